"""Runs from the command line to the last file: contract, determinism, interruption, resuming, every environment."""

import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MODULES, SCRIPTS, make_args, spy
from gymnasium.spaces import Box, Discrete
from launch import Process, flags, tiny

RESULT = """algo env_id seed total_timesteps eval_returns eval_mean train_return sps wall_time"""
LINE = """global_step wall_time episodic_return episodes SPS"""
ENVIRONMENTS = ["CartPole-v1", "Pendulum-v1", "LunarLander-v3", "HalfCheetah-v5", "MinAtar/Breakout-v1", "ALE/Pong-v5",
    "Acrobot-v1"]  # fmt: skip

each_pair = pytest.mark.parametrize(("script", "module"), list(zip(SCRIPTS, MODULES)), ids=[s.stem for s in SCRIPTS])
each_module = pytest.mark.parametrize("module", MODULES, ids=[s.stem for s in SCRIPTS])
each_compiled = pytest.mark.parametrize("module", [module for module in MODULES if hasattr(module.Args, "compile")],
    ids=lambda module: module.__name__.split(".")[-1])  # fmt: skip
each_off_policy = pytest.mark.parametrize("module", [module for module in MODULES if hasattr(module, "ReplayBuffer")],
    ids=lambda module: module.__name__.split(".")[-1])  # fmt: skip


def simple_env(module) -> str:
    """The environment of the script's defaults: CartPole or, for continuous actions, Pendulum."""
    return module.Args().env_id


def arguments(module, folder: Path, **settings):
    """Args of a tiny run in `folder`."""
    settings = tiny(module, **dict(total_timesteps=256, run_dir=str(folder)) | settings)
    return module.parse_args(flags(dict(env_id=simple_env(module)) | settings))


def resume(module, folder: Path, *more: str) -> dict:
    """What `--resume folder` does."""
    return module.train(module.parse_args(["--resume", str(folder), *more]))


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, each of which must be strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def steps(folder: Path) -> list[int]:
    """The steps that metrics.jsonl knows."""
    return [line["global_step"] for line in metrics(folder)]


def checkpoint(folder: Path) -> dict:
    """The checkpoint, loaded as plain data."""
    return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)


