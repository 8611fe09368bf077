"""Imitation: pairs as they happened, losses with known optima, labels of the demonstrator, files of demonstrations."""

import json
import sys

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import MODULES, is_imitation, make_args, spy
from gymnasium.spaces import Box, Discrete
from off_policy import bugs, key, scaled
from on_policy import BOX, OBS, each_space, log_prob, sample
from runs import arguments, checkpoint, each, fails_with_a_bug, finished_run, result, resume, script

from algos import behavior_cloning, dagger, reinforce

each_imitation = each([module for module in MODULES if is_imitation(module)])
each_cloning = each([behavior_cloning])
each_dagger = each([dagger])
CPU = torch.device("cpu")


def rule(env, obs):
    """What is right in the environment Tagged, by its observation alone."""
    number = int(7 * obs[0] + obs[1] + 2 * obs[2])
    if isinstance(env.action_space, Discrete):
        return number % 3
    return np.array([number % 4 - 1.0, -(number % 3) + 0.25])


@pytest.fixture(autouse=True)
def _a_rule(monkeypatch):
    monkeypatch.setattr(envs, "heuristic", rule, raising=False)


def learn(module, folder, **given):
    """The agent, the batches that it learned from and the result of a short run."""
    agents = []
    batches = []

    def see(agent, batch):
        if torch.is_grad_enabled():
            agents.append(agent)
            batches.append(batch)

    plain = dict(env_id="test/Tagged-v0", demonstrations="heuristic", num_demonstrations=6, validation_fraction=0.0)
    plain |= dict(total_timesteps=960, batch_size=32, play_every=160, hidden_size=16, learning_rate=1e-2, log_every=320)
    envs.Tagged.instances = []
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, module, "policy_loss", before=see)
        found = module.train(make_args(module, folder, **plain | given))
    return agents[0], batches, found


def happened(first=0, last=10**6):
    """Observation and action of each step of these episodes of the environment in which all is shown and played."""
    log = envs.Tagged.instances[0].log
    return {key(row["obs"]): row["action"] for row in log if first <= row["obs"][2] < last}


def learned(batches):
    """The action that was learned in each observation; there may be but one."""
    found = {}
    for batch in batches:
        for obs, action in zip(batch["obs"].numpy(), batch["actions"].numpy()):
            assert np.array_equal(found.setdefault(key(obs), action), action)
    return found


# Pairs


@each_imitation
@pytest.mark.parametrize("env", ["Tagged", "TaggedBox"])
@pytest.mark.parametrize("demonstrations", ["heuristic", "uniform"])
def test_pairs_are_those_of_the_demonstrations(module, tmp_path, env, demonstrations):
    """Actions of the step before or after, pairs across episodes, a last state, a reset, actions of another scale."""
    given = dict(env_id=f"test/{env}-v0", demonstrations=demonstrations, num_labelled=0)
    _, batches, found = learn(module, tmp_path, **given)
    pairs = learned(batches)
    expected = happened(last=6)
    assert pairs.keys() == expected.keys()
    for obs, action in pairs.items():
        space = envs.Tagged.instances[0].action_space
        if env == "TaggedBox":
            assert scaled(action, space)[0] == pytest.approx(expected[obs], abs=1e-5)
        else:
            assert action == expected[obs]
    assert found["demonstrator_mean"] == pytest.approx(np.mean(envs.Tagged.instances[0].returns[:6]))
    assert result(tmp_path / "run")["demonstrator_mean"] == found["demonstrator_mean"]


@bugs(
    ("behavior_cloning", 'episode["observations"][:-1]', 'episode["observations"][1:]'),
    ("behavior_cloning", 'to_policy(episode["actions"])', 'to_policy(np.roll(episode["actions"], 1, 0))'),
    ("behavior_cloning", "observations.append(obs[0])", "observations.insert(0, obs[0])"),
    ("behavior_cloning", "done = terminated[0] or cut", "done = terminated[0]"),
    ("behavior_cloning", "range(args.num_demonstrations)", "range(args.num_demonstrations - 1)"),
)
def test_pairs_see(request, name, old, new):
    given = dict(env="Tagged", demonstrations="uniform")
    fails_with_a_bug(request, test_pairs_are_those_of_the_demonstrations, name, old, new, **given)


SPACES = [
    BOX,
    Discrete(4, start=-2),
    Box(np.float32([[-1, 0, 2], [-3, -0.5, -7]]), np.float32([[1, 5, 3], [2, 0.5, -6]])),
    Box(np.float32([-np.inf, 0, -2, 3]), np.float32([np.inf, np.inf, 7, 3])),
]


