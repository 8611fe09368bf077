"""The two algorithms with a KL penalty, PPO-KL and TRPO by dual ascent, against slow and independent references."""

import copy
import json
from types import SimpleNamespace

import envs
import numpy as np
import pytest
import torch
from conftest import make_args, spy
from test_a2c import trained
from test_ppo_clip import BOTH, OBS, gradients, parameters, per_row, reference
from torch.distributions import Categorical, Independent, Normal
from torch.distributions import kl_divergence as torch_kl

from algos import a2c, ppo_kl, trpo_penalty

MODULES = [ppo_kl, trpo_penalty]
LOSS = {ppo_kl: ppo_kl.ppo_kl_loss, trpo_penalty: trpo_penalty.penalty_loss}
WEIGHT = {ppo_kl: "beta", trpo_penalty: "multiplier"}  # the argument, buffer and metric of the weight of the KL
each_module = pytest.mark.parametrize("module", MODULES, ids=["ppo_kl", "trpo_penalty"])

# The divergence


def policies(kind, rows=6):
    """Two batches of distributions in float64, some way apart."""
    x, y = torch.randn(2, rows, 3, dtype=torch.float64)
    if kind == "discrete":
        return Categorical(logits=2 * x), Categorical(logits=2 * x + y)
    std, new_std = torch.tensor([[0.5, 1.0, 2.0], [0.7, 0.8, 1.5]], dtype=torch.float64)  # as the agents have them
    return Independent(Normal(x, std), 1), Independent(Normal(x + 0.5 * y, new_std), 1)


@each_module
@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_kl_against_torch_and_monte_carlo(module, kind):
    """The other direction, a factor or a dimension forgotten, deviations taken for variances."""
    old, new = policies(kind)
    kl = module.kl_divergence(old, new)
    assert kl.shape == (6,)
    torch.testing.assert_close(kl, torch_kl(old, new), atol=1e-12, rtol=1e-12)
    samples = old.sample((200_000,))
    log_ratios = old.log_prob(samples) - new.log_prob(samples)
    error = 5 * log_ratios.std(0) / 200_000**0.5
    assert ((log_ratios.mean(0) - kl).abs() < error).all()
    swapped = module.kl_divergence(new, old)
    assert ((swapped - kl).abs() > error).any(), "samples of the old policy would not tell the two directions apart"
    assert (swapped - torch_kl(old, new)).abs().max() > 0.01
    assert module.kl_divergence(old, old).abs().max() < 1e-12


# The rules for its weight


def check_beta_rule(rule):
    """The rule for a target of 0.75, whose edges 0.5 and 1.125 are exact in binary."""
    edges = np.float32([0.5, 1.125])
    (below, above), (inside, inside_too) = (np.nextafter(edges, np.float32(ends)) for ends in ([0, 9], [9, 0]))
    cases = [(0, 0.5), (0.3, 0.5), (below, 0.5), (edges[0], 1), (inside, 1), (0.75, 1)]
    for kl, factor in [*cases, (inside_too, 1), (edges[1], 1), (above, 2), (30, 2)]:
        for beta in (0.25, 3.0):
            assert rule(torch.tensor(beta), torch.tensor(float(kl)), 0.75).item() == beta * factor, kl


def test_beta_rule():
    """At, below and above both edges; and rules that are wrong only at one of them, or only in their direction."""
    check_beta_rule(ppo_kl.adapt_beta)
    wrong = [
        lambda beta, kl, target: ppo_kl.adapt_beta(beta, target**2 / kl, target),  # the other way round
        lambda beta, kl, target: beta / 2 if kl <= target / 1.5 else beta * 2 if kl > target * 1.5 else beta,
        lambda beta, kl, target: beta / 2 if kl < target / 1.5 else beta * 2 if kl >= target * 1.5 else beta,
        lambda beta, kl, target: beta / 2 if kl < target / 2 else beta * 2 if kl > target * 2 else beta,
        lambda beta, kl, target: beta / 1.5 if kl < target / 1.5 else beta * 1.5 if kl > target * 1.5 else beta,
    ]
    for rule in wrong:
        with pytest.raises(AssertionError):
            check_beta_rule(rule)


