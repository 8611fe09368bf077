"""What all policy-gradient scripts have in common, tested in each of them: policy, schedules, gradients, statistics."""

from collections import defaultdict

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MODULES, is_imitation, learner_name, loss_name, make_args, spy
from gymnasium.spaces import Box, Discrete
from off_policy import bugs
from runs import each, fails_with_a_bug, name_of, resume

POLICY_GRADIENT = [module for module in MODULES if hasattr(module, "RunningNorm") and not is_imitation(module)]
OBS = Box(-np.inf, np.inf, (5,), np.float32)
BOX = Box(np.float32([-1, -3]), np.float32([2, 0.5]))
each_script = each(POLICY_GRADIENT)


def each_with(*flags):
    """Run the test once for each of these scripts that has the flags."""
    return each([module for module in POLICY_GRADIENT if all(hasattr(module.Args, flag) for flag in flags)])


def learn(module, monkeypatch, folder, **given):
    """Train on a Tagged environment, 16 steps of 3 of them per iteration."""
    monkeypatch.setattr(envs.Tagged, "instances", [])
    plain = dict(env_id="test/Tagged-v0", num_envs=3, num_steps=16, total_timesteps=3 * 16 * 8, update_epochs=1)
    plain |= dict(num_minibatches=2, learning_rate=1e-2, critic_learning_rate=1e-2)
    module.train(make_args(module, folder, **(plain | given)))


def spy_batches(monkeypatch, module, before):
    """Let before(agent, batch, function) see every batch that the functions of batches get; the learner's is whole."""
    for name in {learner_name(module), loss_name(module)}:

        def watch(agent, *inputs, name=name):
            (batch,) = [x for x in inputs if isinstance(x, dict)]
            before(agent, batch, name)

        spy(monkeypatch, module, name, watch)


# The policy


def make_agent(module, space, obs_space=OBS, **given):
    """An agent whose policy is far from uniform and whose deviations differ."""
    agent = module.Agent(obs_space, space, module.Args(**given))
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300 if agent.discrete else 70)
        if not agent.discrete:
            agent.log_std.copy_(torch.tensor([-0.5, 0.3]))
    return agent


@each_script
def test_discrete_actions_follow_the_policy(module):
    """Acting from another distribution than the one that learning assumes, or one noise for all environments."""
    agent = make_agent(module, Discrete(4))
    rows = 20_000
    for obs in torch.randn(3, 5):
        expected = agent.actor(obs).softmax(-1).detach().numpy()
        counts = np.bincount(agent.act(obs.expand(rows, 5).numpy()), minlength=4)
        assert (abs(counts - rows * expected) < 5 * np.sqrt(rows * expected * (1 - expected)) + 1).all()
        assert expected.std() > 0.05


GUMBEL = "torch.empty_like(output).exponential_().log()"


@bugs(
    ("ppo_clip", GUMBEL, "torch.empty_like(output).exponential_()"),
    ("ppo_clip", GUMBEL, "torch.randn_like(output)"),
    ("ppo_clip", GUMBEL, "torch.empty_like(output[:1]).exponential_().log()"),
)
def test_discrete_actions_see(request, name, old, new):
    fails_with_a_bug(request, test_discrete_actions_follow_the_policy, name, old, new)


@each_script
def test_box_actions_follow_the_policy(module):
    """Mean or deviation other than learning assumes, or one noise for all dimensions or all environments."""
    agent = make_agent(module, BOX)
    obs = torch.randn(1, 5)
    rows = 20_000
    actions = agent.act(obs.expand(rows, 5).numpy())
    mean = agent.actor(obs)[0].detach().numpy()
    std = np.exp([-0.5, 0.3])
    assert (abs(actions.mean(0) - mean) < 5 * std / np.sqrt(rows)).all()
    assert actions.std(0) == pytest.approx(std, rel=0.03)
    assert abs(np.corrcoef(actions.T)[0, 1]) < 0.04
    assert (abs((actions - mean) / std) < 1).mean() == pytest.approx(0.6827, abs=0.015)


NOISE = "torch.randn_like(output)"


