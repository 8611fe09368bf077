"""Collects finished runs into small JSON files and takes statistics over them."""

import csv
import importlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

import gymnasium as gym
import numpy as np
from scipy.stats import trim_mean

from benchmark.run import Cell, Refusal, file_name, is_number, read_object, read_result, replace_text, suite_cells
from benchmark.suites import NO_FLOOR, SUITES, TABULATED

Row = tuple[str, str, int]  # algorithm with its flags, environment, steps
FOLDER = Path(__file__).parent
PACKAGES = ("torch", "gymnasium", "numpy", "mujoco", "ale-py", "MinAtar", "Box2D")
# What config.json holds beside hyperparameters.
PLUMBING = {"algo", "seed", "run_dir", "track", "capture_video", "checkpoint_every", "resume", "torch", "gymnasium"}
PLUMBING |= {"save_buffer"}
REWRITTEN = "2026-11-24"  # runs from before that day are of texts that were not changed in comments alone since
FEWEST = 5  # seeds whose interval is judged: that of two or three is from the lowest to the highest score
COUNTS = {"seed", "total_timesteps", "trained_steps", "eval_cut"}  # what result.json holds beside measurements
# Nine of the ten colours of Petroff (2021), which colour-blind readers can tell apart; the tenth is faint on white.
COLOURS = ["#94a4a2", "#b9ac70", "#ffa90e", "#a96b59", "#832db6", "#717581", "#e76300", "#3f90da", "#bd1f01"]


def resample(scores: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Bootstrap samples (resamples, runs, tasks) of scores (runs, tasks); runs are resampled within each task."""
    runs, tasks = scores.shape
    chosen = np.random.default_rng(seed).integers(0, runs, (resamples, runs, tasks))
    return scores[chosen, np.arange(tasks)]


def iqm_interval(scores: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """Interquartile mean of scores (runs, tasks) and its 95% stratified bootstrap interval (Agarwal et al. 2021)."""
    samples = resample(scores, resamples).reshape(resamples, -1)
    low, high = np.percentile(trim_mean(samples, 0.25, axis=1), [2.5, 97.5])
    return float(trim_mean(scores, 0.25, axis=None)), float(low), float(high)


def improvement(these: np.ndarray, those: np.ndarray) -> tuple[float, float, float]:
    """The chance that a run of one algorithm beats one of another, with its 95% interval (Agarwal et al. 2021).

    Both have scores (runs, tasks) on the same tasks, over which the chance is averaged; a draw counts half.
    """

    def chance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = x[..., :, None, :], y[..., None, :, :]
        return ((x > y) + (x == y) / 2).mean((-3, -2, -1))

    low, high = np.percentile(chance(resample(these), resample(those, seed=1)), [2.5, 97.5])
    return float(chance(these, those)), float(low), float(high)


def performance_profile(scores: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The share of scores (runs, tasks) above each level, with its 95% interval at each (Agarwal et al. 2021)."""
    samples = (resample(scores)[..., None] > levels).mean((1, 2))
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    return (scores[..., None] > levels).mean((0, 1)), low, high


def aligned(cells: list[list[str]]) -> str:
    """A Markdown table of a head and rows, in columns of equal width."""
    widths = [max(3, *map(len, column)) for column in zip(*cells)]  # of the rule under the head at least 3
    rules = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in [cells[0], rules, *cells[1:]])


def read_references(path: Path) -> dict[Row, dict[str, str]]:
    """Bars and published scores, from the CSV file; raises Refusal if one is no number."""
    references = {}
    with open(path, newline="") as file:
        lines = csv.DictReader(file)
        for line in lines:
            try:
                references[line["algorithm"], line["env_id"], int(line["steps"])] = line
                for name in ("bar", "best_published", "single_run"):
                    float(line.get(name) or 0)
            except (KeyError, ValueError) as error:
                raise Refusal(f"{path}, line {lines.line_num}: {error}") from error
    return references


def is_old(run: dict) -> bool:
    """Whether a run is of a text that drew other random numbers than that of today."""
    return run.get("date", REWRITTEN) < REWRITTEN


def judge(low: float, high: float, bar: str, whole: bool) -> str:
    """How a score between low and high stands to a bar, which may be empty; `whole`: all planned seeds were run."""
    if not bar:
        return "-"
    if high < float(bar):
        return "FAIL"
    if low < float(bar):
        return "open"
    return "PASS" if whole else "short"  # too few seeds to claim anything


