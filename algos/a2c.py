# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy==2.2.6", "gymnasium[box2d,classic-control,mujoco]==1.4.0", "mujoco==3.15.0",
#   "ale-py==0.12.1", "MinAtar==1.0.15", "tyro==1.0.17", "tqdm==4.70.1", "moviepy==2.2.1", "wandb==0.31.0"]
# ///
"""A2C: synchronous advantage actor-critic (Mnih et al. 2016, arXiv:1602.01783), with GAE (arXiv:1506.02438).

Maximises  E[log pi(a|s) A] - c1 E[(V - R)^2] + c2 E[H(pi)]  by one gradient step on each batch of experience from N
environments side by side; A is estimated by GAE(lambda), and R = A + V. Child of actor_critic.py: the advantage
r + gamma V(s') - V(s), over several steps, in place of Q(s, a).

    python algos/a2c.py --env-id CartPole-v1

Expect 500 there (interquartile mean of 10 seeds). Not in the paper: normalised rewards and advantages and, on MuJoCo,
observations; orthogonal initialisation; actions in [-1, 1] are scaled to the bounds of the environment.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
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
from torch.distributions import Categorical, Distribution, Independent, Normal
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium id, also ALE/*, MinAtar/* or module:YourEnv-v0; decides the other defaults
    total_timesteps: int = 100_000  # environment steps to train for
    learning_rate: float = 3e-3  # step size of the optimizer
    optimizer: Literal["adam", "rmsprop"] = "rmsprop"  # rmsprop as in the paper, with alpha = 0.99
    anneal_lr: bool = True  # let the step size fall linearly to 0
    num_envs: int = 8  # N, environments side by side
    num_steps: int = 16  # T, steps in each of them per iteration
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of GAE, from 0 (one-step TD) to 1 (Monte Carlo)
    vf_coef: float = 0.5  # c1, weight of the value loss
    ent_coef: float = 0.0  # c2, weight of the entropy bonus
    max_grad_norm: float = 0.5  # longer gradients are scaled down to this norm
    log_std_init: float = 0.0  # logarithm of the initial standard deviation (Box actions)
    hidden_size: int = 64  # units in each of the two hidden layers (vector observations)
    norm_obs: bool = False  # normalise vector observations by their running mean and deviation
    norm_reward: bool = True  # divide rewards by the running deviation of the discounted return
    clip_reward: bool = False  # learn from rewards clipped to [-1, 1]; the log keeps them whole
    compile: bool | None = None  # compile the gradient step; if not said, when the run is long enough to gain by it

    seed: int = 1  # of weights, actions, minibatches and environments
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda for images where there is one, else cpu
    torch_threads: int = 1  # CPU threads of PyTorch, 0 for one per core; small networks are fastest with 1
    run_dir: str = ""  # where the results go; if not said, runs/<env>__<algo>__<seed>__<time>
    track: bool = False  # log to Weights & Biases
    capture_video: bool = False  # film an episode of the final evaluation
    eval_episodes: int = 20  # episodes of the final evaluation
    checkpoint_every: int = 100_000  # environment steps between checkpoints
    resume: str = ""  # run directory to continue; a finished run is only evaluated again

    def __post_init__(self) -> None:
        """Raise ValueError with one sentence if a value is impossible."""
        lowest = dict(num_steps=4, seed=0, torch_threads=0, log_std_init=-20)  # of 4 steps at least 2 are no resets
        for name, value in asdict(self).items():
            low, high = lowest.get(name, int(type(value) is int)), dict(gamma=1, gae_lambda=1).get(name, float("inf"))
            if isinstance(value, int | float) and not low <= value <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}], but is {value}")
        batch_size = self.num_envs * self.num_steps
        if batch_size > self.total_timesteps:
            raise ValueError(f"num_envs * num_steps = {batch_size} may not exceed total_timesteps")
        if self.device != "auto" and not getattr(torch, self.device).is_available():
            raise ValueError(f"device {self.device} is not available on this machine")


# Defaults by environment, beside those of Args: the first entry with a word that the id contains counts.
FAMILIES = {
    "Pendulum-v": dict(gamma=0.9, eval_episodes=100),
    "Acrobot MountainCar": dict(total_timesteps=300_000, num_envs=16, norm_obs=True, eval_episodes=100),
    "LunarLander BipedalWalker": dict(total_timesteps=1_000_000, num_envs=16, gamma=0.995, ent_coef=1e-5),
    "HalfCheetah Hopper Walker2d Ant Humanoid Swimmer Reacher Pusher Inverted": dict(total_timesteps=1_000_000,
        num_envs=16, num_steps=64, norm_obs=True, log_std_init=-0.7),
    "MinAtar/": dict(total_timesteps=1_000_000, num_envs=64, ent_coef=0.01, norm_reward=False),
    "ALE/": dict(total_timesteps=10_000_000, learning_rate=7e-4, num_envs=16, num_steps=5, ent_coef=0.01,
        norm_reward=False, clip_reward=True, torch_threads=0),
}  # fmt: skip


class RunningNorm(nn.Module):
    """Running mean and variance of a stream, as buffers: saved, loaded and frozen with the weights."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        for name, value in dict(mean=0.0, var=1.0, count=0.0, scale=1.0).items():
            self.register_buffer(name, torch.full(shape, value))

    def update(self, x: Tensor) -> None:
        """Count each row of x (B, *shape) once (Chan et al. 1983)."""
        self.count += len(x)
        weight, delta = len(x) / self.count, x.mean(0) - self.mean
        self.mean += weight * delta
        self.var += weight * (x.var(0, correction=0) - self.var + (1 - weight) * delta.square())
        self.scale.copy_(torch.rsqrt(self.var + 1e-8))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) * self.scale).clamp(-10, 10)


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


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers = [layer for size in zip(sizes, sizes[1:]) for layer in (nn.Linear(*size), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class RMSprop(Adam):
    """Adam without its momentum and its correction of biases, the optimizer of Mnih et al. 2016 (sec. 4)."""

    @torch.no_grad()
    def step(self, gradient: Tensor, lr: Tensor, alpha: float = 0.99) -> None:
        """Move theta down the gradient (P,)."""
        self.v.lerp_(gradient.square(), 1 - alpha)
        self.theta.sub_(lr * gradient / (self.v + 1e-5).sqrt())


class Agent(nn.Module):
    """Actor and critic: an MLP each or, for images, a linear layer each on top of a shared CNN."""

    def __init__(self, obs_space: Space, action_space: Space, args: Args) -> None:
        super().__init__()
        shape, width, hidden = obs_space.shape or (), gym.spaces.flatdim(obs_space), [args.hidden_size] * 2
        self.obs_space, self.is_image, self.discrete = obs_space, len(shape) == 3, isinstance(action_space, Discrete)
        self.trunk = RunningNorm(*shape) if args.norm_obs and len(shape) == 1 else nn.Identity()
        if self.is_image:  # the network of DQN (Mnih et al. 2015), or MinAtar's (Young & Tian 2019) for small images
            filters = [(32, 8, 4), (64, 4, 2), (64, 3, 1)] if sorted(shape)[1] >= 36 else [(16, 3, 1)]
            layers = [layer for f in filters for layer in (nn.LazyConv2d(*f), nn.ReLU())]
            width, hidden = 512 if len(filters) == 3 else 128, []
            self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(width), nn.ReLU())
        num_outputs = gym.spaces.flatdim(action_space)
        self.actor, self.critic = mlp(width, *hidden, num_outputs), mlp(width, *hidden, 1)
        self.log_std = None if self.discrete else nn.Parameter(torch.full((num_outputs,), args.log_std_init))
        self.return_norm = RunningNorm()
        self(torch.as_tensor(obs_space.sample()[None]))  # shows the lazy layers their inputs
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.orthogonal_(layer.weight, {self.actor[-1]: 0.01, self.critic[-1]: 1.0}.get(layer, 2**0.5))
                nn.init.zeros_(layer.bias)
        self.actor_layers = [(layer.weight, layer.bias) for layer in self.actor[::2]]  # for act(), which must be fast
        on_gpu = self.is_image and torch.cuda.is_available()
        self.device = torch.device(args.device.replace("auto", "cuda" if on_gpu else "cpu"))
        self.to(self.device)

    def features(self, obs: Tensor) -> Tensor:
        """Inputs of actor and critic: integers one-hot, vectors normalised if asked for, images through the CNN."""
        if isinstance(self.obs_space, Discrete):
            obs = nn.functional.one_hot(obs - int(self.obs_space.start), int(self.obs_space.n))
        elif self.is_image:
            obs = obs.movedim(-1, 1) if obs.dtype == torch.bool else obs / 255
            obs = obs.contiguous(memory_format=torch.channels_last)  # convolutions run faster so
        return self.trunk(obs.float())

    def forward(self, obs: Tensor) -> tuple[Distribution, Tensor]:
        """pi(.|s) and V(s) (B,) of observations (B, ...)."""
        x = self.features(obs)
        out, value = self.actor(x), self.critic(x).squeeze(-1)
        if self.discrete:
            return Categorical(logits=out, validate_args=False), value
        return Independent(Normal(out, self.log_std.exp(), validate_args=False), 1), value

    @torch.no_grad()
    def act(self, obs: np.ndarray, greedy: bool = False) -> np.ndarray:
        """Actions sampled from pi(.|s) or, if greedy, its mode; lean, because it runs at every step."""
        x = self.features(torch.from_numpy(obs).to(self.device))
        for weight, bias in self.actor_layers[:-1]:
            x = nn.functional.linear(x, weight, bias).tanh()
        x = nn.functional.linear(x, *self.actor_layers[-1])
        if not greedy and self.discrete:
            x = x - torch.empty_like(x).exponential_().log()  # Gumbel-max trick: the argmax is now a sample
        elif not greedy:
            x = x + self.log_std.exp() * torch.randn_like(x)
        return (x.argmax(-1) if self.discrete else x).numpy(force=True)


def compute_gae(rewards: Tensor, values: Tensor, terminated: Tensor, done: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages (T, N) from rewards, terminated, done (T, N), values (T + 1, N); done is terminated or truncated."""
    deltas = rewards + gamma * ~terminated * values[1:] - values[:-1]  # PPO eq. 12; termination stops the bootstrap
    deltas, decays = deltas.numpy(force=True), (gamma * lam * ~done).numpy(force=True)  # 5x faster for so small steps
    advantages = np.zeros_like(deltas, shape=values.shape)
    for t in reversed(range(len(deltas))):
        advantages[t] = deltas[t] + decays[t] * advantages[t + 1]  # eq. 11; an end of either kind stops the trace
    return torch.from_numpy(advantages[:-1]).to(rewards.device)


def a2c_loss(agent: Agent, batch: dict[str, Tensor], args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of A2C on a batch with one transition per row, and what to log."""
    policy, values = agent(batch["obs"])
    policy_loss = -(policy.log_prob(batch["actions"]) * batch["advantages"]).mean()
    value_loss = (values - batch["returns"]).square().mean()
    entropy = policy.entropy().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    metrics = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy)
    return loss, {name: metric.detach() for name, metric in metrics.items()}


def update(agent: Agent, optimizer: Adam, batch: dict, learning_rate: Tensor, args: Args) -> dict:
    """One step of the optimizer down the gradient of a2c_loss; returns its metrics."""
    loss, metrics = a2c_loss(agent, batch, args)
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(agent.parameters()))])
    gradient = gradient * (args.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1)
    optimizer.step(gradient, learning_rate)
    return metrics


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
    """Train A2C, evaluate it, and return what result.json holds; raises ValueError with one sentence on bad input."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads or os.cpu_count() or 1)
    envs = make_envs(args.env_id, args.num_envs)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args)
    optimizer = RMSprop(agent) if args.optimizer == "rmsprop" else Adam(agent)
    to_env = action_map(envs.single_action_space)
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    gradient_step = compile_step(update, num_iterations, agent, args, dynamic=True)
    run = Run(args, agent=agent, optimizer=optimizer)

    first_iteration = run.state["step"] // batch_size
    obs, _ = envs.reset(seed=10**6 * args.seed + first_iteration * args.num_envs)  # no seed twice: i takes seed + i
    done, score, discounted = np.zeros(args.num_envs, bool), np.zeros(args.num_envs), np.zeros(args.num_envs)
    for iteration in range(first_iteration, num_iterations):
        remaining = 1 - iteration / num_iterations
        learning_rate = torch.tensor(args.learning_rate * (remaining if args.anneal_lr else 1), device=agent.device)

        steps, finished = [], []
        for _ in range(args.num_steps):
            action, valid = agent.act(obs), ~done  # the step after an end resets the environment: no transition
            next_obs, reward, terminated, truncated, _ = envs.step(to_env(action))
            done = terminated | truncated
            score = score * valid + reward
            finished += score[done].tolist()
            reward = reward.clip(-1, 1) if args.clip_reward else reward
            if args.norm_reward:
                discounted = args.gamma * discounted * valid + reward
            steps.append((obs, action, reward, terminated, done, valid, discounted))
            obs = next_obs
        rollout = [torch.from_numpy(np.array(column)).to(agent.device) for column in zip(*steps)]
        all_obs, actions, rewards, terminations, ends, valid, discounted_returns = rollout

        rewards = rewards.float()
        if args.norm_reward:
            agent.return_norm.update(discounted_returns[valid].float())
            rewards = (rewards * agent.return_norm.scale).clamp(-10, 10)
        with torch.no_grad():
            all_values = [agent(x)[1] for x in (all_obs.flatten(0, 1), torch.from_numpy(obs).to(agent.device))]
            values = torch.cat(all_values).view(-1, args.num_envs)
        advantages = compute_gae(rewards, values, terminations, ends, args.gamma, args.gae_lambda)
        batch = dict(obs=all_obs, actions=actions, advantages=advantages, returns=advantages + values[:-1])
        batch = {name: column[valid] for name, column in batch.items()}
        batch["advantages"] = (batch["advantages"] - batch["advantages"].mean()) / (batch["advantages"].std() + 1e-8)

        metrics = gradient_step(agent, optimizer, batch, learning_rate, args)
        if isinstance(agent.trunk, RunningNorm):
            agent.trunk.update(batch["obs"].float())  # not before: acting and learning must see the same policy
        run.log((iteration + 1) * batch_size, finished, {name: metric.item() for name, metric in metrics.items()})
    run.save()
    run.bar.close()
    envs.close()
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
