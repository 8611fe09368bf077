"""benchmark run: progress, failures, kills and clusters, against a fake script that learns nothing but keeps files."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmark import run
from benchmark.__main__ import main
from benchmark.run import Cell, progress, run_cells
from benchmark.suites import SUITES

FAKE = """
import argparse, json, os, pathlib, sys, time, zipfile
parser = argparse.ArgumentParser()
for name in ("env-id", "run-dir", "resume"):
    parser.add_argument(f"--{name}", default="")
for name in ("seed", "total-timesteps", "torch-threads"):
    parser.add_argument(f"--{name}", type=int)
parser.add_argument("--delay", type=float, default=0.0)
args = parser.parse_args()
run_dir = pathlib.Path(args.resume or args.run_dir)
with open(run_dir / "starts", "a") as file:
    print(os.getpid(), *sys.argv[1:], file=file)
state = dict(step=0, score=0, size=0)
if args.resume:
    try:
        state = json.loads(zipfile.ZipFile(run_dir / "checkpoint.pt").read("state"))
        vars(args).update(json.loads((run_dir / "config.json").read_text()), resume=args.resume)
        args.env_id[0]
    except (OSError, ValueError, TypeError, IndexError, zipfile.BadZipFile):
        print("this run is damaged")
        sys.exit(2)
(run_dir / "config.json").write_text(json.dumps(vars(args)))
if "TRACE" in os.environ:
    with open(os.environ["TRACE"], "a") as file:
        print(os.environ["NODE"], os.getpid(), args.seed, file=file)
if args.env_id == "Broken-v0" and args.seed == 1:
    sys.exit("the reason")
with open(run_dir / "metrics.jsonl", "a") as log:
    log.truncate(state["size"])
    while state["step"] < args.total_timesteps:
        state["step"] += 10
        state["score"] += args.seed * state["step"]
        line = json.dumps(dict(global_step=state["step"], episodes=1, episodic_return=state["score"]))
        print(line, file=log, flush=True)
        state["size"] += len(line) + 1
        if state["size"] != os.path.getsize(log.name):
            (run_dir / "clash").touch()
        if state["step"] % 20 == 0:
            with zipfile.ZipFile(run_dir / "checkpoint.tmp", "w") as archive:
                archive.writestr("state", json.dumps(state))
            os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")
        while args.env_id == "Wait-v0" and state["step"] == 50 and not pathlib.Path(__file__).with_name("go").exists():
            time.sleep(0.01)
        time.sleep(args.delay)
