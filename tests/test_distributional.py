"""C51 and QR-DQN: projection and quantile loss against slow references, and each known bug planted and seen."""

import copy
import math
from statistics import NormalDist

import envs
import gymnasium as gym
import pytest
import torch
from conftest import spy
from off_policy import answer_always, bugs, gradient, learn, make_agents, make_batch, resume
from runs import each, fails_with_a_bug

from algos import c51, qr_dqn, rainbow

SUPPORTS = [(51, -10, 10), (51, -10, 200), (51, -5, 100), (31, 0, 70), (2, -1, 3)]  # atoms, v_min, v_max
each_support = pytest.mark.parametrize(("num_atoms", "v_min", "v_max"), SUPPORTS)
each_c51 = each([c51])
each_qr = each([qr_dqn])
each_distributional = each([c51, qr_dqn])


def has_atoms(module) -> bool:
    """Whether the script, which may be a copy with a bug, is C51."""
    return hasattr(module, "project")


def own_flags(module, **given) -> dict:
    """Those that the script has."""
    return {name: value for name, value in given.items() if hasattr(module.Args, name)}


class Coin(envs.ValueOnly):
    """One step, paid 4 with probability 1/4 and -2 else, if the action is 1: its mean return is that of action 0."""

    def step(self, action):
        reward = 4.0 if self.np_random.random() < 0.25 else -2.0
        return self.observe(), reward if action == 1 else -0.5, True, False, {}


gym.register("test/Coin-v0", Coin, disable_env_checker=True, order_enforce=False)


# The projection of C51


def slow_projection(probs, reward, end, v_min, v_max, gamma) -> list[float]:
    """The paper's algorithm 1 for one row, in double precision; a value on an atom is all that atom's."""
    num_atoms = len(probs)
    delta_z = (v_max - v_min) / (num_atoms - 1)
    m = [0.0] * num_atoms
    for j, p in enumerate(probs):
        z = v_min + j * delta_z
        value = min(max(reward + (0 if end else gamma * z), v_min), v_max)
        b = min((value - v_min) / delta_z, num_atoms - 1)
        low = math.floor(b)
        m[low] += p * (1 - (b - low))
        if b > low:
            m[low + 1] += p * (b - low)
    return m


def rows_for(num_atoms, v_min, v_max, rows):
    """Inputs of the projection: rewards inside, beyond both ends and of whole atoms; some rows end."""
    support = torch.linspace(v_min, v_max, num_atoms)
    probs = (3 * torch.randn(rows, num_atoms)).softmax(-1)
    rewards = (v_max - v_min) * torch.randn(rows)
    rewards[::3] *= 0.05
    rewards[::5] = (v_max - v_min) / (num_atoms - 1) * torch.randint(-3, 4, (len(rewards[::5]),))
    rewards[1::5] = 0
    return probs, rewards, torch.rand(rows) < 0.3, support


@each_c51
@each_support
@pytest.mark.parametrize("per_row", [False, True])
def test_projection_against_algorithm_1(module, num_atoms, v_min, v_max, per_row):
    """Shares on the wrong atom, rows mixed up, a gamma of each row that is taken along the atoms."""
    rows = num_atoms  # so that nothing but the numbers tells the axes apart
    probs, rewards, terminated, support = rows_for(num_atoms, v_min, v_max, rows)
    gammas = torch.rand(rows) if per_row else torch.full((rows,), 0.97)
    gammas[: rows // 2 if per_row else 0] = 1
    m = module.project(probs, rewards, terminated, support, gammas if per_row else 0.97)
    assert m.shape == (rows, num_atoms)
    for i in range(rows):
        row = probs[i].tolist(), rewards[i].item(), terminated[i].item(), v_min, v_max, gammas[i].item()
        assert m[i].tolist() == pytest.approx(slow_projection(*row), abs=1e-5)
        one = slice(i, i + 1)
        gamma = gammas[one] if per_row else 0.97
        alone = module.project(probs[one], rewards[one], terminated[one], support, gamma)
        torch.testing.assert_close(alone[0], m[i], atol=1e-7, rtol=1e-6)


@each_c51
@each_support
@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.5])
def test_projection_keeps_mass_and_mean(module, num_atoms, v_min, v_max, gamma):
    """Mass lost on an atom, at an end, or by rounding in float32; a mean moved inside the support."""
    rows = 3000
    _, rewards, terminated, support = rows_for(num_atoms, v_min, v_max, rows)
    atoms = torch.randint(num_atoms, (rows,))
    atoms[:300] = num_atoms - 1
    atoms[300:600] = 0
    probs = torch.eye(num_atoms)[atoms]  # all mass on one atom, where no errors cancel
    m = module.project(probs, rewards, terminated, support, gamma).double()
    assert m.min() >= 0
    assert (m.sum(-1) - 1).abs().max() <= 1e-6
    y = (rewards + gamma * ~terminated * support[atoms]).double().clamp(v_min, v_max)
    torch.testing.assert_close(m @ support.double(), y, atol=1e-6 * (v_max - v_min), rtol=0)
    assert ((m > 0).sum(-1) <= 2).all()  # the two atoms beside the value
    assert ((m * (support - y[:, None]).abs()).amax(-1) <= (v_max - v_min) / (num_atoms - 1)).all()


