"""PPO-RLHF: its equations against slow references, its optimum in a language of nine texts, and its four models."""

import functools
import itertools
import json
import math

import language
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

from algos import ppo_rlhf

ours = each([ppo_rlhf])


def make_batch(module, args, rows=6):
    """An actor and a critic with a batch of texts of all lengths."""
    _, actor, tokens, real = ragged(module, args, rows)
    _, other, *_ = ragged(module, args, rows, seed=1)
    critic = module.Critic(other.body)
    torch.nn.init.normal_(critic.head.weight)
    with torch.no_grad():
        policy = module.response_policy(actor, tokens, real, T, args.temperature)
        log_probs = policy.log_prob(tokens[:, -T:]) + 0.3 * torch.randn(rows, T)
    batch = dict(tokens=tokens, real=real, log_probs=log_probs)
    batch |= dict(advantages=torch.randn(rows, T), returns=torch.randn(rows, T))
    return actor, critic, batch


# Rewards and advantages


@ours
def test_the_score_comes_with_the_last_token(module):
    """A score on the token behind the end [trl#3750], a KL that padding pays, a KL of the wrong sign."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    log_ratio = torch.randn(3, 4)
    rewards, last = module.token_rewards(torch.tensor([5.0, -2.0, 7.0]), log_ratio, mask, 0.5)
    assert last.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
    for row, (score, end) in enumerate([(5.0, 1), (-2.0, 3), (7.0, 0)]):
        for t in range(4):
            expected = -0.5 * log_ratio[row, t].item() if t <= end else 0.0
            assert rewards[row, t].item() == pytest.approx(expected + score * (t == end))


REWARDS = "return scores[:, None] * last - beta * log_ratio * mask, last"


@bugs(
    ("ppo_rlhf", "after = F.pad(mask, (0, 1))[:, 1:]", "after = F.pad(mask, (0, 1), value=True)[:, 1:]"),
    ("ppo_rlhf", "last = mask & ~after", "last = ~mask & F.pad(mask, (1, 0))[:, :-1]"),
    ("ppo_rlhf", REWARDS, REWARDS.replace("- beta", "+ beta")),
    ("ppo_rlhf", REWARDS, REWARDS.replace(" * mask", "")),
    ("ppo_rlhf", REWARDS, REWARDS.replace("[:, None] * last", "[:, None] * mask")),
)
def test_rewards_see(request, name, old, new):
    fails_with_a_bug(request, test_the_score_comes_with_the_last_token, name, old, new)


class Stop(Exception):
    """What ends a run when enough was seen."""


def first_batch(module, folder, monkeypatch, steps=1, **given):
    """The batches of the first gradient steps of a run's PPO, with the actor as it was then, by a copy."""
    seen = []
    gradients_of = module.gradients_of

    def watched_gradients_of(loss, parameters, args, **options):
        function = gradients_of(loss, parameters, args, **options)

        def watched(model, batch, num_tokens, args):
            if loss.__name__ == "policy_loss":
                policy = module.response_policy(model, batch["tokens"], batch["real"], args.max_new_tokens, 0.7)
                seen.append(batch | dict(now=policy.log_prob(batch["tokens"][:, -args.max_new_tokens :]).detach()))
                if len(seen) == steps:
                    raise Stop
            return function(model, batch, num_tokens, args)

        return watched if loss.__name__ in ("policy_loss", "value_loss") else function

    args = tiny(module, folder, **given)
    with monkeypatch.context() as patch:
        patch.setattr(module, "gradients_of", watched_gradients_of)
        with pytest.raises(Stop):
            module.train(args)
    return seen


def write_prompts(folder):
    """A file of prompts of one to four words."""
    (folder / "prompts.txt").write_text("the\nthe food\nthe food was\nthe food was not\n")
    return str(folder / "prompts.txt")


@ours
def test_advantages_of_lambda_0(module, tmp_path, monkeypatch):
    """Of a critic that says 0: only the last token has an advantage, its score; what has no end pays for it."""
    given = dict(reward_model="language:length", kl_coef=0.0, gae_lambda=0.0, norm_advantages=False, num_minibatches=1)
    given |= dict(num_responses=60, total_timesteps=1000, missing_eos_penalty=10.0, prompts=write_prompts(tmp_path))
    scores = []
    spy(monkeypatch, module, "score", after=lambda found, *_: scores.append(found))
    (batch,) = first_batch(module, tmp_path, monkeypatch, **given)
    mask = batch["real"][:, -T:]
    end = (batch["tokens"][:, -T:] == 1) & mask
    assert 3 < end.any(1).sum() < 57
    words = batch["real"].sum(1) - end.sum(1)
    length = mask.sum(1)
    for row, advantages in enumerate(batch["advantages"].tolist()):
        same = words == words[row]
        assert advantages[length[row] - 1] != 0
        assert sum(advantage != 0 for advantage in advantages[: length[row]]) == 1
        ended = end[row].any()
        for other in same.nonzero().flatten().tolist():
            gap = advantages[length[row] - 1] - batch["advantages"][other, length[other] - 1].item()
            assert gap == pytest.approx(10.0 * (int(ended) - int(end[other].any())), abs=1e-4)
    assert torch.equal(batch["returns"], batch["advantages"])


