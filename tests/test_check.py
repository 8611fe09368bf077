"""The check: its statistics against counting, its error rates in simulation, its verdicts on fake scripts."""

import itertools
import json
import math
import re
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark import check, report
from benchmark.__main__ import main
from benchmark.run import Cell, suite_cells
from benchmark.suites import SUITES

ROOT = Path(__file__).parent.parent
HEAVY = [271.6, 500.0, 500.0, 500.0, 500.0, 488.6, 490.1, 499.1, 500.0, 500.0]
FAKE = """
import argparse, json, pathlib, shutil, sys
parser = argparse.ArgumentParser()
for name in ("env-id", "run-dir", "total-timesteps", "torch-threads"):
    parser.add_argument(f"--{name}")
parser.add_argument("--seed", type=int)
args = parser.parse_args()
run_dir, seed, weights = pathlib.Path(args.run_dir), args.seed, "a.pt"
score = 100.0
shutil.copy(pathlib.Path(FOLDER) / weights, run_dir / "checkpoint.pt")
result = dict(eval_returns=[score], eval_mean=score, sps=1.0, wall_time=1.0)
(run_dir / "result.json").write_text(json.dumps(result))
"""


def make_row(scores, random=0.0, seeds=(2, 8)) -> check.Row:
    return check.Row(Cell("a", "E-v0", 1, 0), np.array(scores, float), random, seeds)


@pytest.mark.parametrize("short_fresh", range(5))
@pytest.mark.parametrize("short_baseline", range(4))
def test_p_value_is_the_share_of_relabelings(short_fresh, short_baseline):
    fresh = np.array([0.0] * short_fresh + [99.0] * (4 - short_fresh))
    baseline = np.array([0.0] * short_baseline + [100.0] * (7 - short_baseline))
    pooled = [*(fresh < 90), *(baseline < 90)]
    counts = [sum(pooled[i] for i in chosen) for chosen in itertools.combinations(range(11), 4)]
    share = np.mean([count >= short_fresh for count in counts])
    assert check.p_value(fresh, baseline, 0.0) == pytest.approx(share)


@pytest.mark.parametrize(("score", "short"), [(-119.0, 0), (-121.0, 1)])
def test_the_margin_is_a_share_of_the_way_from_the_random_policy(score, short):
    """Also of negative returns: from -300 to -100 it is 20, not a tenth of -100, and the mean is not its scale."""
    baseline = np.array([-100.0] * 5 + [-350.0] * 3)
    all_short = check.p_value(np.full(8, -np.inf), baseline, -300.0)
    assert check.p_value(np.full(8, score), baseline, -300.0) == pytest.approx(all_short if short else 1)


def test_a_constant_baseline_needs_no_variance():
    baseline = np.full(10, 500.0)
    assert check.p_value(np.full(8, 499.2), baseline, 22.0) == pytest.approx(1)
    assert check.p_value(np.full(8, 400.0), baseline, 22.0) == pytest.approx(1 / math.comb(18, 8))


def test_holm_is_its_definition():
    rng = np.random.default_rng(0)
    for p in rng.random((50, 6)) ** 3:
        p[rng.random(6) < 0.3] = np.inf
        ranked, adjusted = sorted(p[np.isfinite(p)]), {np.inf: np.inf}
        for i, value in enumerate(ranked):
            adjusted[value] = max((len(ranked) - j) * ranked[j] for j in range(i + 1))
        assert check.holm(p) == pytest.approx([adjusted[value] for value in p])


def test_as_many_seeds_as_can_show_something():
    """Few seeds of a baseline, or many that fall short, are weighed against more fresh ones."""
    for baseline, level in [([500.0] * 10, 0.05), ([500.0] * 3, 0.05), ([500.0] * 7 + [100.0] * 3, 0.01)]:
        n = check.seed_count(2, level, np.array(baseline), 22.0)
        short = sum(score < 450 for score in baseline)
        p = [math.comb(k + short, k) / math.comb(k + len(baseline), k) for k in range(n + 1)]
        assert p[n] <= level
        assert n == 2 or p[n - 1] > level
    assert check.seed_count(8, 0.05, np.full(10, 500.0), 22.0) == 8
    cells = [Cell(str(i), "E-v0", 1, 0) for i in range(20)]
    rows = check.read_rows(cells, {cell.row: [dict(eval_mean=9.0)] * 3 for cell in cells}, {"E-v0": 0.0})
    p = check.p_value(np.full((20, rows[0].seeds[1]), -np.inf), rows[0].scores, 0.0)
    assert (check.holm(p) <= check.RED).all(), "all rows at once have to be able to turn red"


