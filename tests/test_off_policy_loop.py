"""train() of the off-policy scripts: from what, when and how they learn, what they log, and how they go on."""

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import spy
from gymnasium.spaces import Box, Discrete
from off_policy import (
    bugs,
    check_acting,
    critic_parameters,
    each_continuous,
    each_off_policy,
    each_q_learning,
    flat,
    key,
    learn,
    lines,
    resume,
    scaled,
    transitions,
)
from runs import fails_with_a_bug, is_continuous, name_of, planted, script


class TaggedOther(envs.Tagged):
    """Actions of another form: numbers that do not start at 0, or a Box with two axes and bounds that all differ."""

    def __init__(self, continuous=False):
        super().__init__(continuous)
        numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
        self.action_space = Box(-numbers - 1, numbers**2 + 1) if continuous else Discrete(3, start=-1)


for _kind in ("", "Box"):
    _continuous = dict(continuous=_kind == "Box")
    gym.register(f"test/TaggedOther{_kind}-v0", TaggedOther, kwargs=_continuous, order_enforce=False)
gym.register("test/TaggedNativeBox-v0", vector_entry_point=envs.Native, kwargs=dict(continuous=True))


# From what


@each_off_policy
@pytest.mark.parametrize("env", ["Tagged", "TaggedNative", "TaggedOther"])
def test_learned_rows_are_exactly_the_transitions(module, monkeypatch, tmp_path, env):
    """Reset steps learned from, fields of different steps side by side, actions in the environment's units.

    Also: a Box of two axes taken for one, noise shared by rows, dimensions or steps; all that happened is learned from.
    """
    batches = []
    spy(
        monkeypatch, module, "critic_loss", lambda *inputs: batches.append({k: x.numpy() for k, x in inputs[2].items()})
    )
    clipped = env == "TaggedNative" and not is_continuous(module)
    learn(module, tmp_path, env, total_timesteps=420, train_frequency=2, clip_reward=clipped, n_steps=1)
    true = transitions()
    space = envs.Tagged.instances[0].action_space
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    keys = [key(obs) for obs in columns["obs"]]
    seen = set(keys)
    assert seen <= true.keys(), "a row that never was"
    expected = {name: np.stack([true[k][name] for k in keys]) for name in true[keys[0]]}
    if is_continuous(module):
        assert abs(columns["actions"]).max() <= 1
        actions = scaled(columns["actions"], space)
    else:
        actions = columns["actions"] + space.start
    np.testing.assert_allclose(actions, expected["action"], atol=1e-5)
    rewards = np.clip(expected["reward"], -1, 1) if clipped else expected["reward"]
    np.testing.assert_allclose(columns["rewards"], rewards, rtol=1e-5)
    assert (columns["next_obs"] == expected["next_obs"]).all()
    assert (columns["terminated"] == expected["terminated"]).all()
    assert len({batch["obs"].tobytes() for batch in batches}) == len(batches), "a batch that is learned from twice"
    early = {obs for obs, row in true.items() if obs[0] < 3 and row["t"] < 60}
    assert early <= seen
    kinds = {(true[obs]["terminated"], true[obs]["truncated"]) for obs in seen}
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}

    names = dict(td3=["noise"], sac=["noise", "next_noise"]).get(name_of(module), [])
    assert [name for name in batches[0] if "noise" in name] == names
    if names:
        noise = np.stack([batch[name] for batch in batches for name in names])
        assert noise.shape == (195 * len(names), 16, space.shape[0] if len(space.shape) == 1 else 6)
        assert len(np.unique(noise)) > 0.99 * noise.size
        assert abs(noise.mean()) < 0.05
        assert abs(noise.std() - 1) < 0.05


VALID = "valid = ~done  #"
ADD = "buffer.add(action, reward, terminated, valid, obs)"
NEXT = "self.obs[(rows + 1) % self.num_rows, env_ids]"
SAMPLE = "batch = buffer.sample(args.batch_size, device)"
NOISE = 'batch["noise"] = torch.randn(args.batch_size, D, device=device)'


