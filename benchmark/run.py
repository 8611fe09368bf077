"""Runs the cells of a suite, a few at a time, as processes of this machine or wherever else a launcher sends them."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from benchmark.suites import OFF_POLICY, SUITES, TORCHRUN

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two harnesses from training the same cell
    fcntl = None

LINE_EVERY = 30  # seconds between the lines that take the place of the progress bar where there is no terminal
PATIENCE = 30  # seconds that a script has to end when it is told to


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
    def base(self) -> str:
        """The algorithm without the hash that `check` adds."""
        return self.algo.split("-")[0]

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return f"{file_name(self.row)}__{self.seed}"


class Refusal(ValueError):
    """Bad input or a fault from outside, said in one sentence; main() prints it without a traceback."""


def file_name(row: tuple[str, str, int]) -> str:
    """A table row as a part of file names."""
    return "__".join(map(str, row)).replace("/", "-").replace(" ", "")


def parse_seeds(text: str) -> list[int]:
    """[1, 2, 3, 7] from "1-3,7"."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise Refusal(f"seeds look like 1-3,7 and not like {text!r}")
    seeds = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise Refusal(f"seeds go up, but {part} goes down")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def suite_cells(suite: str, algo: str = "", env: str = "", seeds: str = "", steps: int = 0) -> list[Cell]:
    """The cells of a suite; algo and env choose among its rows, seeds and steps take the place of its own."""
    if suite not in SUITES:
        raise Refusal(f"there is no suite {suite!r}, but there are {', '.join(SUITES)}")
    cells = [
        Cell(name, env_id, steps or row_steps, seed, flags)
        for algos, env_id, row_steps, row_seeds, flags in SUITES[suite]
        for name in algos.split()
        for seed in parse_seeds(seeds or row_seeds)
        if algo in ("", name) and env in ("", env_id)
    ]
    return list(dict.fromkeys(cells))


def require_scripts(cells: list[Cell], algos: Path) -> None:
    """Raise Refusal if the folder has the script of no cell; one that is missing fails alone."""
    if not any((algos / f"{cell.algo}.py").is_file() for cell in cells):
        raise Refusal(f"{algos} is no folder of these scripts: it holds no {cells[0].algo}.py")


def read_object(path: Path) -> dict:
    """The JSON object in a file; raises Refusal with one sentence if the file holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise Refusal(f"{path} is damaged: it holds no JSON object")
    return content


def replace_text(path: Path, text: str) -> None:
    """Write a file aside and put it in its place: an interruption leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def is_number(value: object) -> bool:
    """Whether a value from a JSON file is a finite number; the file may also say NaN, which no bar would stop."""
    return type(value) in (int, float) and math.isfinite(value)


def read_result(run_dir: Path) -> dict | None:
    """What result.json holds, or None if the run is not finished or the file is damaged."""
    try:
        result = read_object(run_dir / "result.json")
    except (FileNotFoundError, ValueError):
        return None
    numbers = [result.get(name) for name in ("eval_mean", "sps", "wall_time")]
    returns = result.get("eval_returns")
    if not isinstance(returns, list) or not returns or not all(map(is_number, numbers + returns)):
        return None
    return result


def refusal_code(cell: Cell) -> int:
    """The exit code with which a script says that its input is bad; torchrun does not pass it on."""
    return 1 if cell.base in TORCHRUN else 2


def is_damaged(run_dir: Path) -> bool:
    """Whether a run that was interrupted cannot be continued, because config.json or checkpoint.pt cannot be read."""
    checkpoint = run_dir / "checkpoint.pt"
    try:
        config = read_object(run_dir / "config.json")
    except FileNotFoundError:
        return checkpoint.exists()
    except ValueError:
        return True
    if "env_id" not in config:
        return True
    if not checkpoint.exists():
        return False
    try:
        with zipfile.ZipFile(checkpoint) as archive:  # which is what torch.save writes
            return archive.testzip() is not None
    except Exception:  # there are many, since any byte may be wrong
        return True


