"""The comparison of speed: its table by hand, its order with fake commands, its hyperparameters against the peers."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmark import peer, speed
from benchmark.__main__ import main
from benchmark.markdown import least_ratios
from benchmark.speed import make_peer
from benchmark.tasks import OURS, TASKS, Task

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
SCRIPT = """
import argparse, json, os, pathlib
parser = argparse.ArgumentParser()
for name in ("env-id", "run-dir", "total-timesteps", "torch-threads", "eval-episodes", "width"):
    parser.add_argument(f"--{name}")
parser.add_argument("--seed", type=int)
parser.add_argument("--anneal-lr", action=argparse.BooleanOptionalAction)
parser.add_argument("--compile", action="store_true")
args = parser.parse_args()
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
line = ["ours", args.seed, args.total_timesteps, cores, os.environ["OMP_NUM_THREADS"]]
with open(LOG, "a") as file:
    print(json.dumps([*line, os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")]), file=file)
pathlib.Path(args.run_dir, "result.json").write_text(json.dumps(dict(sps=100.0 * args.seed)))
"""
PEER = """#!PYTHON
import json, pathlib, sys
if sys.argv[1] == "-c":
    print(json.dumps({name: "1.0" for name in sys.argv[3:]}))
    sys.exit()
kind, options = sys.argv[2], json.loads(sys.argv[3])
with open(LOG, "a") as file:
    print(json.dumps([kind, options["seed"], options["total_timesteps"]]), file=file)
if pathlib.Path(BROKEN).exists() and options["seed"] == 2:
    raise RuntimeError("the reason")
print(json.dumps(dict(sps=50.0)))
"""


class Bench:
    """A folder with a fake script, a fake interpreter of the peers, and the log of what they were asked."""

    def __init__(self, folder):
        self.folder, self.script, self.log = folder, folder / "algos" / "fake.py", folder / "log"
        self.file, self.broken, self.python = folder / "kept" / "speed.json", folder / "broken", folder / "python"
        self.script.parent.mkdir()
        self.script.write_text(f"LOG = {str(self.log)!r}\n{SCRIPT}")
        text = PEER.replace("PYTHON", sys.executable).replace("BROKEN", repr(str(self.broken)))
        self.python.write_text(text.replace("LOG", repr(str(self.log))))
        self.python.chmod(0o755)

    def __call__(self, *words: str) -> int:
        pythons = [f"{name}={self.python}" for name in speed.PEERS]
        return main(["speed", "--baselines", str(self.file.parent), "--peer-python", *pythons, *words])

    def runs(self) -> list[list]:
        """What was run since the last call, as [side, seed, ...]."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def kept(self) -> dict:
        return json.loads(self.file.read_text())["tasks"]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "TASKS", [Task("fake", "Toy-v0", 10, "sb3.PPO sbx.TD3", dict(width=3), {})])
    monkeypatch.setattr(speed, "ALGOS", tmp_path / "algos")
    monkeypatch.setattr(speed, "make_peer", lambda name: pytest.fail(f"{name} was installed"))
    return Bench(tmp_path)


def entry(ours: list[float], theirs: list[float], **more) -> dict:
    """Runs of these speeds; ours take 10, 20, ... MiB, theirs 5, 10, ..."""
    sides = dict(ours=(ours, 10), peer=(theirs, 5))
    return more | {side: [dict(sps=x, peak_mib=mib * i, seconds=1.0) for i, x in enumerate(values, 1)]
                   for side, (values, mib) in sides.items()}  # fmt: skip


def test_table_by_hand():
    text = speed.summary(
        dict(
            cpu="Abacus",
            versions=dict(torch="2", numpy="3"),
            peers=dict(sb3={"stable-baselines3": "4"}, sbx={"sbx-rl": "5", "jax": "6"}),
            tasks={
                "old sb3.PPO Toy-v0": entry([100.0, 300.0], [50.0, 100.0], steps=2000),
                "td3 sbx.TD3 HalfCheetah-v5": entry([100.0], [50.0], steps=10),
                "td3 sb3.TD3 HalfCheetah-v5": entry([10.0, 20.0, 90.0], [20.0, 10.0, 30.0], steps=10),
            },
            first_success=[dict(seed=i, seconds=s, eval_mean=r) for i, s, r in ((1, 5, 500), (2, 9, 475), (3, 1, 474))],
        )
    )
    assert text.splitlines()[0] == (
        "Abacus, one thread, ours: torch 2, numpy 3; sb3: stable-baselines3 4; sbx: sbx-rl 5, jax 6."
    )
    assert text.splitlines()[4:7] == [  # in the order of TASKS; what is no longer there comes last
        "| td3 | sb3.TD3 | HalfCheetah-v5 | 10 | 20 | 20 | 1.00 [0.50, 3.00], 3 runs | 20 against 10 |",
        "| td3 | sbx.TD3 | HalfCheetah-v5 | 10 | 100 | 50 | 2.00, one run | 10 against 5 |",
        "| old | sb3.PPO | Toy-v0 | 2,000 | 200 | 75 | 2.67 [2.00, 3.00], 2 runs | 15 against 8 |",
    ]
    assert text.endswith(" 9.0 s, median over 3 seeds, 2 of which reach it.\n")


def test_both_sides_run_in_turn(bench, capsys):
    assert bench("--rounds", "2") == 0
    assert [run[:3] for run in bench.runs()] == [
        ["ours", 1, "10"], ["sb3.PPO", 1, 10], ["ours", 2, "10"], ["sb3.PPO", 2, 10],
        ["ours", 1, "10"], ["sbx.TD3", 1, 10], ["ours", 2, "10"], ["sbx.TD3", 2, 10],
    ]  # fmt: skip
    assert "| fake | sbx.TD3 | Toy-v0 | 10 | 150 | 50 | 3.00 [2.00, 4.00], 2 runs |" in capsys.readouterr().out
    kept = bench.kept()["fake sb3.PPO Toy-v0"]
    assert [run["sps"] for run in kept["ours"] + kept["peer"]] == [100, 200, 50, 50]
    assert kept["options"] == dict(width=3, env_id="Toy-v0", total_timesteps=10)


def test_kept_rounds_count_until_script_or_steps_change(bench):
    bench("--rounds", "1")
    bench.runs()
    bench("--rounds", "1")
    assert bench.runs() == []
    bench("--rounds", "2", "--peers", "sb3")
    assert [run[:2] for run in bench.runs()] == [["ours", 2], ["sb3.PPO", 2]]
    assert [len(kept["peer"]) for kept in bench.kept().values()] == [2, 1]
    for words in (["--anew"], ["--steps", "20"]):
        bench("--rounds", "1", "--peers", "sb3", *words)
        assert [run[:2] for run in bench.runs()] == [["ours", 1], ["sb3.PPO", 1]]
    assert [kept["steps"] for kept in bench.kept().values()] == [20, 10]
    bench.script.write_text(bench.script.read_text() + "# faster\n")
    bench("--rounds", "1")
    assert len(bench.runs()) == 4


@pytest.mark.parametrize(("old", "new", "left"), [
    ('"cpu": "', '"cpu": "un', {"fake sb3.PPO Toy-v0"}),
    ('"jax": "', '"jax": "0', {"fake sb3.PPO Toy-v0"}),
    ('"sb3-contrib": "', '"sb3-contrib": "0', {"fake sb3.PPO Toy-v0", "fake sbx.TD3 Toy-v0"}),
])  # fmt: skip
def test_what_cannot_stand_beside_the_new_values_is_dropped(bench, old, new, left):
    bench("--rounds", "1")
    text = bench.file.read_text()
    assert text.count(old) == 1
    bench.file.write_text(text.replace(old, new))
    bench.runs()
    words = ["--rounds", "1", "--peers", "sb3", *["sbx"] * ("jax" in old)]
    if "cpu" in old:
        assert bench(*words) == 2, "hours of measurements are not to be lost without a word"
        assert bench.file.read_text() == text.replace(old, new)
        words.append("--anew")
    bench(*words)
    assert bench.runs()
    assert bench.kept().keys() == left | ({"fake sbx.TD3 Toy-v0"} if "jax" in old else set())


def test_failing_peer_is_told_in_a_sentence_and_costs_its_round_alone(bench, capsys):
    bench.broken.touch()
    assert bench("--rounds", "3", "--peers", "sbx") == 2
    *_, told = capsys.readouterr().err.splitlines()
    assert told.startswith(f"benchmark: {bench.python} ")
    assert told.endswith("failed with exit code 1: RuntimeError: the reason")
    bench.runs()
    bench.broken.unlink()
    assert bench("--rounds", "3", "--peers", "sbx") == 0
    assert [run[:2] for run in bench.runs()] == [["ours", 2], ["sbx.TD3", 2], ["ours", 3], ["sbx.TD3", 3]]


def test_flag_that_a_script_lacks_is_named(tmp_path):
    """Of all that tyro frames, the reason and not the advice below it."""
    path = tmp_path / "old.py"
    path.write_text("import tyro\n\ndef main(seed: int, torch_threads: int, run_dir: str): ...\n\ntyro.cli(main)\n")
    with pytest.raises(ValueError, match=r"failed with exit code 2: Unrecognized options: --nonsense, 3$"):
        speed.run_ours(path, dict(nonsense=3), 1)


@pytest.mark.skipif(not CORES, reason="this system gives no process a core of its own")
def test_one_core_and_one_thread(bench, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    bench("--rounds", "2")
    assert {tuple(run[3:5]) for run in bench.runs() if run[0] == "ours"} == {(1, "1")}
    assert os.sched_getaffinity(0) == CORES


@pytest.fixture
def repository(bench):
    """Git around the scripts: at v1 fake.py is half as fast, and other.py is not there yet."""

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", bench.folder, *identity, *words], check=True, capture_output=True)

    new = bench.script.read_text()
    bench.script.write_text(new.replace("sps=100.0", "sps=50.0").replace('"ours"', '"then"'))
    git("init")
    git("add", "algos")
    git("commit", "-m", "first")
    git("tag", "v1")
    bench.script.write_text(new)
    return bench


def test_against_a_revision(repository, capsys):
    assert repository("--against", "v1", "--rounds", "2") == 0
    runs = repository.runs()
    assert [run[:2] for run in runs] == [["ours", 1], ["then", 1], ["ours", 2], ["then", 2]]
    assert (
        capsys.readouterr()
        .out.splitlines()[2]
        .startswith("| fake | v1 | Toy-v0 | 10 | 150 | 75 | 2.00 [2.00, 2.00], 2 runs | ")
    )
    caches = [run[5] for run in runs]
    assert caches[:2] == caches[2:]
    assert caches[0] != caches[1]
    assert not repository.file.exists()


def test_against_tells_what_was_measured_before_a_failure(repository, capsys):
    repository.script.write_text(repository.script.read_text() + "if args.seed == 2: raise SystemExit('the reason')\n")
    assert repository("--against", "v1", "--rounds", "2") == 2
    out, err = capsys.readouterr()
    assert "| 10 | 100 | 50 | 2.00, one run |" in out
    assert err.splitlines()[-1].endswith("the reason")


@pytest.mark.parametrize(("revision", "reason"), [("v1", "other.py' exists on disk, but not in 'v1'"), ("v2", "'v2'")])
def test_revision_without_the_script_is_told_before_anything_runs(repository, monkeypatch, capsys, revision, reason):
    (repository.folder / "algos" / "other.py").touch()
    monkeypatch.setattr(speed, "TASKS", [*speed.TASKS, speed.TASKS[0]._replace(script="other")])
    assert repository("--against", revision) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"benchmark: --against {revision}: fatal: ")
    assert reason in told
    assert repository.runs() == []


@pytest.mark.parametrize(("words", "reason"), [
    (["--algo", "ppo"], "speed has no task with this algorithm, environment and peers"),
    (["--peer-python", "/usr/bin/python3"], "words like sb3=/path/to/python, not /usr/bin/python3"),
    (["--peer-python", "sb3=/nowhere", "sbx=/nowhere"], "No such file or directory: '/nowhere'"),
])  # fmt: skip
def test_bad_input(bench, capsys, words, reason):
    assert bench(*words) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.endswith(reason)


def test_a_script_of_ours_as_a_peer(bench, monkeypatch, capsys):
    """Run in turn with the flags of both; no column of the README, for it is not others that it is compared with."""
    monkeypatch.setattr(speed, "TASKS", [speed.TASKS[0]._replace(peers="foliorl.other")])
    monkeypatch.setattr(speed, "make_peer", make_peer)
    (bench.script.parent / "other.py").write_text(bench.script.read_text().replace('"ours"', '"other"'))
    assert main(["speed", "--baselines", str(bench.file.parent), "--rounds", "2"]) == 0
    assert [run[:2] for run in bench.runs()] == [["ours", 1], ["other", 1], ["ours", 2], ["other", 2]]
    assert "| fake | foliorl.other | Toy-v0 | 10 | " in capsys.readouterr().out
    assert least_ratios(bench.file.parent) == {}


def test_peers_and_environments_select():
    chosen = [(task.script, task.peers) for task in speed.select("", "HalfCheetah-v5", ["sbx"])]
    assert chosen == [("ppo_clip", "sbx.PPO"), ("ddpg", "sbx.DDPG"), ("td3", "sbx.TD3"), ("sac", "sbx.SAC")]


def each_task(test):
    return pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.script}-{task.env_id}")(test)


@each_task
def test_tasks_are_flags_of_the_script(task):
    args = importlib.import_module(f"algos.{task.script}").Args
    fields = {field.name for field in dataclasses.fields(args)}
    assert not task.extra.keys() & fields, "a flag of ours is set on the other side only"
    made = args(**task.at(0) | OURS)  # raises on unknown names and impossible values
    assert not getattr(made, "anneal_lr", False), "no peer anneals its step size"


def foreign(task: Task) -> list[str]:
    """The classes of others among the peers of a task."""
    return [kind for kind in task.peers.split() if not kind.startswith("foliorl.")]


@each_task
def test_peers_take_every_option(task):
    for kind in foreign(task):
        options = task.at(0) | task.extra | dict(seed=1)
        given = peer.settings(kind, options)
        if "train_freq" in given:  # counted in steps of all environments at once
            assert given["train_freq"] * options["num_envs"] == options["train_frequency"]
        with pytest.raises(ValueError, match="no counterpart of n_layers, nonsense"):
            peer.settings(kind, options | dict(nonsense=1, n_layers=2))


GRADIENT = dict(gamma=0.99, vf_coef=0.5, ent_coef=0.0, max_grad_norm=0.5, normalize_advantage=True, width=64)
PPO = GRADIENT | dict(learning_rate=3e-4, gae_lambda=0.95, clip_range=0.2)
TRPO = dict(learning_rate=1e-3, gamma=0.99, gae_lambda=0.95, target_kl=0.01, n_critic_updates=10, cg_max_steps=10,
    cg_damping=0.1, width=64)  # fmt: skip
REPLAY = dict(n_envs=1, gamma=0.99, learning_rate=3e-4, learning_starts=1000, batch_size=256, buffer_size=1_000_000,
    tau=0.005, train_freq=1, gradient_steps=1, width=256)  # fmt: skip
WANTED = {  # script and environment: what the agents of the peers shall show
    ("ppo_clip", "CartPole-v1"): PPO | dict(n_envs=4, n_steps=128, n_epochs=4, batch_size=128, norms=None),
    ("ppo_clip", "HalfCheetah-v5"): PPO
    | dict(n_envs=1, n_steps=2048, n_epochs=10, batch_size=64, norms=(True, True, 0.99)),
    ("ppo_kl", "CartPole-v1"): PPO | dict(n_envs=4, n_steps=128, n_epochs=4, batch_size=128, norms=None),
    ("trpo_penalty", "CartPole-v1"): PPO | dict(n_envs=4, n_steps=128, n_epochs=4, batch_size=128, norms=None),
    ("reinforce", "CartPole-v1"): GRADIENT | dict(learning_rate=7e-4, n_envs=8, n_steps=5, gae_lambda=0.95, norms=None),
    ("a2c", "CartPole-v1"): GRADIENT | dict(learning_rate=7e-4, n_envs=8, n_steps=5, gae_lambda=0.95, norms=None),
    ("a2c", "HalfCheetah-v5"): GRADIENT
    | dict(learning_rate=7e-4, n_envs=4, n_steps=8, gae_lambda=0.95, norms=(True, True, 0.99)),
    ("actor_critic", "CartPole-v1"): GRADIENT
    | dict(learning_rate=7e-4, n_envs=8, n_steps=5, gae_lambda=0.95, norms=None),
    ("trpo", "CartPole-v1"): TRPO | dict(n_envs=4, n_steps=256, batch_size=128, norms=None),
    ("trpo", "HalfCheetah-v5"): TRPO | dict(n_envs=1, n_steps=2048, batch_size=128, norms=(True, True, 0.99)),
    ("npg", "CartPole-v1"): TRPO | dict(n_envs=4, n_steps=256, batch_size=128, norms=None),
    ("dqn", "CartPole-v1"): REPLAY
    | dict(n_envs=4, learning_rate=1e-3, batch_size=64, buffer_size=100_000, tau=1.0, width=64, max_grad_norm=10.0)
    | dict(target_update_interval=250, exploration_initial_eps=1.0, exploration_final_eps=0.05)
    | dict(exploration_fraction=0.2),
    ("qr_dqn", "CartPole-v1"): REPLAY
    | dict(n_envs=4, learning_rate=1e-3, batch_size=64, buffer_size=100_000, tau=1.0, width=64, max_grad_norm=10.0)
    | dict(target_update_interval=250, exploration_initial_eps=1.0, exploration_final_eps=0.05)
    | dict(exploration_fraction=0.2, n_quantiles=25),
    ("ddpg", "HalfCheetah-v5"): REPLAY | dict(noise=0.1, policy_delay=1, critics=1),
    ("td3", "HalfCheetah-v5"): REPLAY
    | dict(noise=0.1, policy_delay=2, critics=2, target_policy_noise=0.2, target_noise_clip=0.5),
    ("sac", "HalfCheetah-v5"): REPLAY | dict(noise=None, critics=2, entropy="auto"),
}


def look(agent, name: str):
    """A setting of an agent of stable-baselines3 or sbx, as the agent holds it."""
    policy = agent.policy
    if name == "norms":
        norm = agent.get_vec_normalize_env()
        return norm and (norm.norm_obs, norm.norm_reward, norm.gamma)
    if name == "noise":
        return agent.action_noise and set(agent.action_noise._sigma).pop()
    if name == "critics":
        return policy.n_critics if hasattr(policy, "n_critics") else agent.critic.n_critics
    if name == "entropy":
        return getattr(agent, "ent_coef_init", None) or agent.ent_coef
    if name == "width" and hasattr(policy, "net_arch_pi"):
        (width,) = {*policy.net_arch_pi, *getattr(policy, "net_arch_vf", []), *getattr(policy, "net_arch_qf", [])}
        return width
    if name == "width":  # two hidden layers make a square matrix
        (width,) = {len(part) for part in policy.parameters() if part.dim() == 2 and part.shape[0] == part.shape[1]}
        return width
    value = getattr(agent, name)
    return value(1.0) if callable(value) else getattr(value, "frequency", value)


@pytest.mark.parametrize(("task", "kind"), [
    pytest.param(task, kind, id=f"{task.script}-{task.env_id}-{kind}") for task in TASKS for kind in foreign(task)
])  # fmt: skip
def test_peers_are_set_up_as_the_task_says(task, kind):
    """Needs the peer: run with its interpreter."""
    pytest.importorskip("sbx" if kind.startswith("sbx") else "sb3_contrib")
    agent = peer.make_agent(kind, task.at(0) | task.extra | dict(seed=7))
    wanted = WANTED[task[:2]] | dict(seed=7)
    assert {name: look(agent, name) for name in wanted} == wanted
    assert agent.get_env().envs[0].spec.id == task.env_id
    assert agent.device == torch.device("cpu")
    assert getattr(agent, "qf_learning_rate", agent.learning_rate) == agent.learning_rate
