"""Prioritized replay: tree, draws, priorities and weights against brute force, and each known bug planted and seen."""

import numpy as np
import pytest
import torch
from conftest import MODULES, spy
from gymnasium.spaces import Discrete
from off_policy import bugs, gradient, learn, make_agents, make_batch, resume
from runs import each, fails_with_a_bug, planted
from test_q_learning import test_loss_and_gradient_against_a_loop as loss_against_a_loop

from algos import double_dqn, prioritized_dqn

each_prioritized = each([module for module in MODULES if hasattr(module, "Priorities")])
ours = each([prioritized_dqn])


# The tree


def check_tree(tree, numbers):
    """Leaves, sums and smallest numbers are those of a list, and each mass falls on the number that a list says."""
    assert (tree.sums[-1].flatten()[: len(numbers)] == numbers).all()
    assert tree.sums[0].sum() == sum(numbers)
    assert tree.minima[0].min() == min((x for x in numbers if x), default=np.inf)
    for above, below in zip(tree.sums, tree.sums[1:]):
        assert (above.flatten()[: len(below)] == below.sum(-1)).all()
    masses = []
    expected = []
    end = 0
    for leaf, number in enumerate(numbers):
        if number:
            masses += [end, end + 0.5, end + number - 0.5, end + number * (1 - 1e-9)]
            expected += [leaf] * 4
        end += number
    assert (tree.find(np.array(masses)) == expected).all()


