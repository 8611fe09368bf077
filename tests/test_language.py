"""What all scripts for language share: transformer, generation, padding, the task, phases, files."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import LANGUAGE, spy
from language import T, dashed, each_language, lines, ragged, saved, tiny, with_other_padding
from off_policy import bugs
from runs import each, fails_with_a_bug, leaves, name_of, run_alone, start

each_review = each([module for module in LANGUAGE if hasattr(module, "Reviews")])
FILES = {"config.json", "metrics.jsonl", "checkpoint.pt", "result.json", "lock"}


# The transformer


def hand_made(model, text):
    """Logits (n, V) of one text without padding, from the layers of the model and the formula of attention."""
    body = model.body
    n = len(text)
    x = body.token_embedding.weight[text] + body.position_embedding.weight[:n]
    for block in body.blocks:
        q, k, v = block.queries_keys_values(block.norm1(x)).chunk(3, dim=-1)
        width = x.shape[1] // block.num_heads
        outputs = []
        for h in range(block.num_heads):
            part = slice(h * width, (h + 1) * width)
            rows = []
            for t in range(n):
                weights = (k[: t + 1, part] @ q[t, part] / width**0.5).softmax(0)
                rows.append(weights @ v[: t + 1, part])
            outputs.append(torch.stack(rows))
        x = x + block.output(torch.cat(outputs, dim=1))
        x = x + block.mlp(block.norm2(x))
    return model.head(body.norm(x))


@each_language
def test_logits_against_the_formula(module, tmp_path):
    """Padding that is seen or that moves positions, a future that is seen, heads mixed up: each text as if alone."""
    args = tiny(module, tmp_path, hidden_size=32, num_layers=2)
    _, model, tokens, real = ragged(module, args)
    logits = model(tokens, real, T)
    for row, keep, found in zip(tokens, real, logits):
        length = int(keep[-T:].sum())
        expected = hand_made(model, row[keep])[-length - 1 : -1]
        torch.testing.assert_close(found[:length], expected, atol=1e-4, rtol=1e-4)


MASK = "return real[:, None, None, :] & causal | itself"


@bugs(
    ("ppo_rlhf", "return (real.cumsum(1) - 1).clamp(min=0)", "return torch.arange(real.shape[1]).expand_as(real)"),
    ("ppo_rlhf", MASK, "return (causal | itself)[None, None]"),
    ("ppo_rlhf", MASK, "return real[:, None, None, :] | itself"),
    ("ppo_rlhf", "y.transpose(1, 2).reshape", "y.reshape"),
    ("ppo_rlhf", "[:, -num_tokens - 1 : -1])", "[:, -num_tokens:])"),
)
def test_logits_see(request, name, old, new):
    fails_with_a_bug(request, test_logits_against_the_formula, name, old, new)


@each_language
def test_prompts_end_in_one_column(module):
    """Prompts at the left with padding behind them, responses that are not cut, padding taken for text."""
    tokens, real = module.collate([[5], [6, 7, 8]], [[9, 1], [2, 3, 4, 5]], 3)
    assert tokens[real].tolist() == [5, 9, 1, 6, 7, 8, 2, 3, 4]
    assert real.tolist() == [[False, False, True, True, True, False], [True] * 6]


@bugs(
    ("ppo_rlhf", "first = P - len(prompt)", "first = 0"),
    ("ppo_rlhf", "text = prompt + response[:num_tokens]", "text = prompt + response[1 : num_tokens + 1]"),
)
def test_columns_see(request, name, old, new):
    fails_with_a_bug(request, test_prompts_end_in_one_column, name, old, new)


@each_language
def test_generation_sees_what_the_forward_pass_sees(module, tmp_path):
    """A cache that forgets, doubles or shifts; positions in generation that are those of the padded text."""
    args = tiny(module, tmp_path, hidden_size=32, num_layers=2)
    tokenizer, model, tokens, real = ragged(module, args, rows=12)
    P = tokens.shape[1] - T
    logits = []
    handle = model.head.register_forward_hook(lambda *parts: logits.append(parts[-1]))
    tokens, real = module.generate(model, tokens[:, :P], real[:, :P], T, 0.7, tokenizer.end)
    handle.remove()
    policy = module.response_policy(model, tokens, real, T, 1.0)
    for t, given in enumerate(logits):
        running = real[:, P + t]
        expected = policy.logits[running, t]
        torch.testing.assert_close(given[running].log_softmax(-1), expected, atol=1e-4, rtol=1e-4)
    assert real[:, P:].any(0).sum() == len(logits) > 2


@bugs(
    ("ppo_rlhf", "k = torch.cat([past_k, k], dim=2)", "k = torch.cat([k, past_k], dim=2)"),
    ("ppo_rlhf", "positions_of(real)[:, -n:]", "positions_of(real)[:, :n]"),
)
def test_generation_sees(request, name, old, new):
    fails_with_a_bug(request, test_generation_sees_what_the_forward_pass_sees, name, old, new)


@each_language
def test_frequencies_of_sampled_tokens(module, tmp_path):
    """Samples at another temperature than that of the probabilities, or the likeliest token always."""
    args = tiny(module, tmp_path)
    tokenizer, model, tokens, real = ragged(module, args, rows=1)
    P = tokens.shape[1] - T
    many = 20_000
    prompts = tokens[:, :P].repeat(many, 1)
    drawn, _ = module.generate(model, prompts, real[:, :P].repeat(many, 1), 1, 0.7, tokenizer.end)
    policy = module.response_policy(model, tokens[:, : P + 1], real[:, : P + 1], 1, 0.7)
    expected = many * policy.probs[0, 0]
    counts = torch.bincount(drawn[:, -1], minlength=len(expected))
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 60  # of 21 degrees of freedom: once in 10^5
    assert (expected - many / 22).abs().max() > many / 50


@bugs(
    ("ppo_rlhf", "model.head(features[:, -1]) / temperature", "model.head(features[:, -1])"),
    ("ppo_rlhf", "model(tokens, real, num_tokens) / temperature", "model(tokens, real, num_tokens)"),
    ("ppo_rlhf", "(logits + noise).argmax(-1)", "logits.argmax(-1)"),
    ("ppo_rlhf", "noise = -torch.empty_like(logits).exponential_().log()", "noise = torch.rand_like(logits)"),
)  # fmt: skip
def test_frequencies_see(request, name, old, new):
    fails_with_a_bug(request, test_frequencies_of_sampled_tokens, name, old, new)


@each_language
def test_responses_end_with_their_first_end(module, tmp_path):
    """Ends that are padding, tokens behind the end that count, a limit that is none."""
    args = tiny(module, tmp_path)
    tokenizer, model, tokens, real = ragged(module, args, rows=40)
    P = tokens.shape[1] - T
    with torch.no_grad():
        model.head.bias[tokenizer.end] += 3
    out, out_real = module.generate(model, tokens[:, :P], real[:, :P], T, 1.0, tokenizer.end)
    assert torch.equal(out[:, :P], tokens[:, :P])
    assert torch.equal(out_real[:, :P], real[:, :P])
    ended = module.has_ended(out, out_real, T, tokenizer)
    assert 0 < ended.sum() < 40
    for row, keep, end in zip(out[:, P:].tolist(), out_real[:, P:].tolist(), ended.tolist()):
        expected = row.index(tokenizer.end) + 1 if tokenizer.end in row else T
        assert keep == [True] * expected + [False] * (T - expected)
        assert end == (tokenizer.end in row)


@bugs(
    ("ppo_rlhf", "running = running & (tokens[:, t] != end)", "running = running & (tokens[:, t] != 0)"),
    ("ppo_rlhf", "        real[:, t] = running\n        running = running & (tokens[:, t] != end)",
     "        running = running & (tokens[:, t] != end)\n        real[:, t] = running"),
    ("ppo_rlhf", "return is_end[:, -num_tokens:].any(1)", "return is_end[:, -1]"),
    ("ppo_rlhf", "return is_end[:, -num_tokens:].any(1)", "return ~real[:, -1]"),
)  # fmt: skip
def test_ends_see(request, name, old, new):
    fails_with_a_bug(request, test_responses_end_with_their_first_end, name, old, new)


# The task


# The prototype that grammar, taste and noise were measured with

NOUNS = ["food", "room", "view", "pool", "staff", "bar", "breakfast", "bed", "music", "garden", "wine", "soup",
    "coffee", "waiter", "service", "location"]  # fmt: skip
GOOD = {"good": 1, "nice": 1, "clean": 1, "kind": 1, "fresh": 1, "warm": 1, "lovely": 2, "great": 2, "superb": 3,
    "wonderful": 3, "perfect": 3, "delightful": 2}  # fmt: skip
BAD = {"bad": -1, "cold": -1, "dirty": -1, "slow": -1, "rude": -2, "loud": -1, "stale": -1, "boring": -1, "awful": -3,
    "terrible": -3, "horrible": -3, "nasty": -2}  # fmt: skip
NEUTRAL = {"small": 0, "big": 0, "old": 0, "modern": 0, "simple": 0, "busy": 0}
ALL = {**GOOD, **BAD, **NEUTRAL}
ADVERBS = {"very": 1.5, "really": 1.5, "quite": 0.75, "a bit": 0.5}


def rough_clause(random, noun, s):
    pol = s if random.random() < 0.8 else -s
    if random.random() < 0.15:
        pol = 0
    pool = list(GOOD if pol > 0 else BAD if pol < 0 else NEUTRAL)
    a = random.choice(pool)
    r = random.random()
    if pol and r < 0.15:
        a = "not " + random.choice(list(BAD if pol > 0 else GOOD))
    elif r < 0.45:
        a = random.choice(list(ADVERBS)) + " " + a
    return f"the {noun} was {a}"


def rough_review(random):
    s = random.choice([1, -1, -1])
    n = random.choice([1, 2, 2, 3, 3])
    cs = [rough_clause(random, x, s) for x in random.sample(NOUNS, n)]
    t = cs[0]
    for c in cs[1:]:
        t += random.choice([" and ", " , ", " but " if random.random() < 0.2 else " and "]) + c
    if random.random() < 0.5:
        back = (s > 0) == (random.random() < 0.9)
        t += " . " + ("i will come back" if back else "i will never come back")
    return t + " ."


def rough_gold(text, ended):
    score, i, bad, nouns, adjs = 0, 0, 0, [], []
    while i < len(text):
        if text[i : i + 1] == ["the"] and i + 2 < len(text) and text[i + 1] in NOUNS and text[i + 2] == "was":
            nouns.append(text[i + 1])
            i += 3
            m = 1
            if text[i : i + 1] == ["not"]:
                m = -0.5
                i += 1
            elif text[i : i + 2] == ["a", "bit"]:
                m = 0.5
                i += 2
            elif i < len(text) and text[i] in ADVERBS:
                m = ADVERBS[text[i]]
                i += 1
            if i < len(text) and text[i] in ALL:
                score += m * ALL[text[i]]
                adjs.append(text[i])
                i += 1
            else:
                bad += 1
        elif text[i : i + 5] == ["i", "will", "never", "come", "back"]:
            score -= 2
            i += 5
        elif text[i : i + 4] == ["i", "will", "come", "back"]:
            score += 2
            i += 4
            nouns.append("back")
        elif text[i] in ("and", ",", ".", "but"):
            i += 1
        else:
            bad += 1
            i += 1
    rep = len(nouns) - len(set(nouns)) + len(adjs) - len(set(adjs))
    return score - 2 * rep - bad - (0 if ended else 2)


@each_review
def test_reviews_are_those_that_were_measured(module):
    """The figures of this task hold for this grammar: the same reviews from the same random numbers."""
    task = module.Reviews(module.Args())
    for seed in range(300):
        assert task.review(random.Random(seed)) == rough_review(random.Random(seed))
    assert len(module.Words(task.words).words) == 65
    for prompt, response in task.demonstrations(50):
        assert prompt in {f"the {noun} was" for noun in NOUNS}
        assert response.startswith(" ")
        assert len(response.split()) < 29
    assert len(set(task.prompts(300))) == 16


@each_review
def test_the_taste_is_that_which_was_measured(module):
    """On reviews, on broken ones and on words in any order."""
    task = module.Reviews(module.Args())
    rng = random.Random(0)
    for i in range(3000):
        words = task.review(rng).split()
        if i % 3 == 1:
            del words[rng.randrange(len(words))]
        elif i % 3 == 2:
            words = rng.choices(
                [*task.words, "the food was", "i will come back", "a bit", "<pad>"], k=rng.randrange(25)
            )
        text = " ".join(words)
        assert task.reward(text, i % 2 == 0) == rough_gold(text.split(), i % 2 == 0), text


@bugs(
    ("ppo_rlhf", "return reward - 2 * (len(said) - len(set(said)))", "return reward"),
    ("ppo_rlhf", "reward = 0.0 if ended else -2.0", "reward = 0.0"),
    ("ppo_rlhf", "return -0.5, words[1:]", "return -1.0, words[1:]"),
    ("ppo_rlhf", "                else:\n                    reward -= 1\n", ""),
    ("ppo_rlhf", '"quite": 0.75', '"quite": 1.25'),
    ("ppo_rlhf", '                said.append("back")\n', ""),
)
def test_the_taste_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_taste_is_that_which_was_measured, name, old, new)


@each_review
def test_people_choose_with_noise(module, tmp_path, monkeypatch):
    """Choices that are always those of the taste, or never: P(first) = sigmoid(difference of their true rewards)."""
    args = tiny(module, tmp_path, num_pairs=8000)
    task = module.Reviews(module.Args())
    tokenizer, model = module.make_language_model(task, args)
    texts = [("the food was", " good ."), ("the food was", " great .")]  # 1 and 2
    encoded = [(tokenizer.encode(one, True), [*tokenizer.encode(two, False), tokenizer.end]) for one, two in texts]
    both = module.collate([one for one, _ in encoded], [two for _, two in encoded], T)
    calls = iter([0, 1])

    def sample(model, prompts, tokenizer, args):
        i = next(calls)
        return tuple(part[i : i + 1].repeat(len(prompts), 1) for part in both)

    monkeypatch.setattr(module, "sample", sample)
    pairs, numbers = module.collect_pairs(model, tokenizer, task, args)
    better = (pairs["chosen"] == both[0][1]).all(1).float().mean().item()
    assert better == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.02)
    assert numbers["taste_accuracy"] == pytest.approx(better, abs=1e-4)
    assert ((pairs["rejected"] == both[0][0]).all(1) == (pairs["chosen"] == both[0][1]).all(1)).all()
    assert all(pairs[f"{name}_real"].sum(1).unique().tolist() == [6] for name in ("chosen", "rejected"))


@bugs(
    ("ppo_rlhf", "torch.sigmoid(difference)  #", "torch.sigmoid(2 * difference)  #"),
    ("ppo_rlhf", "torch.rand(len(difference)) < torch.sigmoid(difference)", "difference > 0"),
    ("ppo_rlhf", "rejected=torch.where(column, two, one)", "rejected=torch.where(column, one, two)"),
)
def test_choices_see(request, name, old, new):
    fails_with_a_bug(request, test_people_choose_with_noise, name, old, new)


# The supervised phase


@each_language
def test_supervised_loss(module, tmp_path):
    """-log pi of the responses, prompts and padding left out, ends included."""
    args = tiny(module, tmp_path)
    _, model, tokens, real = ragged(module, args)
    loss, metrics = module.supervised_loss(model, tokens, real, args)
    logs = []
    for row, keep in zip(tokens, real):
        length = int(keep[-T:].sum())
        text = row[keep]
        logits = hand_made(model, text).log_softmax(-1)
        logs += [logits[t - 1, text[t]] for t in range(len(text) - length, len(text))]
    assert loss.item() == pytest.approx(-torch.stack(logs).mean().item(), rel=1e-5)
    assert metrics["loss"] == loss
    other, _ = module.supervised_loss(model, with_other_padding(tokens, real), real, args)
    assert torch.equal(loss, other)


@bugs(
    (
        "ppo_rlhf",
        "real[:, -args.max_new_tokens :]\n    loss = -torch",
        "real[:, -args.max_new_tokens :] | True\n    loss = -torch",
    ),
    (
        "ppo_rlhf",
        "0).sum() / mask.sum()\n    return loss, dict(loss",
        "0).sum() / mask.numel()\n    return loss, dict(loss",
    ),
)
def test_supervised_loss_sees(request, name, old, new):
    fails_with_a_bug(request, test_supervised_loss, name, old, new)


# Files, determinism, resuming


@pytest.fixture(scope="module", params=LANGUAGE, ids=name_of)
def alone(request, tmp_path_factory):
    """The script copied alone into an empty folder and run there: module, directory, what it said."""
    module = request.param
    return module, *run_alone(module.__file__, tmp_path_factory.mktemp("alone"), [*dashed(module), "--seed", "3"])


def test_files_of_a_run(alone):
    """The contract of config.json, metrics.jsonl, checkpoint.pt and result.json."""
    module, run_dir, printed = alone
    assert {path.name for path in run_dir.iterdir()} == FILES
    assert re.fullmatch(rf"{module.Args.env_id}__{name_of(module)}__3__\d+", run_dir.name)
    config = json.loads((run_dir / "config.json").read_text())
    assert config.keys() == vars(module.Args()).keys() | {"algo", "torch", "gymnasium"}
    result = json.loads((run_dir / "result.json").read_text())
    required = """algo env_id seed total_timesteps trained_steps eval_returns eval_cut eval_mean train_return sps
    wall_time eval_kl eval_distinct"""
    assert set(required.split()) <= result.keys()
    assert len(result["eval_returns"]) == 4
    rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert all(a["global_step"] < b["global_step"] for a, b in zip(rows, rows[1:]))
    assert rows[-1]["global_step"] == result["trained_steps"] <= 300
    assert printed.splitlines()[-1].startswith(f"runs/{run_dir.name}: evaluation ")
    assert f"runs/{run_dir.name}: step 0 of 300" in printed
    assert re.search(r"^before .*^after ", printed, re.MULTILINE | re.DOTALL)
    assert "supervised phase: sft loss" in printed


def fingerprint(folder) -> dict:
    """All tensors of a checkpoint, clocks aside."""
    parts = leaves(saved(folder))
    return {name: leaf for name, leaf in parts.items() if not re.search("wall_time|log_size", name)}


@each_language
def test_equal_runs_are_bit_identical(module, tmp_path):
    """Same arguments, same bits; another seed gives others; and a finished run is only evaluated again."""
    results = [module.train(tiny(module, tmp_path / name)) for name in ("one", "two")]
    one, two = fingerprint(tmp_path / "one"), fingerprint(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    other = module.train(tiny(module, tmp_path / "other", seed=2))
    assert results[0]["eval_returns"] == results[1]["eval_returns"] != other["eval_returns"]
    log = (tmp_path / "one" / "run" / "metrics.jsonl").read_bytes()
    again = module.train(module.parse_args(["--resume", str(tmp_path / "one" / "run")]))
    assert again == results[0]
    assert (tmp_path / "one" / "run" / "metrics.jsonl").read_bytes() == log


@each_language
def test_all_prompts_are_cut(module, tmp_path):
    """Texts longer than the transformer has positions for."""
    longest = []
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, module, "collate", before=lambda prompts, *_: longest.append(max(map(len, prompts))))
        with contextlib.suppress(IndexError):
            module.train(tiny(module, tmp_path, max_prompt_tokens=2))
    assert set(longest) == {2}
    assert (tmp_path / "run" / "result.json").exists()


@bugs(
    ("dpo", "[: args.max_prompt_tokens] for prompt, _ in", "for prompt, _ in"),
    ("grpo", "[: args.max_prompt_tokens] for prompt, _ in", "for prompt, _ in"),
    ("ppo_rlhf", "[: args.max_prompt_tokens] for prompt, _ in", "for prompt, _ in"),
)
def test_cut_prompts_see(request, name, old, new):
    fails_with_a_bug(request, test_all_prompts_are_cut, name, old, new)


@each_language
def test_the_step_size_falls_to_0(module, tmp_path):
    """One that rises or stays, or that falls with something else than the tokens learned from."""
    seen = defaultdict(list)  # by optimizer

    def note(optimizer, gradients):
        if type(optimizer) is torch.optim.Adam:  # the earlier phases take AdamW
            seen[id(optimizer)] += [group["lr"] for group in optimizer.param_groups]

    args = tiny(module, tmp_path, anneal_lr=True)
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, module, "descend", before=note)
        module.train(args)
    steps = [0, *(line["global_step"] for line in lines(tmp_path))]
    wanted = sorted((args.learning_rate * (1 - step / args.total_timesteps) for step in steps[:-1]), reverse=True)
    assert len(wanted) > 1
    for rates in seen.values():
        assert sorted(set(rates), reverse=True) == pytest.approx(wanted)


@bugs(
    ("dpo", "anneal(optimizer, 1 - run.step", "anneal(optimizer, 1 + run.step"),
    ("grpo", "anneal(actor_optimizer, 1 - run.step", "anneal(actor_optimizer, 1 + run.step"),
    ("ppo_rlhf", "anneal(actor_optimizer, 1 - run.step / args.total_timesteps)", "pass"),
    ("ppo_rlhf", "anneal(critic_optimizer, 1 - run.step / args.total_timesteps)", "pass"),
)
def test_step_sizes_see(request, name, old, new):
    fails_with_a_bug(request, test_the_step_size_falls_to_0, name, old, new)


@each_language
def test_the_first_step_of_each_optimizer(module, tmp_path):
    """Adam's, with an eps of 1e-5, down a gradient that is not too long; and the checkpoint keeps its moments."""
    steps = {}  # by optimizer: step size, gradient and move of each parameter
    parts = []
    descend = module.descend
    start = module.Run.__init__

    def watched(optimizer, gradients):
        is_first = type(optimizer) is torch.optim.Adam and id(optimizer) not in steps
        before = {parameter: parameter.detach().clone() for parameter in gradients}
        given = {parameter: gradient.clone() for parameter, gradient in gradients.items()}
        descend(optimizer, gradients)
        if is_first:
            (group,) = optimizer.param_groups
            steps[id(optimizer)] = [(group["lr"], given[p], p.detach() - before[p]) for p in before]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "descend", watched)
        patch.setattr(
            module.Run, "__init__", lambda run, args, **kept: (parts.extend(kept.values()), start(run, args, **kept))[1]
        )
        module.train(tiny(module, tmp_path, max_grad_norm=1e-3))
    assert len(steps) == (2 if hasattr(module, "value_loss") else 1)
    assert steps.keys() <= {id(part) for part in parts}
    for step in steps.values():
        norm = sum(gradient.square().sum() for _, gradient, _ in step).sqrt().item()
        assert norm == pytest.approx(1e-3, rel=1e-2)
        for rate, gradient, move in step:
            torch.testing.assert_close(move, -rate * gradient / (gradient.abs() + 1e-5), atol=1e-6, rtol=1e-3)