@bugs(
    ("dqn", VALID, "valid = ~done | True  #"),
    ("dqn", ADD, "buffer.add(action, reward, done, valid, obs)"),
    ("dqn", ADD, "buffer.add(action, reward, terminated & ~truncated, valid, obs)"),
    ("dqn", ADD, "buffer.add(action * 0, reward, terminated, valid, obs)"),
    ("dqn", NEXT, "self.obs[rows, env_ids]"),
    ("dqn", SAMPLE, f"if t % 4 or not history:\n                    {SAMPLE}"),
    ("ddpg", VALID, "valid = ~done | True  #"),
    ("ddpg", ADD, "buffer.add(action, reward, done, valid, obs)"),
    ("ddpg", ADD, "buffer.add(to_env(action), reward, terminated, valid, obs)"),
    ("ddpg", "scaled = low + (actions + 1)", "scaled = low[0] + (actions + 1)"),
    ("ddpg", "* ((high - low) / 2)", "* high"),
    ("td3", NOISE, NOISE.replace("args.batch_size, D,", "1, D,") + ".repeat(args.batch_size, 1)"),
    ("td3", NOISE, NOISE.replace("args.batch_size, D,", "args.batch_size, 1,") + ".repeat(1, D)"),
    ("sac", NOISE, NOISE.replace("args.batch_size, D,", "1, D,") + ".repeat(args.batch_size, 1)"),
)
def test_rows_see(request, name, old, new):
    fails_with_a_bug(request, test_learned_rows_are_exactly_the_transitions, name, old, new, env="Tagged")


@bugs(("dqn", "return lambda actions: actions + space.start", "return lambda actions: actions"))
def test_rows_with_another_start_see(request, name, old, new):
    fails_with_a_bug(request, test_learned_rows_are_exactly_the_transitions, name, old, new, env="TaggedOther")


@bugs(
    ("ddpg", "D = gym.spaces.flatdim(action_space)", "D = action_space.shape[0]"),
    ("sac", "        actions = actions.reshape(-1, *space.shape)\n", ""),
)
def test_rows_of_two_axes_see(name, old, new, monkeypatch, tmp_path):
    module = planted(script(name), old, new, tmp_path / "planted")
    with pytest.raises(ValueError, match=r"zip|broadcast"):
        test_learned_rows_are_exactly_the_transitions(module, monkeypatch, tmp_path, "TaggedOther")


@each_q_learning
def test_the_network_that_learns_acts_on_what_it_sees(module, monkeypatch, tmp_path):
    """Actions of the target network, or for the observations of the step before or of another environment."""
    acting = []
    agents = set()
    learning = set()

    def remember(actions, agent, obs, *_):
        if len(acting) < 100:  # the rest is the evaluation
            acting.append((obs.copy(), actions))
            agents.add(agent)

    spy(monkeypatch, module.Agent, "act", after=remember)
    spy(monkeypatch, module, "critic_loss", lambda agent, *_: learning.add(agent))
    monkeypatch.setattr(module, "evaluate", lambda *_: dict(eval_returns=[0.0], eval_cut=0))
    learn(module, tmp_path)
    assert agents == learning
    check_acting(acting)


ACT = "action = agent.act(obs)"


@bugs(
    ("dqn", ACT, "target.epsilon = agent.epsilon; action = target.act(obs)"),
    ("noisy_dqn", ACT, "action = target.act(obs)"),
    ("dqn", ACT, "action = agent.act(np.roll(obs, 1, 0))"),
    ("dqn", ACT, "action = agent.act(buffer.obs[int(buffer.t) % buffer.num_rows - 1])"),
    ("rainbow", ACT, "action = agent.act(obs)[::-1]"),
)
def test_acting_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_network_that_learns_acts_on_what_it_sees, name, old, new)


