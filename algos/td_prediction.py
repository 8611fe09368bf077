# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.2.6", "gymnasium[box2d,classic-control,mujoco]==1.4.0", "mujoco==3.15.0",
#   "ale-py==0.12.1", "MinAtar==1.0.15", "tyro==1.0.17", "tqdm==4.70.1", "filelock==3.20.0", "moviepy==2.2.1",
#   "wandb==0.31.0"]
# ///
"""TD prediction: the value V(s) of a fixed policy by a neural network, from Monte-Carlo or n-step TD targets.

Sutton & Barto 2018, Reinforcement learning: an introduction, ch. 9 and sec. 7.1. From every state s of an episode

    w <- w + alpha (G - V(s)) grad V(s)    with  G = r_1 + gamma r_2 + ... + gamma^(n-1) r_n + gamma^n V(s_n)

where r_1, r_2, ... are the rewards that follow and s_n is the state after n steps. With --method td, n is --n-steps;
with --method mc (Monte Carlo) the rewards go on to the end of the episode. No gradient flows through V(s_n).

    python algos/td_prediction.py --env-id RandomWalk-v0                 # error 0.009 after 3M steps
    python algos/td_prediction.py --env-id RandomWalk-v0 --method mc     # error 0.010 after 3M steps
    python algos/td_prediction.py --env-id CartPole-v1 --policy RUN_DIR  # V of what another script has learned

A Monte-Carlo target is right on average, but varies with all that happens until the end. A TD target varies less, but
it is as wrong as V(s_n) is. Once V is right, value_loss is the variance of the targets: on the random walk 0.83 with mc
and 0.01 with td. Where a time limit or --horizon cuts an episode, V stands for the rest of the return in both methods.

Not in the book: learning waits for the end of an episode, even with TD; a gradient step takes batch_size states; Adam,
and a step size that falls to 0. The score is minus the error: |V - v| in each state of the random walk, whose values v
under the uniform policy are known, and else |V(s_0) - G| in fresh episodes, where G is the return to the end and V
stands for the rest of what a time limit cuts.

Read to the end of train(); what follows the ruler is plumbing that the scripts share.
"""

import argparse
import functools
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO, Literal

import filelock
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box, Dict, Discrete, OneOf, Space, Text, Tuple
from torch import Tensor
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "RandomWalk-v0"  # Gymnasium id, also ALE/*, MinAtar/* or module:YourEnv-v0; decides other defaults
    total_timesteps: int = 3_000_000  # environment steps to train for
    num_envs: int = 8  # N, environments side by side
    policy: str = "uniform"  # whose values: uniform, which takes random actions, or the directory of a finished run
    greedy: bool = False  # the policy of that run without its exploration
    method: Literal["mc", "td"] = "td"  # G: the whole return (Monte Carlo), or n steps of it and then V
    n_steps: int = 1  # n, steps before the bootstrap
    horizon: int = 10_000  # steps after which learning cuts an episode
    batch_size: int = 128  # transitions per gradient step
    learning_rate: float = 2e-4  # step size of the optimizer
    anneal_lr: bool = True  # let the step size fall linearly to 0
    gamma: float = 1.0  # discount
    hidden_size: int = 64  # units in each hidden layer of the MLPs
    compile: bool = False  # compile the gradient step: 10 s at the start, then 2 to 3 times as fast

    seed: int = 1  # of weights, actions, minibatches and environments
    device: str = "auto"  # cpu, cuda, cuda:1, mps or auto: a CUDA GPU for images if there is one, else the CPU
    torch_threads: int = 1  # CPU threads, 0 for one per core; small networks are fastest with 1
    env_kwargs: str = ""  # JSON for the environment, like '{"max_episode_steps": 200}'
    run_dir: str = ""  # where the results go; if empty, runs/<env>__<algo>__<seed>__<time>
    track: bool = False  # log to Weights & Biases
    wandb_project: str = "foliorl"  # the project there
    wandb_entity: str = ""  # the user or team there; if empty, your default
    capture_video: bool = False  # film an episode of the final evaluation
    eval_episodes: int = 20  # episodes of the final evaluation
    log_every: int = 1000  # environment steps between lines of the log
    checkpoint_every: int = 100_000  # environment steps between checkpoints
    resume: str = ""  # run directory to continue; a finished run is only evaluated again

    def __post_init__(self) -> None:
        check_ranges(self, minimum=dict(seed=0, torch_threads=0), maximum=dict(gamma=1))
        if self.greedy and self.policy == "uniform":
            raise Refusal("--greedy needs --policy RUN_DIR: the uniform policy has no exploration to leave out")
        if self.num_envs > self.total_timesteps:
            raise Refusal(f"num_envs = {self.num_envs} may not exceed total_timesteps")
        if self.batch_size > self.total_timesteps:
            raise Refusal(f"batch_size = {self.batch_size} may not exceed total_timesteps")


class Agent(nn.Module):
    """V(s), an MLP or, for images, a linear layer on top of a CNN."""

    def __init__(self, obs_space: Space, args: Args) -> None:
        super().__init__()
        self.encoder, width = make_encoder(obs_space)
        hidden = [] if is_image(obs_space) else [args.hidden_size, args.hidden_size]
        self.v = mlp([width, *hidden, 1], nn.ReLU)

    def forward(self, obs: Tensor) -> Tensor:
        """V(s) (B,) of observations (B, ...)."""
        return self.v(self.encoder(obs)).squeeze(-1)