def summarise(row: Row, runs: list[dict], planned: Iterable[int], references: dict[Row, dict[str, str]]) -> dict:
    """One line of the table from the runs of its seeds; `planned` are those of the suite."""
    reference: dict[str, str] = defaultdict(str, references.get(row, {}))
    iqm, low, high = iqm_interval(np.array([[run["eval_mean"]] for run in runs]))
    whole = set(planned) <= {run["seed"] for run in runs}
    line = dict(row=row, iqm=iqm, low=low, high=high, n=len(runs), whole=whole, reference=reference)
    line["mean"] = float(np.mean([run["eval_mean"] for run in runs]))
    line["sps"] = np.median([run["sps"] for run in runs])
    line["old"] = any(map(is_old, runs))
    line["verdict"] = judge(iqm, iqm, reference["bar"], whole)
    line["interval"] = judge(low, high, reference["bar"], whole)
    if reference["bar"] and len(runs) < FEWEST:
        line["interval"] = "few"
    return line


def suite_rows(*suites: str) -> dict[Row, list[Cell]]:
    """The cells of the suites by table row; a row that several suites name has the seeds of all."""
    rows: dict[Row, list[Cell]] = defaultdict(list)
    for cell in dict.fromkeys(cell for suite in suites for cell in suite_cells(suite)):
        rows[cell.row].append(cell)
    return rows


def learning_curve(run_dir: Path, name: str = "episodic_return", points: int = 100) -> list[list[float]]:
    """At most `points` pairs of global step and mean of a metric of the training episodes; none if it is not there."""
    path = run_dir / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [line for line in lines if name in line]
        data = np.array([(x["global_step"], x[name], x["episodes"]) for x in lines if x["episodes"]])
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{path} is damaged") from error
    chunks = np.array_split(data, min(points, len(data))) if len(data) else []
    return [[float(c[-1, 0]), round(float(np.average(c[:, 1], weights=c[:, 2])), 2)] for c in chunks]


def kept_run(run_dir: Path, seed: int, result: dict) -> dict:
    """What is kept of a finished run."""
    path = run_dir / "origin.json"
    origin = read_object(path) if path.exists() else {}  # a run that was started by hand has none
    versions = origin.get("versions", {})
    finished = datetime.fromtimestamp((run_dir / "result.json").stat().st_mtime, timezone.utc)
    kept = dict(seed=seed)
    for name in ("eval_returns", "eval_mean", "train_return", "sps", "wall_time"):
        kept[name] = result.get(name)
    numbers = {name: value for name, value in result.items() if is_number(value) and name not in {*kept, *COUNTS}}
    if numbers:
        kept["numbers"] = numbers
    if "eval_kl" in result:
        kept["curves"] = {name: learning_curve(run_dir, name) for name in ("proxy_reward", "kl")}
    return kept | dict(
        date=str(finished.date()),
        script=origin.get("script"),
        versions={name: versions[name] for name in PACKAGES if name in versions},
        curve=learning_curve(run_dir),
    )


def differences(these: dict, those: dict) -> list[str]:
    """The hyperparameters in which two runs differ; a flag that only one of them has is new or gone since."""
    return [name for name in these if name in those and these[name] != those[name]]


def collect(runs: Path, baselines: Path) -> None:
    """Keep the finished cells of all suites; what was kept of other seeds stays unless the hyperparameters changed.

    Raises Refusal if what was kept is newer than the runs that would take its place.
    """
    for row, cells in suite_rows(*SUITES).items():
        seeds = {}
        hyperparameters = None
        for cell in cells:
            run_dir = runs / cell.name
            result = read_result(run_dir)
            if result is None:
                continue
            config = read_object(run_dir / "config.json")
            mine = {key: value for key, value in config.items() if key not in PLUMBING}
            hyperparameters = hyperparameters or mine
            if differing := differences(hyperparameters, mine):
                raise Refusal(f"{run_dir} differs from the seeds before it in {', '.join(differing)}")
            seeds[cell.seed] = kept_run(run_dir, cell.seed, result)
        if hyperparameters is None:
            continue
        path = baselines / f"{file_name(row)}.json"
        if path.exists():
            old = read_object(path)
            kept = {run["seed"]: run for run in old["seeds"]}
            changed = differences(old["hyperparameters"], hyperparameters)
            replaced = kept.keys() if changed else kept.keys() & seeds.keys()
            newest = max(run["date"] for run in seeds.values())
            if any(kept[seed].get("date", "") > newest for seed in replaced):
                raise Refusal(f"{path} holds newer results than {runs}, which would take their place: delete either")
            if changed:
                print(f"{path.name}: {len(kept)} kept seeds are dropped, for {', '.join(changed)} changed")
            else:
                seeds = kept | seeds
        body = ",\n".join(json.dumps(seeds[seed]) for seed in sorted(seeds))  # a line per seed keeps diffs small
        top = json.dumps(dict(row=row, hyperparameters=hyperparameters), indent=1).removesuffix("\n}")
        replace_text(path, f'{top},\n "seeds": [\n{body}\n]}}\n')


