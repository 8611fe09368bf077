"""DDPG, TD3 and SAC against slow references, and each known bug planted and seen (as in test_dqn.py)."""

import copy
import json
import math

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import make_args, spy
from gymnasium.spaces import Box, Discrete
from test_dqn import LOSS, _own_instances, check_metrics, key, learn, near, parameters, planted, sees  # noqa: F401

from algos import ddpg, sac, td3

MODULES = [ddpg, td3, sac]
LOSS |= {module: f"{module.__name__.split('.')[-1]}_critic_loss" for module in MODULES}
VECTOR, BOX = Box(-np.inf, np.inf, (5,), np.float32), Box(np.float32([-1, -3]), np.float32([2, 0.5]))
LOW, HIGH = np.array([-1, -3]), np.array([2, 0.5])
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])


def bugs(*triples):
    """Run the test once for each bug, given as (script, old, new)."""
    names = [f"{source.__name__.split('.')[-1]}-{new.strip()[:40]}" for source, _, new in triples]
    return pytest.mark.parametrize(("source", "old", "new"), triples, ids=names)


def actor_loss(module):
    """The function by that name of a script, or of a script with a bug in it."""
    return getattr(module, LOSS[module].replace("critic", "actor"))


def make_agent(module, obs_space=VECTOR, actions=BOX, **given):
    """An agent whose outputs differ much from row to row, targets of another agent, the optimizers, the arguments."""
    args = module.Args(**(dict(hidden_size=16) | given))
    agent, other = (module.Agent(obs_space, actions, args) for _ in range(2))
    with torch.no_grad():
        for network in (agent, other):
            for parameter in network.parameters():
                parameter *= 2
    if hasattr(agent.actor, "log_alpha"):
        agent.actor.log_alpha.data.fill_(0.3)
    names = ("critic",) if hasattr(module, "squash") else ("actor", "critic")
    target = torch.nn.ModuleDict({name: module.Target(getattr(other, name)) for name in names})
    optimizers = torch.nn.ModuleDict({name: module.Adam(getattr(agent, name)) for name in ("actor", "critic")})
    return agent, target, optimizers, args


def make_batch(rows=64):
    """A batch as the learner gets it, with the noise of any of the three."""
    batch = dict(obs=torch.randn(rows, 5), actions=torch.rand(rows, 2) * 2 - 1, rewards=torch.randn(rows) * 2)
    batch |= dict(next_obs=torch.randn(rows, 5), terminated=torch.rand(rows) < 0.3)
    return batch | dict(noise=torch.randn(rows, 2), next_noise=torch.randn(rows, 2))


def gradients(network, loss):
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(network.parameters()))])


def step(module, agent, target, optimizers, batch, args):
    """One update of everything; returns the metrics."""
    inputs = agent, target, optimizers, batch, torch.tensor(0.01), args
    metrics = module.update(*inputs)
    return metrics | module.update_policy(*inputs) if hasattr(module, "update_policy") else metrics


# The critics


@torch.no_grad()
def slow_targets(module, agent, target, batch, args):
    """y of each row."""
    targets = []
    for i in range(len(batch["obs"])):
        row, bonus = {name: column[i : i + 1] for name, column in batch.items()}, 0.0
        if hasattr(module, "squash"):
            mean, log_std = agent(row["next_obs"])
            u = mean + log_std.exp() * row["next_noise"]
            action, bonus = u.tanh(), -(agent.actor.log_alpha.exp() * slow_log_prob(mean, log_std, u)).item()
        else:
            action = target["actor"](row["next_obs"]).tanh()
        if hasattr(args, "policy_noise"):
            scaled_noise = [args.policy_noise * x for x in row["noise"][0].tolist()]
            noise = [max(-args.noise_clip, min(args.noise_clip, x)) for x in scaled_noise]
            action = torch.tensor([[max(-1, min(1, a + x)) for a, x in zip(action[0].tolist(), noise)]])
        value = min(target["critic"](row["next_obs"], action)[0].tolist()) + bonus
        targets.append(row["rewards"].item() + (0 if row["terminated"] else args.gamma * value))
    return targets


def slow_critic_loss(module, agent, target, batch, args):
    """The loss row by row."""
    total = 0.0
    for i, y in enumerate(slow_targets(module, agent, target, batch, args)):
        total += sum((q - y) ** 2 for q in agent.critic(batch["obs"][i : i + 1], batch["actions"][i : i + 1])[0])
    return total / len(batch["obs"])


def slow_log_prob(mean, log_std, u):
    """log pi (B,) of tanh(u), by the change of variables as it is written in the paper, in double precision."""
    mean, log_std, u = mean.double(), log_std.double(), u.double()
    return (torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - torch.log1p(-u.tanh().square())).sum(-1)


def check_critic_loss(module):
    torch.manual_seed(4)
    given = dict(policy_noise=0.5, noise_clip=0.3) if hasattr(module.Args, "policy_noise") else {}
    agent, target, _, args = make_agent(module, gamma=0.8, **given)
    batch, loss_of = make_batch(), getattr(module, LOSS[module])
    loss, metrics = loss_of(agent, batch, target, args)
    expected = slow_critic_loss(module, agent, target, batch, args)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradients(agent.critic, loss), gradients(agent.critic, expected), atol=1e-4, rtol=1e-3)
    assert metrics["td_loss"].item() == loss.item()
    values = agent.critic(batch["obs"], batch["actions"])
    assert metrics["q_value"].item() == pytest.approx(values.mean().item(), abs=1e-5)
    assert not any(metric.requires_grad for metric in metrics.values())
    own = dict(actor=agent.actor, critic=agent.critic)  # the target is a constant, whoever made it
    both, alone = loss_of(agent, batch, own, args)[0], loss_of(agent, batch, copy.deepcopy(own), args)[0]
    torch.testing.assert_close(gradients(agent.critic, both), gradients(agent.critic, alone))
    assert set(torch.autograd.grad(both, list(agent.actor.parameters()), allow_unused=True)) == {None}
    order = torch.randperm(64)
    shuffled = loss_of(agent, {name: column[order] for name, column in batch.items()}, target, args)[0]
    assert shuffled.item() == pytest.approx(loss.item(), rel=1e-4)


@each_module
def test_critic_loss_and_gradient_against_a_loop(module):
    """(B, 1) against (B,), networks mixed up, noise shared or unclipped, the larger critic, a lost entropy term."""
    check_critic_loss(module)


Q_NEXT = 'target["critic"](batch["next_obs"], next_actions)'


