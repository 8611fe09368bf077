"""A2C against slow and independent references, and against PPO where both are the same algorithm."""

import envs
import numpy as np
import pytest
import torch
from conftest import make_args, spy
from test_ppo_clip import BOTH, gradients, make_agent, make_batch, parameters, per_row, reference

from algos import a2c, ppo_clip


def trained(module, folder, monkeypatch, **given):
    """The parameters after a short training, its minibatches in the order of the batch."""
    agents = []
    with monkeypatch.context() as patch:
        patch.setattr(envs.Tagged, "instances", [])
        patch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n, device=device))
        patch.setattr(module, "evaluate", lambda agent, *_: agents.append(agent) or [0.0])
        plain = dict(num_envs=3, num_steps=16, total_timesteps=3 * 16 * 6, learning_rate=1e-2, optimizer="adam")
        plain |= dict(
            update_epochs=1, num_minibatches=1, clip_coef=1e6, gae_lambda=0.9, ent_coef=0.01, norm_reward=True
        )
        module.train(make_args(module, folder / module.__name__, **(plain | given)))
    return parameters(agents[0])


@pytest.mark.parametrize("env_id", ["test/Tagged-v0", "test/TaggedBox-v0"])
@pytest.mark.parametrize("norm_obs", [False, True])
def test_equals_ppo_of_one_epoch_without_clipping(tmp_path, monkeypatch, env_id, norm_obs):
    """Any difference between the two scripts that is not the idea of PPO; a second epoch is one."""
    given = dict(env_id=env_id, norm_obs=norm_obs)
    ours = trained(a2c, tmp_path, monkeypatch, **given)
    torch.testing.assert_close(ours, trained(ppo_clip, tmp_path, monkeypatch, **given), atol=1e-5, rtol=1e-4)
    two_epochs = trained(ppo_clip, tmp_path / "two", monkeypatch, update_epochs=2, **given)
    assert (ours - two_epochs).abs().max() > 1e-3


@BOTH
def test_gradient_of_the_loss(space):
    """A sign, a factor, an advantage that gradients flow through, or a term on the wrong rows."""
    agent, args = make_agent(space)
    args = a2c.Args(vf_coef=0.3, ent_coef=0.02)
    batch = make_batch(agent)
    policy, values = reference(agent, batch["obs"])
    log_probs = per_row(agent, policy.log_prob(batch["actions"]))
    loss = -sum(log_probs * batch["advantages"]) / 64 + 0.3 * sum((values - batch["returns"]) ** 2) / 64
    expected = gradients(agent, loss - 0.02 * sum(per_row(agent, policy.entropy())) / 64)
    found = gradients(agent, a2c.a2c_loss(agent, batch, args)[0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    wrong = gradients(agent, a2c.a2c_loss(agent, batch | dict(advantages=-batch["advantages"]), args)[0])
    assert (wrong - expected).abs().max() > 0.01


@pytest.mark.parametrize(("name", "kind"), [("rmsprop", a2c.RMSprop), ("adam", a2c.Adam)])
def test_the_optimizer_asked_for(tmp_path, monkeypatch, name, kind):
    """--optimizer without effect."""
    steps = []
    for each in (a2c.RMSprop, a2c.Adam):
        spy(monkeypatch, each, "step", before=lambda optimizer, *_: steps.append(type(optimizer)))
    trained(a2c, tmp_path, monkeypatch, optimizer=name)
    assert steps == [kind] * 6


def test_rmsprop_of_the_paper():
    """Epsilon outside the root, a decay of 0.9, or a correction of the bias: Mnih et al. 2016, eqs. 8-9."""
    layer, random = torch.nn.Linear(3, 2), np.random.default_rng(0)
    optimizer = a2c.RMSprop(layer)
    theta, g = parameters(layer).double().numpy(), np.zeros(8)
    for step in range(300):
        rate, gradient = 0.01 * (1 - step / 300), random.normal(size=8) * np.logspace(-4, 1, 8)
        g = 0.99 * g + 0.01 * gradient**2
        theta = theta - rate * gradient / np.sqrt(g + 1e-5)
        optimizer.step(torch.tensor(gradient, dtype=torch.float32), torch.tensor(rate))
    assert parameters(layer).numpy() == pytest.approx(theta, rel=1e-4, abs=1e-5)
