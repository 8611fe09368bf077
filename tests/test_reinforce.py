"""REINFORCE and QAC: gradients against enumerated expectations, data paths against what happened."""

import itertools
from types import SimpleNamespace

import envs
import numpy as np
import pytest
import torch
from conftest import loss_name, make_args, spy
from gymnasium.spaces import Box, Discrete
from off_policy import bugs, flat, gradient, key, lines, scaled
from on_policy import each_space, entropy, log_prob, make_agent, sample
from runs import each, fails_with_a_bug, name_of
from test_probes import keep_reset_steps, learn, near, value

from algos import actor_critic, reinforce

DECAYS = "decays = gamma * (~done).to(rewards.dtype)"
COMBINATIONS = list(itertools.product(["return", "reward-to-go"], ["none", "mean", "value"]))
each_script = each([reinforce, actor_critic])
each_reinforce = each([reinforce])
each_actor_critic = each([actor_critic])

# An MDP of at most two steps: outcomes (probability, reward, next state or None at the end) by state and action.
MDP = {
    (0, 0): [(0.7, 1.0, 1), (0.3, -1.0, 2)],
    (0, 1): [(0.6, 0.5, 2), (0.4, 2.0, None)],
    (1, 0): [(1.0, 3.0, None)],
    (1, 1): [(1.0, 0.0, None)],
    (2, 0): [(0.5, 1.0, None), (0.5, 4.0, None)],
    (2, 1): [(1.0, 2.0, None)],
}


def mdp_agent(module, **given):
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
        q[s, a] = 0
        for chance, reward, n in MDP[s, a]:
            following = 0 if n is None else sum(pi[n, b] * q[n, b] for b in (0, 1))
            q[s, a] += chance * (reward + gamma * following)
    return q


def actor_gradient(agent, x):
    """The gradient of a number with respect to the policy, whose graph is kept."""
    return flat(torch.autograd.grad(x, agent.actor.parameters(), retain_graph=True))


def estimates(module, weight, baseline, gamma, values, change=None):
    """Probability and gradient estimate of every pair of episodes, through the functions of the script."""
    agent, args, pi = mdp_agent(module, baseline=baseline)
    one = torch.ones(1)
    scores = {}
    for s, a in MDP:  # grad log pi(a|s), as the loss sees it
        batch = dict(obs=torch.tensor([s]), actions=torch.tensor([a]), weights=one, returns=one)
        scores[s, a] = -actor_gradient(agent, module.reinforce_loss(agent, batch, args)[0])
    all_episodes = [(chance * np.prod([pi[s, a].item() for s, a, _ in steps]), steps) for chance, steps in episodes()]
    probabilities = []
    gradients = []
    for pair in itertools.product(all_episodes, repeat=2):
        rewards = torch.full((2, 2), 9.0)  # 9: a step of some later episode
        v = torch.zeros(3, 2)
        terminated = torch.zeros(2, 2, dtype=bool)
        valid = torch.zeros(2, 2, dtype=bool)
        for n, (_, steps) in enumerate(pair):
            for t, (s, _, r) in enumerate(steps):
                rewards[t, n] = r
                v[t, n] = values[s]
                valid[t, n] = True
            terminated[len(steps) - 1, n] = True
        if change:
            rewards, v, valid = change(rewards, v, valid)
        returns = module.compute_returns(rewards, v, terminated, terminated, gamma)
        weights = module.compute_weights(returns, v[:-1], valid, weight, baseline)
        total = 0
        for n, (_, steps) in enumerate(pair):
            for t, (s, a, _) in enumerate(steps):
                total = total + weights[t, n] * scores[s, a]
        gradients.append(total / 2)
        probabilities.append(pair[0][0] * pair[1][0])
    assert sum(probabilities) == pytest.approx(1)
    return torch.tensor(probabilities, dtype=torch.float32), torch.stack(gradients), agent, pi


def mean_and_variance(probabilities, gradients):
    """Of the estimates."""
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
    q = true_q(fixed, gamma)
    visits = {0: 1.0, 1: 0.0, 2: 0.0}
    for a in (0, 1):
        for chance, _, n in MDP[0, a]:
            if n is not None:
                visits[n] += fixed[0, a] * chance
    return actor_gradient(agent, sum(visits[s] * pi[s, a] * q[s, a] for s, a in MDP))


def state_values(module, gamma):
    """V^pi(s)."""
    pi = mdp_agent(module)[2].detach()
    q = true_q(pi, gamma)
    return [sum(pi[s, a] * q[s, a] for a in (0, 1)).item() for s in range(3)]


