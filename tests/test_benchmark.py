"""The harness: statistics against brute force, cells against a fake script, its texts against stored results."""

import ast
import dataclasses
import importlib.metadata
import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SCRIPTS
from runs import script

from benchmark import markdown, pictures, report, speed
from benchmark.__main__ import COMMANDS, main
from benchmark.run import Cell, Refusal, command, file_name, parse_seeds, read_result, suite_cells
from benchmark.suites import SUITES

ROOT = Path(__file__).parent.parent
FAKE = """
import argparse, json, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("env-id", "run-dir", "resume"):
    parser.add_argument(f"--{name}", default="")
for name in ("seed", "total-timesteps", "torch-threads"):
    parser.add_argument(f"--{name}", type=int)
parser.add_argument("--bonus", type=float, default=0.0)
args = parser.parse_args()
run_dir = pathlib.Path(args.resume or args.run_dir)
with open(run_dir / "starts", "a") as file:
    print(*sys.argv[1:], file=file)
if args.resume:
    vars(args).update(json.loads((run_dir / "config.json").read_text()))
if args.env_id == "Broken-v0" and args.seed == 1:
    sys.exit("the reason")
if args.env_id == "Slow-v0":
    time.sleep(60)
config = vars(args) | dict(algo="fake", torch="0", gymnasium="0")
(run_dir / "config.json").write_text(json.dumps(config))
lines = [dict(global_step=i, episodes=i % 3, episodic_return=float(i) if i % 3 else None) for i in range(500)]
(run_dir / "metrics.jsonl").write_text("\\n".join(map(json.dumps, lines)))
score = args.seed * 10 + args.bonus
result = dict(seed=args.seed, eval_returns=[score], eval_mean=score, train_return=1.0, sps=100.0, wall_time=1.0)
result |= dict(trained_steps=args.total_timesteps, eval_cut=0)
(run_dir / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Calls the command line with a suite `toy` of a fake algorithm, whose return is 10 times the seed."""
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "README.md").write_text(f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n")
    for suite in list(SUITES):
        monkeypatch.setitem(SUITES, suite, [])
    monkeypatch.setattr(report, "TABULATED", ["toy"])
    monkeypatch.setattr(report, "random_return", lambda env_id: 0.0)
    monkeypatch.setitem(
        SUITES, "toy", [("fake", "Toy/Env-v0", 1000, "1-4", ""), ("fake", "Broken-v0", 1000, "1-2", "")]
    )

    def call(name: str, *words: str, bar: str = "") -> int:
        head = "algorithm,env_id,steps,bar,best_published,seeds,protocol,source,note"
        (tmp_path / "references.csv").write_text(f"{head}\nfake,Toy/Env-v0,1000,{bar},30,1,single run,a/b@c:d,note\n")
        files = dict(run=["out", "algos"], report=["runs", "baselines", "readme", "results", "page"])[name]
        places = dict(out="runs", algos=".", runs="runs", baselines="benchmark/baselines", readme="README.md")
        places |= dict(results="benchmark/RESULTS.md", page="page.html")
        paths = [word for flag in files for word in (f"--{flag}", str(tmp_path / places[flag]))]
        return main([name, "--references", str(tmp_path / "references.csv"), *paths, *words])

    return call


def starts(tmp_path: Path, seed: int, env: str = "Toy-Env-v0") -> list[str]:
    return (tmp_path / "runs" / f"fake__{env}__1000__{seed}" / "starts").read_text().splitlines()


@pytest.mark.parametrize("runs", [1, 2, 4, 5, 10])
def test_iqm_is_the_mean_of_the_middle_half(runs):
    scores = np.random.default_rng(1).normal(size=(runs, 3))
    kept = sorted(scores.ravel())[int(0.25 * scores.size) : scores.size - int(0.25 * scores.size)]
    assert report.iqm_interval(scores)[0] == pytest.approx(sum(kept) / len(kept))


def test_interval_matches_all_resamples():
    scores = [1.0, 2.0, 4.0, 8.0, 16.0]
    every = [np.mean(sorted(chosen)[1:-1]) for chosen in itertools.product(scores, repeat=5)]
    _, low, high = report.iqm_interval(np.array(scores)[:, None], resamples=50_000)
    assert (low, high) == pytest.approx(tuple(np.percentile(every, [2.5, 97.5])), rel=0.03)


def test_bootstrap_is_stratified():
    """Runs are resampled within each task: where all runs of a task agree, nothing varies."""
    assert report.iqm_interval(np.array([[0.0, 100.0, 7.0]] * 4))[1:] == pytest.approx([64 / 3] * 2)


def test_chance_of_improvement_by_hand():
    """3 of 4 pairs on the first task, one of them drawn, all on the second; equal algorithms have one half."""
    these, those = np.array([[2.0, 9.0], [3.0, 8.0]]), np.array([[1.0, 0.0], [3.0, 1.0]])
    chance, low, high = report.improvement(these, those)
    assert chance == pytest.approx((2.5 / 4 + 1) / 2)
    assert 0.5 <= low < chance < high == 1
    chance, low, high = report.improvement(these, these)
    assert low < chance == 0.5 < high, "each algorithm is resampled by itself"
    assert report.improvement(these[:1], those[:1])[1:] == (1.0, 1.0), "one run each: nothing varies"


def test_performance_profile_by_hand():
    scores = np.array([[0.0, 1.0], [2.0, 1.0]])
    share, low, high = report.performance_profile(scores, np.array([-1.0, 0.0, 0.5, 1.5, 2.0]))
    assert share.tolist() == [1, 0.75, 0.75, 0.25, 0]
    assert low.tolist() == [1, 0.5, 0.5, 0, 0]  # the first task has two zeros, one or none
    assert high.tolist() == [1, 1, 1, 0.5, 0]


def test_scores_on_mujoco_are_normalised(tmp_path, monkeypatch):
    """By hand: seeds that an algorithm has on all environments, between the random policy and the best published."""
    monkeypatch.setitem(SUITES, "mujoco", [
        ("a b", "X-v0", 1_000_000, "1-3", ""), ("a b", "Y-v0", 1_000_000, "1-3", ""), ("b", "X-v0", 9, "1-3", ""),
    ])  # fmt: skip
    returns = {("a", "X-v0"): [10, 20, 30], ("a", "Y-v0"): [-1, 0], ("b", "X-v0"): [5, 5], ("b", "Y-v0"): [5]}
    for (algo, env_id), values in returns.items():
        row = (algo, env_id, 1_000_000)
        runs = [dict(seed=seed, eval_mean=value) for seed, value in enumerate(values, 1)]
        (tmp_path / f"{report.file_name(row)}.json").write_text(json.dumps(dict(row=row, seeds=runs)))
    (tmp_path / "random.json").write_text(json.dumps({"X-v0": 10, "Y-v0": -2}))
    best = {("a", "X-v0", 1_000_000): "20", ("b", "X-v0", 1_000_000): "15", ("b", "Y-v0", 1_000_000): "2"}
    best |= {("b", "X-v0", 9): "99", ("a", "Y-v0", 1_000_000): ""}
    scores = report.mujoco_scores(tmp_path, {row: dict(best_published=value) for row, value in best.items()})
    assert {algo: x.tolist() for algo, x in scores.items()} == {"a": [[0, 0.25], [1, 0.5]]}


def test_what_reaches_the_best_published_score(tmp_path, monkeypatch):
    """Those that do not are told, with the difference; neither intervals of few seeds nor rows that lack some count."""

    def line(algo: str, best: str, *scores: float) -> dict:
        runs = [dict(seed=seed, eval_mean=score, sps=1.0) for seed, score in enumerate(scores)]
        return report.summarise(
            (algo, "X-v0", 1), runs, [0, 1], {(algo, "X-v0", 1): dict(bar="", best_published=best, protocol="p")}
        )

    lines = [line("sure", "10", 10, 11), line("so", "10", 9, 12), line("no", "20", 9, 12), line("alone", "", 1, 2)]
    text = " ".join(markdown.published_section(lines).split())
    assert "2, of which 0 with their whole interval. Below it with their whole interval: 0." in text
    assert "-9.50 | few |" in text
    monkeypatch.setattr(report, "FEWEST", 2)
    text = markdown.published_section([*lines, line("barely", "20", 19, 20)])
    assert text.startswith("4 rows with all their seeds have a published score")
    assert text == markdown.published_section([*lines, line("barely", "20", 19, 20), line("half", "10", 99)])
    told = "the best one, whatever its protocol: 2, of which 1 with their whole interval. Below it with their whole"
    assert f"{told} interval: 1. Intervals" in " ".join(text.split())
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("|")]
    assert cells[2:] == [
        ["no", "X-v0", "1", "10.5 [9.00, 12.0]", "20 (p)", "-9.50", "below"],
        ["barely", "X-v0", "1", "19.5 [19.0, 20.0]", "20 (p)", "-0.50", "open"],
    ]
    assert "single run" not in text
    assert "the mean over ours" not in text
    failed = line("failed", "10", 1, 10, 10, 10, 10)
    told = " ".join(markdown.published_section([*lines, failed]).split())
    assert "whatever its protocol: 3, of which 1 with their whole" in told
    assert "By the mean over ours 2 are at or above; low" in told
    assert "pull below it: failed on X-v0 (8.20; 10.0)." in told
    for line, single in ((lines[0], "10.1"), (lines[1], "12")):
        line["reference"]["single_run"] = single
    text = markdown.published_section(lines)
    assert "For 2 of these rows a single run was published" in " ".join(text.split())
    told = text.split("nobody knows. Below it: 1.")[1].strip().splitlines()[2:]
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in told] == [
        ["so", "X-v0", "1", "10.5 [9.00, 12.0]", "12.0"]
    ]
    assert markdown.published_section(lines[3:4]) == ""