def leaves(part, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors and numbers in nested containers, by path."""
    if isinstance(part, dict):
        part = {str(key): value for key, value in part.items()}
    elif isinstance(part, (list, tuple)):
        part = dict(enumerate(part))
    else:
        return {name: torch.as_tensor(part)} if isinstance(part, (torch.Tensor, int, float)) else {}
    return {path: leaf for key, value in part.items() for path, leaf in leaves(value, f"{name}/{key}").items()}


def fingerprint(folder: Path) -> str:
    """A hash of all that a run computed, clocks aside."""
    digest = hashlib.sha256()
    for path, leaf in sorted(leaves(checkpoint(folder)).items()):
        if not any(word in path for word in ("wall_time", "log_size")):  # lines of the log contain times
            digest.update(path.encode() + leaf.contiguous().numpy().tobytes())
    for line in metrics(folder):
        digest.update(json.dumps({key: line[key] for key in sorted(line) if key not in ("wall_time", "SPS")}).encode())
    return digest.hexdigest()


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of floats in the checkpoint: weights, normalisers, optimiser states."""
    return {path: leaf for path, leaf in leaves(checkpoint(folder)).items() if leaf.ndim and leaf.is_floating_point()}


def equal(one: dict, two: dict) -> bool:
    """Same names, same bits."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module", params=list(zip(SCRIPTS, MODULES)), ids=[s.stem for s in SCRIPTS])
def finished(request, tmp_path_factory):
    """A finished run: module, script, directory, returned result. Tests that change it take a copy."""
    script, module = request.param
    folder = tmp_path_factory.mktemp(script.stem) / "run"
    result = module.train(arguments(module, folder))
    return module, script, folder, result


@pytest.fixture
def copy(finished, tmp_path):
    """The finished run's module and a copy of its directory."""
    shutil.copytree(finished[2], tmp_path / "copy")
    return finished[0], tmp_path / "copy"


# The contract


@pytest.fixture(scope="module", params=list(zip(SCRIPTS, MODULES)), ids=[s.stem for s in SCRIPTS])
def alone(request, tmp_path_factory):
    """The script copied alone into an empty folder and run there by a plain Python: folder and completed process."""
    script, module = request.param
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(script, folder)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = flags(dict(env_id=simple_env(module)) | tiny(module, num_envs=4, total_timesteps=1024, seed=3))
    done = subprocess.run(
        [sys.executable, script.name, *line],
        cwd=folder,
        env=environ | dict(PYTHONPATH=""),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout.decode()
    (run_dir,) = (folder / "runs").iterdir()
    return module, script, run_dir, done.stdout.decode()


def test_a_script_runs_alone(alone):
    """Nothing but the script is needed, and all it leaves is one directory with the four files."""
    module, script, run_dir, _ = alone
    assert {path.name for path in run_dir.parents[1].iterdir()} - {"__pycache__"} == {script.name, "runs"}
    assert {path.name for path in run_dir.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt", "result.json"}
    assert re.fullmatch(rf"{simple_env(module)}__{script.stem}__3__\d+\S*", run_dir.name)


def test_config_file(alone):
    """All arguments, the versions of the packages, and no commit where there is no repository."""
    module, _, run_dir, _ = alone
    config = json.loads((run_dir / "config.json").read_text())
    assert vars(module.Args()).keys() <= config.keys()
    assert (config["env_id"], config["seed"], config["num_envs"]) == (simple_env(module), 3, 4)
    assert torch.__version__ in json.dumps(config)
    assert gym.__version__ in json.dumps(config)
    assert config["git_commit"] is None


def test_commit_in_config_file(finished):
    """Inside the repository the commit is known."""
    root = Path(__file__).parents[1]
    git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    if git.returncode:
        pytest.skip("no repository here")
    assert json.loads((finished[2] / "config.json").read_text())["git_commit"] == git.stdout.strip()


def test_result_file(alone):
    """The keys, and numbers that fit one another."""
    _, script, run_dir, _ = alone
    result = json.loads((run_dir / "result.json").read_text())
    assert result.keys() == set(RESULT.split())
    assert (result["algo"], result["seed"], result["total_timesteps"]) == (script.stem, 3, 1024)
    assert len(result["eval_returns"]) == 2
    assert result["eval_mean"] == pytest.approx(sum(result["eval_returns"]) / 2)
    assert 0 < result["wall_time"] < 60
    assert result["sps"] == pytest.approx(1024 / result["wall_time"], rel=0.2)


def test_train_returns_the_result_file(finished):
    """What train() returns is what result.json holds."""
    assert finished[3] == json.loads((finished[2] / "result.json").read_text())


def test_metrics_file(alone):
    """Lines of JSON with the common keys and the losses, finite or null, steps rising to the end of the run."""
    _, _, run_dir, _ = alone
    lines = metrics(run_dir)
    assert len(lines) >= 4
    for line in lines:
        assert set(LINE.split()) < line.keys(), "no losses"
        assert line.keys() == lines[-1].keys()
        assert all(value is None or math.isfinite(value) for value in line.values())
        assert (line["episodic_return"] is None) == (line["episodes"] == 0)
    for key in ("global_step", "wall_time"):
        assert all(a[key] < b[key] for a, b in zip(lines, lines[1:])), key
    assert lines[-1]["global_step"] == 1024
    assert [name for name in lines[-1] if "loss" in name]


def test_train_return_is_the_mean_of_the_last_100_episodes(alone):
    """Taken together, the lines' mean returns and counts of episodes give train_return."""
    _, _, run_dir, _ = alone
    lines = [line for line in metrics(run_dir) if line["episodes"]]
    episodes = sum(line["episodes"] for line in lines)
    assert 0 < episodes <= 100, "this run is meant to be shorter"
    total = sum(line["episodes"] * line["episodic_return"] for line in lines)
    result = json.loads((run_dir / "result.json").read_text())
    assert result["train_return"] == pytest.approx(total / episodes)


@each_module
def test_no_train_return_without_an_episode(module, tmp_path):
    """0, which would be the best score of all where rewards are costs."""
    env_id = "Pendulum-v1" if simple_env(module) == "Pendulum-v1" else "MountainCar-v0"
    settings = dict(env_id=env_id, total_timesteps=64, horizon=16, eval_episodes=1)
    assert module.train(arguments(module, tmp_path / "run", **settings))["train_return"] is None


def test_checkpoint_file(alone):
    """Plain data (weights_only), with the step; one float tensor per parameter at least."""
    _, _, run_dir, _ = alone
    assert checkpoint(run_dir)["step"] == 1024
    assert len(parameters(run_dir)) >= 6


def test_the_last_line_is_the_evaluation(alone):
    """The last line printed, to either stream, says where and how the evaluation was."""
    _, _, run_dir, printed = alone
    result = json.loads((run_dir / "result.json").read_text())
    assert f"{result['eval_mean']:.1f}" in printed.splitlines()[-1]
    assert run_dir.name in printed.splitlines()[-1]


def test_plain_progress_without_a_terminal(alone):
    """Into a file go a few plain lines, no bar that draws over itself."""
    printed = alone[3]
    assert "\r" not in printed
    assert len(printed.splitlines()) <= 6
    assert " of 1024 steps" in printed


def test_progress_bar_on_a_terminal(finished, tmp_path):
    """On a terminal one line is redrawn: carriage returns, and few line feeds."""
    module, script, _, _ = finished
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80)) if hasattr(termios, "tcsetwinsize") else pytest.skip(
        "Python 3.11 and later"
    )
    line = flags(dict(env_id=simple_env(module)) | tiny(module, total_timesteps=2048, run_dir="run"))
    process = Process(script, line, tmp_path, terminal=os.ttyname(follower)).wait()
    printed = os.read(leader, 10**5)
    os.close(leader)
    os.close(follower)
    assert process.rc == 0, printed
    assert re.search(rb"\r[^\n]*\d+/2048", printed), printed
    assert printed.count(b"\n") <= 3, printed


# Determinism


@each_module
def test_equal_runs_are_bit_identical(module, tmp_path):
    """Same arguments, same bits in checkpoint and log; another seed gives others."""
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    results = [module.train(arguments(module, folder)) for folder in (first, second)]
    module.train(arguments(module, other, seed=2))
    assert fingerprint(first) == fingerprint(second)
    assert results[0]["eval_returns"] == results[1]["eval_returns"]
    assert fingerprint(first) != fingerprint(other)
    assert not equal(parameters(first), parameters(other))


def test_process_and_function_agree(finished, tmp_path):
    """The command line computes, bit for bit, what train() computes."""
    module, script, folder, _ = finished
    line = flags(dict(env_id=simple_env(module)) | tiny(module, total_timesteps=256, run_dir="run"))
    done = Process(script, line, tmp_path).wait()
    assert done.rc == 0, done.err
    assert fingerprint(tmp_path / "run") == fingerprint(folder)


def test_two_resumes_are_bit_identical(finished, tmp_path):
    """Two continuations of one checkpoint go the same way, and it is not the way back to the start."""
    module, _, folder, _ = finished
    for name in ("one", "two"):
        shutil.copytree(folder, tmp_path / name)
        resume(module, tmp_path / name, "--total-timesteps", "512")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    assert fingerprint(tmp_path / "one") != fingerprint(folder)


def test_random_numbers_of_a_resumed_run(copy, monkeypatch, tmp_path):
    """Numbers drawn a second time: those of the start of the run, or those of an earlier continuation."""
    module, folder = copy
    states = []
    spy(monkeypatch, module, "Run", after=lambda *_: states.append(torch.get_rng_state().numpy().tobytes()))
    module.train(arguments(module, tmp_path / "start"))
    resume(module, folder, "--total-timesteps", "512")
    resume(module, folder, "--total-timesteps", "768")
    assert len(set(states)) == 3


class Dice(gym.Env):
    """Rewards drawn by the environment times what the action is: no two episodes or policies have the same return."""

    observation_space = Box(-1, 1, (3,), np.float32)

    def __init__(self, continuous=False):
        self.action_space = Box(-1, 1, (1,), np.float32) if continuous else Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 8
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        self.left -= 1
        reward = self.np_random.normal() * (2 + float(np.sum(action)))
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), reward, self.left == 0, False, {}