@each_c51
def test_projection_by_hand(module):
    """A bootstrap at the end, values beyond an end that vanish, or that fold back."""
    support = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.5]])
    cases = {
        (0.25, True): [0, 0, 0.75, 0.25, 0],
        (1.0, True): [0, 0, 0, 1, 0],
        (2.0, True): [0, 0, 0, 0, 1],
        (9.0, True): [0, 0, 0, 0, 1],
        (-9.0, True): [1, 0, 0, 0, 0],
        (0.0, False): [0, 0.25, 0.25, 0.5, 0],  # -0.5 and 1
        (1.5, False): [0, 0, 0, 0.5, 0.5],  # 1 and 2.5
        (-2.25, False): [0.5 + 0.125, 0.375, 0, 0, 0],  # -2.75 and -1.25
    }
    for (reward, end), expected in cases.items():
        m = module.project(probs, torch.tensor([reward]), torch.tensor([end]), support, 0.5)
        assert m[0].tolist() == pytest.approx(expected, abs=1e-6), (reward, end)


Y = "y = td_target(rewards, terminated, support[:, None], gamma).T"
CLAMP = ".clamp(0, num_atoms - 1)"
SHARES = "shares = (1 - (b[:, None, :] - i[:, None]).abs()).clamp(0, 1)"
FLOOR_AND_CEIL = """low = b.floor()[:, None, :]
    up = b.ceil()[:, None, :]
    b = b[:, None, :]
    i = i[:, None]
    shares = (i == low) * (up - b) + (i == up) * (b - low)"""
IN_UNITS_OF_RETURN = """y = y.clamp(support[0], support[-1])[:, None, :]
    shares = (1 - (y - support[:, None]).abs() / delta_z).clamp(0, 1)"""


@bugs(
    ("c51", SHARES, FLOOR_AND_CEIL),  # low = up takes all mass away
    ("c51", SHARES, IN_UNITS_OF_RETURN),  # as it is printed; linspace rounds its atoms
    ("c51", CLAMP, ""),
    ("c51", CLAMP, ".clamp(min=0)"),
    ("c51", CLAMP, ".clamp(max=num_atoms - 1)"),
    ("c51", "(y - support[0]) / delta_z)", "(y - support[0]) / delta_z).round()"),
)
def test_mass_and_mean_see(request, name, old, new):
    given = dict(num_atoms=51, v_min=-10, v_max=200, gamma=1.0)
    fails_with_a_bug(request, test_projection_keeps_mass_and_mean, name, old, new, **given)


@bugs(
    ("c51", Y, "y = td_target(rewards[:, None], terminated[:, None], support, gamma)"),
    ("c51", "(shares * p[:, None, :]).sum(-1)", "(shares * p[:, :, None]).sum(-1)"),
    ("c51", "(shares * p[:, None, :]).sum(-1)", "(shares * p[:, :, None]).sum(-2)"),
    ("c51", "p[:, None, :]", "p[None, :, :]"),
    ("c51", "p[:, None, :]", "p.roll(1, 0)[:, None, :]"),
    ("c51", CLAMP, ".remainder(num_atoms)"),
)
def test_projection_sees(request, name, old, new):
    given = dict(num_atoms=51, v_min=-10, v_max=10, per_row=True)
    fails_with_a_bug(request, test_projection_against_algorithm_1, name, old, new, **given)