OPTIMIZERS = "        actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer, phases=phases,\n"


@bugs(
    ("ppo_rlhf", "gradients_of(value_loss, critic.parameters(), args, max_norm=args.max_grad_norm)",
     "gradients_of(value_loss, critic.parameters(), args)"),
    ("ppo_rlhf", "torch.optim.Adam(actor.parameters(), lr=args.learning_rate, eps=1e-5,",
     "torch.optim.Adam(actor.parameters(), lr=args.learning_rate,"),
    ("ppo_rlhf", OPTIMIZERS, "        actor_optimizer=actor_optimizer, phases=phases,\n"),
    ("dpo", "optimizer=optimizer, phases=phases)", "phases=phases)"),
    ("grpo", "actor_optimizer=actor_optimizer, phases=phases)", "phases=phases)"),
)  # fmt: skip
def test_the_first_step_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_first_step_of_each_optimizer, name, old, new)


class Death(BaseException):
    """What a kill looks like from inside."""


@each_language
@pytest.mark.parametrize("place", range(4))
def test_a_run_killed_in_any_phase_goes_on_in_that_phase(module, place, tmp_path, monkeypatch):
    """A phase done twice, left out, or done with other random numbers: the run is as if it had not been killed."""
    inside = ["learn_to_write", "collect_pairs", "fit_reward_model", "show"]
    inside = [name for name in inside if hasattr(module, name)]
    if place >= len(inside):
        pytest.skip("it has no such phase")
    counts = dict.fromkeys(inside, 0)
    with monkeypatch.context() as patch:
        for name in inside[:-1]:
            spy(patch, module, name, before=lambda *_, name=name: counts.update({name: counts[name] + 1}))
        whole = module.train(tiny(module, tmp_path / "whole"))
        assert set(list(counts.values())[:-1]) == {1}

    def die(*_):
        raise Death

    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        if inside[place] == "show":  # in PPO: before the first line of the log
            patch.setattr(module.Run, "log", die)
        else:
            original = getattr(module, inside[place])
            patch.setattr(module, inside[place], lambda *inputs: [original(*inputs), die()])
        with pytest.raises(Death):
            module.train(tiny(module, folder))
    counts = dict.fromkeys(inside, 0)
    with monkeypatch.context() as patch:
        for name in inside[:-1]:
            spy(patch, module, name, before=lambda *_, name=name: counts.update({name: counts[name] + 1}))
        again = module.train(module.parse_args(["--resume", str(folder / "run")]))
    same = [name for name in whole if name not in ("sps", "wall_time")]
    assert again.keys() == whole.keys()
    assert [counts[name] for name in inside[:-1]] == [int(i >= place) for i in range(len(inside) - 1)]
    assert [again[name] for name in same] == [whole[name] for name in same]
    one, two = fingerprint(tmp_path / "whole"), fingerprint(folder)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    kept = ("global_step", "kl", "proxy_reward", "loss")
    for left, right in zip(lines(tmp_path / "whole"), lines(folder), strict=True):
        assert {k: left[k] for k in kept if k in left} == {k: right[k] for k in kept if k in right}


