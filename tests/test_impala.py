"""V-trace against the sum that the paper writes, and what reaches the learner through train(), all without Ray."""

import copy
import itertools
import math
from types import SimpleNamespace

import envs
import numpy as np
import pytest
import torch
from conftest import make_args, spy
from gymnasium.spaces import Discrete
from launch import Process
from off_policy import bugs
from on_policy import each_space, entropy, log_prob, make_agent, sample
from runs import checkpoint, each, equal, fails_with_a_bug, line, metrics, result, resume
from test_probes import learn as learn_probe
from test_probes import near, value

from algos import a2c, impala

ours = each([impala])
N = 3
T = 16


# V-trace


def case(seed, steps=14):
    """Random arrays (T, N) with ends of both kinds; the rows after them only reset, and hold nonsense."""
    random = np.random.default_rng(seed)
    end = random.random((steps, N)) < 0.25
    for t in range(1, steps):
        end[t] &= ~end[t - 1]
    truncated = end & (random.random((steps, N)) < 0.5)
    terminated = end & (~truncated | (random.random((steps, N)) < 0.3))
    valid = ~np.vstack([np.zeros((1, N), bool), end[:-1]])
    rewards = np.where(valid, random.normal(0.5, 2, (steps, N)), 1e6)
    log_ratio = np.where(valid, random.normal(0, 0.7, (steps, N)), 5)
    values = random.normal(0, 2, (steps + 1, N))
    return SimpleNamespace(
        rewards=rewards, values=values, log_ratio=log_ratio, terminated=terminated, done=end, valid=valid
    )


def vtrace(module, x, **given):
    """What the script makes of a case, as arrays."""
    arrays = (x.rewards, x.values, x.log_ratio, x.terminated, x.done)
    found = module.vtrace(*map(torch.from_numpy, arrays), module.Args(**given))
    return [array.numpy() for array in found]


def slow_vtrace(x, gamma, rho_bar, c_bar):
    """Eq. 1 and the advantages of Sect. 4.2, step by step; a trajectory ends with its episode or with the arrays."""
    ratio = np.exp(x.log_ratio)
    rho = np.minimum(rho_bar, ratio)
    v = x.values.copy()
    for s, n in np.ndindex(x.rewards.shape):
        product = 1.0
        for t in range(s, len(x.rewards)):
            next_value = 0.0 if x.terminated[t, n] else x.values[t + 1, n]
            delta = rho[t, n] * (x.rewards[t, n] + gamma * next_value - x.values[t, n])
            v[s, n] += gamma ** (t - s) * product * delta
            if x.done[t, n]:
                break
            product *= min(c_bar, ratio[t, n])
    advantages = np.zeros_like(x.rewards)
    for s, n in np.ndindex(x.rewards.shape):
        next_v = x.values[s + 1, n] if x.done[s, n] else v[s + 1, n]
        next_v = 0.0 if x.terminated[s, n] else next_v
        advantages[s, n] = x.rewards[s, n] + gamma * next_v - x.values[s, n]
    return v[:-1], advantages, rho


@ours
@pytest.mark.parametrize(("rho_bar", "c_bar"), [(1.0, 1.0), (3.7, 2.2), (0.6, 1.5)])
def test_vtrace_is_the_sum(module, rho_bar, c_bar):
    """A ratio upside down, a clip at the wrong place, a bootstrap or a trace that an end should have stopped."""
    for seed in range(5):
        x = case(seed)
        found = vtrace(module, x, gamma=0.9, rho_bar=rho_bar, c_bar=c_bar)
        for ours, expected in zip(found, slow_vtrace(x, 0.9, rho_bar, c_bar), strict=True):
            np.testing.assert_allclose(ours[x.valid], expected[x.valid], atol=1e-12, rtol=1e-12)


ERRORS = "errors = rewards + args.gamma * values[1:] * ~terminated - values[:-1]"
DECAYS = "(args.gamma * ratios.clamp(max=args.c_bar) * ~done)"
RECURSION = "corrections[s] = deltas[s] + decays[s] * corrections[s + 1]"
ADVANTAGES = "advantages = errors + args.gamma * corrections[1:] * ~done"
RETURNED = "return values[:-1] + corrections[:-1], advantages, rhos"


