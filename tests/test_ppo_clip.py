"""The equations of PPO-Clip against slow and independent references."""

import envs
import numpy as np
import pytest
import torch
from conftest import make_args, on_policy, spy
from gymnasium.spaces import Box, Discrete
from off_policy import bugs
from runs import each, fails_with_a_bug
from torch.distributions import Categorical, Normal

from algos import ppo_clip

OBS = Box(-np.inf, np.inf, (5,), np.float32)
BOX = Box(np.float32([-1, -3]), np.float32([2, 0.5]))
BOTH = pytest.mark.parametrize("space", [Discrete(4), BOX], ids=["discrete", "box"])
CLIP = torch.tensor(0.2)
ours = each([ppo_clip])


def make_agent(space, obs_space=OBS, module=ppo_clip, **given):
    """An agent whose policy is far from uniform and whose deviations differ, and its arguments."""
    torch.manual_seed(3)
    args = module.Args(**given)
    agent = module.Agent(obs_space, space, args)
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300 if agent.discrete else 70)
        if not agent.discrete:
            agent.log_std.copy_(torch.tensor([-0.5, 0.3]))
    return agent, args


def make_batch(agent, rows=64, shift=0.0):
    """A batch as the learner gets it; the ratio of each row is exp(shift)."""
    obs = torch.randn(rows, 5)
    with torch.no_grad():
        policy, _ = reference(agent, obs)
        actions = policy.sample()
        log_probs = per_row(agent, policy.log_prob(actions)) - shift
    return dict(
        obs=obs, actions=actions, log_probs=log_probs, advantages=torch.randn(rows), returns=torch.randn(rows) * 3
    )


def reference(agent, obs):
    """pi and V from the layers alone; the distributions of vectors keep one factor per dimension."""
    out = agent.actor(obs)
    values = agent.critic(obs)[:, 0]
    return Categorical(logits=out) if agent.discrete else Normal(out, agent.log_std.exp()), values


def per_row(agent, x):
    return x if agent.discrete else x.sum(-1)


def gradients(agent, loss):
    grads = torch.autograd.grad(loss, list(agent.parameters()), allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(agent.parameters(), grads)]
    )


def parameters(agent):
    return torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone()


# GAE


def gae_case(seed, T=11, N=4):
    random = np.random.default_rng(seed)
    terminated, truncated = random.random((2, T, N)) < 0.2  # also both at once
    return random.normal(size=(T, N)), random.normal(size=(T + 1, N)), terminated, terminated | truncated


def gae(module, rewards, values, terminated, done, gamma, lam):
    return module.compute_gae(*map(torch.from_numpy, (rewards, values, terminated, done)), gamma, lam).numpy()


def slow_gae(rewards, values, terminated, done, gamma, lam):
    """The sum of the TD errors to come, one by one."""
    advantages = np.zeros_like(values[:-1])
    for t, n in np.ndindex(rewards.shape):
        for k in range(t, len(rewards)):
            delta = rewards[k, n] - values[k, n] + (0 if terminated[k, n] else gamma * values[k + 1, n])
            advantages[t, n] += (gamma * lam) ** (k - t) * delta
            if done[k, n]:
                break
    return advantages


SETTINGS = [(0.9, 0.7), (0.99, 0.95), (1.0, 1.0), (0.5, 0.0), (0.0, 1.0)]  # gamma, lambda


@ours
def test_gae_against_double_loop(module):
    """One mask for both kinds of end, a trace or a bootstrap shifted by one step, gamma or lambda applied twice."""
    for seed in range(5):
        case = gae_case(seed)
        for gamma, lam in SETTINGS:
            expected = slow_gae(*case, gamma, lam)
            assert gae(module, *case, gamma, lam) == pytest.approx(expected, abs=1e-6)


DELTAS = "deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]"
DECAYS = "decays = gamma * lam * (~done)"
TRACE = "trace = deltas[t] + decays[t] * trace"


