"""Command lines at a tenth of their cost: a server imports torch once and forks a process for each of them."""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

TINY = dict(  # settings for a run of a second; a script takes those that it has
    num_envs=2, num_steps=16, num_minibatches=2, update_epochs=1, eval_episodes=2, torch_threads=1,
    batch_size=16, buffer_size=1000, learning_starts=32, hidden_size=16, log_every=64,
)  # fmt: skip

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["pytest", "numpy", "torch", "torch._dynamo", "gymnasium", "tyro", "tqdm", "moviepy", "wandb"]
)


def tiny(module, **settings) -> dict:
    """TINY and `settings`, as far as the script has such flags."""
    known = vars(module.Args()).keys()
    return {name: value for name, value in (TINY | settings).items() if name in known}


def flags(settings: dict) -> list[str]:
    """Settings as a command line."""
    line = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        line += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return line


def _main(script: str, argv: list[str], cwd: str, output: list[str], environ: dict, path: list[str], hide: str) -> None:
    for number, file in enumerate(output, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    os.chdir(cwd)
    for name, value in environ.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    if hide:
        for name in [name for name in sys.modules if name.split(".")[0] == hide]:
            del sys.modules[name]
        sys.modules[hide] = None
    sys.path[:0], sys.argv = path, [script, *argv]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


class Process:
    """`python script *argv` in the folder cwd, under way.

    `environ` changes the environment (None takes a variable away), `path` goes before the module search path, the
    package `hide` cannot be imported, and with `terminal`, the path of one, both streams go there.
    """

    def __init__(self, script: Path, argv: list, cwd: Path, environ=None, path=(), hide: str = "", terminal: str = ""):
        self.files = [] if terminal else [Path(cwd, f".{os.urandom(4).hex()}.{name}") for name in ("out", "err")]
        output = [terminal] * 2 if terminal else [str(file) for file in self.files]
        task = str(script), [str(arg) for arg in argv], str(cwd), output, environ or {}, [str(p) for p in path], hide
        self.process = SERVER.Process(target=_main, args=task)
        self.process.start()
        self.pid = self.process.pid

    def wait(self, seconds: float = 60) -> "Process":
        """Wait for the end; `rc`, `out`, `err` say how it was. A process that does not end is killed and an error."""
        self.process.join(seconds)
        late = self.process.is_alive()
        if late:
            self.process.kill()
            self.process.join()
        self.rc, (self.out, self.err) = self.process.exitcode, [f.read_bytes().decode() for f in self.files] or ["", ""]
        for file in self.files:
            file.unlink()
        assert not late, f"still running after {seconds} s\n{self.out}\n{self.err}"
        return self
