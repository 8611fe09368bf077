"""Writes what report.py keeps as Markdown: benchmark/RESULTS.md and the short table of the README."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import trim_mean

from benchmark import report, scaling, speed
from benchmark.pictures import IMITATION, LANGUAGE, MUJOCO, curve_file
from benchmark.report import Row, aligned, iqm_interval, read_baselines
from benchmark.run import Refusal, read_object
from benchmark.suites import NO_FLOOR, PPO_PAPER, PPO_PAPER_ENVS

HEAD = ["Algorithm", "Environment", "Steps", "IQM [95% interval]", "Seeds", "Bar", "Best published", "Steps/s"]
HEAD += ["Score", "Interval"]
BEGIN = "<!-- results:begin -->"
END = "<!-- results:end -->"
README_HEAD = ["Script", "Environment, steps: score (best published)", "Speed"]
README_SCORES = 3  # at most so many for each script
README_CURVES = ("HalfCheetah-v5", 1_000_000)
README_NOTE = """\
Score: interquartile mean over 3 to 10 seeds (of three, their mean), with a star if it is of an older text of the script
that drew other random numbers; in brackets the best published one, whatever its protocol, of several seeds if there is
one. Most of those are means, which a failed seed lowers more. Speed: steps per second over those of the fastest peer
that was measured, of stable-baselines3, sb3-contrib and SBX (JAX), on the environment where we gain least, with the
texts of that time. The nearest algorithm stands in where no peer has the same one. Every script's scores, with
intervals, sources and curves: [benchmark/RESULTS.md](benchmark/RESULTS.md).
"""
ABOUT = """\
# Results

<!-- `python -m benchmark report` writes this file: what is changed by hand gets lost. -->

A score is the mean return of the episodes that the trained policy plays in fresh environments without exploring, 100 of
them on Acrobot, MountainCar and Pendulum and 20 elsewhere; DDPG and TD3 play their target policy, a running average.
Language models answer 256 prompts, sampled, and td_prediction is scored by its error (see below). Each row is the
interquartile mean over training runs that differ only in their seed, with its 95% interval in brackets (stratified
bootstrap, Agarwal et al. 2021); of two or three seeds it is their mean, with the lowest and the highest score.
Hyperparameters were tuned on other seeds, those of n_step_dqn on CartPole, of deep_sarsa on CliffWalking, of dqn on
MountainCar, of a2c, dqn, double_dqn and qr_dqn on Acrobot, of double_dqn and prioritized_dqn on LunarLander, of a2c on
MuJoCo, of td3 and sac on Hopper and of ppo_clip and qr_dqn on Breakout once more after a failure on these, see below.
`python -m benchmark run --suite mujoco` trains the rows of a suite again and prints them as here, and `--algo`, `--env`
and `--seeds` choose among its runs.

The last columns judge the score and its whole interval. PASS: not below the bar, with all seeds of the suite; short:
not below it, with fewer; open: the interval holds the bar; few: fewer than five seeds; FAIL: below it; -: no bar. Bars
and published scores with their sources are in [`references.csv`](references.csv), and a bar that no source explains is
ours; the score and the curve of every seed are in [`baselines/`](baselines). Behind a published score stands how it was
taken. Evaluation: mean over seeds at the end of training; training average: mean of the last training episodes;
maximum: the highest such mean at any time of the training, which flatters; single run: of one tuned run.

