"""The gradient steps of the off-policy scripts, what they log and evaluate, how a run goes on, what they refuse."""

import copy
import weakref

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import make_args, spy
from gymnasium.spaces import Box
from off_policy import bugs, each_off_policy, flat, has_noise, key, learn, lines, resume, scaled, transitions
from runs import fails_with_a_bug, is_continuous, name_of

# The gradient steps


@each_off_policy
@pytest.mark.parametrize(("env", "max_grad_norm"), [("Tagged", 0.05), ("Tagged", 1e6), ("Image", 0.05)])
def test_gradient_step(module, monkeypatch, tmp_path, env, max_grad_norm):
    """First the critics, then the actor up the new critics, then temperature and targets; each moves its part alone.

    Gradients are scaled all together, and only where they are too long. Each step is the first one of Adam, with the
    eps of 1e-5 in DQN and its kin, and with PyTorch's own of 1e-8 elsewhere. Behind a CNN, gradients lie in memory in
    another order than parameters, which the fused optimizers of PyTorch take for the same without a word.
    """
    inputs = []
    gradients = []  # of each step, by name
    agents = []  # before each step and at the end

    def before(_, given):
        names = {parameter: name for name, parameter in inputs[0].named_parameters()}
        gradients.append({names[parameter]: gradient.clone() for parameter, gradient in given.items()})
        agents.append(copy.deepcopy(inputs[0]))

    spy(monkeypatch, module, "critic_loss", lambda *given: inputs.extend([*given, copy.deepcopy(given[1])]))
    spy(monkeypatch, module, "descend", before)
    given = dict(train_frequency=3, total_timesteps=33, policy_frequency=1, target_network_frequency=1000, tau=0.3)
    learn(module, tmp_path, env, learning_rate=0.01, max_grad_norm=max_grad_norm, **given)
    agent, target, batch, *rest, old_target = inputs  # rest: what else a loss needs, as noise and args
    agents.append(agent)

    def entropy():
        return module.actor_loss(agents[1], batch)[1]["entropy"]

    losses = [lambda: module.critic_loss(agents[0], old_target, batch, *rest)[0]]
    owners = [""]
    if is_continuous(module):
        losses.append(lambda: module.actor_loss(agents[1], batch)[0])
        owners = ["critic", "actor"]
    if has_noise(module):
        losses.append(lambda: agents[2].log_alpha.exp() * (entropy() + batch["actions"].shape[-1]))
        owners.append("log_alpha")
    assert len(gradients) == len(losses)

    eps = 1e-8 if is_continuous(module) else 1e-5
    for i, owner in enumerate(owners):
        old = dict(agents[i].named_parameters())
        new = dict(agents[i + 1].named_parameters())
        own = {name: parameter for name, parameter in old.items() if name.startswith(owner)}
        assert gradients[i].keys() == own.keys()
        expected = flat(torch.autograd.grad(losses[i](), own.values()))
        if not is_continuous(module):
            assert expected.norm() > 0.05
            expected *= min(1, max_grad_norm / expected.norm().item())
        g = flat(gradients[i].values())
        torch.testing.assert_close(g, expected, atol=1e-6, rtol=1e-3)
        moved = flat(new[name] - old[name] for name in own)
        torch.testing.assert_close(moved, -0.01 * g / (g.abs() + eps), atol=2e-7, rtol=1e-4)
        assert all(torch.equal(new[name], old[name]) for name in old.keys() - own.keys())

    new = dict(agent.named_parameters())
    old = dict(old_target.named_parameters())
    for name, parameter in target.named_parameters():
        follows = name.startswith("critic") or (name.startswith("actor") and not has_noise(module))
        expected = 0.3 * new[name] + 0.7 * old[name] if follows else old[name]
        torch.testing.assert_close(parameter, expected.detach(), atol=1e-7, rtol=1e-6)


TOGETHER = """descend(critic_optimizer, gradients)
            {0} = actor_gradients(agent, batch)
            descend(actor_optimizer, gradients)"""