@bugs(
    ("ppo_clip", f"self.log_std.exp() * {NOISE}", NOISE),
    ("ppo_clip", f"self.log_std.exp() * {NOISE}", f"(self.log_std / 2).exp() * {NOISE}"),
    ("ppo_clip", NOISE, "torch.randn_like(output[:1])"),
    ("ppo_clip", NOISE, "torch.randn_like(output[:, :1])"),
    ("ppo_clip", NOISE, "3**0.5 * (2 * torch.rand_like(output) - 1)"),
)
def test_box_actions_see(request, name, old, new):
    fails_with_a_bug(request, test_box_actions_follow_the_policy, name, old, new)


@each_script
@pytest.mark.parametrize("space", [Discrete(4), BOX, Box(-1, 1, (2, 3))], ids=["discrete", "box", "matrix"])
def test_greedy_is_the_mode(module, space):
    """An evaluation that still samples."""
    agent = module.Agent(OBS, space, module.Args())
    obs = torch.randn(50, 5)
    out = agent.actor(obs).detach()
    state = torch.get_rng_state()
    actions = agent.act(obs.numpy(), greedy=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert actions == pytest.approx((out.argmax(-1) if agent.discrete else out).numpy(), abs=1e-5)
    assert not np.array_equal(actions, agent.act(obs.numpy()))
    assert module.action_map(space)(actions).shape == (50, *space.shape)


@each_script
def test_initial_weights(module):
    """Layers that are not orthogonal, another gain, a bias, sizes and deviations other than asked for."""
    agent = module.Agent(OBS, BOX, module.Args(hidden_size=12, log_std_init=-0.7))
    assert agent.log_std.tolist() == pytest.approx([-0.7] * 2)
    for part, last_gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        layers = [layer for layer in part if isinstance(layer, torch.nn.Linear)]
        assert [layer.out_features for layer in layers[:-1]] == [12, 12]
        for layer in layers:
            values = torch.linalg.svdvals(layer.weight)
            gain = last_gain if layer is layers[-1] else 2**0.5
            torch.testing.assert_close(values, torch.full_like(values, gain))
            assert not layer.bias.any()


@bugs(
    ("ppo_clip", "nn.init.orthogonal_(layer.weight, 2**0.5)", "nn.init.xavier_uniform_(layer.weight, 2**0.5)"),
    ("ppo_clip", "nn.init.orthogonal_(layer.weight, 2**0.5)", "nn.init.orthogonal_(layer.weight)"),
    ("ppo_clip", "nn.init.zeros_(layer.bias)", "nn.init.normal_(layer.bias)"),
    ("ppo_clip", "nn.init.orthogonal_(self.actor[-1].weight, 0.01)", "pass"),
    ("ppo_clip", "float(args.log_std_init)", "0.0"),
)
def test_initial_weights_see(request, name, old, new):
    fails_with_a_bug(request, test_initial_weights, name, old, new)


# Schedules, gradients and optimizers


class Death(BaseException):
    """What ends a run at once."""


@each_script
@pytest.mark.parametrize("anneal_lr", [False, True])
def test_step_size_falls_with_the_steps_taken(module, monkeypatch, tmp_path, anneal_lr):
    """A schedule that is ignored or not asked for, starts late, ends early, or begins anew in a resumed run."""
    shares = defaultdict(list)  # the step sizes used after a number of steps, as shares of the largest
    steps = []

    def after_log(_, run, step, *rest):
        steps.append(step)
        if len(steps) == 5:
            raise Death

    def before_descend(optimizer, _):
        for group in optimizer.param_groups:
            shares[steps[-1]].append(group["lr"] / 1e-2)

    spy(monkeypatch, module.Run, "log", after=after_log)
    spy(monkeypatch, module.Run, "__init__", after=lambda _, run, *rest: steps.append(run.step))
    spy(monkeypatch, module, "descend", before_descend)
    if hasattr(module.Args, "policy_step"):
        spy(monkeypatch, module, learner_name(module), lambda *inputs: shares[steps[-1]].append(inputs[2] / 0.4))
    with pytest.raises(Death):
        learn(module, monkeypatch, tmp_path, anneal_lr=anneal_lr, policy_step=0.4, checkpoint_every=1)
    resume(module, tmp_path / "run")
    assert steps[5] == steps[4]
    assert steps[-1] == 384
    assert shares.keys() == set(steps[:-1])
    for step, found in shares.items():
        assert found == pytest.approx([1 - step / 384 if anneal_lr else 1] * len(found))


FALLING = "remaining = 1 - iteration / num_iterations"


@bugs(
    ("ppo_clip", FALLING, "remaining = 1 - (iteration + 1) / (num_iterations + 1)"),
    ("ppo_clip", FALLING, "remaining = 1 - (iteration - first_iteration) / num_iterations"),
    ("ppo_clip", "anneal(optimizer, remaining)", "pass"),
    ("npg", "policy_step = args.policy_step * (remaining if args.anneal_lr else 1)", "policy_step = args.policy_step"),
    ("actor_critic", "for group in optimizer.param_groups:", "for group in optimizer.param_groups[:1]:"),
    ("reinforce", "1 - run.step / args.total_timesteps", "1 - run.step / 2 / args.total_timesteps"),
)
def test_schedule_sees(request, name, old, new):
    fails_with_a_bug(request, test_step_size_falls_with_the_steps_taken, name, old, new, anneal_lr=True)


@each_with("max_grad_norm")
def test_long_gradients_are_scaled_down(module, monkeypatch, tmp_path):
    """A norm other than asked for, of each part or each element by itself, or short gradients made longer."""

    def first_gradient(max_grad_norm):
        found = []

        def before(optimizer, gradients):
            found.append(torch.cat([gradients[p].flatten() for g in optimizer.param_groups for p in g["params"]]))

        with monkeypatch.context() as patch:
            spy(patch, module, "descend", before)
            learn(module, patch, tmp_path / str(max_grad_norm), max_grad_norm=max_grad_norm, total_timesteps=48)
        return found[0]

    whole = first_gradient(1e9)
    norm = whole.norm().item()
    assert norm > 0.01
    for share in (0.5, 0.9, 1.1):
        found = first_gradient(share * norm)
        torch.testing.assert_close(found, whole * min(1, share), atol=1e-6, rtol=1e-4)


NORM = "norm = nn.utils.get_total_norm(gradients, foreach=False)"
SCALE = "gradients = [gradient * scale for gradient in gradients]"
BY_PART = "gradients = [gradient * (max_norm / gradient.norm()).clamp(max=1) for gradient in gradients]"


@bugs(
    ("ppo_clip", NORM, "norm = nn.utils.get_total_norm(gradients, norm_type=1.0, foreach=False)"),
    ("ppo_clip", SCALE, BY_PART),
    ("ppo_clip", SCALE, "gradients = [gradient.clamp(-max_norm, max_norm) for gradient in gradients]"),
    ("ppo_clip", ".clamp(max=1)\n            gradients", "\n            gradients"),
    ("ppo_clip", "args, max_norm=args.max_grad_norm)", "args)"),
)
def test_long_gradients_see(request, name, old, new):
    fails_with_a_bug(request, test_long_gradients_are_scaled_down, name, old, new)


class SlowAdam:
    """Adam (Kingma & Ba 2015, Algorithm 1) with eps = 1e-5."""

    def __init__(self):
        self.m = 0
        self.v = 0
        self.t = 0

    def step(self, g):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        return self.m / (1 - 0.9**self.t) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-5)


