"""The equations of DDPG, TD3 and SAC against slow references, and each known bug planted and seen."""

import copy
import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete
from off_policy import (
    FRAMES,
    GRID,
    answer_always,
    bugs,
    critic_parameters,
    critics,
    each_continuous,
    flat,
    gradient,
    has_noise,
    make_agents,
    make_batch,
)
from runs import fails_with_a_bug

# The critics


def slow_log_prob(mean, log_std, u):
    """log pi (B,) of tanh(u), by the change of variables as it is written in the paper, in double precision."""
    mean = mean.double()
    u = u.double()
    density = torch.distributions.Normal(mean, log_std.double().exp()).log_prob(u)
    return (density - torch.log1p(-u.tanh().square())).sum(-1)


@torch.no_grad()
def slow_target(agent, target, row, args) -> float:
    """y of a batch of one row."""
    bonus = 0.0
    if hasattr(agent, "log_alpha"):
        mean, log_std = agent.actor(row["next_obs"])
        u = mean + log_std.exp() * row["next_noise"]
        action = u.tanh()
        bonus = -(agent.log_alpha.exp() * slow_log_prob(mean, log_std, u)).item()
    else:
        action = target.actor(row["next_obs"])
    if hasattr(args, "policy_noise"):
        for d, noise in enumerate(row["noise"][0].tolist()):
            noise = max(-args.noise_clip, min(args.noise_clip, args.policy_noise * noise))
            action[0, d] = max(-1, min(1, action[0, d].item() + noise))
    value = min(critic(row["next_obs"], action).item() for critic in critics(target)) + bonus
    return row["rewards"].item() + (0 if row["terminated"] else args.gamma * value)


def slow_critic_loss(agent, target, batch, args):
    """The loss row by row."""
    total = 0.0
    for i in range(len(batch["obs"])):
        row = {name: column[i : i + 1] for name, column in batch.items()}
        y = slow_target(agent, target, row, args)
        total += sum((critic(row["obs"], row["actions"])[0] - y) ** 2 for critic in critics(agent))
    return total / len(batch["obs"])


@each_continuous
def test_critic_loss_and_gradient_against_a_loop(module):
    """(B, 1) against (B,), networks mixed up, noise shared or unclipped, the larger critic, a lost entropy term."""
    torch.manual_seed(4)
    given = dict(policy_noise=0.5, noise_clip=0.3) if hasattr(module.Args, "policy_noise") else {}
    agent, target, args = make_agents(module, gamma=0.8, **given)
    batch = make_batch(module)
    parameters = critic_parameters(agent)
    loss, metrics = module.critic_loss(agent, target, batch, args)
    expected = slow_critic_loss(agent, target, batch, args)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradient(loss, parameters), gradient(expected, parameters), atol=1e-4, rtol=1e-3)
    assert metrics["critic_loss"].item() == loss.item()
    values = critics(agent)[0](batch["obs"], batch["actions"])
    assert metrics["q_value"].item() == pytest.approx(values.mean().item(), abs=1e-5)
    assert not any(metric.requires_grad for metric in metrics.values())

    both = module.critic_loss(agent, agent, batch, args)[0]  # the target is a constant, whoever made it
    alone = module.critic_loss(agent, copy.deepcopy(agent), batch, args)[0]
    torch.testing.assert_close(gradient(both, parameters), gradient(alone, parameters))
    others = [parameter for name, parameter in agent.named_parameters() if not name.startswith("critic")]
    both = module.critic_loss(agent, agent, batch, args)[0]
    assert set(torch.autograd.grad(both, others, allow_unused=True)) == {None}
    order = torch.randperm(64)
    shuffled = module.critic_loss(agent, target, {name: column[order] for name, column in batch.items()}, args)[0]
    assert shuffled.item() == pytest.approx(loss.item(), rel=1e-4)


NEXT = 'target.critic(batch["next_obs"], target.actor(batch["next_obs"]))'
NOISE = 'args.policy_noise * batch["noise"]'
SMALLER = "next_values = torch.min(next_q1, next_q2)"
BOTH = "F.mse_loss(q1, y) + F.mse_loss(q2, y)"
ENTROPY = "next_values = torch.min(next_q1, next_q2) - agent.log_alpha.exp() * log_probs"
SAMPLE = 'agent.sample(batch["next_obs"], batch["next_noise"])'