gym.register("test/Dice-v0", Dice)
gym.register("test/DiceContinuous-v0", Dice, kwargs=dict(continuous=True))


@each_module
def test_the_evaluation_is_deterministic(module, tmp_path):
    """Eight environments with seeds of their own; evaluated again, with other random numbers, the returns are equal."""
    env_id = "test/DiceContinuous-v0" if simple_env(module) == "Pendulum-v1" else "test/Dice-v0"
    folder = tmp_path / "run"
    returns = module.train(arguments(module, folder, env_id=env_id, eval_episodes=8))["eval_returns"]
    assert len(set(returns)) == 8
    assert resume(module, folder)["eval_returns"] == returns


@each_module
def test_environments_share_no_seed(module, tmp_path, monkeypatch):
    """Start states that two runs share, training and evaluation, or a run and its continuation."""
    seeds, make_envs = [], module.make_envs

    def watched(*inputs):
        made = make_envs(*inputs)
        reset = made.reset

        def watched_reset(seed=None, **options):
            if seed is not None:
                seeds.append(range(seed, seed + made.num_envs))  # environment i takes seed + i
            return reset(seed=seed, **options)

        made.reset = watched_reset
        return made

    monkeypatch.setattr(module, "make_envs", watched)
    for name, seed in dict(one=1, two=2).items():
        module.train(arguments(module, tmp_path / name, seed=seed, num_envs=3, num_steps=24, total_timesteps=144))
    resume(module, tmp_path / "one", "--total-timesteps", "288")
    *others, again = seeds  # training and evaluation of three runs
    assert len(others) == 5
    assert again == others[1]
    assert len(set().union(*others)) == sum(map(len, others))


