"""What the tests of the scripts for language share: short runs, a language of nine texts, and batches with padding."""

import json

import torch
from conftest import LANGUAGE
from launch import flags
from runs import each
from torch import nn

each_language = each(LANGUAGE)
T = 5  # most tokens of a response
UTILITIES = torch.tensor([[0.3, -1.0, 0.8], [1.5, 0.0, -0.4], [-0.2, 0.9, -1.3]])  # of the nine texts
TINY = dict(
    total_timesteps=300, num_demonstrations=40, sft_steps=3, num_pairs=20, rm_epochs=1, batch_size=8, num_responses=6,
    max_new_tokens=T, hidden_size=16, num_layers=1, num_minibatches=2, update_epochs=1, eval_episodes=4,
    num_generations=3, log_responses=4,
)  # fmt: skip


def tiny(module, folder, **given):
    """Arguments of a run of a second."""
    settings = TINY | dict(run_dir=str(folder / "run"), reward_function="language:letters") | given
    return module.Args(**{name: value for name, value in settings.items() if hasattr(module.Args, name)})


def dashed(module) -> list[str]:
    """A command line of such a run."""
    return flags({name: value for name, value in TINY.items() if hasattr(module.Args, name)})


def lines(folder) -> list[dict]:
    """The log of a run."""
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def saved(folder) -> dict:
    """The checkpoint of a run."""
    return torch.load(folder / "run" / "checkpoint.pt", weights_only=True)


def constant(texts):
    """A reward that all texts get."""
    return [0.3] * len(texts)


def length(texts):
    """A reward for words."""
    return [float(len(text.split())) for text in texts]


def letters(texts):
    """A reward for letters."""
    return [float(len(text)) for text in texts]


def utility(texts):
    """The reward of a text of the language of nine, which is three numbers, the first of which is the prompt."""
    numbers = torch.tensor([[int(word) for word in text.split()] for text in texts])
    return UTILITIES[numbers[:, 1], numbers[:, 2]]


class Digits:
    """The tokenizer of the language of nine: tokens are numbers, and no text ends before its last."""

    end = -1

    def encode(self, text, is_start):
        return [int(word) for word in text.split()]

    def decode(self, numbers):
        return " ".join(map(str, numbers))


class Nine:
    """The task of the language of nine: two of the words 0, 1, 2 behind the prompt 0."""

    own_prompts = ("0",)
    own_pairs = ()

    def prompts(self, count):
        return ["0"] * count

    def rewards(self, texts, ended, proxy):
        return proxy.cpu()


class Table(nn.Module):
    """A body with a feature of its own for each start of a text: so that heads are tables."""

    width = 13

    def forward(self, tokens, real, cache=None):
        if cache is not None:
            tokens = cache["tokens"] = torch.cat([*cache.values(), tokens], dim=1)
        state = torch.zeros_like(tokens)
        if tokens.shape[1] > 1:
            state[:, 1] = 1 + tokens[:, 1]
        if tokens.shape[1] > 2:
            state[:, 2] = 4 + 3 * tokens[:, 1] + tokens[:, 2]
        features = nn.functional.one_hot(state, self.width).float()
        return features[:, -1:] if cache is not None else features


def table_model(module):
    """A policy for the language of nine, far from uniform."""
    head = nn.Linear(Table.width, 3, bias=False)
    nn.init.normal_(head.weight, std=0.7)
    return Digits(), module.LanguageModel(Table(), head)


def probabilities(model):
    """pi (3, 3) of the nine texts."""
    logits = model.head.weight.detach().T
    first = logits[0].softmax(-1)
    second = logits[1:4].softmax(-1)
    return first[:, None] * second


def optimum(reference, rewards, beta):
    """pi_ref exp(r / beta) / Z (3, 3), what the objective of all these scripts is largest for."""
    return (reference.log() + rewards / beta).flatten().softmax(0).view(3, 3)


def ragged(module, args, rows=6, seed=0):
    """A model of words, and texts with prompts and responses of all lengths: tokens (B, L) and which are real."""
    torch.manual_seed(seed)
    tokenizer = module.Words([f"w{i}" for i in range(20)])
    body = module.Transformer(22, 40, args.hidden_size, args.num_layers)
    model = module.LanguageModel(body, nn.Linear(args.hidden_size, 22))
    with torch.no_grad():
        for embedding in (body.token_embedding, body.position_embedding):
            embedding.weight *= 40  # so that the texts matter
        for block in body.blocks:
            block.queries_keys_values.weight *= 3
    prompts = [torch.randint(2, 22, (1 + i % 4,)).tolist() for i in range(rows)]
    lengths = [args.max_new_tokens if i % 3 == 2 else 1 + i % args.max_new_tokens for i in range(rows)]
    responses = [torch.randint(2, 22, (length,)).tolist() for length in lengths]
    for i, response in enumerate(responses):
        if i % 3 != 2:
            response[-1] = tokenizer.end
    tokens, real = module.collate(prompts, responses, args.max_new_tokens)
    return tokenizer, model, tokens, real


def with_other_padding(tokens, real):
    """The same texts with other numbers in the padding."""
    return torch.where(real, tokens, torch.randint_like(tokens, 2, 22))


def gradients(loss, model):
    """The gradient of a loss, as a vector."""
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])
