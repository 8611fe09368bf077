"""The off-policy scripts in environments whose values and best actions are known, and proof that bugs would be seen."""

import math

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import spy
from gymnasium.spaces import Box
from off_policy import (
    critics,
    each_continuous,
    each_off_policy,
    each_q_learning,
    has_noise,
    has_noisy_layers,
    learn,
    lines,
)
from runs import each, is_continuous, planted

from algos import c51, ddpg, dqn, dueling_dqn, n_step_dqn, noisy_dqn, rainbow, sac

TWO = Box(np.float32([-1, -3]), np.float32([2, 0.5]))


class FollowBox(envs.ObsValue):
    """Reward -|a - optimum|^2, where the optimum of each dimension depends on the observation, -1 or 1."""

    action_space = TWO

    def step(self, action):
        optimum = np.array([0.5 + 0.8 * self.state, -1.25 - 1.2 * self.state])
        return self.observe(), -float(np.square(action - optimum).sum()), True, False, {}


class BoundsBox(envs.Bounds):
    """The environment Bounds under the name that scripts for Box actions look for."""


for _env in (FollowBox, BoundsBox):
    gym.register(f"test/{_env.__name__}-v0", _env, disable_env_checker=True, order_enforce=False)
for _env in (envs.ObsValue, envs.Discounting, envs.Truncation, envs.Successor, envs.BothEnds):
    _twin = type(f"{_env.__name__}Box", (_env,), dict(action_space=Box(-1, 1, (1,), np.float32)))
    gym.register(f"test/{_twin.__name__}-v0", _twin, disable_env_checker=True, order_enforce=False)


def probe(module, monkeypatch, folder, name, log_alpha=-20.0, **given):
    """Train, SAC with next to no entropy bonus; the agent and the mean return of its deterministic policy."""
    plain = dict(total_timesteps=1600, num_envs=4, learning_rate=5e-3, gamma=0.9, eval_episodes=20, anneal_lr=True)
    plain |= dict(train_frequency=2, batch_size=32, learning_starts=64)
    plain |= dict(target_network_frequency=20, end_e=0.3, tau=0.2, noisy=False)
    agents = []

    def start(_, agent, *__):
        agents.append(agent)
        if has_noise(module):
            agent.log_alpha.data.fill_(log_alpha)

    def fall(optimizer, _):
        """Let the step size fall, so that values come to rest."""
        for group in optimizer.param_groups:
            group["lr"] *= 0.999

    with monkeypatch.context() as patch:
        spy(patch, module.Agent, "__init__", after=start)
        if is_continuous(module):
            spy(patch, module, "descend", before=fall)
        result = learn(module, folder, name, **plain | given)
    return agents[0], result["eval_mean"]


@torch.no_grad()
def values(agent, obs) -> np.ndarray:
    """Q of each observation (rows): of each action or, if continuous, by each critic for the action 0 (columns)."""
    obs = torch.as_tensor(obs)
    if hasattr(agent, "draw_noise"):
        return torch.stack([agent(obs, agent.draw_noise()) for _ in range(1000)]).mean(0).numpy()
    if not hasattr(agent, "actor"):
        return agent(obs).numpy()
    return torch.stack([critic(obs, torch.zeros(len(obs), 1)) for critic in critics(agent)], -1).numpy()


def slack(module) -> int:
    """By how much values may differ more: noise on the weights blurs them, and the maximum over it is too high."""
    return 2 if has_noisy_layers(module) else 1


def near(expected, tolerance):
    """Each number as near as that."""
    return pytest.approx(np.array(expected), abs=tolerance)


# Values


def check_values(module, monkeypatch, folder, name, expected, tolerance, steps):
    """All Q of an observation are the expected value, for the actions change nothing."""
    agent, _ = probe(module, monkeypatch, folder, name, total_timesteps=steps)
    found = values(agent, np.float32([*expected])[:, None])
    column = np.array([*expected.values()])[:, None]
    assert found == near(np.broadcast_to(column, found.shape), tolerance * slack(module))


@each_off_policy
@pytest.mark.parametrize(
    ("name", "expected", "tolerance", "steps"),
    [
        ("ObsValue", {-1: -1, 1: 1}, 0.05, 800),
        ("Discounting", {-1: 0.9, 1: 1}, 0.04, 1600),
        ("Truncation", {1: 10}, 0.25, 2400),  # 4.7 if truncation is termination, 8.9 if reset steps are learned from
        ("BothEnds", {1: 1}, 0.05, 800),
    ],
)
def test_values(module, monkeypatch, tmp_path, name, expected, tolerance, steps):
    """Rows mixed up, a wrong discount, every misuse of an end of an episode."""
    check_values(module, monkeypatch, tmp_path, name, expected, tolerance, steps)


@each([dqn, n_step_dqn, rainbow, ddpg])
def test_value_of_the_last_observation(module, monkeypatch, tmp_path):
    """Its value is not that of the observation after the reset; other scripts take their rows as one of these does."""
    check_values(module, monkeypatch, tmp_path, "Successor", {-1: 9, 1: 10}, 0.25, 4000)


@pytest.mark.parametrize("module", [dqn, ddpg], ids=["dqn", "ddpg"])
@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("reward, terminated, valid,", "reward, done, valid,", 1 / (1 - 0.9 * 7 / 8)),
        ("valid = ~done  #", "valid = ~done | True  #", 80 / 9),  # Q = 8/9 + 0.9 Q
    ],
)
def test_truncation_probe_sees(module, monkeypatch, tmp_path, old, new, wrong):
    """A probe that could not fail: with the bug put in, Q is not 10 but the number that the bug is known by."""
    broken = planted(module, old, new, tmp_path / "planted")
    check_values(broken, monkeypatch, tmp_path, "Truncation", {1: wrong}, 0.35, 2400)


