"""DD-PPO with real processes: two are one on the joined batch, agree on all that counts, and end together."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import envs
import numpy as np
import pytest
import torch
from conftest import make_args
from launch import Process, is_alive, wait_until
from off_policy import bugs
from runs import checkpoint, each, equal, fails_with_a_bug, leaves, line, metrics, result, steps

from algos import ddppo, ppo_clip

ours = each([ddppo])
TESTS = Path(__file__).parent
DRIVER = TESTS / "ddppo_process.py"


def free_port() -> str:
    """A port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_processes(script, argv, folder: Path, count: int = 2, environ=None) -> list[Process]:
    """The script in so many processes that know of one another as torchrun would let them."""
    environ = (environ or {}) | dict(
        WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), OMP_NUM_THREADS="1"
    )
    started = []
    for rank in range(count):
        ranks = dict(RANK=str(rank), LOCAL_RANK=str(rank))
        started.append(Process(script, argv, folder, environ=environ | ranks, path=[TESTS, TESTS.parent]))
    return started


def signalling(folder: Path, kwargs: dict, *argv, **settings) -> list[str]:
    """The command line of a run in the environment that sends signals to its process."""
    settings = dict(total_timesteps=10**6, checkpoint_every=64, timeout=20) | settings
    env = dict(env_id="envs:test/Signalling-v0", env_kwargs=json.dumps(kwargs))
    return line(ddppo, *argv, **settings | env, run_dir=folder / "run")


# Two processes and one


def joined(module, folder: Path, count: int, num_envs: int, **settings) -> list[dict]:
    """What the driver saw in each of so many processes that train on Tagged environments in float64."""
    settings = dict(num_envs=num_envs, num_steps=16, total_timesteps=16 * 4 * 10) | settings
    folder.mkdir(parents=True)
    argv = [module.__file__, json.dumps(settings | dict(run_dir=str(folder / "run")))]
    for process in start_processes(DRIVER, argv, folder, count):
        assert process.wait(30).rc == 0, process.err
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


@functools.cache
def alone() -> dict:
    """The same environments in one process."""
    with tempfile.TemporaryDirectory() as folder:
        (seen,) = joined(ddppo, Path(folder) / "one", 1, 4)
    return seen


def check_two_are_one(module, folder: Path) -> None:
    one = alone()
    first, second = joined(module, folder / "two", 2, 2)
    assert first["rows"] != second["rows"], "as many valid rows in each process"
    assert [sum(rows) for rows in zip(first["rows"], second["rows"])] == one["rows"]
    assert equal(first["agent"], second["agent"])
    for name, tensor in one["agent"].items():
        torch.testing.assert_close(first["agent"][name], tensor, atol=1e-10, rtol=0, msg=name)
    for line_of_one, line_of_two in zip(one["log"], first["log"], strict=True):
        for name in line_of_one.keys() - {"wall_time", "SPS"}:
            assert line_of_two[name] == pytest.approx(line_of_one[name], abs=1e-6), name


@ours
def test_two_processes_are_one_on_the_joined_batch(tmp_path, module):
    """Means of means where rows are unequal, statistics or a clipping of each process alone, a log of the first."""
    check_two_are_one(module, tmp_path)


SUMS = "[n_w * mean for mean in means] + [n_w]"


@bugs(
    ("ddppo", SUMS, "means + [n_w / num_rows]"),
    ("ddppo", "agent.parameters(), args)\n", "agent.parameters(), args, max_norm=args.max_grad_norm)\n"),
    ("ddppo", "gather_rows(advantages[valid])", "advantages[valid]"),
    ("ddppo", 'gather_rows(batch["discounted"][valid])', 'batch["discounted"][valid]'),
    ("ddppo", 'gather_rows(batch["obs"].float())', 'batch["obs"]'),
    ("ddppo", "[score for returns, _ in reports for score in returns]", "reports[0][0]"),
)
def test_two_processes_see(request, name, old, new):
    fails_with_a_bug(request, test_two_processes_are_one_on_the_joined_batch, name, old, new)


