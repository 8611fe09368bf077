# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.2.6", "gymnasium[box2d,classic-control,mujoco]==1.4.0", "mujoco==3.15.0",
#   "ale-py==0.12.1", "MinAtar==1.0.15", "tyro==1.0.17", "tqdm==4.70.1", "filelock==3.20.0", "moviepy==2.2.1",
#   "wandb==0.31.0", "ray==2.60.0"]
# ///
"""IMPALA: samplers act without waiting for the learner, and V-trace corrects for the age of their policies.

Espeholt et al. 2018, arXiv:1802.01561. Child of a2c.py: samplers apart from the learner, V-trace for their lag.

    v_s = V(x_s) + sum_{t=s}^{s+n-1} gamma^(t-s) c_s ... c_{t-1} rho_t (r_t + gamma V(x_{t+1}) - V(x_t))
    rho_t = min(rho_bar, pi(a_t|x_t) / mu(a_t|x_t)),  c_t = min(c_bar, pi(a_t|x_t) / mu(a_t|x_t))

mu is the policy of a sampler (an actor in the paper), an older copy of pi, and s + n the end of its rollout. The
objective (section 4.2) is that of a2c.py with other targets, other advantages and a weight:

    L = E[rho_s log pi(a_s|x_s) A_s] - c1 E[(V(x_s) - v_s)^2] + c2 E[H(pi)]    with  A_s = r_s + gamma v_{s+1} - V(x_s)

No gradient flows through rho_s, A_s and v_s. A_s is normalised before rho_s weighs it.

    python algos/impala.py --env-id CartPole-v1    # 500 after 200,000 steps, with 2 samplers

Learner and samplers are actors of Ray, with --address on a cluster. A batch is the rollout of one sampler's --num-envs
environments. Batches are learned from in the order of asking, in the paper in that of arrival: so none is older than
--max-lag updates, and equal runs are bit-identical. Not in the paper: what a2c.py names, but for the clipped gradients,
which the paper has, too: means over the batch in place of sums, layers that start orthogonal, eps outside the root, and
what is normalised and scaled.

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
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal

import filelock
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box, Dict, Discrete, OneOf, Space, Text, Tuple
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium id, also ALE/*, MinAtar/* or module:YourEnv-v0; decides other defaults
    total_timesteps: int = 200_000  # environment steps to train for
    num_samplers: int = 2  # W, processes that act, at most max_lag + 1 at a time; 0: this one acts, without Ray
    max_lag: int = 2  # updates that mu may be behind pi when its batch is learned from; 0 waits for each update
    address: str = ""  # Ray cluster, host:port or auto; if empty, this machine alone
    num_envs: int = 8  # N, environments side by side
    num_steps: int = 16  # T, steps in each environment per iteration
    learning_rate: float = 3e-3  # step size of the optimizer
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"  # rmsprop is the paper's
    anneal_lr: bool = True  # let the step size fall linearly to 0
    gamma: float = 0.99  # discount
    rho_bar: float = 1.0  # largest weight of a step, on which the fixed point depends
    c_bar: float = 1.0  # largest factor of a trace, on which only the speed depends; in the paper at most rho_bar
    vf_coef: float = 0.5  # c1, weight of the value loss
    ent_coef: float = 0.0  # c2, weight of the entropy bonus
    max_grad_norm: float = 0.5  # longer gradients are scaled down to this norm
    hidden_size: int = 64  # units in each hidden layer of the MLPs
    log_std_init: float = 0.0  # logarithm of the initial standard deviation (Box actions)
    norm_obs: bool = False  # normalise vector observations by their running mean and deviation, then clip to [-10, 10]
    norm_reward: bool = True  # divide rewards by the running deviation of their discounted sum, then clip to [-10, 10]
    clip_reward: bool = False  # learn from rewards clipped to [-1, 1]; the log shows them unclipped
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
    checkpoint_every: int = 100_000  # environment steps between checkpoints
    resume: str = ""  # run directory to continue; a finished run is only evaluated again

    def __post_init__(self) -> None:
        minimum = dict(seed=0, torch_threads=0, num_steps=4, log_std_init=-20)  # 4: 2 may be resets, and std() needs 2
        check_ranges(self, minimum | dict(num_samplers=0, max_lag=0), maximum=dict(gamma=1))
        check_batch(self.num_envs * self.num_steps, self.total_timesteps)
        if self.address and self.num_samplers == 0:
            raise Refusal("address is that of a Ray cluster, which num_samplers 0 does without")


class Agent(nn.Module):
    """The policy pi(a|s) and the value V(s): an MLP each or, for images, a linear layer each on top of one CNN."""

    def __init__(self, obs_space: Space, action_space: Space, args: Args) -> None:
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        num_outputs = gym.spaces.flatdim(action_space)
        self.encoder, width = make_encoder(obs_space)
        if args.norm_obs and is_vector(obs_space):
            self.encoder = RunningNorm(width)
        hidden = [] if is_image(obs_space) else [args.hidden_size, args.hidden_size]
        self.actor = mlp([width, *hidden, num_outputs], nn.Tanh)
        self.critic = mlp([width, *hidden, 1], nn.Tanh)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((num_outputs,), float(args.log_std_init)))
        self.reward_norm = RunningNorm()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # learned from; tells the age of weights

        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.orthogonal_(layer.weight, 2**0.5)
                nn.init.zeros_(layer.bias)
        nn.init.orthogonal_(self.actor[-1].weight, 0.01)
        nn.init.orthogonal_(self.critic[-1].weight, 1.0)

    def policy(self, x: Tensor) -> Distribution:
        """pi(.|s) of encoded observations (B, width)."""
        output = self.actor(x)
        if self.discrete:
            return Categorical(logits=output, validate_args=False)
        return Independent(Normal(output, self.log_std.exp(), validate_args=False), 1)

    @torch.no_grad()
    def act(self, obs: np.ndarray, greedy: bool = False) -> np.ndarray:
        """Actions sampled from pi(.|s) or, if greedy, its mode. Runs at every step, so no Distribution is built."""
        obs = to_tensor(obs, next(self.parameters()).device)
        output = self.actor(self.encoder(obs))
        if self.discrete:
            if not greedy:
                output = output - torch.empty_like(output).exponential_().log()  # Gumbel-max: now argmax is a sample
            action = output.argmax(-1)
        else:
            action = output if greedy else output + self.log_std.exp() * torch.randn_like(output)
        return action.numpy(force=True)

    def forward(self, obs: Tensor) -> tuple[Distribution, Tensor]:
        """pi(.|s) and V(s) (B,) of observations (B, ...)."""
        x = self.encoder(obs)
        return self.policy(x), self.critic(x).squeeze(-1)


def vtrace(rewards: Tensor, values: Tensor, log_ratio: Tensor, terminated: Tensor, done: Tensor, args: Args) -> tuple:
    """Targets v_s (eq. 1), advantages r_s + gamma v_{s+1} - V(x_s) and weights rho_s, each (T, N).

    values are (T + 1, N), the other inputs (T, N), and log_ratio is log pi(a|x) / mu(a|x). A termination stops the
    bootstrap; an end of either kind stops the trace.
    """
    ratios = log_ratio.exp()
    rhos = ratios.clamp(max=args.rho_bar)
    errors = rewards + args.gamma * values[1:] * ~terminated - values[:-1]
    deltas = (rhos * errors).numpy(force=True)  # in numpy the loop runs 40 times as fast
    decays = (args.gamma * ratios.clamp(max=args.c_bar) * ~done).numpy(force=True)
    corrections = np.zeros(values.shape, deltas.dtype)  # v_s - V(x_s); 0 after the last step
    for s in reversed(range(len(deltas))):
        corrections[s] = deltas[s] + decays[s] * corrections[s + 1]  # Remark 1
    corrections = torch.from_numpy(corrections).to(values.device)
    advantages = errors + args.gamma * corrections[1:] * ~done  # after an end, v is V
    return values[:-1] + corrections[:-1], advantages, rhos


def impala_loss(agent: Agent, batch: dict[str, Tensor], args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the objective L (section 4.2) on a batch with one transition per row, and what to log."""
    policy, values = agent(batch["obs"])
    policy_loss = -(batch["rhos"] * policy.log_prob(batch["actions"]) * batch["advantages"]).mean()
    value_loss = F.mse_loss(values, batch["returns"])
    entropy = policy.entropy().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    metrics = dict(policy_loss=policy_loss.detach(), value_loss=value_loss.detach(), entropy=entropy.detach())
    return loss, metrics


