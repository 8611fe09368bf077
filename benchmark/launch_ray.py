"""Launches cells as tasks of a Ray cluster. Its nodes need what requirements.txt names, but none of our files."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import ray
from ray import cloudpickle

from benchmark import run
from benchmark.run import Cell, Refusal

for module in (run, sys.modules[__name__]):
    cloudpickle.register_pickle_by_value(module)  # the nodes cannot import it
FILES = ("config.json", "origin.json", "metrics.jsonl", "result.json")  # the last one says that a run is finished


class Board:
    """An actor that holds how far each running cell is."""

    def __init__(self) -> None:
        self.told: dict[str, tuple[int, float | None]] = {}

    def tell(self, name: str, progress: tuple[int, float | None]) -> None:
        """Note how far a cell is."""
        self.told[name] = progress

    def read(self) -> dict[str, tuple[int, float | None]]:
        """How far each cell is, by name."""
        return self.told


def train(cell: Cell, script: str | None, board: Any) -> tuple[int, str, dict[str, bytes]]:
    """Run the script's text in a temporary folder of a node; exit code, output and files of the run."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # of a cancelled task; `nohup ray start &` ignores it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_dir = folder / "run"
        run_dir.mkdir()
        path = folder / f"{cell.algo}.py"
        if script is not None:
            path.write_text(script)
        run.write_origin(run_dir, run.text_hash(path))  # with the packages of the node
        with open(folder / "log.txt", "w") as log:
            process = run.spawn(cell, run_dir, folder, log)
        try:
            while process.poll() is None:
                board.tell.remote(cell.name, run.progress(run_dir))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
        finally:
            run.terminate([process])
        files = {name: (run_dir / name).read_bytes() for name in FILES if (run_dir / name).exists()}
        return process.returncode, (folder / "log.txt").read_text(errors="replace"), files


class Ray:
    """Launches cells as tasks, which Ray repeats elsewhere if their node is lost; has the methods of `Local`.

    A run directory comes back when its cell has ended, without its checkpoint: these hold replay buffers of gigabytes.
    For the same reason a cell that was half done here starts afresh.
    """

    def __init__(self, address: str, out: Path, algos: Path) -> None:
        """Connect to the cluster or, without an address, start one on this machine."""
        self.out = out
        self.algos = algos
        self.running: dict[Cell, tuple[ray.ObjectRef, IO]] = {}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        handler = signal.getsignal(signal.SIGTERM)
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            if host:  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address or "local", log_to_driver=False, logging_level="ERROR")
        except Exception as error:
            raise Refusal(f"no Ray cluster at {address or 'this machine'}: {error}") from error
        signal.signal(signal.SIGTERM, handler)  # Ray has set its own
        self.task = ray.remote(num_cpus=1, max_retries=10)(train)
        self.board = ray.remote(num_cpus=0, max_restarts=-1)(Board).remote()
        self.told: dict[str, tuple[int, float | None]] = {}

    def start(self, cell: Cell, log: IO) -> None:
        """Send a cell to the cluster; `log` is that from `own`."""
        script = self.algos / f"{cell.algo}.py"
        text = script.read_text() if script.exists() else None
        task = self.task.remote(cell, text, self.board)
        self.running[cell] = (task, log)

    def ended(self) -> dict[Cell, int]:
        """The cells that ended since the last call, with their exit codes."""
        tasks = {task: cell for cell, (task, _) in self.running.items()}
        ready, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=0) if tasks else ([], [])
        codes = {}
        for cell in [tasks[task] for task in ready]:
            task, log = self.running[cell]
            try:
                codes[cell], output, files = ray.get(task)
            except ray.exceptions.RayError as error:  # such as a node without memory
                codes[cell] = 1
                output = str(error)
                files = {}
            run_dir = self.out / cell.name
            if "result.json" in files:
                (run_dir / "checkpoint.pt").unlink(missing_ok=True)  # of another run
                for name, content in files.items():
                    (run_dir / name).write_bytes(content)
            with log:
                log.write(output)
            del self.running[cell]
        return codes

    def progress(self, cells: list[Cell]) -> dict[Cell, tuple[int, float | None]]:
        """How far each cell is, as the board says it."""
        with contextlib.suppress(ray.exceptions.RayError):  # the board's node may be lost
            self.told = ray.get(self.board.read.remote(), timeout=1)
        return {cell: self.told.get(cell.name, (0, None)) for cell in cells}

    def close(self) -> None:
        """End what is running."""
        tasks = [task for task, _ in self.running.values()]
        for task in tasks:
            ray.cancel(task)
        if tasks:
            ray.wait(tasks, num_returns=len(tasks), timeout=run.PATIENCE + 10)  # for their scripts to end
        ray.shutdown()
