# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.2.6", "gymnasium==1.4.0", "tyro==1.0.17", "tqdm==4.70.1",
#   "filelock==3.20.0", "wandb==0.31.0", "transformers==5.20.2", "datasets==5.2.0"]
# ///
"""DPO: direct preference optimization, what RLHF is after, as one loss on the pairs.

Rafailov et al. 2023, arXiv:2305.18290. Child of ppo_rlhf.py: the pairs train the policy itself, without reward model,
critic and samples.

    L = -E[log sigmoid(beta log(pi(y|x) / pi_ref(y|x)) - beta log(pi(y'|x) / pi_ref(y'|x)))]    y chosen, y' rejected

Its parent fits r to choices and seeks the policy with the largest E[r - beta log(pi / pi_ref)]. That policy is
known: pi_ref exp(r / beta) / Z(x) (eq. 4). So r is beta log(pi / pi_ref), up to a beta log Z(x) that both texts of a
pair share (eq. 5), and the parent's loss of the reward model becomes a loss of the policy.

    python algos/dpo.py --env-id reviews    # true reward 3.4 after 104,000 tokens, from -1.3
    python algos/dpo.py --env-id reviews --kl-coef 0.1    # too small: the chosen texts become unlikely, too
    python algos/dpo.py --env-id reviews --model gpt2 --preferences pairs.jsonl

Only differences count: the log-probabilities of chosen and rejected texts may both fall, and texts that are in no pair
gain. So watch chosen_log_prob in the log. A step is a token of a response; the default is one pass over the pairs. Of
pairs of your own nobody knows the true reward, and 0 is shown.

Not in the paper: a small transformer, Adam in place of RMSprop, clipped gradients, a step size that falls to 0 without
a warm-up, and a few responses for each line of the log, from which nothing is learned. In the paper, but not here: a
reference without its own training is first fitted to the chosen texts.

Read to the end of train(); what follows the ruler is plumbing that the scripts share.
"""

import argparse
import copy
import functools
import importlib
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

import filelock
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.distributions import Categorical
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "reviews"  # the task
    total_timesteps: int = 104_000  # tokens of responses to learn from in the last phase
    num_demonstrations: int = 20_000  # texts to learn to write from
    sft_steps: int = 800  # gradient steps of the supervised phase
    sft_learning_rate: float = 3e-3  # their step size, which falls linearly to 0
    num_pairs: int = 4000  # pairs of responses that people choose from
    batch_size: int = 64  # demonstrations (or pairs, where there are any) per gradient step
    max_new_tokens: int = 29  # T, the largest number of tokens in a response
    temperature: float = 1.0  # divides the logits in sampling and, but for the supervised phase, in probabilities
    kl_coef: float = 0.5  # beta, weight of the KL to the reference
    learning_rate: float = 1e-3  # step size of the last phase
    anneal_lr: bool = True  # let the step size fall linearly to 0
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this norm
    hidden_size: int = 64  # width of the transformer
    num_layers: int = 2  # blocks of the transformer
    compile: bool = False  # compile the gradient steps

    model: str = "tiny"  # tiny, the transformer below, or the name or directory of a Hugging Face model
    prompts: str = ""  # your prompts: lines of a text file, JSON lines or a data set; if empty, the task's
    max_prompt_tokens: int = 16  # longer prompts lose their end
    preferences: str = ""  # your pairs: JSON lines or a data set with prompt, chosen, rejected; if empty, the task's

    seed: int = 1  # of weights, texts and minibatches
    device: str = "auto"  # cpu, cuda, cuda:1, mps or auto: a CUDA GPU if there is one, else the CPU
    torch_threads: int = 1  # CPU threads, 0 for one per core; small networks are fastest with 1
    run_dir: str = ""  # where the results go; if empty, runs/<env>__<algo>__<seed>__<time>
    track: bool = False  # log to Weights & Biases
    wandb_project: str = "foliorl"  # the project there
    wandb_entity: str = ""  # the user or team there; if empty, your default
    log_responses: int = 32  # responses to look at for each line of the log
    eval_episodes: int = 256  # responses of the final evaluation
    checkpoint_every: int = 25_000  # tokens between checkpoints
    resume: str = ""  # run directory to continue; a finished run is only evaluated again

    def __post_init__(self) -> None:
        minimum = dict(seed=0, torch_threads=0, sft_steps=0, num_pairs=10, temperature=1e-3)
        check_ranges(self, minimum, maximum={})
        if 2 * self.batch_size * self.max_new_tokens > self.total_timesteps:
            raise Refusal("2 * batch_size * max_new_tokens may not exceed total_timesteps")
        if self.prompts and not self.preferences:
            raise Refusal("prompts of your own need preferences: nobody knows what is good there")


def response_log_prob(model: nn.Module, tokens: Tensor, real: Tensor, args: Args) -> Tensor:
    """log pi(y|x) (B,) of the responses in tokens (B, L): the sum over their tokens, without prompts and padding."""
    T = args.max_new_tokens
    policy = response_policy(model, tokens, real, T, args.temperature)
    log_probs = policy.log_prob(tokens[:, -T:])
    return torch.where(real[:, -T:], log_probs, 0).sum(-1)


