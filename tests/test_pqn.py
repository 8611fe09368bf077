"""PQN: the returns of Q(lambda) against their definition, LayerNorm, what train() learns from, and known values."""

from types import SimpleNamespace

import envs
import numpy as np
import pytest
import test_q_learning
import torch
from conftest import make_args, spy
from gymnasium.spaces import Discrete
from off_policy import FRAMES, GRID, VECTOR, bugs, check_acting, gradient, key, make_agents
from runs import each, fails_with_a_bug, planted

from algos import pqn

ours = each([pqn])


@pytest.mark.parametrize(
    "test",
    [
        test_q_learning.test_epsilon_greedy,
        test_q_learning.test_greedy_takes_no_random_numbers,
        test_q_learning.test_images_and_numbers,
        test_q_learning.test_linear_schedule,
    ],
    ids=lambda test: test.__name__,
)
def test_as_in_dqn(test):
    """The policy and its schedule."""
    test(pqn)


# Returns


def slow_return(rewards, next_values, terminated, done, gamma, lam):
    """R of the first of these steps (T,): the mean of all n-step returns, with weights (1 - lam) lam^(n - 1).

    The longest one, to the end of the episode or of the rollout, has the weight that is left.
    """
    length = next((t + 1 for t in range(len(done)) if done[t]), len(done))
    total = 0.0
    left = 1.0
    for n in range(1, length + 1):
        n_step = sum(gamma**k * rewards[k] for k in range(n))
        if not terminated[n - 1]:
            n_step += gamma**n * next_values[n - 1]
        weight = left if n == length else left * (1 - lam)
        total += weight * n_step
        left -= weight
    return total


def case(seed, T, N):
    """Rewards, values, terminated and done (T, N), with ends of either kind and of both at once."""
    random = np.random.default_rng(seed)
    terminated, truncated = random.random((2, T, N)) < 0.2
    return random.normal(size=(T, N)), 3 * random.normal(size=(T, N)), terminated, terminated | truncated


def returns(module, rewards, next_values, terminated, done, gamma, lam):
    """What the script makes of arrays."""
    return module.lambda_returns(*map(torch.from_numpy, (rewards, next_values, terminated, done)), gamma, lam).numpy()


@ours
@pytest.mark.parametrize("lam", [0.0, 0.65, 1.0])
def test_returns_against_their_definition(module, lam):
    """Values of other steps, an end of one kind taken for the other, a discount or lambda applied twice or never."""
    for seed in range(12):
        for T, N in ((1, 1), (3, 2), (11, 3)):
            columns = case(seed, T, N)
            found = returns(module, *columns, 0.9, lam)
            assert found.shape == (T, N)
            for t, n in np.ndindex(T, N):
                expected = slow_return(*(column[t:, n] for column in columns), 0.9, lam)
                assert found[t, n] == pytest.approx(expected, abs=1e-9), (t, n)


SEED = "R = next_values[-1]"
DISCOUNTS = "discounts = gamma * ~terminated.numpy(force=True)"
TRACES = "traces = lam * ~done.numpy(force=True)"
MIX = "traces[t] * R + (1 - traces[t]) * next_values[t]"
LATE = "next_values[-1 if t == len(rewards) - 2 else t]"  # purejaxql: Q(s_T) stays where Q(s_{T-1}) belongs


@bugs(
    ("pqn", MIX, MIX.replace("next_values[t]", LATE)),
    ("pqn", MIX, MIX.replace("next_values[t]", "next_values[t - 1]")),
    ("pqn", MIX, MIX.replace("(1 - traces[t])", "(1 - lam)")),
    ("pqn", MIX, MIX.replace("traces[t] * R", "traces[t - 1] * R")),
    ("pqn", MIX, f"lam * ({MIX})"),
    ("pqn", SEED, "R = 0 * next_values[-1]"),
    ("pqn", SEED, "R = rewards[-1]"),
    ("pqn", DISCOUNTS, DISCOUNTS.replace("~terminated", "~done")),
    ("pqn", DISCOUNTS, DISCOUNTS.replace("gamma * ", "")),
    ("pqn", DISCOUNTS, "discounts = gamma + 0 * terminated.numpy(force=True)"),
    ("pqn", TRACES, TRACES.replace("~done", "~terminated")),
    ("pqn", TRACES, TRACES.replace("lam *", "gamma * lam *")),
)
def test_returns_see(request, name, old, new):
    fails_with_a_bug(request, test_returns_against_their_definition, name, old, new, lam=0.65)