@bugs(
    ("ddpg", "    with torch.no_grad():\n        next_values", "    if True:\n        next_values"),
    ("ddpg", NEXT, NEXT.replace("target.actor", "agent.actor")),
    ("ddpg", NEXT, NEXT.replace("target.critic", "agent.critic")),
    ("ddpg", NEXT, NEXT.replace('critic(batch["next_obs"]', 'critic(batch["obs"]')),
    ("ddpg", NEXT, NEXT.replace('actor(batch["next_obs"]', 'actor(batch["obs"]')),
    ("ddpg", NEXT, 'target.critic(batch["next_obs"], batch["actions"])'),
    ("ddpg", "actions], -1)).squeeze(-1)", "actions], -1))"),
    ("ddpg", "F.mse_loss(q, y)", "F.smooth_l1_loss(q, y)"),
    ("td3", SMALLER, "next_values = torch.max(next_q1, next_q2)"),
    ("td3", SMALLER, "next_values = (next_q1 + next_q2) / 2"),
    ("td3", SMALLER, "next_values = next_q1"),
    ("td3", NOISE, f"{NOISE}[:1]"),
    ("td3", NOISE, f"{NOISE}[:, :1]"),
    ("td3", NOISE, 'batch["noise"]'),
    ("td3", ".clamp(-args.noise_clip, args.noise_clip)", ""),
    ("td3", " + noise).clamp(-1, 1)", " + noise)"),
    ("td3", "target.actor(", "agent.actor("),
    ("td3", "target.critic1(", "agent.critic1("),
    ("td3", "target.critic2(", "target.critic1("),
    ("td3", BOTH, f"({BOTH}) / 2"),
    ("td3", BOTH, "F.mse_loss(q1, y) + F.mse_loss(q2, q1)"),
    ("sac", ENTROPY, "next_values = torch.min(next_q1, next_q2)"),
    ("sac", ENTROPY, ENTROPY.replace("- agent", "+ agent")),
    ("sac", ENTROPY, ENTROPY.replace("log_alpha.exp()", "log_alpha")),
    ("sac", ENTROPY, ENTROPY.replace("torch.min(next_q1, next_q2)", "(next_q1 + next_q2) / 2")),
    ("sac", "target.critic1(", "agent.critic1("),
    ("sac", SAMPLE, SAMPLE.replace("next_obs", "obs")),
    ("sac", SAMPLE, SAMPLE.replace("next_noise", "noise")),
    ("sac", SAMPLE, SAMPLE.replace("agent", "target")),
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_critic_loss_sees(request, name, old, new):
    fails_with_a_bug(request, test_critic_loss_and_gradient_against_a_loop, name, old, new)


# The actors


class Quadratic(torch.nn.Module):
    """Q(s, a) = -|a - optimum|^2 (B,), with a parameter that no actor's step may touch."""

    def __init__(self, *optimum):
        super().__init__()
        self.optimum = torch.nn.Parameter(torch.tensor(optimum))

    def forward(self, obs, actions):
        return -(actions - self.optimum).square().sum(-1)


@each_continuous
def test_actor_gradient_on_a_quadratic(module):
    """A wrong sign, the wrong critic, actions from the buffer, a temperature that pushes or is pushed.

    The gradient is dQ/da at the policy's own actions, chained with its Jacobian.
    """
    torch.manual_seed(5)
    agent, _, args = make_agents(module)
    batch = make_batch(module)
    first = Quadratic(0.3, -0.6)
    second = Quadratic(-0.9, 0.9)
    if hasattr(agent, "critic"):
        agent.critic = first
    else:
        agent.critic1 = first
        agent.critic2 = second
    parameters = list(agent.actor.parameters())
    if has_noise(module):
        mean, log_std = agent.actor(batch["obs"])
        u = mean + log_std.exp() * batch["noise"]
        values = torch.stack([first(None, u.tanh()), second(None, u.tanh())])
        log_probs = slow_log_prob(mean, log_std, u)
        assert 5 < (values[0] < values[1]).sum() < 59  # each is the smaller one somewhere
        expected_loss = sum(math.exp(0.3) * log_probs[i] - min(values[:, i]) for i in range(64)) / 64
        expected = gradient(expected_loss, parameters).float()
    else:
        actions = agent.actor(batch["obs"])
        expected_loss = -first(None, actions).mean()
        slope = -2 * (actions.detach() - first.optimum.detach())  # dQ/da
        expected = flat(torch.autograd.grad(actions, parameters, grad_outputs=-slope / 64))

    touched = set()
    for name, parameter in agent.named_parameters():
        parameter.register_hook(lambda _, name=name: touched.add(name.split(".")[0]))
    gradients, metrics = module.gradients_of(module.actor_loss, parameters, args)(agent, batch)
    assert touched == {"actor"}  # a gradient of the critic would be computed for nothing
    assert list(gradients) == parameters
    torch.testing.assert_close(flat(gradients.values()), expected, atol=1e-4, rtol=1e-3)
    assert metrics["actor_loss"].item() == pytest.approx(expected_loss.item(), rel=1e-4)
    assert not any(metric.requires_grad for metric in metrics.values())
    assert all(parameter.grad is None for parameter in agent.parameters())  # or the next step would take it along
    if has_noise(module):
        assert metrics["entropy"].item() == pytest.approx(-log_probs.mean().item(), rel=1e-4)
        others = torch.autograd.grad(module.actor_loss(agent, batch)[0], [agent.log_alpha], allow_unused=True)
        assert others == (None,)


OWN = 'agent.critic(batch["obs"], agent.actor(batch["obs"]))'
SOFT = "(agent.log_alpha.exp().detach() * log_probs - torch.min(q1, q2)).mean()"


@bugs(
    ("ddpg", "torch.autograd.grad(value, parameters)", "(value.backward(), [p.grad for p in parameters])[1]"),
    ("ddpg", f"-{OWN}", OWN),
    ("ddpg", OWN, 'agent.critic(batch["obs"], agent.actor(batch["next_obs"]))'),
    ("ddpg", OWN, 'agent.critic(batch["obs"], 2 * agent.actor(batch["obs"]))'),
    ("td3", 'agent.critic1(batch["obs"], agent.actor', 'agent.critic2(batch["obs"], agent.actor'),
    ("td3", '-agent.critic1(batch["obs"], agent.actor', 'agent.critic1(batch["obs"], agent.actor'),
    ("sac", SOFT, SOFT.replace("- torch", "+ torch")),
    ("sac", SOFT, SOFT.replace("(agent", "(-agent")),
    ("sac", SOFT, SOFT.replace(".detach()", "")),
    ("sac", SOFT, "(0 * log_probs - torch.min(q1, q2)).mean()"),
    ("sac", SOFT, SOFT.replace("torch.min(q1, q2)", "(q1 + q2) / 2")),
    ("sac", SOFT, SOFT.replace("torch.min(q1, q2)", "q1")),
    ("sac", "entropy=-log_probs.detach().mean()", "entropy=log_probs.detach().mean()"),
    ("sac", "entropy=-log_probs.detach().mean()", "entropy=-log_probs.mean()"),
    ("sac", 'agent.sample(batch["obs"], batch["noise"])', 'agent.sample(batch["obs"], batch["next_noise"])'),
)
def test_actor_gradient_sees(request, name, old, new):
    fails_with_a_bug(request, test_actor_gradient_on_a_quadratic, name, old, new)


# The targets


@each_continuous
@pytest.mark.parametrize("tau", [0.0, 0.005, 0.3, 1.0])
def test_targets_approach_geometrically(module, tau):
    """theta'_k = theta + (1 - tau)^k (theta'_0 - theta) while theta stands still; buffers are copied.

    Found: targets that jump, stand still, go the other way or move the networks; running means left behind.
    """
    agent, target, _ = make_agents(module)
    for network in (agent, target):
        network.norm = torch.nn.BatchNorm1d(5)
        network.norm(torch.randn(9, 5) + len(flat(network.parameters())))
    target.norm(torch.randn(9, 5))
    start = flat(target.parameters())
    end = flat(agent.parameters())
    buffers = flat(agent.buffers())
    assert not torch.equal(buffers, flat(target.buffers()))
    for k in range(1, 6):
        module.polyak_update(target, agent, tau)
        torch.testing.assert_close(
            flat(target.parameters()), end + (1 - tau) ** k * (start - end), atol=1e-5, rtol=1e-5
        )
        assert torch.equal(flat(target.buffers()), buffers)
        assert torch.equal(flat(agent.parameters()), end)


@bugs(
    ("ddpg", "old.lerp_(new, tau)", "old.lerp_(new, 1 - tau)"),
    ("ddpg", "old.lerp_(new, tau)", "new.lerp_(old, tau)"),
    ("ddpg", "old.lerp_(new, tau)", "old.copy_(new)"),
    ("ddpg", "old.copy_(new)", "pass"),
    ("ddpg", "old.copy_(new)", "old.copy_(tau * new + (1 - tau) * old)"),
)
def test_targets_see(request, name, old, new):
    fails_with_a_bug(request, test_targets_approach_geometrically, name, old, new, tau=0.3)


# Acting


@each_continuous
def test_exploration(module):
    """Noise of each environment and dimension its own, of the right size, and clipped to the bounds."""
    torch.manual_seed(8)
    given = {} if has_noise(module) else dict(exploration_noise=0.15)
    agent, _, _ = make_agents(module, **given)
    obs = torch.randn(1, 5).expand(40_000, 5).numpy()
    answer_always(agent.actor, [0.2, -0.5, -1.0, 0.3])
    actions = agent.act(obs)
    assert actions.shape == (40_000, 2)
    assert actions.dtype == np.float32
    assert abs(actions).max() <= 1
    if has_noise(module):
        noise = (np.arctanh(actions.astype(np.float64).clip(-1 + 1e-9, 1 - 1e-9)) - [0.2, -0.5]) / np.exp([-1.0, 0.3])
    else:
        noise = (actions - np.tanh([0.2, -0.5])) / 0.15
    assert noise.mean(0) == pytest.approx([0, 0], abs=0.05)
    assert noise.std(0) == pytest.approx([1, 1], abs=0.05)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.03
    assert abs(np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]) < 0.03
    assert agent.act(obs).tolist() != actions.tolist()
    answer_always(agent.actor, [3.0, 3.0, -1.0, 0.3])
    if not has_noise(module):
        assert (agent.act(obs) == 1).mean() > 0.4
    assert abs(agent.act(obs)).max() <= 1