def dpo_loss(
    actor: nn.Module, reference: nn.Module, batch: dict[str, Tensor], args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log P(chosen > rejected) on a batch of pairs, where the policy is its own reward model; and what to log."""
    chosen = response_log_prob(actor, batch["chosen"], batch["chosen_real"], args)
    rejected = response_log_prob(actor, batch["rejected"], batch["rejected_real"], args)
    ref_chosen = response_log_prob(reference, batch["chosen"], batch["chosen_real"], args)
    ref_rejected = response_log_prob(reference, batch["rejected"], batch["rejected_real"], args)

    chosen_reward = args.kl_coef * (chosen - ref_chosen)  # r(x, y) - beta log Z(x), eq. 5
    rejected_reward = args.kl_coef * (rejected - ref_rejected)
    loss = -F.logsigmoid(chosen_reward - rejected_reward).mean()  # eq. 7

    metrics = dict(
        loss=loss.detach(),
        # Of choices not seen before, in the first pass; 0 at the start, where all rewards are 0.
        accuracy=(chosen_reward > rejected_reward).float().mean(),
        chosen_log_prob=chosen.mean().detach(),
        rejected_log_prob=rejected.mean().detach(),
        chosen_reward=chosen_reward.mean().detach(),
        rejected_reward=rejected_reward.mean().detach(),
    )
    return loss, metrics


def shuffled_batches(pairs: dict[str, Tensor], args: Args) -> Iterator[dict[str, Tensor]]:
    """Batches of pairs, pass after pass over all of them, each in another order; a resumed run has the same."""
    generator = torch.Generator().manual_seed(env_seed(args.seed, 0))
    while True:
        for rows in torch.randperm(len(pairs["chosen"]), generator=generator).split(args.batch_size):
            yield {name: column[rows] for name, column in pairs.items()}


def train(args: Args) -> dict:
    """Train, evaluate, and return what result.json holds; raises Refusal with one sentence on bad input."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    device = pick_device(args.device)
    task = Reviews(args)
    tokenizer, actor = make_language_model(task, args)
    actor = actor.to(device)
    reference = copy.deepcopy(actor).requires_grad_(False)
    optimizer = torch.optim.Adam(actor.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    dpo_gradients = gradients_of(dpo_loss, actor.parameters(), args, max_norm=args.max_grad_norm)
    phases = Phases()
    run = Run(args, actor=actor, reference=reference, optimizer=optimizer, phases=phases)

    # Learn to write from demonstrations: the result is the first actor and, for good, the reference.
    if phases.begin("supervised", run):
        numbers = learn_to_write(actor, tokenizer, task, run, args)
        reference.load_state_dict(actor.state_dict())
        phases.end("supervised", run, numbers)

    # Let people choose between two responses of the reference to each prompt.
    if phases.begin("pairs", run):
        phases.pairs, numbers = collect_pairs(reference, tokenizer, task, args)
        phases.end("pairs", run, numbers)

    # DPO: learn from their choices.
    torch.manual_seed(env_seed(args.seed, run.step))
    T = args.max_new_tokens
    pairs = {name: column.to(device) for name, column in phases.pairs.items()}
    step = 0
    for batch in shuffled_batches(pairs, args):
        num_tokens = int(batch["chosen_real"][:, -T:].sum() + batch["rejected_real"][:, -T:].sum())
        step += num_tokens
        if step <= run.step:
            continue  # what a resumed run has learned from already
        if step > args.total_timesteps:
            break
        if args.anneal_lr:
            anneal(optimizer, 1 - run.step / args.total_timesteps)
        gradients, metrics = dpo_gradients(actor, reference, batch, args)
        descend(optimizer, gradients)

        # Look at what the actor writes by now.
        seen = judge(actor, reference, None, task.prompts(args.log_responses), tokenizer, task, args)
        run.episode_returns += seen["gold"].tolist()
        means = dict(gold=seen["gold"].mean(), kl=seen["kl"].mean())
        metrics |= dict(
            gold_reward=means["gold"], kl=means["kl"], eos_fraction=seen["ended"].float().mean(),
            distinct_fraction=torch.tensor(len(set(seen["texts"])) / args.log_responses),
        )  # fmt: skip
        run.log(step, mean_metrics([metrics]))
        of_first = dict(gold=seen["gold"][0], kl=seen["kl"][0])
        show(run, num_tokens, means, seen["texts"][0], of_first)

    run.save()
    return run.finish(evaluate(actor, reference, None, tokenizer, task, args) | phases.numbers)


# Defaults in place of those of Args: of the task or, with --model, of models that have learned to write already.
FAMILIES = {
    "reviews": dict(),
    "Hugging-Face": dict(
        kl_coef=0.1, sft_learning_rate=5e-5, learning_rate=1e-6, sft_steps=200, batch_size=32, log_responses=4,
        max_new_tokens=128, max_prompt_tokens=256,
    ),
}  # fmt: skip


# ====================================================================================================================
# What follows is plumbing: no algorithm is in it, and every script that needs a part of it has the same text.


class Refusal(Exception):
    """Bad input or a fault from outside, said in one sentence; main() prints it without a traceback."""


class Transformer(nn.Module):
    """Features of each token, which know the tokens before it (Vaswani et al. 2017, Radford et al. 2019)."""

    def __init__(self, num_tokens: int, max_length: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.width = width
        self.token_embedding = nn.Embedding(num_tokens, width)
        self.position_embedding = nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, real: Tensor, cache: dict | None = None) -> Tensor:
        """Features (B, n, width) of tokens (B, n), the last n of a text whose padding is not real (B, L).

        A cache keeps keys and values of the tokens before, so that only the new tokens need to be given.
        """
        n = tokens.shape[1]
        x = self.token_embedding(tokens) + self.position_embedding(positions_of(real)[:, -n:])
        visible = visible_tokens(real)[:, :, -n:]
        for block in self.blocks:
            x = block(x, visible, cache)
        return self.norm(x)


class Block(nn.Module):
    """Attention to the tokens before and an MLP; each sees normalised features and adds to them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = max(width // 16, 1)
        self.norm1 = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, visible: Tensor, cache: dict | None) -> Tensor:
        """Features (B, n, width) from features of the same shape and what each token sees (B, 1, n, L)."""
        B, n, width = x.shape
        heads = self.queries_keys_values(self.norm1(x)).view(B, n, 3, self.num_heads, width // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, heads, n, width of a head)
        if cache is not None:
            if self in cache:
                past_k, past_v = cache[self]
                k = torch.cat([past_k, k], dim=2)
                v = torch.cat([past_v, v], dim=2)
            cache[self] = (k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.output(y.transpose(1, 2).reshape(B, n, width))
        return x + self.mlp(self.norm2(x))


def positions_of(real: Tensor) -> Tensor:
    """Positions (B, L) in the text, counted from its first real token, wherever padding has moved it."""
    return (real.cumsum(1) - 1).clamp(min=0)


def visible_tokens(real: Tensor) -> Tensor:
    """Which tokens each token sees (B, 1, L, L): the real ones up to itself, and itself even if it is padding."""
    L = real.shape[1]
    itself = torch.eye(L, dtype=torch.bool, device=real.device)
    causal = torch.ones(L, L, dtype=torch.bool, device=real.device).tril()
    return real[:, None, None, :] & causal | itself


class LanguageModel(nn.Module):
    """Logits of the next token: a linear head on the features of a body."""

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, tokens: Tensor, real: Tensor, num_tokens: int) -> Tensor:
        """Logits (B, T, V) from which the last num_tokens = T of tokens (B, L) were chosen."""
        return self.head(self.body(tokens, real)[:, -num_tokens - 1 : -1])


def response_policy(model: nn.Module, tokens: Tensor, real: Tensor, num_tokens: int, temperature: float) -> Categorical:
    """pi(.|x, y_<t) (B, T) before each of the last num_tokens = T of tokens (B, L)."""
    return Categorical(logits=model(tokens, real, num_tokens) / temperature, validate_args=False)


@torch.no_grad()
def generate(
    model: LanguageModel, prompts: Tensor, real: Tensor, num_tokens: int, temperature: float, end: int
) -> tuple[Tensor, Tensor]:
    """Tokens (B, P + T), prompts (B, P) with sampled responses of at most num_tokens = T; and which are real.

    A response goes up to and including its first token `end`; what follows that is padding.
    """
    P = prompts.shape[1]
    tokens = F.pad(prompts, (0, num_tokens))
    real = F.pad(real, (0, num_tokens))
    running = torch.ones_like(real[:, 0])
    cache = {}
    start = 0
    for t in range(P, P + num_tokens):
        features = model.body(tokens[:, start:t], real[:, :t], cache)
        logits = model.head(features[:, -1]) / temperature
        noise = -torch.empty_like(logits).exponential_().log()
        tokens[:, t] = (logits + noise).argmax(-1) * running  # Gumbel-max: now argmax is a sample
        real[:, t] = running
        running = running & (tokens[:, t] != end)
        start = t
        if not running.any():
            break
    return tokens, real


def sample(model: LanguageModel, prompts: list[str], tokenizer: object, args: Args) -> tuple[Tensor, Tensor]:
    """Tokens (B, P + T) of the prompts with sampled responses, and which of them are real."""
    device = next(model.parameters()).device
    encoded = [tokenizer.encode(prompt, True)[: args.max_prompt_tokens] for prompt in prompts]
    tokens, real = collate(encoded, [[] for _ in encoded], 0)
    parts = []
    for rows in torch.arange(len(tokens)).split(512):  # all at once could be too much for the memory
        part = (tokens[rows].to(device), real[rows].to(device))
        parts.append(generate(model, *part, args.max_new_tokens, args.temperature, tokenizer.end))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def collate(prompts: list[list[int]], responses: list[list[int]], num_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, P + T) and which are real: each prompt ends, and each response begins, in the same column."""
    P = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), P + num_tokens, dtype=torch.long)
    real = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        text = prompt + response[:num_tokens]
        first = P - len(prompt)
        tokens[row, first : first + len(text)] = torch.tensor(text)
        real[row, first : first + len(text)] = True
    return tokens, real


