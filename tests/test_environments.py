"""Any environment that a user brings: what its spaces and its rewards become on the way to the networks and back."""

from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import MODULES, is_imitation, make_args
from gymnasium.spaces import (
    Box,
    Dict,
    Discrete,
    Graph,
    MultiBinary,
    MultiDiscrete,
    OneOf,
    Sequence,
    Text,
    Tuple,
    flatdim,
    flatten,
)
from runs import acts, each, each_back, each_module, is_continuous, name_of, planted, script

ON_POLICY = [module for module in MODULES if hasattr(module, "RunningNorm")]
VECTOR = Box(-1, 1, (3,), np.float32)
BOUNDED = Box(np.float32([[-1, 0, 2], [-3, -0.5, -7]]), np.float32([[1, 5, 3], [2, 0.5, -6]]))


def label(space):
    """A short name of a space, for the name of a test."""
    return f"{type(space).__name__}{space.shape or ''}{space.dtype or ''}"


def box(shape, dtype):
    """A Box of numbers of this type; for bytes and truth values, all of them."""
    if dtype == np.bool_:
        return Box(0, 1, shape, dtype)
    return Box(0, 255, shape, dtype) if dtype == np.uint8 else Box(-1, 1, shape, dtype)


class Any(gym.Env):
    """Any spaces, episodes of 5 steps, reward 1; `log` holds what happened."""

    instances: list["Any"] = []  # noqa: RUF012

    def __init__(self, observations, actions):
        self.observation_space = observations
        self.action_space = actions
        self.log = []
        self.emitted = []
        self.instances.append(self)

    def observe(self):
        self.emitted.append(self.observation_space.sample())
        return self.emitted[-1]

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        self.steps += 1
        obs = self.emitted[-1]
        self.log.append((obs, action, self.observe()))
        return self.emitted[-1], 1.0, self.steps == 5, False, {}


@pytest.fixture
def own(monkeypatch):
    """A function that registers an environment with these spaces; actions are by default of a kind that suits."""
    monkeypatch.setattr(Any, "instances", [])

    def register(module, observations, actions=None):
        gym.registry.pop("test/Any-v0", None)
        actions = actions or (BOUNDED if is_continuous(module) else Discrete(3, start=1))
        gym.register(
            "test/Any-v0",
            Any,
            kwargs=dict(observations=observations, actions=actions),
            disable_env_checker=True,
            order_enforce=False,
        )
        return "test/Any-v0"

    yield register
    gym.registry.pop("test/Any-v0", None)


def learn(module, folder, env_id, **given):
    """The result of a run of a moment."""
    plain = dict(num_envs=2, num_steps=12, total_timesteps=48, num_minibatches=2, update_epochs=1, hidden_size=8)
    plain |= dict(learning_starts=16, batch_size=8, buffer_size=100, train_frequency=8, n_steps=1, play_every=8)
    return module.train(make_args(module, folder, **dict(env_id=env_id) | plain | given))


def make_agent(module, observations, actions=None):
    """An agent for these spaces."""
    if not acts(module):
        return module.Agent(observations, module.Args(hidden_size=8))
    actions = actions or (BOUNDED if is_continuous(module) else Discrete(3))
    if not hasattr(module, "RunningNorm"):
        actions = flatdim(actions)
    return module.Agent(observations, actions, module.Args(hidden_size=8))


# Images

IMAGES = [  # shape, type and what the axes mean
    ((1, 36, 36), np.uint8, "CHW"),
    ((3, 40, 36), np.uint8, "CHW"),
    ((4, 44, 48), np.uint8, "CHW"),
    ((36, 36, 1), np.uint8, "HWC"),
    ((36, 50, 3), np.uint8, "HWC"),
    ((52, 44, 4), np.uint8, "HWC"),
    ((36, 36), np.uint8, "HW"),
    ((60, 37), np.uint8, "HW"),
    ((7, 7, 3), np.uint8, "HWC"),
    ((3, 8, 9), np.uint8, "CHW"),
    ((37, 12, 2), np.uint8, "HWC"),
    ((10, 10, 4), np.bool_, "HWC"),
    ((10, 10, 10), np.bool_, "HWC"),
    ((6, 10, 9), np.bool_, "CHW"),
    ((3, 3, 3), np.bool_, "HWC"),
]
NO_IMAGES = [
    box((36, 35), np.uint8),
    box((8, 8), np.uint8),
    box((40, 40), np.bool_),
    box((40, 40), np.float32),
    box((3, 40, 40), np.float32),
    box((2, 2, 3), np.uint8),
    box((2, 5, 5, 3), np.uint8),
]
each_image = pytest.mark.parametrize(
    ("shape", "dtype", "axes"), IMAGES, ids=lambda part: getattr(part, "__name__", None)
)


