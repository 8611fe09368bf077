"""The equations of DQN, Double DQN and Dueling DQN against slow references, and each known bug planted and seen."""

import copy

import numpy as np
import pytest
import torch
from conftest import spy
from gymnasium.spaces import Discrete
from off_policy import (
    FRAMES,
    GRID,
    OFF_POLICY,
    bugs,
    each_epsilon_greedy,
    each_q_learning,
    each_squared_error,
    gradient,
    make_agents,
    make_batch,
)
from runs import each, fails_with_a_bug, name_of

from algos import double_dqn, dqn, dueling_dqn

# The target and the loss


@each(OFF_POLICY)
def test_td_target_against_a_loop(module):
    """A bootstrap at a termination, a discount that is missing, or applied to the reward."""
    random = np.random.default_rng(0)
    rewards = random.normal(size=50)
    values = random.normal(size=50)
    terminated = random.random(50) < 0.4
    expected = [r if end else r + 0.9 * v for r, v, end in zip(rewards, values, terminated)]
    found = module.td_target(torch.tensor(rewards), torch.tensor(terminated), torch.tensor(values), 0.9)
    assert found.shape == (50,)
    assert found.numpy() == pytest.approx(np.array(expected), abs=1e-6)


@bugs(
    ("dqn", "gamma * ~terminated * next_values", "gamma * next_values"),
    ("dqn", "gamma * ~terminated * next_values", "gamma * terminated * next_values"),
    ("dqn", "gamma * ~terminated * next_values", "~terminated * next_values"),
    ("dqn", "rewards + gamma * ~terminated * next_values", "gamma * (rewards + ~terminated * next_values)"),
)
def test_td_target_sees(request, name, old, new):
    fails_with_a_bug(request, test_td_target_against_a_loop, name, old, new)


DOUBLE_Q = ("double_dqn", "dueling_dqn", "prioritized_dqn")  # the online network chooses, the target values


def slow_loss(module, agent, target, batch, gamma):
    """The loss row by row; the scripts differ in which network chooses the next action, and rows may have a weight."""
    total = 0.0
    for i in range(len(batch["obs"])):
        online = agent(batch["next_obs"][i : i + 1])[0].tolist()
        held = target(batch["next_obs"][i : i + 1])[0].tolist()
        preferences = online if name_of(module) in DOUBLE_Q else held
        y = batch["rewards"][i].item()
        if not batch["terminated"][i]:
            discount = batch["discounts"][i].item() if "discounts" in batch else gamma
            y += discount * held[preferences.index(max(preferences))]
        weight = batch["weights"][i].item() if "weights" in batch else 1
        total += weight * (agent(batch["obs"][i : i + 1])[0, batch["actions"][i]] - y) ** 2
    return total / len(batch["obs"])


@each_squared_error
def test_loss_and_gradient_against_a_loop(module):
    """(B, 1) against (B,), a gradient through the target, clipped errors, networks mixed up."""
    torch.manual_seed(4)
    agent, target, args = make_agents(module, gamma=0.8)
    batch = make_batch(module)
    loss, metrics = module.critic_loss(agent, target, batch, args)
    expected = slow_loss(module, agent, target, batch, 0.8)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    found = gradient(loss, agent.parameters())
    torch.testing.assert_close(found, gradient(expected, agent.parameters()), atol=1e-5, rtol=1e-3)
    values = agent(batch["obs"])[torch.arange(64), batch["actions"]]
    assert metrics["critic_loss"].item() == loss.item()
    assert metrics["q_value"].item() == pytest.approx(values.mean().item(), abs=1e-5)
    assert not any(metric.requires_grad for metric in metrics.values())
    both = module.critic_loss(agent, agent, batch, args)[0]  # the target is a constant, whoever made it
    alone = module.critic_loss(agent, copy.deepcopy(agent), batch, args)[0]
    torch.testing.assert_close(gradient(both, agent.parameters()), gradient(alone, agent.parameters()))


NEXT = 'target(batch["next_obs"]).amax(-1)'
DOUBLE = 'target(batch["next_obs"]).gather(-1, agent(batch["next_obs"]).argmax(-1, keepdim=True)).squeeze(-1)'


