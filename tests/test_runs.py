"""Runs from the command line to the last file: contract, determinism, resuming, every environment."""

import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import shutil
import sys
import types
from collections import defaultdict
from pathlib import Path

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MODULES, is_imitation, spy
from gymnasium.spaces import Box, Discrete
from launch import flags, tiny
from runs import (
    acts,
    arguments,
    checkpoint,
    config,
    each,
    each_back,
    each_module,
    each_off_policy,
    each_rewarded,
    equal,
    fails_with_a_bug,
    finished_run,
    is_continuous,
    leaves,
    line,
    metrics,
    name_of,
    parameters,
    result,
    resume,
    run_alone,
    script,
    start,
    steps,
)

RESULT = """algo env_id seed total_timesteps trained_steps eval_returns eval_cut eval_mean train_return sps wall_time"""
LINE = """global_step wall_time episodic_return episodes SPS"""
FILES = {"config.json", "metrics.jsonl", "checkpoint.pt", "result.json", "lock"}
ENVIRONMENTS = ["CartPole-v1", "Pendulum-v1", "LunarLander-v3", "HalfCheetah-v5", "MinAtar/Breakout-v1", "ALE/Pong-v5",
    "Acrobot-v1"]  # fmt: skip

each_compiled = each([module for module in MODULES if hasattr(module.Args, "compile")])


