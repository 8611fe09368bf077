"""A3C: one worker is a2c, several share what they should, and no process outlives the run."""

import copy
import itertools
import json
import os
import signal
from pathlib import Path

import envs
import numpy as np
import pytest
import torch
from conftest import make_args, spy
from launch import SERVER, Process, is_alive, wait_until
from off_policy import bugs
from runs import checkpoint, each, equal, fails_with_a_bug, leaves, line, metrics, result, steps

from algos import a2c, a3c

ours = each([a3c])
TESTS = Path(__file__).parent


def trained(module, folder, monkeypatch, **given):
    """The directory of a short training on Tagged environments."""
    monkeypatch.setattr(envs.Tagged, "instances", [])
    plain = dict(env_id="test/Tagged-v0", num_envs=3, num_steps=16, total_timesteps=3 * 16 * 6, learning_rate=1e-2)
    plain |= dict(norm_obs=True, norm_reward=True, anneal_lr=True, ent_coef=0.01, seed=3)
    module.train(make_args(module, folder / module.__name__, **plain | given))
    return folder / module.__name__ / "run"


@ours
@pytest.mark.parametrize("lock", [False, True])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_one_worker_is_a2c(module, optimizer, lock, tmp_path, monkeypatch):
    """The same checkpoint and log, bit for bit: gradients that pile up, a copy that stays behind, another schedule."""
    one = trained(module, tmp_path, monkeypatch, optimizer=optimizer, lock=lock)
    two = trained(a2c, tmp_path, monkeypatch, optimizer=optimizer)
    for part in ("agent", "optimizer"):
        assert equal(leaves(checkpoint(one)[part]), leaves(checkpoint(two)[part]))
    for row, other in zip(metrics(one), metrics(two), strict=True):
        for name in row.keys() - {"wall_time", "SPS"}:
            assert row[name] == other[name], name
    assert result(one)["eval_returns"] == result(two)["eval_returns"]
    assert result(one)["processes"] == 1


COPY = "agent.load_state_dict(shared.agent.state_dict())"
PILED_UP = "parameter.grad = gradient + (0 if parameter.grad is None else parameter.grad)"
SHARE = "1 - shared.steps.sum().item() / args.total_timesteps"


@bugs(
    ("a3c", COPY, "pass"),
    ("a3c", "dict(zip(shared.agent.parameters(), gradients.values()))", "gradients"),
    ("a3c", SHARE, "1 - (shared.steps.sum().item() + N * T) / args.total_timesteps"),
    ("a3c", 'shared.agent.reward_norm.update(batch["discounted"][valid])', "pass"),
    ("a3c", "shared.agent.encoder.update(", "agent.encoder.update("),
    ("a3c", "parameter.grad = gradient", PILED_UP),
    ("a3c", "alpha=0.99", "alpha=0.9"),
)
def test_one_worker_sees(request, name, old, new):
    fails_with_a_bug(request, test_one_worker_is_a2c, name, old, new, optimizer="rmsprop", lock=False)


# Several workers in this process, one update each in turn


def make_shared(module, **given):
    """What workers share, with environments for each, and the arguments."""
    torch.manual_seed(3)
    plain = dict(env_id="test/Tagged-v0", num_workers=3, num_envs=2, num_steps=8, total_timesteps=400, hidden_size=8)
    args = module.Args(**plain | given)
    all_envs = [module.make_envs(args.env_id, args.num_envs) for _ in range(args.num_workers)]
    agent = module.Agent(all_envs[0].single_observation_space, all_envs[0].single_action_space, args)
    optimizer = torch.optim.RMSprop(agent.parameters(), lr=args.learning_rate)
    counters = torch.zeros(args.num_workers + 1, dtype=torch.int64)
    shared = module.Shared(agent, optimizer, counters, module.Lock(args.lock), module.Lock(True))
    return shared, all_envs, args


def turns(workers):
    """The index of each worker that has made an update, in turn, until all have ended."""
    workers = dict(enumerate(workers))
    while workers:
        for index in list(workers):
            if next(workers[index], None) is None:
                del workers[index]
            else:
                yield index