PENALTY = "args.missing_eos_penalty * ~ended"


@bugs(
    ("ppo_rlhf", PENALTY, "args.missing_eos_penalty * ended"),
    ("ppo_rlhf", PENALTY, "args.missing_eos_penalty * (tokens[:, -1] != tokenizer.end)"),
    ("ppo_rlhf", "returns = advantages + values[:, :-1]", "returns = advantages + values[:, :-1] + 1"),
)
def test_lambda_0_sees(request, name, old, new):
    fails_with_a_bug(request, test_advantages_of_lambda_0, name, old, new)


@ours
def test_every_real_token_counts(module, tmp_path, monkeypatch):
    """With lambda 1, as many advantages as real tokens are not 0, among them those of ends."""
    given = dict(reward_model="language:length", gae_lambda=1.0, norm_advantages=False, num_minibatches=1)
    (batch,) = first_batch(module, tmp_path, monkeypatch, num_responses=40, total_timesteps=1000, **given)
    mask = batch["real"][:, -T:]
    assert (batch["advantages"] * mask != 0).sum() == mask.sum() < mask.numel()


@ours
def test_advantages_and_returns_of_a_run(module, tmp_path, monkeypatch):
    """By a loop: the critic learns returns of the advantages as they are [torchrl#1033], the actor whitened ones."""
    rewards = []
    values = []
    spy(monkeypatch, module.Critic, "__init__", after=lambda _, critic, *__: torch.nn.init.normal_(critic.head.weight))
    spy(monkeypatch, module.Critic, "forward", after=lambda found, *_: values.append(found))
    spy(monkeypatch, module, "token_rewards", after=lambda found, *_: rewards.append(found[0]))
    monkeypatch.setattr(module.torch, "randperm", lambda n, **_: torch.arange(n))
    given = dict(reward_model="language:length", num_responses=40, total_timesteps=1000, num_minibatches=1)
    (batch,) = first_batch(module, tmp_path, monkeypatch, gamma=0.9, gae_lambda=0.7, **given)
    mask = batch["real"][:, -T:]
    expected = torch.zeros(40, T)
    for row, length in enumerate(mask.sum(1).tolist()):
        following = 0.0  # there is no value behind the last token
        advantage = 0.0
        for t in reversed(range(length)):
            value = values[0][row, t].item()
            advantage = rewards[0][row, t].item() + 0.9 * following - value + 0.9 * 0.7 * advantage
            expected[row, t] = advantage
            following = value
    torch.testing.assert_close(batch["returns"][mask], (expected + values[0][:, :-1])[mask], atol=1e-4, rtol=1e-4)
    real = expected[mask]
    assert 40 < len(real) < 40 * T
    torch.testing.assert_close(
        batch["advantages"][mask], (real - real.mean()) / real.std(correction=0), atol=1e-3, rtol=1e-3
    )


@bugs(
    ("ppo_rlhf", "last.T, last.T, args.gamma, args.gae_lambda)", "last.T, last.T, args.gae_lambda, args.gamma)"),
    ("ppo_rlhf", "returns = advantages + values", "returns = whiten(advantages, mask) + values"),
    ("ppo_rlhf", "advantages = whiten(advantages, mask)", "advantages = whiten(advantages, mask | True)"),
)
def test_advantages_and_returns_see(request, name, old, new):
    fails_with_a_bug(request, test_advantages_and_returns_of_a_run, name, old, new)


# The ratio


@ours
def test_the_first_ratio_is_1(module, tmp_path, monkeypatch):
    """Ragged prompts, temperature 0.7: what generated, what is stored and what learns are one policy at every token."""
    given = dict(prompts=write_prompts(tmp_path), reward_model="language:length", temperature=0.7)
    logits = []
    generate = module.generate

    def watched(model, *inputs):
        handle = model.head.register_forward_hook(lambda *parts: logits.append(parts[-1] / 0.7))
        try:
            return generate(model, *inputs)
        finally:
            handle.remove()

    monkeypatch.setattr(module, "generate", watched)
    monkeypatch.setattr(module.torch, "randperm", lambda n, **_: torch.arange(n))
    for minibatches in (1, 2):
        logits.clear()
        folder = tmp_path / str(minibatches)
        (batch,) = first_batch(module, folder, monkeypatch, num_minibatches=minibatches, num_responses=8, **given)
        mask = batch["real"][:, -T:]
        ratio = (batch["now"] - batch["log_probs"])[mask].exp()
        if minibatches == 1:
            assert (ratio == 1).all()
        assert ratio == pytest.approx(1, abs=1e-6)
        generated = torch.stack(logits[-T:], dim=1).log_softmax(-1)[: len(mask)]
        generated = generated.gather(-1, batch["tokens"][:, -T:, None]).squeeze(-1)
        torch.testing.assert_close(batch["log_probs"][mask], generated[mask], atol=1e-5, rtol=1e-5)