@each_continuous
def test_actions_are_uniform_until_learning_starts(module, monkeypatch, tmp_path):
    """A policy that has not learned yet, asked too early or never; actions that do not fill the bounds."""
    acting = []
    spy(monkeypatch, module.Agent, "act", lambda *_, **__: acting.append(envs.Tagged.instances[0].t))
    learn(module, tmp_path, learning_starts=2700, total_timesteps=3000, train_frequency=50)
    assert acting[:100] == [*range(900, 1000)]  # 900 vector steps of 3, reset steps among them
    rows = [row["action"] for env in envs.Tagged.instances[:3] for row in env.log if row["t"] < 900]
    space = envs.Tagged.instances[0].action_space
    shares = (np.stack(rows) - space.low) / (space.high - space.low)
    assert len(rows) > 1800
    assert np.sort(shares, 0) == pytest.approx(np.linspace([0, 0], [1, 1], len(rows)), abs=0.06)  # Kolmogorov-Smirnov
    assert abs(np.corrcoef(shares.T)[0, 1]) < 0.1


@bugs(
    ("td3", "if step <= args.learning_starts:", "if step < args.learning_starts:"),
    ("td3", "if step <= args.learning_starts:", "if step <= 2 * args.learning_starts:"),
    ("td3", "2 * torch.rand(N, D)", "torch.rand(N, D)"),
    ("td3", "torch.rand(N, D).numpy()", "torch.rand(N, 1).numpy().repeat(D, 1)"),
)
def test_uniform_actions_see(request, name, old, new):
    fails_with_a_bug(request, test_actions_are_uniform_until_learning_starts, name, old, new)


# When


def networks(agent, target) -> dict:
    """The parameters as vectors."""
    parts = dict(agent=agent.parameters(), critic=critic_parameters(agent), target=target.parameters())
    if hasattr(agent, "actor"):
        parts["actor"] = agent.actor.parameters()
    return {name: flat(parameters) for name, parameters in parts.items()}


def watch(module, folder, **given):
    """Train; the networks before each gradient step and at the end, and how many such steps each add() found done."""
    states = []
    counts = []
    last = []

    def before(agent, target, *_):
        last[:] = agent, target
        states.append(networks(agent, target))
        assert not any(parameter.requires_grad for parameter in target.parameters())

    with pytest.MonkeyPatch.context() as patch:
        spy(patch, module, "critic_loss", before)
        spy(patch, module.ReplayBuffer, "add", lambda *_: counts.append(len(states)))
        spy(patch, module, "evaluate", lambda *_: states.append(networks(*last)))
        learn(module, folder, **given)
    return states, counts


