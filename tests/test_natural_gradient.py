"""The equations of NPG and TRPO against slow and independent references."""

import envs
import numpy as np
import pytest
import torch
from conftest import make_args, spy
from gymnasium.spaces import Box, Discrete
from torch.distributions import Categorical, Independent, Normal
from torch.nn.utils import parameters_to_vector

from algos import npg, trpo
from algos.trpo import Agent, conjugate_gradient, fisher_vector_product, kl_divergence, surrogate

OBS = Box(-np.inf, np.inf, (3,), np.float32)
BOX = Box(np.float32([-1, -3]), np.float32([2, 0.5]))
BOTH = pytest.mark.parametrize("space", [Discrete(4), BOX], ids=["discrete", "box"])


def flatten(agent):
    """The agent with its policy in agent.theta again, after a change of its type or of its layers."""
    agent.policy_parameters = [p for name, p in agent.named_parameters() if not name.startswith("critic")]
    agent.theta = parameters_to_vector(agent.policy_parameters).detach()
    torch.nn.utils.vector_to_parameters(agent.theta, agent.policy_parameters)
    return agent


def make_agent(space, **given):
    """A small agent in float64 whose policy is far from uniform and whose deviations differ, and its arguments."""
    torch.manual_seed(3)
    args = trpo.Args(**dict(hidden_size=5) | given)
    agent = flatten(Agent(OBS, space, args).double())
    with torch.no_grad():
        agent.actor[-1].weight.mul_(100)
        if agent.log_std is not None:
            agent.log_std.copy_(torch.tensor([-0.5, 0.3]))
    agent.features = lambda obs: obs  # in float64, too
    return agent, args


def make_batch(agent, rows=64):
    """A batch as the learner gets it; its advantages prefer some actions."""
    obs = torch.randn(rows, 3, dtype=torch.float64)
    with torch.no_grad():
        actions = agent(obs)[0].sample()
    advantages = actions.double() if agent.discrete else actions[:, 0] - actions[:, 1] * obs[:, 0]
    return dict(
        obs=obs, actions=actions, advantages=(advantages - advantages.mean()) / advantages.std(),
        returns=torch.randn(rows, dtype=torch.float64),
    )  # fmt: skip


def theta(agent):
    return parameters_to_vector(agent.policy_parameters).detach().clone()


def policy_of(agent, batch):
    with torch.no_grad():
        return agent(batch["obs"])[0]


def out_and_jacobian(agent, obs):
    """For each row, the numbers (D,) that the distribution is made of, and their derivatives (D, P), one by one."""
    for row in obs:
        out = agent.actor(row)
        out = out if agent.discrete else torch.cat([out, agent.log_std])
        grads = [torch.autograd.grad(x, agent.policy_parameters, retain_graph=True, allow_unused=True) for x in out]
        rows = [
            [torch.zeros_like(p) if g is None else g for g, p in zip(grad, agent.policy_parameters)] for grad in grads
        ]
        yield out.detach(), torch.stack([parameters_to_vector(row) for row in rows])


def score_fisher(agent, obs):
    """E[grad log pi grad log pi^T], the sum over all actions; for Gaussians in closed form for each dimension."""
    total = 0
    for out, jacobian in out_and_jacobian(agent, obs):
        if agent.discrete:
            probs = out.exp() / out.exp().sum()
            for action in range(4):
                score = (torch.eye(4, dtype=torch.float64)[action] - probs) @ jacobian
                total = total + probs[action] * torch.outer(score, score)
        else:  # the scores of mean and log(deviation) have variances 1 / deviation^2 and 2, and no covariance
            weights = torch.cat([(-2 * out[2:]).exp(), torch.full((2,), 2.0, dtype=torch.float64)])
            total = total + jacobian.T @ (weights[:, None] * jacobian)
    return total / len(obs)


def kl_hessian(agent, obs):
    """The Hessian of torch's mean KL(pi_old || pi) at pi_old, by differences of its gradient."""
    parameters, start = agent.policy_parameters, theta(agent)
    with torch.no_grad():
        old = agent(obs)[0]

    def gradient(x):
        agent.theta.copy_(x)
        kl = torch.distributions.kl_divergence(old, agent(obs)[0]).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(kl, parameters)])

    steps = 1e-5 * torch.eye(len(start), dtype=torch.float64)
    columns = [(gradient(start + step) - gradient(start - step)) / 2e-5 for step in steps]
    agent.theta.copy_(start)
    return torch.stack(columns)


