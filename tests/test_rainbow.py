"""Rainbow equals the script of each of its parts where the others are off, and runs with any of them."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import spy
from off_policy import FRAMES, GRID, VECTOR, bugs, flat, learn, make_batch
from runs import each, fails_with_a_bug, script
from test_distributional import slow_projection

from algos import rainbow

PARTS = ("double", "dueling", "prioritized", "n_steps", "noisy", "distributional")
SCRIPTS = {  # what the script of a part, or of several, has of Rainbow
    "dqn": (),
    "double_dqn": ("double",),
    "dueling_dqn": ("double", "dueling"),
    "prioritized_dqn": ("double", "prioritized"),
    "n_step_dqn": ("n_steps",),
    "noisy_dqn": ("noisy",),
    "c51": ("distributional",),
}

each_rainbow = each([rainbow])


def switches(parts) -> dict:
    """The arguments of Rainbow with these parts alone."""
    given = {name: name in parts for name in PARTS}
    return given | dict(n_steps=3 if "n_steps" in parts else 1)


def heads(agent) -> list[torch.nn.Module]:
    """The networks on top of the encoder, in the order of Rainbow's streams."""
    if hasattr(agent, "streams"):
        return list(agent.streams)
    names = ("advantage", "value") if hasattr(agent, "value") else ("theta",) if hasattr(agent, "theta") else ("q",)
    return [getattr(agent, name) for name in names]


def parameters(agent) -> list[torch.nn.Parameter]:
    """All that learns, in one order for Rainbow and the scripts of its parts."""
    return [parameter for part in (agent.encoder, *heads(agent)) for parameter in part.parameters()]


def pair(module, parts, obs_space, **given):
    """Two agents of the script of these parts, the same two as agents of Rainbow, and the arguments of both."""
    own = script(next(name for name, those in SCRIPTS.items() if those == parts))
    common = dict(hidden_size=16, v_min=-5.0, v_max=5.0, num_atoms=11)
    args = module.Args(**common | switches(parts) | given)
    fields = {name: value for name, value in vars(args).items() if hasattr(own.Args, name)}
    own_args = own.Args(**fields)
    agents = [own.Agent(obs_space, 3, own_args) for _ in range(2)]
    copies = [module.Agent(obs_space, 3, args) for _ in range(2)]
    with torch.no_grad():
        for agent, copy in zip(agents, copies):
            for one, two in zip(parameters(agent), parameters(copy), strict=True):
                one *= 2  # outputs differ much between rows
                two.copy_(one)
    return own, agents, own_args, copies, args


def differentiate(loss, agent):
    """The gradient of each parameter."""
    return torch.autograd.grad(loss, parameters(agent))