def collect(all_weights: Iterator[dict[str, Tensor]], number: int, agent: Agent, args: Args) -> Iterator[tuple]:
    """A sampler: acts with each of the weights of mu that it gets; yields T steps and the returns of episodes."""
    torch.manual_seed(env_seed(args.seed, number))  # no two samplers have the same number
    device = torch.device("cpu")
    envs = make_envs(args.env_id, args.num_envs, args.env_kwargs)
    to_env = action_map(envs.single_action_space)
    N = args.num_envs
    obs, _ = envs.reset(seed=train_seed(args.seed, number * N))
    done = np.zeros(N, bool)
    score = np.zeros(N)  # return so far of the running episodes
    discounted = np.zeros(N)  # sum of the rewards so far, that of k steps ago times gamma^k; it scales them

    for weights in all_weights:
        agent.load_state_dict(weights)

        # Collect T steps from N environments.
        rollout = []
        episode_returns = []
        for _ in range(args.num_steps):
            action = agent.act(obs)
            next_obs, reward, terminated, truncated, _ = envs.step(to_env(action))
            valid = ~done  # the step after an end only resets the environment: it is no transition
            done = terminated | truncated
            score = score * valid + reward
            episode_returns += score[done].tolist()
            if args.clip_reward:
                reward = reward.clip(-1, 1)
            discounted = args.gamma * discounted * valid + reward
            step = dict(obs=obs, actions=action, rewards=reward, terminated=terminated, done=done, valid=valid)
            rollout.append(step | dict(discounted=discounted))
            obs = next_obs
        batch = stack(rollout, device)  # tensors (T, N, ...)
        with torch.no_grad():
            policy, _ = agent(batch["obs"].flatten(0, 1))
            batch["log_mu"] = policy.log_prob(batch["actions"].flatten(0, 1)).view(-1, N)
        yield batch | dict(last_obs=to_tensor(obs, device), steps=weights["steps"]), episode_returns


