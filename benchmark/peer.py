"""Trains an algorithm of stable-baselines3, sb3-contrib or sbx-rl and prints its steps per second.

For the peer's interpreter: `python peer.py sb3.PPO OPTIONS`, the latter as a JSON object whose names are our flags.
"""

import json
import sys
import time
from importlib import import_module

import numpy as np

NAMES = dict(
    cg_iterations="cg_max_steps", clip_coef="clip_range", damping="cg_damping", end_e="exploration_final_eps",
    noise_clip="target_noise_clip", num_steps="n_steps", policy_frequency="policy_delay",
    policy_noise="target_policy_noise", start_e="exploration_initial_eps",
    target_network_frequency="target_update_interval", train_frequency="train_freq", update_epochs="n_epochs",
)  # fmt: skip
SAME = """batch_size buffer_size ent_coef exploration_fraction gae_lambda gamma learning_rate learning_starts
    max_grad_norm seed target_kl tau vf_coef"""
NAMES |= {name: name for name in SAME.split()}
ELSEWHERE = {"env_id", "num_envs", "total_timesteps", "norm_obs", "norm_reward", "exploration_noise"}
ELSEWHERE |= {"anneal_lr"}  # which is off, for no peer anneals unless it is given a schedule


def settings(kind: str, options: dict) -> dict:
    """The arguments of a class like sb3.PPO; those that it does not take make it raise TypeError."""
    names = NAMES | (dict(update_epochs="n_critic_updates") if kind == "sb3.TRPO" else {})
    found = {names[key]: value for key, value in options.items() if key in names}
    found["policy_kwargs"] = dict(net_arch=[options["hidden_size"]] * 2)
    if "num_quantiles" in options:
        found["policy_kwargs"]["n_quantiles"] = options["num_quantiles"]
    if "num_minibatches" in options:
        found["batch_size"] = options["num_envs"] * options["num_steps"] // options["num_minibatches"]
    if "train_frequency" in options:
        found["train_freq"] //= options["num_envs"]  # they count steps of all environments at once
    if kind == "sb3.A2C":
        found["normalize_advantage"] = True
    if kind == "sbx.DDPG":
        found["qf_learning_rate"] = options["learning_rate"]  # its default is a number, not that of the actor
    if unknown := options.keys() - names - ELSEWHERE - {"hidden_size", "num_minibatches", "num_quantiles"}:
        raise ValueError(f"{kind} has no counterpart of {', '.join(sorted(unknown))}")
    return found


def make_agent(kind: str, options: dict):
    """The peer's agent with its environments, set up as the options say."""
    from stable_baselines3.common.env_util import make_vec_env  # here, for `settings` needs no peer
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.vec_env import VecNormalize

    arguments = settings(kind, options)
    library, name = kind.split(".")
    modules = map(import_module, ("sbx",) if library == "sbx" else ("stable_baselines3", "sb3_contrib"))
    make = next(getattr(module, name) for module in modules if hasattr(module, name))
    envs = make_vec_env(options["env_id"], options["num_envs"], seed=options["seed"])
    if options.get("norm_obs") or options.get("norm_reward"):
        envs = VecNormalize(envs, options["norm_obs"], options["norm_reward"], gamma=options["gamma"])
    if "exploration_noise" in options:
        mean = np.zeros(envs.action_space.shape)
        arguments["action_noise"] = NormalActionNoise(mean, mean + options["exploration_noise"])
    return make("MlpPolicy", envs, device="cpu", **arguments)


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    agent = make_agent(sys.argv[1], options)
    start = time.perf_counter()
    agent.learn(options["total_timesteps"])
    print(json.dumps(dict(sps=agent.num_timesteps / (time.perf_counter() - start))))
