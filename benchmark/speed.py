"""Measures our scripts against stable-baselines3: same machine, same hyperparameters, one thread each, in turn."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tqdm import tqdm

FOLDER = Path(__file__).parent
ALGOS = FOLDER.parent / "algos"
PLAIN = dict(gamma=0.99, hidden_size=64, norm_obs=False, norm_reward=False)
MUJOCO = dict(num_envs=1, num_steps=2048, norm_obs=True, norm_reward=True)
GRADIENT = PLAIN | dict(vf_coef=0.5, ent_coef=0.0, max_grad_norm=0.5)
PPO = GRADIENT | dict(learning_rate=3e-4, gae_lambda=0.95)
A2C = GRADIENT | dict(learning_rate=7e-4)
TRPO = PLAIN | dict(learning_rate=1e-3, gae_lambda=0.95, update_epochs=10, cg_iterations=10, damping=0.1)
PPO_CARTPOLE = PPO | dict(num_envs=4, num_steps=128, update_epochs=4, num_minibatches=4)
TRPO_CARTPOLE = TRPO | dict(num_envs=4, num_steps=256, num_minibatches=8)
CLIP, GAE, KL = dict(clip_coef=0.2), dict(gae_lambda=0.95), dict(target_kl=0.01)
TASKS = {  # script, peer, environment: hyperparameters of both sides, and those that only the peer has
    ("ppo_clip", "PPO", "CartPole-v1"): (PPO_CARTPOLE | CLIP, {}),
    ("ppo_clip", "PPO", "HalfCheetah-v5"): (PPO | CLIP | MUJOCO | dict(update_epochs=10, num_minibatches=32), {}),
    ("ppo_kl", "PPO", "CartPole-v1"): (PPO_CARTPOLE, CLIP),
    ("trpo_penalty", "PPO", "CartPole-v1"): (PPO_CARTPOLE, CLIP),
    ("a2c", "A2C", "CartPole-v1"): (A2C | GAE | dict(num_envs=8, num_steps=5), {}),
    ("a2c", "A2C", "HalfCheetah-v5"): (A2C | GAE | MUJOCO | dict(num_envs=4, num_steps=8), {}),
    ("actor_critic", "A2C", "CartPole-v1"): (A2C | dict(num_envs=8, num_steps=5), GAE),
    ("trpo", "TRPO", "CartPole-v1"): (TRPO_CARTPOLE | KL, {}),
    ("trpo", "TRPO", "HalfCheetah-v5"): (TRPO | KL | MUJOCO | dict(num_minibatches=16), {}),
    ("npg", "TRPO", "CartPole-v1"): (TRPO_CARTPOLE, KL),
}


def timed(words: list[str]) -> dict:
    """Run a command with one thread; its output, seconds from start to end and peak resident memory in MiB."""
    environment = os.environ | dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _, status, usage = os.wait4(process.pid, 0)  # unlike wait(), tells what this one child used
        except BaseException:
            process.kill()
            raise
        seconds, process.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise ValueError(f"{' '.join(words)} failed:\n{text[-2000:]}")
    return dict(text=text, seconds=seconds, peak_mib=usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def run_ours(algo: str, options: dict) -> dict:
    """One command of ours: what `timed` says and result.json."""
    words = [sys.executable, str(ALGOS / f"{algo}.py"), "--torch-threads", "1"]
    for key, value in options.items():
        name = key.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    with tempfile.TemporaryDirectory() as run_dir:
        return timed([*words, "--run-dir", run_dir]) | json.loads(Path(run_dir, "result.json").read_text())


def run_peer(python: str, options: dict) -> dict:
    """One command of the peer: what `timed` says and its sps."""
    measured = timed([python, str(FOLDER / "peer_sb3.py"), json.dumps(options)])
    return measured | json.loads(measured["text"].splitlines()[-1])


def make_peer() -> str:
    """The interpreter of a virtual environment that holds the peer, with our versions of what both use."""
    folder, version = FOLDER / "peers" / "sb3", importlib.metadata.version
    python = str(folder / "bin" / "python")
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        names = ("torch", "numpy", "gymnasium[mujoco]", "mujoco")
        pins = [f"{name}=={version(name.split('[')[0]).partition('+')[0]}" for name in names]
        if subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *pins, "stable-baselines3", "sb3-contrib"]
        ).returncode:
            raise ValueError("the peer could not be installed: --peer-python takes an interpreter that has it")
        (folder / "ready").touch()
    return python


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def measure(peer: str, rounds: int, steps: int, seeds: list[int], algo: str, env: str, found: dict) -> dict:
    """All measurements, raw, so that any statistic can be taken from them; `peer` is the peer's interpreter.

    Those of `found` that are not made anew stay, if they were made on the same machine with the same versions.
    """
    versions = {name: importlib.metadata.version(name) for name in ("torch", "gymnasium", "numpy", "mujoco")}
    for name in ("stable-baselines3", "sb3-contrib"):
        ask = f"import importlib.metadata as m; print(m.version('{name}'))"
        versions[name] = timed([peer, "-c", ask])["text"].strip()
    header = dict(cpu=cpu_name(), cores=os.cpu_count(), python=platform.python_version(), versions=versions)
    if any(found.get(key) != value for key, value in header.items()):
        found = dict(tasks={}, first_success=[])
    tasks = {task: options for task, options in TASKS.items() if algo in ("", task[0]) and env in ("", task[2])}
    bar = tqdm(total=2 * rounds * len(tasks) + len(seeds), unit="run", disable=None)
    for (script, kind, env_id), (task, peers_own) in tasks.items():
        sides: dict = dict(steps=steps, ours=[], peer=[])
        for seed in range(1, rounds + 1):
            options = task | dict(env_id=env_id, total_timesteps=steps, seed=seed)
            extra = dict(anneal_lr=False, clip_reward=False, eval_episodes=1)
            for side in ("ours", "peer"):  # in turn, so that a slow hour of the machine hits both
                run = (
                    run_ours(script, options | extra)
                    if side == "ours"
                    else run_peer(peer, options | peers_own | dict(peer=kind))
                )
                sides[side].append({key: run[key] for key in ("sps", "peak_mib", "seconds")})
                bar.update()
        found["tasks"][f"{script} {kind} {env_id}"] = sides
    if seeds:
        found["first_success"] = []
    for seed in seeds:  # with the defaults, as a user would type it
        run = run_ours("ppo_clip", dict(env_id="CartPole-v1", seed=seed))
        found["first_success"].append({key: run[key] for key in ("seed", "seconds", "eval_mean")})
        bar.update()
    bar.close()
    return header | found


def summary(found: dict) -> str:
    """The measurements as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    text = f"{found['cpu']}, one thread, equal hyperparameters; {versions}.\n\n"
    head = "Script | Peer | Environment | Steps | ours, steps/s | peer, steps/s | ratio [min, max] | runs | memory, MiB"
    text += f"| {head} |\n|{'---|' * 9}\n"
    for task, sides in found["tasks"].items():
        script, kind, env_id = task.split()
        ours, peer = ([run["sps"] for run in sides[side]] for side in ("ours", "peer"))
        ratios = [a / b for a, b in zip(ours, peer)]
        memory = " against ".join(f"{median(run['peak_mib'] for run in sides[side]):.0f}" for side in ("ours", "peer"))
        text += f"| {script} | {kind} | {env_id} | {sides['steps']:,} | {median(ours):,.0f} | {median(peer):,.0f} "
        text += (
            f"| {median(ours) / median(peer):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] | {len(ours)} | {memory} |\n"
        )
    if not found["first_success"]:
        return text
    seconds = [run["seconds"] if run["eval_mean"] >= 475 else float("inf") for run in found["first_success"]]
    text += "\nFrom the start of `python algos/ppo_clip.py` to an evaluated return of at least 475 on CartPole-v1: "
    reached = sum(value < float("inf") for value in seconds)
    return text + f"{median(seconds):.1f} s, median over {len(seconds)} seeds, {reached} of which reach it.\n"