class SlowRMSprop:
    """Mnih et al. 2016, eqs. 8-9, but with eps outside the root."""

    def __init__(self):
        self.v = 0

    def step(self, g):
        self.v = 0.99 * self.v + 0.01 * g**2
        return g / (self.v.sqrt() + 1e-5)


def check_optimizer(module, slow, monkeypatch, folder, **given):
    """Each step that train() takes is one of the slow optimizer's; gradients are made so small that its eps counts."""
    agents = []
    optimizers = defaultdict(slow)
    expected = {}

    def step_size(name):
        return 3e-2 if name_of(module) == "actor_critic" and name.startswith("critic.") else 1e-2

    def before(optimizer, gradients):
        for name, parameter in agents[0].named_parameters():
            if parameter in gradients:
                gradients[parameter] = gradients[parameter] * 1e-4
                step = optimizers[name].step(gradients[parameter].double())
                expected[name] = parameter.detach().double() - step_size(name) * step

    def after(_, optimizer, gradients):
        for name, parameter in agents[0].named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.detach().double(), expected[name], atol=1e-6, rtol=1e-6)

    spy(monkeypatch, module.Run, "__init__", after=lambda _, run, *rest: agents.append(run.parts["agent"]))
    spy(monkeypatch, module, "descend", before, after)
    learn(module, monkeypatch, folder, critic_learning_rate=3e-2, **given)
    names = [name for name, _ in agents[0].named_parameters()]
    if hasattr(module, "surrogate"):  # the natural gradient moves the policy, the optimizer the critic alone
        names = [name for name in names if name.startswith("critic.")]
    assert set(names) == set(expected)


