"""Bad input: exit code 2, one clear sentence, nothing damaged, nothing left behind."""

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
from conftest import ALL, MODULES
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from launch import Process, tiny
from runs import (
    checkpoint,
    each,
    each_back,
    each_module,
    each_rewarded,
    fails_with_a_bug,
    finished_run,
    is_continuous,
    is_discrete,
    line,
    metrics,
    name_of,
    parameters,
    result,
    script,
    start,
    steps,
    tree,
)


class Own(gym.Env):
    """Ten steps of nothing, with any actions; from `bad_after` steps on in all, the reward is not a number."""

    observation_space = Box(-1, 1, (3,), np.float32)

    def __init__(self, actions, bad_after=np.inf):
        self.action_space = actions
        self.bad_after = bad_after
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(np.nan_to_num(action)), f"{action} is not in {self.action_space}"
        self.steps += 1
        reward = float("nan") if self.steps > self.bad_after else 1.0
        return self.observation_space.sample(), reward, self.steps % 10 == 0, False, {}


@pytest.fixture
def own():
    """A function that registers an environment with some spaces, by default ones that the script supports."""

    def register(module, actions=None, env=Own, **kwargs):
        actions = actions or (Box(-1, 1, (1,), np.float32) if is_continuous(module) else Discrete(2))
        gym.register("test/Own-v0", env, kwargs=kwargs | dict(actions=actions), disable_env_checker=True)
        return "test/Own-v0"

    yield register
    gym.registry.pop("test/Own-v0", None)


def check(done: Process, *words: str) -> None:
    """Exit code 2, no traceback, one sentence with these words; tyro frames its own, for flags."""
    assert done.rc == 2, (done.rc, done.out, done.err)
    assert re.fullmatch(r"([^\n]+ with the (defaults for|arguments of) [^\n]+\n)?", done.out)
    assert "Traceback" not in done.err
    text = " ".join(re.sub(r"[^\x20-\x7e]", " ", done.err).split())
    if "For full helptext" not in text:
        assert re.fullmatch(r"\w+\.py: [^\n]+\n", done.err), done.err
        assert len(text) < 400, text
    for word in words:
        assert re.search(word, text, re.IGNORECASE), f"{word!r} is not in: {text}"


def run(module, folder: Path, *argv: str, **how) -> Process:
    """A tiny run with `argv` last on its command line, which count."""
    return start(module, folder, *line(module, *argv), **how).wait(30)


def refused(module, words: str, *argv: str) -> None:
    """Assert that train() refuses this command line in one sentence with these words."""
    with pytest.raises(module.Refusal, match=words) as error:
        module.train(module.parse_args([str(arg) for arg in argv]))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    del error  # with its traceback goes the lock