@bugs(
    (ddpg, "    with torch.no_grad():\n        next_actions", "    if True:\n        next_actions"),
    (ddpg, 'target["actor"](batch["next_obs"]).tanh()', 'agent(batch["next_obs"])'),
    (ddpg, 'target["actor"](batch["next_obs"]).tanh()', 'target["actor"](batch["next_obs"]).clamp(-1, 1)'),
    (ddpg, Q_NEXT, 'agent.critic(batch["next_obs"], next_actions)'),
    (ddpg, Q_NEXT, 'target["critic"](batch["obs"], next_actions)'),
    (ddpg, Q_NEXT, 'target["critic"](batch["next_obs"], batch["actions"])'),
    (ddpg, f"{Q_NEXT}.squeeze(-1)", Q_NEXT),
    (ddpg, 'agent.critic(batch["obs"], batch["actions"]).squeeze(-1)', 'agent.critic(batch["obs"], batch["actions"])'),
    (ddpg, "(values - targets).square().mean()", "nn.functional.smooth_l1_loss(values, targets)"),
    (td3, ".amin(-1)  # eq. 10", ".amax(-1)"),
    (td3, ".amin(-1)  # eq. 10", ".mean(-1)"),
    (td3, ".amin(-1)  # eq. 10", "[:, 0]"),
    (td3, 'args.policy_noise * batch["noise"]', 'args.policy_noise * batch["noise"][:1]'),
    (td3, 'args.policy_noise * batch["noise"]', 'args.policy_noise * batch["noise"][:, :1]'),
    (td3, 'args.policy_noise * batch["noise"]', 'batch["noise"]'),
    (td3, ".clamp(-args.noise_clip, args.noise_clip)", ""),
    (td3, " + noise).clamp(-1, 1)", " + noise)"),
    (td3, 'target["actor"](batch["next_obs"]).tanh()', 'agent(batch["next_obs"])'),
    (td3, Q_NEXT, 'agent.critic(batch["next_obs"], next_actions)'),
    (td3, ".square().mean(0).sum()", ".square().mean()"),
    (sac, "next_values - agent.actor.log_alpha.exp() * log_probs", "next_values"),
    (sac, "next_values - agent.actor.log_alpha.exp()", "next_values + agent.actor.log_alpha.exp()"),
    (sac, "next_values - agent.actor.log_alpha.exp()", "next_values - agent.actor.log_alpha"),
    (sac, f"{Q_NEXT}.amin(-1)", f"{Q_NEXT}.mean(-1)"),
    (sac, Q_NEXT, 'agent.critic(batch["next_obs"], next_actions)'),
    (sac, 'agent(batch["next_obs"]), batch["next_noise"]', 'agent(batch["obs"]), batch["next_noise"]'),
    (sac, 'agent(batch["next_obs"]), batch["next_noise"]', 'agent(batch["next_obs"]), batch["noise"]'),
)  # fmt: skip
def test_critic_loss_sees(monkeypatch, source, old, new):
    sees(monkeypatch, check_critic_loss, old, new, source=source)


# The actors


class Quadratic(torch.nn.Module):
    """Q(s, a) = -|a - optimum|^2 (B, 1), with a parameter that no actor's step may touch."""

    def __init__(self, *optimum):
        super().__init__()
        self.optimum = torch.nn.Parameter(torch.tensor(optimum))

    def forward(self, obs, actions):
        return -(actions - self.optimum).square().sum(-1, keepdim=True)


def check_actor_gradient(module):
    """dQ/da at the policy's own actions, chained with its Jacobian, and nothing else."""
    torch.manual_seed(5)
    agent, _, _, _ = make_agent(module)
    batch, first, second = make_batch(), Quadratic(0.3, -0.6), Quadratic(-0.9, 0.9)
    agent.critic = module.Critics([first, second]) if hasattr(module, "Critics") else first
    loss, metrics = actor_loss(module)(agent, batch)
    assert loss.shape == ()
    assert not any(metric.requires_grad for metric in metrics.values())
    rows = list(agent.actor.named_parameters())
    if not hasattr(module, "squash"):
        actions = agent(batch["obs"])
        slope = -2 * (actions.detach() - first.optimum.detach())  # dQ/da
        expected = torch.autograd.grad(actions, [p for _, p in rows], grad_outputs=-slope / 64)
        assert metrics["policy_loss"].item() == pytest.approx(-first(None, actions).mean().item(), rel=1e-5)
    else:
        mean, log_std = agent(batch["obs"])
        u = mean + log_std.exp() * batch["noise"]
        values = torch.cat([first(None, u.tanh()), second(None, u.tanh())], -1)
        log_probs = slow_log_prob(mean, log_std, u)
        assert 5 < (values[:, 0] < values[:, 1]).sum() < 59  # each is the smaller one somewhere
        alpha, entropy = math.exp(0.3), -log_probs.mean().item()
        policy_loss = sum(alpha * log_probs[i] - min(values[i]) for i in range(64)) / 64
        grads = torch.autograd.grad(policy_loss, [p for _, p in rows], allow_unused=True)
        own = torch.tensor(alpha * (entropy + 2))
        expected = [own if name == "log_alpha" else grad for (name, _), grad in zip(rows, grads)]
        assert metrics["policy_loss"].item() == pytest.approx(policy_loss.item(), rel=1e-4)
        assert metrics["entropy"].item() == pytest.approx(entropy, rel=1e-4)
        assert metrics["alpha"].item() == pytest.approx(alpha)
    found = module.gradient(loss, agent.actor)
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]), atol=1e-4, rtol=1e-3)


@each_module
def test_actor_gradient_on_a_quadratic(module):
    """A wrong sign, the wrong critic, actions from the buffer, a temperature that pushes the policy."""
    check_actor_gradient(module)


@bugs(
    (ddpg, 'loss = -agent.critic(batch["obs"], agent(', 'loss = agent.critic(batch["obs"], agent('),
    (ddpg, 'agent.critic(batch["obs"], agent(batch["obs"]))', 'agent.critic(batch["obs"], agent(batch["next_obs"]))'),
    (ddpg, 'agent.critic(batch["obs"], agent(batch["obs"]))', 'agent.critic(batch["obs"], agent(batch["obs"]) * 2)'),
    (td3, "-agent.critic[0](", "-agent.critic[1]("),
    (td3, "-agent.critic[0](", "-agent.critic("),
    (sac, "(alpha.detach() * log_probs - values)", "(alpha.detach() * log_probs + values)"),
    (sac, "(alpha.detach() * log_probs - values)", "(-alpha.detach() * log_probs - values)"),
    (sac, "(alpha.detach() * log_probs - values)", "(alpha * log_probs - values)"),
    (sac, "(alpha.detach() * log_probs - values)", "(-values)"),
    (sac, 'actions).amin(-1), agent.actor', 'actions).mean(-1), agent.actor'),
    (sac, "entropy = -log_probs.detach().mean()", "entropy = -log_probs.mean()"),
    (sac, "alpha * (entropy + actions.shape[-1])", "alpha * (entropy - actions.shape[-1])"),
    (sac, "alpha * (entropy + actions.shape[-1])", "-alpha * (entropy + actions.shape[-1])"),
    (sac, "alpha * (entropy + actions.shape[-1])", "alpha * (entropy + actions.shape[-1] / 2)"),
)  # fmt: skip
def test_actor_gradient_sees(monkeypatch, source, old, new):
    sees(monkeypatch, check_actor_gradient, old, new, source=source)