@pytest.mark.parametrize(("kl", "end"), [(0.0, 1e-4), (1.0, 1e4)])
def test_beta_comes_back(kl, end):
    """A beta that 200 iterations on one side of the target have made 0, infinite, or useless for as many to come."""
    beta = plain = torch.tensor(1.0)
    for _ in range(200):
        beta, plain = ppo_kl.adapt_beta(beta, torch.tensor(kl), 0.01), plain * (2 if kl else 0.5)
    assert beta.item() == pytest.approx(end)
    assert plain in (0, torch.inf)
    for _ in range(14):
        beta = ppo_kl.adapt_beta(beta, torch.tensor(1.0 - kl), 0.01)
    assert (beta >= 1) if end < 1 else (beta <= 1)


def check_dual_step(rule):
    """Rising above the constraint, falling below it, in proportion to the violation, and never negative."""
    cases = [(0.5, 0.03, 0.7), (0.5, 0.02, 0.6), (0.5, 0.01, 0.5), (0.5, 0.0, 0.4), (0.05, 0.0, 0.0), (0.0, 0.0, 0.0)]
    for multiplier, kl, expected in [*cases, (0.0, 1.0, 9.9)]:
        found = rule(torch.tensor(multiplier), torch.tensor(kl), 0.01, 10.0).item()
        assert found == pytest.approx(expected, abs=1e-6)


def test_dual_step():
    """Descent in place of ascent, no projection, a projection of the step alone, a penalty that only rises."""
    check_dual_step(trpo_penalty.dual_step)
    wrong = [
        lambda multiplier, kl, target, rate: (multiplier - rate * (kl - target)).clamp(min=0),
        lambda multiplier, kl, target, rate: multiplier + rate * (kl - target),
        lambda multiplier, kl, target, rate: multiplier + rate * (kl - target).clamp(min=0),
        lambda multiplier, kl, target, rate: (multiplier + rate * kl).clamp(min=0),
    ]
    for rule in wrong:
        with pytest.raises(AssertionError):
            check_dual_step(rule)


# The loss


def make_case(module, space, **given):
    """An agent in float64 with a policy far from uniform, an older one some way from it, a batch, and the arguments."""
    torch.manual_seed(3)
    args = module.Args(**dict(vf_coef=0.7, ent_coef=0.3) | given)
    agent = module.Agent(OBS, space, args).double()
    agent.features = lambda obs: obs  # or else they become float32
    old = copy.deepcopy(agent)
    with torch.no_grad():
        for part in (agent, old):
            part.actor[-1].weight.copy_(torch.randn_like(part.actor[-1].weight) * 0.3)
            if part.log_std is not None:
                part.log_std.copy_(0.3 * torch.randn_like(part.log_std))
    batch = dict(obs=torch.randn(64, 5), advantages=torch.randn(64), returns=torch.randn(64) * 3)
    batch = {name: column.double() for name, column in batch.items()}
    return agent, old, batch | dict(actions=old(batch["obs"])[0].sample()), args


def reference_loss(module, agent, old, batch, args):
    """The loss with ratios of densities, the KL of torch, and the layers alone; and the mean KL."""
    (new_policy, values), (old_policy, _) = reference(agent, batch["obs"]), reference(old, batch["obs"])
    density, old_density = (per_row(agent, p.log_prob(batch["actions"])).exp() for p in (new_policy, old_policy))
    kl = per_row(agent, torch_kl(old_policy, new_policy)).mean()
    loss = 0.7 * ((values - batch["returns"]) ** 2).mean() - 0.3 * per_row(agent, new_policy.entropy()).mean()
    weight = getattr(args, WEIGHT[module])
    penalty = weight * (kl if module is ppo_kl else kl - args.target_kl)
    return loss - (density / old_density.detach() * batch["advantages"]).mean() + penalty, kl


