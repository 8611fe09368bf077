"""DPO: its loss against slow references, its optimum in a language of nine texts, and its pass over the pairs."""

import functools
import itertools
import math

import pytest
import torch
from conftest import spy
from language import (
    UTILITIES,
    Nine,
    T,
    gradients,
    lines,
    optimum,
    probabilities,
    ragged,
    saved,
    table_model,
    tiny,
    with_other_padding,
)
from off_policy import bugs
from runs import each, fails_with_a_bug, leaves
from torch.nn import functional as F

from algos import dpo

ours = each([dpo])


def make_batch(module, args, rows=6):
    """An actor, a reference and a batch of pairs of all lengths."""
    _, actor, tokens, real = ragged(module, args, rows)
    _, reference, others, others_real = ragged(module, args, rows, seed=1)
    batch = dict(chosen=tokens, chosen_real=real)
    batch |= dict(rejected=others.roll(1, 0), rejected_real=others_real.roll(1, 0))
    return actor, reference, batch


def slow_log_prob(model, tokens, real, temperature):
    """log pi(y|x) of each text, token by token."""
    logits = model(tokens, real, T) / temperature
    sums = []
    for row, keep, rows_of_logits in zip(tokens, real, logits):
        total = 0.0
        for t in range(T):
            if keep[-T + t]:
                total += rows_of_logits[t].log_softmax(-1)[row[-T + t]]
        sums.append(total)
    return torch.stack(sums)


# The loss


@ours
def test_the_first_loss_is_ln_2(module, tmp_path, monkeypatch):
    """Of a run: the actor starts as the reference, so no pair is preferred yet, to the last bit."""
    seen = []
    spy(monkeypatch, module, "dpo_loss", after=lambda output, *_: seen.append(output))
    module.train(tiny(module, tmp_path))
    loss, metrics = seen[0]
    assert torch.equal(loss, -F.logsigmoid(torch.tensor(0.0)))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["chosen_reward"] == metrics["rejected_reward"] == 0
    assert seen[1][0] != loss


@bugs(
    ("dpo", "        reference.load_state_dict(actor.state_dict())\n", ""),
    ("dpo", "ref_rejected = response_log_prob(reference,", "ref_rejected = 0.9 * response_log_prob(reference,"),
    ("dpo", "rejected_reward = args.kl_coef * (rejected - ref_rejected)", "rejected_reward = args.kl_coef * rejected"),
)
def test_ln_2_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_first_loss_is_ln_2, name, old, new)


@ours
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_loss_against_a_loop(module, temperature, tmp_path):
    """Means over tokens in place of sums [trl#789], prompts or padding in the sum [OpenRLHF#465], beta left out."""
    args = tiny(module, tmp_path, kl_coef=0.3, temperature=temperature)
    actor, reference, batch = make_batch(module, args)
    loss, metrics = module.dpo_loss(actor, reference, batch, args)
    sums = {}
    for name in ("chosen", "rejected"):
        for model, who in ((actor, "actor"), (reference, "reference")):
            sums[name, who] = slow_log_prob(model, batch[name], batch[f"{name}_real"], temperature)
    chosen = 0.3 * (sums["chosen", "actor"] - sums["chosen", "reference"])
    rejected = 0.3 * (sums["rejected", "actor"] - sums["rejected", "reference"])
    expected = torch.stack([-(1 / (1 + math.e ** (b - a))).log() for a, b in zip(chosen, rejected)]).mean()
    assert loss.item() == metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["accuracy"].item() == pytest.approx((chosen > rejected).float().mean().item())
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        assert metrics[f"{name}_reward"].item() == pytest.approx(value.mean().item(), rel=1e-4)
        assert metrics[f"{name}_log_prob"].item() == pytest.approx(sums[name, "actor"].mean().item(), rel=1e-4)
    torch.testing.assert_close(gradients(loss, actor), gradients(expected, actor), atol=1e-5, rtol=1e-3)


SUM = "return torch.where(real[:, -T:], log_probs, 0).sum(-1)"


