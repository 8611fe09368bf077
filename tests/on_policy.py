"""What the tests of the policy gradients share: agents in float64, their policies written out, and Adam."""

import math

import envs
import numpy as np
import pytest
import torch
from conftest import make_args, spy
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


def check_adam(module, folder):
    """Every step that train() takes is one of Adam with eps = 1e-5; gradients are made so small that eps counts."""
    moments = {}
    expected = {}

    def before(optimizer, gradients):
        for parameter, gradient in gradients.items():
            gradient = gradient * 1e-5
            gradients[parameter] = gradient
            m, v, t = moments.get(parameter, (0, 0, 0))
            m = 0.9 * m + 0.1 * gradient.double()
            v = 0.999 * v + 0.001 * gradient.double() ** 2
            t = t + 1
            moments[parameter] = (m, v, t)
            step = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-5)
            expected[parameter] = (parameter.detach() - 1e-2 * step).float()

    def after(_, optimizer, gradients):
        for parameter in gradients:
            torch.testing.assert_close(parameter.detach(), expected[parameter], atol=1e-6, rtol=1e-6)

    envs.Tagged.instances = []
    given = dict(env_id="test/Tagged-v0", num_envs=3, num_steps=16, total_timesteps=240, update_epochs=2)
    given |= dict(num_minibatches=2, learning_rate=1e-2, critic_learning_rate=1e-2)
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, module, "descend", before, after)
        module.train(make_args(module, folder, **given))
    assert min(t for _, _, t in moments.values()) > 4