@each_module
@BOTH
def test_first_gradient_is_the_policy_gradient(module, space):
    """Where the policies are equal: a penalty that has a gradient there; a sign or a factor of any other term."""
    agent, _, batch, args = make_case(module, space, **{WEIGHT[module]: 1e3})
    loss, metrics = LOSS[module](agent, batch, copy.deepcopy(agent), args)
    policy, values = reference(agent, batch["obs"])
    log_probs, entropy = per_row(agent, policy.log_prob(batch["actions"])), per_row(agent, policy.entropy()).mean()
    value_loss = ((values - batch["returns"]) ** 2).mean()
    plain = -(batch["advantages"] * log_probs).mean() + 0.7 * value_loss - 0.3 * entropy
    torch.testing.assert_close(gradients(agent, loss), gradients(agent, plain), atol=1e-10, rtol=1e-8)
    assert metrics["entropy"].item() == pytest.approx(entropy.item())
    assert metrics["value_loss"].item() == pytest.approx(value_loss.item())
    assert metrics["policy_loss"].item() == pytest.approx(-batch["advantages"].mean().item())
    assert not any(metric.requires_grad for metric in metrics.values())


@each_module
@BOTH
def test_gradient_away_from_the_old_policy(module, space, monkeypatch):
    """The KL in the other direction, with another weight or sign, or from a policy other than the old one."""
    agent, old, batch, args = make_case(module, space, **{WEIGHT[module]: 2.0})
    expected, kl = reference_loss(module, agent, old, batch, args)
    loss, expected_gradient = LOSS[module](agent, batch, old, args)[0], gradients(agent, expected)
    assert kl > 0.1
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(gradients(agent, loss), expected_gradient, atol=1e-10, rtol=1e-8)

    def error(old=old):
        return (gradients(agent, LOSS[module](agent, batch, old, args)[0]) - expected_gradient).abs().max()

    assert error(copy.deepcopy(agent)) > 0.01
    divergence, weight = module.kl_divergence, getattr(agent, WEIGHT[module])
    for wrong in (lambda old, new: divergence(new, old), lambda old, new: -divergence(old, new)):
        with monkeypatch.context() as patch:
            patch.setattr(module, "kl_divergence", wrong)
            assert error() > 0.01
    weight.fill_(1.0)  # the loss reads the buffer, which changes, and not the argument
    assert error() > 0.01


@each_module
@BOTH
def test_loss_row_by_row(module, space):
    """(B, 1) against (B,): the loss of a batch is the mean of the losses of its rows, in whatever order."""
    agent, old, batch, args = make_case(module, space)
    loss, metrics = LOSS[module](agent, batch, old, args)
    rows = [LOSS[module](agent, {name: x[i : i + 1] for name, x in batch.items()}, old, args) for i in range(64)]
    assert loss.shape == ()
    assert loss.item() == pytest.approx(np.mean([row.item() for row, _ in rows]))
    for name, metric in metrics.items():
        assert metric.shape == ()
        assert metric.item() == pytest.approx(np.mean([row[name].item() for _, row in rows]))
    order = torch.randperm(64)
    permuted, _ = LOSS[module](agent, {name: x[order] for name, x in batch.items()}, old, args)
    assert permuted.item() == pytest.approx(loss.item())


@each_module
@pytest.mark.parametrize("env_id", ["test/Tagged-v0", "test/TaggedBox-v0"])
def test_equals_a2c_with_one_gradient_step(module, tmp_path, monkeypatch, env_id):
    """Any difference from the parent beside the penalty, which has no gradient at the first step; a second has one."""
    given = dict(env_id=env_id, norm_obs=True)
    ours = trained(module, tmp_path, monkeypatch, **given)
    torch.testing.assert_close(ours, trained(a2c, tmp_path, monkeypatch, **given), atol=1e-5, rtol=1e-4)
    two_epochs = trained(module, tmp_path / "two", monkeypatch, update_epochs=2, **given)
    assert (ours - two_epochs).abs().max() > 1e-3


# train()