def test_seeds_and_cells(monkeypatch):
    assert parse_seeds("1-3,7") == [1, 2, 3, 7]
    with pytest.raises(Refusal, match="seeds go up, but 3-1 goes down"):
        parse_seeds("7,3-1")
    monkeypatch.setitem(SUITES, "toy", [("a b", "X/Y-v0", 10, "1-2", "--k 3")])
    assert len(suite_cells("toy")) == 4
    assert suite_cells("toy", algo="b", seeds="9", steps=5) == [Cell("b", "X/Y-v0", 5, 9, "--k 3")]
    assert suite_cells("toy")[0].name == "a--k3__X-Y-v0__10__1"
    assert command(suite_cells("toy")[0], Path("d"), Path("algos"))[-2:] == ["--k", "3"]
    assert command(suite_cells("toy")[0], Path("d"), Path("algos"))[:2] == [sys.executable, str(Path("algos/a.py"))]


@pytest.mark.parametrize("algo", ["ddppo", "ddppo-2a6e91d69b"], ids=["script", "copy for check"])
def test_scripts_of_several_processes_are_started_by_torchrun(algo):
    words = command(Cell(algo, "X-v0", 10, 1), Path("d"), Path("algos"))
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert words[words.index("--nproc-per-node") + 1] == "2"
    assert words.index(str(Path(f"algos/{algo}.py"))) == words.index("--nproc-per-node") + 2


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_runs_keep_their_replay_buffer(path):
    """Each script that has one; else a run that was interrupted would go on with an empty one."""
    name = path.stem
    text = path.read_text(encoding="utf-8")
    for algo in (name, f"{name}-2a6e91d69b"):
        words = command(Cell(algo, "X-v0", 1000, 1), Path("d"), Path("algos"))
        assert ("--save-buffer" in words) == ("--checkpoint-every" in words) == ("save_buffer: bool" in text)


