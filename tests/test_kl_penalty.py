"""The two algorithms with a KL penalty, PPO-KL and TRPO by dual ascent, against slow and independent references."""

import copy
import gc
from types import SimpleNamespace

import envs
import numpy as np
import pytest
import torch
from conftest import loss_name, make_args, spy
from off_policy import bugs, flat, gradient, lines
from on_policy import each_space, entropy, kl, log_prob, make_agent, sample
from runs import checkpoint, each, fails_with_a_bug, name_of
from test_a2c import trained
from torch.distributions import Categorical, kl_divergence

from algos import a2c, ppo_kl, trpo_penalty

each_script = each([ppo_kl, trpo_penalty])


def weight_name(module):
    """The name of the weight of the KL, which is an argument, a buffer and a metric."""
    return "beta" if name_of(module) == "ppo_kl" else "multiplier"


# The rules for its weight


@each([ppo_kl])
def test_beta_rule(module):
    """A rule that is wrong at one edge only, or in its direction; the edges of the target 0.75 are exact in binary."""
    low = np.float32(0.5)
    high = np.float32(1.125)
    below = np.nextafter(low, np.float32(0))
    above = np.nextafter(high, np.float32(9))
    cases = [(0, 0.5), (0.3, 0.5), (below, 0.5), (low, 1), (np.nextafter(low, high), 1), (0.75, 1)]
    cases += [(np.nextafter(high, low), 1), (high, 1), (above, 2), (30, 2)]
    for divergence, factor in cases:
        for beta in (0.25, 3.0):
            found = module.adapt_beta(torch.tensor(beta), torch.tensor(float(divergence)), 0.75)
            assert found.item() == beta * factor, divergence


@each([ppo_kl])
@pytest.mark.parametrize(("divergence", "end"), [(0.0, 1e-4), (1.0, 1e4)])
def test_beta_comes_back(module, divergence, end):
    """A beta that 200 iterations on one side of the target have made 0, infinite, or useless for as many to come."""
    beta = torch.tensor(1.0)
    for _ in range(200):
        beta = module.adapt_beta(beta, torch.tensor(divergence), 0.01)
    assert beta.item() == pytest.approx(end)
    for _ in range(14):
        beta = module.adapt_beta(beta, torch.tensor(1.0 - divergence), 0.01)
    assert (beta >= 1) if end < 1 else (beta <= 1)


FALLS = "if kl < target / 1.5:\n        beta = beta / 2"
RISES = "elif kl > target * 1.5:\n        beta = beta * 2"


@bugs(
    ("ppo_kl", FALLS, FALLS.replace("kl < target / 1.5", "kl > target * 1.5")),
    ("ppo_kl", FALLS, FALLS.replace("<", "<=")),
    ("ppo_kl", FALLS, FALLS.replace("1.5", "2")),
    ("ppo_kl", FALLS, FALLS.replace("beta / 2", "beta / 1.5")),
    ("ppo_kl", RISES, RISES.replace(">", ">=")),
    ("ppo_kl", RISES, RISES.replace("1.5", "2")),
    ("ppo_kl", RISES, RISES.replace("beta * 2", "beta * 1.5")),
    ("ppo_kl", RISES, RISES.replace("elif", "if kl == kl and").replace("kl >", "kl <")),
)
def test_beta_rule_sees(request, name, old, new):
    fails_with_a_bug(request, test_beta_rule, name, old, new)


@bugs(("ppo_kl", ".clamp(1e-4, 1e4)", ""), ("ppo_kl", ".clamp(1e-4, 1e4)", ".clamp(1e-10, 1e10)"))
@pytest.mark.parametrize(("divergence", "end"), [(0.0, 1e-4), (1.0, 1e4)])
def test_a_beta_that_is_lost_is_seen(request, name, old, new, divergence, end):
    fails_with_a_bug(request, test_beta_comes_back, name, old, new, divergence=divergence, end=end)


@each([trpo_penalty])
def test_dual_step(module):
    """Rising above the constraint, falling below it, in proportion to the violation, and never negative."""
    cases = [(0.5, 0.03, 0.7), (0.5, 0.02, 0.6), (0.5, 0.01, 0.5), (0.5, 0.0, 0.4), (0.05, 0.0, 0.0), (0.0, 0.0, 0.0)]
    for multiplier, divergence, expected in [*cases, (0.0, 1.0, 9.9)]:
        found = module.dual_step(torch.tensor(multiplier), torch.tensor(divergence), 0.01, 10.0).item()
        assert found == pytest.approx(expected, abs=1e-6)