@each_imitation
@pytest.mark.parametrize("space", SPACES, ids=["bounds", "discrete", "axes", "open"])
def test_actions_and_back(module, space):
    """Bounds of another dimension or side, a forgotten start, a scale where there is nothing to scale to."""
    space.seed(3)
    actions = np.stack([space.sample() for _ in range(50)])
    policy = module.inverse_action_map(space)(actions)
    assert policy.shape == ((50,) if isinstance(space, Discrete) else (50, gym.spaces.flatdim(space)))
    assert policy.dtype == (np.int64 if isinstance(space, Discrete) else np.float32)
    assert module.action_map(space)(policy) == pytest.approx(actions, abs=1e-5)
    if isinstance(space, Discrete):
        assert sorted(set(policy)) == [0, 1, 2, 3]
    elif space.is_bounded():
        ends = module.inverse_action_map(space)(np.stack([space.low, space.high]))
        assert ends == pytest.approx(np.stack([-np.ones(policy.shape[1]), np.ones(policy.shape[1])]), abs=1e-5)


@bugs(
    ("behavior_cloning", "actions.astype(np.int64) - space.start", "actions.astype(np.int64)"),
    ("behavior_cloning", "(actions - low) / half - 1", "(actions - low) / half.max() - 1"),
    ("behavior_cloning", "(actions - low) / half - 1", "actions / half"),
    ("behavior_cloning", "half = np.where(high > low, (high - low) / 2, 1)", "half = high - low"),
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_actions_see(request, name, old, new):
    space = SPACES[1] if "start" in old else SPACES[0]
    fails_with_a_bug(request, test_actions_and_back, name, old, new, space=space)


def episode(number, rewards):
    """An episode of the environment Tagged whose observations say which."""
    T = len(rewards)
    columns = dict(actions=np.arange(T) % 3, terminations=np.arange(T) == T - 1, truncations=np.zeros(T, bool))
    observations = np.stack([np.float32([0, t, number]) for t in range(T + 1)])
    return dict(observations=observations, rewards=np.float64(rewards)) | columns


@each_imitation
def test_the_best_episodes(module):
    """The best by return, not by length, last reward or mean reward; in their order; at least one."""
    shown = [episode(0, [3, 0]), episode(1, [5, -9]), episode(2, [1] * 4), episode(3, [1, 1]), episode(4, [0, 2.5])]

    def numbers(fraction):
        return [int(row["observations"][0, 2]) for row in module.choose_best(shown, fraction)]

    assert numbers(1.0) == [0, 1, 2, 3, 4]
    assert numbers(0.8) == [0, 2, 3, 4]
    assert numbers(0.4) == [0, 2]
    assert numbers(0.2) == numbers(0.01) == [2]


@bugs(
    ("behavior_cloning", "[-count:]", "[:count]"),
    ("behavior_cloning", "for i in sorted(best)", "for i in best"),
    ("behavior_cloning", 'episode["rewards"].sum() for episode in episodes]\n    count', 'episode["rewards"].mean() for episode in episodes]\n    count'),  # noqa: E501
    ("behavior_cloning", "max(round(fraction * len(episodes)), 1)", "int(fraction * len(episodes))"),
)  # fmt: skip
def test_the_best_episodes_see(request, name, old, new):
    fails_with_a_bug(request, test_the_best_episodes, name, old, new)


@each_imitation
def test_the_best_are_learned_from(module, tmp_path):
    """--top-fraction without effect, or a demonstrator's mean of other episodes."""
    _, batches, found = learn(module, tmp_path, top_fraction=0.5, num_labelled=0)
    returns = envs.Tagged.instances[0].returns[:6]
    best = np.argsort(returns)[3:]
    assert {obs[2] for obs in learned(batches)} == set(best.tolist())
    assert found["demonstrator_mean"] == pytest.approx(np.mean([returns[i] for i in best]))


@each_imitation
def test_what_is_held_out(module, tmp_path):
    """Whole episodes, the last ones; neither learned from nor in the statistics, which a resumed run counts once."""
    given = dict(validation_fraction=0.5, norm_obs=True, num_labelled=0)
    agent, batches, _ = learn(module, tmp_path, **given)
    assert {obs[2] for obs in learned(batches)} == {0, 1, 2}
    shown = np.array(list(happened(last=3)))

    def check(state):
        assert state["encoder.count"].item() == len(shown)
        assert state["encoder.mean"].numpy() == pytest.approx(shown.mean(0), abs=1e-5)
        assert state["encoder.var"].numpy() == pytest.approx(shown.var(0), abs=1e-5)

    check(agent.state_dict())
    rest = np.array(list(happened(first=3, last=6)), np.float32)
    actions = torch.tensor([rule(envs.Tagged.instances[0], obs) for obs in rest])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    probs = agent.actor(agent.encoder(torch.tensor(rest))).softmax(-1)[torch.arange(len(rest)), actions]
    assert lines[-1]["validation_loss"] == pytest.approx(-probs.log().mean().item(), rel=1e-4)
    learn(module, tmp_path, **given, resume=str(tmp_path / "run"), total_timesteps=1920)
    check(checkpoint(tmp_path / "run")["agent"])


@bugs(
    ("behavior_cloning", "pairs = pairs_of(episodes[:num_train]", "pairs = pairs_of(episodes"),
    ("behavior_cloning", "pairs_of(episodes[num_train:]", "pairs_of(episodes[:num_train]"),
    ("behavior_cloning", "if run.step == 0 and isinstance", "if isinstance"),
    ("dagger", "if run.step == 0 and isinstance", "if isinstance"),
)  # fmt: skip
def test_held_out_sees(request, name, old, new):
    fails_with_a_bug(request, test_what_is_held_out, name, old, new)


@each_imitation
def test_all_held_out_pairs_count_alike(module):
    """A mean of the means of batches, of which the last is smaller."""
    args = module.Args(hidden_size=8)
    agent = module.Agent(OBS, Discrete(3), args)
    pairs = dict(obs=torch.randn(23, 3), actions=torch.randint(3, (23,)))
    _, metrics = module.policy_loss(agent, pairs)
    found = module.validate(agent, pairs, 5, CPU)
    assert found == pytest.approx({f"validation_{name}": value.item() for name, value in metrics.items()})


@bugs(
    ("behavior_cloning", "share = len(rows) / num_pairs", "share = batch_size / num_pairs"),
    ("behavior_cloning", "share = len(rows) / num_pairs", "share = 1 / 5"),
    ("behavior_cloning", 'totals.get(f"validation_{name}", 0) + share', "share"),
)
def test_held_out_pairs_see(request, name, old, new):
    fails_with_a_bug(request, test_all_held_out_pairs_count_alike, name, old, new)


@each_imitation
def test_pairs_are_drawn_uniformly(module):
    """A pair that is never drawn, or the first more often; rows of which obs and action are not of one pair."""
    pairs = dict(obs=torch.arange(7.0)[:, None], actions=torch.arange(7))
    batch = module.sample_pairs(pairs, 70_000, CPU)
    assert torch.equal(batch["obs"][:, 0], batch["actions"].float())
    assert torch.bincount(batch["actions"], minlength=7).numpy() == pytest.approx(10_000, abs=400)


# The loss


@each_imitation
@each_space
def test_gradient_is_reinforce_with_weight_1(module, space):
    """The claim of the docstring, against the loss of reinforce.py and against the formula."""
    torch.manual_seed(3)
    agent = module.Agent(OBS, space, module.Args(hidden_size=5, norm_obs=False, learn_std=True)).double()
    args = reinforce.Args(hidden_size=5, norm_obs=False, baseline="none", ent_coef=0.0)
    learner = reinforce.Agent(OBS, space, args).double()
    learner.actor.load_state_dict(agent.actor.state_dict())
    obs = torch.randn(40, 3).double()
    actions = sample(agent, obs)
    names = [name for name, _ in agent.named_parameters()]
    loss, metrics = module.policy_loss(agent, dict(obs=obs, actions=actions))
    found = torch.autograd.grad(loss, list(agent.parameters()))
    batch = dict(obs=obs, actions=actions, weights=torch.ones(40).double(), returns=torch.zeros(40).double())
    other, _ = reinforce.reinforce_loss(learner, batch, args)
    expected = torch.autograd.grad(other, [learner.get_parameter(name) for name in names])
    formula = torch.autograd.grad(-log_prob(agent, obs, actions).mean(), list(agent.parameters()))
    for name, one, two, three in zip(names, found, expected, formula):
        torch.testing.assert_close(one, two, msg=name)
        torch.testing.assert_close(one, three, msg=name)
    assert metrics["loss"].item() == pytest.approx(-log_prob(agent, obs, actions).mean().item())


@each_imitation
def test_gradient_step(module, tmp_path, monkeypatch):
    """Weights that decay by themselves, beside Adam's step, not through the gradient; or that do not."""
    seen = []
    descend = module.descend

    def watched(optimizer, gradients):
        before = {parameter: parameter.detach().clone() for parameter in gradients}
        given = {parameter: gradient.clone() for parameter, gradient in gradients.items()}
        descend(optimizer, gradients)
        seen.append([(before[p], given[p], p.detach() - before[p]) for p in before])

    monkeypatch.setattr(module, "descend", watched)
    learn(module, tmp_path, learning_rate=0.01, weight_decay=0.5)
    for weight, gradient, move in seen[0]:
        expected = -0.01 * (0.5 * weight + gradient / (gradient.abs() + 1e-8))
        torch.testing.assert_close(move, expected, atol=1e-6, rtol=1e-4)


@bugs(
    ("behavior_cloning", "torch.optim.AdamW(", "torch.optim.Adam("),
    ("dagger", "weight_decay=args.weight_decay,", "weight_decay=args.weight_decay / 9,"),
)
def test_gradient_step_sees(request, name, old, new):
    fails_with_a_bug(request, test_gradient_step, name, old, new)


LOSS = 'loss = -policy.log_prob(batch["actions"]).mean()'


@bugs(
    ("behavior_cloning", LOSS, LOSS.replace("= -", "= ")),
    ("behavior_cloning", LOSS, LOSS.replace(".mean()", ".sum()")),
    ("behavior_cloning", LOSS, 'loss = -policy.log_prob(policy.sample()).mean()'),
)  # fmt: skip
@each_space
def test_gradients_see(request, name, old, new, space):
    fails_with_a_bug(request, test_gradient_is_reinforce_with_weight_1, name, old, new, space=space)


@each_imitation
def test_fixed_deviation_is_a_squared_error(module):
    """A deviation that is learned unasked, or that has a weight in the optimizer's eyes."""
    agent = module.Agent(OBS, BOX, module.Args(hidden_size=5, norm_obs=False))
    obs = torch.randn(40, 3)
    actions = torch.randn(40, 2)
    loss, metrics = module.policy_loss(agent, dict(obs=obs, actions=actions))
    errors = (agent.actor(obs) - actions).square()
    expected = errors.sum(-1).mean().item() / 2 + np.log(2 * np.pi)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["squared_error"].item() == pytest.approx(errors.mean().item(), rel=1e-5)
    assert {name.split(".")[0] for name, _ in agent.named_parameters()} == {"actor"}
    assert "log_std" in agent.state_dict()


def fit(module, agent, batch, steps, rate):
    """Gradient steps of the script on one batch, with a step size that falls to 0."""
    optimizer = torch.optim.Adam(agent.parameters(), lr=rate)
    policy_gradients = module.gradients_of(module.policy_loss, agent.parameters(), module.Args())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        gradients, _ = policy_gradients(agent, batch)
        module.descend(optimizer, gradients)


@each_imitation
def test_linear_gaussian_demonstrator(module):
    """a = K s + b + noise: K, b and the deviations are found, as least squares finds them and as they are."""
    agent = module.Agent(OBS, BOX, module.Args(norm_obs=False, learn_std=True)).double()
    agent.actor = nn.Linear(3, 2).double()
    generator = torch.Generator().manual_seed(0)
    K = torch.tensor([[0.5, -1.0, 0.2], [0.0, 0.3, 2.0]]).double()
    obs = torch.randn(20_000, 3, generator=generator).double()
    std = torch.tensor([0.02, 0.05]).double()
    actions = obs @ K.T + 0.7 + std * torch.randn(20_000, 2, generator=generator)
    fit(module, agent, dict(obs=obs, actions=actions), 400, 0.1)
    rows = torch.cat([obs, torch.ones(20_000, 1)], 1)
    solution = torch.linalg.lstsq(rows, actions).solution
    found = torch.cat([agent.actor.weight.T, agent.actor.bias[None]]).detach()
    assert found.numpy() == pytest.approx(solution.numpy(), abs=1e-4)
    assert agent.actor.weight.detach().numpy() == pytest.approx(K.numpy(), abs=1e-3)
    assert agent.log_std.exp().detach().numpy() == pytest.approx(std.numpy(), rel=2e-2)


@each_imitation
def test_a_demonstrator_without_noise(module):
    """A deviation that goes to 0 and a loss that goes to minus infinity."""
    agent = module.Agent(OBS, BOX, module.Args(norm_obs=False, learn_std=True))
    agent.actor = nn.Linear(3, 2)
    obs = torch.randn(100, 3)
    batch = dict(obs=obs, actions=obs[:, :2].clone())
    fit(module, agent, batch, 600, 0.1)
    assert agent.policy(obs).base_dist.stddev.min().item() >= np.exp(-5) * 0.999
    loss, _ = module.policy_loss(agent, batch)
    assert loss.item() > -2 * 5
    drawn = torch.from_numpy(np.stack([agent.act(obs.numpy()) for _ in range(50)]))
    assert drawn.std(0).mean().item() == pytest.approx(np.exp(-5), rel=0.2)


FLOOR = "std = self.log_std.clamp(min=-5).exp()"


@bugs(
    ("behavior_cloning", FLOOR, "std = self.log_std.exp()"),
    ("behavior_cloning", "output + self.log_std.clamp(min=-5).exp() *", "output + self.log_std.exp() *"),
)
def test_floors_see(request, name, old, new):
    fails_with_a_bug(request, test_a_demonstrator_without_noise, name, old, new)


@each_imitation
def test_conflicting_demonstrations(module):
    """Of a demonstrator that acts at random the policy learns the frequencies, in each state its own."""
    agent = module.Agent(Discrete(2, start=4), Discrete(3), module.Args())
    agent.actor = nn.Linear(2, 3)
    shares = torch.tensor([[5, 3, 2], [1, 0, 9]])
    obs = torch.repeat_interleave(torch.tensor([4, 4, 4, 5, 5, 5]), shares.flatten())
    actions = torch.repeat_interleave(torch.arange(3).repeat(2), shares.flatten())
    fit(module, agent, dict(obs=obs, actions=actions), 1500, 0.2)
    probs = agent.policy(agent.encoder(torch.tensor([4, 5]))).probs.detach()
    assert probs.numpy() == pytest.approx(shares.numpy() / 10, abs=1e-3)
    _, metrics = module.policy_loss(agent, dict(obs=obs, actions=actions))
    assert metrics["accuracy"].item() == pytest.approx(0.7)
    drawn = np.bincount(agent.act(np.full(20_000, 4)), minlength=3) / 20_000
    assert drawn == pytest.approx([0.5, 0.3, 0.2], abs=0.02)


# DAgger


@each_dagger
def test_states_of_the_learner_and_labels_of_the_demonstrator(module, tmp_path):
    """The learner's own actions as labels, the demonstrator's states, labels of the step before, more than asked."""
    played = {}

    class Watched(module.Agent):
        def act(self, obs, greedy=False):
            assert greedy
            action = super().act(obs, greedy)
            played.update({key(row): a for row, a in zip(obs, action)})
            return action

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Agent", Watched)
        _, batches, _ = learn(module, tmp_path, num_labelled=4, total_timesteps=1280, learning_rate=1e-4)
    env = envs.Tagged.instances[0]
    pairs = learned(batches)
    states = happened(first=6, last=10)
    assert pairs.keys() == happened(last=10).keys(), "in 8 episodes of the learner, 4 are labelled"
    for obs, action in pairs.items():
        assert action == rule(env, obs)
    for obs, action in states.items():
        assert action == played.get(obs), "the learner acts"
    differ = [obs for obs in states if states[obs] != rule(env, obs)]
    assert len(differ) >= 3, "it errs"
    saved = checkpoint(tmp_path / "run")["pairs"]
    assert {key(obs) for obs in saved["obs"].numpy()} == pairs.keys()
    assert len(saved["obs"]) == len(saved["actions"]) == len(pairs)


LABELS = 'episode["actions"] = np.concatenate([demonstrator(obs[None]) for obs in episode["observations"][:-1]])'


@bugs(
    ("dagger", LABELS, "pass"),
    ("dagger", LABELS, LABELS.replace("[:-1]])", "[1:]])")),
    ("dagger", "lambda obs: to_env(agent.act(obs, greedy=True))", "demonstrator"),
    ("dagger", "lambda obs: to_env(agent.act(obs, greedy=True))", "lambda obs: to_env(agent.act(obs))"),
    ("dagger", "<= args.num_labelled", "< args.num_labelled"),
    ("dagger", "if step // play_every <= args.num_labelled:", "if True:"),
    ("dagger", "pairs.add(labelled)", "pairs.load_state_dict(labelled)"),
    ("dagger", 'self.actions = torch.cat([self.actions, pairs["actions"]])',
     'self.actions = torch.cat([pairs["actions"], self.actions])'),
)  # fmt: skip
def test_labels_see(request, name, old, new):
    fails_with_a_bug(request, test_states_of_the_learner_and_labels_of_the_demonstrator, name, old, new)


@each_dagger
def test_a_resumed_run_keeps_its_labels(module, tmp_path):
    """Pairs lost or taken twice by --resume; statistics that forget what was labelled."""
    given = dict(num_labelled=100, norm_obs=True)
    learn(module, tmp_path, **given)
    first = checkpoint(tmp_path / "run")["pairs"]
    assert len(first["obs"]) == len(happened(last=12)), "6 episodes shown and 6 played"
    _, batches, _ = learn(module, tmp_path, **given, resume=str(tmp_path / "run"), total_timesteps=1920)
    saved = checkpoint(tmp_path / "run")
    count = len(first["obs"])
    assert torch.equal(saved["pairs"]["obs"][:count], first["obs"])
    assert torch.equal(saved["pairs"]["actions"][:count], first["actions"])
    assert len(saved["pairs"]["obs"]) > count
    assert {tuple(obs) for obs in first["obs"].tolist()} <= {tuple(obs) for b in batches for obs in b["obs"].tolist()}
    everything = saved["pairs"]["obs"]
    assert saved["agent"]["encoder.count"].item() == len(everything)
    torch.testing.assert_close(saved["agent"]["encoder.mean"], everything.mean(0))


@bugs(
    ("dagger", "optimizer=optimizer, pairs=pairs)", "optimizer=optimizer, pairs=Pairs(pairs.state_dict()))"),
    ("dagger", 'agent.encoder.update(labelled["obs"].to(device))', "pass"),
)
def test_resumed_labels_see(request, name, old, new):
    fails_with_a_bug(request, test_a_resumed_run_keeps_its_labels, name, old, new)


# Demonstrators


@each_imitation
def test_an_episode_as_it_was(module):
    """All that a file needs: one observation more than steps, ends of both kinds, a cut, a signal that is heeded."""
    envs.Tagged.instances = []
    made = module.make_envs("test/Tagged-v0", 1)
    for seed in range(9):
        shown = module.roll_out(made, lambda obs: np.array([int(obs[0, 1]) % 3]), seed)
        env = envs.Tagged.instances[0]
        rows = [row for row in env.log if row["obs"][2] == seed]
        T = len(rows)
        assert [len(shown[name]) for name in ("observations", "actions", "rewards")] == [T + 1, T, T]
        assert shown["observations"].tolist() == [[0, t, seed] for t in range(T + 1)]
        assert shown["rewards"] == pytest.approx([row["reward"] for row in rows])
        assert shown["actions"].tolist() == [t % 3 for t in range(T)]
        assert shown["terminations"].tolist() == [row["terminated"] for row in rows]
        assert shown["truncations"].tolist() == [row["truncated"] for row in rows]
    endless = module.make_envs("test/Truncation-v0", 1)
    shown = module.roll_out(endless, lambda obs: np.array([0]), 1, max_steps=5)
    assert shown["truncations"].tolist() == [False] * 4 + [True]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Run, "stop_signal", 2)
        with pytest.raises(KeyboardInterrupt):
            module.roll_out(endless, lambda obs: np.array([0]), 1)