N, T = 3, 16
PLAIN = dict(env_id="test/Tagged-v0", num_envs=N, num_steps=T, total_timesteps=N * T * 12, num_minibatches=2,
    update_epochs=3, learning_rate=3e-3, target_kl=0.02, multiplier_lr=5.0)  # fmt: skip


def read_log(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def watch(module, monkeypatch, folder, **given):
    """Train on a Tagged environment; return each iteration's gradient steps, the log, and the arguments."""
    iterations = []

    def before_update(agent, optimizer, batch, learning_rate, old_agent, args):
        iterations[-1].append(SimpleNamespace(agent=copy.deepcopy(agent), old=copy.deepcopy(old_agent), batch=batch))

    def after_update(metrics, agent, *_):
        iterations[-1][-1].after = copy.deepcopy(agent)

    with monkeypatch.context() as patch:
        patch.setattr(envs.Tagged, "instances", [])
        spy(patch, module, "compute_gae", after=lambda *_: iterations.append([]))
        spy(patch, module, "update", before_update, after_update)
        args = make_args(module, folder, **(PLAIN | given))
        module.train(args)
    assert len(iterations) == 12
    return iterations, read_log(folder), args


def check_old_agents(iterations):
    """In each step of an iteration the old agent is, to the bit, the agent that acted, statistics included."""
    for steps in iterations:
        acted = steps[0].agent.state_dict()
        for step in steps:
            assert all(torch.equal(tensor, acted[name]) for name, tensor in step.old.state_dict().items())
        assert (parameters(steps[-1].agent) - parameters(steps[-1].old)).abs().max() > 1e-3


@each_module
@pytest.mark.parametrize("env_id", ["test/Tagged-v0", "test/TaggedBox-v0"])
def test_old_agent_is_the_one_that_acted(module, tmp_path, monkeypatch, env_id):
    """An old agent of an earlier iteration, of the last epoch, with other statistics, or one that learns, too."""
    given = dict(env_id=env_id, norm_obs=True)
    check_old_agents(watch(module, monkeypatch, tmp_path, **given)[0])
    monkeypatch.setattr(module.Agent, "load_state_dict", lambda *_: None)  # the old one stays what it was at first
    iterations, _, _ = watch(module, monkeypatch, tmp_path / "stale", **given)
    with pytest.raises(AssertionError):
        check_old_agents(iterations)


def weights(module, lines, args):
    """The weights of the KL that the log should show, by the rule in plain Python from the KL it shows."""
    weight, found = getattr(args, WEIGHT[module]), []
    for line in lines:
        found.append(weight)
        kl = line["approx_kl"]
        if module is trpo_penalty:
            weight = max(0.0, weight + args.multiplier_lr * (kl - args.target_kl))
        elif args.kl == "adaptive":
            weight *= 0.5 if kl < args.target_kl / 1.5 else 2 if kl > args.target_kl * 1.5 else 1
    return pytest.approx(found, rel=1e-4, abs=1e-6)


@each_module
@pytest.mark.parametrize("env_id", ["test/Tagged-v0", "test/TaggedBox-v0"])
def test_weight_follows_the_kl_of_the_whole_batch(module, tmp_path, monkeypatch, env_id):
    """The KL of the last minibatch or of an earlier step, in the other direction, or of statistics that moved on."""
    iterations, lines, args = watch(module, monkeypatch, tmp_path, env_id=env_id, norm_obs=True)
    shown = [line[WEIGHT[module]] for line in lines]
    assert shown == weights(module, lines, args)
    assert any(a < b for a, b in zip(shown, shown[1:]))
    assert any(a > b for a, b in zip(shown, shown[1:]))
    logged, right, swapped, last_rows, moved = [line["approx_kl"] for line in lines[:-1]], [], [], [], []
    for steps, later in zip(iterations, iterations[1:]):
        rows = torch.cat([step.batch["obs"] for step in steps[:2]])  # the minibatches of an epoch
        with torch.no_grad():
            old, new, normalised = (part(rows)[0] for part in (steps[0].agent, steps[-1].after, later[0].agent))
            right.append(torch_kl(old, new).mean().item())
            swapped.append(torch_kl(new, old).mean().item())
            last_rows.append(torch_kl(old, new)[-len(steps[-1].batch["obs"]) :].mean().item())
            moved.append(torch_kl(old, normalised).mean().item())
    tolerance = dict(rel=1e-3, abs=1e-6)
    assert logged == pytest.approx(right, **tolerance)
    assert all(logged != pytest.approx(wrong, **tolerance) for wrong in (swapped, last_rows, moved))


def test_fixed_beta_never_moves(tmp_path, monkeypatch):
    """A rule that is applied whatever --kl says: the KL leaves its band, and beta stays."""
    iterations, lines, _ = watch(ppo_kl, monkeypatch, tmp_path, kl="fixed", beta=3.0, target_kl=0.002)
    assert max(line["approx_kl"] for line in lines) > 0.003
    assert {line["beta"] for line in lines} == {3.0}
    assert {step.after.beta.item() for steps in iterations for step in steps} == {3.0}
    _, lines, _ = watch(ppo_kl, monkeypatch, tmp_path / "adaptive", kl="adaptive", beta=3.0, target_kl=0.002)
    assert len({line["beta"] for line in lines}) > 2


class Death(BaseException):
    """What ends a run at once."""


@each_module
def test_weight_survives_death(module, tmp_path, monkeypatch):
    """A run that begins again with the first weight, or with that of before its last step; and an old agent kept."""
    args = make_args(module, tmp_path, **PLAIN, checkpoint_every=N * T)
    calls = []

    def die_in_the_ninth_iteration(*_):
        calls.append(0)
        if len(calls) == 8 * 6 + 4:
            raise Death

    with monkeypatch.context() as patch:
        spy(patch, module, "update", die_in_the_ninth_iteration)
        with pytest.raises(Death):
            module.train(args)
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path)
    assert saved["step"] == N * T * 8
    assert set(saved) == {"algo", "env_id", "step", "wall_time", "returns", "log_size", "agent", "optimizer"}

    def resume(weight):
        saved["agent"][WEIGHT[module]] = weight
        torch.save(saved, path)
        module.train(module.parse_args(["--resume", str(tmp_path / "run")]))
        lines = read_log(tmp_path)
        assert len(lines) == 12
        return [line[WEIGHT[module]] for line in lines], weights(module, lines, args)

    shown, expected = resume(saved["agent"][WEIGHT[module]])
    assert shown == expected
    shown, expected = resume(torch.tensor(getattr(args, WEIGHT[module])))  # as if the checkpoint had not held it
    assert shown != expected


