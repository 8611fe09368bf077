"""What all policy-gradient scripts have in common, tested in each of them: policy, schedules, gradients, statistics."""

from collections import defaultdict

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MODULES, make_args, spy
from gymnasium.spaces import Box, Discrete

POLICY_GRADIENT = [module for module in MODULES if hasattr(module, "RunningNorm")]
OBS, BOX = Box(-np.inf, np.inf, (5,), np.float32), Box(np.float32([-1, -3]), np.float32([2, 0.5]))


def each(*flags):
    """Run the test once for each of these scripts that has the flags."""
    modules = [module for module in POLICY_GRADIENT if all(hasattr(module.Args, flag) for flag in flags)]
    return pytest.mark.parametrize("module", modules, ids=lambda module: module.__name__.split(".")[-1])


def learn(module, monkeypatch, folder, **given):
    """Train on a Tagged environment, 16 steps of 3 of them per iteration,."""
    monkeypatch.setattr(envs.Tagged, "instances", [])
    plain = dict(env_id="test/Tagged-v0", num_envs=3, num_steps=16, total_timesteps=3 * 16 * 8, learning_rate=1e-2)
    module.train(make_args(module, folder, **(plain | dict(critic_learning_rate=1e-2) | given)))


def spy_steps(monkeypatch, module, before):
    """Let before(optimizer, gradient, learning_rate) see every step of whatever optimizer the script has."""
    for kind in {module.Adam, getattr(module, "RMSprop", module.Adam)}:
        spy(monkeypatch, kind, "step", before)


def spy_updates(monkeypatch, module, before):
    """Let before(agent, batch, function) see every call of the functions that take gradient steps."""
    for name in {"update", "critic_step"} & set(vars(module)):
        spy(monkeypatch, module, name, lambda agent, *inputs, name=name: before(
            agent, next(x for x in inputs if isinstance(x, dict)), name))  # fmt: skip


# The policy


def make_agent(module, space, obs_space=OBS, **given):
    """An agent whose policy is far from uniform and whose deviations differ."""
    agent = module.Agent(obs_space, space, module.Args(**given))
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300 if agent.discrete else 70)
        if agent.log_std is not None:
            agent.log_std.copy_(torch.tensor([-0.5, 0.3]))
    return agent


@each()
def test_discrete_actions_follow_the_policy(module):
    """Acting from another distribution than the one that learning assumes, or one noise for all environments."""
    agent, rows = make_agent(module, Discrete(4)), 20_000
    for obs in torch.randn(3, 5):
        expected = agent.actor(obs).softmax(-1).detach().numpy()
        counts = np.bincount(agent.act(obs.expand(rows, 5).numpy()), minlength=4)
        assert (abs(counts - rows * expected) < 5 * np.sqrt(rows * expected * (1 - expected)) + 1).all()
        assert expected.std() > 0.05


@each()
def test_box_actions_follow_the_policy(module):
    """Mean or deviation other than learning assumes, or one noise for all dimensions or all environments."""
    agent, obs, rows = make_agent(module, BOX), torch.randn(1, 5), 20_000
    actions = agent.act(obs.expand(rows, 5).numpy())
    mean, std = agent.actor(obs)[0].detach().numpy(), np.exp([-0.5, 0.3])
    assert (abs(actions.mean(0) - mean) < 5 * std / np.sqrt(rows)).all()
    assert actions.std(0) == pytest.approx(std, rel=0.03)
    assert abs(np.corrcoef(actions.T)[0, 1]) < 0.04
    assert (abs((actions - mean) / std) < 1).mean() == pytest.approx(0.6827, abs=0.015)