def fingerprint(folder: Path) -> str:
    """A hash of all that a run computed, clocks aside."""
    digest = hashlib.sha256()
    for path, leaf in sorted(leaves(checkpoint(folder)).items()):
        if not any(word in path for word in ("wall_time", "log_size")):  # lines of the log contain times
            digest.update(path.encode() + leaf.contiguous().numpy().tobytes())
    for row in metrics(folder):
        digest.update(json.dumps({key: row[key] for key in sorted(row) if key not in ("wall_time", "SPS")}).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module", params=MODULES, ids=name_of)
def finished(request, tmp_path_factory):
    """A finished run: module, directory, returned result. Tests that change it take a copy."""
    module = request.param
    folder = tmp_path_factory.mktemp(name_of(module)) / "run"
    return module, folder, module.train(arguments(module, folder))


@pytest.fixture
def copy(finished, tmp_path):
    """The finished run's module and a copy of its directory."""
    module, folder, _ = finished
    shutil.copytree(folder, tmp_path / "copy")
    return module, tmp_path / "copy"


# The contract


@pytest.fixture(scope="module", params=MODULES, ids=name_of)
def alone(request, tmp_path_factory):
    """The script copied alone into an empty folder and run there: module, directory, what it said."""
    module = request.param
    argv = line(module, num_envs=4, total_timesteps=1024, seed=3)
    return module, *run_alone(module.__file__, tmp_path_factory.mktemp("alone"), argv)


def test_a_script_runs_alone(alone):
    """Nothing but the script is needed, and all it leaves is one directory with its files."""
    module, run_dir, _ = alone
    assert {path.name for path in run_dir.parents[1].iterdir()} - {"__pycache__"} == {f"{name_of(module)}.py", "runs"}
    assert {path.name for path in run_dir.iterdir()} == FILES
    assert re.fullmatch(rf"{module.Args.env_id}__{name_of(module)}__3__\d+", run_dir.name)


@pytest.mark.parametrize("helper", ["algos", "twins", "conftest"])
def test_a_script_with_a_helper_does_not_run_alone(helper, tmp_path):
    """The package of the scripts, a tool of the repository, a module of these tests: a copied script has none."""
    (tmp_path / "helped.py").write_text(f"import {helper}\n{Path(script('ppo_clip').__file__).read_text()}")
    (tmp_path / "alone").mkdir()
    with pytest.raises(AssertionError, match=f"No module named '{helper}'"):
        run_alone(tmp_path / "helped.py", tmp_path / "alone", [])


def test_config_file(alone):
    """All arguments and the versions of torch and gymnasium; the rest is the harness's business."""
    module, run_dir, _ = alone
    written = config(run_dir)
    assert written.keys() == vars(module.Args()).keys() | {"algo", "torch", "gymnasium"}
    assert (written["env_id"], written["seed"]) == (module.Args.env_id, 3)
    assert is_imitation(module) or written["num_envs"] == 4
    assert (written["torch"], written["gymnasium"]) == (torch.__version__, gym.__version__)


def test_result_file(alone):
    """The keys, and numbers that fit one another."""
    module, run_dir, _ = alone
    written = result(run_dir)
    extras = set() if acts(module) else {"rmse"}
    if name_of(module) in ("a3c", "ddppo", "impala"):
        extras |= {"processes"}
    if is_imitation(module):
        extras |= {"demonstrator_mean"}
    assert written.keys() == set(RESULT.split()) | extras
    assert (written["algo"], written["env_id"], written["seed"]) == (name_of(module), module.Args.env_id, 3)
    assert (written["total_timesteps"], written["trained_steps"], written["eval_cut"]) == (1024, 1024, 0)
    scores = written["eval_returns"]
    assert len(scores) == (2 if acts(module) else 19)  # episodes, or states whose values are known
    assert written["eval_mean"] == pytest.approx(sum(scores) / len(scores))
    assert 0 < written["wall_time"] < 60
    assert written["sps"] == pytest.approx(1024 / written["wall_time"])


def test_train_returns_the_result_file(finished):
    """What train() returns is what result.json holds."""
    assert finished[2] == result(finished[1])


def test_metrics_file(alone):
    """Lines of JSON with the common keys and the losses, finite or null, steps rising to the end of the run."""
    lines = metrics(alone[1])
    assert len(lines) >= 4
    for row in lines:
        assert set(LINE.split()) < row.keys(), "no losses"
        waits = not acts(alone[0]) and "value_loss" not in row  # no episode has ended
        assert waits or row.keys() == lines[-1].keys()
        assert all(value is None or math.isfinite(value) for value in row.values())
        assert (row["episodic_return"] is None) == (row["episodes"] == 0)
    for key in ("global_step", "wall_time"):
        assert all(a[key] < b[key] for a, b in zip(lines, lines[1:])), key
    assert lines[-1]["global_step"] == 1024
    assert [name for name in lines[-1] if "loss" in name]


def test_train_return_is_the_mean_of_the_last_100_episodes(alone):
    """Taken together, the lines' mean returns and counts of episodes give train_return."""
    lines = [row for row in metrics(alone[1]) if row["episodes"]]
    episodes = sum(row["episodes"] for row in lines)
    assert 0 < episodes <= 100, "this run is meant to be shorter"
    total = sum(row["episodes"] * row["episodic_return"] for row in lines)
    assert result(alone[1])["train_return"] == pytest.approx(total / episodes)


def test_the_last_100_episodes(tmp_path):
    """train_return of all episodes, or of those since the last line: here 150 have ended, with the returns 0 to 149."""
    module = script("ppo_clip")
    run = module.Run(arguments(module, tmp_path / "run"))
    for first in (0, 60, 120):
        run.episode_returns += range(first, min(first + 60, 150))
        run.log(first + 60, {})
    assert run.last_returns == list(range(50, 150))
    assert [row["episodes"] for row in metrics(tmp_path / "run")] == [60, 60, 30]
    assert [row["episodic_return"] for row in metrics(tmp_path / "run")] == [29.5, 89.5, 134.5]


@each_module
def test_no_train_return_without_an_episode(module, tmp_path):
    """0, which would be the best score of all where rewards are costs."""
    env_id = "Pendulum-v1" if is_continuous(module) else "MountainCar-v0"
    settings = dict(env_id=env_id, total_timesteps=64, horizon=16, play_every=1000, eval_episodes=1)
    assert module.train(arguments(module, tmp_path / "run", **settings))["train_return"] is None


@each_module
def test_a_run_ends_with_its_last_whole_batch(module, tmp_path):
    """301 steps are no whole number of batches of 32, nor of steps of 2 environments: what is reported was trained."""
    written = module.train(arguments(module, tmp_path / "run", total_timesteps=301))
    last = 288 if hasattr(module.Args, "num_steps") or is_imitation(module) else 300
    assert (written["total_timesteps"], written["trained_steps"]) == (301, last)
    assert steps(tmp_path / "run")[-1] == checkpoint(tmp_path / "run")["step"] == last
    assert written["sps"] == pytest.approx(last / written["wall_time"])


def test_checkpoint_file(alone):
    """Plain data (weights_only), with the step; one float tensor per parameter at least."""
    assert checkpoint(alone[1])["step"] == 1024
    assert len(parameters(alone[1])) >= 6


def test_what_is_printed_without_a_terminal(alone):
    """Which defaults were taken, where the run is, now and then a plain line, no bar; at last the evaluation."""
    module, run_dir, printed = alone
    lines = printed.splitlines()
    assert "\r" not in printed
    assert len(lines) <= 6
    family = module.find_family(module.Args.env_id, "") or f"{module.Args.env_id} and all of no family"
    assert lines[0] == f"{module.Args.env_id} with the defaults for {family}"
    assert lines[1] == f"runs/{run_dir.name}: step 0 of 1024"
    returns = result(run_dir)["eval_returns"]
    assert lines[-1] == f"runs/{run_dir.name}: evaluation {np.mean(returns):.2f} +- {np.std(returns):.2f}"


@each_back
def test_the_directory_is_printed_before_the_first_step(module, tmp_path, monkeypatch, capsys):
    """A user who kills a run that was slow or wrong from the start and does not know what to resume or delete."""
    printed = []
    spy(monkeypatch, module, "gradients_of", before=lambda *_: capsys.readouterr())
    spy(monkeypatch, module.Agent, "act", before=lambda *_: printed.append(capsys.readouterr().out))
    module.train(arguments(module, tmp_path / "run"))
    assert printed[0] == f"{tmp_path / 'run'}: step 0 of 256\n"
    resume(module, tmp_path / "run", "--total-timesteps", 512)
    assert f"{tmp_path / 'run'}: step 256 of 512\n" in "".join(printed)


@each_back
def test_the_default_directory_has_no_colon_in_its_name(module, tmp_path, monkeypatch):
    """module:Env-v0 in a name is a drive to Windows, and a host to scp."""
    monkeypatch.chdir(tmp_path)
    env_id = f"envs:test/{'TaggedBox' if is_continuous(module) else 'Tagged'}-v0"
    monkeypatch.setattr(envs.Tagged, "instances", [])
    module.train(arguments(module, "", env_id=env_id))
    (run_dir,) = Path("runs").iterdir()
    assert re.fullmatch(rf"{re.sub('[:/]', '-', env_id)}__{name_of(module)}__1__\d+", run_dir.name)


@each_back
def test_progress_bar_on_a_terminal(module, tmp_path):
    """On a terminal one line is redrawn: carriage returns, and few line feeds."""
    pty = pytest.importorskip("pty")
    termios = pytest.importorskip("termios")
    if not hasattr(termios, "tcsetwinsize"):
        pytest.skip("Python 3.11 and later")
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    given = line(module, total_timesteps=2048, run_dir="run")
    process = start(module, tmp_path, *given, terminal=os.ttyname(follower)).wait()
    printed = os.read(leader, 10**5)
    os.close(leader)
    os.close(follower)
    assert process.rc == 0, printed
    assert re.search(rb"\r[^\n]*\d+/2048", printed), printed
    assert printed.count(b"\n") <= 4, printed


# Clocks


class Clock:
    """The module time, in which only steps of environments take time: a second each."""

    def __init__(self, module, monkeypatch):
        self.now = 1e6
        make_envs = module.make_envs

        def watched(*inputs, **options):
            made = make_envs(*inputs, **options)
            spy(monkeypatch, made, "step", before=self.tick)
            return made

        monkeypatch.setattr(module, "make_envs", watched)
        clock = types.SimpleNamespace(perf_counter=lambda: self.now, time=lambda: 17, time_ns=lambda: 17)
        monkeypatch.setattr(module, "time", clock)

    def tick(self, *_):
        self.now += 1


@each_rewarded
def test_steps_per_second(module, tmp_path, monkeypatch):
    """A speed that counts one environment's steps, the evaluation's time or, after --resume, the time before twice."""
    clock = Clock(module, monkeypatch)
    settings = dict(num_envs=4, num_steps=8, total_timesteps=256, horizon=8)
    first = module.train(arguments(module, tmp_path / "run", **settings))
    clock.now += 1000
    again = resume(module, tmp_path / "run", "--total-timesteps", 512)
    assert (first["sps"], first["wall_time"]) == (4, 64)
    assert (again["sps"], again["wall_time"]) == (4, 128)
    assert {row["SPS"] for row in metrics(tmp_path / "run")} == {4}
    assert all(row["wall_time"] == row["global_step"] / 4 for row in metrics(tmp_path / "run"))


@each_back
def test_a_plain_line_every_ten_seconds(module, tmp_path, monkeypatch, capsys):
    """Without a terminal: a line at each log, which would fill the file, or none, by which a slow run looks dead."""
    Clock(module, monkeypatch)
    module.train(arguments(module, tmp_path / "run", total_timesteps=320, log_every=8, num_steps=4))
    printed = capsys.readouterr().out
    lines = re.findall(r"^(\d+) of 320 steps, (\d+) steps/s, (?:return [-.\d]+|no episode has ended)$", printed, re.M)
    assert lines == [(str(step), "2") for step in range(24, 320, 24)]


@each_back
def test_a_run_goes_on_though_nobody_reads(module, tmp_path, monkeypatch):
    """`| head` or a terminal that is closed: what cannot be printed must not cost what was learned."""
    unread = []

    def broken(text, **options):
        if "steps/s" in text:
            unread.append(text)
            raise BrokenPipeError
        print(text, **options)

    Clock(module, monkeypatch)
    monkeypatch.setattr(module, "print", broken, raising=False)
    module.train(arguments(module, tmp_path / "run", total_timesteps=320, log_every=8, num_steps=4))
    assert len(unread) > 5
    assert result(tmp_path / "run")["trained_steps"] == 320


@each_off_policy
def test_the_bar_moves_with_each_step(module, tmp_path, monkeypatch):
    """Slow environments, a step a second: a bar that moves at lines of the log alone, or that counts steps twice."""
    seen = []
    runs = []
    monkeypatch.setattr(module.os, "isatty", lambda _: True)
    spy(monkeypatch, module.Run, "__init__", after=lambda _, run, *__: runs.append(run))
    spy(monkeypatch, module.ReplayBuffer, "add", before=lambda *_: seen.append(runs[-1].bar.n))
    module.train(arguments(module, tmp_path / "run"))
    assert seen == list(range(0, 256, 2))
    assert runs[-1].bar.n == 256
    resume(module, tmp_path / "run", "--total-timesteps", 320)
    assert seen[128:] == list(range(256, 320, 2))


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


@each_back
def test_process_and_function_agree(module, tmp_path):
    """The command line computes, bit for bit, what train() computes."""
    done = start(module, tmp_path, *line(module, run_dir="run")).wait()
    assert done.rc == 0, done.err
    assert fingerprint(tmp_path / "run") == fingerprint(finished_run(module, tmp_path / "finished"))


def test_two_resumes_are_bit_identical(finished, tmp_path):
    """Two continuations of one checkpoint go the same way, and it is not the way back to the start."""
    module, folder, _ = finished
    for name in ("one", "two"):
        shutil.copytree(folder, tmp_path / name)
        resume(module, tmp_path / name, "--total-timesteps", 512)
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    assert fingerprint(tmp_path / "one") != fingerprint(folder)


@each_back
def test_random_numbers_of_a_resumed_run(module, tmp_path, monkeypatch):
    """Numbers drawn a second time: those of the start of the run, or those of an earlier continuation."""
    states = []
    spy(monkeypatch, module.Run, "__init__", after=lambda *_: states.append(torch.get_rng_state().numpy().tobytes()))
    module.train(arguments(module, tmp_path / "run"))
    resume(module, tmp_path / "run", "--total-timesteps", 512)
    resume(module, tmp_path / "run", "--total-timesteps", 768)
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


class Paid(Dice):
    """Every step is paid the same, as the arguments say, and takes a second of no clock."""

    def __init__(self, continuous=False, pay=1.0, length=8):
        super().__init__(continuous)
        self.pay = pay
        self.length = length

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        self.left = self.length
        return obs, info

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, self.pay, terminated, truncated, info


for _env in (Dice, Paid):
    gym.register(f"test/{_env.__name__}-v0", _env)
    gym.register(f"test/{_env.__name__}Box-v0", _env, kwargs=dict(continuous=True))


def environment(module, name: str) -> str:
    """The id of an environment of this module with actions for the script."""
    return f"test/{name}{'Box' if is_continuous(module) else ''}-v0"


@each_module
def test_the_evaluation_is_deterministic(module, tmp_path):
    """Eight environments with seeds of their own; evaluated again, with other random numbers, the returns are equal."""
    folder = tmp_path / "run"
    settings = dict(env_id=environment(module, "Dice"), eval_episodes=8)
    returns = module.train(arguments(module, folder, **settings))["eval_returns"]
    assert len(set(returns)) == 8
    assert resume(module, folder)["eval_returns"] == returns


@each_rewarded
def test_environments_share_no_seed(module, tmp_path, monkeypatch):
    """Start states that two runs share, training and evaluation, or a run and its continuation."""
    seeds = []
    make_envs = module.make_envs

    def watched(*inputs, **options):
        made = make_envs(*inputs, **options)
        reset = made.reset

        def watched_reset(seed=None, **options):
            if seed is not None:
                seeds.append(range(seed, seed + made.num_envs))  # environment i takes seed + i
            return reset(seed=seed, **options)

        made.reset = watched_reset
        return made

    monkeypatch.setattr(module, "make_envs", watched)
    for name, seed in dict(one=1, two=2).items():
        settings = dict(seed=seed, num_envs=3, num_steps=24, total_timesteps=144)
        if not acts(module):
            settings["env_id"] = "CartPole-v1"  # for values that are not known, so that the evaluation plays
        module.train(arguments(module, tmp_path / name, **settings))
    resume(module, tmp_path / "one", "--total-timesteps", 288)
    *others, again = seeds  # training and evaluation of three runs
    assert len(others) == 5
    assert again == others[1]
    assert len(set().union(*others)) == sum(map(len, others))


# What a run is made of


class Ready(BaseException):
    """What ends a run before its first step."""


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """A function that runs train() with some settings up to its first step and returns its local variables then."""

    def up_to_the_run(module, **settings):
        found = {}

        def stop(args, **parts):
            found.update(sys._getframe(1).f_locals)
            found["parts"] = parts
            raise Ready

        stop.stop_signal = 0  # demonstrations are watched before the run begins
        name = next(name for name in ("SharedRun", "RemoteRun", "Run") if hasattr(module, name))
        monkeypatch.setattr(module, name, stop)
        with pytest.raises(Ready):
            module.train(arguments(module, tmp_path / "run", **settings))
        return found

    return up_to_the_run


@each_module
def test_weights_follow_the_seed(module, prepare):
    """The same initial weights whatever --seed says, or others at each run."""
    one, again, two = (prepare(module, seed=seed)["agent"].state_dict() for seed in (1, 1, 2))
    assert equal(one, again)
    assert not equal(one, two)


@each_module
def test_all_parts_are_saved(module, prepare):
    """A target network or an optimizer that a resumed run begins anew: train() has made it, but Run does not get it."""
    found = prepare(module)
    made = [name for name, value in found.items() if isinstance(value, torch.nn.Module | torch.optim.Optimizer)]
    made = [name for name in made if name != "old_agent"]  # it becomes a copy of the agent in each iteration
    assert {"agent"} < set(made)
    assert {name: id(found[name]) for name in made} == {name: id(part) for name, part in found["parts"].items()}


@each_module
def test_threads(module, prepare, monkeypatch):
    """--torch-threads without effect, or 0 that is not what PyTorch finds, one per core that the process may use."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    prepare(module, torch_threads=3)
    prepare(module, torch_threads=0)
    assert asked == [3, torch.get_num_threads()]


@each_off_policy
def test_sizes_of_buffer_and_batch(module, tmp_path, prepare, monkeypatch):
    """A buffer as large for each environment as for all of them, or batches of another size than asked for."""
    assert prepare(module, num_envs=3, buffer_size=600)["buffer"].valid.shape == (200 + 1, 3)
    monkeypatch.undo()
    sizes = []
    spy(monkeypatch, module, "critic_loss", before=lambda *inputs: sizes.append(len(inputs[2]["rewards"])))
    module.train(arguments(module, tmp_path / "run", batch_size=11))
    assert set(sizes) == {11}


@each_compiled
def test_compile_is_a_flag(module, prepare, monkeypatch, tmp_path):
    """--compile without effect, or a run compiled that did not ask for it."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: asked.append(function) or function)

    def start_training(compile):
        if hasattr(module, "work") or hasattr(module, "learn"):  # workers make their gradients after the start
            module.train(arguments(module, tmp_path / f"compile {compile}", compile=compile))
        else:
            prepare(module, compile=compile)

    start_training(compile=False)
    assert asked == []
    start_training(compile=True)
    assert set(asked) - {torch.neg}  # by which can_compile() tries the compiler


def gradient_steps(module, family: dict) -> int:
    """How many gradient steps a run with these defaults takes."""
    given = {name: getattr(module.Args, name) for name in vars(module.Args())} | family
    if "train_frequency" in given:
        return (given["total_timesteps"] - given["learning_starts"]) // given["train_frequency"]
    if "horizon" in given:
        return 0  # one an episode
    if is_imitation(module):
        return given["total_timesteps"] // given["batch_size"]
    batches = given["total_timesteps"] // (given["num_envs"] * given.get("num_steps", 1))
    return batches * given.get("update_epochs", 1) * given.get("num_minibatches", 1)


@each_compiled
def test_long_runs_are_compiled(module):
    """A family of many gradient steps that is not compiled, or one of few that is.

    With images nothing is gained, unless distributions of returns are learned on small ones.
    """
    for name, family in module.FAMILIES.items():
        compiled = family.get("compile", module.Args.compile)
        if name == "MinAtar/" and module.__name__.split(".")[-1] in ("c51", "qr_dqn", "rainbow"):
            assert compiled
        elif name.endswith("/") or gradient_steps(module, family) < 10_000:
            assert not compiled, name
        elif gradient_steps(module, family) > 25_000:
            assert compiled, name


@each_module
def test_log_shows_the_mean_of_all_gradient_steps(module, tmp_path, monkeypatch):
    """Metrics of the last minibatch alone, or of other steps than those since the last line (here, fewer than 100)."""
    outputs = [defaultdict(list)]
    gradients_of = module.gradients_of

    def watched(*inputs, **options):
        function = gradients_of(*inputs, **options)

        def remembered(*batch):
            gradients, seen = function(*batch)
            for name, metric in seen.items():
                outputs[-1][name].append(metric.mean().item())
            return gradients, seen

        return remembered

    monkeypatch.setattr(module, "gradients_of", watched)
    spy(monkeypatch, module.Run, "log", after=lambda *_: outputs.append(defaultdict(list)))
    module.train(arguments(module, tmp_path / "run"))
    compared = 0
    for row, output in zip(metrics(tmp_path / "run"), outputs):
        for name, values in output.items():
            assert row[name] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-6)
            compared += 1
    assert compared