@each_script
@pytest.mark.parametrize("env", ["TaggedBox", "Grid"])
def test_every_step_is_the_optimizers(module, monkeypatch, tmp_path, env):
    """Another eps than the script says, moments mixed up, one step size for two, parameters that never change.

    With images: elements mixed up, because gradients lie in memory in another order than their parameters.
    """
    slow = SlowRMSprop if getattr(module.Args, "optimizer", "adam") == "rmsprop" else SlowAdam
    check_optimizer(module, slow, monkeypatch, tmp_path, env_id=f"test/{env}-v0")


@each_with("optimizer")
def test_every_step_is_that_of_the_optimizer_asked_for(module, monkeypatch, tmp_path):
    """--optimizer without effect."""
    check_optimizer(module, SlowAdam, monkeypatch, tmp_path / "adam", optimizer="adam")
    check_optimizer(module, SlowRMSprop, monkeypatch, tmp_path / "rmsprop", optimizer="rmsprop")


ADAM = "torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)"
RMSPROP = "alpha=0.99, eps=1e-5"
ACTOR_RATE = "dict(params=other_parameters, lr=args.learning_rate)"
CRITIC_RATE = "dict(params=critic_parameters, lr=args.critic_learning_rate)"


@bugs(
    ("ppo_clip", ADAM, ADAM.replace("eps=1e-5", "eps=1e-8")),
    ("ppo_clip", ADAM, ADAM.replace("eps=1e-5", "eps=1e-5, betas=(0.9, 0.99)")),
    ("ppo_clip", ADAM, ADAM.replace("torch.optim.Adam(", "torch.optim.AdamW(")),
    ("ppo_clip", ADAM, ADAM.replace("agent.parameters()", "agent.actor.parameters()")),
    ("npg", "lr=args.learning_rate, eps=1e-5", "lr=args.learning_rate"),
    ("a2c", RMSPROP, "alpha=0.9, eps=1e-5"),
    ("a2c", RMSPROP, "alpha=0.99, eps=1e-8"),
    ("a2c", RMSPROP, "alpha=0.99, eps=1e-5, centered=True"),
    ("actor_critic", CRITIC_RATE, CRITIC_RATE.replace("critic_learning_rate", "learning_rate")),
    ("actor_critic", ACTOR_RATE, ACTOR_RATE.replace("learning_rate", "critic_learning_rate")),
    ("actor_critic", "eps=1e-5, fused=True", "fused=True"),
    ("ppo_clip", "parameter.grad = gradient", "parameter.grad = gradient.sign()"),
)
def test_optimizer_sees(request, name, old, new):
    fails_with_a_bug(request, test_every_step_is_the_optimizers, name, old, new, env="TaggedBox")


@bugs(("ppo_clip", "if gradient.stride() != parameter.stride():", "if False:"))
def test_mixed_up_elements_are_seen(request, name, old, new):
    fails_with_a_bug(request, test_every_step_is_the_optimizers, name, old, new, env="Grid")


