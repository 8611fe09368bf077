"""NPG and TRPO against slow and independent references, and each known bug planted and seen."""

import copy

import envs
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import learner_name, make_args, spy
from gymnasium.spaces import Box, Discrete
from off_policy import bugs, flat, gradient, lines
from on_policy import each_space, entropy, kl, log_prob, make_agent, sample
from runs import each, fails_with_a_bug, name_of, planted
from torch.nn.utils import vector_to_parameters

from algos import npg, trpo

each_twin = each([trpo])  # what is the same text in both
each_script = each([npg, trpo])


def policy_parameters(agent):
    """What the policy is made of."""
    return [parameter for name, parameter in agent.named_parameters() if not name.startswith("critic")]


def theta(agent):
    """The policy as a vector, with memory of its own."""
    return flat(policy_parameters(agent))


def set_theta(agent, x):
    """Make a vector the policy."""
    vector_to_parameters(x, policy_parameters(agent))


def make_batch(agent, rows=64):
    """A batch as the learner gets it, but for the mean of its advantages, which is not 0; they prefer some actions."""
    obs = torch.randn(rows, 3, dtype=torch.float64)
    actions = sample(agent, obs)
    advantages = actions.double() if agent.discrete else actions[:, 0] - actions[:, 1] * obs[:, 0]
    advantages = (advantages - advantages.mean()) / advantages.std() + 0.1
    return dict(obs=obs, actions=actions, advantages=advantages, returns=torch.randn(rows, dtype=torch.float64))


def label(x):
    """Of a test with its arguments, or of a text, the name in the list of tests."""
    return x[0].__name__ if isinstance(x, tuple) else " ".join(x.split())[:50]


def take_step(module, agent, batch, args, alpha=0.01):
    """The step of the policy, whichever the script is."""
    if name_of(module) == "npg":
        return module.natural_gradient_step(agent, batch, alpha, args)
    return module.trust_region_step(agent, batch, args)


# The Fisher matrix


def out_and_jacobian(agent, obs):
    """For each row, the numbers (D,) that the distribution is made of, and their derivatives (D, P), one by one."""
    parameters = policy_parameters(agent)
    for row in obs:
        out = agent.actor(row)
        out = out if agent.discrete else torch.cat([out, agent.log_std])
        rows = []
        for x in out:
            grads = torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True)
            rows.append(flat(torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads)))
        yield out.detach(), torch.stack(rows)


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
    """The Hessian of the mean KL(pi_old || pi) at pi_old, by differences of its gradient."""
    start = theta(agent)
    old = copy.deepcopy(agent)

    def slope(x):
        set_theta(agent, x)
        return gradient(kl(old, agent, obs).mean(), policy_parameters(agent))

    steps = 1e-5 * torch.eye(len(start), dtype=torch.float64)
    columns = [(slope(start + step) - slope(start - step)) / 2e-5 for step in steps]
    set_theta(agent, start)
    return torch.stack(columns)


def dense(product, size):
    """The matrix that the products are those of."""
    return torch.stack([product(column) for column in torch.eye(size, dtype=torch.float64)])


