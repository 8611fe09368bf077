"""GRPO: advantages of groups, weights of tokens, the gradient against enumeration, and the check of Countdown."""

import functools
import itertools
import json
import random

import pytest
import torch
from conftest import spy
from language import UTILITIES, T, gradients, lines, probabilities, ragged, saved, table_model, tiny, with_other_padding
from off_policy import bugs
from runs import each, fails_with_a_bug, leaves

from algos import grpo

ours = each([grpo])
NORMS = ("token", "sequence", "constant")
each_norm = pytest.mark.parametrize("norm", NORMS)


def make_batch(module, args, rows=6, noise=0.3):
    """An actor and a batch of texts of all lengths, which another policy wrote."""
    _, actor, tokens, real = ragged(module, args, rows)
    with torch.no_grad():
        policy = module.response_policy(actor, tokens, real, T, args.temperature)
        log_probs = policy.log_prob(tokens[:, -T:])
    batch = dict(tokens=tokens, real=real, log_probs=log_probs + noise * torch.randn(rows, T))
    batch |= dict(ref_log_probs=log_probs + noise * torch.randn(rows, T), advantages=torch.randn(rows))
    batch |= dict(weights=module.token_weights(real[:, -T:], args))
    return actor, batch


# Advantages


@ours
def test_three_right_of_eight(module, tmp_path):
    """To four digits, with and without the deviation; groups lie in a row."""
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 0] + [0.0] * 7 + [2.0])
    for scale, right, wrong in ((False, 0.625, -0.375), (True, 1.2076, -0.7246)):
        args = tiny(module, tmp_path, num_responses=8, num_generations=8, scale_rewards=scale)
        found = module.group_advantages(rewards, args)
        assert found[:8].tolist() == pytest.approx([right if r else wrong for r in rewards[:8]], abs=5e-5)
        first = module.group_advantages(rewards[:8], args)
        torch.testing.assert_close(found[:8], first)
        assert found[8:].sum().abs() < 1e-5
        assert found[15] > 1
    three = tiny(module, tmp_path, num_generations=3)
    assert module.group_advantages(torch.tensor([0.0, 0, 3, 1, 2, 3]), three).tolist() == [-1, -1, 2, -1, 0, 1]


@bugs(
    ("grpo", "groups.mean(1, keepdim=True)", "groups.mean()"),
    ("grpo", "groups = rewards.view(-1, args.num_generations)", "groups = rewards.view(args.num_generations, -1).T"),
    ("grpo", "groups.std(1, keepdim=True)", "groups.std(1, keepdim=True, correction=0)"),
    ("grpo", "groups.std(1, keepdim=True) + 1e-6", "groups.std(1, keepdim=True) + 1e-2"),
    ("grpo", "groups - groups.mean(1, keepdim=True)",
     "groups - (groups.sum(1, keepdim=True) - groups) / (groups.shape[1] - 1)"),
)  # fmt: skip
def test_three_right_sees(request, name, old, new):
    fails_with_a_bug(request, test_three_right_of_eight, name, old, new)


@ours
def test_equal_rewards_teach_exactly_nothing(module, tmp_path):
    """Rounding that the deviation turns into advantages of thousands [NeMo-RL#4161]."""
    for G, scale in itertools.product((2, 3, 5, 6, 7, 8, 11, 13), (False, True)):
        args = tiny(module, tmp_path, num_responses=G, num_generations=G, scale_rewards=scale)
        for reward in (0.0, 1.0, 0.35, 0.1, -0.7, 1 / 3, 123.456):
            assert (module.group_advantages(torch.full((G,), reward), args) == 0).all()


@bugs(("grpo", "    groups = groups - groups[:, :1]  #", "    #"))
def test_equal_rewards_see(request, name, old, new):
    fails_with_a_bug(request, test_equal_rewards_teach_exactly_nothing, name, old, new)


# The loss


