"""Faults from outside: errors of the user's, full disks, kills, signals, damaged files, two processes on one run."""

import errno
import functools
import inspect
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import envs
import filelock
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MODULES, spy
from gymnasium.spaces import Box, Discrete
from runs import (
    acts,
    arguments,
    checkpoint,
    config,
    each,
    each_back,
    each_module,
    fails_with_a_bug,
    finished_run,
    is_continuous,
    line,
    metrics,
    name_of,
    parameters,
    resume,
    script,
    start,
    steps,
    tree,
)

BACK = """Refusal Run make_envs write_aside evaluate frame check_video find_family parse_args
read_config prepare_forks main"""


def test_every_script_has_the_back_that_is_tested_here():
    """Most tests of this kind run two scripts: it is enough as long as all have the same plumbing."""
    for name in BACK.split():
        texts = {inspect.getsource(getattr(module, name)) for module in MODULES if hasattr(module, name)}
        assert len(texts) == 1, name


# Errors of the user's


@each_back
def test_an_environment_that_lacks_a_library(module):
    """A traceback for what is no bug: HalfCheetah-v3 tells by an ImportError where it has gone."""

    def make(**_):
        raise ImportError("it has moved")

    gym.register("test/Moved-v0", make)
    try:
        with pytest.raises(module.Refusal, match="test/Moved-v0 cannot be made: it has moved"):
            module.make_envs("test/Moved-v0", 1)
        with pytest.raises(ImportError, match="it has moved"):  # in a module of the user's it is a bug
            module.make_envs("envs:test/Moved-v0", 1)
    finally:
        gym.registry.pop("test/Moved-v0")


class Broken(gym.Env):
    """An environment with a bug: it raises an error in one of its functions."""

    observation_space = Box(-1, 1, (3,), np.float32)

    def __init__(self, continuous=False, where="", error=None):
        self.action_space = Box(-1, 1, (1,), np.float32) if continuous else Discrete(2)
        self.where = where
        self.error = error
        self.steps = 0
        self.stumble("init")

    def stumble(self, where):
        if where == self.where:
            raise self.error

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.stumble("reset")
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        self.stumble("evaluation" if self.steps > 128 else "step")
        return np.zeros(3, np.float32), 1.0, False, self.steps % 10 == 0, {}


@pytest.fixture
def main(monkeypatch):
    """A function that is the command line of a script, without its handlers of signals."""

    def run(module, *argv):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        module.main()

    return run


