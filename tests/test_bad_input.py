"""Bad input: exit code 2, one clear sentence, nothing damaged, nothing left behind."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MODULES, SCRIPTS
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from launch import Process, flags, tiny
from test_runs import arguments, checkpoint, each_module, each_pair, metrics, parameters, simple_env

MODULE_OF_ENVIRONMENTS = '''
"""Environments of a user's own."""
import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete


class Own(gym.Env):
    """Ten steps of nothing; from `bad_after` steps on in all, the reward is not a number."""

    def __init__(self, bad_after=np.inf, as_dict=False, continuous=False):
        space = Box(-1, 1, (3,), np.float32)
        self.observation_space = Dict(position=space) if as_dict else space
        self.action_space = Box(-1, 1, (1,), np.float32) if continuous else Discrete(2)
        self.bad_after, self.steps = bad_after, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        reward = float("nan") if self.steps > self.bad_after else 1.0
        return self.observation_space.sample(), reward, self.steps % 10 == 0, False, {}


for continuous in False, True:
    kind = "Continuous" if continuous else ""
    gym.register(f"Own{kind}-v0", Own, kwargs=dict(continuous=continuous))
    gym.register(f"OwnDict{kind}-v0", Own, kwargs=dict(as_dict=True, continuous=continuous))
    gym.register(f"OwnNaN{kind}-v0", Own, kwargs=dict(bad_after=100, continuous=continuous))
