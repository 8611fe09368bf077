"""The replay buffer against brute force. Its text is the same in every script, so that of DQN stands for all."""

import os

import numpy as np
import pytest
import torch
from conftest import make_args, spy
from gymnasium.spaces import Box, Discrete
from off_policy import CPU, VECTOR, bugs, each_off_policy
from runs import each, fails_with_a_bug

from algos import dqn

each_buffer = each([dqn])


def rows_of(batch) -> list[tuple]:
    """The transitions of a batch whose observations are numbers."""
    names = ("obs", "actions", "rewards", "next_obs", "terminated")
    return list(zip(*(batch[name].tolist() for name in names)))


# Which rows are drawn


@each_buffer
@pytest.mark.parametrize("num_envs", [1, 2, 3, 7])
@pytest.mark.parametrize("num_rows", [2, 3, 8, 13])
@pytest.mark.parametrize("ends", ["random", "always"])
def test_ring(module, num_envs, num_rows, ends):
    """No unwritten, over-written or reset row, none whose successor is over-written or a stranger; all others, whole.

    This holds after every step, three times around the ring; with `always`, every second row is a reset. In the middle
    the run is resumed, so that its last row has no successor.
    """
    random = np.random.default_rng(num_envs * num_rows)
    buffer = module.ReplayBuffer(Discrete(10**6), (), np.int64, num_envs, num_rows, False)
    obs = np.arange(num_envs)
    done = np.zeros(num_envs, bool)
    steps = []  # the true transitions of each step
    buffer.start(obs)
    for t in range(3 * num_rows + 7):
        if t == 2 * num_rows + 3:
            obs = obs + num_envs
            done[:] = False
            steps[-1] = []
            buffer.start(obs)
        next_obs = obs + num_envs  # no number occurs twice
        valid = ~done
        terminated = valid & (random.random(num_envs) < 0.25)
        truncated = valid & (random.random(num_envs) < 0.25)
        if ends == "always":
            truncated = valid & ~terminated
        actions = random.integers(10**6, size=num_envs)
        rewards = random.integers(99, size=num_envs)
        columns = dict(obs=obs, actions=actions, rewards=rewards, next_obs=next_obs, terminated=terminated)
        steps.append([row for row, real in zip(rows_of(columns), valid) if real])
        buffer.add(actions, rewards, terminated, valid, next_obs)

        expected = {row for step in steps[-num_rows:] for row in step}
        assert len(buffer) == min(t + 1, num_rows) * num_envs
        assert set(rows_of(buffer.sample(25 * len(buffer), CPU))) == expected, t
        obs = next_obs
        done = terminated | truncated


NEXT = "self.obs[(rows + 1) % self.num_rows, env_ids]"
ENVS = "torch.randint(self.num_envs, (2 * batch_size,))"
KEEP = "np.stack([rows[valid], env_ids[valid]], 1)"


@bugs(
    ("dqn", "self.num_rows = num_rows + 1", "self.num_rows = num_rows"),  # the seam
    ("dqn", NEXT, "self.obs[rows, env_ids]"),
    ("dqn", NEXT, "self.obs[(rows + 2) % self.num_rows, env_ids]"),
    ("dqn", NEXT, "self.obs[np.minimum(rows + 1, self.num_rows - 1), env_ids]"),
    ("dqn", NEXT, "self.obs[(rows + 1) % self.num_rows, 0]"),
    ("dqn", KEEP, "np.stack([rows, env_ids], 1)"),
    ("dqn", "self.valid[row] = valid", "self.valid[row] = True"),
    ("dqn", "valid = self.valid[rows, env_ids]", "valid = self.valid[rows, 0]"),
    ("dqn", "self.valid[row - 1] = False", "pass"),
    ("dqn", "self.rewards[row] = reward", "self.rewards[(row + 1) % self.num_rows] = reward"),
    ("dqn", "torch.randint(oldest, newest,", "torch.randint(oldest + (newest > self.num_rows), newest,"),
    ("dqn", "torch.randint(oldest, newest,", "torch.randint(oldest, max(newest - 1, 1),"),
    ("dqn", ENVS, "torch.randint(max(self.num_envs - 1, 1), (2 * batch_size,))"),
    ("dqn", ENVS, "torch.randint(self.num_envs, (1,)).repeat(2 * batch_size)"),
)
def test_ring_sees(request, name, old, new):
    fails_with_a_bug(request, test_ring, name, old, new, num_envs=3, num_rows=8, ends="random")