@ours
def test_the_group_ends_before_the_interpreter(tmp_path, module):
    """Its threads, if the interpreter ends before them, abort some runs. In a Python that has imported nothing yet."""
    settings = dict(num_envs=4, num_steps=16, total_timesteps=64, run_dir=str(tmp_path / "run"))
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    group = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    command = [sys.executable, str(DRIVER), module.__file__, json.dumps(settings)]
    subprocess.run(command, env=os.environ | group | dict(PYTHONPATH=paths), timeout=60, check=True)
    assert "gloo" not in (tmp_path / "0.threads").read_text()


@bugs(("ddppo", "torch.compiler.reset()", "pass"), ("ddppo", "atexit.register(dist.destroy_process_group)", "pass"))
def test_the_end_of_the_group_sees(request, name, old, new):
    fails_with_a_bug(request, test_the_group_ends_before_the_interpreter, name, old, new)


@ours
def test_the_rows_of_all_processes(tmp_path, module):
    """Minibatches drawn by each process: no row lost, the same number of steps though one has fewer rows than asked."""
    settings = dict(num_steps=4, num_minibatches=8, total_timesteps=8 * 4 * 2, random=True)
    first, second = joined(module, tmp_path / "two", 2, 2, **settings)
    assert len(first["rows"]) == len(second["rows"])
    assert min(first["rows"] + second["rows"]) > 0
    assert equal(first["agent"], second["agent"])


@bugs(
    ("ddppo", "fewest(num_rows, device)", "num_rows"),
    ("ddppo", "tensor_split(num_minibatches)", "tensor_split(args.num_minibatches)"),
)
def test_the_rows_see(request, name, old, new):
    fails_with_a_bug(request, test_the_rows_of_all_processes, name, old, new)


def check_seeds(module, folder: Path) -> None:
    """Every environment of every process has a seed of its own, and so have the actions, also after a resumption."""
    settings = dict(total_timesteps=128, num_steps=16, random=True)
    before = joined(module, folder / "one", 2, 2, **settings)
    after = joined(module, folder / "two", 2, 2, **settings | dict(total_timesteps=256, copy=str(folder / "one/run")))
    seeds = [seen["seed"] + i for seen in before + after for i in range(2)]
    assert len(set(seeds)) == 8
    draws = [seen["draw"] for seen in before + after]
    assert len(set(draws)) == 4
    assert all(seen["start"] == 128 for seen in after)
    assert equal(after[0]["loaded"], after[1]["loaded"])
    for name, tensor in before[1]["agent"].items():
        assert torch.equal(after[1]["loaded"][f"agent/{name}"], tensor)
    assert any(name.startswith("moments/") for name in after[1]["loaded"])


@ours
def test_seeds_are_apart(tmp_path, module):
    """The same episodes in each process, from the start or again after a resumption; a state that only one resumes."""
    check_seeds(module, tmp_path)


SEED = "(first_iteration * W + rank) * N"


@bugs(
    ("ddppo", SEED, "first_iteration * N"),
    ("ddppo", SEED, "(first_iteration * W + rank)"),
    ("ddppo", SEED, "rank * N"),
    ("ddppo", "env_seed(args.seed, run.step + rank)", "args.seed"),
    ("ddppo", "parts[name].load_state_dict(part_state)", "pass"),
    ("ddppo", "self.step, state = message", "_, state = message"),
)
def test_seeds_see(request, name, old, new):
    fails_with_a_bug(request, test_seeds_are_apart, name, old, new)


@ours
def test_its_defaults_are_those_of_ppo_clip(module):
    """Without torchrun it is ppo_clip.py, in every environment."""
    assert ppo_clip.FAMILIES == module.FAMILIES
    theirs = {field.name: field.default for field in fields(ppo_clip.Args)}
    assert {field.name: field.default for field in fields(module.Args)} == theirs | dict(timeout=module.Args.timeout)