@ours
def test_returns_in_float64(module):
    """Returns of an agent in float64 that are only as exact as float32."""
    rewards, next_values, terminated, done = case(0, 5, 2)
    next_values += 1e6  # of which float32 keeps no decimal
    found = returns(module, rewards.astype(np.float32), next_values, terminated, done, 0.9, 0.65)
    assert found.dtype == np.float64
    for t, n in np.ndindex(5, 2):
        columns = (rewards.astype(np.float32), next_values, terminated, done)
        expected = slow_return(*(column[t:, n].astype(float) for column in columns), 0.9, 0.65)
        assert found[t, n] == pytest.approx(expected, abs=1e-6)


# The loss


@ours
def test_loss_and_gradient_against_a_loop(module):
    """(B, 1) against (B,), errors that are clipped, Q of another action."""
    agent, _, _ = make_agents(module)
    batch = dict(obs=torch.randn(32, 5), actions=torch.randint(3, (32,)), returns=3 * torch.randn(32))
    loss, metrics = module.critic_loss(agent, batch)
    errors = []
    for obs, action, R in zip(batch["obs"], batch["actions"], batch["returns"]):
        errors.append(R - agent(obs[None])[0, action])
    expected = torch.stack(errors).square().mean()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    found = gradient(loss, agent.parameters())
    torch.testing.assert_close(found, gradient(expected, agent.parameters()), atol=1e-4, rtol=1e-3)
    values = agent(batch["obs"])[torch.arange(32), batch["actions"]]
    assert metrics["critic_loss"].item() == loss.item()
    assert metrics["q_value"].item() == pytest.approx(values.mean().item(), abs=1e-5)
    assert not any(metric.requires_grad for metric in metrics.values())