@ours
@each_norm
def test_the_loss_against_a_loop(module, norm, tmp_path):
    """The clipped surrogate with two ranges and the KL of eq. 4, token by token, in each of the three weightings.

    What is logged beside it is a mean over tokens in each of them.
    """
    args = tiny(module, tmp_path, loss_norm=norm, clip_low=0.1, clip_high=0.3, kl_coef=0.5, temperature=0.7)
    actor, batch = make_batch(module, args)
    loss, metrics = module.policy_loss(actor, batch, args)
    now = (actor(batch["tokens"], batch["real"], T) / 0.7).log_softmax(-1)
    mask = batch["real"][:, -T:]
    total, entropy, clipped = 0, 0, 0
    for row in range(6):
        for t in range(T):
            if not mask[row, t]:
                continue
            weight = {"token": 1 / mask.sum(), "sequence": 1 / mask[row].sum() / 6, "constant": 1 / (6 * T)}[norm]
            log_prob = now[row, t, batch["tokens"][row, -T + t]]
            ratio = (log_prob - batch["log_probs"][row, t]).exp()
            advantage = batch["advantages"][row]
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.3) * advantage)
            ref_ratio = (batch["ref_log_probs"][row, t] - log_prob).exp()
            total += weight * (0.5 * (ref_ratio - ref_ratio.log() - 1) - surrogate)
            entropy -= (now[row, t].exp() * now[row, t]).sum() / mask.sum()
            clipped += (not 0.9 <= ratio <= 1.3) / int(mask.sum())
    assert loss.item() == metrics["policy_loss"].item() == pytest.approx(total.item(), rel=1e-4)
    assert metrics["entropy"].item() == pytest.approx(entropy.item(), rel=1e-4)
    assert metrics["clip_fraction"].item() == pytest.approx(clipped, rel=1e-4)
    assert clipped > 0
    torch.testing.assert_close(gradients(loss, actor), gradients(total, actor), atol=1e-5, rtol=1e-3)


@bugs(
    ("grpo", "torch.min(ratio * advantages, clipped_ratio * advantages)", "clipped_ratio * advantages"),
    ("grpo", "torch.min(ratio * advantages", "torch.max(ratio * advantages"),
    ("grpo", "1 + args.clip_high", "1 + args.clip_low"),
    ("grpo", "ref_log_ratio.exp() - ref_log_ratio - 1", "(-ref_log_ratio).exp() + ref_log_ratio - 1"),
    ("grpo", "(args.kl_coef * kl - surrogate)", "(kl - surrogate)"),
    ("grpo", "return mask / mask.sum()", "return mask / (mask.shape[0] * mask.shape[1])"),
    ("grpo", 'batch["tokens"], batch["real"], T, args.temperature)', 'batch["tokens"], batch["real"], T, 1.0)'),
)
def test_the_loop_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_loss_against_a_loop, name, old, new, norm="token")


@bugs(
    ("grpo", "mean(policy.entropy())", "(mask * batch['weights'] * policy.entropy()).sum()"),
    ("grpo", "mean((ratio != clipped_ratio).float())", "(mask * batch['weights'] * (ratio != clipped_ratio)).sum()"),
)
def test_logs_that_follow_the_weighting_are_seen(request, name, old, new):
    fails_with_a_bug(request, test_the_loss_against_a_loop, name, old, new, norm="constant")


@bugs(
    ("grpo", "mask / mask.sum(1, keepdim=True) / N", "mask / mask.sum(1, keepdim=True)"),
    ("grpo", "mask / mask.sum(1, keepdim=True) / N", "mask / T / N"),
)
def test_the_loop_of_sequences_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_loss_against_a_loop, name, old, new, norm="sequence")


