"""REINFORCE and QAC: gradients against enumerated expectations, data paths against what happened."""

import itertools
import json
from types import SimpleNamespace

import envs
import numpy as np
import pytest
import torch
from conftest import loss_name, make_args, spy
from gymnasium.spaces import Box, Discrete
from test_data_path import key
from test_probes import keep_reset_steps, learn, near, value

from algos import actor_critic, reinforce

COMBINATIONS = list(itertools.product(["return", "reward-to-go"], ["none", "mean", "value"]))
BOTH = pytest.mark.parametrize("module", [reinforce, actor_critic], ids=["reinforce", "actor_critic"])

# An MDP of at most two steps: outcomes (probability, reward, next state or None at the end) by state and action.
MDP = {
    (0, 0): [(0.7, 1.0, 1), (0.3, -1.0, 2)],
    (0, 1): [(0.6, 0.5, 2), (0.4, 2.0, None)],
    (1, 0): [(1.0, 3.0, None)],
    (1, 1): [(1.0, 0.0, None)],
    (2, 0): [(0.5, 1.0, None), (0.5, 4.0, None)],
    (2, 1): [(1.0, 2.0, None)],
}


def make_agent(module, **given):
    """An agent on the MDP with a policy far from uniform, its arguments, and pi(a|s) as a differentiable table."""
    torch.manual_seed(3)
    args = module.Args(hidden_size=8, **given)
    agent = module.Agent(Discrete(3), Discrete(2), args)
    with torch.no_grad():
        agent.actor[-1].weight.mul_(150)
    return agent, args, torch.softmax(agent.actor(torch.eye(3)), -1)


def episodes(state=0):
    """Every episode from a state on: the probability of its outcomes and its steps (s, a, r)."""
    for action in (0, 1):
        for chance, reward, following in MDP[state, action]:
            rest = [(1.0, [])] if following is None else episodes(following)
            for chance_of_rest, steps in rest:
                yield chance * chance_of_rest, [(state, action, reward), *steps]


def true_q(pi, gamma):
    """Q^pi(s, a) by recursion."""
    q = {}
    for s, a in sorted(MDP, reverse=True):  # later states have higher numbers
        following = lambda n: 0 if n is None else sum(pi[n, b] * q[n, b] for b in (0, 1))  # noqa: E731
        q[s, a] = sum(chance * (reward + gamma * following(n)) for chance, reward, n in MDP[s, a])
    return q


def actor_gradient(agent, x):
    return torch.cat([part.flatten() for part in torch.autograd.grad(x, agent.actor.parameters(), retain_graph=True)])


def estimates(weight, baseline, gamma, values, change=None):
    """Probability and gradient estimate of every pair of episodes, through the functions of the script."""
    agent, args, pi = make_agent(reinforce, baseline=baseline)
    one = torch.ones(1)
    scores = {}
    for s, a in MDP:  # grad log pi(a|s), as the loss sees it
        batch = dict(obs=torch.tensor([s]), actions=torch.tensor([a]), advantages=one, returns=one)
        scores[s, a] = -actor_gradient(agent, reinforce.reinforce_loss(agent, batch, args)[0])
    all_episodes = [(chance * np.prod([pi[s, a].item() for s, a, _ in steps]), steps) for chance, steps in episodes()]
    probabilities, gradients = [], []
    for pair in itertools.product(all_episodes, repeat=2):
        rewards, v = torch.full((2, 2), 9.0), torch.zeros(3, 2)  # 9: a step of some later episode
        terminated, valid = torch.zeros(2, 2, dtype=bool), torch.zeros(2, 2, dtype=bool)
        for n, (_, steps) in enumerate(pair):
            for t, (s, _, r) in enumerate(steps):
                rewards[t, n], v[t, n], valid[t, n] = r, values[s], True
            terminated[len(steps) - 1, n] = True
        if change:
            rewards, v, valid = change(rewards, v, valid)
        returns = reinforce.compute_returns(rewards, v, terminated, terminated, gamma)
        weights = reinforce.compute_weights(returns, v[:-1], valid, weight, baseline)
        rows = [(t, n, steps[t]) for n, (_, steps) in enumerate(pair) for t in range(len(steps))]
        gradients.append(sum(weights[t, n] * scores[s, a] for t, n, (s, a, _) in rows) / 2)
        probabilities.append(pair[0][0] * pair[1][0])
    assert sum(probabilities) == pytest.approx(1)
    return torch.tensor(probabilities, dtype=torch.float32), torch.stack(gradients), agent, pi