@each_twin
@each_space
def test_fisher_vector_products_against_the_dense_matrix(module, space):
    """A Hessian of log pi, a sum for a mean, another point than pi_old, damping left out or added twice."""
    agent, _ = make_agent(module, space)
    obs = make_batch(agent, 7)["obs"]
    size = len(theta(agent))
    matrix = dense(module.fisher_vector_product(agent, obs, 0.0), size)
    torch.testing.assert_close(matrix, score_fisher(agent, obs), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(matrix, kl_hessian(agent, obs), atol=1e-6, rtol=1e-4)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert eigenvalues.min() > -1e-9
    assert eigenvalues.max() > 0.1
    damped = dense(module.fisher_vector_product(agent, obs, 0.3), size)
    torch.testing.assert_close(damped, matrix + 0.3 * torch.eye(size, dtype=torch.float64))


KL = "kl = mean_kl(old, policy)"


@each_space
@bugs(
    ("trpo", KL, KL.replace("mean_kl", "len(obs) * mean_kl")),
    ("trpo", KL, f"{KL} / 2"),
    ("trpo", KL, KL.replace("old,", "policy,")),
    ("trpo", KL, "kl = policy.log_prob(old.sample()).square().mean()"),
    ("trpo", " + damping * v", ""),
    ("trpo", " + damping * v", " + 2 * damping * v"),
)
def test_fisher_vector_products_see(request, space, name, old, new):
    fails_with_a_bug(request, test_fisher_vector_products_against_the_dense_matrix, name, old, new, space=space)


@each_script
@each_space
def test_the_policy_and_the_critic_step_apart(module, space):
    """Value parameters in theta, in the products, or moved by the policy's step; a policy moved by the critic's."""
    agent, args = make_agent(module, space)
    batch = make_batch(agent)
    critic = list(agent.critic.parameters())
    assert set(agent.policy_parameters()) | set(critic) == set(agent.parameters())
    assert not set(agent.policy_parameters()) & set(critic)
    v = torch.randn(len(theta(agent)), dtype=torch.float64)
    before = module.fisher_vector_product(agent, batch["obs"], 0.0)(v)
    assert before.shape == v.shape
    with torch.no_grad():
        for parameter in critic:
            parameter.mul_(3).add_(1)
    assert torch.equal(module.fisher_vector_product(agent, batch["obs"], 0.0)(v), before)
    policy = theta(agent)
    values = flat(critic)
    take_step(module, agent, batch, args)
    assert torch.equal(flat(critic), values)
    moved = theta(agent)
    assert not torch.equal(moved, policy)
    gradients, _ = module.gradients_of(module.value_loss, critic, args)(agent, batch)
    module.descend(torch.optim.SGD(critic, lr=0.1), gradients)
    assert torch.equal(theta(agent), moved)
    assert not torch.equal(flat(critic), values)


@each_script
def test_the_critic_learns_nothing_into_the_encoder_of_images(module):
    """Value gradients in the convolutions, which belong to the policy."""
    agent = module.Agent(Box(0, 1, (10, 10, 3), np.bool_), Discrete(3), module.Args())
    obs = torch.rand(8, 10, 10, 3) < 0.3
    loss, _ = module.value_loss(agent, dict(obs=obs, returns=torch.randn(8)))
    grads = torch.autograd.grad(loss, list(agent.parameters()), allow_unused=True)
    moved = [name for (name, _), grad in zip(agent.named_parameters(), grads) if grad is not None]
    assert moved == ["critic.0.weight", "critic.0.bias"]
    assert agent.policy_parameters() == [*agent.encoder.parameters(), *agent.actor.parameters()]
    product = module.fisher_vector_product(agent, obs, 0.1)
    assert product(torch.ones(len(theta(agent)))).isfinite().all()


@bugs(("trpo", "with torch.no_grad():\n        x = agent.encoder", "if True:\n        x = agent.encoder"))
def test_gradients_of_the_encoder_are_seen(request, name, old, new):
    fails_with_a_bug(request, test_the_critic_learns_nothing_into_the_encoder_of_images, name, old, new)


# Conjugate gradient


def spd(seed, size=12, condition=1e3):
    """A symmetric positive definite matrix, and a vector."""
    random = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=random))
    values = torch.logspace(0, np.log10(condition), size, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T, torch.randn(size, dtype=torch.float64, generator=random)


@each_twin
@pytest.mark.parametrize("seed", range(5))
def test_conjugate_gradient_solves_random_systems(module, seed):
    """A wrong step length or direction: then n iterations do not solve n equations."""
    matrix, b = spd(seed)
    x = module.conjugate_gradient(matrix.mv, b, 24, 1e-12)
    assert (matrix @ x - b).norm() < 1e-8 * b.norm()
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), atol=1e-8, rtol=1e-6)


@each_twin
@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_conjugate_gradient_is_optimal_in_its_krylov_space(module, iterations):
    """Steepest descent, or directions that are not conjugate: k iterations give the best x of the k-th Krylov space."""
    matrix, b = spd(7)
    space, _ = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(matrix, k) @ b for k in range(iterations)], 1))
    best = space @ torch.linalg.solve(space.T @ matrix @ space, space.T @ b)
    torch.testing.assert_close(module.conjugate_gradient(matrix.mv, b, iterations), best, atol=1e-9, rtol=1e-6)


def count_products(module, matrix, b, *options):
    """The solution, and how many products it took."""
    products = []
    x = module.conjugate_gradient(lambda v: products.append(v) or matrix @ v, b, *options)
    return x, len(products)


