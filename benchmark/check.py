"""Is a suite still as good as its baselines? Trains fresh seeds, and turns red where these are shown to be worse.

On the scale on which a random policy scores 0 and the median of the baseline's seeds 1, a seed falls short if it scores
less than 1 - MARGIN. A row is suspect if its fresh seeds fall short more often than the baseline's (one-sided test of
Fisher, p <= SUSPECT). It is WORSE if the same test of new seeds, of these alone, says so again (p <= RED after
Holm's correction over the suspects).

Counting needs no variance, so ten times 500 can be a baseline, and a seed that collapses counts once, as heavy tails
need it. What is found is that every seed loses more than the margin or that most seeds collapse: against a constant
baseline a collapse of 90% of the seeds in 90% of the checks, of 80% in 79%, of half of them in 32%, of one in five in
1%. A second seed in the first stage would find 95% instead of 79%, for twice the time.
"""

import hashlib
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import hypergeom

from benchmark.report import aligned
from benchmark.run import Cell, Refusal, read_result

MARGIN = 0.1  # the share of the baseline that a seed may lack
DROP = 0.2  # the share whose loss has to be found
SUSPECT = 0.4  # level of the first stage
RED = 0.05  # level of the second
SEEDS = (1, 8)  # trained in the stages, at least
BASELINE = 3  # seeds, without which nothing can be shown
FIRST_SEED = (1001, 2001)  # of the stages, not among those of the baselines
NEUTRAL_STEPS = 20_000  # of the runs that compare two versions of a script
Run = Callable[[list[Cell]], list[Cell]]  # trains cells by the scripts in the folder of the results; those that failed
HEAD = ["Algorithm", "Environment", "Steps", "Baseline", "Fresh", "Difference", "p", ""]


class Row(NamedTuple):
    """A row of a suite and what it is held against."""

    cell: Cell  # of no seed
    scores: np.ndarray  # of the baseline's seeds
    random: float  # score of a random policy or, of a language model, of the untrained one
    seeds: tuple[int, int]  # to train in the stages


def p_value(fresh: np.ndarray, baseline: np.ndarray, random: float | np.ndarray) -> np.ndarray:
    """Chance that of scores like the baseline's (..., m) so many of the fresh ones (..., n) would fall short."""
    median = np.median(baseline, axis=-1, keepdims=True)
    line = median - MARGIN * np.abs(median - random)
    short = (fresh < line).sum(-1)
    n = fresh.shape[-1]
    p = hypergeom.sf(short - 1, n + baseline.shape[-1], short + (baseline < line).sum(-1), n)
    return p.round(12)  # so that 1/20 does not exceed 0.05


def holm(p: np.ndarray) -> np.ndarray:
    """p-values adjusted over the last axis (Holm 1979); inf is what was not tested."""
    order = p.argsort(-1)
    factors = np.maximum(np.isfinite(p).sum(-1, keepdims=True) - np.arange(p.shape[-1]), 1)
    adjusted = np.maximum.accumulate(np.take_along_axis(p, order, -1) * factors, -1)
    return np.take_along_axis(adjusted, order.argsort(-1), -1)