@each([sac])
def test_the_entropy_is_part_of_the_value(module, monkeypatch, tmp_path):
    """Reward 1 at a step, then the entropy of the next action for ever: Q = 10 + 9 alpha H, here with alpha = 1."""
    fixed = planted(module, "loss = alpha * (entropy", "loss = 0 * alpha * (entropy", tmp_path / "planted")
    agent, _ = probe(fixed, monkeypatch, tmp_path, "Truncation", log_alpha=0.0, total_timesteps=2400)
    assert agent.log_alpha == 0
    with torch.no_grad():
        actions, log_probs = agent.sample(torch.ones(20_000, 1), torch.randn(20_000, 1))
        q = agent.critic1(torch.ones(20_000, 1), actions).mean().item()
    entropy = -log_probs.mean().item()
    assert entropy == near(math.log(2), 0.1)  # nothing but the entropy is paid: uniform on [-1, 1]
    assert q == near(10 + 9 * entropy, 0.5)


# Actions


@each_q_learning
def test_policy_finds_the_paid_action(module, monkeypatch, tmp_path):
    """Values of the wrong action learned, or the smallest one taken."""
    agent, mean = probe(module, monkeypatch, tmp_path, "ActionReward", total_timesteps=800)
    assert mean == 1
    assert values(agent, [[1.0]]) == near([[-1, 1]], 0.05 * slack(module))


@each_q_learning
def test_policy_depends_on_the_observation(module, monkeypatch, tmp_path):
    """Actions, rewards and observations of different rows mixed up."""
    agent, mean = probe(module, monkeypatch, tmp_path, "ObsActionReward", total_timesteps=1200)
    assert mean == 1
    assert values(agent, [[-1.0], [1.0]]) == near([[1, -1], [-1, 1]], 0.1 * slack(module))


@each_q_learning
def test_numbers_that_do_not_start_at_0(module, monkeypatch, tmp_path):
    """Discrete.start forgotten, in observations or in actions."""
    agent, mean = probe(module, monkeypatch, tmp_path, "Numbers")
    assert mean == 1
    assert values(agent, [5, 6, 7]) == near(2 * np.eye(3) - 1, 0.15)


@each_continuous
def test_bounds_of_each_dimension_and_side(module, monkeypatch, tmp_path):
    """One bound for all dimensions, symmetric bounds, a bias added twice, actions outside the space.

    The temperature of SAC falls to a third meanwhile: at the end the entropy is -dim(A).
    """
    monkeypatch.setattr(envs.Bounds, "actions", [])
    agent, mean = probe(module, monkeypatch, tmp_path, "Bounds", log_alpha=-2.0, total_timesteps=3200, hidden_size=32)
    assert all(map(envs.Bounds.action_space.contains, envs.Bounds.actions))
    chosen = module.action_map(envs.Bounds.action_space)(agent.act(np.ones((1, 1), np.float32), greedy=True))
    assert chosen[0].tolist() == near(envs.Bounds.optimum.tolist(), 0.25)
    assert mean == near(0, 0.08)
    if has_noise(module):
        assert lines(tmp_path)[-1]["entropy"] == near(-2, 0.15)


@each_continuous
def test_box_actions_depend_on_the_observation(module, monkeypatch, tmp_path):
    """Actions, rewards and observations of different rows mixed up; a gradient that reaches one dimension alone."""
    agent, mean = probe(module, monkeypatch, tmp_path, "Follow", log_alpha=0.0, total_timesteps=2400, hidden_size=32)
    chosen = module.action_map(TWO)(agent.act(np.float32([[-1], [1]]), greedy=True))
    assert chosen == near([[-0.3, -0.05], [1.3, -2.45]], 0.3)
    assert mean == near(0, 0.1)


# Images


@each([dqn, dueling_dqn, noisy_dqn, c51, rainbow])
def test_image(module, monkeypatch, tmp_path):
    """Frames (C, H, W) in uint8 scaled twice or not at all, or with axes mixed up; all have the same encoder."""
    _, mean = probe(module, monkeypatch, tmp_path, "Image", total_timesteps=800, learning_rate=1e-3)
    assert mean == 1


@each([dqn, dueling_dqn])
def test_grid(module, monkeypatch, tmp_path):
    """Boolean images (H, W, C) whose channels are taken for rows."""
    _, mean = probe(module, monkeypatch, tmp_path, "Grid", total_timesteps=2800, learning_rate=2e-3)
    assert mean > 0.85  # by chance -1/3


@each([ddpg])
def test_image_with_box_actions(module, monkeypatch, tmp_path):
    """Frames (C, H, W) in uint8 scaled twice or not at all, or with axes mixed up; all have the same encoder."""
    given = dict(total_timesteps=800, learning_rate=1e-3, batch_size=16)
    agent, _ = probe(module, monkeypatch, tmp_path, "Image", **given)
    obs, _ = module.make_envs("test/ImageBox-v0", 40).reset(seed=1)
    right = obs[:, 1, :, 20:].max((1, 2)) > obs[:, 1, :, :16].max((1, 2))
    assert ((values(agent, obs) > 0) == right[:, None]).mean() > 0.9
