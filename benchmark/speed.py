"""Measures our scripts against their peers or their own past: one core, in alternating runs."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from tqdm import tqdm

from benchmark.run import Refusal, read_object, replace_text
from benchmark.tasks import OURS, TASKS, Task

FOLDER = Path(__file__).parent
ALGOS = FOLDER.parent / "algos"
PEERS = dict(  # packages, for which each peer has an environment of its own; a script of ours needs none
    sb3=("stable-baselines3", "sb3-contrib"), sbx=("sbx-rl", "jax"), foliorl=()
)


def select(algo: str, env: str, peers: Sequence[str]) -> list[Task]:
    """The tasks of a script and an environment, "" for all, each with those of its classes that are of the peers."""
    chosen = []
    for task in TASKS:
        kinds = [kind for kind in task.peers.split() if kind.split(".")[0] in peers]
        if kinds and algo in ("", task.script) and env in ("", task.env_id):
            chosen.append(task._replace(peers=" ".join(kinds)))
    if not chosen:
        raise Refusal("speed has no task with this algorithm, environment and peers")
    return chosen


@contextmanager
def one_core() -> Iterator[None]:
    """Everything started within shares one core, where the system can be told: XLA does not heed OMP_NUM_THREADS."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def timed(words: list[str], **variables: str) -> dict:
    """Run a command with one thread; its output, seconds from start to end and peak resident memory in MiB."""
    threads = dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", XLA_FLAGS="--xla_cpu_multi_thread_eigen=false")
    environment = os.environ | threads | dict(JAX_PLATFORMS="cpu") | variables
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _, status, usage = os.wait4(process.pid, 0)  # unlike wait(), tells what this one child used
        except BaseException:
            process.kill()
            process.wait()  # else it may still write to a folder that is removed next
            raise
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        framed = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]  # by tyro, its advice last
        told = framed[0] if framed else text.strip().rpartition("\n")[2]
        raise Refusal(f"{shlex.join(words)} failed with exit code {process.returncode}: {told}")
    return dict(text=text, seconds=seconds, peak_mib=usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def run_ours(script: Path, options: dict, seed: int, **variables: str) -> dict:
    """One command of ours: what `timed` says and result.json."""
    words = [sys.executable, str(script), "--torch-threads", "1"]
    for key, value in (options | dict(seed=seed)).items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    with tempfile.TemporaryDirectory() as run_dir:
        measured = timed([*words, "--run-dir", run_dir], **variables)
        return measured | json.loads(Path(run_dir, "result.json").read_text())


def run_peer(python: str, kind: str, options: dict, seed: int) -> dict:
    """One command of the peer: what `timed` says and its sps."""
    measured = timed([python, str(FOLDER / "peer.py"), kind, json.dumps(options | dict(seed=seed))])
    return measured | json.loads(measured["text"].splitlines()[-1])


def in_turn(label: str, ours: Callable, theirs: Callable, rounds: int, entry: dict) -> Iterator[None]:
    """Run both with equal seeds until the entry holds so many runs of each; yields after each round.

    In turn, so that a slow hour of the machine hits both.
    """
    for seed in tqdm(range(len(entry["ours"]) + 1, rounds + 1), label, unit="round", disable=None):
        runs = dict(ours=ours(seed), peer=theirs(seed))
        for side, run in runs.items():
            entry[side].append({key: run[key] for key in ("sps", "peak_mib", "seconds")})
        yield


def make_peer(peer: str) -> str:
    """The interpreter of a virtual environment that holds the peer, with our versions of what both use."""
    if not PEERS[peer]:
        return sys.executable
    folder = FOLDER / "peers" / peer
    python = str(folder / "bin" / "python")
    if not (folder / "ready").exists():
        names = ("torch", "numpy", "gymnasium[mujoco]", "mujoco")
        pins = [f"{name}=={importlib.metadata.version(name.split('[')[0]).partition('+')[0]}" for name in names]
        make = [sys.executable, "-m", "venv", str(folder)]
        install = [python, "-m", "pip", "install", "--quiet", *pins, *PEERS[peer]]
        if any(subprocess.run(command).returncode for command in (make, install)):
            raise Refusal(f"{peer} could not be installed: --peer-python {peer}=PYTHON takes one that has it")
        (folder / "ready").touch()
    return python


def cpu_name() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def machine() -> dict:
    """What measurements must agree in to stand side by side."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "gymnasium", "numpy", "mujoco")}
    return dict(cpu=cpu_name(), cores=os.cpu_count(), python=platform.python_version(), versions=versions)


def peer_versions(peer: str, python: str, ours: dict) -> dict:
    """Versions of the peer's own packages, and of the common ones where they are not ours."""
    ask = "import importlib.metadata as m, json, sys; print(json.dumps({x: m.version(x) for x in sys.argv[1:]}))"
    found = json.loads(timed([python, "-c", ask, *PEERS[peer], *ours])["text"])
    return {name: version for name, version in found.items() if ours.get(name) != version}


def measure(
    path: Path, tasks: list[Task], pythons: dict[str, str], rounds: int, steps: int, seeds: list[int], anew: bool
) -> dict:
    """Measure what the file lacks of so many rounds; returns what it holds, raw, for any statistic to be taken from.

    `pythons` are the interpreters of the peers. Kept rounds count if they are of the same scripts and options; those
    with other versions of a peer are dropped. Raises Refusal for a file of another machine, unless measured `anew`.
    """
    here = machine()
    found = read_object(path) if path.exists() else {}
    if any(found.get(key) != value for key, value in here.items()):
        if found and not anew:
            raise Refusal(f"{path} is of another machine or other versions: --anew replaces it, --baselines FOLDER not")
        found = here | dict(peers={}, tasks={}, first_success=[])
    for peer, python in pythons.items():
        versions = peer_versions(peer, python, here["versions"])
        if found["peers"].get(peer) != versions:
            found["tasks"] = {key: entry for key, entry in found["tasks"].items() if f" {peer}." not in key}
            found["peers"][peer] = versions
    with one_core():
        for task, kind in [(each, kind) for each in tasks for kind in each.peers.split()]:
            key = f"{task.script} {kind} {task.env_id}"
            library, name = kind.split(".")
            script = ALGOS / f"{task.script}.py"
            texts = [script.read_bytes()]
            if library == "foliorl":
                texts.append((ALGOS / f"{name}.py").read_bytes())
            version = hashlib.sha256(b"".join(texts)).hexdigest()
            theirs = task.at(steps) | task.extra
            what = dict(steps=steps or task.steps, options=theirs, sha256=version)
            entry = found["tasks"].get(key, {})
            if anew or any(entry.get(name) != value for name, value in what.items()):
                entry = what | dict(ours=[], peer=[])
            ours = partial(run_ours, script, task.at(steps) | OURS)
            if library == "foliorl":
                peer = partial(run_ours, ALGOS / f"{name}.py", task.at(steps) | OURS)
            else:
                peer = partial(run_peer, pythons[library], kind, theirs)
            for _ in in_turn(key, ours, peer, rounds, entry):
                found["tasks"][key] = entry
                replace_text(path, json.dumps(found, indent=1) + "\n")
    if seeds and any(task[:2] == ("ppo_clip", "CartPole-v1") for task in tasks):  # as a user would type it
        runs = [run_ours(ALGOS / "ppo_clip.py", dict(env_id="CartPole-v1"), seed) for seed in seeds]
        found["first_success"] = [{key: run[key] for key in ("seed", "seconds", "eval_mean")} for run in runs]
        replace_text(path, json.dumps(found, indent=1) + "\n")
    return found


def against(revision: str, tasks: list[Task], rounds: int, steps: int) -> None:
    """Print how our scripts compare with those of a git revision, a row as soon as it is known."""
    with tempfile.TemporaryDirectory() as folder, one_core():
        now = Path(folder, "now")
        then = Path(folder, "then")
        shutil.copytree(ALGOS, now)
        then.mkdir()
        for script in {f"{task.script}.py" for task in tasks}:
            shown = subprocess.run(["git", "-C", str(ALGOS), "show", f"{revision}:./{script}"], capture_output=True)
            if shown.returncode:
                raise Refusal(f"--against {revision}: {shown.stderr.decode().strip()}")
            (then / script).write_bytes(shown.stdout)
        print(HEAD)
        for task in tasks:
            options = task.at(steps) | OURS
            runs = []
            for side in (now, then):
                cache = str(side)  # the compiler's caches apart, so that neither side profits from the other
                runs.append(partial(run_ours, side / f"{task.script}.py", options, TORCHINDUCTOR_CACHE_DIR=cache))
            entry: dict = dict(steps=steps or task.steps, ours=[], peer=[])
            try:
                for _ in in_turn(f"{task.script} {task.env_id}", *runs, rounds, entry):
                    pass
            finally:  # also on Ctrl-C
                if entry["ours"]:
                    print(row(task.script, revision, task.env_id, entry))


HEAD = "| Script | Against | Environment | Steps | ours, steps/s | theirs, steps/s | ratio [min, max] | memory, MiB |"
HEAD += "\n|" + "---|" * 8


def middle(entry: dict, side: str, name: str) -> float:
    """The median of a figure over the runs of a side, "ours" or "peer"."""
    return median(run[name] for run in entry[side])


def ratio(entry: dict) -> float:
    """How many times as fast as the other side we are."""
    return middle(entry, "ours", "sps") / middle(entry, "peer", "sps")


def row(script: str, peer: str, env_id: str, entry: dict) -> str:
    """A line of the table: medians, and the range of the ratio over the rounds."""
    ratios = [ours["sps"] / theirs["sps"] for ours, theirs in zip(entry["ours"], entry["peer"])]
    spread = f" [{min(ratios):.2f}, {max(ratios):.2f}], {len(ratios)} runs" if len(ratios) > 1 else ", one run"
    memory = f"{middle(entry, 'ours', 'peak_mib'):.0f} against {middle(entry, 'peer', 'peak_mib'):.0f}"
    speeds = f"{entry['steps']:,} | {middle(entry, 'ours', 'sps'):,.0f} | {middle(entry, 'peer', 'sps'):,.0f}"
    return f"| {script} | {peer} | {env_id} | {speeds} | {ratio(entry):.2f}{spread} | {memory} |"


def summary(found: dict) -> str:
    """The measurements as Markdown."""
    groups = {"ours": found["versions"]} | found["peers"]
    versions = []
    for name, group in groups.items():
        if not group:
            continue
        packages = [f"{package} {version}" for package, version in group.items()]
        versions.append(f"{name}: {', '.join(packages)}")
    text = f"{found['cpu']}, one thread, {'; '.join(versions)}.\n\n{HEAD}\n"
    order = [f"{task.script} {kind} {task.env_id}" for task in TASKS for kind in task.peers.split()]
    for key in sorted(found["tasks"], key=lambda key: order.index(key) if key in order else len(order)):
        text += row(*key.split(), found["tasks"][key]) + "\n"
    if not found["first_success"]:
        return text
    seconds = [run["seconds"] if run["eval_mean"] >= 475 else float("inf") for run in found["first_success"]]
    text += "\nFrom the start of `python algos/ppo_clip.py` to an evaluated return of at least 475 on CartPole-v1: "
    reached = sum(value < float("inf") for value in seconds)
    return text + f"{median(seconds):.1f} s, median over {len(seconds)} seeds, {reached} of which reach it.\n"