OLD_CRITIC = """first = gradients
            {0} = actor_gradients(agent, batch)
            descend(critic_optimizer, first)
            descend(actor_optimizer, gradients)"""
GET = "gradients, actor_metrics"
FOLLOW = "polyak_update(target, agent, args.tau)"


@bugs(
    ("dqn", "eps=1e-5, ", ""),
    ("dqn", "eps=1e-5, ", "eps=1e-8, "),
    ("dueling_dqn", "eps=1e-5, ", "eps=1e-4, "),
    ("dqn", ", max_norm=args.max_grad_norm", ""),
    ("dqn", "nn.utils.get_total_norm(gradients, foreach=False)", "gradients[0].norm()"),
    ("dqn", "Adam(agent.parameters(),", "Adam(agent.q[:3].parameters(),"),
    ("ddpg", "Adam(agent.critic.parameters(),", "Adam(agent.critic.parameters(), eps=1e-5,"),
    ("td3", "Adam(critic_parameters,", "Adam(critic_parameters, eps=1e-5,"),
    ("sac", "Adam(agent.actor.parameters(),", "Adam(agent.actor.parameters(), eps=1e-5,"),
    ("sac", "Adam([agent.log_alpha],", "Adam([agent.log_alpha], eps=1e-2,"),
    ("ddpg", "Adam(agent.actor.parameters(),", "Adam(agent.parameters(),"),
    ("td3", "Adam(agent.actor.parameters(),", "Adam(agent.parameters(),"),
    ("sac", "Adam(agent.actor.parameters(),", "Adam(agent.parameters(),"),
    ("sac", "Adam([agent.log_alpha],", "Adam(agent.parameters(),"),
    ("ddpg", TOGETHER.format(GET), OLD_CRITIC.format(GET)),
    ("sac", TOGETHER.format(GET), OLD_CRITIC.format(GET)),
    ("td3", "[*agent.critic1.parameters(), *agent.critic2.parameters()]", "[*agent.critic1.parameters()]"),
    ("sac", 'metrics["entropy"], -D', 'metrics["entropy"], D'),
    ("sac", 'metrics["entropy"], -D', 'metrics["entropy"], -D / 2'),
    ("sac", "descend(temperature_optimizer, gradients)", "pass"),
    ("ddpg", FOLLOW, "polyak_update(target, agent, 1 - args.tau)"),
    ("ddpg", FOLLOW, "polyak_update(agent, target, args.tau)"),
    ("ddpg", FOLLOW, "polyak_update(target.critic, agent.critic, args.tau)"),
    ("td3", FOLLOW, "pass"),
    ("td3", FOLLOW, "polyak_update(target.critic1, agent.critic1, args.tau)"),
    ("sac", "polyak_update(target.critic2, agent.critic2, args.tau)", "pass"),
    ("sac", "polyak_update(target.critic2, agent.critic2", "polyak_update(target.critic2, agent.critic1"),
)
def test_gradient_step_sees(request, name, old, new):
    fails_with_a_bug(request, test_gradient_step, name, old, new, env="Tagged", max_grad_norm=0.05)


@bugs(("dqn", "(max_norm / (norm + 1e-6)).clamp(max=1)", "max_norm / (norm + 1e-6)"))
def test_step_down_a_short_gradient_sees(request, name, old, new):
    fails_with_a_bug(request, test_gradient_step, name, old, new, env="Tagged", max_grad_norm=1e6)


@bugs(
    ("dqn", "if gradient.stride() != parameter.stride():", "if False:"),
    ("sac", "if gradient.stride() != parameter.stride():", "if False:"),
)
def test_step_behind_a_cnn_sees(request, name, old, new):
    fails_with_a_bug(request, test_gradient_step, name, old, new, env="Image", max_grad_norm=0.05)


# What is logged and evaluated


