"""Trains an algorithm of stable-baselines3 or sb3-contrib as a JSON object says, and prints its steps per second.

For the peer's interpreter. The names of the options are those of our flags.
"""

import json
import sys
import time

import sb3_contrib
import stable_baselines3
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

NAMES = dict(
    num_steps="n_steps", update_epochs="n_epochs", clip_coef="clip_range", cg_iterations="cg_max_steps",
    damping="cg_damping", learning_rate="learning_rate", gamma="gamma",
    gae_lambda="gae_lambda", vf_coef="vf_coef", ent_coef="ent_coef", max_grad_norm="max_grad_norm",
    target_kl="target_kl", seed="seed",
)  # fmt: skip

options = json.loads(sys.argv[1])
torch.set_num_threads(1)
envs = make_vec_env(options["env_id"], options["num_envs"], seed=options["seed"])
if options["norm_obs"] or options["norm_reward"]:
    envs = VecNormalize(envs, options["norm_obs"], options["norm_reward"], gamma=options["gamma"])
if options["peer"] == "TRPO":
    NAMES["update_epochs"] = "n_critic_updates"
settings = {theirs: options[ours] for ours, theirs in NAMES.items() if ours in options}
if "num_minibatches" in options:
    settings["batch_size"] = options["num_envs"] * options["num_steps"] // options["num_minibatches"]
if options["peer"] == "A2C":
    settings["normalize_advantage"] = True
kind = getattr(stable_baselines3, options["peer"], None) or getattr(sb3_contrib, options["peer"])
network = dict(net_arch=[options["hidden_size"]] * 2)
agent = kind("MlpPolicy", envs, policy_kwargs=network, device="cpu", **settings)
start = time.perf_counter()
agent.learn(options["total_timesteps"])
print(json.dumps(dict(sps=agent.num_timesteps / (time.perf_counter() - start))))
