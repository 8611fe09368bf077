"""The squashed Gaussian of SAC and its temperature."""

import math

import pytest
import torch
from off_policy import GRID, answer_always, bugs, learn, lines, make_agents, make_batch, resume
from runs import checkpoint, each, fails_with_a_bug

from algos import sac


class Fixed(torch.nn.Module):
    """An actor that answers the same to every observation."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, obs):
        return self.outputs


def sample(module, mean, log_std, noise):
    """Actions and their log-probabilities, of a policy with this mean and deviation."""
    agent, _, _ = make_agents(module)
    agent.actor = Fixed(mean, log_std)
    return agent.sample(None, noise)


@each([sac])
def test_sample(module):
    """Against the Jacobian of tanh by autograd, in double precision; finite where tanh is 1; a density on [-1, 1]."""
    torch.manual_seed(7)
    mean = torch.randn(50, 3).double()
    log_std = torch.randn(50, 3).double() / 4
    noise = torch.randn(50, 3).double()
    actions, log_probs = sample(module, mean, log_std, noise)
    assert log_probs.shape == (50,)
    for i in range(50):
        u = mean[i] + log_std[i].exp() * noise[i]
        jacobian = torch.autograd.functional.jacobian(torch.tanh, u)
        density = torch.distributions.MultivariateNormal(mean[i], torch.diag((2 * log_std[i]).exp())).log_prob(u)
        torch.testing.assert_close(actions[i], u.tanh())
        assert log_probs[i].item() == pytest.approx((density - torch.linalg.slogdet(jacobian)[1]).item(), abs=1e-6)
    for extreme in (-20.0, -8.0, 8.0, 20.0):
        mean = torch.full((2, 1), extreme, requires_grad=True)
        log_std = torch.full((2, 1), -2.0, requires_grad=True)
        log_probs = sample(module, mean, log_std, torch.tensor([[0.5], [-0.5]]))[1]
        slope, other = torch.autograd.grad(log_probs.sum(), [mean, log_std])
        u = extreme + math.exp(-2) * 0.5 * torch.tensor([1.0, -1.0])
        expected = -0.125 + 2 - math.log(2 * math.pi) / 2 - 2 * (math.log(2) - u.abs())  # but for terms of exp(-2|u|)
        torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=1e-5)
        assert slope.tolist() == [[pytest.approx(math.copysign(2, extreme), abs=1e-5)]] * 2
        assert other.isfinite().all()
    for mean, log_std in ((0.0, 0.0), (0.8, -1.5), (-1.2, 0.7)):
        u = torch.linspace(-25, 25, 400_001, dtype=torch.float64)[:, None]
        noise = (u - mean) / math.exp(log_std)
        actions, log_probs = sample(module, torch.tensor(mean), torch.tensor(log_std), noise)
        assert torch.trapezoid(log_probs.exp(), actions[:, 0]).item() == pytest.approx(1, abs=1e-5)


SLOPE = "2 * (math.log(2) - u - F.softplus(-2 * u))"


@bugs(
    ("sac", "(log_density - log_slope)", "log_density"),
    ("sac", "(log_density - log_slope)", "(log_density + log_slope)"),
    ("sac", "(log_density - log_slope).sum(-1)", "(log_density - log_slope).mean(-1)"),
    ("sac", SLOPE, "torch.log(1 - u.tanh().square())"),
    ("sac", SLOPE, "torch.log(1 - u.tanh().square() + 1e-6)"),
    ("sac", SLOPE, SLOPE.removeprefix("2 * ")),
    ("sac", " - log_std - math.log(2 * math.pi) / 2", " - math.log(2 * math.pi) / 2"),
    ("sac", " - math.log(2 * math.pi) / 2", ""),
    ("sac", "-noise.square() / 2", "-u.square() / 2"),
)
def test_sample_sees(request, name, old, new):
    fails_with_a_bug(request, test_sample, name, old, new)


@each([sac])
def test_start_and_bounds(module):
    """A first temperature other than --alpha, or deviations that leave [exp(-20), exp(2)]."""
    agent = module.Agent(GRID, 2, module.Args(alpha=0.2))
    assert agent.log_alpha.exp().item() == pytest.approx(0.2)
    agent = module.Agent(GRID, 2, module.Args())
    assert agent.log_alpha == 0
    with torch.no_grad():
        for log_std, expected in ((50.0, 2.0), (1.9, 1.9), (-19.0, -19.0), (-50.0, -20.0)):
            answer_always(agent.actor, [60.0, -60.0, log_std, log_std])
            mean, found = agent.actor(torch.zeros(1, 10, 10, 3, dtype=torch.bool))
            assert mean.tolist() == [[60, -60]]
            assert found.tolist() == [pytest.approx([expected] * 2)]


@each([sac])
@pytest.mark.parametrize("log_std", [0.0, -2.1, -3.0, -6.0])
def test_temperature_moves_toward_the_target_entropy(module, log_std):
    """alpha falls while the policy is more random than the target entropy -dim(A), and rises while it is less.

    At first the entropy of the two dimensions is about 2 (log_std + 1.42), so the limit is at log_std = -2.42.
    """
    agent, _, args = make_agents(module)
    answer_always(agent.actor, [0.0, 0.0, log_std, log_std])
    entropy = module.actor_loss(agent, make_batch(module, 4096))[1]["entropy"]
    rises = log_std < -2.42
    assert (entropy.item() < -2) == rises
    optimizer = torch.optim.Adam([agent.log_alpha], lr=0.01)
    gradients, metrics = module.gradients_of(module.temperature_loss, [agent.log_alpha], args)(agent, entropy, -2)
    assert list(gradients) == [agent.log_alpha]
    assert gradients[agent.log_alpha].item() == pytest.approx(math.exp(0.3) * (entropy.item() + 2), rel=1e-5)
    assert metrics["alpha"].item() == pytest.approx(math.exp(0.3))
    assert not metrics["alpha"].requires_grad
    module.descend(optimizer, gradients)
    assert agent.log_alpha.item() == pytest.approx(0.31 if rises else 0.29, abs=1e-4)


@bugs(
    ("sac", "alpha * (entropy - target_entropy)", "-alpha * (entropy - target_entropy)"),
    ("sac", "alpha * (entropy - target_entropy)", "alpha * (entropy + target_entropy)"),
    ("sac", "alpha * (entropy - target_entropy)", "alpha * (entropy - target_entropy / 2)"),
    ("sac", "alpha=alpha.detach()", "alpha=agent.log_alpha.detach()"),
)
def test_temperature_sees(request, name, old, new):
    fails_with_a_bug(request, test_temperature_moves_toward_the_target_entropy, name, old, new, log_std=-2.1)


@each([sac])
@pytest.mark.parametrize("learned", [True, False])
def test_the_temperature_is_learned_or_fixed(module, tmp_path, learned):
    """Without --learn-alpha it stays what --alpha says, to the bit, and is no news for the log."""
    learn(module, tmp_path, alpha=0.2, learn_alpha=learned)
    start = torch.tensor(0.2).log()
    assert (checkpoint(tmp_path / "run")["agent"]["log_alpha"] != start) == learned
    assert all(("alpha" in line) == learned for line in lines(tmp_path))


@each([sac])
def test_a_fixed_temperature_of_a_resumed_run(module, tmp_path):
    """The flag of today counts, not what the checkpoint holds; a learned temperature goes on from there."""
    learn(module, tmp_path, alpha=0.2, learn_alpha=False)
    resume(module, tmp_path, alpha=0.05, learn_alpha=False)
    assert checkpoint(tmp_path / "run")["agent"]["log_alpha"] == torch.tensor(0.05).log()
    learn(module, tmp_path / "learned", alpha=0.2)
    before = checkpoint(tmp_path / "learned" / "run")["agent"]["log_alpha"]
    resume(module, tmp_path / "learned", alpha=0.05, total_timesteps=300)
    assert checkpoint(tmp_path / "learned" / "run")["agent"]["log_alpha"] == before


@bugs(("sac", "if not args.learn_alpha:", "if False:"), ("sac", "if not args.learn_alpha:", "if True:"))
def test_a_fixed_temperature_of_a_resumed_run_sees(request, name, old, new):
    fails_with_a_bug(request, test_a_fixed_temperature_of_a_resumed_run, name, old, new)


@bugs(("sac", "if args.learn_alpha:", "if True:"), ("sac", "if args.learn_alpha:", "if not args.learn_alpha:"))
def test_the_fixed_temperature_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_temperature_is_learned_or_fixed, name, old, new, learned=False)
