"""Runs the cells of a suite, a few at a time, as processes of this machine or wherever else a launcher sends them."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from benchmark.suites import SUITES

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two harnesses from training the same cell
    fcntl = None

LINE_EVERY = 30  # seconds between the lines that take the place of the progress bar where there is no terminal


class Cell(NamedTuple):
    """One training: of an algorithm, with flags beside its defaults, on an environment with a seed."""

    algo: str
    env_id: str
    steps: int
    seed: int
    flags: str = ""

    @property
    def row(self) -> tuple[str, str, int]:
        """What the seeds of one table row have in common; variants of an algorithm carry their flags in the name."""
        return f"{self.algo} {self.flags}".strip(), self.env_id, self.steps

    @property
    def name(self) -> str:
        return f"{file_name(self.row)}__{self.seed}"


def file_name(row: tuple[str, str, int]) -> str:
    return "__".join(map(str, row)).replace("/", "-").replace(" ", "")


def parse_seeds(text: str) -> list[int]:
    """[1, 2, 3, 7] from "1-3,7"."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ValueError(f"seeds look like 1-3,7 and not like {text!r}")
    ranges = [part.split("-") for part in text.split(",")]
    return [seed for ends in ranges for seed in range(int(ends[0]), int(ends[-1]) + 1)]


def suite_cells(suite: str, algo: str = "", env: str = "", seeds: str = "", steps: int = 0) -> list[Cell]:
    """The cells of a suite; algo and env choose among its rows, seeds and steps take the place of its own."""
    cells = [
        Cell(name, env_id, steps or row_steps, seed, flags)
        for algos, env_id, row_steps, row_seeds, flags in SUITES[suite]
        for name in algos.split()
        for seed in parse_seeds(seeds or row_seeds)
        if algo in ("", name) and env in ("", env_id)
    ]
    return list(dict.fromkeys(cells))


