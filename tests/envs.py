"""Environments whose right answers are known, registered as test/<Name>-v0 when this module is imported."""

import multiprocessing
import os
import time

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv


class Tagged(gym.Env):
    """Observations [environment, step, episode] say where a row comes from; `instances` keep what really happened.

    Episodes of 1 to 7 steps, different for each environment and episode; they end by termination, by truncation or
    by both at once. `log` holds each true transition with the vector step `t` at which it took place.
    """

    observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    instances: list["Tagged"] = []  # noqa: RUF012

    def __init__(self, continuous=False):
        self.action_space = Box(np.float32([-1, -3]), np.float32([2, 0.5])) if continuous else Discrete(3)
        self.index, self.episode, self.t, self.log, self.returns = len(self.instances), -1, -1, [], []
        self.random = np.random.default_rng(self.index)
        self.instances.append(self)

    def obs(self):
        return np.array([self.index, self.step_number, self.episode], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_number, self.t = self.episode + 1, 0, self.t + 1  # a reset takes a vector step
        self.length, self.end = 1 + (3 * self.index + 5 * self.episode) % 7, (self.index + self.episode) % 3
        self.returns.append(0.0)
        return self.obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        row = dict(t=self.t, obs=self.obs(), action=np.array(action), reward=float(self.random.normal(0.5, 3)))
        self.step_number += 1
        self.t += 1
        over = self.step_number == self.length
        row |= dict(next_obs=self.obs(), terminated=over and self.end != 1, truncated=over and self.end != 0)
        self.log.append(row)
        self.returns[-1] += row["reward"]
        return row["next_obs"], row["reward"], row["terminated"], row["truncated"], {}


class ValueOnly(gym.Env):
    """One observation, one step, reward 1: V = 1."""

    observation_space, action_space = Box(-1, 1, (1,), np.float32), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def observe(self):
        return np.ones(1, np.float32)

    def step(self, action):
        return self.observe(), 1.0, True, False, {}


class ObsValue(ValueOnly):
    """The observation, -1 or 1, is the reward: V(s) = s."""

    def observe(self):
        self.state = int(self.np_random.integers(2)) * 2 - 1
        return np.full(1, self.state, np.float32)

    def step(self, action):
        reward = float(self.state)
        return self.observe(), reward, True, False, {}


class Discounting(ValueOnly):
    """Observation -1, then 1, and the reward 1 after the second: V(1) = 1, V(-1) = gamma."""

    def reset(self, *, seed=None, options=None):
        self.state = -1
        return super().reset(seed=seed)

    def observe(self):
        return np.full(1, self.state, np.float32)

    def step(self, action):
        over, self.state = self.state == 1, 1
        return self.observe(), float(over), over, False, {}


class ActionReward(ValueOnly):
    """Action 1 is paid 1, action 0 costs 1."""

    def step(self, action):
        return self.observe(), 2.0 * int(action) - 1, True, False, {}


class ObsActionReward(ObsValue):
    """Action 1 is right where the observation is 1 and action 0 where it is -1; paid 1, else -1."""

    def step(self, action):
        reward = 1.0 if (action == 1) == (self.state == 1) else -1.0
        return self.observe(), reward, True, False, {}


class Truncation(ValueOnly):
    """One observation, reward 1 for ever, cut every 8 steps: V = 1 / (1 - gamma)."""

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return super().reset(seed=seed)

    def step(self, action):
        self.steps += 1
        return self.observe(), 1.0, False, self.steps == 8, {}


class Successor(Truncation):
    """Observation -1 (reward 0), then 1 for ever (reward 1), cut after 2 steps: V(1) = 1 / (1 - gamma) = V(-1) / gamma.

    Unlike in Truncation, the observation at the end is another one than after the reset.
    """

    def observe(self):
        return np.full(1, 1 if self.steps else -1, np.float32)

    def step(self, action):
        reward, self.steps = float(self.steps > 0), self.steps + 1
        return self.observe(), reward, False, self.steps == 2, {}


class BothEnds(ValueOnly):
    """Reward 1 and an end that is termination and truncation at once: V = 1, there is nothing to bootstrap from."""

    def step(self, action):
        return self.observe(), 1.0, True, True, {}


class Bounds(ValueOnly):
    """Reward -|a - optimum|^2; the bounds differ by dimension and side, and the optimum is off-centre in each."""

    action_space, optimum = Box(np.float32([-1, -3]), np.float32([2, 0.5])), np.array([1.4, -2.3])
    actions: list[np.ndarray] = []  # noqa: RUF012

    def step(self, action):
        self.actions.append(np.array(action))
        return self.observe(), -float(np.square(action - self.optimum).sum()), True, False, {}


class Image(ValueOnly):
    """A bright block in the left or the right half of the second of two dark frames says which action is paid."""

    observation_space = Box(0, 255, (2, 36, 36), np.uint8)

    def observe(self):
        self.state = int(self.np_random.integers(2))
        image, row, column = np.zeros((2, 36, 36), np.uint8), *self.np_random.integers(2, 10, 2)
        image[1, row : row + 16, 18 * self.state + column - 2 : 18 * self.state + column + 8] = 255
        return image

    def step(self, action):
        reward = 1.0 if action == self.state else -1.0
        return self.observe(), reward, True, False, {}


class Grid(Image):
    """MinAtar's kind of image: the channel that has a cell set says which of three actions is paid."""

    observation_space, action_space = Box(0, 1, (10, 10, 3), np.bool_), Discrete(3)

    def observe(self):
        self.state = int(self.np_random.integers(3))
        image, (row, column) = np.zeros((10, 10, 3), bool), self.np_random.integers(0, 10, 2)
        image[row, column, self.state] = True
        return image


class Numbers(ValueOnly):
    """Numbered observations and actions, neither from 0: action s - 7 is paid in state s."""

    observation_space, action_space = Discrete(3, start=5), Discrete(3, start=-2)

    def observe(self):
        self.state = int(self.np_random.integers(5, 8))
        return np.int64(self.state)

    def step(self, action):
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        reward = 1.0 if action == self.state - 7 else -1.0
        return self.observe(), reward, True, False, {}


class Signalling(gym.Env):
    """Sends its process signals after so many steps, counted over all environments of the process."""

    observation_space = Box(-1, 1, (3,), np.float32)
    count = 0

    def __init__(self, continuous=False, signals=(), length=10**9, pause=0):
        self.action_space = Box(-1, 1, (1,), np.float32) if continuous else Discrete(2)
        self.signals = signals
        self.length = length
        self.pause = pause

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.length
        return np.zeros(3, np.float32), {}

    def step(self, action):
        time.sleep(self.pause)
        Signalling.count += 1
        for count, number in self.signals:
            if count == Signalling.count:
                os.kill(os.getpid(), number)
        self.left -= 1
        return np.zeros(3, np.float32), 1.0, self.left == 0, False, {}


class Simulated(Signalling):
    """Its simulator is a process of its own, which is told to end when the environment is closed."""

    def __init__(self, **kwargs):
        super().__init__(length=20, **kwargs)
        fork = multiprocessing.get_context("fork")
        self.pipe, other = fork.Pipe()
        self.process = fork.Process(target=self.simulate, args=(self.pipe, other), daemon=True)
        self.process.start()

    @staticmethod
    def simulate(ours, pipe):
        ours.close()
        while True:
            pipe.send(pipe.recv())

    def step(self, action):
        self.pipe.send(1)
        self.pipe.recv()
        return super().step(action)

    def close(self):
        self.process.terminate()
        self.process.join()


class Native(SyncVectorEnv):
    """A native vector environment in any autoreset mode, or without a word about it."""

    def __init__(self, num_envs, mode=AutoresetMode.NEXT_STEP, **kwargs):
        super().__init__([lambda: Tagged(**kwargs)] * num_envs, autoreset_mode=mode or AutoresetMode.NEXT_STEP)
        if mode is None:
            self.metadata = {}


for _env in (ValueOnly, ObsValue, Discounting, ActionReward, ObsActionReward, Truncation, Successor, BothEnds, Bounds,
             Image, Grid, Numbers, Tagged):  # fmt: skip
    gym.register(f"test/{_env.__name__}-v0", _env, disable_env_checker=True, order_enforce=False)
gym.register("test/TaggedBox-v0", Tagged, kwargs=dict(continuous=True), disable_env_checker=True, order_enforce=False)
for _name, _continuous in dict(Signalling=False, SignallingBox=True).items():
    gym.register(f"test/{_name}-v0", Signalling, kwargs=dict(continuous=_continuous), disable_env_checker=True)
for _name, _continuous in dict(Simulated=False, SimulatedBox=True).items():
    gym.register(f"test/{_name}-v0", Simulated, kwargs=dict(continuous=_continuous), disable_env_checker=True)
gym.register("test/TaggedNative-v0", vector_entry_point=Native)
for _name, _mode in dict(SameStep=AutoresetMode.SAME_STEP, Disabled=AutoresetMode.DISABLED, Silent=None).items():
    gym.register(f"test/{_name}-v0", vector_entry_point=Native, kwargs=dict(mode=_mode))
