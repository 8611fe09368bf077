"""Draws the kept runs: learning curves, algorithms compared over environments, and what single suites show."""

import textwrap
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from benchmark import report
from benchmark.report import iqm_interval, mean_curve, read_baselines, read_hyperparameters, styles
from benchmark.suites import NO_FLOOR

matplotlib.use("svg")
plt.rcParams["svg.hashsalt"] = "foliorl"  # equal results give equal files
plt.rcParams["axes.spines.top"] = False
plt.rcParams["axes.spines.right"] = False
MUJOCO = "curves/performance_profile.svg"
LANGUAGE = "curves/over_optimisation.svg"
IMITATION = "curves/demonstrations.svg"


def curve_file(env_id: str, steps: int) -> str:
    """Where the learning curves of an environment to so many steps lie within the baselines."""
    return f"curves/{env_id.replace('/', '-')}__{steps}.svg"


def save(figure: plt.Figure, path: Path) -> None:
    """Write a picture and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_seeds(axes: Axes, curves: list[np.ndarray], colour: str, line: str, label: str) -> None:
    """Each seed as a thin line and their mean as a thick one."""
    for curve in curves:
        axes.plot(*curve, color=colour, linewidth=0.5, alpha=0.4, zorder=1)
    axes.plot(*mean_curve(curves), line, color=colour, linewidth=2, label=label)


def draw_curves(baselines: Path) -> None:
    """A picture of learning curves for each environment and number of steps."""
    pictures: dict[tuple[str, int], dict[str, list[dict]]] = defaultdict(dict)
    for (algo, env_id, steps), runs in read_baselines(baselines, *report.TABULATED).items():
        if env_id not in NO_FLOOR:  # else no policy acts that could have a score
            pictures[env_id, steps][algo] = runs
    for (env_id, steps), by_algo in pictures.items():
        figure = plt.figure(figsize=(7, 3.8), layout="constrained")
        axes = figure.gca()
        axes.set(title=f"{env_id}, {steps:,} steps", xlabel="environment steps", ylabel="return of training episodes")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        for algo, runs in by_algo.items():
            curves = [np.array(run["curve"]).T for run in runs if run["curve"]]
            if not curves:  # no episode ended
                continue
            colour, line = styles()[algo]
            label = textwrap.fill(f"{algo}, {len(curves)} seed{'s' * (len(curves) > 1)}", 30, break_on_hyphens=False)
            draw_seeds(axes, curves, colour, dict(solid="-", dash="--", dot=":")[line], label)
        figure.legend(loc="outside right upper", frameon=False)
        save(figure, baselines / curve_file(env_id, steps))


def draw_performance_profile(baselines: Path, references: dict[report.Row, dict[str, str]]) -> None:
    """For each algorithm the share of its runs on MuJoCo above a normalised score, over that score."""
    scores = report.mujoco_scores(baselines, references)
    if not scores:
        return
    figure = plt.figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.gca()
    levels = np.linspace(0, max(x.max() for x in scores.values()), 200)
    for algo, x in scores.items():
        colour, line = styles()[algo]
        share, low, high = report.performance_profile(x, levels)
        axes.fill_between(levels, low, high, color=colour, alpha=0.15, linewidth=0)
        label = f"{algo}, {len(x)} seeds"
        axes.plot(levels, share, dict(solid="-", dash="--", dot=":")[line], color=colour, linewidth=2, label=label)
    axes.axvline(1, color="black", linewidth=0.5)
    title = "MuJoCo, 1,000,000 steps"
    axes.set(title=title, xlabel="normalised score", ylabel="share of runs above it", ylim=(0, 1.02))
    figure.legend(loc="outside right upper", frameon=False)
    save(figure, baselines / MUJOCO)


def draw_over_optimisation(baselines: Path) -> None:
    """True reward, proxy and KL of ppo_rlhf over the tokens it has learned from, for each weight of the KL."""
    rows = {row: runs for row, runs in read_baselines(baselines, "language").items() if "ppo_rlhf" in row[0]}
    if not rows:
        return
    figure, (gold, proxy, kl) = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    for row, runs in rows.items():
        colour, _ = styles()[row[0]]
        label = f"beta = {read_hyperparameters(baselines, row)['kl_coef']:g}"
        draw_seeds(gold, [np.array(run["curve"]).T for run in runs], colour, "-", label)
        draw_seeds(proxy, [np.array(run["curves"]["proxy_reward"]).T for run in runs], colour, "-", label)
        draw_seeds(kl, [np.array(run["curves"]["kl"]).T for run in runs], colour, "-", label)
    titles = {"true reward": gold, "reward model (the proxy)": proxy, "KL to the reference": kl}
    for title, axes in titles.items():
        axes.set(title=title, xlabel="tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    gold.legend(frameon=False)
    save(figure, baselines / LANGUAGE)


def draw_demonstrations(baselines: Path) -> None:
    """Return over the number of episodes that the demonstrator has shown or labelled."""
    points: dict[str, list[tuple[int, float, float, float]]] = {}
    demonstrator = []
    for row, runs in read_baselines(baselines, "imitation").items():
        hyperparameters = read_hyperparameters(baselines, row)
        episodes = hyperparameters["num_demonstrations"] + hyperparameters.get("num_labelled", 0)
        scores = iqm_interval(np.array([[run["eval_mean"]] for run in runs]))
        label = row[0].split()[0]
        if hyperparameters["top_fraction"] < 1:
            label += f", the best {hyperparameters['top_fraction']:.0%}"
        points.setdefault(label, []).append((episodes, *scores))
        if hyperparameters["top_fraction"] == 1:
            demonstrator += [run["numbers"]["demonstrator_mean"] for run in runs]
    if not points:
        return
    figure = plt.figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.gca()
    for label, scores in points.items():
        x, y, low, high = np.array(sorted(scores)).T
        axes.errorbar(x, y, yerr=[y - low, high - y], marker="o", capsize=3, label=label)
    axes.axhline(np.mean(demonstrator), color="black", linestyle=":", label="demonstrator")
    axes.set(title="LunarLander-v3", xlabel="episodes of the demonstrator", ylabel="return", xscale="log")
    numbers = sorted({point[0] for scores in points.values() for point in scores})
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.legend(frameon=False)
    save(figure, baselines / IMITATION)


def draw_all(baselines: Path, references: dict[report.Row, dict[str, str]]) -> None:
    """Every picture of RESULTS.md."""
    draw_curves(baselines)
    draw_performance_profile(baselines, references)
    draw_over_optimisation(baselines)
    draw_demonstrations(baselines)