@bugs(
    ("ppo_rlhf", "log_probs = response_policy(actor, tokens, real, T, args.temperature)",
     "log_probs = response_policy(actor, tokens, real, T, 1.0)"),
    ("ppo_rlhf", "return (real.cumsum(1) - 1).clamp(min=0)",
     "L = real.shape[1]\n    return torch.arange(L).expand_as(real) if L == 9 else (real.cumsum(1) - 1).clamp(min=0)"),
    ("ppo_rlhf", "x = x + self.output(y.transpose", "x = F.dropout(x, 0.1) + self.output(y.transpose"),
)  # fmt: skip
def test_the_ratio_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_first_ratio_is_1, name, old, new)


@ours
def test_temperature_of_the_loss(module, tmp_path):
    """Probabilities in the loss at another temperature than in the batch [trl#3029]: here the ratio is 1."""
    args = tiny(module, tmp_path, temperature=0.7)
    actor, _, batch = make_batch(module, args)
    with torch.no_grad():
        logits = actor(batch["tokens"], batch["real"], T) / 0.7
    batch["log_probs"] = logits.log_softmax(-1).gather(-1, batch["tokens"][:, -T:, None]).squeeze(-1)
    _, metrics = module.policy_loss(actor, batch, batch["real"][:, -T:].sum(), args)
    assert metrics["approx_kl"].item() == pytest.approx(0, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    mask = batch["real"][:, -T:]
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)[mask].mean().item()
    assert metrics["entropy"].item() == pytest.approx(entropy, rel=1e-4)


@bugs(
    ("ppo_rlhf", 'batch["real"], T, args.temperature)', 'batch["real"], T, 1.0)'),
    ("ppo_rlhf", "model(tokens, real, num_tokens) / temperature", "model(tokens, real, num_tokens)"),
)
def test_temperature_sees(request, name, old, new):
    fails_with_a_bug(request, test_temperature_of_the_loss, name, old, new)


# Losses


@ours
def test_losses_against_a_loop(module, tmp_path):
    """The clipped surrogate and the squared errors, token by token; ends have a gradient like every other token."""
    args = tiny(module, tmp_path)
    actor, critic, batch = make_batch(module, args)
    mask = batch["real"][:, -T:]
    num_tokens = mask.sum()
    policy, _ = module.policy_loss(actor, batch, num_tokens, args)
    value, metrics = module.value_loss(critic, batch, num_tokens, args)
    now = actor(batch["tokens"], batch["real"], T).log_softmax(-1)
    values = critic(batch["tokens"], batch["real"], T)
    total, squares = 0, 0
    for row, t in mask.nonzero().tolist():
        ratio = (now[row, t, batch["tokens"][row, -T + t]] - batch["log_probs"][row, t]).exp()
        advantage = batch["advantages"][row, t]
        total += torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        squares += (values[row, t] - batch["returns"][row, t]) ** 2
    assert policy.item() == pytest.approx(-total.item() / num_tokens.item(), rel=1e-4)
    assert value.item() == metrics["value_loss"].item() == pytest.approx(squares.item() / num_tokens.item(), rel=1e-4)

    ends = (batch["tokens"][:, -T:] == 1) & mask
    assert ends.any()
    alone = batch | dict(
        advantages=batch["advantages"] * ends,
        log_probs=now.gather(-1, batch["tokens"][:, -T:, None]).squeeze(-1).detach(),
    )
    assert gradients(module.policy_loss(actor, alone, num_tokens, args)[0], actor).abs().max() > 1e-3


@bugs(
    ("ppo_rlhf", "-torch.min(ratio * advantages, clipped_ratio * advantages)", "-ratio * advantages"),
    ("ppo_rlhf", "ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)", "ratio.clamp(1 - args.clip_coef)"),
    ("ppo_rlhf", "T)[:, :-1]\n", "T)[:, 1:]\n"),
    ("ppo_rlhf", "errors.square().sum() / tokens_per_minibatch", "errors.square().mean()"),
)
def test_losses_see(request, name, old, new):
    fails_with_a_bug(request, test_losses_against_a_loop, name, old, new)


@ours
def test_padding_changes_nothing(module, tmp_path):
    """Losses, gradients and metrics are the same bits whatever numbers the padding has [trl#2022]."""
    args = tiny(module, tmp_path, num_layers=2)
    actor, critic, batch = make_batch(module, args, rows=12)
    other = batch | dict(tokens=with_other_padding(batch["tokens"], batch["real"]))
    padding = ~batch["real"][:, -T:]
    for name in ("log_probs", "advantages", "returns"):
        other[name] = torch.where(padding, 7.0, batch[name])
    assert (other["tokens"] != batch["tokens"]).sum() > 20
    num_tokens = batch["real"][:, -T:].sum()
    for loss, model in ((module.policy_loss, actor), (module.value_loss, critic)):
        (one, metrics), (two, other_metrics) = (loss(model, each, num_tokens, args) for each in (batch, other))
        assert torch.equal(one, two)
        assert torch.equal(gradients(one, model), gradients(two, model))
        assert all(torch.equal(metrics[name], other_metrics[name]) for name in metrics)
    reward_model = module.RewardModel(critic.body)
    torch.nn.init.normal_(reward_model.head.weight)
    pairs, other_pairs = (
        dict(chosen=each["tokens"][:6], rejected=each["tokens"][6:], chosen_real=batch["real"][:6],
             rejected_real=batch["real"][6:]) for each in (batch, other)
    )  # fmt: skip
    one, two = (module.reward_loss(reward_model, each)[0] for each in (pairs, other_pairs))
    assert torch.equal(one, two)
    assert torch.equal(gradients(one, reward_model), gradients(two, reward_model))