class Ready(BaseException):
    """What ends a run before its first step."""


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """A function that runs train() with some settings up to its first step and returns the parts of the run."""

    def up_to_the_run(module, **settings):
        parts = {}

        def stop(args, **made):
            parts.update(made)
            raise Ready

        monkeypatch.setattr(module, "Run", stop)
        with pytest.raises(Ready):
            module.train(arguments(module, tmp_path, **settings))
        return parts

    return up_to_the_run


@each_module
def test_weights_follow_the_seed(module, prepare):
    """The same initial weights whatever --seed says, or others at each run."""
    one, again, two = (prepare(module, seed=seed)["agent"].state_dict() for seed in (1, 1, 2))
    assert equal(one, again)
    assert not equal(one, two)


@each_module
def test_all_parts_are_saved(module, prepare):
    """A target network or an optimizer that a resumed run begins anew."""
    parts = prepare(module)
    expected = {"agent", "optimizers" if module.__name__.split(".")[-1] in ("ddpg", "td3", "sac") else "optimizer"}
    assert parts.keys() == expected | ({"target", "buffer"} if hasattr(module, "ReplayBuffer") else set())


@each_module
def test_threads(module, prepare, monkeypatch):
    """--torch-threads without effect, or 0 that is not one per core."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    prepare(module, torch_threads=3)
    prepare(module, torch_threads=0)
    assert asked == [3, os.cpu_count()]


@each_off_policy
def test_sizes_of_buffer_and_batch(module, tmp_path, prepare, monkeypatch):
    """A buffer as large for each environment as for all of them, or batches of another size than asked for."""
    assert prepare(module, num_envs=3, buffer_size=600)["buffer"].size == 3 * (200 + 1)
    monkeypatch.undo()
    sizes = []
    spy(monkeypatch, module.ReplayBuffer, "sample", after=lambda batch, *_: sizes.append(len(batch["rewards"])))
    module.train(arguments(module, tmp_path / "run", batch_size=11))
    assert set(sizes) == {11}


@pytest.mark.parametrize(("compiled", "steps"), [(True, 10), (False, 30_000), (None, 20_000), (None, 20_001)])
@each_compiled
def test_long_runs_are_compiled(module, prepare, monkeypatch, compiled, steps):
    """--compile without effect, a run compiled that is too short to gain by it, or a long one that is not."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: asked.append(function) or function)
    given = dict(num_envs=1, num_steps=5, num_minibatches=1, update_epochs=1, train_frequency=5, learning_starts=5)
    prepare(module, compile=str(compiled), total_timesteps=5 * steps, **given)
    assert bool({*asked} - {torch.neg}) == (steps > 20_000 if compiled is None else compiled)


