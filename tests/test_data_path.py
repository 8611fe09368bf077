"""What reaches the learner, through the real train(): rows of environments whose observations say where they come from.

The environments write down every transition that really happened; expected values are computed from that alone.
"""

import json
from types import SimpleNamespace

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MODULES, learner_name, make_args, on_policy, spy
from gymnasium.spaces import Box
from off_policy import bugs, scaled
from runs import each, each_module, fails_with_a_bug

N = 3
T = 16
ITERATIONS = 16
VALID = "valid = ~done  #"


class TaggedMatrix(envs.Tagged):
    """Actions of two axes, with bounds that all differ."""

    def __init__(self):
        super().__init__()
        numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
        self.action_space = Box(-numbers - 1, numbers**2 + 1)


gym.register("test/TaggedMatrix-v0", TaggedMatrix, disable_env_checker=True, order_enforce=False)


def key(obs):
    return tuple(int(x) for x in obs)


def watch(module, monkeypatch, folder, **given):
    """Train on a Tagged environment; return the transitions, the batches and values of each iteration, and the rest."""
    seen = SimpleNamespace(iterations=[], states=[])
    monkeypatch.setattr(envs.Tagged, "instances", [])

    def after_gae(advantages, rewards, *_):
        seen.iterations.append(SimpleNamespace(rewards=rewards.numpy().copy(), batches=[], values={}))

    def before_learning(agent, *inputs):
        (batch,) = [x for x in inputs if isinstance(x, dict)]
        iteration = seen.iterations[-1]
        if not iteration.batches:  # the parameters are still those that acted
            obs = {key(row[name]): row[name] for env in envs.Tagged.instances for row in env.log[-T:] for name in
                   ("obs", "next_obs")}  # fmt: skip
            with torch.no_grad():
                values = agent(torch.from_numpy(np.stack(list(obs.values()))))[1]
            iteration.values = dict(zip(obs, values.tolist(), strict=True))
        iteration.batches.append({name: column.numpy().copy() for name, column in batch.items()})

    def remember(agent):
        seen.agent = agent
        seen.states.append({name: tensor.clone() for name, tensor in agent.state_dict().items()})

    spy(monkeypatch, module, "compute_gae", after=after_gae)
    spy(monkeypatch, module, learner_name(module), before=before_learning)
    spy(monkeypatch, module, "evaluate", lambda agent, *_: remember(agent), lambda _, agent, *rest: remember(agent))
    plain = dict(env_id="test/Tagged-v0", num_envs=N, num_steps=T, total_timesteps=N * T * ITERATIONS, gamma=0.9)
    plain |= dict(gae_lambda=0.8, update_epochs=1, num_minibatches=2, learning_rate=1e-2)
    args = make_args(module, folder, **(plain | given))
    seen.result = module.train(args)
    seen.lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    seen.trained, seen.evaluated = envs.Tagged.instances[:N], envs.Tagged.instances[N:]
    for k, iteration in enumerate(seen.iterations):
        iteration.rows = [{row["t"] - k * T: row for row in env.log if 0 <= row["t"] - k * T < T}
                          for env in seen.trained]  # fmt: skip
        names = iteration.batches[0]
        iteration.batch = {name: np.concatenate([batch[name] for batch in iteration.batches]) for name in names}
    assert len(seen.iterations) == ITERATIONS
    return seen