def dense(product, size):
    return torch.stack([product(column) for column in torch.eye(size, dtype=torch.float64)])


# The KL divergence


def two_policies(kind, rows=50):
    torch.manual_seed(1)
    one, two = torch.randn(2, rows, 3, dtype=torch.float64)
    if kind == "discrete":
        return Categorical(logits=2 * one), Categorical(logits=2 * two)
    return tuple(Independent(Normal(x, torch.rand(3, dtype=torch.float64) + 0.5), 1) for x in (one, two))


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_kl_against_torch_and_monte_carlo(kind):
    """KL(new || old), a factor of a deviation, a mean over dimensions instead of the sum."""
    old, new = two_policies(kind)
    kl = kl_divergence(old, new)
    assert kl.shape == (50,)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(old, new))
    assert (abs(kl - kl_divergence(new, old)) > 1e-2).double().mean() > 0.8  # the direction matters here
    assert kl_divergence(old, old).abs().max() < 1e-12
    actions = old.sample((20_000,))
    log_ratios = old.log_prob(actions) - new.log_prob(actions)
    assert (abs(kl - log_ratios.mean(0)) < 5 * log_ratios.std(0) / 20_000**0.5).all()


# The Fisher matrix


@BOTH
def test_fisher_vector_products_against_the_dense_matrix(space):
    """A Hessian of KL(pi || pi_old) or of log pi, a sum for a mean, damping left out or added twice."""
    agent, _ = make_agent(space)
    obs = make_batch(agent, 7)["obs"]
    matrix = dense(fisher_vector_product(agent, obs, 0.0), len(theta(agent)))
    torch.testing.assert_close(matrix, score_fisher(agent, obs), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(matrix, kl_hessian(agent, obs), atol=1e-6, rtol=1e-4)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert eigenvalues.min() > -1e-9
    assert eigenvalues.max() > 0.1
    damped = dense(fisher_vector_product(agent, obs, 0.3), len(matrix))
    torch.testing.assert_close(damped, matrix + 0.3 * torch.eye(len(matrix), dtype=torch.float64))


@BOTH
def test_the_reference_tells_other_matrices_apart(monkeypatch, space):
    """The test above could fail: half the KL, the sum over rows, and another point than pi_old are seen."""
    agent, _ = make_agent(space)
    obs = make_batch(agent, 7)["obs"]
    expected, kl = score_fisher(agent, obs), kl_divergence
    other = Categorical(logits=torch.tensor([0.0, 1, 2, 3]).double()) if agent.discrete else None
    other = other or Independent(Normal(*torch.tensor([[0.5, 0.5], [2, 0.4]]).double()), 1)
    for wrong in (
        lambda old, new: kl(old, new) / 2,
        lambda old, new: kl(old, new) * 7,
        lambda old, new: kl(other, new),
        lambda old, new: kl(new, new),
    ):
        monkeypatch.setattr(trpo, "kl_divergence", wrong)
        matrix = dense(fisher_vector_product(agent, obs, 0.0), len(expected))
        assert (matrix - expected).abs().max() > 0.05 * expected.abs().max()


@BOTH
def test_the_critic_is_not_in_the_hessian(space):
    """Value parameters in theta, in the products, or moved by the policy's step; a policy moved by the critic's."""
    agent, args = make_agent(space)
    batch = make_batch(agent)
    in_theta, critic = {id(p) for p in agent.policy_parameters}, {id(p) for p in agent.critic.parameters()}
    assert in_theta | critic == {id(p) for p in agent.parameters()}
    assert not in_theta & critic
    product = fisher_vector_product(agent, batch["obs"], 0.0)
    v = torch.randn(len(theta(agent)), dtype=torch.float64)
    before = product(v)
    assert before.shape == v.shape
    with torch.no_grad():
        for parameter in agent.critic.parameters():
            parameter.mul_(3).add_(1)
    torch.testing.assert_close(fisher_vector_product(agent, batch["obs"], 0.0)(v), before, atol=0, rtol=0)
    policy, values = theta(agent), parameters_to_vector(agent.critic.parameters()).clone()
    trpo.update(agent, batch, args)
    assert torch.equal(parameters_to_vector(agent.critic.parameters()), values)
    moved = theta(agent)
    assert not torch.equal(moved, policy)
    trpo.critic_step(agent, trpo.Adam(agent.critic), batch, torch.tensor(0.1))
    assert torch.equal(theta(agent), moved)
    assert not torch.equal(parameters_to_vector(agent.critic.parameters()), values)


def test_the_critic_learns_nothing_into_the_trunk_of_images():
    """Value gradients in the convolutions, which belong to the policy."""
    agent = Agent(Box(0, 1, (10, 10, 3), np.bool_), Discrete(3), trpo.Args())
    obs = torch.rand(8, 10, 10, 3) < 0.3
    loss, _ = trpo.value_loss(agent, dict(obs=obs, returns=torch.randn(8)))
    grads = torch.autograd.grad(loss, list(agent.parameters()), allow_unused=True)
    moved = [name for (name, _), grad in zip(agent.named_parameters(), grads) if grad is not None]
    assert moved == ["critic.0.weight", "critic.0.bias"]
    assert len(agent.policy_parameters) == len(list(agent.trunk.parameters())) + len(list(agent.actor.parameters()))
    product = fisher_vector_product(agent, obs, 0.1)
    assert product(torch.ones(len(theta(agent)))).isfinite().all()


# Conjugate gradient


def spd(seed, size=12, condition=1e3):
    random = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=random))
    values = torch.logspace(0, np.log10(condition), size, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T, torch.randn(size, dtype=torch.float64, generator=random)


@pytest.mark.parametrize("seed", range(5))
def test_conjugate_gradient_solves_random_systems(seed):
    """A wrong step length or direction: then n iterations do not solve n equations."""
    matrix, b = spd(seed)
    x = conjugate_gradient(matrix.mv, b, 24, 1e-12)
    assert (matrix @ x - b).norm() < 1e-8 * b.norm()
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_conjugate_gradient_is_optimal_in_its_krylov_space(iterations):
    """Steepest descent, or directions that are not conjugate: k iterations give the best x of the k-th Krylov space."""
    matrix, b = spd(7)
    space, _ = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(matrix, k) @ b for k in range(iterations)], 1))
    best = space @ torch.linalg.solve(space.T @ matrix @ space, space.T @ b)
    torch.testing.assert_close(conjugate_gradient(matrix.mv, b, iterations), best, atol=1e-9, rtol=1e-6)
    descent = torch.zeros_like(b)
    for _ in range(iterations):
        residual = b - matrix @ descent
        descent += (residual @ residual) / (residual @ matrix @ residual) * residual
    assert ((descent - best).norm() > 1e-2 * best.norm()) == (iterations > 1)