@each()
@pytest.mark.parametrize("space", [Discrete(4), BOX], ids=["discrete", "box"])
def test_greedy_is_the_mode(module, space):
    """An evaluation that still samples."""
    agent, obs = make_agent(module, space), torch.randn(50, 5)
    out, state = agent.actor(obs).detach(), torch.get_rng_state()
    actions = agent.act(obs.numpy(), greedy=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert actions == pytest.approx((out.argmax(-1) if agent.discrete else out).numpy(), abs=1e-5)
    assert not np.array_equal(actions, agent.act(obs.numpy()))


@each()
def test_images_are_scaled_once(module):
    """Pixels divided by 255 twice or never, channels of boolean images taken for rows, numbers not made one-hot."""
    frames, grid = Box(0, 255, (2, 36, 36), np.uint8), Box(0, 1, (10, 10, 3), np.bool_)
    for space, prepare in ((frames, lambda x: x.float() / 255), (grid, lambda x: x.permute(0, 3, 1, 2).float())):
        agent = make_agent(module, Discrete(4), space)
        obs = torch.from_numpy(np.stack([space.sample() for _ in range(3)]))
        torch.testing.assert_close(agent.features(obs), agent.trunk(prepare(obs)))
        assert agent.features(obs).std(0).max() > 0
    agent = make_agent(module, Discrete(4), Discrete(3, start=5))
    assert agent.features(torch.tensor([5, 7])).tolist() == torch.eye(3)[[0, 2]].tolist()


@each()
def test_initial_weights(module):
    """Layers that are not orthogonal, another gain, a bias, sizes and deviations other than asked for."""
    agent = module.Agent(OBS, BOX, module.Args(hidden_size=12, log_std_init=-0.7))
    assert agent.log_std.tolist() == pytest.approx([-0.7] * 2)
    for head, gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        layers = [layer for layer in head if isinstance(layer, torch.nn.Linear)]
        assert [layer.out_features for layer in layers[:-1]] == [12, 12]
        for layer in layers:
            squared = torch.linalg.svdvals(layer.weight) / (gain if layer is layers[-1] else 2**0.5)
            torch.testing.assert_close(squared, torch.ones_like(squared))
            assert not layer.bias.any()


# Schedules and gradients


class Death(BaseException):
    """What ends a run at once."""


@each()
@pytest.mark.parametrize("anneal_lr", [False, True])
def test_step_size_falls_with_the_steps_taken(module, monkeypatch, tmp_path, anneal_lr):
    """A schedule that is ignored or not asked for, starts late, ends early, or begins anew in a resumed run."""
    shares, steps = defaultdict(list), []  # the step sizes used after a number of steps, as shares of the largest

    def after_log(_, run, step, *rest):
        steps.append(step)
        if len(steps) == 5:
            raise Death

    def before_update(agent, *inputs):
        if hasattr(module.Args, "policy_step"):
            shares[steps[-1]].append(inputs[1].item() / 0.4)

    spy(monkeypatch, module.Run, "log", after=after_log)
    spy(monkeypatch, module, "Run", after=lambda run, *_: steps.append(run.state["step"]))
    spy(monkeypatch, module, "update", before_update)
    spy_steps(monkeypatch, module, lambda _, gradient, rate: shares[steps[-1]].extend(rate.flatten().unique() / 1e-2))
    with pytest.raises(Death):
        learn(module, monkeypatch, tmp_path, anneal_lr=anneal_lr, policy_step=0.4, checkpoint_every=1)
    module.train(module.parse_args(["--resume", str(tmp_path / "run")]))
    assert steps[5] == steps[4]
    assert steps[-1] == 384
    assert shares.keys() == set(steps[:-1])
    for step, found in shares.items():
        assert [float(share) for share in found] == pytest.approx([1 - step / 384 if anneal_lr else 1] * len(found))


@each("max_grad_norm")
def test_long_gradients_are_scaled_down(module, monkeypatch, tmp_path):
    """A norm other than asked for, of each part or each element by itself, or short gradients made longer."""
    found = []

    def first_gradient(max_grad_norm):
        gradients = []
        with monkeypatch.context() as patch:
            spy_steps(patch, module, lambda _, gradient, rate: gradients.append(gradient.clone()))
            learn(module, patch, tmp_path / str(max_grad_norm), max_grad_norm=max_grad_norm, total_timesteps=48)
        return gradients[0]

    whole = first_gradient(1e9)
    norm = whole.norm().item()
    assert norm > 0.01
    for share in (0.5, 0.9, 1.1):
        found = first_gradient(share * norm)
        torch.testing.assert_close(found, whole * min(1, share), atol=1e-6, rtol=1e-4)


@each("update_epochs", "num_minibatches")
def test_minibatches_partition_the_valid_rows(module, monkeypatch, tmp_path):
    """Rows drawn with replacement, left over or used twice, reset steps among them, one order for all epochs."""
    batches, name = [], "critic_step" if hasattr(module, "critic_step") else "update"

    def before(agent, batch, function):
        if function == name:
            batches.append([tuple(obs) for obs in batch["obs"].tolist()])

    spy_updates(monkeypatch, module, before)
    learn(module, monkeypatch, tmp_path, update_epochs=3, num_minibatches=4)
    assert len(batches) == 8 * 3 * 4
    for k in range(8):
        epochs = [batches[4 * i : 4 * i + 4] for i in range(3 * k, 3 * k + 3)]
        rows = {tuple(row["obs"]) for env in envs.Tagged.instances[:3] for row in env.log if row["t"] // 16 == k}
        orders = [[row for batch in epoch for row in batch] for epoch in epochs]
        assert all(sorted(order) == sorted(rows) for order in orders)
        assert all(max(map(len, epoch)) - min(map(len, epoch)) <= 1 for epoch in epochs)
        assert orders[0] != orders[1] != orders[2] != sorted(rows)


# Statistics


@each("norm_obs")
def test_observation_statistics_wait_for_the_learner(module, monkeypatch, tmp_path):
    """Statistics that move before their rows are learned from, count reset steps, stand still, or are not used."""
    seen, x, rows, new = [], torch.ones(1, 3), torch.zeros(0, 3), torch.zeros(0, 3)
    spy_updates(monkeypatch, module, lambda agent, batch, name: seen.append((agent.features(x), name, batch["obs"])))
    spy(monkeypatch, module, "evaluate", lambda agent, *_: seen.append((agent.features(x), "update", rows)))
    learn(module, monkeypatch, tmp_path, norm_obs=True, update_epochs=1, num_minibatches=1)
    assert len(seen) > 8
    for found, name, obs in seen:
        if name == "update":
            rows, new = torch.cat([rows, new]), obs
        expected = (x - rows.mean(0)) * (rows.var(0, correction=0) + 1e-8).rsqrt() if len(rows) else x
        torch.testing.assert_close(found, expected.clamp(-10, 10), atol=1e-2, rtol=1e-3)


class Jackpot(envs.ValueOnly):
    """Reward 1000 at the 200th step, 0 before and after it."""

    steps = 0

    def step(self, action):
        self.steps += 1
        return self.observe(), 1000.0 * (self.steps == 200), False, False, {}


gym.register("test/Jackpot-v0", Jackpot, max_episode_steps=10, disable_env_checker=True, order_enforce=False)


@each()
def test_rewards_end_at_10_deviations(module, monkeypatch, tmp_path):
    """One reward that outweighs all others."""
    seen, name = [], next(n for n in ("compute_gae", "compute_returns", "sarsa_targets") if hasattr(module, n))
    spy(monkeypatch, module, name, before=lambda rewards, *_: seen.append(rewards.abs().max().item()))
    given = dict(norm_reward=True, total_timesteps=16 * 20, gamma=0.0, eval_episodes=1)
    learn(module, monkeypatch, tmp_path, env_id="test/Jackpot-v0", num_envs=1, baseline="value", **given)
    assert max(seen) == 10