@bugs(
    ("ppo_clip", DELTAS, DELTAS.replace("~terminated", "~done")),
    ("ppo_clip", DELTAS, DELTAS.replace(" * ~terminated", "")),
    ("ppo_clip", DELTAS, DELTAS.replace("gamma * ", "")),
    ("ppo_clip", DELTAS, DELTAS.replace("values[1:]", "values[:-1]")),
    ("ppo_clip", DECAYS, DECAYS.replace("~done", "~terminated")),
    ("ppo_clip", DECAYS, "decays = lam * (~done)"),
    ("ppo_clip", DECAYS, "decays = gamma * (~done)"),
    ("ppo_clip", DECAYS, "decays = gamma * lam**2 * (~done)"),
    ("ppo_clip", TRACE, "trace = deltas[t] + decays[t - 1] * trace"),
    ("ppo_clip", "trace = np.zeros_like(deltas[0])", "trace = values[-1].numpy(force=True)"),
)
def test_gae_sees(request, name, old, new):
    fails_with_a_bug(request, test_gae_against_double_loop, name, old, new)


@on_policy
def test_gae_in_float64(module):
    """Advantages of an agent in float64 that are only as exact as float32."""
    rewards, values, terminated, done = gae_case(0)
    values += 1e6  # of which float32 keeps no decimal
    for given in (rewards, rewards.astype(np.float32)):
        found = gae(module, given, values, terminated, done, 0.9, 0.7)
        assert found.dtype == np.float64
        assert found == pytest.approx(slow_gae(given, values, terminated, done, 0.9, 0.7), abs=1e-6)


@bugs(
    ("ppo_clip", DELTAS, DELTAS.replace("values[1:] * ~terminated", "~terminated * values[1:]")),
    ("ppo_clip", "(~done).to(deltas.dtype)", "~done"),
    ("ppo_clip", "advantages = np.zeros_like(deltas)", "advantages = np.zeros_like(deltas, np.float32)"),
)
def test_float64_sees(request, name, old, new):
    fails_with_a_bug(request, test_gae_in_float64, name, old, new)


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
    assert gae(ppo_clip, rewards, values, terminated, done, 0.9, 1.0) == pytest.approx(expected, abs=1e-6)


def test_gae_of_lambda_0_is_the_td_error():
    """A trace that survives lambda = 0."""
    rewards, values, terminated, done = gae_case(0)
    expected = rewards + 0.9 * np.where(terminated, 0, values[1:]) - values[:-1]
    assert gae(ppo_clip, rewards, values, terminated, done, 0.9, 0.0) == pytest.approx(expected, abs=1e-6)


# The policy


@ours
@BOTH
def test_log_probs_and_entropy(module, space):
    """A factor of the density forgotten, dimensions averaged instead of summed, the entropy of one dimension only."""
    agent, _ = make_agent(space, module=module)
    batch = make_batch(agent)
    policy, values = agent(batch["obs"])
    out = agent.actor(batch["obs"]).double()
    actions = batch["actions"]
    if agent.discrete:
        probs = out.exp() / out.exp().sum(-1, keepdim=True)
        log_prob = probs[torch.arange(64), actions].log()
        entropy = -(probs * probs.log()).sum(-1)
    else:
        std = agent.log_std.double().exp()
        density = (-((actions - out) ** 2) / (2 * std**2)).exp() / (std * (2 * torch.pi) ** 0.5)
        log_prob = density.prod(-1).log()
        entropy = (0.5 + 0.5 * np.log(2 * np.pi) + std.log()).sum().expand(64)
    assert policy.log_prob(actions).shape == policy.entropy().shape == values.shape == (64,)
    torch.testing.assert_close(policy.log_prob(actions).double(), log_prob, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(policy.entropy().double(), entropy, atol=1e-5, rtol=1e-5)


GAUSSIAN = "Independent(Normal(output, self.log_std.exp(), validate_args=False), 1)"


@bugs(
    ("ppo_clip", GAUSSIAN, GAUSSIAN.replace("self.log_std.exp()", "(self.log_std / 2).exp()")),
    ("ppo_clip", GAUSSIAN, GAUSSIAN.replace("self.log_std.exp()", "self.log_std.mean().exp()")),
    ("ppo_clip", GAUSSIAN, GAUSSIAN.replace(", 1)", ", 0)")),
    ("ppo_clip", "self.critic(x).squeeze(-1)", "self.critic(x)"),
)
def test_log_probs_see(request, name, old, new):
    fails_with_a_bug(request, test_log_probs_and_entropy, name, old, new, space=BOX)


def check_action_map(low, high, module=ppo_clip):
    """The formula and the clipping, element by element; the actions of the policy come flat."""
    space = Box(low, high)
    actions = np.random.default_rng(0).normal(size=(50, low.size)).astype(np.float32)
    actions[:2] = [[-1], [1]]
    found = module.action_map(space)(actions.astype(np.float64))  # of an agent in float64
    assert found.dtype == np.float32
    assert found.shape == (50, *low.shape)
    for row, acted in zip(actions, found):
        assert space.contains(acted)
        for action, x, a, b in zip(row, acted.flat, low.flat, high.flat, strict=True):
            if np.isfinite([a, b]).all():
                expected = (a + b) / 2 + action * (b - a) / 2
            else:
                expected = action
            assert x == pytest.approx(min(max(expected, a), b), abs=1e-5)


@ours
def test_actions_are_scaled_by_element(module):
    """Scalar bounds, symmetric bounds, a bias added twice, and infinite bounds that turn actions into nan."""
    check_action_map(np.float32([-1, -3, -np.inf, 0]), np.float32([2, 0.5, np.inf, np.inf]), module)
    with np.errstate(over="ignore"):
        widest = module.action_map(Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (2,)))
    assert widest(np.float32([[-0.5, 1]])).tolist() == [[-0.5, 1]], "so far apart, bounds are as good as none"
    for action in (np.nan, np.inf):
        with pytest.raises(module.Refusal, match="training diverged: an action is not finite; "):
            widest(np.float32([[0, action]]))
    assert module.action_map(Discrete(3, start=-1))(np.array([0, 2])).tolist() == [-1, 1]