def test_the_floor_of_a_language_model_is_its_score_before_training():
    """No random policy plays there; and a suite of such rows has a baseline."""
    kept = report.read_baselines(ROOT / "benchmark" / "baselines", "language")
    rows = {row.cell.row: row for row in check.read_rows(suite_cells("language", seeds="0"), kept, {})}
    assert rows.keys() == kept.keys()
    for name, runs in kept.items():
        before = [run["numbers"]["eval_before"] for run in runs]
        assert min(before) <= rows[name].random <= max(before)
        assert rows[name].random == pytest.approx(sum(before) / len(runs))


def test_p_values_are_at_most_1(monkeypatch, tmp_path):
    """Of three suspects none is WORSE; Holm's factors alone would print 3."""
    rows = [check.Row(Cell(name, "E-v0", 1, 0), np.full(10, 9.0), 0.0, (1, 1)) for name in "abc"]
    scores = iter([[np.zeros(1)] * 3, [np.full(1, 9.0)] * 3])
    monkeypatch.setattr(check, "train", lambda *_: next(scores))
    assert [line[-2:] for line in check.compare(rows, None, tmp_path, tmp_path)] == [["1", "ok"]] * 3


def test_simulation_matches_all_draws(monkeypatch):
    """Two rows of three seeds: every baseline, every fresh seed of both stages, by another Fisher and Holm."""
    monkeypatch.setattr(check, "SUSPECT", 0.6)
    monkeypatch.setattr(check, "RED", 0.65)
    populations, outcomes = ([0.0, 80.0, 100.0], [85.0, 100.0, 100.0]), []

    def fisher(fresh, baseline):
        line = 0.9 * sorted(baseline)[1]
        short, total, n = sum(x < line for x in fresh), sum(x < line for x in [*fresh, *baseline]), len(fresh)
        ways = [math.comb(total, k) * math.comb(n + 3 - total, n - k) for k in range(short, n + 1)]
        return round(sum(ways) / math.comb(n + 3, n), 9)

    for scores in populations:
        median, found = sorted(scores)[1], {}
        for loss in (0, 0.2 * median):
            found[loss > 0] = Counter(
                (fisher([first - loss], baseline), fisher([x - loss for x in second], baseline))
                for *baseline, first, x, y in itertools.product(scores, repeat=6)
                for second in [(x, y)]
            )
        outcomes.append(found)

    def rate(worse: int | None, red) -> float:
        total = 0.0
        for p, times in outcomes[0][worse == 0].items():
            for q, others in outcomes[1][worse == 1].items():
                tested = sorted((r[1], i) for i, r in enumerate((p, q)) if r[0] <= 0.6)
                reds = set()
                for rank, (value, i) in enumerate(tested):  # Holm: from the smallest on, until one does not hold
                    if value * (len(tested) - rank) > 0.65:
                        break
                    reds.add(i)
                total += times * others * red(reds)
        return total / 3**12

    rows = [make_row(scores, seeds=(1, 2)) for scores in populations]
    alarms, power, trainings = check.simulate(rows, 100_000)
    expected = [rate(None, bool), rate(0, lambda reds: 0 in reds), rate(1, lambda reds: 1 in reds)]
    assert [alarms, *power] == pytest.approx(expected, abs=0.006)
    assert 0.02 < min(expected) < max(expected) < 0.98
    suspects = sum(sum(n for p, n in found[False].items() if p[0] <= 0.6) / 3**6 for found in outcomes)
    assert trainings == pytest.approx(2 + 2 * suspects, abs=0.02)


