"""IMPALA with real processes: they do what one process does, whoever is killed, and none outlives the run."""

import io
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from launch import Process, is_alive, wait_until
from runs import arguments, checkpoint, equal, leaves, line, metrics, result, resume, steps

from algos import impala

pytest.importorskip("ray")
TESTS = Path(__file__).parent
PATH = os.pathsep.join([str(TESTS), str(TESTS.parent)])
PLAIN = dict(num_envs=4, num_steps=32, total_timesteps=4 * 32 * 8, norm_obs=True, norm_reward=True, seed=5)


def ray_process(argv: list[str], folder: Path) -> Process:
    """The script, whose processes find the environments of the tests; what they write at home, they write here."""
    where = dict(PYTHONPATH=PATH, HOME=str(folder), OMP_NUM_THREADS="1", RAY_AUTH_MODE=os.environ.get("RAY_AUTH_MODE"))
    return Process(impala.__file__, argv, folder, environ=where, path=[folder, TESTS, TESTS.parent])


def signalling(folder: Path, kwargs: dict, **settings) -> list[str]:
    """The command line of an endless run of two samplers."""
    settings = dict(total_timesteps=10**6, checkpoint_every=64, num_samplers=2, max_lag=2) | settings
    env = dict(env_id="envs:test/Signalling-v0", env_kwargs=json.dumps(kwargs))
    return line(impala, **settings | env, run_dir=folder / "run")


def descendants(pid: int) -> dict[int, str]:
    """The processes that this one has started, and those that they have, with their names."""
    found = {}
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in file.read_text().split()]
        except OSError:
            continue
        for child in children:
            if is_alive(child):
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                found |= descendants(child)
    return found


def actors(pid: int, kind: str) -> list[int]:
    """The processes of the learner or of the samplers."""
    return [child for child, name in descendants(pid).items() if name.startswith(f"ray::{kind}")]


def listening(pids: list[int]) -> set[str]:
    """The addresses at which these processes take connections, in the kernel's notation."""
    sockets = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(file)))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = row.split()[:10]
            if state == "0A" and inode in sockets:
                found.add(local.split(":")[0])
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


class Samplers(impala.OneProcess):
    """Several samplers in this process."""

    def __init__(self, run, args):
        super().__init__(run, args)
        self.samplers = [impala.Sampler(impala.collect, **impala.sampler_inputs(run, args, i)) for i in range(2)]
        self.randoms = [None, None]  # each sampler has random numbers of its own
        self.asked = 0

    def sample(self, weights):
        index = self.asked % 2
        self.asked += 1
        if self.randoms[index] is not None:
            impala.torch.set_rng_state(self.randoms[index])
        answer = self.samplers[index].answer(weights)
        self.randoms[index] = impala.torch.get_rng_state()
        return answer


def same(one: Path, two: Path) -> None:
    """The same bits in checkpoint, log and evaluation."""
    for part in ("agent", "optimizer"):
        assert equal(leaves(checkpoint(one)[part]), leaves(checkpoint(two)[part]))
    for row, other in zip(metrics(one), metrics(two), strict=True):
        assert {**row, "wall_time": 0, "SPS": 0} == {**other, "wall_time": 0, "SPS": 0}
    assert result(one)["eval_returns"] == result(two)["eval_returns"]


def test_the_bits_are_those_of_one_process(tmp_path, monkeypatch):
    """Parameters or normalisers that get lost on the way or are read too soon, an order that is left to chance.

    First one sampler without lag, then two with some. And what a newcomer sees of Ray: one line that says how long it
    took, nothing at home, no error.
    """
    first = PLAIN | dict(max_lag=0, optimizer="adam", num_samplers=1)
    then = ["--num-samplers", "2", "--max-lag", "3", "--total-timesteps", "2048"]
    done = ray_process(line(impala, run_dir="there", **first), tmp_path).wait()
    assert (done.rc, done.err) == (0, "")
    assert re.fullmatch(
        r"CartPole-v1 with the defaults for CartPole-v1 and all of no family\nthere: step 0 of 1024\n"
        r"the learner and 1 sampler have started in \d+\.\d s\nthere: evaluation \d+\.\d\d \+- \d+\.\d\d\n",
        done.out,
    )
    assert {path.name for path in tmp_path.iterdir()} == {"there"}
    assert result(tmp_path / "there")["wall_time"] < float(re.search(r"started in (\S+) s", done.out)[1])
    assert result(tmp_path / "there")["processes"] == 3
    impala.train(arguments(impala, tmp_path / "here", **first | dict(num_samplers=0)))
    same(tmp_path / "here", tmp_path / "there")

    done = ray_process(["--resume", "there", *then], tmp_path).wait()
    assert (done.rc, done.err) == (0, "")
    assert result(tmp_path / "there")["processes"] == 4
    assert [row["lag"] for row in metrics(tmp_path / "there")] == [0] * 8 + [0, 1, 2, 3, 3, 3, 3, 3]
    monkeypatch.setattr(impala, "make_processes", Samplers)
    resume(impala, tmp_path / "here", *then)
    same(tmp_path / "here", tmp_path / "there")


