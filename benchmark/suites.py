"""What the benchmark runs: one row for algorithms x environment x seeds."""

# name: rows of (algorithms, environment, steps, seeds, flags beside the defaults, such as "--num-envs 8").
# `ci` is small enough for every commit. Its budgets differ from those of the other suites because a bar belongs to an
# algorithm, an environment and a budget.
SUITES = {
    "ci": [
        ("ppo_clip", "CartPole-v1", 50_000, "1-4", ""),
        ("ppo_clip", "Acrobot-v1", 100_000, "1-2", ""),
        ("ppo_clip", "Pendulum-v1", 80_000, "1-2", ""),
    ],
    "classic": [
        ("ppo_clip", "CartPole-v1", 100_000, "1-10", ""),
        ("ppo_clip", "Acrobot-v1", 300_000, "1-10", ""),
        ("ppo_clip", "Pendulum-v1", 100_000, "1-10", ""),
    ],
    "box2d": [("ppo_clip", "LunarLander-v3", 1_000_000, "1-10", "")],
    "mujoco": [("ppo_clip", "HalfCheetah-v5", 1_000_000, "1-5", "")],
    "minatar": [("ppo_clip", "MinAtar/Breakout-v1", 1_000_000, "1-3", "")],
    "atari": [("ppo_clip", "ALE/Pong-v5", 1_000_000, "1-2", "")],
}
