# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.2.6", "gymnasium[box2d,classic-control,mujoco]==1.4.0", "mujoco==3.15.0",
#   "ale-py==0.12.1", "MinAtar==1.0.15", "tyro==1.0.17", "tqdm==4.70.1", "filelock==3.20.0", "moviepy==2.2.1",
#   "wandb==0.31.0"]
# ///
"""QR-DQN: Q-learning of the distribution of returns by quantile regression.

Dabney et al. 2018, arXiv:1710.10044. Child of dqn.py: quantiles of the return in place of its mean Q. So the network
also learns how returns spread, and needs no bounds for them. theta_i(s, a) is the return's quantile at the level
tau_i = (i + 1/2) / n, i = 0 ... n - 1 (tau-hat in the paper), and Q(s, a) is the mean of these. theta minimises

    L = E[sum_i mean_j rho(tau_i, r + gamma theta_target,j(s', a') - theta_i(s, a))]
        with  rho(tau, u) = |tau - 1{u < 0}| L_kappa(u) / kappa    and  a' = argmax Q_target(s', .)

over transitions drawn uniformly from a replay buffer; where s' is terminal, the target is r. L_kappa is the Huber loss;
theta are the quantiles as kappa falls to 0, but for errors below kappa they are expectiles, whose mean is that of the
return only if it is symmetric. The policy is epsilon-greedy in Q. theta_target is a copy of theta, renewed every
--target-network-frequency steps.

    python algos/qr_dqn.py --env-id CartPole-v1            # 500 after 50,000 steps
    python algos/qr_dqn.py --env-id MountainCar-v0         # -101 after 120,000 steps
    python algos/qr_dqn.py --env-id MinAtar/Breakout-v1    # 28 after 1M steps

Not in the paper: Adam's eps (1e-5, there 0.01 / 32), the division by kappa (of later papers), a step size that falls to
0 (not on MinAtar and Atari), an epsilon that falls from the first step on and is 0 in the evaluation, clipped
gradients, fewer than 200 quantiles where they are enough, and kappa = 10 on CartPole, whose discounted returns reach
100, and on Acrobot and MinAtar, where it was better in trials. All periods count single steps, so that several
environments learn as often as one.

Read to the end of train(); what follows the ruler is plumbing that the scripts share.
"""

import argparse
import copy
import functools
import importlib
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
from typing import BinaryIO

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
    env_id: str = "CartPole-v1"  # Gymnasium id, also ALE/*, MinAtar/* or module:YourEnv-v0; decides other defaults
    total_timesteps: int = 50_000  # environment steps to train for
    num_envs: int = 4  # N, environments side by side
    buffer_size: int = 50_000  # environment steps that the replay buffer holds
    learning_starts: int = 1000  # environment steps before the first gradient step
    batch_size: int = 128  # transitions per gradient step
    train_frequency: int = 2  # environment steps per gradient step
    target_network_frequency: int = 150  # environment steps between copies to the target network
    learning_rate: float = 1e-3  # step size of the optimizer
    anneal_lr: bool = True  # let the step size fall linearly to 0
    gamma: float = 0.99  # discount
    num_quantiles: int = 25  # n, quantiles of each distribution of returns
    kappa: float = 1.0  # where the Huber loss turns from a parabola into a line
    start_e: float = 1.0  # epsilon, the share of random actions, at the start
    end_e: float = 0.05  # epsilon at the end of exploration and from then on
    exploration_fraction: float = 0.2  # share of the run over which epsilon falls linearly
    max_grad_norm: float = 10.0  # longer gradients are scaled down to this norm
    hidden_size: int = 128  # units in each hidden layer of the MLPs
    clip_reward: bool = False  # learn from rewards clipped to [-1, 1]; the log shows them unclipped
    save_buffer: bool = False  # keep the replay buffer in checkpoints; else a resumed run has to fill a new one
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
        shares = dict(gamma=1, start_e=1, end_e=1, exploration_fraction=1)
        check_ranges(self, minimum=dict(seed=0, torch_threads=0), maximum=shares)
        if not 0 < self.kappa < math.inf:
            raise Refusal(f"kappa = {self.kappa} must be positive and finite")
        if self.learning_starts + self.num_envs > self.total_timesteps:
            raise Refusal(f"learning_starts = {self.learning_starts} leaves nothing of total_timesteps")
        if self.buffer_size < 2 * self.num_envs:  # one step of each may be a reset, which nothing is learned from
            raise Refusal(f"buffer_size = {self.buffer_size} must be at least 2 * num_envs")


