"""Collects finished runs into small JSON files, and draws the tables and learning curves from those."""

import csv
import importlib
import json
import textwrap
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path

import gymnasium as gym
import numpy as np
from scipy.stats import trim_mean

from benchmark.run import Cell, file_name, read_result, suite_cells
from benchmark.speed import summary
from benchmark.suites import PPO_PAPER, PPO_PAPER_ENVS, SUITES, TABULATED

Row = tuple[str, str, int]  # algorithm with its flags, environment, steps
FOLDER = Path(__file__).parent
PACKAGES = ("torch", "gymnasium", "numpy", "mujoco", "ale-py", "MinAtar", "Box2D")
PLUMBING = ("algo", "seed", "run_dir", "track", "capture_video", "checkpoint_every", "resume", "versions", "git_commit")
HEAD = ["Algorithm", "Environment", "Steps", "IQM [95% interval]", "Seeds", "Bar", "Best published", "Steps/s", ""]
# Nine of the ten colours of Petroff (2021), which colour-blind readers can tell apart; the tenth is faint on white.
COLOURS = ["#94a4a2", "#b9ac70", "#ffa90e", "#a96b59", "#832db6", "#717581", "#e76300", "#3f90da", "#bd1f01"]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def iqm_interval(scores: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """Interquartile mean of scores (runs, tasks) and its 95% stratified bootstrap interval (Agarwal et al. 2021)."""
    runs, tasks = scores.shape
    chosen = np.random.default_rng(0).integers(0, runs, (resamples, runs, tasks))  # runs are resampled within each task
    samples = scores[chosen, np.arange(tasks)].reshape(resamples, -1)
    low, high = np.percentile(trim_mean(samples, 0.25, axis=1), [2.5, 97.5])
    return float(trim_mean(scores, 0.25, axis=None)), float(low), float(high)


def read_references(path: Path) -> dict[Row, dict[str, str]]:
    """Bars and published scores, from the CSV file."""
    with open(path, newline="") as file:
        return {(line["algorithm"], line["env_id"], int(line["steps"])): line for line in csv.DictReader(file)}


def summarise(row: Row, runs: list[dict], planned: int, references: dict[Row, dict[str, str]]) -> dict:
    """One line of the table from the runs of its seeds."""
    reference = defaultdict(str, references.get(row, {}))
    iqm, low, high = iqm_interval(np.array([[run["eval_mean"]] for run in runs]))
    if not reference["bar"]:
        verdict = "-"
    elif iqm < float(reference["bar"]):
        verdict = "FAIL"
    else:
        verdict = "PASS" if len(runs) >= planned else "short"  # short: too few seeds to claim anything
    sps = np.median([run["sps"] for run in runs])
    return dict(row=row, iqm=iqm, low=low, high=high, n=len(runs), sps=sps, reference=reference, verdict=verdict)


def published(reference: dict[str, str]) -> str:
    """The best published score and how it was obtained, or nothing."""
    return "{best_published} ({protocol})".format(**reference) if reference["best_published"] else ""


def table_row(line: dict) -> list[str]:
    """A line from `summarise` as text under HEAD."""
    reference, score = line["reference"], f"{line['iqm']:.1f}"
    if line["n"] > 1:
        score += " [{low:.1f}, {high:.1f}]".format(**line)
    algo, env_id, steps = line["row"]
    numbers = [score, str(line["n"]), reference["bar"], published(reference), f"{line['sps']:,.0f}"]
    return [algo, env_id, f"{steps:,}", *numbers, line["verdict"]]


def table(lines: list[dict]) -> str:
    """Lines from `summarise` as a Markdown table that is aligned in a terminal, too."""
    return aligned([HEAD, *map(table_row, lines)])


def aligned(cells: list[list[str]]) -> str:
    """A Markdown table of a head and rows, in columns of equal width."""
    widths = [max(3, *map(len, column)) for column in zip(*cells)]  # of the rule under the head at least 3
    rules = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in [cells[0], rules, *cells[1:]])


def suite_rows(*suites: str) -> dict[Row, list[Cell]]:
    """The cells of the suites by table row; a row that several suites name has the seeds of all."""
    rows: dict[Row, list[Cell]] = defaultdict(list)
    for cell in dict.fromkeys(cell for suite in suites for cell in suite_cells(suite)):
        rows[cell.row].append(cell)
    return rows