def learn(batches: Iterator[dict[str, Tensor]], agent: Agent, optimizer: torch.optim.Optimizer, args: Args) -> Iterator:
    """The learner: updates pi with each batch that it gets; yields the weights after the update and metrics."""
    impala_gradients = gradients_of(impala_loss, agent.parameters(), args, max_norm=args.max_grad_norm)

    for batch in batches:
        if args.anneal_lr:
            anneal(optimizer, 1 - agent.steps.item() / args.total_timesteps)
        batch = {name: column.to(agent.steps.device) for name, column in batch.items()}
        valid = batch["valid"]
        lag = (agent.steps - batch["steps"]) / valid.numel()  # in updates

        # Estimate advantages and returns.
        rewards = batch["rewards"]
        if args.norm_reward:
            agent.reward_norm.update(batch["discounted"][valid])
            rewards = (rewards * agent.reward_norm.scale).clamp(-10, 10)
        with torch.no_grad():
            policy, values = agent(batch["obs"].flatten(0, 1))
            _, last_values = agent(batch["last_obs"])
            log_ratio = policy.log_prob(batch["actions"].flatten(0, 1)).view(-1, args.num_envs) - batch["log_mu"]
            values = torch.cat([values, last_values]).view(-1, args.num_envs)
        returns, advantages, rhos = vtrace(rewards, values, log_ratio, batch["terminated"], batch["done"], args)
        batch |= dict(returns=returns, rhos=rhos)
        batch["advantages"] = (advantages - advantages[valid].mean()) / (advantages[valid].std() + 1e-8)

        # Optimise the objective by one gradient step.
        names = ("obs", "actions", "rhos", "advantages", "returns")
        batch = {name: batch[name][valid] for name in names}  # one transition per row
        gradients, metrics = impala_gradients(agent, batch, args)
        descend(optimizer, gradients)
        if isinstance(agent.encoder, RunningNorm):
            agent.encoder.update(batch["obs"])  # only now: rho and the loss must see the same pi
        agent.steps += valid.numel()
        yield copy_weights(agent), mean_metrics([metrics | dict(lag=lag)])