# The loss of quantiles


def slow_rho(u, tau, kappa) -> float:
    """Equations 9 and 10, divided by kappa."""
    huber = u * u / 2 if abs(u) <= kappa else kappa * (abs(u) - kappa / 2)
    return abs(tau - (u < 0)) * huber / kappa


def slow_slope(u, tau, kappa) -> float:
    """The derivative of rho by u."""
    return abs(tau - (u < 0)) * min(max(u, -kappa), kappa) / kappa


@each_qr
@pytest.mark.parametrize(("B", "n", "m"), [(5, 3, 4), (4, 4, 4), (1, 1, 6), (2, 7, 1)])
@pytest.mark.parametrize("kappa", [0.3, 1.0, 4.0])
def test_quantile_loss_against_a_loop(module, B, n, m, kappa):
    """Levels along the targets, sums for means, a division that is missing, an error with the other sign."""
    quantiles = (2 * torch.randn(B, n)).requires_grad_()
    targets = 2 * torch.randn(B, m)
    loss = module.quantile_huber(quantiles, targets, kappa)
    expected = 0.0
    slopes = torch.zeros(B, n)
    for b in range(B):
        for i in range(n):
            for j in range(m):
                u = (targets[b, j] - quantiles[b, i]).item()
                tau = (i + 0.5) / n
                expected += slow_rho(u, tau, kappa) / m / B
                slopes[b, i] -= slow_slope(u, tau, kappa) / m / B
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, quantiles)[0], slopes, atol=1e-6, rtol=1e-5)


WEIGHT = "torch.where(u < 0, 1 - tau, tau)"
THROUGH = "(tau - ((u < 0).to(u) - u + u.detach())).abs()"  # right in its value, wrong in its gradient
SUMS = "rho.mean(-1).sum(-1).mean()"


@bugs(
    ("qr_dqn", "((i + 0.5) / n)[:, None]", "(i + 0.5) / n"),
    ("qr_dqn", "((i + 0.5) / n)[:, None]", "(i / n)[:, None]"),
    ("qr_dqn", "((i + 0.5) / n)[:, None]", "((i + 1) / n)[:, None]"),
    ("qr_dqn", "targets[:, None, :] - quantiles[:, :, None]", "quantiles[:, :, None] - targets[:, None, :]"),
    ("qr_dqn", "targets[:, None, :] - quantiles[:, :, None]", "targets[:, :, None] - quantiles[:, None, :]"),
    ("qr_dqn", "targets[:, None, :] - quantiles[:, :, None]", "targets[None, :, :] - quantiles[:, :, None]"),
    ("qr_dqn", WEIGHT, "torch.where(u > 0, 1 - tau, tau)"),
    ("qr_dqn", WEIGHT, "(tau - (u < 0).to(u))"),
    ("qr_dqn", WEIGHT, THROUGH),
    ("qr_dqn", " * huber / kappa", " * huber"),
    ("qr_dqn", " * huber / kappa", " * huber / kappa**2"),
    ("qr_dqn", ", delta=kappa)", ")"),
    ("qr_dqn", SUMS, "rho.mean()"),
    ("qr_dqn", SUMS, "rho.sum(-1).sum(-1).mean()"),
    ("qr_dqn", SUMS, "rho.mean(-1).sum()"),
)
def test_quantile_loss_sees(request, name, old, new):
    fails_with_a_bug(request, test_quantile_loss_against_a_loop, name, old, new, B=4, n=4, m=4, kappa=0.3)


@bugs(("qr_dqn", SUMS, "rho.sum(-1).mean(-1).mean()"), ("qr_dqn", SUMS, "rho.sum(-2).sum(-1).mean() / n"))
def test_quantile_loss_of_two_sizes_sees(request, name, old, new):
    fails_with_a_bug(request, test_quantile_loss_against_a_loop, name, old, new, B=5, n=3, m=4, kappa=1.0)


@each_qr
def test_one_quantile(module):
    """With a large kappa and undivided, the loss of the median is u^2 / 4: half of the half of a square."""
    quantiles = torch.randn(6, 1)
    targets = torch.randn(6, 1)
    loss = 1000 * module.quantile_huber(quantiles, targets, 1000.0)
    assert loss.item() == pytest.approx(((targets - quantiles).square() / 4).mean().item(), rel=1e-4)


