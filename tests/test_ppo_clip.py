"""The equations of PPO-Clip against slow and independent references."""

import json

import envs
import numpy as np
import pytest
import torch
from conftest import make_args, spy
from gymnasium.spaces import Box, Discrete
from torch.distributions import Categorical, Normal

from algos import ppo_clip
from algos.ppo_clip import Adam, Agent, action_map, compute_gae, ppo_loss

OBS = Box(-np.inf, np.inf, (5,), np.float32)
BOX = Box(np.float32([-1, -3]), np.float32([2, 0.5]))
BOTH = pytest.mark.parametrize("space", [Discrete(4), BOX], ids=["discrete", "box"])


def make_agent(space, obs_space=OBS, **given):
    """An agent whose policy is far from uniform and whose deviations differ, and its arguments."""
    torch.manual_seed(3)
    args = ppo_clip.Args(**given)
    agent = Agent(obs_space, space, args)
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300 if agent.discrete else 70)
        if agent.log_std is not None:
            agent.log_std.copy_(torch.tensor([-0.5, 0.3]))
    return agent, args


def make_batch(agent, rows=64, shift=0.0):
    """A batch as the learner gets it; the ratio of each row is exp(shift)."""
    obs = torch.randn(rows, 5)
    with torch.no_grad():
        policy, _ = agent(obs)
        actions = policy.sample()
        log_probs = policy.log_prob(actions) - shift
    return dict(
        obs=obs, actions=actions, log_probs=log_probs, advantages=torch.randn(rows), returns=torch.randn(rows) * 3
    )


def reference(agent, obs):
    """pi and V from the layers alone; the distributions of vectors keep one factor per dimension."""
    out, values = agent.actor(obs), agent.critic(obs)[:, 0]
    return Categorical(logits=out) if agent.discrete else Normal(out, agent.log_std.exp()), values


def per_row(agent, x):
    return x if agent.discrete else x.sum(-1)


def gradients(agent, loss):
    grads = torch.autograd.grad(loss, list(agent.parameters()), allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(agent.parameters(), grads)]
    )


# GAE


def gae_case(seed, T=11, N=4):
    random = np.random.default_rng(seed)
    terminated, truncated = random.random((2, T, N)) < 0.2  # also both at once
    return random.normal(size=(T, N)), random.normal(size=(T + 1, N)), terminated, terminated | truncated


def gae(rewards, values, terminated, done, gamma, lam):
    return compute_gae(*map(torch.from_numpy, (rewards, values, terminated, done)), gamma, lam).numpy()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.7), (0.99, 0.95), (1.0, 1.0), (0.5, 0.0), (0.0, 1.0)])
def test_gae_against_double_loop(seed, gamma, lam):
    """One mask for both kinds of end, a trace or a bootstrap shifted by one step, gamma or lambda applied twice."""
    rewards, values, terminated, done = gae_case(seed)
    expected = np.zeros_like(rewards)
    for t, n in np.ndindex(rewards.shape):
        for k in range(t, len(rewards)):
            delta = rewards[k, n] - values[k, n] + (0 if terminated[k, n] else gamma * values[k + 1, n])
            expected[t, n] += (gamma * lam) ** (k - t) * delta
            if done[k, n]:
                break
    assert gae(rewards, values, terminated, done, gamma, lam) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_gae_of_lambda_1_is_monte_carlo(seed):
    """Returns that forget the bootstrap at a truncation or at the end of the rollout, or add one at a termination."""
    rewards, values, terminated, done = gae_case(seed)
    expected = np.zeros_like(rewards)
    for t, n in np.ndindex(rewards.shape):
        k = t
        while k < len(rewards) - 1 and not done[k, n]:
            k += 1
        expected[t, n] = sum(0.9 ** (j - t) * rewards[j, n] for j in range(t, k + 1)) - values[t, n]
        expected[t, n] += 0 if terminated[k, n] else 0.9 ** (k + 1 - t) * values[k + 1, n]
    assert gae(rewards, values, terminated, done, 0.9, 1.0) == pytest.approx(expected, abs=1e-5)


def test_gae_of_lambda_0_is_the_td_error():
    """A trace that survives lambda = 0."""
    rewards, values, terminated, done = gae_case(0)
    expected = rewards + 0.9 * np.where(terminated, 0, values[1:]) - values[:-1]
    assert gae(rewards, values, terminated, done, 0.9, 0.0) == pytest.approx(expected, abs=1e-5)


# The policy