score = state["score"]
result = dict(seed=args.seed, eval_mean=score, eval_returns=[score], sps=100.0, wall_time=1.0)
(run_dir / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Calls `run` on one row of the fake script; a run directory per cell appears under tmp_path / out."""
    (tmp_path / "fake.py").write_text(FAKE)

    def call(*words, row=("fake", "Toy-v0", 100, "1-4", ""), out="out") -> int:
        monkeypatch.setitem(SUITES, "toy", [row])
        return main(["run", "--suite", "toy", "--out", str(tmp_path / out), "--algos", str(tmp_path), *words])

    return call


WAIT = ("fake", "Wait-v0", 100, "1-2", "")


@contextlib.contextmanager
def harness(folder, row, *words):
    """The harness in a process group of its own; cells of the environment Wait-v0 wait half way for the file `go`."""
    words = ["run", "--suite", "toy", "--workers", "2", "--out", str(folder / "out"), "--algos", str(folder), *words]
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "  # as in a foreground
    program += "from benchmark.__main__ import main; from benchmark.suites import SUITES; "
    program += f"SUITES['toy'] = [{row!r}]; sys.exit(main({words!r}))"
    root = Path(run.__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", program], cwd=root, start_new_session=True)
    try:
        yield process
    finally:
        (folder / "go").touch()  # ends what is left
        process.kill()
        process.wait()


def wait_for(condition, seconds=30):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


def starts(folder: Path, env: str = "Wait-v0") -> list[list[str]]:
    """The lines that each of the two runs wrote when it started."""
    files = [folder / "out" / f"fake__{env}__100__{seed}" / "starts" for seed in (1, 2)]
    return [file.read_text().splitlines() if file.exists() else [] for file in files]


def half_done(folder: Path) -> bool:
    files = [folder / "out" / f"fake__Wait-v0__100__{seed}" / "metrics.jsonl" for seed in (1, 2)]
    return all(file.exists() and file.read_text().count("\n") == 5 for file in files)


def test_progress_is_the_last_whole_line(tmp_path):
    assert progress(tmp_path) == (0, None)
    lines = [json.dumps(dict(global_step=i, episodic_return=i / 2 if i % 2 else None)) for i in range(1000)]
    for text, expected in (
        ("", (0, None)),
        (lines[0] + "\n", (0, None)),
        (lines[0][:9], (0, None)),
        ("\n".join(lines[:3]) + "\n", (2, 0.5)),  # the last line has no return: the one before counts
        ("\n".join(lines) + "\n", (999, 499.5)),
        ("\n".join(lines), (998, 498.5)),  # the last line is being written
        ("\0" * 99 + "\n", (0, None)),
        ("null\n", (0, None)),
        ("{}\n", (0, None)),
    ):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert progress(tmp_path) == expected


RESULT = dict(eval_mean=7.25, eval_returns=[7.25], sps=100.0, wall_time=61.2)


class Script:
    """A launcher whose only cell is, at each look, as far as the next of `steps`."""

    def __init__(self, out, *steps):
        self.out, self.algos, self.steps, self.running = out, out, list(steps), {}

    def start(self, cell, log):
        self.running[cell] = log

    def progress(self, cells):
        return {cell: (self.steps[0], 412.0 if self.running else None) for cell in cells}

    def ended(self):
        if self.running:
            self.steps.pop(0)
        if self.steps:
            return {}
        (cell,) = self.running
        (self.out / cell.name / "result.json").write_text(json.dumps(RESULT))
        self.running.pop(cell).close()
        return {cell: 0}


CELLS = [Cell("fake", "Toy-v0", 1000, seed) for seed in (1, 2)]


def test_lines_without_a_terminal_count_steps(tmp_path, capsys, monkeypatch):
    """Of two cells one is finished and the other resumed at a half: three quarters."""
    monkeypatch.setattr(run, "LINE_EVERY", 0)
    (tmp_path / CELLS[0].name).mkdir()
    (tmp_path / CELLS[0].name / "result.json").write_text(json.dumps(RESULT))
    assert run_cells(CELLS, 1, tmp_path, Script(tmp_path, 500, 500, 500)) == []
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "75% of 2.00k steps, ? steps/s, ? left, fake Toy-v0 2: 412.0"  # nothing is known of its speed
    assert lines[-2] == f"{CELLS[1].name}: 7.2 in 61 s, 2 of 2"
    assert lines[-1].startswith("100% of 2.00k steps")


def test_terminal_shows_finished_cells_above_the_bar(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    run_cells(CELLS[:1], 1, tmp_path, Script(tmp_path, 0, 500))
    text = sys.stderr.getvalue()
    assert "50%|" in text
    assert "fake Toy-v0 1: 412.0" in text
    assert f"\r{CELLS[0].name}: 7.2 in 61 s, 1 of 1\n" in text
    assert "100%|" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seeds", "3-"], "seeds look like 1-3,7 and not like '3-'"),
        (["--seeds", "a"], "seeds look like 1-3,7 and not like 'a'"),
        (["--seeds", "1,"], "seeds look like 1-3,7 and not like '1,'"),
        (["--workers", "0"], "--workers must be at least 1, but is 0"),
        (["--steps=-1"], "--steps may not be negative, but is -1"),
        (["--algos", "."], ". is no folder of these scripts: it holds no fake.py"),
        (["--address", "auto"], "--address is that of a Ray cluster, for --launcher ray"),
        (["--launcher", "ray"], "--launcher ray needs ray: pip install -r requirements-ray.txt"),
    ],
)
def test_bad_flags_are_refused_before_any_work(bench, tmp_path, capsys, monkeypatch, words, sentence):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "benchmark.launch_ray", raising=False)
    assert bench(*words) == 2
    assert capsys.readouterr().err == f"benchmark: {sentence}\n"
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_is_refused(bench, tmp_path, capsys):
    assert bench(out="fake.py") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_missing_script_fails_alone(bench, tmp_path, capsys):
    assert bench(row=("gone fake", "Toy-v0", 100, "1", "")) == 1
    out, err = capsys.readouterr()
    assert "can't open file" in err
    assert "2 of 2" in err
    assert "failed: gone__Toy-v0__100__1" in out
    assert "fake__Toy-v0__100__1:" in err


def test_a_seed_named_twice_counts_once(bench, tmp_path, capsys):
    assert bench("--seeds", "1,1-2,2") == 0
    assert capsys.readouterr().out.splitlines()[2].split("|")[5].strip() == "2"
    assert [len(lines) for lines in starts(tmp_path, "Toy-v0")] == [1, 1]


@pytest.fixture
def undisturbed(bench, tmp_path, capsys):
    """The table of the row WAIT."""
    (tmp_path / "go").touch()
    assert bench(row=WAIT, out="undisturbed") == 0
    (tmp_path / "go").unlink()
    return capsys.readouterr().out


def test_killed_and_started_again_gives_the_same_table(bench, tmp_path, capsys, undisturbed):
    """As when the machine goes down: harness and scripts end at once."""
    interrupt(tmp_path)
    assert bench(row=WAIT) == 0
    assert capsys.readouterr().out == undisturbed
    assert all("--resume" in lines[1] for lines in starts(tmp_path))


@pytest.mark.parametrize("locks", [True, False])
def test_a_killed_harness_leaves_no_two_writers(bench, tmp_path, capsys, monkeypatch, undisturbed, locks):
    """Its scripts go on; a new harness waits for them. Without locks two processes write into one directory."""
    if not locks:
        monkeypatch.setattr(run, "fcntl", None)
    with harness(tmp_path, WAIT) as process:
        wait_for(lambda: half_done(tmp_path))
        os.killpg(process.pid, signal.SIGKILL)
        waits = "fake__Wait-v0__100__2: another process trains it, which is waited for"
        seen = []
        monkeypatch.setattr(run.tqdm, "write", lambda text, file: seen.append(text))

        def go():
            wait_for(lambda: waits in seen if locks else all(len(lines) == 2 for lines in starts(tmp_path)))
            (tmp_path / "go").touch()

        thread = threading.Thread(target=go)
        thread.start()
        code = bench(row=WAIT)
        thread.join()
    clashes = list(tmp_path.glob("out/*/clash"))
    if locks:
        assert (code, capsys.readouterr().out, clashes) == (0, undisturbed, [])
        assert [len(lines) for lines in starts(tmp_path)] == [1, 1]
    else:
        assert clashes


def interrupt(folder: Path) -> list[Path]:
    """Run directories of two cells that were killed half way."""
    with harness(folder, WAIT) as process:
        wait_for(lambda: half_done(folder))
        os.killpg(process.pid, signal.SIGKILL)
        for (line,) in starts(folder):
            os.kill(int(line.split()[0]), signal.SIGKILL)
    return [folder / "out" / f"fake__Wait-v0__100__{seed}" for seed in (1, 2)]


DAMAGED = [("checkpoint.pt", "cut"), ("checkpoint.pt", "")]
DAMAGED += [("config.json", content) for content in ("cut", "gone", "", "{}", "null", "[]")]


def damage(path: Path, content: str) -> None:
    """Cut a file, take it away, or write something else into it."""
    if content == "gone":
        path.unlink()
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_text(content)


@pytest.mark.parametrize(("name", "content"), [DAMAGED[0], *DAMAGED[3:5]])
def test_a_damaged_run_starts_afresh(bench, tmp_path, capsys, undisturbed, name, content):
    """It ends with the same table; what was there is kept, and the other cell continues."""
    damaged, whole = interrupt(tmp_path)
    (damaged / "lock").touch()
    damage(damaged / name, content)
    log = (damaged / "metrics.jsonl").read_text()
    assert bench(row=WAIT) == 0
    out, err = capsys.readouterr()
    assert out == undisturbed
    told = f"{damaged.name} is damaged and starts afresh; its files are kept in {damaged / 'damaged'}"
    assert err.splitlines().count(told) == 1
    assert "2 of 2" in err
    assert ["--resume" in line for line in (damaged / "starts").read_text().splitlines()] == [False]
    first, second = (damaged / "damaged" / "starts").read_text().splitlines()
    assert "--resume" not in first
    assert "--resume" in second
    assert (damaged / "damaged" / "metrics.jsonl").read_text() == log
    assert (damaged / "damaged" / name).exists() == (content != "gone")
    assert (damaged / "lock").exists(), "another process may wait for it"
    assert "this run is damaged" in (damaged / "log.txt").read_text()
    assert not (whole / "damaged").exists()
    assert "--resume" in (whole / "starts").read_text().splitlines()[1]


def test_a_run_starts_afresh_only_once(bench, tmp_path, capsys):
    """A script that damages its own checkpoint and refuses it fails; nothing goes round and round."""
    for path in interrupt(tmp_path):
        (path / "checkpoint.pt").write_text("damaged")
    broken = FAKE.replace("if args.resume:", "(run_dir / 'checkpoint.pt').write_text('damaged')\nsys.exit(2)\nif 1:", 1)
    (tmp_path / "fake.py").write_text(broken)
    assert bench(row=WAIT) == 1
    out, err = capsys.readouterr()
    assert err.count("starts afresh") == 2
    assert err.count("failed with exit code 2") == 2
    assert out.count("failed: ") == 2
    assert [len(lines) for lines in starts(tmp_path)] == [1, 1]


@pytest.mark.parametrize(
    ("code", "damaged", "kept"), [(1, False, True), (2, False, True), (1, True, True), (2, True, False)]
)
def test_a_whole_run_is_not_put_aside(bench, tmp_path, capsys, monkeypatch, code, damaged, kept):
    """Whatever else a script refuses to continue for, such as a package that is missing today.

    It takes both to be put aside, the exit code and the damage, which is wrongly found here.
    """
    if damaged:
        monkeypatch.setattr(run, "is_damaged", lambda _: True)
    refusal = f"if args.resume:\n    print('no')\n    sys.exit({code})\n"
    (tmp_path / "fake.py").write_text(FAKE.replace("if args.resume:", refusal + "if args.resume:", 1))
    paths = interrupt(tmp_path)
    before = [(path / "checkpoint.pt").read_bytes() for path in paths]
    (tmp_path / "go").touch()
    assert bench(row=WAIT) == (1 if kept else 0)
    err = capsys.readouterr().err
    assert ("afresh" in err) == (not kept)
    assert (f"failed with exit code {code}:\n    no" in err) == kept
    same = [(path / "checkpoint.pt").read_bytes() == content for path, content in zip(paths, before)]
    assert same == [kept, kept]


def test_a_refusal_behind_torchrun():
    """torchrun ends with 1 whatever its scripts end with; a script that is started by itself refuses with 2."""
    assert run.refusal_code(Cell("ddppo", "Toy-v0", 100, 1)) == 1
    assert run.refusal_code(Cell("ddppo-0312647df9", "Toy-v0", 100, 1)) == 1, "a copy that check makes"
    assert run.refusal_code(Cell("ppo_clip", "Toy-v0", 100, 1)) == 2


@pytest.fixture
def whole_run(tmp_path):
    """The directory of a run, as far as it decides whether the run can be continued."""
    (tmp_path / "config.json").write_text('{"env_id": "Toy-v0"}')
    assert not run.is_damaged(tmp_path)
    torch.save(dict(agent=dict(weight=torch.arange(1000.0))), tmp_path / "checkpoint.pt")
    assert not run.is_damaged(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "content"), DAMAGED)
def test_damage_is_found(whole_run, name, content):
    damage(whole_run / name, content)
    assert run.is_damaged(whole_run)


def test_a_checkpoint_of_torch_is_whole_unless_it_was_cut_or_overwritten(whole_run):
    path = whole_run / "checkpoint.pt"
    whole = path.read_bytes()
    half = len(whole) // 2
    for content in (whole[:half], whole[:half] + bytes(len(whole) - half), whole[:half] + b"x" + whole[half + 1 :]):
        path.write_bytes(content)
        assert run.is_damaged(whole_run)


def test_a_script_that_does_not_end_is_killed(tmp_path, monkeypatch):
    """One that ends by itself is left alone."""
    monkeypatch.setattr(run, "PATIENCE", 0.3)
    deaf = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    good = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print(flush=True); "
    good += "time.sleep(60)"
    options = dict(stdout=subprocess.PIPE, start_new_session=True)
    processes = [subprocess.Popen([sys.executable, "-c", program], **options) for program in (deaf, good)]
    for process in processes:
        process.stdout.readline()
    run.terminate(processes)
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 7]


def test_overhead_of_a_cell_is_small(bench, tmp_path):
    """Per cell, beyond what the script takes by itself; 3 s are allowed, about 0.1 s were measured."""
    words = [sys.executable, "fake.py", "--env-id", "Toy-v0", "--total-timesteps", "10", "--seed", "1"]
    words += ["--run-dir", "."]
    start = time.perf_counter()
    subprocess.run(words, cwd=tmp_path, check=True)
    alone = time.perf_counter() - start
    start = time.perf_counter()
    assert bench("--workers", "1", row=("fake", "Toy-v0", 10, "1-8", "")) == 0
    assert (time.perf_counter() - start) / 8 - alone < 3


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Two Ray nodes, a and b, begun in the background; they tell the scripts their names and where to write them."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else a token appears in the home directory
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    def node(name):
        return dict(num_cpus=2, env_vars=dict(NODE=name, TRACE=str(tmp_path / "trace")))

    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    cluster = Cluster(initialize_head=True, head_node_args=node("a"))
    cluster.b = cluster.add_node(**node("b"))
    cluster.wait_for_nodes()
    signal.signal(signal.SIGINT, handler)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def trace(folder: Path) -> list[list[str]]:
    """Node, process and seed of each start of a script."""
    file = folder / "trace"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_dead(folder: Path, seconds: float = 0) -> None:
    """No script is alive, or after so many seconds none."""
    wait_for(lambda: not any(is_alive(int(pid)) for _, pid, _ in trace(folder)), seconds)


def test_a_cluster_gives_the_same_table(bench, tmp_path, capsys, cluster):
    """The nodes get neither the repository nor the run directories; failures are told, finished cells skipped."""
    row = ("gone fake", "Broken-v0", 100, "1-6", "--delay 0.1")
    codes = [bench("--seeds", "1-6", row=row, out="here")]
    here = capsys.readouterr()
    words, half_done = ["--launcher", "ray", "--address", cluster.address], "out/fake--delay0.1__Broken-v0__100__3"
    (tmp_path / half_done).mkdir(parents=True)
    (tmp_path / half_done / "checkpoint.pt").write_text("of a run that was interrupted here")
    codes += [bench("--seeds", "1-2", *words, row=row), bench(*words, row=row)]
    there = capsys.readouterr()
    assert codes == [1, 1, 1]
    assert here.out == there.out[-len(here.out) :]
    assert {node for node, _, _ in trace(tmp_path)} == {"a", "b"}
    assert sorted(seed for _, _, seed in trace(tmp_path)) == list("1123456")  # the one that failed once more
    for text in ("failed with exit code 1:\n    the reason", "can't open file"):
        assert text in here.err
        assert text in there.err
    assert "12 of 12" in there.err
    for seed in range(2, 7):
        files = [
            tmp_path / out / f"fake--delay0.1__Broken-v0__100__{seed}" / "metrics.jsonl" for out in ("here", "out")
        ]
        assert files[0].read_text() == files[1].read_text()
    assert not (tmp_path / half_done / "checkpoint.pt").exists()  # --resume would take it for that of the new run
    origin = json.loads((tmp_path / half_done / "origin.json").read_text())
    assert origin == dict(script=run.text_hash(tmp_path / "fake.py"), versions=origin["versions"])
    assert "ray" in origin["versions"]


def test_interruption_of_a_cluster_ends_the_scripts(tmp_path, cluster):
    """The row has a short cell and long ones; what is finished stays, and the same command continues."""
    (tmp_path / "fake.py").write_text(
        FAKE.replace("time.sleep(args.delay)", "time.sleep(args.delay * (args.seed - 1))")
    )
    row, words = ("fake", "Toy-v0", 100, "1-3", "--delay 6"), ["--launcher", "ray", "--address", cluster.address]
    result = tmp_path / "out" / "fake--delay6__Toy-v0__100__1" / "result.json"
    for number, code, count in ((signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 4)):
        with harness(tmp_path, row, *words) as process:
            wait_for(lambda count=count: result.exists() and len(trace(tmp_path)) > count)
            process.send_signal(number)
            assert process.wait(run.PATIENCE) == code, "or the tasks were not cancelled"
        assert_dead(tmp_path, seconds=3)  # Ray tells them in its own time; left alone, one lives for 6 s
    assert [seed for _, _, seed in trace(tmp_path)].count("1") == 1


def test_a_lost_node_only_repeats_its_cells(bench, tmp_path, capsys, cluster):
    def lose_b():
        wait_for(lambda: "b" in [node for node, _, _ in trace(tmp_path)])
        cluster.remove_node(cluster.b, allow_graceful=False)

    thread = threading.Thread(target=lose_b)
    thread.start()
    row = ("fake", "Toy-v0", 100, "1-6", "--delay 0.3")
    assert bench("--launcher", "ray", "--address", cluster.address, row=row) == 0
    thread.join()
    assert "6 of 6" in capsys.readouterr().err
    assert len(trace(tmp_path)) > 6
    assert_dead(tmp_path)


def test_nodes_need_none_of_our_files(tmp_path):
    """What is sent can be unpacked where `benchmark` cannot be imported."""
    pytest.importorskip("ray")
    from benchmark import launch_ray

    sent = launch_ray.cloudpickle.dumps((launch_ray.train, launch_ray.Board, CELLS))
    (tmp_path / "sent").write_bytes(sent)
    program = "import pickle; print([cell.name for cell in pickle.load(open('sent', 'rb'))[2]])"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{[cell.name for cell in CELLS]}\n", done.stderr
