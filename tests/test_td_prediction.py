"""TD prediction: targets against brute force, textbook examples, known values, policies of other scripts."""

import json

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import make_args, spy
from gymnasium.spaces import Box, Discrete
from off_policy import bugs, flat, key, transitions
from runs import arguments, each, fails_with_a_bug, finished_run, name_of, planted, script

from algos import td_prediction

each_prediction = each([td_prediction])
each_method = pytest.mark.parametrize("method", ["mc", "td"])
OBS = Box(-np.inf, np.inf, (3,), np.float32)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _the_walk_of_the_script():
    """Copies with a bug register the random walk anew."""
    yield
    gym.registry.pop("RandomWalk-v0", None)
    td_prediction.registered(td_prediction.RandomWalk)


def learn(module, folder, name, **given):
    """The agent and the result of a short run."""
    agents = []
    plain = dict(env_id=name, num_envs=4, batch_size=32, hidden_size=16, learning_rate=1e-2, gamma=0.9, anneal_lr=True)
    if not given.get("resume"):
        envs.Tagged.instances = []
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, module, "evaluate_values", before=lambda agent, *_: agents.append(agent))
        found = module.train(make_args(module, folder, **plain | given))
    return agents[0], found


@each_prediction
def test_the_step_size_falls_to_0(module, tmp_path, monkeypatch):
    """By the environment steps so far, whatever the number of environments, also resumed."""
    shares = []
    spy(monkeypatch, module, "anneal", before=lambda _, share: shares.append(share))
    learn(module, tmp_path, "test/Tagged-v0", total_timesteps=300)
    assert shares == pytest.approx([1 - t / 300 for t in range(0, 300, 4)])
    shares.clear()
    learn(module, tmp_path, "test/Tagged-v0", total_timesteps=600, resume=str(tmp_path / "run"))
    assert shares == pytest.approx([1 - t / 600 for t in range(300, 600, 4)])


@bugs(("td_prediction", "1 - (step - N) / args", "1 - step / args"))
def test_step_sizes_see(request, name, old, new):
    fails_with_a_bug(request, test_the_step_size_falls_to_0, name, old, new)


def linear(module, states):
    """An agent that has a number for each state, 0 at the start."""
    agent = module.Agent(Discrete(states), module.Args())
    agent.v = nn.Linear(states, 1, bias=False)
    nn.init.zeros_(agent.v.weight)
    return agent


def batch_of(module, episodes, n, gamma=1.0):
    """All rows of episodes (states, rewards) that end by termination, as the loss gets them."""
    rows = []
    for states, rewards in episodes:
        rows += module.n_step_rows([np.int64(s) for s in states], rewards, True, n, gamma)
    return module.stack(rows, CPU)


def fixed_point(module, states, batch, steps=250, rate=1.0):
    """The values that gradient steps of the script on one batch come to."""
    agent = linear(module, states)
    args = module.Args()
    optimizer = torch.optim.SGD(agent.parameters(), lr=rate)
    value_gradients = module.gradients_of(module.value_loss, agent.parameters(), args)
    for _ in range(steps):
        gradients, _ = value_gradients(agent, batch)
        module.descend(optimizer, gradients)
    return agent(torch.arange(states)).tolist()


# Rows and targets


@each_prediction
@pytest.mark.parametrize("n", [1, 3, 10_000])
def test_rows_against_brute_force(module, n):
    """gamma^n for rows with fewer steps, a step too many or too few, a bootstrap at a termination."""
    random = np.random.default_rng(0)
    for T in (1, 2, 3, 4, 9):
        for terminated in (True, False):
            states = list(random.normal(size=(T + 1, 3)))
            rewards = list(random.normal(size=T))
            rows = module.n_step_rows(states, rewards, terminated, n, 0.8)
            assert len(rows) == T
            for t, row in enumerate(rows):
                expected = 0.0
                weight = 1.0
                k = t
                while k < T and k < t + n:
                    expected += weight * rewards[k]
                    weight *= 0.8
                    k += 1
                assert row["rewards"] == pytest.approx(expected)
                assert row["discounts"] == pytest.approx(weight)
                assert row["obs"] is states[t]
                assert row["next_obs"] is states[k]
                assert row["terminated"] == (terminated and k == T)


STEPS = "m = min(n, T - t)"