def check_no_other_gradient(module):
    """A gradient of the critic in the actor's step is computed for nothing, and one that stays is added to the next."""
    agent, target, _, args = make_agent(module)
    batch, touched = make_batch(), []
    for name, parameter in agent.named_parameters():
        parameter.register_hook(lambda grad, name=name: touched.append(name.split(".")[0]))
    module.gradient(actor_loss(module)(agent, batch)[0], agent.actor)
    assert set(touched) == {"actor"}
    touched.clear()
    module.gradient(getattr(module, LOSS[module])(agent, batch, target, args)[0], agent.critic)
    assert set(touched) == {"critic"}
    assert all(parameter.grad is None for parameter in agent.parameters())


@each_module
def test_gradients_of_one_network_alone(module):
    check_no_other_gradient(module)


def test_gradients_of_one_network_alone_see(monkeypatch):
    old = "torch.autograd.grad(loss, list(network.parameters()))"
    new = "(loss.backward(), [p.grad for p in network.parameters()])[1]"
    sees(monkeypatch, check_no_other_gradient, old, new, source=ddpg)


# The update


def check_update(module, monkeypatch):
    """First the critic, then the actor up the new critic, then the targets; each step moves its own part alone."""
    torch.manual_seed(6)
    agent, target, optimizers, args = make_agent(module, tau=0.3)
    batch, seen, old_target = make_batch(), [], copy.deepcopy(target)

    def state():
        networks = dict(actor=agent.actor, critic=agent.critic) | {f"{name}'": target[name] for name in target}
        return {name: parameters(network) for name, network in networks.items()}

    def before(name):
        return lambda *inputs: seen.append((name, inputs, copy.deepcopy(agent), state()))

    start = state()
    with monkeypatch.context() as patch:
        for name in optimizers:
            spy(patch, optimizers[name], "step", before(name))
        metrics = step(module, agent, target, optimizers, batch, args)
    end = state()
    assert [name for name, *_ in seen] == ["critic", "actor"]
    (_, critic_step, first, _), (_, actor_step, second, middle) = seen
    expected = gradients(first.critic, getattr(module, LOSS[module])(first, batch, old_target, args)[0])
    torch.testing.assert_close(critic_step[0], expected, atol=1e-5, rtol=1e-4)
    expected = gradients(second.actor, actor_loss(module)(second, batch)[0])
    torch.testing.assert_close(actor_step[0], expected, atol=1e-5, rtol=1e-4)
    assert critic_step[1] == actor_step[1] == torch.tensor(0.01)
    assert [name for name in start if not torch.equal(middle[name], start[name])] == ["critic"]
    assert torch.equal(end["critic"], middle["critic"])
    for name, (g, *_), one, two in (("critic", critic_step, start, middle), ("actor", actor_step, middle, end)):
        moved = two[name] - one[name]  # by the first step of Adam
        torch.testing.assert_close(moved, -0.01 * g / (g.abs() + 1e-8), atol=1e-6, rtol=1e-4)
    for name in target:
        torch.testing.assert_close(end[f"{name}'"], 0.3 * end[name] + 0.7 * start[f"{name}'"])
    assert {"td_loss", "q_value", "policy_loss"} <= metrics.keys()


@each_module
def test_update(module, monkeypatch):
    """A critic moved by the actor's step, an actor up the old critic, targets that follow the old networks."""
    check_update(module, monkeypatch)


@bugs(
    (ddpg, '["actor"].step(gradient(loss, agent.actor)', '["critic"].step(gradient(loss, agent.critic)'),
    (ddpg, "theta.lerp_(optimizers[name].theta, tau)", "theta.lerp_(optimizers[name].theta, 1 - tau)"),
    (ddpg, "network.theta.lerp_(optimizers[name].theta, tau)", "optimizers[name].theta.lerp_(network.theta, tau)"),
    (ddpg, "network.theta.lerp_(optimizers[name].theta, tau)", "network.theta.copy_(optimizers[name].theta)"),
    (ddpg, "in target.items():\n        network", "in list(target.items())[:1]:\n        network"),
    (ddpg, "        nn.utils.vector_to_parameters(self.theta, self.network.parameters())", "        pass"),
    (ddpg, "gradient(loss, agent.critic), learning_rate, eps=1e-8)", "gradient(loss, agent.critic), learning_rate)"),
    (sac, "gradient(loss, agent.actor), learning_rate, eps=1e-8)", "gradient(loss, agent.actor), learning_rate)"),
    (td3, "    follow(target, optimizers, args.tau)", "    pass"),
    (sac, "    follow(target, optimizers, args.tau)", "    pass"),
)  # fmt: skip
def test_update_sees(monkeypatch, source, old, new):
    sees(monkeypatch, check_update, old, new, monkeypatch, source=source)


def test_without_the_policy_only_the_critics_move():
    agent, target, optimizers, args = make_agent(td3)
    before = parameters(agent.actor), parameters(target), parameters(agent.critic)
    metrics = td3.update(agent, target, optimizers, make_batch(), torch.tensor(0.01), args)
    assert torch.equal(parameters(agent.actor), before[0])
    assert torch.equal(parameters(target), before[1])
    assert not torch.equal(parameters(agent.critic), before[2])
    assert metrics.keys() == {"td_loss", "q_value"}


@each_module
@pytest.mark.parametrize("tau", [0.0, 0.005, 0.3, 1.0])
def test_targets_approach_geometrically(module, tau):
    """theta'_k = theta + (1 - tau)^k (theta'_0 - theta) while theta stands still, in the networks themselves."""
    agent, target, optimizers, _ = make_agent(module)
    start, batch = {name: parameters(network) for name, network in target.items()}, make_batch()
    for k in range(1, 6):
        module.follow(target, optimizers, tau)
        for name, network in target.items():
            end = parameters(getattr(agent, name))
            expected = end + (1 - tau) ** k * (start[name] - end)
            torch.testing.assert_close(parameters(network), expected, atol=1e-5, rtol=1e-5)
            assert torch.equal(parameters(network), network.theta)
            assert not network.theta.requires_grad
    if tau == 1:
        found, expected = (critic(batch["obs"], batch["actions"]) for critic in (target["critic"], agent.critic))
        torch.testing.assert_close(found, expected)


@each_module
def test_target_survives_a_checkpoint(module):
    """A loaded target whose parameters are no longer those that follow."""
    agent, target, optimizers, _ = make_agent(module)
    other = make_agent(module)[1]
    other.load_state_dict(copy.deepcopy(target.state_dict()))
    assert torch.equal(parameters(other), parameters(target))
    module.follow(other, optimizers, 1.0)
    assert torch.equal(parameters(other["critic"]), parameters(agent.critic))


# The squashed Gaussian and its temperature