@each_twin
def test_conjugate_gradient_stops_at_its_tolerance(module):
    """An absolute tolerance, one on the squared norm, or iterations on after the solution is found."""
    matrix, b = spd(0, condition=50)
    for scale in (1e-6, 1, 1e6):
        x, products = count_products(module, matrix, b * scale, 100, 1e-2)
        assert (matrix @ x - b * scale).norm() <= 1e-2 * (b * scale).norm()
        assert 2 < products < 12
        previous, _ = count_products(module, matrix, b * scale, products - 1, 1e-2)
        assert (matrix @ previous - b * scale).norm() > 1e-2 * (b * scale).norm()
    assert count_products(module, torch.eye(12).double(), b, 100)[1] == 1
    assert count_products(module, matrix, b, 4, 1e-12)[1] == 4


@each_twin
def test_conjugate_gradient_without_positive_curvature(module):
    """NaN and steps to infinity where H is zero, singular, negative or indefinite, or b zero or not a number."""
    matrix, b = spd(0)
    zero = torch.zeros_like(b)
    assert torch.equal(module.conjugate_gradient(matrix.mv, zero, 10), zero)
    assert torch.equal(module.conjugate_gradient((0 * matrix).mv, b, 10), zero)
    assert torch.equal(module.conjugate_gradient((-matrix).mv, b, 10), zero)
    assert torch.equal(module.conjugate_gradient(matrix.mv, b * torch.nan, 10), zero)
    singular = torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64))
    solvable, unsolvable = torch.tensor([[6.0, 2.0, 0.0], [6.0, 2.0, 1.0]], dtype=torch.float64)
    x = module.conjugate_gradient(singular.mv, solvable, 10)
    torch.testing.assert_close(x, torch.tensor([2.0, 1, 0]).double())
    assert module.conjugate_gradient(singular.mv, unsolvable, 10).isfinite().all()
    indefinite = torch.diag(torch.tensor([3.0, 1.0, -1.0], dtype=torch.float64))
    x, products = count_products(module, indefinite, torch.tensor([1.0, 1.0, 0.5]).double(), 10)
    assert 1 < products < 10  # it began well, met a direction of negative curvature and kept what it had
    assert x.isfinite().all()
    assert x @ indefinite @ x > 0


LENGTH = "length = squared_norm / curvature"
DIRECTION = "direction = residual + squared_norm / last_squared_norm * direction"
CURVATURE = "        if not curvature > 0:  # also if it is not a number\n            break\n"
GOAL = "goal = tolerance**2 * squared_norm"
SOLVES = (test_conjugate_gradient_solves_random_systems, dict(seed=0))
IS_OPTIMAL = (test_conjugate_gradient_is_optimal_in_its_krylov_space, dict(iterations=3))
STOPS = (test_conjugate_gradient_stops_at_its_tolerance, {})
WITHOUT_CURVATURE = (test_conjugate_gradient_without_positive_curvature, {})


@pytest.mark.parametrize(
    ("test", "old", "new"),
    [
        (SOLVES, LENGTH, f"{LENGTH} / 2"),
        (SOLVES, LENGTH, "length = (direction @ b) / (direction @ direction)"),
        (SOLVES, DIRECTION, "direction = residual"),
        (SOLVES, DIRECTION, DIRECTION.replace("squared_norm / last_squared_norm", "last_squared_norm / squared_norm")),
        (SOLVES, "residual = residual - length", "residual = residual + length"),
        (IS_OPTIMAL, DIRECTION, "direction = residual"),
        (IS_OPTIMAL, DIRECTION, DIRECTION.replace(" / last_squared_norm", "")),
        (STOPS, GOAL, "goal = tolerance * squared_norm"),
        (STOPS, GOAL, "goal = tolerance**2"),
        (STOPS, "if squared_norm <= goal:", "if False:"),
        (STOPS, "for _ in range(iterations):", "for _ in range(100):"),
        (WITHOUT_CURVATURE, CURVATURE, ""),
        (WITHOUT_CURVATURE, CURVATURE, CURVATURE.replace("not curvature > 0", "curvature < 0")),
        (WITHOUT_CURVATURE, CURVATURE, CURVATURE.replace("not curvature > 0", "curvature == 0")),
    ],
    ids=label,
)
def test_conjugate_gradient_sees(request, test, old, new):
    test, given = test
    fails_with_a_bug(request, test, "trpo", old, new, **given)


# The steps


def surrogate_gradient(agent, batch):
    """g, from the score of each row."""
    total = 0
    for i in range(len(batch["obs"])):
        score = gradient(
            log_prob(agent, batch["obs"][i : i + 1], batch["actions"][i : i + 1]), policy_parameters(agent)
        )
        total = total + batch["advantages"][i] * score
    return total / len(batch["obs"])