@pytest.mark.parametrize("suite", ["ci", "classic"])
def test_error_rates_on_the_kept_seeds(suite):
    """Also if one seed in eleven of every row gets only half of the way, which ten seeds need not have shown."""
    baselines = ROOT / "benchmark" / "baselines"
    kept = report.read_baselines(baselines, suite)
    rows = check.read_rows(suite_cells(suite, seeds="0"), kept, report.read_random_returns(baselines))
    assert len(rows) == len(kept)
    alarms, power, _ = check.simulate(rows, 5000)
    assert alarms < 0.01
    assert power.min() >= 0.9
    halves = [row._replace(scores=np.append(row.scores, (np.median(row.scores) + row.random) / 2)) for row in rows]
    assert check.simulate(halves, 5000)[0] < 0.01


def test_one_stage_alone_would_err():
    """Thirteen rows with heavy tails: the two stages keep the bound that neither keeps alone."""
    rng = np.random.default_rng(0)
    p = np.empty((2, 5000, 13))
    for i in range(13):
        baseline = rng.choice(HEAVY, (5000, 10))
        for stage, n in enumerate(check.SEEDS):
            p[stage, :, i] = check.p_value(rng.choice(HEAVY, (5000, n)), baseline, 22.0)
    assert (check.decide(*p) <= check.RED).any(-1).mean() < 0.01
    assert (p[0] <= check.SUSPECT).any(-1).mean() > 0.05
    assert (p[1] <= check.RED).any(-1).mean() > 0.02


def test_holm_holds_the_level_that_many_rows_would_break():
    rng = np.random.default_rng(0)
    draws = rng.normal(100, 20, (4000, 30, 18))
    p = check.p_value(draws[..., :8], draws[..., 8:], 0.0)
    everything = np.zeros_like(p)  # all rows are suspected
    assert (check.decide(everything, p) <= check.RED).any(-1).mean() < check.RED
    assert (p <= check.RED).any(-1).mean() > 2 * check.RED


def test_fresh_seeds_are_fresh():
    for suite in SUITES:
        assert max(cell.seed for cell in suite_cells(suite)) < min(check.FIRST_SEED)
    assert check.FIRST_SEED[0] + 1000 <= check.FIRST_SEED[1]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Calls the check of a suite `toy` of the scripts `one` and `two`; bench.write makes a script of FAKE."""
    for suite in list(SUITES):
        monkeypatch.setitem(SUITES, suite, [])
    monkeypatch.setitem(SUITES, "toy", [("one two", "Toy-v0", 10_000, "1-10", "")])
    (tmp_path / "repo" / "algos").mkdir(parents=True)
    (tmp_path / "baselines").mkdir()
    (tmp_path / "baselines" / "random.json").write_text(json.dumps({"Toy-v0": -100.0}))
    for name in ("a", "b"):
        torch.save(dict(agent=dict(weight=torch.full((2,), ord(name))), wall_time=0.0), tmp_path / f"{name}.pt")

    def write(algo: str, old: str = "", new: str = "", baseline: int = 10) -> None:
        text = FAKE.replace("FOLDER", repr(str(tmp_path))).replace(old, new, 1 if old else 0)
        (tmp_path / "repo" / "algos" / f"{algo}.py").write_text(text)
        body = json.dumps(dict(seeds=[dict(eval_mean=100.0)] * baseline))
        (tmp_path / "baselines" / f"{algo}__Toy-v0__10000.json").write_text(body)

    def call(*words: str) -> int:
        places = dict(out="out", algos="repo/algos", baselines="baselines")
        paths = [word for flag, path in places.items() for word in (f"--{flag}", str(tmp_path / path))]
        return main(["check", "--suite", "toy", "--workers", "4", *paths, *words])

    call.write = write
    for algo in ("one", "two"):
        write(algo)
    return call


def seeds_of(tmp_path: Path, algo: str) -> list[int]:
    """The seeds in the directories of an algorithm's runs."""
    return sorted(int(path.parent.name.split("__")[-1]) for path in tmp_path.glob(f"out/{algo}-*/result.json"))


def verdicts(output: str) -> dict[str, list[str]]:
    """Difference, p and verdict by algorithm."""
    lines = [line.strip("| ").split("|") for line in output.splitlines() if "| Toy-v0" in line]
    return {line[0].strip(): [word.strip() for word in line[-3:]] for line in lines}