def check_squash(module):
    """Against the Jacobian of tanh by autograd, in double precision; finite where tanh is 1; a density on [-1, 1]."""
    torch.manual_seed(7)
    mean, log_std, noise = torch.randn(50, 3).double(), torch.randn(50, 3).double() / 4, torch.randn(50, 3).double()
    actions, log_probs = module.squash(mean, log_std, noise)
    assert log_probs.shape == (50,)
    for i in range(50):
        u = mean[i] + log_std[i].exp() * noise[i]
        jacobian = torch.autograd.functional.jacobian(torch.tanh, u)
        density = torch.distributions.MultivariateNormal(mean[i], torch.diag((2 * log_std[i]).exp())).log_prob(u)
        torch.testing.assert_close(actions[i], u.tanh())
        assert log_probs[i].item() == pytest.approx((density - torch.linalg.slogdet(jacobian)[1]).item(), abs=1e-6)
    for extreme in (-20.0, -8.0, 8.0, 20.0):
        mean, log_std = torch.full((2, 1), extreme, requires_grad=True), torch.full((2, 1), -2.0, requires_grad=True)
        log_probs = module.squash(mean, log_std, torch.tensor([[0.5], [-0.5]]))[1]
        slope, other = torch.autograd.grad(log_probs.sum(), [mean, log_std])
        u = extreme + math.exp(-2) * 0.5 * torch.tensor([1.0, -1.0])
        expected = -0.125 + 2 - math.log(2 * math.pi) / 2 - 2 * (math.log(2) - u.abs())  # but for terms of exp(-2|u|)
        torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=1e-5)
        assert slope.tolist() == [[pytest.approx(math.copysign(2, extreme), abs=1e-5)]] * 2
        assert other.isfinite().all()
    for mean, log_std in ((0.0, 0.0), (0.8, -1.5), (-1.2, 0.7)):
        u = torch.linspace(-25, 25, 400_001, dtype=torch.float64)[:, None]
        noise = (u - mean) / math.exp(log_std)
        actions, log_probs = module.squash(torch.tensor(mean), torch.tensor(log_std), noise)
        assert torch.trapezoid(log_probs.exp(), actions[:, 0]).item() == pytest.approx(1, abs=1e-5)


def test_squash():
    check_squash(sac)


@bugs(
    (sac, "(log_prob - log_slope)", "log_prob"),
    (sac, "(log_prob - log_slope)", "(log_prob + log_slope)"),
    (sac, "2 * (math.log(2) - u - nn.functional.softplus(-2 * u))", "torch.log(1 - u.tanh().square())"),
    (sac, "2 * (math.log(2) - u - nn.functional.softplus(-2 * u))", "torch.log(1 - u.tanh().square() + 1e-6)"),
    (sac, "2 * (math.log(2) - u", "(math.log(2) - u"),
    (sac, " - log_std - math.log(2 * math.pi) / 2", " - math.log(2 * math.pi) / 2"),
    (sac, " - math.log(2 * math.pi) / 2", ""),
    (sac, "-noise.square() / 2", "-u.square() / 2"),
    (sac, "(log_prob - log_slope).sum(-1)", "(log_prob - log_slope).mean(-1)"),
)
def test_squash_sees(monkeypatch, source, old, new):
    sees(monkeypatch, check_squash, old, new, source=source)


def test_start_and_bounds():
    """A first temperature other than 1, or deviations that leave [exp(-20), exp(2)]."""
    agent = sac.Agent(VECTOR, BOX, sac.Args())
    assert agent.actor.log_alpha == 0
    with torch.no_grad():
        agent.actor.head[-1].weight.zero_()
        for log_std, expected in ((50.0, 2.0), (1.9, 1.9), (-19.0, -19.0), (-50.0, -20.0)):
            agent.actor.head[-1].bias.copy_(torch.tensor([60.0, -60.0, log_std, log_std]))
            mean, found = agent(torch.randn(1, 5))
            assert mean.tolist() == [[60, -60]]
            assert found.tolist() == [pytest.approx([expected] * 2)]


def check_temperature(module):
    """alpha falls while the policy is more random than the target entropy -dim(A), and rises while it is less."""
    for log_std, rises in ((0.0, False), (-2.1, False), (-3.0, True), (-6.0, True)):  # entropy about log_std + 1.42
        agent, target, optimizers, args = make_agent(module)
        with torch.no_grad():
            agent.actor.head[-1].weight.zero_()
            agent.actor.head[-1].bias.copy_(torch.tensor([0.0, 0.0, log_std, log_std]))
        metrics = step(module, agent, target, optimizers, make_batch(4096), args)
        assert (metrics["entropy"].item() < -2) == rises
        assert (agent.actor.log_alpha.item() > 0.3) == rises
        assert agent.actor.log_alpha.item() == pytest.approx(0.3, abs=0.011)  # one step of Adam


def test_temperature_moves_toward_the_target_entropy():
    check_temperature(sac)


@bugs(
    (sac, "alpha * (entropy + actions.shape[-1])", "-alpha * (entropy + actions.shape[-1])"),
    (sac, "alpha * (entropy + actions.shape[-1])", "alpha * (entropy - actions.shape[-1])"),
    (sac, "alpha * (entropy + actions.shape[-1])", "alpha * (entropy + actions.shape[-1] / 2)"),
    (sac, "return policy_loss + temperature_loss, metrics", "return policy_loss, metrics"),
)
def test_temperature_sees(monkeypatch, source, old, new):
    with pytest.raises((AssertionError, RuntimeError)):  # a temperature without a gradient is an error of autograd
        check_temperature(planted(monkeypatch, old, new, source))


# Acting


def check_exploration(module):
    """Noise of each environment and dimension its own, of the right size, and clipped to the bounds."""
    torch.manual_seed(8)
    agent, _, _, _ = make_agent(module, **({} if hasattr(module, "squash") else dict(exploration_noise=0.15)))
    obs = torch.randn(1, 5).expand(40_000, 5).numpy()
    with torch.no_grad():
        agent.actor.head[-1].weight.zero_()
        outputs = torch.tensor([0.2, -0.5, -1.0, 0.3][: len(agent.actor.head[-1].bias)])
        agent.actor.head[-1].bias.copy_(outputs)
    actions = agent.act(obs)
    assert actions.shape == (40_000, 2)
    assert actions.dtype == np.float32
    assert abs(actions).max() <= 1
    if hasattr(module, "squash"):
        noise = (np.arctanh(actions.astype(np.float64).clip(-1 + 1e-9, 1 - 1e-9)) - [0.2, -0.5]) / np.exp([-1.0, 0.3])
    else:
        noise = (actions - np.tanh([0.2, -0.5])) / 0.15
    assert noise.mean(0) == pytest.approx([0, 0], abs=0.05)
    assert noise.std(0) == pytest.approx([1, 1], abs=0.05)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.03
    assert abs(np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]) < 0.03
    assert agent.act(obs).tolist() != actions.tolist()
    with torch.no_grad():
        agent.actor.head[-1].bias[:2] = 3.0
    if not hasattr(module, "squash"):
        assert (agent.act(obs) == 1).mean() > 0.4
    assert abs(agent.act(obs)).max() <= 1


