"""Noisy layers and Noisy DQN: the distribution of the noise, what it does to Q, and where it is drawn anew."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import MODULES, spy
from off_policy import FRAMES, GRID, VECTOR, bugs, flat, gradient, learn, lines, make_batch
from runs import each, fails_with_a_bug

from algos import noisy_dqn

each_noisy = each([module for module in MODULES if hasattr(module, "NoisyLinear")])
ours = each([noisy_dqn])
C = math.sqrt(2 / math.pi)  # E f(e)^2 = E |e|
F_OF = "x.sign() * x.abs().sqrt()"
OUTER = "torch.outer(f_out, f_in)"


def make_agent(module, obs_space=VECTOR, **given):
    """An agent for 3 actions whose noise is about as large as its weights and differs from weight to weight."""
    args = module.Args(**dict(hidden_size=6) | given)
    agent = module.Agent(obs_space, 3, args)
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if "sigma" in name:
                parameter.copy_(torch.randn_like(parameter) / 2)
    return agent, args


def noisy_layers(module, agent) -> list:
    """The noisy layers in their order."""
    return [layer for layer in agent.modules() if isinstance(layer, module.NoisyLinear)]


def by_hand(layer, x, noise):
    """The output of a noisy layer for one input, weight by weight."""
    f_in, f_out = (e.abs().sqrt().copysign(e) for e in noise)
    outputs = []
    for i in range(len(f_out)):
        y = layer.mu.bias[i] + layer.sigma_bias[i] * f_out[i]
        for j in range(len(f_in)):
            y = y + (layer.mu.weight[i, j] + layer.sigma_weight[i, j] * f_out[i] * f_in[j]) * x[j]
        outputs.append(y)
    return torch.stack(outputs)


def q_by_hand(module, agent, x, noise):
    """Q of one observation by one network, layer by layer."""
    x = agent.encoder(x[None])[0]
    for number, layer in enumerate(noisy_layers(module, agent)):
        x = by_hand(layer, x if number == 0 else x.clamp(min=0), noise[number])
    return x


def silent(agent):
    """No noise, as noise."""
    return [(0 * e_in, 0 * e_out) for e_in, e_out in agent.draw_noise()]


# A layer


@each_noisy
def test_distribution_of_the_noise(module):
    """Noise that is not normal, all of one sign, or of another variance; one draw for both ends of the layer."""
    layer = module.NoisyLinear(300, 300, 0.5)
    pairs = [layer.draw_noise() for _ in range(400)]
    ends = torch.stack([torch.stack(pair) for pair in pairs])  # (400, 2, 300)
    assert not ends.requires_grad
    for e in ends.unbind(1):
        assert e.mean().item() == pytest.approx(0, abs=0.015)
        assert e.square().mean().item() == pytest.approx(1, abs=0.02)
        assert (e**4).mean().item() == pytest.approx(3, abs=0.2)
        assert e.abs().mean().item() == pytest.approx(C, abs=0.01)
    assert len(ends.unique()) > 0.98 * ends.numel()
    assert abs((ends[:, 0] * ends[:, 1]).mean()) < 0.015
    assert abs((ends[1:] * ends[:-1]).mean()) < 0.015


@bugs(
    ("noisy_dqn", "e_out = torch.randn_like(self.mu.bias)", "e_out = e_in"),
    ("noisy_dqn", "torch.randn_like(self.mu.weight[0])", "torch.rand_like(self.mu.weight[0])"),
    ("noisy_dqn", "torch.randn_like(self.mu.bias)", "torch.randn(1).expand_as(self.mu.bias)"),
)
def test_distribution_sees(request, name, old, new):
    fails_with_a_bug(request, test_distribution_of_the_noise, name, old, new)


@each_noisy
def test_a_layer_by_hand(module):
    """Noise of the inputs for the outputs, biases without noise, a sigma that is not learned; rows mixed up."""
    layer = module.NoisyLinear(4, 4, 0.5)
    with torch.no_grad():
        layer.sigma_weight.copy_(torch.randn(4, 4))
        layer.sigma_bias.copy_(torch.randn(4))
    noise = layer.draw_noise()
    x = torch.randn(5, 4)
    expected = torch.stack([by_hand(layer, row, noise) for row in x])
    torch.testing.assert_close(layer(x, noise), expected)
    found = gradient(layer(x, noise).square().sum(), layer.parameters())
    torch.testing.assert_close(found, gradient(expected.square().sum(), layer.parameters()), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer(x, None), x @ layer.mu.weight.T + layer.mu.bias)


@bugs(
    ("noisy_dqn", F_OF, "x"),
    ("noisy_dqn", F_OF, "x.abs().sqrt()"),
    ("noisy_dqn", F_OF, "x.sign() * x.square()"),
    ("noisy_dqn", "f_out = signed_sqrt(e_out)", "f_out = e_out"),
    ("noisy_dqn", OUTER, "torch.outer(f_in, f_out)"),
    ("noisy_dqn", OUTER, "torch.randn_like(self.sigma_weight)"),
    ("noisy_dqn", "self.sigma_weight * torch", "self.sigma_weight.abs() * torch"),
    ("noisy_dqn", "self.mu.bias + self.sigma_bias * f_out", "self.mu.bias"),
    ("noisy_dqn", "self.sigma_bias * f_out", "self.sigma_bias * f_in"),
)
def test_a_layer_sees(request, name, old, new):
    fails_with_a_bug(request, test_a_layer_by_hand, name, old, new)


def outputs(layer, x, count):
    """What the layer gives for the inputs x in so many independent draws (count, rows, outputs)."""
    with torch.no_grad():
        return torch.stack([layer(x, layer.draw_noise()) for _ in range(count)])


@each_noisy
def test_moments_of_the_outputs(module):
    """E y = mu_w x + mu_b and Var y_i = c (sum_j c sigma_ij^2 x_j^2 + sigma_i^2) with c = E f(e)^2 = sqrt(2 / pi)."""
    layer = module.NoisyLinear(7, 5, 0.5)
    with torch.no_grad():
        layer.sigma_weight.copy_(torch.rand(5, 7) + 0.5)
        layer.sigma_bias.copy_(torch.rand(5) + 0.5)
    x = torch.randn(3, 7)
    y = outputs(layer, x, 8000)
    variance = C * (C * x.square() @ layer.sigma_weight.square().T + layer.sigma_bias.square())
    assert y.var(0).numpy() == pytest.approx(variance.detach().numpy(), rel=0.1)
    error = (y.mean(0) - layer(x, None)) / (variance / 8000).sqrt()
    assert error.abs().max() < 4


@bugs(
    ("noisy_dqn", F_OF, "x"),
    ("noisy_dqn", "self.sigma_bias * f_out", "self.sigma_bias"),
    ("noisy_dqn", "self.sigma_weight * torch", "self.sigma_weight**2 * torch"),
)
def test_moments_see(request, name, old, new):
    fails_with_a_bug(request, test_moments_of_the_outputs, name, old, new)


@each_noisy
def test_the_noise_is_factorised(module):
    """Squares of two weights of one input or output correlate with (2 / pi) / (1 + 2 / pi) = 0.39, others do not."""
    layer = module.NoisyLinear(3, 3, 0.5)
    with torch.no_grad():
        for parameter in (layer.mu.weight, layer.mu.bias, layer.sigma_bias):
            parameter.zero_()
    squares = outputs(layer, torch.eye(3), 8000).square()  # (8000, inputs, outputs)
    found = np.corrcoef(squares.flatten(1).T.numpy()).reshape(3, 3, 3, 3)
    for j, i, k, m in np.ndindex(found.shape):
        shared = (j == k) + (i == m)
        assert found[j, i, k, m] == pytest.approx([0, 0.389, 1][shared], abs=0.08)


@bugs(
    ("noisy_dqn", OUTER, "torch.randn_like(self.sigma_weight)"),
    ("noisy_dqn", OUTER, f"signed_sqrt({OUTER}).mul(torch.randn_like(self.sigma_weight))"),
    ("noisy_dqn", OUTER, "f_in.expand_as(self.sigma_weight)"),
)
def test_factorisation_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_noise_is_factorised, name, old, new)


@each_noisy
@pytest.mark.parametrize("sigma_0", [0.5, 0.2])
def test_initial_values(module, sigma_0):
    """mu ~ U(-1 / sqrt p, 1 / sqrt p) and sigma = sigma_0 / sqrt p with p inputs, for weights and biases."""
    layer = module.NoisyLinear(100, 2000, sigma_0)
    for mu in (layer.mu.weight, layer.mu.bias):
        assert np.sort(mu.detach().flatten().numpy()) == pytest.approx(np.linspace(-0.1, 0.1, mu.numel()), abs=0.012)
    assert layer.sigma_weight.shape == (2000, 100)
    assert layer.sigma_bias.shape == (2000,)
    for sigma in (layer.sigma_weight, layer.sigma_bias):
        assert sigma.detach().numpy() == pytest.approx(sigma_0 / 10)


@bugs(
    ("noisy_dqn", "sigma = sigma_0 / n_in**0.5", "sigma = sigma_0"),
    ("noisy_dqn", "sigma = sigma_0 / n_in**0.5", "sigma = 0.017"),
    ("noisy_dqn", "sigma = sigma_0 / n_in**0.5", "sigma = 0.5 / n_in**0.5"),
    ("noisy_dqn", "torch.full((n_out,), sigma)", "torch.full((n_out,), sigma_0 / n_out**0.5)"),
    ("noisy_dqn", "        sigma = ", "        nn.init.xavier_normal_(self.mu.weight)\n        sigma = "),
    ("noisy_dqn", "        sigma = ", "        nn.init.zeros_(self.mu.bias)\n        sigma = "),
)
def test_initial_values_see(request, name, old, new):
    fails_with_a_bug(request, test_initial_values, name, old, new, sigma_0=0.2)


@each_noisy
def test_sigma_0_reaches_every_layer(module):
    """A network with the noise of another sigma_0 than that of the flag."""
    agent = module.Agent(VECTOR, 3, module.Args(hidden_size=16, sigma_0=0.2))
    for layer in noisy_layers(module, agent):
        assert layer.sigma_weight.detach().numpy() == pytest.approx(0.2 / 4)


@bugs(
    ("noisy_dqn", "nn.ReLU, args.sigma_0)", "nn.ReLU, args.sigma_0 / 2)"),
    ("rainbow", "args.sigma_0) if args.noisy", "args.sigma_0 / 2) if args.noisy"),
)
def test_sigma_0_sees(request, name, old, new):
    fails_with_a_bug(request, test_sigma_0_reaches_every_layer, name, old, new)


@each_noisy
def test_useless_noise_is_unlearned(module):
    """Where the output should be a constant, the squared error is least without noise: sigma falls to 0."""
    layer = module.NoisyLinear(3, 2, 0.5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        (layer(torch.ones(1, 3), layer.draw_noise()) - 1).square().sum().backward()
        optimizer.step()
    assert layer.sigma_weight.abs().max() < 0.05
    assert layer.sigma_bias.abs().max() < 0.05


@bugs(
    ("noisy_dqn", "self.sigma_weight * torch", "self.sigma_weight.detach() * torch"),
    ("noisy_dqn", "self.sigma_bias * f_out", "self.sigma_bias.detach() * f_out"),
    (
        "noisy_dqn",
        "self.sigma_bias = nn.Parameter(torch.full((n_out,), sigma))",
        "self.sigma_bias = torch.tensor(sigma)",
    ),
)
def test_unlearning_sees(request, name, old, new):
    fails_with_a_bug(request, test_useless_noise_is_unlearned, name, old, new)


# The network


@ours
def test_q_by_hand(module):
    """Noise of another layer, a layer without noise, an activation behind the last layer or missing between two."""
    agent, _ = make_agent(module)
    layers = noisy_layers(module, agent)
    assert [(layer.mu.in_features, layer.mu.out_features) for layer in layers] == [(6, 6), (6, 3)]
    plain = [layer for layer in agent.encoder.modules() if isinstance(layer, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in plain] == [(5, 6)]
    obs = torch.randn(4, 5)
    noise = agent.draw_noise()
    assert [(len(e_in), len(e_out)) for e_in, e_out in noise] == [(6, 6), (6, 3)]
    expected = torch.stack([q_by_hand(module, agent, row, noise) for row in obs])
    torch.testing.assert_close(agent(obs, noise), expected, atol=1e-5, rtol=1e-4)
    means = torch.stack([q_by_hand(module, agent, row, silent(agent)) for row in obs])
    torch.testing.assert_close(agent(obs), means, atol=1e-5, rtol=1e-4)
    assert (expected - means).abs().min() > 1e-3


@bugs(
    ("noisy_dqn", "if i > 0:", "if i > 1:"),
    ("noisy_dqn", "None if noise is None else noise[i]", "None if noise is None or i == 0 else noise[i]"),
    ("noisy_dqn", "self.q(self.encoder(obs), noise)", "self.q(self.encoder(obs), None)"),
    ("noisy_dqn", "self.q(self.encoder(obs), noise)", "self.q(self.encoder(obs), noise or self.draw_noise())"),
)
def test_q_sees(request, name, old, new):
    fails_with_a_bug(request, test_q_by_hand, name, old, new)


@ours
def test_networks_for_images(module):
    """A layer behind the CNN that is not noisy."""
    for space, width in ((FRAMES, 512), (GRID, 128)):
        agent, _ = make_agent(module, space)
        layers = noisy_layers(module, agent)
        assert [(layer.mu.in_features, layer.mu.out_features) for layer in layers] == [(width, 6), (6, 3)]
        obs = torch.from_numpy(np.stack([space.sample() for _ in range(3)]))
        noise = agent.draw_noise()
        expected = torch.stack([q_by_hand(module, agent, x, noise) for x in obs])
        torch.testing.assert_close(agent(obs, noise), expected, atol=1e-4, rtol=1e-4)


@ours
def test_noise_follows_the_network(module):
    """Noise in a number format of its own, or of the layers that the agent once had."""
    agent, args = make_agent(module)
    agent.q = module.NoisyMLP([6, 4, 4, 4, 3], torch.nn.Tanh, args.sigma_0)
    agent.double()
    noise = agent.draw_noise()
    assert [(len(e_in), len(e_out)) for e_in, e_out in noise] == [(6, 4), (4, 4), (4, 4), (4, 3)]
    assert {f.dtype for pair in noise for f in pair} == {torch.float64}
    assert agent(torch.randn(2, 5), noise).dtype == torch.float64


@ours
def test_mean_sigma(module, monkeypatch, tmp_path):
    """The noise that the log says is left: of one layer, with the biases, or before the absolute value."""
    agent, _ = make_agent(module)
    sigmas = flat(layer.sigma_weight for layer in noisy_layers(module, agent)).abs()
    assert agent.mean_sigma() == pytest.approx(sigmas.mean().item(), rel=1e-5)
    last = []
    spy(monkeypatch, module, "evaluate", before=lambda agent, *_: last.append(agent.mean_sigma()))
    learn(module, tmp_path)
    assert lines(tmp_path)[-1]["mean_sigma"] == last[0]


@bugs(
    ("noisy_dqn", ".abs().mean().item()", ".mean().item()"),
    ("noisy_dqn", "for layer in layers]).abs()", "for layer in layers[-1:]]).abs()"),
)
def test_mean_sigma_sees(request, name, old, new):
    fails_with_a_bug(request, test_mean_sigma, name, old, new)


# The loss


@ours
def test_loss_and_gradient_against_a_loop(module):
    """One draw for both networks, a target or an online network without noise, a gradient through the target."""
    agent, args = make_agent(module, gamma=0.8)
    target, _ = make_agent(module)
    batch = make_batch(module, rows=20)
    noise = agent.draw_noise()
    target_noise = target.draw_noise()
    loss, metrics = module.critic_loss(agent, target, batch, noise, target_noise, args)
    errors = []
    for i in range(20):
        y = batch["rewards"][i]
        if not batch["terminated"][i]:
            y = y + 0.8 * max(q_by_hand(module, target, batch["next_obs"][i], target_noise).tolist())
        errors.append(q_by_hand(module, agent, batch["obs"][i], noise)[batch["actions"][i]] - y)
    expected = torch.stack(errors).square().mean()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    found = gradient(loss, agent.parameters())
    torch.testing.assert_close(found, gradient(expected, agent.parameters()), atol=1e-4, rtol=1e-3)
    assert metrics["critic_loss"].item() == loss.item()
    assert not any(metric.requires_grad for metric in metrics.values())
    both = module.critic_loss(agent, agent, batch, noise, target_noise, args)[0]  # the target is a constant, whoever
    alone = module.critic_loss(agent, copy.deepcopy(agent), batch, noise, target_noise, args)[0]  # made it
    torch.testing.assert_close(gradient(both, agent.parameters()), gradient(alone, agent.parameters()))


@bugs(
    ("noisy_dqn", 'target(batch["next_obs"], target_noise)', 'target(batch["next_obs"])'),
    ("noisy_dqn", 'target(batch["next_obs"], target_noise)', 'target(batch["next_obs"], noise)'),
    ("noisy_dqn", 'target(batch["next_obs"], target_noise)', 'agent(batch["next_obs"], target_noise)'),
    ("noisy_dqn", "    with torch.no_grad():\n        next_values", "    if True:\n        next_values"),
    ("noisy_dqn", 'agent(batch["obs"], noise)', 'agent(batch["obs"], target_noise)'),
    ("noisy_dqn", "gamma * ~terminated * next_values", "gamma * next_values"),
)
def test_loss_sees(request, name, old, new):
    fails_with_a_bug(request, test_loss_and_gradient_against_a_loop, name, old, new)


# The draws


@ours
def test_action_frequencies(module):
    """Actions by the means, by noise that stays, or by epsilon: each is as frequent as it is best in noisy networks."""
    agent, _ = make_agent(module)
    obs = torch.randn(1, 5)
    with torch.no_grad():
        best = [agent(obs, agent.draw_noise()).argmax().item() for _ in range(2000)]
    chosen = [agent.act(obs.numpy()).item() for _ in range(2000)]
    expected = np.bincount(best, minlength=3)
    found = np.bincount(chosen, minlength=3)
    assert expected.max() < 1900
    assert (abs(found - expected) <= 4 * np.sqrt(found + expected + 1)).all()


@bugs(
    ("noisy_dqn", "noise = None if greedy else self.draw_noise()", "noise = None"),
    ("noisy_dqn", "values.argmax(-1)", "values.argmin(-1)"),
)
def test_action_frequencies_see(request, name, old, new):
    fails_with_a_bug(request, test_action_frequencies, name, old, new)


def watch(module, monkeypatch, folder, **given):
    """The noise by the purpose that it is used for in a short run, in the order of use; and that of the evaluation."""
    used = dict(acting=[], online=[], target=[], evaluation=[])
    state = dict(in_loss=False, trained=False)

    def note(agent, obs, noise=None):
        if state["trained"]:
            used["evaluation"].append(noise)
        elif torch.is_grad_enabled():
            used["online"].append(noise)
        else:
            used["target" if state["in_loss"] else "acting"].append(noise)

    with monkeypatch.context() as patch:
        spy(patch, module.Agent, "forward", before=note)
        spy(patch, module, "critic_loss", lambda *_: state.update(in_loss=True), lambda *_: state.update(in_loss=False))
        spy(patch, module, "evaluate", before=lambda *_: state.update(trained=True))
        learn(module, folder, **given)
    return used


@ours
def test_each_purpose_draws_anew(module, monkeypatch, tmp_path):
    """Noise that is kept from action to action, also before learning starts, or from one gradient step to the next.

    Also one draw that acts, learns and makes targets at once, and noise in the evaluation.
    """
    used = watch(module, monkeypatch, tmp_path)
    assert len(used["acting"]) == 100  # 300 steps of 3 environments
    assert len(used["online"]) == len(used["target"]) == 270
    assert used["evaluation"]
    assert all(noise is None for noise in used["evaluation"])
    draws = [noise for name in ("acting", "online", "target") for noise in used[name]]
    assert all(noise is not None for noise in draws)
    numbers = torch.stack([flat(f for pair in noise for f in pair) for noise in draws])
    assert len(numbers.unique()) > 0.98 * numbers.numel()


DRAW = "noise = None if greedy else self.draw_noise()"
NOISE = "                noise = agent.draw_noise()\n"


@bugs(
    ("noisy_dqn", DRAW, "self.kept = getattr(self, 'kept', None) or self.draw_noise(); noise = self.kept"),
    ("noisy_dqn", DRAW, "noise = self.draw_noise()"),
    ("noisy_dqn", "action = agent.act(obs)", "action = agent.act(obs, greedy=step <= args.learning_starts)"),
    ("noisy_dqn", "target_noise = target.draw_noise()", "target_noise = noise"),
    ("noisy_dqn", "target_noise = target.draw_noise()", "target_noise = None"),
    ("noisy_dqn", "target_noise = target.draw_noise()", "target_noise = target_noise if history else noise"),
    ("noisy_dqn", NOISE, "                noise = noise if history else agent.draw_noise()\n"),
)
def test_draws_see(request, name, old, new):
    fails_with_a_bug(request, test_each_purpose_draws_anew, name, old, new)
