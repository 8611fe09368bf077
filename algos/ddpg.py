# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy==2.2.6", "gymnasium[box2d,classic-control,mujoco]==1.4.0", "mujoco==3.15.0",
#   "ale-py==0.12.1", "MinAtar==1.0.15", "tyro==1.0.17", "tqdm==4.70.1", "moviepy==2.2.1", "wandb==0.31.0"]
# ///
"""DDPG: a deterministic policy that follows the gradient of its critic (Lillicrap et al. 2016, arXiv:1509.02971).

Minimises  E[(r + gamma Q'(s', mu'(s')) - Q(s, a))^2]  over transitions drawn uniformly from a replay buffer, and
maximises  E[Q(s, mu(s))]  over the parameters of mu alone (Silver et al. 2014); Q' and mu' follow Q and mu slowly.
Child of dqn.py: an actor mu(s) in place of the maximum over actions, which are continuous here.

    python algos/ddpg.py --env-id Pendulum-v1

Expect -145 there after 20,000 steps. Not in the paper: the policy evaluated is mu', an average of the last mu;
independent Gaussian noise instead of an Ornstein-Uhlenbeck process; uniform actions at first; one step size for both
networks; no batch normalisation or weight decay; actions into the first layer of Q. Actions in [-1, 1] are scaled to
the bounds of the environment. Several environments side by side learn exactly as often as one would.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.spaces import Box, Discrete, Space
from torch import Tensor
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "Pendulum-v1"  # Gymnasium id, also ALE/*, MinAtar/* or module:YourEnv-v0; decides the other defaults
    total_timesteps: int = 20_000  # environment steps to train for
    learning_rate: float = 1e-3  # step size of the optimizer
    anneal_lr: bool = False  # let the step size fall linearly to 0
    num_envs: int = 1  # N, environments side by side
    buffer_size: int = 200_000  # transitions that the replay buffer holds
    learning_starts: int = 1000  # environment steps before the first gradient step
    batch_size: int = 128  # transitions per gradient step
    train_frequency: int = 1  # environment steps per gradient step
    gamma: float = 0.98  # discount
    tau: float = 0.005  # share by which the target networks approach the others at each step
    exploration_noise: float = 0.1  # deviation of the noise on actions in [-1, 1]
    hidden_size: int = 256  # units in each of the two hidden layers (vector observations)
    save_buffer: bool = False  # keep the replay buffer in checkpoints; without it, a resumed run fills it anew
    compile: bool | None = None  # compile the gradient step; if not said, when the run is long enough to gain by it

    seed: int = 1  # of weights, actions, minibatches and environments
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda for images where there is one, else cpu
    torch_threads: int = 1  # CPU threads of PyTorch, 0 for one per core; small networks are fastest with 1
    run_dir: str = ""  # where the results go; if not said, runs/<env>__<algo>__<seed>__<time>
    track: bool = False  # log to Weights & Biases
    capture_video: bool = False  # film an episode of the final evaluation
    eval_episodes: int = 100  # episodes of the final evaluation
    log_every: int = 1000  # environment steps between lines of the log
    checkpoint_every: int = 10_000  # environment steps between checkpoints
    resume: str = ""  # run directory to continue; a finished run is only evaluated again

    def __post_init__(self) -> None:
        """Raise ValueError with one sentence if a value is impossible."""
        lowest, shares = dict(seed=0, torch_threads=0), ("gamma", "tau")
        for name, value in asdict(self).items():
            low, high = lowest.get(name, int(type(value) is int)), 1 if name in shares else float("inf")
            if isinstance(value, int | float) and not low <= value <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}], but is {value}")
        if self.learning_starts + self.num_envs > self.total_timesteps:
            raise ValueError(f"learning_starts = {self.learning_starts} leaves nothing of total_timesteps")
        if self.buffer_size < 2 * self.num_envs:  # one step of each may be a reset, which nothing is learned from
            raise ValueError(f"buffer_size = {self.buffer_size} must be at least 2 * num_envs")
        if self.device != "auto" and not getattr(torch, self.device).is_available():
            raise ValueError(f"device {self.device} is not available on this machine")


# Defaults by environment, beside those of Args: the first entry with a word that the id contains counts.
FAMILIES = {
    "LunarLander BipedalWalker": dict(total_timesteps=300_000, learning_starts=10_000, batch_size=256,
        eval_episodes=20),
    "HalfCheetah": dict(total_timesteps=1_000_000, buffer_size=1_000_000, learning_starts=10_000,
        batch_size=256, eval_episodes=20),
    "Hopper Walker2d Ant Humanoid Swimmer": dict(total_timesteps=1_000_000, buffer_size=1_000_000,
        learning_starts=10_000, gamma=0.99, batch_size=256, eval_episodes=20),
    "Reacher Pusher Inverted": dict(total_timesteps=100_000, gamma=0.99, batch_size=256, eval_episodes=20),
}  # fmt: skip


class Adam(nn.Module):
    """Adam (Kingma & Ba 2015, eps 1e-8 there) on theta, the vector of all parameters, which become views of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.register_buffer("theta", nn.utils.parameters_to_vector(module.parameters()).detach())
        nn.utils.vector_to_parameters(self.theta, module.parameters())
        for name, shape in dict(t=(), weight1=(), weight2=(), m=self.theta.shape, v=self.theta.shape).items():
            self.register_buffer(name, self.theta.new_zeros(shape))

    @torch.no_grad()
    def step(self, gradient: Tensor, lr: Tensor, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-5) -> None:
        """Move theta down the gradient (P,)."""
        self.t += 1
        self.weight1 += (1 - beta1) * (1 - self.weight1)  # 1 - beta1^t; compiled, a power would be taken per parameter
        self.weight2 += (1 - beta2) * (1 - self.weight2)
        self.m.lerp_(gradient, 1 - beta1)
        self.v.lerp_(gradient.square(), 1 - beta2)
        m_hat, v_hat = self.m / self.weight1, self.v / self.weight2
        self.theta.sub_(lr * m_hat / (v_hat.sqrt() + eps))  # -= would rebind theta to a view