@ours
def test_bias_by_length(module, tmp_path):
    """What one token of a wrong answer is pushed down by: only `sequence` spares the tokens of long ones.

    And only `constant` asks no token how long the other answers are.
    """
    push = {}
    for norm in NORMS:
        args = tiny(module, tmp_path, loss_norm=norm)
        for other, length in itertools.product((1, 4), (1, 5)):
            mask = torch.zeros(2, T, dtype=torch.bool)
            mask[0, :other] = True
            mask[1, :length] = True
            batch = dict(tokens=torch.zeros(2, T + 1, dtype=torch.long), real=torch.nn.functional.pad(mask, (1, 0)))
            batch["real"][:, 0] = True
            zeros = torch.zeros(2, T)
            actor = Uniform()
            batch |= dict(log_probs=zeros - torch.tensor(4.0).log(), ref_log_probs=zeros)
            batch |= dict(advantages=torch.tensor([0.5, -0.5]), weights=module.token_weights(mask, args))
            loss, _ = module.policy_loss(actor, batch, args)
            (gradient,) = torch.autograd.grad(loss, actor.logits)
            push[norm, other, length] = gradient[1, 0, 0].item()  # of the wrong answer's first token
            assert (gradient[~mask] == 0).all()
    one = 0.5 * 0.75  # the advantage times 1 - pi
    for other in (1, 4):
        assert push["sequence", other, 1] == pytest.approx(one / 2)
        assert push["sequence", other, 5] == pytest.approx(one / 2 / 5), "a fifth of the blame"
        for length in (1, 5):
            assert push["token", other, length] == pytest.approx(one / (other + length))
            assert push["constant", other, length] == pytest.approx(one / (2 * T))