@bugs(
    ("impala", "ratios = log_ratio.exp()", "ratios = (-log_ratio).exp()"),
    ("impala", "ratios = log_ratio.exp()", "ratios = 1 + log_ratio"),
    ("impala", "ratios.clamp(max=args.rho_bar)", "ratios.clamp(max=args.c_bar)"),
    ("impala", "ratios.clamp(max=args.rho_bar)", "ratios.clamp(min=1 / args.rho_bar, max=args.rho_bar)"),
    ("impala", "(rhos * errors)", "(ratios * errors)"),
    ("impala", "(rhos * errors)", "errors"),
    ("impala", ERRORS, ERRORS.replace("~terminated", "~done")),
    ("impala", ERRORS, ERRORS.replace(" * ~terminated", "")),
    ("impala", ERRORS, ERRORS.replace("args.gamma * ", "")),
    ("impala", DECAYS, DECAYS.replace("c_bar", "rho_bar")),
    ("impala", DECAYS, DECAYS.replace("args.gamma * ", "")),
    ("impala", DECAYS, DECAYS.replace("~done", "~terminated")),
    ("impala", RECURSION, RECURSION.replace("decays[s]", "decays[s] * args.gamma")),
    ("impala", RECURSION, RECURSION.replace("deltas[s] +", "values.numpy()[s] + deltas[s] +")),
    ("impala", ADVANTAGES, ADVANTAGES.replace(" * ~done", "")),
    ("impala", ADVANTAGES, ADVANTAGES.replace("corrections[1:]", "corrections[:-1]")),
    ("impala", ADVANTAGES, ADVANTAGES.replace("errors + args.gamma * corrections[1:] * ~done", "corrections[:-1]")),
    ("impala", RETURNED, RETURNED.replace("rhos", "ratios")),
    ("impala", RETURNED, RETURNED.replace("advantages", "rhos * advantages")),
)
def test_the_sum_sees(request, name, old, new):
    fails_with_a_bug(request, test_vtrace_is_the_sum, name, old, new, rho_bar=3.7, c_bar=2.2)


@ours
def test_on_policy_it_is_the_n_step_return(module):
    """Where pi = mu, v is the return up to the end, or with a bootstrap there: GAE(1) of a2c.py above the value."""
    for seed in range(5):
        x = case(seed)
        x.log_ratio[x.valid] = 0
        v, advantages, rho = vtrace(module, x, gamma=0.9)
        expected = np.zeros_like(v)
        for s, n in np.ndindex(v.shape):
            t = s
            while t < len(v) - 1 and not x.done[t, n]:
                t += 1
            expected[s, n] = sum(0.9 ** (k - s) * x.rewards[k, n] for k in range(s, t + 1))
            expected[s, n] += 0 if x.terminated[t, n] else 0.9 ** (t + 1 - s) * x.values[t + 1, n]
        arrays = map(torch.from_numpy, (x.rewards, x.values, x.terminated, x.done))
        gae = a2c.compute_gae(*arrays, 0.9, 1.0).numpy()
        np.testing.assert_allclose(v[x.valid], expected[x.valid], atol=1e-12, rtol=1e-12)
        np.testing.assert_allclose(advantages[x.valid], (expected - x.values[:-1])[x.valid], atol=1e-12, rtol=1e-12)
        np.testing.assert_allclose(advantages[x.valid], gae[x.valid], atol=1e-12, rtol=1e-12)
        assert (rho[x.valid] == 1).all()


@bugs(
    ("impala", ERRORS, ERRORS.replace("~terminated", "~done")),
    ("impala", DECAYS, DECAYS.replace("~done", "~terminated")),
    ("impala", ADVANTAGES, ADVANTAGES.replace(" * ~done", "")),
)
def test_on_policy_sees(request, name, old, new):
    fails_with_a_bug(request, test_on_policy_it_is_the_n_step_return, name, old, new)


def one_step(log_ratio):
    """A single step with reward 1 in a state of value 0, which ends the episode."""
    x = dict(rewards=np.ones((1, 1)), values=np.zeros((2, 1)), log_ratio=np.full((1, 1), log_ratio))
    return SimpleNamespace(**x, terminated=np.ones((1, 1), bool), done=np.ones((1, 1), bool))