MEAN = "return torch.where(mask, x, 0).sum() / tokens_per_minibatch"


@bugs(
    ("ppo_rlhf", MEAN, "return x.mean()"),
    ("ppo_rlhf", 'torch.where(batch["real"][:, -T:], values - batch["returns"], 0)', '(values - batch["returns"])'),
    ("ppo_rlhf", "return real[:, None, None, :] & causal | itself", "return (causal | itself)[None, None]"),
    ("ppo_rlhf", "last = (torch.arange(real.shape[1], device=real.device) * real).argmax(-1)",
     "last = torch.full_like(tokens[:, 0], -1)"),
)  # fmt: skip
def test_padding_sees(request, name, old, new):
    fails_with_a_bug(request, test_padding_changes_nothing, name, old, new)


@ours
def test_minibatches_add_up(module, tmp_path):
    """Means over each minibatch [open-instruct#1161]: tokens of short responses would count for more than others."""
    args = tiny(module, tmp_path)
    actor, critic, batch = make_batch(module, args, rows=12)
    num_tokens = batch["real"][:, -T:].sum()
    for loss, model in ((module.policy_loss, actor), (module.value_loss, critic)):
        whole = gradients(loss(model, batch, num_tokens, args)[0], model)
        for k in (2, 3, 12):
            parts = [{name: column[i::k] for name, column in batch.items()} for i in range(k)]
            mean = sum(gradients(loss(model, part, num_tokens / k, args)[0], model) for part in parts) / k
            torch.testing.assert_close(mean, whole, atol=1e-5, rtol=1e-3)


@bugs(
    ("ppo_rlhf", MEAN, "return torch.where(mask, x, 0).sum() / mask.sum()"),
    ("ppo_rlhf", "errors.square().sum() / tokens_per_minibatch", "errors.square().sum() / (errors != 0).sum()"),
)
def test_minibatches_see(request, name, old, new):
    fails_with_a_bug(request, test_minibatches_add_up, name, old, new)


@ours
def test_the_minibatches_of_a_run_share_its_tokens(module, tmp_path, monkeypatch):
    """What train() divides by: the real tokens of the batch per minibatch."""
    seen = []
    spy(monkeypatch, module, "policy_loss", before=lambda _, batch, num_tokens, __: seen.append((batch, num_tokens)))
    module.train(tiny(module, tmp_path, num_minibatches=3))
    for i in range(0, len(seen), 3):
        real = sum(batch["real"][:, -T:].sum() for batch, _ in seen[i : i + 3])
        assert {(3 * num_tokens).item() for _, num_tokens in seen[i : i + 3]} == {real.item()}
    assert len(seen) > 6


# KL

P = torch.tensor([0.7, 0.3], dtype=torch.float64)
Q = torch.tensor([0.4, 0.6], dtype=torch.float64)


class OneToken(torch.nn.Module):
    """A policy of one token of two, whatever the text."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, tokens, real, num_tokens):
        return self.logits.expand(len(tokens), num_tokens, 2)


def two_texts(module, old, args):
    """The batch of both texts of one token, drawn from `old`."""
    tokens = torch.tensor([[0, 0], [0, 1]])
    return dict(tokens=tokens, real=torch.ones(2, 2, dtype=torch.bool), log_probs=old.log()[:, None])


@ours
def test_kl_to_six_digits(module, tmp_path):
    """KL(p || q) = 0.183787: the mean of what tokens pay, and of the log's approx_kl; reversed it is 0.191213."""
    args = tiny(module, tmp_path, max_new_tokens=1)
    rewards, _ = module.token_rewards(torch.zeros(2), (P / Q).log()[:, None], torch.ones(2, 1).bool(), 1.0)
    assert -(P * rewards[:, 0]).sum().item() == pytest.approx(0.183787, abs=5e-7)

    batch = two_texts(module, P, args)
    approx = []
    for row in range(2):
        one = {name: column[row : row + 1] for name, column in batch.items()} | dict(advantages=torch.ones(1, 1))
        _, metrics = module.policy_loss(OneToken(Q.log()), one, torch.tensor(1), args)
        approx.append(metrics["approx_kl"])
    assert (P * torch.stack(approx)).sum().item() == pytest.approx(0.183787, abs=5e-7)


@bugs(
    ("ppo_rlhf", "approx_kl=mean(ratio - 1 - log_ratio)", "approx_kl=mean(1 / ratio - 1 + log_ratio)"),
    ("ppo_rlhf", "- beta * log_ratio * mask, last", "- beta * (log_ratio.exp() - 1 - log_ratio) * mask, last"),
)
def test_kl_sees(request, name, old, new):
    fails_with_a_bug(request, test_kl_to_six_digits, name, old, new)


