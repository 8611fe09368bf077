"""Command lines at a tenth of their cost: a server imports torch once and forks a process for each of them."""

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import sysconfig
import time
from pathlib import Path

TINY = dict(  # settings for a run of a second; a script takes those that it has
    num_envs=2, num_steps=16, num_minibatches=2, update_epochs=1, eval_episodes=2, torch_threads=1,
    batch_size=16, buffer_size=1000, learning_starts=32, train_frequency=4, hidden_size=16, log_every=64,
    compile=False, num_workers=1, num_samplers=0, max_lag=0,
    num_responses=4, max_new_tokens=6, num_demonstrations=40, sft_steps=2, num_pairs=20, rm_epochs=1, num_layers=1,
    num_generations=2,
    demonstrations="uniform", play_every=64,
)  # fmt: skip

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["pytest", "numpy", "torch", "torch._dynamo", "gymnasium", "tyro", "tqdm", "moviepy", "wandb"]
)
INSTALLED = [sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")]


def tiny(module, **settings) -> dict:
    """TINY and `settings`, as far as the script has such flags."""
    if hasattr(module.Args, "top_fraction"):  # it learns from episodes of other lengths than those of texts
        settings = dict(num_demonstrations=2) | settings
    return {name: value for name, value in (TINY | settings).items() if hasattr(module.Args, name)}


def flags(settings: dict) -> list[str]:
    """Settings as a command line."""
    line = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        line += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return line


def _main(task: dict) -> None:
    for number, file in enumerate(task["output"], 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    os.chdir(task["cwd"])
    for name, value in task["environ"].items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    if task["hide"]:
        for name in [name for name in sys.modules if name.split(".")[0] == task["hide"]]:
            del sys.modules[name]
        sys.modules[task["hide"]] = None
    if task["disk"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["disk"], task["disk"]))
    if task["alone"]:
        sys.path = [path for path in sys.path if any(map(Path(path).is_relative_to, INSTALLED))]
    sys.path[:0] = task["path"]
    sys.argv = task["argv"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


class Process:
    """`python script *argv` in the folder cwd, under way.

    `environ` changes the environment (None takes a variable away), `path` goes before the module search path, the
    package `hide` cannot be imported, with `terminal`, the path of one, both streams go there, and no file can grow
    beyond `disk` bytes. `alone`, it finds nothing but what is installed.
    """

    def __init__(
        self, script: Path, argv: list, cwd: Path, environ=None, path=(), hide="", terminal="", disk=0, alone=False
    ):
        self.files = [] if terminal else [Path(cwd, f".{os.urandom(4).hex()}.{name}") for name in ("out", "err")]
        task = dict(
            argv=[str(arg) for arg in (script, *argv)],
            cwd=str(cwd),
            output=[terminal] * 2 if terminal else [str(file) for file in self.files],
            environ=environ or {},
            path=[str(folder) for folder in path],
            hide=hide,
            disk=disk,
            alone=alone,
        )
        self.process = SERVER.Process(target=_main, args=(task,))
        self.process.start()
        self.pid = self.process.pid

    def wait(self, seconds: float = 60) -> "Process":
        """Wait for the end; `rc`, `out`, `err` say how it was. A process that does not end is killed and an error."""
        self.process.join(seconds)
        late = self.process.is_alive()
        if late:
            self.process.kill()
            self.process.join()
        self.rc = self.process.exitcode
        self.out, self.err = [file.read_bytes().decode() for file in self.files] or ["", ""]
        for file in self.files:
            file.unlink()
        assert not late, f"still running after {seconds} s\n{self.out}\n{self.err}"
        return self


def wait_until(condition, seconds: float = 30) -> None:
    """Wait until the condition holds."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "nothing happened"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended, but that nobody has waited for, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