DUAL = "(multiplier + step_size * (kl - target)).clamp(min=0)"


@bugs(
    ("trpo_penalty", DUAL, DUAL.replace("+ step_size", "- step_size")),
    ("trpo_penalty", DUAL, DUAL.replace(".clamp(min=0)", "")),
    ("trpo_penalty", DUAL, "multiplier + step_size * (kl - target).clamp(min=0)"),
    ("trpo_penalty", DUAL, DUAL.replace("(kl - target)", "kl")),
    ("trpo_penalty", DUAL, DUAL.replace("step_size *", "step_size / 10 *")),
)
def test_dual_step_sees(request, name, old, new):
    fails_with_a_bug(request, test_dual_step, name, old, new)


# The loss


def make_case(module, space, **given):
    """An agent with a policy far from uniform, an older one some way from it, a batch of that, and the arguments."""
    agent, args = make_agent(module, space, **dict(vf_coef=0.7, ent_coef=0.3) | given)
    old_agent = copy.deepcopy(agent).requires_grad_(False)
    with torch.no_grad():
        for parameter in old_agent.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    obs = torch.randn(64, 3, dtype=torch.float64)
    batch = dict(obs=obs, actions=sample(old_agent, obs), advantages=torch.randn(64).double())
    return agent, old_agent, batch | dict(returns=3 * torch.randn(64).double()), args


def slow_loss(module, agent, old_agent, batch, args):
    """The loss row by row, and its parts."""
    obs = batch["obs"]
    ratios = log_prob(agent, obs, batch["actions"]).exp() / log_prob(old_agent, obs, batch["actions"]).exp()
    policy_loss = -sum(ratio * advantage for ratio, advantage in zip(ratios, batch["advantages"])) / len(obs)
    penalty = sum(kl(old_agent, agent, obs)) / len(obs)
    if name_of(module) == "trpo_penalty":
        penalty = penalty - args.target_kl
    penalty = getattr(args, weight_name(module)) * penalty
    value_loss = sum((v - r) ** 2 for v, r in zip(agent.critic(obs)[:, 0], batch["returns"])) / len(obs)
    mean_entropy = sum(entropy(agent, obs)) / len(obs)
    loss = policy_loss + penalty + 0.7 * value_loss - 0.3 * mean_entropy
    return loss, dict(policy_loss=policy_loss, value_loss=value_loss, entropy=mean_entropy)


def check_loss(module, agent, old_agent, batch, args):
    """Loss, gradient and metrics are those of the slow loss; returns the loss."""
    loss, metrics = getattr(module, loss_name(module))(agent, old_agent, batch, args)
    expected, parts = slow_loss(module, agent, old_agent, batch, args)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    found = gradient(loss, agent.parameters())
    torch.testing.assert_close(found, gradient(expected, agent.parameters()), atol=1e-10, rtol=1e-8)
    assert metrics.keys() == parts.keys()
    for name, metric in metrics.items():
        assert metric.item() == pytest.approx(parts[name].item(), rel=1e-10)
        assert not metric.requires_grad
    return loss.item()


@each_script
@each_space
def test_loss_and_gradient_away_from_the_old_policy(module, space):
    """The KL in the other direction, with another weight or sign, from another policy; (B, 1) against (B,); any term.

    The order of the rows does not matter. The weight is the buffer, which changes, and not the argument.
    """
    agent, old_agent, batch, args = make_case(module, space, **{weight_name(module): 2.0})
    assert kl(old_agent, agent, batch["obs"]).mean() > 0.1
    loss = check_loss(module, agent, old_agent, batch, args)
    order = torch.randperm(64)
    shuffled = {name: column[order] for name, column in batch.items()}
    assert check_loss(module, agent, old_agent, shuffled, args) == pytest.approx(loss)
    getattr(agent, weight_name(module)).fill_(3.0)
    setattr(args, weight_name(module), 3.0)
    check_loss(module, agent, old_agent, batch, args)
    setattr(args, weight_name(module), 0.0)
    found = getattr(module, loss_name(module))(agent, old_agent, batch, args)[0]
    setattr(args, weight_name(module), 3.0)
    assert found.item() == pytest.approx(slow_loss(module, agent, old_agent, batch, args)[0].item())