# The command line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--env-id CartPole-v9", ["CartPole", "v9"]),
        ("--env-id Nope-v0", ["Nope"]),
        ("--env-id nowhere:Nope-v0", ["nowhere"]),
        ("--env-id ALE/Nope-v5", ["Nope"]),
        ("--env-id no:such:id", ["no:such:id"]),
        ("--env-id", ["env-id"]),
        ("--devcie cpu", ["--devcie"]),
        ("--device tpu", ["tpu", "device"]),
        ("--seed 99999999999999999999", ["seed"]),
        ("--num-envs 0", ["num_envs", "0"]),
        ("--num-envs two", ["num-envs", "two"]),
        ("--gamma 1.5", ["gamma", r"1\.5"]),
        ("--total-timesteps 1", ["total_timesteps"]),
        ("--resume nowhere", ["nowhere"]),
        ("--env-kwargs {", ["env_kwargs", "JSON"]),
        ("--env-kwargs {'length':3}", ["env_kwargs", "JSON"]),
        ("--env-kwargs 3", ["env_kwargs", "JSON"]),
        ("--env-kwargs null", ["env_kwargs", "JSON"]),
        ("--env-kwargs []", ["env_kwargs", "JSON"]),
        ('--env-kwargs [["length",3]]', ["env_kwargs", "JSON"]),
        ('--env-kwargs {"lenght":3}', ["lenght"]),
        ('--env-kwargs {"num_envs":3}', ["num_envs"]),
        ('--env-id ALE/Pong-v5 --env-kwargs {"grayscale":false} --capture-video', ["Pong", "filmed"]),
    ],
)
@each([script("ppo_clip")])
def test_bad_command_lines(module, tmp_path, argv, words):
    """A sentence that names what is wrong, and no directory for a run that never was."""
    check(run(module, tmp_path, *argv.split()), *words)
    assert tree(tmp_path) == {}
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("device", ["cuda:1", "cuda:77", "mps", "hpu", "xla", "meta", "", "cuda:-1", "auto:1"])
@each_back
def test_device_that_is_not_there(module, tmp_path, device):
    """What this machine does not have is refused, not silently replaced, and so is a device that computes nothing."""
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    if device == "cuda:1" and torch.cuda.device_count() > 1:
        pytest.skip("this machine has one")
    words = f"device {device} is not available"
    refused(module, words, *line(module, "--device", device, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


IMPOSSIBLE = dict(
    gamma=[-0.1, 1.01, float("nan")], gae_lambda=[-1.0, 2.0], tau=[-0.1, 1.5], total_timesteps=[0, -5],
    num_envs=[0, -1], num_steps=[0, -16], update_epochs=[0], num_minibatches=[0, -4], batch_size=[0], buffer_size=[0],
    hidden_size=[0], learning_rate=[-1e-3, float("nan")], clip_coef=[-0.1], max_grad_norm=[-1.0], eval_episodes=[0, -1],
    checkpoint_every=[0], seed=[-1], torch_threads=[-1], target_kl=[-1.0], beta=[-1.0], multiplier=[-1.0],
    multiplier_lr=[-1.0], policy_step=[-1.0], damping=[-1.0], cg_iterations=[0], fisher_stride=[0],
    line_search_steps=[0], horizon=[0], critic_learning_rate=[-1e-3], policy_frequency=[0],
    exploration_noise=[-1.0], policy_noise=[-1.0], noise_clip=[-1.0], n_steps=[0],
    priority_exponent=[-0.1, 1.1], priority_eps=[0.0], importance_exponent=[-0.1, 1.1],
    sigma_0=[-0.1], q_lambda=[-0.1, 1.1], num_samplers=[-1], max_lag=[-1], rho_bar=[-0.1], c_bar=[-0.1],
    num_atoms=[0, 1], v_min=[1e9, -np.inf], v_max=[-1e9, np.inf], num_quantiles=[0], kappa=[0.0, np.inf],
    temperature=[0.0], kl_coef=[-0.1], kl_horizon=[0], num_responses=[0], max_new_tokens=[0], max_prompt_tokens=[0],
    sft_steps=[-1], num_pairs=[9], rm_epochs=[0], num_layers=[0], missing_eos_penalty=[-1.0], num_demonstrations=[0],
)  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        pytest.param(module, name, value, id=f"{name_of(module)}-{name}-{value}")
        for module in ALL
        for name, values in IMPOSSIBLE.items()
        if hasattr(module.Args, name)
        for value in values
    ],
)
def test_impossible_values(module, name, value):
    """Args refuses values outside their range, with one sentence that names the field and the value."""
    settings = tiny(module, total_timesteps=256) | {name: value}
    with pytest.raises(module.Refusal, match=rf"\b{name}\b.*{re.escape(str(value))}"):
        module.Args(**settings)


@each_module
def test_possible_values(module):
    """The ends of the ranges are values, too: gamma 0 and 1, seed 0, all cores."""
    for settings in (dict(gamma=0.0), dict(gamma=1.0, gae_lambda=0.0), dict(gae_lambda=1.0, seed=0, torch_threads=0)):
        module.Args(**tiny(module, total_timesteps=256, **settings))


@each_module
def test_sizes_that_do_not_fit(module):
    """A run shorter than one batch or without a gradient step, minibatches of several sizes, a buffer of resets."""
    sizes = dict(total_timesteps=1, num_minibatches=3, learning_starts=255, buffer_size=3)
    for name, value in sizes.items():
        if hasattr(module.Args, name):
            with pytest.raises(module.Refusal, match=name):
                module.Args(**tiny(module, total_timesteps=256) | {name: value})


# Environments

UNIT = Box(0, 1, (2,), np.float32)