@bugs(
    ("td_prediction", "discounts=discounts[m])", "discounts=gamma**n)"),
    ("td_prediction", "discounts=discounts[m])", "discounts=gamma)"),
    ("td_prediction", "next_obs=states[t + m]", "next_obs=states[t + 1]"),
    ("td_prediction", "discounts[:m] @ rewards[t : t + m]", "sum(rewards[t : t + m])"),
    ("td_prediction", "terminated and t + m == T", "terminated"),
    ("td_prediction", "terminated and t + m == T", "t + m == T"),
)
def test_rows_see(request, name, old, new):
    fails_with_a_bug(request, test_rows_against_brute_force, name, old, new, n=3)


@each_prediction
def test_loss_against_a_loop(module):
    """A gradient through the target, states taken for next states, (B, 1) against (B,)."""
    agent = module.Agent(OBS, module.Args(hidden_size=8))
    batch = dict(obs=torch.randn(20, 3), next_obs=torch.randn(20, 3), rewards=torch.randn(20))
    batch |= dict(discounts=torch.rand(20), terminated=torch.rand(20) < 0.4)
    loss, metrics = module.value_loss(agent, batch)
    total = 0.0
    for i in range(20):
        G = batch["rewards"][i].item()
        if not batch["terminated"][i]:
            G += batch["discounts"][i].item() * agent(batch["next_obs"][i : i + 1]).item()
        total += (agent(batch["obs"][i : i + 1])[0] - G) ** 2 / 20
    assert loss.shape == ()
    found = torch.autograd.grad(loss, list(agent.parameters()))
    expected = torch.autograd.grad(total, list(agent.parameters()))
    for one, two in zip(found, expected):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    assert metrics["value_loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert metrics["value"].item() == pytest.approx(agent(batch["obs"]).mean().item())


CONSTANT = "with torch.no_grad():  # semi-gradient"


@bugs(
    ("td_prediction", CONSTANT, "if True:  # through the target"),
    ("td_prediction", 'next_values = agent(batch["next_obs"])', 'next_values = agent(batch["obs"])'),
    ("td_prediction", "gamma * ~terminated * next_values", "gamma * next_values"),
    ("td_prediction", "return self.v(self.encoder(obs)).squeeze(-1)", "return self.v(self.encoder(obs))"),
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_loss_sees(request, name, old, new):
    fails_with_a_bug(request, test_loss_against_a_loop, name, old, new)


# Textbook examples


@each_prediction
def test_eight_episodes(module):
    """Example 6.4: A, 0, B, 0 and six times B, 1 and once B, 0. Both agree on B; A is 0 in the mean of its returns."""
    end = 2
    episodes = [([0, 1, end], [0.0, 0.0]), *[([1, end], [1.0])] * 6, ([1, end], [0.0])]
    assert fixed_point(module, 3, batch_of(module, episodes, n=1))[:2] == pytest.approx([0.75, 0.75], abs=1e-4)
    assert fixed_point(module, 3, batch_of(module, episodes, n=100))[:2] == pytest.approx([0, 0.75], abs=1e-4)


@each_prediction
def test_a_split(module):
    """Example 11.2: from A to B or C, of which only B pays 1."""
    end = 3
    batch = batch_of(module, [([0, 1, end], [0.0, 1.0]), ([0, 2, end], [0.0, 0.0])], n=1)
    assert fixed_point(module, 4, batch)[:3] == pytest.approx([0.5, 1, 0], abs=1e-4)


def test_a_split_with_a_gradient_through_the_target(tmp_path):
    """The residual gradient comes to the other values of the example."""
    module = planted(td_prediction, CONSTANT, "if True:  # through the target", tmp_path / "planted")
    batch = batch_of(module, [([0, 1, 3], [0.0, 1.0]), ([0, 2, 3], [0.0, 0.0])], n=1)
    assert fixed_point(module, 4, batch)[:3] == pytest.approx([0.5, 0.75, 0.25], abs=1e-4)


# The random walk


@each_prediction
def test_the_walk(module):
    """Its ends, rewards and values, by every step that there is; the fixed point of TD on them is (s - 10) / 10."""
    env = module.make_envs("RandomWalk-v0", 1).envs[0].unwrapped
    expected = [(s - 10) / 10 for s in range(1, 20)]
    assert env.true_values(1.0) == pytest.approx(expected)
    assert env.reset(seed=1) == (10, {})
    episodes = []
    for state in range(1, 20):
        for action in (0, 1):
            env.state = state
            found = env.step(action)
            successor = state + 2 * action - 1
            reward = {0: -1.0, 20: 1.0}.get(successor, 0.0)
            assert found == (successor, reward, successor in (0, 20), False, {})
            episodes.append(module.n_step_rows([np.int64(state), np.int64(successor)], [reward], found[2], 1, 1.0)[0])
    values = fixed_point(module, 21, module.stack(episodes, CPU), steps=1500, rate=19 / 2)
    assert values[1:20] == pytest.approx(expected, abs=1e-3)


@bugs(
    ("td_prediction", "rewards = {0: -1.0, 20: 1.0}", "rewards = {0: 0.0, 20: 1.0}"),
    ("td_prediction", "self.state = 10\n", "self.state = 9\n"),
    ("td_prediction", "self.state += 1 if action == 1 else -1", "self.state += -1 if action == 1 else 1"),
    ("td_prediction", "r[0] = -0.5", "r[0] = -1"),
)
def test_the_walk_sees(request, name, old, new):
    gym.registry.pop("RandomWalk-v0")
    fails_with_a_bug(request, test_the_walk, name, old, new)


@each_prediction
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_values_of_the_walk_against_a_sum(module, gamma):
    """The values with a discount, from the chances to be in each state after each number of steps."""
    chances = np.eye(19)
    expected = np.zeros(19)
    for t in range(5000):
        expected += gamma**t * (chances[:, -1] - chances[:, 0]) / 2
        left = np.pad(chances[:, 1:], ((0, 0), (0, 1)))
        right = np.pad(chances[:, :-1], ((0, 0), (1, 0)))
        chances = (left + right) / 2
    assert module.RandomWalk.true_values(gamma) == pytest.approx(expected, abs=1e-6)


@each_prediction
@each_method
def test_learning_the_walk(module, tmp_path, method):
    """Through train(): the error falls from 0.55, and what the result says of it is true."""
    given = dict(method=method, gamma=1.0, learning_rate=3e-3, total_timesteps=40_000, num_envs=8, hidden_size=32)
    agent, found = learn(module, tmp_path, "RandomWalk-v0", **given)
    with torch.no_grad():
        errors = agent(torch.arange(1, 20)).numpy() - (np.arange(1, 20) - 10) / 10
    assert found["eval_returns"] == pytest.approx((-abs(errors)).tolist(), abs=1e-6)
    assert found["rmse"] == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-4)
    assert found["rmse"] < 0.3
    assert abs(found["train_return"]) < 0.4
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["rmse"] > 0.4
    assert lines[-1]["rmse"] == pytest.approx(found["rmse"])


@each_prediction
def test_many_steps_are_monte_carlo(module, tmp_path):
    """n of at least the length of every episode: the same run, bit for bit; and n = 1 is another."""
    runs = []
    for name, given in dict(mc=dict(method="mc"), td=dict(n_steps=10_000), one=dict(n_steps=1)).items():
        agent, _ = learn(module, tmp_path / name, "RandomWalk-v0", total_timesteps=4000, **given)
        runs.append(agent.state_dict())
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name])
    assert not torch.equal(runs[0]["v.0.weight"], runs[2]["v.0.weight"])