@each_module
def test_exploration(module):
    check_exploration(module)


@bugs(
    (ddpg, "torch.randn(actions.shape)", "torch.randn(actions.shape[1:])"),
    (ddpg, "torch.randn(actions.shape)", "torch.randn(len(actions), 1)"),
    (ddpg, "self.exploration_noise * torch.randn", "torch.randn"),
    (ddpg, "(actions.shape)).clamp(-1, 1)", "(actions.shape))"),
    (sac, "torch.randn(u.shape)", "torch.randn(u.shape[1:])"),
    (sac, "torch.randn(u.shape)", "torch.randn(len(u), 1)"),
    (sac, "u + log_std.exp() * torch", "u + log_std * torch"),
    (sac, "        return u.tanh().numpy()", "        return u.numpy()"),
)
def test_exploration_sees(monkeypatch, source, old, new):
    sees(monkeypatch, check_exploration, old, new, source=source)


@each_module
def test_greedy_takes_no_random_numbers(module):
    """tanh of the mean (SB3#2249), not the mean."""
    agent, _, _, _ = make_agent(module)
    obs, state = torch.randn(50, 5), torch.get_rng_state()
    out = agent(obs)[0].tanh() if hasattr(module, "squash") else agent(obs)
    assert agent.act(obs.numpy(), greedy=True).tolist() == out.tolist()
    assert torch.equal(torch.get_rng_state(), state)


def test_dot_is_a_linear_layer():
    """A bias left out or added to each product, or an output without its dimension."""
    dot, x = ddpg.Dot(16, 1), torch.randn(7, 16)
    torch.testing.assert_close(dot(x), torch.nn.functional.linear(x, dot.weight, dot.bias))


@each_module
def test_layers(module):
    """A size other than asked for, a layer too many or too few, two with nothing between them, or late actions."""
    agent, _, _, _ = make_agent(module, hidden_size=12)
    critics, batch = agent.critic if hasattr(module, "Critics") else [agent.critic], make_batch(9)
    for network in (agent.actor, *critics):
        inputs = [batch["obs"]] if network is agent.actor else [batch["obs"], batch["actions"]]
        first, second, last = (layer for layer in network.modules() if isinstance(layer, torch.nn.Linear))
        assert first.out_features == second.out_features == 12
        torch.testing.assert_close(network(*inputs), last(second(first(torch.cat(inputs, -1)).relu()).relu()))


@each_module
def test_images_and_numbers(module):
    """Pixels divided by 255 twice or never, channels of boolean images taken for rows, numbers not made one-hot."""
    frames, grid = Box(0, 255, (2, 36, 36), np.uint8), Box(0, 1, (10, 10, 3), np.bool_)
    for space, prepare in ((frames, lambda x: x.float() / 255), (grid, lambda x: x.permute(0, 3, 1, 2).float())):
        agent, _, _, _ = make_agent(module, space)
        obs = torch.from_numpy(np.stack([space.sample() for _ in range(3)]))
        torch.testing.assert_close(agent.actor.features(obs), agent.actor.trunk(prepare(obs)))
        assert agent.act(obs.numpy()).shape == (3, 2)
        assert agent.act(obs.numpy(), greedy=True).std(0).min() > 0
        assert agent.critic(obs, torch.zeros(3, 2)).shape == (3, 2 if hasattr(module, "Critics") else 1)
    agent, _, _, _ = make_agent(module, Discrete(3, start=5))
    assert agent.actor.features(torch.tensor([5, 7])).tolist() == torch.eye(3)[[0, 2]].tolist()


# train(): what, when, how often


def scaled(actions):
    """The actions of the environment that belong to those of the policy."""
    return LOW + (np.asarray(actions, np.float64) + 1) / 2 * (HIGH - LOW)


def check_rows(module, monkeypatch, folder):
    """All that is learned from is what happened, all that happened is learned from; targets follow from it alone."""
    batches, targets = [], []
    with monkeypatch.context() as patch:
        spy(patch, module, LOSS[module], lambda _, batch, *rest: batches.append({k: batch[k].numpy() for k in batch}))
        spy(patch, module, "td_target", lambda *inputs: targets.append([x.numpy() for x in inputs[:2]]))
        learn(module, folder, "TaggedBox", total_timesteps=420)
    true = {key(row["obs"]): row for env in envs.Tagged.instances[:3] for row in env.log}
    seen, noises = set(), []
    for batch, (rewards, terminated) in zip(batches, targets, strict=True):
        assert batch["actions"].shape == (16, 2)
        assert abs(batch["actions"]).max() <= 1
        for i, obs in enumerate(batch["obs"]):
            row = true[key(obs)]
            assert scaled(batch["actions"][i]) == pytest.approx(row["action"], abs=1e-5)
            assert batch["rewards"][i] == rewards[i] == pytest.approx(row["reward"], rel=1e-6)
            assert key(batch["next_obs"][i]) == key(row["next_obs"])
            assert batch["terminated"][i] == terminated[i] == row["terminated"]
            seen.add(key(obs))
        noises += [batch[name] for name in ("noise", "next_noise") if name in batch]
    assert {k for k, row in true.items() if row["t"] < 60} <= seen
    kinds = {(true[k]["terminated"], true[k]["truncated"]) for k in seen}
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}
    assert len(noises) == {ddpg.__file__: 0, td3.__file__: 390, sac.__file__: 780}[module.__file__]
    if noises:
        noises = np.stack(noises)
        assert noises.shape[1:] == (16, 2)
        assert len(np.unique(noises)) > 0.99 * noises.size  # of each row, dimension and step its own
        assert abs(noises.mean()) < 0.05
        assert abs(noises.std() - 1) < 0.05


@each_module
def test_learned_rows_are_exactly_the_transitions(module, monkeypatch, tmp_path):
    """Reset steps learned from, actions in the environment's units, noise shared by rows, dimensions or steps."""
    check_rows(module, monkeypatch, tmp_path)


@bugs(
    (ddpg, "valid = ~done  #", "valid = ~done | True  #"),
    (ddpg, "reward, terminated, valid)", "reward, done, valid)"),
    (ddpg, "reward, terminated, valid)", "reward, terminated & ~truncated, valid)"),
    (ddpg, "buffer.add(obs, action, reward", "buffer.add(obs, to_env(action), reward"),
    (ddpg, "take((places + self.num_envs) % self.size, 0)", "take(places, 0)"),
    (ddpg, "low + (actions.reshape(-1, *space.shape) + 1)", "low[0] + (actions.reshape(-1, *space.shape) + 1)"),
    (ddpg, "* ((high - low) / 2)", "* high"),
    (td3, "torch.randn(args.batch_size, D)", "torch.randn(D).expand(args.batch_size, D)"),
    (td3, "torch.randn(args.batch_size, D)", "torch.randn(args.batch_size, 1).expand(args.batch_size, D)"),
    (sac, "torch.randn(args.batch_size, D)", "torch.randn(1, D).expand(args.batch_size, D)"),
)
def test_rows_see(monkeypatch, tmp_path, source, old, new):
    with pytest.raises((AssertionError, KeyError)):  # a KeyError is a row that never was
        check_rows(planted(monkeypatch, old, new, source), monkeypatch, tmp_path)