def train(args: Args) -> dict:
    """Train, evaluate, and return what result.json holds; raises Refusal with one sentence on bad input."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    envs = make_envs(args.env_id, 1, args.env_kwargs)  # for their spaces; samplers have their own
    device = pick_device(args.device, envs.single_observation_space)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    if args.optimizer == "rmsprop":
        optimizer = torch.optim.RMSprop(agent.parameters(), lr=args.learning_rate, alpha=0.99, eps=1e-5)
    else:
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    run = RemoteRun(args, agent=agent, optimizer=optimizer)
    envs.close()

    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    weights = copy_weights(agent)
    asked = []  # batches that are under way, in their order
    with make_processes(run, args) as processes:
        for iteration in range(run.step // batch_size, num_iterations):
            # Ask for batches. The lag of each will be the number of those that are under way when it is asked for.
            while len(asked) <= min(args.max_lag, num_iterations - iteration - 1):
                asked.append(processes.sample(weights))

            # Learn from the oldest one. If its sampler is lost, another one makes it, with the weights of now.
            batch, episode_returns = processes.receive(asked.pop(0), weights)
            run.episode_returns += episode_returns
            weights, metrics = processes.learn(batch)
            run.log((iteration + 1) * batch_size, metrics)
        run.save()
    return run.finish(evaluate(agent, args, run.dir) | dict(processes=processes.count))


# Defaults in place of those of Args: of the first family that names the environment, or else of its kind of spaces.
FAMILIES = {
    "Pendulum": dict(gamma=0.9, eval_episodes=100),
    "Acrobot MountainCar": dict(total_timesteps=300_000, num_envs=16, norm_obs=True, eval_episodes=100),
    "LunarLander LunarLanderContinuous BipedalWalker BipedalWalkerHardcore": dict(
        total_timesteps=1_000_000, num_envs=16, gamma=0.995, ent_coef=1e-5,
    ),
    "HalfCheetah Hopper Walker2d Ant Humanoid Swimmer Reacher Pusher InvertedPendulum InvertedDoublePendulum": dict(
        total_timesteps=1_000_000, num_envs=16, num_steps=64, ent_coef=0.01, log_std_init=-0.7, norm_obs=True,
    ),
    "MinAtar/": dict(total_timesteps=1_000_000, num_envs=64, ent_coef=0.01, norm_reward=False),
    "ALE/": dict(
        total_timesteps=10_000_000, num_envs=16, num_steps=20, learning_rate=6e-4, ent_coef=0.01, norm_reward=False,
        clip_reward=True,
    ),
    "Discrete-states": dict(norm_reward=False),
    "Box-actions": dict(log_std_init=-0.7),
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


class RunningNorm(nn.Module):
    """Normalises by the running mean and deviation of a stream; buffers, so saved and loaded with the weights."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("scale", torch.ones(shape))  # 1 / deviation

    def update(self, x: Tensor) -> None:
        """Count each row of x (B, *shape) once (Chan et al. 1983)."""
        x = x.to(self.mean.dtype)
        self.count += len(x)
        weight = len(x) / self.count
        delta = x.mean(0) - self.mean
        self.mean += weight * delta
        self.var += weight * (x.var(0, correction=0) - self.var + (1 - weight) * delta.square())
        self.scale.copy_((self.var + 1e-8).rsqrt())

    def forward(self, x: Tensor) -> Tensor:
        return ((x.to(self.mean.dtype) - self.mean) * self.scale).clamp(-10, 10)


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