@bugs(
    ("pqn", 'batch["actions"][:, None]).squeeze(-1)', 'batch["actions"][:, None])'),
    ("pqn", 'F.mse_loss(q, batch["returns"])', 'F.mse_loss(q, batch["returns"]) / 2'),
    ("pqn", 'F.mse_loss(q, batch["returns"])', 'F.smooth_l1_loss(q, batch["returns"])'),
    ("pqn", '.gather(-1, batch["actions"][:, None]).squeeze(-1)', ".amax(-1)"),
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_loss_sees(request, name, old, new):
    fails_with_a_bug(request, test_loss_and_gradient_against_a_loop, name, old, new)


# LayerNorm


@ours
@pytest.mark.parametrize(
    ("space", "count"),
    [(VECTOR, 2), (Discrete(4), 2), (FRAMES, 4), (GRID, 2)],
    ids=["vector", "numbers", "frames", "grid"],
)
def test_layer_norm(module, space, count):
    """The inputs of each activation have mean 0 and deviation 1 in each row, whatever the weights; Q is not normalised.

    Found: an activation without LayerNorm, LayerNorm behind it, over the rows of the batch or over groups of channels.
    """
    agent, _, _ = make_agents(module, space)
    with torch.no_grad():
        for layer in agent.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                layer.weight *= 10
                layer.bias += 3
            if isinstance(layer, torch.nn.LayerNorm | torch.nn.GroupNorm):
                layer.weight.fill_(1)
    outputs = []
    activated = []
    *hidden, last = [layer for layer in agent.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    for layer in hidden:
        layer.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    for layer in agent.modules():
        if isinstance(layer, torch.nn.ReLU):
            layer.register_forward_pre_hook(lambda _, inputs: activated.append(inputs[0]))
    obs = torch.from_numpy(np.stack([space.sample() for _ in range(4)]))
    with torch.no_grad():
        q = agent(obs)
        assert len(activated) == count
        for x, found in zip(outputs, activated, strict=True):
            deviation = x.flatten(1).var(1, correction=0).sqrt()
            expected = (x.flatten(1) - x.flatten(1).mean(1)[:, None]) / deviation[:, None]
            torch.testing.assert_close(found.flatten(1), expected, atol=1e-3, rtol=1e-3)
        last.weight *= 2
        last.bias *= 2
        torch.testing.assert_close(agent(obs), 2 * q)


LINEAR = "            layers.append(nn.LayerNorm(layer.out_features))\n"
CONV = "layers.append(nn.GroupNorm(1, layer.out_channels))"


@bugs(
    ("pqn", LINEAR, "            pass\n"),
    ("pqn", "self.q = with_layer_norm(mlp(", "self.q = (mlp("),
    ("pqn", LINEAR, "            layers.append(nn.BatchNorm1d(layer.out_features))\n"),
    ("pqn", LINEAR, "            layers.insert(-1, nn.LayerNorm(layer.in_features))\n"),
    (
        "pqn",
        "return nn.Sequential(*layers, network[-1])",
        "return nn.Sequential(*layers, network[-1], nn.LayerNorm(3))",
    ),
)
def test_layer_norm_sees(request, name, old, new):
    fails_with_a_bug(request, test_layer_norm, name, old, new, space=VECTOR, count=2)


@bugs(
    ("pqn", CONV, "pass"),
    ("pqn", CONV, CONV.replace("(1,", "(2,")),
    ("pqn", CONV, "layers.append(nn.BatchNorm2d(layer.out_channels))"),
    ("pqn", "self.encoder = with_layer_norm(self.encoder)", "pass"),
)
def test_layer_norm_of_images_sees(request, name, old, new):
    fails_with_a_bug(request, test_layer_norm, name, old, new, space=FRAMES, count=4)


# train()

N = 3
T = 16
ITERATIONS = 5


def watch(module, monkeypatch, folder, **given):
    """Train on a Tagged environment; of each iteration the transitions, the minibatches and the Q before them."""
    seen = SimpleNamespace(iterations=[])
    monkeypatch.setattr(envs.Tagged, "instances", [])

    def collected(*_):
        rows = [[row for row in env.log if row["t"] >= T * len(seen.iterations)] for env in envs.Tagged.instances]
        seen.iterations.append(SimpleNamespace(rows=rows, batches=[], steps=[], values={}))

    def before_loss(agent, batch):
        iteration = seen.iterations[-1]
        if not iteration.batches:  # Q is still what it was in the rollout
            obs = {key(row["next_obs"]): row["next_obs"] for rows in iteration.rows for row in rows}
            with torch.no_grad():
                iteration.values = dict(zip(obs, agent(torch.from_numpy(np.stack([*obs.values()]))).amax(-1).tolist()))
            iteration.epsilon = agent.epsilon
        iteration.batches.append({name: column.numpy().copy() for name, column in batch.items()})
        iteration.before = [parameter.detach().clone() for parameter in agent.parameters()]
        seen.agent = agent

    def after_step(_, optimizer, gradients):
        iteration = seen.iterations[-1]
        moves = [new.detach() - old for new, old in zip(seen.agent.parameters(), iteration.before)]
        (group,) = optimizer.param_groups
        step = SimpleNamespace(lr=group["lr"], moves=moves, gradients=[*gradients.values()])
        step.norm = torch.cat([g.flatten() for g in step.gradients]).norm().item()
        iteration.steps.append(step)

    with monkeypatch.context() as patch:
        spy(patch, module, "lambda_returns", before=collected)
        spy(patch, module, "critic_loss", before=before_loss)
        spy(patch, module, "descend", after=after_step)
        plain = dict(env_id="test/Tagged-v0", num_envs=N, num_steps=T, total_timesteps=N * T * ITERATIONS, gamma=0.9)
        plain |= dict(q_lambda=0.65, update_epochs=3, num_minibatches=4, learning_rate=1e-2, hidden_size=16, seed=3)
        seen.result = module.train(make_args(module, folder, **plain | given))
    assert len(seen.iterations) == ITERATIONS
    return seen


@ours
@pytest.mark.parametrize("clip_reward", [False, True])
def test_learned_rows_and_their_returns(module, monkeypatch, tmp_path, clip_reward):
    """Reset steps learned from, transitions lost or doubled, actions or returns beside the wrong observation.

    Also: values of the wrong step, of the state after a reset or of the Q of another moment; an end of one kind taken
    for the other; minibatches that are the same in each epoch.
    """
    seen = watch(module, monkeypatch, tmp_path, clip_reward=clip_reward)
    kinds = set()
    for iteration in seen.iterations:
        expected = {}
        for rows in iteration.rows:
            rewards = np.array([row["reward"] for row in rows])
            rewards = rewards.clip(-1, 1) if clip_reward else rewards
            values = np.array([iteration.values[key(row["next_obs"])] for row in rows])
            terminated = np.array([row["terminated"] for row in rows])
            truncated = np.array([row["truncated"] for row in rows])
            kinds |= set(zip(terminated.tolist(), truncated.tolist()))
            for t, row in enumerate(rows):
                columns = (rewards[t:], values[t:], terminated[t:], (terminated | truncated)[t:])
                expected[key(row["obs"])] = row["action"], slow_return(*columns, 0.9, 0.65)
        assert len(iteration.batches) == 12
        orders = []
        for epoch in range(3):
            batches = iteration.batches[4 * epoch : 4 * epoch + 4]
            assert max(len(b["obs"]) for b in batches) <= min(len(b["obs"]) for b in batches) + 1
            learned = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
            keys = [key(obs) for obs in learned["obs"]]
            orders.append(keys)
            assert sorted(keys) == sorted(expected)  # each transition once
            assert learned["actions"].tolist() == [expected[k][0] for k in keys]
            assert learned["returns"] == pytest.approx(np.array([expected[k][1] for k in keys]), abs=1e-4)
        assert orders[0] != orders[1] != orders[2]
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}


VALID = "valid = ~done  #"
CALL = 'batch["rewards"], next_values, batch["terminated"], batch["done"],'
NEXT = 'agent(batch["obs"][1:].flatten(0, 1))'
LAST = "agent(to_tensor(obs, device))"
SHUFFLED = "shuffled = torch.randperm(num_rows, device=device)"


@bugs(
    ("pqn", VALID, "valid = ~done | True  #"),
    ("pqn", VALID, "valid = ~terminated  #"),
    ("pqn", CALL, CALL.replace('batch["terminated"]', 'batch["done"]')),
    ("pqn", CALL, CALL.replace('batch["done"]', 'batch["terminated"]')),
    ("pqn", CALL, CALL.replace('batch["terminated"]', 'batch["terminated"] & ~batch["done"]')),
    ("pqn", NEXT, NEXT.replace("[1:]", "[:-1]")),
    ("pqn", NEXT + ".amax(-1)", NEXT + ".mean(-1)"),
    ("pqn", LAST, "agent(to_tensor(step['obs'], device))"),
    ("pqn", "step = dict(obs=obs,", "step = dict(obs=next_obs,"),
    ("pqn", "rollout.append(step)", "rollout.append(step | dict(actions=action[::-1].copy()))"),
    ("pqn", ".view(T, N)", ".view(N, T).T"),
    ("pqn", "args.gamma, args.q_lambda", "args.gamma, args.gamma"),
    ("pqn", SHUFFLED, "shuffled = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1))"),
    ("pqn", SHUFFLED, "shuffled = torch.randint(num_rows, (num_rows,))"),
    ("pqn", "for _ in range(args.update_epochs):", "for _ in range(1):"),
)
def test_rows_see(request, name, old, new):
    fails_with_a_bug(request, test_learned_rows_and_their_returns, name, old, new, clip_reward=False)


@bugs(("pqn", "reward = reward.clip(-1, 1)", "pass"))
def test_clipped_rows_see(request, name, old, new):
    fails_with_a_bug(request, test_learned_rows_and_their_returns, name, old, new, clip_reward=True)


@ours
def test_the_policy_acts_on_what_it_sees(module, monkeypatch, tmp_path):
    """Actions for the observations of another step or environment."""
    acting = []

    def remember(actions, _, obs, *__):
        acting.append((obs.copy(), actions))

    spy(monkeypatch, module.Agent, "act", after=remember)
    monkeypatch.setattr(module, "evaluate", lambda *_: dict(eval_returns=[0.0], eval_cut=0))
    watch(module, monkeypatch, tmp_path)
    assert len(acting) == T * ITERATIONS
    check_acting(acting)


@bugs(
    ("pqn", "agent.act(obs)", "agent.act(np.roll(obs, 1, 0))"),
    ("pqn", "agent.act(obs)", "agent.act(rollout[-1]['obs'] if rollout else obs)"),
)
def test_acting_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_policy_acts_on_what_it_sees, name, old, new)


