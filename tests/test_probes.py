"""Environments small enough to know the right values and the right policy; and proof that known bugs would be seen."""

import envs
import numpy as np
import pytest
import torch
from conftest import make_args, on_policy, spy
from runs import each

from algos import a2c, npg, ppo_clip


def learn(module, monkeypatch, folder, name, **given):
    """Train on test/<name>-v0; return the agent and the mean return of its deterministic policy."""
    plain = dict(env_id=f"test/{name}-v0", total_timesteps=4096, num_envs=4, num_steps=32, learning_rate=1e-2)
    plain |= dict(update_epochs=4, num_minibatches=2, gamma=0.9, eval_episodes=20, anneal_lr=True)
    settings = plain | given
    agents = []
    settings["total_timesteps"] *= 1 if hasattr(module.Args, "update_epochs") else 4  # one gradient step per batch
    settings["total_timesteps"] *= 2 if hasattr(module.Args, "line_search_steps") else 1  # steps of bounded length
    spy(monkeypatch, module, "evaluate", before=lambda agent, *_: agents.append(agent))
    result = module.train(make_args(module, folder, **settings))
    return agents[0], result["eval_mean"]


def value(agent, *obs):
    """V of observations; a Python number stands for a vector of one."""
    obs = [np.full(1, x, np.float32) if isinstance(x, int) else x for x in obs]
    with torch.no_grad():
        return agent(torch.from_numpy(np.stack(obs)))[1].tolist()


def near(expected, tolerance=0.05):
    return pytest.approx(expected, abs=tolerance)


@on_policy
def test_value_depends_on_the_observation(module, monkeypatch, tmp_path):
    """A value head that learns nothing; rows of values and returns that do not belong together: every V is 0."""
    agent, _ = learn(module, monkeypatch, tmp_path, "ObsValue", total_timesteps=2048)
    assert value(agent, -1, 1) == near([-1, 1])


@on_policy
def test_value_is_discounted(module, monkeypatch, tmp_path):
    """A discount that is missing or applied twice, and a bootstrap at a termination."""
    agent, _ = learn(module, monkeypatch, tmp_path, "Discounting")
    assert value(agent, -1, 1) == near([0.9, 1], 0.02)


@on_policy
def test_policy_finds_the_paid_action(module, monkeypatch, tmp_path):
    """A policy loss with the wrong sign."""
    agent, mean = learn(module, monkeypatch, tmp_path, "ActionReward", total_timesteps=2048)
    assert mean == 1
    assert agent(torch.ones(1, 1))[0].probs[0, 1] > 0.9
    assert value(agent, 1) == near([1], 0.1)


@on_policy
def test_policy_depends_on_the_observation(module, monkeypatch, tmp_path):
    """Actions, advantages and observations of different rows mixed up."""
    agent, mean = learn(module, monkeypatch, tmp_path, "ObsActionReward", learning_rate=5e-3)
    assert mean == 1
    policy = agent(torch.tensor([[-1.0], [1.0]]))[0].probs
    assert policy[0, 0] > 0.9
    assert policy[1, 1] > 0.9
    assert value(agent, -1, 1) == near([1, 1], 0.1)


@on_policy
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95])
def test_truncation_is_bootstrapped(module, monkeypatch, tmp_path, gae_lambda):
    """Truncation taken for termination (4.7 or less), reset steps learned from (8.9): V is 10."""
    agent, _ = learn(module, monkeypatch, tmp_path, "Truncation", total_timesteps=6144, gae_lambda=gae_lambda)
    assert value(agent, 1) == near([10], 0.1)


@on_policy
def test_bootstrap_takes_the_true_last_observation(module, monkeypatch, tmp_path):
    """The bootstrap from V(s_t) or from V of the observation after the reset."""
    agent, _ = learn(module, monkeypatch, tmp_path, "Successor", total_timesteps=8192, num_steps=33, num_minibatches=1)
    assert value(agent, -1, 1) == near([9, 10], 0.1)


@on_policy
def test_both_ends_at_once_are_a_termination(module, monkeypatch, tmp_path):
    """A bootstrap wherever `truncated` is set, also if `terminated` is: V is 1, not 10."""
    agent, _ = learn(module, monkeypatch, tmp_path, "BothEnds", total_timesteps=2048)
    assert value(agent, 1) == near([1])


@on_policy
def test_bounds_of_each_dimension_and_side(module, monkeypatch, tmp_path):
    """One bound for all dimensions, symmetric bounds, a bias added twice, actions outside the space."""
    monkeypatch.setattr(envs.Bounds, "actions", [])
    given = dict(log_std_init=-0.7)  # with a wide policy, a mean beyond the bounds is the best
    if not hasattr(module.Args, "update_epochs"):
        given |= dict(learning_rate=3e-3, total_timesteps=8192)  # the first steps of RMSprop are ten times as long
    agent, mean = learn(module, monkeypatch, tmp_path, "Bounds", **given)
    space = envs.Bounds.action_space
    actions = np.stack(envs.Bounds.actions)
    assert all(map(space.contains, envs.Bounds.actions))
    assert (actions[:, 0] == space.high[0]).any()  # exploration reached the bounds beside the optimum, so
    assert (actions[:, 1] == space.low[1]).any()  # that no action was clipped to less than them
    chosen = module.action_map(space)(agent.act(np.ones((1, 1), np.float32), greedy=True))
    assert chosen[0].tolist() == near(envs.Bounds.optimum.tolist(), 0.25)
    assert mean == near(0)