@ours
def test_sign_of_the_ratio(module):
    """A step that pi takes four times as often as mu counts four times, not a quarter, or once if that is the limit."""
    for log_ratio, rho_bar, weight in ((math.log(4), 10.0, 4), (math.log(4), 1.0, 1), (-math.log(4), 1.0, 0.25)):
        v, advantage, rho = vtrace(module, one_step(log_ratio), rho_bar=rho_bar)
        assert (v.item(), rho.item()) == pytest.approx((weight, weight), abs=1e-12)
        assert advantage.item() == 1


@bugs(("impala", "ratios = log_ratio.exp()", "ratios = (-log_ratio).exp()"))
def test_sign_sees(request, name, old, new):
    fails_with_a_bug(request, test_sign_of_the_ratio, name, old, new)


@ours
def test_a_truncation_parts_two_trajectories(module):
    """Episodes in one array, a reset step between them, have the targets that each has alone, whatever the reset is."""
    random = np.random.default_rng(0)
    parts = []
    for length, end in ((5, "truncated"), (1, "truncated"), (4, "terminated"), (6, "")):
        flags = np.zeros((length, 1), bool)
        flags[-1] = end != ""
        rewards, log_ratio = random.normal(0, 2, (2, length, 1))
        values = random.normal(0, 2, (length + 1, 1))
        terminated = flags & (end == "terminated")
        parts.append(
            SimpleNamespace(rewards=rewards, values=values, log_ratio=log_ratio, terminated=terminated, done=flags)
        )
    whole = {name: [] for name in vars(parts[0])}
    kept = []  # rows that are no resets
    for part in parts:
        for name, array in vars(part).items():
            whole[name].append(array)
        kept += [True] * len(part.rewards) + [False]
        whole["rewards"].append(np.full((1, 1), 1e9))  # the reset step, from the last observation on
        whole["log_ratio"].append(np.full((1, 1), 20.0))
        whole["terminated"].append(np.zeros((1, 1), bool))
        whole["done"].append(np.zeros((1, 1), bool))
    joined = SimpleNamespace(**{name: np.concatenate(arrays) for name, arrays in whole.items()})
    for name in ("rewards", "log_ratio", "terminated", "done"):
        setattr(joined, name, getattr(joined, name)[:-1])  # the last part ends with the arrays
    found = vtrace(module, joined, gamma=0.9, rho_bar=2.0, c_bar=1.5)
    alone = [vtrace(module, part, gamma=0.9, rho_bar=2.0, c_bar=1.5) for part in parts]
    for ours, theirs in zip(found, zip(*alone), strict=True):
        np.testing.assert_allclose(ours[kept[:-1]], np.concatenate(theirs), atol=1e-12, rtol=0)


@bugs(
    ("impala", DECAYS, DECAYS.replace("~done", "~terminated")),
    ("impala", ADVANTAGES, ADVANTAGES.replace(" * ~done", "")),
    ("impala", ERRORS, ERRORS.replace("values[1:]", "values[1:].roll(-1, 0)")),
)
def test_parted_trajectories_see(request, name, old, new):
    fails_with_a_bug(request, test_a_truncation_parts_two_trajectories, name, old, new)