def test_suites_and_references_fit():
    """Each row of a suite has its line of references, each line its row, and a bar is its row's alone."""
    suites = [suite for suite in SUITES if suite != "ppo_paper"]
    rows = {cell.row for suite in suites for cell in suite_cells(suite)}
    assert sorted(rows) == sorted(report.read_references(ROOT / "benchmark" / "references.csv"))
    lines = (ROOT / "benchmark" / "references.csv").read_text().splitlines()
    assert len(lines) == len(rows) + 1, "a row has two lines"


def test_finished_cells_are_skipped_and_started_ones_resumed(bench, tmp_path):
    assert bench("run", "--suite", "toy", "--env", "Toy/Env-v0") == 0
    for seed, name in ((2, "result.json"), (3, "result.json")):
        (tmp_path / "runs" / f"fake__Toy-Env-v0__1000__{seed}" / name).unlink()
    (tmp_path / "runs" / "fake__Toy-Env-v0__1000__3" / "checkpoint.pt").touch()
    (tmp_path / "runs" / "fake__Toy-Env-v0__1000__4" / "result.json").write_text('{"torn')
    assert bench("run", "--suite", "toy", "--env", "Toy/Env-v0") == 0
    assert [len(starts(tmp_path, seed)) for seed in (1, 2, 3, 4)] == [1, 2, 2, 2]
    assert starts(tmp_path, 2)[1] == starts(tmp_path, 2)[0]
    assert starts(tmp_path, 3)[1].startswith("--resume")


def test_failures_are_told_and_do_not_stop_the_rest(bench, tmp_path, capsys):
    assert bench("run", "--suite", "toy", "--workers", "1") == 1
    out, err = capsys.readouterr()
    assert "the reason" in err
    assert "failed: fake__Broken-v0__1000__1" in out
    assert starts(tmp_path, 2, "Broken-v0")
    assert bench("run", "--suite", "toy", "--algo", "other") == 2