# Bias and variance


@each_prediction
def test_monte_carlo_varies_and_td_is_biased(module):
    """Targets in the middle of the walk, where v is 0, from a V that is 0.5 too high in all states.

    The return is 1 or -1: no bias, variance 1. One step on, V is 0.4 or 0.6: bias 0.5, variance 0.01. Four steps are
    in between: their variance is 4 / 100, and nothing of the bias is gone, for no episode has ended by then.
    """
    agent = linear(module, 21)
    with torch.no_grad():
        agent.v.weight[0] = (torch.arange(21) - 10) / 10 + 0.5
    env = module.RandomWalk()
    random = np.random.default_rng(0)
    targets = {1: [], 4: [], 40: [], 10**6: []}
    for _ in range(1000):
        state, _ = env.reset()
        states = [np.int64(state)]
        rewards = []
        over = False
        while not over:
            state, reward, over, _, _ = env.step(random.integers(2))
            states.append(np.int64(state))
            rewards.append(reward)
        for n, rows in targets.items():
            rows.append(module.n_step_rows(states, rewards, True, n, 1.0)[0])
    bias = {}
    variance = {}
    for n, rows in targets.items():
        batch = module.stack(rows, CPU)
        with torch.no_grad():
            next_values = agent(batch["next_obs"])
        G = module.td_target(batch["rewards"], batch["terminated"], next_values, batch["discounts"])
        bias[n] = G.mean().item()  # v is 0
        variance[n] = G.var().item()
    assert (bias[1], bias[4], bias[10**6]) == pytest.approx((0.5, 0.5, 0), abs=0.1)
    assert 0.1 < bias[40] < 0.48
    assert (variance[1], variance[4], variance[10**6]) == pytest.approx((0.01, 0.04, 1), rel=0.15)
    assert variance[4] < variance[40] < variance[10**6]