@bugs(
    ("ddpg", "torch.randn_like(action)", "torch.randn(2)"),
    ("ddpg", "torch.randn_like(action)", "torch.randn(len(action), 1)"),
    ("ddpg", "self.exploration_noise * torch.randn", "torch.randn"),
    ("ddpg", "randn_like(action)).clamp(-1, 1)", "randn_like(action))"),
    ("sac", "torch.randn_like(u)", "torch.randn(2)"),
    ("sac", "torch.randn_like(u)", "torch.randn(len(u), 1)"),
    ("sac", "u + log_std.exp() * torch", "u + log_std * torch"),
    ("sac", "return u.tanh().numpy(force=True)", "return u.numpy(force=True)"),
)
def test_exploration_sees(request, name, old, new):
    fails_with_a_bug(request, test_exploration, name, old, new)


@each_continuous
def test_greedy_takes_no_random_numbers(module):
    """The mean in place of its tanh (SB3#2249), or an evaluation that changes what a run does next."""
    agent, _, _ = make_agents(module)
    obs = torch.randn(50, 5)
    state = torch.get_rng_state()
    expected = agent.actor(obs)[0].tanh() if has_noise(module) else agent.actor(obs)
    assert agent.act(obs.numpy(), greedy=True).tolist() == expected.tolist()
    assert torch.equal(torch.get_rng_state(), state)