@bugs(
    ("dpo", SUM, SUM.replace("sum(-1)", "mean(-1)")),
    ("dpo", SUM, SUM.replace("sum(-1)", "sum(-1) / real[:, -T:].sum(-1)")),
    ("dpo", SUM, "return log_probs.sum(-1)"),
    ("dpo", "    T = args.max_new_tokens\n    policy", "    T = tokens.shape[1] - 1\n    policy"),
    ("dpo", "-F.logsigmoid(chosen_reward - rejected_reward)", "-F.logsigmoid(rejected_reward - chosen_reward)"),
    ("dpo", "-F.logsigmoid(chosen_reward - rejected_reward)", "F.relu(1 - chosen_reward + rejected_reward)"),
    ("dpo", "chosen_reward = args.kl_coef * (chosen - ref_chosen)", "chosen_reward = chosen - ref_chosen"),
    ("dpo", "(model, tokens, real, T, args.temperature)", "(model, tokens, real, T, 1.0)"),
)
def test_the_loop_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_loss_against_a_loop, name, old, new, temperature=0.7)


class Positions(torch.nn.Module):
    """A policy with logits of its own at each place of a text, whatever stands there."""

    def __init__(self, length):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(length, 22))

    def forward(self, tokens, real, num_tokens):
        return self.logits[-num_tokens - 1 : -1].expand(len(tokens), -1, -1)


@ours
def test_prompts_have_no_gradient(module, tmp_path):
    """Only the places from which tokens of responses were chosen are learned."""
    args = tiny(module, tmp_path)
    _, _, batch = make_batch(module, args)
    P = batch["chosen"].shape[1] - T
    actor = Positions(P + T)
    loss, _ = module.dpo_loss(actor, Positions(P + T), batch, args)
    (gradient,) = torch.autograd.grad(loss, actor.logits)
    used = gradient.abs().sum(1) > 0
    assert used.tolist() == [False] * (P - 1) + [True] * T + [False]


@ours
def test_padding_changes_nothing(module, tmp_path):
    """Loss, gradient and metrics are the same bits whatever numbers the padding has [minimind#298]."""
    args = tiny(module, tmp_path, num_layers=2)
    actor, reference, batch = make_batch(module, args, rows=12)
    other = dict(batch)
    for name in ("chosen", "rejected"):
        other[name] = with_other_padding(batch[name], batch[f"{name}_real"])
    assert (other["chosen"] != batch["chosen"]).sum() > 20
    (one, metrics), (two, other_metrics) = (
        module.dpo_loss(actor, reference, each, args) for each in (batch, other)
    )  # fmt: skip
    assert torch.equal(one, two)
    assert torch.equal(gradients(one, actor), gradients(two, actor))
    assert all(torch.equal(metrics[name], other_metrics[name]) for name in metrics)


@bugs(
    ("dpo", SUM, "return log_probs.sum(-1)"),
    ("dpo", "return real[:, None, None, :] & causal | itself", "return (causal | itself)[None, None]"),
)
def test_padding_sees(request, name, old, new):
    fails_with_a_bug(request, test_padding_changes_nothing, name, old, new)


# The optimum


def all_pairs():
    """Every ordered pair of the nine texts, as often as people choose so: P(y > y') = sigmoid(u(y) - u(y'))."""
    texts = torch.tensor([[0, a, b] for a, b in itertools.product(range(3), range(3))])
    pairs = torch.tensor(list(itertools.permutations(range(9), 2)))
    u = UTILITIES.flatten()
    counts = (30 * torch.sigmoid(u[pairs[:, 0]] - u[pairs[:, 1]])).round().long()
    chosen, rejected = (texts[column.repeat_interleave(counts)] for column in pairs.T)
    real = torch.ones_like(chosen, dtype=torch.bool)
    return dict(chosen=chosen, chosen_real=real, rejected=rejected, rejected_real=real)