def read_result(run_dir: Path) -> dict | None:
    """What result.json holds, or None if the run is not finished."""
    try:
        return json.loads((run_dir / "result.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # the latter: killed while it was written
        return None


def progress(run_dir: Path) -> tuple[int, float | None]:
    """The global step and the last episodic return, if there is one, at the end of metrics.jsonl."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            start = max(file.seek(0, os.SEEK_END) - 4096, 0)
            file.seek(start)
            lines = [json.loads(line) for line in file.read().split(b"\n")[bool(start) : -1]]  # the others are torn
    except (FileNotFoundError, ValueError):  # the latter: torn by a crash of the machine
        return 0, None
    returns = [line["episodic_return"] for line in lines if line["episodic_return"] is not None]
    return lines[-1]["global_step"] if lines else 0, returns[-1] if returns else None


def command(cell: Cell, run_dir: Path, algos: Path) -> list[str]:
    """The command line that starts the cell or, if there is a checkpoint, continues it."""
    script = [sys.executable, str(algos / f"{cell.algo}.py")]
    if (run_dir / "checkpoint.pt").exists():
        return [*script, "--resume", str(run_dir)]
    options = {"env-id": cell.env_id, "seed": cell.seed, "total-timesteps": cell.steps, "run-dir": run_dir}
    options |= {"torch-threads": 1}  # processes side by side beat threads
    return (
        script + [str(word) for key, value in options.items() for word in (f"--{key}", value)] + shlex.split(cell.flags)
    )


def spawn(cell: Cell, run_dir: Path, algos: Path, log: IO) -> subprocess.Popen:
    """Start the script of a cell in a session of its own, so that its own workers can be ended with it."""
    words = command(cell, run_dir, algos)
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def terminate(processes: list[subprocess.Popen]) -> None:
    """End processes from `spawn` that have not ended by themselves."""
    alive = [process for process in processes if process.poll() is None]
    for process in alive:
        with contextlib.suppress(ProcessLookupError):
            getattr(os, "killpg", os.kill)(process.pid, signal.SIGTERM)
    for process in alive:
        process.wait()


def own(run_dir: Path) -> IO | None:
    """The log of a run, or None if another process has it: who has it open is the only one to write to the directory.

    It is the output of the script, which so owns its run directory even when its harness was killed.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    log = open(run_dir / "log.txt", "a")
    try:
        if fcntl:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        return None
    return log


class Local:
    """Launches cells as processes of this machine."""

    def __init__(self, out: Path, algos: Path) -> None:
        self.out, self.algos = out, algos
        self.running: dict[Cell, subprocess.Popen] = {}

    def start(self, cell: Cell, log: IO) -> None:
        """Start a cell or, if there is a checkpoint, continue it; `log` is that from `own`."""
        with log:
            self.running[cell] = spawn(cell, self.out / cell.name, self.algos, log)

    def ended(self) -> dict[Cell, int]:
        """The cells that ended since the last call, with their exit codes."""
        codes = {cell: process.returncode for cell, process in self.running.items() if process.poll() is not None}
        for cell in codes:
            del self.running[cell]
        return codes

    def progress(self, cells: list[Cell]) -> dict[Cell, tuple[int, float | None]]:
        """How far each cell is, as `progress` says it."""
        return {cell: progress(self.out / cell.name) for cell in cells}

    def close(self) -> None:
        """End what is running."""
        terminate(list(self.running.values()))


def run_cells(cells: list[Cell], workers: int, out: Path, launcher: Local) -> list[Cell]:
    """Train the cells that are not finished yet, `workers` at once; returns those that failed."""
    waiting = [cell for cell in cells if read_result(out / cell.name) is None]
    failed: list[Cell] = []
    foreign: set[Cell] = set()
    count, total = len(cells) - len(waiting), sum(cell.steps for cell in cells)

    def tell(text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def steps_done(seen: dict[Cell, tuple[int, float | None]]) -> int:
        return total - sum(max(cell.steps - step, 0) for cell, (step, _) in seen.items())

    terminal, next_look, next_line = sys.stderr.isatty(), 0.0, time.monotonic() + LINE_EVERY
    plain = "{percentage:.0f}% of {total_fmt} steps, {rate_fmt}, {remaining} left{postfix}"
    options: dict = dict(unit=" steps", unit_scale=True, dynamic_ncols=True, bar_format=None if terminal else plain)
    options |= dict(total=total, initial=steps_done(launcher.progress(waiting)))
    with open(os.devnull, "w") as nowhere, tqdm(**options, file=sys.stderr if terminal else nowhere) as bar:
        while waiting or launcher.running:
            ended: dict[Cell, int] = {}
            for cell in waiting[:]:
                if len(launcher.running) >= workers:
                    break
                if log := own(out / cell.name):
                    waiting.remove(cell)
                    if read_result(out / cell.name):  # by the process that was waited for
                        log.close()
                        ended[cell] = 0
                    else:
                        launcher.start(cell, log)
                elif cell not in foreign:
                    foreign.add(cell)
                    tell(f"{cell.name}: another process trains it, which is waited for")
            time.sleep(0.1)
            for cell, code in (ended | launcher.ended()).items():
                count, next_look = count + 1, 0.0
                result = read_result(out / cell.name)
                if code or result is None:
                    failed.append(cell)
                    lines = (out / cell.name / "log.txt").read_text(errors="replace").splitlines()[-8:]
                    tell("\n    ".join([f"{cell.name} failed with exit code {code}:", *lines]))
                else:
                    score, seconds = result["eval_mean"], result["wall_time"]
                    tell(f"{cell.name}: {score:.1f} in {seconds:.0f} s, {count} of {len(cells)}")
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + 1
                seen = launcher.progress([*launcher.running, *waiting])
                scores = [(cell, seen[cell][1]) for cell in launcher.running if seen[cell][1] is not None]
                bar.n = steps_done(seen)
                bar.set_postfix_str(", ".join(f"{' '.join(cell.row[:2])} {cell.seed}: {x:.1f}" for cell, x in scores))
            if not terminal and time.monotonic() >= next_line:
                next_line = time.monotonic() + LINE_EVERY
                tell(str(bar))
    return [cell for cell in cells if cell in failed]