@each_qr
def test_quantiles_of_the_normal_distribution(module):
    """What the loss is for: its minimum are the quantiles at tau_i, and that of each row is its own."""
    normal = NormalDist()
    targets = torch.tensor([normal.inv_cdf((j + 0.5) / 500) for j in range(500)])
    targets = torch.stack([targets, 1 + targets.flip(0)])
    quantiles = torch.zeros(2, 6, requires_grad=True)
    optimizer = torch.optim.Adam([quantiles], lr=0.1)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 250)
        optimizer.zero_grad()
        module.quantile_huber(quantiles, targets, 0.02).backward()
        optimizer.step()
    levels = [(i + 0.5) / 6 for i in range(6)]
    assert quantiles[0].tolist() == pytest.approx([normal.inv_cdf(tau) for tau in levels], abs=0.03)
    assert quantiles[1].tolist() == pytest.approx([1 + normal.inv_cdf(tau) for tau in levels], abs=0.03)


@bugs(
    ("qr_dqn", "((i + 0.5) / n)[:, None]", "((i + 1) / (n + 1))[:, None]"),
    ("qr_dqn", WEIGHT, "torch.where(u < 0, 0.5, 0.5)"),
    ("qr_dqn", WEIGHT, "torch.where(u < 0, tau, 1 - tau)"),
)
def test_quantiles_see(request, name, old, new):
    fails_with_a_bug(request, test_quantiles_of_the_normal_distribution, name, old, new)


# The networks


@each_distributional
def test_values_are_means(module):
    """Probabilities over actions or rows, a sum for a mean, atoms that are not those of the flags."""
    flags = own_flags(module, num_atoms=4, v_min=-3.0, v_max=6.0, num_quantiles=4)
    agent, _, _ = make_agents(module, **flags)
    obs = torch.randn(6, 5)
    q = agent(obs)
    assert q.shape == (6, 3)
    outputs = agent.theta(agent.encoder(obs)).tolist()
    for b in range(6):
        for a in range(3):
            theta = outputs[b][4 * a : 4 * a + 4]
            if has_atoms(module):
                weights = [math.exp(x) for x in theta]
                mean = sum(w * z for w, z in zip(weights, (-3, 0, 3, 6))) / sum(weights)
                assert agent.logits(obs)[b, a].tolist() == pytest.approx(theta)
            else:
                mean = sum(theta) / 4
                assert agent.quantiles(obs)[b, a].tolist() == pytest.approx(theta)
            assert q[b, a].item() == pytest.approx(mean, abs=1e-5)


@bugs(
    ("c51", "self.logits(obs).softmax(-1) @", "self.logits(obs).softmax(1) @"),
    ("c51", "self.logits(obs).softmax(-1) @", "self.logits(obs).softmax(0) @"),
    ("c51", "self.logits(obs).softmax(-1) @", "self.logits(obs) @"),
    ("c51", "torch.linspace(args.v_min, args.v_max, args.num_atoms)", "torch.linspace(-10, 10, args.num_atoms)"),
    ("qr_dqn", "self.quantiles(obs).mean(-1)", "self.quantiles(obs).sum(-1)"),
    ("qr_dqn", "self.quantiles(obs).mean(-1)", "self.quantiles(obs).median(-1).values"),
)
def test_values_see(request, name, old, new):
    fails_with_a_bug(request, test_values_are_means, name, old, new)


# The losses


