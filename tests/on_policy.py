"""What the tests of the policy gradients share: agents in float64, and their policies written out."""

import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

OBS = Box(-np.inf, np.inf, (3,), np.float32)
BOX = Box(np.float32([-1, -3]), np.float32([2, 0.5]))
each_space = pytest.mark.parametrize("space", [Discrete(4), BOX], ids=["discrete", "box"])


def make_agent(module, space, **given):
    """An agent in float64 whose policy is far from uniform and whose deviations differ, and its arguments."""
    torch.manual_seed(3)
    args = module.Args(**dict(hidden_size=5) | given)
    agent = module.Agent(OBS, space, args).double()
    with torch.no_grad():
        agent.actor[-1].weight.mul_(100)
        if not agent.discrete:
            agent.log_std.copy_(torch.tensor([-0.5, 0.3]))
    return agent, args


def sample(agent, obs):
    """Actions of the policy in these states, drawn without it."""
    output = agent.actor(obs).detach()
    if agent.discrete:
        return torch.multinomial(output.softmax(-1), 1).squeeze(-1)
    return output + agent.log_std.detach().exp() * torch.randn_like(output)


def log_prob(agent, obs, actions):
    """log pi(a|s) (B,), written out."""
    output = agent.actor(obs)
    if agent.discrete:
        return torch.stack([row[action] - row.exp().sum().log() for row, action in zip(output, actions)])
    z = (actions - output) / agent.log_std.exp()
    return (-(z**2) / 2 - agent.log_std - math.log(2 * math.pi) / 2).sum(-1)


def entropy(agent, obs):
    """The entropy (B,) of the policy, written out."""
    output = agent.actor(obs)
    if agent.discrete:
        probs = output.exp() / output.exp().sum(-1, keepdim=True)
        return -(probs * probs.log()).sum(-1)
    return (agent.log_std + math.log(2 * math.pi * math.e) / 2).sum().expand(len(obs))


def kl(old, new, obs):
    """KL(pi_old || pi_new) (B,), written out."""
    output = old.actor(obs)
    new_output = new.actor(obs)
    if old.discrete:
        probs = output.exp() / output.exp().sum(-1, keepdim=True)
        new_probs = new_output.exp() / new_output.exp().sum(-1, keepdim=True)
        return (probs * (probs / new_probs).log()).sum(-1)
    squares = ((2 * old.log_std).exp() + (output - new_output) ** 2) / (2 * new.log_std).exp()
    return (new.log_std - old.log_std + squares / 2 - 0.5).sum(-1)