class Uniform(torch.nn.Module):
    """A policy with logits of its own for each token of two responses, at first all 0."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(2, T, 4))

    def forward(self, tokens, real, num_tokens):
        return self.logits


@bugs(
    ("grpo", "return mask / mask.sum()", "return mask / mask.sum(1, keepdim=True) / N"),
    ("grpo", "return mask / (N * T)", "return mask / mask.sum()"),
    ("grpo", "return mask / (N * T)", "return mask / (N * mask.sum(1).max())"),
    ("grpo", "mask / mask.sum(1, keepdim=True) / N", "mask / T / N"),
)
def test_bias_sees(request, name, old, new):
    fails_with_a_bug(request, test_bias_by_length, name, old, new)


class Positions(torch.nn.Module):
    """A policy with logits of its own at each place of a text, whatever stands there."""

    def __init__(self, length):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(length, 22))

    def forward(self, tokens, real, num_tokens):
        return self.logits[-num_tokens - 1 : -1].expand(len(tokens), -1, -1)


@ours
@each_norm
def test_prompts_have_no_gradient(module, norm, tmp_path):
    """Only the places from which tokens of responses were chosen are learned."""
    args = tiny(module, tmp_path, loss_norm=norm, kl_coef=0.5)
    _, batch = make_batch(module, args)
    P = batch["tokens"].shape[1] - T
    actor = Positions(P + T)
    loss, _ = module.policy_loss(actor, batch, args)
    (gradient,) = torch.autograd.grad(loss, actor.logits)
    assert (gradient.abs().sum(1) > 0).tolist() == [False] * (P - 1) + [True] * T + [False]


@ours
@each_norm
def test_padding_changes_nothing(module, norm, tmp_path):
    """Loss, gradient and metrics are the same bits whatever numbers the padding has."""
    args = tiny(module, tmp_path, num_layers=2, loss_norm=norm, kl_coef=0.5)
    actor, batch = make_batch(module, args, rows=12)
    other = batch | dict(tokens=with_other_padding(batch["tokens"], batch["real"]))
    for name in ("log_probs", "ref_log_probs"):
        other[name] = torch.where(batch["real"][:, -T:], batch[name], -0.5)
    assert (other["tokens"] != batch["tokens"]).sum() > 20
    (one, metrics), (two, other_metrics) = (module.policy_loss(actor, each, args) for each in (batch, other))
    assert torch.equal(one, two)
    assert torch.equal(gradients(one, actor), gradients(two, actor))
    assert all(torch.equal(metrics[name], other_metrics[name]) for name in metrics)


@bugs(
    ("grpo", 'torch.where(mask, batch["weights"] * (args.kl_coef * kl - surrogate), 0).sum()', "surrogate.mean()"),
    ("grpo", "return torch.where(mask, x, 0).sum() / mask.sum()", "return x.mean()"),
    ("grpo", "return real[:, None, None, :] & causal | itself", "return (causal | itself)[None, None]"),
)
def test_padding_sees(request, name, old, new):
    fails_with_a_bug(request, test_padding_changes_nothing, name, old, new, norm="token")


@ours
@each_norm
def test_minibatches_add_up(module, norm, tmp_path, monkeypatch):
    """What train() hands to the loss: the mean gradient of its minibatches is that of the whole batch [trl#6439]."""
    seen = []
    spy(monkeypatch, module, "policy_loss", before=lambda _, batch, args: seen.append((batch, args)))
    given = dict(num_minibatches=3, num_responses=12, loss_norm=norm, learning_rate=0.0, sft_steps=0)
    module.train(tiny(module, tmp_path, total_timesteps=60, **given))
    parts = [batch for batch, _ in seen[:3]]
    args = seen[0][1]
    assert [len(part["tokens"]) for part in parts] == [4, 4, 4]
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    mask = batch["real"][:, -T:]
    assert mask.sum(1).unique().numel() > 1
    batch["weights"] = module.token_weights(mask, args)
    size = 2 + len(module.Countdown(args).words)
    actor = module.LanguageModel(
        module.Transformer(size, args.max_prompt_tokens + T, 16, 1), torch.nn.Linear(16, size)
    )  # fmt: skip
    whole = gradients(module.policy_loss(actor, batch, args)[0], actor)
    mean = sum(gradients(module.policy_loss(actor, part, args)[0], actor) for part in parts) / 3
    torch.testing.assert_close(mean, whole, atol=1e-5, rtol=1e-3)


@bugs(("grpo", "weights=args.num_minibatches * token_weights(mask, args)", "weights=token_weights(mask, args)"))
def test_minibatches_see(request, name, old, new):
    fails_with_a_bug(request, test_minibatches_add_up, name, old, new, norm="token")


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


@ours
def test_the_kl_of_the_loss(module, tmp_path):
    """Its mean is KL(p || q) = 0.183787; its gradient by the first logit, 0.3, is that of KL(q || p)."""
    args = tiny(module, tmp_path, max_new_tokens=1, kl_coef=1.0)
    actor = OneToken(P.log())
    batch = dict(tokens=torch.tensor([[0, 0], [0, 1]]), real=torch.ones(2, 2, dtype=torch.bool))
    batch |= dict(log_probs=P.log()[:, None], ref_log_probs=Q.log()[:, None])
    batch |= dict(advantages=torch.zeros(2), weights=P[:, None])  # each text with its probability
    loss, _ = module.policy_loss(actor, batch, args)
    assert loss.item() == pytest.approx(0.183787, abs=5e-7)
    (gradient,) = torch.autograd.grad(loss, actor.logits)
    logits = P.log().requires_grad_()
    (reverse,) = torch.autograd.grad((Q * (Q.log() - logits.log_softmax(0))).sum(), logits)
    torch.testing.assert_close(gradient, reverse)
    assert gradient[0].item() == pytest.approx(0.3, abs=1e-6)


@bugs(
    ("grpo", "ref_log_ratio.exp() - ref_log_ratio - 1", "(-ref_log_ratio).exp() + ref_log_ratio - 1"),
    ("grpo", "ref_log_ratio.exp() - ref_log_ratio - 1", "-ref_log_ratio"),
)
def test_the_kl_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_kl_of_the_loss, name, old, new)


# The gradient's expectation