def damped_fisher(agent, obs, damping):
    """F + damping I."""
    matrix = score_fisher(agent, obs)
    return matrix + damping * torch.eye(len(matrix), dtype=torch.float64)


def check_metrics(old, new, batch, metrics):
    """What is logged is true of the step from one agent to another; returns its KL and its gain."""
    ratios = (log_prob(new, batch["obs"], batch["actions"]) - log_prob(old, batch["obs"], batch["actions"])).exp()
    gain = ((ratios - 1) * batch["advantages"]).mean().item()
    divergence = kl(old, new, batch["obs"]).mean().item()
    assert metrics["kl"].item() == pytest.approx(divergence, rel=1e-6)
    assert metrics["surrogate_gain"].item() == pytest.approx(gain, rel=1e-6)
    assert metrics["entropy"].item() == pytest.approx(entropy(old, batch["obs"]).mean().item(), rel=1e-6)
    return divergence, gain


@each([npg])
@each_space
@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_npg_step_is_f_inverse_g(module, space, alpha):
    """A step down the gradient, along g itself, of another length or without damping; metrics that are not its own."""
    agent, args = make_agent(module, space, damping=0.05, cg_iterations=300)
    batch = make_batch(agent)
    start = copy.deepcopy(agent)
    g = surrogate_gradient(agent, batch)
    expected = alpha * torch.linalg.solve(damped_fisher(agent, batch["obs"], 0.05), g)
    metrics = module.natural_gradient_step(agent, batch, alpha, args)
    step = theta(agent) - theta(start)
    assert (step - expected).norm() < 1e-3 * expected.norm()
    assert torch.cosine_similarity(step, g, 0) < 0.9
    divergence, gain = check_metrics(start, agent, batch, metrics)
    assert divergence > 1e-5
    assert gain > 1e-3


DIRECTION_OF_STEP = "conjugate_gradient(fisher, gradient, args.cg_iterations)  # F^-1 g"
KL_OF_STEP = "kl = mean_kl(old, new)"
GAIN = 'gain = surrogate(old, new, batch) - batch["advantages"].mean()'
ENTROPY = "entropy=old.entropy().mean()"


@each_space
@bugs(
    ("npg", "theta + alpha * direction", "theta - alpha * direction"),
    ("npg", "theta + alpha * direction", "theta + alpha * direction / direction.norm()"),
    ("npg", "theta + alpha * direction", "theta + 2 * alpha * direction"),
    ("npg", DIRECTION_OF_STEP, "gradient"),
    ("npg", "args.fisher_stride], args.damping)", "args.fisher_stride], 0.0)"),
    ("npg", KL_OF_STEP, KL_OF_STEP.replace("old, new", "new, old")),
    ("npg", KL_OF_STEP, "kl = alpha**2 * (direction @ gradient) / 2"),
    ("npg", KL_OF_STEP, 'log_ratio = new.log_prob(batch["actions"]) - old.log_prob(batch["actions"]); '
     "kl = (log_ratio.exp() - 1 - log_ratio).mean()"),
    ("npg", GAIN, GAIN.removesuffix(' - batch["advantages"].mean()')),
    ("npg", GAIN, "gain = alpha * (gradient @ direction)"),
    ("npg", ENTROPY, "entropy=new.entropy().mean()"),
    ("npg", ENTROPY, 'entropy=-old.log_prob(batch["actions"]).mean()'),
)  # fmt: skip
def test_npg_step_sees(request, space, name, old, new):
    fails_with_a_bug(request, test_npg_step_is_f_inverse_g, name, old, new, space=space, alpha=1.0)