@ours
def test_log_keeps_true_returns(module, monkeypatch, tmp_path):
    """Returns of clipped rewards, of several episodes, or of those alone that terminate."""
    seen = watch(module, monkeypatch, tmp_path, clip_reward=True)
    finished = []
    for env in envs.Tagged.instances[:N]:
        episodes = [key(row["obs"])[2] for row in env.log if row["terminated"] or row["truncated"]]
        finished += [env.returns[episode] for episode in episodes]
    assert len(finished) < 100
    assert seen.result["train_return"] == pytest.approx(np.mean(finished))


SCORE = "score = score * valid + reward"


@bugs(
    ("pqn", SCORE, "score = score + reward"),
    ("pqn", SCORE, f"{SCORE}.clip(-1, 1)"),
    ("pqn", "score[done].tolist()", "score[terminated].tolist()"),
)
def test_log_sees(request, name, old, new):
    fails_with_a_bug(request, test_log_keeps_true_returns, name, old, new)


@ours
@pytest.mark.parametrize("anneal_lr", [False, True])
def test_schedules(module, monkeypatch, tmp_path, anneal_lr):
    """Epsilon and step size fall from iteration to iteration, and the step size only if it is asked for."""
    given = dict(anneal_lr=anneal_lr, start_e=0.8, end_e=0.2, exploration_fraction=0.5)
    seen = watch(module, monkeypatch, tmp_path, **given)
    assert [it.epsilon for it in seen.iterations] == pytest.approx([0.8, 0.56, 0.32, 0.2, 0.2])
    for k, iteration in enumerate(seen.iterations):
        expected = 1e-2 * (1 - k / 5 if anneal_lr else 1)
        assert [step.lr for step in iteration.steps] == pytest.approx([expected] * 12)