@pytest.mark.parametrize("compiler", [True, False])
def test_where_nothing_can_be_compiled_training_goes_on(tmp_path, compiler):
    """A long run that fails on a machine without a compiler, or that is slow there without a word or on any machine."""
    script, module = next(pair for pair in zip(SCRIPTS, MODULES) if pair[0].stem == "ppo_clip")
    line = ["--compile", True, "--run-dir", "run", *flags(tiny(module, total_timesteps=64))]
    none = dict(PATH="", CXX=None, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))  # an old cache would need no compiler
    done = Process(script, line, tmp_path, {} if compiler else none).wait()
    assert (done.rc, "cannot compile" in done.out) == (0, not compiler), done.err
    assert (tmp_path / "run" / "result.json").exists()


@each_compiled
def test_a_compiled_step_can_be_compiled_again(module, tmp_path, monkeypatch):
    """As for a batch of 1 row, or of as many as an observation has numbers: torch 2.13 fails if theta became a view."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(envs.Tagged, "instances", [])
    env_id = "test/TaggedBox-v0" if hasattr(module.Args, "tau") else "test/Tagged-v0"
    given = dict(num_envs=1, num_steps=4, num_minibatches=2, update_epochs=1, total_timesteps=48, learning_starts=20)
    module.train(make_args(module, tmp_path, env_id=env_id, compile=True, **given))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > (not hasattr(module, "ReplayBuffer"))


@each_module
def test_log_shows_the_mean_of_all_gradient_steps(module, tmp_path, monkeypatch):
    """Metrics of the last minibatch alone, or of other steps than those since the last line (here, fewer than 100)."""
    outputs = [defaultdict(list)]

    def remember(metrics, *_):
        for name, metric in metrics.items():
            outputs[-1][name].append(metric.item())

    for function in {"update", "critic_step", "update_policy"} & set(vars(module)):
        spy(monkeypatch, module, function, after=remember)
    spy(monkeypatch, module.Run, "log", after=lambda *_: outputs.append(defaultdict(list)))
    module.train(arguments(module, tmp_path / "run"))
    for line, output in zip(metrics(tmp_path / "run"), outputs):
        for name, values in output.items():
            assert line[name] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-6)
    assert any(output for output in outputs)


# Resuming


def test_resuming_a_finished_run_only_evaluates(copy, finished):
    """No step of training: same tensors, same log, same evaluation."""
    module, folder = copy
    result = resume(module, folder)
    assert equal(parameters(folder), parameters(finished[2]))
    assert (folder / "metrics.jsonl").read_bytes() == (finished[2] / "metrics.jsonl").read_bytes()
    assert result["eval_returns"] == finished[3]["eval_returns"]
    assert result["train_return"] == finished[3]["train_return"]
    assert result["sps"] == pytest.approx(finished[3]["sps"])
    assert result == json.loads((folder / "result.json").read_text())


def test_resuming_twice_works(copy, finished):
    """A resumed run can be resumed: its config.json is still one of a run."""
    module, folder = copy
    resume(module, folder)
    assert resume(module, folder)["eval_returns"] == finished[3]["eval_returns"]


def test_resuming_keeps_the_arguments(finished):
    """--resume alone takes the run's own arguments, not the defaults; a flag beside it counts more."""
    module, _, folder, _ = finished
    again = module.parse_args(["--resume", str(folder)])
    original = arguments(module, folder)
    same = {name: value for name, value in vars(original).items() if name not in ("resume", "run_dir")}
    assert same.items() <= vars(again).items()
    assert module.parse_args(["--resume", str(folder), "--eval-episodes", "7"]).eval_episodes == 7


def test_resuming_with_more_steps_trains_on(copy, finished):
    """A larger --total-timesteps continues where the run stood."""
    module, folder = copy
    before = metrics(folder)
    result = resume(module, folder, "--total-timesteps", "512")
    assert result["total_timesteps"] == 512
    assert metrics(folder)[: len(before)] == before
    assert_schedule(module, steps(folder), 512)
    assert not equal(parameters(folder), parameters(finished[2]))
    assert checkpoint(folder)["step"] == 512
    times = [line["wall_time"] for line in metrics(folder)]
    assert times == sorted(times), "the clock goes on, too"