@ours
@pytest.mark.parametrize("G", [2, 3])
def test_the_expected_gradient(module, G, tmp_path):
    """Over all groups of G of the nine texts, each with its probability: 1 - 1/G of the gradient of E[r], and 1/T."""
    torch.manual_seed(2)
    args = tiny(module, tmp_path, max_new_tokens=2, loss_norm="constant", num_responses=G, num_generations=G)
    _, model = table_model(module)
    texts = torch.tensor([[0, a, b] for a, b in itertools.product(range(3), range(3))])
    groups = torch.tensor(list(itertools.product(range(9), repeat=G)))
    p = probabilities(model).flatten()[groups].prod(1)  # of each group
    tokens = texts[groups.flatten()]
    real = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        log_probs = module.response_policy(model, tokens, real, 2, 1.0).log_prob(tokens[:, -2:])
    weights = module.token_weights(real[:G, -2:], args).repeat(len(groups), 1) * p.repeat_interleave(G)[:, None]
    batch = dict(tokens=tokens, real=real, log_probs=log_probs, ref_log_probs=log_probs, weights=weights)
    batch |= dict(advantages=module.group_advantages(UTILITIES.flatten()[groups.flatten()], args))
    found = gradients(module.policy_loss(model, batch, args)[0], model)

    logits = model.head.weight.T
    pi = logits[0].softmax(-1)[:, None] * logits[1:4].softmax(-1)
    true = gradients((pi * UTILITIES).sum(), model)
    torch.testing.assert_close(found, -(1 - 1 / G) * true / 2, atol=1e-6, rtol=1e-4)
    assert true.abs().max() > 0.05


@bugs(
    ("grpo", "args.kl_coef * kl - surrogate", "args.kl_coef * kl + surrogate"),
    ("grpo", "advantages = groups - groups.mean(1, keepdim=True)",
     "advantages = rewards.view(-1, args.num_generations)"),
    ("grpo", 'log_ratio = log_probs - batch["log_probs"]', "log_ratio = log_probs - log_probs"),
    ("grpo", "advantages = groups - groups.mean(1, keepdim=True)",
     "advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)"),
)  # fmt: skip
def test_the_expectation_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_expected_gradient, name, old, new, G=2)


# Through train()


def brevity(texts):
    """A reward for few words."""
    return [-float(len(text.split())) for text in texts]


def write_prompts(folder):
    """A file of prompts of one to four words."""
    (folder / "prompts.txt").write_text("the\nthe food\nthe food was\nthe food was not\n")
    return str(folder / "prompts.txt")


@ours
def test_groups_and_ratios_of_a_run(module, tmp_path, monkeypatch):
    """Ragged prompts: a group has one, its rewards are compared with each other, and the first ratio is exactly 1."""
    seen = []

    def before(actor, batch, args):
        policy = module.response_policy(actor, batch["tokens"], batch["real"], T, args.temperature)
        seen.append(batch | dict(now=policy.log_prob(batch["tokens"][:, -T:]).detach()))

    spy(monkeypatch, module, "policy_loss", before=before)
    monkeypatch.setattr(module.torch, "randperm", lambda n, **_: torch.arange(n))
    given = dict(prompts=write_prompts(tmp_path), temperature=0.7, num_minibatches=1, num_responses=12)
    module.train(tiny(module, tmp_path, num_generations=4, **given))
    words = module.Words(module.Countdown(tiny(module, tmp_path, prompts=given["prompts"])).words)
    mask = seen[0]["real"][:, -T:]
    assert (seen[0]["ref_log_probs"] == seen[0]["log_probs"])[mask].all()  # the actor starts as the reference
    prompts = set()
    for batch in seen:
        mask = batch["real"][:, -T:]
        assert ((batch["now"] - batch["log_probs"])[mask].exp() == 1).all()
        texts = module.texts_of(batch["tokens"], batch["real"], words)
        rewards = [float(len(text)) for text in texts]
        P = batch["tokens"].shape[1] - T
        for start in range(0, 12, 4):
            group = [tuple(row[keep].tolist()) for row, keep in zip(batch["tokens"][:, :P], batch["real"][:, :P])]
            assert len(set(group[start : start + 4])) == 1
            prompts.add(group[start])
            mean = sum(rewards[start : start + 4]) / 4
            expected = [reward - mean for reward in rewards[start : start + 4]]
            assert batch["advantages"][start : start + 4].tolist() == pytest.approx(expected, abs=1e-4)
    assert len(prompts) == 4
    for row in lines(tmp_path):
        assert row["clip_fraction"] == 0, "the clip is idle"