Steps per second in this table are of runs side by side; the comparison of speed at the end had the machine to itself.
There, our time includes compilation, which takes longest in a first round. It is of the texts of that time, of which
[`speed.json`](baselines/speed.json) has a hash.
"""
PAPER = """\
The experiment of the PPO paper (section 6.1) with these scripts: mean return of the last 100 training episodes after 1M
steps (number of runs), and the average score normalised to 0 for the random policy and 1 for the best run on each
environment.
"""
PAPER_NOTE = """\
As in the paper, leaving out both clip and penalty is by far the worst choice, eps = 0.2 is the best of the three clips,
and A2C and the plain policy gradient stay behind. Unlike there, the adaptive KL does not lie between no clipping and
eps = 0.2 but level with the latter: ahead on HalfCheetah and Hopper, behind on Walker2d, and on each of them the runs
of the two overlap. Without clip or penalty the score is small but not negative, for HalfCheetah, which made it negative
in the paper, ends above the random policy here. On Hopper eps = 0.2 comes near the 2,300 or so of the paper's Figure 3;
on Walker2d it is above the 3,450 there and on HalfCheetah far above the 1,800. On InvertedPendulum all settings but the
worst come to the 1,000 that an episode can bring, or close to it. The paper's scores are over seven environments; one
enters this table when every setting has been run there: `python -m benchmark run --suite ppo_paper`.
"""
MUJOCO_TEXT = """\
HalfCheetah, Hopper and Walker2d at a million steps taken together, as Agarwal et al. (2021) recommend: 0 is the random
policy, 1 the best score over several seeds that was published of any of our algorithms there. IQM is the interquartile
mean over all runs; the other columns give the chance that a run of the row's algorithm beats one of the column's on the
same environment, with 95% intervals. The picture shows how many runs come above a score, with bands of 95% at each.
"""
ORIGINS = """\
`python -m benchmark run --suite SUITE --algo ALGORITHM --env ENVIRONMENT` makes a row. It starts a process for each
seed, such as `python algos/dqn.py --env-id Acrobot-v1 --seed 1 --total-timesteps 100000 --torch-threads 1`, with the
flags that stand behind the algorithm's name at its end, and ddppo by torchrun with two processes. The score of a seed
is eval_mean in the result.json of its run directory. On one machine, with the same versions of the packages, the same
seed gives the same numbers to the last bit if the run is not interrupted, except for a3c, whose workers do not wait for
each other. Elsewhere the last bits differ and after them whole runs, but not what many seeds have in common.

Script is the beginning of the hash of the script's text: `git cat-file -p HASH` prints it, and
`git log --find-object HASH` names the commit that brought it. A run that was begun with another text has none. Texts
change more often than results, in comments for instance: `python -m benchmark check --suite SUITE --neutral COMMIT`
says which of today's scripts do what those of a commit did, bit for bit, and then trains the others on fresh seeds.
Runs from before 24 November 2026 are of texts that were rewritten since, with the same hyperparameters but other random
numbers: what is missing, above, names them, and they will be trained anew.
"""

MISSING = """\
Some rows of the suites have not been run yet, not with all of their seeds, or with the older text of a script that was
rewritten since. `python -m benchmark run` with the suite that each line begins with makes them, and their bars and
published scores are in [`references.csv`](references.csv). What begins with speed was not measured:
`python -m benchmark speed` does so.
"""

MEASURES = {  # by suite: title, what is said of the numbers beside the score, and the picture if there is one
    "prediction": ("The values of a random walk", """\
The policy is given, so the score is minus the mean error of V. The root mean square error (rmse) over the 19 states is
what the textbook's figures show; the values themselves lie between -0.9 and 0.9.
""", ""),
    "imitation": ("Learning from demonstrations", """\
The demonstrator is the heuristic that comes with the environment, and demonstrator_mean the mean return of the episodes
that are learned from. A clone is taught by these alone, 10 unless a flag says otherwise. DAgger is shown one, and then
has the demonstrator label its own, the first 10 or --num-labelled.
""", IMITATION),
    "language": ("Language models", """\