def wait_for(condition, process: Process, seconds: float = 60) -> None:
    """Wait until the condition holds while the process runs."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "nothing happened"
        assert process.process.is_alive() or condition(), f"it ended too soon: {process.wait().err}"
        time.sleep(0.005)


def start_long_run(module, script, folder: Path) -> Process:
    """A run that would take a minute, with a checkpoint now and then, returned when it is past its first ones."""
    settings = tiny(module, total_timesteps=300_000, run_dir="run", checkpoint_every=320)
    line = flags(dict(env_id=simple_env(module)) | settings)
    line += ["--compile", "False"] if hasattr(module.Args, "compile") else []  # a long run, but not for its own sake
    process = Process(script, line, folder)
    wait_for((folder / "run" / "checkpoint.pt").exists, process)
    size = (folder / "run" / "metrics.jsonl").stat().st_size
    wait_for(lambda: (folder / "run" / "metrics.jsonl").stat().st_size > size + 5000, process)
    return process


def assert_schedule(module, taken: list[int], end: int) -> None:
    """Equal iterations up to `end` or, where an iteration is whole episodes, rising steps that meet `end`."""
    if hasattr(module.Args, "horizon"):
        assert taken == sorted(set(taken))
        assert taken[-1] == end
    else:
        assert taken == list(range(taken[0], end // taken[0] * taken[0] + 1, taken[0]))


def check_log_after(module, folder: Path) -> None:
    """Resume a broken run for a few steps: no line of its log is lost, none doubled, none torn."""
    saved = checkpoint(folder)
    kept = [line for line in metrics_until_torn(folder) if line["global_step"] <= saved["step"]]
    end = saved["step"] + 64
    result = resume(module, folder, "--total-timesteps", str(end))
    assert_schedule(module, steps(folder), end)
    assert metrics(folder)[: len(kept)] == kept
    assert len(result["eval_returns"]) == 2


def metrics_until_torn(folder: Path) -> list[dict]:
    """The whole lines of a log that may end in the middle of one."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]