# Resuming


def test_resuming_a_finished_run_only_evaluates(copy, finished):
    """No step of training: same tensors, same log, same evaluation."""
    module, folder = copy
    again = resume(module, folder)
    assert equal(parameters(folder), parameters(finished[1]))
    assert (folder / "metrics.jsonl").read_bytes() == (finished[1] / "metrics.jsonl").read_bytes()
    assert again == finished[2]
    assert again == result(folder)


def test_resuming_twice_works(copy, finished):
    """A resumed run can be resumed: its config.json is still one of a run."""
    module, folder = copy
    resume(module, folder)
    assert resume(module, folder)["eval_returns"] == finished[2]["eval_returns"]


def test_resuming_keeps_the_arguments(finished):
    """--resume alone takes the run's own arguments, not the defaults; a flag beside it counts more."""
    module, folder, _ = finished
    original = arguments(module, folder, eval_episodes=3, seed=5)
    (folder / "config.json").rename(folder / "kept")
    (folder / "config.json").write_text(json.dumps(vars(original)))
    try:
        again = module.parse_args(["--resume", str(folder)])
        assert vars(again) == vars(original) | dict(resume=str(folder))
        assert module.parse_args(["--resume", str(folder), "--eval-episodes", "7"]).eval_episodes == 7
    finally:
        (folder / "kept").rename(folder / "config.json")