def as_image(obs, axes):
    """Observations (B, ...) as (B, C, H, W) in [0, 1], by the meaning of their axes."""
    x = obs / 255 if obs.dtype == np.uint8 else obs.astype(float)
    if axes == "HW":
        return x[:, None]
    return np.stack([np.take(x, channel, 1 + axes.index("C")) for channel in range(x.shape[1 + axes.index("C")])], 1)


def encoders(agent):
    """The parts of the agent that look at observations."""
    return [part.encoder for part in agent.modules() if hasattr(part, "encoder")]


def check_image(module, shape, dtype, axes):
    """Every encoder of the agent shows its first filters this image."""
    space = box(shape, dtype)
    space.seed(0)
    obs = np.stack([space.sample() for _ in range(3)])
    assert module.is_image(space)
    parts = encoders(make_agent(module, space))
    assert len(parts) == 1 + (is_continuous(module) and 1 + (name_of(module) != "ddpg"))
    for encoder in parts:
        first = next(layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d))
        seen = []
        first.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        features = encoder(torch.from_numpy(obs))
        assert features.shape == (3, 512 if min(seen[0].shape[2:]) >= 36 else 128)
        assert seen[0].dtype == torch.float32
        assert seen[0].numpy() == pytest.approx(as_image(obs, axes), abs=1e-6)


@each_image
@each_module
def test_pixels_reach_the_filters(module, shape, dtype, axes):
    """Pixels divided by 255 twice or never, rows taken for channels, an image flattened."""
    check_image(module, shape, dtype, axes)


def bugs(*cases):
    """Run the test once for each (old, new, ...)."""
    return pytest.mark.parametrize(("old", "new", "case"), cases, ids=lambda part: " ".join(str(part).split())[:40])


@bugs(
    ("min(space.shape) >= 36", "min(space.shape) > 36", ((36, 36), np.uint8, "HW")),
    ("min(space.shape) >= 36", "max(space.shape) < 36", ((60, 37), np.uint8, "HW")),
    ("self.scale = 255 if space.dtype == np.uint8 else 1", "self.scale = 1", ((7, 7, 3), np.uint8, "HWC")),
    ("self.scale = 255 if space.dtype == np.uint8 else 1", "self.scale = 255", ((10, 10, 4), np.bool_, "HWC")),
    ("space.shape[-1] <= space.shape[0]", "space.shape[-1] < space.shape[0]", ((10, 10, 10), np.bool_, "HWC")),
    ("space.shape[-1] <= space.shape[0]", "False", ((36, 50, 3), np.uint8, "HWC")),
    ("space.shape[-1] <= space.shape[0]", "True", ((3, 40, 36), np.uint8, "CHW")),
    ("x = x.movedim(-1, 1)", "x = x.transpose(1, 3)", ((36, 50, 3), np.uint8, "HWC")),
    ("x = x.movedim(-1, 1)", "x = x.reshape(-1, *x.movedim(-1, 1).shape[1:])", ((10, 10, 4), np.bool_, "HWC")),
    ("x = x.unsqueeze(1)", "x = x.unsqueeze(1).mT", ((60, 37), np.uint8, "HW")),
)
def test_pixels_see(tmp_path, old, new, case):
    module = planted(script("ppo_clip"), old, new, tmp_path / "planted")
    with pytest.raises(
        (AssertionError, RuntimeError)
    ):  # an image may be too small for the filters, the other way round
        check_image(module, *case)


@pytest.mark.parametrize(
    "space", [box((10, 2, 3), np.uint8), box((36, 2, 4), np.uint8), box((3, 2, 10), np.bool_)], ids=label
)
@each_back
def test_images_without_room_for_a_filter(module, space, own, tmp_path):
    """A strip of two pixels, and as many channels as a filter has rows: the convolution fails."""
    learn(module, tmp_path, own(module, space))


# The networks for images


def nature(x, layers):
    """Mnih et al. 2015, extended data table 1."""
    first, second, third, last = layers
    x = F.conv2d(x, first.weight, first.bias, 4).relu()
    x = F.conv2d(x, second.weight, second.bias, 2).relu()
    x = F.conv2d(x, third.weight, third.bias, 1).relu()
    return F.linear(x.flatten(1), last.weight, last.bias).relu()