def mean_and_variance(probabilities, gradients):
    mean = probabilities @ gradients
    return mean, (probabilities @ (gradients - mean).square()).sum().item()


def expectation(agent, pi, weight, gamma):
    """grad J for whole returns; for rewards-to-go the policy gradient theorem, with states counted without gamma^t."""
    if weight == "return":
        J = 0
        for chance, steps in episodes():
            G = sum(gamma**t * r for t, (_, _, r) in enumerate(steps))
            J += chance * G * torch.stack([pi[s, a] for s, a, _ in steps]).prod()
        return actor_gradient(agent, J)
    fixed = pi.detach()
    q, visits = true_q(fixed, gamma), {0: 1.0, 1: 0.0, 2: 0.0}
    for a in (0, 1):
        for chance, _, n in MDP[0, a]:
            if n is not None:
                visits[n] += fixed[0, a] * chance
    return actor_gradient(agent, sum(visits[s] * pi[s, a] * q[s, a] for s, a in MDP))


def state_values(gamma):
    pi = make_agent(reinforce)[2].detach()
    q = true_q(pi, gamma)
    return [sum(pi[s, a] * q[s, a] for a in (0, 1)).item() for s in range(3)]


@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize(("weight", "baseline"), COMBINATIONS)
def test_gradient_equals_the_enumerated_expectation(weight, baseline, gamma):
    """A baseline with a bias, even that of one's own return in the mean; rewards of the next episode; a shifted sum."""
    probabilities, gradients, agent, pi = estimates(weight, baseline, gamma, values=[3.0, -1.0, 0.5])  # any V will do
    mean, _ = mean_and_variance(probabilities, gradients)
    expected = expectation(agent, pi, weight, gamma)
    assert expected.norm() > 0.1
    torch.testing.assert_close(mean, expected, atol=1e-4, rtol=1e-4)
    if gamma == 1:
        torch.testing.assert_close(expected, expectation(agent, pi, "return", 1), atol=1e-4, rtol=1e-4)


def test_the_enumeration_sees_a_biased_baseline(monkeypatch):
    """A test that could not fail: with one's own episode in the mean the gradient of 2 episodes is halved."""

    def mean_of_all(returns, values, valid, weight, baseline):
        return (returns * valid - (returns * valid).mean(1, keepdim=True))[:1].expand_as(returns)

    monkeypatch.setattr(reinforce, "compute_weights", mean_of_all)
    probabilities, gradients, agent, pi = estimates("return", "mean", 0.6, [0.0] * 3)
    expected = expectation(agent, pi, "return", 0.6)
    torch.testing.assert_close(mean_and_variance(probabilities, gradients)[0], expected / 2, atol=1e-4, rtol=1e-4)


def test_the_enumeration_sees_steps_after_the_end():
    """A test that could not fail: rewards of a later episode that are not masked move the mean of the others."""

    def mask_nothing(rewards, v, valid):
        return rewards, v, torch.ones_like(valid)

    _, masked, *_ = estimates("reward-to-go", "mean", 0.6, [0.0] * 3)
    _, unmasked, *_ = estimates("reward-to-go", "mean", 0.6, [0.0] * 3, mask_nothing)
    assert (masked - unmasked).abs().max() > 1


def test_each_improvement_lowers_the_variance():
    """A baseline that only adds noise, one switched off, or a reward-to-go that still sums the past."""
    values = state_values(1.0)
    variance = {(w, b): mean_and_variance(*estimates(w, b, 1.0, values)[:2])[1] for w, b in COMBINATIONS}
    for weight in ("return", "reward-to-go"):
        assert variance[weight, "mean"] < 0.9 * variance[weight, "none"]
        assert variance[weight, "value"] < 0.9 * variance[weight, "mean"]
    for baseline in ("none", "mean", "value"):
        assert variance["reward-to-go", baseline] < 0.98 * variance["return", baseline]