def check_batch(batch_size: int, total_timesteps: int, num_minibatches: int = 1) -> None:
    """Raise Refusal unless the batch of an iteration fits into the run and divides into minibatches."""
    if batch_size > total_timesteps:
        raise Refusal(f"num_envs * num_steps = {batch_size} may not exceed total_timesteps")
    if batch_size % num_minibatches != 0:
        raise Refusal(f"num_envs * num_steps = {batch_size} must be divisible by num_minibatches")


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


# ====================================================================================================================
# What follows starts, asks, replaces and ends the processes; no other script needs it.


class Host:
    """What a process holds: a generator that turns each message into an answer, and the parts that it works on."""

    def __init__(self, function: Callable, parts: dict[str, nn.Module | torch.optim.Optimizer], **inputs: Any) -> None:
        torch.set_num_threads(inputs["args"].torch_threads or torch.get_num_threads())
        self.parts = parts
        self.inbox = []
        self.answers = function(self.messages(), **parts, **inputs)

    def messages(self) -> Iterator[Any]:
        """The messages, each when the generator asks for it."""
        while True:
            yield self.inbox.pop()

    def answer(self, message: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Any]:
        """What the generator makes of the message. It takes and gives tensors, but arrays travel ten times as fast."""
        self.inbox.append({name: torch.from_numpy(np.asarray(array).copy()) for name, array in message.items()})
        tensors, report = next(self.answers)
        return {name: tensor.numpy() for name, tensor in tensors.items()}, report

    def state(self) -> dict[str, dict]:
        """What the parts have learned."""
        return {name: part.state_dict() for name, part in self.parts.items()}


class Sampler(Host):
    """The host of a sampler; Ray names the process by it."""


class Learner(Host):
    """The host of the learner."""