def slow_loss(module, agent, target, batch, args):
    """The loss row by row, and the mean of the Q that it is about."""
    total = 0.0
    values = []
    for k in range(len(batch["obs"])):
        held = target(batch["next_obs"][k : k + 1])[0].tolist()
        best = held.index(max(held))
        reward = batch["rewards"][k].item()
        end = batch["terminated"][k].item()
        action = batch["actions"][k].item()
        values.append(agent(batch["obs"][k : k + 1])[0, action].item())
        if has_atoms(module):
            probs = target.logits(batch["next_obs"][k : k + 1])[0, best].double().softmax(-1).tolist()
            m = slow_projection(probs, reward, end, args.v_min, args.v_max, args.gamma)
            log_p = agent.logits(batch["obs"][k : k + 1])[0, action].log_softmax(-1)
            total -= sum(m[i] * log_p[i] for i in range(args.num_atoms))
            continue
        next_theta = target.quantiles(batch["next_obs"][k : k + 1])[0, best].tolist()
        theta = agent.quantiles(batch["obs"][k : k + 1])[0, action]
        for i in range(args.num_quantiles):
            for y in next_theta:
                u = reward + (0 if end else args.gamma * y) - theta[i]
                weight = abs((i + 0.5) / args.num_quantiles - (u.item() < 0))
                huber = u * u / 2 if abs(u.item()) <= args.kappa else args.kappa * (u.abs() - args.kappa / 2)
                total += weight * huber / args.kappa / args.num_quantiles
    return total / len(values), sum(values) / len(values)


@each_distributional
def test_distributional_loss_and_gradient(module):
    """A gradient through the target, networks or rows mixed up, actions that are not the best in the mean."""
    torch.manual_seed(4)
    flags = own_flags(module, num_atoms=7, v_min=-4.0, v_max=5.0, num_quantiles=5, kappa=0.8)
    agent, target, args = make_agents(module, gamma=0.8, **flags)
    with torch.no_grad():
        for network in (agent, target):
            network.theta[-1].bias += torch.linspace(0, 3, len(network.theta[-1].bias)).sin()
    batch = make_batch(module, rows=32)
    loss, metrics = module.critic_loss(agent, target, batch, args)
    expected, q_value = slow_loss(module, agent, target, batch, args)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    found = gradient(loss, agent.parameters())
    torch.testing.assert_close(found, gradient(expected, agent.parameters()), atol=1e-5, rtol=1e-3)
    assert metrics["critic_loss"].item() == loss.item()
    assert metrics["q_value"].item() == pytest.approx(q_value, abs=1e-5)
    assert not any(metric.requires_grad for metric in metrics.values())
    both = module.critic_loss(agent, agent, batch, args)[0]  # the target is a constant, whoever made it
    alone = module.critic_loss(agent, copy.deepcopy(agent), batch, args)[0]
    torch.testing.assert_close(gradient(both, agent.parameters()), gradient(alone, agent.parameters()))


NEXT_PROBS = 'target.logits(batch["next_obs"])'
NEXT_QUANTILES = 'target.quantiles(batch["next_obs"])'
GREEDY = "next_actions = (next_probs @ target.support).argmax(-1)"
PROJECT = 'm = project(p, batch["rewards"], batch["terminated"], target.support, args.gamma)'


@bugs(
    ("c51", "    with torch.no_grad():\n        next_probs", "    if True:\n        next_probs"),
    ("c51", NEXT_PROBS, 'agent.logits(batch["next_obs"])'),
    ("c51", NEXT_PROBS, 'target.logits(batch["obs"])'),
    ("c51", GREEDY, "next_actions = next_probs.amax(-1).argmax(-1)"),
    ("c51", GREEDY, "next_actions = next_probs[:, :, -1].argmax(-1)"),
    ("c51", GREEDY, 'next_actions = agent(batch["next_obs"]).argmax(-1)'),
    ("c51", "of_actions(next_probs, next_actions)", "next_probs.mean(1)"),
    ("c51", "of_actions(next_probs, next_actions)", 'of_actions(next_probs, batch["actions"])'),
    ("c51", PROJECT, PROJECT.replace("args.gamma", "1.0")),
    ("c51", PROJECT, PROJECT.replace('batch["terminated"]', '~batch["terminated"]')),
    ("c51", "x.take_along_dim(actions[:, None, None], 1).squeeze(1)", "x[:, actions[0]]"),
    ("c51", "F.cross_entropy(logits, m)", 'F.cross_entropy(logits, m, reduction="sum")'),
    ("c51", "F.cross_entropy(logits, m)", "F.cross_entropy(logits, m.argmax(-1))"),
    ("c51", "F.cross_entropy(logits, m)", "F.mse_loss(logits.softmax(-1), m)"),
    ("c51", "logits.detach().softmax(-1) @ agent.support", "logits.softmax(-1) @ agent.support"),
    ("qr_dqn", "    with torch.no_grad():\n        next_quantiles", "    if True:\n        next_quantiles"),
    ("qr_dqn", NEXT_QUANTILES, 'agent.quantiles(batch["next_obs"])'),
    ("qr_dqn", NEXT_QUANTILES, 'target.quantiles(batch["obs"])'),
    ("qr_dqn", "next_quantiles.mean(-1).argmax(-1)", "next_quantiles.amax(-1).argmax(-1)"),
    ("qr_dqn", "next_quantiles.mean(-1).argmax(-1)", 'agent(batch["next_obs"]).argmax(-1)'),
    ("qr_dqn", "of_actions(next_quantiles, next_actions)", "next_quantiles.amax(1)"),
    ("qr_dqn", "x.take_along_dim(actions[:, None, None], 1).squeeze(1)", "x[:, actions[0]]"),
    ("qr_dqn", "quantile_huber(quantiles, y, args.kappa)", "quantile_huber(quantiles, y, 1.0)"),
    ("qr_dqn", "quantile_huber(quantiles, y, args.kappa)", "quantile_huber(y, quantiles, args.kappa)"),
    ("qr_dqn", "quantile_huber(quantiles, y, args.kappa)", "F.huber_loss(quantiles, y)"),
    ("qr_dqn", "quantiles.detach().mean()", "quantiles.mean()"),
)
def test_distributional_loss_sees(request, name, old, new):
    fails_with_a_bug(request, test_distributional_loss_and_gradient, name, old, new)


