"""What the benchmark runs: one row for algorithms x environment x seeds."""

# Of the ten million steps that are Atari's default; larger steps of the optimizer make up for the small number.
FIRST_MILLION = "--learning-rate 1e-3 --clip-coef 0.2 --no-anneal-clip --update-epochs 4"

# name: rows of (algorithms, environment, steps, seeds, flags beside the defaults, such as "--num-envs 8").
# `ci` is small enough for every commit; its longest rows come first, so that no core waits for one at the end. Where it
# trains less than another suite, it has a bar of its own. The seeds of `unsteady` rows lie so far apart that a few
# fresh ones cannot show the loss of a fifth: `check` has little power there.
SUITES = {
    "ci": [
        ("sac td3 ddpg", "Pendulum-v1", 10_000, "1-10", ""),
        ("dqn double_dqn dueling_dqn c51 qr_dqn", "CartPole-v1", 50_000, "1-10", ""),
        ("ppo_clip", "Acrobot-v1", 100_000, "1-10", ""),
        ("ppo_clip", "Pendulum-v1", 80_000, "1-10", ""),
        ("actor_critic reinforce deep_sarsa", "CartPole-v1", 200_000, "1-10", ""),
        ("a2c", "CartPole-v1", 150_000, "1-10", ""),
        ("pqn", "CartPole-v1", 100_000, "1-10", ""),
        ("npg trpo trpo_penalty ppo_kl ppo_clip", "CartPole-v1", 50_000, "1-10", ""),
    ],
    "classic": [
        ("reinforce actor_critic", "CartPole-v1", 200_000, "1-10", ""),
        ("a2c npg trpo trpo_penalty ppo_kl ppo_clip", "CartPole-v1", 100_000, "1-10", ""),
        ("a2c trpo ppo_kl ppo_clip", "Acrobot-v1", 300_000, "1-10", ""),
        ("trpo ppo_clip", "Pendulum-v1", 100_000, "1-10", ""),
        ("deep_sarsa", "CartPole-v1", 200_000, "1-10", ""),
        ("dqn double_dqn dueling_dqn prioritized_dqn", "CartPole-v1", 50_000, "1-10", ""),
        ("n_step_dqn noisy_dqn c51 qr_dqn", "CartPole-v1", 50_000, "1-10", ""),
        ("pqn", "CartPole-v1", 100_000, "1-10", ""),
        ("dqn double_dqn dueling_dqn n_step_dqn c51 qr_dqn rainbow", "Acrobot-v1", 100_000, "1-10", ""),
        ("ddpg td3 sac", "Pendulum-v1", 20_000, "1-10", ""),
    ],
    "unsteady": [
        ("ppo_clip", "FrozenLake-v1", 100_000, "1-10", ""),
        ("deep_sarsa", "CliffWalking-v1", 100_000, "1-10", ""),
        ("rainbow", "CartPole-v1", 50_000, "1-10", ""),
        ("dqn noisy_dqn qr_dqn", "MountainCar-v0", 120_000, "1-10", ""),
    ],
    "box2d": [
        ("ppo_clip", "LunarLander-v3", 1_000_000, "1-10", ""),
        ("double_dqn prioritized_dqn rainbow", "LunarLander-v3", 300_000, "1-5", ""),
    ],
    "mujoco": [
        ("a2c npg trpo ppo_clip", "HalfCheetah-v5", 1_000_000, "1-5", ""),
        ("a2c npg trpo ppo_clip", "Hopper-v5", 1_000_000, "1-5", ""),
        ("a2c npg trpo ppo_clip", "Walker2d-v5", 1_000_000, "1-5", ""),
        ("td3 sac", "InvertedPendulum-v5", 25_000, "1-10", ""),
        ("ddpg td3 sac", "HalfCheetah-v5", 100_000, "1-5", ""),
        ("td3 sac", "Hopper-v5", 1_000_000, "1-3", ""),
        ("td3 sac", "Walker2d-v5", 1_000_000, "1-3", ""),
        ("ddpg td3 sac", "HalfCheetah-v5", 1_000_000, "1-3", ""),
    ],
    "distributed": [
        ("a3c impala", "CartPole-v1", 200_000, "1-10", ""),
        ("ddppo", "CartPole-v1", 100_000, "1-10", ""),
        ("ddppo", "HalfCheetah-v5", 1_000_000, "1-3", ""),
    ],
    "prediction": [
        ("td_prediction", "RandomWalk-v0", 3_000_000, "1-10", ""),
        ("td_prediction", "RandomWalk-v0", 3_000_000, "1-10", "--method mc"),
    ],
    "imitation": [
        ("behavior_cloning", "LunarLander-v3", 500_000, "1-10", "--num-demonstrations 1"),
        ("behavior_cloning", "LunarLander-v3", 500_000, "1-10", "--num-demonstrations 3"),
        ("behavior_cloning", "LunarLander-v3", 500_000, "1-10", ""),
        ("behavior_cloning", "LunarLander-v3", 500_000, "1-10", "--num-demonstrations 30"),
        ("behavior_cloning", "LunarLander-v3", 500_000, "1-10", "--num-demonstrations 60"),
        ("behavior_cloning", "LunarLander-v3", 500_000, "1-10", "--num-demonstrations 60 --top-fraction 0.5"),
        ("dagger", "LunarLander-v3", 2_800_000, "1-10", "--num-labelled 2"),
        ("dagger", "LunarLander-v3", 2_800_000, "1-10", ""),
    ],
    "language": [
        ("ppo_rlhf", "reviews", 100_000, "1-10", ""),
        ("ppo_rlhf", "reviews", 100_000, "1-10", "--kl-coef 0"),
        ("ppo_rlhf", "reviews", 100_000, "1-10", "--kl-coef 0.3"),
        ("dpo", "reviews", 104_000, "1-10", ""),
        ("grpo", "countdown", 400_000, "1-10", ""),
    ],
    "minatar": [
        ("ppo_clip dqn noisy_dqn qr_dqn rainbow pqn", "MinAtar/Breakout-v1", 1_000_000, "1-3", ""),
        ("ppo_clip dqn rainbow", "MinAtar/SpaceInvaders-v1", 1_000_000, "1-3", ""),
        ("ppo_clip dqn", "MinAtar/Freeway-v1", 1_000_000, "1-3", ""),
        ("ppo_clip dqn", "MinAtar/Asterix-v1", 1_000_000, "1-3", ""),
        ("ppo_clip dqn", "MinAtar/Seaquest-v1", 1_000_000, "1-3", ""),
    ],
    "atari": [("ppo_clip", "ALE/Pong-v5", 1_000_000, "1-3", FIRST_MILLION)],
}