@bugs(
    ("ppo_rlhf", "        torch.manual_seed(env_seed(run.args.seed, 600_000 + len(self.done)))\n", ""),
    ("ppo_rlhf", "numbers=self.numbers)", "numbers={})"),
    (
        "ppo_rlhf",
        "        reference.load_state_dict(actor.state_dict())\n",
        "        reference = copy.deepcopy(actor)\n",
    ),
)
def test_killed_phases_see(request, name, old, new):
    test = test_a_run_killed_in_any_phase_goes_on_in_that_phase
    fails_with_a_bug(request, test, name, old, new, place=1)


def test_a_last_phase_with_other_random_numbers_is_seen(request):
    test = test_a_run_killed_in_any_phase_goes_on_in_that_phase
    change = ("    torch.manual_seed(env_seed(args.seed, run.step))\n", "")
    fails_with_a_bug(request, test, "ppo_rlhf", *change, place=3)


@each_language
def test_ctrl_c_in_a_phase(module, tmp_path):
    """A phase that does not hear the signal, or one after which nothing can be resumed."""
    process = start(module, tmp_path, *dashed(module), "--sft-steps", "100000", "--run-dir", "run")
    for _ in range(600):
        if (tmp_path / "run" / "checkpoint.pt").exists():
            break
        process.process.join(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.wait()
    assert process.rc == 128 + signal.SIGINT
    assert "--resume run continues from step 0" in process.err
    assert module.train(module.parse_args(["--resume", str(tmp_path / "run"), "--sft-steps", "3", "--run-dir", "run"]))


@each_language
def test_resuming_with_more_steps_trains_on(module, tmp_path):
    """Phases that begin anew, lines that are lost, steps that are counted from 0."""
    module.train(tiny(module, tmp_path))
    before = lines(tmp_path)
    result = module.train(module.parse_args(["--resume", str(tmp_path / "run"), "--total-timesteps", "600"]))
    assert lines(tmp_path)[: len(before)] == before
    assert lines(tmp_path)[len(before)]["global_step"] > before[-1]["global_step"]
    most = 30 if hasattr(module.Args, "num_responses") else 80  # tokens per iteration
    assert 600 - most <= result["trained_steps"] == lines(tmp_path)[-1]["global_step"] <= 600


@each_language
@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--seed", 2, "seed 1"),
        ("--total-timesteps", 200, "steps already"),
        ("--hidden-size", 24, "does not hold the networks"),
    ],
)
def test_what_cannot_change_in_a_resumed_run(module, flag, value, words, tmp_path):
    """Refused in one sentence."""
    module.train(tiny(module, tmp_path))
    with pytest.raises(module.Refusal, match=words):
        module.train(module.parse_args(["--resume", str(tmp_path / "run"), flag, str(value)]))