@bugs(
    ("dqn", "    with torch.no_grad():\n        next_values", "    if True:\n        next_values"),
    ("dqn", NEXT, 'agent(batch["next_obs"]).amax(-1)'),
    ("dqn", NEXT, 'target(batch["obs"]).amax(-1)'),
    ("dqn", NEXT, 'target(batch["next_obs"]).mean(-1)'),
    ("dqn", NEXT, DOUBLE),
    ("dqn", 'batch["actions"][:, None]).squeeze(-1)', 'batch["actions"][:, None])'),
    ("dqn", "F.mse_loss(q, y)", "F.mse_loss(q, y) / 2"),
    ("dqn", "F.mse_loss(q, y)", "F.smooth_l1_loss(q, y)"),
    ("double_dqn", 'next_actions = agent(batch["next_obs"])', 'next_actions = target(batch["next_obs"])'),
    ("double_dqn", 'next_values = target(batch["next_obs"])', 'next_values = agent(batch["next_obs"])'),
    ("dueling_dqn", 'next_actions = agent(batch["next_obs"])', 'next_actions = target(batch["next_obs"])'),
    ("dueling_dqn", 'next_values = target(batch["next_obs"])', 'next_values = agent(batch["next_obs"])'),
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_loss_sees(request, name, old, new):
    fails_with_a_bug(request, test_loss_and_gradient_against_a_loop, name, old, new)


@pytest.mark.parametrize(("module", "expected"), [(dqn, 7.0), (double_dqn, 2.0), (dueling_dqn, 2.0)], ids=str)
def test_where_choice_and_value_differ(monkeypatch, module, expected):
    """By hand: the online network prefers action 0, which the target values 2; the target's own maximum is 7."""
    online = torch.tensor([[5.0, 1.0, 3.0]])
    held = torch.tensor([[2.0, 7.0, 4.0]])
    batch = dict(obs=torch.zeros(1), next_obs=torch.zeros(1), actions=torch.tensor([0]))
    batch |= dict(rewards=torch.zeros(1), terminated=torch.tensor([False]))
    seen = []
    spy(monkeypatch, module, "td_target", before=lambda *inputs: seen.append(inputs[2].item()))
    module.critic_loss(lambda _: online, lambda _: held, batch, module.Args())
    assert seen == [expected]


@pytest.mark.parametrize(("module", "expected"), [(dqn, 1.5388), (double_dqn, 0.0), (dueling_dqn, 0.0)], ids=str)
def test_overestimation_shrinks(monkeypatch, module, expected):
    """Van Hasselt's toy: actions worth 0, estimates that are noise; their maximum is too high by E[max of normals]."""
    rows = 20_000
    online = torch.randn(rows, 10)
    held = torch.randn(rows, 10)
    batch = dict(obs=torch.zeros(rows), next_obs=torch.zeros(rows), actions=torch.zeros(rows, dtype=torch.int64))
    batch |= dict(rewards=torch.zeros(rows), terminated=torch.zeros(rows, dtype=torch.bool))
    means = []
    spy(monkeypatch, module, "td_target", before=lambda *inputs: means.append(inputs[2].mean().item()))
    module.critic_loss(lambda _: online, lambda _: held, batch, module.Args())
    assert means == [pytest.approx(expected, abs=0.04)]


# The network


@each([dueling_dqn])
def test_dueling(module):
    """Q = V + A - mean A: a constant added to A changes nothing, one added to V moves all alike."""
    agent, _, _ = make_agents(module)
    obs = torch.randn(6, 5)
    x = agent.encoder(obs)
    values = agent.value(x)
    advantages = agent.advantage(x)
    q = agent(obs)
    assert values.shape == (6, 1)
    for i in range(6):
        mean = sum(advantages[i].tolist()) / 3
        for a in range(3):
            assert q[i, a].item() == pytest.approx(values[i, 0].item() + advantages[i, a].item() - mean, abs=1e-5)
    assert q.mean(-1).tolist() == pytest.approx(values[:, 0].tolist(), abs=1e-5)
    with torch.no_grad():
        agent.advantage[-1].bias += 3.7
        torch.testing.assert_close(agent(obs), q, atol=1e-5, rtol=1e-5)
        agent.value[-1].bias += 2.0
        torch.testing.assert_close(agent(obs), q + 2, atol=1e-5, rtol=1e-5)

    x = agent.encoder(obs)
    advantages = agent.advantage(x)
    by_hand = agent.value(x) + advantages - sum(advantages.split(1, -1)) / 3
    found = gradient(agent(obs).square().sum(), agent.parameters())  # both streams move what they share
    expected = gradient(by_hand.square().sum(), agent.parameters())
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@bugs(
    ("dueling_dqn", "advantages - advantages.mean(-1, keepdim=True)", "advantages"),
    ("dueling_dqn", "advantages - advantages.mean(-1, keepdim=True)", "advantages - advantages.amax(-1, keepdim=True)"),
    ("dueling_dqn", "advantages - advantages.mean(-1, keepdim=True)", "advantages - advantages.mean(0, keepdim=True)"),
    ("dueling_dqn", "advantages - advantages.mean(-1, keepdim=True)", "advantages - advantages.mean()"),
    ("dueling_dqn", "return self.value(x) +", "return self.value(x.detach()) +"),
    ("dueling_dqn", "- advantages.mean(-1, keepdim=True)", "- advantages.mean(-1, keepdim=True).detach()"),
)
def test_dueling_sees(request, name, old, new):
    fails_with_a_bug(request, test_dueling, name, old, new)


@each_squared_error
def test_layers(module):
    """A size other than asked for, a layer too many or too few, or two with nothing between them."""
    agent, _, _ = make_agents(module, hidden_size=12)
    layers = [layer for layer in agent.modules() if isinstance(layer, torch.nn.Linear)]
    obs = torch.randn(9, 5)
    assert [layer.out_features for layer in layers] == ([12, 12, 1, 12, 3] if module is dueling_dqn else [12, 12, 3])
    x = layers[0](obs).relu()
    outputs = [last(hidden(x).relu()) for hidden, last in zip(layers[1::2], layers[2::2])]
    advantages = outputs[-1] - outputs[-1].mean(-1, keepdim=True)
    expected = outputs[0] + advantages if module is dueling_dqn else outputs[0]
    torch.testing.assert_close(agent(obs), expected)


@each_q_learning
def test_images_and_numbers(module):
    """Pixels divided by 255 twice or never, channels of boolean images taken for rows, numbers not made one-hot."""
    for space, prepare in ((FRAMES, lambda x: x.float() / 255), (GRID, lambda x: x.permute(0, 3, 1, 2).float())):
        agent, _, _ = make_agents(module, space)
        obs = torch.from_numpy(np.stack([space.sample() for _ in range(3)]))
        torch.testing.assert_close(agent.encoder[0](obs), prepare(obs))
        assert agent(obs).shape == (3, 3)
        assert agent(obs).std(0).min() > 0
    agent, _, _ = make_agents(module, Discrete(3, start=5))
    first = next(layer for layer in agent.modules() if isinstance(layer, torch.nn.Linear))
    seen = []
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].tolist()))
    agent(torch.tensor([5, 7]))
    assert seen == [[[1, 0, 0], [0, 0, 1]]]