@each_with("update_epochs", "num_minibatches")
def test_minibatches_partition_the_valid_rows(module, monkeypatch, tmp_path):
    """Rows drawn with replacement, left over or used twice, reset steps among them, one order for all epochs."""
    batches = []

    def before(agent, batch, function):
        if function == loss_name(module):
            batches.append([tuple(obs) for obs in batch["obs"].tolist()])

    spy_batches(monkeypatch, module, before)
    learn(module, monkeypatch, tmp_path, update_epochs=3, num_minibatches=4)
    assert len(batches) == 8 * 3 * 4
    for k in range(8):
        epochs = [batches[4 * i : 4 * i + 4] for i in range(3 * k, 3 * k + 3)]
        rows = {tuple(row["obs"]) for env in envs.Tagged.instances[:3] for row in env.log if row["t"] // 16 == k}
        orders = [[row for batch in epoch for row in batch] for epoch in epochs]
        assert all(sorted(order) == sorted(rows) for order in orders)
        assert all(max(map(len, epoch)) - min(map(len, epoch)) <= 1 for epoch in epochs)
        assert orders[0] != orders[1] != orders[2] != sorted(rows)


SHUFFLED = "shuffled = torch.randperm(num_rows, device=device)"


@bugs(
    ("ppo_clip", SHUFFLED, "shuffled = torch.randint(num_rows, (num_rows,), device=device)"),
    ("ppo_clip", SHUFFLED, "shuffled = torch.arange(num_rows, device=device)"),
    ("ppo_clip", SHUFFLED, "shuffled = torch.randperm(num_rows, device=device)[: num_rows // 4 * 4]"),
)
def test_minibatches_see(request, name, old, new):
    fails_with_a_bug(request, test_minibatches_partition_the_valid_rows, name, old, new)


# Statistics


@each_with("norm_obs")
def test_observation_statistics_wait_for_the_learner(module, monkeypatch, tmp_path):
    """Statistics that move before their rows are learned from, count reset steps, stand still, or are not used."""
    x = torch.ones(1, 3)
    seen = []
    whole = learner_name(module)
    spy_batches(monkeypatch, module, lambda agent, batch, name: seen.append((agent.encoder(x), name, batch["obs"])))
    spy(monkeypatch, module, "evaluate", lambda agent, *_: seen.append((agent.encoder(x), whole, None)))
    learn(module, monkeypatch, tmp_path, norm_obs=True, num_minibatches=1)
    assert len(seen) > 8
    rows = torch.zeros(0, 3)
    new = torch.zeros(0, 3)
    for found, name, obs in seen:
        if name == whole:  # a new batch: now the last one counts
            rows = torch.cat([rows, new])
            new = obs
        expected = (x - rows.mean(0)) * (rows.var(0, correction=0) + 1e-8).rsqrt() if len(rows) else x
        torch.testing.assert_close(found, expected.clamp(-10, 10), atol=1e-2, rtol=1e-3)


UPDATE = 'agent.encoder.update(batch["obs"])'
ROWS = "batch = {name: batch[name][valid] for name in names}"


@bugs(
    ("ppo_clip", UPDATE, "pass"),
    ("ppo_clip", ROWS, f'agent.encoder.update(batch["obs"].flatten(0, 1))\n        {ROWS}'),
    ("npg", ROWS, f'{ROWS}\n        agent.encoder.update(batch["obs"])'),
    ("ppo_clip", "self.encoder = RunningNorm(width)", "pass"),
)
def test_observation_statistics_see(request, name, old, new):
    fails_with_a_bug(request, test_observation_statistics_wait_for_the_learner, name, old, new)


class Jackpot(envs.ValueOnly):
    """Reward 1000 at the 200th step, 0 before and after it."""

    steps = 0

    def step(self, action):
        self.steps += 1
        return self.observe(), 1000.0 * (self.steps == 200), False, False, {}


gym.register("test/Jackpot-v0", Jackpot, max_episode_steps=10, disable_env_checker=True, order_enforce=False)


@each_script
def test_rewards_end_at_10_deviations(module, monkeypatch, tmp_path):
    """One reward that outweighs all others."""
    seen = []
    name = next(n for n in ("compute_gae", "compute_returns", "sarsa_targets", "vtrace") if hasattr(module, n))
    spy(monkeypatch, module, name, before=lambda rewards, *_: seen.append(rewards.abs().max().item()))
    given = dict(norm_reward=True, total_timesteps=16 * 20, gamma=0.0, eval_episodes=1)
    learn(module, monkeypatch, tmp_path, env_id="test/Jackpot-v0", num_envs=1, baseline="value", **given)
    assert max(seen) == 10


@bugs(
    ("ppo_clip", "(rewards * agent.reward_norm.scale).clamp(-10, 10)", "rewards * agent.reward_norm.scale"),
    ("ppo_clip", "(rewards * agent.reward_norm.scale).clamp(-10, 10)", "rewards.clamp(-5, 5)"),
)
def test_rewards_see(request, name, old, new):
    fails_with_a_bug(request, test_rewards_end_at_10_deviations, name, old, new)