@each_reinforce
@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize(("weight", "baseline"), COMBINATIONS)
def test_gradient_equals_the_enumerated_expectation(module, weight, baseline, gamma):
    """A baseline with a bias, even that of one's own return in the mean; rewards of the next episode; a shifted sum."""
    values = [3.0, -1.0, 0.5]  # any V will do
    probabilities, gradients, agent, pi = estimates(module, weight, baseline, gamma, values)
    mean, _ = mean_and_variance(probabilities, gradients)
    expected = expectation(agent, pi, weight, gamma)
    assert expected.norm() > 0.1
    torch.testing.assert_close(mean, expected, atol=1e-4, rtol=1e-4)
    if gamma == 1:
        torch.testing.assert_close(expected, expectation(agent, pi, "return", 1), atol=1e-4, rtol=1e-4)


SUM = "G = rewards[t] + decays[t] * G"
OTHERS = "mean_of_others = (total.sum() - total) / (count.sum() - count)"
POLICY_LOSS = '-(policy.log_prob(batch["actions"]) * batch["weights"]).mean()'


@pytest.mark.parametrize("weight", ["return", "reward-to-go"])
@bugs(
    ("reinforce", OTHERS, "mean_of_others = total.sum() / count.sum()"),
    ("reinforce", "return returns - mean_of_others", "return returns + total"),
    ("reinforce", SUM, SUM.replace("decays[t]", "0.6")),
    ("reinforce", SUM, SUM.replace("decays[t]", "decays[t] / 0.6")),
    ("reinforce", SUM, SUM.replace("decays[t]", "decays[t] * 0.6")),
    ("reinforce", POLICY_LOSS, POLICY_LOSS[1:]),
)
def test_the_enumeration_sees(request, name, old, new, weight):
    given = dict(weight=weight, baseline="mean", gamma=0.6)
    fails_with_a_bug(request, test_gradient_equals_the_enumerated_expectation, name, old, new, **given)


@bugs(("reinforce", "returns = returns[:1].expand_as(returns)", "pass"))
def test_the_enumeration_sees_the_weight(request, name, old, new):
    given = dict(weight="return", baseline="none", gamma=0.6)
    fails_with_a_bug(request, test_gradient_equals_the_enumerated_expectation, name, old, new, **given)


@each_reinforce
def test_steps_after_the_end_do_not_count(module):
    """Rewards of a later episode that move the mean of the others, and so the weights."""

    def other_rewards(rewards, v, valid):
        return torch.where(valid, rewards, -99.0), v, valid

    _, found, *_ = estimates(module, "reward-to-go", "mean", 0.6, [0.0] * 3)
    _, same, *_ = estimates(module, "reward-to-go", "mean", 0.6, [0.0] * 3, other_rewards)
    torch.testing.assert_close(same, found)


@bugs(
    ("reinforce", "total = (returns * valid).sum(0)", "total = returns.sum(0)"),
    ("reinforce", DECAYS, "decays = gamma * torch.ones_like(rewards)"),
)
def test_steps_after_the_end_are_seen(request, name, old, new):
    fails_with_a_bug(request, test_steps_after_the_end_do_not_count, name, old, new)


@each_reinforce
def test_each_improvement_lowers_the_variance(module):
    """A baseline that only adds noise, one switched off, or a reward-to-go that still sums the past."""
    values = state_values(module, 1.0)
    variance = {}
    for weight, baseline in COMBINATIONS:
        probabilities, gradients, *_ = estimates(module, weight, baseline, 1.0, values)
        variance[weight, baseline] = mean_and_variance(probabilities, gradients)[1]
    for weight in ("return", "reward-to-go"):
        assert variance[weight, "mean"] < 0.9 * variance[weight, "none"]
        assert variance[weight, "value"] < 0.9 * variance[weight, "mean"]
    for baseline in ("none", "mean", "value"):
        assert variance["reward-to-go", baseline] < 0.98 * variance["return", baseline]


@bugs(
    ("reinforce", 'if weight == "return":', "if True:"),
    ("reinforce", "return returns - values", "return returns"),
    ("reinforce", "return returns - mean_of_others", "return returns"),
)
def test_no_improvement_is_seen(request, name, old, new):
    fails_with_a_bug(request, test_each_improvement_lowers_the_variance, name, old, new)


@each_reinforce
@pytest.mark.parametrize("seed", range(3))
def test_returns_against_a_double_loop(module, seed):
    """One mask for both kinds of end, V of the wrong step at a cut, a discount that is missing or applied twice."""
    random = np.random.default_rng(seed)
    T = 11
    N = 4
    gamma = 0.9
    rewards = random.normal(size=(T, N))
    values = random.normal(size=(T + 1, N))
    terminated, truncated = random.random((2, T, N)) < 0.2
    expected = np.zeros((T, N))
    for t, n in np.ndindex(T, N):
        for k in range(t, T):
            expected[t, n] += gamma ** (k - t) * rewards[k, n]
            if terminated[k, n] or truncated[k, n] or k == T - 1:
                expected[t, n] += 0 if terminated[k, n] else gamma ** (k - t + 1) * values[k + 1, n]
                break
    inputs = [torch.from_numpy(x) for x in (rewards, values, terminated, terminated | truncated)]
    found = module.compute_returns(*inputs, gamma)
    assert found.shape == (T, N)
    assert found.numpy() == pytest.approx(expected, abs=1e-6)