@pytest.mark.parametrize("seed", range(3))
def test_returns_against_a_double_loop(seed):
    """One mask for both kinds of end, V of the wrong step at a cut, a discount that is missing or applied twice."""
    random, T, N, gamma = np.random.default_rng(seed), 11, 4, 0.9
    rewards, values = random.normal(size=(T, N)), random.normal(size=(T + 1, N))
    terminated, truncated = random.random((2, T, N)) < 0.2
    expected = np.zeros((T, N))
    for t, n in np.ndindex(T, N):
        for k in range(t, T):
            expected[t, n] += gamma ** (k - t) * rewards[k, n]
            if terminated[k, n] or truncated[k, n] or k == T - 1:
                expected[t, n] += 0 if terminated[k, n] else gamma ** (k - t + 1) * values[k + 1, n]
                break
    inputs = [torch.from_numpy(x) for x in (rewards, values, terminated, terminated | truncated)]
    assert reinforce.compute_returns(*inputs, gamma).numpy() == pytest.approx(expected, abs=1e-6)
    for wrong in ((inputs[3], inputs[3]), (inputs[2], inputs[2])):
        assert reinforce.compute_returns(*inputs[:2], *wrong, gamma).numpy() != pytest.approx(expected, abs=1e-2)


@BOTH
@pytest.mark.parametrize("space", [Discrete(4), Box(-1, 1, (2,))], ids=["discrete", "box"])
def test_loss_is_the_mean_of_its_rows(module, space):
    """(B, 1) against (B,), signs and coefficients of the three terms, Q of another action or with a gradient twice."""
    args = module.Args(vf_coef=0.7, ent_coef=0.3)
    agent = module.Agent(Box(-1, 1, (5,)), space, args)
    obs, loss_of = torch.randn(16, 5), getattr(module, loss_name(module))
    actions = torch.from_numpy(agent.act(obs.numpy()))
    batch = dict(obs=obs, actions=actions, advantages=torch.randn(16), returns=torch.randn(16))
    policy = torch.distributions.Categorical(logits=agent.actor(obs)) if agent.discrete else None
    policy = policy or torch.distributions.Normal(agent.actor(obs), agent.log_std.exp())
    log_probs, entropy = policy.log_prob(actions).view(16, -1).sum(1), policy.entropy().view(16, -1).sum(1)
    if module is reinforce:
        values = agent.critic(obs)[:, 0]
    elif agent.discrete:
        values = torch.stack([row[a] for row, a in zip(agent.critic(obs), actions)])
    else:
        values = agent.critic(torch.cat([obs, actions], 1))[:, 0]
    rows = -log_probs * batch["advantages"] + 0.7 * (values - batch["returns"]) ** 2 - 0.3 * entropy
    loss, metrics = loss_of(agent, batch, args)
    parts = [torch.autograd.grad(x, list(agent.parameters())) for x in (loss, rows.mean())]
    torch.testing.assert_close(*parts, atol=1e-6, rtol=1e-4)
    assert loss.item() == pytest.approx(rows.mean().item(), abs=1e-5)
    assert not any(metric.requires_grad for metric in metrics.values())


# QAC


def continuing_mdp():
    """Rows (s, a, r, s', a', terminated) whose frequencies are the probabilities; a' follows pi(1|s') = 1/4, 1/2."""
    rows = []
    for s, a in itertools.product((0, 1), repeat=2):
        for s2 in (a, a, a, 1 - a):  # the action names the next state, three times in four
            for a2 in ((0, 0, 0, 1), (0, 0, 1, 1))[s2]:
                rows.append((s, a, s + 2.0 * a - 1, s2, a2, s == a == 1))
    return rows


def analytic_q(rows, gamma, ends):
    """Q = (I - gamma P)^-1 r, over (s, a) in the order 00, 01, 10, 11."""
    P, r = np.zeros((4, 4)), np.zeros(4)
    for s, a, reward, s2, a2, terminated in rows:
        r[2 * s + a] += reward / 16
        P[2 * s + a, 2 * s2 + a2] += 0 if ends and terminated else 1 / 16
    return np.linalg.solve(np.eye(4) - gamma * P, r)