@each_rainbow
@pytest.mark.parametrize("parts", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("obs_space", [VECTOR, FRAMES, GRID], ids=["vector", "frames", "grid"])
def test_with_some_parts_it_learns_as_their_script(module, parts, obs_space):
    """Loss, gradient, metrics and greedy actions, for the same weights, batch and noise."""
    own, agents, own_args, copies, args = pair(module, parts, obs_space)
    batch = make_batch(own)
    for name in ("obs", "next_obs"):
        batch[name] = torch.from_numpy(np.stack([obs_space.sample() for _ in batch["rewards"]]))
    own_inputs = []
    noise = [None, None, None]
    if "noisy" in parts:
        own_inputs = [agents[0].draw_noise(), agents[1].draw_noise()]
        noise = [[own_inputs[0]], [agents[0].draw_noise()], [own_inputs[1]]]  # that of the choice is for double alone
    loss, metrics = own.critic_loss(*agents, batch, *own_inputs, own_args)

    rows = len(batch["rewards"])
    full = dict(weights=torch.ones(rows), discounts=torch.full((rows,), args.gamma)) | batch
    copied_loss, copied_metrics = module.critic_loss(*copies, full, noise, args)
    torch.testing.assert_close(copied_loss, loss)
    for one, two in zip(differentiate(loss, agents[0]), differentiate(copied_loss, copies[0])):
        torch.testing.assert_close(two, one)
    for name, value in metrics.items():
        torch.testing.assert_close(copied_metrics[name], value)
    obs = batch["obs"].numpy()
    assert (agents[0].act(obs, greedy=True) == copies[0].act(obs, greedy=True)).all()


CHOICE = 'next_q = agent(batch["next_obs"], choice_noise)'


@bugs(
    ("rainbow", "    if args.double:\n", "    if not args.double:\n"),
    ("rainbow", CHOICE, 'next_q = agent(batch["obs"], choice_noise)'),
    ("rainbow", "next_outputs = target.outputs(", "next_outputs = agent.outputs("),
    ("rainbow", "advantages.mean(1, keepdim=True)", "advantages.mean(-1, keepdim=True)"),
    ("rainbow", '(batch["weights"] * losses).mean()', "losses.mean()"),
    ("rainbow", 'target.mean(next_outputs), batch["discounts"]', "target.mean(next_outputs), args.gamma"),
    ("rainbow", 'target.support, batch["discounts"]', "target.support, args.gamma**args.n_steps * 0.5"),
    ("rainbow", 'agent.outputs(batch["obs"], own_noise)', 'agent.outputs(batch["obs"], target_noise)'),
    ("rainbow", 'target.outputs(batch["next_obs"], target_noise)', 'target.outputs(batch["next_obs"], own_noise)'),
    ("rainbow", "errors = (y - q).abs()", "errors = y - q"),
    ("rainbow", "        next_probs = next_outputs.softmax(-1)\n", "        next_probs = next_outputs.exp()\n"),
)
def test_parts_see(request, tmp_path, name, old, new):
    """Each bug shows in at least one of the parts."""

    def test(module):
        for parts in SCRIPTS.values():
            test_with_some_parts_it_learns_as_their_script(module, parts, VECTOR)

    fails_with_a_bug(request, test, name, old, new)


def slow_stream(stream, x, noise) -> np.ndarray:
    """What a stream makes of one row x, in double precision; `noise` has a pair for each of its layers, or is None."""
    plain = [layer for layer in stream.modules() if isinstance(layer, torch.nn.Linear)]
    for i, layer in enumerate(plain):
        weight, bias = (parameter.detach().double().numpy() for parameter in (layer.weight, layer.bias))
        if noise is not None:
            f_in, f_out = (np.sign(e) * abs(e) ** 0.5 for e in (e.double().numpy() for e in noise[i]))
            noisy = stream.layers[i]
            weight = weight + noisy.sigma_weight.detach().double().numpy() * f_out[:, None] * f_in[None, :]
            bias = bias + noisy.sigma_bias.detach().double().numpy() * f_out
        x = weight @ (x if i == 0 else x.clip(0)) + bias
    return x


def slow_outputs(agent, args, obs, noise) -> list[list[float]]:
    """For each of three actions its logits or, without a distribution, the one number Q, of one observation."""
    x = obs.double().numpy()
    if args.dueling or args.noisy:
        dense = next(layer for layer in agent.encoder.modules() if isinstance(layer, torch.nn.Linear))
        x = (dense.weight.detach().double().numpy() @ x + dense.bias.detach().double().numpy()).clip(0)
    parts = [slow_stream(stream, x, noise and noise[i]) for i, stream in enumerate(agent.streams)]
    width = args.num_atoms if args.distributional else 1
    advantages = [[parts[0][a * width + i] for i in range(width)] for a in range(3)]
    if not args.dueling:
        return advantages
    return [
        [parts[1][i] + advantages[a][i] - sum(advantages[b][i] for b in range(3)) / 3 for i in range(width)]
        for a in range(3)
    ]


def slow_probs(logits) -> list[float]:
    """softmax."""
    top = max(logits)
    masses = [math.exp(x - top) for x in logits]
    return [mass / sum(masses) for mass in masses]


def slow_mean(outputs, args) -> float:
    """Q of the outputs of one action."""
    if not args.distributional:
        return outputs[0]
    step = (args.v_max - args.v_min) / (args.num_atoms - 1)
    return sum(p * (args.v_min + i * step) for i, p in enumerate(slow_probs(outputs)))


def slow_losses(agent, target, batch, noise, args) -> tuple[list[float], list[float]]:
    """For each row its loss and its error, from the equations and with nothing of the script but its parameters."""
    losses = []
    errors = []
    for row in range(len(batch["rewards"])):
        reward, end, discount = (batch[name][row].item() for name in ("rewards", "terminated", "discounts"))
        next_outputs = slow_outputs(target, args, batch["next_obs"][row], noise[2])
        chooser = slow_outputs(agent, args, batch["next_obs"][row], noise[1]) if args.double else next_outputs
        best = next_outputs[max(range(3), key=lambda a: slow_mean(chooser[a], args))]
        own = slow_outputs(agent, args, batch["obs"][row], noise[0])[batch["actions"][row]]
        if args.distributional:
            m = slow_projection(slow_probs(best), reward, end, args.v_min, args.v_max, discount)
            probs = slow_probs(own)
            losses.append(-sum(m_i * math.log(p) for m_i, p in zip(m, probs)))
            errors.append(sum(m_i * math.log(m_i / p) for m_i, p in zip(m, probs) if m_i > 0))
        else:
            delta = reward + (0 if end else discount * best[0]) - own[0]
            losses.append(delta**2)
            errors.append(abs(delta))
    return losses, errors


@each_rainbow
@pytest.mark.parametrize(
    "parts", list(itertools.product([False, True], repeat=4)), ids=lambda x: "".join("01"[i] for i in x)
)
def test_loss_of_every_combination(module, parts):
    """Against the slow equations, also where no script has these parts together: a part left out beside another."""
    given = dict(zip(("double", "dueling", "noisy", "distributional"), parts))
    args = module.Args(hidden_size=16, v_min=-5.0, v_max=5.0, num_atoms=11, **given)
    agent, target = (module.Agent(VECTOR, 3, args) for _ in range(2))
    with torch.no_grad():
        for parameter in (*agent.parameters(), *target.parameters()):
            parameter *= 2  # outputs differ much between rows
    batch = make_batch(module)
    noise = [network.draw_noise() for network in (agent, agent, target)]
    loss, metrics = module.critic_loss(agent, target, batch, noise, args)
    losses, errors = slow_losses(agent, target, batch, noise, args)
    assert loss.item() == pytest.approx(np.mean(batch["weights"].numpy() * losses), rel=1e-4)
    assert metrics["td_error"].tolist() == pytest.approx(errors, rel=1e-3, abs=1e-4)

    gradients = differentiate(loss, agent)
    length = sum(g.square().sum() for g in gradients) ** 0.5
    sides = []
    for sign in (1, -1):  # a small step along the gradient and one back
        with torch.no_grad():
            for parameter, g in zip(parameters(agent), gradients):
                parameter += (sign if not sides else 2 * sign) * 1e-3 * g / length
        losses, _ = slow_losses(agent, target, batch, noise, args)
        sides.append(np.mean(batch["weights"].numpy() * losses))
    assert (sides[0] - sides[1]) / 2e-3 == pytest.approx(length.item(), rel=0.02)


@bugs(
    ("rainbow", "advantages.mean(1, keepdim=True)", "advantages.mean((1, 2), keepdim=True)"),
    ("rainbow", "- advantages.mean(1, keepdim=True)", "- (self.num_atoms == 1) * advantages.mean(1, keepdim=True)"),
    ("rainbow", "    if args.double:\n", "    if args.double and not args.distributional:\n"),
    (
        "rainbow",
        'loss = (batch["weights"] * losses).mean()',
        'loss = losses.mean() if args.distributional else (batch["weights"] * losses).mean()',
    ),
    ("rainbow", "stream(x, stream_noise) for", "stream(x, noise[0] if stream is self.streams[0] else None) for"),
    ("rainbow", 'target.support, batch["discounts"])', "target.support, args.gamma**args.n_steps)"),
)
def test_combinations_see(request, name, old, new):
    fails_with_a_bug(request, test_loss_of_every_combination, name, old, new, parts=(True, True, True, True))


@each_rainbow
def test_noise_of_every_layer_is_its_own(module):
    """A draw that two layers, two streams or two sides of a layer share."""
    agent = module.Agent(VECTOR, 3, module.Args(hidden_size=16))
    noise = [e for stream in agent.draw_noise() for layer in stream for e in layer]
    numbers = torch.cat(noise).tolist()
    assert len(noise) == 2 * 2 * len(agent.streams)
    assert len(set(numbers)) == len(numbers)


STREAMS = "return [stream.draw_noise() for stream in self.streams] if self.noisy else None"
SHARED = "noise = [stream.draw_noise() for stream in self.streams]; noise[1][0] = noise[0][0]; return noise"


@bugs(("rainbow", STREAMS, SHARED))
def test_noise_of_layers_sees(request, name, old, new):
    fails_with_a_bug(request, test_noise_of_every_layer_is_its_own, name, old, new)


@each_rainbow
def test_parts_that_are_off_are_off_in_the_loop(module, monkeypatch, tmp_path):
    """What the flags of exploration, replay and returns do in train(), each part alone and each part left out.

    With noise epsilon is 0 and each step acts by a draw of its own, from the first step on; without it nothing is
    drawn. Without priorities none is used, and the weights are 1. The number of steps does not depend on the others.
    """
    acted = []
    spy(monkeypatch, module.Agent, "forward", before=lambda agent, obs, noise=None: acted.append((len(obs), noise)))
    epsilons = []
    spy(monkeypatch, module.Agent, "act", before=lambda agent, *_, **__: epsilons.append(agent.epsilon))
    calls = []
    for name in ("draw", "update"):
        spy(monkeypatch, module.Priorities, name, before=lambda *_: calls.append("priorities"))
    spy(monkeypatch, module.ReplayBuffer, "draw", before=lambda *_: calls.append("uniform"))
    steps = []
    spy(monkeypatch, module, "n_step_batch", before=lambda buffer, rows, envs, n, *_: steps.append(n))
    weights = []
    spy(monkeypatch, module, "critic_loss", before=lambda a, t, batch, *_: weights.append(batch["weights"]))
    parts = ("noisy", "prioritized", "n_steps")
    for on in [(), *itertools.combinations(parts, 1), *itertools.combinations(parts, 2), parts]:
        for seen in (acted, epsilons, calls, steps, weights):
            seen.clear()
        given = dict(noisy="noisy" in on, prioritized="prioritized" in on, n_steps=4 if "n_steps" in on else 1)
        learn(module, tmp_path / "-".join(on), total_timesteps=150, eval_episodes=2, **given)
        training = 150 // 3  # calls of act() before those of the evaluation
        draws = [noise for rows, noise in acted if rows == 3][:training]
        if "noisy" in on:
            assert set(epsilons[:training]) == {0.0}
            assert None not in draws
            assert len({float(noise[0][0][0][0]) for noise in draws}) == training
        else:
            assert epsilons[0] == 1.0
            assert epsilons[training - 1] == pytest.approx(0.05)
            assert draws == [None] * training
        assert set(calls) == ({"priorities"} if "prioritized" in on else {"uniform"})
        assert any((w != 1).any() for w in weights) == ("prioritized" in on)
        assert set(steps) == {given["n_steps"]}


ACT = "noise = None if greedy else self.draw_noise()"
ARGUMENTS = "args.n_steps, args.gamma, device)"


@bugs(
    ("rainbow", "self.epsilon = 0.0 if args.noisy else args.start_e", "self.epsilon = args.start_e"),
    ("rainbow", "        if not args.noisy:\n            agent.eps", "        if True:\n            agent.eps"),
    (
        "rainbow",
        "        if not args.noisy:\n            agent.eps",
        "        if not args.double:\n            agent.eps",
    ),
    ("rainbow", ACT, f"{ACT} if not hasattr(self, 'kept') else self.kept; self.kept = noise"),
    ("rainbow", "action = agent.act(obs)", "action = agent.act(obs, greedy=step <= args.learning_starts)"),
    (
        "rainbow",
        "                if args.prioritized:\n                    places",
        "                if True:\n                    places",
    ),
    (
        "rainbow",
        "                if args.prioritized:\n                    places",
        "                if args.noisy:\n                    places",
    ),
    ("rainbow", "np.ones(args.batch_size)", "np.full(args.batch_size, 0.5)"),
    ("rainbow", ARGUMENTS, "args.n_steps if args.prioritized else 1, args.gamma, device)"),
    ("rainbow", ARGUMENTS, "args.n_steps if args.noisy else 1, args.gamma, device)"),
)
def test_parts_in_the_loop_see(request, monkeypatch, tmp_path, name, old, new):
    fails_with_a_bug(request, test_parts_that_are_off_are_off_in_the_loop, name, old, new)


@each_rainbow
@pytest.mark.parametrize(
    "parts", [(), ("double",), ("double", "prioritized"), ("n_steps",), ("distributional",)], ids=str
)
def test_a_run_with_some_parts_is_one_of_their_script(module, parts, monkeypatch, tmp_path):
    """The same bits in all that learns. The order of layers and draws differs where streams or noise come in."""
    own = script(next(name for name, those in SCRIPTS.items() if those == parts))
    found = []
    for number, one in enumerate((own, module)):
        agents = []
        spy(monkeypatch, one, "evaluate", before=lambda agent, *_, agents=agents: agents.append(agent))
        given = dict(gamma=0.9, num_atoms=11, v_min=-5.0, v_max=5.0, priority_exponent=0.6)
        learn(one, tmp_path / str(number), total_timesteps=120, **given | switches(parts))
        found.append(parameters(agents[0]))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


N_STEPS = "rows, env_ids, args.n_steps, args.gamma"


@bugs(
    ("rainbow", N_STEPS, N_STEPS.replace("args.n_steps", "args.n_steps if args.prioritized else 1")),
    ("rainbow", N_STEPS, N_STEPS.replace("args.gamma", "0.99")),
)
def test_a_run_of_many_steps_sees(request, name, old, new):
    fails_with_a_bug(request, test_a_run_with_some_parts_is_one_of_their_script, name, old, new, parts=("n_steps",))


@each_rainbow
def test_each_purpose_draws_anew(module, monkeypatch, tmp_path):
    """Noise that acts and learns at once, that is kept from step to step, or that the evaluation has."""
    used = dict(acting=[], learning=[], evaluation=[])
    state = dict(now="acting")
    spy(monkeypatch, module.Agent, "outputs", lambda _, obs, noise=None: used[state["now"]].append(noise))
    learning = [lambda *_, now=now: state.update(now=now) for now in ("learning", "acting")]
    spy(monkeypatch, module, "critic_loss", *learning)
    spy(monkeypatch, module, "evaluate", lambda *_: state.update(now="evaluation"))
    learn(module, tmp_path)
    assert (len(used["acting"]), len(used["learning"])) == (100, 3 * 270)
    assert used["evaluation"]
    assert all(noise is None for noise in used["evaluation"])
    draws = used["acting"] + used["learning"]
    numbers = torch.stack([flat(e for stream in noise for pair in stream for e in pair) for noise in draws])
    assert len(numbers.unique()) > 0.98 * numbers.numel()


LEARNS_TOO = """noise = None if greedy else Agent.draw_noise(self)
        self.draw_noise = lambda: noise or Agent.draw_noise(self)"""


@bugs(
    ("rainbow", ACT, LEARNS_TOO),
    ("rainbow", ACT, "noise = self.draw_noise()"),
    ("rainbow", "for network in (agent, agent, target)]", "for network in (agent, target)]; noise.append(noise[0])"),
)
def test_purposes_see(request, name, old, new):
    fails_with_a_bug(request, test_each_purpose_draws_anew, name, old, new)


@each_rainbow
def test_the_error_of_a_distribution_is_a_divergence(module):
    """Priorities by the cross-entropy, which does not fall to 0 where nothing is left to learn."""
    args = module.Args(hidden_size=16, noisy=False, v_min=-5.0, v_max=5.0, num_atoms=11)
    agent, target = (module.Agent(VECTOR, 3, args) for _ in range(2))
    batch = make_batch(module)
    _, metrics = module.critic_loss(agent, target, batch, [None, None, None], args)
    with torch.no_grad():
        next_actions = agent(batch["next_obs"]).argmax(-1)
        probs = agent.outputs(batch["obs"]).softmax(-1)
        next_probs = target.outputs(batch["next_obs"]).softmax(-1)
    for row, error in enumerate(metrics["td_error"]):
        one = slice(row, row + 1)
        p = next_probs[one, next_actions[row]]
        m = module.project(p, batch["rewards"][one], batch["terminated"][one], target.support, batch["discounts"][one])
        q = probs[row, batch["actions"][row]]
        divergence = sum(m_i * (m_i / q_i).log() for m_i, q_i in zip(m[0], q) if m_i > 0)
        torch.testing.assert_close(error, divergence)


@bugs(
    ("rainbow", 'errors = F.kl_div(outputs.log_softmax(-1), m, reduction="none").sum(-1)', "errors = losses"),
    (
        "rainbow",
        'outputs.log_softmax(-1), m, reduction="none").sum(-1)',
        'outputs.log_softmax(-1), m, reduction="none").mean(-1)',
    ),
)
def test_divergence_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_error_of_a_distribution_is_a_divergence, name, old, new)