@each_script
@each_space
def test_first_gradient_is_the_policy_gradient(module, space):
    """Where the policies are equal: a penalty that has a gradient there, whatever its weight."""
    agent, _, batch, args = make_case(module, space, **{weight_name(module): 1e3})
    old_agent = copy.deepcopy(agent).requires_grad_(False)
    loss, _ = getattr(module, loss_name(module))(agent, old_agent, batch, args)
    obs = batch["obs"]
    policy_loss = -(batch["advantages"] * log_prob(agent, obs, batch["actions"])).mean()
    value_loss = ((agent.critic(obs)[:, 0] - batch["returns"]) ** 2).mean()
    expected = gradient(policy_loss + 0.7 * value_loss - 0.3 * entropy(agent, obs).mean(), agent.parameters())
    torch.testing.assert_close(gradient(loss, agent.parameters()), expected, atol=1e-8, rtol=1e-6)


BETA_PENALTY = "agent.beta * mean_kl(old_policy, policy)  # PPO eq. 8"
PENALTY = "agent.multiplier * (mean_kl(old_policy, policy) - args.target_kl)"
RATIO = '(policy.log_prob(batch["actions"]) - old_policy.log_prob(batch["actions"])).exp()'
POLICY_LOSS = '-(ratio * batch["advantages"]).mean()'
VALUE_LOSS = 'F.mse_loss(values, batch["returns"])'