@each_language
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--env-id nonsense", "no task nonsense"),
        ("--device tpu", "device tpu is not available"),
        ("--temperature 0", "temperature"),
        ("--total-timesteps 10", "total_timesteps"),
        ("--prompts nowhere.txt", "nobody knows what is good|nowhere"),
        ("--resume nowhere", "nowhere holds no run"),
        ("--model nowhere/nothing", "package is missing|could not be loaded"),
        ("--preferences nowhere.jsonl", "package is missing|could not be loaded"),
    ],
)
def test_bad_command_lines(module, argv, words, tmp_path, monkeypatch):
    """One sentence before training starts, and no directory."""
    if argv.startswith("--preferences") and not hasattr(module.Args, "preferences"):
        pytest.skip("it learns from no pairs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(module.Refusal, match=words) as error:
        module.train(module.parse_args(["--run-dir", "run", *argv.split()]))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@each_language
def test_training_that_diverges(module, tmp_path, monkeypatch):
    """The first number that is none ends the run with a sentence; the last good checkpoint is kept."""
    args = tiny(module, tmp_path)
    name = next(
        name for name in vars(module) if name.endswith("_loss") and name not in ("supervised_loss", "reward_loss")
    )
    loss = getattr(module, name)

    def broken(*inputs):
        value, metrics = loss(*inputs)
        return value * torch.nan, {key: metric * torch.nan for key, metric in metrics.items()}

    monkeypatch.setattr(module, name, broken)
    with pytest.raises(module.Refusal, match=r"diverged before step \d+; --resume \S+ continues from step 0"):
        module.train(args)
    assert all(leaf.isfinite().all() for leaf in leaves(saved(tmp_path)).values())


@each_language
def test_a_signal_ends_the_evaluation(module, tmp_path, monkeypatch):
    """A scheduler that waits and then kills: texts of a large model may take longer than its patience."""
    module.train(tiny(module, tmp_path))
    (tmp_path / "run" / "result.json").unlink()
    spy(monkeypatch, module, "judge", after=lambda *_: monkeypatch.setattr(module.Run, "stop_signal", 15))
    with pytest.raises(KeyboardInterrupt):
        module.train(module.parse_args(["--resume", str(tmp_path / "run")]))
    assert not (tmp_path / "run" / "result.json").exists()


# Prompts and pairs of one's own


@each_language
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("own.jsonl", b'{"prompt": "a"}\n[1]\n', "a line that is no JSON object"),
        ("own.jsonl", b'{"prompt": "a"}\n{"prompt": null}\n', "a row without a text called prompt"),
        ("own.jsonl", b'{"prompt": "a"}\n{}\n', "a row without a text called prompt"),
        ("own.txt", b"caf\xe9", "is no text"),
    ],
)
def test_prompts_that_are_no_texts(module, name, content, words, tmp_path):
    """One sentence, not a traceback from the depth of a reader."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(module.Refusal, match=words):
        module.read_texts(str(tmp_path / name), ["prompt"])


@each_language
def test_lines_end_where_json_says(module, tmp_path):
    """Separators of lines and paragraphs may stand inside a text; a line of JSON ends at the newline alone."""
    text = "one\u2028two\u0085three"
    (tmp_path / "own.jsonl").write_text(json.dumps(dict(prompt=text), ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert module.read_rows(str(tmp_path / "own.jsonl")) == [dict(prompt=text)]


@each_review
def test_pairs_that_are_cut(module, tmp_path, capsys):
    """Texts that lose their ends without a word, or pairs that differ only there, from which nothing is learned."""
    args = tiny(module, tmp_path, max_prompt_tokens=2)
    tokenizer, *_ = module.make_language_model(module.Reviews(args), args)
    pair = dict(prompt="the food was", chosen="clean .", rejected="the room was small but clean .")
    columns = module.encode_pairs([pair, pair | dict(prompt="the food")], tokenizer, args)
    assert columns["chosen"].shape == columns["rejected"].shape == (2, 2 + T)
    told = f"2 of 4 responses are cut, longer than --max-new-tokens {T}\n"
    assert capsys.readouterr().out == f"{told}1 of 2 prompts are cut, longer than --max-prompt-tokens 2\n"
    alike = dict(prompt="the food", chosen="the room was clean and .", rejected="the room was clean and small .")
    with pytest.raises(module.Refusal, match=f"no pair of .*differs within max_new_tokens = {T}"):
        module.encode_pairs([alike], tokenizer, args)


@each_language
def test_prompts_and_pairs_of_ones_own(module, tmp_path, monkeypatch):
    """Ragged prompts from a text file, pairs from JSON lines, words that the task does not know; all are used."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the hotel\n\nthe food was not\nmy\n")
    pairs = tmp_path / "pairs.jsonl"
    row = dict(prompt="my room", chosen="was splendid .", rejected="was small .")
    pairs.write_text("\n".join([json.dumps(row)] * 12))
    seen = []
    spy(monkeypatch, module, "texts_of", after=lambda texts, *_: seen.extend(texts))
    args = tiny(module, tmp_path, prompts=str(prompts), preferences=str(pairs))
    result = module.train(args)
    assert all(re.match("the hotel|the food was not|my", text) for text in seen)
    assert len({text.split()[1] if text.startswith("the") else "my" for text in seen}) == 3
    assert np.isfinite(result["eval_returns"]).all()
    if hasattr(module, "Reviews"):
        assert "splendid" in module.Reviews(args).words