@ours
def test_counter_and_step_size(module, monkeypatch):
    """A schedule by the worker's own steps, a counter that counts twice, a run that goes beyond its end."""
    monkeypatch.setattr(envs.Tagged, "instances", [])
    shared, all_envs, args = make_shared(module, learning_rate=0.01)
    rates = []
    spy(monkeypatch, module, "descend", before=lambda optimizer, _: rates.append(optimizer.param_groups[0]["lr"]))
    workers = [module.work(index, all_envs[index], shared, args) for index in range(3)]
    order = list(turns(workers))
    assert order[:6] == [0, 1, 2, 0, 1, 2]
    assert rates == pytest.approx([0.01 * (1 - 16 * i / 400) for i in range(len(order))])
    assert shared.steps.tolist() == [16 * order.count(index) for index in range(3)] + [0]
    assert 400 - 2 * 3 * 16 < shared.steps.sum() <= 400 - 2 * 16  # two others may be under way at the last look


@bugs(
    ("a3c", SHARE, "1 - 3 * shared.steps[index].item() / args.total_timesteps"),
    ("a3c", "shared.steps[index] += N * T", "shared.steps += N * T"),
    ("a3c", "shared.steps.sum() + W * N * T <= args", "shared.steps.sum() < args"),
    ("a3c", "shared.steps.sum() + W * N * T <= args", "shared.steps.sum() + N * T <= args"),
)
def test_counter_sees(request, name, old, new):
    fails_with_a_bug(request, test_counter_and_step_size, name, old, new)


@ours
def test_a_worker_learns_with_the_copy_that_acted(module, monkeypatch):
    """Another worker updates in between: the gradient stays that of theta', and the step starts at the new theta."""
    seen = []
    for disturbed in (False, True):
        monkeypatch.setattr(envs.Tagged, "instances", [])
        shared, all_envs, args = make_shared(module, num_workers=1)
        with monkeypatch.context() as patch:
            calls = itertools.count()

            def disturb(*_, disturbed=disturbed, shared=shared, calls=calls):
                with torch.no_grad():
                    for parameter in shared.agent.parameters():
                        parameter.add_(disturbed and next(calls) < 100)

            before = []
            spy(patch, module, "compute_gae", before=disturb)
            spy(patch, module, "descend", before=lambda _, gradients, before=before: before.append(dict(gradients)))
            next(module.work(0, all_envs[0], shared, args))
        parameters = torch.nn.utils.parameters_to_vector(shared.agent.parameters()).detach()
        gradients = torch.nn.utils.parameters_to_vector(before[0].values())
        assert list(map(id, before[0])) == list(map(id, shared.agent.parameters()))
        seen.append((parameters, gradients))
    (parameters, gradients), (others, same) = seen
    assert torch.equal(gradients, same)
    torch.testing.assert_close(others, parameters + 1, atol=1e-5, rtol=0)


GRADIENTS = "gradients, metrics = a3c_gradients(agent, batch, args)"


@bugs(("a3c", "copy.deepcopy(shared.agent)", "shared.agent"), ("a3c", GRADIENTS, f"{COPY}; {GRADIENTS}"))
def test_the_copy_sees(request, name, old, new):
    fails_with_a_bug(request, test_a_worker_learns_with_the_copy_that_acted, name, old, new)


class Recorded:
    """A lock that knows whether it is held."""

    def __init__(self):
        self.held = False

    def __enter__(self):
        assert not self.held
        self.held = True

    def __exit__(self, *_):
        self.held = False


@ours
def test_what_is_done_under_which_lock(module, monkeypatch):
    """An update or a moment that two workers may write at once, or a lock that is held while a worker acts."""
    monkeypatch.setattr(envs.Tagged, "instances", [])
    shared, all_envs, args = make_shared(module, num_workers=1, norm_obs=True)
    shared.update_lock = Recorded()
    shared.moments_lock = Recorded()
    held = []

    def note(*_):
        held.append((shared.update_lock.held, shared.moments_lock.held))

    spy(monkeypatch, module, "descend", before=note)
    spy(monkeypatch, module.RunningNorm, "update", before=note)
    spy(monkeypatch, module, "compute_gae", before=note)
    next(module.work(0, all_envs[0], shared, args))
    assert held == [(False, True), (False, False), (True, False), (False, True)]
    assert module.Lock(False).lock is None


MOMENTS = "with shared.moments_lock:\n                shared.agent."


@bugs(
    ("a3c", "with shared.update_lock:", "if True:"),
    ("a3c", "with shared.update_lock:", "with shared.moments_lock:"),
    ("a3c", f"{MOMENTS}reward_norm", "if True:\n                shared.agent.reward_norm"),
    ("a3c", f"{MOMENTS}encoder", "if True:\n                shared.agent.encoder"),
)
def test_the_locks_see(request, name, old, new):
    fails_with_a_bug(request, test_what_is_done_under_which_lock, name, old, new)