@ours
def test_actions_of_more_than_one_axis(module):
    """Bounds of other elements, because axes are swapped or taken for one."""
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    check_action_map(-numbers - 1, numbers**2 + 1, module)
    numbers[0, 1] = np.inf
    check_action_map(-numbers - 1, numbers.reshape(2, 3) ** 2 + 1, module)


SCALED = "scaled = low + (actions + 1) * ((high - low) / 2)"
CLIPPED = "np.minimum(np.maximum(scaled, space.low), space.high)"
RESHAPED = "actions = actions.reshape(-1, *space.shape)"


@bugs(
    ("ppo_clip", SCALED, "scaled = low + actions * ((high - low) / 2)"),
    ("ppo_clip", SCALED, "scaled = actions * high"),
    ("ppo_clip", SCALED, "scaled = low[0] + (actions + 1) * ((high[0] - low[0]) / 2)"),
    ("ppo_clip", CLIPPED, "scaled"),
    ("ppo_clip", CLIPPED, "np.minimum(scaled, space.high)"),
    ("ppo_clip", "low = np.where(bounded, space.low, -1)", "low = space.low"),
    ("ppo_clip", "clipped.astype(space.dtype, copy=False)", "clipped"),
    ("ppo_clip", "return lambda actions: actions + space.start", "return lambda actions: actions"),
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_scaling_sees(request, name, old, new):
    fails_with_a_bug(request, test_actions_are_scaled_by_element, name, old, new)


@bugs(
    ("ppo_clip", RESHAPED, "actions = actions.reshape(-1, *space.shape[::-1]).swapaxes(1, 2)"),
    ("ppo_clip", RESHAPED, "actions = actions.reshape(-1, *space.shape)[:, ::-1]"),
    ("ppo_clip", SCALED, SCALED.replace("low + ", "low[0] + ")),
)
def test_axes_see(request, name, old, new):
    fails_with_a_bug(request, test_actions_of_more_than_one_axis, name, old, new)


# The loss


@ours
@BOTH
def test_first_gradient_is_the_policy_gradient(module, space):
    """At ratio 1: a sign, a coefficient or a factor of any of the three terms, or a gradient through the old policy."""
    agent, args = make_agent(space, module=module, vf_coef=0.7, ent_coef=0.3)
    batch = make_batch(agent)
    loss, metrics = module.ppo_loss(agent, batch, CLIP, args)
    policy, values = reference(agent, batch["obs"])
    log_probs = per_row(agent, policy.log_prob(batch["actions"]))
    entropy = per_row(agent, policy.entropy()).mean()
    value_loss = ((values - batch["returns"]) ** 2).mean()
    plain = -(batch["advantages"] * log_probs).mean() + 0.7 * value_loss - 0.3 * entropy
    torch.testing.assert_close(gradients(agent, loss), gradients(agent, plain), atol=1e-5, rtol=1e-4)
    assert metrics["approx_kl"].item() == pytest.approx(0, abs=1e-6)
    assert metrics["clip_fraction"].item() == 0
    assert metrics["entropy"].item() == pytest.approx(entropy.item(), abs=1e-5)
    assert metrics["value_loss"].item() == pytest.approx(value_loss.item(), rel=1e-5)
    assert metrics["policy_loss"].item() == pytest.approx(-batch["advantages"].mean().item(), abs=1e-5)
    assert not any(metric.requires_grad for metric in metrics.values())


SUM = "loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy"
LOG_RATIO = 'log_ratio = policy.log_prob(batch["actions"]) - batch["log_probs"]'
MINIMUM = "-torch.min(ratio * advantages, clipped_ratio * advantages).mean()"


@bugs(
    ("ppo_clip", SUM, SUM.replace("- args", "+ args")),
    ("ppo_clip", SUM, SUM.replace("args.vf_coef * ", "")),
    ("ppo_clip", SUM, SUM.replace("args.ent_coef * ", "")),
    ("ppo_clip", SUM, SUM.replace("value_loss", "value_loss / 2")),
    ("ppo_clip", SUM, SUM.replace("policy_loss", "-policy_loss")),
    ("ppo_clip", MINIMUM, MINIMUM.replace(".mean()", ".sum()")),
    ("ppo_clip", "policy_loss=policy_loss.detach()", "policy_loss=policy_loss"),
    ("ppo_clip", LOG_RATIO, 'log_ratio = policy.log_prob(batch["actions"])'),
    ("ppo_clip", LOG_RATIO, 'log_ratio = policy.log_prob(batch["actions"]) - policy.log_prob(batch["actions"])'),
)
def test_first_gradient_sees(request, name, old, new):
    fails_with_a_bug(request, test_first_gradient_is_the_policy_gradient, name, old, new, space=BOX)


@ours
@BOTH
def test_clipping_is_one_sided(module, space):
    """A clipped ratio without the minimum, a maximum instead, a clip range of [1/(1+eps), 1+eps], eps taken as 0.1."""
    agent, args = make_agent(space, module=module, vf_coef=0.0)
    for advantage in (1.5, -1.5):
        for ratio in (0.5, 0.81, 0.85, 1.15, 1.5):
            batch = make_batch(agent, shift=np.log(ratio))
            batch["advantages"] = torch.full((64,), advantage)
            loss, metrics = module.ppo_loss(agent, batch, CLIP, args)
            gone = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)  # gained all that it may gain
            log_probs = per_row(agent, reference(agent, batch["obs"])[0].log_prob(batch["actions"]))
            expected = gradients(agent, -(advantage * ratio * log_probs).mean())
            assert expected.norm() > 0.01
            torch.testing.assert_close(gradients(agent, loss), expected * (0 if gone else 1), atol=1e-5, rtol=1e-3)
            clipped = min(max(ratio, 0.8), 1.2)
            assert loss.item() == pytest.approx(-min(ratio * advantage, clipped * advantage), abs=1e-5)
            assert metrics["clip_fraction"].item() == (abs(ratio - 1) > 0.2)
            assert metrics["approx_kl"].item() == pytest.approx(ratio - 1 - np.log(ratio), abs=1e-4)


