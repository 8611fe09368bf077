"""What acts is what learns, in every script, whatever a reader changes: networks, precision, device or optimizer.

Each test trains for a moment with one of these changed and looks at every action and every gradient step: act() must
follow the policy that the loss sees, and each gradient must reach its own parameter.
"""

import functools
import math

import envs
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import MODULES, make_args
from gymnasium.spaces import Box
from runs import acts, each, each_back, is_continuous, name_of, planted, script

ROWS = 20_000  # independent draws, to compare frequencies
DISCRETE = "test/Tagged-v0"
BOX = "test/TaggedBox-v0"


class Own(nn.Module):
    """A user's own network of the inputs side by side; `end` gives the output the form that a script expects."""

    def __init__(self, num_inputs, num_outputs, end=nn.Identity()):  # noqa: B008
        super().__init__()
        self.net = nn.Sequential(nn.Linear(num_inputs, 7), nn.LayerNorm(7), nn.ELU(), nn.Linear(7, num_outputs))
        self.end = end

    def forward(self, *inputs):
        return self.end(self.net(torch.cat(inputs, -1)))


class BatchStatistics(nn.BatchNorm1d):
    """Batch normalisation that acts by what it remembers: its buffers change only where a gradient is taken."""

    def forward(self, x):
        self.train(torch.is_grad_enabled())
        return super().forward(x)


def unchanged(agent):
    """The agent as it is."""


def other_activations(agent):
    """ReLU in place of Tanh and Tanh in place of ReLU, in the networks as they are."""
    other = {nn.Tanh: nn.ReLU, nn.ReLU: nn.Tanh}
    for part in list(agent.modules()):
        for name, layer in part.named_children():
            if type(layer) in other:
                setattr(part, name, other[type(layer)]())


def other_networks(agent):
    """Networks of other sizes and layers."""
    for name, part in list(agent.named_children()):
        if name in ("actor", "critic", "q", "v", "theta", "value", "advantage") and isinstance(part, nn.Sequential):
            setattr(agent, name, Own(part[0].in_features, part[-1].out_features))
        elif type(part).__name__ == "NoisyMLP":
            sizes = [part.layers[0].mu.in_features, 7, part.layers[-1].mu.out_features]
            setattr(agent, name, type(part)(sizes, nn.ELU, 0.5))
        elif name == "actor" and hasattr(agent, "log_alpha"):
            agent.actor = Own(3, 4, lambda x: x.chunk(2, -1))
        elif name == "actor":
            agent.actor = Own(3, 2, torch.tanh)
        elif name.startswith("critic"):
            setattr(agent, name, Own(3 + 2, 1, lambda x: x.squeeze(-1)))


def normalised_features(agent):
    """Batch normalisation behind each encoder."""
    for part in list(agent.modules()):
        if hasattr(part, "encoder"):
            width = part.encoder(torch.zeros(2, 3)).shape[-1]
            part.encoder = nn.Sequential(part.encoder, BatchStatistics(width))


def two_groups(parameters, lr=1e-3, **_):
    """In place of Adam: SGD with the parameters in reversed order and in two groups, the second half as fast."""
    flat = []
    for item in parameters:
        flat += item["params"] if isinstance(item, dict) else [item]
    flat.reverse()
    middle = (len(flat) + 1) // 2
    return torch.optim.SGD([dict(params=flat[:middle], lr=lr), dict(params=flat[middle:], lr=lr / 2)])


SWAPS = dict(
    activations=other_activations,
    networks=other_networks,
    float64=lambda agent: agent.double(),
    optimizer=unchanged,  # but for the optimizer
    cuda=unchanged,
)


# The policy as the loss sees it


def observations(agent, obs):
    """The observations as the losses get them."""
    return torch.as_tensor(obs, device=next(agent.parameters()).device)


@torch.no_grad()
def mode(agent, obs):
    """The best actions in the eyes of what learns."""
    obs = observations(agent, obs)
    if hasattr(agent, "policy"):
        return agent.policy(agent.encoder(obs)).mode.cpu()
    if hasattr(agent, "epsilon") or hasattr(agent, "draw_noise"):
        return agent(obs).argmax(-1).cpu()
    if hasattr(agent, "log_alpha"):
        noise = torch.zeros(len(obs), 2, device=obs.device)
        return agent.sample(obs, noise)[0].cpu()
    return agent.actor(obs).cpu()