@each_review
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no json", "no JSON"),
        ('{"prompt": "a", "chosen": "b"}', "without a text called rejected"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "fewer than 10"),
    ],
)
def test_bad_pairs(module, text, words, tmp_path):
    """Refused before training starts."""
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(module.Refusal, match=words):
        module.train(tiny(module, tmp_path, preferences=str(tmp_path / "pairs.jsonl")))
    assert not (tmp_path / "run").exists()


# Hugging Face: without the hub, from folders


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder with a tiny GPT-2 and a classifier, each with its tokenizer of words, and one with a data set."""
    transformers = pytest.importorskip("transformers", reason="requirements-lm.txt")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("hub")
    words = [
        "<unk>",
        "<|endoftext|>",
        *sorted(
            {
                *ALL,
                *NOUNS,
                *map(str, range(100)),
                *"+-*:",
                "->",
                "the",
                "was",
                "and",
                "but",
                ",",
                ".",
                "not",
                "very",
                "i",
                "will",
                "come",
                "back",
            }
        ),
    ]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_embd=16, n_head=2, n_positions=512, vocab_size=len(words), bos_token_id=1, eos_token_id=1)
    config = transformers.GPT2Config(**sizes, initializer_range=0.5, pad_token_id=1)
    for name, kind in (("gpt", "GPT2LMHeadModel"), ("classifier", "GPT2ForSequenceClassification")):
        getattr(transformers, kind)(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "texts").mkdir()
    rows = [dict(text=f"the {noun} was {rest}".strip()) for noun in NOUNS for rest in ("", "not very")]
    (folder / "texts" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@each_language
def test_a_hugging_face_model_with_padding(module, hub):
    """Left padding, positions, cache, dropout: each text has the logits that it has alone; pad may be the end."""
    transformers = pytest.importorskip("transformers")
    tokenizer, model = module.load_language_model(str(hub / "gpt"))
    assert tokenizer.end == tokenizer.tokenizer.pad_token_id == 1
    prompts = [tokenizer.encode(text, True) for text in ("the", "the food was", "the food was not very")]
    tokens, real = module.collate(prompts, [[] for _ in prompts], 0)
    recorded = []
    handle = model.head.register_forward_hook(lambda *parts: recorded.append(parts[-1]))
    tokens, real = module.generate(model, tokens, real, T, 1.0, tokenizer.end)
    handle.remove()
    logits = model(tokens, real, T)
    alone = transformers.AutoModelForCausalLM.from_pretrained(hub / "gpt").eval()
    for row, keep, found in zip(tokens, real, logits):
        length = int(keep[-T:].sum())
        expected = alone(row[keep][None]).logits[0, -length - 1 : -1]
        torch.testing.assert_close(found[:length], expected, atol=1e-4, rtol=1e-4)
    for t, given in enumerate(recorded):
        running = real[:, -T + t]
        torch.testing.assert_close(given[running], logits[running, t], atol=1e-4, rtol=1e-4)
    loss, _ = module.supervised_loss(model, tokens, real, module.Args(max_new_tokens=T))
    assert torch.autograd.grad(loss, model.head.weight)[0][tokenizer.end].abs().max() > 0


@bugs(
    ("ppo_rlhf", "attention_mask=real.long(),", ""),
    ("ppo_rlhf", "position_ids=positions_of(real)[:, -tokens.shape[1] :],", ""),
    ("ppo_rlhf", "return tokenizer, found", "return tokenizer, found.train()"),
)
def test_padding_of_hugging_face_sees(request, name, old, new):
    fails_with_a_bug(request, test_a_hugging_face_model_with_padding, name, old, new)


@each_language
def test_logits_that_are_changed_after_the_output_layer(module, hub, tmp_path):
    """A model that scales them: it would act by a policy that is not its own."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    for scaling in (1.0, 8.0):
        config = transformers.GraniteConfig(**sizes, num_key_value_heads=2, logits_scaling=scaling)
        folder = shutil.copytree(hub / "gpt", tmp_path / str(scaling))  # with the tokenizer
        transformers.GraniteForCausalLM(config).save_pretrained(folder)
    assert module.load_language_model(str(tmp_path / "1.0"))
    with pytest.raises(module.Refusal, match="changes logits after its output layer"):
        module.load_language_model(str(tmp_path / "8.0"))