@each_module
def test_compiled_training_equals_eager_training(module, tmp_path, monkeypatch):
    """A compiled step that works with the old agent or the weight of the KL of its first call."""

    def run(name, **given):
        history, folder = [], tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(envs.Tagged, "instances", [])
            spy(patch, module.Agent, "act", before=lambda agent, *_: history.append(parameters(agent)))
            if name == "stale":
                patch.setattr(module.Agent, "load_state_dict", lambda *_: None)
            plain = dict(env_id="test/TaggedBox-v0", norm_obs=True, anneal_lr=True, ent_coef=0.01, max_grad_norm=5.0)
            args = make_args(module, folder, **(PLAIN | plain | given))
            module.train(args)
        return torch.stack(history[: 12 * T + 1 : T]), read_log(folder)

    (eager, lines), (compiled, compiled_lines) = run("eager"), run("compiled", compile=True)
    assert ((eager[1:] - eager[:-1]).abs().amax(1) > 1e-4).all()
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
    for a, b in zip(lines, compiled_lines, strict=True):
        for name in ("approx_kl", WEIGHT[module], "value_loss"):
            assert a[name] == pytest.approx(b[name], rel=1e-2, abs=1e-5)
    stale, _ = run("stale")
    constant, _ = run("constant", kl="fixed", multiplier_lr=0.0)
    for wrong in (stale, constant):
        assert (wrong - eager).abs().max() > 1e-3