def young(x, layers):
    """Young & Tian 2019, section 3."""
    first, last = layers
    x = F.conv2d(x, first.weight, first.bias, 1).relu()
    return F.linear(x.flatten(1), last.weight, last.bias).relu()


CNNS = [  # shape, shapes of the weights, and the network
    ((4, 84, 84), [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 64 * 7 * 7)], nature),
    ((3, 36, 36), [(32, 3, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 64)], nature),
    ((5, 35, 36), [(16, 5, 3, 3), (128, 16 * 33 * 34)], young),
    ((4, 10, 10), [(16, 4, 3, 3), (128, 16 * 8 * 8)], young),
]


def check_cnn(module, shape, sizes, network):
    encoder, width = module.make_encoder(box(shape, np.uint8))
    layers = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == sizes
    obs = torch.randint(256, (2, *shape), dtype=torch.uint8)
    features = encoder(obs)
    assert features.shape == (2, width)
    torch.testing.assert_close(features, network(obs / 255, layers), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("shape", "sizes", "network"), CNNS, ids=[str(shape) for shape, *_ in CNNS])
@each_back
def test_networks_of_the_papers(module, shape, sizes, network):
    """Other filters, strides or widths than those that the published scores belong to; a layer that is linear."""
    check_cnn(module, shape, sizes, network)


@bugs(
    ("nn.Conv2d(channels, 32, 8, stride=4)", "nn.Conv2d(channels, 32, 8, stride=3)", CNNS[0]),
    ("nn.Conv2d(64, 64, 3, stride=1)", "nn.Conv2d(64, 32, 3, stride=1)", CNNS[1]),
    ("nn.Conv2d(64, 64, 3, stride=1), nn.ReLU(),", "nn.Conv2d(64, 64, 3, stride=1),", CNNS[0]),
    ("min(example.shape[2:]) >= 36", "min(example.shape[2:]) > 36", CNNS[1]),
    ("nn.Conv2d(channels, 16, 3)", "nn.Conv2d(channels, 16, 3, padding=1)", CNNS[3]),
    ("width = 128", "width = 256", CNNS[3]),
    ("nn.Linear(num_features, width), nn.ReLU())", "nn.Linear(num_features, width))", CNNS[3]),
)
def test_networks_see(tmp_path, old, new, case):
    module = planted(script("ppo_clip"), old, new, tmp_path / "planted")
    with pytest.raises(AssertionError):
        check_cnn(module, *case)


def check_weights(module, shape):
    """All layers are orthogonal, with gain sqrt(2) but for the last ones of policy and value, and without biases."""
    agent = make_agent(module, box(shape, np.uint8))
    gains = {agent.actor[-1]: 0.01, agent.critic[-1]: 1.0}
    kinds = []
    for layer in agent.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            values = torch.linalg.svdvals(layer.weight.flatten(1))
            torch.testing.assert_close(values, torch.full_like(values, gains.get(layer, 2**0.5)))
            assert not layer.bias.any()
            kinds.append(type(layer))
    assert len(kinds) == (4 if min(shape[1:]) >= 36 else 2) + 2


@pytest.mark.parametrize("shape", [(3, 36, 36), (4, 10, 10)], ids=str)
@each([module for module in ON_POLICY if not is_imitation(module)])
def test_weights_of_images(module, shape):
    """Convolutions left as PyTorch makes them, or last layers that are not small."""
    check_weights(module, shape)


@bugs(
    ("isinstance(layer, nn.Linear | nn.Conv2d)", "isinstance(layer, nn.Linear)", (3, 36, 36)),
    ("isinstance(layer, nn.Linear | nn.Conv2d)", "isinstance(layer, nn.Conv2d)", (4, 10, 10)),
    ("nn.init.orthogonal_(self.actor[-1].weight, 0.01)", "pass", (3, 36, 36)),
    ("nn.init.orthogonal_(self.critic[-1].weight, 1.0)", "pass", (3, 36, 36)),
)
def test_weights_see(tmp_path, old, new, case):
    module = planted(script("ppo_clip"), old, new, tmp_path / "planted")
    with pytest.raises(AssertionError):
        check_weights(module, case)


# Everything else is flattened