@each_prediction
def test_the_estimates_of_monte_carlo_vary(module, tmp_path):
    """V after runs with one step size, started from the true values: by Monte-Carlo it is spread more widely."""

    class Started(module.Agent):
        def __init__(self, obs_space, args):
            super().__init__(obs_space, args)
            self.v = nn.Linear(21, 1, bias=False)
            self.v.weight.data = ((torch.arange(21) - 10) / 10)[None]

    spread = {}
    for method in ("mc", "td"):
        found = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "Agent", Started)
            patch.setattr(torch.optim, "Adam", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
            for seed in range(8):
                given = dict(seed=seed, method=method, gamma=1.0, anneal_lr=False, learning_rate=0.2)
                agent, _ = learn(module, tmp_path / f"{method}{seed}", "RandomWalk-v0", total_timesteps=4000, **given)
                found.append(agent.v.weight[0, 1:20].detach().numpy())
        spread[method] = np.var(found, 0).mean()
    assert spread["mc"] > 5 * spread["td"]


# Through train()


@each_prediction
@each_method
def test_learned_rows_are_those_of_the_episodes(module, monkeypatch, tmp_path, method):
    """Reset steps in an episode, two episodes in a row, episodes lost or doubled, truncation taken for termination."""
    batches = []
    spy(monkeypatch, module, "value_loss", lambda *inputs: batches.append({k: x.numpy() for k, x in inputs[1].items()}))
    learn(module, tmp_path, "test/Tagged-v0", method=method, n_steps=2, batch_size=2, total_timesteps=400, gamma=0.8)
    assert batches, "nothing was learned from"
    true = {obs: row for obs, row in transitions().items() if obs[0] < 4}
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    keys = [key(obs) for obs in columns["obs"]]
    assert len(set(keys)) == len(keys)
    last = [max(row["t"] for obs, row in true.items() if obs[0] == i) for i in range(4)]
    sure = {obs for obs, row in true.items() if row["t"] < last[obs[0]] - 12}  # the rest waits for an end or a batch
    assert sure <= set(keys) <= true.keys()
    ends = {obs[::2]: row["t"] for obs, row in true.items()}
    learned = [ends[obs[::2]] for obs in keys]
    assert learned == sorted(learned), "episodes that wait though they ended before others"
    over = {obs[::2] for obs, row in true.items() if row["terminated"] or row["truncated"]}  # environment and episode
    assert len(keys) == sum(obs[::2] in over for obs in true) // 2 * 2, "rows that wait though there is a batch of them"
    n = 2 if method == "td" else 100
    kinds = set()
    for i, obs in enumerate(keys):
        row = true[obs]
        reward = row["reward"]
        m = 1
        while m < n and not (row["terminated"] or row["truncated"]):
            row = true[key(row["next_obs"])]
            reward += 0.8**m * row["reward"]
            m += 1
        assert columns["rewards"][i] == pytest.approx(reward, rel=1e-4, abs=1e-4)
        assert columns["discounts"][i] == pytest.approx(0.8**m)
        assert key(columns["next_obs"][i]) == key(row["next_obs"])
        assert columns["terminated"][i] == row["terminated"]
        kinds.add((row["terminated"], row["truncated"]))
    assert kinds >= {(True, False), (False, True), (True, True)}


VALID = "for i in np.flatnonzero(valid):"
ROWS = "n_step_rows(states[i], rewards[i], terminated[i], n, args.gamma)"


@bugs(
    ("td_prediction", VALID, "for i in range(N):"),
    ("td_prediction", ROWS, ROWS.replace("terminated[i]", "done[i]")),
    ("td_prediction", ROWS, ROWS.replace("terminated[i]", "terminated[i] and not truncated[i]")),
    ("td_prediction", "states[i].append(next_obs[i])", "states[i].append(obs[i])"),
    ("td_prediction", "rows += n_step_rows", "rows = n_step_rows"),
    ("td_prediction", "if done[i] or len", "if terminated[i] or len"),
    ("td_prediction", "rows = rows[args.batch_size :]", "rows = []"),
    ("td_prediction", "rows[: args.batch_size], device)", "rows[-args.batch_size :], device)"),
    ("td_prediction", "while len(rows) >= args.batch_size:", "if len(rows) >= args.batch_size:"),
)
def test_learned_rows_see(request, name, old, new):
    fails_with_a_bug(request, test_learned_rows_are_those_of_the_episodes, name, old, new, method="td")


@each_prediction
def test_gradient_step(module, monkeypatch, tmp_path):
    """One step of Adam with an eps of 1e-5 per batch."""
    states = []
    gradients = []
    spy(monkeypatch, module, "value_loss", lambda agent, *_: states.append(flat(agent.parameters())))
    spy(monkeypatch, module, "descend", lambda _, given: gradients.append(flat(given.values())))
    learn(module, tmp_path, "test/Tagged-v0", total_timesteps=400, learning_rate=0.01, anneal_lr=False)
    assert len(states) == len(gradients) > 1
    g = gradients[0]
    torch.testing.assert_close(states[1] - states[0], -0.01 * g / (g.abs() + 1e-5), atol=2e-7, rtol=1e-5)


@bugs(("td_prediction", "eps=1e-5, fused", "fused"), ("td_prediction", "torch.optim.Adam(", "torch.optim.AdamW("))
def test_gradient_step_sees(request, name, old, new):
    fails_with_a_bug(request, test_gradient_step, name, old, new)


def check_values(module, folder, name, method, expected):
    """V of each observation, a number, is as near as 0.25."""
    given = dict(method=method, total_timesteps=12_000, learning_rate=2e-2)
    agent, found = learn(module, folder, f"test/{name}-v0", **given)
    with torch.no_grad():
        values = agent(torch.tensor([[float(obs)] for obs in expected])).tolist()
    assert values == pytest.approx([*expected.values()], abs=0.25 if max(expected.values()) > 1 else 0.05)
    return found


@each_prediction
@each_method
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ObsValue", {-1: -1, 1: 1}),
        ("Discounting", {-1: 0.9, 1: 1}),
        ("Truncation", {1: 10}),  # less if truncation is termination or if reset steps are learned from
        ("Successor", {-1: 9, 1: 10}),
        ("BothEnds", {1: 1}),
    ],
)
def test_values(module, tmp_path, name, expected, method):
    """Every misuse of an end; and errors of the evaluation that are not those of V, whose returns are known here."""
    found = check_values(module, tmp_path, name, method, expected)
    assert max(map(abs, found["eval_returns"])) < 0.6
    assert found["rmse"] >= -found["eval_mean"] - 1e-9