@ours
def test_seeds_are_apart(module, monkeypatch):
    """The same episodes in two workers, or again after a resumption."""
    monkeypatch.setattr(envs.Tagged, "instances", [])
    seeds = []
    for resumed in (0, 16, 160):
        shared, all_envs, args = make_shared(module)
        shared.steps[-1] = resumed
        for index in range(3):
            reset = all_envs[index].reset
            spied = lambda seed, reset=reset: (seeds.append(seed), reset(seed=seed))[1]  # noqa: E731
            monkeypatch.setattr(all_envs[index], "reset", spied)
            next(module.work(index, all_envs[index], shared, args))
    each_env = [seed + i for seed in seeds for i in range(2)]
    assert len(set(each_env)) == 18
    assert seeds[0] == module.env_seed(args.seed)


@bugs(
    ("a3c", "(first_iteration * W + index) * N", "(first_iteration + index) * N"),
    ("a3c", "(first_iteration * W + index) * N", "first_iteration * W + index"),
    ("a3c", "(first_iteration * W + index) * N", "first_iteration * N"),
)
def test_seeds_see(request, name, old, new):
    fails_with_a_bug(request, test_seeds_are_apart, name, old, new)


# Several processes


def share(shared) -> None:
    """Move to shared memory and make sure that nothing has changed by that."""
    before = copy.deepcopy(shared.agent.state_dict())
    a3c.share_memory(shared)
    assert equal(before, shared.agent.state_dict())