def count_products(matrix, b, *options):
    products = []
    x = conjugate_gradient(lambda v: products.append(v) or matrix @ v, b, *options)
    return x, len(products)


def test_conjugate_gradient_stops_at_its_tolerance():
    """An absolute tolerance, one on the squared norm, or iterations on after the solution is found."""
    matrix, b = spd(0, condition=50)
    for scale in (1e-6, 1, 1e6):
        x, products = count_products(matrix, b * scale, 100, 1e-2)
        assert (matrix @ x - b * scale).norm() <= 1e-2 * (b * scale).norm()
        assert 2 < products < 12
        previous, _ = count_products(matrix, b * scale, products - 1, 1e-2)
        assert (matrix @ previous - b * scale).norm() > 1e-2 * (b * scale).norm()
    assert count_products(torch.eye(12).double(), b, 100)[1] == 1
    assert count_products(matrix, b, 4, 1e-12)[1] == 4


def test_conjugate_gradient_without_positive_curvature():
    """NaN and steps to infinity where H is zero, singular, negative or indefinite, or b zero or not a number."""
    matrix, b = spd(0)
    zero = torch.zeros_like(b)
    assert torch.equal(conjugate_gradient(matrix.mv, zero, 10), zero)
    assert torch.equal(conjugate_gradient((0 * matrix).mv, b, 10), zero)
    assert torch.equal(conjugate_gradient((-matrix).mv, b, 10), zero)
    assert torch.equal(conjugate_gradient(matrix.mv, b * torch.nan, 10), zero)
    singular = torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64))
    solvable, unsolvable = torch.tensor([[6.0, 2.0, 0.0], [6.0, 2.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(conjugate_gradient(singular.mv, solvable, 10), torch.tensor([2.0, 1, 0]).double())
    assert conjugate_gradient(singular.mv, unsolvable, 10).isfinite().all()
    indefinite = torch.diag(torch.tensor([3.0, 1.0, -1.0], dtype=torch.float64))
    x, products = count_products(indefinite, torch.tensor([1.0, 1.0, 0.5]).double(), 10)
    assert 1 < products < 10  # it began well, met a direction of negative curvature and kept what it had
    assert x.isfinite().all()
    assert x @ indefinite @ x > 0


# The steps


@BOTH
def test_npg_step_is_f_inverse_g(space):
    """A step down the gradient, along g itself, of another length, or without damping."""
    agent, _ = make_agent(space)
    args = npg.Args(hidden_size=5, damping=0.05, cg_iterations=300)
    batch, before = make_batch(agent), theta(agent)
    gradient = 0
    for i in range(64):
        log_prob = agent(batch["obs"][i : i + 1])[0].log_prob(batch["actions"][i : i + 1])
        parts = torch.autograd.grad(log_prob.sum(), agent.policy_parameters)
        gradient = gradient + batch["advantages"][i] * torch.cat([part.flatten() for part in parts]) / 64
    damped = score_fisher(agent, batch["obs"]) + 0.05 * torch.eye(len(before), dtype=torch.float64)
    expected = 0.01 * torch.linalg.solve(damped, gradient)
    metrics = npg.update(agent, batch, torch.tensor(0.01), args)
    step = theta(agent) - before
    assert (step - expected).norm() < 1e-3 * expected.norm()
    assert torch.cosine_similarity(step, gradient, 0) < 0.9
    assert metrics["surrogate_gain"].item() == pytest.approx((gradient @ expected).item(), rel=0.1)
    assert metrics["approx_kl"].item() == pytest.approx((expected @ damped @ expected).item() / 2, rel=0.2)


@pytest.mark.parametrize("natural", [True, False])
def test_npg_step_does_not_depend_on_the_parametrisation(monkeypatch, natural):
    """Observations scaled by 10: the gradient's step in the probabilities grows by 100, the natural one's does not."""
    if not natural:  # the test could fail
        monkeypatch.setattr(npg, "conjugate_gradient", lambda product, b, iterations: b)
    moves, args = [], npg.Args(hidden_size=5, damping=0.0)
    for scale in (1.0, 10.0):
        agent, _ = make_agent(Discrete(2))
        agent.actor = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False)).double()
        agent.features = lambda obs, scale=scale: obs * scale
        with torch.no_grad():
            agent.actor[0].weight.copy_(torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.4, -0.3]]) / scale)
        flatten(agent)
        torch.manual_seed(5)
        batch = make_batch(agent)
        before = agent(batch["obs"])[0].probs.detach()
        npg.update(agent, batch, torch.tensor(0.1), args)
        moves.append(agent(batch["obs"])[0].probs.detach() - before)
    assert moves[0].abs().max() > 1e-3
    assert torch.allclose(moves[0], moves[1], atol=1e-6, rtol=1e-4) == natural


