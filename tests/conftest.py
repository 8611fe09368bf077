"""What the test modules share: the scripts under test, imported, and small helpers to run and watch them."""

import importlib
from pathlib import Path

import pytest
import torch

SCRIPTS = sorted((Path(__file__).parents[1] / "algos").glob("*.py"))
ALL = [importlib.import_module(f"algos.{script.stem}") for script in SCRIPTS]


def is_language(module) -> bool:
    """Whether the script learns to write: its steps are tokens and its environment is a task of its own."""
    return hasattr(module.Args, "max_new_tokens")


def is_imitation(module) -> bool:
    """Whether the script learns from demonstrations: its steps are samples and no reward teaches it anything."""
    return hasattr(module.Args, "top_fraction")


MODULES = [module for module in ALL if not is_language(module)]  # they act in environments of Gymnasium
LANGUAGE = [module for module in ALL if is_language(module)]
ON_POLICY = [module for module in MODULES if hasattr(module, "compute_gae")]


def pytest_configure(config):
    config.option.log_level = config.option.log_level or "WARNING"  # the compiler's log would bury a failure


@pytest.hookimpl(optionalhook=True, wrapper=True)
def pytest_xdist_auto_num_workers():
    """Three for two cores, since a sixth of the time tests wait for processes that they have started."""
    return 3 * (yield) // 2


@pytest.fixture(autouse=True)
def _as_in_a_new_process():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for module in ALL:
        module.can_compile.cache_clear()
    yield
    torch.set_float32_matmul_precision("highest")  # after the test, for fixtures of a module come before this one


def on_policy(test):
    """Run the test once for each script that learns advantages with compute_gae."""
    return pytest.mark.parametrize("module", ON_POLICY, ids=lambda module: module.__name__.split(".")[-1])(test)


def make_args(module, folder, **given):
    """Arguments of a short plain run in a folder; those of `given` that the script does not have are left out."""
    plain = dict(run_dir=str(folder / "run"), eval_episodes=2, torch_threads=1, norm_obs=False, norm_reward=False)
    plain |= dict(anneal_lr=False, compile=False)
    plain |= dict(num_workers=1, num_samplers=0, max_lag=0)  # of other processes, tests see nothing
    plain |= dict(demonstrations="uniform", num_demonstrations=2)  # there is a demonstrator in every environment
    return module.Args(**{name: value for name, value in (plain | given).items() if hasattr(module.Args, name)})


def spy(monkeypatch, module, name, before=None, after=None):
    """Let before(*inputs) and after(output, *inputs) see every call of a function of a module."""
    function = getattr(module, name)

    def spied(*inputs, **options):
        if before:
            before(*inputs)
        output = function(*inputs, **options)
        if after:
            after(output, *inputs)
        return output

    monkeypatch.setattr(module, name, spied)


def loss_name(module):
    """The name of the script's loss function, loss(agent, batch, ...)."""
    return next(name for name in vars(module) if name.endswith("_loss"))


def learner_name(module):
    """The name of the function, f(agent, batch, ...), that gets the whole batch of an iteration first."""
    names = ("natural_gradient_step", "trust_region_step", loss_name(module))
    return next(name for name in names if hasattr(module, name))