@BOTH
def test_log_probs_and_entropy(space):
    """A factor of the density forgotten, dimensions averaged instead of summed, the entropy of one dimension only."""
    agent, _ = make_agent(space)
    batch = make_batch(agent)
    policy, values = agent(batch["obs"])
    out, actions = agent.actor(batch["obs"]).double(), batch["actions"]
    if agent.discrete:
        probs = out.exp() / out.exp().sum(-1, keepdim=True)
        log_prob, entropy = probs[torch.arange(64), actions].log(), -(probs * probs.log()).sum(-1)
    else:
        std = agent.log_std.double().exp()
        density = (-((actions - out) ** 2) / (2 * std**2)).exp() / (std * (2 * torch.pi) ** 0.5)
        log_prob, entropy = density.prod(-1).log(), (0.5 + 0.5 * np.log(2 * np.pi) + std.log()).sum().expand(64)
    assert policy.log_prob(actions).shape == policy.entropy().shape == values.shape == (64,)
    torch.testing.assert_close(policy.log_prob(actions).double(), log_prob, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(policy.entropy().double(), entropy, atol=1e-5, rtol=1e-5)


def test_actions_are_scaled_by_dimension():
    """Scalar bounds, symmetric bounds, a bias added twice, and infinite bounds that turn actions into nan."""
    space = Box(np.float32([-1, -3, -np.inf, 0]), np.float32([2, 0.5, np.inf, np.inf]))
    inside, outside = np.float32([[0, 0, 7, 0.5], [-1, 1, -7, 3]]), np.float32([[-1.5, 1.5, 1e3, -2]])
    to_env = action_map(space)
    assert to_env(inside) == pytest.approx(np.array([[0.5, -1.25, 7, 0.5], [-1, 0.5, -7, 3]]), abs=1e-6)
    assert to_env(outside) == pytest.approx(np.array([[-1, 0.5, 1e3, 0]]))
    assert to_env(inside).dtype == np.float32
    assert action_map(Discrete(3, start=-1))(np.array([0, 2])).tolist() == [-1, 1]


# The loss


@BOTH
def test_first_gradient_is_the_policy_gradient(space):
    """At ratio 1: a sign, a coefficient or a factor of any of the three terms, or a gradient through the old policy."""
    agent, args = make_agent(space, vf_coef=0.7, ent_coef=0.3)
    batch = make_batch(agent)
    loss, metrics = ppo_loss(agent, batch, 0.2, args)
    policy, values = reference(agent, batch["obs"])
    log_probs, entropy = per_row(agent, policy.log_prob(batch["actions"])), per_row(agent, policy.entropy()).mean()
    value_loss = ((values - batch["returns"]) ** 2).mean()
    plain = -(batch["advantages"] * log_probs).mean() + 0.7 * value_loss - 0.3 * entropy
    torch.testing.assert_close(gradients(agent, loss), gradients(agent, plain), atol=1e-5, rtol=1e-4)
    assert metrics["approx_kl"].item() == pytest.approx(0, abs=1e-6)
    assert metrics["clip_fraction"].item() == 0
    assert metrics["entropy"].item() == pytest.approx(entropy.item(), abs=1e-5)
    assert metrics["value_loss"].item() == pytest.approx(value_loss.item(), rel=1e-5)
    assert metrics["policy_loss"].item() == pytest.approx(-batch["advantages"].mean().item(), abs=1e-5)
    assert not any(metric.requires_grad for metric in metrics.values())


@BOTH
@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.5, 0.85, 1.15, 1.5])
def test_clipping_is_one_sided(space, advantage, ratio):
    """A clipped ratio without the minimum, a maximum instead, a clip range of [1/(1+eps), 1+eps], eps taken as 0.1."""
    agent, args = make_agent(space, vf_coef=0.0)
    batch = make_batch(agent, shift=np.log(ratio))
    batch["advantages"] = torch.full((64,), advantage)
    loss, metrics = ppo_loss(agent, batch, 0.2, args)
    gone = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)  # gained all that it may gain
    log_probs = per_row(agent, reference(agent, batch["obs"])[0].log_prob(batch["actions"]))
    plain = -(advantage * ratio * log_probs).mean()
    grad, expected = gradients(agent, loss), gradients(agent, plain)
    assert expected.norm() > 0.01
    torch.testing.assert_close(grad, expected * (0 if gone else 1), atol=1e-5, rtol=1e-3)
    clipped = min(max(ratio, 0.8), 1.2)
    assert loss.item() == pytest.approx(-min(ratio * advantage, clipped * advantage), abs=1e-5)
    assert metrics["clip_fraction"].item() == (abs(ratio - 1) > 0.2)
    assert metrics["approx_kl"].item() == pytest.approx(ratio - 1 - np.log(ratio), abs=1e-4)