@bugs(
    ("grpo", "[prompt for prompt in task.prompts(N // G) for _ in range(G)]", "task.prompts(N // G) * G"),
    ("grpo", "log_probs = response_policy(actor, tokens, real, T, args.temperature)",
     "log_probs = response_policy(actor, tokens, real, T, 1.0)"),
    ("grpo", "response_policy(reference, tokens, real, T, args.temperature)",
     "response_policy(reference, tokens, real, T, 1.0)"),
    ("grpo", "{name: column[rows] for name, column in batch.items()}",
     "{name: column[rows if name != 'advantages' else rows.flip(0)] for name, column in batch.items()}"),
)  # fmt: skip
def test_groups_see(request, name, old, new):
    fails_with_a_bug(request, test_groups_and_ratios_of_a_run, name, old, new)


@ours
def test_a_constant_reward_moves_nothing(module, tmp_path):
    """Nothing to learn: the policy stays the reference, to the bit, through a whole run."""
    for scale in (False, True):
        folder = tmp_path / str(scale)
        module.train(
            tiny(module, folder, reward_function="language:constant", learning_rate=0.01, scale_rewards=scale)
        )  # fmt: skip
        found = saved(folder)
        assert all(torch.equal(found["actor"][name], found["reference"][name]) for name in found["actor"])
        assert {row["signal_fraction"] for row in lines(folder)} == {0.0}


@ours
def test_a_reward_is_learned(module, tmp_path):
    """Through train(), on a reward that is easily had: shorter texts are written, and the reference stays."""
    given = dict(reward_function="test_grpo:brevity", learning_rate=0.03, num_responses=60, total_timesteps=9000)
    module.train(tiny(module, tmp_path, num_minibatches=1, update_epochs=2, sft_steps=0, **given))
    rows = lines(tmp_path)
    assert rows[-1]["gold_reward"] > rows[0]["gold_reward"] + 2
    assert rows[-1]["kl"] > 0.05
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6), "the actor starts as the reference"


@bugs(
    ("grpo", "(args.kl_coef * kl - surrogate)", "(args.kl_coef * kl + surrogate)"),
    ("grpo", "reference = copy.deepcopy(actor).requires_grad_(False)", "reference = actor"),
)
def test_learning_sees(request, name, old, new):
    fails_with_a_bug(request, test_a_reward_is_learned, name, old, new)


@ours
def test_what_the_log_has(module, tmp_path):
    """How many groups still teach, and what the best of a group gets, beside reward and KL; a step is a token."""
    module.train(tiny(module, tmp_path))
    wanted = """policy_loss entropy approx_kl clip_fraction reward gold_reward kl best_of_group signal_fraction
    response_length eos_fraction distinct_fraction"""
    previous = 0
    for row in lines(tmp_path):
        assert set(wanted.split()) <= row.keys()
        assert row["global_step"] - previous == pytest.approx(row["response_length"] * 6, abs=1e-3)
        assert row["gold_reward"] == pytest.approx(row["episodic_return"], abs=1e-5)
        assert row["best_of_group"] >= row["gold_reward"] == pytest.approx(row["reward"])
        previous = row["global_step"]


# Countdown


def task_of(module, **given):
    return module.Countdown(module.Args(**given))