def test_a_suite_that_is_not_there_is_refused_and_help_names_those_that_are(bench, capsys):
    assert bench("run", "--suite", "top") == 2
    assert capsys.readouterr().err.startswith("benchmark: there is no suite 'top', but there are ci, ")
    for name in ("run", "check"):
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert [suite for suite in SUITES if suite != "toy" and suite not in text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_comment_behind_every_field(capsys, name):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    shown = " ".join(re.sub("[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
    comments = re.findall(r"^    \w+: .*  # (.+)$", inspect.getsource(COMMANDS[name]), re.MULTILINE)
    assert len(comments) == len(dataclasses.fields(COMMANDS[name]))
    assert [comment for comment in comments if comment not in shown] == []


@pytest.mark.parametrize("words", ["run --suite ci --workers many", "speed --peers jax", "run", "rum", ""])
def test_bad_command_lines_end_in_code_2(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("bar", "code", "verdicts"),
    [("25", 0, ["PASS", "open"]), ("25.1", 1, ["FAIL", "open"]), ("10", 0, ["PASS"] * 2), ("", 0, ["-"] * 2)],
)
def test_exit_code_tells_the_bar(bench, capsys, monkeypatch, bar, code, verdicts):
    monkeypatch.setattr(report, "FEWEST", 4)
    assert bench("run", "--suite", "toy", "--env", "Toy/Env-v0", "--workers", "4", bar=bar) == code
    row = next(line for line in capsys.readouterr().out.splitlines() if "Toy" in line)
    assert "25.0 [" in row
    assert [cell.strip() for cell in row.split("|")[-3:-1]] == verdicts


def test_too_few_seeds_prove_nothing(bench, capsys):
    assert bench("run", "--suite", "toy", "--env", "Toy/Env-v0", "--seeds", "3-4", bar="25") == 0
    assert "| short | few      |" in capsys.readouterr().out
    assert bench("run", "--suite", "toy", "--env", "Toy/Env-v0", "--seeds", "101-104", bar="25") == 0
    assert "| short |" in capsys.readouterr().out, "as many as are planned, but others, on which one may have tuned"


def test_references_are_read_before_the_training(bench, tmp_path, capsys):
    """Hours of training that end in a traceback, for a bar that is no number."""
    assert bench("run", "--suite", "toy", "--env", "Toy/Env-v0", "--seeds", "1", bar="high") == 2
    told = capsys.readouterr().err
    assert told == f"benchmark: {tmp_path / 'references.csv'}, line 2: could not convert string to float: 'high'\n"
    assert not (tmp_path / "runs").exists()


def test_old_results_are_told(bench, tmp_path, capsys):
    """An edited script, whose scores are those of its earlier text; once for all its runs."""
    words = ("run", "--suite", "toy", "--env", "Toy/Env-v0", "--workers", "4")
    bench(*words)
    assert "another text" not in capsys.readouterr().err
    bench(*words)
    assert "another text" not in capsys.readouterr().err
    script = tmp_path / "fake.py"
    script.write_text(script.read_text() + "# Another text.\n")
    bench(*words)
    told = [line for line in capsys.readouterr().err.splitlines() if "another text" in line]
    assert len(told) == 1
    assert told[0].startswith(
        "4 finished runs are of another text of fake.py; to train them anew, delete fake__Toy-Env"
    )


def test_report_keeps_results_and_check_finds_stale_files(bench, tmp_path, capsys):
    bench("run", "--suite", "toy", "--env", "Toy/Env-v0", "--workers", "4")
    assert bench("report", "--check") == 1
    assert "old" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "benchmark").exists()
    assert bench("report") == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith(f"before\n{markdown.BEGIN}\n| Script ")
    assert readme.endswith(f"{markdown.END}\nafter\n")
    assert "| fake | Toy/Env 1k: 25.0 (30.0) |" in readme
    results = (tmp_path / "benchmark" / "RESULTS.md").read_text()
    assert "25.0 [" in results
    assert "a/b@c:d" in results
    path = tmp_path / "benchmark" / "baselines" / "fake__Toy-Env-v0__1000.json"
    kept = json.loads(path.read_text())
    assert [run["seed"] for run in kept["seeds"]] == [1, 2, 3, 4]
    assert "torch" not in kept["hyperparameters"]
    assert len(kept["seeds"][0]["curve"]) == 100
    assert kept["seeds"][0]["curve"][-1][0] == 499
    picture = tmp_path / "benchmark" / "baselines" / "curves" / "Toy-Env-v0__1000.svg"
    assert f'src="{picture.relative_to(tmp_path / "benchmark")}"' in results
    before = [file.read_bytes() for file in (picture, path)]
    assert bench("report", "--check") == 0
    assert bench("report") == 0
    assert [file.read_bytes() for file in (picture, path)] == before
    path.write_text(path.read_text().replace('"eval_mean": 20', '"eval_mean": 24'))
    assert bench("report", "--check") == 1


@pytest.mark.parametrize("name", ["README.md", "benchmark/RESULTS.md"])
def test_one_stale_file_is_enough(bench, tmp_path, capsys, name):
    bench("run", "--suite", "toy", "--env", "Toy/Env-v0", "--workers", "4")
    bench("report")
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace("25.0", "26.0"))
    capsys.readouterr()
    assert bench("report", "--check") == 1
    told = [line.split(" is ")[1].split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(told) == ["current", "stale"]
    assert "26.0" in (tmp_path / name).read_text(), "--check writes nothing"
    (tmp_path / name).write_text(text.replace("\nafter\n", "\nafter, changed by hand\n"))
    assert bench("report", "--check") == 0, "what stands outside of the marks is nobody's result"


def test_where_a_run_comes_from_is_kept(bench, tmp_path):
    """The packages that are installed and the script's text, under the hash by which git will know it."""

    def git(*words: str) -> str:
        line = ["git", "-C", str(tmp_path), *words]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    texts = []
    for seeds, text in (("1-2", FAKE), ("3", FAKE + "# changed\n")):
        (tmp_path / "fake.py").write_text(text)
        texts.append(git("hash-object", "fake.py"))
        bench("run", "--suite", "toy", "--env", "Toy/Env-v0", "--seeds", seeds)
    origin = json.loads((tmp_path / "runs" / "fake__Toy-Env-v0__1000__1" / "origin.json").read_text())
    assert origin["versions"]["tyro"] == importlib.metadata.version("tyro")
    (tmp_path / "runs" / "fake__Toy-Env-v0__1000__2" / "origin.json").unlink()  # as of a run started by hand
    for seed in "13":  # as of runs that were interrupted, and go on with the text of seed 3
        folder = tmp_path / "runs" / f"fake__Toy-Env-v0__1000__{seed}"
        (folder / "result.json").unlink()
        (folder / "checkpoint.pt").touch()
    bench("run", "--suite", "toy", "--env", "Toy/Env-v0", "--seeds", "1,3")
    assert bench("report") == 0
    path = tmp_path / "benchmark" / "baselines" / "fake__Toy-Env-v0__1000.json"
    runs = json.loads(path.read_text())["seeds"]
    assert [run["script"] for run in runs] == [None, None, texts[1]]
    torch = importlib.metadata.version("torch")
    assert [run["versions"].get("torch") for run in runs] == [torch, None, torch]
    assert "tyro" not in runs[0]["versions"], "only what the results depend on"


WHOLE = dict(eval_mean=1.0, sps=1.0, wall_time=1.0, eval_returns=[1.0, 2])


def test_a_whole_result_is_one(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(WHOLE))
    assert read_result(tmp_path) == WHOLE


@pytest.mark.parametrize("text", [
    "", '{"eval_mean": 1', "{}", "null", "[]", "1", "\0" * 20, "\N{SNOWMAN}",
    *[json.dumps({key: value for key, value in WHOLE.items() if key != name}) for name in WHOLE],
    *[json.dumps(WHOLE | {name: value}) for name in WHOLE for value in (None, "1", True, {}, float("nan"))],
    *[json.dumps(WHOLE | dict(eval_returns=value)) for value in ([], [None], ["1"], [float("inf")])],
])  # fmt: skip
def test_a_damaged_result_is_none(tmp_path, text):
    (tmp_path / "result.json").write_text(text, encoding="utf-8")
    assert read_result(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{}", "null", "[]", '{"eval_mean": 40'])
def test_a_cell_with_a_damaged_result_is_not_reported_and_runs_again(bench, tmp_path, text):
    bench("run", "--suite", "toy", "--env", "Toy/Env-v0", "--workers", "4")
    (tmp_path / "runs" / "fake__Toy-Env-v0__1000__4" / "result.json").write_text(text)
    assert bench("report") == 0
    assert "| 20.0 [10.0, 30.0]  | 3 " in (tmp_path / "benchmark" / "RESULTS.md").read_text()
    assert bench("run", "--suite", "toy", "--env", "Toy/Env-v0") == 0
    assert [len(starts(tmp_path, seed)) for seed in (1, 2, 3, 4)] == [1, 1, 1, 2]
    assert bench("report") == 0
    assert "| 25.0 [" in (tmp_path / "benchmark" / "RESULTS.md").read_text()


def test_a_script_that_leaves_a_damaged_result_has_failed(bench, tmp_path, capsys):
    """Not even a bar is any use against NaN, which is below nothing."""
    (tmp_path / "fake.py").write_text(FAKE.replace("score = args.seed", 'score = float("nan") * args.seed'))
    assert bench("run", "--suite", "toy", "--env", "Toy/Env-v0", "--seeds", "1-2", bar="25") == 1
    out, err = capsys.readouterr()
    assert "fake__Toy-Env-v0__1000__1 failed with an incomplete result.json:" in err
    assert "failed: fake__Toy-Env-v0__1000__2" in out
    assert "nan" not in out
    summary = report.summarise(("fake", "Toy/Env-v0", 1000), [dict(seed=1, eval_mean=np.nan, sps=1.0)], [1], {
        ("fake", "Toy/Env-v0", 1000): dict(bar="25", best_published="")
    })  # fmt: skip
    assert summary["verdict"] == "PASS", "it would have passed"


def test_what_report_cannot_read_is_named(bench, tmp_path, capsys):
    bench("run", "--suite", "toy", "--env", "Toy/Env-v0", "--workers", "4")
    for name, text in (("config.json", "{"), ("config.json", "[]"), ("origin.json", "1"), ("metrics.jsonl", "null\n")):
        path = tmp_path / "runs" / "fake__Toy-Env-v0__1000__3" / name
        whole = path.read_text()
        path.write_text(text)
        capsys.readouterr()
        assert bench("report") == 2
        assert capsys.readouterr().err.startswith(f"benchmark: {path} is damaged")
        path.write_text(whole)
    assert bench("report") == 0


def test_kept_seeds_stay_unless_hyperparameters_change(bench, tmp_path):
    words = ["run", "--suite", "toy", "--env", "Toy/Env-v0", "--workers", "4"]
    bench(*words)
    bench("report")
    path = tmp_path / "benchmark" / "baselines" / "fake__Toy-Env-v0__1000.json"
    for seed in (1, 2):
        (tmp_path / "runs" / f"fake__Toy-Env-v0__1000__{seed}" / "result.json").unlink()
    bench("report")
    assert len(json.loads(path.read_text())["seeds"]) == 4
    for seed in (3, 4):
        config = tmp_path / "runs" / f"fake__Toy-Env-v0__1000__{seed}" / "config.json"
        config.write_text(config.read_text().replace('"bonus": 0.0', '"bonus": 1.0'))
    bench("report")
    assert [run["seed"] for run in json.loads(path.read_text())["seeds"]] == [3, 4]
    config.write_text(config.read_text().replace('"bonus": 1.0', '"bonus": 2.0'))
    assert bench("report") == 2


@pytest.mark.parametrize("bonus", ["0.0", "1.0"])
def test_older_runs_do_not_replace_kept_ones(bench, tmp_path, capsys, bonus):
    """A directory of runs that was forgotten, with the same hyperparameters or those of another time."""
    bench("run", "--suite", "toy", "--env", "Toy/Env-v0", "--workers", "4")
    bench("report")
    path = tmp_path / "benchmark" / "baselines" / "fake__Toy-Env-v0__1000.json"
    before = path.read_text()
    for seed in (1, 2, 3, 4):
        folder = tmp_path / "runs" / f"fake__Toy-Env-v0__1000__{seed}"
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"bonus": 0.0', f'"bonus": {bonus}'))
        os.utime(folder / "result.json", (0, 0))
    assert bench("report") == 2
    assert "newer results than" in capsys.readouterr().err
    assert path.read_text() == before


def changed_hyperparameters(row: report.Row, kept: dict) -> list[str]:
    """The kept hyperparameters that the script of a row has not got any more; of compile only the speed depends."""
    algo, *flags = row[0].split()
    settings = ["--env-id", row[1], "--total-timesteps", row[2], "--torch-threads", 1, *flags]
    today = vars(script(algo).parse_args(list(map(str, settings))))
    return [name for name in report.differences(kept, today) if name != "compile"]


def test_the_kept_hyperparameters_are_those_of_today():
    """Results of another environment's defaults, from a time when these were found in another way."""
    baselines = ROOT / "benchmark" / "baselines"
    kept = {row: report.read_hyperparameters(baselines, row) for row in report.read_baselines(baselines, *SUITES)}
    assert {row: names for row in kept if (names := changed_hyperparameters(row, kept[row]))} == {}
    row = ("ppo_clip", "HalfCheetah-v5", 1_000_000)
    assert changed_hyperparameters(row, kept[row] | dict(gamma=0.9)) == ["gamma"]


def test_a_flag_that_is_new_or_gone_is_no_other_hyperparameter(bench, tmp_path):
    bench("run", "--suite", "toy", "--env", "Toy/Env-v0", "--workers", "4")
    bench("report")
    for seed in (1, 2):
        (tmp_path / "runs" / f"fake__Toy-Env-v0__1000__{seed}" / "result.json").unlink()
    for seed in (3, 4):
        config = tmp_path / "runs" / f"fake__Toy-Env-v0__1000__{seed}" / "config.json"
        config.write_text(config.read_text().replace('"bonus": 0.0', f'"flag_of_{seed}": 1'))
    assert bench("report") == 0
    kept = json.loads((tmp_path / "benchmark" / "baselines" / "fake__Toy-Env-v0__1000.json").read_text())
    assert [run["seed"] for run in kept["seeds"]] == [1, 2, 3, 4]


def test_one_run_has_a_curve_but_is_no_result(bench, tmp_path, capsys):
    bench("run", "--suite", "toy", "--env", "Toy/Env-v0", "--seeds", "2")
    assert " 20.0  " in capsys.readouterr().out, "no interval either"
    assert bench("report") == 0
    results = (tmp_path / "benchmark" / "RESULTS.md").read_text()
    for text in (results, (tmp_path / "README.md").read_text()):
        assert "| fake " not in text
        assert "20.0" not in text
    assert "Toy-Env-v0__1000.svg" in results
    picture = tmp_path / "benchmark" / "baselines" / "curves" / "Toy-Env-v0__1000.svg"
    assert "<!-- fake, 1 seed -->" in picture.read_text()
    assert 'class="opener"' not in (tmp_path / "page.html").read_text()


def test_the_table_of_the_readme_by_hand(tmp_path, monkeypatch):
    """Of four environments with a published score the last three; no flags of its own, no row that lacks seeds."""
    suite = [("many", f"Env{i}-v{i}", 10_000 * 10**i, "1-2", "") for i in range(5)]
    suite += [("many", "Own-v0", 5, "1-2", "--k 3"), ("none", "Env0-v0", 10_000, "1-2", "")]
    suite += [("one", "A-v0", 5, "1", ""), ("many", "Env4-v4", 10**9, "1-3", "")]
    monkeypatch.setitem(SUITES, "toy", suite)
    monkeypatch.setattr(report, "TABULATED", ["toy"])
    monkeypatch.setattr(markdown, "README_CURVES", ("Env3-v3", 10_000_000))
    references = {}
    for i, (row, cells) in enumerate(report.suite_rows("toy").items()):
        runs = [dict(seed=cell.seed, eval_mean=i - 1234.25, sps=1.0) for cell in cells[:2]]
        runs[-1] |= dict(date="2026-11-20") if i == 2 else {}
        (tmp_path / f"{report.file_name(row)}.json").write_text(json.dumps(dict(row=row, seeds=runs)))
        if row[0].startswith("many") and i != 3:
            references[row] = dict(bar="", best_published="99.96")
    speeds = {"many sb3.X E": 3.0, "many sbx.X E": 2.5, "many sb3.X F": 8.0, "gone sb3.X E": 1.0}
    tasks = {key: dict(ours=[dict(sps=sps)], peer=[dict(sps=2.0)]) for key, sps in speeds.items()}
    (tmp_path / "speed.json").write_text(json.dumps(dict(tasks=tasks)))
    lines = markdown.readme_part(tmp_path, references).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert cells[2:] == [
        [
            "many",
            "Env1 100k: -1,233 (100.0), Env2 1M: -1,232* (100.0), Env4 100M: -1,230 (100.0)",
            "1.25 x sbx.X, one run",
        ]
    ]
    assert lines[-1].startswith('<img src="benchmark/baselines/curves/Env3-v3__10000000.svg"')


def test_what_has_not_been_run_is_told(tmp_path, monkeypatch):
    """Each row once, and those that lack some seeds or are of older texts; what is whole is not named."""
    for suite in list(SUITES):
        monkeypatch.setitem(SUITES, suite, [])
    monkeypatch.setattr(report, "TABULATED", ["toy", "again"])
    monkeypatch.setitem(
        SUITES, "toy", [("whole part none old both", "A-v0", 5000, "1-2", ""), ("none", "B-v0", 5, "1", "")]
    )
    monkeypatch.setitem(SUITES, "again", [("none", "A-v0", 5000, "1-2", ""), ("whole", "A-v0", 5000, "1-2", "--k 3")])
    monkeypatch.setitem(SUITES, "ppo_paper", [("none", "C-v0", 5, "1", "--k 3")])

    def keep(algo: str, runs: int, date: str = report.REWRITTEN) -> None:
        row = (algo, "A-v0", 5000)
        seeds = [dict(seed=seed, date=date) for seed in range(1, runs + 1)]
        (tmp_path / f"{file_name(row)}.json").write_text(json.dumps(dict(row=row, seeds=seeds)))

    keep("whole", 2)
    keep("part", 1)
    keep("old", 2, "2026-11-23")
    keep("both", 1, "2026-11-23")
    monkeypatch.setattr(speed, "TASKS", [speed.Task("ours", "A-v0", 9, "sb3.X sbx.X", {}, {})])
    (tmp_path / "speed.json").write_text(json.dumps(dict(tasks={"ours sb3.X A-v0": {}})))
    assert markdown.missing_section(tmp_path).split("\n\n")[1].splitlines() == [
        "- toy, A-v0, 5,000 steps: part (1 of 2 seeds), none, old (older text), both (1 of 2 seeds, older text)",
        "- toy, B-v0, 5 steps: none",
        "- again, A-v0, 5,000 steps: whole --k 3",
        "- ppo_paper, C-v0, 5 steps: none --k 3",
        "- speed, A-v0: ours against sbx.X",
    ]
    monkeypatch.setattr(speed, "TASKS", [])
    monkeypatch.setitem(SUITES, "toy", [("whole", "A-v0", 5000, "1-2", "")])
    for suite in ("again", "ppo_paper"):
        monkeypatch.setitem(SUITES, suite, [])
    assert markdown.missing_section(tmp_path) == ""


def test_the_files_of_the_repository_are_short_and_whole():
    """The README's part leaves room for the rest of it; every picture and file that is linked to is there."""
    readme = (ROOT / "README.md").read_text()
    part = readme[readme.index(markdown.BEGIN) : readme.index(markdown.END)]
    assert len(part) < 3500
    assert part.count("<img") == 1
    results = (ROOT / "benchmark" / "RESULTS.md").read_text()
    assert results.count("<img") >= 10
    links = {ROOT / name for name in re.findall(r'src="([^"]+)"|\]\(([^)#:]+)\)', part) for name in name if name}
    for names in re.findall(r'src="([^"]+)"|\]\(([^)#:]+)\)', results):
        links |= {ROOT / "benchmark" / name for name in names if name}
    assert len(links) > 12
    assert [link for link in links if not link.exists()] == []


def test_curves_weigh_episodes_and_leave_out_iterations_without(tmp_path):
    lines = [
        dict(global_step=1, episodes=1, episodic_return=0.0),
        dict(global_step=2, episodes=0, episodic_return=None),
    ]
    lines += [dict(global_step=3, episodes=3, episodic_return=4.0)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert report.learning_curve(tmp_path) == [[1.0, 0.0], [3.0, 4.0]]
    assert report.learning_curve(tmp_path, points=1) == [[3.0, 3.0]]
    (tmp_path / "metrics.jsonl").write_text("")
    assert report.learning_curve(tmp_path) == []


def test_numbers_beside_the_score_are_kept(tmp_path):
    """Whatever result.json measures beside what every run has; of language models the proxy and the KL as curves."""
    lines = [dict(global_step=i, episodes=1, episodic_return=i, kl=2 * i, proxy_reward=-i) for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    plain = WHOLE | dict(algo="a", seed=1, total_timesteps=2, trained_steps=2, eval_cut=0, train_return=None)
    (tmp_path / "result.json").write_text(json.dumps(plain))
    kept = report.kept_run(tmp_path, 1, plain)
    assert kept["curve"] == [[1.0, 1.0], [2.0, 2.0]]
    assert not {"numbers", "curves"} & set(kept)
    kept = report.kept_run(tmp_path, 1, plain | dict(rmse=0.5))
    assert kept["numbers"] == dict(rmse=0.5)
    assert "curves" not in kept
    kept = report.kept_run(tmp_path, 1, plain | dict(eval_kl=3.0))
    assert kept["curves"] == dict(proxy_reward=[[1.0, -1.0], [2.0, -2.0]], kl=[[1.0, 2.0], [2.0, 4.0]])


def test_sections_and_pictures_of_demonstrations_and_language(tmp_path, monkeypatch):
    """Tables of the numbers beside the scores, by hand; pictures show every row and lie where they are linked to."""
    monkeypatch.setattr(report, "TABULATED", ["imitation", "language"])
    for suite in ("imitation", "language"):
        for i, (row, cells) in enumerate(report.suite_rows(suite).items()):
            runs = []
            for cell in cells[:4]:
                curve = [[100.0, 0.0], [200.0, float(cell.seed)]]
                numbers = dict(demonstrator_mean=240.0) if suite == "imitation" else dict(eval_kl=i + cell.seed / 10)
                run = dict(seed=cell.seed, eval_mean=10.0 * i + cell.seed, sps=1.0, numbers=numbers, curve=curve)
                runs.append(run | dict(curves=dict(proxy_reward=curve, kl=curve)))
            settings = dict(num_demonstrations=i + 1, kl_coef=i / 8, top_fraction=0.5 if "top" in row[0] else 1.0)
            text = json.dumps(dict(row=row, hyperparameters=settings, seeds=runs))
            (tmp_path / f"{report.file_name(row)}.json").write_text(text)
    pictures.draw_all(tmp_path, {})
    results = markdown.results_file(tmp_path, {})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results.splitlines()]
    assert ["Algorithm", "Seeds", "score", "demonstrator_mean"] in cells
    assert ["behavior_cloning --num-demonstrations 3", "4", "12.5", "240.0"] in cells
    assert ["Algorithm", "Seeds", "score", "eval_kl"] in cells
    assert ["grpo", "4", "42.5", "4.25"] in cells
    linked = [name for name in re.findall(r'src="baselines/([^"]+)"', results)]
    assert [name for name in linked if not (tmp_path / name).exists()] == []
    assert {pictures.IMITATION, pictures.LANGUAGE} < set(linked)
    assert not any(task in name for task in ("reviews", "countdown") for name in linked)
    shown = (tmp_path / pictures.LANGUAGE).read_text()
    assert [shown.count(f"<!-- beta = {kl} -->") for kl in ("0", "0.125", "0.25", "0.5")] == [1, 1, 1, 0]
    shown = (tmp_path / pictures.IMITATION).read_text()
    assert [shown.count(f"<!-- {label} -->") for label in ("behavior_cloning", "dagger", "demonstrator")] == [1, 1, 1]
    assert "behavior_cloning, the best 50%" in shown


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interruption_ends_the_children(tmp_path, number, code):
    told = "(run_dir / 'pid').write_text(str(__import__('os').getpid()))"
    (tmp_path / "fake.py").write_text(FAKE.replace("time.sleep", f"{told}; time.sleep"))
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "  # as in a foreground
    program += "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    program += "from benchmark.__main__ import main; from benchmark.suites import SUITES; "
    program += "SUITES['toy'] = [('fake', 'Slow-v0', 1, '1-2', '')]; "
    words = ["run", "--suite", "toy", "--workers", "2", "--out", str(tmp_path), "--algos", str(tmp_path)]
    program += f"sys.exit(main({words!r}))"
    harness = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)
    files, deadline = [tmp_path / f"fake__Slow-v0__1__{seed}" / "pid" for seed in (1, 2)], time.time() + 20
    while not all(file.exists() and file.read_text() for file in files):
        assert time.time() < deadline
        time.sleep(0.05)
    harness.send_signal(number)
    harness.communicate(timeout=10)
    assert harness.returncode == code
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_comparison_is_normalised_by_random_and_best(tmp_path, monkeypatch):
    """Worked by hand: two settings on two environments; an environment that one of them lacks does not count."""

    def keep(flags, env_id, returns):
        row = [f"ppo_clip {flags}".strip(), env_id, 1_000_000]
        runs = [dict(seed=i, train_return=x) for i, x in enumerate(returns, 1)]
        (tmp_path / f"{report.file_name(row)}.json").write_text(json.dumps(dict(seeds=runs)))

    settings = [line for line in markdown.PPO_PAPER if line[2] in ("", "--clip-coef inf") and line[1] == "ppo_clip"]
    monkeypatch.setattr(markdown, "PPO_PAPER", settings)
    assert markdown.paper_section(tmp_path) == ""
    keep("", "Hopper-v5", [100, 300])
    keep("", "HalfCheetah-v5", [-100, 0])
    keep("--clip-coef inf", "Hopper-v5", [0, 0])
    keep("--clip-coef inf", "HalfCheetah-v5", [-300, -300])
    keep("", "Swimmer-v5", [5])
    (tmp_path / "random.json").write_text(json.dumps({"Hopper-v5": 100, "HalfCheetah-v5": -200}))
    lines = markdown.paper_table(tmp_path).splitlines()[2:]
    assert [re.sub(" +", " ", line) for line in lines] == [
        "| clipping, eps = 0.2 | -50 (2) | 200 (2) | 0.62 | 0.82 |",
        "| no clipping or penalty | -300 (2) | 0 (2) | -0.50 | -0.39 |",
        "| random policy | -200 | 100 | 0 | 0 |",
    ]


SCORE = re.compile(
    r"algos/(\w+)\.py --env-id (\S+)((?: --\S+ \S+)*) +# "  # algorithm, environment and flags
    r"(?:[a-z]+ )*([-\d.,]+)(?: [a-z]+)* after ([\d,]+M?|[\d.]+M) (?:steps|tokens|samples)"  # score and steps
)


def wrong_scores(docstring: str, baselines: Path) -> list[str]:
    """The commands of a page whose score is not the kept one's, as they round it, or that say it in another way."""
    wrong = []
    for line in docstring.splitlines():
        if "--env-id" not in line or " after " not in line:
            continue
        found = SCORE.search(line)
        if not found:
            wrong.append(line.strip())
            continue
        algo, env_id, flags, score, steps = found.groups()
        number = float(score.replace(",", ""))
        budget = float(steps.replace(",", "").replace("M", "e6"))
        kept = report.read_object(baselines / f"{file_name((algo + flags, env_id, int(budget)))}.json")
        iqm, _, _ = report.iqm_interval(np.array([[run["eval_mean"]] for run in kept["seeds"]]))
        unit = 100 if abs(number) >= 1000 else 10 ** -len(score.partition(".")[2])
        if abs(abs(number) - abs(iqm)) > unit / 2:  # an error is kept with a minus
            wrong.append(line.strip())
    return wrong


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_scores_on_the_pages_are_the_kept_ones(path):
    """A score that was trained anew, or was never measured."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert wrong_scores(docstring, ROOT / "benchmark" / "baselines") == []


def test_a_wrong_score_on_a_page_is_found():
    """A unit too much in the last digit, with and without decimals, and in hundreds."""
    baselines = ROOT / "benchmark" / "baselines"
    right = [
        "algos/dqn.py --env-id CartPole-v1            # 500 after 50,000 steps",
        "algos/npg.py --env-id HalfCheetah-v5    # 5,500 after 1M steps",
        "algos/dpo.py --env-id reviews    # true reward 3.4 after 104,000 tokens, from -1.3",
    ]
    wrong = [line.replace("500 after", "600 after").replace("3.4", "3.5") for line in right]
    wrong[0] = right[0].replace("500", "499")
    assert wrong_scores("\n".join(right), baselines) == []
    assert wrong_scores("\n".join(wrong), baselines) == wrong