@pytest.mark.parametrize("ends", [True, False], ids=["terminated", "truncated"])
@pytest.mark.parametrize("continuous", [False, True])
def test_critic_fixed_point_is_the_analytic_q(ends, continuous):
    """Updates of the script on every transition at its frequency: max in place of a', truncation as termination."""
    gamma, rows = 0.8, continuing_mdp()
    args = actor_critic.Args(hidden_size=32, max_grad_norm=100.0)
    agent = actor_critic.Agent(Discrete(2), Box(-1, 1, (1,)) if continuous else Discrete(2), args)
    s, a, r, s2, a2, over = (torch.tensor(column) for column in zip(*rows))
    a, a2 = (x[:, None].float() if continuous else x for x in (a, a2))
    optimizer, before = actor_critic.Adam(agent), agent.actor[-1].weight.clone()
    expected = analytic_q(rows, gamma, ends)
    for step in range(1500):
        with torch.no_grad():
            q_values = torch.stack([agent(s, a)[1], agent(s2, a2)[1]])
        targets = actor_critic.sarsa_targets(r[None], q_values, (over & ends)[None], gamma)[0]
        batch = dict(obs=s, actions=a, advantages=torch.zeros(len(s)), returns=targets)
        actor_critic.update(agent, optimizer, batch, torch.tensor(1e-2 * (1 - step / 1500)), args)
    learned = agent(s, a)[1].detach().numpy()[::16]
    assert learned == pytest.approx(expected, abs=0.02)
    assert torch.equal(agent.actor[-1].weight, before)  # no advantage, no policy gradient
    assert abs(analytic_q(rows, gamma, not ends) - expected).max() > 0.5
    greedy = np.zeros(4)
    for _ in range(200):
        targets = [r + gamma * (1 - (e and ends)) * greedy[2 * s2 : 2 * s2 + 2].max() for _, _, r, s2, _, e in rows]
        greedy = np.array(targets).reshape(4, 16).mean(1)
    assert abs(greedy - expected).max() > 0.5


# The data path


def watch(module, monkeypatch, folder, **given):
    """Train on a Tagged environment; for each iteration its batch, the critic before the step, and all that acted."""
    seen = SimpleNamespace(iterations=[], acted={}, rates=[])
    monkeypatch.setattr(envs.Tagged, "instances", [])

    def after_act(actions, agent, obs, greedy=False):
        for row, action in zip(obs, actions):
            assert greedy or key(row) not in seen.acted, "two actions in one state"
            seen.acted.setdefault(key(row), action)

    def before_update(agent, optimizer, batch, learning_rate, args):
        assert not any(column.requires_grad for column in batch.values()), "a gradient through the target"
        obs = [row[name] for env in envs.Tagged.instances for row in env.log for name in ("obs", "next_obs")]
        inputs = [torch.from_numpy(np.stack(obs))]
        if module is actor_critic:
            inputs.append(torch.from_numpy(np.stack([seen.acted.get(key(x), 0 * seen.acted[0, 0, 0]) for x in obs])))
        with torch.no_grad():
            values = dict(zip(map(key, obs), agent(*inputs)[1].tolist()))
        seen.rates.append(learning_rate)
        seen.iterations.append(({name: column.numpy().copy() for name, column in batch.items()}, values))

    spy(monkeypatch, module, "update", before=before_update)
    act = module.Agent.act

    def watched_act(agent, obs, greedy=False):
        actions = act(agent, obs, greedy)
        after_act(actions, agent, obs, greedy)
        return actions

    monkeypatch.setattr(module.Agent, "act", watched_act)
    plain = dict(env_id="test/Tagged-v0", num_envs=3, num_steps=16, total_timesteps=768, gamma=0.9, learning_rate=1e-2)
    args = make_args(module, folder, **(plain | given))
    seen.result = module.train(args)
    seen.lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    seen.trained = envs.Tagged.instances[:3]
    seen.log = {key(row["obs"]): row for env in seen.trained for row in env.log}
    return seen