def train_on_nine(module, folder, monkeypatch, **given):
    """A run on all pairs of the language of nine, and what reference and actor do there at the end."""
    torch.manual_seed(5)
    made = table_model(module)
    pairs = all_pairs()
    monkeypatch.setattr(module, "Reviews", lambda _: Nine())
    monkeypatch.setattr(module, "make_language_model", lambda *_: made)
    monkeypatch.setattr(module, "collect_pairs", lambda *_: (pairs, {}))
    settings = dict(
        max_new_tokens=2, sft_steps=0, batch_size=len(pairs["chosen"]), learning_rate=0.1, max_grad_norm=100.0,
        total_timesteps=150 * 4 * len(pairs["chosen"]), log_responses=1,
    )  # fmt: skip
    module.train(tiny(module, folder, **settings | given))
    found = saved(folder)
    models = []
    for name in ("reference", "actor"):
        _, model = table_model(module)
        model.load_state_dict(found[name])
        models.append(probabilities(model))
    return models


@ours
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_the_optimum_of_nine_texts(module, beta, tmp_path, monkeypatch):
    """From all pairs, DPO ends where PPO ends with the utilities as rewards: at pi_ref exp(r / beta) / Z."""
    reference, actor = train_on_nine(module, tmp_path, monkeypatch, kl_coef=beta)
    best = optimum(reference, UTILITIES, beta)
    assert (best * (best / actor).log()).sum() < 0.01
    assert (best * (best / reference).log()).sum() > 0.1


@bugs(
    ("dpo", SUM, SUM.replace("sum(-1)", "mean(-1)")),
    ("dpo", "chosen_reward - rejected_reward).mean()", "rejected_reward - chosen_reward).mean()"),
    ("dpo", "loss = -F.logsigmoid(chosen_reward - rejected_reward)", "loss = -F.logsigmoid(chosen - rejected)"),
    ("dpo", "gradients, metrics = dpo_gradients(actor, reference, batch, args)",
     "gradients, metrics = dpo_gradients(actor, copy.deepcopy(actor), batch, args)"),
)  # fmt: skip
def test_the_optimum_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_optimum_of_nine_texts, name, old, new, beta=1.0)


# The run


@ours
def test_each_pair_once_in_a_pass(module, tmp_path, monkeypatch):
    """Pairs drawn with replacement, orders that repeat, pairs whose columns are shuffled apart; steps are tokens."""
    seen = []
    spy(monkeypatch, module, "dpo_loss", before=lambda _, __, batch, ___: seen.append(batch))
    module.train(tiny(module, tmp_path, num_pairs=12, batch_size=6, total_timesteps=400))
    pairs = saved(tmp_path)["phases"]["pairs"]
    rows = {name: torch.cat([batch[name] for batch in seen[:4]]) for name in pairs}
    assert len(rows["chosen"]) == 24

    def texts(columns):
        return [tuple(map(tuple, parts)) for parts in zip(*(columns[name].tolist() for name in sorted(columns)))]

    once = texts(rows)
    assert sorted(once[:12]) == sorted(once[12:]) == sorted(texts(pairs))
    assert once[:12] != once[12:]
    step = 0
    for batch, row in zip(seen, lines(tmp_path), strict=True):
        step += sum(int(batch[f"{name}_real"][:, -T:].sum()) for name in ("chosen", "rejected"))
        assert row["global_step"] == step


@bugs(
    ("dpo", "torch.randperm(len(pairs[\"chosen\"]), generator=generator).split",
     "torch.randint(len(pairs[\"chosen\"]), (99,)).split"),
    ("dpo", "        for rows in torch.randperm(len(pairs[\"chosen\"]), generator=generator).split",
     "        for rows in torch.arange(len(pairs[\"chosen\"])).split"),
    ("dpo", "yield {name: column[rows] for", "yield {name: column[torch.randperm(len(column))[:6]] for"),
    ("dpo", "+ batch[\"rejected_real\"][:, -T:].sum()", ""),
    ("dpo", "batch[\"chosen_real\"][:, -T:].sum() +", "batch[\"chosen_real\"].sum() +"),
)  # fmt: skip
def test_a_pass_sees(request, name, old, new):
    fails_with_a_bug(request, test_each_pair_once_in_a_pass, name, old, new)