@ours
@pytest.mark.parametrize(("rho_bar", "c_bar"), [(1.0, 1.0), (1.0, 0.3), (1e9, 1.0), (0.5, 0.5)])
def test_fixed_point(module, rho_bar, c_bar):
    """All paths of 3 steps in an MDP of 3 states: the values stay where they are those of the paper's pi_rho_bar."""
    gamma = 0.9
    random = np.random.default_rng(1)
    P = random.dirichlet(np.ones(3), (3, 2))  # P[x, a, y]
    R = random.normal(0, 1, (3, 2))
    pi = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    mu = np.array([[0.3, 0.7], [0.5, 0.5], [0.8, 0.2]])
    target = np.minimum(rho_bar * mu, pi)
    target /= target.sum(1, keepdims=True)  # pi_rho_bar, eq. 3
    expected = np.linalg.solve(np.eye(3) - gamma * np.einsum("xa,xay->xy", target, P), (target * R).sum(1))

    paths = np.array(list(itertools.product(range(3), *[range(2), range(3)] * 3)))
    states = paths[:, ::2].T
    actions = paths[:, 1::2].T
    probs = (mu[states[:-1], actions] * P[states[:-1], actions, states[1:]]).prod(0)  # given the first state
    never = np.zeros(actions.shape, bool)
    log_ratio = np.log(pi / mu)[states[:-1], actions]
    V = np.zeros(3)
    for _ in range(600):
        x = SimpleNamespace(
            rewards=R[states[:-1], actions], values=V[states], log_ratio=log_ratio, terminated=never, done=never
        )
        v, _, _ = vtrace(module, x, gamma=gamma, rho_bar=rho_bar, c_bar=c_bar)
        V = np.bincount(states[0], probs * v[0], 3)
    np.testing.assert_allclose(V, expected, atol=1e-9)


@bugs(
    ("impala", "ratios = log_ratio.exp()", "ratios = (-log_ratio).exp()"),
    ("impala", "(rhos * errors)", "errors"),
    ("impala", "ratios.clamp(max=args.rho_bar)", "ratios.clamp(max=args.c_bar)"),
    ("impala", ERRORS, ERRORS.replace("values[1:]", "values[:-1]")),
)
def test_fixed_point_sees(request, name, old, new):
    fails_with_a_bug(request, test_fixed_point, name, old, new, rho_bar=1.0, c_bar=0.3)


# The loss


@ours
@each_space
def test_gradient_of_the_loss(module, space):
    """A sign, a factor, a weight rho that is missing or that gradients flow through, a term on the wrong rows."""
    agent, args = make_agent(module, space, vf_coef=0.3, ent_coef=0.02)
    obs = torch.randn(64, 3, dtype=torch.float64)
    rhos, advantages, returns = torch.rand(64).double(), torch.randn(64).double(), torch.randn(64).double()
    batch = dict(obs=obs, actions=sample(agent, obs), rhos=rhos, advantages=advantages, returns=returns)
    policy_loss = -(rhos * log_prob(agent, obs, batch["actions"]) * advantages).sum() / 64
    value_loss = ((agent.critic(obs)[:, 0] - returns) ** 2).sum() / 64
    expected = policy_loss + 0.3 * value_loss - 0.02 * entropy(agent, obs).sum() / 64
    loss, found = module.impala_loss(agent, batch, args)
    parameters = list(agent.parameters())
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-10, rtol=1e-8)
    assert found["policy_loss"].item() == pytest.approx(policy_loss.item())
    assert found["value_loss"].item() == pytest.approx(value_loss.item())
    assert not any(metric.requires_grad for metric in found.values())


LOSS = '-(batch["rhos"] * policy.log_prob(batch["actions"]) * batch["advantages"]).mean()'


@bugs(
    ("impala", LOSS, LOSS[1:]),
    ("impala", LOSS, LOSS.replace('batch["rhos"] * ', "")),
    ("impala", LOSS, LOSS.replace(".mean()", ".sum()")),
    ("impala", LOSS, LOSS.replace('batch["rhos"]', 'batch["rhos"].flip(0)')),
    ("impala", "F.mse_loss(values, ", "F.mse_loss(values.detach(), "),
    ("impala", "- args.ent_coef * entropy", "+ args.ent_coef * entropy"),
)
def test_gradient_sees(request, name, old, new):
    fails_with_a_bug(request, test_gradient_of_the_loss, name, old, new, space=Discrete(4))


# What reaches the learner


def train_on_tagged(module, folder, **given):
    """Train on Tagged environments: one for the spaces, then those of the sampler, then those of the evaluation."""
    envs.Tagged.instances = []
    plain = dict(env_id="test/Tagged-v0", num_envs=N, num_steps=T, total_timesteps=N * T * 10, learning_rate=2e-2)
    plain |= dict(gamma=0.9, ent_coef=0.01, norm_obs=True, seed=3)
    module.train(make_args(module, folder, **plain | given))
    return folder / "run"