def one_step(rewards):
    """A batch of ends after action 0."""
    rows = len(rewards)
    batch = dict(obs=torch.ones(rows, 5), next_obs=torch.ones(rows, 5), rewards=torch.tensor(rewards))
    return batch | dict(actions=torch.zeros(rows, dtype=torch.int64), terminated=torch.ones(rows, dtype=torch.bool))


@each_c51
def test_gradient_of_what_seems_impossible(module):
    """A logarithm of clamped probabilities has no gradient where the network is sure and wrong."""
    agent, target, args = make_agents(module, num_atoms=3, v_min=-1.0, v_max=1.0)
    for sure, expected in (([50, -50, -50], [1, 0, -1]), ([-50, 50, -50], [0, 1, -1]), ([0, -50, 50], [0, 0, 0])):
        answer_always(agent.theta, [float(x) for x in sure] * 3)
        loss, _ = module.critic_loss(agent, target, one_step([1.0]), args)
        assert gradient(loss, [agent.theta[-1].bias])[:3].tolist() == pytest.approx(expected, abs=1e-6)


@bugs(
    ("c51", "F.cross_entropy(logits, m)", "-(m * logits.softmax(-1).clamp(1e-5).log()).sum(-1).mean()"),
    ("c51", "F.cross_entropy(logits, m)", "-(m * (logits.softmax(-1) + 1e-8).log()).sum(-1).mean()"),
)
def test_gradient_sees(request, name, old, new):
    fails_with_a_bug(request, test_gradient_of_what_seems_impossible, name, old, new)


@each_distributional
def test_a_law_of_two_points(module):
    """Gradient steps at gamma = 0 recover the law of the reward, not just its mean: -3 once in four times, else 3.5."""
    flags = own_flags(module, num_atoms=11, v_min=-5.0, v_max=5.0, num_quantiles=8, kappa=0.01)
    agent, target, args = make_agents(module, gamma=0.0, **flags)
    batch = one_step([-3.0, 3.5, 3.5, 3.5]) | dict(terminated=torch.zeros(4, dtype=torch.bool))
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.02)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 250)
        optimizer.zero_grad()
        module.critic_loss(agent, target, batch, args)[0].backward()
        optimizer.step()
    if has_atoms(module):
        probs = agent.logits(batch["obs"])[0, 0].softmax(-1)
        assert probs.tolist() == pytest.approx([0, 0, 0.25, 0, 0, 0, 0, 0, 0.375, 0.375, 0], abs=0.01)
    else:
        assert agent.quantiles(batch["obs"])[0, 0].tolist() == pytest.approx([-3] * 2 + [3.5] * 6, abs=0.05)
    assert agent(batch["obs"])[0, 0].item() == pytest.approx(0.25 * -3 + 0.75 * 3.5, abs=0.1)


# train()