FLATTENED = [
    *NO_IMAGES,
    box((), np.float32),
    MultiBinary(4),
    MultiBinary((2, 3)),
    MultiDiscrete([2, 3]),
    MultiDiscrete([[2, 3], [4, 2]]),
    MultiDiscrete([2, 3], start=[1, -1]),
    Dict(position=VECTOR, kind=Discrete(3, start=2), flags=MultiBinary(2)),
    Dict(image=box((36, 36, 3), np.uint8), speed=box((2,), np.float64)),
    Tuple([VECTOR, Dict(a=Tuple([Discrete(2), box((2, 2), np.float32)]))]),
]


def check_flattened(module, space, own):
    """Numbers in the order of Gymnasium's own function, in arrays that stay as they are."""
    envs = module.make_envs(own(module, space), 3)
    kept = [envs.reset(seed=1)[0]]
    for _ in range(12):
        actions = envs.action_space.sample()
        kept.append(envs.step(actions)[0])
    assert envs.single_observation_space.shape == (flatdim(space),)
    assert envs.single_observation_space.dtype == kept[0].dtype
    for i, env in enumerate(Any.instances[-3:]):
        expected = np.stack([flatten(space, obs) for obs in env.emitted])
        assert len({row.tobytes() for row in expected}) > 3
        assert np.array_equal(np.stack(kept)[:, i], expected)
    encoder, width = module.make_encoder(envs.single_observation_space)
    assert width == flatdim(space)
    assert encoder(module.to_tensor(kept[-1], torch.device("cpu"))).tolist() == kept[-1].astype(np.float32).tolist()


@pytest.mark.parametrize("space", FLATTENED, ids=label)
@each_back
def test_other_spaces_are_flattened(module, space, own):
    """Parts lost, in another order or scaled; an array that the next step writes over."""
    check_flattened(module, space, own)


def test_flattening_sees(tmp_path, own):
    """Observations that change in the hands of the learner."""
    old = "envs = gym.wrappers.vector.FlattenObservation(envs)"
    new = f"{old}\n        same = np.zeros((num_envs, gym.spaces.flatdim(space)))\n        whole = envs.observations\n"
    new += "        envs.observations = lambda obs: np.copyto(same, whole(obs)) or same"
    module = planted(script("ppo_clip"), old, new, tmp_path / "planted")
    with pytest.raises(AssertionError):
        check_flattened(module, FLATTENED[-3], own)


@pytest.mark.parametrize(
    "space",
    [
        Text(5),
        Graph(VECTOR, None),
        Sequence(VECTOR),
        Dict(a=VECTOR, b=Text(3)),
        Dict(a=VECTOR, b=Dict(c=Graph(VECTOR, Discrete(2)))),
        Tuple([VECTOR, Dict(a=Tuple([Text(3)]))]),
        Tuple([VECTOR, Sequence(VECTOR)]),
        OneOf([VECTOR, Text(3)]),
    ],
    ids=label,
)
@each_back
def test_spaces_without_a_fixed_count_of_numbers_are_refused(module, space, own, tmp_path):
    """Letters learned from as if they were numbers, or a traceback."""
    with pytest.raises(module.Refusal, match=r"^observation space [^\n]* is not supported: [^\n]*$"):
        learn(module, tmp_path, own(module, space))
    assert not (tmp_path / "run").exists()


@bugs(
    ("space.is_np_flattenable and not isinstance(space, Text)", "space.is_np_flattenable", Text(3)),
    ("all(is_flattenable(part) for part in space.values())", "space.is_np_flattenable", Dict(a=VECTOR, b=Text(3))),
)
def test_refusals_see(tmp_path, own, old, new, case):
    module = planted(script("ppo_clip"), old, new, tmp_path / "planted")
    with pytest.raises(pytest.fail.Exception):  # nothing is raised
        test_spaces_without_a_fixed_count_of_numbers_are_refused(module, case, own, tmp_path)


# Numbers


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
@each_back
def test_numbered_observations(module, dtype):
    """A start forgotten, or any type but PyTorch's own for numbers refused by PyTorch."""
    encoder, width = module.make_encoder(Discrete(4, start=3, dtype=dtype))
    assert width == 4
    assert encoder(torch.from_numpy(np.array([3, 6, 5], dtype))).tolist() == np.eye(4)[[0, 3, 2]].tolist()
    if dtype == np.int64:
        encoder, _ = module.make_encoder(Discrete(3, start=-2))
        assert encoder(torch.tensor([-2, 0])).tolist() == np.eye(3)[[0, 2]].tolist()
    assert module.action_map(Discrete(4, start=-3, dtype=np.int64))(np.array([0, 3])).tolist() == [-3, 0]


# Actions