def check_periods(module, monkeypatch, folder, N, k, f):
    """Gradient steps at each multiple of k beyond learning_starts; exactly one in f moves policy and targets, too."""
    critics, actors, targets, steps, total = [], [], [], [], 240

    def remember(agent, target, optimizers):
        critics.append(parameters(agent.critic))
        actors.append(optimizers["actor"].theta.clone())  # the parameters of the policy are views of it
        targets.append(parameters(target))

    def before(*parts):
        last[:] = parts[:3]
        remember(*last)

    last = []
    with monkeypatch.context() as patch:
        spy(patch, module, "update", before)
        spy(patch, module, "evaluate", lambda *_: remember(*last))
        spy(patch, module.ReplayBuffer, "add", lambda *_: steps.append(len(critics)))
        given = dict(num_envs=N, train_frequency=k, policy_frequency=f, total_timesteps=total)
        learn(module, folder, "TaggedBox", **given)
    times = [t for t in range(1, total + 1) if t > 30 and t % k == 0]
    assert len(critics) == len(times) + 1
    assert steps == [sum(t <= N * j for t in times) for j in [0, *range(total // N)]]  # none before its time, none late
    f = f if hasattr(module.Args, "policy_frequency") else 1
    for values, period in ((critics, 1), (actors, f), (targets, f)):
        changed = [not torch.equal(a, b) for a, b in zip(values, values[1:])]
        assert changed == [i % period == 0 for i in range(1, len(times) + 1)]


@each_module
@pytest.mark.parametrize(("N", "k", "f"), [(1, 1, 3), (3, 2, 5), (8, 3, 2), (3, 1, 1)])
def test_periods(module, monkeypatch, tmp_path, N, k, f):
    """A policy that waits for another number of steps than asked for, with any number of environments."""
    check_periods(module, monkeypatch, tmp_path, N, k, f)


LEARN = "if t > learning_starts and t % args.train_frequency == 0:"
EACH = "for t in range(step - N + 1, step + 1):"
DELAY = "updates % args.policy_frequency == 0"


@bugs(
    (ddpg, LEARN, "if t > learning_starts and step % args.train_frequency == 0:"),
    (ddpg, LEARN, "if t >= learning_starts and t % args.train_frequency == 0:"),
    (ddpg, EACH, "for t in (step,):"),
    (ddpg, EACH, "for t in range(step - N, step):"),
    (td3, DELAY, "t % args.policy_frequency == 0"),
    (td3, DELAY, "step // N % args.policy_frequency == 0"),
    (td3, DELAY, "(updates - 1) % args.policy_frequency == 0"),
    (td3, DELAY, "updates % 2 == 0"),
    (td3, "copy.deepcopy(network).requires_grad_(False)", "network"),
)
def test_periods_see(monkeypatch, tmp_path, source, old, new):
    sees(monkeypatch, check_periods, old, new, monkeypatch, tmp_path, 3, 2, 7, source=source)


@each_module
def test_actions_are_uniform_until_learning_starts(module, monkeypatch, tmp_path):
    """A policy that has not learned yet, asked too early or never; actions that do not fill the bounds."""
    acting = []
    spy(monkeypatch, module.Agent, "act", lambda *_, **__: acting.append(envs.Tagged.instances[0].t))
    learn(module, tmp_path, "TaggedBox", num_envs=3, learning_starts=2700, total_timesteps=3000, train_frequency=50)
    assert acting[:100] == [*range(900, 1000)]  # 900 vector steps of 3, reset steps among them
    rows = [row["action"] for env in envs.Tagged.instances[:3] for row in env.log if row["t"] < 900]
    shares = (np.stack(rows) - LOW) / (HIGH - LOW)
    assert len(rows) > 1800
    assert np.sort(shares, 0) == pytest.approx(np.linspace([0, 0], [1, 1], len(rows)), abs=0.06)  # Kolmogorov-Smirnov
    assert abs(np.corrcoef(shares.T)[0, 1]) < 0.1


@each_module
def test_log_and_evaluation(module, tmp_path):
    """Episodes lost or cut in two by a line of the log; an evaluation that explores or skips the scaling."""
    agents = []
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, module, "evaluate", lambda agent, *_: agents.append(agent))
        result = learn(module, tmp_path, "TaggedBox", log_every=10, eval_episodes=3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["global_step"] for line in lines] == [*range(9, 300, 9), 300]
    trained, evaluated = envs.Tagged.instances[:3], envs.Tagged.instances[3:]
    ends = sorted((3 * (row["t"] + 1), env.index, env.returns[key(row["obs"])[2]]) for env in trained for row in env.log
                  if row["terminated"] or row["truncated"])  # fmt: skip
    last = 0
    for line in lines:
        returns = [total for when, _, total in ends if last < when <= line["global_step"]]
        assert line["episodes"] == len(returns)
        assert line["episodic_return"] == (pytest.approx(np.mean(returns)) if returns else None)
        last = line["global_step"]
    assert lines[-1]["td_loss"] > 0 == lines[0]["td_loss"]
    assert lines[-1]["policy_loss"] != 0
    assert result["eval_returns"] == pytest.approx([env.returns[0] for env in evaluated])
    for env in evaluated:
        obs = np.stack([row["obs"] for row in env.log])
        expected = scaled(agents[0].act(obs, greedy=True))
        assert np.stack([row["action"] for row in env.log]) == pytest.approx(expected, abs=1e-4)


@each_module
def test_metrics(module, monkeypatch, tmp_path):
    """Means over other gradient steps; tensors kept by the thousand, which fragment memory."""
    check_metrics(module, monkeypatch, tmp_path, "TaggedBox")


def check_policy_evaluated(module, monkeypatch, folder):
    """The policy evaluated is mu', which is not mu; where there is no mu', it is the policy itself."""
    evaluated = []
    with monkeypatch.context() as patch:
        spy(patch, module, "evaluate", lambda agent, *_: evaluated.append(parameters(agent.actor)))
        learn(module, folder, "TaggedBox")
    saved = torch.load(folder / "run" / "checkpoint.pt")
    policy, average = saved["optimizers"]["actor.theta"], saved["target"].get("actor.theta")
    assert torch.equal(evaluated[0], policy if average is None else average)
    assert average is None or not torch.equal(policy, average)


@each_module
def test_policy_evaluated(module, monkeypatch, tmp_path):
    """Scores of another policy than the docstring says."""
    check_policy_evaluated(module, monkeypatch, tmp_path)


@pytest.mark.parametrize("source", [ddpg, td3])
def test_policy_evaluated_sees(monkeypatch, tmp_path, source):
    line = 'agent.actor = target["actor"].network'
    sees(monkeypatch, check_policy_evaluated, line, "pass", monkeypatch, tmp_path, source=source)


@each_module
@pytest.mark.parametrize("anneal_lr", [False, True])
def test_step_size(module, monkeypatch, tmp_path, anneal_lr):
    """By the environment steps so far, whatever the number of environments."""
    rates = []
    spy(monkeypatch, module, "update", lambda *inputs: rates.append(inputs[4].item()))
    learn(module, tmp_path, "TaggedBox", anneal_lr=anneal_lr, learning_rate=0.01, train_frequency=3)
    assert rates == pytest.approx([0.01 * (1 - t / 300 if anneal_lr else 1) for t in range(30, 300, 3)], rel=1e-5)


# Checkpoints


def check_resume(module, monkeypatch, folder, save_buffer):
    """Train, resume: the count of steps for the delay, the buffer if it was saved, and all networks go on."""
    given = dict(save_buffer=save_buffer, buffer_size=99, policy_frequency=7, batch_size=8)
    saves, batches, choices, times, restored = [], [], [], [], {}

    def state(run):
        return {name: copy.deepcopy(run.parts[name].state_dict()) for name in ("agent", "target", "optimizers")}

    with monkeypatch.context() as patch:
        spy(patch, module.Run, "save", lambda run: saves.append(state(run)))
        learn(module, folder, "TaggedBox", total_timesteps=300, **given)
        saved = torch.load(folder / "run" / "checkpoint.pt")["buffer"]
        spy(patch, module, "update", lambda *inputs: batches.append(inputs[3]))
        if hasattr(module, "update_policy"):
            spy(patch, module, "update_policy", lambda *_: choices.append(len(batches)))
        spy(patch, module.ReplayBuffer, "add", lambda *_: times.append(len(batches)))
        spy(patch, module, "Run", after=lambda run, *_: restored.update(state(run)))
        learn(module, folder, "TaggedBox", total_timesteps=600, resume=str(folder / "run"), **given)
    for name, part in saves[0].items():
        assert restored[name].keys() == part.keys()
        assert all(torch.equal(restored[name][field], part[field]) for field in part)
    assert restored["optimizers"]["critic.t"] == 270
    if hasattr(module, "update_policy"):
        assert choices == [i for i in range(1, len(batches) + 1) if (270 + i) % 7 == 0]
    true = {key(row["obs"]): row for env in envs.Tagged.instances for row in env.log}
    rows = [(obs, batch["next_obs"][i]) for batch in batches for i, obs in enumerate(batch["obs"])]
    assert all(key(true[key(obs)]["next_obs"]) == key(next_obs) for obs, next_obs in rows)
    old = sum(bool(obs[0] < 3) for obs, _ in rows)  # transitions of the environments of the first run
    if save_buffer:
        assert saved
        assert times[1:4] == [0, 3, 6]  # it goes on learning with its first step
        assert old > 50
    else:
        assert saved == {}
        assert times == [0] * 11 + [3 * j for j in range(90)]  # 30 steps to fill it, as at the start
        assert old == 0


@each_module
@pytest.mark.parametrize("save_buffer", [False, True])
def test_resume(module, monkeypatch, tmp_path, save_buffer):
    """A buffer that comes back empty, a target that starts afresh, a delay that starts its count anew."""
    check_resume(module, monkeypatch, tmp_path, save_buffer)


def test_resume_sees(monkeypatch, tmp_path):
    sees(monkeypatch, check_resume, 'int(optimizers["critic"].t)', "0", monkeypatch, tmp_path, True, source=td3)


@each_module
def test_a_resumed_run_does_not_act_at_random(module, monkeypatch, tmp_path):
    """Uniform actions while an empty buffer is filled again: the policy that is there fills it."""
    acting = []
    learn(module, tmp_path, "TaggedBox")
    with monkeypatch.context() as patch:
        spy(patch, module.Agent, "act", lambda *_, **__: acting.append(1))
        spy(patch, module, "evaluate", lambda *_: acting.append(len(acting)))
        learn(module, tmp_path, "TaggedBox", total_timesteps=600, resume=str(tmp_path / "run"))
    assert 100 in acting


@each_module
def test_compiled_training_equals_eager_training(module, monkeypatch, tmp_path):
    """A compiled step on copies of the parameters, an actor that follows the old critic, noise of its own."""
    runs = []
    for compiled in (False, True):
        parts, folder = [], tmp_path / str(compiled)
        with monkeypatch.context() as patch:
            spy(patch, module, "Run", after=lambda run, *_: parts.append(run.parts))  # noqa: B023
            learn(module, folder, "TaggedBox", compile=compiled, anneal_lr=True, learning_rate=3e-3, tau=0.05)
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        state = {name: parts[0][name].state_dict() for name in ("agent", "target")}
        runs.append((state, [line["td_loss"] for line in lines]))
    (eager, eager_losses), (compiled, compiled_losses) = runs
    for name in eager:
        for field in eager[name]:
            torch.testing.assert_close(compiled[name][field], eager[name][field], atol=1e-4, rtol=1e-3)
    assert compiled_losses == pytest.approx(eager_losses, rel=1e-3)
    assert eager_losses[-1] > 0


# Environments whose values are known


class Follow(envs.ObsValue):
    """Reward -|a - optimum|^2, where the optimum of each dimension depends on the observation, -1 or 1."""

    action_space = BOX

    def step(self, action):
        optimum = np.array([0.5 + 0.8 * self.state, -1.25 - 1.2 * self.state])
        return self.observe(), -float(np.square(action - optimum).sum()), True, False, {}


class BoxImage(envs.Image):
    """The lit half says whether the reward is 1 or -1, whatever the action."""

    action_space = Box(-1, 1, (1,), np.float32)

    def step(self, action):
        reward = 2.0 * self.state - 1
        return self.observe(), reward, True, False, {}


gym.register("test/Follow-v0", Follow, disable_env_checker=True, order_enforce=False)
gym.register("test/BoxImage-v0", BoxImage, disable_env_checker=True, order_enforce=False)
for _env in (envs.ValueOnly, envs.ObsValue, envs.Discounting, envs.Truncation, envs.Successor, envs.BothEnds):
    _twin = type(f"Box{_env.__name__}", (_env,), dict(action_space=Box(-1, 1, (1,), np.float32)))
    gym.register(f"test/{_twin.__name__}-v0", _twin, disable_env_checker=True, order_enforce=False)


def probe(module, monkeypatch, folder, name, log_alpha=-20.0, **given):
    """Train on test/<name>-v0, SAC with next to no entropy bonus; the agent and the mean return of its policy."""
    plain = dict(total_timesteps=1600, num_envs=4, learning_rate=5e-3, gamma=0.9, eval_episodes=20, anneal_lr=True)
    plain |= dict(train_frequency=2, batch_size=32, learning_starts=64, tau=0.2)
    agents = []
    with monkeypatch.context() as patch:
        if hasattr(module, "squash"):
            fill = lambda _, agent, *rest: agent.actor.log_alpha.data.fill_(log_alpha)  # noqa: E731
            spy(patch, module.Agent, "__init__", after=fill)
        spy(patch, module, "evaluate", before=lambda agent, *_: agents.append(agent))
        result = learn(module, folder, name, **(plain | given))
    return agents[0], result["eval_mean"]


def q(agent, *obs):
    """Q(s, 0) of observations of one number: a row for each observation, a column for each critic."""
    with torch.no_grad():
        return agent.critic(torch.tensor(obs, dtype=torch.float32)[:, None], torch.zeros(len(obs), 1)).numpy()


def check_values(module, monkeypatch, folder, name, values, tolerance, **given):
    agent, _ = probe(module, monkeypatch, folder, name, **given)
    found = q(agent, *values)
    assert found == near(np.array(list(values.values()))[:, None].repeat(found.shape[1], 1), tolerance)


@each_module
@pytest.mark.parametrize(
    ("name", "values", "tolerance", "steps"),
    [
        ("BoxValueOnly", {1: 1}, 0.05, 800),
        ("BoxObsValue", {-1: -1, 1: 1}, 0.05, 800),
        ("BoxDiscounting", {-1: 0.9, 1: 1}, 0.04, 1600),
        (
            "BoxTruncation",
            {1: 10},
            0.25,
            4000,
        ),  # 4.7 with truncation for termination, 8.9 with reset steps learned from
        ("BoxSuccessor", {-1: 9, 1: 10}, 0.25, 4000),
        ("BoxBothEnds", {1: 1}, 0.05, 800),
    ],
)
def test_values(module, monkeypatch, tmp_path, name, values, tolerance, steps):
    """Rows mixed up, a wrong discount, every misuse of an end of an episode."""
    check_values(module, monkeypatch, tmp_path, name, values, tolerance, total_timesteps=steps)


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("reward, terminated, valid)", "reward, done, valid)", 1 / (1 - 0.9 * 7 / 8)),
        ("valid = ~done  #", "valid = ~done | True  #", 80 / 9),  # Q = 8/9 + 0.9 Q
    ],
)
def test_truncation_probe_sees(monkeypatch, tmp_path, old, new, wrong):
    """A probe that could not fail: with the bug put in, Q is not 10 but the number that the bug is known by."""
    module = planted(monkeypatch, old, new, ddpg)
    check_values(module, monkeypatch, tmp_path, "BoxTruncation", {1: wrong}, 0.35, total_timesteps=4000)