@on_policy
@pytest.mark.parametrize("env", ["Tagged", "TaggedNative", "TaggedBox", "TaggedMatrix"])
def test_learned_rows_are_exactly_the_transitions(module, monkeypatch, tmp_path, env):
    """Reset steps learned from, transitions lost or doubled, actions stored beside the wrong observation."""
    seen = watch(module, monkeypatch, tmp_path, env_id=f"test/{env}-v0")
    space = seen.trained[0].action_space
    learned = 0
    for iteration in seen.iterations:
        rows = {key(row["obs"]): row for env in iteration.rows for row in env.values()}
        keys = [key(obs) for obs in iteration.batch["obs"]]
        assert sorted(keys) == sorted(rows)
        learned += len(keys)
        expected = np.stack([rows[k]["action"] for k in keys])
        actions = iteration.batch["actions"]
        if isinstance(space, Box):  # stored as sampled; scaled and clipped on the way to the environment only
            assert actions.shape == (len(keys), np.prod(space.shape))
            assert (abs(actions) > 1).any(0).all()
            actions = np.clip(scaled(actions, space), space.low, space.high)
        assert actions == pytest.approx(expected, abs=1e-5)
    assert N * T * ITERATIONS * 0.6 < learned < N * T * ITERATIONS * 0.9  # the rest were resets


ROW = "step = dict(obs=obs, actions=action,"


@bugs(
    ("ppo_clip", VALID, "valid = ~done | True  #"),
    ("ppo_clip", VALID, "valid = ~done & (obs[:, 1] > 0)  #"),
    ("ppo_clip", ROW, "step = dict(obs=next_obs, actions=action,"),
    ("ppo_clip", ROW, "step = dict(obs=obs, actions=action.clip(-1, 1),"),
    ("ppo_clip", ROW, "step = dict(obs=obs, actions=action[::-1].copy(),"),
    ("npg", VALID, "valid = ~done | True  #"),
)
def test_rows_see(request, name, old, new):
    fails_with_a_bug(request, test_learned_rows_are_exactly_the_transitions, name, old, new, env="TaggedBox")


@bugs(
    ("ppo_clip", "actions = actions.reshape(-1, *space.shape)", "actions = actions.reshape(-1, *space.shape)[:, ::-1]"),
    ("ppo_clip", "scaled = low + (actions + 1)", "scaled = low[0] + (actions + 1)"),
)
def test_rows_of_matrices_see(request, name, old, new):
    fails_with_a_bug(request, test_learned_rows_are_exactly_the_transitions, name, old, new, env="TaggedMatrix")


@on_policy
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.9, 0.8), (0.99, 1.0), (0.9, 0.0)])
def test_advantages_stay_within_their_episode(module, monkeypatch, tmp_path, gamma, gae_lambda):
    """Every misuse of an end: of its kind, of both kinds at once, of the last observation, of a rollout's last step."""
    seen = watch(module, monkeypatch, tmp_path, gamma=gamma, gae_lambda=gae_lambda)
    kinds = set()
    for iteration in seen.iterations:
        values = iteration.values
        advantages = {}
        for env in iteration.rows:
            for start, first in env.items():
                t = start
                row = first
                total = 0.0
                while True:
                    bootstrap = 0.0 if row["terminated"] else values[key(row["next_obs"])]
                    delta = row["reward"] + gamma * bootstrap - values[key(row["obs"])]
                    total += (gamma * gae_lambda) ** (t - start) * delta
                    t += 1
                    if row["terminated"] or row["truncated"] or t == T:
                        break
                    row = env[t]
                advantages[key(first["obs"])] = total
                kinds.add((t == T, row["terminated"], row["truncated"]))
        keys = [key(obs) for obs in iteration.batch["obs"]]
        expected = np.array([advantages[k] for k in keys])
        value = np.array([values[k] for k in keys])
        assert iteration.batch["returns"] == pytest.approx(expected + value, abs=1e-4)
        standard = [(x - x.mean()) / x.std() for x in (iteration.batch["advantages"], expected)]
        assert standard[0] == pytest.approx(standard[1], abs=1e-4)
    assert kinds >= {(False, True, False), (False, False, True), (False, True, True), (True, False, False)}
    assert any(last and (terminated or truncated) for last, terminated, truncated in kinds)


GAE = 'compute_gae(rewards, values, batch["terminated"], batch["done"],'
RETURNS = 'batch["returns"] = advantages + values[:-1]'
LAST = "_, last_values = agent(to_tensor(obs, device))"


