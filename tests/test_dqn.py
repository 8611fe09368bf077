"""DQN, Double DQN and Dueling DQN against slow references, and each known bug planted and seen.

A bug is one replacement in the text of a script: the check that passes with the script must fail with the bug.
"""

import copy
import json
import os
import sys
import types
import weakref
from pathlib import Path

import envs
import numpy as np
import pytest
import torch
from conftest import make_args, spy
from gymnasium.spaces import Box, Discrete

from algos import double_dqn, dqn, dueling_dqn

MODULES = [dqn, double_dqn, dueling_dqn]
LOSS = {dqn: "dqn_loss", double_dqn: "double_dqn_loss", dueling_dqn: "double_dqn_loss"}
VECTOR = Box(-np.inf, np.inf, (5,), np.float32)
CPU = torch.device("cpu")
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])


def planted(monkeypatch, old, new, source=dqn):
    """The module with the one `old` in its text replaced by `new`."""
    text = Path(source.__file__).read_text()
    assert text.count(old) == 1, f"{old!r} must occur once"
    module = types.ModuleType("planted")
    module.__file__ = source.__file__
    monkeypatch.setitem(sys.modules, "planted", module)
    exec(compile(text.replace(old, new), source.__file__, "exec"), module.__dict__)
    LOSS[module] = LOSS[source]
    return module


def bugs(*pairs):
    """Run the test once for each bug, given as (old, new)."""
    return pytest.mark.parametrize(("old", "new"), pairs, ids=[f"{new.strip()[:40]}" for _, new in pairs])


def sees(monkeypatch, check, old, new, *inputs, source=dqn):
    """The check fails with the bug in the script."""
    with pytest.raises((AssertionError, IndexError)):
        check(planted(monkeypatch, old, new, source), *inputs)


def make_agent(module, obs_space=VECTOR, actions=3, **given):
    """An agent, another one as its target, and their arguments."""
    args = module.Args(**given)
    agent, target = (module.Agent(obs_space, Discrete(actions), args) for _ in range(2))
    return agent, target, args


def make_batch(rows=64, actions=3):
    """A batch as the learner gets it."""
    batch = dict(obs=torch.randn(rows, 5), actions=torch.randint(actions, (rows,)), rewards=torch.randn(rows) * 2)
    return batch | dict(next_obs=torch.randn(rows, 5), terminated=torch.rand(rows) < 0.3)


def gradients(agent, loss):
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(agent.parameters()))])


def parameters(agent):
    return torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone()


# The replay buffer, by brute force