Interquartile means over seeds of numbers in result.json; score and what begins with eval_ are means over responses.
score is the true reward after training, for grpo the share of problems solved; eval_before is the same before training,
eval_best_of_16 that of the response which the reward model likes best of 16 of the reference. After training,
eval_proxy is what the reward model gives, eval_kl the KL to the reference per response in nats, and eval_ended and
eval_distinct are the shares of texts that end and that are different. sft_loss is the reference's loss at the end of
its training. taste_accuracy is how often people choose what is truly better, where a tie counts as one of two chances,
rm_accuracy how often the reward model foresees their choice on pairs that it was not fitted to. The bars are ours:
nobody has published scores of these tasks.
""", LANGUAGE),
}  # fmt: skip


def published(reference: dict[str, str]) -> str:
    """The best published score and how it was obtained, or nothing."""
    return "{best_published} ({protocol})".format(**reference) if reference["best_published"] else ""


def number(value: float) -> str:
    """A score with one digit after the decimal point, or two or three if it is small."""
    if abs(value) >= 10:
        return f"{value:.1f}"
    if abs(value) >= 0.1:
        return f"{value:.2f}"
    return f"{value:.3f}"


def table_row(line: dict) -> list[str]:
    """A line from `summarise` as text under HEAD."""
    algo, env_id, steps = line["row"]
    score = number(line["iqm"])
    if line["n"] > 1:
        score += f" [{number(line['low'])}, {number(line['high'])}]"
    bar = line["reference"]["bar"]
    sps = f"{line['sps']:,.0f}"
    verdicts = [line["verdict"], line["interval"]]
    return [algo, env_id, f"{steps:,}", score, str(line["n"]), bar, published(line["reference"]), sps, *verdicts]


def table(lines: list[dict]) -> str:
    """Lines from `summarise` as a Markdown table that is aligned in a terminal, too."""
    return aligned([HEAD, *map(table_row, lines)])


def paper_table(baselines: Path) -> str:
    """The experiment of the PPO paper: mean of the last 100 training episodes by setting and environment.

    The normalised score of an environment is 0 for the random policy and 1 for the best run; an environment on which
    a setting is missing is left out.
    """
    kept = {row: [run["train_return"] for run in runs] for row, runs in read_baselines(baselines, "ppo_paper").items()}
    rows = {}
    for name, algo, flags, _ in PPO_PAPER:
        for env_id in PPO_PAPER_ENVS:
            rows[name, env_id] = (f"{algo} {flags}".strip(), env_id, 1_000_000)
    names = [name for name, *_ in PPO_PAPER]
    envs = [env_id for env_id in PPO_PAPER_ENVS if all(rows[name, env_id] in kept for name in names)]
    if not envs:
        return ""
    random = report.read_random_returns(baselines)
    best = {env_id: max(max(kept[rows[name, env_id]]) for name in names) for env_id in envs}
    lines = []
    for name, _, _, in_paper in PPO_PAPER:
        returns = {env_id: np.array(kept[rows[name, env_id]]) for env_id in envs}
        scores = [np.mean((returns[e] - random[e]) / (best[e] - random[e])) for e in envs]
        cells = [f"{x.mean():.0f} ({len(x)})" for x in returns.values()]
        theirs = "" if in_paper is None else str(in_paper)
        lines.append((np.mean(scores), [name, *cells, f"{np.mean(scores):.2f}", theirs]))
    lines.sort(key=lambda line: -line[0])
    head = ["Setting", *envs, "normalised", "PPO paper"]
    last = ["random policy", *(f"{random[env_id]:.0f}" for env_id in envs), "0", "0"]
    return aligned([head, *(cells for _, cells in lines), last])


def paper_section(baselines: Path) -> str:
    """What is said of the PPO paper's experiment; empty if no environment of it was run."""
    compared = paper_table(baselines)
    return f"{PAPER}\n{compared}\n\n{PAPER_NOTE}" if compared else ""


def measures_section(suite: str, baselines: Path) -> str:
    """The numbers beside the score of the rows of a suite, interquartile means; empty if nothing was run."""
    kept = read_baselines(baselines, suite)
    names = list(dict.fromkeys(name for runs in kept.values() for name in runs[0].get("numbers", {})))
    rows = [["Algorithm", "Seeds", "score", *names]]
    for row, runs in kept.items():
        cells = [row[0], str(len(runs))]
        for name in ["eval_mean", *names]:
            values = [run["numbers"].get(name) if name in names else run[name] for run in runs]
            cells.append("" if None in values else number(trim_mean(values, 0.25)))
        rows.append(cells)
    if not kept:
        return ""
    title, text, picture = MEASURES[suite]
    text += f"\n{aligned(rows)}\n"
    return text + f'\n<img src="baselines/{picture}" alt="{title}">\n' if picture else text


def published_section(lines: list[dict]) -> str:
    """How many lines from `summarise` have a published score and reach it, and a table of those that do not.

    A line that still lacks seeds is not compared.
    """
    compared = [line for line in lines if line["whole"] and line["reference"]["best_published"]]
    if not compared:
        return ""
    counts: dict[str, int] = defaultdict(int)
    spoiled = []  # by seeds that failed, which only the mean over seeds shows
    rows = [[*HEAD[:4], "Best published", "Difference", "Interval"]]
    for line in compared:
        best = line["reference"]["best_published"]
        interval = report.judge(line["low"], line["high"], best, whole=True)
        if line["n"] < report.FEWEST:
            interval = "few"
        counts[interval] += 1
        if line["mean"] >= float(best):
            counts["by mean"] += 1
        if line["iqm"] >= float(best):
            counts["reached"] += 1
            if line["mean"] < float(best):
                algo, env_id, _ = line["row"]
                spoiled.append(f"{algo} on {env_id} ({number(line['mean'])}; {number(float(best))})")
        else:
            cells = table_row(line)
            verdict = "below" if interval == "FAIL" else interval
            rows.append([*cells[:4], cells[6], number(line["iqm"] - float(best)), verdict])
    text = f"""\
{len(compared)} rows with all their seeds have a published score beside them, of their budget if there is one, as the
sources below tell. At or above the best one, whatever its protocol: {counts["reached"]}, of which {counts["PASS"]} with
their whole interval. Below it with their whole interval: {counts["FAIL"]}. Intervals of fewer than five seeds do
not count.
"""
    if spoiled:
        text += f"""
Most published scores are means over seeds. By the mean over ours {counts["by mean"]} are at or above; low seeds, to
which the interquartile mean gives less weight, pull below it: {", ".join(spoiled)}.
"""
    if len(rows) > 1:
        text += f"\n{aligned(rows)}\n"
    single = [line for line in compared if line["reference"].get("single_run")]
    ahead = [line for line in single if line["iqm"] < float(line["reference"]["single_run"])]
    if single:
        text += f"""
The best score is one over several seeds if there is one. For {len(single)} of these rows a single run was published
that went beyond it, and whose luck nobody knows. Below it: {len(ahead)}.
"""
    if ahead:
        rows = [[*HEAD[:4], "Single run"]]
        rows += [[*table_row(line)[:4], number(float(line["reference"]["single_run"]))] for line in ahead]
        text += f"\n{aligned(rows)}\n"
    return text