def make_policy(args: Args, obs_space: Space, action_space: Space, device: torch.device) -> Callable:
    """The policy whose value is learned, from observations (B, ...) to actions (B,) or (B, D)."""
    if args.policy != "uniform":
        actor = load_agent(args.policy, obs_space, action_space, device)
        return lambda obs: actor.act(obs, greedy=args.greedy)
    if isinstance(action_space, Discrete):
        num_actions = int(action_space.n)
        return lambda obs: torch.randint(num_actions, (len(obs),)).numpy()
    if not action_space.is_bounded():
        raise Refusal(f"action space {action_space} is not supported: it must be Discrete or a Box with bounds")
    D = gym.spaces.flatdim(action_space)
    return lambda obs: 2 * torch.rand(len(obs), D).numpy() - 1  # [-1, 1] is scaled to the bounds


def n_step_rows(
    states: list[np.ndarray], rewards: list[float], terminated: bool, n: int, gamma: float
) -> list[dict[str, np.ndarray]]:
    """One row to learn from per step of an episode, which has T + 1 states and T rewards.

    A row has the discounted sum of the next m rewards, the state after them and its weight gamma^m in the target, where
    m is n or, near the end of the episode, what is left of it. At the end a termination stops the bootstrap.
    """
    T = len(rewards)
    rewards = np.array(rewards)
    discounts = gamma ** np.arange(T + 1)
    rows = []
    for t in range(T):
        m = min(n, T - t)
        row = dict(obs=states[t], next_obs=states[t + m], discounts=discounts[m])
        row["rewards"] = discounts[:m] @ rewards[t : t + m]
        row["terminated"] = terminated and t + m == T
        rows.append(row)
    return rows


def td_target(rewards: Tensor, terminated: Tensor, next_values: Tensor, gamma: float | Tensor) -> Tensor:
    """y (B,): r + gamma V(s') or, where s' is terminal, r. A truncation is no end. Inputs (B,) each or broadcast."""
    return rewards + gamma * ~terminated * next_values