@each_prediction
@each_method
def test_a_horizon_is_no_end(module, monkeypatch, tmp_path, method):
    """An episode cut at the horizon taken for one that has terminated, or cut elsewhere: of 8 steps come 5 and 3."""
    lengths = set()
    spy(monkeypatch, module, "n_step_rows", lambda states, rewards, *_: lengths.add(len(rewards)))
    agent, _ = learn(module, tmp_path, "test/Truncation-v0", method=method, total_timesteps=16_000, horizon=5,
                     learning_rate=2e-2)  # fmt: skip
    assert agent(torch.ones(1, 1)).item() == pytest.approx(10, abs=0.25)
    assert lengths == {5, 3}


@each_prediction
def test_a_run_that_learns_nothing_is_no_result(module, tmp_path):
    """No episode has ended yet when the budget has: the score would be that of the initial weights."""
    given = dict(env_id="Pendulum-v1", num_envs=8, total_timesteps=1000, run_dir=str(tmp_path / "run"))
    with pytest.raises(module.Refusal, match="nothing was learned: "):
        module.train(module.Args(**given))
    assert not (tmp_path / "run" / "result.json").exists()


@bugs(("td_prediction", "len(rewards[i]) == args.horizon", "len(rewards[i]) > args.horizon"))
def test_a_horizon_sees(request, name, old, new):
    fails_with_a_bug(request, test_a_horizon_is_no_end, name, old, new, method="td")