def by_brute_force(prompt):
    """All right answers: every order of the digits with every operators, as Python reckons them."""
    *digits, _, target, _ = prompt.split()
    found = set()
    for order in itertools.permutations(digits):
        for first, second in itertools.product("+-*", repeat=2):
            answer = f"{order[0]} {first} {order[1]} {second} {order[2]}"
            if eval(answer) == int(target):
                found.add(answer)
    return found


@ours
def test_the_check_against_brute_force(module):
    """On all answers of the form, with digits of the problem and with others: right is what brute force finds."""
    task = task_of(module)
    for prompt in task.prompts(15):
        right = by_brute_force(prompt)
        assert right, "it can be solved"
        digits = prompt.split()[:3]
        pool = sorted({*digits, random.Random(prompt).choice("123456789")})
        answers = [
            f"{a} {first} {b} {second} {c}"
            for a, b, c in itertools.product(pool, repeat=3)
            for first, second in itertools.product("+-*", repeat=2)
        ]
        texts = [f"{prompt} {answer}" for answer in answers]
        ended = torch.ones(len(texts), dtype=torch.bool)
        assert task.rewards(texts, ended).tolist() == [float(answer in right) for answer in answers]
        assert (task.rewards(texts, ~ended) == 0).all(), "what has no end is no answer"
        for answer, text in zip(answers, texts):
            assert task.has_form(text) == (sorted(answer.split()[::2]) == sorted(digits))


@ours
@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("3 * 5 - 2", True),
        ("3*5-2", True),
        ("5 * 3 - 2", True),
        ("3 * 5 - 2 - 2", False),
        ("3 * 5", False),
        ("3 * 5 -", False),
        ("- 3 * 5 - 2", False),
        ("3 * 5 - 2 : 1", False),
        ("3 5 * - 2", False),
        ("15 - 2", False),
        ("3 * 5 + 2", False),
        ("3 * 5 - 2.0", False),
        ("3 ** 5 - 2", False),
        ("6 * 2 + 1", False),
        ("9 + 2 + 2", False),
        ("", False),
        ("1 3", False),
        ("\u0663 * 5 - 2", False),
        (": 3 * 5 - 2", False),
        ("__import__('os')", False),
    ],
)
def test_grammar_of_answers(module, answer, right):
    """Wrong digits, wrong operators, more or less than three numbers, an order that only looks right."""
    task = task_of(module)
    assert task.is_right(f"3 5 2 -> 13 : {answer}") == right


@ours
def test_texts_that_are_no_problems(module):
    """What other tokenizers may make of them is wrong, and no error."""
    task = task_of(module)
    texts = ["", ":", "-> :", "3 5 2", " : 3 * 5 - 2", "3 5 2 -> : 3 * 5 - 2", "-> 13 : 3 * 5 - 2"]
    assert task.rewards(texts, torch.ones(len(texts), dtype=torch.bool)).tolist() == [0.0] * len(texts)


@bugs(
    ("grpo", " and sorted(re.findall(\"[0-9]\", answer)) == sorted(digits)", ""),
    ("grpo", "sorted(re.findall(\"[0-9]\", answer)) == sorted(digits)",
     "set(re.findall(\"[0-9]\", answer)) <= set(digits)"),
    ("grpo", "    if second == \"*\":  # products", "    if second == \"-\":  # products"),
    ("grpo", "problem.split()[-1] == str(value_of(answer))", "True"),
    ("grpo", "float(end and self.is_right(text))", "float(self.is_right(text))"),
)  # fmt: skip
def test_brute_force_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_check_against_brute_force, name, old, new)