@bugs(
    ("ppo_clip", GAE, 'compute_gae(rewards, values, batch["done"], batch["done"],'),
    ("ppo_clip", GAE, 'compute_gae(rewards, values, batch["terminated"], batch["terminated"],'),
    ("ppo_clip", GAE, 'compute_gae(rewards, values, batch["done"] & ~batch["terminated"], batch["done"],'),
    ("ppo_clip", LAST, f"{LAST}\n            last_values = last_values * 0"),
    ("ppo_clip", LAST, '_, last_values = agent(batch["obs"][-1])'),
    ("ppo_clip", LAST, "_, last_values = agent(to_tensor(obs[::-1].copy(), device))"),
    ("ppo_clip", "values = torch.cat([values, last_values]).view(T + 1, N)",
     "values = torch.cat([values.view(N, T).mT, last_values[None]])"),
    ("ppo_clip", RETURNS, 'batch["returns"] = advantages'),
    ("ppo_clip", RETURNS, 'batch["returns"] = (advantages - advantages[valid].mean()) + values[:-1]'),
)  # fmt: skip
def test_advantages_see(request, name, old, new):
    given = dict(gamma=0.9, gae_lambda=0.8)
    fails_with_a_bug(request, test_advantages_stay_within_their_episode, name, old, new, **given)


@each([module for module in MODULES if hasattr(module, "RunningNorm")])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_running_norm_against_numpy(module, shape):
    """Statistics that depend on how a stream is cut into batches, or start from a made-up first sample."""
    random = np.random.default_rng(0)
    norm = module.RunningNorm(*shape)
    stream = [random.normal(50, 4, (size, *shape)) for size in (1, 7, 1, 100, 3)]
    for i, part in enumerate(stream):
        norm.update(torch.tensor(part, dtype=torch.float32))
        whole = np.concatenate(stream[: i + 1])
        assert norm.count.item() == len(whole)
        assert norm.mean.numpy() == pytest.approx(whole.mean(0), rel=1e-5)
        assert norm.var.numpy() == pytest.approx(whole.var(0), rel=1e-3, abs=1e-3)
    x = whole.mean(0) + np.linspace(-60, 60, 9).reshape(-1, *[1] * len(shape))
    expected = np.clip((x - whole.mean(0)) / whole.std(0), -10, 10)
    assert norm(torch.tensor(x, dtype=torch.float32)).numpy() == pytest.approx(expected, abs=1e-2)
    assert set(norm.state_dict()) == {"mean", "var", "count", "scale"}
    assert not list(norm.parameters())


WEIGHT = "weight = len(x) / self.count"
VARIANCE = "(1 - weight) * delta.square())"


@bugs(
    ("ppo_clip", WEIGHT, "weight = 0.01"),
    ("ppo_clip", WEIGHT, "weight = len(x) / (self.count + 1)"),
    ("ppo_clip", VARIANCE, "delta.square())"),
    ("ppo_clip", "x.var(0, correction=0) - self.var", "x.var(0) - self.var"),
    ("ppo_clip", "- self.mean) * self.scale", "- self.mean) / self.scale"),
    ("ppo_clip", "* self.scale).clamp(-10, 10)", "* self.scale)"),
)
@pytest.mark.filterwarnings("ignore:var")
def test_running_norm_sees(request, name, old, new):
    fails_with_a_bug(request, test_running_norm_against_numpy, name, old, new, shape=(3,))


@on_policy
def test_observation_statistics_count_each_frame_once(module, monkeypatch, tmp_path):
    """Frames of reset steps counted, frames counted in every epoch, or statistics that move on in the evaluation."""
    seen = watch(module, monkeypatch, tmp_path, norm_obs=True, update_epochs=2)
    frames = np.stack([row["obs"] for env in seen.trained for row in env.log if row["t"] < T * ITERATIONS])
    norm = seen.agent.encoder
    assert norm.count.item() == len(frames)
    assert norm.mean.numpy() == pytest.approx(frames.mean(0, dtype=float), rel=1e-4)
    assert norm.var.numpy() == pytest.approx(frames.var(0, dtype=float), rel=1e-4)
    before, after = seen.states
    assert all(torch.equal(before[name], after[name]) for name in before)