def test_the_entropy_is_part_of_the_value(monkeypatch, tmp_path):
    """Reward 1 at a step, then the entropy of the next action for ever: Q = 10 + 9 alpha H, here with alpha = 1."""
    old = "temperature_loss = alpha *"
    module = planted(monkeypatch, old, "temperature_loss = 0 * alpha *", sac)
    agent, _ = probe(module, monkeypatch, tmp_path, "BoxTruncation", log_alpha=0.0, total_timesteps=4000)
    noise = torch.randn(20_000, 1)
    with torch.no_grad():
        log_probs = module.squash(*agent(torch.ones(20_000, 1)), noise)[1]
        values = agent.critic(torch.ones(20_000, 1), torch.tanh(noise)).mean(0)
    entropy = -log_probs.mean().item()
    assert entropy == near(math.log(2), 0.1)  # nothing but the entropy is paid: uniform on [-1, 1]
    assert values.numpy() == near([10 + 9 * entropy] * 2, 0.5)


@each_module
def test_bounds_of_each_dimension_and_side(module, monkeypatch, tmp_path):
    """One bound for all dimensions, symmetric bounds, a bias added twice, actions outside the space."""
    monkeypatch.setattr(envs.Bounds, "actions", [])
    agent, mean = probe(module, monkeypatch, tmp_path, "Bounds", log_alpha=0.0, total_timesteps=3200, hidden_size=32)
    assert all(map(envs.Bounds.action_space.contains, envs.Bounds.actions))
    chosen = module.action_map(envs.Bounds.action_space)(agent.act(np.ones((1, 1), np.float32), greedy=True))
    assert chosen[0].tolist() == near(envs.Bounds.optimum.tolist(), 0.25)
    assert mean == near(0, 0.08)