@bugs(
    ("dqn", "self.scale = 255 if", "self.scale = 1 if"),
    ("dqn", "x = x.movedim(-1, 1)", "x = x"),
    ("dqn", "obs.long() - self.start", "obs.long() % self.n"),
)
def test_images_see(request, name, old, new):
    fails_with_a_bug(request, test_images_and_numbers, name, old, new)


# The policy


@each_epsilon_greedy
def test_epsilon_greedy(module):
    """Random actions too often or too rarely, of the wrong range, shared by all environments, or in the evaluation."""
    without_noise = dict(noisy=False) if hasattr(module.Args, "noisy") else {}
    agent, _, _ = make_agents(module, **without_noise)
    rows = 40_000
    obs = torch.randn(1, 5).expand(rows, 5).numpy()
    best = agent(torch.from_numpy(obs[:1])).argmax().item()
    for epsilon in (0.0, 0.3, 1.0):
        agent.epsilon = epsilon
        counts = np.bincount(agent.act(obs), minlength=3)
        expected = rows * np.array([epsilon / 3 + (1 - epsilon) * (action == best) for action in range(3)])
        assert len(counts) == 3
        assert (abs(counts - expected) <= 5 * np.sqrt(expected * (1 - expected / rows))).all()
        assert (agent.act(obs[:100], greedy=True) == best).all()


@bugs(
    ("dqn", "explore = torch.rand(len(actions)).numpy()", "explore = torch.rand(1).numpy()"),
    ("dqn", "torch.randint(values.shape[-1], (len(actions),))", "torch.randint(values.shape[-1], (1,))"),
    ("dqn", "torch.randint(values.shape[-1],", "torch.randint(values.shape[-1] - 1,"),
    ("dqn", "        if greedy:\n", "        if False:\n"),
    ("dqn", "np.where(explore, random_actions, actions)", "np.where(explore, actions, random_actions)"),
)
def test_epsilon_greedy_sees(request, name, old, new):
    fails_with_a_bug(request, test_epsilon_greedy, name, old, new)


@each_q_learning
def test_greedy_takes_no_random_numbers(module):
    """An evaluation that changes what a run does next."""
    agent, _, _ = make_agents(module)
    obs = torch.randn(50, 5)
    state = torch.get_rng_state()
    assert agent.act(obs.numpy(), greedy=True).tolist() == agent(obs).argmax(-1).tolist()
    assert torch.equal(torch.get_rng_state(), state)


@each_epsilon_greedy
def test_linear_schedule(module):
    """A schedule that starts late, overshoots, or divides by a duration of 0."""
    values = [module.linear_schedule(1.0, 0.1, 10, t) for t in (0, 1, 5, 9, 10, 11, 10**6)]
    assert values == pytest.approx([1.0, 0.91, 0.55, 0.19, 0.1, 0.1, 0.1])
    assert module.linear_schedule(0.1, 1.0, 10, 5) == pytest.approx(0.55)
    assert module.linear_schedule(1.0, 0.1, 0, 0) == 0.1