class Agent(nn.Module):
    """theta(s, .), an MLP or, for images, a linear layer on top of a CNN; and the epsilon-greedy policy."""

    def __init__(self, obs_space: Space, num_actions: int, args: Args) -> None:
        super().__init__()
        self.num_quantiles = args.num_quantiles
        self.encoder, width = make_encoder(obs_space)
        hidden = [] if is_image(obs_space) else [args.hidden_size, args.hidden_size]
        self.theta = mlp([width, *hidden, num_actions * args.num_quantiles], nn.ReLU)
        self.epsilon = args.start_e

    def quantiles(self, obs: Tensor) -> Tensor:
        """theta(s, .) (B, A, n) of observations (B, ...)."""
        return self.theta(self.encoder(obs)).unflatten(-1, (-1, self.num_quantiles))

    def forward(self, obs: Tensor) -> Tensor:
        """Q(s, .) (B, A) of observations (B, ...)."""
        return self.quantiles(obs).mean(-1)

    @torch.no_grad()
    def act(self, obs: np.ndarray, greedy: bool = False) -> np.ndarray:
        """The actions of largest Q or, unless greedy, random ones with probability epsilon."""
        values = self(to_tensor(obs, next(self.parameters()).device))
        actions = values.argmax(-1).numpy(force=True)
        if greedy:
            return actions
        explore = torch.rand(len(actions)).numpy() < self.epsilon
        random_actions = torch.randint(values.shape[-1], (len(actions),)).numpy()
        return np.where(explore, random_actions, actions)


def linear_schedule(start: float, end: float, duration: float, t: float) -> float:
    """From start at t = 0 to end at t = duration, and end from there on."""
    return start + (end - start) * t / duration if t < duration else end


def td_target(rewards: Tensor, terminated: Tensor, next_values: Tensor, gamma: float | Tensor) -> Tensor:
    """y (B,): r + gamma V(s') or, where s' is terminal, r. A truncation is no end. Inputs (B,) each or broadcast."""
    return rewards + gamma * ~terminated * next_values


def of_actions(x: Tensor, actions: Tensor) -> Tensor:
    """The part (B, n) of x (B, A, n) that belongs to the actions (B,)."""
    return x.take_along_dim(actions[:, None, None], 1).squeeze(1)


def quantile_huber(quantiles: Tensor, targets: Tensor, kappa: float) -> Tensor:
    """The loss of quantiles theta_i (B, n) of a distribution that the targets y_j (B, m) are drawn from."""
    n = quantiles.shape[-1]
    i = torch.arange(n, dtype=quantiles.dtype, device=quantiles.device)
    tau = ((i + 0.5) / n)[:, None]  # tau-hat of lemma 2
    u = targets[:, None, :] - quantiles[:, :, None]  # (B, i, j)
    huber = F.huber_loss(u, torch.zeros_like(u), reduction="none", delta=kappa)  # L_kappa, eq. 9
    rho = torch.where(u < 0, 1 - tau, tau) * huber / kappa  # eq. 10
    return rho.mean(-1).sum(-1).mean()