class Scaled(nn.Module):
    """Observations in another unit."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, obs):
        return obs * self.scale


@each([npg])
def test_npg_step_does_not_depend_on_the_parametrisation(module):
    """Observations scaled by 10: the gradient's step in the probabilities grows by 100, the natural one's does not."""
    moves = []
    for scale in (1.0, 10.0):
        agent, args = make_agent(module, Discrete(2), damping=0.0)
        agent.actor = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
        agent.encoder = Scaled(scale)
        with torch.no_grad():
            agent.actor[0].weight.copy_(torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.4, -0.3]]) / scale)
        torch.manual_seed(5)
        obs = torch.randn(64, 3, dtype=torch.float64)
        actions = torch.randint(2, (64,))
        batch = dict(obs=obs, actions=actions, advantages=2.0 * actions - 1)
        before = agent.actor(scale * obs).softmax(-1).detach()
        module.natural_gradient_step(agent, batch, 0.1, args)
        moves.append(agent.actor(scale * obs).softmax(-1).detach() - before)
    assert moves[0].abs().max() > 1e-3
    torch.testing.assert_close(moves[0], moves[1], atol=1e-6, rtol=1e-4)


@bugs(("npg", DIRECTION_OF_STEP, "gradient"))
def test_steps_in_parameters_are_seen(request, name, old, new):
    fails_with_a_bug(request, test_npg_step_does_not_depend_on_the_parametrisation, name, old, new)


@each([trpo])
@each_space
@pytest.mark.parametrize("target_kl", [1e-6, 1e-2, 0.3])
def test_trpo_step_stays_in_the_trust_region(module, space, target_kl):
    """A KL beyond delta, a surrogate that has fallen, metrics of another step than the one taken."""
    agent, args = make_agent(module, space, target_kl=target_kl, damping=1e-3, cg_iterations=50)
    batch = make_batch(agent)
    start = copy.deepcopy(agent)
    metrics = module.trust_region_step(agent, batch, args)
    divergence, gain = check_metrics(start, agent, batch, metrics)
    assert 0.2 * target_kl < divergence <= target_kl
    assert gain > 0
    if target_kl < 1e-3:  # so short a step is the second-order one
        assert divergence == pytest.approx(target_kl, rel=0.1)
        assert metrics["step_fraction"] == 1
    assert (theta(agent) != theta(start)).double().mean() > 0.9


@each([trpo])
@each_space
def test_trpo_steps_along_f_inverse_g(module, space):
    """Another direction than NPG's, the length without its root or its 2, x^T x for x^T F x."""
    agent, args = make_agent(module, space, target_kl=1e-6, damping=0.05, cg_iterations=300)
    batch = make_batch(agent)
    before = theta(agent)
    damped = damped_fisher(agent, batch["obs"], 0.05)
    x = torch.linalg.solve(damped, surrogate_gradient(agent, batch))
    expected = (2e-6 / (x @ damped @ x)).sqrt() * x
    module.trust_region_step(agent, batch, args)
    assert (theta(agent) - before - expected).norm() < 1e-3 * expected.norm()


def say_curvature_is_small(monkeypatch, module):
    """Fisher matrices 1/25 as large: x is 25 times too long, x^T F x too, and so the step is 5 times too long."""
    fisher_vector_product = module.fisher_vector_product

    def flat_product(agent, obs, damping):
        product = fisher_vector_product(agent, obs, damping)
        return lambda v: product(v) / 25

    monkeypatch.setattr(module, "fisher_vector_product", flat_product)


@each([trpo])
@each_space
def test_line_search_takes_the_first_step_that_will_do(module, monkeypatch, space):
    """A step that is too long taken all the same, or a shorter one than needed."""
    agent, args = make_agent(module, space, target_kl=1e-3, damping=0.01, cg_iterations=50)
    batch = make_batch(agent)
    start = copy.deepcopy(agent)
    say_curvature_is_small(monkeypatch, module)
    metrics = module.trust_region_step(agent, batch, args)
    step = theta(agent) - theta(start)
    fraction = metrics["step_fraction"].item()
    assert fraction in [pytest.approx(0.8**k) for k in (6, 7, 8, 9)]
    divergence, _ = check_metrics(start, agent, batch, metrics)

    def kl_of(length):
        set_theta(agent, theta(start) + length * step)
        return kl(start, agent, batch["obs"]).mean().item()

    assert divergence == pytest.approx(kl_of(1))
    assert divergence <= 1e-3 < kl_of(1 / 0.8)
    assert kl_of(1 / fraction) > 5e-3


@each([trpo])
@each_space
def test_line_search_wants_a_gain(module, monkeypatch, space):
    """A step within the trust region that makes the policy worse, as the downhill direction here does."""
    agent, args = make_agent(module, space, target_kl=1e-3, damping=1e-3, cg_iterations=50)
    batch = make_batch(agent)
    before = theta(agent)
    conjugate_gradient = module.conjugate_gradient
    monkeypatch.setattr(module, "conjugate_gradient", lambda *inputs: -conjugate_gradient(*inputs))
    metrics = module.trust_region_step(agent, batch, args)
    assert torch.equal(theta(agent), before)
    assert metrics["step_fraction"] == 0