@ours
def test_the_gradient_of_the_kl(module, tmp_path):
    """As a reward the log-ratio has the gradient of the KL, 0.2631 by the first logit; as a loss it would have none."""
    args = tiny(module, tmp_path, max_new_tokens=1, clip_coef=0.2)
    actor = OneToken(P.log())
    rewards, _ = module.token_rewards(torch.zeros(2), (P / Q).log()[:, None], torch.ones(2, 1).bool(), 1.0)
    batch = two_texts(module, P, args) | dict(advantages=rewards * P[:, None])  # each text with its probability
    (gradient,) = torch.autograd.grad(module.policy_loss(actor, batch, torch.tensor(1), args)[0], actor.logits)
    logits = P.log().requires_grad_()
    (true,) = torch.autograd.grad((logits.softmax(0) * (logits.log_softmax(0) - Q.log())).sum(), logits)
    assert gradient[0].item() == pytest.approx(true[0].item(), rel=1e-6)
    assert gradient[0].item() == pytest.approx(0.2631, abs=5e-5)


@ours
def test_controller(module, tmp_path):
    """Exact values at, inside and beyond the clip; a fifth in `kl_horizon` responses, not tokens or batches."""
    args = tiny(module, tmp_path, target_kl=4.0, kl_horizon=100)
    for kl, change in ((4.0, 0.0), (4.4, 0.1), (3.8, -0.05), (4.8, 0.2), (40.0, 0.2), (0.0, -0.2), (-1.0, -0.2)):
        controller = module.KLController()
        controller.update(torch.tensor(kl), 10, args)
        assert controller.factor.item() == pytest.approx(1 + change * 10 / 100, rel=1e-6)


@bugs(
    ("ppo_rlhf", ".clamp(-0.2, 0.2)", ".clamp(-0.2)"),
    ("ppo_rlhf", "error * num_responses / args.kl_horizon", "error / args.kl_horizon"),
    ("ppo_rlhf", "kl / args.target_kl - 1", "1 - kl / args.target_kl"),
)
def test_controller_sees(request, name, old, new):
    fails_with_a_bug(request, test_controller, name, old, new)


@ours
def test_beta_in_a_run(module, tmp_path):
    """The KL to the reference moves beta, from its flag on, and the checkpoint has it; without a target it stays."""
    module.train(tiny(module, tmp_path, target_kl=0.5, kl_horizon=60, learning_rate=0.01, kl_coef=0.2))
    rows = lines(tmp_path)
    beta = 0.2
    for row in rows:
        assert row["kl_coef"] == pytest.approx(beta, rel=1e-5)
        beta *= 1 + min(max(row["kl"] / 0.5 - 1, -0.2), 0.2) * 6 / 60
    assert 0.2 * saved(tmp_path)["controller"]["factor"].item() == pytest.approx(beta, rel=1e-5)
    module.train(tiny(module, tmp_path / "fixed", kl_coef=0.3))
    assert {round(row["kl_coef"], 6) for row in lines(tmp_path / "fixed")} == {0.3}
    for row in lines(tmp_path / "fixed"):
        score = row["proxy_reward"] - (1 - row["eos_fraction"])  # the penalty is 1
        assert row["objective"] == pytest.approx(score - 0.3 * row["kl"], abs=1e-5)
    for given in (
        dict(target_kl=-1.0),
        dict(kl_horizon=0),
        dict(kl_coef=-0.1),
        dict(kl_coef=0.0, target_kl=1.0),
        dict(target_kl=1.0, kl_horizon=5),
    ):
        with pytest.raises(module.Refusal):
            tiny(module, tmp_path, **given)


@bugs(
    ("ppo_rlhf", "controller.update(kl, N, args)", "controller.update(proxy.mean(), N, args)"),
    ("ppo_rlhf", "beta = args.kl_coef * controller.factor", "beta = torch.tensor(args.kl_coef)"),
    ("ppo_rlhf", "controller.update(kl, N, args)", "controller.update(kl, T, args)"),
)
def test_beta_sees(request, name, old, new):
    fails_with_a_bug(request, test_beta_in_a_run, name, old, new)


# Whitening


@ours
def test_whitening(module):
    """Over the tokens of the mask alone; and differences of rounding do not become steps."""
    mask = torch.rand(5, 7) < 0.6
    advantages = 3 * torch.randn(5, 7) + 2
    white = module.whiten(torch.where(mask, advantages, 1e6), mask)[mask]
    x = advantages[mask]
    torch.testing.assert_close(white, (x - x.mean()) / ((x - x.mean()) ** 2).mean().sqrt(), atol=1e-5, rtol=1e-5)
    for tiny_numbers in (torch.zeros(5, 7), 1e-9 * torch.randn(5, 7), 0.1 + 1e-8 * torch.randn(5, 7)):
        assert (module.whiten(tiny_numbers, mask) == 0).all()


@ours
def test_a_constant_reward_moves_nothing(module, tmp_path, monkeypatch):
    """Nothing to learn: the policy stays the reference, to the bit, through a whole run."""
    given = dict(reward_model="language:constant", kl_coef=0.0, missing_eos_penalty=0.0, learning_rate=0.01)
    module.train(tiny(module, tmp_path, **given))
    found = saved(tmp_path)
    assert all(torch.equal(found["actor"][name], found["reference"][name]) for name in found["actor"])
    assert {row["kl"] for row in lines(tmp_path)} == {0.0}