@each_off_policy
def test_metrics(module, monkeypatch, tmp_path):
    """A line of the log has means over the last 100 gradient steps since the line before, if they have the metric.

    Found: means over other steps; tensors kept by the thousand, which fragment memory.
    """
    history = []  # of each gradient step
    tensors = []
    logged = []

    def remember(output, *_):
        metrics = output[1]
        if "critic_loss" in metrics:
            history.append({})
        history[-1] |= {name: value.mean().item() for name, value in metrics.items()}
        tensors.extend(weakref.ref(value) for value in metrics.values())
        assert sum(tensor() is not None for tensor in tensors) <= 110 * 5

    def check(_, step, metrics):
        names = {name for row in history for name in row}
        expected = {name: np.mean([row[name] for row in history[-100:] if name in row]) for name in names}
        others = metrics.keys() - {"epsilon", "mean_sigma"}
        assert {name: metrics[name] for name in others} == pytest.approx(expected, rel=1e-4)
        assert ("epsilon" in metrics) == hasattr(module.Args, "end_e")
        assert ("mean_sigma" in metrics) != ("epsilon" in metrics or is_continuous(module))
        logged.append((step, len(history)))
        history.clear()

    for name in {"critic_loss", "actor_loss", "temperature_loss"} & set(vars(module)):
        spy(monkeypatch, module, name, after=remember)
    spy(monkeypatch, module.Run, "log", check)
    learn(module, tmp_path, log_every=270, policy_frequency=3)
    assert logged == [(270, 240), (300, 30)]


@bugs(
    ("dqn", "deque(maxlen=100)", "[]"),
    ("td3", "deque(maxlen=100)", "deque(maxlen=1000)"),
    ("sac", "deque(maxlen=100)", "deque(maxlen=99)"),
    ("dqn", "            history.clear()\n", ""),
    ("td3", "torch.stack(column).mean()", "column[-1]"),
    ("td3", "torch.stack(column).mean()", "(sum(column) / len(history))"),
    ("ddpg", "history.append(metrics | actor_metrics)", "history.append(metrics); history.append(actor_metrics)"),
)
def test_metrics_see(request, name, old, new):
    fails_with_a_bug(request, test_metrics, name, old, new)


@each_off_policy
def test_log_and_evaluation(module, monkeypatch, tmp_path):
    """Returns of clipped rewards in the log, episodes lost or cut in two by a line of it.

    Also an evaluation that explores, skips the scaling or is of another policy than the docstring says: TD3 and DDPG
    evaluate mu', an average of mu, the others the policy itself.
    """
    given = dict(end_e=1.0, target_network_frequency=70)
    agents = []
    spy(monkeypatch, module, "evaluate", lambda agent, *_: agents.append(agent))
    result = learn(module, tmp_path, clip_reward=True, log_every=10, eval_episodes=3, **given)
    log = lines(tmp_path)
    assert [line["global_step"] for line in log] == [*range(9, 300, 9), 300]
    trained = envs.Tagged.instances[:3]
    evaluated = envs.Tagged.instances[3:]
    rows = [(env, row) for env in trained for row in env.log if row["terminated"] or row["truncated"]]
    ends = [(3 * (row["t"] + 1), env.returns[key(row["obs"])[2]]) for env, row in rows]
    last = 0
    for line in log:
        returns = [total for step, total in ends if last < step <= line["global_step"]]
        assert line["episodes"] == len(returns)
        assert line["episodic_return"] == (pytest.approx(np.mean(returns)) if returns else None)
        last = line["global_step"]

    assert result["eval_returns"] == pytest.approx([env.returns[0] for env in evaluated])
    saved = torch.load(tmp_path / "run" / "checkpoint.pt")
    part = "target" if name_of(module) in ("ddpg", "td3") else "agent"
    other = dict(agent="target", target="agent")[part]
    state = agents[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in saved[part].items())
    assert not all(torch.equal(state[name], value) for name, value in saved[other].items())
    for env in evaluated:
        actions = agents[0].act(np.stack([row["obs"] for row in env.log]), greedy=True)
        expected = scaled(actions, env.action_space) if is_continuous(module) else actions
        assert np.stack([row["action"] for row in env.log]) == pytest.approx(expected, abs=1e-4)


