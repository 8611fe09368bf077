"""Runs the cells of a suite as processes, a few at a time."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmark.suites import SUITES


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
    ranges = [part.split("-") for part in text.split(",")]
    return [seed for ends in ranges for seed in range(int(ends[0]), int(ends[-1]) + 1)]


def suite_cells(suite: str, algo: str = "", env: str = "", seeds: str = "", steps: int = 0) -> list[Cell]:
    """The cells of a suite; algo and env choose among its rows, seeds and steps take the place of its own."""
    return [
        Cell(name, env_id, steps or row_steps, seed, flags)
        for algos, env_id, row_steps, row_seeds, flags in SUITES[suite]
        for name in algos.split()
        for seed in parse_seeds(seeds or row_seeds)
        if algo in ("", name) and env in ("", env_id)
    ]


def read_result(run_dir: Path) -> dict | None:
    """What result.json holds, or None if the run is not finished."""
    try:
        return json.loads((run_dir / "result.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # the latter: killed while it was written
        return None


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


def run_cells(cells: list[Cell], workers: int, out: Path, algos: Path) -> list[Cell]:
    """Train the cells that are not finished yet, `workers` at once; returns those that failed."""
    waiting = [cell for cell in cells if read_result(out / cell.name) is None]
    running: dict[Cell, subprocess.Popen] = {}
    failed: list[Cell] = []
    bar = tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="cell", disable=None)
    try:
        while waiting or running:
            while waiting and len(running) < max(workers, 1):
                cell = waiting.pop(0)
                run_dir = out / cell.name
                run_dir.mkdir(parents=True, exist_ok=True)
                with open(run_dir / "log.txt", "a") as log:
                    words = command(cell, run_dir, algos)
                    streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                    running[cell] = subprocess.Popen(words, start_new_session=True, **streams)
            bar.set_postfix_str(", ".join(cell.name for cell in running))
            time.sleep(0.1)
            for cell in [cell for cell, process in running.items() if process.poll() is not None]:
                code = running.pop(cell).returncode
                if code or read_result(out / cell.name) is None:
                    failed.append(cell)
                    lines = (out / cell.name / "log.txt").read_text(errors="replace").splitlines()[-8:]
                    tqdm.write("\n    ".join([f"{cell.name} failed with exit code {code}:", *lines]), file=sys.stderr)
                bar.update()
    finally:  # also on Ctrl-C: no child outlives the harness
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):  # its session, so that its own workers end as well
                getattr(os, "killpg", os.kill)(process.pid, signal.SIGTERM)
        for process in running.values():
            process.wait()
        bar.close()
    return failed