@bugs(
    ("pqn", "progress = iteration / num_iterations", "progress = (iteration + 1) / num_iterations"),
    ("pqn", "args.exploration_fraction, progress)", "1, progress)"),
    ("pqn", "anneal(optimizer, 1 - progress)", "anneal(optimizer, progress)"),
)
def test_schedules_see(request, name, old, new):
    fails_with_a_bug(request, test_schedules, name, old, new, anneal_lr=True)


@ours
def test_gradient_steps(module, monkeypatch, tmp_path):
    """An optimizer other than RAdam, whose first five steps follow the mean gradient; gradients that are too long."""
    seen = watch(module, monkeypatch, tmp_path, max_grad_norm=0.5)
    steps = [step for iteration in seen.iterations for step in iteration.steps]
    assert max(step.norm for step in steps) == pytest.approx(0.5, rel=1e-3)
    first, second = steps[:2]
    for move, g in zip(first.moves, first.gradients):
        torch.testing.assert_close(move, -0.01 * g, atol=1e-7, rtol=1e-4)
    for move, old, new in zip(second.moves, first.gradients, second.gradients):
        mean = (0.9 * old + new) / 1.9
        torch.testing.assert_close(move, -0.01 * mean, atol=1e-7, rtol=1e-4)

    parameters = [torch.zeros_like(g, requires_grad=True) for g in first.gradients]
    optimizer = torch.optim.RAdam(parameters, lr=0.01, eps=1e-5)
    for step in steps:
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter, g in zip(parameters, step.gradients):
            parameter.grad = g
        optimizer.step()
        for parameter, old, move in zip(parameters, before, step.moves):
            torch.testing.assert_close(move, parameter.detach() - old, atol=2e-7, rtol=1e-4)