@each_space
@bugs(
    ("ppo_kl", BETA_PENALTY, BETA_PENALTY.replace("old_policy, policy", "policy, old_policy")),
    ("ppo_kl", BETA_PENALTY, BETA_PENALTY.replace("agent.beta", "-agent.beta")),
    ("ppo_kl", BETA_PENALTY, BETA_PENALTY.replace("agent.beta", "args.beta")),
    ("ppo_kl", BETA_PENALTY, BETA_PENALTY.replace("mean_kl", "64 * mean_kl")),
    ("ppo_kl", BETA_PENALTY, "agent.beta * -ratio.log().mean()"),
    ("ppo_kl", RATIO, RATIO.replace(".exp()", "")),
    ("ppo_kl", RATIO, RATIO.replace("- old_policy", "- policy")),
    ("ppo_kl", POLICY_LOSS, POLICY_LOSS[1:]),
    ("ppo_kl", POLICY_LOSS, POLICY_LOSS.replace("ratio", "ratio[:, None]")),
    ("ppo_kl", POLICY_LOSS, POLICY_LOSS.replace("ratio", "ratio.clamp(0.8, 1.2)")),
    ("ppo_kl", VALUE_LOSS, f"{VALUE_LOSS} / 2"),
    ("ppo_kl", VALUE_LOSS, VALUE_LOSS.replace('"]', '"][:, None]')),
    ("ppo_kl", "- args.ent_coef * entropy", "+ args.ent_coef * entropy"),
    ("ppo_kl", "args.vf_coef * value_loss", "value_loss"),
    ("ppo_kl", "policy_loss=policy_loss.detach()", "policy_loss=policy_loss"),
    ("trpo_penalty", PENALTY, PENALTY.replace("old_policy, policy", "policy, old_policy")),
    ("trpo_penalty", PENALTY, PENALTY.replace("- args", "+ args")),
    ("trpo_penalty", PENALTY, PENALTY.replace("agent.multiplier", "args.multiplier")),
    ("trpo_penalty", PENALTY, PENALTY.replace("old_policy", "policy")),
    ("trpo_penalty", POLICY_LOSS, POLICY_LOSS[1:]),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_loss_sees(request, space, name, old, new):
    fails_with_a_bug(request, test_loss_and_gradient_away_from_the_old_policy, name, old, new, space=space)


@each_space
@bugs(
    ("ppo_kl", BETA_PENALTY, BETA_PENALTY.replace("policy)", "policy).sqrt()")),
    ("ppo_kl", BETA_PENALTY, "agent.beta * (policy.log_prob(batch['actions']).mean() + policy.entropy().mean())"),
)
def test_a_first_gradient_of_the_penalty_is_seen(request, space, name, old, new):
    fails_with_a_bug(request, test_first_gradient_is_the_policy_gradient, name, old, new, space=space)


@each_script
@pytest.mark.parametrize("env_id", ["test/Tagged-v0", "test/TaggedBox-v0"])
def test_equals_a2c_with_one_gradient_step(module, tmp_path, monkeypatch, env_id):
    """Any difference from the parent beside the penalty, which has no gradient at the first step; a second has one."""
    given = dict(env_id=env_id, norm_obs=True)
    found = trained(module, tmp_path, monkeypatch, **given)
    torch.testing.assert_close(found, trained(a2c, tmp_path, monkeypatch, **given), atol=1e-5, rtol=1e-4)
    two_epochs = trained(module, tmp_path / "two", monkeypatch, update_epochs=2, **given)
    assert (found - two_epochs).abs().max() > 1e-3


@bugs(
    ("ppo_kl", "advantages[valid].std()", "advantages.std()"),
    ("trpo_penalty", "discounted = args.gamma * discounted * valid", "discounted = args.gamma * discounted"),
    ("trpo_penalty", "max_norm=args.max_grad_norm", "max_norm=1.0"),
)
def test_differences_from_a2c_are_seen(request, name, old, new):
    fails_with_a_bug(request, test_equals_a2c_with_one_gradient_step, name, old, new, env_id="test/Tagged-v0")


# train()

N = 3
T = 16
ITERATIONS = 8
PLAIN = dict(env_id="test/Tagged-v0", num_envs=N, num_steps=T, total_timesteps=N * T * ITERATIONS, num_minibatches=2,
             update_epochs=3, learning_rate=3e-3, target_kl=0.02, multiplier_lr=5.0)  # fmt: skip


def watch(module, folder, **given):
    """Train on a Tagged environment; return each iteration's gradient steps, the log, and the arguments."""
    iterations = []

    def before_loss(agent, old_agent, batch, args):
        step = SimpleNamespace(agent=copy.deepcopy(agent), old_agent=copy.deepcopy(old_agent), batch=batch)
        step.live = agent
        iterations[-1].append(step)

    def after_descend(*_):
        step = iterations[-1][-1]
        step.after = copy.deepcopy(step.live)

    envs.Tagged.instances = []
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, module, "compute_gae", after=lambda *_: iterations.append([]))
        spy(patch, module, loss_name(module), before_loss)
        spy(patch, module, "descend", after=after_descend)
        args = make_args(module, folder, **PLAIN | given)
        module.train(args)
    assert len(iterations) == ITERATIONS
    assert {len(steps) for steps in iterations} == {6}
    return iterations, lines(folder), args


@each_script
@pytest.mark.parametrize("env_id", ["test/Tagged-v0", "test/TaggedBox-v0"])
def test_old_agent_is_the_one_that_acted(module, tmp_path, env_id):
    """An old agent of an earlier iteration, of the last epoch, with other statistics, or one that learns, too."""
    iterations, _, _ = watch(module, tmp_path, env_id=env_id, norm_obs=True)
    for steps in iterations:
        acted = steps[0].agent.state_dict()
        acted.pop(weight_name(module))  # only the agent's counts
        for step in steps:
            old = step.old_agent.state_dict()
            for name, tensor in acted.items():
                assert torch.equal(old[name], tensor), name
        assert (flat(steps[-1].agent.parameters()) - flat(steps[-1].old_agent.parameters())).abs().max() > 1e-3


OLD = "        old_agent.load_state_dict(agent.state_dict())\n"
STEP = "                descend(optimizer, gradients)\n"
SHUFFLE = "            shuffled = torch.randperm(num_rows, device=device)\n"
PARAMETERS_ALONE = "dict(agent.named_parameters()), strict=False"


@bugs(
    ("ppo_kl", OLD, ""),
    ("ppo_kl", OLD, OLD.replace("agent.state_dict()", PARAMETERS_ALONE)),
    ("ppo_kl", OLD, "        old_agent = agent\n"),
    ("ppo_kl", STEP, f"{STEP}        {OLD}"),
    ("ppo_kl", SHUFFLE, f"    {OLD}{SHUFFLE}"),
    ("trpo_penalty", OLD, ""),
)
def test_other_old_agents_are_seen(request, name, old, new):
    fails_with_a_bug(request, test_old_agent_is_the_one_that_acted, name, old, new, env_id="test/Tagged-v0")