@bugs(("td_prediction", ROWS, ROWS.replace("terminated[i]", "done[i]")), ("td_prediction", VALID, "for i in range(N):"))
@each_method
def test_values_see(tmp_path, name, old, new, method):
    """A probe that could not fail."""
    broken = planted(script(name), old, new, tmp_path / "planted")
    with pytest.raises(AssertionError):
        check_values(broken, tmp_path, "Truncation", method, {1: 10})


@each_prediction
def test_errors_of_the_evaluation(module, tmp_path):
    """|V(s_0) - G| with G discounted and, at a truncation, continued with V; an episode cut after so many steps."""
    args = module.Args(env_id="test/Successor-v0", gamma=0.5, eval_episodes=3)
    policy = module.make_policy(args, OBS, Discrete(2), CPU)

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(4.0))

        def forward(self, obs):
            return self.weight * obs[:, 0]

    found = module.evaluate_values(Fixed(), policy, args, tmp_path)
    assert found == dict(eval_returns=[-abs(-4 - (0 + 0.5 * 1 + 0.25 * 4))] * 3, eval_cut=0, rmse=5.5)
    values, returns, num_cut = module.play(Fixed(), policy, args, tmp_path, max_steps=1)
    assert (values.tolist(), returns.tolist(), num_cut) == ([-4.0] * 3, [0.5 * 4] * 3, 3)


@bugs(
    ("td_prediction", "discount *= args.gamma", "pass"),
    ("td_prediction", "goes_on = running & truncated & ~terminated", "goes_on = running & False"),
    ("td_prediction", "    returns += discount * agent(to_tensor(obs, device)).numpy(force=True) * running\n", ""),
)
def test_errors_see(request, name, old, new):
    fails_with_a_bug(request, test_errors_of_the_evaluation, name, old, new)


@each_prediction
def test_returns_of_episodes_of_different_lengths(module, tmp_path):
    """A discount that is not each episode's own, rewards of the next episode, a bootstrap at a termination or none."""
    envs.Tagged.instances = []
    args = module.Args(env_id="test/Tagged-v0", gamma=0.5, eval_episodes=6)
    agent = module.Agent(OBS, args)
    policy = module.make_policy(args, OBS, Discrete(3), CPU)
    values, returns, _ = module.play(agent, policy, args, tmp_path)
    for env, value, found in zip(envs.Tagged.instances, values, returns, strict=True):
        rows = [row for row in env.log if key(row["obs"])[2] == 0]
        expected = sum(0.5**t * row["reward"] for t, row in enumerate(rows))
        if not rows[-1]["terminated"]:
            expected += 0.5 ** len(rows) * agent(torch.from_numpy(rows[-1]["next_obs"][None])).item()
        assert found == pytest.approx(expected, abs=1e-5)
        assert value == pytest.approx(agent(torch.from_numpy(rows[0]["obs"][None])).item(), abs=1e-5)


@bugs(
    ("td_prediction", "discount *= args.gamma", "discount *= args.gamma if running.all() else 1.0"),
    ("td_prediction", "goes_on = running & truncated & ~terminated", "goes_on = running & truncated"),
    ("td_prediction", "goes_on = running & truncated & ~terminated", "goes_on = truncated & ~terminated"),
    ("td_prediction", "returns += discount * rewards * running", "returns += discount * rewards"),
)
def test_returns_see(request, name, old, new):
    fails_with_a_bug(request, test_returns_of_episodes_of_different_lengths, name, old, new)


# Policies


@each_prediction
@pytest.mark.parametrize("greedy", [False, True])
def test_the_policy_acts_on_what_it_sees(module, monkeypatch, tmp_path, greedy):
    """The values of another policy: one that sees other observations, or is greedy though --greedy is not given."""
    asked = set()

    class Actor:
        def act(self, obs, greedy=False):
            asked.add(greedy)
            return obs.sum(-1).astype(np.int64) % 3

    monkeypatch.setattr(module, "load_agent", lambda *_: Actor())
    learn(module, tmp_path, "test/Tagged-v0", policy="a run", greedy=greedy, total_timesteps=400)
    assert asked == {greedy}
    for row in transitions().values():
        assert row["action"] == row["obs"].sum() % 3


@bugs(
    ("td_prediction", "greedy=args.greedy", "greedy=True"),
    ("td_prediction", "greedy=args.greedy", "greedy=not args.greedy"),
    ("td_prediction", "action = policy(obs)", "action = policy(np.roll(obs, 1, 0))"),
)
def test_policies_see(request, name, old, new):
    fails_with_a_bug(request, test_the_policy_acts_on_what_it_sees, name, old, new, greedy=False)


