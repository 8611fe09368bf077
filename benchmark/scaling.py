"""How the scripts of several processes scale: steps per second, and time to a solved CartPole, for 1 and 2 processes.

Strong scaling divides the environments of one process among several; weak scaling gives each process as many.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

from benchmark.report import aligned
from benchmark.run import Cell, Refusal, command, read_object, replace_text
from benchmark.speed import machine, timed

ALGOS = Path(__file__).parents[1] / "algos"
SOLVED = 475  # mean return of the last 100 episodes
COUNT_FLAG = {"a3c": "--num-workers", "impala": "--num-samplers"}  # of ddppo torchrun tells it
HEAD = ["Script", "Scaling", "Processes", "Environments of each", "steps/s", "Seconds to 475"]


class Setting(NamedTuple):
    """What is measured."""

    script: str
    scaling: str
    processes: int
    num_envs: int  # of each process
    steps: int

    @property
    def key(self) -> str:
        """Its name in scaling.json."""
        return f"{self.script} {self.processes} x {self.num_envs}"


SETTINGS = [
    Setting("ppo_clip", "", 1, 4, 100_000),
    Setting("ddppo", "", 1, 4, 100_000),
    Setting("ddppo", "strong", 2, 2, 100_000),
    Setting("ddppo", "weak", 2, 4, 100_000),
    Setting("a3c", "", 1, 8, 200_000),
    Setting("a3c", "strong", 2, 4, 200_000),
    Setting("a3c", "weak", 2, 8, 200_000),
    Setting("impala", "", 1, 8, 200_000),
    Setting("impala", "strong", 2, 4, 200_000),
    Setting("impala", "weak", 2, 8, 200_000),
]


def words_of(setting: Setting, seed: int, run_dir: Path) -> list[str]:
    """The command line of a setting."""
    words = command(Cell(setting.script, "CartPole-v1", setting.steps, seed), run_dir, ALGOS)
    if "--nproc-per-node" in words:
        words[words.index("--nproc-per-node") + 1] = str(setting.processes)
    words += ["--num-envs", str(setting.num_envs), "--eval-episodes", "1"]
    if setting.script in COUNT_FLAG:
        words += [COUNT_FLAG[setting.script], str(setting.processes)]
    return words


def seconds_to(score: float, lines: Sequence[dict], episodes: int = 100) -> float | None:
    """The wall_time of the first line of a log at which the mean of the last 100 episodes is the score, or None."""
    window: list[tuple[int, float]] = []
    for line in lines:
        if line["episodes"]:
            window.append((line["episodes"], line["episodic_return"]))
        while sum(count for count, _ in window[1:]) >= episodes:
            del window[0]
        total = sum(count for count, _ in window)
        if total >= episodes and sum(count * mean for count, mean in window) / total >= score:
            return line["wall_time"]
    return None


def run_once(setting: Setting, seed: int) -> dict:
    """Steps per second of a run, and its time to a solved CartPole."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        timed(words_of(setting, seed, run_dir))
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return dict(seed=seed, sps=read_object(run_dir / "result.json")["sps"], solved=seconds_to(SOLVED, lines))


def reduce_often(rank: int, address: str, size: int, times: list) -> None:
    """In a process of two: the mean time of a sum of so many numbers over both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    numbers = torch.zeros(size)  # their sums stay finite
    for _ in range(100):
        dist.all_reduce(numbers)
    start = time.perf_counter()
    for _ in range(1000):
        dist.all_reduce(numbers)
    if rank == 0:
        times.append((time.perf_counter() - start) / 1000)
    dist.destroy_process_group()


def all_reduce_seconds(size: int) -> float:
    """How long two processes of this machine take to add up so many numbers."""
    with mp.get_context("spawn").Manager() as manager, tempfile.TemporaryDirectory() as folder:
        times = manager.list()
        mp.spawn(reduce_often, (Path(folder, "meet").as_uri(), size, times), nprocs=2)
        return times[0]


def measure(path: Path, seeds: Sequence[int]) -> dict:
    """Run what the file lacks of the scripts as they are, in turn so that a slow hour hits all settings alike.

    Raises Refusal for a file of another machine.
    """
    found = read_object(path) if path.exists() else {}
    here = machine()
    if any(found.get(key) != value for key, value in here.items()):
        if found:
            raise Refusal(
                f"{path} is of another machine or other versions: delete it, or keep it by --baselines FOLDER"
            )
        found = here | dict(settings={})
    for seed in tqdm(seeds, unit="round", disable=None):
        for setting in SETTINGS:
            version = hashlib.sha256((ALGOS / f"{setting.script}.py").read_bytes()).hexdigest()
            kept = [run for run in found["settings"].get(setting.key, []) if run["sha256"] == version]
            found["settings"][setting.key] = kept
            if all(run["seed"] != seed for run in kept):
                kept.append(run_once(setting, seed) | dict(sha256=version))
                replace_text(path, json.dumps(found, indent=1) + "\n")
    found["all_reduce"] = {str(size): all_reduce_seconds(size) for size in (10_000, 1_000_000)}
    replace_text(path, json.dumps(found, indent=1) + "\n")
    return found


def expected(found: dict, processes: int) -> float:
    """Steps per second of ddppo by computation: a process's own time, and the sums, which grow with the logarithm.

    In an iteration a process takes num_envs * num_steps = 512 steps and sends 25 messages: the gradients of 16
    minibatches, and 9 that are smaller and take as long, for of 10,000 numbers most time is spent in waiting.
    """
    own = 512 / median(run["sps"] for run in found["settings"]["ddppo 1 x 4"])
    sums = 25 * found["all_reduce"]["10000"] * (processes - 1).bit_length()
    return processes * 512 / (own + sums)


def summary(found: dict) -> str:
    """The measurements as Markdown."""
    rows = [HEAD]
    for setting in SETTINGS:
        runs = found["settings"].get(setting.key, [])
        if not runs:
            continue
        solved = [run["solved"] for run in runs if run["solved"] is not None]
        seconds = f"{median(solved):.1f}" if len(solved) == len(runs) else f"{len(solved)} of {len(runs)} runs"
        counts = [setting.script, setting.scaling, str(setting.processes), str(setting.num_envs)]
        rows.append([*counts, f"{median(run['sps'] for run in runs):,.0f}", seconds])
    small, large = (f"{1e6 * found['all_reduce'][size]:.0f}" for size in ("10000", "1000000"))
    computed = ", ".join(f"{expected(found, count):,.0f} with {count}" for count in (4, 16, 64))
    counts = [len(runs) for runs in found["settings"].values()]
    seeds = " to ".join(dict.fromkeys([str(min(counts)), str(max(counts))]))
    return f"""\
CartPole-v1 on {found["cpu"]} with {found["cores"]} cores, {seeds} seeds, medians. Two cores can show that several
processes work, but not how they scale: processes that wait for each other take these cores from one another. Strong
scaling divides the environments of one process, weak scaling gives each process as many. Seconds to 475: until the mean
return of the last 100 training episodes is 475.

{aligned(rows)}

The sum of 10,000 numbers over two processes takes {small} microseconds, that of a million {large}. A computation from
this, not a measurement: if each process of ddppo has a core and the sums take longer with the logarithm of the
number of processes, weak scaling gives {computed} processes, in steps per second.
"""


def section(baselines: Path) -> str:
    """What was measured; empty if nothing was."""
    path = baselines / "scaling.json"
    found = read_object(path) if path.exists() else {}
    return summary(found) if "all_reduce" in found else ""  # this is measured last