LENGTH_OF_STEP = "(2 * args.target_kl / curvature).sqrt() * direction"
ACCEPT = "if kl <= args.target_kl and gain > 0:"
IN_THE_REGION = (test_trpo_step_stays_in_the_trust_region, dict(target_kl=0.3))
ALONG = (test_trpo_steps_along_f_inverse_g, {})
FIRST = (test_line_search_takes_the_first_step_that_will_do, {})
WITH_GAIN = (test_line_search_wants_a_gain, {})


@each_space
@pytest.mark.parametrize(
    ("test", "old", "new"),
    [
        (IN_THE_REGION, KL_OF_STEP, KL_OF_STEP.replace("old, new", "new, old")),
        (IN_THE_REGION, GAIN, GAIN.removesuffix(' - batch["advantages"].mean()')),
        (IN_THE_REGION, ENTROPY, "entropy=new.entropy().mean()"),
        (ALONG, DIRECTION_OF_STEP, "gradient"),
        (ALONG, DIRECTION_OF_STEP, f"-{DIRECTION_OF_STEP}"),
        (ALONG, LENGTH_OF_STEP, LENGTH_OF_STEP.replace("2 * ", "")),
        (ALONG, LENGTH_OF_STEP, LENGTH_OF_STEP.replace(".sqrt()", "")),
        (ALONG, "curvature = direction @ fisher(direction)", "curvature = direction @ direction"),
        (ALONG, "args.fisher_stride], args.damping)", "args.fisher_stride], 0.0)"),
        (FIRST, ACCEPT, ACCEPT.replace("kl <= args.target_kl and ", "")),
        (FIRST, ACCEPT, ACCEPT.replace("<= args.target_kl", "<= args.target_kl / 2")),
        (FIRST, ACCEPT, ACCEPT.replace("<= args.target_kl", "<= args.target_kl * 1.5")),
        (FIRST, "0.8**attempt", "0.5**attempt"),
        (FIRST, "theta + fraction * full_step", "theta + full_step"),
        (WITH_GAIN, ACCEPT, ACCEPT.replace(" and gain > 0", "")),
    ],
    ids=label,
)
def test_trpo_step_sees(request, space, test, old, new):
    test, given = test
    fails_with_a_bug(request, test, "trpo", old, new, space=space, **given)


@each([trpo])
@each_space
@pytest.mark.parametrize("reason", ["kl", "surrogate", "nan", "no gradient"])
def test_rejected_steps_restore_the_weights(module, monkeypatch, space, reason):
    """Weights that differ in the last bit, or that stay at the last attempt, when no length of the step will do."""
    agent, args = make_agent(module, space, line_search_steps=7)
    batch = {name: x.float() if x.is_floating_point() else x for name, x in make_batch(agent).items()}
    agent = agent.float()
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    start = theta(agent)
    attempts = []
    mean_kl = module.mean_kl
    surrogate = module.surrogate

    def no_room(old, new):
        attempts.append(theta(agent))
        excess = dict(kl=1.0, nan=torch.nan).get(reason, 0.0)
        return mean_kl(old, new) + (excess if len(attempts) > 1 else 0)  # the first is that of the Fisher matrix

    def no_gain(old, new, batch):
        return surrogate(old, new, batch) * (-1 if reason == "surrogate" and len(attempts) > 1 else 1)

    monkeypatch.setattr(module, "mean_kl", no_room)
    monkeypatch.setattr(module, "surrogate", no_gain)
    if reason == "no gradient":
        batch["advantages"] *= 0
    metrics = module.trust_region_step(agent, batch, args)
    assert len(attempts) == 8
    assert all(not torch.equal(attempt, start) for attempt in attempts[1:])
    for name, tensor in agent.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name in ("kl", "surrogate_gain", "step_fraction"):
        assert metrics[name].item() == 0
    assert metrics["entropy"].isfinite()


RESTORE = "            copy_to_parameters(theta, parameters)\n            fraction"


@bugs(
    ("trpo", RESTORE, "            fraction"),
    ("trpo", RESTORE, RESTORE.replace("(theta,", "(theta + fraction * full_step - fraction * full_step,")),
    ("trpo", RESTORE, RESTORE.replace("(theta,", "(parameters_to_vector(parameters) - fraction * full_step,")),
    ("trpo", "            kl = torch.zeros(())\n", ""),
    ("trpo", "            gain = torch.zeros(())\n", ""),
    ("trpo", "fraction = 0.0\n", "pass\n"),
)
@pytest.mark.parametrize("reason", ["kl", "nan"])
def test_rejected_steps_see(request, name, old, new, reason):
    given = dict(space=Discrete(4), reason=reason)
    fails_with_a_bug(request, test_rejected_steps_restore_the_weights, name, old, new, **given)