@each_imitation
@pytest.mark.parametrize("continuous", [False, True])
def test_the_heuristic_of_the_lander(module, continuous):
    """Gymnasium's own, which is told its environment."""
    lander = pytest.importorskip("gymnasium.envs.box2d.lunar_lander")
    made = module.make_envs("LunarLander-v3", 1, json.dumps(dict(continuous=continuous)))
    act = module.make_demonstrator(module.Args(), made, CPU)
    shown = module.roll_out(made, act, 7)
    env = gym.make("LunarLander-v3", continuous=continuous)
    obs, _ = env.reset(seed=7)
    score = 0
    over = False
    while not over:
        obs, reward, terminated, truncated, _ = env.step(lander.heuristic(env, obs))
        score += reward
        over = terminated or truncated
    assert shown["rewards"].sum() == pytest.approx(score)


@each_imitation
def test_demonstrators_without_a_run(module):
    """Uniform actions of the whole space; one sentence for what there is not."""
    made = module.make_envs("test/TaggedBox-v0", 1)
    actions = module.make_demonstrator(module.Args(demonstrations="uniform"), made, CPU)(np.zeros((9000, 3)))
    low, high = made.single_action_space.low, made.single_action_space.high
    assert np.sort(actions, 0) == pytest.approx(np.linspace(low, high, 9000), abs=0.1)
    cart = module.make_envs("CartPole-v1", 1)
    for name, words in (("heuristic", "has no heuristic"), ("nowhere", "nowhere are neither heuristic nor")):
        with pytest.raises(module.Refusal, match=words) as error:
            module.make_demonstrator(module.Args(env_id="CartPole-v1", demonstrations=name), cart, CPU)
        assert "\n" not in str(error.value)