def critic_loss(agent: Agent, target: Agent, batch: dict[str, Tensor], args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of theta on a batch with one transition per row, and what to log."""
    with torch.no_grad():
        next_quantiles = target.quantiles(batch["next_obs"])  # (B, A, n)
        next_actions = next_quantiles.mean(-1).argmax(-1)
        next_quantiles = of_actions(next_quantiles, next_actions)  # (B, n)
        rewards = batch["rewards"][:, None]
        terminated = batch["terminated"][:, None]
        y = td_target(rewards, terminated, next_quantiles, args.gamma)  # T theta_j (B, n), algorithm 1

    quantiles = of_actions(agent.quantiles(batch["obs"]), batch["actions"])
    loss = quantile_huber(quantiles, y, args.kappa)
    return loss, dict(critic_loss=loss.detach(), q_value=quantiles.detach().mean())


def train(args: Args) -> dict:
    """Train, evaluate, and return what result.json holds; raises Refusal with one sentence on bad input."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    envs = make_envs(args.env_id, args.num_envs, args.env_kwargs)
    obs_space = envs.single_observation_space
    action_space = envs.single_action_space
    if not isinstance(action_space, Discrete):
        raise Refusal(f"action space {action_space} is not supported: it must be Discrete")
    to_env = action_map(action_space)
    device = pick_device(args.device, obs_space)

    N = args.num_envs
    agent = Agent(obs_space, int(action_space.n), args).to(device)
    target = copy.deepcopy(agent).requires_grad_(False)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    critic_gradients = gradients_of(critic_loss, agent.parameters(), args, max_norm=args.max_grad_norm)
    buffer = ReplayBuffer(obs_space, (), np.int64, N, args.buffer_size // N, args.save_buffer)
    run = Run(args, agent=agent, target=target, optimizer=optimizer, buffer=buffer)

    log_every = max(args.log_every // N, 1) * N
    learn_after = args.learning_starts
    if len(buffer) == 0:
        learn_after += run.step  # a run resumed without its buffer acts by its policy, but fills the buffer first
    obs, _ = envs.reset(seed=train_seed(args.seed, run.step // log_every * N))  # other episodes in a resumed run
    buffer.start(obs)
    done = np.zeros(N, bool)
    score = np.zeros(N)  # return so far of the running episodes
    history = deque(maxlen=100)  # metrics of the last gradient steps

    for step in range(run.step + N, args.total_timesteps + 1, N):
        progress = (step - N) / args.total_timesteps
        agent.epsilon = linear_schedule(args.start_e, args.end_e, args.exploration_fraction, progress)
        if args.anneal_lr:
            anneal(optimizer, 1 - progress)

        # Take one step in each environment.
        action = agent.act(obs)
        obs, reward, terminated, truncated, _ = envs.step(to_env(action))
        valid = ~done  # the step after an end only resets the environment: it is no transition
        done = terminated | truncated
        score = score * valid + reward
        run.episode_returns += score[done].tolist()
        if args.clip_reward:
            reward = reward.clip(-1, 1)
        buffer.add(action, reward, terminated, valid, obs)

        # Optimise once every train_frequency steps; t counts the N steps just taken.
        for t in range(step - N + 1, step + 1):
            if t > learn_after and t % args.train_frequency == 0:
                batch = buffer.sample(args.batch_size, device)
                gradients, metrics = critic_gradients(agent, target, batch, args)
                descend(optimizer, gradients)
                history.append(metrics)
            if t % args.target_network_frequency == 0:
                target.load_state_dict(agent.state_dict())

        run.bar.update(N)
        if step % log_every < N or step + N > args.total_timesteps:
            run.log(step, mean_metrics(history) | dict(epsilon=agent.epsilon))
            history.clear()

    run.save()
    envs.close()
    return run.finish(evaluate(agent, args, run.dir))


# Defaults in place of those of Args: of the first family that names the environment.
FAMILIES = {
    "CartPole": dict(kappa=10.0, compile=True),
    "Acrobot": dict(
        total_timesteps=100_000, train_frequency=1, target_network_frequency=250, learning_rate=1.5e-3, kappa=10.0,
        end_e=0.1, exploration_fraction=0.12, hidden_size=256, compile=True, eval_episodes=100,
    ),
    "MountainCar": dict(  # it leaves the valley only if the policy stays the same for a while: one car, few updates
        total_timesteps=120_000, num_envs=1, buffer_size=10_000, batch_size=256, train_frequency=8,
        target_network_frequency=300, learning_rate=4e-3, gamma=0.98, exploration_fraction=0.05,
        hidden_size=256, eval_episodes=100,
    ),
    "LunarLander": dict(
        total_timesteps=300_000, target_network_frequency=250, learning_rate=6.3e-4, num_quantiles=51, end_e=0.01,
        exploration_fraction=0.12, hidden_size=256, compile=True,
    ),
    "MinAtar/": dict(
        total_timesteps=1_000_000, num_envs=8, buffer_size=100_000, learning_starts=5000, batch_size=32,
        train_frequency=1, target_network_frequency=1000, learning_rate=2.5e-4, anneal_lr=False,
        num_quantiles=51, kappa=10.0, end_e=0.01, exploration_fraction=0.1, compile=True,
    ),
    "ALE/": dict(
        total_timesteps=10_000_000, num_envs=8, buffer_size=100_000, learning_starts=20_000, batch_size=32,
        train_frequency=4, target_network_frequency=1000, learning_rate=5e-5, anneal_lr=False,
        num_quantiles=200, end_e=0.01, exploration_fraction=0.1, clip_reward=True, torch_threads=0,
    ),
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


class ReplayBuffer(nn.Module):
    """The last `num_rows` steps of N environments, for uniform sampling; a module so that checkpoints can hold it.

    Row t has the observation, action, reward and end of step t. In mode NEXT_STEP its successor is always the
    observation of row t + 1, so that each observation is stored once. Reset steps have rows, too, but are not valid.
    """

    def __init__(
        self, obs_space: Space, action_shape: tuple, action_dtype: type, num_envs: int, num_rows: int, persistent: bool
    ) -> None:
        """Raises Refusal if the memory of this machine is too small; persistent if checkpoints shall hold the rows."""
        super().__init__()
        self.num_envs = num_envs
        self.num_rows = num_rows + 1  # the last observation has a row of its own
        obs_dtype = np.dtype(np.float32) if obs_space.dtype == np.float64 else obs_space.dtype
        row_bytes = math.prod(obs_space.shape) * obs_dtype.itemsize + 6  # 6 for a reward and two flags
        row_bytes += math.prod(action_shape) * np.dtype(action_dtype).itemsize
        num_bytes = self.num_rows * num_envs * row_bytes
        if hasattr(os, "sysconf") and num_bytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise Refusal(f"the replay buffer needs {num_bytes / 1e9:.0f} GB, more memory than this machine has")

        def column(name: str, shape: tuple, dtype: type) -> np.ndarray:
            """An array (rows, N, *shape) that shares its memory with a buffer of the module."""
            array = np.zeros((self.num_rows, num_envs, *shape), dtype)
            self.register_buffer(f"_{name}", torch.from_numpy(array), persistent)
            return array

        self.obs = column("obs", obs_space.shape, obs_dtype)
        self.actions = column("actions", action_shape, action_dtype)
        self.rewards = column("rewards", (), np.float32)
        self.terminated = column("terminated", (), np.bool_)
        self.valid = column("valid", (), np.bool_)
        self.register_buffer("t", torch.zeros((), dtype=torch.int64), persistent)  # steps added so far

    def __len__(self) -> int:
        return min(int(self.t), self.num_rows - 1) * self.num_envs

    def start(self, obs: np.ndarray) -> None:
        """The first observations of a run or of a resumed run."""
        row = int(self.t) % self.num_rows
        self.valid[row - 1] = False  # what a resumed run did last has not led here
        self.obs[row] = obs

    def add(
        self, action: np.ndarray, reward: np.ndarray, terminated: np.ndarray, valid: np.ndarray, next_obs: np.ndarray
    ) -> None:
        """A step of every environment from the observations before; `valid` where it was not a reset."""
        row = int(self.t) % self.num_rows
        self.actions[row] = action
        self.rewards[row] = reward
        self.terminated[row] = terminated
        self.valid[row] = valid
        self.t += 1
        self.obs[int(self.t) % self.num_rows] = next_obs

    def draw(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and environments (batch_size,) of transitions, drawn uniformly and with replacement."""
        newest = int(self.t)
        oldest = max(0, newest - self.num_rows + 1)
        places = np.zeros((0, 2), np.int64)  # row and environment
        while len(places) < batch_size:  # draws more than are needed: what is not valid is left out
            rows = torch.randint(oldest, newest, (2 * batch_size,)).numpy() % self.num_rows
            env_ids = torch.randint(self.num_envs, (2 * batch_size,)).numpy()
            valid = self.valid[rows, env_ids]
            places = np.concatenate([places, np.stack([rows[valid], env_ids[valid]], 1)])
        rows, env_ids = places[:batch_size].T
        return rows, env_ids

    def gather(self, rows: np.ndarray, env_ids: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """The transitions (B, ...) at these rows and environments (B,)."""
        batch = dict(
            obs=self.obs[rows, env_ids],
            actions=self.actions[rows, env_ids],
            rewards=self.rewards[rows, env_ids],
            terminated=self.terminated[rows, env_ids],
            next_obs=self.obs[(rows + 1) % self.num_rows, env_ids],
        )
        return {name: torch.from_numpy(column).to(device) for name, column in batch.items()}

    def sample(self, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        """Transitions (batch_size, ...), drawn uniformly and with replacement."""
        rows, env_ids = self.draw(batch_size)
        return self.gather(rows, env_ids, device)


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


def evaluate(agent: nn.Module, args: Args, folder: Path, max_steps: int = 27_000) -> dict:
    """Returns of one greedy episode in each of args.eval_episodes fresh environments, and how many were cut.

    An episode is cut after max_steps, for there are environments and policies whose episodes never end.
    """
    agent.eval()
    envs = make_envs(args.env_id, args.eval_episodes, args.env_kwargs, render=args.capture_video)
    to_env = action_map(envs.single_action_space)
    obs, _ = envs.reset(seed=env_seed(args.seed, 500_000))
    returns = np.zeros(args.eval_episodes)
    running = np.ones(args.eval_episodes, bool)
    frames = []  # of the first environment
    for _ in range(max_steps):
        if Run.stop_signal:
            raise KeyboardInterrupt
        if args.capture_video and running[0] and len(frames) < 3000:  # more may not fit into the memory
            frames.append(frame(envs, obs))
        obs, rewards, terminated, truncated, _ = envs.step(to_env(agent.act(obs, greedy=True)))
        returns += rewards * running
        running &= ~(terminated | truncated)
        if not running.any():
            break
    if frames:
        video = importlib.import_module("gymnasium.utils.save_video")
        video.save_video(frames, str(folder), lambda _: True, fps=envs.metadata.get("render_fps", 30))
    envs.close()
    return dict(eval_returns=returns.tolist(), eval_cut=int(running.sum()))


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


if __name__ == "__main__":
    main()
