"""Transitions of n steps: rewards and bootstrap of each row against loops, and each known bug planted and seen."""

import envs
import numpy as np
import pytest
import torch
from conftest import MODULES, spy
from gymnasium.spaces import Discrete
from off_policy import CPU, bugs, key, learn, lines, resume, transitions
from runs import each, equal, fails_with_a_bug, leaves, planted
from test_off_policy_probes import check_values

from algos import dqn, n_step_dqn

each_n_step = each([module for module in MODULES if hasattr(module, "n_step_batch")])
NAMES = ("obs", "actions", "rewards", "terminated", "next_obs", "discounts")


# The rows


def slow_rows(steps, first, n, gamma) -> dict:
    """By observation: the transition of up to n steps of one environment that starts at each usable step from first on.

    Steps are dicts; None stands for a reset, or for a step of which a resumed run does not know where it led.
    """
    rows = {}
    for start in range(first, len(steps)):
        if steps[start] is None:
            continue
        total = 0.0
        discount = 1.0
        for k in range(n):
            if start + k == len(steps) or steps[start + k] is None:
                break
            last = steps[start + k]
            total += discount * last["reward"]
            discount *= gamma
        begin = steps[start]
        rows[begin["obs"]] = (begin["action"], total, last["terminated"], last["next_obs"], discount)
    return rows


@each_n_step
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 10**12])
@pytest.mark.parametrize(("num_envs", "num_rows"), [(1, 3), (3, 11), (2, 24)])
def test_rows_against_a_double_loop(module, n, num_envs, num_rows):
    """Every transition starts exactly one row, which has n steps, or goes to an end of either kind or the newest step.

    This holds after every step, three times around the ring. In the middle the run is resumed, so that its last step
    leads nowhere. Found: a step across an end, a reset, the head of the ring or a resume; a bootstrap from an
    observation before or behind the last one; a discount of n steps for a row of fewer.
    """
    random = np.random.default_rng(n * num_rows)
    buffer = module.ReplayBuffer(Discrete(10**6), (), np.int64, num_envs, num_rows, False)
    obs = np.arange(num_envs)
    done = np.zeros(num_envs, bool)
    steps = [[] for _ in range(num_envs)]
    buffer.start(obs)
    for t in range(3 * num_rows + 9):
        if t == 2 * num_rows + 4:
            obs = obs + num_envs
            done[:] = False
            for own in steps:
                own[-1] = None
            buffer.start(obs)
        next_obs = obs + num_envs  # no number occurs twice
        valid = ~done
        terminated = valid & (random.random(num_envs) < 0.15)
        truncated = valid & (random.random(num_envs) < 0.15)
        actions = random.integers(10**6, size=num_envs)
        rewards = random.normal(size=num_envs)
        buffer.add(actions, rewards, terminated, valid, next_obs)
        for e, own in enumerate(steps):
            step = dict(obs=obs[e], action=actions[e], reward=rewards[e])
            step |= dict(terminated=terminated[e], next_obs=next_obs[e])
            own.append(step if valid[e] else None)
        obs = next_obs
        done = terminated | truncated

        expected = {}
        for own in steps:
            expected |= slow_rows(own, max(0, t + 1 - num_rows), n, 0.9)
        places = buffer.draw(25 * len(buffer))
        batch = module.n_step_batch(buffer, *places, n, 0.9, CPU)
        columns = [batch[name].tolist() for name in NAMES]
        found = {row[0]: row[1:] for row in zip(*columns)}
        assert found.keys() == expected.keys()
        for start, row in expected.items():
            assert found[start] == pytest.approx(row, abs=1e-6), (t, start)