@each_imitation
@pytest.mark.parametrize("name", ["ppo_clip", "dqn", "ddpg", "td3", "a3c"])
def test_a_run_as_demonstrator(module, name, tmp_path):
    """Its greedy actions as the environment takes them, by the network that its own run was evaluated with."""
    teacher = script(name)
    folder = finished_run(teacher, tmp_path / "teacher")
    env_id = teacher.Args.env_id
    made = module.make_envs(env_id, 1)
    args = arguments(module, tmp_path / "run", env_id=env_id, demonstrations=folder)
    act = module.make_demonstrator(args, made, CPU)
    agent = module.load_agent(str(folder), made.single_observation_space, made.single_action_space, CPU)
    obs = np.stack([made.single_observation_space.sample() for _ in range(20)]).clip(-3, 3)
    expected = module.action_map(made.single_action_space)(agent.act(obs, greedy=True))
    assert (act(obs) == expected).all()
    evaluated = checkpoint(folder)["target" if name in ("ddpg", "td3") else "agent"]
    assert all((agent.state_dict()[key] == value).all() for key, value in evaluated.items())
    found = module.train(args)
    assert np.isfinite(found["demonstrator_mean"])


@each_imitation
def test_a_fixed_deviation_of_a_resumed_run(module, tmp_path):
    """The flag of today counts, not what the checkpoint holds; one that is learned goes on from there."""
    for learned in (False, True):
        folder = tmp_path / str(learned)
        given = dict(env_id="test/TaggedBox-v0", learn_std=learned)
        learn(module, folder, **given, log_std_init=-1.0)
        before = checkpoint(folder / "run")["agent"]["log_std"]
        learn(module, folder, **given, log_std_init=-2.0, resume=str(folder / "run"), total_timesteps=1280)
        after = checkpoint(folder / "run")["agent"]["log_std"]
        if learned:
            assert (after > -1.5).all()
            assert not (before == -1).any()
        else:
            assert (after == -2).all()


