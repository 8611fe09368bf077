"""What the tests of the off-policy scripts share: agents, batches, short runs and the networks that they learn."""

import json

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MODULES, make_args
from gymnasium.spaces import Box
from runs import each, is_continuous, is_distributional


def has_noisy_layers(module) -> bool:
    """Whether the script explores by noise on the weights of its network."""
    return hasattr(module, "NoisyLinear")


OFF_POLICY = [module for module in MODULES if hasattr(module, "ReplayBuffer")]
each_off_policy = each(OFF_POLICY)
each_q_learning = each([module for module in OFF_POLICY if not is_continuous(module)])
each_epsilon_greedy = each([module for module in OFF_POLICY if hasattr(module, "linear_schedule")])
each_squared_error = each(  # Q-learning of means, without noise; the rest is in test_distributional.py, test_noisy.py
    [
        module
        for module in OFF_POLICY
        if not (is_continuous(module) or is_distributional(module) or has_noisy_layers(module))
    ]
)
each_continuous = each([module for module in OFF_POLICY if is_continuous(module)])
VECTOR = Box(-np.inf, np.inf, (5,), np.float32)
FRAMES = Box(0, 255, (2, 36, 36), np.uint8)
GRID = Box(0, 1, (10, 10, 3), np.bool_)
CPU = torch.device("cpu")


class ImageBox(envs.Image):
    """The lit half says whether the reward is 1 or -1, whatever the action."""

    action_space = Box(-1, 1, (1,), np.float32)

    def step(self, action):
        reward = 2.0 * self.state - 1
        return self.observe(), reward, True, False, {}


gym.register("test/ImageBox-v0", ImageBox, disable_env_checker=True, order_enforce=False)


def bugs(*triples):
    """Run the test once for each bug: the name of a script, a text that occurs in it once, and what replaces it."""
    names = [f"{name}-{' '.join(new.split())[:50]}" for name, _, new in triples]
    return pytest.mark.parametrize(("name", "old", "new"), triples, ids=names)


def has_noise(module) -> bool:
    """Whether the script learns a policy that is random: SAC."""
    return hasattr(module, "temperature_loss")


def make_agents(module, obs_space=VECTOR, **given):
    """Two agents for 3 or, if continuous, 2-dimensional actions, whose outputs differ much between rows; arguments."""
    args = module.Args(**dict(hidden_size=16) | given)
    num_actions = 2 if is_continuous(module) else 3
    agents = [module.Agent(obs_space, num_actions, args) for _ in range(2)]
    with torch.no_grad():
        for agent in agents:
            for parameter in agent.parameters():
                parameter *= 2
            if has_noise(module):
                agent.log_alpha.fill_(0.3)
    return *agents, args


@torch.no_grad()
def answer_always(actor, outputs):
    """Let the last layer of an actor give these numbers, whatever the observation."""
    last = [layer for layer in actor.modules() if isinstance(layer, torch.nn.Linear)][-1]
    last.weight.zero_()
    last.bias.copy_(torch.tensor(outputs[: len(last.bias)]))


def make_batch(module, rows=64):
    """A batch as the losses get it."""
    batch = dict(
        obs=torch.randn(rows, 5),
        rewards=2 * torch.randn(rows),
        next_obs=torch.randn(rows, 5),
        terminated=torch.rand(rows) < 0.3,
    )
    if hasattr(module, "n_step_batch"):
        batch["discounts"] = 0.8 ** torch.randint(1, 4, (rows,))
    if hasattr(module, "Priorities"):
        batch["weights"] = torch.rand(rows)
    if not is_continuous(module):
        return batch | dict(actions=torch.randint(3, (rows,)))
    actions = 2 * torch.rand(rows, 2) - 1
    return batch | dict(actions=actions, noise=torch.randn(rows, 2), next_noise=torch.randn(rows, 2))


def critics(agent) -> list:
    """The networks that learn values."""
    if hasattr(agent, "critic1"):
        return [agent.critic1, agent.critic2]
    return [agent.critic] if hasattr(agent, "critic") else [agent]


def critic_parameters(agent) -> list:
    """What the loss of the critics moves."""
    return [parameter for critic in critics(agent) for parameter in critic.parameters()]


def flat(tensors) -> torch.Tensor:
    """A vector of all of them, with memory of its own."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient(loss, parameters) -> torch.Tensor:
    """The gradient of a loss, as a vector."""
    return flat(torch.autograd.grad(loss, list(parameters)))


def learn(module, folder, name="Tagged", **given) -> dict:
    """The result of a short run in test/<name>-v0 or, if continuous, in test/<name>Box-v0."""
    kind = "Box" if is_continuous(module) else ""
    plain = dict(env_id=f"test/{name}{kind}-v0", num_envs=3, total_timesteps=300, learning_starts=30, batch_size=16)
    plain |= dict(buffer_size=1000, hidden_size=16, train_frequency=1, learning_rate=1e-3)
    if not given.get("resume"):
        envs.Tagged.instances = []
    return module.train(make_args(module, folder, **plain | given))


def resume(module, folder, **given) -> dict:
    """The result of the same run, continued to the step 600."""
    return learn(module, folder, **dict(total_timesteps=600, resume=str(folder / "run")) | given)


def lines(folder) -> list[dict]:
    """The log of a short run."""
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def key(obs) -> tuple:
    """An observation of the environment Tagged, by which its transition is found."""
    return tuple(int(x) for x in obs)


def transitions() -> dict:
    """What really happened in the environments Tagged, by observation."""
    return {key(row["obs"]): row for env in envs.Tagged.instances for row in env.log}


def check_acting(acting) -> None:
    """Each step of the environments Tagged took the action that act() gave for the observation before that step.

    `acting` holds inputs and output of act() for each step of the vector.
    """
    for row in transitions().values():
        if row["t"] < len(acting):
            obs, actions = acting[row["t"]]
            index = int(row["obs"][0])
            assert key(obs[index]) == key(row["obs"])
            assert actions[index] == row["action"]


def scaled(actions, space) -> np.ndarray:
    """The actions of an environment that belong to those of a policy in [-1, 1]."""
    shares = (np.asarray(actions, np.float64).reshape(-1, *space.shape) + 1) / 2
    return space.low + shares * (space.high - space.low)