@each_distributional
def test_train_learns_the_law_of_returns(module, monkeypatch, tmp_path):
    """From the flags to the network: of two actions with the same mean, one is sure and one is not."""
    agents = []
    spy(monkeypatch, module.Agent, "__init__", after=lambda _, agent, *__: agents.append(agent))
    given = dict(num_atoms=11, v_min=-5.0, v_max=5.0, num_quantiles=8, kappa=0.05, num_envs=4, end_e=1.0)
    given |= dict(total_timesteps=1600, learning_rate=5e-3, anneal_lr=True, batch_size=64, train_frequency=2)
    learn(module, tmp_path, "Coin", **given)
    obs = torch.ones(1, 1)
    assert agents[0](obs)[0].tolist() == pytest.approx([-0.5, -0.5], abs=0.25)
    if has_atoms(module):
        sure, unsure = agents[0].logits(obs)[0].softmax(-1)
        assert sure.tolist() == pytest.approx([0, 0, 0, 0, 0.5, 0.5, 0, 0, 0, 0, 0], abs=0.03)
        assert unsure.tolist() == pytest.approx([0, 0, 0, 0.75, 0, 0, 0, 0, 0, 0.25, 0], abs=0.05)
    else:
        sure, unsure = agents[0].quantiles(obs)[0]
        assert sure.tolist() == pytest.approx([-0.5] * 8, abs=0.1)
        assert unsure[:5].tolist() == pytest.approx([-2] * 5, abs=0.1)
        assert unsure[-1].item() == pytest.approx(4, abs=0.1)


@each_c51
@pytest.mark.parametrize(("v_min", "v_max", "expected"), [(-50.0, 5.0, 5), (20.0, 30.0, 20)])
def test_returns_beyond_the_support(module, monkeypatch, tmp_path, v_min, v_max, expected):
    """The environment Truncation is worth 10, and so the nearest atom where no atom is as much."""
    agents = []
    spy(monkeypatch, module.Agent, "__init__", after=lambda _, agent, *__: agents.append(agent))
    given = dict(v_min=v_min, v_max=v_max, num_envs=4, gamma=0.9, total_timesteps=1600, learning_rate=5e-3)
    given |= dict(anneal_lr=True, batch_size=32, train_frequency=2, target_network_frequency=20)
    learn(module, tmp_path, "Truncation", **given)
    assert agents[0](torch.ones(1, 1))[0].tolist() == pytest.approx([expected] * 2, abs=0.25)


@each_c51
def test_supports_that_are_refused(module):
    """One sentence for ends in the wrong order or that no number of atoms reaches."""
    for v_min, v_max in ((1.0, 1.0), (2.0, 1.0), (-math.inf, 0.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(module.Refusal, match=r"^v_min\b[^\n]*$"):
            module.Args(v_min=v_min, v_max=v_max)
    with pytest.raises(module.Refusal, match="num_atoms must lie in"):
        module.Args(num_atoms=1)


@each([c51, rainbow])
@pytest.mark.parametrize("name", ["v_min", "v_max"])
def test_atoms_of_a_resumed_run(module, name, tmp_path):
    """Other atoms would give all that was learned another value."""
    learn(module, tmp_path)
    with pytest.raises(module.Refusal, match=f"{name} .*, which cannot change"):
        resume(module, tmp_path, **{name: 3.5})


@each([c51, rainbow])
def test_families_hold_the_returns(module):
    """Supports that cut off what can be earned: 100 at one per step, 10 or so with rewards clipped to [-1, 1]."""
    supports = {}
    for family, defaults in module.FAMILIES.items():
        args = module.Args(**defaults)
        supports[family] = args.v_min, args.v_max
    assert supports["CartPole"] == supports["MinAtar/"] == (0, 100)
    assert supports["Acrobot"] == (-100, 0)
    assert supports["MountainCar"] == (-50, 0)  # -1 for ever at gamma = 0.98
    assert supports["ALE/"] == (-10, 10)
    assert supports["LunarLander"] == (-300, 300)


@bugs(("rainbow", "anneal_lr=False, v_min=0.0,", "anneal_lr=False, v_min=0.0, v_max=10.0,"))
def test_families_see(request, name, old, new):
    fails_with_a_bug(request, test_families_hold_the_returns, name, old, new)