@pytest.mark.parametrize(
    ("actions", "named"),
    [
        (MultiDiscrete([3, 4]), "MultiDiscrete"),
        (MultiBinary(4), "MultiBinary"),
        (Dict(a=UNIT, b=Discrete(2)), "Dict"),
        (Tuple([UNIT, Discrete(2)]), "Tuple"),
    ],
    ids=str,
)
@each_module
def test_actions_that_are_not_supported(module, actions, named, own, tmp_path):
    """One sentence with the kind of space, its own and those supported; no directory is made."""
    words = f"^action space {named}.* is not supported: it must be"
    refused(module, words, *line(module, env_id=own(module, actions), run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@each_module
def test_actions_of_the_other_kind(module, own, tmp_path):
    """Scripts for one kind of actions say so; those for both take both."""
    for actions, supported in ((Discrete(2), not is_continuous(module)), (UNIT, not is_discrete(module))):
        given = line(module, env_id=own(module, actions), run_dir=tmp_path / type(actions).__name__)
        if supported:
            module.train(module.parse_args(given))
        else:
            refused(module, rf"^action space {type(actions).__name__}.* is not supported: it must be", *given)


@each([module for module in MODULES if is_continuous(module)])
def test_actions_without_bounds(module, own, tmp_path):
    """A policy in [-1, 1] that is scaled to the bounds has nothing to be scaled to."""
    given = line(module, env_id=own(module, Box(-np.inf, np.inf, (2,))), run_dir=tmp_path / "run")
    refused(module, r"^action space Box.* is not supported: it must be", *given)


@each([script("ppo_clip")])
def test_seeds_of_atari(module):
    """Its seeds have 31 bits, and those of environments are a million times as large as that of the run."""
    envs = module.make_envs("ALE/Pong-v5", 2)
    for seed in (0, 5000, 2**31 - 1):
        envs.reset(seed=module.env_seed(seed, 500_000))
    envs.close()


@pytest.mark.parametrize("mode", ["SameStep", "Disabled", "Silent"])
@each([script("ppo_clip")])
def test_other_ways_to_reset(module, mode, tmp_path):
    """An environment whose last observations are lost, or that says nothing about it."""
    refused(module, "only NEXT_STEP", *line(module, env_id=f"envs:test/{mode}-v0", run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


MODULE_OF_ENVIRONMENTS = '''
"""Environments of a user's own."""
import gymnasium as gym
from gymnasium.spaces import Box, Discrete, Text


class Own(gym.Env):
    def __init__(self, text=False, continuous=False):
        self.observation_space = Text(5) if text else Box(-1, 1, (3,))
        self.action_space = Box(-1, 1, (1,)) if continuous else Discrete(2)
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps % 10 == 0, False, {}


gym.register("Own-v0", Own)
gym.register("OwnBox-v0", Own, kwargs=dict(continuous=True))
'''


@each_back
def test_environments_of_ones_own(module, tmp_path):
    """module:Env-v0 on PYTHONPATH runs; with text for observations it is refused (by a Python of its own)."""
    (tmp_path / "own.py").write_text(MODULE_OF_ENVIRONMENTS)
    env_id = f"own:Own{'Box' if is_continuous(module) else ''}-v0"
    done = start(module, tmp_path, *line(module, env_id=env_id, run_dir="run"), path=[tmp_path]).wait()
    assert done.rc == 0, done.err
    assert result(tmp_path / "run")["eval_returns"] == [10.0, 10.0]
    given = line(module, env_id=env_id, run_dir="text", env_kwargs='{"text": true}')
    alone = subprocess.run(
        [sys.executable, module.__file__, *given],
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (alone.returncode, alone.stdout) == (2, "")
    assert re.fullmatch(r"\w+\.py: [^\n]*Text[^\n]*not supported[^\n]*\n", alone.stderr)
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize(
    ("env_id", "package"),
    [
        ("MinAtar/Breakout-v1", "minatar"),
        ("ALE/Pong-v5", "ale_py"),
        ("HalfCheetah-v5", "mujoco"),
        ("LunarLander-v3", "Box2D"),
    ],
)
@each([script("ppo_clip")])
def test_missing_package(module, tmp_path, env_id, package):
    """A package that some environments need and that is not installed is named in one sentence."""
    check(run(module, tmp_path, "--env-id", env_id, "--run-dir", "run", hide=package), package)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("package", "flag"), [("moviepy", "--capture-video"), ("wandb", "--track")])
@each_back
def test_missing_package_of_an_option(module, tmp_path, package, flag):
    """Without moviepy or wandb all runs but --capture-video or --track, and that is refused before training."""
    done = run(module, tmp_path, "--run-dir", "plain", hide=package)
    assert done.rc == 0, done.err
    check(run(module, tmp_path, "--run-dir", "run", flag, hide=package), package)
    assert not (tmp_path / "run").exists()


class OnScreen(Own):
    """It shows itself to people, but makes no pictures for films."""

    metadata = dict(render_modes=["human"])  # noqa: RUF012

    def __init__(self, actions, render_mode=None):
        super().__init__(actions)
        self.render_mode = render_mode

    def render(self):
        raise AssertionError(f"there is no mode {self.render_mode}")


class Unpainted(OnScreen):
    """The package that paints its pictures is missing."""

    metadata = dict(render_modes=["rgb_array"])  # noqa: RUF012

    def render(self):
        raise gym.error.DependencyNotInstalled("nothing is installed that could render")


class Unlit(OnScreen):
    """It has no library for graphics: PyOpenGL raises this as soon as MuJoCo makes its renderer."""

    metadata = dict(render_modes=["rgb_array"])  # noqa: RUF012

    def __init__(self, actions, render_mode=None):
        super().__init__(actions)
        if render_mode:
            raise AttributeError("'NoneType' object has no attribute 'render'")


@pytest.mark.parametrize("env", [Own, OnScreen, Unpainted, Unlit])
@each_back
def test_an_environment_without_pictures(module, env, own, tmp_path):
    """--capture-video that fails when all has been trained, because there is nothing to film."""
    given = line(module, "--capture-video", env_id=own(module, env=env), run_dir=tmp_path / "run")
    refused(module, "render", *given)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


class Clumsy(OnScreen):
    """Its render() has a bug."""

    metadata = dict(render_modes=["rgb_array"])  # noqa: RUF012

    def render(self):
        raise ValueError("mine")


@each_back
def test_an_error_in_render_keeps_its_traceback(module, own):
    """A user's own error that ends in one sentence about films."""
    with pytest.raises(ValueError, match="mine"):
        module.parse_args(line(module, "--capture-video", env_id=own(module, env=Clumsy)))


# Directories


@each_back
def test_unwritable_directory(module, tmp_path):
    """A run directory below a file cannot be made, by nobody."""
    (tmp_path / "file").write_text("precious")
    check(run(module, tmp_path, "--run-dir", "file/run"), "file")
    assert (tmp_path / "file").read_text() == "precious"


@each_back
def test_directory_of_another_run(module, tmp_path):
    """--run-dir with a run in it is refused, with a hint at --resume, and stays as it is."""
    finished_run(module, tmp_path / "run")
    before = tree(tmp_path)
    check(run(module, tmp_path, "--run-dir", "run"), "run", "--resume")
    assert tree(tmp_path) == before


@each_back
def test_directory_without_a_checkpoint(module, tmp_path):
    """--resume of a run that was stopped before its first checkpoint says what is missing."""
    folder = finished_run(module, tmp_path / "run")
    (folder / "checkpoint.pt").unlink()
    before = tree(tmp_path)
    check(start(module, tmp_path, "--resume", "run").wait(), r"run .*no checkpoint")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--seed", 2, "seed 1"),
        ("--env-kwargs", '{"max_episode_steps": 9}', "env_kwargs ''"),
        ("--run-dir", "elsewhere", "run_dir"),
        ("--total-timesteps", 200, "256 steps already"),
        ("--hidden-size", 24, "does not hold the networks"),
        ("--env-id", None, "env_id"),
    ],
)
@each_module
def test_what_cannot_change_in_a_resumed_run(module, flag, value, words, tmp_path):
    """A run whose second half is another run's, or that ends before it began: refused, and nothing is touched."""
    folder = finished_run(module, tmp_path / "run")
    before = tree(tmp_path)
    if flag == "--env-id":
        value = "MountainCarContinuous-v0" if is_continuous(module) else "Acrobot-v1"
        words = f"env_id '{module.Args.env_id}'"
    refused(module, words, "--resume", folder, flag, value)
    assert tree(tmp_path) == before


@each_back
def test_a_refusal_keeps_the_result(module, tmp_path):
    """More steps make the old result go, but not when another flag is refused after them."""
    folder = finished_run(module, tmp_path / "run")
    before = tree(tmp_path)
    refused(module, "does not hold the networks", "--resume", folder, "--total-timesteps", 512, "--hidden-size", 24)
    assert tree(tmp_path) == before


@each([script("rainbow"), script("prioritized_dqn")])
def test_what_a_buffer_was_filled_with_cannot_change(module, tmp_path):
    """Priorities of two exponents, or rewards of two scales, side by side in one buffer."""
    folder = finished_run(module, tmp_path / "run")
    refused(module, "priority_exponent", "--resume", folder, "--priority-exponent", 0.2)
    refused(module, "clip_reward", "--resume", folder, "--clip-reward")


@each_back
def test_checkpoint_of_another_algorithm(module, tmp_path):
    """A script under another name is another algorithm: it refuses the run, names its algorithm and touches nothing."""
    finished_run(module, tmp_path / "run")
    shutil.copy(module.__file__, tmp_path / "another.py")
    before = tree(tmp_path)
    check(Process(tmp_path / "another.py", ["--resume", "run"], tmp_path).wait(), name_of(module))
    assert tree(tmp_path) == before


# Services and numbers


@each_back
def test_tracking_without_login(module, tmp_path):
    """--track with no API key anywhere: refused within seconds, before training, and no run directory remains."""
    pytest.importorskip("wandb")
    environ = dict(HOME=str(tmp_path), NETRC=str(tmp_path / "netrc"), WANDB_MODE=None, WANDB_API_KEY=None)
    done = run(module, tmp_path, "--track", "--run-dir", "run", environ=environ)
    check(done, "wandb")
    assert not (tmp_path / "run").exists()


@each_rewarded
def test_training_that_diverges(module, own, tmp_path):
    """The first loss that is not a number ends the run; the last good checkpoint is whole and good."""
    env_id = own(module, bad_after=100)
    given = line(module, total_timesteps=2000, checkpoint_every=64, env_id=env_id, run_dir=tmp_path / "run")
    told = r"(training diverged( before step \d+|: an action is not finite)|a return before step \d+ is not finite)"
    with pytest.raises(module.Refusal, match=rf"^{told}; --resume \S+ continues from step \d+$") as error:
        module.train(module.parse_args(given))
    *seen, saved = map(int, re.findall(r"step (\d+)", str(error.value)))
    step = max(seen, default=264)
    assert 200 < step <= 264, "the bad rewards begin at step 200: 100 of 2 environments"
    assert 64 <= checkpoint(tmp_path / "run")["step"] == saved < step
    assert parameters(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in parameters(tmp_path / "run").values())
    assert steps(tmp_path / "run")[-1] < step
    assert metrics(tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


# Bugs that these tests find


@pytest.mark.parametrize(
    ("test", "given", "name", "old", "new"),
    [
        (test_training_that_diverges, {}, "ppo_clip", "if not np.isfinite(list(metrics.values())).all():", "if False:"),
        (
            test_what_cannot_change_in_a_resumed_run, dict(flag="--seed", value=2, words="seed 1"),
            "td3", '"env_kwargs", "seed"', '"env_kwargs"',
        ),
        (
            test_what_cannot_change_in_a_resumed_run, dict(flag="--total-timesteps", value=200, words="already"),
            "ppo_clip", 'now["total_timesteps"] < self.step', "False",
        ),
        (
            test_directory_of_another_run, {},
            "td3", "if has_checkpoint and not args.resume:", "if False:",
        ),
        (
            test_other_ways_to_reset, dict(mode="Silent"),
            "ppo_clip", "if mode != gym.vector.AutoresetMode.NEXT_STEP:", "if mode == 1:",
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)  # fmt: skip
def test_a_planted_bug_is_found(request, test, given, name, old, new):
    """Each of these edits of a script makes the test fail."""
    fails_with_a_bug(request, test, name, old, new, **given)