def draw_all(monkeypatch, buffer):
    """Every transition that the buffer may draw, in order."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", lambda low, high, size: torch.arange(low, high))
        batch = buffer.sample(1, CPU)
    return list(zip(*(batch[name].tolist() for name in ("obs", "actions", "rewards", "next_obs", "terminated"))))


def check_ring(module, monkeypatch, num_envs, num_rows):
    """After each step the buffer holds the last `num_rows` steps without the resets, and nothing else."""
    random, space = np.random.default_rng(num_envs * num_rows), Box(0, np.inf, (2,), np.float32)
    buffer = module.ReplayBuffer(space, Discrete(10**6), num_envs, num_rows, False)
    obs, done, rows = np.arange(1.0, 2 * num_envs + 1).reshape(num_envs, 2), np.zeros(num_envs, bool), []
    buffer.add(obs, 0, 0, False, valid=False)
    assert len(buffer) == 0
    rows.append([])
    for t in range(5 * num_rows + 7):
        next_obs = obs + 2 * num_envs  # no number occurs twice
        terminated, truncated = random.random((2, num_envs)) < 0.25
        terminated, truncated, valid = terminated & ~done, truncated & ~done, ~done
        actions, rewards = random.integers(10**6, size=num_envs), random.integers(99, size=num_envs)
        step = zip(obs.tolist(), actions.tolist(), rewards.tolist(), next_obs.tolist(), terminated.tolist())
        rows.append([row for row, real in zip(step, valid) if real])
        buffer.add(next_obs, actions, rewards, terminated, valid)
        expected = [row for step in rows[-num_rows:] for row in step]
        assert len(buffer) == len(expected)
        assert draw_all(monkeypatch, buffer) == expected, t
        obs, done = next_obs, terminated | truncated


@pytest.mark.parametrize("num_envs", [1, 2, 3, 7])
@pytest.mark.parametrize("num_rows", [2, 3, 8, 13])
def test_ring(monkeypatch, num_envs, num_rows):
    """No unwritten, overwritten or reset step, and no step whose successor is overwritten; all others are there."""
    check_ring(dqn, monkeypatch, num_envs, num_rows)


@bugs(
    ("= num_envs, (num_rows + 1) * num_envs", "= num_envs, num_rows * num_envs"),  # the seam
    ("for k in (added, added + 1))", "for k in (added, added))"),
    ('tail += np.count_nonzero(arrays["valid"][following])', "tail += 0"),
    ('tail += np.count_nonzero(arrays["valid"][following])', 'tail += np.count_nonzero(arrays["valid"][row])'),
    ('tail += np.count_nonzero(arrays["valid"][following])', "tail += (added > 3) * n"),
    ('np.flatnonzero(arrays["valid"][row])', "np.arange(n)"),
    ("take((places + self.num_envs) % self.size, 0)", "take((places + 1) % self.size, 0)"),
    ("take((places + self.num_envs) % self.size, 0)", 'take(places + self.num_envs, 0, mode="clip")'),
    ("take((places + self.num_envs) % self.size, 0)", "take(places, 0)"),
)
def test_ring_sees(monkeypatch, old, new):
    sees(monkeypatch, check_ring, old, new, monkeypatch, 3, 8)


def test_draws_are_uniform_and_with_replacement(monkeypatch):
    """A transition left out at either end of the ring, or drawn more often than others: within 5 deviations."""
    buffer = dqn.ReplayBuffer(Discrete(10**6), Discrete(2), 3, 10, False)
    for t in range(27):
        buffer.add(np.arange(3) + 3 * t, 0, 0, False, valid=np.array([True, t % 3 > 0, t % 2 > 0]))
    rows, draws = [obs for obs, *_ in draw_all(monkeypatch, buffer)], 50_000
    assert len(rows) == len(set(rows)) == len(buffer)
    obs = buffer.sample(draws, CPU)["obs"].tolist()
    counts, mean = np.array([obs.count(row) for row in rows]), draws / len(rows)
    assert sum(counts) == draws
    assert (abs(counts - mean) < 5 * mean**0.5).all()


@pytest.mark.parametrize(
    ("space", "dtype"),
    [
        (Box(0, 255, (4, 36, 36), np.uint8), torch.uint8),
        (Box(0, 1, (10, 10, 4), np.bool_), torch.bool),
        (Box(-1, 1, (3,), np.float64), torch.float32),
        (Box(-1, 1, (3,), np.float32), torch.float32),
        (Discrete(3, start=5), torch.int64),
    ],
    ids=str,
)
def test_observations_keep_their_type(space, dtype):
    """Images blown up to floats, in the buffer or on the way out; doubles stored as such."""
    buffer = dqn.ReplayBuffer(space, Discrete(2), 2, 5, False)
    obs = np.stack([space.sample() for _ in range(2)])
    buffer.add(obs, 0, 0, False, valid=False)
    buffer.add(obs, np.array([0, 1]), np.array([0.5, 1.5]), np.array([True, False]), np.array([True, True]))
    batch = buffer.sample(7, CPU)
    assert batch["obs"].dtype == batch["next_obs"].dtype == buffer.obs.dtype == dtype
    assert batch["obs"].shape == batch["next_obs"].shape == (7, *space.shape)
    assert batch["rewards"].dtype == torch.float32
    assert batch["terminated"].dtype == torch.bool
    assert all(batch[name].shape == (7,) for name in ("actions", "rewards", "terminated"))
    assert set(zip(batch["actions"].tolist(), batch["rewards"].tolist())) <= {(0, 0.5), (1, 1.5)}
    for row in batch["next_obs"].numpy():
        assert (row == obs.astype(row.dtype)).reshape(2, -1).all(1).any()


def test_actions_of_a_box_are_kept():
    """For the continuous actions of its twins: floats, one column per dimension."""
    buffer = dqn.ReplayBuffer(VECTOR, Box(-1, 1, (2,)), 3, 5, False)
    actions = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    buffer.add(np.zeros((3, 5)), actions, 0, False, valid=np.ones(3, bool))
    assert {tuple(row) for row in buffer.sample(50, CPU)["actions"].tolist()} == {
        tuple(row) for row in actions.tolist()
    }


def test_a_buffer_that_does_not_fit_is_refused(monkeypatch, tmp_path):
    """One sentence with both sizes, before anything is written; no check where the system does not know its memory."""
    frames = Box(0, 255, (4, 84, 84), np.uint8)
    with pytest.raises(ValueError, match=r"1000000000 transitions needs 28\d\d\d\.\d GB.* has [\d.]+ GB"):
        dqn.ReplayBuffer(frames, Discrete(2), 8, 10**9 // 8, False)
    with pytest.raises(ValueError, match="GB"):
        dqn.train(make_args(dqn, tmp_path, buffer_size=10**12))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    needed = (10 + 1) * 2 * (5 * 4 + 8 + 4 + 1 + 1 + 8)
    assert needed < 1000 * 1000
    monkeypatch.setattr(os, "sysconf", lambda name: 30)  # 900 bytes
    with pytest.raises(ValueError, match="buffer of 20 transitions"):
        dqn.ReplayBuffer(VECTOR, Discrete(2), 2, 10, False)
    monkeypatch.setattr(os, "sysconf", lambda name: 31)
    dqn.ReplayBuffer(VECTOR, Discrete(2), 2, 10, False)
    monkeypatch.delattr(os, "sysconf")
    dqn.ReplayBuffer(VECTOR, Discrete(2), 2, 10, False)


# The equations


def check_td_target(module):
    random = np.random.default_rng(0)
    rewards, values, terminated = random.normal(size=50), random.normal(size=50), random.random(50) < 0.4
    expected = [r if end else r + 0.9 * v for r, v, end in zip(rewards, values, terminated)]
    found = module.td_target(*map(torch.from_numpy, (rewards, terminated, values)), 0.9)
    assert found.shape == (50,)
    assert found.numpy() == pytest.approx(np.array(expected), abs=1e-6)


@each_module
def test_td_target_against_a_loop(module):
    """A bootstrap at a termination, a discount that is missing, or applied to the reward."""
    check_td_target(module)


@bugs(
    ("gamma * ~terminated * next_values", "gamma * next_values"),
    ("gamma * ~terminated * next_values", "gamma * terminated * next_values"),
    ("gamma * ~terminated * next_values", "~terminated * next_values"),
    ("rewards + gamma * ~terminated * next_values", "gamma * (rewards + ~terminated * next_values)"),
)
def test_td_target_sees(monkeypatch, old, new):
    sees(monkeypatch, check_td_target, old, new)


def slow_loss(module, agent, target, batch, gamma):
    """The loss row by row; which network chooses the next action is what the scripts differ in."""
    total = 0.0
    for i in range(len(batch["obs"])):
        online, held = agent(batch["next_obs"][i : i + 1])[0].tolist(), target(batch["next_obs"][i : i + 1])[0].tolist()
        chosen = max(range(3), key=lambda a: held[a] if LOSS[module] == "dqn_loss" else online[a])
        y = batch["rewards"][i].item() + (0 if batch["terminated"][i] else gamma * held[chosen])
        error = agent(batch["obs"][i : i + 1])[0, batch["actions"][i]] - y
        total += error**2
    return total / len(batch["obs"])


def check_loss(module):
    torch.manual_seed(4)
    agent, target, args = make_agent(module, gamma=0.8, hidden_size=16)
    with torch.no_grad():
        for network in (agent, target):  # the next actions' values shall matter
            torch.nn.utils.vector_to_parameters(3 * parameters(network), network.parameters())
    batch = make_batch()
    loss, metrics = getattr(module, LOSS[module])(agent, batch, target, args)
    expected = slow_loss(module, agent, target, batch, 0.8)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradients(agent, loss), gradients(agent, expected), atol=1e-5, rtol=1e-3)
    values = agent(batch["obs"])[torch.arange(64), batch["actions"]]
    assert metrics["td_loss"].item() == loss.item()
    assert metrics["q_value"].item() == pytest.approx(values.mean().item(), abs=1e-5)
    assert not any(metric.requires_grad for metric in metrics.values())
    both = getattr(module, LOSS[module])(agent, batch, agent, args)[0]  # the target is a constant, whoever made it
    alone = getattr(module, LOSS[module])(agent, batch, copy.deepcopy(agent), args)[0]
    torch.testing.assert_close(gradients(agent, both), gradients(agent, alone))


@each_module
def test_loss_and_gradient_against_a_loop(module):
    """(B, 1) against (B,), a gradient through the target, clipped errors, networks mixed up."""
    check_loss(module)


@bugs(
    ("    with torch.no_grad():\n        next_values", "    if True:\n        next_values"),
    ('target(batch["next_obs"]).amax(-1)', 'agent(batch["next_obs"]).amax(-1)'),
    ('target(batch["next_obs"]).amax(-1)', 'target(batch["obs"]).amax(-1)'),
    ('target(batch["next_obs"]).amax(-1)', 'target(batch["next_obs"]).mean(-1)'),
    ('target(batch["next_obs"]).amax(-1)', 'target(batch["next_obs"])[agent(batch["next_obs"]).argmax(-1)].amax(-1)'),
    ('batch["actions"][:, None]).squeeze(-1)', 'batch["actions"][:, None])'),
    ("(values - targets).square().mean()", "(values - targets).square().mean() / 2"),
    ("(values - targets).square().mean()", "nn.functional.smooth_l1_loss(values, targets)"),
)
def test_loss_sees(monkeypatch, old, new):
    sees(monkeypatch, check_loss, old, new)


def test_double_loss_sees_the_other_choice(monkeypatch):
    """Double DQN that is DQN, or that takes the online network's value."""
    old = 'choice = agent(batch["next_obs"]).argmax'
    sees(monkeypatch, check_loss, old, old.replace("agent", "target"), source=double_dqn)
    old = 'next_values = target(batch["next_obs"])'
    sees(monkeypatch, check_loss, old, old.replace("target", "agent"), source=double_dqn)