FIRST, SECOND = [1001], [2001, 2002, 2003, 2004, 2005, 2006, 2007, 2008]


@pytest.mark.parametrize(
    ("score", "code", "said", "seeds"),
    [
        ("100.0", 0, ["+0.0%", "1", "ok"], FIRST),
        ("81.0", 0, ["-9.5%", "1", "ok"], FIRST),
        ("60.0", 1, ["-20.0%", "2.3e-05", "WORSE"], FIRST + SECOND),
        ("20.0 if seed == 1001 else 100.0", 0, ["+0.0%", "1", "ok"], FIRST + SECOND),
        ("20.0 if seed % 2 == 1 else 100.0", 1, ["-20.0%", "0.023", "WORSE"], FIRST + SECOND),
        ("119.0", 0, ["+9.5%", "1", "ok"], FIRST),
        ("140.0", 0, ["+20.0%", "1", "ok"], FIRST),
        ("sys.exit('the reason') if seed == 1001 else 100.0", 1, ["", "", "failed"], []),
        ("sys.exit('the reason') if seed == 2003 else 60.0", 1, ["", "", "failed"], FIRST + SECOND[:2] + SECOND[3:]),
    ],
)
def test_verdicts(bench, tmp_path, capsys, score, code, said, seeds):
    bench.write("one", "100.0", score)
    assert bench() == code
    output = capsys.readouterr().out
    assert verdicts(output) == dict(one=said, two=["+0.0%", "1", "ok"])
    assert seeds_of(tmp_path, "one") == seeds
    assert seeds_of(tmp_path, "two") == FIRST
    fine = "none of 2 rows is shown to be worse than its baseline"
    assert output.splitlines()[-1] == (f"{said[-1]}: one Toy-v0 10,000" if code else fine)


def test_only_what_has_a_baseline_is_trained(bench, tmp_path, capsys):
    bench.write("one", baseline=check.BASELINE - 1)
    (tmp_path / "baselines" / "random.json").rename(tmp_path / "random.json")
    assert bench() == 2
    assert "lacks what fresh seeds are compared with: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "random.json").rename(tmp_path / "baselines" / "random.json")
    assert bench() == 0
    assert verdicts(capsys.readouterr().out)["one"][-1] == "no baseline"
    assert (seeds_of(tmp_path, "one"), seeds_of(tmp_path, "two")) == ([], FIRST)
    assert bench("--algo", "three") == 2
    assert bench("--workers", "0") == 2


def test_results_belong_to_the_text_of_the_script(bench, tmp_path, capsys):
    bench.write("one", "score = 100.0", "open(run_dir / 'starts', 'a').write('x'); score = 100.0")

    def starts() -> list[str]:
        return [path.read_text() for path in sorted(tmp_path.glob("out/one-*/starts"))]

    assert bench() == 0
    assert bench() == 0
    assert starts() == ["x"], "what is finished was trained again"
    next(tmp_path.glob("out/one-*__1001/result.json")).unlink()
    next(tmp_path.glob("out/one-*__1001/checkpoint.pt")).unlink()
    assert bench() == 0
    assert starts() == ["xx"], "what is not finished was not trained"
    bench.write("one", "100.0", "60.0")
    assert bench() == 1, "results of another text were taken"
    for pin, times in [("other==1", 1), ("shutil==1", 2)]:
        (tmp_path / "repo" / "requirements.txt").write_text(f"{pin}  # why")
        assert bench("--algo", "two") == 0
        assert seeds_of(tmp_path, "two") == sorted(FIRST * times), "only packages of the script count, and they do"


