"""What reaches the learner, through the real train(): rows of environments whose observations say where they come from.

The environments write down every transition that really happened; expected values are computed from that alone.
"""

import json
from types import SimpleNamespace

import envs
import numpy as np
import pytest
import torch
from conftest import MODULES, loss_name, make_args, on_policy, spy

N, T, ITERATIONS = 3, 16, 16


def key(obs):
    return tuple(int(x) for x in obs)


def watch(module, monkeypatch, folder, **given):
    """Train on a Tagged environment; return the transitions, the batches and values of each iteration, and the rest."""
    seen = SimpleNamespace(iterations=[], states=[])
    monkeypatch.setattr(envs.Tagged, "instances", [])

    def after_gae(advantages, rewards, *_):
        seen.iterations.append(SimpleNamespace(rewards=rewards.numpy().copy(), batches=[], values={}))

    def before_loss(agent, batch, *_):
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
    spy(monkeypatch, module, loss_name(module), before=before_loss)
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
@pytest.mark.parametrize("name", ["Tagged", "TaggedNative", "TaggedBox"])
def test_learned_rows_are_exactly_the_transitions(module, monkeypatch, tmp_path, name):
    """Reset steps learned from, transitions lost or doubled, actions stored beside the wrong observation."""
    seen = watch(module, monkeypatch, tmp_path, env_id=f"test/{name}-v0")
    learned = 0
    for iteration in seen.iterations:
        rows = {key(row["obs"]): row for env in iteration.rows for row in env.values()}
        keys = [key(obs) for obs in iteration.batch["obs"]]
        assert sorted(keys) == sorted(rows)
        learned += len(keys)
        expected = np.stack([rows[k]["action"] for k in keys])
        actions = iteration.batch["actions"]
        if name == "TaggedBox":  # stored as sampled; scaled and clipped on the way to the environment only
            low, high = np.array([-1, -3]), np.array([2, 0.5])
            assert (abs(actions) > 1).any(0).all()
            actions = np.clip(low + (actions + 1) / 2 * (high - low), low, high)
        assert actions == pytest.approx(expected, abs=1e-5)
    assert N * T * ITERATIONS * 0.6 < learned < N * T * ITERATIONS * 0.9  # the rest were resets


@on_policy
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.9, 0.8), (0.99, 1.0), (0.9, 0.0)])
def test_advantages_stay_within_their_episode(module, monkeypatch, tmp_path, gamma, gae_lambda):
    """Every misuse of an end: of its kind, of both kinds at once, of the last observation, of a rollout's last step."""
    seen = watch(module, monkeypatch, tmp_path, gamma=gamma, gae_lambda=gae_lambda)
    kinds = set()
    for iteration in seen.iterations:
        values, rows, advantages = iteration.values, iteration.rows, {}
        for env in rows:
            for start, first in env.items():
                t, row, total = start, first, 0.0
                while True:
                    bootstrap = 0.0 if row["terminated"] else values[key(row["next_obs"])]
                    delta = row["reward"] + gamma * bootstrap - values[key(row["obs"])]
                    total += (gamma * gae_lambda) ** (t - start) * delta
                    over, t = row["terminated"] or row["truncated"], t + 1
                    if over or t == T:
                        break
                    row = env[t]
                advantages[key(first["obs"])] = total
                kinds.add((t == T, row["terminated"], row["truncated"]))
        keys = [key(obs) for obs in iteration.batch["obs"]]
        expected, value = np.array([advantages[k] for k in keys]), np.array([values[k] for k in keys])
        assert iteration.batch["returns"] == pytest.approx(expected + value, abs=1e-4)
        standard = [(x - x.mean()) / x.std() for x in (iteration.batch["advantages"], expected)]
        assert standard[0] == pytest.approx(standard[1], abs=1e-4)
    assert kinds >= {(False, True, False), (False, False, True), (False, True, True), (True, False, False)}
    assert any(last and (terminated or truncated) for last, terminated, truncated in kinds)


@pytest.mark.parametrize("module", [module for module in MODULES if hasattr(module, "RunningNorm")])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_running_norm_against_numpy(module, shape):
    """Statistics that depend on how a stream is cut into batches, or start from a made-up first sample."""
    random, norm = np.random.default_rng(0), module.RunningNorm(*shape)
    stream = [random.normal(50, 4, (size, *shape)) for size in (1, 7, 1, 100, 3)]
    for i, part in enumerate(stream):
        norm.update(torch.tensor(part, dtype=torch.float32))
        whole = np.concatenate(stream[: i + 1])
        assert norm.count.numpy() == pytest.approx(np.full(shape, len(whole)))
        assert norm.mean.numpy() == pytest.approx(whole.mean(0), rel=1e-5)
        assert norm.var.numpy() == pytest.approx(whole.var(0), rel=1e-3, abs=1e-3)
    x = whole.mean(0) + np.linspace(-60, 60, 9).reshape(-1, *[1] * len(shape))
    expected = np.clip((x - whole.mean(0)) / whole.std(0), -10, 10)
    assert norm(torch.tensor(x, dtype=torch.float32)).numpy() == pytest.approx(expected, abs=1e-2)
    assert set(norm.state_dict()) == {"mean", "var", "count", "scale"}
    assert not list(norm.parameters())