@pytest.mark.parametrize("module", [double_dqn, dueling_dqn])
def test_double_where_choice_and_value_differ(monkeypatch, module):
    """By hand: online prefers action 0, which the target values 2; the target's own maximum is 7."""
    online, held = torch.tensor([[5.0, 1.0, 3.0]]), torch.tensor([[2.0, 7.0, 4.0]])
    for loss, source, expected in ((double_dqn.double_dqn_loss, double_dqn, 2.0), (dqn.dqn_loss, dqn, 7.0)):
        seen = []
        with monkeypatch.context() as patch:
            spy(patch, source, "td_target", before=lambda *inputs: seen.append(inputs[2].item()))  # noqa: B023
            batch = dict(obs=torch.zeros(1), next_obs=torch.zeros(1), actions=torch.tensor([0]))
            batch |= dict(rewards=torch.zeros(1), terminated=torch.tensor([False]))
            loss(lambda _: online, batch, lambda _: held, module.Args())
        assert seen == [expected]


def test_overestimation_shrinks(monkeypatch):
    """Van Hasselt's toy: actions worth 0, estimates that are noise; their maximum is too high by E[max of normals]."""
    torch.manual_seed(0)
    rows, m = 20_000, 10
    online, held, means = torch.randn(rows, m), torch.randn(rows, m), {}
    batch = dict(obs=torch.zeros(rows), next_obs=torch.zeros(rows), actions=torch.zeros(rows, dtype=torch.int64))
    batch |= dict(rewards=torch.zeros(rows), terminated=torch.zeros(rows, dtype=torch.bool))
    for module in MODULES[:2]:
        spy(monkeypatch, module, "td_target", before=lambda *x: means.update({module: x[2].mean().item()}))  # noqa: B023
        getattr(module, LOSS[module])(lambda _: online, batch, lambda _: held, module.Args())
    assert means[dqn] == pytest.approx(1.5388, abs=0.03)  # E of the largest of 10 standard normals
    assert means[double_dqn] == pytest.approx(0, abs=0.04)