def read_baselines(baselines: Path, *suites: str) -> dict[Row, list[dict]]:
    """The kept runs by table row, in the order of the suites."""
    paths = {row: baselines / f"{file_name(row)}.json" for row in suite_rows(*suites)}
    return {row: read_object(path)["seeds"] for row, path in paths.items() if path.exists()}


def read_hyperparameters(baselines: Path, row: Row) -> dict:
    """The hyperparameters of a row's kept runs."""
    return read_object(baselines / f"{file_name(row)}.json")["hyperparameters"]


def random_return(env_id: str, episodes: int = 100) -> float:
    """Mean return of uniformly random actions."""
    if env_id.startswith("ALE/"):
        gym.register_envs(importlib.import_module("ale_py"))
    elif env_id.startswith("MinAtar/") and env_id not in gym.registry:
        importlib.import_module("minatar.gym").register_envs()
    env = gym.make(env_id)
    env.action_space.seed(0)
    total = 0.0
    for episode in range(episodes):
        env.reset(seed=episode)
        over = False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total += float(reward)
            over = terminated or truncated
    return total / episodes


def read_random_returns(baselines: Path) -> dict[str, float]:
    """The kept scores of the random policy by environment."""
    path = baselines / "random.json"
    return read_object(path) if path.exists() else {}


def keep_random_returns(baselines: Path) -> None:
    """Store the scores of the random policy on the environments that were run and have one."""
    known = read_random_returns(baselines)
    for _, env_id, _ in read_baselines(baselines, *SUITES):
        if env_id not in known and env_id not in NO_FLOOR:
            known[env_id] = random_return(env_id)
    if known:
        replace_text(baselines / "random.json", json.dumps(known, indent=1) + "\n")


def results(kept: dict[Row, list[dict]], references: dict[Row, dict[str, str]]) -> dict[Row, dict]:
    """Lines from `summarise` for the rows of several runs: one run has a curve, but is no result."""
    planned = suite_rows(*SUITES)
    return {
        row: summarise(row, runs, [cell.seed for cell in planned[row]], references)
        for row, runs in kept.items()
        if len(runs) > 1
    }


def mujoco_scores(baselines: Path, references: dict[Row, dict[str, str]]) -> dict[str, np.ndarray]:
    """Scores (seeds, environments) of every algorithm that was run on all environments of MuJoCo for a million steps.

    0 is the random policy and 1 the best published score of any algorithm there.
    """
    steps = 1_000_000
    kept = {
        (algo, env_id): runs for (algo, env_id, n), runs in read_baselines(baselines, "mujoco").items() if n == steps
    }
    env_ids = sorted({env_id for _, env_id in kept})
    random = read_random_returns(baselines)
    best: dict[str, float] = {}
    for (_, env_id, n), reference in references.items():
        if n == steps and reference["best_published"]:
            best[env_id] = max(float(reference["best_published"]), best.get(env_id, -np.inf))
    scores = {}
    for algo in dict.fromkeys(algo for algo, _ in kept):
        by_env = [{run["seed"]: run["eval_mean"] for run in kept.get((algo, env_id), [])} for env_id in env_ids]
        seeds = sorted(set.intersection(*map(set, by_env)))
        if len(seeds) > 1:
            floor = np.array([random[env_id] for env_id in env_ids])
            top = np.array([best[env_id] for env_id in env_ids])
            returns = np.array([[returns[seed] for returns in by_env] for seed in seeds])
            scores[algo] = (returns - floor) / (top - floor)
    return scores


def styles() -> dict[str, tuple[str, str]]:
    """Colour and kind of line of every algorithm of the tables, the same in every picture."""
    kinds = ["solid", "dash", "dot"]
    looks = [(colour, kind) for kind in kinds for colour in COLOURS]
    algos = dict.fromkeys(algo for algo, _, _ in suite_rows(*TABULATED))
    return dict(zip(algos, itertools.cycle(looks)))


def mean_curve(curves: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all curves cover and the mean over curves there."""
    grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 100)
    return grid, np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