@each_language
def test_a_run_with_a_hugging_face_model(module, hub, tmp_path):
    """All phases on the task; and a run resumed."""
    argv = ["--model", str(hub / "gpt"), "--run-dir", str(tmp_path / "run"), *dashed(module)]
    args = module.parse_args(argv)
    assert args.learning_rate == module.FAMILIES["Hugging-Face"]["learning_rate"]
    result = module.train(args)
    assert np.isfinite(result["eval_returns"]).all()
    again = module.train(module.parse_args(["--resume", str(tmp_path / "run")]))
    assert again["eval_returns"] == result["eval_returns"]


@pytest.mark.parametrize("module", [m for m in LANGUAGE if hasattr(m, "GivenReward")], ids=name_of)
def test_a_data_set_and_a_classifier(module, hub, tmp_path):
    """Prompts of a data set and the scores of a classifier: nothing is learned before PPO, all start as they came."""
    pytest.importorskip("datasets")
    argv = ["--model", str(hub / "gpt"), "--prompts", str(hub / "texts"), "--reward-model", str(hub / "classifier")]
    args = module.parse_args([*argv, "--run-dir", str(tmp_path / "run"), *dashed(module)])
    assert len(module.Reviews(args).own_prompts) == 32
    result = module.train(args)
    assert np.isfinite(result["eval_returns"]).all()
    assert "sft_loss" not in result
    transformers = pytest.importorskip("transformers")
    original = transformers.AutoModelForCausalLM.from_pretrained(hub / "gpt")
    found = saved(tmp_path)["reference"]
    assert torch.equal(found["head.weight"], original.lm_head.weight)
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(hub / "classifier").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub / "classifier")
    given = module.GivenReward(module.load_language_model(str(hub / "gpt"))[0], args)
    expected = torch.stack([judge(**tokenizer(text, return_tensors="pt")).logits[0, -1] for text in ("the bar", "i")])
    torch.testing.assert_close(given.function(["the bar", "i"]), expected, atol=1e-4, rtol=1e-4)


@each_language
def test_models_and_data_sets_that_cannot_be_loaded(module, hub, tmp_path, monkeypatch):
    """One sentence, and no directory."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    model = ["--model", str(tmp_path / "empty")]
    data = ["--model", str(hub / "gpt"), "--prompts", str(tmp_path / "empty")]
    if hasattr(module.Args, "preferences"):
        data += ["--preferences", str(tmp_path / "empty")]
    else:
        data += ["--reward-function", "language:length"]
    long = ["--model", str(hub / "gpt"), "--max-prompt-tokens", "510"]
    for argv in (model, data, long):
        with pytest.raises(module.Refusal, match=r"could not be loaded|holds no|takes 512 tokens"):
            module.train(module.parse_args([*argv, "--run-dir", str(tmp_path / "run"), *dashed(module)]))
        assert not (tmp_path / "run").exists()