@ours
@pytest.mark.parametrize("env_id", ["test/Tagged-v0", "test/TaggedBox-v0"])
def test_one_process_is_ppo_clip(env_id, tmp_path, monkeypatch, module):
    """Without torchrun: the same checkpoint and log, bit for bit."""
    given = dict(env_id=env_id, num_envs=3, num_steps=16, total_timesteps=3 * 16 * 5, num_minibatches=4, seed=3)
    given |= dict(norm_obs=True, norm_reward=True, anneal_lr=True, learning_rate=0.01, ent_coef=0.01)
    given |= dict(anneal_clip=True, clip_coef=0.1)
    for script in (module, ppo_clip):
        monkeypatch.setattr(envs.Tagged, "instances", [])
        folder = tmp_path / script.__name__.split(".")[-1]
        script.train(make_args(script, folder, **given))
        if script is module:
            one = folder / "run"
    two = tmp_path / "ppo_clip" / "run"
    for name in ("agent", "optimizer"):
        assert equal(leaves(checkpoint(one)[name]), leaves(checkpoint(two)[name]))
    for row, other in zip(metrics(one), metrics(two), strict=True):
        for column in row.keys() - {"wall_time", "SPS"}:
            assert row[column] == other[column]
    assert result(one)["eval_returns"] == result(two)["eval_returns"]
    assert result(one)["processes"] == 1


@bugs(
    ("ddppo", "remaining if args.anneal_clip", "remaining**2 if args.anneal_clip"),
    ("ddppo", "anneal(optimizer, remaining)", "anneal(optimizer, remaining**2)"),
)
def test_one_process_sees(request, name, old, new):
    fails_with_a_bug(request, test_one_process_is_ppo_clip, name, old, new, env_id="test/Tagged-v0")


# The end


def test_log_and_result_of_two_processes(tmp_path):
    """Steps and episodes of one process only; a second process that prints or writes too."""
    settings = dict(run_dir="run", total_timesteps=256, num_envs=2, num_steps=16)
    first, second = [process.wait() for process in start_processes(ddppo.__file__, line(ddppo, **settings), tmp_path)]
    assert (first.rc, second.rc) == (0, 0), first.err + second.err
    assert steps(tmp_path / "run") == [64, 128, 192, 256]
    assert result(tmp_path / "run")["processes"] == 2
    assert result(tmp_path / "run")["trained_steps"] == 256
    assert first.out.splitlines()[-1].startswith("run: evaluation")
    assert len(second.out.splitlines()) == 1  # with which defaults it runs
    assert second.err == ""


@ours
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_both(rank, tmp_path, module):
    """A process that waits for ever for the one that was told to stop; a stop without a checkpoint."""
    processes = start_processes(module.__file__, signalling(tmp_path, dict(pause=0.001)), tmp_path)
    wait_until((tmp_path / "run" / "checkpoint.pt").exists)
    os.kill(processes[rank].pid, signal.SIGTERM)
    first, second = [process.wait(5) for process in processes]
    assert (first.rc, second.rc) == (128 + signal.SIGTERM, 128 + signal.SIGTERM), first.err + second.err
    step = steps(tmp_path / "run")[-1]
    assert checkpoint(tmp_path / "run")["step"] == step
    sentence = f"interrupted; --resume {tmp_path / 'run'} continues from step {step}"
    assert (first.err + second.err).count(sentence) == 1


