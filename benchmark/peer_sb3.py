"""Trains stable-baselines3's PPO as a JSON object says, and prints its steps per second; for the peer's interpreter."""

import json
import sys
import time

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

options = json.loads(sys.argv[1])
torch.set_num_threads(1)
envs = make_vec_env(options["env_id"], options["num_envs"], seed=options["seed"])
if options["norm_obs"] or options["norm_reward"]:
    envs = VecNormalize(envs, options["norm_obs"], options["norm_reward"], gamma=options["gamma"])
agent = PPO(
    "MlpPolicy",
    envs,
    learning_rate=options["learning_rate"],
    n_steps=options["num_steps"],
    batch_size=options["num_envs"] * options["num_steps"] // options["num_minibatches"],
    n_epochs=options["update_epochs"],
    gamma=options["gamma"],
    gae_lambda=options["gae_lambda"],
    clip_range=options["clip_coef"],
    vf_coef=options["vf_coef"],
    ent_coef=options["ent_coef"],
    max_grad_norm=options["max_grad_norm"],
    policy_kwargs=dict(net_arch=[options["hidden_size"]] * 2),
    seed=options["seed"],
    device="cpu",
)
start = time.perf_counter()
agent.learn(options["total_timesteps"])
print(json.dumps(dict(sps=agent.num_timesteps / (time.perf_counter() - start))))