@each_module
def test_policy_depends_on_the_observation(module, monkeypatch, tmp_path):
    """Actions, rewards and observations of different rows mixed up; a gradient that reaches one dimension alone."""
    agent, mean = probe(module, monkeypatch, tmp_path, "Follow", log_alpha=0.0, total_timesteps=4800, hidden_size=32)
    chosen = module.action_map(BOX)(agent.act(np.float32([[-1], [1]]), greedy=True))
    assert chosen == near([[-0.3, -0.05], [1.3, -2.45]], 0.3)
    assert mean == near(0, 0.1)


@each_module
def test_image(module, monkeypatch, tmp_path):
    """Frames (C, H, W) in uint8 scaled twice or not at all, or with axes mixed up."""
    given = dict(total_timesteps=800, learning_rate=1e-3, batch_size=16)
    agent, _ = probe(module, monkeypatch, tmp_path, "BoxImage", **given)
    obs, _ = module.make_envs("test/BoxImage-v0", 40).reset(seed=1)
    right = torch.from_numpy(obs[:, 1, :, 20:].max((1, 2)) > obs[:, 1, :, :16].max((1, 2)))
    with torch.no_grad():
        values = agent.critic(torch.from_numpy(obs), torch.zeros(40, 1))
    assert ((values > 0) == right[:, None]).float().mean() > 0.9


# Refusals and defaults


@each_module
def test_discrete_actions_are_refused(module, tmp_path):
    """One sentence with the space, before anything is written."""
    with pytest.raises(ValueError, match=r"^action space Discrete\(3\) is not supported: it must be a Box of floats$"):
        learn(module, tmp_path, "Tagged")
    assert not (tmp_path / "run").exists()


@each_module
@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_starts", 300), ("buffer_size", 5), ("tau", 1.1), ("exploration_noise", -0.1), ("policy_noise", -1.0),
     ("noise_clip", -0.5), ("policy_frequency", 0), ("train_frequency", 0)],
)  # fmt: skip
def test_impossible_values(module, tmp_path, name, value):
    if hasattr(module.Args, name):
        with pytest.raises(ValueError, match=f"{name} .*{value}"):
            make_args(module, tmp_path, **(dict(num_envs=3, total_timesteps=300, learning_starts=30) | {name: value}))