'''


def check(done: Process, *words: str) -> None:
    """Exit code 2, no traceback, one sentence with these words; tyro frames its own, for flags."""
    assert done.rc == 2, (done.rc, done.out, done.err)
    assert done.out == ""
    assert "Traceback" not in done.err
    text = " ".join(re.sub(r"[^\x20-\x7e]", " ", done.err).split())
    if "For full helptext" not in text:
        assert re.fullmatch(r"\w+\.py: [^\n]+\n", done.err), done.err
        assert len(text) < 400, text
    for word in words:
        assert re.search(word, text, re.IGNORECASE), f"{word!r} is not in: {text}"


def tree(folder: Path) -> dict[str, str]:
    """A hash of every file below the folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith((".out", ".err"))]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(script, module, folder: Path, *argv: str, **how) -> Process:
    """A tiny run with `argv` last on its command line, which count."""
    line = flags(dict(env_id=simple_env(module)) | tiny(module, total_timesteps=256))
    return Process(script, [*line, *argv], folder, **how).wait(30)


@pytest.fixture(scope="module", params=list(zip(SCRIPTS, MODULES)), ids=[s.stem for s in SCRIPTS])
def finished(request, tmp_path_factory):
    """A finished run: script, module and directory."""
    script, module = request.param
    folder = tmp_path_factory.mktemp("bad_input") / "run"
    module.train(arguments(module, folder))
    return script, module, folder


# The command line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--env-id CartPole-v9", ["CartPole", "v9"]),
        ("--env-id Nope-v0", ["Nope"]),
        ("--env-id nowhere:Nope-v0", ["nowhere"]),
        ("--env-id ALE/Nope-v5", ["Nope"]),
        ("--devcie cpu", ["--devcie"]),
        ("--device tpu", ["tpu", "cuda"]),
        ("--num-envs 0", ["num_envs", "0"]),
        ("--num-envs two", ["num-envs", "two"]),
        ("--gamma 1.5", ["gamma", r"1\.5"]),
        ("--total-timesteps 1", ["total_timesteps"]),
        ("--resume nowhere", ["nowhere"]),
    ],
)
@each_pair
def test_bad_command_lines(script, module, tmp_path, argv, words):
    """A sentence that names what is wrong, and no directory for a run that never was."""
    check(run(script, module, tmp_path, *argv.split()), *words)
    assert tree(tmp_path) == {}
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@each_pair
def test_device_that_is_not_there(script, module, tmp_path):
    """--device cuda without a GPU is refused, not silently replaced."""
    check(run(script, module, tmp_path, "--device", "cuda"), "cuda")
    assert tree(tmp_path) == {}


IMPOSSIBLE = dict(
    gamma=[-0.1, 1.01, float("nan")], gae_lambda=[-1.0, 2.0], tau=[-0.1, 1.5], total_timesteps=[0, -5],
    num_envs=[0, -1], num_steps=[0, -16], update_epochs=[0], num_minibatches=[0, -4], batch_size=[0], buffer_size=[0],
    hidden_size=[0], learning_rate=[-1e-3, float("nan")], clip_coef=[-0.1], max_grad_norm=[-1.0], eval_episodes=[0, -1],
    checkpoint_every=[0], seed=[-1], torch_threads=[-1], target_kl=[-1.0], beta=[-1.0], multiplier=[-1.0],
    multiplier_lr=[-1.0], policy_step=[-1.0], damping=[-1.0], cg_iterations=[0], fisher_stride=[0],
    line_search_steps=[0], horizon=[0], critic_learning_rate=[-1e-3], policy_frequency=[0],
    exploration_noise=[-1.0], policy_noise=[-1.0], noise_clip=[-1.0],
)  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        pytest.param(module, name, value, id=f"{script.stem}-{name}-{value}")
        for script, module in zip(SCRIPTS, MODULES)
        for name, values in IMPOSSIBLE.items()
        if hasattr(module.Args, name)
        for value in values
    ],
)
def test_impossible_values(module, name, value):
    """Args refuses values outside their range, with one sentence that names the field and the value."""
    settings = tiny(module, total_timesteps=256) | {name: value}
    with pytest.raises(ValueError, match=rf"\b{name}\b.*{re.escape(str(value))}"):
        module.Args(**settings)


@each_module
def test_possible_values(module):
    """The ends of the ranges are values, too: gamma 0 and 1, seed 0, all cores."""
    for settings in (dict(gamma=0.0), dict(gamma=1.0, gae_lambda=0.0), dict(gae_lambda=1.0, seed=0, torch_threads=0)):
        module.Args(**tiny(module, total_timesteps=256, **settings))


@each_module
def test_batches_that_do_not_fit(module):
    """A run shorter than one batch and, where there are minibatches, a batch that they do not divide."""
    with pytest.raises(ValueError, match="total_timesteps"):
        module.Args(**tiny(module, total_timesteps=1))
    if "num_minibatches" in vars(module.Args()):
        with pytest.raises(ValueError, match="num_minibatches"):
            module.Args(**tiny(module, total_timesteps=256) | dict(num_minibatches=3))


# Environments


class Odd(gym.Env):
    """An environment with any spaces."""

    def __init__(self, observations, actions):
        self.observation_space, self.action_space = observations, actions

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


VECTOR, UNIT = Box(-1, 1, (3,), np.float32), Box(0, 1, (2,), np.float32)


@pytest.mark.parametrize(
    ("observations", "actions", "named"),
    [
        (Dict(a=VECTOR, b=UNIT), None, "Dict"),
        (Tuple([VECTOR, UNIT]), None, "Tuple"),
        (MultiDiscrete([3, 4]), None, "MultiDiscrete"),
        (MultiBinary(4), None, "MultiBinary"),
        (Text(5), None, "Text"),
        (Box(-1, 1, (3, 3), np.float32), None, r"Box.*\(3, 3\)"),
        (Box(-1, 1, (), np.float32), None, r"Box.*\(\)"),
        (VECTOR, MultiDiscrete([3, 4]), "MultiDiscrete"),
        (VECTOR, MultiBinary(4), "MultiBinary"),
        (VECTOR, Dict(a=UNIT, b=Discrete(2)), "Dict"),
        (VECTOR, Tuple([UNIT, Discrete(2)]), "Tuple"),
    ],
    ids=str,
)
@each_module
def test_spaces_that_are_not_supported(module, observations, actions, named, tmp_path):
    """One sentence with the kind of space, its own and those supported; no directory is made."""
    if actions is None:
        actions = UNIT if simple_env(module) == "Pendulum-v1" else Discrete(2)
    gym.register("test/Odd-v0", Odd, kwargs=dict(observations=observations, actions=actions))
    try:
        with pytest.raises(ValueError, match=f"{named}.*not supported.*(Discrete|Box)") as error:
            module.train(arguments(module, tmp_path / "run", env_id="test/Odd-v0"))
    finally:
        gym.registry.pop("test/Odd-v0")
    assert "\n" not in str(error.value)
    kind = "observation" if observations is not VECTOR else "action"
    assert f"{kind} space" in str(error.value)
    assert not (tmp_path / "run").exists()


def own(module, kind: str) -> str:
    """The id of one of the user's own environments, with actions that the script supports."""
    return f"own:Own{kind}{'Continuous' if simple_env(module) == 'Pendulum-v1' else ''}-v0"


@each_pair
def test_environments_of_ones_own(script, module, tmp_path):
    """module:Env-v0 on PYTHONPATH runs; with a Dict of observations it is refused (by a Python of its own)."""
    (tmp_path / "own.py").write_text(MODULE_OF_ENVIRONMENTS)
    line = [
        flags(tiny(module, total_timesteps=64, env_id=own(module, kind), run_dir=f"run{kind}")) for kind in ("", "Dict")
    ]
    done = Process(script, line[0], tmp_path, path=[tmp_path]).wait()
    assert done.rc == 0, done.err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["eval_returns"] == [10.0, 10.0]
    environ = os.environ | dict(PYTHONPATH=str(tmp_path))
    refused = subprocess.run(
        [sys.executable, script, *line[1]], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(r"\w+\.py: [^\n]*Dict[^\n]*not supported[^\n]*\n", refused.stderr)
    assert not (tmp_path / "runDict").exists()


@pytest.mark.parametrize(
    ("env_id", "package"),
    [
        ("MinAtar/Breakout-v1", "minatar"),
        ("ALE/Pong-v5", "ale_py"),
        ("HalfCheetah-v5", "mujoco"),
        ("LunarLander-v3", "Box2D"),
    ],
)
@each_pair
def test_missing_package(script, module, tmp_path, env_id, package):
    """A package that some environments need and that is not installed is named in one sentence."""
    check(run(script, module, tmp_path, "--env-id", env_id, "--run-dir", "run", hide=package), package)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("package", "flag"), [("moviepy", "--capture-video"), ("wandb", "--track")])
@each_pair
def test_missing_package_of_an_option(script, module, tmp_path, package, flag):
    """Without moviepy or wandb all runs but --capture-video or --track, and that is refused before training."""
    done = run(script, module, tmp_path, "--run-dir", "plain", hide=package)
    assert done.rc == 0, done.err
    check(run(script, module, tmp_path, "--run-dir", "run", flag, hide=package), package)
    assert not (tmp_path / "run").exists()


# Directories


@each_pair
def test_unwritable_directory(script, module, tmp_path):
    """A run directory below a file cannot be made, by nobody."""
    (tmp_path / "file").write_text("precious")
    check(run(script, module, tmp_path, "--run-dir", "file/run"), "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_directory_of_another_run(finished, tmp_path):
    """--run-dir with a run in it is refused, with a hint at --resume, and stays as it is."""
    script, module, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    before = tree(tmp_path)
    check(run(script, module, tmp_path, "--run-dir", "run"), "run", "--resume")
    assert tree(tmp_path) == before


def test_directory_without_a_checkpoint(finished, tmp_path):
    """--resume of a run that was stopped before its first checkpoint says what is missing."""
    script, _, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    before = tree(tmp_path)
    check(Process(script, ["--resume", "run"], tmp_path).wait(), r"checkpoint\.pt")
    assert tree(tmp_path) == before


def test_checkpoint_of_another_environment(finished, tmp_path):
    """--resume with another --env-id is refused with both names at hand, and nothing is touched."""
    script, module, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    before = tree(tmp_path)
    other = "MountainCarContinuous-v0" if simple_env(module) == "Pendulum-v1" else "Acrobot-v1"
    check(Process(script, ["--resume", "run", "--env-id", other], tmp_path).wait(), simple_env(module))
    assert tree(tmp_path) == before


def test_checkpoint_of_another_size(finished, tmp_path):
    """--resume with another network than that of the checkpoint is refused with a sentence, and nothing is touched."""
    script, _, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    before = tree(tmp_path)
    check(Process(script, ["--resume", "run", "--hidden-size", "24"], tmp_path).wait(), "sizes")
    assert tree(tmp_path) == before


def test_checkpoint_of_another_algorithm(finished, tmp_path):
    """A script under another name is another algorithm: it refuses the run, names its algorithm and touches nothing."""
    script, _, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    shutil.copy(script, tmp_path / "another.py")
    before = tree(tmp_path)
    check(Process(tmp_path / "another.py", ["--resume", "run"], tmp_path).wait(), script.stem)
    assert tree(tmp_path) == before


# Services and numbers


@each_pair
def test_tracking_without_login(script, module, tmp_path):
    """--track with no API key anywhere: refused within seconds, before training, and no run directory remains."""
    pytest.importorskip("wandb")
    environ = dict(HOME=str(tmp_path), NETRC=str(tmp_path / "netrc"), WANDB_MODE=None, WANDB_API_KEY=None)
    done = run(script, module, tmp_path, "--track", "--run-dir", "run", environ=environ)
    check(done, "wandb")
    assert not (tmp_path / "run").exists()


@each_pair
def test_training_that_diverges(script, module, tmp_path):
    """The first loss that is not a number ends the run; the last good checkpoint is whole and good."""
    (tmp_path / "own.py").write_text(MODULE_OF_ENVIRONMENTS)
    settings = tiny(module, total_timesteps=2000, checkpoint_every=64, env_id=own(module, "NaN"), run_dir="run")
    done = Process(script, flags(settings), tmp_path, path=[tmp_path]).wait()
    assert done.rc == 2, done.err
    assert "Traceback" not in done.err
    (sentence,) = [line for line in done.err.splitlines() if line.startswith(f"{script.name}: ")]
    assert re.search(r"step \d+", sentence), sentence
    step = int(re.search(r"step (\d+)", sentence)[1])
    assert 200 < step <= 264, "the bad rewards begin at step 200: 100 of 2 environments"
    assert "checkpoint" in sentence
    assert 64 <= checkpoint(tmp_path / "run")["step"] < step
    assert parameters(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in parameters(tmp_path / "run").values())
    lines = metrics(tmp_path / "run")
    assert lines[-1]["global_step"] < step
    assert not (tmp_path / "run" / "result.json").exists()