UPDATE = 'agent.encoder.update(batch["obs"])'


@bugs(
    ("ppo_clip", UPDATE, "agent.encoder.update(minibatch['obs'])"),
    ("ppo_clip", UPDATE, f"{UPDATE}\n            {UPDATE}"),
    ("ppo_clip", "agent.eval()\n", "agent.encoder.update(torch.zeros(1, 3))\n"),
)
def test_observation_statistics_see(request, name, old, new):
    fails_with_a_bug(request, test_observation_statistics_count_each_frame_once, name, old, new)


@on_policy
@pytest.mark.parametrize("clip_reward", [False, True])
def test_rewards_are_divided_by_the_deviation_of_returns(module, monkeypatch, tmp_path, clip_reward):
    """Another discount than the algorithm's, sums that run on across an end, reset steps counted, a mean taken off.

    Where rewards are clipped, too, the returns are those of the clipped rewards.
    """
    seen = watch(module, monkeypatch, tmp_path, norm_reward=True, clip_reward=clip_reward, gamma=0.8)
    running = [0.0] * N
    sums = []
    for iteration in seen.iterations:
        rewards = {}
        for i, env in enumerate(iteration.rows):
            for t, row in env.items():
                rewards[t, i] = np.clip(row["reward"], -1, 1) if clip_reward else row["reward"]
                if row["obs"][1] == 0:  # an episode starts
                    running[i] = 0.0
                running[i] = rewards[t, i] + 0.8 * running[i]
                sums.append(running[i])
        for (t, i), reward in rewards.items():
            expected = np.clip(reward / np.sqrt(np.var(sums) + 1e-8), -10, 10)
            assert iteration.rewards[t, i] == pytest.approx(expected, rel=1e-4)
    norm = seen.agent.reward_norm
    assert norm.count.item() == len(sums)
    assert norm.mean.item() == pytest.approx(np.mean(sums), rel=1e-4)
    assert norm.var.item() == pytest.approx(np.var(sums), rel=1e-4)


DISCOUNTED = "discounted = args.gamma * discounted * valid + reward"
CLIPPED = "            if args.clip_reward:\n                reward = reward.clip(-1, 1)\n"
SCALED = "(rewards * agent.reward_norm.scale)"


@bugs(
    ("ppo_clip", DISCOUNTED, "discounted = discounted * valid + reward"),
    ("ppo_clip", DISCOUNTED, "discounted = args.gamma * discounted + reward"),
    ("ppo_clip", DISCOUNTED, "discounted = args.gamma * (discounted * valid + reward)"),
    ("ppo_clip", 'batch["discounted"][valid]', 'batch["discounted"].flatten()'),
    ("ppo_clip", 'batch["discounted"][valid]', 'batch["rewards"][valid]'),
    ("ppo_clip", SCALED, "agent.reward_norm(rewards)"),
    ("ppo_clip", f"{CLIPPED}            {DISCOUNTED}\n", f"            {DISCOUNTED}\n{CLIPPED}"),
    ("ppo_clip", CLIPPED, ""),
    ("ppo_clip", CLIPPED, CLIPPED.replace("args.clip_reward", "args.clip_reward and not args.norm_reward")),
)
def test_reward_statistics_see(request, name, old, new):
    test = test_rewards_are_divided_by_the_deviation_of_returns
    fails_with_a_bug(request, test, name, old, new, clip_reward=True)


