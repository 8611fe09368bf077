"""What `python -m benchmark speed` measures: the hyperparameters of each of our scripts and of its peers."""

from typing import NamedTuple


class Task(NamedTuple):
    """What a script and its peers train; the names of the options are our flags, and `extra` is for the peers alone."""

    script: str
    env_id: str
    steps: int
    peers: str  # classes, like sb3.PPO, or a script of ours, like foliorl.dqn
    options: dict
    extra: dict

    def at(self, steps: int) -> dict:
        """The options of both sides with the environment and these steps or, if 0, those of the task."""
        return self.options | dict(env_id=self.env_id, total_timesteps=steps or self.steps)


OURS = dict(eval_episodes=1, compile=True)  # the evaluation is not measured, and long runs compile
PLAIN = dict(gamma=0.99, hidden_size=64, norm_obs=False, norm_reward=False, anneal_lr=False)
MUJOCO = dict(num_envs=1, num_steps=2048, norm_obs=True, norm_reward=True)
GRADIENT = PLAIN | dict(vf_coef=0.5, ent_coef=0.0, max_grad_norm=0.5)
PPO = GRADIENT | dict(learning_rate=3e-4, gae_lambda=0.95)
A2C = GRADIENT | dict(learning_rate=7e-4)
TRPO = PLAIN | dict(learning_rate=1e-3, gae_lambda=0.95, update_epochs=10, cg_iterations=10, damping=0.1)
PPO_CARTPOLE = PPO | dict(num_envs=4, num_steps=128, update_epochs=4, num_minibatches=4)
TRPO_CARTPOLE = TRPO | dict(num_envs=4, num_steps=256, num_minibatches=8)
CLIP = dict(clip_coef=0.2)
GAE = dict(gae_lambda=0.95)
KL = dict(target_kl=0.01)
REPLAY = dict(gamma=0.99, learning_starts=1000)
DQN = REPLAY | dict(num_envs=4, learning_rate=1e-3, hidden_size=64, buffer_size=100_000, batch_size=64,
    train_frequency=4, target_network_frequency=250, start_e=1.0, end_e=0.05, exploration_fraction=0.2,
    max_grad_norm=10.0, anneal_lr=False)  # fmt: skip
NO_EPSILON = {name: value for name, value in DQN.items() if name not in ("start_e", "end_e", "exploration_fraction")}
SAC = REPLAY | dict(num_envs=1, learning_rate=3e-4, hidden_size=256, buffer_size=1_000_000, batch_size=256,
    train_frequency=1, tau=0.005)  # fmt: skip
DDPG = SAC | dict(exploration_noise=0.1)
TD3 = DDPG | dict(policy_noise=0.2, noise_clip=0.5, policy_frequency=2)
TASKS = [
    Task("ppo_clip", "CartPole-v1", 1_000_000, "sb3.PPO sbx.PPO", PPO_CARTPOLE | CLIP, {}),
    Task("ppo_clip", "HalfCheetah-v5", 1_000_000, "sb3.PPO sbx.PPO",
        PPO | CLIP | MUJOCO | dict(update_epochs=10, num_minibatches=32), {}),
    Task("ppo_kl", "CartPole-v1", 1_000_000, "sb3.PPO", PPO_CARTPOLE, CLIP),
    Task("trpo_penalty", "CartPole-v1", 1_000_000, "sb3.PPO", PPO_CARTPOLE, CLIP),
    Task("reinforce", "CartPole-v1", 1_000_000, "sb3.A2C", A2C | dict(num_envs=8), GAE | dict(num_steps=5)),
    Task("a2c", "CartPole-v1", 1_000_000, "sb3.A2C", A2C | GAE | dict(num_envs=8, num_steps=5), {}),
    Task("a2c", "HalfCheetah-v5", 300_000, "sb3.A2C", A2C | GAE | MUJOCO | dict(num_envs=4, num_steps=8), {}),
    Task("actor_critic", "CartPole-v1", 1_000_000, "sb3.A2C", A2C | dict(num_envs=8, num_steps=5), GAE),
    Task("trpo", "CartPole-v1", 300_000, "sb3.TRPO", TRPO_CARTPOLE | KL, {}),
    Task("trpo", "HalfCheetah-v5", 300_000, "sb3.TRPO", TRPO | KL | MUJOCO | dict(num_minibatches=16), {}),
    Task("npg", "CartPole-v1", 300_000, "sb3.TRPO", TRPO_CARTPOLE, KL),
    Task("dqn", "CartPole-v1", 500_000, "sb3.DQN", DQN, {}),
    Task("n_step_dqn", "CartPole-v1", 100_000, "foliorl.dqn", DQN, {}),
    Task("prioritized_dqn", "CartPole-v1", 100_000, "foliorl.dqn", DQN, {}),
    Task("noisy_dqn", "CartPole-v1", 100_000, "foliorl.dqn", NO_EPSILON, {}),
    Task("c51", "CartPole-v1", 100_000, "foliorl.dqn", DQN, {}),
    Task("qr_dqn", "CartPole-v1", 100_000, "foliorl.dqn", DQN, {}),
    Task("qr_dqn", "CartPole-v1", 100_000, "sb3.QRDQN", DQN | dict(num_quantiles=25), {}),
    Task("rainbow", "CartPole-v1", 100_000, "foliorl.dqn", DQN, {}),
    Task("pqn", "CartPole-v1", 500_000, "foliorl.dqn", dict(hidden_size=64, anneal_lr=False), {}),
    Task("pqn", "MinAtar/Breakout-v1", 100_000, "foliorl.dqn", dict(anneal_lr=False), {}),
    Task("ddpg", "HalfCheetah-v5", 25_000, "sb3.DDPG sbx.DDPG", DDPG, {}),
    Task("td3", "HalfCheetah-v5", 25_000, "sb3.TD3 sbx.TD3", TD3, {}),
    Task("sac", "HalfCheetah-v5", 25_000, "sb3.SAC sbx.SAC", SAC, {}),
]  # fmt: skip