def watch(module, monkeypatch, folder, **given):
    """The weights after each update, and agent and batch just before it."""
    seen = SimpleNamespace(weights=[], batches=[])

    def before_loss(agent, batch, args):
        seen.batches.append((copy.deepcopy(agent), {name: column.clone() for name, column in batch.items()}))

    with monkeypatch.context() as patch:
        spy(patch, module, "copy_weights", after=lambda weights, _: seen.weights.append(copy.deepcopy(weights)))
        spy(patch, module, "impala_loss", before=before_loss)
        train_on_tagged(module, folder, **given)
    seen.trained = envs.Tagged.instances[1 : 1 + N]
    return seen


def expected_rows(k, trained, pi, mu, rho_bar, c_bar):
    """By observation, what the learner must get in iteration k: action, v, advantage and rho, from what happened."""
    rows = {}
    for env in trained:
        window = [row for row in env.log if k * T <= row["t"] < (k + 1) * T]
        episodes = [list(group) for _, group in itertools.groupby(window, key=lambda row: row["obs"][2])]
        for episode in episodes:
            obs = torch.from_numpy(np.stack([row["obs"] for row in episode] + [episode[-1]["next_obs"]]))
            actions = torch.tensor([int(row["action"]) for row in episode])
            with torch.no_grad():
                policy, values = pi(obs)
                log_pi = policy.log_prob(torch.cat([actions, actions[:1]]))[:-1]
                log_mu = mu(obs[:-1])[0].log_prob(actions)
            column = lambda array: np.asarray(array)[:, None]  # noqa: E731
            x = SimpleNamespace(
                rewards=column([row["reward"] for row in episode]),
                values=column(values.double()),
                log_ratio=column((log_pi - log_mu).double()),
                terminated=column([row["terminated"] for row in episode]),
                done=column([row["terminated"] or row["truncated"] for row in episode]),
            )
            v, advantages, rho = slow_vtrace(x, 0.9, rho_bar, c_bar)
            for i, row in enumerate(episode):
                rows[tuple(row["obs"])] = (int(row["action"]), v[i, 0], advantages[i, 0], rho[i, 0])
    return rows