@bugs(
    ("dqn", "evaluate(agent, args, run.dir)", "evaluate(target, args, run.dir)"),
    ("ddpg", "evaluate(target, args, run.dir)", "evaluate(agent, args, run.dir)"),
    ("td3", "evaluate(target, args, run.dir)", "evaluate(agent, args, run.dir)"),
    ("sac", "evaluate(agent, args, run.dir)", "evaluate(target, args, run.dir)"),
    ("td3", "agent.act(obs, greedy=True)", "agent.act(obs)"),
    ("dqn", "agent.act(obs, greedy=True)", "agent.act(obs)"),
    ("td3", "score = score * valid + reward", "score = score + reward"),
    ("dqn", "score = score * valid + reward", "score = score * valid + reward.clip(-1, 1)"),
    ("td3", "returns += rewards * running", "returns += rewards"),
    ("td3", "run.episode_returns += score[done].tolist()", "run.episode_returns += score[terminated].tolist()"),
)
def test_log_and_evaluation_see(request, name, old, new):
    fails_with_a_bug(request, test_log_and_evaluation, name, old, new)


# How a run goes on


@each_off_policy
@pytest.mark.parametrize("save_buffer", [False, True])
def test_resume(module, monkeypatch, tmp_path, save_buffer):
    """Optimizers that start afresh, a buffer that comes back empty, learning before an empty one is filled.

    Also: random actions while it is filled, and a transition from the last observation into the new episode.
    """
    given = dict(save_buffer=save_buffer, buffer_size=99, batch_size=8, n_steps=1)
    batches = []
    filled = []  # gradient steps that each step of the environments found done
    acting = []
    before = {}  # the states of the optimizers, in the order of their steps
    after = {}  # the same before their first steps in the resumed run

    with monkeypatch.context() as patch:
        spy(patch, module, "descend", after=lambda _, optimizer, *rest: before.setdefault(optimizer))
        learn(module, tmp_path, **given)
    assert bool(torch.load(tmp_path / "run" / "checkpoint.pt")["buffer"]) == save_buffer

    def remember(optimizer, _):
        if optimizer not in after:
            after[optimizer] = copy.deepcopy(optimizer.state_dict()["state"])

    spy(monkeypatch, module, "critic_loss", lambda *inputs: batches.append(inputs[2]))
    spy(monkeypatch, module, "descend", remember)
    spy(monkeypatch, module.ReplayBuffer, "add", lambda *_: filled.append(len(batches)))
    spy(monkeypatch, module.Agent, "act", lambda *_, **__: acting.append(len(filled)))
    resume(module, tmp_path, **given)

    for optimizer, restored in zip(before, after.values(), strict=True):
        saved = optimizer.state_dict()["state"]
        assert restored.keys() == saved.keys() != set()
        for number, tensors in saved.items():
            assert all(torch.equal(restored[number][name], tensor) for name, tensor in tensors.items())
    assert acting[:100] == [*range(100)]
    assert filled == ([3 * j for j in range(100)] if save_buffer else [0] * 11 + [3 * j for j in range(1, 90)])
    true = transitions()
    obs = torch.cat([batch["obs"] for batch in batches]).numpy()
    next_obs = torch.cat([batch["next_obs"] for batch in batches]).numpy()
    assert (next_obs == np.stack([true[key(row)]["next_obs"] for row in obs])).all()
    old = (obs[:, 0] < 3).sum()  # of the environments of the first run
    assert old > 50 if save_buffer else old == 0


RESUMED = "    if len(buffer) == 0:\n"