def mujoco_section(baselines: Path, references: dict[Row, dict[str, str]]) -> str:
    """Algorithms compared over the environments of MuJoCo; empty if none was run on all of them."""
    scores = report.mujoco_scores(baselines, references)
    if not scores:
        return ""

    def interval(value: float, low: float, high: float) -> str:
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"

    rows = [["Algorithm", "Seeds", "IQM", *(f"beats {algo}" for algo in scores)]]
    for algo, mine in scores.items():
        chances = ["" if other is mine else interval(*report.improvement(mine, other)) for other in scores.values()]
        rows.append([algo, str(len(mine)), interval(*iqm_interval(mine)), *chances])
    picture = f'<img src="baselines/{MUJOCO}" width="75%" alt="Performance profiles on MuJoCo">'
    return f"{MUJOCO_TEXT}\n{aligned(rows)}\n\n{picture}\n"


def origins_section(baselines: Path) -> str:
    """How to make each row again, and what it was made with."""
    rows = [["Algorithm", "Environment", "Steps", "Suite", "Runs of", "Script"]]
    versions: dict[str, set[str]] = defaultdict(set)
    seen = set()
    for suite in report.TABULATED:
        for row, runs in read_baselines(baselines, suite).items():
            if row in seen or len(runs) < 2:
                continue
            seen.add(row)
            dates = sorted({run["date"] for run in runs if "date" in run})
            texts = {run["script"][:8] for run in runs if run.get("script")}
            days = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else ""
            rows.append([row[0], row[1], f"{row[2]:,}", suite, days, ", ".join(sorted(texts))])
            for run in runs:
                for name, version in run.get("versions", {}).items():
                    versions[name].add(version)
    told = ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in versions.items())
    return f"{ORIGINS}\n{aligned(rows)}\n\nVersions: {told}.\n" if seen else ""


def missing_section(baselines: Path) -> str:
    """The rows that the suites name, but that are not there with all of their seeds; empty if there are none."""
    seen = set()
    told: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for suite in [*report.TABULATED, "ppo_paper", "ci"]:
        kept = read_baselines(baselines, suite)
        for row, cells in report.suite_rows(suite).items():
            runs = kept.get(row, [])
            is_old = any(map(report.is_old, runs))
            if row in seen or (len(runs) >= len(cells) and not is_old):
                continue
            seen.add(row)
            algo, env_id, steps = row
            states = [f"{len(runs)} of {len(cells)} seeds"] if 0 < len(runs) < len(cells) else []
            states += ["older text"] if is_old else []
            told[suite, env_id, steps].append(f"{algo} ({', '.join(states)})" if states else algo)
    lines = [f"- {suite}, {env}, {steps:,} steps: {', '.join(algos)}\n" for (suite, env, steps), algos in told.items()]
    measured = speed_entries(baselines)
    for task in speed.TASKS:
        peers = [peer for peer in task.peers.split() if f"{task.script} {peer} {task.env_id}" not in measured]
        if peers:
            lines.append(f"- speed, {task.env_id}: {task.script} against {', '.join(peers)}\n")
    return f"{MISSING}\n{''.join(lines)}" if lines else ""


def speed_entries(baselines: Path) -> dict[str, dict]:
    """What was measured of speed, by script, peer and environment."""
    path = baselines / "speed.json"
    return read_object(path)["tasks"] if path.exists() else {}