@each_script
@pytest.mark.parametrize("curvature", [-1.0, 0.0, float("nan")])
def test_no_step_without_curvature(module, monkeypatch, curvature):
    """The root of a negative number: NaN in every weight. A direction is given, whose x^T F x cannot be used."""
    agent, args = make_agent(module, Discrete(4))
    batch = make_batch(agent)
    before = theta(agent)
    monkeypatch.setattr(module, "fisher_vector_product", lambda *_: lambda v: curvature * v)
    directions = [module.conjugate_gradient]
    if module is trpo:
        directions.append(lambda product, b, iterations: b)
    for direction in directions:
        monkeypatch.setattr(module, "conjugate_gradient", direction)
        metrics = take_step(module, agent, batch, args)
        assert torch.equal(theta(agent), before)
        assert all(metric.isfinite() for metric in metrics.values())
        assert metrics.get("step_fraction", 0) == 0


@each_script
def test_fisher_matrix_of_every_kth_row(module, monkeypatch):
    """A stride that also thins out the gradient or the line search, or that is not used."""
    agent, args = make_agent(module, Discrete(4), fisher_stride=5)
    batch = make_batch(agent)
    rows = []
    seen = []
    spy(monkeypatch, module, "fisher_vector_product", before=lambda agent, obs, damping: seen.append((obs, damping)))
    spy(monkeypatch, module, "surrogate", before=lambda old, new, batch: rows.append(new.logits.shape[0]))
    take_step(module, agent, batch, args)
    ((obs, damping),) = seen
    assert torch.equal(obs, batch["obs"][::5])
    assert damping == args.damping
    assert len(rows) > 1
    assert set(rows) == {64}


ROWS = 'obs = batch["obs"]\n'


@bugs(
    ("npg", "obs[:: args.fisher_stride]", "obs"),
    ("npg", "obs[:: args.fisher_stride]", "obs[: len(obs) // args.fisher_stride]"),
    ("trpo", ROWS, f"batch = {{name: column[:: args.fisher_stride] for name, column in batch.items()}}\n    {ROWS}"),
)
def test_stride_is_seen(request, name, old, new):
    fails_with_a_bug(request, test_fisher_matrix_of_every_kth_row, name, old, new)


@each_script
@each_space
def test_a_replaced_actor_is_what_moves(module, space):
    """A list of theta's parameters that is made once: the step would move a network that no longer acts."""
    agent, args = make_agent(module, space, cg_iterations=50)
    args.target_kl = 0.1  # a step of TRPO long enough to be seen
    take_step(module, agent, make_batch(agent), args, alpha=0.1)
    replaced = agent.actor
    unmoved = flat(replaced.parameters())
    agent.actor = nn.Sequential(nn.Linear(3, 7), nn.ELU(), nn.Linear(7, replaced[-1].out_features)).double()
    start = copy.deepcopy(agent)
    batch = make_batch(agent)
    metrics = take_step(module, agent, batch, args, alpha=1.0)
    divergence, _ = check_metrics(start, agent, batch, metrics)
    assert divergence > 0.01
    assert torch.equal(flat(replaced.parameters()), unmoved)
    for (name, parameter), old in zip(agent.named_parameters(), start.parameters()):
        assert torch.equal(parameter, old) == name.startswith("critic"), name

    rows = 20_000
    obs = batch["obs"][:1]
    actions = agent.act(obs.expand(rows, 3).numpy())
    output = agent.actor(obs.float().double())[0].detach()  # act() gets observations as the environment has them
    if agent.discrete:
        expected = rows * output.softmax(-1).numpy()
        counts = np.bincount(actions, minlength=4)
        assert (abs(counts - expected) < 5 * np.sqrt(expected) + 1).all()
        before = rows * start.actor(obs)[0].softmax(-1).detach().numpy()
        assert (abs(counts - before) > 10 * np.sqrt(before)).any()
    else:
        std = agent.log_std.exp().detach().numpy()
        assert (abs(actions.mean(0) - output.numpy()) < 5 * std / np.sqrt(rows)).all()
        assert actions.std(0) == pytest.approx(std, rel=0.03)
        before = start.actor(obs)[0].detach().numpy()
        assert (abs(actions.mean(0) - before) > 10 * std / np.sqrt(rows)).any()