@ours
def test_demonstrations(module):
    """Two in five are solved, and a few more by chance; all have the form and fit; targets are from 0 to 99."""
    args = dict(num_demonstrations=10)
    for share, low, high in ((0.4, 0.40, 0.50), (1.0, 1.0, 1.0), (0.0, 0.01, 0.12)):
        rows = task_of(module, right_demonstrations=share, **args).demonstrations(2000)
        task = task_of(module)
        texts = [prompt + response for prompt, response in rows]
        assert all(task.has_form(text) for text in texts)
        right = task.rewards(texts, torch.ones(len(texts), dtype=torch.bool)).mean().item()
        assert low - 0.02 <= right <= high
        targets = [int(prompt.split()[4]) for prompt, _ in rows]
        assert min(targets) == 0
        assert 60 < max(targets) <= 99
        words = module.Words(task.words)
        assert {len(words.encode(prompt, True)) for prompt, _ in rows} == {6}
        assert {len(words.encode(response, False)) for _, response in rows} == {5}
    assert module.Args().max_new_tokens == 6, "and the end"


@bugs(
    ("grpo", "if rng.random() >= self.right_demonstrations:", "if rng.random() < self.right_demonstrations:"),
    ("grpo", "if 0 <= value_of(solution) <= 99:", "if True:"),
)
def test_demonstrations_see(request, name, old, new):
    fails_with_a_bug(request, test_demonstrations, name, old, new)


@ours
def test_partial_rewards(module, tmp_path, monkeypatch):
    """For the form, right or wrong; they are learned from, and are no true rewards."""
    seen = []
    spy(monkeypatch, module, "group_advantages", before=lambda rewards, _: seen.append(rewards))
    calls = []
    monkeypatch.setattr(module.Countdown, "has_form", lambda _, text: calls.append(text) or len(calls) % 2 == 1)
    module.train(tiny(module, tmp_path, reward_function="", partial_reward=0.25, total_timesteps=60))
    assert seen[0].tolist() == pytest.approx([0.25, 0.0] * 3)
    assert {row["gold_reward"] for row in lines(tmp_path)} == {0.0}
    assert lines(tmp_path)[0]["reward"] == pytest.approx(0.125)


@ours
def test_rewards_of_ones_own(module, tmp_path):
    """A function module:name judges prompts of one's own; what cannot be is refused before training."""
    for name in ("language:nothing", "nowhere:function"):
        with pytest.raises(module.Refusal, match=f"reward_function {name} was not found"):
            module.train(tiny(module, tmp_path, reward_function=name))
        assert not (tmp_path / "run").exists()
    rows = [dict(question="what is one and one", answer="2"), dict(question="two and two", answer="4")]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = tiny(module, tmp_path, prompts=str(tmp_path / "problems.jsonl"))
    assert module.Countdown(args).own_prompts == [row["question"] for row in rows]
    result = module.train(args)
    assert min(result["eval_returns"]) >= len("two and two")
    for given, words in (
        (dict(prompts="nowhere.txt", reward_function=""), "nobody knows what is good"),
        (dict(partial_reward=0.1), "own check"),
        (dict(num_responses=7), "multiple of num_generations"),
        (dict(num_generations=1), "num_generations"),
        (dict(clip_low=1.5), "clip_low"),
        (dict(num_minibatches=100), "num_minibatches"),
    ):
        with pytest.raises(module.Refusal, match=words):
            tiny(module, tmp_path, **given)


@ours
def test_compiled_losses(module, tmp_path, monkeypatch):
    """--compile learns what the eager run learns, in one graph for each loss."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    given = dict(update_epochs=2, learning_rate=0.01, total_timesteps=120, sft_steps=0)
    for name, compiled in (("eager", False), ("compiled", True)):
        module.can_compile.cache_clear()
        module.train(tiny(module, tmp_path / name, compile=compiled, **given))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one to find out whether there is a compiler
    one, two = (leaves(saved(tmp_path / name)) for name in ("eager", "compiled"))
    for name, leaf in one.items():
        if name.startswith("/actor/"):
            torch.testing.assert_close(two[name], leaf, atol=1e-4, rtol=1e-3)