@each_n_step
def test_one_step_is_the_transition(module):
    """With n = 1, the rows that the buffer has, bit by bit and in the same types, and gamma."""
    buffer = module.ReplayBuffer(Discrete(10**6), (), np.int64, 3, 20, False)
    numbers = np.arange(3)
    buffer.start(numbers)
    for t in range(50):
        rewards = np.random.default_rng(t).normal(size=3)
        buffer.add(numbers, rewards, numbers == t % 5, numbers != t % 4, numbers + 3 * t + 3)
    places = buffer.draw(500)
    expected = buffer.gather(*places, CPU) | dict(discounts=torch.full((500,), 0.97))
    batch = module.n_step_batch(buffer, *places, 1, 0.97, CPU)
    assert list(batch) == list(expected)
    for name, column in expected.items():
        assert batch[name].dtype == column.dtype
        assert torch.equal(batch[name], column), name


WITHIN = "belongs = np.logical_and.accumulate(usable, axis=1)"
HEAD = "(k < steps_to_head[:, None])"
BOOTSTRAP = "buffer.obs[(last + 1) % buffer.num_rows, env_ids]"
DISCOUNT = "discounts=(gamma**m)"


@bugs(
    ("n_step_dqn", WITHIN, "belongs = usable"),
    ("n_step_dqn", WITHIN, "belongs = usable | True"),
    ("n_step_dqn", HEAD, "(k < n)"),
    ("n_step_dqn", HEAD, "(k <= steps_to_head[:, None])"),
    ("n_step_dqn", HEAD, "(k < np.maximum(steps_to_head[:, None] - 1, 1))"),
    ("n_step_dqn", "steps_to_head = (head - rows) % buffer.num_rows", "steps_to_head = abs(head - rows)"),
    ("n_step_dqn", "(rows[:, None] + k) % buffer.num_rows", "np.minimum(rows[:, None] + k, buffer.num_rows - 1)"),
    ("n_step_dqn", "(window_rows, env_ids[:, None])", "(window_rows, 0)"),
    ("n_step_dqn", BOOTSTRAP, "buffer.obs[last, env_ids]"),
    ("n_step_dqn", BOOTSTRAP, "buffer.obs[(rows + n) % buffer.num_rows, env_ids]"),
    ("n_step_dqn", BOOTSTRAP, "buffer.obs[(rows + 1) % buffer.num_rows, env_ids]"),
    ("n_step_dqn", "terminated=buffer.terminated[last, env_ids]", "terminated=buffer.terminated[rows, env_ids]"),
    ("n_step_dqn", "terminated=buffer.terminated[last, env_ids]", "terminated=m < n"),
    ("n_step_dqn", DISCOUNT, "discounts=(gamma ** (0 * m + n))"),
    ("n_step_dqn", DISCOUNT, "discounts=(gamma ** (0 * m + 1))"),
    ("n_step_dqn", "gamma**k *", "gamma **(k + 1) *"),
    ("n_step_dqn", "gamma**k *", ""),
)
def test_rows_see(request, name, old, new):
    fails_with_a_bug(request, test_rows_against_a_double_loop, name, old, new, n=3, num_envs=3, num_rows=11)


@bugs(("n_step_dqn", "self.valid[row - 1] = False", "pass"))
def test_a_resume_sees(request, name, old, new):
    fails_with_a_bug(request, test_rows_against_a_double_loop, name, old, new, n=3, num_envs=2, num_rows=24)


# Through train()


def check_chain(batch, true, newest, n, gamma):
    """Each row of a batch is the chain of true transitions of Tagged that starts at its observation."""
    for i, obs in enumerate(batch["obs"].numpy()):
        total = 0.0
        discount = 1.0
        here = key(obs)
        for _ in range(n):
            if here not in true or true[here]["t"] > newest(here[0]):
                break
            last = true[here]
            total += discount * last["reward"]
            discount *= gamma
            here = key(last["next_obs"])
        assert batch["actions"][i] == true[key(obs)]["action"]
        assert batch["rewards"][i].item() == pytest.approx(total, rel=1e-4, abs=1e-4)
        assert batch["discounts"][i].item() == pytest.approx(discount)
        assert batch["terminated"][i] == last["terminated"]
        assert batch["next_obs"][i].tolist() == last["next_obs"].tolist()