@bugs(("ppo_rlhf", " * (deviation > 1e-6)", ""))
def test_whitening_sees(request, name, old, new):
    fails_with_a_bug(request, test_whitening, name, old, new)


@bugs(
    ("ppo_rlhf", "return (scores - self.mean) * self.scale", "return scores * self.scale"),
    ("ppo_rlhf", "scores = scores.cpu().double()  #", "scores = scores.cpu() + 1e-8 * torch.rand_like(scores)  #"),
)
def test_constant_rewards_see(request, name, old, new):
    fails_with_a_bug(request, test_a_constant_reward_moves_nothing, name, old, new)


# The reward model


@ours
def test_the_reward_model_recovers_utilities(module):
    """Bradley and Terry on all pairs of nine texts, with their true frequencies: r = u + constant. At first ln 2."""
    model = module.RewardModel(language.Table())
    texts = torch.tensor([[0, a, b] for a, b in itertools.product(range(3), range(3))])
    pairs = torch.tensor(list(itertools.permutations(range(9), 2)))
    u = UTILITIES.flatten()
    shares = torch.sigmoid(u[pairs[:, 0]] - u[pairs[:, 1]])  # of people who choose the first
    real = torch.ones(len(pairs), 3, dtype=torch.bool)
    batch = dict(chosen=texts[pairs[:, 0]], rejected=texts[pairs[:, 1]], chosen_real=real, rejected_real=real)
    loss, metrics = module.reward_loss(model, batch)
    assert loss.item() == metrics["loss"].item() == pytest.approx(math.log(2), abs=1e-7)

    counts = (200 * shares).round().long()
    rows = torch.arange(len(pairs)).repeat_interleave(counts)
    many = {name: column[rows] for name, column in batch.items()}
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=100)

    def closure():
        optimizer.zero_grad()
        value, _ = module.reward_loss(model, many)
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        found = model(texts, torch.ones(9, 3, dtype=torch.bool))
    torch.testing.assert_close(found - found.mean(), u - u.mean(), atol=0.03, rtol=0)


@bugs(
    ("ppo_rlhf", "-F.logsigmoid(chosen - rejected)", "-F.logsigmoid(rejected - chosen)"),
    ("ppo_rlhf", "-F.logsigmoid(chosen - rejected)", "F.relu(1 - chosen + rejected)"),
    ("ppo_rlhf", "-F.logsigmoid(chosen - rejected)", "-F.logsigmoid(2 * chosen - 2 * rejected)"),
)
def test_utilities_see(request, name, old, new):
    fails_with_a_bug(request, test_the_reward_model_recovers_utilities, name, old, new)


@ours
def test_the_score_of_a_text(module, tmp_path):
    """Read off at its last real token, however much padding follows or goes before; shifted and scaled as measured."""
    args = tiny(module, tmp_path)
    tokenizer, model, tokens, real = ragged(module, args)
    reward_model = module.RewardModel(model.body)
    torch.nn.init.normal_(reward_model.head.weight)
    scores = reward_model(tokens, real)
    for row, keep, found in zip(tokens, real, scores):
        alone = row[keep][None]
        features = model.body(alone, torch.ones_like(alone, dtype=torch.bool))[0, -1]
        assert found.item() == pytest.approx(reward_model.head(features).item(), abs=1e-4)
    longer = torch.nn.functional.pad(tokens, (0, 3)), torch.nn.functional.pad(real, (0, 3))
    torch.testing.assert_close(reward_model(*longer), scores)
    reward_model.norm.fit(scores.detach())
    torch.testing.assert_close(reward_model(tokens, real), (scores - scores.mean()) / scores.std())
    assert tokenizer.end == 1


@ours
def test_scores_of_the_reference_have_mean_0_and_deviation_1(module, tmp_path, monkeypatch):
    """Scores that are not normalised, or not by the texts of the reference: here it goes on writing them."""
    found = []
    spy(monkeypatch, module, "score", after=lambda scores, *_: found.append(scores))
    given = dict(reward_model="language:letters", learning_rate=0.0, num_responses=64, total_timesteps=2000)
    module.train(tiny(module, tmp_path, **given))
    assert found[0].mean() > 20
    assert found[0].std() > 2
    later = torch.cat(found[1:])
    assert later.mean().item() == pytest.approx(0, abs=0.15)
    assert later.std().item() == pytest.approx(1, abs=0.15)


@ours
def test_what_people_chose_is_learned(module, tmp_path):
    """Through train(): pairs of one's own that prefer one word; the held-out ones are foreseen, texts with it score."""
    rows = [dict(prompt="the food was", chosen=f"good {w}", rejected=f"bad {w}") for w in ["and", "but", ".", ","] * 20]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = tiny(module, tmp_path, preferences=str(tmp_path / "pairs.jsonl"), rm_epochs=5, rm_learning_rate=0.01)
    assert module.train(args)["rm_accuracy"] == 1.0