def check_dueling(module):
    torch.manual_seed(1)
    agent, _, _ = make_agent(module, actions=4)
    obs = torch.randn(6, 5)
    x = agent.trunk(obs)
    values, advantages = agent.value(x), agent.advantage(x)
    q = agent(obs)
    assert values.shape == (6, 1)
    for i in range(6):
        mean = sum(advantages[i].tolist()) / 4
        for a in range(4):
            assert q[i, a].item() == pytest.approx(values[i, 0].item() + advantages[i, a].item() - mean, abs=1e-5)
    assert q.mean(-1).tolist() == pytest.approx(values[:, 0].tolist(), abs=1e-5)
    with torch.no_grad():
        agent.advantage[-1].bias += 3.7
        torch.testing.assert_close(agent(obs), q, atol=1e-5, rtol=1e-5)
        agent.value[-1].bias += 2.0
        torch.testing.assert_close(agent(obs), q + 2, atol=1e-5, rtol=1e-5)


def test_dueling():
    """Q = V + A - mean A: a constant added to A changes nothing, one added to V moves all alike."""
    check_dueling(dueling_dqn)


@bugs(
    ("advantages - advantages.mean(-1, keepdim=True)", "advantages"),
    ("advantages - advantages.mean(-1, keepdim=True)", "advantages - advantages.amax(-1, keepdim=True)"),
    ("advantages - advantages.mean(-1, keepdim=True)", "advantages - advantages.mean(0, keepdim=True)"),
    ("advantages - advantages.mean(-1, keepdim=True)", "advantages - advantages.mean()"),
)
def test_dueling_sees(monkeypatch, old, new):
    sees(monkeypatch, check_dueling, old, new, source=dueling_dqn)


# The policy and the network


@each_module
def test_epsilon_greedy(module):
    """Random actions too often or too rarely, of the wrong range, shared by all environments, or in the evaluation."""
    agent, _, _ = make_agent(module, actions=4)
    obs, rows = torch.randn(1, 5).expand(40_000, 5).numpy(), 40_000
    best = agent(torch.from_numpy(obs[:1])).argmax().item()
    for epsilon in (0.0, 0.3, 1.0):
        agent.epsilon = epsilon
        counts = np.bincount(agent.act(obs), minlength=4)
        expected = rows * np.array([epsilon / 4 + (1 - epsilon) * (a == best) for a in range(4)])
        assert len(counts) == 4
        assert (abs(counts - expected) <= 5 * np.sqrt(expected * (1 - expected / rows))).all()
        assert (agent.act(obs[:100], greedy=True) == best).all()


@each_module
def test_greedy_takes_no_random_numbers(module):
    agent, _, _ = make_agent(module)
    obs, state = torch.randn(50, 5), torch.get_rng_state()
    assert agent.act(obs.numpy(), greedy=True).tolist() == agent(obs).argmax(-1).tolist()
    assert torch.equal(torch.get_rng_state(), state)


@each_module
def test_layers(module):
    """A size other than asked for, a layer too many or too few, or two with nothing between them."""
    agent, _, _ = make_agent(module, hidden_size=12)
    layers, obs = [layer for layer in agent.modules() if isinstance(layer, torch.nn.Linear)], torch.randn(9, 5)
    assert [layer.out_features for layer in layers] == ([12, 12, 1, 12, 3] if module is dueling_dqn else [12, 12, 3])
    x = layers[0](obs).relu()
    outputs = [last(hidden(x).relu()) for hidden, last in zip(layers[1::2], layers[2::2])]
    advantages = outputs[-1] - outputs[-1].mean(-1, keepdim=True)
    expected = outputs[0] + advantages if module is dueling_dqn else outputs[0]
    torch.testing.assert_close(agent(obs), expected)


@each_module
def test_images_are_scaled_once(module):
    """Pixels divided by 255 twice or never, channels of boolean images taken for rows, numbers not made one-hot."""
    frames, grid = Box(0, 255, (2, 36, 36), np.uint8), Box(0, 1, (10, 10, 3), np.bool_)
    for space, prepare in ((frames, lambda x: x.float() / 255), (grid, lambda x: x.permute(0, 3, 1, 2).float())):
        agent, _, _ = make_agent(module, space)
        obs = torch.from_numpy(np.stack([space.sample() for _ in range(3)]))
        torch.testing.assert_close(agent.features(obs), agent.trunk(prepare(obs)))
        assert agent(obs).shape == (3, 3)
        assert agent(obs).std(0).min() > 0
    agent, _, _ = make_agent(module, Discrete(3, start=5))
    torch.testing.assert_close(agent.features(torch.tensor([5, 7])), agent.trunk(torch.eye(3)[[0, 2]]))


@each_module
def test_target_starts_as_a_copy_and_takes_no_gradient(module, monkeypatch, tmp_path):
    """A target with weights of its own, or one that shares its memory with the network it is to lag behind."""
    targets = []

    def before(agent, target, *_):
        if not targets:
            torch.testing.assert_close(parameters(target), parameters(agent), atol=0, rtol=0)
        targets.append(parameters(target))
        assert not any(parameter.requires_grad for parameter in target.parameters())

    spy(monkeypatch, module, "update", before=before)
    learn(module, tmp_path, "Tagged", total_timesteps=128, target_network_frequency=10**6)
    assert len(targets) > 30
    assert torch.equal(targets[0], targets[-1])


# train(): how often, from what, with what


def learn(module, folder, name, **given):
    """Train briefly on test/<name>-v0 and return the result."""
    plain = dict(env_id=f"test/{name}-v0", num_envs=3, total_timesteps=300, learning_starts=30, batch_size=16)
    plain |= dict(buffer_size=1000, hidden_size=16, train_frequency=1, learning_rate=1e-3)
    envs.Tagged.instances = [] if not given.get("resume") else envs.Tagged.instances
    return module.train(make_args(module, folder, **(plain | given)))