@each_buffer
@pytest.mark.parametrize(("num_envs", "steps"), [(1, 300), (3, 120), (3, 300)])
def test_draws_are_uniform_and_independent(module, num_envs, steps):
    """A row drawn in place of its neighbour, one environment for a whole batch, a deck that is dealt: chi-square.

    Of environment i every (i + 3)-th step is a reset. The number of draws of each row must vary as chance would have
    it: neither more nor, as without replacement, less.
    """
    buffer = module.ReplayBuffer(Discrete(10**6), (), np.int64, num_envs, 200, False)
    numbers = np.arange(num_envs)
    periods = numbers + 3
    expected = set()
    buffer.start(numbers)
    for t in range(steps):
        valid = t % periods > 0
        if t >= steps - 200:
            expected |= set((numbers + t * num_envs)[valid].tolist())
        buffer.add(0, 0, False, valid, numbers + (t + 1) * num_envs)
    draws = torch.cat([buffer.sample(100, CPU)["obs"] for _ in range(1000)])
    rows, counts = draws.unique(return_counts=True)
    assert set(rows.tolist()) == expected
    mean = len(draws) / len(rows)
    chi_square = ((counts - mean) ** 2 / mean).sum().item()
    freedom = len(rows) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


VALID = "valid = self.valid[rows, env_ids]"


@bugs(
    ("dqn", VALID, f"rows = np.where(self.valid[rows, env_ids], rows, (rows + 1) % self.num_rows); {VALID}"),
    ("dqn", "torch.randint(oldest, newest, (2 * batch_size,))", "(oldest + torch.randperm(newest - oldest))"),
)
def test_uniformity_sees(request, name, old, new):
    fails_with_a_bug(request, test_draws_are_uniform_and_independent, name, old, new, num_envs=1, steps=300)


@each_buffer
@pytest.mark.parametrize("num_envs", [1, 5])
def test_drawing_ends(module, monkeypatch, num_envs):
    """Draws that go on for ever where all environments are reset at every second step, which leaves half the rows."""
    buffer = module.ReplayBuffer(VECTOR, (), np.int64, num_envs, 2, False)
    draws = []

    def count(*_):
        draws.append(1)
        assert len(draws) < 1000

    spy(monkeypatch, torch, "randint", count)
    obs = np.zeros((num_envs, 5))
    buffer.start(obs)
    for t in range(9):
        buffer.add(0, 0, False, np.full(num_envs, t % 2 == 0), obs)
        draws.clear()
        buffer.sample(64, CPU)
        assert len(draws) < 50


@bugs(("dqn", "torch.randint(oldest, newest,", "torch.randint(newest - 1, newest,"))
def test_drawing_ends_sees(request, name, old, new):
    fails_with_a_bug(request, test_drawing_ends, name, old, new, num_envs=1)


# What is kept