@each_rainbow
def test_no_error_is_negative(module):
    """Where nothing is left to learn, rounding takes a divergence to either side of 0; a power of less is NaN."""
    args = module.Args(hidden_size=16, noisy=False, double=False, v_min=-5.0, v_max=5.0, num_atoms=51)
    agent = module.Agent(VECTOR, 3, args)
    obs = torch.randn(500, *VECTOR.shape)
    zeros = torch.zeros(len(obs))
    batch = dict(obs=obs, actions=agent(obs).argmax(-1), rewards=zeros, terminated=zeros.bool())
    batch |= dict(next_obs=obs, discounts=zeros + 1, weights=zeros + 1)
    _, metrics = module.critic_loss(agent, agent, batch, [None, None, None], args)
    assert metrics["td_error"].max() < 1e-5
    assert metrics["td_error"].min() >= 0


@bugs(("rainbow", "errors = errors.clamp(min=0)", "pass"))
def test_no_error_sees(request, name, old, new):
    fails_with_a_bug(request, test_no_error_is_negative, name, old, new)


@each_rainbow
@pytest.mark.parametrize("distributional", [False, True])
def test_three_draws_of_noise(module, distributional):
    """The noise of Q(s, a), of the choice of a' and of the target are those that were handed in, each for itself."""
    args = module.Args(hidden_size=16, distributional=distributional, prioritized=False, v_min=-5.0, v_max=5.0)
    agent, target = (module.Agent(VECTOR, 3, args) for _ in range(2))
    with torch.no_grad():
        for parameter in (*agent.parameters(), *target.parameters()):
            parameter *= 3
    batch = make_batch(module) | dict(weights=torch.ones(64))
    draws = [[network.draw_noise() for network in (agent, agent, target)] for _ in range(2)]
    losses = []
    for choice in itertools.product([0, 1], repeat=3):
        noise = [draws[number][place] for place, number in enumerate(choice)]
        losses.append(module.critic_loss(agent, target, batch, noise, args)[0].item())
    assert len(set(losses)) == 8  # each of the three matters