CUT = "gamma * (done & ~terminated) * values[1:]"


@bugs(
    ("reinforce", CUT, CUT.replace("done & ~terminated", "done")),
    ("reinforce", CUT, CUT.replace("done & ~terminated", "terminated")),
    ("reinforce", CUT, CUT.replace("done & ~terminated", "~terminated")),
    ("reinforce", CUT, CUT.replace("values[1:]", "values[:-1]")),
    ("reinforce", CUT, CUT.replace("gamma * ", "")),
    ("reinforce", DECAYS, "decays = gamma * (~terminated).to(rewards.dtype)"),
    ("reinforce", DECAYS, "decays = (~done).to(rewards.dtype)"),
    ("reinforce", "G = values[-1].numpy(force=True)", "G = np.zeros_like(rewards[0])"),
    ("reinforce", "G = values[-1].numpy(force=True)", "G = values[-2].numpy(force=True)"),
)
def test_returns_see(request, name, old, new):
    fails_with_a_bug(request, test_returns_against_a_double_loop, name, old, new, seed=0)


@each_script
@each_space
def test_loss_is_the_mean_of_its_rows(module, space):
    """(B, 1) against (B,), signs and coefficients of the three terms, Q of another action or with a gradient twice."""
    agent, args = make_agent(module, space, vf_coef=0.7, ent_coef=0.3)
    obs = torch.randn(16, 3).double()
    actions = sample(agent, obs)
    target_name = "returns" if name_of(module) == "reinforce" else "targets"
    batch = dict(obs=obs, actions=actions, weights=torch.randn(16).double())
    batch[target_name] = torch.randn(16).double()
    if name_of(module) == "reinforce":
        values = agent.critic(obs)[:, 0]
    elif agent.discrete:
        values = torch.stack([row[a] for row, a in zip(agent.critic(obs), actions)])
    else:
        values = agent.critic(torch.cat([obs, actions], 1))[:, 0]
    policy_loss = (-log_prob(agent, obs, actions) * batch["weights"]).mean()
    value_loss = ((values - batch[target_name]) ** 2).mean()
    expected = policy_loss + 0.7 * value_loss - 0.3 * entropy(agent, obs).mean()
    loss, metrics = getattr(module, loss_name(module))(agent, batch, args)
    found = gradient(loss, agent.parameters())
    torch.testing.assert_close(found, gradient(expected, agent.parameters()), atol=1e-10, rtol=1e-8)
    assert loss.item() == pytest.approx(expected.item())
    parts = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy(agent, obs).mean())
    assert metrics.keys() == parts.keys()
    for name, metric in metrics.items():
        assert metric.item() == pytest.approx(parts[name].item())
        assert not metric.requires_grad


Q_OF_DISCRETE = "self.critic(x).gather(-1, actions.unsqueeze(-1)).squeeze(-1)"
Q_OF_BOX = "self.critic(torch.cat([x, actions], -1)).squeeze(-1)"