# The experiment of the PPO paper (Schulman et al. 2017, section 6.1): name, algorithm, flags and, from its Table 1, the
# average normalised score. The last three are methods of its Figure 3.
PPO_PAPER = [
    ("no clipping or penalty", "ppo_clip", "--clip-coef inf", -0.39),
    ("clipping, eps = 0.1", "ppo_clip", "--clip-coef 0.1", 0.76),
    ("clipping, eps = 0.2", "ppo_clip", "", 0.82),
    ("clipping, eps = 0.3", "ppo_clip", "--clip-coef 0.3", 0.70),
    ("adaptive KL, d_targ = 0.01", "ppo_kl", "", 0.74),
    ("fixed KL, beta = 3", "ppo_kl", "--kl fixed --beta 3", 0.72),
    ("TRPO", "trpo", "", None),
    ("A2C", "a2c", "", None),
    ("vanilla policy gradient", "reinforce", "", None),
]
PPO_PAPER_ENVS = [
    "HalfCheetah-v5",
    "Hopper-v5",
    "Walker2d-v5",
    "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5",
    "Reacher-v5",
    "Swimmer-v5",
]
SUITES["ppo_paper"] = [
    (algo, env_id, 1_000_000, "1-3", flags) for env_id in PPO_PAPER_ENVS for _, algo, flags, _ in PPO_PAPER
]
TORCHRUN = {"ddppo": 2}  # how many processes torchrun starts of a script
OFF_POLICY = {"ddpg", "td3", "sac", "dqn", "double_dqn", "dueling_dqn", "prioritized_dqn", "n_step_dqn", "noisy_dqn"}
OFF_POLICY |= {"c51", "qr_dqn", "rainbow"}  # what has a replay buffer
NO_FLOOR = {"RandomWalk-v0", "reviews", "countdown"}  # where a policy that acts at random has no score
TABULATED = [suite for suite in SUITES if suite not in ("ci", "ppo_paper")]  # ppo_paper has a table of its own