# The networks


@each_continuous
def test_layers(module):
    """A size other than asked for, a layer too many or too few, two with nothing between them, or late actions."""
    agent, _, _ = make_agents(module, hidden_size=12)
    batch = make_batch(module, 9)
    for network in (agent.actor, *critics(agent)):
        inputs = [batch["obs"]] if network is agent.actor else [batch["obs"], batch["actions"]]
        first, second, last = (layer for layer in network.modules() if isinstance(layer, torch.nn.Linear))
        assert first.out_features == second.out_features == 12
        x = last(second(first(torch.cat(inputs, -1)).relu()).relu())
        if network is not agent.actor:
            torch.testing.assert_close(network(*inputs), x.squeeze(-1))
        elif has_noise(module):
            torch.testing.assert_close(torch.cat(network(*inputs), -1), x)
        else:
            torch.testing.assert_close(network(*inputs), x.tanh())


@each_continuous
def test_images_and_numbers(module):
    """Pixels divided by 255 twice or never, channels of boolean images taken for rows, numbers not made one-hot."""
    for space, prepare in ((FRAMES, lambda x: x.float() / 255), (GRID, lambda x: x.permute(0, 3, 1, 2).float())):
        agent, _, _ = make_agents(module, space)
        obs = torch.from_numpy(np.stack([space.sample() for _ in range(3)]))
        for network in (agent.actor, *critics(agent)):
            torch.testing.assert_close(network.encoder[0](obs), prepare(obs))
        assert agent.act(obs.numpy()).shape == (3, 2)
        assert agent.act(obs.numpy(), greedy=True).std(0).min() > 0
        assert critics(agent)[0](obs, torch.zeros(3, 2)).shape == (3,)
    agent, _, _ = make_agents(module, Discrete(3, start=5))
    assert agent.actor.encoder(torch.tensor([5, 7])).tolist() == [[1, 0, 0], [0, 0, 1]]