@each_prioritized
@pytest.mark.parametrize("num_leaves", [2, 15, 16, 17, 300, 5000])
def test_tree_against_a_list(module, num_leaves):
    """Whole numbers, whose sums are exact. In an update a leaf may occur several times; then the last number counts."""
    random = np.random.default_rng(num_leaves)
    tree = module.SumTree(num_leaves)
    numbers = [0.0] * num_leaves
    for _ in range(12):
        leaves = random.integers(num_leaves, size=num_leaves // 2 + 1)
        values = random.integers(1, 100, size=len(leaves)) * (random.random(len(leaves)) < 0.7).astype(float)
        for leaf, value in zip(leaves.tolist(), values.tolist()):
            numbers[leaf] = value
        tree.update(leaves, values)
        check_tree(tree, numbers)


@each_prioritized
def test_sums_are_in_double_precision(module):
    """Sums in which a small priority is lost beside large ones."""
    numbers = 1.0 + 10**9 * (np.arange(300) % 2)
    tree = module.SumTree(300)
    tree.update(np.arange(300), numbers)
    assert tree.sums[0].sum() == numbers.sum()


@bugs(("prioritized_dqn", "np.zeros((num_nodes, 16))", "np.zeros((num_nodes, 16), np.float32)"))
def test_precision_sees(request, name, old, new):
    fails_with_a_bug(request, test_sums_are_in_double_precision, name, old, new)


@each_prioritized
def test_a_tree_depends_on_its_leaves_alone(module):
    """Sums that keep the rounding of earlier updates: a run that is resumed, with a new tree, would draw otherwise."""
    random = np.random.default_rng(0)
    tree = module.SumTree(700)
    numbers = random.random(700)
    tree.update(np.arange(700), numbers)
    for _ in range(100):
        leaves = random.integers(700, size=9)
        numbers[leaves] = 10 ** random.uniform(-9, 9, 9)
        tree.update(leaves, numbers[leaves])
    new = module.SumTree(700)
    new.update(np.arange(700), numbers)
    assert all((old == fresh).all() for old, fresh in zip(tree.sums + tree.minima, new.sums + new.minima))


@each_prioritized
def test_a_leaf_of_zero_is_never_found(module):
    """Sums are rounded, so that a mass may lie behind the end of what it falls on: at the total, and at each border."""
    random = np.random.default_rng(0)
    for num_leaves in (5, 100, 1000):
        for _ in range(20):
            numbers = 10 ** random.uniform(-9, 9, num_leaves) * (random.random(num_leaves) < 0.3)
            numbers[random.integers(num_leaves - 3)] = 0.1
            numbers[-3:] = 0
            tree = module.SumTree(num_leaves)
            tree.update(np.arange(num_leaves), numbers)
            total = tree.sums[0].sum()
            ends = numbers.cumsum()
            masses = np.concatenate(
                [[0, total, total * (1 + 1e-15)], ends, np.nextafter(ends, 0), np.nextafter(ends, np.inf)]
            )
            assert (numbers[tree.find(masses)] > 0).all()


@bugs(
    ("prioritized_dqn", "np.put(sums, nodes, values)", "np.put(sums, nodes[::-1], values[::-1])"),
    ("prioritized_dqn", "np.put(sums, nodes, values)", "np.add.at(sums.reshape(-1), nodes, values)"),
    ("prioritized_dqn", "values = sums[nodes].sum(-1)", "pass"),
    ("prioritized_dqn", "np.where(values > 0, values, np.inf)", "values"),
    ("prioritized_dqn", "smallest = minima[nodes].min(-1)", "smallest = minima[nodes].max(-1)"),
    ("prioritized_dqn", "passed = ends <= masses[:, None]", "passed = ends < masses[:, None]"),
    ("prioritized_dqn", "masses = masses - np.where(passed, ends, 0).max(-1)", "masses = masses - ends[:, 0]"),
    ("prioritized_dqn", "nodes = 16 * nodes + passed.sum(-1)", "nodes = 15 * nodes + passed.sum(-1)"),
)
def test_tree_sees(request, name, old, new):
    fails_with_a_bug(request, test_tree_against_a_list, name, old, new, num_leaves=300)


@pytest.mark.parametrize("new", ["pass", "masses = np.minimum(masses, ends[:, -1])"])
def test_a_leaf_of_zero_sees(tmp_path, new):
    old = "masses = np.minimum(masses, np.nextafter(ends[:, -1], 0))"
    broken = planted(prioritized_dqn, old, new, tmp_path / "planted")
    with pytest.raises((AssertionError, IndexError)):
        test_a_leaf_of_zero_is_never_found(broken)


# What is drawn


def filled(module, steps, num_envs=3, num_rows=20, **given):
    """Buffer and priorities after so many steps, of which in each environment every fourth is a reset."""
    buffer = module.ReplayBuffer(Discrete(10**6), (), np.int64, num_envs, num_rows, False)
    priorities = module.Priorities(buffer, module.Args(**given))
    obs = np.arange(num_envs)
    buffer.start(obs)
    priorities.start(buffer)
    for t in range(steps):
        buffer.add(0, 0, False, (t + obs) % 4 > 0, obs + (t + 1) * num_envs)
        priorities.add(buffer)
    return buffer, priorities


@each_prioritized
@pytest.mark.parametrize("k", [1, 7])
def test_draws_are_in_proportion_and_stratified(module, k):
    """Up to each place as many draws of a batch as k times its share of the sum, give or take less than one.

    In many batches, the draws of each part of the sum are as often on each place as its share of the part says:
    chi-square. Draws of different parts do not know of each other.
    """
    torch.manual_seed(3)
    _, priorities = filled(module, 12, priority_exponent=1, priority_eps=1e-6)
    places = priorities.leaves.nonzero()[0]
    priorities.update(places, torch.rand(len(places)) + 0.1)
    ends = k * priorities.leaves.cumsum() / priorities.leaves.sum()
    starts = np.concatenate([[0], ends[:-1]])
    batches = 4000
    draws = np.stack([priorities.draw(k) for _ in range(batches)])  # (batches, k)
    assert draws.shape == (batches, k)
    numbers = np.arange(len(ends))
    up_to = (draws[:, :, None] <= numbers).sum(1)
    assert (abs(up_to - ends) < 1 + 1e-9).all()

    chi_square = 0
    freedom = -k
    for part in range(k):
        overlap = np.minimum(ends, part + 1) - np.maximum(starts, part)
        expected = batches * overlap.clip(0)
        counts = np.bincount(draws[:, part], minlength=len(ends))
        assert (counts[expected == 0] == 0).all()
        large = expected > 5
        chi_square += ((counts - expected)[large] ** 2 / expected[large]).sum()
        freedom += large.sum()
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
    if k > 1:
        assert abs(np.corrcoef(draws.T) - np.eye(k)).max() < 5 / batches**0.5


RAND = "torch.rand(batch_size, dtype=torch.float64).numpy()"
PARTS = f"np.arange(batch_size) + {RAND}"
MASSES = "parts / batch_size * self.tree.sums[0].sum()"


@bugs(
    ("prioritized_dqn", PARTS, f"batch_size * {RAND}"),
    ("prioritized_dqn", PARTS, "np.arange(batch_size) + torch.rand(1).item()"),
    ("prioritized_dqn", PARTS, "np.arange(batch_size) + 0.5"),
    ("prioritized_dqn", MASSES, "parts / (batch_size + 1) * self.tree.sums[0].sum()"),
    ("prioritized_dqn", MASSES, "parts / batch_size * self.leaves[:-1].sum() * 0.95"),
    ("prioritized_dqn", "return self.tree.find(", "return self.leaves.nonzero()[0][0] + 0 * self.tree.find("),
)
def test_draws_see(request, name, old, new):
    fails_with_a_bug(request, test_draws_are_in_proportion_and_stratified, name, old, new, k=7)


# Priorities and weights


def check_priorities(buffer, priorities, held):
    """Places with a priority are those of the transitions held, which have theirs; weights are those of the formula."""
    places = priorities.leaves.nonzero()[0]
    obs = buffer.obs[places // buffer.num_envs, places % buffer.num_envs].tolist()
    assert dict(zip(obs, priorities.leaves[places].tolist())) == pytest.approx(held)
    assert len(obs) == len(held)

    total = sum(held.values())
    weights = {o: (len(held) * p / total) ** -0.6 for o, p in held.items()}
    largest = max(weights.values())
    drawn = priorities.draw(4)
    obs = buffer.obs[drawn // buffer.num_envs, drawn % buffer.num_envs].tolist()
    expected = [weights[o] / largest for o in obs]
    assert priorities.weights(drawn, 0.6).tolist() == pytest.approx(expected)


@each_prioritized
@pytest.mark.parametrize(("num_envs", "num_rows"), [(1, 3), (1, 16), (3, 11)])
def test_priorities_against_brute_force(module, num_envs, num_rows):
    """The newest transition has the largest priority so far, one that was replayed that of its error, and others none.

    Others are resets, rows not yet written, the head of the ring, and the last step before a resume. This holds after
    every step, three times around the ring, in the middle of which the run is resumed from a checkpoint.
    """
    random = np.random.default_rng(num_rows)
    buffer = module.ReplayBuffer(Discrete(10**6), (), np.int64, num_envs, num_rows, True)
    args = module.Args(priority_exponent=0.7, priority_eps=0.3, save_buffer=True)
    priorities = module.Priorities(buffer, args)
    obs = np.arange(num_envs)
    done = np.zeros(num_envs, bool)
    steps = []  # of each step: p^alpha by observation
    largest = 1.0
    buffer.start(obs)
    priorities.start(buffer)
    for t in range(3 * num_rows + 9):
        if t == 2 * num_rows + 4:
            saved = priorities.state_dict()
            priorities = module.Priorities(buffer, args)
            priorities.load_state_dict(saved)
            obs = obs + num_envs
            done[:] = False
            steps[-1] = {}
            buffer.start(obs)
            priorities.start(buffer)
        next_obs = obs + num_envs  # no number occurs twice
        valid = ~done
        buffer.add(0, 0, False, valid, next_obs)
        priorities.add(buffer)
        steps.append({o: largest for o, real in zip(obs.tolist(), valid) if real})
        obs = next_obs
        done = valid & (random.random(num_envs) < 0.3)

        check_priorities(buffer, priorities, {o: p for step in steps[-num_rows:] for o, p in step.items()})
        places = priorities.draw(5)
        drawn = buffer.obs[places // num_envs, places % num_envs]
        errors = np.float32(2 * abs(np.sin(drawn + t)) * (drawn % 3 > 0))
        priorities.update(places, torch.from_numpy(errors))
        for o, error in zip(drawn.tolist(), errors.tolist()):
            step = next(step for step in steps if o in step)
            step[o] = (error + 0.3) ** 0.7
            largest = max(largest, step[o])
        check_priorities(buffer, priorities, {o: p for step in steps[-num_rows:] for o, p in step.items()})


NEWEST = "powers[0] = self.largest.item() * buffer.valid[newest]"
POWER = "powers = p**self.alpha"
WEIGHTS = "(self.leaves[places] / self.tree.minima[0].min()) ** -beta"
LARGEST = "self.largest.fill_(max(self.largest.item(), powers.max()))"


@bugs(
    ("prioritized_dqn", NEWEST, "powers[0] = self.largest.item()"),
    ("prioritized_dqn", NEWEST, "powers[0] = 1 * buffer.valid[newest]"),
    ("prioritized_dqn", NEWEST, "powers[0] = self.largest.item() ** self.alpha * buffer.valid[newest]"),
    ("prioritized_dqn", "np.array([[newest], [head]])", "np.array([[newest], [newest - 1]])"),
    ("prioritized_dqn", "rows * buffer.num_envs + np", "rows + buffer.num_rows * np"),
    ("prioritized_dqn", LARGEST, "self.largest.fill_(powers.max())"),
    ("prioritized_dqn", LARGEST, "pass"),
    ("prioritized_dqn", POWER, "powers = p**self.alpha**2"),
    ("prioritized_dqn", POWER, "powers = p"),
    ("prioritized_dqn", " + self.eps\n", "\n        p = p.clip(1e-9)\n"),
    ("prioritized_dqn", WEIGHTS, "(self.leaves[places] / self.leaves[places].min()) ** -beta"),
    ("prioritized_dqn", WEIGHTS, "(self.leaves[places] / self.tree.minima[0].min()) ** (-beta * self.alpha)"),
    ("prioritized_dqn", WEIGHTS, "(self.leaves[places] / self.leaves.max()) ** -beta"),
    ("prioritized_dqn", WEIGHTS, "(self.leaves[places] / self.leaves.mean()) ** -beta"),
    ("prioritized_dqn", WEIGHTS, "(self.leaves[places] / self.tree.minima[0].min()) ** (beta - 1)"),
    ("prioritized_dqn", "self.tree.update(np.arange(len(self.leaves)), self.leaves)", "pass"),
    ("prioritized_dqn", "        self.add(buffer)  # takes", "        # takes"),
    ("prioritized_dqn", "torch.from_numpy(self.leaves),", "torch.from_numpy(self.leaves.copy()),"),
    ("prioritized_dqn", "torch.ones((), dtype=torch.float64), args.save_buffer", "torch.ones(()), False"),
)
def test_priorities_see(request, name, old, new):
    fails_with_a_bug(request, test_priorities_against_brute_force, name, old, new, num_envs=3, num_rows=11)


# The loss


@ours
def test_uniform_replay_is_double_dqn(module):
    """With alpha = 0 all are drawn alike, whatever their errors, and with beta = 0 the loss is that of Double DQN."""
    _, priorities = filled(module, 30, priority_exponent=0)
    places = priorities.leaves.nonzero()[0]
    priorities.update(places, torch.rand(len(places)) * 9)
    assert (priorities.leaves[places] == 1).all()
    agent, target, args = make_agents(module, gamma=0.8)
    batch = make_batch(module) | dict(weights=torch.from_numpy(priorities.weights(priorities.draw(64), 0.0)))
    loss, _ = module.critic_loss(agent, target, batch, args)
    expected, _ = double_dqn.critic_loss(agent, target, batch, args)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient(loss, agent.parameters()), gradient(expected, agent.parameters()))


LOSS = '(batch["weights"] * delta**2).mean()'


@bugs(
    ("prioritized_dqn", LOSS, "(delta**2).mean()"),
    ("prioritized_dqn", LOSS, '((batch["weights"] * delta) ** 2).mean()'),
    ("prioritized_dqn", LOSS, '(batch["weights"] * delta**2).sum() / batch["weights"].sum()'),
    ("prioritized_dqn", LOSS, '(batch["weights"] * delta**2).sum()'),
    ("prioritized_dqn", LOSS, '(batch["weights"][:, None] * delta**2).mean()'),
    ("prioritized_dqn", 'next_actions = agent(batch["next_obs"])', 'next_actions = target(batch["next_obs"])'),
)
def test_loss_sees(request, name, old, new):
    fails_with_a_bug(request, loss_against_a_loop, name, old, new)


# Through train()


@each_prioritized
def test_each_batch_updates_its_own_priorities(module, monkeypatch, tmp_path):
    """Errors with a sign, of other rows, of a uniform draw, with weights, or not used; beta that does not rise to 1."""
    buffers = []
    losses = []  # the batch and the errors of each gradient step
    updated = []
    betas = []

    def remember(output, agent, target, batch, *_):
        losses.append((batch, output[1]["td_error"]))

    def check(priorities, places, errors):
        batch, expected = losses[-1]
        rows, columns = places // 3, places % 3
        assert torch.equal(errors, expected)
        assert (errors >= 0).all()
        assert (batch["obs"].numpy() == buffers[0].obs[rows, columns]).all()
        assert (batch["next_obs"].numpy() == buffers[0].obs[(rows + 1) % buffers[0].num_rows, columns]).all()
        weights = (priorities.leaves[places] / priorities.leaves[priorities.leaves > 0].min()) ** -betas[-1]
        assert batch["weights"].numpy() == pytest.approx(weights, rel=1e-5)

    def check_after(_, priorities, places, errors):
        expected = (errors.numpy().astype(float) + 0.01) ** 0.6
        assert priorities.leaves[places] == pytest.approx(expected)
        updated.append(places)

    spy(monkeypatch, module.ReplayBuffer, "__init__", lambda buffer, *_: buffers.append(buffer))
    spy(monkeypatch, module, "critic_loss", after=remember)
    spy(monkeypatch, module.Priorities, "weights", lambda _, places, beta: betas.append(beta))
    spy(monkeypatch, module.Priorities, "update", check, check_after)
    given = dict(priority_eps=0.01, priority_exponent=0.6, importance_exponent=0.4, n_steps=1)
    learn(module, tmp_path, buffer_size=99, **given)
    assert len(losses) == 270
    assert len(updated) == 270
    assert betas == pytest.approx([0.4 + 0.6 * 3 * j / 300 for j in range(10, 100) for _ in range(3)])


@ours
def test_the_error_is_that_of_the_loss(module):
    """td_error is |y - Q(s, a)| of each row: with weights of 1, the mean of its squares is the loss."""
    agent, target, args = make_agents(module)
    batch = make_batch(module) | dict(weights=torch.ones(64))
    loss, metrics = module.critic_loss(agent, target, batch, args)
    td_error = metrics["td_error"]
    assert td_error.shape == (64,)
    assert (td_error >= 0).all()
    assert td_error.square().mean().item() == pytest.approx(loss.item(), rel=1e-5)
    for i in range(5):
        row = {name: column[i : i + 1] for name, column in batch.items()}
        assert module.critic_loss(agent, target, row, args)[0].sqrt().item() == pytest.approx(
            td_error[i].item(), rel=1e-4
        )


DRAW = "places = priorities.draw(args.batch_size)"
UPDATE = 'priorities.update(places, metrics["td_error"])'


@bugs(
    ("prioritized_dqn", UPDATE, "pass"),
    ("prioritized_dqn", UPDATE, 'priorities.update(places, metrics["td_error"].flip(0))'),
    ("prioritized_dqn", UPDATE, 'priorities.update(places, metrics["td_error"] * batch["weights"])'),
    ("prioritized_dqn", UPDATE, f'{DRAW}; priorities.update(places, metrics["td_error"])'),
    ("prioritized_dqn", "buffer.gather(rows, env_ids, device)", "buffer.sample(args.batch_size, device)"),
    (
        "prioritized_dqn",
        "linear_schedule(args.importance_exponent, end=1, duration=1, t=progress)",
        "args.importance_exponent",
    ),
    (
        "prioritized_dqn",
        "linear_schedule(args.importance_exponent, end=1, duration=1,",
        "linear_schedule(args.importance_exponent, end=1, duration=0.5,",
    ),
    (
        "prioritized_dqn",
        "linear_schedule(args.importance_exponent, end=1, duration=1,",
        "linear_schedule(1, end=args.importance_exponent, duration=1,",
    ),
    ("prioritized_dqn", "delta.detach().abs()", "delta.detach()"),
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_updates_see(request, name, old, new):
    fails_with_a_bug(request, test_each_batch_updates_its_own_priorities, name, old, new)


@each_prioritized
def test_beta_goes_on_in_a_resumed_run(module, monkeypatch, tmp_path):
    """A beta that begins anew: it rises over the whole run, of which the resumed part is the second half."""
    learn(module, tmp_path, importance_exponent=0.4)
    betas = []
    spy(monkeypatch, module.Priorities, "weights", lambda _, places, beta: betas.append(beta))
    resume(module, tmp_path, importance_exponent=0.4)
    assert betas == pytest.approx([0.4 + 0.6 * 3 * j / 600 for j in range(110, 200) for _ in range(3)])


BETA = "end=1, duration=1, t=progress)"


@bugs(
    ("prioritized_dqn", BETA, BETA.replace("progress", "progress - (learn_after - 30) / args.total_timesteps")),
    ("rainbow", BETA, BETA.replace("progress", "progress - (learn_after - 30) / args.total_timesteps")),
)
def test_beta_sees(request, name, old, new):
    fails_with_a_bug(request, test_beta_goes_on_in_a_resumed_run, name, old, new)


@each_prioritized
@pytest.mark.parametrize("save_buffer", [False, True])
def test_resume(module, monkeypatch, tmp_path, save_buffer):
    """With its buffer a run goes on with its priorities, but for the last step, which leads nowhere; else it has none.

    Found: priorities that begin anew, beside old sums or without them; a checkpoint that holds them unasked.
    """
    given = dict(save_buffer=save_buffer, buffer_size=99, priority_eps=0.5)
    learn(module, tmp_path, **given)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt")["priorities"]
    assert bool(saved) == save_buffer
    started = []

    def check(_, priorities, buffer):
        expected = saved["_leaves"].numpy().copy() if save_buffer else 0 * priorities.leaves
        if save_buffer:
            last = (int(buffer.t) - 1) % buffer.num_rows
            assert expected[3 * last : 3 * last + 3].any()
            expected[3 * last : 3 * last + 3] = 0
            assert priorities.largest.item() == saved["largest"].item() > 1
        assert (priorities.leaves == expected).all()
        sums = priorities.leaves.reshape(-1, 16).sum(-1)
        assert priorities.tree.sums[-2].flatten()[: len(sums)].tolist() == sums.tolist()
        started.append(priorities)

    spy(monkeypatch, module.Priorities, "start", after=check)
    resume(module, tmp_path, **given)
    assert len(started) == 1


@bugs(
    ("prioritized_dqn", "buffer=buffer, priorities=priorities", "buffer=buffer"),
    ("prioritized_dqn", "    priorities.start(buffer)\n", ""),
    ("prioritized_dqn", "torch.from_numpy(self.leaves), args.save_buffer", "torch.from_numpy(self.leaves), False"),
)
def test_resume_sees(request, name, old, new):
    fails_with_a_bug(request, resume_or_fail, name, old, new)


def resume_or_fail(module, monkeypatch, tmp_path):
    """The test above, in which a part that is not in the checkpoint is a failure."""
    try:
        test_resume(module, monkeypatch, tmp_path, save_buffer=True)
    except KeyError as error:
        raise AssertionError from error