def value_loss(agent: Agent, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of V on a batch with one row per state, and what to log."""
    with torch.no_grad():  # semi-gradient: the target counts as a constant
        next_values = agent(batch["next_obs"])
        G = td_target(batch["rewards"], batch["terminated"], next_values, batch["discounts"])  # eq. 7.1

    values = agent(batch["obs"])
    loss = F.mse_loss(values, G)
    return loss, dict(value_loss=loss.detach(), value=values.detach().mean())


def train(args: Args) -> dict:
    """Train, evaluate, and return what result.json holds; raises Refusal with one sentence on bad input."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    envs = make_envs(args.env_id, args.num_envs, args.env_kwargs)
    obs_space = envs.single_observation_space
    action_space = envs.single_action_space
    to_env = action_map(action_space)
    device = pick_device(args.device, obs_space)

    N = args.num_envs
    n = args.n_steps if args.method == "td" else args.horizon  # no episode is longer
    policy = make_policy(args, obs_space, action_space, device)
    agent = Agent(obs_space, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    value_gradients = gradients_of(value_loss, agent.parameters(), args)
    run = Run(args, agent=agent, optimizer=optimizer)

    log_every = max(args.log_every // N, 1) * N
    obs, _ = envs.reset(seed=train_seed(args.seed, run.step // log_every * N))  # other episodes in a resumed run
    done = np.zeros(N, bool)
    score = np.zeros(N)  # return so far of the running episodes
    states = [[] for _ in range(N)]  # of the running episodes
    rewards = [[] for _ in range(N)]  # of the running episodes
    rows = []  # of the episodes that have ended or were cut, and not learned from yet
    num_updates = 0
    history = deque(maxlen=100)  # metrics of the last gradient steps

    for step in range(run.step + N, args.total_timesteps + 1, N):
        if args.anneal_lr:
            anneal(optimizer, 1 - (step - N) / args.total_timesteps)

        # Take one step in each environment.
        action = policy(obs)
        next_obs, reward, terminated, truncated, _ = envs.step(to_env(action))
        valid = ~done  # the step after an end only resets the environment: it is no transition
        done = terminated | truncated
        score = score * valid + reward
        run.episode_returns += score[done].tolist()

        # Compute what there is to learn from each episode that ends in this step or is cut at the horizon.
        for i in np.flatnonzero(valid):
            states[i].append(obs[i])
            rewards[i].append(reward[i])
            if done[i] or len(rewards[i]) == args.horizon:
                states[i].append(next_obs[i])
                rows += n_step_rows(states[i], rewards[i], terminated[i], n, args.gamma)
                states[i] = []
                rewards[i] = []
        obs = next_obs

        # Optimise by one gradient step per batch_size rows.
        while len(rows) >= args.batch_size:
            batch = stack(rows[: args.batch_size], device)
            rows = rows[args.batch_size :]
            gradients, metrics = value_gradients(agent, batch)
            descend(optimizer, gradients)
            num_updates += 1
            history.append(metrics)

        run.bar.update(N)
        if step % log_every < N or step + N > args.total_timesteps:
            run.log(step, mean_metrics(history) | known_rmse(agent, args))
            history.clear()

    if num_updates == 0 and not args.resume:
        raise Refusal("nothing was learned: too few steps of finished episodes; raise total_timesteps or lower horizon")
    run.save()
    envs.close()
    return run.finish(evaluate_values(agent, policy, args, run.dir))


# Defaults in place of those of Args: of the first family that names the environment.
FAMILIES = {
    "CartPole Acrobot MountainCar MountainCarContinuous Pendulum": dict(
        total_timesteps=200_000, learning_rate=1e-3, gamma=0.99,
    ),
    "LunarLander LunarLanderContinuous BipedalWalker BipedalWalkerHardcore": dict(
        total_timesteps=1_000_000, gamma=0.99,
    ),
    "HalfCheetah Hopper Walker2d Ant Humanoid Swimmer Reacher Pusher InvertedPendulum InvertedDoublePendulum": dict(
        total_timesteps=1_000_000, gamma=0.99,
    ),
    "MinAtar/": dict(total_timesteps=1_000_000, gamma=0.99),
    "ALE/": dict(total_timesteps=1_000_000, gamma=0.99, horizon=2000, learning_rate=1e-4, torch_threads=0),
}  # fmt: skip


# ====================================================================================================================
# What follows is plumbing: no algorithm is in it, and every script that needs a part of it has the same text.


class Refusal(Exception):
    """Bad input or a fault from outside, said in one sentence; main() prints it without a traceback."""


def is_image(space: Space) -> bool:
    """uint8 or bool with three axes or, if both sides have 36 pixels or more, uint8 with two (grey)."""
    if not isinstance(space, Box) or space.dtype not in (np.uint8, np.bool_):
        return False
    if len(space.shape) == 2:
        return space.dtype == np.uint8 and min(space.shape) >= 36
    if len(space.shape) != 3:
        return False
    sides = space.shape[1:] if space.shape[0] < space.shape[-1] else space.shape[:-1]
    return min(sides) >= 3  # room for a 3x3 filter


def is_vector(space: Space) -> bool:
    """Numbers along one axis."""
    return isinstance(space, Box) and len(space.shape) == 1


def make_encoder(space: Space) -> tuple[nn.Module, int]:
    """What turns observations (B, ...) into features (B, width), and the width."""
    if isinstance(space, Discrete):
        return OneHot(space), int(space.n)
    if is_vector(space):
        return ToFloat(), space.shape[0]
    to_float = ImageToFloat(space)
    example = to_float(torch.as_tensor(space.sample()[None]))
    channels = example.shape[1]
    if min(example.shape[2:]) >= 36:  # Atari and its like: the network of Mnih et al. 2015
        width = 512
        convolutions = [
            nn.Conv2d(channels, 32, 8, stride=4), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1), nn.ReLU(),
        ]  # fmt: skip
    else:  # MinAtar and its like: the network of Young & Tian 2019
        width = 128
        convolutions = [nn.Conv2d(channels, 16, 3), nn.ReLU()]
    cnn = nn.Sequential(*convolutions, nn.Flatten())
    num_features = cnn(example).shape[1]
    return nn.Sequential(to_float, *cnn, nn.Linear(num_features, width), nn.ReLU()), width


class ToFloat(nn.Module):
    """Numbers (B, D) in the precision of the network, which a buffer knows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(()), persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        return obs.to(self.one.dtype)


class OneHot(ToFloat):
    """Integers (B,) as vectors (B, n)."""

    def __init__(self, space: Discrete) -> None:
        super().__init__()
        self.start = int(space.start)
        self.n = int(space.n)

    def forward(self, obs: Tensor) -> Tensor:
        return super().forward(F.one_hot(obs.long() - self.start, self.n))


class ImageToFloat(ToFloat):
    """Images as (B, C, H, W), in [0, 1]. Channels are the last axis, unless the first one is shorter."""

    def __init__(self, space: Box) -> None:
        super().__init__()
        self.grey = len(space.shape) == 2
        self.channels_last = space.shape[-1] <= space.shape[0]
        self.scale = 255 if space.dtype == np.uint8 else 1

    def forward(self, obs: Tensor) -> Tensor:
        x = super().forward(obs) / self.scale
        if self.grey:
            x = x.unsqueeze(1)
        elif self.channels_last:
            x = x.movedim(-1, 1)
        return x.contiguous(memory_format=torch.channels_last)  # convolutions are faster this way


def mlp(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        layers.append(nn.Linear(n_in, n_out))
        layers.append(activation())
    return nn.Sequential(*layers[:-1])


def gradients_of(
    loss: Callable, parameters: Iterable[nn.Parameter], args: Args, max_norm: float = math.inf
) -> Callable:
    """A function that takes what the loss takes and returns its gradients for these parameters, and its metrics.

    The gradients come as a dict from parameter to gradient, scaled down if together they are longer than max_norm.
    With --compile, forward and backward pass are compiled into one function.
    """
    parameters = list(parameters)

    def differentiate(*inputs) -> tuple[list[Tensor], dict[str, Tensor]]:
        value, metrics = loss(*inputs)
        gradients = torch.autograd.grad(value, parameters)
        if max_norm < math.inf:
            norm = nn.utils.get_total_norm(gradients, foreach=False)
            scale = (max_norm / (norm + 1e-6)).clamp(max=1)
            gradients = [gradient * scale for gradient in gradients]
        return gradients, metrics

    if args.compile and can_compile(parameters[0].device):
        torch._dynamo.config.trace_autograd_ops = True  # lets the compiler see torch.autograd.grad
        differentiate = torch.compile(differentiate, dynamic=True)

    def function(*inputs) -> tuple[dict[nn.Parameter, Tensor], dict[str, Tensor]]:
        gradients, metrics = differentiate(*inputs)
        return dict(zip(parameters, gradients)), metrics

    return function


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether PyTorch finds a compiler on this machine; says so if not, for then training is slower."""
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except RuntimeError:
        print("PyTorch finds no compiler on this machine: training goes on without --compile", flush=True)
        return False
    return True


def descend(optimizer: torch.optim.Optimizer, gradients: dict[nn.Parameter, Tensor]) -> None:
    """One step of the optimizer down these gradients."""
    for parameter, gradient in gradients.items():
        if gradient.stride() != parameter.stride():  # as behind a CNN; a fused optimizer would mix up the elements
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient
    optimizer.step()


def anneal(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Let every parameter group learn with this share of the step size that it was made with."""
    for group in optimizer.param_groups:
        group["lr"] = share * group.setdefault("initial_lr", group["lr"])


def mean_metrics(history: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each metric over the gradient steps that have it."""
    columns: dict[str, list[Tensor]] = {}
    for metrics in history:
        for name, value in metrics.items():
            columns.setdefault(name, []).append(value)
    return {name: torch.stack(column).mean().item() for name, column in columns.items()}


def to_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; float64 becomes float32 first, for not every device has float64."""
    tensor = torch.from_numpy(array)
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    return tensor.to(device)


def stack(rollout: list[dict[str, np.ndarray]], device: torch.device) -> dict[str, Tensor]:
    """The columns of T steps as tensors (T, N, ...)."""
    return {name: to_tensor(np.stack([step[name] for step in rollout]), device) for name in rollout[0]}


def check_ranges(args: Args, minimum: dict[str, float], maximum: dict[str, float]) -> None:
    """Raise Refusal unless counts are at least 1 and other numbers at least 0, or within the limits given."""
    for field in fields(args):
        value = getattr(args, field.name)
        if isinstance(value, bool | str):
            continue
        low = minimum.get(field.name, 1 if field.type is int else 0)
        high = maximum.get(field.name, 2**62 if field.type is int else math.inf)
        if not low <= value <= high:
            raise Refusal(f"{field.name} must lie in [{low}, {high}], but is {value}")


def pick_device(name: str, obs_space: Space) -> torch.device:
    """The device of --device; raises Refusal if this machine has no such device."""
    if name == "auto":
        return torch.device("cuda" if is_image(obs_space) and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refusal(f"device {name} is not available on this machine") from error
    return device


def env_seed(seed: int, offset: int = 0) -> int:
    """Each run has a million seeds; environment i of a vector takes the i-th after this. Runs 0 to 2146 share none."""
    return (1_000_000 * seed + offset) % (2**31 - 1)  # ALE takes no larger one


def train_seed(seed: int, offset: int) -> int:
    """A seed of the first half of the run's million, for environments to learn in; the second is for the evaluation."""
    return env_seed(seed, offset % 498_973)  # a prime: round numbers of steps do not come back to the first episodes


def make_envs(env_id: str, num_envs: int, env_kwargs: str = "", render: bool = False) -> gym.vector.VectorEnv:
    """Environments side by side, in autoreset mode NEXT_STEP; raises Refusal for what we cannot learn in."""
    try:
        kwargs = json.loads(env_kwargs or "{}")
    except ValueError as error:
        raise Refusal(f"env_kwargs {env_kwargs!r} is no JSON: {error}") from error
    if not isinstance(kwargs, dict):
        raise Refusal(f"env_kwargs {env_kwargs!r} is no JSON object")
    options = dict(render_mode="rgb_array") if render else {}
    if render and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    try:
        if env_id.startswith("ALE/"):
            gym.register_envs(importlib.import_module("ale_py"))
            options = dict(reward_clipping=False)  # scores count whole
        if env_id.startswith("MinAtar/"):
            options["max_episode_steps"] = 10_000  # MinAtar has no limit of its own
            if env_id not in gym.registry:
                importlib.import_module("minatar.gym").register_envs()
        envs = gym.make_vec(env_id, num_envs, **options | kwargs)
    except (gym.error.Error, ImportError) as error:
        if ":" in env_id and type(error) is ImportError:
            raise  # a bug in the user's own module, with its traceback
        raise Refusal(f"{env_id} cannot be made: {error}") from error
    except TypeError as error:
        if (kwargs or render) and "argument" in str(error):
            raise Refusal(f"{env_id} cannot be made: {error}") from error
        raise

    if render and not env_id.startswith("ALE/") and "rgb_array" not in envs.metadata.get("render_modes", []):
        raise Refusal(f"{env_id} cannot be filmed: it has no render mode rgb_array")
    space = envs.single_observation_space
    mode = envs.metadata.get("autoreset_mode")
    if mode != gym.vector.AutoresetMode.NEXT_STEP:
        raise Refusal(f"{env_id} resets in mode {mode}, but only NEXT_STEP is supported")
    if not is_flattenable(space):
        raise Refusal(f"observation space {space} is not supported: it must be made of numbers, of a fixed count")
    actions = envs.single_action_space
    if not (isinstance(actions, Discrete) or (isinstance(actions, Box) and actions.dtype.kind == "f")):
        raise Refusal(f"action space {actions} is not supported: it must be Discrete or a Box of floats")
    if not (is_vector(space) or is_image(space) or isinstance(space, Discrete)):
        envs = gym.wrappers.vector.FlattenObservation(envs)
    return envs


def is_flattenable(space: Space) -> bool:
    """Whether a vector of numbers can stand for the space; text has numbers too, but they mean nothing."""
    if isinstance(space, Dict):
        return all(is_flattenable(part) for part in space.values())
    if isinstance(space, Tuple | OneOf):
        return all(is_flattenable(part) for part in space.spaces)
    return space.is_np_flattenable and not isinstance(space, Text)


def action_map(space: Space) -> Callable[[np.ndarray], np.ndarray]:
    """From the policy's actions (N, ...) to the environment's: [-1, 1] becomes [low, high]; the rest is clipped."""
    if isinstance(space, Discrete):
        return lambda actions: actions + space.start
    bounded = np.isfinite(space.high - space.low)
    low = np.where(bounded, space.low, -1)
    high = np.where(bounded, space.high, 1)

    def to_env(actions: np.ndarray) -> np.ndarray:
        if not np.isfinite(actions).all():
            raise Refusal(f"training diverged: an action is not finite; {Run.saved}")
        actions = actions.reshape(-1, *space.shape)
        scaled = low + (actions + 1) * ((high - low) / 2)
        clipped = np.minimum(np.maximum(scaled, space.low), space.high)  # faster than clip
        return clipped.astype(space.dtype, copy=False)

    return to_env


def load_agent(folder: str, obs_space: Space, action_space: Space, device: torch.device) -> nn.Module:
    """The agent of a run of any script beside this one: agent.act(obs, greedy) is its policy. Raises Refusal."""
    try:
        algo = json.loads((Path(folder) / "config.json").read_text())["algo"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{folder} holds no run: its config.json is missing or damaged") from error
    path = Path(__file__).with_name(f"{algo}.py")
    if not path.exists():
        raise Refusal(f"{folder} holds a run of {algo}, but there is no script {path}")
    spec = importlib.util.spec_from_file_location(algo, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[algo] = script  # where dataclasses look up their annotations
    spec.loader.exec_module(script)
    if not hasattr(getattr(script, "Agent", None), "act"):
        raise Refusal(f"{folder} holds a run of {algo}, which learns no policy")

    try:
        settings = script.Args(**script.read_config(Path(folder)))
        envs = script.make_envs(settings.env_id, 1, settings.env_kwargs)
    except script.Refusal as error:
        raise Refusal(str(error)) from error
    envs.close()
    for ours, theirs in ((obs_space, envs.single_observation_space), (action_space, envs.single_action_space)):
        if ours != theirs:
            raise Refusal(f"{folder} holds a policy for another environment: its space {theirs} is not {ours}")

    numbered = "num_actions" in inspect.signature(script.Agent).parameters
    agent = script.Agent(obs_space, gym.spaces.flatdim(action_space) if numbered else action_space, settings)
    try:
        checkpoint = torch.load(Path(folder) / "checkpoint.pt", map_location="cpu")
        part = "target" if algo in ("ddpg", "td3") else "agent"  # what the run was evaluated by
        agent.load_state_dict(checkpoint[part])
    except Exception as error:  # what is raised depends on where the file is damaged
        raise Refusal(f"the checkpoint of {folder} is missing or damaged") from error
    if hasattr(agent, "epsilon") and not getattr(settings, "noisy", False):
        agent.epsilon = settings.end_e  # as it was at the end of training
    return agent.eval().to(device)


class Run:
    """A run's directory with its files, its progress bar and, with --track, its page on wandb."""

    stop_signal = 0  # Ctrl-C or SIGTERM, set by main(): save at the next line of the log and stop
    saved = "nothing was saved"  # what messages can promise

    def __init__(self, args: Args, **parts: nn.Module | torch.optim.Optimizer) -> None:
        """Start afresh or, with --resume, restore the parts from the checkpoint; raises Refusal."""
        self.args = args
        self.parts = parts
        self.algo = Path(__file__).stem
        name = f"{args.env_id}__{self.algo}__{args.seed}__{int(time.time())}"
        self.dir = Path(args.resume or args.run_dir or f"runs/{re.sub('[:/]', '-', name)}")
        self.step = 0  # environment steps so far
        self.wall_time = 0.0
        self.log_size = 0
        self.wandb_id = str(time.time_ns())
        self.episode_returns: list[float] = []  # of the episodes since the last log()
        self.last_returns: list[float] = []  # of the last 100 episodes before that
        Run.saved = "nothing was saved"

        self.import_optional()
        has_checkpoint = (self.dir / "checkpoint.pt").exists()
        if args.resume and not has_checkpoint:
            raise Refusal(f"{self.dir} holds no checkpoint to resume from")
        self.lock_directory()
        if has_checkpoint and not args.resume:
            raise Refusal(f"{self.dir} holds a run already, which --resume continues")
        if args.resume:
            self.load()
        self.config = dict(algo=self.algo, torch=torch.__version__, gymnasium=gym.__version__) | asdict(args)
        write_aside(self.dir / "config.json", lambda file: file.write(json.dumps(self.config, indent=1).encode()))
        self.file = open(self.dir / "metrics.jsonl", "a")
        self.file.truncate(min(self.log_size, self.file.tell()))

        if self.wandb:
            self.wandb.init(
                project=args.wandb_project, entity=args.wandb_entity or None, name=self.dir.name, dir=self.dir,
                config=self.config, id=self.wandb_id, resume="allow",
            )  # fmt: skip
        print(f"{self.dir}: step {self.step} of {args.total_timesteps}", flush=True)
        self.bar = tqdm(
            total=args.total_timesteps, initial=self.step, unit=" steps", disable=not os.isatty(2), dynamic_ncols=True
        )
        self.start = time.perf_counter() - self.wall_time  # unlike the time of day, it never goes back
        self.next_line = time.perf_counter() + 10  # for the lines in place of the bar where there is no terminal

    def import_optional(self) -> None:
        """Import what only some runs need, so that a missing package is missed before training."""
        self.wandb = None
        try:
            if self.args.track:
                self.wandb = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            raise Refusal(f"a package is missing: {error}") from error
        if self.wandb:
            self.log_in()

    def log_in(self) -> None:
        """See that wandb will take what is logged; raises Refusal."""
        try:
            if self.wandb.setup().settings.mode == "online" and not self.wandb.login(prompt=False):
                raise Refusal("--track needs `wandb login` first, or WANDB_MODE=offline")
        except self.wandb.Error as error:
            raise Refusal(f"--track: {error}; WANDB_MODE=offline needs no login") from error

    def lock_directory(self) -> None:
        """Keep other processes out for as long as this one lives."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(self.dir / "lock")
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise Refusal(f"{self.dir} is in use by another process") from None
        except OSError as error:
            raise Refusal(f"{self.dir} cannot be used: {error}") from error

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record what happened since the last line: bar, metrics.jsonl, wandb and, when it is due, a checkpoint."""
        if not np.isfinite(self.episode_returns).all():
            self.fail(f"a return before step {step} is not finite")
        if not np.isfinite(list(metrics.values())).all():
            self.fail(f"training diverged before step {step}")
        self.wall_time = time.perf_counter() - self.start
        episodes = self.episode_returns
        line = dict(
            global_step=step,
            wall_time=self.wall_time,
            SPS=step / self.wall_time,
            episodes=len(episodes),
            episodic_return=sum(episodes) / len(episodes) if episodes else None,
            **metrics,
        )
        try:
            print(json.dumps(line), file=self.file, flush=True)
        except OSError as error:
            self.fail(f"{self.file.name} could not be written ({error})")
        if self.wandb:
            self.wandb.log(line, step=step)
        self.last_returns = (self.last_returns + episodes)[-100:]
        self.episode_returns = []
        checkpoint_due = step // self.args.checkpoint_every > self.step // self.args.checkpoint_every
        stopping = Run.stop_signal != 0  # asked once: a signal that comes now waits for the next line
        self.step = step
        if checkpoint_due or stopping:
            self.save()
        if stopping:
            self.bar.close()
            raise KeyboardInterrupt
        self.show_progress(step)

    def show_progress(self, step: int) -> None:
        """Move the bar or, where there is no terminal, print a line every ten seconds."""
        status = f"return {np.mean(self.last_returns):.2f}" if self.last_returns else "no episode has ended"
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and time.perf_counter() > self.next_line:
            self.next_line = time.perf_counter() + 10
            speed = step / self.wall_time
            try:
                print(f"{step} of {self.args.total_timesteps} steps, {speed:.0f} steps/s, {status}", flush=True)
            except OSError:
                return  # what reads the output has ended; the run need not

    def fail(self, reason: str) -> None:
        """Stop the run for a reason."""
        self.bar.close()
        raise Refusal(f"{reason}; {self.saved}")

    def save(self) -> None:
        """Write the checkpoint, unless a number is not finite: then the last good one stays and Refusal is raised."""
        for part in self.parts.values():
            numbers = part.state_dict().values() if isinstance(part, nn.Module) else []
            if not all(x.isfinite().all() for x in numbers if x.is_floating_point()):
                self.fail(f"training diverged before step {self.step}")
        checkpoint = {name: part.state_dict() for name, part in self.parts.items()}
        checkpoint |= dict(args=asdict(self.args) | dict(algo=self.algo), log_size=self.file.tell())
        for name in ("step", "wall_time", "last_returns", "wandb_id"):
            checkpoint[name] = getattr(self, name)
        write_aside(self.dir / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
        Run.saved = f"--resume {self.dir} continues from step {self.step}"

    def load(self) -> None:
        """Continue from the checkpoint; raises Refusal if it is damaged or of another run than the flags say."""
        path = self.dir / "checkpoint.pt"
        try:
            saved = torch.load(path, map_location="cpu")
            for name in ("step", "wall_time", "last_returns", "log_size", "wandb_id"):
                if not isinstance(saved[name], type(getattr(self, name))):
                    raise TypeError(f"{name} is {saved[name]}")
                setattr(self, name, saved[name])
            for name in ("args", *self.parts):
                if not isinstance(saved[name], dict):
                    raise TypeError(f"{name} is {saved[name]}")
            states = {name: saved[name] for name in self.parts}
            before = saved["args"]
        except PermissionError as error:
            raise Refusal(f"{path} cannot be read: {error}") from error
        except Exception as error:  # what is raised depends on where the file is damaged
            raise Refusal(f"{path} is damaged; start the run anew in another --run-dir") from error

        now = asdict(self.args) | dict(algo=self.algo)
        fixed = ("algo", "env_id", "env_kwargs", "seed", "run_dir", "optimizer", "v_min", "v_max")
        for name in (*fixed, "priority_exponent", "clip_reward"):  # a buffer may hold what was made with the last two
            if now.get(name) != before.get(name):
                raise Refusal(f"{self.dir} holds a run with {name} {before.get(name)!r}, which cannot change")
        if now["total_timesteps"] < self.step:
            raise Refusal(f"{self.dir} has {self.step} steps already, more than total_timesteps")
        planned = before.get("total_timesteps")
        if now["total_timesteps"] != planned:
            print(f"planned for {planned} steps, now for {now['total_timesteps']}: schedules, if any, are stretched")
        try:
            for name, part in self.parts.items():
                state = states[name]
                if isinstance(part, torch.optim.Optimizer):  # the flags of today decide the step size
                    state = state | dict(param_groups=part.state_dict()["param_groups"])
                part.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            raise Refusal(f"{self.dir} does not hold the networks, or the buffer, that the flags ask for") from error
        if now["total_timesteps"] != planned:
            (self.dir / "result.json").unlink(missing_ok=True)  # the run it tells of is no longer finished
        torch.manual_seed(env_seed(self.args.seed, self.step))  # not the random numbers of the start again
        Run.saved = f"--resume {self.dir} continues from step {self.step}"

    def finish(self, evaluation: dict) -> dict:
        """Write, print and return the result."""
        returns = evaluation["eval_returns"]
        result = {name: self.config[name] for name in ("algo", "env_id", "seed", "total_timesteps")}
        result |= dict(
            trained_steps=self.step,
            **evaluation,
            eval_mean=float(np.mean(returns)),
            train_return=float(np.mean(self.last_returns)) if self.last_returns else None,
            sps=self.step / self.wall_time,
            wall_time=self.wall_time,
        )
        write_aside(self.dir / "result.json", lambda file: file.write(json.dumps(result, indent=1).encode()))
        self.file.close()
        self.bar.close()
        if self.wandb:
            self.wandb.finish()
        self.lock.release()
        cut = f", {evaluation['eval_cut']} of {len(returns)} episodes cut" if evaluation["eval_cut"] else ""
        print(f"{self.dir}: evaluation {np.mean(returns):.2f} +- {np.std(returns):.2f}{cut}")
        return result


def write_aside(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file aside and put it in place: a kill leaves the old one or the new one, and so does a full disk."""
    aside = path.with_suffix(".tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides the fault of the disk
        raise Refusal(f"{path} could not be written ({reason}); {Run.saved}") from error


def frame(envs: gym.vector.VectorEnv, obs: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) of the first environment; that of Atari is its newest observation."""
    envs = envs.unwrapped
    if envs.render_mode != "rgb_array":
        return np.repeat(obs[0, -1, :, :, None], 3, axis=-1)
    picture = envs.envs[0].render() if hasattr(envs, "envs") else envs.render()[0]
    if picture.dtype != np.uint8:  # MinAtar's: 10 x 10 numbers in [0, 1]
        picture = (255 * picture).astype(np.uint8).repeat(16, 0).repeat(16, 1)
    return picture


def check_video(args: Args) -> None:
    """Raise Refusal if --capture-video will find nothing to film with, before anything is trained."""
    try:
        importlib.import_module("moviepy")
    except ModuleNotFoundError as error:
        raise Refusal(f"a package is missing: {error}") from error
    try:
        envs = make_envs(args.env_id, 1, args.env_kwargs, render=True)
    except AttributeError as error:  # PyOpenGL's, if there is no library for graphics
        raise Refusal(f"{args.env_id} cannot be filmed: {error}") from error
    obs, _ = envs.reset()
    if envs.unwrapped.render_mode != "rgb_array" and obs.ndim != 4:
        raise Refusal(f"{args.env_id} cannot be filmed: it shows neither rgb_array nor frames in grey")
    try:
        frame(envs, obs)
    except (gym.error.Error, ImportError) as error:
        raise Refusal(f"{args.env_id} cannot be filmed: {error}") from error
    envs.close()


def find_family(env_id: str, env_kwargs: str) -> str:
    """The first family that names the environment or its namespace, else the kind of its spaces; "" for none."""
    if env_id.count(":") > 1:
        raise Refusal(f"{env_id} is no id of an environment")
    try:
        namespace, name, _ = gym.envs.registration.parse_env_id(env_id.split(":")[-1])
    except gym.error.Error as error:
        raise Refusal(str(error)) from error
    for family in FAMILIES:
        if name in family.split() or f"{namespace}/" in family.split():
            return family
    envs = make_envs(env_id, 1, env_kwargs)
    envs.close()
    if "Discrete-states" in FAMILIES and isinstance(envs.single_observation_space, Discrete):
        return "Discrete-states"
    if "Box-actions" in FAMILIES and isinstance(envs.single_action_space, Box):
        return "Box-actions"
    return ""


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over the defaults of the environment's family or, with --resume, over the arguments of that run."""
    # The defaults depend on these three, so they are read first. A value that is missing is left for tyro to tell.
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--env-id", "--env_id", nargs="?", const=Args.env_id, default=Args.env_id)
    first_look.add_argument("--env-kwargs", "--env_kwargs", nargs="?", const="", default="")
    first_look.add_argument("--resume", nargs="?", const="", default="")
    given, _ = first_look.parse_known_args(argv)
    if given.resume:
        defaults = read_config(Path(given.resume)) | dict(capture_video=False)
        source = f"the arguments of {given.resume}"
    else:
        family = find_family(given.env_id, given.env_kwargs)
        defaults = dict(env_id=given.env_id) | FAMILIES.get(family, {})
        source = f"the defaults for {family or Args.env_id + ' and all of no family'}"
    args = tyro.cli(Args, args=argv, default=Args(**defaults), description=f"{__doc__}\nShown are {source}.")
    print(f"{args.env_id} with {source}", flush=True)
    if args.capture_video:
        check_video(args)
    return args


def read_config(folder: Path) -> dict:
    """The arguments of the run in a directory."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        arguments = {field.name: config[field.name] for field in fields(Args)}
        for name, value in arguments.items():
            kind = type(getattr(Args, name))
            if not isinstance(value, int | float if kind is float else kind):
                raise TypeError(f"{name} is {value}")
    except FileNotFoundError as error:
        raise Refusal(f"{folder} holds no run to resume") from error
    except KeyError as error:
        told = f"{path} is damaged or another script's, for it has no {error}"
        raise Refusal(f"{told}; start the run anew in another --run-dir") from error
    except PermissionError as error:
        raise Refusal(f"{path} cannot be read: {error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise Refusal(f"{path} is damaged; start the run anew in another --run-dir") from error
    return arguments


def prepare_forks() -> None:
    """Reset the signals in processes that an environment forks, which would else take them for ours.

    SIGTERM ends such a process, since to close an environment may mean to send it one and to wait. Ctrl-C is ignored:
    this process handles it. A SIGTERM to all processes thus ends the run, too, at its last checkpoint.
    """
    masks = []

    def before() -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}))  # none may get lost in between

    def after_in_parent() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop())

    def after_in_child() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        after_in_parent()

    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(before=before, after_in_parent=after_in_parent, after_in_child=after_in_child)


def main() -> None:
    """Train as the command line says. Bad input ends in one sentence; an error of the user's keeps its traceback."""

    def stop(number: int, _: object) -> None:
        if Run.stop_signal:
            raise KeyboardInterrupt
        Run.stop_signal = number
        try:
            os.write(2, b"\nsaving and stopping at the next line of the log; once more to stop at once\n")
        except OSError:
            return  # what reads the output, such as tee, has been stopped, too

    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters of a text or a path
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    prepare_forks()
    try:
        train(parse_args())
    except Refusal as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(__file__).name}: interrupted; {Run.saved}", file=sys.stderr)
        sys.exit(128 + Run.stop_signal)


# ====================================================================================================================
# What follows is for this script alone: how V is judged, and the random walk.


@torch.no_grad()
def known_errors(agent: nn.Module, args: Args) -> np.ndarray:
    """V - v at each state of the random walk; no number where the true values v are not known."""
    if args.env_id != "RandomWalk-v0" or args.policy != "uniform":
        return np.zeros(0)
    states = torch.arange(1, 20, device=next(agent.parameters()).device)
    return agent(states).numpy(force=True) - RandomWalk.true_values(args.gamma)


def known_rmse(agent: nn.Module, args: Args) -> dict[str, float]:
    """The root mean square error of V for the log, where the true values are known."""
    errors = known_errors(agent, args)
    return dict(rmse=float(np.sqrt(np.mean(errors**2)))) if len(errors) else {}


def evaluate_values(agent: nn.Module, policy: Callable, args: Args, folder: Path) -> dict:
    """Minus the absolute errors of V, their root mean square, and how many returns were cut to find them.

    The errors are V - v at each state where the true values v are known, and else V(s_0) - G of fresh episodes.
    """
    agent.eval()
    errors = known_errors(agent, args)
    num_cut = 0
    if len(errors) == 0:
        values, returns, num_cut = play(agent, policy, args, folder)
        errors = values - returns
    rmse = float(np.sqrt(np.mean(errors**2)))
    print(f"root mean square error of V: {rmse:.4f}")
    return dict(eval_returns=(-abs(errors)).tolist(), eval_cut=num_cut, rmse=rmse)


@torch.no_grad()
def play(
    agent: nn.Module, policy: Callable, args: Args, folder: Path, max_steps: int = 27_000
) -> tuple[np.ndarray, np.ndarray, int]:
    """V(s_0) and the return G of one episode in each of args.eval_episodes fresh environments, and how many were cut.

    An episode that is truncated, or cut after max_steps, goes on with V.
    """
    device = next(agent.parameters()).device
    torch.manual_seed(env_seed(args.seed, 500_000))  # for policies that are random
    envs = make_envs(args.env_id, args.eval_episodes, args.env_kwargs, render=args.capture_video)
    to_env = action_map(envs.single_action_space)
    obs, _ = envs.reset(seed=env_seed(args.seed, 500_000))
    values = agent(to_tensor(obs, device)).numpy(force=True)
    returns = np.zeros(args.eval_episodes)
    discount = 1.0
    running = np.ones(args.eval_episodes, bool)
    frames = []  # of the first environment
    for _ in range(max_steps):
        if Run.stop_signal:
            raise KeyboardInterrupt
        if args.capture_video and running[0] and len(frames) < 3000:  # more may not fit into the memory
            frames.append(frame(envs, obs))
        obs, rewards, terminated, truncated, _ = envs.step(to_env(policy(obs)))
        returns += discount * rewards * running
        discount *= args.gamma
        goes_on = running & truncated & ~terminated
        if goes_on.any():
            returns += discount * agent(to_tensor(obs, device)).numpy(force=True) * goes_on
        running &= ~(terminated | truncated)
        if not running.any():
            break
    returns += discount * agent(to_tensor(obs, device)).numpy(force=True) * running
    if frames:
        video = importlib.import_module("gymnasium.utils.save_video")
        video.save_video(frames, str(folder), lambda _: True, fps=envs.metadata.get("render_fps", 30))
    envs.close()
    return values, returns, int(running.sum())


def registered(env: type[gym.Env]) -> type[gym.Env]:
    """Let --env-id find the environment."""
    gym.register(f"{env.__name__}-v0", env)
    return env


@registered
class RandomWalk(gym.Env):
    """States 1 to 19 in a row, from 10 one step to the left or right; the end 0 pays -1 and the end 20 pays 1.

    Example 7.1 of Sutton & Barto; the uniform policy makes the walk random.
    """

    observation_space = Discrete(21)
    action_space = Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[int, dict]:
        """Start in the middle."""
        super().reset(seed=seed)
        self.state = 10
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        """Action 0 goes to the left, action 1 to the right."""
        self.state += 1 if action == 1 else -1
        rewards = {0: -1.0, 20: 1.0}
        over = self.state in rewards
        return self.state, rewards.get(self.state, 0.0), over, False, {}

    @staticmethod
    def true_values(gamma: float) -> np.ndarray:
        """v of the states 1 to 19 under the uniform policy, from v = r + gamma P v: (s - 10) / 10 if gamma is 1."""
        P = (np.eye(19, k=-1) + np.eye(19, k=1)) / 2
        r = np.zeros(19)
        r[0] = -0.5
        r[-1] = 0.5
        return np.linalg.solve(np.eye(19) - gamma * P, r)


if __name__ == "__main__":
    main()