def learning_curve(run_dir: Path, points: int = 100) -> list[list[float]]:
    """At most `points` pairs of global step and mean return of the training episodes."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    data = np.array([(x["global_step"], x["episodic_return"], x["episodes"]) for x in lines if x["episodes"]])
    chunks = np.array_split(data, min(points, len(data))) if len(data) else []
    return [[float(c[-1, 0]), round(float(np.average(c[:, 1], weights=c[:, 2])), 2)] for c in chunks]


def collect(runs: Path, baselines: Path) -> None:
    """Keep the finished cells of all suites; what was kept of other seeds stays unless the hyperparameters changed."""
    for row, cells in suite_rows(*SUITES).items():
        seeds, hyperparameters = {}, None
        for cell in cells:
            result = read_result(runs / cell.name)
            if result is None:
                continue
            config = json.loads((runs / cell.name / "config.json").read_text())
            mine = {key: value for key, value in config.items() if key not in PLUMBING}
            hyperparameters = hyperparameters or mine
            if differing := [key for key in hyperparameters | mine if hyperparameters.get(key) != mine.get(key)]:
                raise ValueError(f"{runs / cell.name} differs from the seeds before it in {', '.join(differing)}")
            finished = datetime.fromtimestamp((runs / cell.name / "result.json").stat().st_mtime, timezone.utc)
            kept = ("seed", "eval_returns", "eval_mean", "train_return", "sps", "wall_time")
            versions = {name: config["versions"][name] for name in PACKAGES if name in config["versions"]}
            seeds[cell.seed] = {key: result[key] for key in kept} | dict(
                date=str(finished.date()),
                git_commit=config["git_commit"],
                versions=versions,
                curve=learning_curve(runs / cell.name),
            )
        if hyperparameters is None:
            continue
        path = baselines / f"{file_name(row)}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        if old.get("hyperparameters") == hyperparameters:
            seeds = {run["seed"]: run for run in old["seeds"]} | seeds
        body = ",\n".join(json.dumps(seeds[seed]) for seed in sorted(seeds))  # a line per seed keeps diffs small
        top = json.dumps(dict(row=row, hyperparameters=hyperparameters), indent=1).removesuffix("\n}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{top},\n "seeds": [\n{body}\n]}}\n')


def read_baselines(baselines: Path, *suites: str) -> dict[Row, list[dict]]:
    """The kept runs by table row, in the order of the suites."""
    rows = suite_rows(*suites)
    paths = {row: baselines / f"{file_name(row)}.json" for row in rows}
    return {row: json.loads(path.read_text())["seeds"] for row, path in paths.items() if path.exists()}


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
            total, over = total + float(reward), terminated or truncated
    return total / episodes


def keep_random_returns(baselines: Path) -> None:
    """Store the scores of the random policy on the environments that were run."""
    path = baselines / "random.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for _, env_id, _ in read_baselines(baselines, *SUITES):
        known[env_id] = known.get(env_id) or random_return(env_id)
    if known:
        path.write_text(json.dumps(known, indent=1) + "\n")


def comparison(baselines: Path) -> str:
    """The experiment of the PPO paper: mean of the last 100 training episodes by setting and environment.

    The normalised score of an environment is 0 for the random policy and 1 for the best run; an environment on which
    a setting is missing is left out.
    """
    kept = {row: [run["train_return"] for run in runs] for row, runs in read_baselines(baselines, "ppo_paper").items()}
    rows = {(name, env_id): (f"{algo} {flags}".strip(), env_id, 1_000_000)
            for name, algo, flags, _ in PPO_PAPER for env_id in PPO_PAPER_ENVS}  # fmt: skip
    names = [name for name, *_ in PPO_PAPER]
    envs = [env_id for env_id in PPO_PAPER_ENVS if all(rows[name, env_id] in kept for name in names)]
    if not envs:
        return ""
    random = json.loads((baselines / "random.json").read_text())
    best = {env_id: max(max(kept[rows[name, env_id]]) for name in names) for env_id in envs}
    lines = []
    for name, *_, in_paper in PPO_PAPER:
        runs = [kept[rows[name, env_id]] for env_id in envs]
        scores = [np.mean((np.array(x) - random[e]) / (best[e] - random[e])) for x, e in zip(runs, envs)]
        cells = [f"{np.mean(x):.0f} ({len(x)})" for x in runs]
        lines.append((np.mean(scores), [name, *cells, f"{np.mean(scores):.2f}", in_paper or ""]))
    head = ["Setting", *envs, "normalised", "PPO paper"]
    text = "| " + " | ".join(head) + " |\n|" + "---|" * len(head) + "\n"
    for _, cells in sorted(lines, key=lambda line: -line[0]):
        text += "| " + " | ".join(map(str, cells)) + " |\n"
    cells = [f"{random[env_id]:.0f}" for env_id in envs]
    return text + "| " + " | ".join(["random policy", *cells, "0", "0"]) + " |\n"


def comparisons(baselines: Path) -> str:
    """What was measured beside the scores, as Markdown: the experiment of the PPO paper and speed."""
    text = ""
    if compared := comparison(baselines):
        text += "The experiment of the PPO paper (section 6.1) with these scripts: mean return of the last 100 "
        text += "training episodes after 1M steps (number of runs), and the average score normalised to 0 for the "
        text += f"random policy and 1 for the best run on each environment.\n\n{compared}\n"
    if (baselines / "speed.json").exists():
        text += "Speed: " + summary(json.loads((baselines / "speed.json").read_text()))
    return text


def results(kept: dict[Row, list[dict]], references: dict[Row, dict[str, str]]) -> dict[Row, dict]:
    """Lines from `summarise` for the rows of several runs: one run has a curve, but is no result."""
    planned = suite_rows(*SUITES)
    return {row: summarise(row, runs, len(planned[row]), references) for row, runs in kept.items() if len(runs) > 1}


def markdown(baselines: Path, references: dict[Row, dict[str, str]]) -> str:
    """What stands in the README between the marks."""
    kept = read_baselines(baselines, *TABULATED)
    text = table(list(results(kept, references).values()))
    text += "\n\n<details><summary>Where the bars and the published scores come from</summary>\n\n"
    for row in kept:
        if reference := references.get(row):
            origin = "; ".join(filter(None, [published(reference), reference["source"], reference["note"]]))
            text += f"- {row[0]}, {row[1]}, {row[2]:,} steps: {origin}\n"
    text += "\n</details>\n\n"
    for env_id in dict.fromkeys(env_id for _, env_id, _ in kept):
        text += f'<img src="benchmark/baselines/{curve_file(env_id)}" width="49%" alt="Learning curves on {env_id}">\n'
    return f"{text}\n{comparisons(baselines)}"


def insert(readme: str, text: str) -> str:
    """The README with `text` between the marks."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"the README must hold {BEGIN} and {END} once")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{text}{END}{rest.split(END)[1]}"