def learned_returns(seen, batch, values, gamma, weight="reward-to-go", baseline="value", cut_values=True):
    """For each key of a batch of whole episodes its G and, with `weight` and `baseline`, G - b, from the log alone."""
    keys = {key(obs) for obs in batch["obs"]}
    G, cuts = {}, 0
    for index, step, episode in sorted(keys, reverse=True):
        row, following = seen.log[index, step, episode], (index, step + 1, episode)
        assert step == 0 or (index, step - 1, episode) in keys, "not a whole episode"
        bootstrap = G.get(following, values[key(row["next_obs"])] if cut_values else 0.0)
        cuts += following not in keys and not row["terminated"] and not row["truncated"]
        G[index, step, episode] = row["reward"] + gamma * (0 if row["terminated"] else bootstrap)
    weights = {}
    for index, step, episode in keys:
        at = 0 if weight == "return" else step
        others = [G[i, 0 if weight == "return" else t, e] for i, t, e in keys if i != index]
        b = dict(none=0.0, mean=np.mean(others), value=values[index, at, episode])[baseline]
        weights[index, step, episode] = G[index, at, episode] - b
    return G, weights, cuts


@pytest.mark.parametrize(("weight", "baseline"), COMBINATIONS)
@pytest.mark.parametrize("horizon", [100, 4])
def test_reinforce_learns_from_one_whole_episode_of_each_environment(monkeypatch, tmp_path, weight, baseline, horizon):
    """Steps after the end, parts of episodes, sums across an end, cuts taken for ends, a baseline nobody asked for."""
    seen = watch(reinforce, monkeypatch, tmp_path, weight=weight, baseline=baseline, horizon=horizon)
    assert len(seen.iterations) > 30
    step, cuts, finished, used = 0, 0, 0, set()
    for line, (batch, values) in zip(seen.lines, seen.iterations, strict=True):
        G, expected, new_cuts = learned_returns(seen, batch, values, 0.9, weight, baseline, baseline == "value")
        keys = [key(obs) for obs in batch["obs"]]
        assert len(set(keys)) == len(keys)
        assert len({(i, episode) for i, _, episode in keys}) == len({i for i, _, _ in keys}) == 3
        assert not used & set(keys)
        used |= set(keys)
        assert batch["actions"].tolist() == [seen.log[k]["action"] for k in keys]
        assert batch["returns"] == pytest.approx(np.array([G[k] for k in keys]), abs=1e-4)
        weights = np.array([expected[k] for k in keys])
        assert batch["advantages"] == pytest.approx(weights / np.sqrt(np.mean(weights**2)), abs=1e-3)
        step += 3 * (1 + max(k[1] for k in keys))  # environments that wait for the last one take steps, too
        assert line["global_step"] == step
        ended = [seen.log[k] for k in keys if seen.log[k]["terminated"] or seen.log[k]["truncated"]]
        returns = [seen.trained[int(row["obs"][0])].returns[int(row["obs"][2])] for row in ended]
        assert line["episodes"] == len(returns) == 3 - new_cuts
        assert line["episodic_return"] == (pytest.approx(np.mean(returns)) if returns else None)
        cuts, finished = cuts + new_cuts, finished + len(returns)
    assert step == 768
    assert finished > 30
    assert cuts > 30 if horizon == 4 else cuts <= 3  # 3: at the end of the budget


def test_reinforce_data_path_sees_a_sum_across_episodes(monkeypatch, tmp_path):
    """A test that could not fail: with one mask for both purposes, learned returns are not those of the log."""
    compute_returns = reinforce.compute_returns
    monkeypatch.setattr(reinforce, "compute_returns", lambda r, v, terminated, done, gamma: compute_returns(
        r, v, terminated, terminated, gamma))  # fmt: skip
    seen = watch(reinforce, monkeypatch, tmp_path)
    wrong = 0
    for batch, values in seen.iterations:
        G, _, _ = learned_returns(seen, batch, values, 0.9)
        wrong += batch["returns"] != pytest.approx(np.array([G[key(obs)] for obs in batch["obs"]]), abs=1e-4)
    assert wrong > 5