@ours
def test_a_resumed_run_goes_on_in_the_pass(module, tmp_path, monkeypatch):
    """Interrupted runs that see some pairs twice and others never: the batches are those of one run in one go."""
    seen = []
    spy(monkeypatch, module, "dpo_loss", before=lambda _, __, batch, ___: seen.append(batch["chosen"].tolist()))
    module.train(tiny(module, tmp_path / "whole", num_pairs=12, batch_size=3, total_timesteps=400))
    whole = seen.copy()
    seen.clear()
    module.train(tiny(module, tmp_path / "parts", num_pairs=12, batch_size=3, total_timesteps=60))
    assert 0 < len(seen) < len(whole)
    module.train(module.parse_args(["--resume", str(tmp_path / "parts" / "run"), "--total-timesteps", "400"]))
    assert seen == whole


@bugs(
    ("dpo", "torch.Generator().manual_seed(env_seed(args.seed, 0))", "None"),
    ("dpo", "        if step <= run.step:\n            continue", "        if False:\n            continue"),
    ("dpo", "if step <= run.step:", "if step < run.step:"),
)
def test_going_on_in_the_pass_sees(request, name, old, new):
    fails_with_a_bug(request, test_a_resumed_run_goes_on_in_the_pass, name, old, new)


@ours
def test_reference_and_actor(module, tmp_path, monkeypatch):
    """The reference is what wrote the pairs, to the bit, and the actor starts there and leaves."""
    states = []
    spy(
        monkeypatch,
        module,
        "collect_pairs",
        before=lambda model, *_: states.append({name: leaf.clone() for name, leaf in model.state_dict().items()}),
    )
    module.train(tiny(module, tmp_path))
    found = saved(tmp_path)
    assert all(torch.equal(found["reference"][name], leaf) for name, leaf in states[0].items())
    assert any(not torch.equal(found["actor"][name], leaf) for name, leaf in states[0].items())


@ours
def test_what_the_log_has(module, tmp_path):
    """Displacement can be seen: log-probabilities of chosen and rejected texts, beside true reward and KL."""
    module.train(tiny(module, tmp_path))
    wanted = """loss accuracy chosen_log_prob rejected_log_prob chosen_reward rejected_reward gold_reward kl
    eos_fraction distinct_fraction"""
    for row in lines(tmp_path):
        assert set(wanted.split()) <= row.keys()
        assert row["gold_reward"] == pytest.approx(row["episodic_return"], abs=1e-5)
        assert row["episodes"] == 4


@ours
def test_learning_raises_the_chosen_over_the_rejected(module, tmp_path):
    """Through train(), on pairs that prefer one word: the choices are foreseen by the end, and the rewards part."""
    rows = [
        f'{{"prompt": "the food was", "chosen": "good {word}", "rejected": "bad {word}"}}'
        for word in ["and", "but", ".", ","] * 5
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    args = tiny(
        module, tmp_path, preferences=str(tmp_path / "pairs.jsonl"), total_timesteps=2000, learning_rate=0.01
    )  # fmt: skip
    module.train(args)
    last = lines(tmp_path)[-1]
    assert last["accuracy"] == 1
    assert last["chosen_reward"] > last["rejected_reward"] + 1


@ours
def test_compiled_losses(module, tmp_path, monkeypatch):
    """--compile learns what the eager run learns, in one graph for each loss."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for name, compiled in (("eager", False), ("compiled", True)):
        module.can_compile.cache_clear()
        module.train(tiny(module, tmp_path / name, compile=compiled, learning_rate=0.01, sft_steps=0, num_pairs=24))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one to find out whether there is a compiler
    one, two = (leaves(saved(tmp_path / name)) for name in ("eager", "compiled"))
    for name, leaf in one.items():
        if name.startswith("/actor/"):
            torch.testing.assert_close(two[name], leaf, atol=1e-4, rtol=1e-3)