@on_policy
@pytest.mark.parametrize("norm_reward", [False, True])
def test_log_keeps_true_returns(module, monkeypatch, tmp_path, norm_reward):
    """Returns of clipped or normalised rewards in the log, episodes lost or cut in two by the end of a rollout."""
    seen = watch(module, monkeypatch, tmp_path, clip_reward=not norm_reward, norm_reward=norm_reward)
    finished = []
    ends = []
    for env in seen.trained:
        ends += [(row["t"], env.index, key(row["obs"])[2]) for row in env.log if row["terminated"] or row["truncated"]]
    ends.sort()
    for k, (line, iteration) in enumerate(zip(seen.lines, seen.iterations, strict=True)):
        returns = [seen.trained[i].returns[episode] for t, i, episode in ends if k * T <= t < (k + 1) * T]
        finished += returns
        assert line["global_step"] == (k + 1) * N * T
        assert line["episodes"] == len(returns)
        assert line["episodic_return"] == pytest.approx(np.mean(returns))
        for i, env in enumerate(iteration.rows):
            for t, row in env.items():
                if not norm_reward:
                    assert iteration.rewards[t, i] == pytest.approx(np.clip(row["reward"], -1, 1))
    assert len(finished) > 100
    assert seen.result["train_return"] == pytest.approx(np.mean(finished[-100:]))
    assert seen.result["eval_returns"] == pytest.approx([env.returns[0] for env in seen.evaluated])


SCORE = "score = score * valid + reward\n            run.episode_returns += score[done].tolist()\n"
RUNNING = "returns += rewards * running"


@bugs(
    ("ppo_clip", SCORE, SCORE.replace("score * valid", "score")),
    ("ppo_clip", SCORE, SCORE.replace("score[done]", "score[terminated]")),
    ("ppo_clip", f"{SCORE}{CLIPPED}", f"{CLIPPED.lstrip()}            {SCORE}"),
    ("ppo_clip", CLIPPED, CLIPPED.replace("(-1, 1)", "(-2, 2)")),
    ("ppo_clip", RUNNING, "returns += rewards"),
    ("ppo_clip", RUNNING, "returns += rewards.clip(-1, 1) * running"),
    ("ppo_clip", "running &= ~(terminated | truncated)", "running &= ~terminated"),
)
def test_log_sees(request, name, old, new):
    fails_with_a_bug(request, test_log_keeps_true_returns, name, old, new, norm_reward=False)


@on_policy
def test_evaluation_plays_the_mode(module, monkeypatch, tmp_path):
    """An evaluation that explores, that goes on training environments, or that skips the scaling to the bounds."""
    seen = watch(module, monkeypatch, tmp_path, env_id="test/TaggedBox-v0", eval_episodes=4)
    assert len(seen.evaluated) == 4
    for env in seen.evaluated:
        rows = env.log[: 1 + next(i for i, row in enumerate(env.log) if row["terminated"] or row["truncated"])]
        mode = seen.agent(torch.from_numpy(np.stack([row["obs"] for row in rows])))[0].mean.detach().numpy()
        expected = np.clip(scaled(mode, env.action_space), env.action_space.low, env.action_space.high)
        assert np.stack([row["action"] for row in rows]) == pytest.approx(expected, abs=1e-4)


@bugs(
    ("ppo_clip", "agent.act(obs, greedy=True)", "agent.act(obs)"),
    ("ppo_clip", "to_env(agent.act(obs, greedy=True))", "agent.act(obs, greedy=True)"),
)
def test_evaluation_sees(request, name, old, new):
    fails_with_a_bug(request, test_evaluation_plays_the_mode, name, old, new)


@each_module
@pytest.mark.parametrize(("name", "mode"), [("SameStep", "SAME_STEP"), ("Disabled", "DISABLED"), ("Silent", "None")])
@pytest.mark.filterwarnings("ignore:.*missing AutoresetMode")
def test_other_autoreset_modes_are_refused(module, tmp_path, name, mode):
    """Training on in a mode in which `next_obs` is not the true last observation."""
    with pytest.raises(module.Refusal, match=rf"{mode}.*NEXT_STEP"):
        module.make_envs(f"test/{name}-v0", 2)
    with pytest.raises(module.Refusal, match=rf"{mode}.*NEXT_STEP"):
        module.train(make_args(module, tmp_path, env_id=f"test/{name}-v0"))
    assert not (tmp_path / "run").exists()