@bugs(
    ("behavior_cloning", "if not (agent.discrete or args.learn_std):", "if False:"),
    ("dagger", "if not (agent.discrete or args.learn_std):", "if False:"),
)
def test_fixed_deviations_see(request, name, old, new):
    fails_with_a_bug(request, test_a_fixed_deviation_of_a_resumed_run, name, old, new)


@each_imitation
def test_a_loss_that_is_no_number(module, tmp_path):
    """The run ends, and no checkpoint of nonsense is written."""
    with pytest.raises(module.Refusal, match="diverged before step"):
        learn(module, tmp_path, learning_rate=1e38)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


# Files


@each_cloning
def test_files_and_back(module, tmp_path):
    """A run from the file of another run is that run; the layout is Minari's; the first of many are the first."""
    h5py = pytest.importorskip("h5py", reason="requirements-imitation.txt")
    path = tmp_path / "shown.hdf5"
    given = dict(num_demonstrations=12, env_id="test/TaggedBox-v0")
    _, batches, found = learn(module, tmp_path / "one", save_demonstrations=str(path), **given)
    with h5py.File(path) as file:
        assert set(file) == {f"episode_{i}" for i in range(12)}
        rows = [row for row in envs.Tagged.instances[0].log if row["obs"][2] == 4]
        group = file["episode_4"]
        assert set(group) == {"observations", "actions", "rewards", "terminations", "truncations"}
        assert (group.attrs["id"], group.attrs["total_steps"]) == (4, len(rows))
        assert group["observations"][()].tolist() == [[0, t, 4] for t in range(len(rows) + 1)]
        assert group["actions"][()] == pytest.approx(np.stack([row["action"] for row in rows]))
        assert group["terminations"].dtype == group["truncations"].dtype == np.bool_
    _, again, same = learn(module, tmp_path / "two", demonstrations=str(path), **given)
    for one, two in zip(batches, again):
        assert torch.equal(one["obs"], two["obs"])
        assert torch.equal(one["actions"], two["actions"])
    assert same["demonstrator_mean"] == found["demonstrator_mean"]
    _, few, _ = learn(module, tmp_path / "three", demonstrations=str(path), **given | dict(num_demonstrations=3))
    assert {obs[2] for obs in learned(few)} == {0, 1, 2}, "episode_10 and episode_11 come behind episode_2"