@on_policy
def test_observation_statistics_count_each_frame_once(module, monkeypatch, tmp_path):
    """Frames of reset steps counted, frames counted in every epoch, or statistics that move on in the evaluation."""
    seen = watch(module, monkeypatch, tmp_path, norm_obs=True, update_epochs=2)
    frames = np.stack([row["obs"] for env in seen.trained for row in env.log if row["t"] < T * ITERATIONS])
    norm = seen.agent.trunk
    assert norm.count.tolist() == [len(frames)] * 3
    assert norm.mean.numpy() == pytest.approx(frames.mean(0, dtype=float), rel=1e-4)
    assert norm.var.numpy() == pytest.approx(frames.var(0, dtype=float), rel=1e-4)
    before, after = seen.states
    assert all(torch.equal(before[name], after[name]) for name in before)


@on_policy
def test_rewards_are_divided_by_the_deviation_of_returns(module, monkeypatch, tmp_path):
    """Another discount than the algorithm's, sums that run on across an end, reset steps counted, a mean taken off."""
    seen = watch(module, monkeypatch, tmp_path, norm_reward=True, gamma=0.8)
    sums = []
    for iteration in seen.iterations:
        for i, env in enumerate(iteration.rows):
            for row in env.values():
                previous = row["obs"][1] > 0 and seen.trained[i].discounted
                seen.trained[i].discounted = row["reward"] + 0.8 * previous
                sums.append(seen.trained[i].discounted)
        for i, env in enumerate(iteration.rows):
            for t, row in env.items():
                expected = np.clip(row["reward"] / np.sqrt(np.var(sums) + 1e-8), -10, 10)
                assert iteration.rewards[t, i] == pytest.approx(expected, rel=1e-4)
    norm = seen.agent.return_norm
    assert norm.count.item() == len(sums)
    assert norm.mean.item() == pytest.approx(np.mean(sums), rel=1e-4)
    assert norm.var.item() == pytest.approx(np.var(sums), rel=1e-4)


@on_policy
@pytest.mark.parametrize("norm_reward", [False, True])
def test_log_keeps_true_returns(module, monkeypatch, tmp_path, norm_reward):
    """Returns of clipped or normalised rewards in the log, episodes lost or cut in two by the end of a rollout."""
    seen = watch(module, monkeypatch, tmp_path, clip_reward=not norm_reward, norm_reward=norm_reward)
    finished, ends = [], sorted((row["t"], env.index, key(row["obs"])[2]) for env in seen.trained for row in env.log
                                if row["terminated"] or row["truncated"])  # fmt: skip
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


@on_policy
def test_evaluation_plays_the_mode(module, monkeypatch, tmp_path):
    """An evaluation that explores, that goes on training environments, or that skips the scaling to the bounds."""
    seen = watch(module, monkeypatch, tmp_path, env_id="test/TaggedBox-v0", eval_episodes=4)
    assert len(seen.evaluated) == 4
    for env in seen.evaluated:
        rows = env.log[: 1 + next(i for i, row in enumerate(env.log) if row["terminated"] or row["truncated"])]
        mode = seen.agent(torch.from_numpy(np.stack([row["obs"] for row in rows])))[0].mean.detach().numpy()
        low, high = np.array([-1, -3]), np.array([2, 0.5])
        expected = np.clip(low + (mode + 1) / 2 * (high - low), low, high)
        assert np.stack([row["action"] for row in rows]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
@pytest.mark.parametrize(("name", "mode"), [("SameStep", "SAME_STEP"), ("Disabled", "DISABLED"), ("Silent", "None")])
@pytest.mark.filterwarnings("ignore:.*missing AutoresetMode")
def test_other_autoreset_modes_are_refused(module, tmp_path, name, mode):
    """Training on in a mode in which `next_obs` is not the true last observation."""
    with pytest.raises(ValueError, match=rf"{mode}.*NEXT_STEP"):
        module.make_envs(f"test/{name}-v0", 2)
    with pytest.raises(ValueError, match=rf"{mode}.*NEXT_STEP"):
        module.train(make_args(module, tmp_path, env_id=f"test/{name}-v0"))
    assert not (tmp_path / "run").exists()
