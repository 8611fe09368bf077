"""Tiny runs of the scripts, and what lies in the directories that they leave."""

import functools
import importlib.util
import inspect
import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ALL, MODULES, is_imitation
from launch import Process, flags, tiny


def name_of(module) -> str:
    """The name of a script."""
    return Path(module.__file__).stem


def each(modules):
    """Run the test once for each of these scripts."""
    return pytest.mark.parametrize("module", modules, ids=name_of)


each_module = each(MODULES)
each_rewarded = each([module for module in MODULES if not is_imitation(module)])  # their steps are the environments'
each_off_policy = each([module for module in MODULES if hasattr(module, "ReplayBuffer")])
each_back = each([module for module in MODULES if name_of(module) in ("ppo_clip", "td3")])  # the back is one text


def script(name: str):
    """The script of this name, as a module."""
    return next(module for module in ALL if name_of(module) == name)


def is_continuous(module) -> bool:
    """Whether the script is for Box actions only."""
    return module.Args.env_id == "Pendulum-v1"


def is_discrete(module) -> bool:
    """Whether the script is for Discrete actions only."""
    return 'it must be Discrete")' in Path(module.__file__).read_text()


def is_distributional(module) -> bool:
    """Whether the script learns distributions of returns, on atoms or by quantiles."""
    return hasattr(module.Args, "num_atoms") or hasattr(module.Args, "num_quantiles")


def acts(module) -> bool:
    """Whether the script learns a policy, which its evaluation plays; td_prediction values that of others."""
    return hasattr(module.Agent, "act")


def learns_step_by_step(module) -> bool:
    """Whether each gradient step is on one step of each environment: Sarsa."""
    return not any(hasattr(module.Args, name) for name in ("batch_size", "num_steps", "horizon"))


def line(module, *argv, **settings) -> list[str]:
    """The command line of a tiny run in the environment of the script's defaults; `argv` comes last, so it counts."""
    settings = dict(env_id=module.Args.env_id) | tiny(module, **dict(total_timesteps=256) | settings)
    return [*flags(settings), *map(str, argv)]


def arguments(module, folder: Path, **settings):
    """Args of a tiny run in `folder`."""
    return module.parse_args(line(module, **dict(run_dir=folder) | settings))


def start(module, folder: Path, *argv, **how) -> Process:
    """A process of the script in a folder, under way."""
    return Process(module.__file__, argv, folder, **how)


def run_alone(file: Path, folder: Path, argv: list) -> tuple[Path, str]:
    """Run a copy of the file in an empty folder, with nothing but what is installed; its directory, what it said."""
    done = Process(shutil.copy(file, folder), argv, folder, alone=True).wait()
    assert done.rc == 0, done.out + done.err
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir, done.out + done.err


def resume(module, folder: Path, *argv) -> dict:
    """What `--resume folder` does."""
    return module.train(module.parse_args(["--resume", str(folder), *map(str, argv)]))


def metrics(folder: Path, running: bool = False) -> list[dict]:
    """The lines of metrics.jsonl, each of which must be strict JSON; a running process may be writing one more."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    if running:
        text = text[: text.rfind("\n") + 1]
    try:
        return [json.loads(row, parse_constant=refuse) for row in text.splitlines()]
    except ValueError:
        raise AssertionError(f"no lines of JSON: {text}") from None


def steps(folder: Path, running: bool = False) -> list[int]:
    """The steps that metrics.jsonl knows."""
    return [row["global_step"] for row in metrics(folder, running)]


def config(folder: Path) -> dict:
    """What config.json holds."""
    return json.loads((folder / "config.json").read_text())


def result(folder: Path) -> dict:
    """What result.json holds."""
    return json.loads((folder / "result.json").read_text())


def checkpoint(folder: Path) -> dict:
    """The checkpoint, loaded as plain data."""
    return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)


def leaves(part, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors and numbers in nested containers, by path."""
    if isinstance(part, dict):
        part = {str(key): value for key, value in part.items()}
    elif isinstance(part, list | tuple):
        part = dict(enumerate(part))
    else:
        return {name: torch.as_tensor(part)} if isinstance(part, torch.Tensor | int | float) else {}
    return {path: leaf for key, value in part.items() for path, leaf in leaves(value, f"{name}/{key}").items()}


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of floats in the checkpoint: weights, normalisers, optimiser states."""
    return {path: leaf for path, leaf in leaves(checkpoint(folder)).items() if leaf.ndim and leaf.is_floating_point()}


def equal(one: dict, two: dict) -> bool:
    """Same names, same bits."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def tree(folder: Path) -> dict[str, bytes]:
    """The content of every file below the folder, but for the empty file of the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@functools.cache
def _finished(name: str) -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    module = script(name)
    module.train(arguments(module, Path(folder.name) / "run"))
    return folder


def finished_run(module, to: Path) -> Path:
    """Copy the directory of a finished tiny run of the script to a path, and return that; call it before you patch."""
    folder = Path(_finished(name_of(module)).name) / "run"
    return Path(shutil.copytree(folder, to))


def planted(module, old: str, new: str, folder: Path):
    """A copy of the script with a bug in it, as a module."""
    text = Path(module.__file__).read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    folder.mkdir()
    path = folder / Path(module.__file__).name
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"planted_{path.stem}", path)
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy  # dataclasses look there
    spec.loader.exec_module(copy)
    return copy


def fails_with_a_bug(request, test, name: str, old: str, new: str, **given) -> None:
    """Assert that a test of this directory fails on a copy of the script with a bug in it."""
    folder = request.getfixturevalue("tmp_path")
    given = dict(module=planted(script(name), old, new, folder / "planted")) | given
    for parameter in inspect.signature(test).parameters:
        if parameter not in given:
            given[parameter] = request.getfixturevalue(parameter)
    with pytest.raises((AssertionError, OSError, SystemExit, pytest.fail.Exception)):  # no slip in the bug itself
        test(**given)