@each_buffer
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
def test_observations_keep_their_type(module, space, dtype):
    """Images blown up to floats, in the buffer or on the way out; doubles stored as such."""
    buffer = module.ReplayBuffer(space, (), np.int64, 2, 5, False)
    obs = np.stack([space.sample() for _ in range(2)])
    next_obs = np.stack([space.sample() for _ in range(2)])
    buffer.start(obs)
    buffer.add(np.array([0, 1]), np.array([0.5, 1.5]), np.array([True, False]), np.array([True, True]), next_obs)
    batch = buffer.sample(50, CPU)
    assert torch.from_numpy(buffer.obs).dtype == batch["obs"].dtype == batch["next_obs"].dtype == dtype
    assert batch["obs"].shape == batch["next_obs"].shape == (50, *space.shape)
    types = {name: batch[name].dtype for name in ("actions", "rewards", "terminated")}
    assert types == dict(actions=torch.int64, rewards=torch.float32, terminated=torch.bool)
    for i, row in enumerate(batch["actions"].tolist()):
        assert batch["rewards"][i] == row + 0.5
        assert batch["terminated"][i] == (row == 0)
        assert (batch["obs"][i].numpy() == obs[row].astype(batch["obs"].numpy().dtype)).all()
        assert (batch["next_obs"][i].numpy() == next_obs[row].astype(batch["obs"].numpy().dtype)).all()


@each_buffer
def test_actions_of_a_box_are_kept(module):
    """Actions rounded to integers, or of one dimension alone."""
    buffer = module.ReplayBuffer(VECTOR, (2,), np.float32, 3, 5, False)
    actions = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    buffer.start(np.zeros((3, 5)))
    buffer.add(actions, 0, False, np.ones(3, bool), np.zeros((3, 5)))
    assert set(map(tuple, buffer.sample(50, CPU)["actions"].tolist())) == set(map(tuple, actions.tolist()))


@each_buffer
def test_checkpoint(module):
    """Rows that are not saved, or saved unasked; a loaded buffer that goes on in another row or in old memory."""

    def make(persistent):
        return module.ReplayBuffer(Discrete(10**6), (), np.int64, 2, 6, persistent)

    def add(buffer, t):
        buffer.add(np.array([t, -t]), t, False, np.array([True, t % 3 > 0]), np.array([2 * t, 2 * t + 1]))

    buffer = make(True)
    buffer.start(np.array([0, 1]))
    for t in range(1, 10):
        add(buffer, t)
    loaded = make(True)
    loaded.load_state_dict(buffer.state_dict())
    for t in range(10, 15):
        assert len(loaded) == len(buffer)
        assert set(rows_of(loaded.sample(300, CPU))) == set(rows_of(buffer.sample(300, CPU)))
        add(buffer, t)
        add(loaded, t)
    assert not make(False).state_dict()


@bugs(
    ("dqn", 'self.register_buffer("t", torch.zeros((), dtype=torch.int64), persistent)', "self.t = torch.tensor(0)"),
    (
        "dqn",
        "torch.from_numpy(array), persistent)",
        "torch.from_numpy(array if name == 'valid' else array.copy()), persistent)",
    ),
    ("dqn", "torch.from_numpy(array), persistent)", "torch.from_numpy(array), True)"),
)
def test_checkpoint_sees(request, name, old, new):
    fails_with_a_bug(request, test_checkpoint, name, old, new)


# A buffer that does not fit


@each_buffer
def test_a_buffer_that_does_not_fit_is_refused(module, monkeypatch):
    """One byte too much: each row has 5 floats, an action of 2 floats, a reward and two flags.

    Where the system does not know its memory, nothing is refused.
    """

    def make():
        module.ReplayBuffer(VECTOR, (2,), np.float32, 2, 10, False)

    memory = dict(SC_PAGE_SIZE=1, SC_PHYS_PAGES=(10 + 1) * 2 * (5 * 4 + 2 * 4 + 4 + 1 + 1))
    monkeypatch.setattr(os, "sysconf", memory.get)
    make()
    memory["SC_PHYS_PAGES"] -= 1
    with pytest.raises(module.Refusal, match=r"the replay buffer needs \d+ GB, more memory than this machine has"):
        make()
    monkeypatch.delattr(os, "sysconf")
    make()


@each_off_policy
def test_a_run_that_does_not_fit_is_refused(module, tmp_path):
    """A run that the system kills when no memory is left; refused before anything is written."""
    with pytest.raises(module.Refusal, match=r"needs \d+ GB, more memory than this machine has"):
        module.train(make_args(module, tmp_path, buffer_size=10**12))
    assert not (tmp_path / "run").exists()
