# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.2.6", "gymnasium==1.4.0", "tyro==1.0.17", "tqdm==4.70.1",
#   "filelock==3.20.0", "wandb==0.31.0", "transformers==5.20.2", "datasets==5.2.0"]
# ///
"""GRPO: group relative policy optimization, PPO for language without a critic.

Shao et al. 2024, arXiv:2402.03300. Child of ppo_rlhf.py: the mean reward of a group of responses takes the critic's
place, and a checker that of the reward model.

    max E[sum_it w_it min(rho_it A_i, clip(rho_it, 1 - eps_low, 1 + eps_high) A_i)]    with  A_i = r_i - mean(r)

A group is G responses to one prompt, with rewards r. All tokens t of response i share its advantage A_i, and rho_it is
the token's ratio pi / pi_old. With one gradient step on each batch, the default, pi still is pi_old: the ratio is 1,
the clip is idle, and the gradient is that of REINFORCE with a baseline. With more epochs or minibatches they matter.

    python algos/grpo.py --env-id countdown    # 0.43 of the problems after 400,000 tokens, from 0.16
    python algos/grpo.py --env-id countdown --scale-rewards --loss-norm sequence --kl-coef 0.04    # as in the paper
    PYTHONPATH=. python algos/grpo.py --env-id countdown --model Qwen/Qwen2.5-0.5B --prompts problems.jsonl \\
        --reward-function my_checks:right    # the function right in my_checks.py

The paper divides A_i by the deviation of r, and averages over each response first: w_it = 1 / (G |y_i|). Liu et al.
2025, arXiv:2503.20783, find both biased: towards problems that are nearly always or never solved, and towards long
wrong answers. So both are flags. By default all tokens of a batch weigh the same; Yu et al. 2025, arXiv:2503.14476,
whose eps_high is 0.28, let those of a group do so, w_it = 1 / sum_i |y_i|. The KL (eq. 4) is off; where it is on, its
gradient is that of KL(pi_ref || pi) as long as pi is pi_old. Not in the paper: a small transformer, an exact check in
place of a reward model, clipped gradients, and a reference that is never renewed.

Read to the end of train(); what follows the ruler is plumbing that the scripts share.
"""

import argparse
import copy
import functools
import importlib
import json
import math
import operator
import os
import pkgutil
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO, Literal

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
    env_id: str = "countdown"  # the task
    total_timesteps: int = 400_000  # tokens of responses to learn from in the last phase
    num_demonstrations: int = 40_000  # texts to learn to write from
    right_demonstrations: float = 0.4  # share of them that are sure to be right; the others are answers at random
    sft_steps: int = 1200  # gradient steps of the supervised phase
    sft_learning_rate: float = 2e-3  # their step size, which falls linearly to 0
    batch_size: int = 128  # demonstrations (or pairs, where there are any) per gradient step
    num_responses: int = 256  # N, responses per iteration
    num_generations: int = 8  # G, responses to the same prompt, which are compared with each other
    max_new_tokens: int = 6  # T, the largest number of tokens in a response
    temperature: float = 1.0  # divides the logits in sampling and, but for the supervised phase, in probabilities
    partial_reward: float = 0.0  # reward for each answer of the right form, be its value right or wrong
    scale_rewards: bool = False  # divide the advantages of a group by the deviation of its rewards
    kl_coef: float = 0.0  # beta, weight of the KL to the reference
    update_epochs: int = 1  # K, passes over each batch
    num_minibatches: int = 1  # minibatches per pass
    loss_norm: Literal["token", "sequence", "constant"] = "token"  # equal weight per token or response, or 1 / (N T)
    learning_rate: float = 3e-4  # step size of the last phase
    anneal_lr: bool = True  # let the step size fall linearly to 0
    clip_low: float = 0.2  # eps_low, how far below 1 the probability ratio counts
    clip_high: float = 0.2  # eps_high, how far above
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this norm
    hidden_size: int = 64  # width of the transformer
    num_layers: int = 3  # blocks of the transformer
    compile: bool = False  # compile the gradient steps

    model: str = "tiny"  # tiny, the transformer below, or the name or directory of a Hugging Face model
    prompts: str = ""  # your prompts: lines of a text file, JSON lines or a data set; if empty, the task's
    max_prompt_tokens: int = 16  # longer prompts lose their end
    reward_function: str = ""  # in place of the check: module:function on PYTHONPATH, of texts with their prompts

    seed: int = 1  # of weights, texts and minibatches
    device: str = "auto"  # cpu, cuda, cuda:1, mps or auto: a CUDA GPU if there is one, else the CPU
    torch_threads: int = 1  # CPU threads, 0 for one per core; small networks are fastest with 1
    run_dir: str = ""  # where the results go; if empty, runs/<env>__<algo>__<seed>__<time>
    track: bool = False  # log to Weights & Biases
    wandb_project: str = "foliorl"  # the project there
    wandb_entity: str = ""  # the user or team there; if empty, your default
    eval_episodes: int = 256  # responses of the final evaluation
    checkpoint_every: int = 25_000  # tokens between checkpoints
    resume: str = ""  # run directory to continue; a finished run is only evaluated again

    def __post_init__(self) -> None:
        minimum = dict(seed=0, torch_threads=0, sft_steps=0, num_generations=2, temperature=1e-3)
        check_ranges(self, minimum, maximum=dict(right_demonstrations=1, clip_low=1))
        if self.num_responses * self.max_new_tokens > self.total_timesteps:
            raise Refusal("num_responses * max_new_tokens may not exceed total_timesteps")
        if self.num_responses % self.num_generations != 0:
            raise Refusal("num_responses must be a multiple of num_generations")
        if self.num_minibatches > self.num_responses:
            raise Refusal("num_minibatches may not exceed num_responses")
        if self.prompts and not self.reward_function:
            raise Refusal("prompts of your own need a reward_function: nobody knows what is good there")
        if self.partial_reward and self.reward_function:
            raise Refusal("partial_reward is of the task's own check, not of a reward_function")