@ours
@pytest.mark.parametrize("max_lag", [0, 2])
def test_what_is_learned_is_what_happened(module, monkeypatch, tmp_path, max_lag):
    """Reset steps learned from, rows mixed up, policies of another age than the lag says, a wrong last observation."""
    seen = watch(module, monkeypatch, tmp_path, max_lag=max_lag, rho_bar=1.3, c_bar=1.1)
    smallest = 1.0
    assert len(seen.batches) == 10
    for k, (pi, batch) in enumerate(seen.batches):
        mu = copy.deepcopy(pi)
        mu.load_state_dict(seen.weights[max(0, k - max_lag)])
        rows = expected_rows(k, seen.trained, pi, mu, 1.3, 1.1)
        keys = [tuple(obs) for obs in batch["obs"].tolist()]
        assert sorted(keys) == sorted(rows)
        actions, v, advantages, rho = map(np.array, zip(*[rows[key] for key in keys]))
        assert batch["actions"].tolist() == actions.tolist()
        np.testing.assert_allclose(batch["returns"], v, atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(batch["rhos"], rho, atol=1e-4, rtol=1e-4)
        advantages = (advantages - advantages.mean()) / advantages.std(ddof=1)
        np.testing.assert_allclose(batch["advantages"], advantages, atol=1e-3, rtol=1e-3)
        smallest = min(smallest, rho.min())
    assert (smallest < 0.9) == (max_lag > 0)


VALID = "valid = ~done  #"
LAST = "last_obs=to_tensor(obs, device)"
ASK = "while len(asked) <= min(args.max_lag, num_iterations - iteration - 1):"


@bugs(
    ("impala", VALID, "valid = ~done | True  #"),
    ("impala", LAST, 'last_obs=batch["obs"][-1]'),
    ("impala", "agent.load_state_dict(weights)\n", "pass\n"),
    ("impala", "vtrace(rewards, values, log_ratio, ", "vtrace(rewards, values, -log_ratio, "),
    ("impala", "dict(returns=returns, rhos=rhos)", "dict(returns=returns, rhos=rhos / rhos)"),
    ("impala", 'batch["advantages"] = (advantages - ', 'batch["advantages"] = (rhos * advantages - '),
    ("impala", "asked.pop(0)", "asked.pop()"),
    ("impala", ASK, ASK.replace("args.max_lag", "args.max_lag + 1")),
)
def test_what_is_learned_sees(request, name, old, new):
    fails_with_a_bug(request, test_what_is_learned_is_what_happened, name, old, new, max_lag=2)


@ours
@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_lag_in_the_log(module, tmp_path, max_lag):
    """A policy older than --max-lag, or younger than it must be where all are busy; steps that nobody learns from."""
    folder = train_on_tagged(module, tmp_path, max_lag=max_lag)
    assert [row["lag"] for row in metrics(folder)] == [min(k, max_lag) for k in range(10)]
    assert [env.t + 1 for env in envs.Tagged.instances[1 : 1 + N]] == [10 * T + 1] * N  # and the first reset
    assert result(folder)["processes"] == 1
    before = checkpoint(folder)["agent"]["steps"]
    assert before == 10 * N * T
    resume(module, folder, "--total-timesteps", N * T * 15)
    assert [row["lag"] for row in metrics(folder)[10:]] == [min(k, max_lag) for k in range(5)]
    assert checkpoint(folder)["agent"]["steps"] == 15 * N * T


@bugs(
    ("impala", ASK, ASK.replace("args.max_lag", "args.max_lag + 1")),
    ("impala", ASK, "while len(asked) <= args.max_lag:"),
    ("impala", "asked.pop(0)", "asked.pop()"),
    ("impala", "agent.steps += valid.numel()", "agent.steps += valid.sum()"),
)
def test_lag_sees(request, name, old, new):
    fails_with_a_bug(request, test_lag_in_the_log, name, old, new, max_lag=1)


@ours
def test_weights_are_a_copy(module):
    """Weights that change while they are under way, as the learner goes on."""
    agent, _ = make_agent(module, Discrete(4))
    weights = module.copy_weights(agent)
    before = copy.deepcopy(weights)
    with torch.no_grad():
        for tensor in agent.state_dict().values():
            tensor.add_(1)
    assert equal(weights, before)


@bugs(("impala", 'tensor.to("cpu", copy=True)', "tensor.cpu()"))
def test_copies_see(request, name, old, new):
    fails_with_a_bug(request, test_weights_are_a_copy, name, old, new)


@ours
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_without_lag_it_is_a2c(module, monkeypatch, tmp_path, optimizer):
    """Any difference from a2c.py with lambda = 1 that is not V-trace's: in collecting, normalising or updating."""
    given = dict(optimizer=optimizer, norm_reward=True, anneal_lr=True, learning_rate=1e-2)
    given |= dict(clip_reward=optimizer == "adam")
    found = checkpoint(train_on_tagged(module, tmp_path / "impala", **given))
    rows = metrics(tmp_path / "impala" / "run")
    spy(monkeypatch, a2c.Run, "__init__", after=lambda *_: torch.manual_seed(a2c.env_seed(3)))
    monkeypatch.setattr(envs.Tagged, "instances", [])
    plain = dict(env_id="test/Tagged-v0", num_envs=N, num_steps=T, total_timesteps=N * T * 10, gamma=0.9)
    plain |= dict(ent_coef=0.01, norm_obs=True, seed=3, gae_lambda=1.0)
    envs.Tagged.instances.append(None)  # where impala.py looks at the spaces
    a2c.train(make_args(a2c, tmp_path / "a2c", **plain | given))
    expected = checkpoint(tmp_path / "a2c" / "run")
    for name, tensor in expected["agent"].items():
        torch.testing.assert_close(found["agent"][name], tensor, atol=1e-3, rtol=1e-3, msg=name)
    for row, other in zip(rows, metrics(tmp_path / "a2c" / "run"), strict=True):
        for name in other.keys() - {"wall_time", "SPS"}:
            assert row[name] == pytest.approx(other[name], abs=1e-3, rel=1e-3), name


@bugs(
    ("impala", "discounted = args.gamma * discounted * valid", "discounted = args.gamma * discounted"),
    ("impala", "score = score * valid + reward", "score = score + reward"),
    ("impala", "1 - agent.steps.item() / args.total", "1 - (agent.steps.item() + 48) / args.total"),
    ("impala", "agent.reward_norm.update(batch", "agent.reward_norm.update(2 * batch"),
    ("impala", "max_norm=args.max_grad_norm", "max_norm=1.0"),
    ("impala", "advantages[valid].std()", "advantages.std()"),
    ("impala", "reward.clip(-1, 1)", "reward.clip(-2, 2)"),
)
def test_without_lag_sees(request, name, old, new):
    fails_with_a_bug(request, test_without_lag_it_is_a2c, name, old, new, optimizer="adam")


@ours
@pytest.mark.parametrize(
    ("env", "observations", "values", "max_lag"),
    [
        ("Truncation", (1,), [10], 0), ("Truncation", (1,), [10], 2), ("Successor", (-1, 1), [9, 10], 2),
        ("BothEnds", (1,), [1], 0), ("Discounting", (-1, 1), [0.9, 1], 0),
    ],
)  # fmt: skip
def test_values_that_are_known(module, monkeypatch, tmp_path, env, observations, values, max_lag):
    """Truncation taken for termination, the value after a reset, reset steps learned from: V would not be 10."""
    given = dict(total_timesteps=2048, num_steps=33, max_lag=max_lag)
    agent, _ = learn_probe(module, monkeypatch, tmp_path, env, **given)
    assert value(agent, *observations) == near(values, 0.1)


@bugs(
    ("impala", ERRORS, ERRORS.replace("~terminated", "~done")),
    ("impala", DECAYS, DECAYS.replace("~done", "~terminated")),
    ("impala", VALID, "valid = ~done | True  #"),
)
def test_values_see(request, name, old, new):
    given = dict(env="Truncation", observations=(1,), values=[10], max_lag=0)
    fails_with_a_bug(request, test_values_that_are_known, name, old, new, **given)


@ours
def test_no_two_samplers_have_one_number(module):
    """The same episodes and actions in two samplers, in one that takes the place of another, or after a resumption."""
    agent = torch.nn.Linear(1, 1)
    args = module.Args(num_samplers=3, num_envs=2, num_steps=8)
    numbers = []
    for step in (0, 16, 32, 160):
        run = SimpleNamespace(step=step, parts=dict(agent=agent))
        inputs = [module.sampler_inputs(run, args, index) for index in range(3)]
        numbers += [each_inputs["number"] for each_inputs in inputs]
        assert all(each_inputs["parts"]["agent"] is not agent for each_inputs in inputs)
    assert len(set(numbers)) == 12
    assert numbers[0] == 0


@bugs(
    ("impala", "number = iteration * max(1, args.num_samplers) + index", "number = iteration + index"),
    ("impala", "number = iteration * max(1, args.num_samplers) + index", "number = index"),
    ("impala", '(agent=copy.deepcopy(run.parts["agent"]).cpu())', '(agent=run.parts["agent"])'),
)
def test_numbers_see(request, name, old, new):
    fails_with_a_bug(request, test_no_two_samplers_have_one_number, name, old, new)


# Without Ray


def test_without_ray(tmp_path):
    """One sentence, before anything is made; and a run in one process needs no Ray."""
    given = line(impala, num_samplers=2, run_dir="run")
    done = Process(impala.__file__, given, tmp_path, hide="ray").wait()
    assert done.rc == 2
    advice = "pip install ray==2.60.0, or act in this process with --num-samplers 0"
    assert done.err == f"impala.py: --num-samplers 2 needs Ray: {advice}\n"
    assert not (tmp_path / "run").exists()
    done = Process(impala.__file__, line(impala, num_samplers=0, run_dir="run"), tmp_path, hide="ray").wait()
    assert (done.rc, done.err) == (0, "")


def test_an_address_without_samplers():
    """A cluster that would not be used."""
    with pytest.raises(impala.Refusal, match=r"address.*num_samplers 0"):
        impala.Args(address="auto", num_samplers=0)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:x", "nowhere.invalid:6379"])
def test_an_address_where_nobody_listens(address, tmp_path):
    """Minutes of trying, or a directory for a run that never was."""
    pytest.importorskip("ray")
    with pytest.raises(impala.Refusal, match=f"^no Ray at {address}: .*$"):
        impala.train(make_args(impala, tmp_path, num_samplers=2, address=address))
    assert not (tmp_path / "run").exists()


# Losses, with something in place of Ray


class Lost(Exception):
    """What Ray raises where an actor has died."""


class TaskError(Exception):
    """What Ray raises where an actor has raised an error."""

    def __init__(self, cause):
        self.cause = cause


class FakeRay:
    """Answers are what they say, or errors that are raised."""

    exceptions = SimpleNamespace(RayActorError=Lost, RayTaskError=TaskError)

    def __init__(self):
        self.killed = []

    def get(self, answer):
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self, actor):
        self.killed.append(actor)