@each_prediction
def test_uniform_policies(module):
    """Random actions of every kind, from the whole space; a space without bounds has no uniform policy."""
    args = module.Args()
    actions = module.make_policy(args, OBS, Discrete(3, start=5), CPU)(np.zeros((9000, 3)))
    assert np.bincount(actions) == pytest.approx([3000] * 3, abs=250)  # numbered from 0: action_map adds the start
    space = Box(np.float32([-1, -3]), np.float32([2, 0.5]))
    actions = module.make_policy(args, OBS, space, CPU)(np.zeros((9000, 3)))
    assert actions.shape == (9000, 2)
    assert np.sort(actions, 0) == pytest.approx(np.linspace([-1, -1], [1, 1], 9000), abs=0.06)
    assert abs(np.corrcoef(actions.T)[0, 1]) < 0.06
    with pytest.raises(
        module.Refusal, match=r"^action space Box.* is not supported: it must be Discrete or a Box with"
    ):
        module.make_policy(args, OBS, Box(-np.inf, np.inf, (2,)), CPU)


OTHERS = [script(name) for name in ("ppo_clip", "a3c", "dqn", "rainbow", "td3", "sac", "deep_sarsa", "reinforce")]


@each(OTHERS)
def test_policies_of_other_scripts(module, tmp_path):
    """What the network does that its run was evaluated with, greedily; its exploration as at the end of training."""
    folder = finished_run(module, tmp_path / "run")
    env_id = module.Args.env_id
    made = module.make_envs(env_id, 4)
    obs, _ = made.reset(seed=1)
    spaces = (made.single_observation_space, made.single_action_space)
    loaded = td_prediction.load_agent(str(folder), *spaces, CPU)
    args = module.parse_args(["--resume", str(folder)])
    takes_space = hasattr(module, "RunningNorm")
    agent = module.Agent(spaces[0], spaces[1] if takes_space else gym.spaces.flatdim(spaces[1]), args)
    agent.load_state_dict(torch.load(folder / "checkpoint.pt")["target" if name_of(module) == "td3" else "agent"])
    assert (loaded.act(obs, greedy=True) == agent.act(obs, greedy=True)).all()
    if hasattr(agent, "epsilon"):  # noise on the weights takes its place in Rainbow
        assert loaded.epsilon == (0 if hasattr(args, "noisy") else args.end_e) < 1
    given = dict(env_id=env_id, policy=str(folder), total_timesteps=600, horizon=20, run_dir=tmp_path / "values")
    for greedy in (True, False):
        settings = given | dict(greedy=greedy, run_dir=tmp_path / f"values{greedy}")
        found = td_prediction.train(arguments(td_prediction, **dict(folder=settings["run_dir"]) | settings))
        assert np.isfinite(found["eval_returns"]).all()


@each_prediction
def test_policies_that_are_refused(module, tmp_path):
    """One sentence for what is no run, a script that is not there, another environment, and a checkpoint in pieces."""
    folder = finished_run(script("ppo_clip"), tmp_path / "run")
    made = module.make_envs("CartPole-v1", 1)
    spaces = (made.single_observation_space, made.single_action_space)

    def refused(words, path=folder, spaces=spaces):
        with pytest.raises(module.Refusal, match=words) as error:
            module.load_agent(str(path), *spaces, CPU)
        assert "\n" not in str(error.value)

    refused("nowhere holds no run", tmp_path / "nowhere")
    refused("holds a policy for another environment", spaces=(spaces[0], Discrete(3)))
    refused("holds a policy for another environment", spaces=(OBS, spaces[1]))
    refused("learns no policy", finished_run(module, tmp_path / "values"))
    checkpoint = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(checkpoint[:1000])
    refused("checkpoint of .* is missing or damaged")
    (folder / "checkpoint.pt").unlink()
    refused("checkpoint of .* is missing or damaged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(gamma="high")))
    refused("config.json is damaged")
    (folder / "config.json").write_text(json.dumps(config | dict(algo="ppo_rlhf")))
    refused("a run of ppo_rlhf, which learns no policy")
    (folder / "config.json").write_text(json.dumps(config | dict(algo="gone")))
    refused("a run of gone, but there is no script")
    (folder / "config.json").write_text("[]")
    refused("holds no run")
    with pytest.raises(module.Refusal, match=r"^--greedy needs --policy RUN_DIR"):
        module.Args(greedy=True)