@bugs(
    ("behavior_cloning", "key=lambda name: int(name.removeprefix(\"episode_\"))", "key=str"),
    ("behavior_cloning", "for i, episode in enumerate(episodes):", "for i, episode in enumerate(episodes[::-1]):"),
    ("behavior_cloning", "names[:count]", "names[-count:]"),
)  # fmt: skip
def test_files_see(request, name, old, new):
    pytest.importorskip("h5py", reason="requirements-imitation.txt")
    fails_with_a_bug(request, test_files_and_back, name, old, new)


@each_cloning
def test_files_that_are_refused(module, tmp_path):
    """One sentence for each that does not fit; above all for T observations instead of T + 1."""
    h5py = pytest.importorskip("h5py", reason="requirements-imitation.txt")
    path = tmp_path / "shown.hdf5"
    space = OBS
    three = Discrete(3)

    def refused(words, count=2, action_space=three, **changed):
        module.write_episodes(str(path), [episode(0, [1, 2, 3]), episode(1, [1, 2])])
        with h5py.File(path, "a") as file:
            for name, column in changed.items():
                del file["episode_1"][name]
                if column is not None:
                    file["episode_1"][name] = column
        with pytest.raises(module.Refusal, match=words) as error:
            module.read_episodes(str(path), count, space, action_space)
        assert "\n" not in str(error.value)

    refused("episode_1 has 2 observations for 2 rewards, not 3", observations=np.zeros((2, 3)))
    refused("episode_1 has 3 actions for 2 rewards", actions=np.zeros(3, int))
    refused("episode_1 has 0 terminations for 2 rewards", terminations=np.zeros(0, bool))
    refused("holds 2 episodes, fewer than num_demonstrations = 3", count=3)
    refused("cannot be read as demonstrations", rewards=None)
    refused("other observations or actions than", observations=np.zeros((3, 4)))
    refused("other observations or actions than", actions=np.zeros((2, 2)))
    refused("other observations or actions than", action_space=BOX)
    refused(r"actions that are not in Discrete\(2\)", actions=np.array([0, 2]), action_space=Discrete(2))
    module.write_episodes(str(path), [episode(0, [1, 2, 3])])
    with h5py.File(path, "a") as file:
        del file["episode_0"]["observations"]
        file["episode_0"].create_group("observations")["position"] = np.zeros((4, 3))
    with pytest.raises(module.Refusal, match="cannot be read as demonstrations"):
        module.read_episodes(str(path), 1, space, three)
    path.write_bytes(b"no such format")
    with pytest.raises(module.Refusal, match=r"shown.hdf5 cannot be read as demonstrations"):
        module.read_episodes(str(path), 1, space, three)
    with pytest.raises(module.Refusal, match=r"none.hdf5 cannot be read as demonstrations"):
        module.read_episodes(str(tmp_path / "none.hdf5"), 1, space, three)
    with pytest.raises(module.Refusal, match="could not be written"):
        module.write_episodes(str(tmp_path / "none" / "shown.hdf5"), [episode(0, [1])])