@pytest.fixture
def repository(bench, tmp_path):
    """Commits the scripts; calls git."""

    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path / "repo"), *identity, *words], check=True, capture_output=True)

    (tmp_path / "repo" / "requirements.txt").write_text("shutil==1  # why\nother==1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "base")
    return git


def found(output: str) -> list[str]:
    return re.findall(r"\| (changed|unchanged) ", output)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("score = 100.0", "score = 100.0  # a comment", "unchanged"),
        ("score = 100.0", "score = 95.0", "changed"),
        ('"a.pt"', '"b.pt"', "changed"),
        ("score = 100.0", "score = 100.0 if seed > 1 else sys.exit(1)", "changed"),
    ],
)
def test_neutral_scripts_are_left_out(bench, repository, tmp_path, capsys, monkeypatch, old, new, said):
    """A comment is neutral; other returns, other weights and a script that fails are not."""
    monkeypatch.setattr(check, "NEUTRAL_STEPS", 5000)  # fewer than the suite has
    bench.write("one", old, new)
    assert bench("--neutral", "HEAD") == 0
    assert found(capsys.readouterr().out) == [said, "unchanged"]
    short = len(list(tmp_path.glob(f"out/one-*__{check.NEUTRAL_STEPS}__1")))
    assert short == 2, "base and head have to run side by side"
    fresh = [seed for seed in seeds_of(tmp_path, "one") if seed > 1]
    assert fresh == ([] if said == "unchanged" else FIRST)
    assert not list(tmp_path.glob("out/two*")), "an equal text needs no run"


def test_what_cannot_be_shown_to_be_neutral_is_compared(bench, repository, tmp_path, capsys):
    bench.write("two", "100.0", "60.0")
    assert bench("--neutral", "no-revision") == 2
    assert "no-revision is no revision" in capsys.readouterr().err
    repository("rm", "--cached", "algos/one.py")
    repository("commit", "-m", "without one")
    assert bench("--neutral", "HEAD") == 1
    output = capsys.readouterr().out
    assert found(output) == ["changed", "changed"], "a new script is a changed one"
    assert verdicts(output.split("\n\n")[1])["two"][-1] == "WORSE"
    repository("add", ".")
    repository("commit", "-m", "all")
    bench.write("one", "= 100.0", "= 100.0  # a comment")
    for pins, said in [("shutil==1\nother==2", "unchanged"), ("shutil==2\nother==2", "changed")]:
        (tmp_path / "repo" / "requirements.txt").write_text(pins)
        bench("--neutral", "HEAD")
        assert found(capsys.readouterr().out) == [said] * 2, "other packages may do otherwise, if the script has them"
    (tmp_path / "repo" / "requirements.txt").write_text("shutil==1\n")
    for pins, said in [("til==1", "unchanged"), ("sys==1", "changed")]:  # "til" is only a part of a word of the script
        (tmp_path / "repo" / "requirements-more.txt").write_text(pins)
        bench("--neutral", "HEAD")
        assert found(capsys.readouterr().out) == [said] * 2, "packages of another file count, too"


@pytest.mark.parametrize("words", [[], ["--neutral", "HEAD"]])
def test_a_folder_without_a_script_is_refused(bench, repository, tmp_path, capsys, words):
    """The root of the repository given for the folder of its scripts; a script that was deleted."""
    root = tmp_path / "repo"
    (root / "algos" / "two.py").unlink()
    for folder, missing in ((root, "one"), (root / "algos", "two")):
        assert bench("--algos", str(folder), *words) == 2
        said = f"benchmark: {folder} is no folder of these scripts: it holds no {missing}.py\n"
        assert capsys.readouterr().err == said
    assert not (tmp_path / "out").exists()


def test_simulation_tells_its_rates_and_trains_nothing(bench, tmp_path, monkeypatch, capsys):
    assert bench("--simulate", "100") == 0
    output = capsys.readouterr().out
    assert re.search(r"\| two +\| Toy-v0 +\| 10,000 \| 10 +\| 1 \+ 8 \| 100.0% ", output)
    assert output.splitlines()[-1].startswith("Of 100 simulated checks of an unchanged suite 0.00% turn red, after 2.0")
    assert not (tmp_path / "out").exists()
    for alarms, power, code in [(0.0099, 0.9, 0), (0.01, 0.9, 1), (0.0099, 0.89, 1)]:
        rates = alarms, np.array([1.0, power]), 4.0
        monkeypatch.setattr(check, "simulate", lambda *_, rates=rates: rates)
        assert bench("--simulate", "100") == code