class Dot(nn.Linear):
    """A linear layer of one output, as a sum: on a CPU, a matrix product with a single column takes longer."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(-1, keepdim=True) + self.bias


class Network(nn.Module):
    """An MLP or a CNN of observations and, for a critic, of actions."""

    def __init__(self, obs_space: Space, num_outputs: int, args: Args) -> None:
        super().__init__()
        shape, width = obs_space.shape or (), args.hidden_size
        self.obs_space, self.is_image = obs_space, len(shape) == 3
        self.trunk, second = nn.Identity(), [nn.Linear(width, width), nn.ReLU()]
        if self.is_image:  # the network of DQN (Mnih et al. 2015), or MinAtar's (Young & Tian 2019) for small images
            filters = [(32, 8, 4), (64, 4, 2), (64, 3, 1)] if sorted(shape)[1] >= 36 else [(16, 3, 1)]
            layers = [layer for f in filters for layer in (nn.LazyConv2d(*f), nn.ReLU())]
            self.trunk, width, second = nn.Sequential(*layers, nn.Flatten()), 512 if len(filters) == 3 else 128, []
        last = (nn.Linear if num_outputs > 1 else Dot)(width, num_outputs)
        self.head = nn.Sequential(nn.LazyLinear(width), nn.ReLU(), *second, last)

    def features(self, obs: Tensor) -> Tensor:
        """What the head sees of observations: integers one-hot, vectors as they are, images through the CNN."""
        if isinstance(self.obs_space, Discrete):
            obs = nn.functional.one_hot(obs - int(self.obs_space.start), int(self.obs_space.n))
        elif self.is_image:
            obs = obs.movedim(-1, 1) if obs.dtype == torch.bool else obs / 255
            obs = obs.contiguous(memory_format=torch.channels_last)  # convolutions run faster so
        return self.trunk(obs.float())

    def forward(self, obs: Tensor, *actions: Tensor) -> Tensor:
        """Outputs (B, num_outputs) for observations (B, ...) and, for a critic, actions (B, D)."""
        return self.head(torch.cat([self.features(obs), *actions], -1))


class Target(nn.Module):
    """A copy of a network that follows it slowly; its parameters are views of theta, as in Adam."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer("theta", nn.utils.parameters_to_vector(self.network.parameters()))
        nn.utils.vector_to_parameters(self.theta, self.network.parameters())

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs)