def has_ended(tokens: Tensor, real: Tensor, num_tokens: int, tokenizer: object) -> Tensor:
    """Whether a response (B,) came to its end within its num_tokens tokens."""
    is_end = (tokens == tokenizer.end) & real
    return is_end[:, -num_tokens:].any(1)


def texts_of(tokens: Tensor, real: Tensor, tokenizer: object) -> list[str]:
    """Prompts and responses as text, without padding and ends."""
    kept = (real & (tokens != tokenizer.end)).cpu()
    return [tokenizer.decode(row[keep].tolist()) for row, keep in zip(tokens.cpu(), kept)]


@torch.no_grad()
def score(model: nn.Module, tokens: Tensor, real: Tensor) -> Tensor:
    """The scores (B,) of a reward model, some texts at a time."""
    return torch.cat([model(*part) for part in zip(tokens.split(512), real.split(512))])


class Words:
    """A tokenizer: every word of a list has its number, and so has the end of a text."""

    end = 1

    def __init__(self, words: list[str]) -> None:
        self.words = ["<pad>", "<end>", *words]
        self.numbers = {word: number for number, word in enumerate(self.words)}

    def encode(self, text: str, is_start: bool) -> list[int]:
        """The numbers of the words; is_start is for tokenizers that mark the start of a text."""
        return [self.numbers[word] for word in text.split()]

    def decode(self, numbers: list[int]) -> str:
        """The words, with spaces between them."""
        return " ".join(self.words[number] for number in numbers)


class Reviews:
    """Reviews of hotels from a small grammar, more of them bad than good, and the taste of a guest who reads them."""

    def __init__(self, args: Args) -> None:
        if args.env_id != "reviews":
            raise Refusal(f"there is no task {args.env_id}: there is reviews")
        self.own_pairs = read_pairs(args.preferences)
        self.own_prompts = read_texts(args.prompts, ["prompt", "query", "text"])
        self.own_prompts = self.own_prompts or [pair["prompt"] for pair in self.own_pairs]
        nouns = "food room view pool staff bar breakfast bed music garden wine soup coffee waiter service location"
        self.nouns = nouns.split()
        good = dict(good=1, nice=1, clean=1, kind=1, fresh=1, warm=1, lovely=2, great=2, superb=3, wonderful=3)
        good |= dict(perfect=3, delightful=2)
        bad = dict(bad=-1, cold=-1, dirty=-1, slow=-1, rude=-2, loud=-1, stale=-1, boring=-1, awful=-3, terrible=-3)
        bad |= dict(horrible=-3, nasty=-2)
        neutral = dict(small=0, big=0, old=0, modern=0, simple=0, busy=0)
        self.moods = {1: good, 0: neutral, -1: bad}
        self.adjectives = good | bad | neutral  # with what each is worth
        self.adverbs = {"very": 1.5, "really": 1.5, "quite": 0.75, "a bit": 0.5}
        others = "the was not very really quite a bit and but , . i will never come back"
        own = " ".join([*self.own_prompts, *(" ".join(pair.values()) for pair in self.own_pairs)])
        self.words = sorted({*self.nouns, *self.adjectives, *others.split(), *own.split()})

    def prompts(self, count: int) -> list[str]:
        """Starts of reviews."""
        starts = self.own_prompts or [f"the {noun} was" for noun in self.nouns]
        return [starts[i] for i in torch.randint(len(starts), (count,))]

    def demonstrations(self, count: int) -> list[tuple[str, str]]:
        """Reviews as people write them, each as a prompt and a response."""
        rng = random.Random(int(torch.randint(2**31 - 1, ())))
        reviews = [self.review(rng).split(" ", 3) for _ in range(count)]
        return [(" ".join(words[:3]), f" {words[3]}") for words in reviews]

    def review(self, rng: random.Random) -> str:
        """One to three clauses of mostly one mood, and perhaps whether the guest will come back."""
        mood = rng.choice([1, -1, -1])
        nouns = rng.sample(self.nouns, rng.choice([1, 2, 2, 3, 3]))
        clauses = [self.clause(rng, noun, mood) for noun in nouns]
        text = clauses[0]
        for clause in clauses[1:]:
            contrast = " but " if rng.random() < 0.2 else " and "
            text += rng.choice([" and ", " , ", contrast]) + clause
        if rng.random() < 0.5:
            comes_back = (mood > 0) == (rng.random() < 0.9)
            text += " . i will come back" if comes_back else " . i will never come back"
        return text + " ."

    def clause(self, rng: random.Random, noun: str, mood: int) -> str:
        """The noun was good or, in the same sense, not bad; now and then in another mood, or in none."""
        if rng.random() >= 0.8:
            mood = -mood
        if rng.random() < 0.15:
            mood = 0
        adjective = rng.choice(list(self.moods[mood]))
        style = rng.random()
        if mood != 0 and style < 0.15:
            adjective = "not " + rng.choice(list(self.moods[-mood]))
        elif style < 0.45:
            adjective = f"{rng.choice(list(self.adverbs))} {adjective}"
        return f"the {noun} was {adjective}"

    def reward(self, text: str, ended: bool) -> float:
        """The taste: praise and blame, less what is said twice, what is no sentence, and a text without an end."""
        words = text.split()
        reward = 0.0 if ended else -2.0
        said = []
        while words:
            if words[0] == "the" and len(words) > 2 and words[1] in self.nouns and words[2] == "was":
                said.append(words[1])
                factor, words = self.read_adverb(words[3:])
                if words and words[0] in self.adjectives:
                    said.append(words[0])
                    reward += factor * self.adjectives[words[0]]
                    words = words[1:]
                else:
                    reward -= 1
            elif " ".join(words[:5]) == "i will never come back":
                reward -= 2
                words = words[5:]
            elif " ".join(words[:4]) == "i will come back":
                said.append("back")
                reward += 2
                words = words[4:]
            else:
                reward -= words[0] not in ("and", "but", ",", ".")
                words = words[1:]
        return reward - 2 * (len(said) - len(set(said)))

    def read_adverb(self, words: list[str]) -> tuple[float, list[str]]:
        """How much the adjective counts behind the words that come first, and the words from there on."""
        if words[:1] == ["not"]:
            return -0.5, words[1:]
        for adverb, factor in self.adverbs.items():
            length = len(adverb.split())
            if words[:length] == adverb.split():
                return factor, words[length:]
        return 1.0, words

    def rewards(self, texts: list[str], ended: Tensor, proxy: Tensor) -> Tensor:
        """True rewards (B,) of texts; of your own prompts, whose true reward nobody knows, the proxy."""
        if self.own_prompts:
            return proxy.cpu()
        return torch.tensor([self.reward(text, end) for text, end in zip(texts, ended.tolist())])