@bugs(
    ("pqn", "torch.optim.RAdam", "torch.optim.Adam"),
    ("pqn", "torch.optim.RAdam(agent.parameters(), lr=args.learning_rate, eps=1e-5,",
     "torch.optim.SGD(agent.parameters(), lr=args.learning_rate,"),
    ("pqn", ", max_norm=args.max_grad_norm", ""),
    ("pqn", "eps=1e-5, foreach", "foreach"),
    ("pqn", "eps=1e-5, foreach", "eps=1e-5, betas=(0.9, 0.9), foreach"),
)  # fmt: skip
def test_gradient_steps_see(request, name, old, new):
    fails_with_a_bug(request, test_gradient_steps, name, old, new)


# Known values


def probe(module, monkeypatch, folder, name, **given):
    """Train on test/<name>-v0; the agent and the mean return of its greedy policy."""
    plain = dict(env_id=f"test/{name}-v0", total_timesteps=4096, num_envs=4, num_steps=32, learning_rate=1e-2)
    plain |= dict(update_epochs=4, num_minibatches=2, gamma=0.9, eval_episodes=20, anneal_lr=True, end_e=0.3)
    agents = []
    with monkeypatch.context() as patch:
        spy(patch, module, "evaluate", before=lambda agent, *_: agents.append(agent))
        result = module.train(make_args(module, folder, **plain | dict(hidden_size=16) | given))
    return agents[0], result["eval_mean"]


@torch.no_grad()
def check_values(agent, obs, expected, tolerance):
    """Q of each action in each of these states."""
    found = agent(torch.as_tensor(obs)).numpy()
    expected = np.array(expected, float)
    expected = expected if expected.ndim == 2 else expected[:, None]
    assert found == pytest.approx(np.broadcast_to(expected, found.shape), abs=tolerance)


def check_known(module, monkeypatch, folder, name, expected, q_lambda, tolerance=0.15):
    """All Q of an observation are the expected value, for the actions change nothing."""
    given = dict(q_lambda=q_lambda, num_steps=36, end_e=1.0)  # whole episodes of 8 steps and a reset
    if max(expected.values()) > 1:
        given |= dict(total_timesteps=14_400, learning_rate=5e-2, num_minibatches=1, update_epochs=8)
    agent, _ = probe(module, monkeypatch, folder, name, **given)
    check_values(agent, np.float32([*expected])[:, None], [*expected.values()], tolerance)


@ours
@pytest.mark.parametrize("q_lambda", [0.0, 0.65])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ObsValue", {-1: -1, 1: 1}),
        ("Discounting", {-1: 0.9, 1: 1}),
        ("Truncation", {1: 10}),
        ("Successor", {-1: 9, 1: 10}),
        ("BothEnds", {1: 1}),
    ],
)
def test_values(module, monkeypatch, tmp_path, name, expected, q_lambda):
    """Rows mixed up, a wrong discount, every misuse of an end of an episode."""
    check_known(module, monkeypatch, tmp_path, name, expected, q_lambda)