@pytest.mark.parametrize("optimizer", [torch.optim.RMSprop, torch.optim.Adam])
def test_a_process_shares_all_with_this_one(optimizer, monkeypatch):
    """Parameters, moments of the optimizer, normalisers or counters that are the process's own."""
    found = []
    for apart in (True, False):
        shared, all_envs, args = make_shared(a3c, env_id="envs:test/Tagged-v0", norm_obs=True, total_timesteps=160)
        shared.optimizer = optimizer(shared.agent.parameters(), lr=args.learning_rate)
        share(shared)
        if apart:
            receiver, sender = SERVER.Pipe(duplex=False)
            process = SERVER.Process(target=a3c.serve, args=(sender, 1, shared, args))
            process.start()
            sender.close()
            process.join(20)
            assert process.exitcode == 0
            reports = [receiver.recv() for _ in range(int(shared.steps[1]) // 16)]
        else:
            monkeypatch.setattr(envs.Tagged, "instances", [])
            all_envs = [a3c.make_envs(args.env_id, args.num_envs)]
            torch.manual_seed(a3c.env_seed(args.seed) + 1)
            reports = list(a3c.work(1, all_envs[0], shared, args))
        state = leaves(dict(agent=shared.agent.state_dict(), optimizer=shared.optimizer.state_dict()["state"]))
        found.append((state, reports, shared.steps.tolist()))
    assert equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    assert found[0][2] == [0, 128, 0, 0]


def add_ones(shared, count: int) -> None:
    """So many updates that add 1 to each parameter."""
    gradients = {parameter: -torch.ones_like(parameter) for parameter in shared.agent.parameters()}
    for _ in range(count):
        with shared.update_lock:
            a3c.descend(shared.optimizer, gradients)


def test_with_the_lock_no_update_is_lost():
    """Three processes, each of whose updates adds 1 to 10,000 parameters."""
    shared, _, _ = make_shared(a3c, lock=True, hidden_size=64)
    shared.optimizer = torch.optim.SGD(shared.agent.parameters(), lr=1.0)
    with torch.no_grad():
        for parameter in shared.agent.parameters():
            parameter.zero_()
    share(shared)
    processes = [SERVER.Process(target=add_ones, args=(shared, 300)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    for parameter in shared.agent.parameters():
        assert (parameter == 900).all()


def hold(lock) -> None:
    """Die with the lock in hand."""
    lock.__enter__()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_lock_whose_holder_was_killed():
    """A wait for ever: the first worker looks after the others, and ends the run."""
    workers = a3c.Workers(None, a3c.Args(num_workers=1))
    lock = a3c.Lock(True)
    process = SERVER.Process(target=hold, args=(lock,), name="worker 1")
    process.start()
    process.join(20)
    workers.processes.append(process)
    lock.check = workers.check
    with pytest.raises(SystemExit, match=r"a3c\.py: worker 1 has died with exit code -9; "), lock:
        pass


# The end


def signalling(folder: Path, **settings) -> list[str]:
    """The command line of an endless run of two workers."""
    settings = dict(total_timesteps=10**6, checkpoint_every=64) | settings
    env = dict(env_id="envs:test/Signalling-v0", env_kwargs=json.dumps(dict(pause=0.001)))
    return line(a3c, **settings | env, num_workers=2, run_dir=folder / "run")


def children(pid: int) -> list[int]:
    """The processes that this one has started: workers, and what keeps books of shared memory."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def is_worker(pid: int) -> bool:
    """Whether it is a worker."""
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


@ours
def test_episodes_of_all_workers_count(module, tmp_path, monkeypatch):
    """Here the other worker reports what the first one does."""
    alone = metrics(trained(module, tmp_path / "alone", monkeypatch))
    monkeypatch.setattr(module.Workers, "beside", lambda _, first: ([report, report] for report in first))
    both = metrics(trained(module, tmp_path / "both", monkeypatch))
    assert [row["episodes"] for row in both] == [2 * row["episodes"] for row in alone]
    assert sum(row["episodes"] for row in alone) > 10


@bugs(("a3c", "for episode_returns, _ in reports:", "for episode_returns, _ in reports[:1]:"))
def test_episodes_of_all_workers_see(request, name, old, new):
    fails_with_a_bug(request, test_episodes_of_all_workers_count, name, old, new)


@pytest.mark.parametrize("who", ["worker", "parent", "Ctrl-C"])
def test_no_process_outlives_the_run(who, tmp_path):
    """A worker killed, the first one killed, a signal to all: one sentence, a checkpoint, and nobody is left."""
    run = Process(a3c.__file__, signalling(tmp_path), tmp_path, path=[TESTS, TESTS.parent])
    folder = tmp_path / "run"

    wait_until(lambda: (folder / "checkpoint.pt").exists() and any(map(is_worker, children(run.pid))))
    started = children(run.pid)
    (worker,) = filter(is_worker, started)
    wait_until(lambda: max(np.diff(steps(folder, running=True)), default=0) > 32)  # a line with reports of both
    if who == "Ctrl-C":
        for pid in [run.pid, worker]:
            os.kill(pid, signal.SIGINT)
    else:
        os.kill(dict(worker=worker, parent=run.pid)[who], signal.SIGKILL)
    run.wait(8)
    wait_until(lambda: not any(map(is_alive, started)), 8)  # a moment on an idle machine
    last = run.err.strip().splitlines()[-1] if run.err.strip() else ""
    promise = f"--resume {folder} continues from step {checkpoint(folder)['step']}"
    if who == "worker":
        assert run.rc == 1
        assert run.err.strip() == f"a3c.py: worker 1 has died with exit code -9; {promise}"
    elif who == "Ctrl-C":
        assert run.rc == 128 + signal.SIGINT
        assert last == f"a3c.py: interrupted; {promise}"
        assert "Traceback" not in run.err
    else:
        assert (run.rc, run.err) == (-signal.SIGKILL, "")


@ours
@pytest.mark.parametrize("seconds", [60])
def test_workers_whose_environments_have_processes(module, seconds, tmp_path):
    """Closing such an environment waits for a process that would inherit that its worker is deaf, for ever."""
    settings = dict(env_id="envs:test/Simulated-v0", num_workers=2, run_dir="run")
    done = Process(module.__file__, line(module, **settings), tmp_path, path=[TESTS, TESTS.parent]).wait(seconds)
    assert done.rc == 0, done.err
    assert result(tmp_path / "run")["processes"] == 2


@bugs(("a3c", "    prepare_forks()\n    torch", "    torch"))
def test_processes_of_environments_see(request, name, old, new):
    fails_with_a_bug(request, test_workers_whose_environments_have_processes, name, old, new, seconds=10)


def test_two_workers_finish_a_run(tmp_path):
    """Steps or episodes of one worker only, steps beyond the end, a worker that is not waited for."""
    settings = dict(total_timesteps=4000, num_envs=2, num_steps=8, num_workers=2, run_dir="run", lock=True)
    done = Process(a3c.__file__, line(a3c, **settings), tmp_path, path=[TESTS.parent]).wait(60)
    assert done.rc == 0, done.err
    found = result(tmp_path / "run")
    assert found["processes"] == 2
    assert 4000 - 2 * 2 * 16 < found["trained_steps"] <= 4000
    assert found["trained_steps"] == steps(tmp_path / "run")[-1] == checkpoint(tmp_path / "run")["step"]
    assert all(step > 0 for step in np.diff(steps(tmp_path / "run")))