def styles() -> dict[str, tuple[str, str]]:
    """Colour and kind of line of every algorithm of the tables, the same in every picture."""
    lines = ["solid", "dash", "dot"]
    algos = dict.fromkeys(algo for algo, _, _ in suite_rows(*TABULATED))
    return {algo: (COLOURS[i % 9], lines[i // 9 % 3]) for i, algo in enumerate(algos)}


def mean_curve(curves: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all curves cover and the mean over curves there."""
    grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 100)
    return grid, np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)


def curve_file(env_id: str) -> str:
    """Where the learning curves of an environment lie within the baselines."""
    return f"curves/{env_id.replace('/', '-')}.svg"


def draw_curves(baselines: Path) -> None:
    """A picture per environment: each seed as a thin line, the mean over seeds as a thick one."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "foliorl"  # equal results give equal files
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter

    figures: dict[str, plt.Figure] = {}
    for (algo, env_id, _), runs in read_baselines(baselines, *TABULATED).items():
        figure = figures[env_id] = figures.get(env_id) or plt.figure(figsize=(7, 3.8), layout="constrained")
        axes = figure.gca()
        axes.set(title=env_id, xlabel="environment steps", ylabel="return of training episodes")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        curves = [np.array(run["curve"]).T for run in runs if run["curve"]]
        if not curves:  # no episode ended
            continue
        colour, line = styles()[algo]
        for curve in curves:
            axes.plot(*curve, color=colour, linewidth=0.5, alpha=0.4, zorder=1)
        label = textwrap.fill(f"{algo}, {len(curves)} seed{'s' * (len(curves) > 1)}", 30, break_on_hyphens=False)
        line = dict(solid="-", dash="--", dot=":")[line]
        axes.plot(*mean_curve(curves), line, color=colour, linewidth=2, label=label)
    (baselines / "curves").mkdir(parents=True, exist_ok=True)
    for env_id, figure in figures.items():
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(baselines / curve_file(env_id), metadata={"Date": None})
        plt.close(figure)