OPEN = Box(  # bounded, open, bounded below, bounded above
    np.float32([[-1, -np.inf], [0, -np.inf]]), np.float32([[3, np.inf], [np.inf, 0.5]])
)


def to_environment(space, actions):
    """The actions of the environment that belong to those of the policy, number by number."""
    found = []
    for action, low, high in zip(actions.tolist(), space.low.flatten().tolist(), space.high.flatten().tolist()):
        share = (action + 1) / 2
        scaled = low + share * (high - low) if np.isfinite([low, high]).all() else action
        found.append(min(max(scaled, low), high))
    return np.array(found).reshape(space.shape)


def check_actions(module, space, own, folder):
    """What the environments were given is what the policy chose, scaled where there are two bounds, clipped at any."""
    chosen = {}

    class Watched(module.Agent):
        def act(self, obs, greedy=False):
            actions = super().act(obs, greedy)
            chosen.update({row.tobytes(): action for row, action in zip(obs, actions)})
            return actions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Agent", Watched)
        learn(module, folder, own(module, VECTOR, space), log_std_init=0.7, exploration_noise=0.5)
    found = []
    for env in Any.instances:
        for obs, action, _ in env.log:
            if obs.tobytes() in chosen:
                assert action.shape == space.shape
                assert action.dtype == space.dtype
                assert action == pytest.approx(to_environment(space, chosen[obs.tobytes()]), abs=1e-5)
                found.append(action)
    assert len(found) > 20
    found = np.stack(found)
    assert (found.std(0) > 0.01).all()
    if space is OPEN:
        assert (abs(found[:, 0, 1]) > 2.5).any()
        assert (found[:, 1, 0] == 0).any()
        assert (found[:, 1, 1] == 0.5).any()


@each([module for module in MODULES if is_continuous(module) or module in ON_POLICY])
def test_actions_of_several_axes(module, own, tmp_path):
    """One pair of bounds for all numbers, or the numbers of another place."""
    check_actions(module, BOUNDED, own, tmp_path)


@each([module for module in ON_POLICY if not is_imitation(module)])  # their actions do not vary enough
def test_actions_without_bounds(module, own, tmp_path):
    """Scaled by infinity or by a made-up bound; clipped where nothing asks for it, or not where there is one bound."""
    check_actions(module, OPEN, own, tmp_path)


@bugs(
    ("low = np.where(bounded, space.low, -1)", "low = space.low", OPEN),
    ("low = np.where(bounded, space.low, -1)", "low = np.where(bounded, space.low, -2)", OPEN),
    ("np.minimum(np.maximum(scaled, space.low), space.high)", "np.minimum(np.maximum(scaled, low), high)", OPEN),
    ("np.minimum(np.maximum(scaled, space.low), space.high)", "scaled", BOUNDED),
    ("actions = actions.reshape(-1, *space.shape)", "actions = actions.reshape(-1, *space.shape)[:, ::-1]", BOUNDED),
    ("(actions + 1) * ((high - low) / 2)", "(actions + 1) * (high.max() - low.min()) / 2", BOUNDED),
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_actions_see(tmp_path, own, old, new, case):
    module = planted(script("ppo_clip"), old, new, tmp_path / "planted")
    with pytest.raises(AssertionError):
        check_actions(module, case, own, tmp_path)


# A moment of training in each kind of environment


def row_of(space, obs):
    """An observation as it may be found again: in the bytes of an image, or of the numbers that it is flattened to."""
    flat = flatten(space, obs) if isinstance(space, Dict | Tuple | MultiBinary | MultiDiscrete) else obs
    flat = np.asarray(flat)
    return (flat if flat.dtype in (np.uint8, np.bool_, np.int64) else flat.astype(np.float32)).tobytes()


def check_training(module, space, own, folder):
    """The rows that are learned from are the observations of the environment, and on-policy all of them."""
    learned = []
    gradients_of = module.gradients_of

    def watched_gradients_of(loss, *inputs, **options):
        function = gradients_of(loss, *inputs, **options)

        def watched(*inputs):
            learned.extend([x for x in inputs if isinstance(x, dict)])
            return function(*inputs)

        return watched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "gradients_of", watched_gradients_of)
        result = learn(module, folder, own(module, space))
    if acts(module):
        assert result["eval_returns"] == [5.0, 5.0]
    happened = [row for env in [env for env in Any.instances if env.log][:2] for row in env.log]
    if is_imitation(module):
        seen = {row_of(space, obs) for obs, *_ in Any.instances[0].log}
        rows = {obs.numpy().tobytes() for batch in learned for obs in batch["obs"]}
        assert len(rows) >= 8  # of two demonstrations of 5 steps
        assert rows <= seen
    elif "next_obs" not in learned[0]:  # on-policy
        rows = Counter(obs.numpy().tobytes() for batch in learned for obs in batch["obs"])
        assert rows == Counter(row_of(space, obs) for obs, *_ in happened)
        assert rows.total() >= 40  # of 48 steps
    else:
        pairs = {(row_of(space, obs), row_of(space, next_obs)) for obs, _, next_obs in happened}
        for batch in learned:
            for obs, next_obs in zip(batch["obs"], batch["next_obs"]):
                assert (obs.numpy().tobytes(), next_obs.numpy().tobytes()) in pairs