@ours
def test_a_tenth_of_the_pairs_is_held_out(module, tmp_path, monkeypatch):
    """Choices that were learned are no measure of what is foreseen."""
    rows = [dict(prompt="the food was", chosen=f"good w{i}", rejected=f"bad w{i}") for i in range(50)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    learned = set()
    judged = set()
    spy(
        monkeypatch, module, "reward_loss", before=lambda _, batch: learned.update(map(tuple, batch["chosen"].tolist()))
    )
    spy(monkeypatch, module, "score", before=lambda _, tokens, __: judged.update(map(tuple, tokens.tolist())))
    spy(monkeypatch, module.ScoreNorm, "fit", before=lambda *_: monkeypatch.undo())  # what is judged later is sampled
    module.train(tiny(module, tmp_path, preferences=str(tmp_path / "pairs.jsonl")))
    assert len(learned) == 45
    assert not learned & judged


@bugs(("ppo_rlhf", "    rows = rows[len(held_out) :]\n", ""))
def test_held_out_pairs_see(request, name, old, new):
    fails_with_a_bug(request, test_a_tenth_of_the_pairs_is_held_out, name, old, new)


# The optimum


def train_on_nine(module, folder, monkeypatch, **given):
    """A run in the language of nine, what the reference and the actor do there at the end, and the rewards."""
    torch.manual_seed(5)
    made = table_model(module)
    monkeypatch.setattr(module, "Reviews", lambda _: Nine())
    monkeypatch.setattr(module, "make_language_model", lambda *_: made)
    settings = dict(
        reward_model="language:utility", missing_eos_penalty=0.0, max_new_tokens=2, num_responses=128,
        total_timesteps=256 * 100, sft_steps=0, norm_advantages=False, gae_lambda=1.0, learning_rate=0.15,
        num_minibatches=1, update_epochs=1, max_grad_norm=100.0, clip_coef=0.2,
    )  # fmt: skip
    module.train(tiny(module, folder, **settings | given))
    found = saved(folder)
    models = []
    for name in ("reference", "actor"):
        _, model = table_model(module)
        model.load_state_dict(found[name])
        models.append(probabilities(model) if given.get("temperature", 1) == 1 else model)
    norm = found["reward_model"]
    rewards = (UTILITIES - norm["norm.mean"]) * norm["norm.scale"]
    return *models, rewards, found


@ours
@pytest.mark.parametrize("beta", [0.5, 1.0, 30.0])
def test_the_optimum_of_nine_texts(module, beta, tmp_path, monkeypatch):
    """PPO ends at pi_ref exp(r / beta) / Z; where beta is large that is the reference, where small the best text.

    The critic ends at what the rest of the text is worth: E[r - beta log(pi / pi_ref)] of the tokens to come.
    """
    rate = 0.15 / max(beta, 1)
    reference, actor, rewards, found = train_on_nine(module, tmp_path, monkeypatch, kl_coef=beta, learning_rate=rate)
    best = optimum(reference, rewards, beta)
    assert (best * (best / actor).log()).sum() < 0.01
    if beta == 30:
        return
    assert (best * (best / reference).log()).sum() > 0.1
    if beta == 1:
        second, second_reference = (p / p.sum(1, keepdim=True) for p in (actor, reference))
        worth = (second * (rewards - beta * (second / second_reference).log())).sum(1)
        values = found["critic"]["head.weight"][0] + found["critic"]["head.bias"]
        torch.testing.assert_close(values[1:4], worth, atol=0.1, rtol=0)
        first, first_reference = actor.sum(1), reference.sum(1)
        start = (first * (worth - beta * (first / first_reference).log())).sum()
        assert values[0].item() == pytest.approx(start.item(), abs=0.1)


@bugs(
    ("ppo_rlhf", "- beta * log_ratio * mask, last", "+ beta * log_ratio * mask, last"),
    ("ppo_rlhf", "- beta * log_ratio * mask, last", "- 0 * log_ratio * mask, last"),
    ("ppo_rlhf", "log_probs - ref_log_probs", "log_probs - log_probs"),
    ("ppo_rlhf", "log_probs - ref_log_probs", "2 * log_probs - 2 * ref_log_probs"),
    ("ppo_rlhf", "scores[:, None] * last", "scores[:, None] * mask"),
    (
        "ppo_rlhf",
        "compute_gae(rewards.T, values.T, last.T, last.T",
        "compute_gae(rewards.T, values.T, last.T, last.T | True",
    ),
)
def test_the_optimum_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_optimum_of_nine_texts, name, old, new, beta=1.0)


@ours
def test_the_optimum_at_another_temperature(module, tmp_path, monkeypatch):
    """All policies are tempered, the reference, too: the optimum is that of softmax(logits / T)."""
    reference, actor, rewards, _ = train_on_nine(module, tmp_path, monkeypatch, kl_coef=1.0, temperature=0.7)
    for model in (reference, actor):
        model.head.weight.data /= 0.7
    best = optimum(probabilities(reference), rewards, 1.0)
    assert (best * (best / probabilities(actor)).log()).sum() < 0.01


# The four models