def decide(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Adjusted p-values of the second stage from those of both stages (..., rows), inf for rows beyond suspicion."""
    return holm(np.where(first <= SUSPECT, second, np.inf))


def seed_count(least: int, level: float, baseline: np.ndarray, random: float) -> int:
    """How many seeds reach the level if all of them fall short, and at least so many."""
    while p_value(np.full(least, -np.inf), baseline, random) > level:
        least += 1
    return least


def read_rows(cells: list[Cell], kept: dict[tuple[str, str, int], list[dict]], random: dict[str, float]) -> list[Row]:
    """The rows of the cells that have a baseline and, of a policy that is random or untrained, a score."""
    rows = []
    for cell in cells:
        runs = kept.get(cell.row, [])
        scores = np.array([run["eval_mean"] for run in runs])
        untrained = [run["numbers"]["eval_before"] for run in runs if "eval_before" in run.get("numbers", {})]
        floor = np.mean(untrained) if untrained else random.get(cell.env_id)
        if len(scores) >= BASELINE and floor is not None:
            levels = (SUSPECT, RED / len(cells))  # the second even if all rows reach it
            seeds = [seed_count(n, level, scores, floor) for n, level in zip(SEEDS, levels)]
            rows.append(Row(cell, scores, floor, tuple(seeds)))
    return rows


def simulate(rows: list[Row], draws: int) -> tuple[float, np.ndarray, float]:
    """Chance that an unchanged suite turns red, power per row against DROP, and trainings of an unchanged suite.

    Each draw takes baseline and fresh seeds alike from the kept ones, with replacement.
    """
    rng = np.random.default_rng(0)
    p = np.empty((2, 2, draws, len(rows)))  # unchanged or worse; stage
    for i, row in enumerate(rows):
        drop = DROP * abs(np.median(row.scores) - row.random)
        baseline = rng.choice(row.scores, (draws, len(row.scores)))
        for stage, n in enumerate(row.seeds):
            fresh = rng.choice(row.scores, (draws, n))
            for worse, loss in enumerate([0, drop]):
                p[worse, stage, :, i] = p_value(fresh - loss, baseline, row.random)
    power = np.empty(len(rows))
    for i in range(len(rows)):  # one row is worse, the others are as they were
        mixed = np.where(np.arange(len(rows)) == i, p[1], p[0])
        power[i] = (decide(*mixed)[:, i] <= RED).mean()
    first, second = np.array([row.seeds for row in rows]).T
    trainings = first.sum() + ((p[0, 0] <= SUSPECT) * second).sum(-1).mean()
    return float((decide(*p[0]) <= RED).any(-1).mean()), power, float(trainings)


def error_rates(rows: list[Row], draws: int) -> tuple[str, bool]:
    """What `simulate` finds as text, and whether it is good enough."""
    alarms, power, trainings = simulate(rows, draws)
    lines = [[*HEAD[:4], "Fresh", f"Power at -{DROP:.0%}"]]
    for row, share in zip(rows, power):
        lines.append([*words(row.cell), str(len(row.scores)), "{} + {}".format(*row.seeds), f"{share:.1%}"])
    text = f"{aligned(lines)}\nOf {draws:,} simulated checks of an unchanged suite {alarms:.2%} turn red, "
    return text + f"after {trainings:.1f} trainings on average", alarms < 0.01 and power.min() >= 0.9


def words(cell: Cell) -> list[str]:
    """A cell as the first cells of a table's row."""
    return [cell.row[0], cell.env_id, f"{cell.steps:,}"]


def requirements(algos: Path) -> bytes:
    """The text of every requirements*.txt beside the folder of the scripts."""
    return b"\n".join(path.read_bytes() for path in sorted(algos.parent.glob("requirements*.txt")))


def pins(text: bytes, lines: bytes) -> list[bytes]:
    """The lines of a requirements*.txt, less their comments, on packages that a script names."""
    lines = [line.split(b"#")[0].strip() for line in lines.splitlines()]
    return [line for line in lines if line and re.search(rb"\b%b\b" % re.match(rb"[\w-]*", line)[0], text)]


def freeze(cell: Cell, text: bytes, algos: Path, out: Path) -> Cell:
    """The cell with a copy of its script in `out`, named after a hash: no other version's results count as its own."""
    version = hashlib.sha256(repr((text, pins(text, requirements(algos)))).encode())
    name = f"{cell.algo}-{version.hexdigest()[:10]}"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.py").write_bytes(text)
    return cell._replace(algo=name)


def tensors(value: object, place: str = "") -> Iterator[tuple[str, bytes]]:
    """Where in nested dictionaries tensors are, and their bytes."""
    if isinstance(value, torch.Tensor):
        yield f"{place} {value.dtype} {tuple(value.shape)}", value.numpy(force=True).tobytes()
    for key in sorted(value) if isinstance(value, dict) else ():
        yield from tensors(value[key], f"{place}/{key}")


def outcome(run_dir: Path) -> tuple[list[float], str]:
    """Returns of the evaluation and a hash of all tensors of the checkpoint."""
    saved = torch.load(run_dir / "checkpoint.pt", map_location="cpu")
    return read_result(run_dir)["eval_returns"], hashlib.sha256(repr([*tensors(saved)]).encode()).hexdigest()


def changed_since(base: str, cells: list[Cell], run: Run, out: Path, algos: Path) -> list[bool]:
    """Whether the script of each cell, run for NEUTRAL_STEPS steps, ends differently from that of revision `base`.

    Equal texts need no run, and with other packages than at `base`, or if it refuses so few steps, a script counts as
    changed. What only longer runs do, such as saving a checkpoint on the way, is not compared.
    """

    def git(*words: str) -> bytes | None:
        done = subprocess.run(["git", "-C", str(algos), *words], capture_output=True)
        return None if done.returncode else done.stdout

    if git("rev-parse", "--verify", f"{base}^{{commit}}") is None:
        raise Refusal(f"{base} is no revision of a repository that holds {algos}")
    above = git("ls-tree", "--name-only", base, "../") or b""  # none above the repository
    files = re.findall(r"\.\./requirements.*\.txt", above.decode())
    packages_then = b"\n".join(git("show", f"{base}:{name}") for name in files)
    packages_now = requirements(algos)
    changed = {}
    pairs = {}
    for cell in cells:
        old = git("show", f"{base}:./{cell.algo}.py")
        new = (algos / f"{cell.algo}.py").read_bytes()
        same = pins(new, packages_then) == pins(new, packages_now)
        changed[cell] = not same or old != new
        if same and old not in (None, new):
            short = cell._replace(seed=1, steps=min(cell.steps, NEUTRAL_STEPS))
            pairs[cell] = [freeze(short, text, algos, out) for text in (old, new)]
    failed = set(run(list({side: None for pair in pairs.values() for side in pair})))
    for cell, pair in pairs.items():
        changed[cell] = bool(failed & set(pair)) or outcome(out / pair[0].name) != outcome(out / pair[1].name)
    return [changed[cell] for cell in cells]


def train(rows: list[Row], stage: int, run: Run, out: Path, algos: Path) -> list[np.ndarray | None]:
    """Fresh scores of the rows, None where a run failed."""
    groups = []
    for row in rows:
        cell = freeze(row.cell, (algos / f"{row.cell.algo}.py").read_bytes(), algos, out)
        groups.append([cell._replace(seed=FIRST_SEED[stage] + i) for i in range(row.seeds[stage])])
    failed = set(run([cell for group in groups for cell in group]))
    scores = []
    for group in groups:
        if failed & set(group):
            scores.append(None)
        else:
            scores.append(np.array([read_result(out / cell.name)["eval_mean"] for cell in group]))
    return scores


def compare(rows: list[Row], run: Run, out: Path, algos: Path) -> list[list[str]]:
    """Train the stages; under HEAD what decided about each row."""
    p = np.full((2, len(rows)), np.inf)  # by stage
    fresh: list[np.ndarray | None] = [None] * len(rows)
    for stage in range(2):
        chosen = [i for i in range(len(rows)) if stage == 0 or p[0, i] <= SUSPECT]
        for i, scores in zip(chosen, train([rows[i] for i in chosen], stage, run, out, algos)):
            fresh[i] = scores
            if scores is not None:
                p[stage, i] = p_value(scores, rows[i].scores, rows[i].random)
    lines = []
    for (cell, baseline, random, _), scores, first, second in zip(rows, fresh, p[0], decide(*p)):
        lines.append([*words(cell), f"{baseline.mean():.1f} ({len(baseline)})"])
        if scores is None:
            lines[-1] += ["", "", "", "failed"]
            continue
        scale = abs(np.median(baseline) - random)
        difference = f"{(scores.mean() - baseline.mean()) / scale:+.1%}" if scale else "as random"
        p_decisive = min(second, 1) if np.isfinite(second) else first
        lines[-1] += [f"{scores.mean():.1f} ({len(scores)})", difference, f"{p_decisive:.2g}"]
        lines[-1].append("WORSE" if second <= RED else "ok")
    return lines