END = 4 * ([0.0] * 7 + [1.0, 0.0])  # of an episode in the environment Truncation, in 36 steps
STEP = 4 * ([1.0] * 8 + [0.0])  # not a reset; also the rewards
NEVER = [0.0] * 36
ALWAYS = [1.0] * 36


def fixed_point(terminated, done, learned, lam):
    """V = mean of the returns of the steps that are learned from, where all states have this value V."""

    def mean_return(value):
        columns = (np.array(STEP), np.full(36, value), np.array(terminated), np.array(done))
        return np.mean([slow_return(*(x[t:] for x in columns), 0.9, lam) for t in range(36) if learned[t]])

    return mean_return(0.0) / (1 - mean_return(1.0) + mean_return(0.0))


def test_fixed_points():
    """The right value, and those that the bugs are known by."""
    for lam in (0.0, 0.65, 0.95):
        assert fixed_point(NEVER, END, STEP, lam) == pytest.approx(10)
    assert fixed_point(END, END, STEP, 0.0) == pytest.approx(4.71, abs=0.01)
    assert fixed_point(END, END, STEP, 0.95) == pytest.approx(3.71, abs=0.01)
    assert fixed_point(NEVER, END, ALWAYS, 0.0) == pytest.approx(8.89, abs=0.01)


@pytest.mark.parametrize(
    ("old", "new", "ends", "q_lambda"),
    [
        (CALL, CALL.replace('batch["terminated"]', 'batch["done"]'), (END, END, STEP), 0.0),
        (CALL, CALL.replace('batch["terminated"]', 'batch["done"]'), (END, END, STEP), 0.65),
        (VALID, "valid = ~done | True  #", (NEVER, END, ALWAYS), 0.0),
        (VALID, "valid = ~done | True  #", (NEVER, END, ALWAYS), 0.65),
        (CALL, CALL.replace('batch["done"]', 'batch["terminated"]'), (NEVER, NEVER, STEP), 0.65),
    ],
)
def test_truncation_probe_sees(monkeypatch, tmp_path, old, new, ends, q_lambda):
    """A probe that could not fail: with the bug put in, Q is not 10 but the number that the bug is known by."""
    wrong = fixed_point(*ends, q_lambda)
    assert abs(wrong - 10) > 0.3
    broken = planted(pqn, old, new, tmp_path / "planted")
    check_known(broken, monkeypatch, tmp_path, "Truncation", {1: wrong}, q_lambda, tolerance=0.25)


@ours
def test_policy_finds_the_paid_action(module, monkeypatch, tmp_path):
    """Values of the wrong action learned, or the smallest one taken."""
    agent, mean = probe(module, monkeypatch, tmp_path, "ActionReward")
    assert mean == 1
    check_values(agent, [[1.0]], [[-1, 1]], 0.1)


@ours
def test_policy_depends_on_the_observation(module, monkeypatch, tmp_path):
    """Actions, returns and observations of different rows mixed up."""
    agent, mean = probe(module, monkeypatch, tmp_path, "ObsActionReward")
    assert mean == 1
    check_values(agent, [[-1.0], [1.0]], [[1, -1], [-1, 1]], 0.1)


@ours
def test_numbers_that_do_not_start_at_0(module, monkeypatch, tmp_path):
    """Discrete.start forgotten, in observations or in actions."""
    agent, mean = probe(module, monkeypatch, tmp_path, "Numbers", end_e=0.6)
    assert mean == 1
    check_values(agent, [5, 6, 7], 2 * np.eye(3) - 1, 0.15)


@ours
@pytest.mark.parametrize(("name", "steps"), [("Image", 1536), ("Grid", 6144)])
def test_images(module, monkeypatch, tmp_path, name, steps):
    """Frames scaled twice or with axes mixed up."""
    _, mean = probe(module, monkeypatch, tmp_path, name, total_timesteps=steps, learning_rate=2e-3)
    assert mean > 0.85  # by chance 0 or -1/3