def set_aside(run_dir: Path) -> None:
    """Move the files of a damaged run into a folder of its directory, so that the next start is a first one."""
    aside = run_dir / "damaged"
    shutil.rmtree(aside, ignore_errors=True)
    files = [path for path in run_dir.iterdir() if path.name not in ("log.txt", "lock")]  # these may be in use
    aside.mkdir()
    for path in files:
        path.rename(aside / path.name)


def text_hash(script: Path) -> str | None:
    """The hash under which git keeps the script's text once it is committed: `git cat-file -p` shows it."""
    if not script.exists():
        return None
    text = script.read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(text), text)).hexdigest()


def write_origin(run_dir: Path, script: str | None) -> None:
    """Note in origin.json what a run is made with: the hash of the script's text and the versions of all packages."""
    names = {package.name for package in importlib.metadata.distributions()} - {None}  # what pip could not remove
    versions = {name: importlib.metadata.version(name) for name in sorted(names)}
    replace_text(run_dir / "origin.json", json.dumps(dict(script=script, versions=versions), indent=1))


def noted_script(run_dir: Path) -> str | None:
    """The hash of the script in origin.json, if that can be read."""
    try:
        return read_object(run_dir / "origin.json").get("script")
    except (OSError, ValueError):
        return None


def progress(run_dir: Path) -> tuple[int, float | None]:
    """The global step and the last episodic return, if there is one, at the end of metrics.jsonl."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 4096, 0))
            lines = file.read().split(b"\n")[:-1]  # the last one may be half written
        if size > 4096:
            del lines[:1]  # its beginning was not read
        points = [(line["global_step"], line["episodic_return"]) for line in map(json.loads, lines)]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # all but the first: damaged by a crash of the machine
        return 0, None
    if not points:
        return 0, None
    returns = [episodic_return for _, episodic_return in points if episodic_return is not None]
    return points[-1][0], returns[-1] if returns else None


def command(cell: Cell, run_dir: Path, algos: Path) -> list[str]:
    """The command line that starts the cell or, if there is a checkpoint, continues it."""
    words = [sys.executable, str(algos / f"{cell.algo}.py")]
    if cell.base in TORCHRUN:
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(TORCHRUN[cell.base])]
    if (run_dir / "checkpoint.pt").exists():
        return [*words, "--resume", str(run_dir)]
    words += ["--env-id", cell.env_id, "--seed", str(cell.seed), "--total-timesteps", str(cell.steps)]
    words += ["--run-dir", str(run_dir), "--torch-threads", "1"]  # processes side by side beat threads
    if cell.base in OFF_POLICY:  # an interrupted run goes on where it was
        words += ["--save-buffer", "--checkpoint-every", "100000"]
    return words + shlex.split(cell.flags)


def spawn(cell: Cell, run_dir: Path, algos: Path, log: IO) -> subprocess.Popen:
    """Start the script of a cell in a session of its own, so that its own workers can be ended with it."""
    words = command(cell, run_dir, algos)
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def terminate(processes: list[subprocess.Popen]) -> None:
    """End processes from `spawn` that have not ended by themselves; they get a while to save their checkpoints."""
    alive = [process for process in processes if process.poll() is None]
    for process in alive:
        end(process, at_once=False)
    deadline = time.monotonic() + PATIENCE
    for process in alive:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            end(process, at_once=True)
            process.wait()


def end(process: subprocess.Popen, at_once: bool) -> None:
    """Tell a process from `spawn` and its own workers to end, or end them."""
    if not hasattr(os, "killpg"):  # Windows
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL if at_once else signal.SIGTERM)


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
        self.out = out
        self.algos = algos
        self.running: dict[Cell, subprocess.Popen] = {}

    def start(self, cell: Cell, log: IO) -> None:
        """Start a cell or, if there is a checkpoint, continue it; `log` is that from `own`."""
        run_dir = self.out / cell.name
        with log:
            script = text_hash(self.algos / f"{cell.algo}.py")
            if (run_dir / "checkpoint.pt").exists() and noted_script(run_dir) != script:
                script = None  # more than one text has made the run
            write_origin(run_dir, script)
            self.running[cell] = spawn(cell, run_dir, self.algos, log)

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
    """Train the cells that are not finished yet, `workers` at once; returns those that failed.

    A cell that refuses to continue a damaged run starts afresh, but only once.
    """
    waiting = [cell for cell in cells if read_result(out / cell.name) is None]
    older: dict[str, list[str]] = {}  # what is finished, but was made by another text of its script
    for cell in cells:
        script = launcher.algos / f"{cell.algo}.py"
        if cell not in waiting and noted_script(out / cell.name) != text_hash(script):
            older.setdefault(script.name, []).append(cell.name)
    failed: list[Cell] = []
    foreign: set[Cell] = set()  # what another process was seen to train
    afresh: set[Cell] = set()  # what was found damaged
    total = sum(cell.steps for cell in cells)
    count = len(cells) - len(waiting)
    terminal = sys.stderr.isatty()
    next_look = 0.0
    next_line = time.monotonic() + LINE_EVERY

    def tell(text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def steps_done(seen: dict[Cell, tuple[int, float | None]]) -> int:
        return total - sum(max(cell.steps - step, 0) for cell, (step, _) in seen.items())

    for script, names in older.items():
        tell(f"{len(names)} finished runs are of another text of {script}; to train them anew, delete {names[0]} ...")

    options: dict = dict(total=total, initial=steps_done(launcher.progress(waiting)), unit=" steps", unit_scale=True)
    options |= dict(dynamic_ncols=True)
    if not terminal:  # the bar is drawn nowhere, but its text is the line that is told now and then
        options |= dict(bar_format="{percentage:.0f}% of {total_fmt} steps, {rate_fmt}, {remaining} left{postfix}")
    with open(os.devnull, "w") as nowhere, tqdm(**options, file=sys.stderr if terminal else nowhere) as bar:
        while waiting or launcher.running:
            ended: dict[Cell, int] = {}
            for cell in waiting[:]:
                if len(launcher.running) >= workers:
                    break
                run_dir = out / cell.name
                log = own(run_dir)
                if log is None:
                    if cell not in foreign:
                        foreign.add(cell)
                        tell(f"{cell.name}: another process trains it, which is waited for")
                    continue
                waiting.remove(cell)
                if read_result(run_dir) is not None:  # by the process that was waited for
                    log.close()
                    ended[cell] = 0
                    continue
                if cell in afresh and is_damaged(run_dir):
                    set_aside(run_dir)
                launcher.start(cell, log)
            time.sleep(0.1)
            ended |= launcher.ended()
            for cell, code in ended.items():
                next_look = 0.0
                run_dir = out / cell.name
                if code == refusal_code(cell) and cell not in afresh and is_damaged(run_dir):
                    afresh.add(cell)
                    waiting.append(cell)
                    tell(f"{cell.name} is damaged and starts afresh; its files are kept in {run_dir / 'damaged'}")
                    continue
                count += 1
                result = read_result(run_dir)
                if code or result is None:
                    failed.append(cell)
                    reason = f"exit code {code}" if code else "an incomplete result.json"
                    lines = (run_dir / "log.txt").read_text(errors="replace").splitlines()[-8:]
                    tell("\n    ".join([f"{cell.name} failed with {reason}:", *lines]))
                else:
                    told = f"{result['eval_mean']:.1f} in {result['wall_time']:.0f} s"
                    tell(f"{cell.name}: {told}, {count} of {len(cells)}")
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + 1
                seen = launcher.progress([*launcher.running, *waiting])
                bar.n = steps_done(seen)
                scores = {cell: seen[cell][1] for cell in launcher.running if seen[cell][1] is not None}
                told = [f"{' '.join(cell.row[:2])} {cell.seed}: {score:.1f}" for cell, score in scores.items()]
                bar.set_postfix_str(", ".join(told))
            if not terminal and time.monotonic() >= next_line:
                next_line = time.monotonic() + LINE_EVERY
                tell(str(bar))
    return [cell for cell in cells if cell in failed]