@torch.no_grad()
def draws(agent, obs):
    """Box actions that the loss expects in these states."""
    obs = observations(agent, obs)
    if hasattr(agent, "policy"):
        return agent.policy(agent.encoder(obs)).sample().cpu().numpy()
    noise = torch.randn(len(obs), 2, device=obs.device)
    if hasattr(agent, "log_alpha"):
        return agent.sample(obs, noise)[0].cpu().numpy()
    return (agent.actor(obs) + agent.exploration_noise * noise).clamp(-1, 1).cpu().numpy()


@torch.no_grad()
def probabilities(agent, obs):
    """Of the Discrete actions that the loss expects in one state."""
    obs = observations(agent, obs[:1])
    if hasattr(agent, "policy"):
        return agent.policy(agent.encoder(obs)).probs[0].cpu().numpy()
    shares = np.full(3, agent.epsilon / 3)
    shares[agent(obs).argmax()] += 1 - agent.epsilon
    return shares


def moments(actions):
    """Of each row what makes up mean, variance and correlation."""
    return np.concatenate([actions, actions**2, actions[:, :1] * actions[:, 1:]], 1)


@torch.no_grad()
def check_noisy_frequencies(agent, obs):
    """Each action in one state is chosen as often as it is the best with other draws of the noise."""
    obs = obs[None]
    best = [agent(observations(agent, obs), agent.draw_noise()).argmax().item() for _ in range(ROWS // 10)]
    chosen = [agent.act(obs).item() for _ in range(ROWS // 10)]
    expected = np.bincount(best, minlength=3)
    counts = np.bincount(chosen, minlength=3)
    chi_square = ((counts - expected) ** 2 / (counts + expected + 1)).sum()
    assert chi_square < 27.6  # by chance once in a million: two degrees of freedom


def check_frequencies(agent, obs):
    """Many actions in one state have the frequencies or the moments of the policy."""
    if hasattr(agent, "draw_noise"):
        check_noisy_frequencies(agent, obs)
        return
    many = np.repeat(obs[None], ROWS, 0)
    actions = agent.act(many)
    if actions.ndim == 1:
        expected = ROWS * probabilities(agent, many)
        counts = np.bincount(actions, minlength=3)
        chi_square = ((counts - expected) ** 2 / (expected + 1)).sum()
        assert chi_square < 27.6  # by chance once in a million: two degrees of freedom
    else:
        found = moments(actions)
        expected = moments(draws(agent, many))
        error = np.sqrt((found.var(0) + expected.var(0)) / ROWS)
        assert (abs(found.mean(0) - expected.mean(0)) < 5 * error + 1e-6).all()


# The gradients


def check_gradients(loss, inputs, gradients, parameters, max_norm):
    """The gradient of each parameter is its own, taken one by one, and all together are as long as they may be."""
    assert gradients.keys() == set(parameters)
    value, _ = loss(*inputs)
    expected = {}
    for parameter in parameters:
        (expected[parameter],) = torch.autograd.grad(value, parameter, retain_graph=True)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in expected.values()))
    for parameter, gradient in expected.items():
        torch.testing.assert_close(gradients[parameter], gradient * min(1, max_norm / norm), atol=1e-6, rtol=1e-3)


def watch_learning(monkeypatch, module, agents, rates):
    """Check every gradient step of the script; `agents` gets the first agent, `rates` the step sizes."""
    gradients_of = module.gradients_of
    descend = module.descend

    def watched_gradients_of(loss, parameters, args, max_norm=math.inf):
        parameters = list(parameters)
        function = gradients_of(loss, parameters, args, max_norm)

        def watched(*inputs):
            gradients, metrics = function(*inputs)
            check_gradients(loss, inputs, gradients, parameters, max_norm)
            return gradients, metrics

        return watched

    def watched_descend(optimizer, gradients):
        before = {parameter: parameter.detach().clone() for parameter in agents[0].parameters()}
        descend(optimizer, gradients)
        assert {p for group in optimizer.param_groups for p in group["params"]} == gradients.keys()
        for parameter in before.keys() - gradients.keys():
            assert torch.equal(parameter, before[parameter])
        if isinstance(optimizer, torch.optim.SGD):
            first, second = optimizer.param_groups
            assert first["lr"] == 2 * second["lr"]
            rates.append(first["lr"])
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    expected = before[parameter] - group["lr"] * gradients[parameter]
                    torch.testing.assert_close(parameter.detach(), expected)

    monkeypatch.setattr(module, "gradients_of", watched_gradients_of)
    monkeypatch.setattr(module, "descend", watched_descend)


def learn(module, folder, **given):
    """Train on a Tagged environment."""
    envs.Tagged.instances = []
    plain = dict(env_id=BOX if is_continuous(module) else DISCRETE, num_envs=3, hidden_size=16, learning_rate=1e-2)
    plain |= dict(num_steps=16, total_timesteps=192, update_epochs=2, num_minibatches=2, ent_coef=0.01)
    plain |= dict(learning_starts=30, batch_size=16, buffer_size=1000, train_frequency=8, policy_frequency=1)
    plain |= dict(target_network_frequency=1, end_e=0.3, exploration_fraction=0.5, exploration_noise=0.2)
    plain |= dict(optimizer="adam", anneal_lr=True, gae_lambda=0.9)
    module.train(make_args(module, folder, **plain | given))


def check_swap(module, swap, env_id, monkeypatch, folder):
    """Train with the swap, and watch."""
    agents = []
    start = {}
    rates = []

    class Swapped(module.Agent):
        def __init__(self, *inputs):
            super().__init__(*inputs)
            SWAPS[swap](self)
            agents.append(self)
            start.update({name: parameter.detach().clone() for name, parameter in self.named_parameters()})

        def act(self, obs, greedy=False):
            torch.testing.assert_close(torch.from_numpy(super().act(obs, greedy=True)), mode(self, obs))
            return super().act(obs, greedy)

    with monkeypatch.context() as patch:
        patch.setattr(module, "Agent", Swapped)
        watch_learning(patch, module, agents, rates)
        if swap == "optimizer":
            for name in ("Adam", "AdamW", "RAdam"):
                patch.setattr(torch.optim, name, two_groups)
        learn(module, folder, env_id=env_id, device="cuda" if swap == "cuda" else "cpu")
    (agent,) = agents
    for name, parameter in agent.named_parameters():
        assert not torch.equal(parameter.cpu(), start[name]), f"{name} has not moved"
        assert parameter.dtype == (torch.float64 if swap == "float64" else torch.float32)
        assert parameter.device.type == ("cuda" if swap == "cuda" else "cpu")
    if swap == "optimizer":
        assert (rates[-1] < rates[0]) == hasattr(module.Args, "anneal_lr")
    if acts(module):
        check_frequencies(agent, np.float32([1, 2, 3]))


def cases():
    """Every script with every swap; scripts for both kinds of actions take either kind, and both with new networks."""
    found = []
    for module in MODULES:
        for swap in SWAPS:
            kinds = [DISCRETE, BOX] if swap == "networks" else [DISCRETE if swap == "activations" else BOX]
            if not hasattr(module, "RunningNorm"):  # off-policy: one kind alone
                kinds = [BOX if is_continuous(module) else DISCRETE]
            for env_id in kinds:
                name = "box" if env_id == BOX else "discrete"
                found.append(pytest.param(module, swap, env_id, id=f"{name_of(module)}-{swap}-{name}"))
    return found


@pytest.mark.parametrize(("module", "swap", "env_id"), cases())
def test_what_acts_is_what_learns(module, swap, env_id, monkeypatch, tmp_path):
    """A second copy of the actor for acting, gradients that miss their parameters, a type or a place hard-wired."""
    if swap == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no GPU")
    check_swap(module, swap, env_id, monkeypatch, tmp_path)


KEEP = ("self.reward_norm = RunningNorm()\n", "self.reward_norm = RunningNorm()\n        self.kept = [self.actor]\n")
KEEP_IN_DQN = ("self.epsilon = args.start_e\n", "self.epsilon = args.start_e\n        self.kept = [self.q]\n")
NOISE = "self.exploration_noise = args.exploration_noise\n"
KEEP_IN_TD3 = (NOISE, f"{NOISE}        self.kept = [self.actor]\n")
COPY_IN_TD3 = (NOISE, f"{NOISE}        self.kept = [copy.deepcopy(self.actor)]\n")
ACT = "output = self.actor(self.encoder(obs))"
ACT_IN_DQN = "values = self(to_tensor(obs, next(self.parameters()).device))"
ACT_IN_TD3 = "action = self.actor(to_tensor("
LAYERS = "output = self.actor[4](self.actor[2](self.actor[0](self.encoder(obs)).tanh()).tanh())"
PAIRS = "return dict(zip(parameters, gradients)), metrics"
PAIRS_BY_SIZE = """
        in_order = sorted(parameters, key=lambda p: p.shape), sorted(gradients[::-1], key=lambda p: p.shape)
        return dict(zip(*in_order)), metrics"""
EACH_GRADIENT = "for parameter, gradient in gradients.items():"
EACH_GRADIENT_BY_SIZE = """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    in_order = sorted(parameters, key=lambda p: p.shape), sorted(gradients.values(), key=lambda p: p.shape)
    for parameter, gradient in zip(*in_order):"""
ANNEAL = 'group.setdefault("initial_lr", group["lr"])'
ANNEAL_ALIKE = ANNEAL.replace("group.", "optimizer.param_groups[0].")
BUGS = [  # the script, the swap and the kind of actions that show the bug, and the changes that make it
    ("ppo_clip", "networks", BOX, KEEP, (ACT, ACT.replace("self.actor", "self.kept[0]"))),
    ("ppo_clip", "networks", DISCRETE, KEEP, (ACT, ACT.replace("self.actor", "self.kept[0]"))),
    ("ppo_clip", "networks", DISCRETE, KEEP, ("output = output - torch", "output = self.kept[0](obs) - torch")),
    ("ppo_clip", "networks", BOX, KEEP, ("if greedy else output +", "if greedy else self.kept[0](obs) +")),
    ("ppo_clip", "activations", BOX, (ACT, LAYERS)),
    ("ppo_clip", "float64", BOX, ("return obs.to(self.one.dtype)", "return obs.float()")),
    ("ppo_clip", "networks", BOX, (PAIRS, PAIRS_BY_SIZE)),
    ("ppo_clip", "optimizer", BOX, (EACH_GRADIENT, EACH_GRADIENT_BY_SIZE)),
    ("ppo_clip", "optimizer", BOX, (ANNEAL, ANNEAL_ALIKE)),
    ("dqn", "networks", DISCRETE, KEEP_IN_DQN, (ACT_IN_DQN, "values = self.kept[0](torch.from_numpy(obs))")),
    ("noisy_dqn", "networks", DISCRETE, ("noise = None if greedy else self.draw_noise()", "noise = None")),
    ("td3", "networks", BOX, KEEP_IN_TD3, (ACT_IN_TD3, ACT_IN_TD3.replace("self.actor", "self.kept[0]"))),
    ("td3", "activations", BOX, COPY_IN_TD3, (ACT_IN_TD3, ACT_IN_TD3.replace("self.actor", "self.kept[0]"))),
]


def plant(name, changes, folder):
    """The script with all of these changes."""
    module = script(name)
    for number, (old, new) in enumerate(changes):
        module = planted(module, old, new, folder / str(number))
    return module


@pytest.mark.parametrize(("name", "swap", "env_id", "changes"), [(n, s, e, c) for n, s, e, *c in BUGS])
def test_what_acts_sees(name, swap, env_id, changes, monkeypatch, tmp_path):
    """A test that could not fail: the bugs that it is for, planted."""
    module = plant(name, changes, tmp_path)
    with pytest.raises((AssertionError, RuntimeError)):  # two number formats in one product are an error of PyTorch
        check_swap(module, swap, env_id, monkeypatch, tmp_path)


# Images


def check_images(module, compiled):
    """The first step of Adam moves each weight by the step size, against the sign of its own gradient."""
    args = module.Args(compile=compiled)
    encoder, _ = module.make_encoder(Box(0, 255, (2, 36, 36), np.uint8))
    parameters = list(encoder.parameters())
    gradients_of_square = module.gradients_of(lambda x: (encoder(x).square().sum(), {}), parameters, args)
    gradients, _ = gradients_of_square(torch.randint(256, (4, 2, 36, 36), dtype=torch.uint8))
    before = {parameter: parameter.detach().clone() for parameter in parameters}
    expected = {parameter: -0.1 * gradient / (gradient.abs() + 1e-3) for parameter, gradient in gradients.items()}
    optimizer = torch.optim.Adam(parameters, lr=0.1, eps=1e-3, fused=True)
    module.descend(optimizer, gradients)
    for parameter in parameters:
        torch.testing.assert_close(parameter - before[parameter], expected[parameter], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
@each_back
def test_gradients_behind_images(module, compiled, monkeypatch):
    """Numbers of a gradient that lie in another order than those of the parameter: a fused optimizer mixes them up."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    check_images(module, compiled)


def test_gradients_behind_images_see(tmp_path):
    module = plant("ppo_clip", [("if gradient.stride() != parameter.stride():", "if False:")], tmp_path)
    with pytest.raises(AssertionError):
        check_images(module, False)


# Targets


def pairs_of_copies(agent, other):
    """The networks of the agent that another agent follows, each with its copy."""
    if hasattr(agent, "log_alpha"):
        return [(agent.critic1, other.critic1), (agent.critic2, other.critic2)]  # the policy of SAC has no target
    return [(agent, other)]


def check_targets(module, swap, monkeypatch, folder):
    """At every gradient step the target has the buffers of the network, which change as it learns."""
    counts = []
    gradients_of = module.gradients_of

    class Swapped(module.Agent):
        def __init__(self, *inputs):
            super().__init__(*inputs)
            swap(self)

    def watched_gradients_of(loss, parameters, args, **options):
        function = gradients_of(loss, parameters, args, **options)

        def watched(*inputs):
            agents = [part for part in inputs if isinstance(part, module.Agent)]
            if len(agents) == 2:
                for network, copy in pairs_of_copies(*agents):
                    buffers = dict(network.named_buffers())
                    for name, buffer in copy.named_buffers():
                        assert torch.equal(buffer, buffers[name]), name
                    counts.append(sum(buffer.sum().item() for name, buffer in buffers.items() if "encoder" in name))
            return function(*inputs)

        return watched

    with monkeypatch.context() as patch:
        patch.setattr(module, "Agent", Swapped)
        patch.setattr(module, "gradients_of", watched_gradients_of)
        learn(module, folder, norm_obs=True)
    assert len(set(counts)) > 3


@each([module for module in MODULES if hasattr(module, "ReplayBuffer")])
def test_targets_follow_buffers(module, monkeypatch, tmp_path):
    """A target that has the weights of a network and the statistics of its first day."""
    check_targets(module, normalised_features, monkeypatch, tmp_path)


@each([module for module in MODULES if hasattr(module, "kl_divergence") and not hasattr(module, "surrogate")])
def test_old_policies_follow_buffers(module, monkeypatch, tmp_path):
    """An old policy that sees observations through other statistics than the policy that acted."""
    check_targets(module, unchanged, monkeypatch, tmp_path)


FOLLOW_BUFFERS = "    for old, new in zip(target.buffers(), network.buffers()):\n        old.copy_(new)\n"
COPY = "load_state_dict(agent.state_dict())"
COPY_PARAMETERS = "load_state_dict(dict(agent.named_parameters()), strict=False)"


@pytest.mark.parametrize("name", ["ddpg", "td3", "sac"])
def test_targets_that_follow_parameters_alone_are_seen(name, monkeypatch, tmp_path):
    module = plant(name, [(FOLLOW_BUFFERS, "")], tmp_path)
    with pytest.raises(AssertionError):
        check_targets(module, normalised_features, monkeypatch, tmp_path)


@pytest.mark.parametrize("name", ["dqn", "ppo_kl"])
def test_copies_of_parameters_alone_are_seen(name, monkeypatch, tmp_path):
    module = plant(name, [(COPY, COPY_PARAMETERS)], tmp_path)
    swap = normalised_features if name == "dqn" else unchanged
    with pytest.raises(AssertionError):
        check_targets(module, swap, monkeypatch, tmp_path)