class Agent(nn.Module):
    """The policy mu(s) in [-1, 1]^D, with Gaussian noise for exploration, and its critic Q(s, a)."""

    def __init__(self, obs_space: Space, action_space: Box, args: Args) -> None:
        super().__init__()
        self.actor = Network(obs_space, gym.spaces.flatdim(action_space), args)
        self.critic = Network(obs_space, 1, args)
        self.is_image, self.exploration_noise = self.actor.is_image, args.exploration_noise
        obs = torch.as_tensor(obs_space.sample()[None])
        self.critic(obs, self(obs))  # shows the lazy layers their inputs
        on_gpu = self.is_image and torch.cuda.is_available()
        self.device = torch.device(args.device.replace("auto", "cuda" if on_gpu else "cpu"))
        self.to(self.device)

    def forward(self, obs: Tensor) -> Tensor:
        """mu(s) (B, D) of observations (B, ...)."""
        return self.actor(obs).tanh()

    @torch.no_grad()
    def act(self, obs: np.ndarray, greedy: bool = False) -> np.ndarray:
        """mu(s) and, unless greedy, noise of each environment and dimension its own."""
        actions = self(torch.from_numpy(obs).to(self.device)).cpu()
        if not greedy:
            actions = (actions + self.exploration_noise * torch.randn(actions.shape)).clamp(-1, 1)
        return actions.numpy()