@each_space
@bugs(
    ("reinforce", POLICY_LOSS, POLICY_LOSS[1:]),
    ("reinforce", POLICY_LOSS, POLICY_LOSS.replace(".mean()", ".sum()")),
    ("reinforce", POLICY_LOSS, POLICY_LOSS.replace('["weights"]', '["weights"][:, None]')),
    ("reinforce", POLICY_LOSS, POLICY_LOSS.replace('batch["weights"]', '(batch["returns"] - values)')),
    ("reinforce", "self.critic(x).squeeze(-1)", "self.critic(x)"),
    ("reinforce", "vf_coef * value_loss", "value_loss"),
    ("reinforce", 'vf_coef = args.vf_coef if args.baseline == "value" else 0', "vf_coef = 0"),
    ("reinforce", "- args.ent_coef * entropy", "+ args.ent_coef * entropy"),
    ("actor_critic", POLICY_LOSS, POLICY_LOSS[1:]),
    ("actor_critic", POLICY_LOSS, POLICY_LOSS.replace('batch["weights"]', "q_values")),
    ("actor_critic", 'F.mse_loss(q_values, batch["targets"])', 'F.mse_loss(q_values, batch["targets"]) / 2'),
    ("actor_critic", "args.vf_coef * value_loss", "value_loss"),
    ("actor_critic", "- args.ent_coef * entropy", "+ args.ent_coef * entropy"),
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_loss_sees(request, space, name, old, new):
    fails_with_a_bug(request, test_loss_is_the_mean_of_its_rows, name, old, new, space=space)


@pytest.mark.parametrize(
    ("space", "old", "new"),
    [
        (Discrete(4), Q_OF_DISCRETE, "self.critic(x).amax(-1)"),
        (Discrete(4), Q_OF_DISCRETE, Q_OF_DISCRETE.removesuffix(".squeeze(-1)")),
        (Box(-1, 1, (2,)), Q_OF_BOX, Q_OF_BOX.removesuffix(".squeeze(-1)")),
        (Box(-1, 1, (2,)), Q_OF_BOX, Q_OF_BOX.replace("actions", "self.actor(x)")),
        (Box(-1, 1, (2,)), Q_OF_BOX, Q_OF_BOX.replace("actions", "actions.clamp(-1, 1)")),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_q_of_other_actions_is_seen(request, space, old, new):
    fails_with_a_bug(request, test_loss_is_the_mean_of_its_rows, "actor_critic", old, new, space=space)


# QAC


@each_actor_critic
def test_sarsa_targets_against_a_loop(module):
    """A bootstrap at a termination, Q of the same step, a discount that is missing."""
    random = np.random.default_rng(0)
    rewards = random.normal(size=(7, 3))
    q_values = random.normal(size=(8, 3))
    terminated = random.random((7, 3)) < 0.4
    expected = np.zeros((7, 3))
    for t, n in np.ndindex(7, 3):
        expected[t, n] = rewards[t, n] + (0 if terminated[t, n] else 0.8 * q_values[t + 1, n])
    inputs = [torch.from_numpy(x) for x in (rewards, q_values, terminated)]
    assert module.sarsa_targets(*inputs, 0.8).numpy() == pytest.approx(expected, abs=1e-6)


TARGETS = "rewards + gamma * ~terminated * q_values[1:]"


@bugs(
    ("actor_critic", TARGETS, TARGETS.replace("~terminated * ", "")),
    ("actor_critic", TARGETS, TARGETS.replace("~terminated", "terminated")),
    ("actor_critic", TARGETS, TARGETS.replace("gamma * ", "")),
    ("actor_critic", TARGETS, TARGETS.replace("[1:]", "[:-1]")),
)
def test_sarsa_targets_see(request, name, old, new):
    fails_with_a_bug(request, test_sarsa_targets_against_a_loop, name, old, new)


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
    P = np.zeros((4, 4))
    r = np.zeros(4)
    for s, a, reward, s2, a2, terminated in rows:
        r[2 * s + a] += reward / 16
        P[2 * s + a, 2 * s2 + a2] += 0 if ends and terminated else 1 / 16
    return np.linalg.solve(np.eye(4) - gamma * P, r)


@each_actor_critic
@pytest.mark.parametrize("ends", [True, False], ids=["terminated", "truncated"])
@pytest.mark.parametrize("continuous", [False, True])
def test_critic_fixed_point_is_the_analytic_q(module, ends, continuous):
    """Steps of the script on every transition at its frequency: max in place of a', truncation as termination."""
    gamma = 0.8
    steps = 600
    rows = continuing_mdp()
    args = module.Args(hidden_size=32)
    agent = module.Agent(Discrete(2), Box(-1, 1, (1,)) if continuous else Discrete(2), args)
    s, a, r, s2, a2, over = (torch.tensor(column) for column in zip(*rows))
    if continuous:
        a = a[:, None].float()
        a2 = a2[:, None].float()
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    gradients_of_loss = module.gradients_of(module.actor_critic_loss, agent.parameters(), args)
    before = agent.actor[-1].weight.clone()
    expected = analytic_q(rows, gamma, ends)
    for step in range(steps):
        module.anneal(optimizer, 1 - step / steps)
        with torch.no_grad():
            q_values = torch.stack([agent(s, a)[1], agent(s2, a2)[1]])
        targets = module.sarsa_targets(r[None], q_values, (over & ends)[None], gamma)[0]
        batch = dict(obs=s, actions=a, weights=torch.zeros(len(s)), targets=targets)
        gradients, _ = gradients_of_loss(agent, batch, args)
        module.descend(optimizer, gradients)
    learned = agent(s, a)[1].detach().numpy()[::16]
    assert learned == pytest.approx(expected, abs=0.02)
    assert torch.equal(agent.actor[-1].weight, before)  # no weight, no policy gradient
    assert abs(analytic_q(rows, gamma, not ends) - expected).max() > 0.5
    greedy = np.zeros(4)
    for _ in range(200):
        targets = [r + gamma * (1 - (e and ends)) * greedy[2 * s2 : 2 * s2 + 2].max() for _, _, r, s2, _, e in rows]
        greedy = np.array(targets).reshape(4, 16).mean(1)
    assert abs(greedy - expected).max() > 0.5


# The data path


def watch(module, monkeypatch, folder, **given):
    """Train on a Tagged environment; for each iteration its batch, the critic before the step, and all that acted."""
    seen = SimpleNamespace(iterations=[], acted={}, agents=[])
    envs.Tagged.instances = []
    act = module.Agent.act

    def watched_act(agent, obs, greedy=False):
        actions = act(agent, obs, greedy)
        for row, action in zip(obs, actions):
            assert greedy or key(row) not in seen.acted, "two actions in one state"
            seen.acted.setdefault(key(row), action)
        return actions

    def before_loss(agent, batch, args):
        assert not any(column.requires_grad for column in batch.values()), "a gradient through the target"
        obs = [row[name] for env in envs.Tagged.instances for row in env.log for name in ("obs", "next_obs")]
        inputs = [torch.from_numpy(np.stack(obs))]
        if name_of(module) == "actor_critic":
            nothing = 0 * seen.acted[0, 0, 0]
            inputs.append(torch.from_numpy(np.stack([seen.acted.get(key(x), nothing) for x in obs])))
        with torch.no_grad():
            values = dict(zip(map(key, obs), agent(*inputs)[1].tolist()))
        seen.iterations.append(({name: column.numpy().copy() for name, column in batch.items()}, values))

    monkeypatch.setattr(module.Agent, "act", watched_act)
    spy(monkeypatch, module, loss_name(module), before=before_loss)
    spy(monkeypatch, module, "evaluate", before=lambda agent, *_: seen.agents.append(agent))
    plain = dict(env_id="test/Tagged-v0", num_envs=3, num_steps=16, total_timesteps=768, gamma=0.9, learning_rate=1e-2)
    module.train(make_args(module, folder, **plain | given))
    seen.lines = lines(folder)
    seen.trained = envs.Tagged.instances[:3]
    seen.log = {key(row["obs"]): row for env in seen.trained for row in env.log}
    return seen


def learned_returns(seen, batch, values, gamma, weight, baseline):
    """For each key of a batch of whole episodes its G and, with `weight` and `baseline`, G - b, from the log alone."""
    keys = {key(obs) for obs in batch["obs"]}
    G = {}
    cuts = 0
    for index, step, episode in sorted(keys, reverse=True):
        row = seen.log[index, step, episode]
        following = (index, step + 1, episode)
        assert step == 0 or (index, step - 1, episode) in keys, "not a whole episode"
        cut = values[key(row["next_obs"])] if baseline == "value" else 0.0
        cuts += following not in keys and not row["terminated"] and not row["truncated"]
        G[index, step, episode] = row["reward"] + gamma * (0 if row["terminated"] else G.get(following, cut))
    weights = {}
    for index, step, episode in keys:
        at = 0 if weight == "return" else step
        others = [G[i, 0 if weight == "return" else t, e] for i, t, e in keys if i != index]
        b = dict(none=0.0, mean=np.mean(others), value=values[index, at, episode])[baseline]
        weights[index, step, episode] = G[index, at, episode] - b
    return G, weights, cuts


@each_reinforce
@pytest.mark.parametrize(("weight", "baseline"), COMBINATIONS)
@pytest.mark.parametrize("horizon", [100, 4])
def test_reinforce_learns_from_one_whole_episode_of_each_environment(
    module, monkeypatch, tmp_path, weight, baseline, horizon
):
    """Steps after the end, parts of episodes, sums across an end, cuts taken for ends, a baseline nobody asked for."""
    seen = watch(module, monkeypatch, tmp_path, weight=weight, baseline=baseline, horizon=horizon)
    assert len(seen.iterations) > 30
    step = 0
    cuts = 0
    finished = 0
    used = set()
    for line, (batch, values) in zip(seen.lines, seen.iterations, strict=True):
        keys = [key(obs) for obs in batch["obs"]]
        assert len(set(keys)) == len(keys)
        assert len({(i, episode) for i, _, episode in keys}) == len({i for i, _, _ in keys}) == 3
        assert not used & set(keys)
        used |= set(keys)
        G, expected, new_cuts = learned_returns(seen, batch, values, 0.9, weight, baseline)
        assert batch["actions"].tolist() == [seen.log[k]["action"] for k in keys]
        assert batch["returns"] == pytest.approx(np.array([G[k] for k in keys]), abs=1e-4)
        weights = np.array([expected[k] for k in keys])
        assert batch["weights"] == pytest.approx(weights / np.sqrt(np.mean(weights**2)), abs=1e-3)
        step += 3 * (1 + max(k[1] for k in keys))  # environments that wait for the last one take steps, too
        assert line["global_step"] == step
        ended = [seen.log[k] for k in keys if seen.log[k]["terminated"] or seen.log[k]["truncated"]]
        returns = [seen.trained[int(row["obs"][0])].returns[int(row["obs"][2])] for row in ended]
        assert line["episodes"] == len(returns) == 3 - new_cuts
        assert line["episodic_return"] == (pytest.approx(np.mean(returns)) if returns else None)
        cuts += new_cuts
        finished += len(returns)
    assert step == 768
    assert finished > 30
    assert cuts > 30 if horizon == 4 else cuts <= 3  # 3: at the end of the budget


VALID = "valid = ~ended  # only the first episode of an environment counts"
START = "        obs, _ = envs.reset()\n"
NORM = "weights / (weights[valid].square().mean().sqrt() + 1e-8)"
LAST = "_, last_values = agent(to_tensor(obs, device))"


@bugs(
    ("reinforce", VALID, "valid = ~ended | True"),
    ("reinforce", "ended = ended | done", "ended = done"),
    ("reinforce", "score[done & valid]", "score[done]"),
    ("reinforce", "score = score + reward * valid", "score = reward * valid"),
    ("reinforce", DECAYS, "decays = gamma * (~terminated).to(rewards.dtype)"),
    ("reinforce", NORM, NORM.replace("weights / ", "(weights - weights[valid].mean()) / ")),
    ("reinforce", NORM, NORM.replace("[valid]", "")),
    ("reinforce", "run.log(run.step + N * T", 'run.log(run.step + len(batch["obs"])'),
)
def test_whole_episodes_see(request, name, old, new):
    test = test_reinforce_learns_from_one_whole_episode_of_each_environment
    fails_with_a_bug(request, test, name, old, new, weight="reward-to-go", baseline="value", horizon=100)


@bugs(
    ("reinforce", START, "        obs = envs.reset()[0] if run.step == 0 else obs\n"),
    ("reinforce", "range(min(args.horizon, ", "range(min(10**9, "),
    ("reinforce", LAST, '_, last_values = agent(batch["obs"][-1])'),
)
def test_cut_episodes_see(request, name, old, new):
    test = test_reinforce_learns_from_one_whole_episode_of_each_environment
    fails_with_a_bug(request, test, name, old, new, weight="reward-to-go", baseline="value", horizon=4)


@pytest.mark.parametrize(
    ("weight", "baseline", "old", "new"),
    [
        ("return", "value", "        values = values[:1]\n", ""),
        ("reward-to-go", "mean", "total = (returns * valid).sum(0)", "total = returns.sum(0)"),
        ("reward-to-go", "mean", 'if args.baseline == "value":\n            with', "if True:\n            with"),
        ("reward-to-go", "none", "valid, args.weight, args.baseline)", "valid, args.weight, 'mean')"),
    ],
)  # fmt: skip
def test_baselines_see(request, weight, baseline, old, new):
    test = test_reinforce_learns_from_one_whole_episode_of_each_environment
    fails_with_a_bug(request, test, "reinforce", old, new, weight=weight, baseline=baseline, horizon=4)


@each_actor_critic
@pytest.mark.parametrize("env", ["Tagged", "TaggedBox"])
def test_actor_critic_learns_from_the_transitions_and_the_actions_taken(module, monkeypatch, tmp_path, env):
    """Reset steps learned from, a' that is not executed, Q after a reset, a bootstrap missing at a truncation."""
    seen = watch(module, monkeypatch, tmp_path, env_id=f"test/{env}-v0")
    assert len(seen.iterations) == 16
    space = seen.trained[0].action_space
    for k, (batch, values) in enumerate(seen.iterations):
        rows = {key(r["obs"]): r for env in seen.trained for r in env.log if 16 * k <= r["t"] < 16 * (k + 1)}
        keys = [key(obs) for obs in batch["obs"]]
        assert sorted(keys) == sorted(rows)
        for i, action in zip(keys, batch["actions"]):
            assert np.array_equal(action, seen.acted[i])
            if isinstance(space, Box):
                action = np.clip(scaled(action, space)[0], space.low, space.high)
            assert action == pytest.approx(rows[i]["action"], abs=1e-6)
        following = [0 if rows[i]["terminated"] else values[key(rows[i]["next_obs"])] for i in keys]
        targets = np.array([rows[i]["reward"] for i in keys]) + 0.9 * np.array(following)
        assert batch["targets"] == pytest.approx(targets, abs=1e-4)
        q = np.array([values[i] for i in keys])
        assert batch["weights"] == pytest.approx((q - q.mean()) / q.std(ddof=1), abs=1e-3)


NEXT_ACTION = "action = agent.act(obs)  # a' is needed where an episode was cut, too"
LAST_Q = "agent(to_tensor(obs, device), to_tensor(action, device))"
WEIGHTS = "(weights - weights[valid].mean()) / (weights[valid].std() + 1e-8)"


@bugs(
    ("actor_critic", "valid = ~done  #", "valid = ~done | True  #"),
    ("actor_critic", NEXT_ACTION, "action = agent.act(rollout[-1]['obs'])"),
    ("actor_critic", LAST_Q, "agent(to_tensor(obs, device), to_tensor(agent.act(obs), device))"),
    ("actor_critic", LAST_Q, 'agent(batch["obs"][-1], to_tensor(action, device))'),
    ("actor_critic", 'sarsa_targets(rewards, q_values, batch["terminated"]', "sarsa_targets(rewards, q_values, ~valid"),
    ("actor_critic", WEIGHTS, WEIGHTS.replace("weights[valid].mean()", "weights.mean()")),
    ("actor_critic", WEIGHTS, WEIGHTS.replace("weights[valid].std()", "weights.std()")),
    ("actor_critic", "weights = q_values[:-1]", "weights = q_values[1:]"),
    ("actor_critic", "with torch.no_grad():\n            _, q_values", "if True:\n            _, q_values"),
)
def test_transitions_see(request, name, old, new):
    test = test_actor_critic_learns_from_the_transitions_and_the_actions_taken
    fails_with_a_bug(request, test, name, old, new, env="Tagged")


@each_script
@pytest.mark.parametrize(("clip_reward", "norm_reward"), [(True, False), (False, True), (True, True)])
def test_rewards_are_clipped_and_divided(module, monkeypatch, tmp_path, clip_reward, norm_reward):
    """A flag without effect, statistics of reset steps or across an end, a mean taken off, a log of clipped returns."""
    seen = watch(module, monkeypatch, tmp_path, horizon=5, clip_reward=clip_reward, norm_reward=norm_reward)
    rewards = {k: np.clip(row["reward"], -1, 1) if clip_reward else row["reward"] for k, row in seen.log.items()}
    sums = {}
    finished = 0
    for line, (batch, values) in zip(seen.lines, seen.iterations, strict=True):
        keys = [key(obs) for obs in batch["obs"]]
        for i, step, episode in sorted(keys):
            sums[i, step, episode] = rewards[i, step, episode] + 0.9 * sums.get((i, step - 1, episode), 0)
        scale = 1 / np.sqrt(np.var(list(sums.values())) + 1e-8) if norm_reward else 1
        G = {}
        for i, step, episode in sorted(keys, reverse=True):
            row = seen.log[i, step, episode]
            rest = values[key(row["next_obs"])]
            if name_of(module) == "reinforce":
                rest = G.get((i, step + 1, episode), rest)
            G[i, step, episode] = scale * rewards[i, step, episode] + 0.9 * (0 if row["terminated"] else rest)
        learned = batch["returns" if name_of(module) == "reinforce" else "targets"]
        assert learned == pytest.approx(np.array([G[k] for k in keys]), abs=1e-3)
        ended = [k for k in keys if seen.log[k]["terminated"] or seen.log[k]["truncated"]]
        returns = [seen.trained[i].returns[episode] for i, _, episode in ended]
        assert line["episodes"] == len(returns)
        assert line["episodic_return"] == (pytest.approx(np.mean(returns)) if returns else None)
        finished += len(returns)
    assert finished > 30
    assert seen.agents[0].reward_norm.count == (len(sums) if norm_reward else 0)


CLIP = "            if args.clip_reward:\n                reward = reward.clip(-1, 1)\n"


@bugs(
    ("reinforce", CLIP, ""),
    ("reinforce", CLIP, CLIP.replace("if args.clip_reward", "if not args.clip_reward")),
    ("reinforce", "discounted = args.gamma * discounted + reward", "discounted = discounted + reward"),
    ("reinforce", "        discounted = np.zeros(N)", "        discounted = locals().get('discounted', np.zeros(N))"),
    ("reinforce", 'batch["discounted"][valid]', 'batch["discounted"].flatten()'),
    ("reinforce", "(rewards * agent.reward_norm.scale)", "agent.reward_norm(rewards)"),
    ("reinforce", "        if args.norm_reward:\n", "        if False:\n"),
    ("actor_critic", "discounted = args.gamma * discounted * valid", "discounted = args.gamma * discounted"),
    ("actor_critic", "score = score * valid + reward\n", "score = score * valid + reward.clip(-1, 1)\n"),
)
def test_rewards_see(request, name, old, new):
    given = dict(clip_reward=True, norm_reward=True)
    fails_with_a_bug(request, test_rewards_are_clipped_and_divided, name, old, new, **given)


@each_reinforce
@pytest.mark.parametrize("baseline", ["none", "mean"])
def test_no_baseline_no_critic(module, monkeypatch, tmp_path, baseline):
    """A critic that learns, and shapes what it shares with the policy, where none was asked for."""
    agents = []
    critics = []
    spy(monkeypatch, module.Run, "__init__", after=lambda _, run, *rest: agents.append(run.parts["agent"]))
    spy(monkeypatch, module, "descend", before=lambda *_: critics.append(flat(agents[0].critic.parameters())))
    args = make_args(module, tmp_path, env_id="test/ObsActionReward-v0", total_timesteps=800, baseline=baseline,
                     learning_rate=1e-2)  # fmt: skip
    assert module.train(args)["eval_mean"] == 1
    assert torch.equal(critics[0], flat(agents[0].critic.parameters()))


@bugs(("reinforce", 'vf_coef = args.vf_coef if args.baseline == "value" else 0', "vf_coef = args.vf_coef"))
def test_a_critic_nobody_asked_for_is_seen(request, name, old, new):
    fails_with_a_bug(request, test_no_baseline_no_critic, name, old, new, baseline="none")


def test_the_mean_of_the_others_needs_others():
    """A division by the 0 others."""
    with pytest.raises(reinforce.Refusal, match="num_envs"):
        reinforce.Args(baseline="mean", num_envs=1)


def test_a_return_needs_something_to_be_measured_by():
    """One return divided by its own size: weights of 1 or -1, from which nothing is learned."""
    with pytest.raises(reinforce.Refusal, match="num_envs"):
        reinforce.Args(weight="return", baseline="none", num_envs=1)
    reinforce.Args(weight="return", baseline="none", num_envs=2)


# Probes


def train(module, monkeypatch, folder, name, **given):
    """Train on test/<name>-v0; the mean return, and V(s) or, of both actions, Q(s, a) as a function of a number s."""
    if module is reinforce:  # its batches are as short as the episodes
        plain = dict(num_envs=16, total_timesteps=1024)
    else:  # an actor slow enough to try both actions to the end
        plain = dict(critic_learning_rate=1e-2, learning_rate=1e-4, total_timesteps=2048)
    agent, mean = learn(module, monkeypatch, folder, name, **plain | given)

    def values(*observations):
        if module is reinforce:
            return value(agent, *observations)
        obs = torch.tensor(observations).float().repeat_interleave(2)[:, None]
        actions = torch.tensor([0, 1] * len(observations))
        with torch.no_grad():
            return agent(obs, actions)[1].tolist()

    return values, mean


def expected_values(module, *values):
    """The same for both actions."""
    return list(values) if module is reinforce else [v for v in values for _ in (0, 1)]


@each_script
def test_values_of_the_probes(module, monkeypatch, tmp_path):
    """A critic that learns nothing, mixes rows, bootstraps at a termination or takes both ends at once for a cut."""
    values, _ = train(module, monkeypatch, tmp_path / "1", "ObsValue")
    assert values(-1, 1) == near(expected_values(module, -1, 1))
    values, _ = train(module, monkeypatch, tmp_path / "2", "Discounting")
    assert values(-1, 1) == near(expected_values(module, 0.9, 1), 0.03)
    values, _ = train(module, monkeypatch, tmp_path / "3", "BothEnds")
    assert values(1) == near(expected_values(module, 1))


@each_script
def test_policy_depends_on_the_observation(module, monkeypatch, tmp_path):
    """A policy loss with the wrong sign, actions and weights of different rows."""
    learning_rate = 5e-3 if module is reinforce else 1e-3
    values, mean = train(module, monkeypatch, tmp_path, "ObsActionReward", learning_rate=learning_rate)
    assert mean == 1
    if module is actor_critic:
        assert values(-1, 1) == near([1, -1, -1, 1], 0.2)


@each_script
def test_truncation_is_bootstrapped(module, monkeypatch, tmp_path):
    """V is 10, and 9 before it, also when it was cut; the observation at the end is not the next start."""
    values, _ = train(module, monkeypatch, tmp_path / "1", "Truncation", total_timesteps=3072)
    assert values(1) == near(expected_values(module, 10), 0.1)
    given = dict(total_timesteps=2048 if module is reinforce else 4096, num_steps=33)
    values, _ = train(module, monkeypatch, tmp_path / "2", "Successor", **given)
    assert values(-1, 1) == near(expected_values(module, 9, 10), 0.1)


def truncation_as_termination(module, monkeypatch):
    """Let environments say that each end is a termination."""

    def step(made, actions):
        obs, rewards, terminated, truncated, infos = type(made).step(made, actions)
        return obs, rewards, terminated | truncated, truncated, infos

    def changed(*inputs, **options):
        made = make_envs(*inputs, **options)
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
    values, _ = train(module, monkeypatch, tmp_path, "Truncation", total_timesteps=3600, num_steps=36)
    assert values(1) == near(expected_values(module, wrong), 0.1)