@bugs(
    ("rainbow", CHOICE, 'next_q = agent(batch["next_obs"], own_noise)'),
    ("rainbow", CHOICE, 'next_q = agent(batch["next_obs"])'),
    ("rainbow", 'agent.outputs(batch["obs"], own_noise)', 'agent.outputs(batch["obs"], choice_noise)'),
    ("rainbow", 'target.outputs(batch["next_obs"], target_noise)', 'target.outputs(batch["next_obs"])'),
)
def test_three_draws_see(request, name, old, new):
    fails_with_a_bug(request, test_three_draws_of_noise, name, old, new, distributional=True)


@each_rainbow
def test_each_gradient_step_draws_its_noise(module, monkeypatch, tmp_path):
    """One draw for all steps, or one for two of the three passes."""
    seen = []

    def look(agent, target, batch, noise, args):
        seen.extend(float(passes[0][0][0].sum()) for passes in noise)

    spy(monkeypatch, module, "critic_loss", before=look)
    learn(module, tmp_path, total_timesteps=120)
    assert len(seen) == len(set(seen)) > 100


@bugs(
    ("rainbow", "for network in (agent, agent, target)]", "for network in (agent, target, target)][:1] * 3"),
    ("rainbow", "noise = [network", "noise = run.args.noise = getattr(run.args, 'noise', None) or [network"),
)
def test_draws_see(request, name, old, new):
    fails_with_a_bug(request, test_each_gradient_step_draws_its_noise, name, old, new)


@each_rainbow
@pytest.mark.parametrize(
    "parts", list(itertools.product([False, True], repeat=6)), ids=lambda x: "".join("01"[i] for i in x)
)
def test_all_combinations_run(module, parts, tmp_path):
    """Training, checkpoint, evaluation."""
    chosen = [name for name, wanted in zip(PARTS, parts) if wanted]
    result = learn(module, tmp_path, total_timesteps=66, num_atoms=5, **switches(chosen))
    assert np.isfinite(result["eval_returns"]).all()


@each_rainbow
def test_greedy_actions_have_no_noise(module):
    """Evaluation by the means: the same action each time, and not that of the noise."""
    args = module.Args(hidden_size=16)
    agent = module.Agent(VECTOR, 3, args)
    obs = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    greedy = agent.act(obs, greedy=True)
    assert all((agent.act(obs, greedy=True) == greedy).all() for _ in range(5))
    assert any((agent.act(obs) != greedy).any() for _ in range(20))


@bugs(("rainbow", ACT, "noise = self.draw_noise()"))
def test_greedy_sees(request, name, old, new):
    fails_with_a_bug(request, test_greedy_actions_have_no_noise, name, old, new)