TRAINED = [
    box((4, 36, 40), np.uint8),
    box((40, 36, 3), np.uint8),
    box((36, 37), np.uint8),
    box((7, 7, 3), np.uint8),
    box((10, 10, 10), np.bool_),
    box((3, 4), np.float64),
    Dict(position=VECTOR, kind=Discrete(3, start=2), flags=MultiBinary(2)),
    Tuple([VECTOR, MultiDiscrete([[2, 3], [4, 2]])]),
    Discrete(50, start=-20),
]


@pytest.mark.parametrize("space", TRAINED, ids=label)
@each_module
def test_training(module, space, own, tmp_path):
    """Rows mixed up, stored in another type or written over, in each script and each kind of observations."""
    check_training(module, space, own, tmp_path)


@bugs(
    ("obs = next_obs\n        batch = stack", "obs[...] = next_obs\n        batch = stack", TRAINED[0]),
    ("np.stack([step[name] for step in rollout])", "np.stack([rollout[0][name] for _ in rollout])", TRAINED[-1]),
)
def test_training_sees(tmp_path, own, old, new, case):
    module = planted(script("ppo_clip"), old, new, tmp_path / "planted")
    with pytest.raises(AssertionError):
        check_training(module, case, own, tmp_path)


# Environments of others


def best_reward(module, steps=100):
    """The largest reward of some random steps in a game that pays tens of points."""
    envs = module.make_envs("ALE/Asterix-v5", 2)
    envs.reset(seed=1)
    random = np.random.default_rng(0)
    rewards = [envs.step(random.integers(envs.single_action_space.n, size=2))[1].max() for _ in range(steps)]
    envs.close()
    return max(rewards)


def test_rewards_of_atari_come_whole(tmp_path):
    """Rewards that the environment clips to 1, so that every score is a number of events."""
    module = script("ppo_clip")
    assert best_reward(module) == 50
    broken = planted(module, "options = dict(reward_clipping=False)", "options = {}", tmp_path / "planted")
    assert best_reward(broken) == 1


def length_of_minatar(module, env_kwargs=""):
    """The steps of an episode of MinAtar that nothing but its limit ends."""
    envs = module.make_envs("MinAtar/Breakout-v1", 1, env_kwargs)
    obs, _ = envs.reset(seed=1)
    envs.envs[0].unwrapped.step = lambda action: (obs[0].copy(), 0.0, False, False, {})
    for step in range(1, 10_002):
        *_, terminated, truncated, _ = envs.step(np.zeros(1, int))
        assert not terminated.any()
        if truncated.any():
            return step
    return None


def test_episodes_of_minatar_end(tmp_path):
    """Games that a good policy never ends; a limit of one's own that counts for nothing."""
    module = script("ppo_clip")
    assert length_of_minatar(module) == 10_000
    assert length_of_minatar(module, '{"max_episode_steps": 200}') == 200
    broken = planted(module, 'options["max_episode_steps"] = 10_000', "pass", tmp_path / "planted")
    assert length_of_minatar(broken) is None


@pytest.mark.parametrize(("name", "continuous"), [("ppo_clip", True), ("td3", True), ("dqn", False)])
def test_a_racing_car(name, continuous, tmp_path):
    """Pictures of 96 x 96 pixels in three colours; to steer, both ways, to accelerate and to brake, one way."""
    pytest.importorskip("Box2D")
    env_kwargs = f'{{"max_episode_steps": 8, "continuous": {str(continuous).lower()}}}'
    given = dict(env_kwargs=env_kwargs, num_envs=1, num_steps=8, total_timesteps=24, eval_episodes=1)
    result = learn(script(name), tmp_path, "CarRacing-v3", **given)
    assert np.isfinite(result["eval_returns"]).all()