@bugs(("behavior_cloning", 'wanted = T + 1 if name == "observations" else T', "wanted = len(episode[name])"))
def test_refused_files_see(request, name, old, new):
    pytest.importorskip("h5py", reason="requirements-imitation.txt")
    fails_with_a_bug(request, test_files_that_are_refused, name, old, new)


@each_cloning
def test_a_missing_package(module, tmp_path, monkeypatch):
    """Files need h5py; nothing else does."""
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(module.Refusal, match=r"a package is missing: .*h5py"):
        learn(module, tmp_path / "one", demonstrations="shown.hdf5")
    with pytest.raises(module.Refusal, match=r"a package is missing: .*h5py"):
        learn(module, tmp_path / "two", save_demonstrations=str(tmp_path / "shown.hdf5"))
    learn(module, tmp_path / "three")


@each_dagger
def test_a_file_cannot_answer(module, tmp_path):
    """DAgger asks; a data set is silent."""
    with pytest.raises(module.Refusal, match=r"shown.hdf5 are neither heuristic nor uniform nor a run's directory"):
        learn(module, tmp_path, demonstrations="shown.hdf5")


@each_imitation
def test_a_finished_run_is_evaluated_again(module, tmp_path, capsys):
    """With the demonstrator's score, which is printed too."""
    module.train(arguments(module, tmp_path / "run"))
    before = result(tmp_path / "run")
    assert f"demonstrations: 2, return {before['demonstrator_mean']:.1f} +- " in capsys.readouterr().out
    again = resume(module, tmp_path / "run")
    assert again["eval_returns"] == before["eval_returns"]
    assert again["demonstrator_mean"] == before["demonstrator_mean"]