def td_target(rewards: Tensor, terminated: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """y (B,) of algorithm 1 from rewards, terminated, values of the next states (B,); truncation does not stop it."""
    return rewards + gamma * ~terminated * next_values


def ddpg_critic_loss(
    agent: Agent, batch: dict[str, Tensor], target: nn.ModuleDict, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of Q on a batch with one transition per row, and what to log."""
    with torch.no_grad():
        next_actions = target["actor"](batch["next_obs"]).tanh()
        next_values = target["critic"](batch["next_obs"], next_actions).squeeze(-1)
        targets = td_target(batch["rewards"], batch["terminated"], next_values, args.gamma)
    values = agent.critic(batch["obs"], batch["actions"]).squeeze(-1)
    loss = (values - targets).square().mean()
    return loss, dict(td_loss=loss.detach(), q_value=values.detach().mean())


def ddpg_actor_loss(agent: Agent, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """-E[Q(s, mu(s))], whose gradient for the actor is -E[dQ/da dmu/dtheta] (eq. 6), and what to log."""
    loss = -agent.critic(batch["obs"], agent(batch["obs"])).mean()
    return loss, dict(policy_loss=loss.detach())


def gradient(loss: Tensor, network: nn.Module) -> Tensor:
    """The gradient (P,) for the parameters of one network; for those of others none is computed."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(network.parameters()))])


@torch.no_grad()
def follow(target: nn.ModuleDict, optimizers: nn.ModuleDict, tau: float) -> None:
    """theta' <- tau theta + (1 - tau) theta' for each target network (algorithm 1)."""
    for name, network in target.items():
        network.theta.lerp_(optimizers[name].theta, tau)


def update(
    agent: Agent, target: nn.ModuleDict, optimizers: nn.ModuleDict, batch: dict, learning_rate: Tensor, args: Args
) -> dict[str, Tensor]:
    """A step of the critic, one of the actor up the new critic, and targets that follow; returns the metrics."""
    loss, metrics = ddpg_critic_loss(agent, batch, target, args)
    optimizers["critic"].step(gradient(loss, agent.critic), learning_rate, eps=1e-8)
    loss, more = ddpg_actor_loss(agent, batch)
    optimizers["actor"].step(gradient(loss, agent.actor), learning_rate, eps=1e-8)
    follow(target, optimizers, args.tau)
    return metrics | more


class ReplayBuffer(nn.Module):
    """A ring of the last `num_rows` steps of N environments, for uniform sampling.

    Each observation is stored once, for in mode NEXT_STEP the successor of step t is always the observation of step
    t + 1; hence one row more. Reset steps keep their places but are not in `order`, the ring of what can be sampled.
    """

    def __init__(self, obs_space: Space, action_space: Space, num_envs: int, num_rows: int, persistent: bool) -> None:
        """The columns are buffers of the module, persistent if checkpoints shall hold them."""
        super().__init__()
        discrete, number = isinstance(action_space, Discrete), (np.int64, ())
        columns = dict(rewards=(np.float32, ()), terminated=(np.bool_, ()), valid=(np.bool_, ()), order=number)
        columns["obs"] = np.float32 if obs_space.dtype == np.float64 else obs_space.dtype, obs_space.shape
        columns["actions"] = number if discrete else (np.float32, (gym.spaces.flatdim(action_space),))
        self.num_envs, self.size = num_envs, (num_rows + 1) * num_envs
        num_bytes = self.size * sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for dtype, shape in columns.values())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else np.inf
        if num_bytes > memory:
            needs = f"a replay buffer of {num_rows * num_envs} transitions needs {num_bytes / 1e9:.1f} GB"
            raise ValueError(f"{needs} of memory, but this machine has {memory / 1e9:.1f} GB")
        self.arrays = {name: np.zeros((self.size, *shape), dtype) for name, (dtype, shape) in columns.items()}
        self.arrays["counts"] = np.zeros(3, np.int64)  # rows added, transitions added, transitions overwritten
        for name, array in self.arrays.items():
            self.register_buffer(name, torch.from_numpy(array), persistent)

    def __len__(self) -> int:
        """Transitions that can be sampled."""
        return int(self.arrays["counts"][1] - self.arrays["counts"][2])

    def add(
        self, next_obs: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray, valid: np.ndarray
    ) -> None:
        """A step of all environments from their last observations; where not valid, it was a reset."""
        arrays, n = self.arrays, self.num_envs
        added, head, tail = arrays["counts"].tolist()
        row, following = (slice(k * n % self.size, k * n % self.size + n) for k in (added, added + 1))
        tail += np.count_nonzero(arrays["valid"][following])  # the oldest row: its observation is overwritten here
        arrays["obs"][following] = next_obs
        arrays["actions"][row], arrays["rewards"][row] = actions, rewards
        arrays["terminated"][row], arrays["valid"][row] = terminated, valid
        places = np.flatnonzero(arrays["valid"][row]) + row.start
        arrays["order"][np.arange(head, head + len(places)) % self.size] = places
        arrays["counts"][:] = added + 1, head + len(places), tail

    def sample(self, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        """A batch of transitions, drawn uniformly and with replacement."""
        arrays, (_, head, tail) = self.arrays, self.arrays["counts"].tolist()
        places = arrays["order"][torch.randint(tail, head, (batch_size,)).numpy() % self.size]
        batch = {name: arrays[name].take(places, 0) for name in ("obs", "actions", "rewards", "terminated")}
        batch["next_obs"] = arrays["obs"].take((places + self.num_envs) % self.size, 0)
        return {name: torch.from_numpy(column).to(device) for name, column in batch.items()}


def make_envs(env_id: str, num_envs: int, video: bool = False) -> gym.vector.VectorEnv:
    """Environments side by side in autoreset mode NEXT_STEP, native vector ones where there are."""
    options = dict(render_mode="rgb_array", vectorization_mode="sync") if video else {}
    if video and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    if env_id.startswith("ALE/"):
        gym.register_envs(importlib.import_module("ale_py"))
        options = dict(reward_clipping=False)  # scores count whole
    elif env_id.startswith("MinAtar/"):
        options |= dict(max_episode_steps=10_000)  # MinAtar sets no limit
        if env_id not in gym.registry:
            importlib.import_module("minatar.gym").register_envs()
    envs = gym.make_vec(env_id, num_envs, **options)
    obs, action, mode = envs.single_observation_space, envs.single_action_space, envs.metadata.get("autoreset_mode")
    dims = len(obs.shape) if isinstance(obs, Box) else -isinstance(obs, Discrete)
    if dims not in (-1, 1, 3) or (dims == 3 and obs.dtype not in (np.uint8, np.bool_)):
        raise ValueError(f"observation space {obs} is not supported: it must be Discrete, a 1-D Box or an image Box")
    if not (isinstance(action, Discrete) or (isinstance(action, Box) and action.dtype.kind == "f")):
        raise ValueError(f"action space {action} is not supported: it must be Discrete or a Box of floats")
    if mode != gym.vector.AutoresetMode.NEXT_STEP:
        raise ValueError(f"{env_id} resets in mode {mode}, but only NEXT_STEP is supported")
    return envs


def action_map(space: Space) -> Callable[[np.ndarray], np.ndarray]:
    """From the policy's actions (N, ...) to the environment's: [-1, 1] becomes [low, high], the rest is clipped."""
    if isinstance(space, Discrete):
        return lambda actions: actions + space.start
    bounded = space.bounded_below & space.bounded_above
    low, high = np.where(bounded, space.low, -1), np.where(bounded, space.high, 1)

    def to_env(actions: np.ndarray) -> np.ndarray:
        actions = low + (actions.reshape(-1, *space.shape) + 1) * ((high - low) / 2)
        return np.minimum(np.maximum(actions, space.low), space.high).astype(space.dtype, copy=False)

    return to_env


class Run:
    """The directory of a run with its files, the progress bar and, with --track, the page on wandb."""

    def __init__(self, args: Args, **parts: nn.Module) -> None:
        """Start afresh or, with args.resume, restore `parts` from the checkpoint."""
        self.args, self.parts, algo = args, parts, Path(__file__).stem
        name = f"{args.env_id.replace('/', '-')}__{algo}__{args.seed}__{time.time():.0f}"
        self.dir = Path(args.resume or args.run_dir or f"runs/{name}")
        self.state = dict(algo=algo, env_id=args.env_id, step=0, wall_time=0.0, returns=[], log_size=0)
        if args.resume or (self.dir / "checkpoint.pt").exists():
            saved = torch.load(self.dir / "checkpoint.pt", map_location="cpu")
            if not args.resume or any(saved[key] != self.state[key] for key in ("algo", "env_id")):
                raise ValueError(f"{self.dir} holds {saved['algo']} on {saved['env_id']}, which --resume continues")
            self.state = {key: saved[key] for key in self.state}
            torch.manual_seed(10**6 * args.seed + saved["step"])  # other numbers than at the start, on every device
            try:
                for key, part in parts.items():
                    part.load_state_dict(saved[key])
            except RuntimeError as error:
                raise ValueError(f"{self.dir} holds networks of other sizes than the flags ask for") from error
        self.wandb = importlib.import_module("wandb") if args.track else None
        if self.wandb and self.wandb.setup().settings.mode == "online" and not self.wandb.login(prompt=False):
            raise ValueError("--track needs `wandb login` first, or WANDB_MODE=offline")
        if args.capture_video:
            importlib.import_module("moviepy")  # missing packages are missed before training
        self.dir.mkdir(parents=True, exist_ok=bool(args.resume or args.run_dir))
        status, commit = subprocess.getstatusoutput(f'git -C "{Path(__file__).parent}" rev-parse HEAD')
        versions = {package.name: package.version for package in importlib.metadata.distributions()}
        self.config = asdict(args) | dict(algo=algo, git_commit=None if status else commit, versions=versions)
        (self.dir / "config.json").write_text(json.dumps(self.config, indent=1))
        self.log_file = open(self.dir / "metrics.jsonl", "a")
        self.log_file.truncate(self.state["log_size"])
        if self.wandb:
            self.wandb.init(project="foliorl", name=self.dir.name, dir=self.dir, config=self.config)
        progress = dict(initial=self.state["step"], total=args.total_timesteps, unit=" steps")
        self.bar = tqdm(**progress, disable=not os.isatty(2))  # without a terminal, log() prints lines
        self.start, self.next_line = time.time() - self.state["wall_time"], time.time()

    def log(self, step: int, returns: list[float], metrics: dict[str, float]) -> None:
        """Record an iteration: the steps so far, the returns of the episodes it finished, its metrics."""
        if not np.isfinite(list(metrics.values())).all():
            self.bar.close()
            raise ValueError(f"training diverged before step {step}; the last checkpoint in {self.dir} is good")
        last_step, recent, now = self.state["step"], (self.state["returns"] + returns)[-100:], time.time() - self.start
        self.state |= dict(step=step, wall_time=now, returns=recent)
        line = dict(global_step=step, wall_time=now, SPS=step / now, episodes=len(returns))
        line |= dict(episodic_return=sum(returns) / len(returns) if returns else None) | metrics
        print(json.dumps(line), file=self.log_file, flush=True)
        if self.wandb:
            self.wandb.log(line, step=step)
        status = f"return {np.mean(recent):.1f}" if recent else "no episode has ended"
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update(step - last_step)
        if self.bar.disable and time.time() > self.next_line:
            self.next_line = time.time() + 10
            print(f"{step} of {self.args.total_timesteps} steps, {step / now:.0f} steps/s, {status}", flush=True)
        if step // self.args.checkpoint_every > last_step // self.args.checkpoint_every:
            self.save()

    def save(self) -> None:
        """Write the checkpoint, atomically: a kill leaves the old one or the new one."""
        self.state["log_size"] = self.log_file.tell()
        parts = {key: part.state_dict() for key, part in self.parts.items()}
        torch.save(self.state | parts, self.dir / "checkpoint.tmp")
        os.replace(self.dir / "checkpoint.tmp", self.dir / "checkpoint.pt")

    def finish(self, eval_returns: list[float]) -> dict:
        """Write, print and return the result."""
        mean, returns, wall_time = float(np.mean(eval_returns)), self.state["returns"], self.state["wall_time"]
        result = {key: self.config[key] for key in ("algo", "env_id", "seed", "total_timesteps")}
        result |= dict(eval_returns=eval_returns, eval_mean=mean, sps=self.state["step"] / wall_time)
        result |= dict(train_return=float(np.mean(returns)) if returns else None, wall_time=wall_time)
        (self.dir / "result.json").write_text(json.dumps(result, indent=1))
        if self.wandb:
            self.wandb.finish()
        print(f"{self.dir}: the deterministic policy returns {mean:.1f} +- {np.std(eval_returns):.1f}")
        return result


def evaluate(agent: Agent, args: Args, folder: Path) -> list[float]:
    """Returns of one episode in each of args.eval_episodes fresh environments, under the mode of the policy."""
    envs = make_envs(args.env_id, args.eval_episodes, args.capture_video)
    to_env, (obs, _) = action_map(envs.single_action_space), envs.reset(seed=10**6 * args.seed + 10**6 // 2)
    returns, running, frames = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, bool), []
    while running.any():
        if args.capture_video and running[0]:  # ALE cannot render, but its observations are frames
            frames.append(envs.envs[0].render() if hasattr(envs, "envs") else obs[0, -1, :, :, None].repeat(3, -1))
        obs, rewards, terminated, truncated, _ = envs.step(to_env(agent.act(obs, greedy=True)))
        returns += rewards * running
        running &= ~(terminated | truncated)
    if frames:
        video = importlib.import_module("gymnasium.utils.save_video")
        video.save_video(frames, str(folder), lambda _: True, fps=envs.metadata.get("render_fps", 30))
    envs.close()
    return returns.tolist()


def compile_step(step: Callable, num_calls: int, agent: Agent, args: Args, dynamic: bool | None = None) -> Callable:
    """The step, compiled if args.compile or, where that is None, if so many calls gain by it."""
    cpu = agent.device.type == "cpu"
    gains = num_calls > 20_000 and cpu and not agent.is_image
    if not (gains if args.compile is None else args.compile):
        return step
    torch._dynamo.config.trace_autograd_ops = True  # lets the compiler see torch.autograd.grad
    options = dict(cpp_wrapper=cpu)  # the kernels are called from C++
    try:
        torch.compile(torch.neg, options=options)(torch.zeros(1, device=agent.device))
    except RuntimeError:  # for instance, there is no C++ compiler
        print("PyTorch cannot compile on this machine: training goes on, but slower", flush=True)
        return step
    return torch.compile(step, dynamic=dynamic, options=options)


def train(args: Args) -> dict:
    """Train, evaluate, and return what result.json holds; raises ValueError with one sentence on bad input."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads or os.cpu_count() or 1)
    torch.set_float32_matmul_precision("medium")  # faster products by oneDNN on a CPU; bf16 only where AMX is
    envs, N = make_envs(args.env_id, args.num_envs), args.num_envs
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    if not isinstance(action_space, Box):
        raise ValueError(f"action space {action_space} is not supported: it must be a Box of floats")
    agent = Agent(obs_space, action_space, args)
    target = nn.ModuleDict(dict(actor=Target(agent.actor), critic=Target(agent.critic)))
    optimizers = nn.ModuleDict(dict(actor=Adam(agent.actor), critic=Adam(agent.critic)))
    to_env, D = action_map(action_space), gym.spaces.flatdim(action_space)
    buffer = ReplayBuffer(obs_space, action_space, N, args.buffer_size // N, args.save_buffer)
    gradient_step = compile_step(update, args.total_timesteps // args.train_frequency, agent, args)
    run = Run(args, agent=agent, target=target, optimizers=optimizers, buffer=buffer)

    first_step = run.state["step"]
    learning_starts = args.learning_starts + (0 if len(buffer) else first_step)  # an empty buffer is filled first
    log_every = max(args.log_every // N, 1) * N
    obs, _ = envs.reset(seed=10**6 * args.seed + first_step // log_every * N)  # no seed twice: i takes seed + i
    buffer.add(obs, 0, 0, False, valid=False)
    done, score, finished = np.zeros(N, bool), np.zeros(N), []
    history = deque(maxlen=100)  # of metrics; thousands of such small tensors would fragment memory
    metrics = dict(td_loss=0.0, q_value=0.0, policy_loss=0.0)  # until learning starts
    for step in range(first_step + N, args.total_timesteps + 1, N):
        progress = (step - N) / args.total_timesteps
        learning_rate = torch.tensor(args.learning_rate * (1 - progress if args.anneal_lr else 1), device=agent.device)
        action = agent.act(obs) if step - N >= args.learning_starts else 2 * torch.rand(N, D).numpy() - 1
        valid = ~done  # the step after an end resets the environment: no transition
        obs, reward, terminated, truncated, _ = envs.step(to_env(action))
        done = terminated | truncated
        score = score * valid + reward
        finished += score[done].tolist()
        buffer.add(obs, action, reward, terminated, valid)

        for t in range(step - N + 1, step + 1):  # each environment's step counts
            if t > learning_starts and t % args.train_frequency == 0:
                batch = buffer.sample(args.batch_size, agent.device)
                history.append(gradient_step(agent, target, optimizers, batch, learning_rate, args))

        if step % log_every == 0 or step + N > args.total_timesteps:
            columns = {name: [m[name] for m in history if name in m] for name in metrics}
            metrics |= {name: torch.stack(column).mean().item() for name, column in columns.items() if column}
            run.log(step, finished, metrics)
            finished = []
            history.clear()
    run.save()
    run.bar.close()
    envs.close()
    agent.actor = target["actor"].network  # steadier than mu itself
    return run.finish(evaluate(agent, args, run.dir))


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over the defaults for the environment or, with --resume, over the arguments of that run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--env-id", "--env_id", default=Args.env_id)
    parser.add_argument("--resume")
    known, _ = parser.parse_known_args(argv)
    defaults = next((FAMILIES[words] for words in FAMILIES if any(w in known.env_id for w in words.split())), {})
    if known.resume:
        config = json.loads(Path(known.resume, "config.json").read_text()) | dict(capture_video=False)
        defaults = {name: config[name] for name in asdict(Args()) if name in config}
    return tyro.cli(Args, args=argv, default=Args(**dict(env_id=known.env_id) | defaults), description=__doc__)


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, OSError, ImportError, gym.error.Error) as error:
        argparse.ArgumentParser().exit(2, f"{Path(__file__).name}: {error}\n")
    except KeyboardInterrupt:
        argparse.ArgumentParser().exit(130, "interrupted; --resume DIR continues from the last checkpoint\n")