def make_language_model(task: object, args: Args) -> tuple[object, LanguageModel]:
    """A tokenizer, and the model of --model with a head for its tokens."""
    max_length = args.max_prompt_tokens + args.max_new_tokens
    if args.model != "tiny":
        tokenizer, model = load_language_model(args.model)
        limit = getattr(model.body.model.config, "max_position_embeddings", max_length)
        if max_length > limit:
            raise Refusal(f"model {args.model} takes {limit} tokens, fewer than max_prompt_tokens + max_new_tokens")
        return tokenizer, model
    tokenizer = Words(task.words)
    body = Transformer(len(tokenizer.words), max_length, args.hidden_size, args.num_layers)
    head = nn.Linear(args.hidden_size, len(tokenizer.words))
    nn.init.normal_(head.weight, std=0.02)
    return tokenizer, LanguageModel(body, head)


def supervised_loss(model: LanguageModel, tokens: Tensor, real: Tensor, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """-log pi(y|x) per token of the responses, and what to log."""
    policy = response_policy(model, tokens, real, args.max_new_tokens, 1.0)
    mask = real[:, -args.max_new_tokens :]
    loss = -torch.where(mask, policy.log_prob(tokens[:, -args.max_new_tokens :]), 0).sum() / mask.sum()
    return loss, dict(loss=loss.detach())


def learn_to_write(model: LanguageModel, tokenizer: object, task: object, run: "Run", args: Args) -> dict:
    """Fit the model to demonstrations of the task, unless it has learned to write elsewhere; the last losses' mean."""
    if args.sft_steps == 0 or (task.own_prompts and args.model != "tiny"):
        return {}
    device = next(model.parameters()).device
    demonstrations = task.demonstrations(args.num_demonstrations)
    prompts = [tokenizer.encode(prompt, True)[: args.max_prompt_tokens] for prompt, _ in demonstrations]
    responses = [[*tokenizer.encode(response, False), tokenizer.end] for _, response in demonstrations]
    tokens, real = collate(prompts, responses, args.max_new_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.sft_learning_rate, fused=True)
    gradients_of_loss = gradients_of(supervised_loss, model.parameters(), args)
    losses = []
    for step in run_phase("supervised", range(args.sft_steps), run):
        anneal(optimizer, 1 - step / args.sft_steps)
        rows = torch.randint(len(tokens), (args.batch_size,))
        gradients, metrics = gradients_of_loss(model, tokens[rows].to(device), real[rows].to(device), args)
        descend(optimizer, gradients)
        losses.append(metrics)
    return dict(sft_loss=mean_metrics(losses[-100:])["loss"])


def collect_pairs(model: LanguageModel, tokenizer: object, task: object, args: Args) -> tuple[dict, dict]:
    """Pairs (num_pairs, L) of a chosen and a rejected response, and how often the choice was that of the taste."""
    if task.own_pairs:
        return encode_pairs(task.own_pairs, tokenizer, args), {}
    prompts = task.prompts(args.num_pairs)
    one, one_real = sample(model, prompts, tokenizer, args)
    two, two_real = sample(model, prompts, tokenizer, args)
    rewards = []
    for tokens, real in ((one, one_real), (two, two_real)):
        ended = has_ended(tokens, real, args.max_new_tokens, tokenizer)
        rewards.append(task.rewards(texts_of(tokens, real, tokenizer), ended, ended))
    difference = rewards[0] - rewards[1]
    first_chosen = torch.rand(len(difference)) < torch.sigmoid(difference)  # people err where it is small
    column = first_chosen[:, None].to(one.device)
    pairs = dict(
        chosen=torch.where(column, one, two), chosen_real=torch.where(column, one_real, two_real),
        rejected=torch.where(column, two, one), rejected_real=torch.where(column, two_real, one_real),
    )  # fmt: skip
    agreement = ((difference > 0) == first_chosen).float().mean().item()
    return {name: tensor.cpu() for name, tensor in pairs.items()}, dict(taste_accuracy=agreement)


def encode_pairs(pairs: list[dict[str, str]], tokenizer: object, args: Args) -> dict[str, Tensor]:
    """The pairs of --preferences as tokens (num_pairs, L). Says how many are cut; raises Refusal if none differ."""
    P = args.max_prompt_tokens
    T = args.max_new_tokens
    prompts = [tokenizer.encode(pair["prompt"], True) for pair in pairs]
    columns = {}
    num_cut = 0
    for key in ("chosen", "rejected"):
        responses = [[*tokenizer.encode(pair[key], False), tokenizer.end] for pair in pairs]
        num_cut += sum(len(response) > T for response in responses)
        columns[key], columns[f"{key}_real"] = collate([prompt[:P] for prompt in prompts], responses, T)
    if torch.equal(columns["chosen"], columns["rejected"]):
        raise Refusal(f"no pair of {args.preferences} differs within max_new_tokens = {T}")
    if num_cut:
        print(f"{num_cut} of {2 * len(pairs)} responses are cut, longer than --max-new-tokens {T}", flush=True)
    num_cut = sum(len(prompt) > P for prompt in prompts)
    if num_cut:
        print(f"{num_cut} of {len(pairs)} prompts are cut, longer than --max-prompt-tokens {P}", flush=True)
    return columns


def read_pairs(name: str) -> list[dict[str, str]]:
    """The pairs of --preferences, at least ten, if there are any."""
    if not name:
        return []
    pairs = read_rows(name)
    for key in ("prompt", "chosen", "rejected"):
        if not all(isinstance(pair.get(key), str) for pair in pairs):
            raise Refusal(f"{name} has a row without a text called {key}")
    if len(pairs) < 10:
        raise Refusal(f"{name} has {len(pairs)} pairs, fewer than 10")
    return pairs


def read_texts(name: str, columns: list[str]) -> list[str]:
    """The lines of a text file, or the first of these columns that a file of JSON lines or a data set has."""
    if not name:
        return []
    if Path(name).is_file() and Path(name).suffix != ".jsonl":
        try:
            texts = Path(name).read_text(encoding="utf-8").splitlines()
        except ValueError as error:
            raise Refusal(f"{name} is no text: {error}") from error
    else:
        rows = read_rows(name)
        found = [column for column in columns if rows and isinstance(rows[0].get(column), str)]
        if not found:
            raise Refusal(f"{name} has no texts called {' or '.join(columns)}")
        texts = [row.get(found[0]) for row in rows]
        if not all(isinstance(text, str) for text in texts):
            raise Refusal(f"{name} has a row without a text called {found[0]}")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise Refusal(f"{name} holds no text")
    return texts


def read_rows(name: str) -> list[dict]:
    """The rows of a file of JSON lines or of the training split of a Hugging Face data set."""
    if Path(name).is_file():
        try:
            text = Path(name).read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError as error:
            raise Refusal(f"{name} has a line that is no JSON: {error}") from error
        if not all(isinstance(row, dict) for row in rows):
            raise Refusal(f"{name} has a line that is no JSON object")
        return rows
    try:
        return list(importlib.import_module("datasets").load_dataset(name, split="train"))
    except ModuleNotFoundError as error:
        raise Refusal(f"a package is missing for the data set {name}: {error}") from error
    except Exception as error:  # what is raised depends on what is missing: the hub, the name, the split
        raise Refusal(f"the data set {name} could not be loaded: {first_sentence(error)}") from error


def load_language_model(name: str) -> tuple[object, LanguageModel]:
    """Tokenizer and model of a Hugging Face name or directory, the model without dropout."""
    auto = import_transformers(f"--model {name}")
    try:
        tokenizer = HuggingFaceTokenizer(auto.AutoTokenizer.from_pretrained(name))
        model = auto.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise Refusal(f"model {name} could not be loaded: {first_sentence(error)}") from error
    found = LanguageModel(HuggingFaceBody(model.base_model), model.get_output_embeddings())
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        logits = found(tokens, torch.ones_like(tokens, dtype=torch.bool), 7)
        if not torch.allclose(logits, model(tokens).logits[:, :-1], rtol=1e-3, atol=1e-3):
            raise Refusal(f"model {name} is not supported: it changes logits after its output layer")
    return tokenizer, found


def import_transformers(purpose: str) -> object:
    """The package transformers, which only some runs need."""
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise Refusal(f"a package is missing for {purpose}: {error}") from error


def first_sentence(error: Exception) -> str:
    """The first line of a message that may be long."""
    return str(error).split("\n")[0][:200]


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer with the methods of ours."""

    def __init__(self, tokenizer: object) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.eos_token_id
        if self.end is None:
            raise ValueError("its tokenizer has no token for the end of a text")

    def encode(self, text: str, is_start: bool) -> list[int]:
        """The numbers of the tokens."""
        return self.tokenizer.encode(text, add_special_tokens=is_start)

    def decode(self, numbers: list[int]) -> str:
        """The text of the tokens."""
        return self.tokenizer.decode(numbers, skip_special_tokens=True)


class HuggingFaceBody(nn.Module):
    """A Hugging Face model with the arguments of our transformer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()  # no dropout: what acts is what learns
        self.width = model.config.hidden_size

    def forward(self, tokens: Tensor, real: Tensor, cache: dict | None = None) -> Tensor:
        """Features (B, n, width) of tokens (B, n), the last n of a text whose padding is not real (B, L)."""
        output = self.model(
            input_ids=tokens, attention_mask=real.long(), position_ids=positions_of(real)[:, -tokens.shape[1] :],
            past_key_values=None if cache is None else cache.get("past"), use_cache=cache is not None,
        )  # fmt: skip
        if cache is not None:
            cache["past"] = output.past_key_values
        return output.last_hidden_state


class Phases:
    """The phases before the last that a run has completed, and what they found; a part of the checkpoint."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.pairs: dict[str, Tensor] = {}  # what people chose
        self.numbers: dict[str, float] = {}  # what the result shows

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return dict(done=self.done, pairs=self.pairs, numbers=self.numbers)

    def load_state_dict(self, state: dict) -> None:
        """Go on where the checkpoint was written."""
        self.done = state["done"]
        self.pairs = state["pairs"]
        self.numbers = state["numbers"]

    def begin(self, name: str, run: "Run") -> bool:
        """Whether the phase is still to be done; its random numbers are the same after a kill."""
        if name in self.done:
            return False
        if not self.done:
            run.save()  # from here on --resume can continue
        torch.manual_seed(env_seed(run.args.seed, 600_000 + len(self.done)))
        return True

    def end(self, name: str, run: "Run", numbers: dict[str, float]) -> None:
        """Say what came of the phase, and save."""
        self.done.append(name)
        self.numbers |= numbers
        run.wall_time = time.perf_counter() - run.start
        run.save()
        report = ", ".join(f"{key.replace('_', ' ')} {number:.2f}" for key, number in numbers.items())
        run.bar.write(f"{name} phase: {report or 'done'}")


def run_phase(name: str, steps: Iterable, run: "Run") -> Iterator:
    """Count the steps of a phase beside the bar; a phase that is interrupted begins anew when the run is resumed."""
    for number, step in enumerate(steps):
        if Run.stop_signal:
            run.bar.close()
            raise KeyboardInterrupt
        run.bar.set_postfix_str(f"{name} phase, step {number}", refresh=False)
        run.bar.update(0)
        yield step


def show(run: "Run", num_tokens: int, means: dict[str, Tensor], text: str, numbers: dict[str, Tensor]) -> None:
    """Show means beside the bar and, whenever a tenth of the run is over, a text with its own numbers."""
    run.bar.set_postfix_str(" ".join(f"{name} {mean:.2f}" for name, mean in means.items()))
    tenth = max(run.args.total_timesteps // 10, 1)
    if run.step // tenth > (run.step - num_tokens) // tenth:
        run.bar.write(f"step {run.step}: {text} ({', '.join(f'{name} {n:.2f}' for name, n in numbers.items())})")


def gradients_of(
    loss: Callable, parameters: Iterable[nn.Parameter], args: Args, max_norm: float = math.inf
) -> Callable:
    """A function that takes what the loss takes and returns its gradients for these parameters, and its metrics.

    The gradients come as a dict from parameter to gradient, scaled down if together they are longer than max_norm.
    With --compile, forward and backward pass are compiled into one function.
    """
    parameters = list(parameters)

    def differentiate(*inputs) -> tuple[list[Tensor], dict[str, Tensor]]:
        value, metrics = loss(*inputs)
        gradients = torch.autograd.grad(value, parameters)
        if max_norm < math.inf:
            norm = nn.utils.get_total_norm(gradients, foreach=False)
            scale = (max_norm / (norm + 1e-6)).clamp(max=1)
            gradients = [gradient * scale for gradient in gradients]
        return gradients, metrics

    if args.compile and can_compile(parameters[0].device):
        torch._dynamo.config.trace_autograd_ops = True  # lets the compiler see torch.autograd.grad
        differentiate = torch.compile(differentiate, dynamic=True)

    def function(*inputs) -> tuple[dict[nn.Parameter, Tensor], dict[str, Tensor]]:
        gradients, metrics = differentiate(*inputs)
        return dict(zip(parameters, gradients)), metrics

    return function


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether PyTorch finds a compiler on this machine; says so if not, for then training is slower."""
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except RuntimeError:
        print("PyTorch finds no compiler on this machine: training goes on without --compile", flush=True)
        return False
    return True


def descend(optimizer: torch.optim.Optimizer, gradients: dict[nn.Parameter, Tensor]) -> None:
    """One step of the optimizer down these gradients."""
    for parameter, gradient in gradients.items():
        if gradient.stride() != parameter.stride():  # as behind a CNN; a fused optimizer would mix up the elements
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient
    optimizer.step()


def anneal(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Let every parameter group learn with this share of the step size that it was made with."""
    for group in optimizer.param_groups:
        group["lr"] = share * group.setdefault("initial_lr", group["lr"])


def mean_metrics(history: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each metric over the gradient steps that have it."""
    columns: dict[str, list[Tensor]] = {}
    for metrics in history:
        for name, value in metrics.items():
            columns.setdefault(name, []).append(value)
    return {name: torch.stack(column).mean().item() for name, column in columns.items()}


def check_ranges(args: Args, minimum: dict[str, float], maximum: dict[str, float]) -> None:
    """Raise Refusal unless counts are at least 1 and other numbers at least 0, or within the limits given."""
    for field in fields(args):
        value = getattr(args, field.name)
        if isinstance(value, bool | str):
            continue
        low = minimum.get(field.name, 1 if field.type is int else 0)
        high = maximum.get(field.name, 2**62 if field.type is int else math.inf)
        if not low <= value <= high:
            raise Refusal(f"{field.name} must lie in [{low}, {high}], but is {value}")


def pick_device(name: str) -> torch.device:
    """The device of --device; raises Refusal if this machine has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refusal(f"device {name} is not available on this machine") from error
    return device


def env_seed(seed: int, offset: int = 0) -> int:
    """Each run has a million seeds; environment i of a vector takes the i-th after this. Runs 0 to 2146 share none."""
    return (1_000_000 * seed + offset) % (2**31 - 1)  # ALE takes no larger one


class Run:
    """A run's directory with its files, its progress bar and, with --track, its page on wandb."""

    stop_signal = 0  # Ctrl-C or SIGTERM, set by main(): save at the next line of the log and stop
    saved = "nothing was saved"  # what messages can promise

    def __init__(self, args: Args, **parts: nn.Module | torch.optim.Optimizer) -> None:
        """Start afresh or, with --resume, restore the parts from the checkpoint; raises Refusal."""
        self.args = args
        self.parts = parts
        self.algo = Path(__file__).stem
        name = f"{args.env_id}__{self.algo}__{args.seed}__{int(time.time())}"
        self.dir = Path(args.resume or args.run_dir or f"runs/{re.sub('[:/]', '-', name)}")
        self.step = 0  # environment steps so far
        self.wall_time = 0.0
        self.log_size = 0
        self.wandb_id = str(time.time_ns())
        self.episode_returns: list[float] = []  # of the episodes since the last log()
        self.last_returns: list[float] = []  # of the last 100 episodes before that
        Run.saved = "nothing was saved"

        self.import_optional()
        has_checkpoint = (self.dir / "checkpoint.pt").exists()
        if args.resume and not has_checkpoint:
            raise Refusal(f"{self.dir} holds no checkpoint to resume from")
        self.lock_directory()
        if has_checkpoint and not args.resume:
            raise Refusal(f"{self.dir} holds a run already, which --resume continues")
        if args.resume:
            self.load()
        self.config = dict(algo=self.algo, torch=torch.__version__, gymnasium=gym.__version__) | asdict(args)
        write_aside(self.dir / "config.json", lambda file: file.write(json.dumps(self.config, indent=1).encode()))
        self.file = open(self.dir / "metrics.jsonl", "a")
        self.file.truncate(min(self.log_size, self.file.tell()))

        if self.wandb:
            self.wandb.init(
                project=args.wandb_project, entity=args.wandb_entity or None, name=self.dir.name, dir=self.dir,
                config=self.config, id=self.wandb_id, resume="allow",
            )  # fmt: skip
        print(f"{self.dir}: step {self.step} of {args.total_timesteps}", flush=True)
        self.bar = tqdm(
            total=args.total_timesteps, initial=self.step, unit=" steps", disable=not os.isatty(2), dynamic_ncols=True
        )
        self.start = time.perf_counter() - self.wall_time  # unlike the time of day, it never goes back
        self.next_line = time.perf_counter() + 10  # for the lines in place of the bar where there is no terminal

    def import_optional(self) -> None:
        """Import what only some runs need, so that a missing package is missed before training."""
        self.wandb = None
        try:
            if self.args.track:
                self.wandb = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            raise Refusal(f"a package is missing: {error}") from error
        if self.wandb:
            self.log_in()

    def log_in(self) -> None:
        """See that wandb will take what is logged; raises Refusal."""
        try:
            if self.wandb.setup().settings.mode == "online" and not self.wandb.login(prompt=False):
                raise Refusal("--track needs `wandb login` first, or WANDB_MODE=offline")
        except self.wandb.Error as error:
            raise Refusal(f"--track: {error}; WANDB_MODE=offline needs no login") from error

    def lock_directory(self) -> None:
        """Keep other processes out for as long as this one lives."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(self.dir / "lock")
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise Refusal(f"{self.dir} is in use by another process") from None
        except OSError as error:
            raise Refusal(f"{self.dir} cannot be used: {error}") from error

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record what happened since the last line: bar, metrics.jsonl, wandb and, when it is due, a checkpoint."""
        if not np.isfinite(self.episode_returns).all():
            self.fail(f"a return before step {step} is not finite")
        if not np.isfinite(list(metrics.values())).all():
            self.fail(f"training diverged before step {step}")
        self.wall_time = time.perf_counter() - self.start
        episodes = self.episode_returns
        line = dict(
            global_step=step,
            wall_time=self.wall_time,
            SPS=step / self.wall_time,
            episodes=len(episodes),
            episodic_return=sum(episodes) / len(episodes) if episodes else None,
            **metrics,
        )
        try:
            print(json.dumps(line), file=self.file, flush=True)
        except OSError as error:
            self.fail(f"{self.file.name} could not be written ({error})")
        if self.wandb:
            self.wandb.log(line, step=step)
        self.last_returns = (self.last_returns + episodes)[-100:]
        self.episode_returns = []
        checkpoint_due = step // self.args.checkpoint_every > self.step // self.args.checkpoint_every
        stopping = Run.stop_signal != 0  # asked once: a signal that comes now waits for the next line
        self.step = step
        if checkpoint_due or stopping:
            self.save()
        if stopping:
            self.bar.close()
            raise KeyboardInterrupt
        self.show_progress(step)

    def show_progress(self, step: int) -> None:
        """Move the bar or, where there is no terminal, print a line every ten seconds."""
        status = f"return {np.mean(self.last_returns):.2f}" if self.last_returns else "no episode has ended"
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and time.perf_counter() > self.next_line:
            self.next_line = time.perf_counter() + 10
            speed = step / self.wall_time
            try:
                print(f"{step} of {self.args.total_timesteps} steps, {speed:.0f} steps/s, {status}", flush=True)
            except OSError:
                return  # what reads the output has ended; the run need not

    def fail(self, reason: str) -> None:
        """Stop the run for a reason."""
        self.bar.close()
        raise Refusal(f"{reason}; {self.saved}")

    def save(self) -> None:
        """Write the checkpoint, unless a number is not finite: then the last good one stays and Refusal is raised."""
        for part in self.parts.values():
            numbers = part.state_dict().values() if isinstance(part, nn.Module) else []
            if not all(x.isfinite().all() for x in numbers if x.is_floating_point()):
                self.fail(f"training diverged before step {self.step}")
        checkpoint = {name: part.state_dict() for name, part in self.parts.items()}
        checkpoint |= dict(args=asdict(self.args) | dict(algo=self.algo), log_size=self.file.tell())
        for name in ("step", "wall_time", "last_returns", "wandb_id"):
            checkpoint[name] = getattr(self, name)
        write_aside(self.dir / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
        Run.saved = f"--resume {self.dir} continues from step {self.step}"

    def load(self) -> None:
        """Continue from the checkpoint; raises Refusal if it is damaged or of another run than the flags say."""
        path = self.dir / "checkpoint.pt"
        try:
            saved = torch.load(path, map_location="cpu")
            for name in ("step", "wall_time", "last_returns", "log_size", "wandb_id"):
                if not isinstance(saved[name], type(getattr(self, name))):
                    raise TypeError(f"{name} is {saved[name]}")
                setattr(self, name, saved[name])
            for name in ("args", *self.parts):
                if not isinstance(saved[name], dict):
                    raise TypeError(f"{name} is {saved[name]}")
            states = {name: saved[name] for name in self.parts}
            before = saved["args"]
        except PermissionError as error:
            raise Refusal(f"{path} cannot be read: {error}") from error
        except Exception as error:  # what is raised depends on where the file is damaged
            raise Refusal(f"{path} is damaged; start the run anew in another --run-dir") from error

        now = asdict(self.args) | dict(algo=self.algo)
        fixed = ("algo", "env_id", "env_kwargs", "seed", "run_dir", "optimizer", "v_min", "v_max")
        for name in (*fixed, "priority_exponent", "clip_reward"):  # a buffer may hold what was made with the last two
            if now.get(name) != before.get(name):
                raise Refusal(f"{self.dir} holds a run with {name} {before.get(name)!r}, which cannot change")
        if now["total_timesteps"] < self.step:
            raise Refusal(f"{self.dir} has {self.step} steps already, more than total_timesteps")
        planned = before.get("total_timesteps")
        if now["total_timesteps"] != planned:
            print(f"planned for {planned} steps, now for {now['total_timesteps']}: schedules, if any, are stretched")
        try:
            for name, part in self.parts.items():
                state = states[name]
                if isinstance(part, torch.optim.Optimizer):  # the flags of today decide the step size
                    state = state | dict(param_groups=part.state_dict()["param_groups"])
                part.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            raise Refusal(f"{self.dir} does not hold the networks, or the buffer, that the flags ask for") from error
        if now["total_timesteps"] != planned:
            (self.dir / "result.json").unlink(missing_ok=True)  # the run it tells of is no longer finished
        torch.manual_seed(env_seed(self.args.seed, self.step))  # not the random numbers of the start again
        Run.saved = f"--resume {self.dir} continues from step {self.step}"

    def finish(self, evaluation: dict) -> dict:
        """Write, print and return the result."""
        returns = evaluation["eval_returns"]
        result = {name: self.config[name] for name in ("algo", "env_id", "seed", "total_timesteps")}
        result |= dict(
            trained_steps=self.step,
            **evaluation,
            eval_mean=float(np.mean(returns)),
            train_return=float(np.mean(self.last_returns)) if self.last_returns else None,
            sps=self.step / self.wall_time,
            wall_time=self.wall_time,
        )
        write_aside(self.dir / "result.json", lambda file: file.write(json.dumps(result, indent=1).encode()))
        self.file.close()
        self.bar.close()
        if self.wandb:
            self.wandb.finish()
        self.lock.release()
        cut = f", {evaluation['eval_cut']} of {len(returns)} episodes cut" if evaluation["eval_cut"] else ""
        print(f"{self.dir}: evaluation {np.mean(returns):.2f} +- {np.std(returns):.2f}{cut}")
        return result


def write_aside(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file aside and put it in place: a kill leaves the old one or the new one, and so does a full disk."""
    aside = path.with_suffix(".tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides the fault of the disk
        raise Refusal(f"{path} could not be written ({reason}); {Run.saved}") from error


def evaluate(
    actor: LanguageModel, reference: LanguageModel, reward_model: nn.Module | None, tokenizer: object, task: object,
    args: Args,
) -> dict:  # fmt: skip
    """True rewards of args.eval_episodes sampled responses to fresh prompts, and a table of what has changed."""

    def judged(model: LanguageModel, prompts: list[str]) -> dict:
        if Run.stop_signal:
            raise KeyboardInterrupt
        return judge(model, reference, reward_model, prompts, tokenizer, task, args)

    torch.manual_seed(env_seed(args.seed, 500_000))
    prompts = task.prompts(args.eval_episodes)
    table = dict(before=judged(reference, prompts))
    if reward_model is not None:
        repeated = [prompt for prompt in prompts[:64] for _ in range(16)]
        many = judged(reference, repeated)
        best = many["proxy"].view(-1, 16).argmax(1) + 16 * torch.arange(len(repeated) // 16)
        table["best of 16"] = {name: [column[i] for i in best.tolist()] for name, column in many.items()}
        table["best of 16"]["kl"] = [math.log(16) - 15 / 16]  # a bound
    after = judged(actor, prompts)
    table["after"] = after
    tqdm.write(f"{'':10} {'gold':>6} {'proxy':>6} {'kl':>6}")
    means = {}
    for name, row in table.items():
        means[name] = {key: float(np.mean([float(x) for x in row[key]])) for key in ("gold", "proxy", "kl")}
        numbers = " ".join(f"{mean:6.2f}" for mean in means[name].values())
        tqdm.write(f"{name:10} {numbers}   {row['texts'][0]}")
    result = dict(eval_returns=after["gold"].tolist(), eval_cut=int((~after["ended"]).sum()))
    result["eval_kl"] = means["after"]["kl"]
    result["eval_ended"] = float(after["ended"].float().mean())
    result["eval_distinct"] = len(set(after["texts"])) / len(prompts)
    result["eval_before"] = means["before"]["gold"]
    if reward_model is not None:
        result["eval_proxy"] = means["after"]["proxy"]
        result["eval_best_of_16"] = means["best of 16"]["gold"]
    return result


@torch.no_grad()
def judge(
    model: LanguageModel, reference: LanguageModel, reward_model: nn.Module | None, prompts: list[str],
    tokenizer: object, task: object, args: Args,
) -> dict:  # fmt: skip
    """Responses of a model to prompts: texts, and their true rewards, proxies, KL to the reference and ends (B,)."""
    tokens, real = sample(model, prompts, tokenizer, args)
    T = args.max_new_tokens
    log_ratios = []
    for some_tokens, some_real in zip(tokens.split(128), real.split(128)):
        policy = response_policy(model, some_tokens, some_real, T, args.temperature)
        reference_policy = response_policy(reference, some_tokens, some_real, T, args.temperature)
        responses = some_tokens[:, -T:]
        log_ratio = policy.log_prob(responses) - reference_policy.log_prob(responses)
        log_ratios.append(torch.where(some_real[:, -T:], log_ratio, 0).sum(-1))
    ended = has_ended(tokens, real, T, tokenizer).cpu()
    proxy = torch.zeros(len(tokens)) if reward_model is None else score(reward_model, tokens, real).cpu()
    texts = texts_of(tokens, real, tokenizer)
    gold = task.rewards(texts, ended, proxy)
    return dict(texts=texts, gold=gold, proxy=proxy, kl=torch.cat(log_ratios).cpu(), ended=ended)


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over the defaults of the task or of --model or, with --resume, over the arguments of that run."""
    # The defaults depend on these three, so they are read first. A value that is missing is left for tyro to tell.
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--env-id", "--env_id", nargs="?", const=Args.env_id, default=Args.env_id)
    first_look.add_argument("--model", nargs="?", const=Args.model, default=Args.model)
    first_look.add_argument("--resume", nargs="?", const="", default="")
    given, _ = first_look.parse_known_args(argv)
    if given.resume:
        defaults = read_config(Path(given.resume))
        source = f"the arguments of {given.resume}"
    else:
        family = given.env_id if given.model == "tiny" else "Hugging-Face"
        defaults = dict(env_id=given.env_id) | FAMILIES.get(family, {})
        source = f"the defaults for {family}"
    args = tyro.cli(Args, args=argv, default=Args(**defaults), description=f"{__doc__}\nShown are {source}.")
    print(f"{args.env_id} with {source}", flush=True)
    return args


def read_config(folder: Path) -> dict:
    """The arguments of the run in a directory."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        arguments = {field.name: config[field.name] for field in fields(Args)}
        for name, value in arguments.items():
            kind = type(getattr(Args, name))
            if not isinstance(value, int | float if kind is float else kind):
                raise TypeError(f"{name} is {value}")
    except FileNotFoundError as error:
        raise Refusal(f"{folder} holds no run to resume") from error
    except KeyError as error:
        told = f"{path} is damaged or another script's, for it has no {error}"
        raise Refusal(f"{told}; start the run anew in another --run-dir") from error
    except PermissionError as error:
        raise Refusal(f"{path} cannot be read: {error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise Refusal(f"{path} is damaged; start the run anew in another --run-dir") from error
    return arguments


def prepare_forks() -> None:
    """Reset the signals in processes that an environment forks, which would else take them for ours.

    SIGTERM ends such a process, since to close an environment may mean to send it one and to wait. Ctrl-C is ignored:
    this process handles it. A SIGTERM to all processes thus ends the run, too, at its last checkpoint.
    """
    masks = []

    def before() -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}))  # none may get lost in between

    def after_in_parent() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop())

    def after_in_child() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        after_in_parent()

    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(before=before, after_in_parent=after_in_parent, after_in_child=after_in_child)


def main() -> None:
    """Train as the command line says. Bad input ends in one sentence; an error of the user's keeps its traceback."""

    def stop(number: int, _: object) -> None:
        if Run.stop_signal:
            raise KeyboardInterrupt
        Run.stop_signal = number
        try:
            os.write(2, b"\nsaving and stopping at the next line of the log; once more to stop at once\n")
        except OSError:
            return  # what reads the output, such as tee, has been stopped, too

    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters of a text or a path
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    prepare_forks()
    try:
        train(parse_args())
    except Refusal as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(__file__).name}: interrupted; {Run.saved}", file=sys.stderr)
        sys.exit(128 + Run.stop_signal)


if __name__ == "__main__":
    main()