RANGE = "ratio.clamp(1 - clip_coef, 1 + clip_coef)"


@bugs(
    ("ppo_clip", MINIMUM, "-(clipped_ratio * advantages).mean()"),
    ("ppo_clip", MINIMUM, "-(ratio * advantages).mean()"),
    ("ppo_clip", MINIMUM, MINIMUM.replace("torch.min", "torch.max")),
    ("ppo_clip", RANGE, "ratio.clamp(1 / (1 + clip_coef), 1 + clip_coef)"),
    ("ppo_clip", RANGE, "ratio.clamp(1 - clip_coef / 2, 1 + clip_coef / 2)"),
    ("ppo_clip", RANGE, "ratio.clamp(max=1 + clip_coef)"),
    ("ppo_clip", "(ratio - 1 - log_ratio).mean()", "(-log_ratio).mean()"),
    ("ppo_clip", "(ratio != clipped_ratio)", "(ratio > clipped_ratio)"),
)
def test_clipping_sees(request, name, old, new):
    fails_with_a_bug(request, test_clipping_is_one_sided, name, old, new, space=BOX)


@ours
@BOTH
def test_loss_row_by_row(module, space):
    """(B, 1) against (B,): the loss of a batch is the mean of the losses of its rows, in whatever order."""
    agent, args = make_agent(space, module=module, ent_coef=0.1)
    batch = make_batch(agent)
    batch["log_probs"] += 0.3 * torch.randn(64)
    loss, metrics = module.ppo_loss(agent, batch, CLIP, args)
    assert loss.shape == ()
    assert all(metric.shape == () for metric in metrics.values())
    rows = [module.ppo_loss(agent, {name: x[i : i + 1] for name, x in batch.items()}, CLIP, args) for i in range(64)]
    assert loss.item() == pytest.approx(np.mean([row.item() for row, _ in rows]), abs=1e-5)
    for name, metric in metrics.items():
        assert metric.item() == pytest.approx(np.mean([row[name].item() for _, row in rows]), abs=1e-5)
    order = torch.randperm(64)
    permuted, _ = module.ppo_loss(agent, {name: x[order] for name, x in batch.items()}, CLIP, args)
    assert permuted.item() == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.filterwarnings("ignore:Using a target size")