@pytest.mark.parametrize("name", ["Tagged", "TaggedBox"])
def test_actor_critic_learns_from_the_transitions_and_the_actions_taken(monkeypatch, tmp_path, name):
    """Reset steps learned from, a' that is not executed, Q after a reset, a bootstrap missing at a truncation."""
    seen = watch(actor_critic, monkeypatch, tmp_path, env_id=f"test/{name}-v0", critic_learning_rate=3e-2)
    assert len(seen.iterations) == 16
    to_env = actor_critic.action_map(seen.trained[0].action_space)
    for k, (batch, values) in enumerate(seen.iterations):
        rows = {key(r["obs"]): r for env in seen.trained for r in env.log if 16 * k <= r["t"] < 16 * (k + 1)}
        keys = [key(obs) for obs in batch["obs"]]
        assert sorted(keys) == sorted(rows)
        for i, action in zip(keys, batch["actions"]):
            assert np.array_equal(action, seen.acted[i])
            assert to_env(action[None])[0] == pytest.approx(rows[i]["action"], abs=1e-6)
        following = [0 if rows[i]["terminated"] else values[key(rows[i]["next_obs"])] for i in keys]
        targets = np.array([rows[i]["reward"] for i in keys]) + 0.9 * np.array(following)
        assert batch["returns"] == pytest.approx(targets, abs=1e-4)
        q = np.array([values[i] for i in keys])
        assert batch["advantages"] == pytest.approx((q - q.mean()) / q.std(ddof=1), abs=1e-3)
    rates = seen.rates[0].tolist()
    sizes = [sum(p.numel() for p in part.parameters()) for part in (actor_critic.Agent(
        envs.Tagged.observation_space, seen.trained[0].action_space, actor_critic.Args()).critic,)]  # fmt: skip
    assert sum(rate == pytest.approx(3e-2) for rate in rates) == sizes[0]
    assert sum(rate == pytest.approx(1e-2) for rate in rates) == len(rates) - sizes[0] > 0


@BOTH
@pytest.mark.parametrize(("clip_reward", "norm_reward"), [(True, False), (False, True), (True, True)])
def test_rewards_are_clipped_and_divided(module, monkeypatch, tmp_path, clip_reward, norm_reward):
    """A flag without effect, statistics of reset steps or across an end, a mean taken off, a log of clipped returns."""
    agents = []
    spy(monkeypatch, module, "evaluate", before=lambda agent, *_: agents.append(agent))
    given = dict(horizon=5, clip_reward=clip_reward, norm_reward=norm_reward)
    seen = watch(module, monkeypatch, tmp_path, **given)
    rewards = {k: np.clip(row["reward"], -1, 1) if clip_reward else row["reward"] for k, row in seen.log.items()}
    sums, finished = {}, 0
    for line, (batch, values) in zip(seen.lines, seen.iterations, strict=True):
        keys, G = [key(obs) for obs in batch["obs"]], {}
        for i, step, episode in sorted(keys):
            sums[i, step, episode] = rewards[i, step, episode] + 0.9 * sums.get((i, step - 1, episode), 0)
        scale = 1 / np.sqrt(np.var(list(sums.values())) + 1e-8) if norm_reward else 1
        for i, step, episode in sorted(keys, reverse=True):
            row = seen.log[i, step, episode]
            rest = values[key(row["next_obs"])]
            rest = G.get((i, step + 1, episode), rest) if module is reinforce else rest
            G[i, step, episode] = scale * rewards[i, step, episode] + 0.9 * (0 if row["terminated"] else rest)
        assert batch["returns"] == pytest.approx(np.array([G[k] for k in keys]), abs=1e-3)
        ended = [k for k in keys if seen.log[k]["terminated"] or seen.log[k]["truncated"]]
        returns = [seen.trained[i].returns[episode] for i, _, episode in ended]
        assert line["episodes"] == len(returns)
        assert line["episodic_return"] == (pytest.approx(np.mean(returns)) if returns else None)
        finished += len(returns)
    assert finished > 30
    assert agents[0].return_norm.count == (len(sums) if norm_reward else 0)