class OneProcess:
    """A sampler and the learner in this process; the former answers when it is asked."""

    count = 1

    def __init__(self, run: "RemoteRun", args: Args) -> None:
        self.learner = Learner(learn, run.parts, args=args)
        self.sampler = Sampler(collect, **sampler_inputs(run, args, 0))

    def __enter__(self) -> "OneProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def sample(self, weights: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[float]]:
        """A batch by the policy with these weights, and the returns of its episodes."""
        return self.sampler.answer(weights)

    def receive(self, request: tuple, weights: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[float]]:
        """What sample() has returned."""
        return request

    def learn(self, batch: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """The weights after the update with this batch, and its metrics."""
        weights, metrics = self.learner.answer(batch)
        return weights, metrics | dict(lost_samplers=0)


class Processes:
    """The samplers and the learner as actors of Ray, whose messages go from process to process and not through here.

    They are started when the first batch is asked for, and gone when the context is left.
    """

    def __init__(self, run: "RemoteRun", args: Args) -> None:
        self.run = run
        self.args = args
        self.ray = run.ray
        self.count = args.num_samplers + 2  # the learner, and the one that the user has started
        self.learner = None
        self.samplers = []
        self.asked = 0  # batches, so far
        self.lost = 0  # samplers, so far
        self.connected = False  # to Ray
        self.guard = None  # ends what Ray has started, if this process is killed
        self.others: list[int] = []  # processes from before Ray, such as wandb's

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        if self.guard:
            self.guard.stdin.close()  # in a second it ends what has not ended
        if self.connected:
            for actor in (self.learner, *self.samplers):
                if actor:
                    self.ray.kill(actor)
            self.ray.shutdown()
        if self.guard:
            self.guard.wait()

    def start(self) -> None:
        """Start the learner and the samplers; raises Refusal if that cannot be done."""
        W = self.args.num_samplers
        begin = time.perf_counter()
        try:
            self.start_ray()
        except Exception as error:  # what is raised depends on what is wrong
            reason = str(error).partition("\n")[0]
            raise Refusal(f"no Ray at {self.args.address or 'this machine'}: {reason}") from error
        self.send_by_value()
        node = self.ray.get_runtime_context().get_node_id()
        here = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        actor = self.ray.remote(num_cpus=0, scheduling_strategy=here)(Learner)  # on this machine, which has --device
        self.learner = actor.remote(learn, self.run.parts, args=self.args)
        self.samplers = [self.start_sampler(index) for index in range(W)]
        try:
            self.ray.get([actor.__ray_ready__.remote() for actor in (self.learner, *self.samplers)], timeout=120)
        except self.ray.exceptions.GetTimeoutError as error:
            raise Refusal(f"Ray has found no room for {W} samplers, which take a CPU each") from error
        self.tell_guard()
        self.run.fetch = self.fetch
        seconds = time.perf_counter() - begin
        self.run.start += seconds  # training has not begun
        self.run.next_line += seconds
        tqdm.write(f"the learner and {W} sampler{'s' if W > 1 else ''} have started in {seconds:.1f} s")

    def start_ray(self) -> None:
        """Start Ray on this machine, for this run alone, or join the cluster."""
        self.others = descendants(os.getpid())
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = [signal.getsignal(number) for number in numbers]
        address = self.args.address or "local"
        options = dict(log_to_driver=False, logging_level="ERROR")
        if address == "local":
            folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # the paths of its sockets must be short
            command = f"trap '' INT TERM; while read line; do pids=$line; done; sleep 1; kill -9 $pids; rm -rf {folder}"
            pipe = subprocess.PIPE  # the loop ends when this process does
            self.guard = subprocess.Popen(["sh", "-c", command], stdin=pipe, stderr=pipe, start_new_session=True)
            options |= dict(num_cpus=self.args.num_samplers + 1, object_store_memory=256 * 2**20)
            options |= dict(include_dashboard=False, _temp_dir=folder)
        # Ray's processes inherit this: a SIGTERM to all, as of a job scheduler, leaves them to who wants to save.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self.ray.init(address, **options)
        finally:
            for number, handler in zip(numbers, handlers):
                signal.signal(number, handler)  # Ray has set its own
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        self.connected = True
        self.tell_guard()

    def tell_guard(self) -> None:
        """Say which processes are to be ended if this one is killed: some of Ray's would take a minute."""
        if self.guard:
            others = [self.guard.pid, *self.others]
            pids = [str(pid) for pid in descendants(os.getpid()) if pid not in others]
            self.guard.stdin.write(f"{' '.join(pids)}\n".encode())
            self.guard.stdin.flush()

    def send_by_value(self) -> None:
        """Let functions and classes of this file travel whole: other machines do not have it."""
        self.ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        register = self.ray.util.register_serializer  # for two things that they use and that cannot
        register(type(can_compile), serializer=lambda cached: cached.__wrapped__, deserializer=functools.cache)
        config = torch._dynamo.config
        register(type(config), serializer=lambda module: module.__name__, deserializer=importlib.import_module)

    def start_sampler(self, index: int) -> Any:
        """Start a sampler: the first one of this index, or one in its place."""
        actor = self.ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(Sampler)
        return actor.remote(collect, **sampler_inputs(self.run, self.args, index))

    def sample(self, weights: Any) -> tuple[int, Any, Any]:
        """Ask the next sampler in turn for a batch by the policy with these weights; receive() waits for it."""
        if not self.learner:
            self.start()
        index = self.asked % len(self.samplers)
        self.asked += 1
        return self.ask(index, weights)

    def ask(self, index: int, weights: Any) -> tuple[int, Any, Any]:
        """Ask the sampler of this index for a batch."""
        sampler = self.samplers[index]
        return index, sampler, sampler.answer.options(num_returns=2).remote(weights)

    def receive(self, request: tuple[int, Any, Any], weights: Any) -> tuple[Any, list[float]]:
        """The batch that was asked for and the returns of its episodes; replaces a lost sampler, with these weights."""
        index, sampler, answer = request
        for _ in range(3):
            batch, episode_returns = answer
            try:
                return batch, self.get(episode_returns)
            except self.ray.exceptions.RayActorError:
                if sampler is self.samplers[index]:  # else it was replaced when another of its batches was missed
                    self.lost += 1
                    self.ray.kill(sampler)  # it may only be out of reach
                    self.samplers[index] = self.start_sampler(index)
                _, sampler, answer = self.ask(index, weights)
        self.end(f"sampler {index} has died 3 times in a row")

    def learn(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """The weights after the update with this batch, and its metrics."""
        weights, metrics = self.learner.answer.options(num_returns=2).remote(batch)
        return weights, self.of_learner(metrics) | dict(lost_samplers=self.lost)

    def fetch(self) -> None:
        """Bring here what the learner has learned."""
        for name, state in self.of_learner(self.learner.state.remote()).items():
            self.run.parts[name].load_state_dict(state)

    def of_learner(self, answer: Any) -> dict:
        """What the learner answers; ends the run if it has died."""
        try:
            return self.get(answer)
        except self.ray.exceptions.RayActorError:
            self.end("the learner has died")

    def get(self, answer: Any) -> Any:
        """What an actor answers; a Refusal is raised as what it was there."""
        try:
            return self.ray.get(answer)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Refusal):
                raise error.cause from None
            raise

    def end(self, reason: str) -> None:
        """End the run."""
        self.run.bar.close()
        sys.exit(f"\n{Path(__file__).name}: {reason}; {Run.saved}")


def make_processes(run: "RemoteRun", args: Args) -> OneProcess | Processes:
    """What samples and learns, as --num-samplers asks."""
    return Processes(run, args) if run.ray else OneProcess(run, args)


def sampler_inputs(run: "RemoteRun", args: Args, index: int) -> dict[str, Any]:
    """What a sampler is made of; those that act at a time, or from another iteration on, have other numbers."""
    iteration = run.step // (args.num_envs * args.num_steps)
    number = iteration * max(1, args.num_samplers) + index
    return dict(parts=dict(agent=copy.deepcopy(run.parts["agent"]).cpu()), number=number, args=args)


class RemoteRun(Run):
    """The run of a learner in another process: what it has learned comes here to be saved."""

    fetch: Callable[[], None] | None = None  # brings it here, once there is a learner

    def import_optional(self) -> None:
        """Import Ray, too, without a token in the home directory or reports to its makers."""
        super().import_optional()
        self.ray = None
        if self.args.num_samplers == 0:
            return
        if sys.platform == "win32":
            raise Refusal("samplers need Linux or macOS; with --num-samplers 0 this process acts")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the learner sees its GPU
        if not self.args.address:
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on macOS, too: listen to this machine alone
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # and there to this user alone
            os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())
        try:
            self.ray = importlib.import_module("ray")
        except ModuleNotFoundError as error:
            advice = "pip install ray==2.60.0, or act in this process with --num-samplers 0"
            raise Refusal(f"--num-samplers {self.args.num_samplers} needs Ray: {advice}") from error
        if ":" in self.args.address:
            self.check_address()

    def check_address(self) -> None:
        """Raise Refusal if nobody listens there: Ray itself would try for minutes."""
        host, _, port = self.args.address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            raise Refusal(f"no Ray at {self.args.address}: {error}") from error

    def save(self) -> None:
        """Write the checkpoint with what the learner has learned."""
        if self.fetch:
            self.fetch()
        super().save()


def descendants(pid: int) -> list[int]:
    """The processes that this one has started, and those that they have (Linux alone knows)."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in file.read_text().split()]
        except OSError:  # it has just ended
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def copy_weights(agent: Agent) -> dict[str, Tensor]:
    """The weights and buffers of the agent, as they are now, on the CPU."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in agent.state_dict().items()}


if __name__ == "__main__":
    main()