@BOTH
@pytest.mark.parametrize("target_kl", [1e-4, 1e-2, 0.3])
def test_trpo_step_stays_in_the_trust_region(space, target_kl):
    """A KL beyond delta, a surrogate that has fallen, metrics of another step than the one taken."""
    agent, args = make_agent(space, target_kl=target_kl, damping=1e-3, cg_iterations=50)
    batch, before = make_batch(agent), theta(agent)
    old = policy_of(agent, batch)
    metrics = trpo.update(agent, batch, args)
    new = policy_of(agent, batch)
    kl = torch.distributions.kl_divergence(old, new).mean().item()
    gain = ((new.log_prob(batch["actions"]) - old.log_prob(batch["actions"])).exp() - 1) * batch["advantages"]
    assert 0.2 * target_kl < kl <= target_kl
    assert gain.mean() > 0
    assert metrics["approx_kl"].item() == pytest.approx(kl, rel=1e-6)
    assert metrics["surrogate_gain"].item() == pytest.approx(gain.mean().item(), rel=1e-6)
    assert metrics["entropy"].item() == pytest.approx(old.entropy().mean().item())
    if target_kl < 1e-3:  # so short a step is the second-order one
        assert kl == pytest.approx(target_kl, rel=0.1)
        assert metrics["step_fraction"] == 1
    assert (theta(agent) != before).double().mean() > 0.9


@BOTH
def test_trpo_steps_along_f_inverse_g(space):
    """Another direction than NPG's, the length without its root or its 2, x^T x or x^T g for x^T F x."""
    agent, args = make_agent(space, target_kl=1e-6, damping=0.05, cg_iterations=300)
    batch, before = make_batch(agent), theta(agent)
    policy = agent(batch["obs"])[0]
    gain = (policy.log_prob(batch["actions"]) * batch["advantages"]).mean()
    gradient = parameters_to_vector(torch.autograd.grad(gain, agent.policy_parameters))
    damped = score_fisher(agent, batch["obs"]) + 0.05 * torch.eye(len(before), dtype=torch.float64)
    x = torch.linalg.solve(damped, gradient)
    expected = (2e-6 / (x @ damped @ x)).sqrt() * x
    trpo.update(agent, batch, args)
    assert (theta(agent) - before - expected).norm() < 1e-3 * expected.norm()