@each_pair
def test_kill_and_resume(script, module, tmp_path):
    """SIGKILL in the middle of a run, half a line in its log: the rest of the run fits on to the checkpoint."""
    process = start_long_run(module, script, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().rc == -signal.SIGKILL
    folder = tmp_path / "run"
    lines = metrics_until_torn(folder)
    lines[-1]["global_step"] += 1_000_000  # written after the checkpoint, before the kill
    with open(folder / "metrics.jsonl", "a") as log:
        log.write(json.dumps(lines[-1]) + "\n" + json.dumps(lines[-1])[:40])
    assert not (folder / "result.json").exists()
    check_log_after(module, folder)


@each_pair
def test_ctrl_c_keeps_the_checkpoint(script, module, tmp_path):
    """SIGINT ends the run at once and not with 0; its checkpoint loads and continues."""
    process = start_long_run(module, script, tmp_path)
    os.kill(process.pid, signal.SIGINT)
    process.process.join(5)
    if process.process.is_alive():  # Python drops an interrupt that falls into a finaliser
        os.kill(process.pid, signal.SIGINT)
    assert process.wait(10).rc != 0
    assert checkpoint(tmp_path / "run")["step"] >= 320
    check_log_after(module, tmp_path / "run")


@each_module
def test_the_checkpoint_holds_all_that_learns(module, tmp_path, monkeypatch):
    """Every tensor of the networks, normalisers and optimisers of the run is in its checkpoint."""
    made = []
    for kind in (module.Agent, module.Adam):

        def watched(self, *args, init=kind.__init__, **kwargs):
            made.append(self)
            init(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", watched)
    module.train(arguments(module, tmp_path / "run"))
    saved = {leaf.contiguous().numpy().tobytes() for leaf in leaves(checkpoint(tmp_path / "run")).values()}
    assert all(any(isinstance(part, kind) for part in made) for kind in (module.Agent, module.Adam))
    for part in made:
        state = leaves(part.state_dict())
        assert state
        assert [name for name, leaf in state.items() if leaf.contiguous().numpy().tobytes() not in saved] == []


@each_off_policy
def test_schedules_go_on_in_a_resumed_run(module, tmp_path, monkeypatch):
    """A step size or an epsilon that begins anew: the run is cut after 128 of 256 steps and fills its buffer again."""
    rates = []

    def cut(_, run, step, *rest):
        if step == 128:
            rates.append(None)
            raise Ready

    spy(monkeypatch, module, "update", before=lambda *inputs: rates.append(inputs[4].item()))
    spy(monkeypatch, module.Run, "log", after=cut)
    given = dict(
        start_e=1.0, end_e=0.0, exploration_fraction=1.0, anneal_lr=True, learning_rate=0.01, train_frequency=1
    )
    with pytest.raises(Ready):
        module.train(arguments(module, tmp_path / "run", checkpoint_every=64, **given))
    resume(module, tmp_path / "run")
    before, after = rates[: rates.index(None)], rates[rates.index(None) + 1 :]
    assert before == pytest.approx([0.01 * (1 - t / 256) for t in range(32, 128, 2) for _ in range(2)])
    assert after == pytest.approx([0.01 * (1 - t / 256) for t in range(160, 256, 2) for _ in range(2)])
    lines = metrics(tmp_path / "run")
    assert [line["global_step"] for line in lines] == [64, 128, 192, 256]
    if hasattr(module.Args, "end_e"):
        assert [line["epsilon"] for line in lines] == pytest.approx([1 - (t - 2) / 256 for t in (64, 128, 192, 256)])


@each_module
def test_when_checkpoints_are_written(module, tmp_path, monkeypatch):
    """At every iteration, or only if one ends exactly at a multiple of --checkpoint-every, or not at the end."""
    saved = []
    spy(monkeypatch, module.Run, "save", after=lambda _, run: saved.append(run.state["step"]))
    module.train(arguments(module, tmp_path / "run", checkpoint_every=100, log_every=48))
    taken = steps(tmp_path / "run")
    assert saved == [b for a, b in zip([0, *taken], taken) if a // 100 < b // 100] + taken[-1:]
    assert len(saved) == 3


@each_module
def test_a_checkpoint_is_written_whole_or_not_at_all(module, tmp_path, monkeypatch):
    """Death in the middle of writing the second checkpoint leaves the first one, readable and resumable."""
    save, saved = torch.save, []

    class Death(BaseException):
        pass

    def dying_save(data, file, *args, **kwargs):
        if saved:
            whole = saved[0].read_bytes()
            Path(file).write_bytes(whole[: len(whole) // 2])
            raise Death
        save(data, file, *args, **kwargs)
        saved.append(tmp_path / "first.pt")
        shutil.copy(file, saved[0])

    monkeypatch.setattr(torch, "save", dying_save)
    with pytest.raises(Death):
        module.train(arguments(module, tmp_path / "run", checkpoint_every=64))
    monkeypatch.undo()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == saved[0].read_bytes()
    assert 64 <= checkpoint(tmp_path / "run")["step"] < 256
    check_log_after(module, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "result.json",
    }, "what was half written is gone"


# Every environment


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
@each_module
def test_smoke(module, env_id, tmp_path, monkeypatch, recwarn):
    """In each family: the gradient steps changed every parameter, the numbers are finite, the evaluation ran."""
    started = {}

    class Watched(module.Agent):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.update({name: p.detach().clone() for name, p in self.named_parameters()})
            started["agent"] = self

    evaluate = module.evaluate

    def watched_evaluate(agent, *args, **kwargs):
        before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
        returns = evaluate(agent, *args, **kwargs)
        assert equal(before, agent.state_dict()), "the evaluation changed the agent"
        return returns

    family = module.parse_args(["--env-id", env_id])
    episodes = 1 if env_id.startswith(("ALE", "Half")) else 2
    settings = tiny(module, total_timesteps=128, run_dir=str(tmp_path / "run"), eval_episodes=episodes)
    args = module.parse_args(["--env-id", env_id, *flags(settings)])
    untouched = {name: value for name, value in vars(family).items() if name not in settings}
    assert untouched.items() <= vars(args).items(), "a flag changed what it does not name"
    monkeypatch.setattr(module, "Agent", Watched)
    monkeypatch.setattr(module, "evaluate", watched_evaluate)
    try:
        result = module.train(args)
    except ValueError as error:
        if not re.search(r"(action|observation) space .* is not supported", str(error)):
            raise
        pytest.skip(str(error))
    agent = started.pop("agent")
    assert len(started) >= 4
    unchanged = [name for name, p in agent.named_parameters() if torch.equal(p.detach().cpu(), started[name])]
    assert unchanged == []
    assert all(tensor.isfinite().all() for tensor in parameters(tmp_path / "run").values())
    lines = metrics(tmp_path / "run")
    assert lines[-1]["global_step"] == 128
    assert all(math.isfinite(value) for value in lines[-1].values() if value is not None)
    assert len(result["eval_returns"]) == episodes
    assert all(map(math.isfinite, result["eval_returns"]))
    assert result["env_id"] == env_id
    again = resume(module, tmp_path / "run") if not env_id.startswith("ALE") else result  # its episodes are long
    assert again["eval_returns"] == result["eval_returns"]
    assert [str(w.message) for w in recwarn if w.category is UserWarning] == [], "warnings to the user"


@each_module
def test_some_environment_is_supported(module):
    """The skips of the smoke test are not all there is: CartPole or Pendulum runs in every script."""
    module.make_envs(simple_env(module), 1).close()


@each_module
def test_family_defaults_are_shown_and_overridden(module, capsys):
    """--help shows the defaults of the environment named beside it, and a flag overrides them."""
    families = 0
    for env_id in ENVIRONMENTS:
        plain, family = vars(module.parse_args([])), vars(module.parse_args(["--env-id", env_id]))
        changed = {name for name in plain if plain[name] != family[name]} - {"env_id"}
        families += bool(changed)
        if env_id == "CartPole-v1":
            assert not changed, "Args' own defaults are CartPole's"
        with pytest.raises(SystemExit, match=r"^0$"):
            module.parse_args(["--help", "--env-id", env_id])
        shown = " ".join(re.sub(r"[│|\s]+", " ", capsys.readouterr().out).split())
        for name in changed:
            flag = name.replace("_", "-")
            assert re.search(rf"--{flag}\b[^()]*(\([^d][^()]*\)[^()]*)*\(default: {family[name]}\)", shown), name
        for name in changed - {"compile"}:
            own = module.parse_args(["--env-id", env_id, *flags({name: plain[name]})])
            assert getattr(own, name) == plain[name]
    assert families >= 2


def test_help_names_the_family_of_halfcheetah():
    """The example in numbers: PPO collects 2048 steps of HalfCheetah per iteration."""
    ppo = next(module for module in MODULES if module.__name__.endswith("ppo_clip"))
    assert ppo.parse_args(["--env-id", "HalfCheetah-v5"]).num_steps == 2048
    assert ppo.parse_args(["--env-id=HalfCheetah-v5", "--num-steps", "512"]).num_steps == 512
    assert ppo.parse_args(["--num-steps", "512", "--env_id", "HalfCheetah-v5"]).num_envs == 1


# Video and tracking


def test_video_of_a_trained_agent(finished, tmp_path):
    """`--resume DIR --capture-video` films one evaluation episode, frame by frame, and trains nothing."""
    module, script, original, _ = finished
    pytest.importorskip("moviepy")
    shutil.copytree(original, tmp_path / "run")
    argv = ["--resume", "run", "--capture-video", "--eval-episodes", "1"]
    done = Process(script, argv, tmp_path).wait()
    assert done.rc == 0, done.err
    (video,) = (tmp_path / "run").rglob("*.mp4")
    from moviepy import VideoFileClip

    with VideoFileClip(str(video)) as clip:
        frames, size = clip.n_frames, clip.size
    assert min(size) >= 100
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    if simple_env(module) == "CartPole-v1":  # a frame before each step, and as many steps as reward
        assert abs(frames - result["eval_returns"][0]) <= 2
    assert equal(parameters(tmp_path / "run"), parameters(original))


@each_module
def test_video_at_the_end_of_training(module, tmp_path):
    """--capture-video on a fresh run: one film, and the evaluation still has all its episodes."""
    pytest.importorskip("moviepy")
    result = module.train(arguments(module, tmp_path / "run", capture_video=True))
    assert [path.stat().st_size > 1000 for path in (tmp_path / "run").rglob("*.mp4")] == [True]
    assert len(result["eval_returns"]) == 2


@each_pair
def test_tracking_offline(script, module, tmp_path):
    """--track with WANDB_MODE=offline leaves wandb's own files in the run directory, and the losses are in them."""
    pytest.importorskip("wandb")
    line = flags(dict(env_id=simple_env(module)) | tiny(module, total_timesteps=256, run_dir="run", track=True))
    environ = dict(WANDB_MODE="offline", HOME=str(tmp_path))
    done = Process(script, line, tmp_path, environ).wait()
    assert done.rc == 0, done.err
    (log,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    written = log.read_bytes()
    assert all(name.encode() in written for name in metrics(tmp_path / "run")[-1])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["total_timesteps"] == 256