def weights(module, log, args):
    """The weights of the KL that the log should show, by the rule in plain Python from the KL it shows."""
    weight = getattr(args, weight_name(module))
    found = []
    for line in log:
        found.append(weight)
        divergence = line["kl"]
        if name_of(module) == "trpo_penalty":
            weight = max(0.0, weight + args.multiplier_lr * (divergence - args.target_kl))
        elif divergence < args.target_kl / 1.5:
            weight = weight / 2
        elif divergence > args.target_kl * 1.5:
            weight = weight * 2
    return pytest.approx(found, rel=1e-4, abs=1e-6)


@each_script
@pytest.mark.parametrize("env_id", ["test/Tagged-v0", "test/TaggedBox-v0"])
def test_weight_follows_the_kl_of_the_whole_batch(module, tmp_path, env_id):
    """The KL of the last minibatch or of an earlier step, in the other direction, or of statistics that moved on."""
    iterations, log, args = watch(module, tmp_path, env_id=env_id, norm_obs=True)
    shown = [line[weight_name(module)] for line in log]
    assert shown == weights(module, log, args)
    assert any(a < b for a, b in zip(shown, shown[1:]))
    assert any(a > b for a, b in zip(shown, shown[1:]))
    for steps, line in zip(iterations, log):
        obs = torch.cat([step.batch["obs"] for step in steps[:2]])  # the minibatches of an epoch
        acted = steps[0].agent
        with torch.no_grad():
            divergence = kl(acted, steps[-1].after, acted.encoder(obs)).mean().item()
        assert line["kl"] == pytest.approx(divergence, rel=1e-3, abs=1e-6)


MEASURED = "kl = mean_kl(old_policy, policy)"
POLICIES = """
            policy, _ = agent(batch["obs"])
            old_policy, _ = old_agent(batch["obs"])
"""


@bugs(
    ("ppo_kl", MEASURED, MEASURED.replace("old_policy, policy", "policy, old_policy")),
    ("ppo_kl", MEASURED, MEASURED.replace("mean_kl", "2 * mean_kl")),
    ("ppo_kl", MEASURED, "log_ratio = policy.log_prob(batch['actions']) - old_policy.log_prob(batch['actions']); "
     "kl = (log_ratio.exp() - 1 - log_ratio).mean()"),
    ("ppo_kl", POLICIES, POLICIES.replace("batch", "minibatch")),
    ("ppo_kl", POLICIES, f"\n            agent.encoder.update(batch['obs']){POLICIES}"),
    ("ppo_kl", "history.append(dict(kl=kl, beta=agent.beta))",
     "history.append(dict(kl=kl, beta=adapt_beta(agent.beta, kl, args.target_kl)))"),
    ("ppo_kl", "agent.beta = adapt_beta(agent.beta, kl, args.target_kl)", "pass"),
    ("trpo_penalty", MEASURED, MEASURED.replace("old_policy, policy", "policy, old_policy")),
    ("trpo_penalty", "dual_step(agent.multiplier, kl, args.target_kl, args.multiplier_lr)",
     "dual_step(agent.multiplier, kl, args.target_kl, args.learning_rate)"),
    ("trpo_penalty", "agent.multiplier = dual_step", "multiplier = dual_step"),
)  # fmt: skip
def test_weight_sees(request, name, old, new):
    fails_with_a_bug(request, test_weight_follows_the_kl_of_the_whole_batch, name, old, new, env_id="test/Tagged-v0")


@each([ppo_kl])
def test_fixed_beta_never_moves(module, tmp_path):
    """A rule that is applied whatever --kl says: the KL leaves its band, and beta stays."""
    iterations, log, _ = watch(module, tmp_path, kl="fixed", beta=3.0, target_kl=0.002)
    assert max(line["kl"] for line in log) > 0.003
    assert {line["beta"] for line in log} == {3.0}
    assert {step.after.beta.item() for steps in iterations for step in steps} == {3.0}