@BOTH
def test_loss_row_by_row(space):
    """(B, 1) against (B,): the loss of a batch is the mean of the losses of its rows, in whatever order."""
    agent, args = make_agent(space, ent_coef=0.1)
    batch = make_batch(agent)
    batch["log_probs"] += 0.3 * torch.randn(64)
    loss, metrics = ppo_loss(agent, batch, 0.2, args)
    assert loss.shape == ()
    assert all(metric.shape == () for metric in metrics.values())
    rows = [ppo_loss(agent, {name: x[i : i + 1] for name, x in batch.items()}, 0.2, args) for i in range(64)]
    assert loss.item() == pytest.approx(np.mean([row.item() for row, _ in rows]), abs=1e-5)
    for name, metric in metrics.items():
        assert metric.item() == pytest.approx(np.mean([row[name].item() for _, row in rows]), abs=1e-5)
    order = torch.randperm(64)
    permuted, _ = ppo_loss(agent, {name: x[order] for name, x in batch.items()}, 0.2, args)
    assert permuted.item() == pytest.approx(loss.item(), abs=1e-5)


# The gradient step


def parameters(agent):
    return torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone()


@pytest.mark.parametrize("epsilon", [dict(), dict(eps=1e-8)])
def test_adam_equals_that_of_torch(epsilon):
    """A bias left uncorrected, moments mixed up, epsilon inside the root, parameters that stay behind theta."""
    ours, theirs = (torch.nn.Linear(3, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    adam, reference = Adam(ours), torch.optim.Adam(theirs.parameters(), **(dict(eps=1e-5) | epsilon))
    for step in range(300):
        rate = 0.01 * (1 - step / 300)
        reference.param_groups[0]["lr"] = rate
        gradient = torch.randn(8) * torch.logspace(-6, 1, 8)
        for parameter, part in zip(theirs.parameters(), (gradient[:6].view(2, 3), gradient[6:])):
            parameter.grad = part
        reference.step()
        adam.step(gradient, torch.tensor(rate), **epsilon)
    torch.testing.assert_close(parameters(ours), parameters(theirs), atol=1e-6, rtol=1e-4)
    assert set(adam.state_dict()) == {"theta", "m", "v", "t", "weight1", "weight2"}


@BOTH
@pytest.mark.parametrize("max_grad_norm", [0.05, 1e6])
def test_update_scales_the_global_gradient(monkeypatch, space, max_grad_norm):
    """Gradients clipped per tensor or per element, not at all, always scaled, or parameters that never change."""
    agent, args = make_agent(space, max_grad_norm=max_grad_norm)
    batch = make_batch(agent)
    gradient = gradients(agent, ppo_loss(agent, batch, 0.2, args)[0])
    adam, steps = Adam(agent), []
    spy(monkeypatch, adam, "step", before=lambda *inputs: steps.append(inputs))
    before = parameters(agent)
    ppo_clip.update(agent, adam, batch, torch.tensor(0.25), torch.tensor(0.2), args)
    assert gradient.norm() > 0.1
    expected = gradient * min(1, max_grad_norm / gradient.norm().item())
    ((scaled, learning_rate),) = steps
    torch.testing.assert_close(scaled, expected, atol=1e-5, rtol=1e-3)
    assert learning_rate == 0.25
    assert (parameters(agent) != before).float().mean() > 0.9


# train()


def watch(monkeypatch, folder, **given):
    """Train on a Tagged environment; return each iteration's valid rows and advantages and its gradient steps."""
    iterations, T, N = [], 16, 3
    monkeypatch.setattr(envs.Tagged, "instances", [])

    def after_gae(advantages, *_):
        k = len(iterations)
        rows = [(row["t"] - k * T, env.index, row) for env in envs.Tagged.instances for row in env.log[-T:]]
        rows = {tuple(row["obs"].tolist()): advantages[t, i].item() for t, i, row in rows if t >= 0}
        iterations.append((rows, []))

    def before_update(agent, optimizer, batch, learning_rate, clip_coef, args):
        with torch.no_grad():
            policy, _ = agent(batch["obs"])
            ratio = (policy.log_prob(batch["actions"]) - batch["log_probs"]).exp()
        step = dict(batch=batch, clip_coef=float(clip_coef), lr=float(learning_rate), ratio=ratio)
        iterations[-1][1].append(step)

    def after_update(metrics, *_):
        iterations[-1][1][-1]["metrics"] = metrics

    spy(monkeypatch, ppo_clip, "compute_gae", after=after_gae)
    spy(monkeypatch, ppo_clip, "update", before_update, after_update)
    plain = dict(env_id="test/Tagged-v0", num_envs=N, num_steps=T, total_timesteps=N * T * 5, num_minibatches=4)
    ppo_clip.train(make_args(ppo_clip, folder, **(plain | dict(update_epochs=3, learning_rate=1e-2) | given)))
    assert len(iterations) == 5
    return iterations


@pytest.mark.parametrize("name", ["Tagged", "TaggedBox"])
@pytest.mark.parametrize("norm_obs", [False, True])
def test_first_ratio_is_1(monkeypatch, tmp_path, name, norm_obs):
    """Old log-probabilities of clipped actions, of other rows, or under other statistics than those that act."""
    for _, steps in watch(monkeypatch, tmp_path, env_id=f"test/{name}-v0", norm_obs=norm_obs):
        assert (steps[0]["ratio"] - 1).abs().max() < 2e-6
        assert steps[0]["metrics"]["approx_kl"].item() == pytest.approx(0, abs=1e-6)
        assert steps[0]["metrics"]["clip_fraction"].item() == 0
        assert (steps[-1]["ratio"] - 1).abs().max() > 1e-3


def test_advantages_are_normalised_over_the_valid_rows(monkeypatch, tmp_path):
    """Reset steps in the mean or the deviation, statistics per minibatch, or targets made of normalised advantages."""
    for rows, steps in watch(monkeypatch, tmp_path):
        raw = np.array(list(rows.values()))
        expected = {obs: (a - raw.mean()) / raw.std(ddof=1) for obs, a in rows.items()}
        for step in steps:
            for obs, advantage in zip(step["batch"]["obs"].tolist(), step["batch"]["advantages"].tolist(), strict=True):
                assert advantage == pytest.approx(expected[tuple(obs)], abs=1e-4)


@pytest.mark.parametrize("anneal", [False, True])
def test_annealing(monkeypatch, tmp_path, anneal):
    """A schedule that starts late, ends early, or moves only one of step size and clip range."""
    iterations = watch(monkeypatch, tmp_path, anneal_lr=anneal, anneal_clip=not anneal, clip_coef=0.3)
    for k, (_, steps) in enumerate(iterations):
        falling = 1 - k / 5
        for step in steps:
            assert step["lr"] == pytest.approx(1e-2 * (falling if anneal else 1))
            assert step["clip_coef"] == pytest.approx(0.3 * (1 if anneal else falling))


def test_old_policy_stays_for_all_epochs(monkeypatch, tmp_path):
    """Old log-probabilities computed anew in each epoch, which makes every ratio 1 and the clipping idle."""
    fractions = []
    for _, steps in watch(monkeypatch, tmp_path, update_epochs=2, num_minibatches=1, learning_rate=0.05):
        batches = [step["batch"] for step in steps]
        first, second = ({tuple(obs): x for obs, x in zip(b["obs"].tolist(), b["log_probs"].tolist())} for b in batches)
        assert first == second
        fractions.append(steps[1]["metrics"]["clip_fraction"].item())
    assert max(fractions) > 0.1


def test_compiled_training_equals_eager_training(monkeypatch, tmp_path):
    """A compiled step that works on copies of the parameters, or with the clip range or step size of its first call.

    Inductor's cache of graphs (torch 2.13) takes a Python float for a constant, even from one run to the next.
    """
    runs = []
    for compiled in (False, True):
        history, folder = [], tmp_path / str(compiled)
        with monkeypatch.context() as patch:
            spy(patch, Agent, "act", before=lambda agent, *_: history.append(parameters(agent)))  # noqa: B023
            schedule = dict(anneal_lr=True, anneal_clip=True, clip_coef=0.1, learning_rate=5e-3, max_grad_norm=5.0)
            args = make_args(ppo_clip, folder, env_id="test/TaggedBox-v0", num_envs=3, num_steps=16,
                             total_timesteps=3 * 16 * 5, num_minibatches=2, ent_coef=0.01, compile=compiled,
                             norm_obs=True, **schedule)  # fmt: skip
            monkeypatch.setattr(envs.Tagged, "instances", [])
            ppo_clip.train(args)
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        runs.append((torch.stack(history[: 16 * 5 + 1 : 16]), lines))
    (eager, eager_lines), (compiled, compiled_lines) = runs
    assert ((eager[1:] - eager[:-1]).abs().amax(1) > 1e-4).all()
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)
    for a, b in zip(eager_lines, compiled_lines, strict=True):
        assert 0.1 < a["clip_fraction"] == pytest.approx(b["clip_fraction"])
        assert a["value_loss"] == pytest.approx(b["value_loss"], rel=1e-4)


@pytest.mark.parametrize("sizes", [(1, 8, 8), (1, 4, 1), (4, 4, 16)], ids=str)
def test_fewer_transitions_than_minibatches(tmp_path, sizes):
    """Empty minibatches, or the deviation of a single advantage, where every second step is a reset."""
    num_envs, num_steps, num_minibatches = sizes
    args = make_args(ppo_clip, tmp_path, env_id="test/ValueOnly-v0", num_envs=num_envs, num_steps=num_steps,
                     num_minibatches=num_minibatches, total_timesteps=64)  # fmt: skip
    assert ppo_clip.train(args)["eval_mean"] == 1