@ours
def test_four_models(module, tmp_path, monkeypatch):
    """Reference and reward model are what they were before PPO; an actor's step moves no critic, and the reverse."""
    states = []

    def copy_of(run):
        return {name: part.state_dict() for name, part in run.parts.items() if isinstance(part, torch.nn.Module)}

    spy(monkeypatch, module.Phases, "end", after=lambda _, __, ___, run, *____: states.append(leaves_of(copy_of(run))))
    moved = set()
    runs = []
    spy(monkeypatch, module.Run, "__init__", after=lambda _, run, *__, **___: runs.append(run))

    def before(optimizer, gradients):
        runs[0].before = leaves_of(copy_of(runs[0]))

    def after(_, optimizer, gradients):
        now = leaves_of(copy_of(runs[0]))
        names = {name.split("/")[1] for name in now if not torch.equal(now[name], runs[0].before[name])}
        if "reward model" in runs[0].parts["phases"].done:
            moved.add(frozenset(names))

    spy(monkeypatch, module, "descend", before=before, after=after)
    started = []  # from which the reward model is fitted
    spy(monkeypatch, module, "fit_reward_model", before=lambda model, *_: started.append(leaves_of(model.state_dict())))
    module.train(tiny(module, tmp_path, total_timesteps=100))
    end = leaves(saved(tmp_path))
    for name, leaf in states[-1].items():
        frozen = name.startswith(("/reference", "/reward_model"))
        assert torch.equal(end[name], leaf) or not frozen, name
    assert moved == {frozenset(["actor"]), frozenset(["critic"])}
    for name in ("token_embedding.weight", "blocks.0.output.weight"):
        assert torch.equal(states[-1][f"/critic/body.{name}"], states[-1][f"/reward_model/body.{name}"])
        assert torch.equal(states[-1][f"/actor/body.{name}"], states[-1][f"/reference/body.{name}"])
        assert torch.equal(started[0][f"/body.{name}"], states[-1][f"/reference/body.{name}"])
        assert torch.equal(states[0][f"/critic/body.{name}"], states[0][f"/actor/body.{name}"])
        assert not torch.equal(end[f"/actor/body.{name}"], end[f"/reference/body.{name}"])
    assert (states[-1]["/critic/head.weight"] == 0).all()


def leaves_of(part):
    return {name: leaf.clone() for name, leaf in leaves(part).items()}


@bugs(
    ("ppo_rlhf", "reference = copy.deepcopy(actor).requires_grad_(False)", "reference = actor"),
    ("ppo_rlhf", "critic = Critic(copy.deepcopy(actor.body))", "critic = Critic(actor.body)"),
    ("ppo_rlhf", "            critic.body.load_state_dict(reward_model.body.state_dict())\n", ""),
    ("ppo_rlhf", "            reward_model.body.load_state_dict(reference.body.state_dict())\n", ""),
    ("ppo_rlhf", "        critic.body.load_state_dict(actor.body.state_dict())\n", ""),
)
def test_four_models_see(request, name, old, new):
    fails_with_a_bug(request, test_four_models, name, old, new)


# The log and the command line


@ours
def test_what_the_log_has(module, tmp_path):
    """What over-optimisation can be drawn from, and PPO's losses."""
    module.train(tiny(module, tmp_path))
    wanted = """proxy_reward gold_reward kl objective response_length eos_fraction distinct_fraction kl_coef policy_loss
    value_loss entropy approx_kl clip_fraction"""
    previous = 0
    for row in lines(tmp_path):
        assert set(wanted.split()) <= row.keys()
        assert row["global_step"] - previous == pytest.approx(row["response_length"] * 6, abs=1e-3), "a step is a token"
        assert row["gold_reward"] == pytest.approx(row["episodic_return"], abs=1e-5)
        assert row["episodes"] == 6
        previous = row["global_step"]
    assert lines(tmp_path)[0]["kl"] == pytest.approx(0, abs=1e-6), "the actor starts as the reference"


@ours
def test_rewards_of_ones_own(module, tmp_path):
    """A function module:name learns from what it says; one that is not there is refused before training."""
    for name in ("language:nothing", "nowhere:function"):
        with pytest.raises(module.Refusal, match=f"reward_model {name} was not found"):
            module.train(tiny(module, tmp_path, reward_model=name))
        assert not (tmp_path / "run").exists()
    result = module.train(tiny(module, tmp_path, reward_model="language:length"))
    assert "rm_accuracy" not in result
    assert result["eval_best_of_16"] == result["eval_best_of_16"]


@ours
def test_compiled_losses(module, tmp_path, monkeypatch):
    """--compile learns what the eager run learns, in one graph for each loss."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    given = dict(update_epochs=2, learning_rate=0.01, total_timesteps=120, sft_steps=0, reward_model="language:length")
    for name, compiled in (("eager", False), ("compiled", True)):
        module.can_compile.cache_clear()
        module.train(tiny(module, tmp_path / name, compile=compiled, **given))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # one to find out whether there is a compiler
    one, two = (leaves(saved(tmp_path / name)) for name in ("eager", "compiled"))
    for name, leaf in one.items():
        if name.startswith(("/actor/", "/critic/", "/reward_model/")):
            torch.testing.assert_close(two[name], leaf, atol=1e-4, rtol=1e-3)