LIST = """        return [parameter for name, parameter in self.named_parameters() if not name.startswith("critic.")]"""
LIST_MADE_ONCE = f"""
        if "kept" not in vars(self):
            self.kept = {LIST.split(maxsplit=1)[1]}
        return self.kept
"""


@bugs(("npg", LIST, LIST_MADE_ONCE), ("trpo", LIST, LIST_MADE_ONCE))
def test_a_list_made_once_is_seen(name, old, new, tmp_path):
    module = planted(dict(npg=npg, trpo=trpo)[name], old, new, tmp_path / "planted")
    with pytest.raises((AssertionError, RuntimeError)):  # PyTorch finds no such parameters in the graph
        test_a_replaced_actor_is_what_moves(module, Discrete(4))


# train()


@each_script
@each_space
def test_surrogate_and_value_loss_row_by_row(module, space):
    """(B, 1) against (B,), log-ratios the wrong way round, a factor 1/2 in the value loss."""
    agent, _ = make_agent(module, space)
    batch = make_batch(agent)
    other = copy.deepcopy(agent)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    log_ratios = log_prob(agent, batch["obs"], batch["actions"]) - log_prob(other, batch["obs"], batch["actions"])
    expected = [ratio * advantage for ratio, advantage in zip(log_ratios.exp().tolist(), batch["advantages"].tolist())]
    found = module.surrogate(other(batch["obs"])[0], agent(batch["obs"])[0], batch)
    assert found.item() == pytest.approx(np.mean(expected))

    loss, metrics = module.value_loss(agent, batch)
    values = agent.critic(batch["obs"])[:, 0]
    expected = sum((v - r) ** 2 for v, r in zip(values, batch["returns"])) / 64
    assert loss.item() == metrics["value_loss"].item() == pytest.approx(expected.item())
    critic = list(agent.critic.parameters())
    torch.testing.assert_close(gradient(loss, critic), gradient(expected, critic))


@bugs(
    ("trpo", "(ratio * batch[", "(ratio[:, None] * batch["),
    ("trpo", "(ratio * batch[", "(ratio.detach().log() * batch["),
    ("trpo", "ratio = (new.log_prob(", "ratio = -(new.log_prob("),
    ("trpo", "agent.critic(x).squeeze(-1)\n    loss", "agent.critic(x)\n    loss"),
    ("trpo", 'loss = F.mse_loss(values, batch["returns"])', 'loss = F.mse_loss(values, batch["returns"]) / 2'),
    ("trpo", 'loss = F.mse_loss(values, batch["returns"])', 'loss = F.smooth_l1_loss(values, batch["returns"])'),
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_surrogate_and_value_loss_see(request, name, old, new):
    fails_with_a_bug(request, test_surrogate_and_value_loss_row_by_row, name, old, new, space=Discrete(4))


@each_script
def test_the_policy_moves_once_per_batch_and_first(module, monkeypatch, tmp_path):
    """A policy step after the critic's, or more than one; a log of other steps than those taken."""
    monkeypatch.setattr(envs.Tagged, "instances", [])
    events = []
    starts = []
    moves = []

    def before_step(agent, batch, *_):
        events.append("policy")
        starts.append(copy.deepcopy(agent))

    def after_step(metrics, agent, batch, *_):
        with torch.no_grad():
            x = agent.encoder(batch["obs"])
            moves.append((kl(starts[-1], agent, x).mean().item(), entropy(starts[-1], x).mean().item()))

    spy(monkeypatch, module, learner_name(module), before_step, after_step)
    spy(monkeypatch, module, "descend", before=lambda *_: events.append("critic"))
    given = dict(num_envs=3, num_steps=16, total_timesteps=192, update_epochs=2, num_minibatches=4, norm_obs=True)
    module.train(make_args(module, tmp_path, env_id="test/TaggedBox-v0", **given))
    assert events == (["policy"] + ["critic"] * 8) * 4
    logged = [(line["kl"], line["entropy"]) for line in lines(tmp_path)]
    for found, expected in zip(logged, moves, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert max(moves)[0] > 1e-3


STEP = "history = [natural_gradient_step(agent, batch, policy_step, args)]"


@bugs(
    ("npg", STEP, f"{STEP}\n        history.append(natural_gradient_step(agent, batch, policy_step, args))"),
    ("npg", "history.append(metrics)", "history.append(metrics | dict(kl=torch.zeros(())))"),
)
def test_more_than_a_step_is_seen(request, name, old, new):
    fails_with_a_bug(request, test_the_policy_moves_once_per_batch_and_first, name, old, new)