@each_off_policy
@pytest.mark.parametrize(("N", "k", "f"), [(1, 2, 6), (3, 2, 7), (8, 3, 2), (3, 4, 70)])
def test_periods(module, tmp_path, N, k, f):
    """Gradient steps at each multiple of k beyond learning_starts, whatever N is; of TD3 every f-th moves the policy.

    The target of DQN and its kin is copied at each multiple of f, also where no gradient is taken; those of the others
    follow with every step of the policy. All this goes on at the same steps in a resumed run, from the same networks.
    Found: periods that meet at their least common multiple, that are rounded away with several environments, or that
    begin anew; a target that is the network itself, or after --resume that of the start.
    """
    end = 0
    final = None
    for total in (250, 500):
        start = end
        end = total // N * N
        given = dict(num_envs=N, train_frequency=k, policy_frequency=f, target_network_frequency=f)
        given |= dict(resume=str(tmp_path / "run")) if start else {}
        states, counts = watch(module, tmp_path, total_timesteps=total, **given)
        times = [t for t in range(start + 31, end + 1) if t % k == 0]
        assert len(states) == len(times) + 1
        assert counts == [sum(t <= start + N * j for t in times) for j in range((end - start) // N)]
        first = states[0]
        if not final:
            assert torch.equal(first["target"], first["agent"])
            final = first
        assert torch.equal(first["agent"], final["agent"])
        check_critics(states)
        if is_continuous(module):
            check_delay(states, [t // k for t in times], f if hasattr(module.Args, "policy_frequency") else 1)
            assert torch.equal(first["target"], final["target"])
        else:
            check_copies(states, times, f, start, end, final["target"])
        final = states[-1]


def check_critics(states):
    """Every gradient step moves the critics."""
    for before, after in zip(states, states[1:]):
        assert not torch.equal(before["critic"], after["critic"])


def check_delay(states, updates, period):
    """Gradient steps whose number is a multiple of the period move policy and targets, others do not."""
    for name in ("actor", "target"):
        moved = [not torch.equal(before[name], after[name]) for before, after in zip(states, states[1:])]
        assert moved == [number % period == 0 for number in updates], name


def check_copies(states, times, period, start, end, held):
    """At each step the target is what the network was after the last multiple of the period."""
    for time, state in zip([*times, end + 1], states):
        last = (time - 1) // period * period  # a copy at this very time comes after the gradient step
        expected = states[sum(t <= last for t in times)]["agent"] if last > start else held
        assert torch.equal(state["target"], expected), time


COPY = "if t % args.target_network_frequency == 0:"
LEARN = "if t > learn_after and t % args.train_frequency == 0:"
SKIP = "if t <= learn_after or t % args.train_frequency != 0:"
EACH = "for t in range(step - N + 1, step + 1):"
UPDATES = "updates = t // args.train_frequency"
DELAY = "if updates % args.policy_frequency == 0:"
SHIFTED = "(t - learn_after + args.learning_starts)"  # the same until the run is resumed


@bugs(
    ("dqn", COPY, "if t % args.train_frequency == t % args.target_network_frequency == 0:"),
    ("dqn", COPY, "if step % args.target_network_frequency == 0:"),
    ("dqn", COPY, "if step // args.train_frequency % args.target_network_frequency == 0:"),
    ("dqn", COPY, "if step // N % args.target_network_frequency == 0:"),
    ("dueling_dqn", COPY, f"if {SHIFTED} % args.target_network_frequency == 0:"),
    ("dqn", "target.load_state_dict(agent.state_dict())", "target = agent"),
    ("dqn", "target.load_state_dict(agent.state_dict())", "pass"),
    ("dqn", "copy.deepcopy(agent).requires_grad_(False)", "copy.deepcopy(agent)"),
    ("dqn", LEARN, "if t > learn_after and step % args.train_frequency == 0:"),
    ("dqn", LEARN, "if t > learn_after and step // N % args.train_frequency == 0:"),
    ("dqn", LEARN, "if t >= learn_after and t % args.train_frequency == 0:"),
    ("dqn", EACH, "for t in (step,):"),
    ("dqn", EACH, "for t in range(step - N, step):"),
    ("ddpg", SKIP, "if t <= learn_after or step % args.train_frequency != 0:"),
    ("ddpg", SKIP, "if t < learn_after or t % args.train_frequency != 0:"),
    ("ddpg", EACH, "for t in (step,):"),
    ("ddpg", EACH, "for t in range(step - N, step):"),
    ("ddpg", "agent=agent, target=target", "agent=agent, target=agent"),
    ("td3", "agent=agent, target=target", "agent=agent, target=copy.deepcopy(agent)"),
    ("ddpg", "copy.deepcopy(agent).requires_grad_(False)", "copy.deepcopy(agent)"),
    ("td3", "copy.deepcopy(agent).requires_grad_(False)", "agent"),
    ("td3", DELAY, "if step // N % args.policy_frequency == 0:"),
    ("td3", DELAY, "if (updates - 1) % args.policy_frequency == 0:"),
    ("td3", DELAY, "if updates % 2 == 0:"),
    ("td3", UPDATES, f"updates = {SHIFTED} // args.train_frequency"),
    ("sac", "agent=agent, target=target", "agent=agent, target=agent"),
)
def test_periods_see(request, name, old, new):
    fails_with_a_bug(request, test_periods, name, old, new, N=3, k=2, f=7)


@each_q_learning
def test_the_target_is_the_whole_network(module, monkeypatch, tmp_path):
    """A copy of the last layers alone, on top of the convolutions of the start."""
    networks = []
    spy(monkeypatch, module, "critic_loss", lambda agent, target, *_: networks.append((agent, target)))
    learn(module, tmp_path, "Image", total_timesteps=60, target_network_frequency=60)
    agent, target = networks[-1]
    assert torch.equal(flat(agent.parameters()), flat(target.parameters()))


@bugs(("dqn", "target.load_state_dict(agent.state_dict())", "target.q.load_state_dict(agent.q.state_dict())"))
def test_target_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_target_is_the_whole_network, name, old, new)


@bugs(("td3", DELAY, "if t % args.policy_frequency == 0:"), ("td3", DELAY, "if updates % args.policy_frequency == 1:"))
def test_even_periods_see(request, name, old, new):
    fails_with_a_bug(request, test_periods, name, old, new, N=1, k=2, f=6)


@bugs(
    ("dqn", "copy.deepcopy(agent).requires", "Agent(obs_space, int(action_space.n), args).requires"),
    ("dqn", "agent=agent, target=target", "agent=agent, target=agent"),
    ("double_dqn", "agent=agent, target=target", "agent=agent, target=copy.deepcopy(agent)"),
    ("dueling_dqn", "agent=agent, target=target,", "agent=agent,"),
)
def test_long_periods_see(request, name, old, new):
    fails_with_a_bug(request, test_periods, name, old, new, N=3, k=4, f=70)


@each_q_learning
@pytest.mark.parametrize("anneal_lr", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_schedules(module, monkeypatch, tmp_path, anneal_lr, fraction):
    """Epsilon and step size by the environment steps so far, whatever the number of environments, also resumed."""
    has_epsilon = hasattr(module.Args, "end_e")
    given = dict(start_e=0.8, end_e=0.2, exploration_fraction=fraction, anneal_lr=anneal_lr, learning_rate=0.01)
    given |= dict(train_frequency=3, noisy=False)
    acting = []
    rates = []
    spy(monkeypatch, module.Agent, "act", lambda agent, *_, **__: acting.append(getattr(agent, "epsilon", None)))
    spy(monkeypatch, module, "descend", lambda optimizer, _: rates.append(optimizer.param_groups[0]["lr"]))

    def check(total, start):
        expected = [0.8 - 0.6 * min(t / (total * fraction), 1) if fraction else 0.2 for t in range(start, total, 3)]
        assert acting[:100] == (pytest.approx(expected) if has_epsilon else [None] * 100)
        times = range(start + 30, total, 3)
        assert rates == pytest.approx([0.01 * (1 - t / total if anneal_lr else 1) for t in times], rel=1e-5)
        assert lines(tmp_path)[-1].get("epsilon") == (pytest.approx(expected[-1]) if has_epsilon else None)

    learn(module, tmp_path, total_timesteps=300, **given)
    check(300, 0)
    acting.clear()
    rates.clear()
    resume(module, tmp_path, **given)
    check(600, 300)


@bugs(
    ("dqn", "progress = (step - N) /", "progress = step /"),
    ("dqn", "progress = (step - N) /", "progress = (step - N) // N /"),
    ("dqn", "anneal(optimizer, 1 - progress)", "anneal(optimizer, progress)"),
    ("dqn", "share * group.setdefault", "group.setdefault"),
)
def test_schedules_see(request, name, old, new):
    fails_with_a_bug(request, test_schedules, name, old, new, anneal_lr=True, fraction=0.5)