@bugs(
    ("dqn", RESUMED, "    if True:\n"),
    ("dqn", "args.save_buffer)\n", "False)\n"),
    ("dqn", "optimizer=optimizer, buffer", "buffer"),
    ("td3", "critic_optimizer=critic_optimizer, actor", "actor"),
    ("sac", "        temperature_optimizer=temperature_optimizer, buffer", "        buffer"),
    ("td3", "self.valid[row - 1] = False", "pass"),
)
def test_resume_with_the_buffer_sees(request, name, old, new):
    fails_with_a_bug(request, test_resume, name, old, new, save_buffer=True)


@bugs(
    ("dqn", RESUMED, "    if False:\n"),
    ("dqn", "args.save_buffer)\n", "True)\n"),
    ("td3", "if step <= args.learning_starts:", "if step <= learn_after:"),
)
def test_resume_without_the_buffer_sees(request, name, old, new):
    fails_with_a_bug(request, test_resume, name, old, new, save_buffer=False)


# What is refused, and the least that is not


def unbounded(low, high):
    """The environment Tagged with such a Box of two actions."""
    env = envs.Tagged(continuous=True)
    env.action_space = Box(np.float32(low), np.float32(high))
    return env


INF = np.inf
for _name, _bounds in dict(Free=([-INF] * 2, [INF] * 2), HalfFree=([-1, -1], [1, INF])).items():
    gym.register(f"test/{_name}-v0", unbounded, kwargs=dict(low=_bounds[0], high=_bounds[1]))


@each_off_policy
@pytest.mark.parametrize("env_id", ["test/Tagged-v0", "test/TaggedBox-v0", "test/Free-v0", "test/HalfFree-v0"])
def test_actions_that_are_refused(module, tmp_path, env_id):
    """One sentence with the space, before anything is written: by DQN and its kin Boxes, by others all without bounds.

    Actions in [-1, 1] cannot be scaled to bounds that are not there: they would reach a part of the space alone.
    """
    if env_id == ("test/TaggedBox-v0" if is_continuous(module) else "test/Tagged-v0"):
        learn(module, tmp_path, env_id=env_id)
        return
    kind = "a Box with bounds" if is_continuous(module) else "Discrete"
    with pytest.raises(
        module.Refusal, match=rf"^action space (Box|Discrete)\(.*\) is not supported: it must be {kind}$"
    ):
        learn(module, tmp_path, env_id=env_id)
    assert not (tmp_path / "run").exists()


@bugs(
    ("ddpg", " and action_space.is_bounded()", ""),
    ("td3", "action_space.is_bounded()", 'action_space.is_bounded("below")'),
    ("sac", "action_space.is_bounded()", "action_space.bounded_above.any()"),
)
def test_refusals_see(request, name, old, new):
    fails_with_a_bug(request, test_actions_that_are_refused, name, old, new, env_id="test/HalfFree-v0")


@each_off_policy
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_starts", 300),
        ("buffer_size", 5),
        ("end_e", 1.1),
        ("exploration_fraction", -0.1),
        ("train_frequency", 0),
        ("target_network_frequency", 0),
        ("policy_frequency", 0),
        ("tau", 1.1),
        ("exploration_noise", -0.1),
        ("policy_noise", -1.0),
        ("noise_clip", -0.5),
    ],
)
def test_impossible_values(module, tmp_path, name, value):
    """Values that leave nothing to learn from, or that divide by zero in the middle of a run."""
    if hasattr(module.Args, name):
        with pytest.raises(module.Refusal, match=f"{name} .*{value}"):
            make_args(module, tmp_path, **dict(num_envs=3, total_timesteps=300, learning_starts=30) | {name: value})


@each_off_policy
@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_smallest_buffer_and_batch(module, tmp_path, num_envs):
    """A buffer of two steps, of which one may be a reset, is never empty, also in a resumed run."""
    given = dict(num_envs=num_envs, buffer_size=2 * num_envs, batch_size=1, learning_starts=1, save_buffer=True)
    learn(module, tmp_path, total_timesteps=61, **given)
    resume(module, tmp_path, **given | dict(total_timesteps=122))