@BOTH
def test_line_search_takes_the_first_step_that_will_do(monkeypatch, space):
    """A step that is too long taken all the same, or a shorter one than needed: the curvature is said to be 1/25."""
    agent, args = make_agent(space, target_kl=1e-3, damping=0.0, cg_iterations=50)
    batch, before = make_batch(agent), theta(agent)

    def flat(agent, obs, damping):
        product = fisher_vector_product(agent, obs, 1e-6)
        return lambda v: product(v) / 25  # x is 25 times too long, x^T F x too, and so the step is 5 times too long

    monkeypatch.setattr(trpo, "fisher_vector_product", flat)
    old = policy_of(agent, batch)
    metrics = trpo.update(agent, batch, args)
    step, fraction = theta(agent) - before, metrics["step_fraction"].item()
    assert fraction in [pytest.approx(0.8**k) for k in (6, 7, 8, 9)]

    def kl_of(length):
        agent.theta.copy_(before + length * step)
        return torch.distributions.kl_divergence(old, policy_of(agent, batch)).mean().item()

    assert kl_of(1) == pytest.approx(metrics["approx_kl"].item(), rel=1e-6)
    assert kl_of(1) <= 1e-3 < kl_of(1 / 0.8)
    assert kl_of(1 / fraction) > 5e-3


@BOTH
@pytest.mark.parametrize("reason", ["kl", "surrogate", "nan", "no attempt"])
def test_rejected_steps_restore_the_weights(monkeypatch, space, reason):
    """Weights that differ in the last bit, or that stay at the last attempt, when no length of the step will do."""
    agent, args = make_agent(space, line_search_steps=7)
    batch = {name: x.float() if x.is_floating_point() else x for name, x in make_batch(agent).items()}
    flatten(agent.float())
    before, attempts = theta(agent), []
    values = {name: tensor.clone() for name, tensor in agent.state_dict().items()}

    def no_room(old, new):
        attempts.append(theta(agent))
        return kl_divergence(old, new) + (dict(kl=1.0, nan=torch.nan).get(reason, 0.0) if len(attempts) > 1 else 0)

    def no_gain(old, new, batch):
        return surrogate(old, new, batch) * (-1 if reason == "surrogate" and len(attempts) > 1 else 1)

    monkeypatch.setattr(trpo, "kl_divergence", no_room)  # but for the first one, of the Fisher matrix
    monkeypatch.setattr(trpo, "surrogate", no_gain)
    if reason == "no attempt":
        batch["advantages"] *= 0
    metrics = trpo.update(agent, batch, args)
    assert len(attempts) == (1 if reason == "no attempt" else 8)
    assert all(not torch.equal(attempt, before) for attempt in attempts[1:])
    assert all(torch.equal(tensor, values[name]) for name, tensor in agent.state_dict().items())
    assert {name: metrics[name].item() for name in ("approx_kl", "surrogate_gain", "step_fraction")} == dict(
        approx_kl=0, surrogate_gain=0, step_fraction=0
    )


@pytest.mark.parametrize("curvature", [-1.0, 0.0, float("nan")])
def test_no_step_without_curvature(monkeypatch, curvature):
    """The root of a negative number: NaN in every weight. A direction is given, whose x^T F x cannot be used."""
    agent, args = make_agent(Discrete(4))
    batch, before = make_batch(agent), theta(agent)
    monkeypatch.setattr(trpo, "fisher_vector_product", lambda *_: lambda v: curvature * v)
    for direction in (conjugate_gradient, lambda product, b, iterations: b):
        monkeypatch.setattr(trpo, "conjugate_gradient", direction)
        metrics = trpo.update(agent, batch, args)
        assert torch.equal(theta(agent), before)
        assert all(metric.isfinite() for metric in metrics.values())
        assert metrics["step_fraction"] == 0
    monkeypatch.setattr(npg, "fisher_vector_product", lambda *_: lambda v: curvature * v)
    npg.update(agent, batch, torch.tensor(0.5), npg.Args())
    assert torch.equal(theta(agent), before)