@bugs(
    ("ppo_clip", 'F.mse_loss(values, batch["returns"])', 'F.mse_loss(values[:, None], batch["returns"])'),
    ("ppo_clip", 'advantages = batch["advantages"]', 'advantages = batch["advantages"][:, None]'),
)
def test_rows_see(request, name, old, new):
    fails_with_a_bug(request, test_loss_row_by_row, name, old, new, space=BOX)


# train()


def watch(monkeypatch, folder, module=ppo_clip, **given):
    """Train on a Tagged environment; return each iteration's valid rows and advantages and its gradient steps."""
    iterations = []
    T = 16
    N = 3
    monkeypatch.setattr(envs.Tagged, "instances", [])

    def after_gae(advantages, *_):
        k = len(iterations)
        rows = [(row["t"] - k * T, env.index, row) for env in envs.Tagged.instances for row in env.log[-T:]]
        rows = {tuple(row["obs"].tolist()): advantages[t, i].item() for t, i, row in rows if t >= 0}
        iterations.append((rows, []))

    def after_loss(output, agent, batch, clip_coef, args):
        with torch.no_grad():
            policy, _ = agent(batch["obs"])
            ratio = (policy.log_prob(batch["actions"]) - batch["log_probs"]).exp()
        iterations[-1][1].append(dict(batch=batch, clip_coef=float(clip_coef), ratio=ratio, metrics=output[1]))

    def before_descend(optimizer, _):
        (group,) = optimizer.param_groups
        iterations[-1][1][-1]["lr"] = group["lr"]

    spy(monkeypatch, module, "compute_gae", after=after_gae)
    spy(monkeypatch, module, "ppo_loss", after=after_loss)
    spy(monkeypatch, module, "descend", before=before_descend)
    plain = dict(env_id="test/Tagged-v0", num_envs=N, num_steps=T, total_timesteps=N * T * 5, num_minibatches=4)
    module.train(make_args(module, folder, **(plain | dict(update_epochs=3, learning_rate=1e-2) | given)))
    assert len(iterations) == 5
    return iterations


@ours
@pytest.mark.parametrize("env", ["Tagged", "TaggedBox"])
@pytest.mark.parametrize("norm_obs", [False, True])
def test_first_ratio_is_1(module, monkeypatch, tmp_path, env, norm_obs):
    """Old log-probabilities of clipped actions, of other rows, or under other statistics than those that act."""
    for _, steps in watch(monkeypatch, tmp_path, module, env_id=f"test/{env}-v0", norm_obs=norm_obs):
        assert (steps[0]["ratio"] - 1).abs().max() < 2e-6
        assert steps[0]["metrics"]["approx_kl"].item() == pytest.approx(0, abs=1e-6)
        assert steps[0]["metrics"]["clip_fraction"].item() == 0
        assert (steps[-1]["ratio"] - 1).abs().max() > 1e-3


NAMES = 'names = ("obs", "actions", "log_probs", "advantages", "returns")'