class FakeActor:
    """A sampler that says who it is, what it was asked and, if it lives, that an episode has returned 1."""

    def __init__(self, name, lives=True):
        self.name = name
        self.lives = lives
        self.answer = SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=self.remote))

    def remote(self, weights):
        return f"{self.name} with {weights}", [1.0] if self.lives else Lost()


def fake_processes(module, lives):
    """Two samplers and what starts others."""
    run = SimpleNamespace(ray=FakeRay(), bar=SimpleNamespace(close=lambda: None))
    module.Run.saved = "nothing was saved"
    processes = module.Processes(run, module.Args(num_samplers=2))
    processes.learner = True  # there is one
    processes.samplers = [FakeActor("first 0"), FakeActor("first 1")]
    names = iter(["second", "third", "fourth", "fifth"])
    processes.start_sampler = lambda index: FakeActor(f"{next(names)} {index}", lives)
    return processes


@ours
def test_a_loss_is_counted_once(module):
    """A replacement for each batch that a lost sampler owes, or for its replacement; an answer of the other one."""
    processes = fake_processes(module, lives=True)
    lost = processes.samplers[0]
    requests = [processes.sample(f"w{k}") for k in range(3)]
    lost.lives = False
    requests.append(processes.sample("w3"))
    requests.append(processes.sample("w4"))
    assert [request[0] for request in requests] == [0, 1, 0, 1, 0]
    requests[2] = (0, lost, ("lost", Lost()))
    answers = [processes.receive(request, f"v{k}")[0] for k, request in enumerate(requests)]
    assert answers == ["first 0 with w0", "first 1 with w1", "second 0 with v2", "first 1 with w3", "second 0 with v4"]
    assert processes.lost == 1
    assert processes.run.ray.killed == [lost]