@pytest.mark.parametrize("module", [npg, trpo])
def test_fisher_matrix_of_every_kth_row(monkeypatch, module):
    """A stride that also thins out the gradient or the line search, or that is not used."""
    agent, args = make_agent(BOX, fisher_stride=5)
    batch, seen = make_batch(agent), []
    spy(monkeypatch, module, "fisher_vector_product", before=lambda agent, obs, damping: seen.append((obs, damping)))
    spy(monkeypatch, module, "surrogate", before=lambda old, new, batch: seen.append(len(batch["obs"])))
    module.update(agent, batch, *([torch.tensor(0.5)] if module is npg else []), args)
    assert torch.equal(seen[1][0], batch["obs"][::5])
    assert seen[1][1] == args.damping
    assert {seen[0], *seen[2:]} == {64}


# train()


def test_surrogate_and_value_loss_row_by_row():
    """(B, 1) against (B,), log-ratios the wrong way round, a factor 1/2 in the value loss."""
    agent, _ = make_agent(BOX)
    batch, old = make_batch(agent), Independent(Normal(*torch.rand(2, 64, 2).double() + 0.5), 1)
    new = policy_of(agent, batch)
    ratios = (new.log_prob(batch["actions"]) - old.log_prob(batch["actions"])).exp().tolist()
    expected = np.mean([ratio * advantage for ratio, advantage in zip(ratios, batch["advantages"].tolist())])
    assert surrogate(old, new, batch).item() == pytest.approx(expected)
    loss, metrics = trpo.value_loss(agent, batch)
    values = agent.critic(batch["obs"])[:, 0].tolist()
    expected = np.mean([(v - r) ** 2 for v, r in zip(values, batch["returns"].tolist())])
    assert loss.item() == metrics["value_loss"].item() == pytest.approx(expected)


@pytest.mark.parametrize("module", [npg, trpo])
@pytest.mark.parametrize("norm_obs", [False, True])
def test_the_policy_moves_once_per_batch_and_first(monkeypatch, tmp_path, module, norm_obs):
    """A policy step after the critic's or after new statistics, on some rows only, on more than the valid ones."""
    events, batches = [], []

    def before_update(agent, batch, *rest):
        events.append("policy")
        batches.append((batch, agent.state_dict()["trunk.mean"].clone() if norm_obs else None, rest[0]))

    def before_critic(agent, optimizer, batch, learning_rate):
        events.append("critic")
        assert norm_obs is False or torch.equal(agent.state_dict()["trunk.mean"], batches[-1][1])
        assert learning_rate.item() == pytest.approx(1e-3 * (1 - (len(batches) - 1) / 4))

    spy(monkeypatch, module, "update", before=before_update)
    spy(monkeypatch, module, "critic_step", before=before_critic)
    schedule = dict(anneal_lr=True, policy_step=0.4, learning_rate=1e-3, norm_obs=norm_obs)
    args = make_args(module, tmp_path, env_id="test/TaggedBox-v0", num_envs=3, num_steps=16, total_timesteps=192,
                     update_epochs=2, num_minibatches=4, **schedule)  # fmt: skip
    module.train(args)
    assert events == (["policy"] + ["critic"] * 8) * 4
    for k, (batch, _, step) in enumerate(batches):
        assert batch["advantages"].mean().item() == pytest.approx(0, abs=1e-6)
        assert batch["advantages"].std().item() == pytest.approx(1, rel=1e-3)
        if module is npg:
            assert step.item() == pytest.approx(0.4 * (1 - k / 4))


def test_compiled_training_equals_eager_training(monkeypatch, tmp_path):
    """A compiled critic that works on copies of its parameters, or with the step size of its first call."""
    histories = dict(eager=[], compiled=[])
    for name, history in histories.items():

        def remember(agent, *_, history=history):
            history.append(parameters_to_vector(agent.critic.parameters()).detach().clone())
            return {}

        monkeypatch.setattr(trpo, "update", remember)  # the policy stays, or rounding would soon change the actions
        monkeypatch.setattr(envs.Tagged, "instances", [])
        args = make_args(trpo, tmp_path / name, env_id="test/TaggedBox-v0", num_envs=3, num_steps=16, norm_obs=True,
                         total_timesteps=3 * 16 * 5, num_minibatches=2, update_epochs=2, learning_rate=5e-3,
                         anneal_lr=True, compile=name == "compiled")  # fmt: skip
        trpo.train(args)
    eager, compiled = map(torch.stack, histories.values())
    assert ((eager[1:] - eager[:-1]).abs().amax(1) > 1e-3).all()
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)