@pytest.mark.parametrize("baseline", ["none", "mean"])
def test_no_baseline_no_critic(monkeypatch, tmp_path, baseline):
    """A critic that learns, and shapes what it shares with the policy, where none was asked for."""
    agents = []
    spy(monkeypatch, reinforce, "update", before=lambda agent, *_: agents.append(agent.critic[0].weight.clone()))
    args = make_args(reinforce, tmp_path, env_id="test/ObsActionReward-v0", total_timesteps=800, baseline=baseline,
                     learning_rate=1e-2)  # fmt: skip
    assert reinforce.train(args)["eval_mean"] == 1
    assert torch.equal(agents[0], agents[-1])


def test_the_mean_of_the_others_needs_others():
    with pytest.raises(ValueError, match="num_envs"):
        reinforce.Args(baseline="mean", num_envs=1)


# Probes


def q_value(agent, obs, *actions):
    """Q(s, a) of a number as the observation and of each action."""
    with torch.no_grad():
        return agent(torch.full((len(actions), 1), float(obs)), torch.tensor(actions))[1].tolist()


def train(module, monkeypatch, folder, name, **given):
    """Train on test/<name>-v0; V(s) of the agent as a function of a number, and its return. V is Q of the mode."""
    given = dict(critic_learning_rate=1e-2, total_timesteps=2048) | given
    given |= dict(num_envs=16) if module is reinforce else {}  # its batches are as short as the episodes
    agent, mean = learn(module, monkeypatch, folder, name, **given)
    if module is reinforce:
        return (lambda *obs: value(agent, *obs)), mean, agent
    mode = lambda obs: int(agent.act(np.full((1, 1), obs, np.float32), greedy=True)[0])  # noqa: E731
    return (lambda *obs: [q_value(agent, x, mode(x))[0] for x in obs]), mean, agent


@BOTH
def test_values_of_the_probes(module, monkeypatch, tmp_path):
    """A critic that learns nothing, mixes rows, bootstraps at a termination or takes both ends at once for a cut."""
    assert train(module, monkeypatch, tmp_path / "1", "ObsValue")[0](-1, 1) == near([-1, 1])
    assert train(module, monkeypatch, tmp_path / "2", "Discounting")[0](-1, 1) == near([0.9, 1], 0.03)
    assert train(module, monkeypatch, tmp_path / "3", "BothEnds")[0](1) == near([1])


@BOTH
def test_policy_depends_on_the_observation(module, monkeypatch, tmp_path):
    """A policy loss with the wrong sign, actions and weights of different rows."""
    _, mean, agent = train(module, monkeypatch, tmp_path, "ObsActionReward", learning_rate=5e-3)
    assert mean == 1
    if module is actor_critic:
        assert q_value(agent, 1, 0, 1) == near([-1, 1], 0.3)
        assert q_value(agent, -1, 0, 1) == near([1, -1], 0.3)


@BOTH
def test_truncation_is_bootstrapped(module, monkeypatch, tmp_path):
    """V is 10, and 9 before it, also when it was cut; the observation at the end is not the next start."""
    assert train(module, monkeypatch, tmp_path / "1", "Truncation", total_timesteps=6144)[0](1) == near([10], 0.1)
    given = dict(total_timesteps=8192, num_steps=33)
    assert train(module, monkeypatch, tmp_path / "2", "Successor", **given)[0](-1, 1) == near([9, 10], 0.1)


def truncation_as_termination(module, monkeypatch):
    def step(envs, actions):
        obs, rewards, terminated, truncated, infos = type(envs).step(envs, actions)
        return obs, rewards, terminated | truncated, truncated, infos

    def changed(*inputs):
        made = make_envs(*inputs)
        made.step = lambda actions: step(made, actions)
        return made

    make_envs = module.make_envs
    monkeypatch.setattr(module, "make_envs", changed)


@pytest.mark.parametrize(
    ("module", "bug", "wrong"),
    [
        (reinforce, truncation_as_termination, 3.59),
        (actor_critic, truncation_as_termination, 4.71),
        (actor_critic, keep_reset_steps, 8.89),
    ],
)
def test_truncation_probe_sees(module, monkeypatch, tmp_path, bug, wrong):
    """A probe that could not fail: with the bug put in, V is not 10 but the number that the bug is known by."""
    bug(module, monkeypatch)
    values, _, _ = train(module, monkeypatch, tmp_path, "Truncation", total_timesteps=7200, num_steps=36)
    assert values(1) == near([wrong], 0.1)