@pytest.mark.parametrize("where", ["init", "reset", "step"])
@pytest.mark.parametrize(
    "error",
    [
        ValueError("mine"), OSError("mine"), TypeError("mine() got an unexpected keyword argument"),
        RuntimeError("mine"), KeyError("mine"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@each_back
def test_an_error_in_an_environment_is_no_refusal(module, where, error, main, tmp_path):
    """A user's own ValueError or OSError that ends in one sentence, without the line where it comes from."""
    gym.register("test/Broken-v0", Broken, kwargs=dict(continuous=is_continuous(module), where=where, error=error))
    try:
        with pytest.raises(type(error), match="mine") as raised:
            main(module, *line(module, env_id="test/Broken-v0", run_dir=tmp_path / "run"))
        assert "in stumble" in "".join(traceback.format_exception(raised.value))
        assert not isinstance(raised.value, module.Refusal)
    finally:
        gym.registry.pop("test/Broken-v0")


@pytest.mark.parametrize("error", [ImportError("mine"), gym.error.Error("mine"), ModuleNotFoundError("mine")])
@each_back
def test_a_package_missing_in_a_step_is_no_refusal(module, error, main, tmp_path):
    """An environment that cannot be made is refused; one that fails later has a bug."""
    gym.register("test/Broken-v0", Broken, kwargs=dict(continuous=is_continuous(module), where="step", error=error))
    try:
        with pytest.raises(type(error), match="mine"):
            main(module, *line(module, env_id="test/Broken-v0", run_dir=tmp_path / "run"))
    finally:
        gym.registry.pop("test/Broken-v0")


@each_module
def test_an_error_in_a_network_is_no_refusal(module, main, tmp_path, monkeypatch):
    """The same for what a reader of the script changes in its front."""

    def fail(*_, **__):
        raise ValueError("mine")

    monkeypatch.setattr(module.Agent, "act" if acts(module) else "forward", fail)
    with pytest.raises(ValueError, match="mine") as raised:
        main(module, *line(module, run_dir=tmp_path / "run", learning_starts=1))
    assert not isinstance(raised.value, module.Refusal)


MODULE_WITH_A_BUG = """
import gymnasium as gym


class Own(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,))

    def __init__(self, continuous=False):
        self.action_space = gym.spaces.Box(-1, 1, (1,)) if continuous else gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        raise ValueError("it is my own fault")


gym.register("Own-v0", Own)
gym.register("OwnBox-v0", Own, kwargs=dict(continuous=True))
"""


@each_back
def test_an_error_keeps_its_traceback(module, tmp_path):
    """Exit code 1, and the line of the user's code on stderr."""
    (tmp_path / "own.py").write_text(MODULE_WITH_A_BUG)
    env_id = f"own:Own{'Box' if is_continuous(module) else ''}-v0"
    done = start(module, tmp_path, *line(module, env_id=env_id, run_dir="run"), path=[tmp_path]).wait()
    assert done.rc == 1
    assert re.search(r'own\.py", line 15, in step\s+raise ValueError\("it is my own fault"\)', done.err)


# Writing


class Death(BaseException):
    """What a kill looks like from inside, as far as files are concerned."""


class File:
    """A file that takes some bytes and then raises an error."""

    def __init__(self, file, room, error):
        self.file = file
        self.room = room
        self.error = error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise self.error()
        return self.file.write(data)


@pytest.fixture
def limit(monkeypatch):
    """A function that lets writes of a script to a file end in an error after so many bytes."""

    def patch(module, name, room, error):
        def opened(path, mode):
            file = open(path, mode)
            return File(file, room, error) if Path(path).stem == name and "w" in mode else file

        monkeypatch.setattr(module, "open", opened, raising=False)

    return patch


def no_space() -> OSError:
    """What a write to a full disk raises."""
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("file", "room"),
    [("config", 0), ("config", 100), ("checkpoint", 0), ("checkpoint", 700), ("checkpoint", 5000), ("result", 100)],
)
@each_back
def test_a_full_disk(module, file, room, limit, tmp_path):
    """A traceback, a file that is lost or half written, or a rest of it that takes the space that there is."""
    folder = finished_run(module, tmp_path / "run")
    before = tree(folder)
    limit(module, file, room, no_space)
    with pytest.raises(module.Refusal, match=r"No space left on device.*continues from step 256") as error:
        resume(module, folder)
    assert str(folder / file) in str(error.value)
    assert "\n" not in str(error.value)
    after = tree(folder)
    assert after.keys() == before.keys()
    changed = [name for name in after if after[name] != before[name]]
    assert set(changed) <= {"config.json", "checkpoint.pt"} - {f"{file}.json", f"{file}.pt"}


@each_back
def test_a_full_disk_at_the_first_checkpoint(module, limit, tmp_path):
    """A message that promises a checkpoint where there is none."""
    limit(module, "checkpoint", 100, no_space)
    with pytest.raises(module.Refusal, match=r"checkpoint\.pt could not be written.*No space left.*nothing was saved"):
        module.train(arguments(module, tmp_path / "run"))
    assert tree(tmp_path / "run").keys() == {"config.json", "metrics.jsonl"}


@each_back
def test_a_full_disk_at_a_line_of_the_log(module, tmp_path, monkeypatch):
    """The log is the one file that grows in place: its error is a fault from outside like that of the others."""

    def fill(_, run, *__):
        run.file = File(run.file, 100, no_space)

    folder = finished_run(module, tmp_path / "run")
    with monkeypatch.context() as patch:
        spy(patch, module.Run, "__init__", after=fill)
        with pytest.raises(module.Refusal, match=r"metrics\.jsonl.*No space left on device.*continues from step 256"):
            resume(module, folder, "--total-timesteps", 512)
    assert resume(module, folder, "--total-timesteps", 512)["trained_steps"] == 512


@each([script("ppo_clip")])
def test_a_disk_that_is_full_in_earnest(module, tmp_path):
    """The operating system's own limit: exit code 2, one sentence, and the log is whole."""
    given = line(module, run_dir="run", checkpoint_every=32, hidden_size=64)
    done = start(module, tmp_path, *given, disk=20_000).wait()
    assert done.rc == 2, done.err
    sentence = r"ppo_clip\.py: run/checkpoint\.pt could not be written \(.*File too large.*\); nothing was saved\n"
    assert re.fullmatch(sentence, done.err)
    assert tree(tmp_path / "run").keys() == {"config.json", "metrics.jsonl"}
    assert steps(tmp_path / "run") == [32]


@pytest.mark.parametrize("number", [1, 2, 3], ids=["config", "checkpoint", "result"])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
@each_back
def test_a_kill_leaves_the_old_file(module, number, moment, tmp_path, monkeypatch):
    """Half a file where a whole one was; what a kill leaves beside it is gone after the next run."""
    folder = finished_run(module, tmp_path / "run")
    name = [None, "config.json", "checkpoint.pt", "result.json"][number]
    before = (folder / name).read_bytes()
    calls = []

    def die(file, *_):
        calls.append(file)
        if len(calls) == number:
            if moment == "fsync":
                os.ftruncate(file, 100)
            raise Death

    with monkeypatch.context() as patch:
        spy(patch, module.os, moment, before=die)
        with pytest.raises(Death):
            resume(module, folder, "--eval-episodes", 3)
    assert (folder / name).read_bytes() == before
    assert len(resume(module, folder, "--eval-episodes", 3)["eval_returns"]) == 3
    assert tree(folder).keys() == {"config.json", "metrics.jsonl", "checkpoint.pt", "result.json"}


@each_back
def test_a_file_is_on_the_disk_before_it_replaces_another(module, tmp_path, monkeypatch):
    """An empty file after a loss of power: the name was changed before the content was written."""
    events = []
    spy(monkeypatch, module.os, "fsync", before=lambda _: events.append("written"))
    spy(monkeypatch, module.os, "replace", before=lambda _, target: events.append(target.name))
    module.train(arguments(module, tmp_path / "run"))
    assert events == ["written", "config.json", "written", "checkpoint.pt", "written", "result.json"]


@each_back
def test_a_deleted_log_is_not_padded(module, tmp_path):
    """Zeros up to where the log once ended, which no reader of JSON takes."""
    folder = finished_run(module, tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    resume(module, folder, "--total-timesteps", 512)
    assert b"\0" not in (folder / "metrics.jsonl").read_bytes()
    assert steps(folder)[0] > 256
    assert steps(folder)[-1] == 512


# Numbers that are not finite


@each_back
def test_returns_that_are_not_finite_are_told_apart(module, tmp_path, monkeypatch):
    """A fault of the environment that is taken for one of the training, after a line of the log that is no JSON."""
    spy(monkeypatch, module.Run, "log", before=lambda run, step, _: step > 100 and run.episode_returns.append(np.nan))
    with pytest.raises(module.Refusal, match=r"^a return before step \d+ is not finite; "):
        module.train(arguments(module, tmp_path / "run", checkpoint_every=32))
    assert all(np.isfinite(row["episodic_return"] or 0) for row in metrics(tmp_path / "run"))


@each_back
def test_weights_that_are_not_finite_are_not_saved(module, tmp_path, monkeypatch):
    """The last gradient step makes a weight infinite, and no line of the log comes after it: the good one stays."""
    good = []

    def spoil(_, run, step, *__):
        good.append(run.parts["agent"].state_dict())
        if step == 256:
            with torch.no_grad():
                list(run.parts["agent"].parameters())[-1][0] = float("inf")

    spy(monkeypatch, module.Run, "log", after=spoil)
    expected = r"diverged before step 256; --resume \S+ continues from step (192|224)"
    with pytest.raises(module.Refusal, match=expected):
        module.train(arguments(module, tmp_path / "run", checkpoint_every=96))
    assert checkpoint(tmp_path / "run")["step"] in (192, 224)
    assert all(tensor.isfinite().all() for tensor in parameters(tmp_path / "run").values())
    assert not (tmp_path / "run" / "result.json").exists()


class Endless(gym.Env):
    """One of its observations is infinite."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        obs = self.np_random.normal(size=3).astype(np.float32)
        return obs * (np.inf if self.steps == 45 else 1), 1.0, False, False, {}


gym.register("test/Endless-v0", Endless, disable_env_checker=True)


@each([script("ppo_clip")])
def test_statistics_that_are_not_finite_are_not_saved(module, tmp_path):
    """An infinite observation, which the clipping hides from the loss: the mean of all is not a number from then on."""
    with pytest.raises(module.Refusal, match=r"diverged before step \d+; --resume \S+ continues from step 64"):
        module.train(arguments(module, tmp_path / "run", env_id="test/Endless-v0", norm_obs=True, checkpoint_every=32))
    assert checkpoint(tmp_path / "run")["step"] == 64
    assert all(tensor.isfinite().all() for tensor in parameters(tmp_path / "run").values())


# Two processes


def signalling(module, **kwargs) -> dict:
    """The environment whose steps send signals to the process, in a process of its own."""
    env_id = f"envs:test/Signalling{'Box' if is_continuous(module) else ''}-v0"
    return dict(env_id=env_id, env_kwargs=json.dumps(kwargs))


def wait_for(condition, process, seconds: float = 60) -> None:
    """Wait until the condition holds while the process runs."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "nothing happened"
        assert process.process.is_alive() or condition(), f"it ended too soon: {process.wait().err}"
        time.sleep(0.005)


@pytest.mark.parametrize("resumed", [False, True])
@each_back
def test_a_directory_is_for_one_process(module, resumed, tmp_path, monkeypatch):
    """Two processes that write into one log and replace each other's checkpoints: the second one is refused."""
    folder = tmp_path / "run"
    settings = dict(run_dir="run", checkpoint_every=64, total_timesteps=10**6, **signalling(module, pause=0.001))
    first = start(module, tmp_path, *line(module, **settings), path=[Path(__file__).parent])
    wait_for((folder / "checkpoint.pt").exists, first)
    if resumed:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        saved = checkpoint(folder)["step"]
        first = start(module, tmp_path, "--resume", "run", path=[Path(__file__).parent])
        wait_for(lambda: checkpoint(folder)["step"] > saved, first)
    try:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(module.Run, "log", lambda *_: pytest.fail("it trains"))
        written = (folder / "config.json").stat().st_mtime_ns
        for argv in (["--resume", "run"], line(module, **settings | dict(seed=2))):
            with pytest.raises(module.Refusal, match=r"run is in use by another process"):
                module.train(module.parse_args(argv))
        assert (folder / "config.json").stat().st_mtime_ns == written
    finally:
        os.kill(first.pid, signal.SIGTERM)
        first.wait()
    assert first.rc == 128 + signal.SIGTERM, first.err
    assert set(np.diff(steps(folder))) == {steps(folder)[0]}
    assert checkpoint(folder)["step"] == steps(folder)[-1]


@each_back
def test_a_run_that_has_ended_lets_others_in(module, tmp_path):
    """A lock that stays: it goes with the file's owner, even if that was killed, and with the end of the run."""
    folder = finished_run(module, tmp_path / "run")
    lock = filelock.FileLock(folder / "lock")
    lock.acquire()
    before = tree(folder)
    with pytest.raises(module.Refusal, match=r"run is in use by another process"):
        resume(module, folder)
    assert tree(folder) == before
    lock.release()
    resume(module, folder)
    lock.acquire(timeout=0)
    lock.release()


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@each_back
def test_the_first_signal_saves_and_stops(module, number, tmp_path, monkeypatch):
    """Minutes of training lost to Ctrl-C or to a scheduler's SIGTERM: the signal comes at step 40, the line at 64."""
    settings = dict(run_dir="run", log_every=32, **signalling(module, signals=[[40, number]]))
    done = start(module, tmp_path, *line(module, **settings), path=[Path(__file__).parent]).wait()
    folder = tmp_path / "run"
    assert done.rc == 128 + number, done.err
    assert steps(folder) == [32, 64]
    assert checkpoint(folder)["step"] == 64
    assert not (folder / "result.json").exists()
    assert "saving and stopping at the next line of the log" in done.err
    assert done.err.splitlines()[-1] == f"{name_of(module)}.py: interrupted; --resume run continues from step 64"
    assert "Traceback" not in done.err

    monkeypatch.setattr(envs.Signalling, "count", 10**6)  # it sends no more signals
    monkeypatch.setattr(module, "evaluate", functools.partial(module.evaluate, max_steps=10))
    assert resume(module, folder)["trained_steps"] == 256
    assert steps(folder) == list(range(32, 257, 32))


@each_back
def test_a_signal_saves_though_nobody_reads(module, tmp_path):
    """With `2>&1 | tee log`, Ctrl-C ends tee as well, and what is written then breaks the pipe."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    settings = dict(run_dir="run", log_every=32, total_timesteps=10**6, **signalling(module, pause=0.001))
    process = start(module, tmp_path, *line(module, **settings), path=[Path(__file__).parent], terminal=str(pipe))
    log = tmp_path / "run" / "metrics.jsonl"
    # The first update imports modules, and Python's import takes a broken pipe for a cache that it cannot read.
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 2, process)
    os.close(reader)  # the run itself writes every ten seconds only
    os.kill(process.pid, signal.SIGINT)
    process.wait()
    assert checkpoint(tmp_path / "run")["step"] == metrics(tmp_path / "run")[-1]["global_step"] > 0


@pytest.mark.parametrize(
    ("every", "promise"), [(1000, "nothing was saved"), (32, "--resume run continues from step 32")]
)
@each_back
def test_the_second_signal_stops_at_once(module, every, promise, tmp_path):
    """A process that nothing but a SIGKILL ends before the next line of the log, or a promise that does not hold."""
    signals = [[40, signal.SIGINT], [50, signal.SIGTERM]]
    settings = dict(run_dir="run", log_every=32, checkpoint_every=every, **signalling(module, signals=signals))
    done = start(module, tmp_path, *line(module, **settings), path=[Path(__file__).parent]).wait()
    assert done.rc == 128 + signal.SIGINT, done.err
    assert steps(tmp_path / "run") == [32]
    assert (tmp_path / "run" / "checkpoint.pt").exists() == (every == 32)
    assert done.err.splitlines()[-1] == f"{name_of(module)}.py: interrupted; {promise}"
    assert "Traceback" not in done.err


@each_back
def test_a_signal_ends_the_evaluation(module, tmp_path):
    """A scheduler that waits and then kills: the evaluation of a policy may take longer than its patience."""
    settings = dict(run_dir="run", **signalling(module, signals=[[260, signal.SIGTERM]], length=400))
    done = start(module, tmp_path, *line(module, **settings), path=[Path(__file__).parent]).wait()
    assert done.rc == 128 + signal.SIGTERM, done.err
    assert checkpoint(tmp_path / "run")["step"] == 256
    assert not (tmp_path / "run" / "result.json").exists()
    assert done.err.splitlines()[-1] == f"{name_of(module)}.py: interrupted; --resume run continues from step 256"


@pytest.mark.parametrize("seconds", [60])
@each_back
def test_an_environment_with_a_process_of_its_own(module, seconds, tmp_path):
    """Closing it waits for a process that would inherit what this one does with signals, for ever."""
    env_id = f"envs:test/Simulated{'Box' if is_continuous(module) else ''}-v0"
    process = start(module, tmp_path, *line(module, env_id=env_id, run_dir="run"), path=[Path(__file__).parent])
    done = process.wait(seconds)
    assert done.rc == 0, done.err
    assert "saving and stopping" not in done.err


FORK = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("script", sys.argv[1])
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
signal.signal(signal.SIGTERM, lambda *_: None)
seen = []
note = lambda: seen.append(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))
os.register_at_fork(before=note, after_in_parent=note, after_in_child=note)  # the last before, the first after it
script.prepare_forks()
note()
child = os.fork()
note()
if child:
    os.waitpid(child, 0)
print(seen, child > 0, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, flush=True)
"""


@each_back
def test_no_signal_gets_lost_in_a_fork(module):
    """SIGTERM comes when a process has been forked, but still has this one's handler: it would only take a note."""
    done = subprocess.run([sys.executable, "-c", FORK, module.__file__], capture_output=True, text=True, timeout=60)
    seen = [False, True, True, False]  # waits for both to be ready, and only as long
    assert done.stdout == f"{seen} False True\n{seen} True False\n", done.stderr


@each_back
def test_kill_and_resume(module, tmp_path, monkeypatch):
    """SIGKILL in the middle of a run, which can say and save nothing: the rest of it fits on to the checkpoint."""
    settings = dict(run_dir="run", checkpoint_every=64, **signalling(module, signals=[[200, signal.SIGKILL]]))
    done = start(module, tmp_path, *line(module, **settings), path=[Path(__file__).parent]).wait()
    folder = tmp_path / "run"
    assert done.rc == -signal.SIGKILL
    kept = metrics(folder)
    assert kept[-1]["global_step"] == checkpoint(folder)["step"] == 192
    monkeypatch.setattr(envs.Signalling, "count", 10**6)
    monkeypatch.setattr(module, "evaluate", functools.partial(module.evaluate, max_steps=10))
    resume(module, folder)
    assert metrics(folder)[: len(kept)] == kept
    assert steps(folder)[-1] == 256


# Damaged files


class Hostile:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


CHECKPOINTS = dict(
    truncated=lambda path: path.write_bytes(path.read_bytes()[:-100]),
    halved=lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    empty=lambda path: path.write_bytes(b""),
    text=lambda path: path.write_text("no checkpoint"),
    list=lambda path: torch.save([1, 2], path),
    number=lambda path: torch.save(3, path),
    hostile=lambda path: torch.save(Hostile(f"touch {path.parent}/hostile"), path),
    pickled=lambda path: path.write_bytes(pickle.dumps(Hostile(f"touch {path.parent}/hostile"))),
)


@pytest.mark.parametrize("damage", CHECKPOINTS)
@each_back
def test_a_damaged_checkpoint(module, damage, tmp_path):
    """A traceback, a command that runs, or files that are touched: one sentence names the file and the way out."""
    folder = finished_run(module, tmp_path / "run")
    CHECKPOINTS[damage](folder / "checkpoint.pt")
    check_that_it_is_refused(module, folder, "checkpoint.pt")


def check_that_it_is_refused(module, folder: Path, file: str) -> None:
    """--resume ends in one sentence with the file and the way out, and nothing is touched."""
    before = tree(folder)
    with pytest.raises(module.Refusal, match=rf"{folder / file} is damaged.* --run-dir") as error:
        resume(module, folder, "--total-timesteps", 512)
    assert "\n" not in str(error.value)
    assert tree(folder) == before
    del error  # with its traceback goes the lock


@pytest.mark.parametrize(
    ("owner", "name", "file"), [(torch, "load", "checkpoint.pt"), (Path, "read_text", "config.json")]
)
@each_back
def test_a_file_that_may_not_be_read(module, owner, name, file, tmp_path, monkeypatch):
    """A run of another user is no damaged one, to be given up."""
    folder = finished_run(module, tmp_path / "run")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(module.Refusal, match=rf"{folder / file} cannot be read: .*Permission denied"):
        resume(module, folder)


@pytest.mark.parametrize("damage", ["missing", "null", "wrong"])
@each_back
def test_a_checkpoint_with_a_damaged_entry(module, damage, tmp_path):
    """The same for each of its entries: it is not there, it is None, or of another type."""
    folder = finished_run(module, tmp_path / "run")
    original = torch.load(folder / "checkpoint.pt")
    not_refused = []
    for name in original:
        wrong = 3 if isinstance(original[name], list | dict) else ["wrong"]
        content = original | {name: None if damage == "null" else wrong}
        if damage == "missing":
            del content[name]
        torch.save(content, folder / "checkpoint.pt")
        try:
            check_that_it_is_refused(module, folder, "checkpoint.pt")
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            not_refused.append(f"{name}: {type(error).__name__} {error}")
    assert not_refused == []


CONFIGS = dict(
    truncated=lambda path: path.write_bytes(path.read_bytes()[:-100]),
    empty=lambda path: path.write_bytes(b""),
    zeros=lambda path: path.write_bytes(bytes(1000)),
    binary=lambda path: path.write_bytes(bytes(range(128, 256))),
    list=lambda path: path.write_text("[1, 2]"),
    null=lambda path: path.write_text("null"),
    text=lambda path: path.write_text('"text"'),
)


@pytest.mark.parametrize("damage", CONFIGS)
@each_back
def test_a_damaged_config(module, damage, tmp_path):
    """As for the checkpoint."""
    folder = finished_run(module, tmp_path / "run")
    CONFIGS[damage](folder / "config.json")
    check_that_it_is_refused(module, folder, "config.json")


@pytest.mark.parametrize("damage", ["missing", "null", "list", "object", "wrong"])
@each_back
def test_a_config_with_a_damaged_entry(module, damage, tmp_path):
    """A null or a list that becomes the text "None" or "[]", or text for a number: other arguments, or a traceback."""
    folder = finished_run(module, tmp_path / "run")
    original = config(folder)
    not_refused = []
    for name, default in vars(module.Args()).items():
        wrong = 3 if isinstance(default, str) else "text"
        content = original | {name: dict(null=None, list=[], object={}, wrong=wrong).get(damage)}
        if damage == "missing":
            del content[name]
        (folder / "config.json").write_text(json.dumps(content))
        try:
            check_that_it_is_refused(module, folder, "config.json")
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            not_refused.append(f"{name}: {type(error).__name__} {error}")
    assert not_refused == []


@each_back
def test_a_run_without_a_config(module, tmp_path):
    """A checkpoint alone is no run: its arguments are not known."""
    folder = finished_run(module, tmp_path / "run")
    (folder / "config.json").unlink()
    before = tree(folder)
    with pytest.raises(module.Refusal, match=f"{folder} holds no run to resume"):
        resume(module, folder)
    assert tree(folder) == before


# Bugs that these tests find


@pytest.mark.parametrize(
    ("test", "given", "name", "old", "new"),
    [
        (
            test_an_error_in_an_environment_is_no_refusal, dict(where="step", error=ValueError("mine")),
            "td3", "except Refusal as error:", "except ValueError as error:",
        ),
        (
            test_an_error_in_an_environment_is_no_refusal, dict(where="init", error=RuntimeError("mine")),
            "td3", "ImportError) as error:\n        if", "RuntimeError) as error:\n        if",
        ),
        (test_a_full_disk, dict(file="config", room=100), "td3", "aside.unlink(missing_ok=True)", "pass"),
        (test_a_full_disk, dict(file="result", room=100), "ppo_clip", 'path.with_suffix(".tmp")', "path"),
        (test_a_kill_leaves_the_old_file, dict(number=3, moment="fsync"), "td3", 'path.with_suffix(".tmp")', "path"),
        (
            test_a_file_is_on_the_disk_before_it_replaces_another, {},
            "td3", "            os.fsync(file.fileno())\n", "",
        ),
        (test_a_deleted_log_is_not_padded, {}, "td3", "min(self.log_size, self.file.tell())", "self.log_size"),
        (
            test_returns_that_are_not_finite_are_told_apart, {},
            "td3", "if not np.isfinite(self.episode_returns).all():", "if False:",
        ),
        (test_weights_that_are_not_finite_are_not_saved, {}, "td3", "(part, nn.Module) else", "(part, nn.Linear) else"),
        (test_a_directory_is_for_one_process, dict(resumed=False), "td3", "self.lock.acquire(timeout=0)", "pass"),
        (test_a_run_that_has_ended_lets_others_in, {}, "ppo_clip", "self.lock.release()", "Run.held = self.lock"),
        (
            test_the_first_signal_saves_and_stops, dict(number=signal.SIGINT),
            "td3", "if checkpoint_due or stopping:", "if checkpoint_due:",
        ),
        (
            test_the_first_signal_saves_and_stops, dict(number=signal.SIGTERM),
            "ppo_clip", "signal.signal(signal.SIGTERM, stop)", "pass",
        ),
        (
            test_the_first_signal_saves_and_stops, dict(number=signal.SIGTERM),
            "ppo_clip", "sys.exit(128 + Run.stop_signal)", "sys.exit(130)",
        ),
        (
            test_a_signal_saves_though_nobody_reads, {},
            "td3", "        except OSError:\n            return", "        except ValueError:\n            return",
        ),
        (
            test_the_second_signal_stops_at_once, dict(every=32, promise="--resume run continues from step 32"),
            "ppo_clip", "            raise KeyboardInterrupt\n        Run.stop", "            pass\n        Run.stop",
        ),
        (
            test_a_signal_ends_the_evaluation, {},
            "td3", "            raise KeyboardInterrupt\n        if args.cap", "            pass\n        if args.cap",
        ),
        (
            test_an_environment_with_a_process_of_its_own, dict(seconds=6),
            "ppo_clip", "    prepare_forks()\n", "",
        ),
        (test_no_signal_gets_lost_in_a_fork, {}, "ppo_clip", "SIG_BLOCK, {signal.SIGTERM}", "SIG_BLOCK, set()"),
        (
            test_a_damaged_checkpoint, dict(damage="hostile"),
            "td3", 'torch.load(path, map_location="cpu")', "torch.load(path, weights_only=False)",
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)  # fmt: skip
def test_a_planted_bug_is_found(request, test, given, name, old, new):
    """Each of these edits of a script makes the test fail."""
    fails_with_a_bug(request, test, name, old, new, **given)