@each([a2c, npg, ppo_clip])
def test_image(module, monkeypatch, tmp_path):
    """Frames (C, H, W) in uint8 scaled twice or not at all, or with axes mixed up; all have the same encoder."""
    given = dict(total_timesteps=1536, learning_rate=1e-3, policy_step=0.05)
    agent, mean = learn(module, monkeypatch, tmp_path, "Image", **given)
    assert mean == 1
    assert value(agent, np.zeros((2, 36, 36), np.uint8)) != near([0], 1e-4)


@each([a2c])
def test_grid(module, monkeypatch, tmp_path):
    """Boolean images (H, W, C) whose channels are taken for rows."""
    given = dict(total_timesteps=9216, num_minibatches=4, learning_rate=5e-3, policy_step=0.05)
    _, mean = learn(module, monkeypatch, tmp_path, "Grid", **given)
    assert mean > 0.85  # by chance -1/3


@on_policy
def test_numbers_that_do_not_start_at_0(module, monkeypatch, tmp_path):
    """Discrete.start forgotten, in observations or in actions."""
    agent, mean = learn(module, monkeypatch, tmp_path, "Numbers", learning_rate=5e-3)
    assert mean == 1
    assert value(agent, *np.arange(5, 8)) == near([1, 1, 1], 0.1)


# Broken on purpose: each of these bugs must move a value far enough for the probes above to see it.


class NeverValid(np.ndarray):
    """Flags whose negation is true everywhere, as if no step were a reset."""

    def __array_ufunc__(self, function, method, *inputs, **options):
        inputs = [x.view(np.ndarray) if isinstance(x, NeverValid) else x for x in inputs]
        if function in (np.invert, np.logical_not):
            return np.ones(inputs[0].shape, bool)
        return getattr(function, method)(*inputs, **options).view(NeverValid)


def keep_reset_steps(module, monkeypatch):
    def step(envs, actions):
        obs, rewards, terminated, truncated, infos = type(envs).step(envs, actions)
        return obs, rewards, terminated, truncated.view(NeverValid), infos

    def forgetful(*inputs):
        monkeypatch.setattr(module, "make_envs", make_envs)  # the evaluation stays as it is
        envs = make_envs(*inputs)
        envs.step = lambda actions: step(envs, actions)
        return envs

    make_envs = module.make_envs
    monkeypatch.setattr(module, "make_envs", forgetful)


def break_gae(change):
    def put_in(module, monkeypatch):
        compute_gae = module.compute_gae
        monkeypatch.setattr(module, "compute_gae", lambda *inputs: compute_gae(*change(*inputs)))

    put_in.__name__ = change.__name__
    return put_in


@break_gae
def take_truncation_for_termination(rewards, values, terminated, done, gamma, lam):
    return rewards, values, done, done, gamma, lam


@break_gae
def trace_across_truncations(rewards, values, terminated, done, gamma, lam):
    return rewards, values, terminated, terminated, gamma, lam


@break_gae
def bootstrap_after_reset(rewards, values, terminated, done, gamma, lam):
    values = values.clone()
    ends = done[:-1]
    values[1:-1][ends] = values[2:][ends]
    return rewards, values, terminated, done, gamma, lam


@each([ppo_clip])
@pytest.mark.parametrize(
    ("bug", "gae_lambda", "wrong"),
    [
        (take_truncation_for_termination, 0.0, 4.71),
        (take_truncation_for_termination, 0.95, 3.71),
        (take_truncation_for_termination, 1.0, 3.59),
        (keep_reset_steps, 0.0, 8.89),
        (keep_reset_steps, 0.95, 9.68),
        (trace_across_truncations, 0.95, 8.91),
    ],
)
def test_truncation_probe_sees(module, monkeypatch, tmp_path, bug, gae_lambda, wrong):
    """A probe that could not fail: with the bug put in, V is not 10 but the number that the bug is known by."""
    bug(module, monkeypatch)
    given = dict(total_timesteps=7200, num_steps=36, num_minibatches=1, update_epochs=8)  # whole episodes
    agent, _ = learn(module, monkeypatch, tmp_path, "Truncation", gae_lambda=gae_lambda, **given)
    assert value(agent, 1) == near([wrong], 0.1)


@each([a2c, ppo_clip])
def test_successor_probe_sees_the_value_after_the_reset(module, monkeypatch, tmp_path):
    """A probe that could not fail: bootstrapping from the reset observation, V(1) = 1 + 0.9 V(-1) = 1 + 0.81 V(1)."""
    bootstrap_after_reset(module, monkeypatch)
    agent, _ = learn(module, monkeypatch, tmp_path, "Successor", total_timesteps=8192, num_steps=33, num_minibatches=1)
    assert value(agent, -1, 1) == near([0.9 / 0.19, 1 / 0.19], 0.1)