@bugs(("ppo_kl", 'if args.kl == "adaptive":', "if True:"))
def test_a_fixed_beta_that_moves_is_seen(request, name, old, new):
    fails_with_a_bug(request, test_fixed_beta_never_moves, name, old, new)


@pytest.mark.parametrize("module", [ppo_kl], ids=["ppo_kl"])
def test_a_new_fixed_beta_counts_in_a_resumed_run(module, tmp_path):
    """The beta of the checkpoint in place of the one on the command line, which config.json then tells of."""
    module.train(make_args(module, tmp_path, **PLAIN, kl="fixed", beta=1.0))
    more = ["--total-timesteps", str(2 * N * T * ITERATIONS), "--beta", "3"]
    module.train(module.parse_args(["--resume", str(tmp_path / "run"), *more]))
    assert [line["beta"] for line in lines(tmp_path)] == [1.0] * ITERATIONS + [3.0] * ITERATIONS


@bugs(("ppo_kl", "agent.beta.fill_(args.beta)", "pass"))
def test_a_fixed_beta_of_the_checkpoint_is_seen(request, name, old, new):
    fails_with_a_bug(request, test_a_new_fixed_beta_counts_in_a_resumed_run, name, old, new)


class Death(BaseException):
    """What ends a run at once."""


@each_script
def test_weight_survives_death(module, tmp_path):
    """A run that begins again with the first weight, or with that of before its last step; and an old agent kept."""
    args = make_args(module, tmp_path, **PLAIN, checkpoint_every=N * T)
    steps = []

    def die_in_the_sixth_iteration(*_):
        steps.append(0)
        if len(steps) == 5 * 6 + 4:
            raise Death

    with pytest.MonkeyPatch.context() as patch:
        spy(patch, module, "descend", die_in_the_sixth_iteration)
        with pytest.raises(Death):
            module.train(args)
    saved = checkpoint(tmp_path / "run")
    assert saved["step"] == N * T * 5
    assert "old_agent" not in saved
    gc.collect()  # with the objects of the run that died goes its lock
    module.train(module.parse_args(["--resume", str(tmp_path / "run")]))
    log = lines(tmp_path)
    assert len(log) == ITERATIONS
    assert [line[weight_name(module)] for line in log] == weights(module, log, args)


@bugs(
    ("ppo_kl", "torch.tensor(float(args.beta)))", "torch.tensor(float(args.beta)), persistent=False)"),
    (
        "trpo_penalty",
        "torch.tensor(float(args.multiplier)))",
        "torch.tensor(float(args.multiplier)), persistent=False)",
    ),
)
def test_a_weight_that_is_lost_is_seen(request, name, old, new):
    fails_with_a_bug(request, test_weight_survives_death, name, old, new)


# --compile


@each_script
def test_the_kl_does_not_break_the_graph(module, monkeypatch, tmp_path):
    """A formula that PyTorch looks up in the compiled function, as it does at its first KL in a process."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    torch.distributions.kl._KL_MEMOIZE.clear()
    compile_ = torch.compile
    monkeypatch.setattr(module, "can_compile", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="eager", **options))
    envs.Tagged.instances = []
    given = dict(env_id="test/TaggedBox-v0", total_timesteps=N * T * 3, update_epochs=1, compile=True)
    module.train(make_args(module, tmp_path, **PLAIN | given))
    assert len({line[weight_name(module)] for line in lines(tmp_path)}) > 1
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


FIRST_KL = "    mean_kl(policy, policy)  #"


@bugs(("ppo_kl", FIRST_KL, "    #"))
def test_a_graph_in_pieces_is_seen(request, name, old, new):
    fails_with_a_bug(request, test_the_kl_does_not_break_the_graph, name, old, new)


@each_script
def test_mean_kl_stays_finite(module):
    """A probability that underflows to 0, where PyTorch's own KL is infinite and its gradient is not a number."""
    logits = torch.tensor([[0.0, -300.0], [0.0, 1.0]], requires_grad=True)
    old = Categorical(logits=torch.zeros(2, 2))
    new = Categorical(logits=logits)
    assert kl_divergence(old, new)[0].isinf()
    expected = (150 - np.log(2) + 0.5 * np.log(0.25 * (1 + np.e) ** 2 / np.e)) / 2
    assert module.mean_kl(old, new).item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(module.mean_kl(old, new), logits)
    assert gradient.isfinite().all()