OWN = """
import gymnasium as gym
import envs


class Own(envs.ValueOnly):
    def step(self, action):
        raise ValueError("it is my own fault")


gym.register("Own-v0", Own)
"""


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of Ray that have a CPU each."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else a token appears in the home directory
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    node = dict(num_cpus=1, env_vars=dict(PYTHONPATH=PATH, OMP_NUM_THREADS="1"))
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def test_a_cluster(tmp_path, monkeypatch, cluster):
    """A sampler on each node: the same bits again; an error in an environment there keeps its traceback."""
    settings = PLAIN | dict(num_samplers=2, max_lag=1)
    done = ray_process(line(impala, run_dir="there", address=cluster.address, **settings), tmp_path).wait()
    assert (done.rc, done.err) == (0, "")
    monkeypatch.setattr(impala, "make_processes", Samplers)
    impala.train(arguments(impala, tmp_path / "here", **settings))
    same(tmp_path / "here", tmp_path / "there")

    (tmp_path / "own.py").write_text(OWN)
    settings = dict(env_id="own:Own-v0", num_samplers=1, address=cluster.address)
    done = ray_process(line(impala, run_dir="own", **settings), tmp_path).wait()
    assert done.rc == 1
    assert re.search(r'own\.py", line 8, in step\s+raise ValueError\("it is my own fault"\)', done.err)


# Whoever is killed


def start_and_wait(folder: Path) -> tuple[Process, dict[int, str]]:
    """An endless run that has saved a checkpoint, and the processes below it."""
    run = ray_process(signalling(folder, dict(pause=0.001)), folder)
    wait_until((folder / "run" / "checkpoint.pt").exists, 180)
    started = descendants(run.pid)
    assert len(actors(run.pid, "Sampler")) == 2
    assert len(actors(run.pid, "Learner")) == 1
    return run, started


def all_gone(started: dict[int, str]) -> None:
    """None of these processes outlives the run by more than ten seconds, nor do the files that Ray has made."""
    (raylet,) = [name for name in started.values() if "raylet_socket_name" in name]
    folder = Path(re.search(r"raylet_socket_name=(.*?/ray-[^/]+)", raylet)[1])
    wait_until(lambda: not any(map(is_alive, started)) and not folder.exists(), 10)


def promise(folder: Path) -> str:
    """What the last line of a run says that has a checkpoint."""
    return f"--resume {folder / 'run'} continues from step {checkpoint(folder / 'run')['step']}"


def test_a_lost_sampler_and_a_lost_learner(tmp_path):
    """A run that ends with a sampler or goes on without it, one that waits for a dead learner; a lost checkpoint."""
    run, started = start_and_wait(tmp_path)
    first = set(actors(run.pid, "Sampler"))
    os.kill(min(first), signal.SIGKILL)
    wait_until(lambda: metrics(tmp_path / "run", running=True)[-1]["lost_samplers"] == 1, 60)
    step = steps(tmp_path / "run", running=True)[-1]
    wait_until(lambda: steps(tmp_path / "run", running=True)[-1] > step + 6 * 32)
    second = set(actors(run.pid, "Sampler"))
    assert len(second) == 2
    assert len(second & first) == 1
    started |= descendants(run.pid)
    (learner,) = actors(run.pid, "Learner")
    os.kill(learner, signal.SIGKILL)
    run.wait(40)
    all_gone(started)
    assert run.rc == 1
    assert run.err.strip() == f"impala.py: the learner has died; {promise(tmp_path)}"
    assert {row["lost_samplers"] for row in metrics(tmp_path / "run")} == {0, 1}
    assert {row["lag"] for row in metrics(tmp_path / "run")} <= {0, 1, 2}
    assert np.all(np.diff(steps(tmp_path / "run")) == 32)


def test_a_killed_parent(tmp_path):
    """SIGKILL of the process that the user has started: nothing is left of its processes, of Ray, or of Ray's files.

    While it lives, no other machine can reach any of them.
    """
    run, started = start_and_wait(tmp_path)
    found = listening([run.pid, *started])
    assert found
    assert found <= LOOPBACK
    os.kill(run.pid, signal.SIGKILL)
    run.wait(5)
    all_gone(started)
    assert (run.rc, run.err) == (-signal.SIGKILL, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all(tmp_path, number):
    """As from a terminal or a job scheduler: one sentence, a checkpoint of the last step, and nobody left."""
    run, started = start_and_wait(tmp_path)
    for pid in [*started, run.pid]:
        if is_alive(pid):
            os.kill(pid, number)
    run.wait(40)
    all_gone(started)
    assert run.rc == 128 + number
    assert run.err.strip().splitlines()[-1] == f"impala.py: interrupted; {promise(tmp_path)}"
    assert "Traceback" not in run.err
    assert checkpoint(tmp_path / "run")["step"] == steps(tmp_path / "run")[-1]


def test_the_guard_spares_what_was_there_before_ray():
    """wandb's process, without which the end of the log is lost."""
    before, after, guard = [subprocess.Popen(["cat"], stdin=subprocess.PIPE) for _ in range(3)]
    told = io.BytesIO()
    kept = SimpleNamespace(guard=SimpleNamespace(pid=guard.pid, stdin=told), others=[before.pid])
    impala.Processes.tell_guard(kept)
    for process in (before, after, guard):
        process.communicate()
    pids = list(map(int, told.getvalue().split()))
    assert after.pid in pids
    assert not {before.pid, guard.pid} & {*pids}