@ours
def test_a_sampler_that_always_dies_ends_the_run(module):
    """Replacements without an end."""
    processes = fake_processes(module, lives=False)
    processes.samplers[0].lives = False
    with pytest.raises(SystemExit, match=r"impala\.py: sampler 0 has died 3 times in a row; nothing was saved"):
        processes.receive(processes.sample("w"), "v")
    assert processes.lost == 3


@bugs(
    ("impala", "if sampler is self.samplers[index]:", "if True:"),
    ("impala", "index = self.asked % len(self.samplers)", "index = 0"),
    ("impala", "return batch, self.get(episode_returns)", "return batch, episode_returns"),
)
def test_losses_see(request, name, old, new):
    fails_with_a_bug(request, test_a_loss_is_counted_once, name, old, new)


@bugs(
    ("impala", "for _ in range(3):", "for _ in range(4):"),
    ("impala", "_, sampler, answer = self.ask(index, weights)", "_, _, answer = self.ask(index, weights)"),
)
def test_dying_samplers_see(request, name, old, new):
    fails_with_a_bug(request, test_a_sampler_that_always_dies_ends_the_run, name, old, new)


@ours
def test_errors_of_actors(module):
    """A Refusal that is printed as a traceback, or an error of the user's that becomes a sentence."""
    processes = fake_processes(module, lives=True)
    with pytest.raises(module.Refusal, match=r"^mine$"):
        processes.get(TaskError(module.Refusal("mine")))
    with pytest.raises(TaskError):
        processes.get(TaskError(ValueError("mine")))
    with pytest.raises(SystemExit, match=r"impala\.py: the learner has died; nothing was saved"):
        processes.of_learner(Lost())