def test_resuming_with_more_steps_trains_on(copy, finished, capsys):
    """A larger --total-timesteps continues where the run stood, says so, and all files tell of the longer run."""
    module, folder = copy
    before = metrics(folder)
    unfinished = []
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, module.Run, "log", before=lambda *_: unfinished.append(not (folder / "result.json").exists()))
        again = resume(module, folder, "--total-timesteps", 512)
    assert unfinished
    assert all(unfinished), "what is there is the result of the shorter run"
    assert (again["total_timesteps"], again["trained_steps"]) == (512, 512)
    assert again == result(folder)
    assert config(folder)["total_timesteps"] == checkpoint(folder)["args"]["total_timesteps"] == 512
    assert "planned for 256 steps, now for 512: schedules, if any, are" in capsys.readouterr().out
    assert metrics(folder)[: len(before)] == before
    assert_schedule(module, steps(folder), 512)
    assert not equal(parameters(folder), parameters(finished[1]))
    assert checkpoint(folder)["step"] == 512
    times = [row["wall_time"] for row in metrics(folder)]
    assert times == sorted(times), "the clock goes on, too"
    assert resume(module, folder) == again
    assert "planned for" not in capsys.readouterr().out


def assert_schedule(module, taken: list[int], end: int) -> None:
    """Equal iterations up to `end` or, where an iteration is whole episodes, rising steps that meet `end`."""
    if hasattr(module.Args, "horizon"):
        assert taken == sorted(set(taken))
        assert taken[-1] == end
    else:
        assert taken == list(range(taken[0], end // taken[0] * taken[0] + 1, taken[0]))


def cut(monkeypatch, module, end: int, folder: Path, **settings) -> None:
    """A run that dies right after the first line of its log at `end` or later."""

    def die(_, run, step, *rest):
        if step >= end:
            raise Ready

    with monkeypatch.context() as patch:
        spy(patch, module.Run, "log", after=die)
        with pytest.raises(Ready):
            module.train(arguments(module, folder, **settings))


@each_module
def test_a_broken_run_goes_on_from_its_checkpoint(module, tmp_path, monkeypatch):
    """Lines of the log lost, doubled or torn: after the checkpoint at 128 came a line and a half before the kill."""
    folder = tmp_path / "run"
    cut(monkeypatch, module, 192, folder, checkpoint_every=128)
    saved = checkpoint(folder)["step"]
    assert 128 <= saved < steps(folder)[-1] < 256
    kept = [row for row in metrics(folder) if row["global_step"] <= saved]
    with open(folder / "metrics.jsonl", "a") as log:
        log.write(json.dumps(kept[-1])[:40])
    assert resume(module, folder)["trained_steps"] == 256
    assert metrics(folder)[: len(kept)] == kept
    assert_schedule(module, steps(folder), 256)
    assert not (folder / "checkpoint.tmp").exists()


@each_module
def test_the_checkpoint_holds_all_that_learns(module, tmp_path, monkeypatch):
    """Every tensor of the networks, normalisers and optimisers of the run is in its checkpoint."""
    parts = {}
    spy(monkeypatch, module.Run, "save", after=lambda _, run: parts.update(run.parts))
    module.train(arguments(module, tmp_path / "run"))
    saved = checkpoint(tmp_path / "run")
    for name, part in parts.items():
        assert equal(leaves(saved[name]), leaves(part.state_dict())), name
    assert {"agent"} < parts.keys()


@each([module for module in MODULES if hasattr(module.Args, "anneal_lr") and not hasattr(module.Args, "log_every")])
def test_schedules_go_on_in_a_resumed_run(module, tmp_path, monkeypatch):
    """A step size that begins anew: the run is cut after 128 of 256 steps. Here each gradient step has a line."""
    rates = []
    spy(monkeypatch, module, "descend", before=lambda optimizer, _: rates.append(optimizer.param_groups[0]["lr"]))
    cut(monkeypatch, module, 128, tmp_path / "run", checkpoint_every=64, anneal_lr=True, learning_rate=0.01, horizon=16)
    last = rates[-1]
    resume(module, tmp_path / "run")
    starts = [0, *steps(tmp_path / "run")[:-1]]
    assert list(dict.fromkeys(rates)) == pytest.approx([0.01 * (1 - step / 256) for step in starts])
    assert last > rates[-1]


@each([module for module in MODULES if hasattr(module.Args, "log_every")])
def test_the_log_goes_on_when_steps_come_in_other_numbers(module, tmp_path):
    """The steps of a resumed run are no multiples of the new number of environments or batch size: no line ever."""
    flag = "batch-size" if is_imitation(module) else "num-envs"
    folder = tmp_path / "run"
    module.train(module.parse_args(line(module, f"--{flag}", 4, run_dir=folder)))
    resume(module, folder, f"--{flag}", 3, "--total-timesteps", 1000)
    taken = [step for step in steps(folder) if step > 256]
    assert len(taken) == pytest.approx((1000 - 256) / 64, abs=2)
    assert max(b - a for a, b in zip(taken, taken[1:])) <= 64 + 3


@each([module for module in MODULES if acts(module) and not is_imitation(module)])
def test_episodes_of_a_long_run_that_is_resumed(module, tmp_path, monkeypatch):
    """Half a million lines of the log later, those of the evaluation or of the next seed: each run has its own."""
    folder = finished_run(module, tmp_path / "run")
    saved = checkpoint(folder)
    saved["step"] = 3_000_000 * steps(folder)[0]
    saved["args"]["total_timesteps"] = saved["step"] + 256
    torch.save(saved, folder / "checkpoint.pt")
    seeds = []
    make_envs = module.make_envs

    def make(*args, **kwargs):
        envs = make_envs(*args, **kwargs)
        reset = envs.reset
        envs.reset = lambda seed=None, **rest: (seeds.append(seed), reset(seed=seed, **rest))[1]
        return envs

    monkeypatch.setattr(module, "make_envs", make)
    resume(module, folder, "--total-timesteps", saved["step"] + 256)
    assert 1_000_000 <= seeds[0] < 1_500_000 <= seeds[-1] < 2_000_000
    first = {module.train_seed(1, step) for step in range(1024)}
    later = {module.train_seed(1, 100_000 * i) for i in range(1, 200)}
    assert not first & later, "at a round number of steps the first episodes come again"


@each_module
def test_a_new_learning_rate_counts_in_a_resumed_run(module, tmp_path, monkeypatch):
    """The step size of the checkpoint's optimizer in place of the one on the command line."""
    folder = finished_run(module, tmp_path / "run")
    rates = set()
    spy(monkeypatch, module, "descend", before=lambda optimizer, _: rates.add(optimizer.param_groups[0]["lr"]))
    plain = [] if not hasattr(module.Args, "anneal_lr") else ["--no-anneal-lr"]
    resume(module, folder, "--total-timesteps", 512, "--learning-rate", 0.0123, *plain)
    assert rates == {0.0123}
    assert config(folder)["learning_rate"] == checkpoint(folder)["args"]["learning_rate"] == 0.0123


@each_module
def test_when_checkpoints_are_written(module, tmp_path, monkeypatch):
    """At every iteration, or only if one ends exactly at a multiple of --checkpoint-every, or not at the end."""
    saved = []
    spy(monkeypatch, module.Run, "save", after=lambda _, run: saved.append(run.step))
    module.train(arguments(module, tmp_path / "run", checkpoint_every=100, log_every=48))
    taken = steps(tmp_path / "run")
    assert saved == [b for a, b in zip([0, *taken], taken) if a // 100 < b // 100] + taken[-1:]
    assert len(saved) == 3


# The evaluation


@each_back
def test_an_evaluation_without_end_is_cut(module, tmp_path, monkeypatch, capsys):
    """A policy that keeps an episode going for ever, in an environment that does not mind: result and line say so."""
    default = inspect.signature(module.evaluate).parameters["max_steps"].default
    assert default == 27_000, "Atari's own limit: 108,000 frames, of which each fourth is a step"
    monkeypatch.setattr(module, "evaluate", functools.partial(module.evaluate, max_steps=50))
    kwargs = json.dumps(dict(length=10**9))
    written = module.train(arguments(module, tmp_path / "run", env_id=environment(module, "Paid"), env_kwargs=kwargs))
    assert (written["eval_returns"], written["eval_cut"]) == ([50, 50], 2)
    assert result(tmp_path / "run")["eval_cut"] == 2
    assert capsys.readouterr().out.splitlines()[-1].endswith("evaluation 50.00 +- 0.00, 2 of 2 episodes cut")


@each_back
def test_only_what_did_not_end_is_cut(module, tmp_path, capsys):
    """An episode that ends with the last step allowed, or one of those that have ended, counted as cut."""
    args = arguments(module, tmp_path, env_id=environment(module, "Paid"), eval_episodes=3)
    envs = module.make_envs(args.env_id, 1)
    space = envs.single_action_space
    agent = torch.nn.Module()
    agent.act = lambda obs, greedy: np.zeros((len(obs), *space.shape), space.dtype)
    for max_steps, cut_short in ((7, 3), (8, 0), (9, 0)):
        written = module.evaluate(agent, args, tmp_path, max_steps=max_steps)
        assert written == dict(eval_returns=[min(max_steps, 8)] * 3, eval_cut=cut_short)


# Arguments of the environment


@each_module
def test_arguments_of_the_environment_reach_it(module, tmp_path):
    """--env-kwargs that training, evaluation or a resumed run does not know of: 5 steps at 2.5 instead of 8 at 1."""
    given = dict(env_id=environment(module, "Paid"), env_kwargs='{"pay": 2.5, "length": 5}')
    first = module.train(arguments(module, tmp_path / "run", **given))
    assert first["train_return"] == 12.5
    if acts(module):
        assert first["eval_returns"] == [12.5, 12.5]
    assert config(tmp_path / "run")["env_kwargs"] == given["env_kwargs"]
    again = resume(module, tmp_path / "run", "--total-timesteps", 512)
    assert again["train_return"] == 12.5
    if acts(module):
        assert again["eval_returns"] == [12.5, 12.5]


@each_back
def test_the_limit_of_an_episode_is_an_argument(module, tmp_path):
    """The example of --help, for an environment with a vector implementation of its own and for one without."""
    module.train(arguments(module, tmp_path / "run", env_kwargs='{"max_episode_steps": 3}'))
    assert sum(row["episodes"] for row in metrics(tmp_path / "run")) == 256 // 4, "three steps and the reset"


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

    name = "evaluate" if acts(module) else "evaluate_values"
    evaluate = getattr(module, name)

    def watched_evaluate(agent, *args, **kwargs):
        before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
        returns = evaluate(agent, *args, **kwargs)
        assert equal(before, agent.state_dict()), "the evaluation changed the agent"
        return returns

    family = module.parse_args(["--env-id", env_id])
    episodes = 1 if env_id.startswith(("ALE", "Half")) else 2
    settings = tiny(module, total_timesteps=128, horizon=32, run_dir=tmp_path / "run", eval_episodes=episodes)
    if env_id.startswith("ALE"):
        settings["env_kwargs"] = '{"max_num_frames_per_episode": 400}'
    args = module.parse_args(["--env-id", env_id, *flags(settings)])
    untouched = {name: value for name, value in vars(family).items() if name not in settings}
    assert untouched.items() <= vars(args).items(), "a flag changed what it does not name"
    monkeypatch.setattr(module, "Agent", Watched)
    monkeypatch.setattr(module, name, watched_evaluate)
    try:
        written = module.train(args)
    except module.Refusal as error:
        if not re.search(r"action space .* is not supported", str(error)):
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
    assert len(written["eval_returns"]) == episodes
    assert all(map(math.isfinite, written["eval_returns"]))
    assert written["env_id"] == env_id
    if not env_id.startswith("ALE"):  # MinAtar has images, too, and nothing that takes as long to start
        again = resume(module, tmp_path / "run")
        assert again["eval_returns"] == written["eval_returns"]
    assert [str(w.message) for w in recwarn if w.category is UserWarning] == [], "warnings to the user"


@each_module
def test_some_environment_is_supported(module):
    """The skips of the smoke test are not all there is: CartPole or Pendulum runs in every script."""
    module.make_envs(module.Args.env_id, 1).close()


# Families


@each_module
def test_family_defaults_are_shown_and_overridden(module, capsys):
    """--help shows the defaults of the environment named beside it, and a flag overrides them."""
    plain = vars(module.parse_args([]))
    seen = []
    for env_id in ENVIRONMENTS:
        family = vars(module.parse_args(["--env-id", env_id]))
        changed = {name for name in plain if plain[name] != family[name]} - {"env_id"}
        if env_id == module.Args.env_id:
            assert not changed, "Args' own defaults are those of its environment"
        others = family | dict(env_id="")
        if others in seen:
            continue
        seen.append(others)
        with pytest.raises(SystemExit, match=r"^0$"):
            module.parse_args(["--help", "--env-id", env_id])
        shown = " ".join(re.sub(r"[│|\s]+", " ", capsys.readouterr().out).split())
        assert "Shown are the defaults for" in shown
        for name in changed:
            flag = name.replace("_", "-")
            assert re.search(rf"--{flag}\b[^()]*(\([^d][^()]*\)[^()]*)*\(default: {family[name]}\)", shown), name
        own = module.parse_args(["--env-id", env_id, *flags({name: plain[name] for name in changed})])
        assert vars(own) == plain | dict(env_id=env_id)
    assert len(seen) > 1


def test_help_names_the_family_of_halfcheetah():
    """The example in numbers: PPO collects 2048 steps of HalfCheetah per iteration."""
    ppo = script("ppo_clip")
    assert ppo.parse_args(["--env-id", "HalfCheetah-v5"]).num_steps == 2048
    assert ppo.parse_args(["--env-id=HalfCheetah-v5", "--num-steps", "512"]).num_steps == 512
    assert ppo.parse_args(["--num-steps", "512", "--env_id", "HalfCheetah-v5"]).num_envs == 1


FAMILY_OF = {  # by environment: the first word of the family of ppo_clip.py that it belongs to
    "CartPole-v1": "",
    "Pendulum-v1": "Pendulum",
    "Acrobot-v1": "Acrobot",
    "MountainCar-v0": "Acrobot",
    "LunarLander-v3": "LunarLander",
    "BipedalWalkerHardcore-v3": "LunarLander",
    "Ant-v5": "HalfCheetah",
    "Ant-v4": "HalfCheetah",
    "InvertedPendulum-v5": "HalfCheetah",
    "MinAtar/Breakout-v1": "MinAtar/",
    "ALE/Breakout-v5": "ALE/",
    "Taxi-v4": "Discrete-states",
    "MountainCarContinuous-v0": "Box-actions",
    "my:AntiAging-v0": "",
    "my:PendulumWithALE-v0": "",
    "my:MinAtar-v0": "",
    "my:Numbered-v0": "Discrete-states",
    "my:Boxed-v0": "Box-actions",
    "my:None/Ant-v0": "HalfCheetah",
}


@pytest.fixture
def my_module(monkeypatch):
    """A module `my` with environments whose names have other environments' names in them."""
    monkeypatch.setitem(sys.modules, "my", types.ModuleType("my"))
    made = [
        ("AntiAging-v0", envs.ValueOnly), ("PendulumWithALE-v0", envs.ValueOnly), 
        ("MinAtar-v0", envs.ValueOnly), ("Numbered-v0", envs.Numbers), ("Boxed-v0", envs.Bounds),
        ("None/Ant-v0", envs.ValueOnly),
    ]  # fmt: skip
    for env_id, env in made:
        gym.register(env_id, env, disable_env_checker=True, order_enforce=False)
    yield
    for env_id, _ in made:
        gym.registry.pop(env_id)


@each([script("ppo_clip")])
def test_the_family_of_an_environment(module, my_module):
    """Parts of names that count ("Ant" in my:AntiAging-v0), namespaces, and kinds of spaces."""
    for env_id, word in FAMILY_OF.items():
        assert module.find_family(env_id, "").split()[:1] == word.split(), env_id


@each([script("ppo_clip")])
def test_the_line_that_says_which_defaults_were_taken(module, tmp_path, capsys):
    """A run whose user does not know that it has other defaults than the last one."""
    folder = finished_run(module, tmp_path / "run")
    capsys.readouterr()
    for argv, source in (
        (["--env-id", "CartPole-v1"], "CartPole-v1 with the defaults for .*no .*family"),
        (["--env-id", "Acrobot-v1"], "Acrobot-v1 with the defaults for Acrobot MountainCar"),
        (["--env-id", "Taxi-v4"], "Taxi-v4 with the defaults for Discrete-states"),
        (["--resume", str(folder)], f"CartPole-v1 with the arguments of {folder}"),
    ):
        module.parse_args(argv)
        assert re.fullmatch(f"{source}\n", capsys.readouterr().out)


# Video and tracking


@each_back
def test_video_of_a_trained_agent(module, tmp_path):
    """`--resume DIR --capture-video` films one evaluation episode, frame by frame, and trains nothing."""
    pytest.importorskip("moviepy")
    folder = finished_run(module, tmp_path / "run")
    before = parameters(folder)
    returns = result(folder)["eval_returns"]
    done = start(module, tmp_path, "--resume", "run", "--run-dir", config(folder)["run_dir"], "--capture-video").wait()
    assert done.rc == 0, done.err
    (video,) = folder.rglob("*.mp4")
    from moviepy import VideoFileClip

    with VideoFileClip(str(video)) as clip:
        frames = clip.n_frames
        size = clip.size
    assert min(size) >= 100
    assert result(folder)["eval_returns"] == returns
    steps_of_the_episode = result(folder)["eval_returns"][0] if module.Args.env_id == "CartPole-v1" else 200
    assert abs(frames - steps_of_the_episode) <= 2
    assert equal(parameters(folder), before)


class Filmed(Dice):
    """Its pictures have the step and the length of the episode, which is also its return, as their colours."""

    metadata = dict(render_modes=["rgb_array"], render_fps=10)  # noqa: RUF012

    def __init__(self, continuous=False, render_mode=None, length=0):
        super().__init__(continuous)
        self.render_mode = render_mode
        self.given = length

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        self.length = self.left = self.given or int(self.np_random.integers(2, 20))
        return obs, info

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, 1.0, terminated, truncated, info

    def render(self):
        return np.full((8, 8, 3), [(self.length - self.left) % 256, self.length % 256, 0], np.uint8)


gym.register("test/Filmed-v0", Filmed)
gym.register("test/FilmedBox-v0", Filmed, kwargs=dict(continuous=True))


@each_back
def test_the_film_is_of_the_first_episode_of_the_evaluation(module, tmp_path, monkeypatch):
    """Frames of other episodes, of the time after the end, or of an environment that was not evaluated."""
    films = []
    video = importlib.import_module("gymnasium.utils.save_video")
    monkeypatch.setattr(video, "save_video", lambda frames, folder, *_, **options: films.append((frames, folder)))
    settings = dict(env_id=environment(module, "Filmed"), eval_episodes=5, capture_video=True)
    written = module.train(arguments(module, tmp_path / "run", **settings))
    ((frames, folder),) = films
    length = int(written["eval_returns"][0])
    assert length < max(written["eval_returns"]), "this one is meant to be shorter"
    assert [tuple(frame[0, 0]) for frame in frames] == [(t, length, 0) for t in range(length)]
    assert folder == str(tmp_path / "run")


@each_back
def test_a_film_has_an_end(module, tmp_path, monkeypatch):
    """The pictures of 27,000 steps may not fit into the memory; the score is of the whole episode all the same."""
    films = []
    video = importlib.import_module("gymnasium.utils.save_video")
    monkeypatch.setattr(video, "save_video", lambda frames, *_, **options: films.append(len(frames)))
    monkeypatch.setattr(module, "evaluate", functools.partial(module.evaluate, max_steps=3010))
    settings = dict(env_id=environment(module, "Filmed"), eval_episodes=1, capture_video=True)
    written = module.train(arguments(module, tmp_path / "run", env_kwargs='{"length": 100000}', **settings))
    assert (films, written["eval_returns"]) == ([3000], [3010])


def test_a_picture_of_atari():
    """It cannot be rendered beside the evaluation: the newest of the four frames of the first environment stands in."""
    obs = np.arange(2 * 4 * 3 * 5).reshape(2, 4, 3, 5)
    envs = types.SimpleNamespace(unwrapped=types.SimpleNamespace(render_mode=None))
    picture = script("ppo_clip").frame(envs, obs)
    assert picture.shape == (3, 5, 3)
    assert (picture == obs[0, 3, :, :, None]).all()


def test_a_picture_of_minatar():
    """Its numbers in [0, 1] are black to what writes the film, and ten by ten pixels a speck."""
    module = script("ppo_clip")
    envs = module.make_envs("MinAtar/Breakout-v1", 1, render=True)
    obs, _ = envs.reset(seed=0)
    picture = module.frame(envs, obs)
    assert picture.dtype == np.uint8
    assert picture.shape == (160, 160, 3)
    assert picture.max() > 200
    small = 255 * envs.unwrapped.envs[0].render()
    assert (picture[8::16, 8::16] == small.astype(np.uint8)).all()


class Wandb(types.ModuleType):
    """As much of wandb as a run needs; it keeps what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.given = []
        self.lines = []
        self.finished = 0

    def setup(self):
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode="offline"))

    def init(self, **given):
        self.given.append(given)

    def log(self, row, step):
        self.lines.append((step, row))

    def finish(self):
        self.finished += 1


@each_back
def test_tracking(module, tmp_path, monkeypatch):
    """--wandb-project or --wandb-entity without effect, or a resumed run that begins another page."""
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = tmp_path / "run"
    module.train(arguments(module, folder, track=True))
    resume(module, folder, "--total-timesteps", 512)
    given = dict(track=True, wandb_project="mine", wandb_entity="ours")
    module.train(arguments(module, tmp_path / "other", **given))
    first, again, other = fake.given
    assert (first["project"], first["entity"], first["name"]) == ("foliorl", None, "run")
    assert (other["project"], other["entity"], other["name"]) == ("mine", "ours", "other")
    assert (first["id"], first["resume"]) == (again["id"], "allow")
    assert first["id"] != other["id"]
    assert first["config"].items() >= dict(algo=name_of(module), total_timesteps=256, seed=1).items()
    assert again["config"]["total_timesteps"] == 512
    rows = metrics(folder) + metrics(tmp_path / "other")
    assert fake.lines == [(row["global_step"], row) for row in rows]
    assert fake.finished == 3


@each_back
def test_tracking_with_a_key_that_is_refused(module, tmp_path, monkeypatch):
    """A traceback from the depth of wandb where its own sentence tells what is wrong."""

    class Refusing(Wandb):
        Error = type("Error", (Exception,), {})

        def setup(self):
            return types.SimpleNamespace(settings=types.SimpleNamespace(mode="online"))

        def login(self, prompt):
            raise self.Error("the key is too short")

    monkeypatch.setitem(sys.modules, "wandb", Refusing())
    with pytest.raises(module.Refusal, match="--track: the key is too short; WANDB_MODE=offline"):
        module.train(arguments(module, tmp_path / "run", track=True))
    assert not (tmp_path / "run").exists()


@each_back
def test_tracking_offline(module, tmp_path):
    """--track with WANDB_MODE=offline leaves wandb's own files in the run directory, and the losses are in them."""
    pytest.importorskip("wandb")
    environ = dict(WANDB_MODE="offline", HOME=str(tmp_path))
    done = start(module, tmp_path, *line(module, run_dir="run", track=True), environ=environ).wait()
    assert done.rc == 0, done.err
    (log,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    written = log.read_bytes()
    assert all(name.encode() in written for name in metrics(tmp_path / "run")[-1])
    assert result(tmp_path / "run")["total_timesteps"] == 256


# Bugs that these tests find


@pytest.mark.parametrize(
    ("test", "name", "old", "new"),
    [
        (test_a_run_ends_with_its_last_whole_batch, "ppo_clip", "steps=self.step", "steps=self.args.total_timesteps"),
        (test_the_directory_is_printed_before_the_first_step, "td3", "step {self.step} of", "of"),
        (test_the_default_directory_has_no_colon_in_its_name, "ppo_clip", "'[:/]'", "'[/]'"),
        (test_steps_per_second, "ppo_clip", "SPS=step / self.wall_time", "SPS=2 * step / self.wall_time"),
        (test_steps_per_second, "td3", "sps=self.step / self", "sps=2 * self.step / self"),
        (test_steps_per_second, "td3", "perf_counter() - self.wall_time", "perf_counter()"),
        (test_steps_per_second, "ppo_clip", "run.log((iteration + 1) * N * T", "run.log((iteration + 1) * T"),
        (test_a_plain_line_every_ten_seconds, "ppo_clip", "time.perf_counter() > self.next_line", "step"),
        (
            test_a_run_goes_on_though_nobody_reads,
            "ppo_clip",
            "            except OSError:\n",
            "            except EOFError:\n",
        ),
        (test_the_bar_moves_with_each_step, "td3", "        run.bar.update(N)\n", ""),
        (test_the_bar_moves_with_each_step, "td3", "update(step - self.bar.n)", "update(step)"),
        (test_random_numbers_of_a_resumed_run, "ppo_clip", "env_seed(self.args.seed, self.step)", "self.args.seed"),
        (test_compile_is_a_flag, "td3", "if args.compile and", "if"),
        (test_a_broken_run_goes_on_from_its_checkpoint, "ppo_clip", "self.log_size, self.file", "10**9, self.file"),
        (test_schedules_go_on_in_a_resumed_run, "ppo_clip", "iteration / num", "(iteration - first_iteration) / num"),
        (test_the_log_goes_on_when_steps_come_in_other_numbers, "td3", "% log_every < N", "% log_every == 0"),
        (test_the_log_goes_on_when_steps_come_in_other_numbers, "dagger", "% log_every < B", "% log_every == 0"),
        (test_episodes_of_a_long_run_that_is_resumed, "ppo_clip", " % 498_973", ""),
        (test_episodes_of_a_long_run_that_is_resumed, "ppo_clip", "498_973", "500_000"),
        (test_a_new_learning_rate_counts_in_a_resumed_run, "td3", "state | dict(param_groups", "state | dict(_"),
        (test_an_evaluation_without_end_is_cut, "ppo_clip", "for _ in range(max_steps)", "for _ in range(99)"),
        (test_an_evaluation_without_end_is_cut, "td3", "eval_cut=int(running.sum())", "eval_cut=0"),
        (test_only_what_did_not_end_is_cut, "td3", "eval_cut=int(running.sum())", "eval_cut=len(running)"),
        (test_arguments_of_the_environment_reach_it, "td3", "eval_episodes, args.env_kwargs", "eval_episodes, ''"),
        (test_the_family_of_an_environment, "ppo_clip", "name in family.split()", "family.split()[0] in env_id"),
        (test_the_film_is_of_the_first_episode_of_the_evaluation, "td3", "video and running[0] and", "video and"),
        (test_a_film_has_an_end, "td3", "len(frames) < 3000", "len(frames) < 30_000"),
        (test_tracking, "td3", "id=self.wandb_id", "id=str(time.time_ns())"),
        (test_tracking, "ppo_clip", "entity=args.wandb_entity or None", "entity=None"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_planted_bug_is_found(request, test, name, old, new):
    """Each of these edits of a script makes the test fail."""
    fails_with_a_bug(request, test, name, old, new)


def test_the_agent_of_the_readme(tmp_path, monkeypatch):
    """The lines that load a trained agent do so as they stand, given a run."""
    folder = finished_run(script("ppo_clip"), tmp_path / "run")
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(root / "algos")
    code = re.search(r"```python\n(import ppo_clip.*?)```", (root / "README.md").read_text(), re.DOTALL)[1]
    assert code.count("runs/") == 1
    names = {}
    exec(re.sub(r'"runs/[^"]*"', repr(str(folder)), code), names)
    trained = names["torch"].load(folder / "checkpoint.pt")["agent"]
    assert equal(leaves(names["agent"].state_dict()), leaves(trained))
    assert names["actions"].shape == (1,)