@bugs(("ddppo", "Run.stop_signal = max(stop_signal for _, stop_signal in reports)", "pass"))
def test_a_signal_sees(request, name, old, new):
    fails_with_a_bug(request, test_a_signal_to_one_process_stops_both, name, old, new, rank=1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run(rank, tmp_path):
    """A process that waits for ever, a traceback, a lost checkpoint."""
    processes = start_processes(ddppo.__file__, signalling(tmp_path, dict(pause=0.001)), tmp_path)
    wait_until((tmp_path / "run" / "checkpoint.pt").exists)
    os.kill(processes[rank].pid, signal.SIGKILL)
    other = processes[1 - rank].wait(10)  # not as long as a timeout
    processes[rank].wait()
    assert other.rc == 1
    assert len(other.err.strip().splitlines()) == 1, other.err
    assert "ddppo.py: another process has died or does not answer" in other.err
    if rank == 1:
        assert f"--resume {tmp_path / 'run'} continues from step {checkpoint(tmp_path / 'run')['step']}" in other.err


@ours
def test_a_process_that_does_not_answer(tmp_path, module):
    """An environment that hangs: the other process waits for `timeout` seconds, not for ever."""
    argv = signalling(tmp_path, dict(pause=0.001), "--timeout", 4)
    first, second = start_processes(module.__file__, argv, tmp_path)
    wait_until((tmp_path / "run" / "checkpoint.pt").exists)
    os.kill(second.pid, signal.SIGSTOP)
    try:
        first.wait(12)
    finally:
        os.kill(second.pid, signal.SIGKILL)
        second.wait()
    assert first.rc == 1, first.err
    assert "ddppo.py: another process has died or does not answer" in first.err


@bugs(("ddppo", "backend, timeout=timedelta(seconds=args.timeout)", "backend"))
def test_a_process_that_does_not_answer_sees(request, name, old, new):
    fails_with_a_bug(request, test_a_process_that_does_not_answer, name, old, new)


def test_a_divergence_stops_both(tmp_path):
    """A process that goes on, or waits, when the other one has found numbers that are none."""
    argv = line(ddppo, "--learning-rate", "1e38", run_dir="run", total_timesteps=10**6, num_envs=2, num_steps=16)
    first, second = [process.wait(20) for process in start_processes(ddppo.__file__, argv, tmp_path)]
    assert (first.rc, second.rc) == (2, 2)
    assert "ddppo.py: training diverged before step" in first.err
    assert second.err == ""


def test_a_refusal_is_said_once(tmp_path):
    """A directory that holds a run, which only the first process looks at: the other one ends with it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").touch()
    processes = start_processes(ddppo.__file__, line(ddppo, run_dir="run"), tmp_path)
    first, second = [process.wait(20) for process in processes]
    assert (first.rc, second.rc) == (2, 2)
    assert first.err.strip() == "ddppo.py: run holds a run already, which --resume continues"
    assert second.err == ""


def test_a_batch_of_all_processes_fits_into_the_run(tmp_path):
    """A run of no iteration, because each process alone would fit."""
    argv = line(ddppo, run_dir="run", total_timesteps=48, num_envs=2, num_steps=16)
    for process in start_processes(ddppo.__file__, argv, tmp_path):
        assert process.wait(20).rc == 2
        assert "num_envs * num_steps of 2 processes = 64 may not exceed total_timesteps" in process.err


def test_a_restart_goes_on_from_the_checkpoint(tmp_path):
    """A restart by torchrun that begins anew or is refused, and one that could find no checkpoint."""
    settings = dict(signals=[[130, signal.SIGKILL]], length=10)  # in the fifth of six iterations; then no more
    argv = signalling(tmp_path, settings, total_timesteps=400, eval_episodes=1)
    for process in start_processes(ddppo.__file__, argv, tmp_path):
        assert process.wait(20).rc != 0
    assert checkpoint(tmp_path / "run")["step"] == 256
    restart = dict(TORCHELASTIC_RESTART_COUNT="1", TORCHELASTIC_MAX_RESTARTS="1")
    for process in start_processes(ddppo.__file__, argv, tmp_path, environ=restart):
        assert process.wait(20).rc == 0, process.err
    assert steps(tmp_path / "run") == list(range(64, 385, 64))
    assert result(tmp_path / "run")["trained_steps"] == 384
    for process in start_processes(ddppo.__file__, line(ddppo), tmp_path, environ=restart):
        assert process.wait(20).rc == 2
        assert "torchrun --max-restarts needs --run-dir, where a restart finds the checkpoint" in process.err


def test_nothing_outlives_torchrun(tmp_path):
    """SIGKILL of torchrun, which can tell its processes nothing."""
    environ = os.environ | dict(PYTHONPATH=os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ddppo.__file__]
    argv = signalling(tmp_path, dict(pause=0.001))
    with open(tmp_path / "output", "w") as output:
        running = subprocess.Popen([*command, *argv], cwd=tmp_path, env=environ, stdout=output, stderr=output)
    wait_until((tmp_path / "run" / "checkpoint.pt").exists, 40)
    children = [int(pid) for pid in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()]
    assert len(children) >= 2
    running.kill()
    running.wait()
    wait_until(lambda: not any(map(is_alive, children)), 8)  # half a second on an idle machine
    assert np.isfinite(checkpoint(tmp_path / "run")["step"])