@bugs(
    ("ppo_clip", NAMES, f"batch['actions'] = batch['actions'].clamp(-1, 1)\n        {NAMES}"),
    ("ppo_clip", NAMES, f"batch['log_probs'] = batch['log_probs'].flip(1)\n        {NAMES}"),
    ("ppo_clip", NAMES, f"agent.encoder.update(batch['obs'][valid])\n        {NAMES}"),
)
def test_first_ratio_sees(request, name, old, new):
    fails_with_a_bug(request, test_first_ratio_is_1, name, old, new, env="TaggedBox", norm_obs=True)


@ours
def test_advantages_are_normalised_over_the_valid_rows(module, monkeypatch, tmp_path):
    """Reset steps in the mean or the deviation, or statistics per minibatch."""
    for rows, steps in watch(monkeypatch, tmp_path, module):
        raw = np.array(list(rows.values()))
        expected = {obs: (a - raw.mean()) / raw.std(ddof=1) for obs, a in rows.items()}
        for step in steps:
            for obs, advantage in zip(step["batch"]["obs"].tolist(), step["batch"]["advantages"].tolist(), strict=True):
                assert advantage == pytest.approx(expected[tuple(obs)], abs=1e-4)


NORMALISED = "(advantages - advantages[valid].mean()) / (advantages[valid].std() + 1e-8)"
MINIBATCH = "minibatch = {name: column[rows] for name, column in batch.items()}\n"
PER_MINIBATCH = 'minibatch["advantages"] = minibatch["advantages"] - minibatch["advantages"].mean()\n'


@bugs(
    ("ppo_clip", NORMALISED, NORMALISED.replace("[valid].mean", ".mean")),
    ("ppo_clip", NORMALISED, NORMALISED.replace("[valid].std", ".std")),
    ("ppo_clip", MINIBATCH, f"{MINIBATCH}{' ' * 16}{PER_MINIBATCH}"),
)
def test_normalisation_sees(request, name, old, new):
    fails_with_a_bug(request, test_advantages_are_normalised_over_the_valid_rows, name, old, new)


@pytest.mark.parametrize("anneal", [False, True])
def test_annealing(monkeypatch, tmp_path, anneal):
    """A schedule that starts late, ends early, or moves only one of step size and clip range."""
    iterations = watch(monkeypatch, tmp_path, anneal_lr=anneal, anneal_clip=not anneal, clip_coef=0.3)
    for k, (_, steps) in enumerate(iterations):
        falling = 1 - k / 5
        for step in steps:
            assert step["lr"] == pytest.approx(1e-2 * (falling if anneal else 1))
            assert step["clip_coef"] == pytest.approx(0.3 * (1 if anneal else falling))


@ours
def test_old_policy_stays_for_all_epochs(module, monkeypatch, tmp_path):
    """Old log-probabilities computed anew in each epoch, which makes every ratio 1 and the clipping idle."""
    fractions = []
    given = dict(update_epochs=2, num_minibatches=1, learning_rate=0.05)
    for _, steps in watch(monkeypatch, tmp_path, module, **given):
        batches = [step["batch"] for step in steps]
        first, second = ({tuple(obs): x for obs, x in zip(b["obs"].tolist(), b["log_probs"].tolist())} for b in batches)
        assert first == second
        fractions.append(steps[1]["metrics"]["clip_fraction"].item())
    assert max(fractions) > 0.1


ANEW = 'minibatch["log_probs"] = agent(minibatch["obs"])[0].log_prob(minibatch["actions"]).detach()\n'


@bugs(("ppo_clip", MINIBATCH, f"{MINIBATCH}{' ' * 16}{ANEW}"))
def test_old_policy_sees(request, name, old, new):
    fails_with_a_bug(request, test_old_policy_stays_for_all_epochs, name, old, new)


@ours
@pytest.mark.parametrize("sizes", [(1, 8, 8), (1, 4, 1), (4, 4, 16)], ids=str)
def test_fewer_transitions_than_minibatches(module, tmp_path, sizes):
    """Empty minibatches, or the deviation of a single advantage, where every second step is a reset."""
    num_envs, num_steps, num_minibatches = sizes
    args = make_args(module, tmp_path, env_id="test/ValueOnly-v0", num_envs=num_envs, num_steps=num_steps,
                     num_minibatches=num_minibatches, total_timesteps=64)  # fmt: skip
    assert module.train(args)["eval_mean"] == 1