@each_n_step
@pytest.mark.parametrize("n", [1, 3, 5])
def test_learned_rows_are_chains_of_transitions(module, monkeypatch, tmp_path, n):
    """What the loss gets in a run whose buffer is overwritten again and again, and in the run that goes on from it."""
    seen = []  # of each batch: the batch, and the last step that was taken before

    def remember(*inputs):
        seen.append((inputs[2], envs.Tagged.instances[-1].t - 1))

    spy(monkeypatch, module, "critic_loss", remember)
    given = dict(n_steps=n, gamma=0.9, buffer_size=99, train_frequency=2, save_buffer=True)
    learn(module, tmp_path, **given)
    assert len(seen) == 135
    true = transitions()
    for batch, now in seen:
        check_chain(batch, true, lambda _, now=now: now, n, 0.9)
    discounts = torch.cat([batch["discounts"] for batch, _ in seen]).unique()
    assert discounts.tolist() == pytest.approx([0.9**m for m in range(n, 0, -1)])

    seen.clear()
    envs.Tagged.instances = envs.Tagged.instances[:3]  # the evaluation's have gone
    resume(module, tmp_path, **given)
    assert len(seen) == 150
    assert any((batch["obs"][:, 0] < 3).any() for batch, _ in seen)
    true = transitions()
    for batch, now in seen:  # where the step 99 of the first run led, the resumed run does not know
        check_chain(batch, true, lambda index, now=now: 98 if index < 3 else now, n, 0.9)


@bugs(
    ("n_step_dqn", "args.n_steps, args.gamma, device)", "1, args.gamma, device)"),
    ("n_step_dqn", "args.n_steps, args.gamma, device)", "args.n_steps + 1, args.gamma, device)"),
    ("n_step_dqn", "args.n_steps, args.gamma, device)", "args.n_steps, 1.0, device)"),
    ("n_step_dqn", "self.valid[row - 1] = False", "pass"),
    ("n_step_dqn", HEAD, "(k < n)"),
    ("n_step_dqn", WITHIN, "belongs = usable"),
)
def test_learned_rows_see(request, name, old, new):
    fails_with_a_bug(request, test_learned_rows_are_chains_of_transitions, name, old, new, n=3)


@each([n_step_dqn])
@pytest.mark.parametrize("env", ["Tagged", "Grid"])
def test_one_step_is_dqn(module, tmp_path, env):
    """With n = 1, a run of DQN: the same bits in networks, optimizer and log."""
    found = []
    for script in (dqn, module):
        folder = tmp_path / script.__name__
        learn(script, folder, env, n_steps=1, gamma=0.97, log_every=30)
        saved = torch.load(folder / "run" / "checkpoint.pt")
        log = [{name: x for name, x in line.items() if name not in ("wall_time", "SPS")} for line in lines(folder)]
        found.append((leaves({name: saved[name] for name in ("agent", "target", "optimizer")}), log))
    assert equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@bugs(
    ("n_step_dqn", "discounts=(gamma**m).astype(np.float32)", "discounts=(gamma**m)"),
    ("n_step_dqn", "buffer.draw(args.batch_size)", "buffer.draw(args.batch_size + 1)"),
    ("n_step_dqn", 'batch["discounts"])', "1.0)"),
)
def test_one_step_sees(request, name, old, new):
    fails_with_a_bug(request, test_one_step_is_dqn, name, old, new, env="Tagged")


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("discounts=", "discounts=", 10),
        (DISCOUNT, "discounts=(gamma ** (0 * m + n))", 2.395 / (1 - 0.729)),
        ("buffer.add(action, reward, terminated,", "buffer.add(action, reward, done,", 2.395 / (1 - 5 / 8 * 0.729)),
    ],
    ids=["right", "gamma^n", "truncation"],
)
def test_truncation_probe(monkeypatch, tmp_path, old, new, value):
    """Reward 1 for ever, cut every 8 steps: the value is 10, or with a bug the number that the bug is known by.

    Of 8 rows, 6 have 3 rewards (2.71), one has 2 (1.9) and one has 1: in the mean 2.395.
    """
    module = planted(n_step_dqn, old, new, tmp_path / "planted")
    check_values(module, monkeypatch, tmp_path, "Truncation", {1: value}, 0.3, 1600)