@pytest.fixture(autouse=True)
def _own_instances(monkeypatch):
    monkeypatch.setattr(envs.Tagged, "instances", [])


def check_periods(module, monkeypatch, folder, N, k, f):
    """Gradient steps at each multiple of k beyond learning_starts, copies at each multiple of f, whatever N is."""
    online, targets, steps, total = [], [], [], 240
    with monkeypatch.context() as patch:
        spy(patch, module, "update", lambda agent, target, *_: targets.append(parameters(target)),
            lambda _, agent, *rest: online.append(parameters(agent)))  # fmt: skip
        spy(patch, module.ReplayBuffer, "add", lambda *_: steps.append(len(online)))
        learn(
            module, folder, "Tagged", num_envs=N, train_frequency=k, target_network_frequency=f, total_timesteps=total
        )
    times = [t for t in range(1, total + 1) if t > 30 and t % k == 0]
    assert len(online) == len(times)
    assert steps == [sum(t <= N * j for t in times) for j in [0, *range(total // N)]]  # none before its time, none late
    assert all((a != b).any() for a, b in zip(online, online[1:]))
    for time, target in zip(times, targets):
        last = (time - 1) // f * f  # a copy at this very time comes after the gradient step
        done = sum(t <= last for t in times)
        assert torch.equal(target, online[done - 1] if done else targets[0]), time


@each_module
@pytest.mark.parametrize(
    ("N", "k", "f"), [(1, 1, 7), (1, 2, 5), (3, 1, 7), (3, 2, 5), (8, 3, 7), (8, 1, 3), (3, 4, 60)]
)
def test_periods(module, monkeypatch, tmp_path, N, k, f):
    """Steps and copies at the least common multiple of two periods, or lost by rounding with several environments."""
    check_periods(module, monkeypatch, tmp_path, N, k, f)


COPY = "if t % args.target_network_frequency == 0:"
LEARN = "if t > learning_starts and t % args.train_frequency == 0:"
EACH = "for t in range(step - N + 1, step + 1):"


@bugs(
    (COPY, "if t % args.train_frequency == t % args.target_network_frequency == 0:"),
    (COPY, "if step % args.target_network_frequency == 0:"),
    (COPY, "if step // args.train_frequency % args.target_network_frequency == 0:"),
    (COPY, "if step // N % args.target_network_frequency == 0:"),
    ("target.load_state_dict(agent.state_dict())", "target = agent"),
    ("target.load_state_dict(agent.state_dict())", "pass"),
    (LEARN, "if t > learning_starts and step % args.train_frequency == 0:"),
    (LEARN, "if t > learning_starts and step // N % args.train_frequency == 0:"),
    (LEARN, "if t >= learning_starts and t % args.train_frequency == 0:"),
    (EACH, "for t in (step,):"),
    (EACH, "for t in range(step - N, step):"),
)
def test_periods_see(monkeypatch, tmp_path, old, new):
    sees(monkeypatch, check_periods, old, new, monkeypatch, tmp_path, 3, 2, 5)


def key(obs):
    return tuple(int(x) for x in obs)


def check_rows(module, monkeypatch, folder, name="Tagged", **given):
    """All that is learned from is what happened, all that happened is learned from; targets follow from it alone."""
    batches, checks = [], []

    def before(agent, batch, target, args):
        batches.append({field: column.numpy() for field, column in batch.items()})
        true = {key(row["obs"]): row for env in envs.Tagged.instances for row in env.log}
        rows = [true[key(obs)] for obs in batch["obs"]]
        with torch.no_grad():
            nexts = target(torch.from_numpy(np.stack([row["next_obs"] for row in rows])))
            online = agent(torch.from_numpy(np.stack([row["next_obs"] for row in rows])))
            best = (nexts if LOSS[module] == "dqn_loss" else online).argmax(-1)
        rewards = [np.clip(row["reward"], -1, 1) if args.clip_reward else row["reward"] for row in rows]
        targets = [r + (0 if row["terminated"] else args.gamma * nexts[i, best[i]].item())
                   for i, (r, row) in enumerate(zip(rewards, rows))]  # fmt: skip
        checks.append(targets)

    with monkeypatch.context() as patch:
        spy(patch, module, LOSS[module], before=before)
        spy(patch, module, "td_target", after=lambda y, *_: checks.append(y.tolist()))
        result = learn(module, folder, name, total_timesteps=420, **given)
    trained = envs.Tagged.instances[:3]
    true = {key(row["obs"]): row for env in trained for row in env.log}
    seen = set()
    for batch in batches:
        for i, obs in enumerate(batch["obs"]):
            row = true[key(obs)]
            reward = np.clip(row["reward"], -1, 1) if given.get("clip_reward") else row["reward"]
            assert batch["actions"][i] == row["action"]
            assert batch["rewards"][i] == pytest.approx(reward, rel=1e-6)
            assert key(batch["next_obs"][i]) == key(row["next_obs"])
            assert batch["terminated"][i] == row["terminated"]
            seen.add(key(obs))
    for expected, found in zip(checks[::2], checks[1::2], strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    early = {k for k, row in true.items() if row["t"] < 60}
    assert early <= seen
    kinds = {(true[k]["terminated"], true[k]["truncated"]) for k in seen}
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}
    assert not result["eval_returns"] or len(result["eval_returns"]) == 2
    return result


@each_module
@pytest.mark.parametrize(("name", "clip_reward"), [("Tagged", False), ("TaggedNative", True)])
def test_learned_rows_are_exactly_the_transitions(module, monkeypatch, tmp_path, name, clip_reward):
    """Reset steps learned from, fields of different steps side by side, bootstraps from another observation."""
    check_rows(module, monkeypatch, tmp_path, name, clip_reward=clip_reward)


@bugs(
    ("action, valid = agent.act(obs), ~done", "action, valid = agent.act(obs), ~done | True"),
    ("else reward, terminated, valid)", "else reward, done, valid)"),
    ("else reward, terminated, valid)", "else reward, terminated & ~truncated, valid)"),
    ("buffer.add(obs, action, reward", "buffer.add(obs, to_env(action) * 0, reward"),
    ("take((places + self.num_envs) % self.size, 0)", "take(places, 0)"),
    ("take((places + self.num_envs) % self.size, 0)", "take((places + 2 * self.num_envs) % self.size, 0)"),
)
def test_rows_see(monkeypatch, tmp_path, old, new):
    with pytest.raises((AssertionError, KeyError, RuntimeError)):  # a KeyError is a row that never was
        check_rows(planted(monkeypatch, old, new), monkeypatch, tmp_path)


@each_module
def test_log_keeps_true_returns(module, tmp_path):
    """Returns of clipped rewards in the log, episodes lost or cut in two by a line of the log."""
    result = learn(module, tmp_path, "Tagged", clip_reward=True, log_every=10)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["global_step"] for line in lines] == [*range(9, 300, 9), 300]
    trained, evaluated = envs.Tagged.instances[:3], envs.Tagged.instances[3:]
    ends = sorted((3 * (row["t"] + 1), env.index, env.returns[key(row["obs"])[2]]) for env in trained for row in env.log
                  if row["terminated"] or row["truncated"])  # fmt: skip
    last = 0
    for line in lines:
        returns = [total for step, _, total in ends if last < step <= line["global_step"]]
        assert line["episodes"] == len(returns)
        assert line["episodic_return"] == (pytest.approx(np.mean(returns)) if returns else None)
        last = line["global_step"]
    assert result["eval_returns"] == pytest.approx([env.returns[0] for env in evaluated])


def check_metrics(module, monkeypatch, folder, env):
    """A line of the log has means over the last 100 gradient steps; no tensors of much earlier ones are kept."""
    outputs, tensors, names, lines = [], [], set(), []

    def remember(output, *_):
        names.update(output)
        outputs.append({name: value.item() for name, value in output.items()})
        tensors.extend(weakref.ref(value) for value in output.values())
        assert sum(tensor() is not None for tensor in tensors) <= 110 * len(names)

    def line(run, step, returns, metrics):
        means = {name: np.mean([each[name] for each in outputs[-100:] if name in each]) for name in names}
        assert {name: metrics[name] for name in names} == pytest.approx(means, rel=1e-4)
        lines.append(step)

    with monkeypatch.context() as patch:
        for name in {"update", "update_policy"} & set(vars(module)):
            spy(patch, module, name, after=remember)
        spy(patch, module.Run, "log", line)
        learn(module, folder, env, log_every=300)
    assert lines == [300]


@each_module
def test_metrics(module, monkeypatch, tmp_path):
    """Means over other gradient steps; tensors kept by the thousand, which fragment memory."""
    check_metrics(module, monkeypatch, tmp_path, "Tagged")


@bugs(("deque(maxlen=100)", "[]"), ("[m[name] for m in history]", "[history[-1][name]]"))
def test_metrics_see(monkeypatch, tmp_path, old, new):
    sees(monkeypatch, check_metrics, old, new, monkeypatch, tmp_path, "Tagged")


@each_module
def test_evaluation_does_not_explore(module, monkeypatch, tmp_path):
    """An evaluation that is epsilon-greedy: with epsilon 1 to the end, its actions are still those of largest Q."""
    agents = []
    spy(monkeypatch, module, "evaluate", lambda agent, *_: agents.append(agent))
    learn(module, tmp_path, "Tagged", end_e=1.0, eval_episodes=4)
    for env in envs.Tagged.instances[3:]:
        obs = torch.from_numpy(np.stack([row["obs"] for row in env.log]))
        assert [int(row["action"]) for row in env.log] == agents[0](obs).argmax(-1).tolist()


def test_linear_schedule():
    """A schedule that starts late, overshoots, or divides by a duration of 0."""
    values = [dqn.linear_schedule(1.0, 0.1, 10, t) for t in (0, 1, 5, 9, 10, 11, 10**6)]
    assert values == pytest.approx([1.0, 0.91, 0.55, 0.19, 0.1, 0.1, 0.1])
    assert dqn.linear_schedule(0.1, 1.0, 10, 5) == pytest.approx(0.55)
    assert dqn.linear_schedule(1.0, 0.1, 0, 0) == 0.1


@each_module
@pytest.mark.parametrize("anneal_lr", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_schedules(module, monkeypatch, tmp_path, anneal_lr, fraction):
    """Epsilon and step size by the environment steps so far, whatever the number of environments."""
    acting, rates = [], []
    spy(monkeypatch, module.Agent, "act", lambda agent, *_, **__: acting.append(agent.epsilon))
    spy(monkeypatch, module, "update", lambda *inputs: rates.append(inputs[4].item()))
    given = dict(start_e=0.8, end_e=0.2, exploration_fraction=fraction, anneal_lr=anneal_lr, learning_rate=0.01)
    learn(module, tmp_path, "Tagged", train_frequency=3, **given)
    expected = [0.8 - 0.6 * min(t / (300 * fraction), 1) if fraction else 0.2 for t in range(0, 300, 3)]
    assert acting[:100] == pytest.approx(expected)
    assert rates == pytest.approx([0.01 * (1 - t / 300 if anneal_lr else 1) for t in range(30, 300, 3)], rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epsilon"] for line in lines] == pytest.approx(
        [expected[line["global_step"] // 3 - 1] for line in lines]
    )


# Checkpoints


def resumed(module, folder, monkeypatch, save_buffer):
    """Train, resume; the rows and times of the gradient steps after that, and the buffer before and after."""
    buffers, times, batches = [], [], []
    with monkeypatch.context() as patch:
        spy(patch, module.ReplayBuffer, "__init__", lambda buffer, *_: buffers.append(buffer))
        learn(module, folder, "Tagged", save_buffer=save_buffer, buffer_size=99)
        saved = torch.load(folder / "run" / "checkpoint.pt")["buffer"]
        spy(patch, module.ReplayBuffer, "add", lambda *_: times.append(len(batches)))
        spy(patch, module, LOSS[module], lambda agent, batch, *_: batches.append(batch))
        learn(module, folder, "Tagged", save_buffer=save_buffer, buffer_size=99, total_timesteps=600,
              resume=str(folder / "run"))  # fmt: skip
    return saved, buffers, times, batches


@each_module
def test_checkpoint_with_the_buffer(module, monkeypatch, tmp_path):
    """A buffer that comes back empty or shifted, or a transition from its last observation into the new episode."""
    saved, (first, second), times, batches = resumed(module, tmp_path, monkeypatch, True)
    assert saved.keys() == {"obs", "actions", "rewards", "terminated", "valid", "order", "counts"}
    assert all(torch.equal(saved[name], getattr(first, name)) for name in saved)
    assert times[1:4] == [0, 3, 6]  # it goes on learning with its first step
    true = {key(row["obs"]): row for env in envs.Tagged.instances for row in env.log}
    old = 0
    for batch in batches:
        for i, obs in enumerate(batch["obs"]):
            row = true[key(obs)]
            assert key(batch["next_obs"][i]) == key(row["next_obs"])
            assert batch["actions"][i] == row["action"]
            assert batch["terminated"][i] == row["terminated"]
            old += obs[0] < 3
    assert old > 100
    assert second.arrays["counts"][0] == 1 + 100 + 1 + 100


@each_module
def test_checkpoint_without_the_buffer(module, monkeypatch, tmp_path):
    """Learning from an empty buffer, or from few rows; the checkpoint stays small."""
    saved, _, times, batches = resumed(module, tmp_path, monkeypatch, False)
    assert saved == {}
    assert times == [0] * 11 + [3 * j for j in range(90)]  # 30 steps to fill it, as at the start
    assert all((batch["obs"][:, 0] >= 5).all() for batch in batches)  # the environments of the second run


# The gradient step


@each_module
@pytest.mark.parametrize("max_grad_norm", [0.05, 1e6])
def test_update_scales_the_global_gradient(monkeypatch, module, max_grad_norm):
    """Gradients clipped per tensor, not at all or always, or parameters that never change."""
    agent, target, args = make_agent(module, max_grad_norm=max_grad_norm)
    batch, steps = make_batch(), []
    gradient = gradients(agent, getattr(module, LOSS[module])(agent, batch, target, args)[0])
    adam, before, held = module.Adam(agent), parameters(agent), parameters(target)
    spy(monkeypatch, adam, "step", before=lambda *inputs: steps.append(inputs))
    module.update(agent, target, adam, batch, torch.tensor(0.25), args)
    ((scaled, learning_rate),) = steps
    assert gradient.norm() > 0.1
    torch.testing.assert_close(scaled, gradient * min(1, max_grad_norm / gradient.norm().item()), atol=1e-5, rtol=1e-3)
    assert learning_rate == 0.25
    assert (parameters(agent) != before).float().mean() > 0.4  # ReLU leaves some without a gradient
    assert torch.equal(parameters(target), held)


@each_module
def test_compiled_training_equals_eager_training(module, monkeypatch, tmp_path):
    """A compiled step that works on copies of the parameters, with an old target or with its first step size."""
    runs = []
    for compiled in (False, True):
        agents, folder = [], tmp_path / str(compiled)
        with monkeypatch.context() as patch:
            spy(patch, module, "evaluate", lambda agent, *_: agents.append(parameters(agent)))  # noqa: B023
            learn(module, folder, "Tagged", compile=compiled, anneal_lr=True, learning_rate=3e-3, max_grad_norm=2.0,
                  target_network_frequency=50, end_e=1.0)  # fmt: skip
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        runs.append((agents[0], [line["td_loss"] for line in lines]))
    (eager, eager_losses), (compiled, compiled_losses) = runs
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-3)
    assert compiled_losses == pytest.approx(eager_losses, rel=1e-3)
    assert eager_losses[-1] > 0


# Environments whose values are known


def probe(module, monkeypatch, folder, name, **given):
    """Train on test/<name>-v0; return the agent and the mean return of its deterministic policy."""
    plain = dict(total_timesteps=1600, num_envs=4, learning_rate=5e-3, gamma=0.9, eval_episodes=20, anneal_lr=True)
    plain |= dict(target_network_frequency=20, train_frequency=2, batch_size=32, end_e=0.3, learning_starts=64)
    agents = []
    spy(monkeypatch, module, "evaluate", before=lambda agent, *_: agents.append(agent))
    result = learn(module, folder, name, **(plain | given))
    return agents[0], result["eval_mean"]


def q(agent, *obs):
    """Q(s, .) of observations of one number."""
    with torch.no_grad():
        return agent(torch.tensor(obs, dtype=torch.float32)[:, None]).tolist()


def near(expected, tolerance=0.05):
    return pytest.approx(np.array(expected), abs=tolerance)


@each_module
def test_value_of_one_step(module, monkeypatch, tmp_path):
    """A network that learns nothing, or a bootstrap at a termination."""
    agent, _ = probe(module, monkeypatch, tmp_path, "ValueOnly", total_timesteps=800)
    assert q(agent, 1) == near([[1, 1]])


@each_module
def test_value_depends_on_the_observation(module, monkeypatch, tmp_path):
    """Rows of values and targets that do not belong together, as with (B, 1) against (B,)."""
    agent, _ = probe(module, monkeypatch, tmp_path, "ObsValue", total_timesteps=800)
    assert q(agent, -1, 1) == near([[-1, -1], [1, 1]])


@each_module
def test_value_is_discounted(module, monkeypatch, tmp_path):
    """A discount that is missing or applied twice."""
    agent, _ = probe(module, monkeypatch, tmp_path, "Discounting")
    assert q(agent, -1, 1) == near([[0.9, 0.9], [1, 1]], 0.03)


@each_module
def test_policy_finds_the_paid_action(module, monkeypatch, tmp_path):
    """Values of the wrong action learned, or the smallest one taken."""
    agent, mean = probe(module, monkeypatch, tmp_path, "ActionReward", total_timesteps=800)
    assert mean == 1
    assert q(agent, 1) == near([[-1, 1]])


@each_module
def test_policy_depends_on_the_observation(module, monkeypatch, tmp_path):
    """Actions, rewards and observations of different rows mixed up."""
    agent, mean = probe(module, monkeypatch, tmp_path, "ObsActionReward", total_timesteps=1200)
    assert mean == 1
    assert q(agent, -1, 1) == near([[1, -1], [-1, 1]], 0.1)


def check_truncation(module, monkeypatch, folder, expected=10, tolerance=0.15):
    agent, _ = probe(module, monkeypatch, folder, "Truncation", total_timesteps=6000)
    assert q(agent, 1) == near([[expected] * 2], tolerance)


@each_module
def test_truncation_is_bootstrapped(module, monkeypatch, tmp_path):
    """Truncation taken for termination (4.7), reset steps learned from (8.9): Q is 10."""
    check_truncation(module, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("else reward, terminated, valid)", "else reward, done, valid)", 1 / (1 - 0.9 * 7 / 8)),
        ("agent.act(obs), ~done", "agent.act(obs), ~done | True", 80 / 9),  # Q = 8/9 + 0.9 Q
    ],
)
def test_truncation_probe_sees(monkeypatch, tmp_path, old, new, wrong):
    """A probe that could not fail: with the bug put in, Q is not 10 but the number that the bug is known by."""
    check_truncation(planted(monkeypatch, old, new), monkeypatch, tmp_path, wrong, 0.3)


@each_module
def test_bootstrap_takes_the_true_last_observation(module, monkeypatch, tmp_path):
    """The bootstrap from s_t or from the observation after the reset."""
    agent, _ = probe(module, monkeypatch, tmp_path, "Successor", total_timesteps=6000)
    assert q(agent, -1, 1) == near([[9, 9], [10, 10]], 0.15)


@each_module
def test_both_ends_at_once_are_a_termination(module, monkeypatch, tmp_path):
    """A bootstrap wherever `truncated` is set, also if `terminated` is: Q is 1, not 10."""
    agent, _ = probe(module, monkeypatch, tmp_path, "BothEnds", total_timesteps=800)
    assert q(agent, 1) == near([[1, 1]])


@each_module
def test_image(module, monkeypatch, tmp_path):
    """Frames (C, H, W) in uint8 scaled twice or not at all, or with axes mixed up."""
    _, mean = probe(module, monkeypatch, tmp_path, "Image", total_timesteps=800, learning_rate=1e-3)
    assert mean == 1


@each_module
def test_grid(module, monkeypatch, tmp_path):
    """Boolean images (H, W, C) whose channels are taken for rows."""
    _, mean = probe(module, monkeypatch, tmp_path, "Grid", total_timesteps=2800, learning_rate=2e-3)
    assert mean > 0.85  # by chance -1/3


@each_module
def test_numbers_that_do_not_start_at_0(module, monkeypatch, tmp_path):
    """Discrete.start forgotten, in observations or in actions."""
    agent, mean = probe(module, monkeypatch, tmp_path, "Numbers")
    assert mean == 1
    with torch.no_grad():
        values = agent(torch.tensor([5, 6, 7]))
    assert values.numpy() == near(2 * np.eye(3) - 1, 0.15)


# Refusals


@each_module
def test_continuous_actions_are_refused(module, tmp_path):
    """One sentence with the space, before anything is written."""
    with pytest.raises(ValueError, match=r"^action space Box.* is not supported: it must be Discrete$"):
        learn(module, tmp_path, "TaggedBox")
    assert not (tmp_path / "run").exists()


@each_module
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(learning_starts=300), "learning_starts = 300"),
        (dict(buffer_size=5), "buffer_size = 5"),
        (dict(end_e=1.1), "end_e .*1.1"),
        (dict(exploration_fraction=-0.1), "exploration_fraction .*-0.1"),
        (dict(train_frequency=0), "train_frequency .*0"),
        (dict(target_network_frequency=0), "target_network_frequency .*0"),
    ],
    ids=str,
)
def test_impossible_values(module, tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        learn(module, tmp_path, "Tagged", **given)


@each_module
def test_the_smallest_buffer_and_batch(module, tmp_path):
    """A buffer of two steps, one of which may be a reset, is never empty."""
    for num_envs in (1, 3):
        learn(module, tmp_path / str(num_envs), "ValueOnly", num_envs=num_envs, buffer_size=2 * num_envs, batch_size=1,
              learning_starts=1, total_timesteps=60)  # fmt: skip