def group_advantages(rewards: Tensor, args: Args) -> Tensor:
    """Advantages (N,) from rewards (N,), of which each G in a row are a group: how much better than its mean each is.

    The mean has r_i in it, which makes the expected gradient shorter by a share of 1 / G, but does not turn it.
    """
    groups = rewards.view(-1, args.num_generations)
    groups = groups - groups[:, :1]  # so that equal rewards have advantages of exactly 0, without any rounding
    advantages = groups - groups.mean(1, keepdim=True)
    if args.scale_rewards:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-6)  # section 4.1.2
    return advantages.flatten()


def token_weights(mask: Tensor, args: Args) -> Tensor:
    """How much each token (N, T) of a batch counts in the loss; those of the mask are real."""
    N, T = mask.shape
    if args.loss_norm == "token":
        return mask / mask.sum()  # each token of the batch as much as any other; Yu et al.: of the group
    if args.loss_norm == "sequence":
        return mask / mask.sum(1, keepdim=True) / N  # each response as much as any other: eq. 3
    return mask / (N * T)  # the same in every batch, however long its responses: Liu et al.


def policy_loss(actor: nn.Module, batch: dict[str, Tensor], args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the clipped surrogate, plus beta times the KL, over the tokens of a minibatch; and what to log."""
    T = args.max_new_tokens
    mask = batch["real"][:, -T:]
    policy = response_policy(actor, batch["tokens"], batch["real"], T, args.temperature)
    log_probs = policy.log_prob(batch["tokens"][:, -T:])
    advantages = batch["advantages"][:, None]

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0).sum() / mask.sum()

    log_ratio = log_probs - batch["log_probs"]
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    surrogate = torch.min(ratio * advantages, clipped_ratio * advantages)  # eq. 3
    ref_log_ratio = batch["ref_log_probs"] - log_probs
    kl = ref_log_ratio.exp() - ref_log_ratio - 1  # eq. 4
    loss = torch.where(mask, batch["weights"] * (args.kl_coef * kl - surrogate), 0).sum()

    metrics = dict(
        policy_loss=loss.detach(),
        entropy=mean(policy.entropy()).detach(),
        approx_kl=mean(ratio - 1 - log_ratio).detach(),  # http://joschu.net/blog/kl-approx.html
        clip_fraction=mean((ratio != clipped_ratio).float()),
    )
    return loss, metrics


def train(args: Args) -> dict:
    """Train, evaluate, and return what result.json holds; raises Refusal with one sentence on bad input."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    device = pick_device(args.device)
    task = Countdown(args)
    tokenizer, actor = make_language_model(task, args)
    actor = actor.to(device)
    reference = copy.deepcopy(actor).requires_grad_(False)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    policy_gradients = gradients_of(policy_loss, actor.parameters(), args, max_norm=args.max_grad_norm)
    phases = Phases()
    run = Run(args, actor=actor, reference=reference, actor_optimizer=actor_optimizer, phases=phases)

    # Learn to write from demonstrations: the result is the first actor and, for good, the reference.
    if phases.begin("supervised", run):
        numbers = learn_to_write(actor, tokenizer, task, run, args)
        reference.load_state_dict(actor.state_dict())
        phases.end("supervised", run, numbers)

    # GRPO: a response is an episode, a token a step.
    N = args.num_responses
    G = args.num_generations
    T = args.max_new_tokens
    torch.manual_seed(env_seed(args.seed, run.step))
    while run.step + N * T <= args.total_timesteps:
        if args.anneal_lr:
            anneal(actor_optimizer, 1 - run.step / args.total_timesteps)

        # Collect G responses to each of N / G prompts.
        prompts = [prompt for prompt in task.prompts(N // G) for _ in range(G)]
        tokens, real = sample(actor, prompts, tokenizer, args)
        mask = real[:, -T:]  # the tokens of responses up to their ends
        ended = has_ended(tokens, real, T, tokenizer)

        # Judge them: the actor and the reference by their log-probabilities, and the check.
        with torch.no_grad():
            log_probs = response_policy(actor, tokens, real, T, args.temperature).log_prob(tokens[:, -T:])
            ref_log_probs = response_policy(reference, tokens, real, T, args.temperature).log_prob(tokens[:, -T:])
        log_ratio = torch.where(mask, log_probs - ref_log_probs, 0)
        kl = log_ratio.sum(-1).mean()  # an estimate of KL(pi || pi_ref), per response
        texts = texts_of(tokens, real, tokenizer)
        gold = task.rewards(texts, ended)
        rewards = gold.clone()
        if args.partial_reward > 0:
            rewards += args.partial_reward * torch.tensor([task.has_form(text) for text in texts])

        # Estimate advantages.
        advantages = group_advantages(rewards, args).to(device)

        # Optimise the surrogate for K epochs of minibatches.
        batch = dict(
            tokens=tokens, real=real, log_probs=log_probs, ref_log_probs=ref_log_probs, advantages=advantages,
            weights=args.num_minibatches * token_weights(mask, args),  # a minibatch has only a part of their sum
        )  # fmt: skip
        history = []
        for _ in range(args.update_epochs):
            for rows in torch.randperm(N, device=device).tensor_split(args.num_minibatches):
                minibatch = {name: column[rows] for name, column in batch.items()}
                gradients, metrics = policy_gradients(actor, minibatch, args)
                descend(actor_optimizer, gradients)
                history.append(metrics)

        run.episode_returns += gold.tolist()
        has_signal = (advantages.view(-1, G) != 0).any(1)  # groups with equal rewards teach nothing
        metrics = dict(
            reward=rewards.mean(), gold_reward=gold.mean(), best_of_group=gold.view(-1, G).amax(1).mean(),
            kl=kl, signal_fraction=has_signal.float().mean(), response_length=mask.sum() / N,
            eos_fraction=ended.float().mean(), distinct_fraction=torch.tensor(len(set(texts)) / N),
        )  # fmt: skip
        num_tokens = int(mask.sum())
        run.log(run.step + num_tokens, mean_metrics([*history, metrics]))
        means = dict(gold=gold.mean(), kl=kl)
        of_first = dict(gold=gold[0], kl=log_ratio[0].sum())
        show(run, num_tokens, means, texts[0], of_first)

    run.save()
    return run.finish(evaluate(actor, reference, None, tokenizer, task, args) | phases.numbers)


# Defaults in place of those of Args: of the task or, with --model, of models that have learned to write already.
FAMILIES = {
    "countdown": dict(),
    "Hugging-Face": dict(
        sft_learning_rate=5e-5, learning_rate=1e-6, sft_steps=200, batch_size=32, max_new_tokens=16,
        max_prompt_tokens=256,
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


# ====================================================================================================================
# Only here: problems with an exact check.


class Countdown:
    """Problems such as `3 5 2 -> 13 :`, solved by `3 * 5 - 2`: the digits, each once, with + - * give the number."""

    def __init__(self, args: Args) -> None:
        if args.env_id != "countdown":
            raise Refusal(f"there is no task {args.env_id}: there is countdown")
        self.right_demonstrations = args.right_demonstrations
        self.own_prompts = read_texts(args.prompts, ["prompt", "question", "problem", "text"])
        self.own_rewards = resolve_function(args.reward_function)
        numbers = map(str, range(100))
        self.words = sorted({*numbers, "+", "-", "*", "->", ":", *" ".join(self.own_prompts).split()})

    def prompts(self, count: int) -> list[str]:
        """Problems that can be solved."""
        if self.own_prompts:
            return [self.own_prompts[i] for i in torch.randint(len(self.own_prompts), (count,))]
        rng = random.Random(int(torch.randint(2**31 - 1, ())))
        return [self.problem(rng)[0] for _ in range(count)]

    def demonstrations(self, count: int) -> list[tuple[str, str]]:
        """Problems with answers, of which some are right."""
        rng = random.Random(int(torch.randint(2**31 - 1, ())))
        rows = []
        for _ in range(count):
            prompt, answer = self.problem(rng)
            if rng.random() >= self.right_demonstrations:
                answer = self.answer(rng, prompt.split()[:3])
            rows.append((prompt, f" {answer}"))
        return rows

    def problem(self, rng: random.Random) -> tuple[str, str]:
        """A problem and its solution, whose value lies from 0 to 99."""
        while True:
            digits = [str(rng.randint(1, 9)) for _ in range(3)]
            solution = self.answer(rng, digits)
            if 0 <= value_of(solution) <= 99:
                return f"{' '.join(digits)} -> {value_of(solution)} :", solution

    def answer(self, rng: random.Random, digits: list[str]) -> str:
        """The digits in any order, with any operators."""
        a, b, c = rng.sample(digits, 3)
        return f"{a} {rng.choice('+-*')} {b} {rng.choice('+-*')} {c}"

    def has_form(self, text: str) -> bool:
        """Whether the answer in a text uses each digit of its problem once."""
        problem, _, answer = text.partition(":")
        digits = problem.split("->")[0].split()
        return value_of(answer) is not None and sorted(re.findall("[0-9]", answer)) == sorted(digits)

    def is_right(self, text: str) -> bool:
        """Whether it also has the value wanted."""
        problem, _, answer = text.partition(":")
        return self.has_form(text) and problem.split()[-1] == str(value_of(answer))

    def rewards(self, texts: list[str], ended: Tensor, proxy: Tensor | None = None) -> Tensor:
        """Rewards (B,) of texts: 1 if the answer is right and at its end, else 0; or what your own function says."""
        if self.own_rewards:
            return torch.as_tensor(self.own_rewards(texts), dtype=torch.float32).cpu()
        return torch.tensor([float(end and self.is_right(text)) for text, end in zip(texts, ended.tolist())])


def value_of(answer: str) -> int | None:
    """The value of three digits with two operators between them, or None if the answer has another form."""
    match = re.fullmatch(r"([1-9])([-+*])([1-9])([-+*])([1-9])", answer.replace(" ", ""))
    if match is None:
        return None
    a, first, b, second, c = match.groups()
    operators = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    if second == "*":  # products come first
        return operators[first](int(a), int(b) * int(c))
    return operators[second](operators[first](int(a), int(b)), int(c))


def resolve_function(name: str) -> Callable | None:
    """The function of --reward-function, if there is one."""
    if not name:
        return None
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Refusal(f"reward_function {name} was not found: {error}") from error


if __name__ == "__main__":
    main()