def speed_section(baselines: Path) -> str:
    """What was measured of speed; empty if nothing was."""
    path = baselines / "speed.json"
    return speed.summary(read_object(path)) if path.exists() else ""


def results_file(baselines: Path, references: dict[Row, dict[str, str]]) -> str:
    """The text of RESULTS.md, whose links start in the folder of the baselines' folder."""
    kept = read_baselines(baselines, *report.TABULATED)
    sources = ""
    for row in kept:
        if row in references:
            reference = references[row]
            told = filter(None, [published(reference), reference["source"], reference["note"]])
            sources += f"- {row[0]}, {row[1]}, {row[2]:,} steps: {'; '.join(told)}\n"
    curves = ""
    for picture in sorted({row[1:] for row in kept if row[1] not in NO_FLOOR}):
        curves += f'<img src="baselines/{curve_file(*picture)}" width="49%" alt="Learning curves on {picture[0]}">\n'
    measures = {title: measures_section(suite, baselines) for suite, (title, *_) in MEASURES.items()}
    lines = list(report.results(kept, references).values())
    sections = {
        "Against the best published scores": published_section(lines),
        "MuJoCo as a whole": mujoco_section(baselines, references),
        "What is missing": missing_section(baselines),
        "Where the bars and the published scores come from": sources,
        "Learning curves": curves,
        **measures,
        "The experiment of the PPO paper": paper_section(baselines),
        "Speed": speed_section(baselines),
        "Several processes": scaling.section(baselines),
        "How each number is made": origins_section(baselines),
    }
    text = f"{ABOUT}\n{table(lines)}\n"
    for title, section in sections.items():
        if section:
            text += f"\n## {title}\n\n{section}"
    return text


def short_number(value: float) -> str:
    """A score in few digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else number(value)


def short_steps(steps: int) -> str:
    """A budget such as 25k or 1M."""
    return f"{steps / 1e6:g}M" if steps >= 1e6 else f"{steps / 1e3:g}k"


def short_score(line: dict) -> str:
    """A line from `summarise` in a few words, such as HalfCheetah 100k: 5,030 (4,339)."""
    _, env_id, steps = line["row"]
    name = re.sub(r"-v\d+$", "", env_id)
    best = float(line["reference"]["best_published"])
    star = "*" if line["old"] else ""
    return f"{name} {short_steps(steps)}: {short_number(line['iqm'])}{star} ({short_number(best)})"


def least_ratios(baselines: Path) -> dict[str, str]:
    """For each script how it compares with the peer of others that comes nearest to its speed."""
    found: dict[str, tuple[float, str]] = {}
    for key, entry in speed_entries(baselines).items():
        script, peer, _ = key.split()
        if peer.startswith("foliorl."):
            continue
        measured = (speed.ratio(entry), peer if len(entry["ours"]) > 1 else f"{peer}, one run")
        found[script] = min(found.get(script, measured), measured)
    return {script: f"{ratio:.2f} x {peer}" for script, (ratio, peer) in found.items()}


def readme_part(baselines: Path, references: dict[Row, dict[str, str]]) -> str:
    """What stands in the README between the marks: the scripts with a published score beside theirs, and one picture.

    The suites go from easy to hard, so the last scores tell most. A row that still lacks seeds has none yet.
    """
    kept = read_baselines(baselines, *report.TABULATED)
    scores: dict[str, dict[str, dict]] = defaultdict(dict)
    for (algo, env_id, _), line in report.results(kept, references).items():
        if line["whole"] and " " not in algo:  # flags of its own say nothing about the script's defaults
            scores[algo][env_id] = line
    ratios = least_ratios(baselines)
    rows = []
    for algo, by_env in scores.items():
        lines = [line for line in by_env.values() if line["reference"]["best_published"]]
        if lines:
            rows.append([algo, ", ".join(map(short_score, lines[-README_SCORES:])), ratios.get(algo, "")])
    table = "\n".join("| " + " | ".join(row) + " |" for row in [README_HEAD, ["---"] * len(README_HEAD), *rows])
    text = f"{table}\n\n{README_NOTE}"
    if any(row[1:] == README_CURVES for row in kept):
        picture = f"benchmark/baselines/{curve_file(*README_CURVES)}"
        text += f'\n<img src="{picture}" width="75%" alt="Learning curves on {README_CURVES[0]}">\n'
    return text


def insert(readme: str, text: str) -> str:
    """The README with `text` between the marks."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise Refusal(f"the README must hold {BEGIN} and {END} once")
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{text}{END}{tail}"
