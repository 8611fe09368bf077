"""The benchmark harness: trains suites, keeps their results, measures speed."""

import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmark import markdown, pictures, report, run, scaling, speed
from benchmark.run import Cell, Refusal, file_name, parse_seeds, read_result, require_scripts, suite_cells

FOLDER = Path(__file__).parent


def core_count() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def launch(cells: list[Cell], workers: int | None, out: Path, algos: Path, address: str | None = None) -> list[Cell]:
    """Train what is missing, here or, with an address, on a Ray cluster; returns the cells that failed."""
    if workers is not None and workers < 1:
        raise Refusal(f"--workers must be at least 1, but is {workers}")
    if address is None:
        launcher = run.Local(out, algos)
        cores = core_count()
    else:
        try:
            from benchmark.launch_ray import Ray
        except ImportError as error:
            raise Refusal("--launcher ray needs ray: pip install -r requirements-ray.txt") from error
        launcher = Ray(address, out, algos)
        cores = len(cells)  # the cluster knows how many it has
    with contextlib.closing(launcher):  # also on Ctrl-C: no cell outlives the harness
        return run.run_cells(cells, workers or cores, out, launcher)


@dataclass
class Run:
    """Train what is missing of a suite and print its table; exits 1 if a run failed or a row is below its bar."""

    suite: str  # ci classic unsteady box2d mujoco distributed prediction imitation language minatar atari ppo_paper
    algo: str = ""  # only this algorithm
    env: str = ""  # only this environment
    seeds: str = ""  # instead of those of the suite, like 1-3,7
    steps: int = 0  # environment steps of a run; 0 for those of the suite
    workers: int | None = None  # runs at once; if None, one per core, here or of the cluster
    launcher: Literal["local", "ray"] = "local"  # where to train
    address: str = ""  # Ray cluster: auto, ray://... or host:port; if empty, one made here
    out: Path = FOLDER / "runs"  # a directory per run, shared by all suites
    algos: Path = FOLDER.parent / "algos"  # folder of the scripts
    references: Path = FOLDER / "references.csv"  # bars and published scores

    def execute(self) -> int:
        """The exit code."""
        if self.steps < 0:
            raise Refusal(f"--steps may not be negative, but is {self.steps}")
        if self.address and self.launcher == "local":
            raise Refusal("--address is that of a Ray cluster, for --launcher ray")
        cells = suite_cells(self.suite, self.algo, self.env, self.seeds, self.steps)
        if not cells:
            raise Refusal(f"suite {self.suite} has no run with this algorithm, environment and seeds")
        require_scripts(cells, self.algos)
        references = report.read_references(self.references)
        address = self.address if self.launcher == "ray" else None
        failed = launch(cells, self.workers, self.out, self.algos, address)

        planned = suite_cells(self.suite, steps=self.steps)
        lines = []
        for row in dict.fromkeys(cell.row for cell in cells):
            results = [read_result(self.out / cell.name) for cell in cells if cell.row == row]
            finished = [result for result in results if result is not None]
            if finished:
                seeds = [cell.seed for cell in planned if cell.row == row]
                lines.append(report.summarise(row, finished, seeds, references))
        print(markdown.table(lines))
        problems = [f"failed: {cell.name}" for cell in failed]
        problems += [f"below the bar: {file_name(line['row'])}" for line in lines if line["verdict"] == "FAIL"]
        print("\n".join(problems) or "every run finished, none is below its bar")
        return 1 if problems else 0


@dataclass
class Check:
    """Train fresh seeds of a suite; exits 1 where they are worse than the baselines or a run failed."""

    suite: str  # ci classic unsteady box2d mujoco distributed prediction imitation language minatar atari ppo_paper
    algo: str = ""  # only this algorithm
    env: str = ""  # only this environment
    neutral: str = ""  # a git revision: say which scripts do what they did there, and train only the others
    simulate: int = 0  # train nothing, print the error rates over so many draws
    workers: int | None = None  # runs at once; if None, one per core
    out: Path = FOLDER / "runs" / "check"  # a directory per script and run
    algos: Path = FOLDER.parent / "algos"  # folder of the scripts
    baselines: Path = FOLDER / "baselines"  # the kept results

    def train(self, cells: list[Cell]) -> list[Cell]:
        """Train cells by the scripts that lie among the results; returns those that failed."""
        return launch(cells, self.workers, self.out, algos=self.out) if cells else []

    def execute(self) -> int:
        """The exit code."""
        from benchmark import check  # the other commands do without PyTorch, which takes a second to import

        if self.simulate < 0:
            raise Refusal(f"--simulate may not be negative, but is {self.simulate}")
        cells = suite_cells(self.suite, self.algo, self.env, seeds="0")
        if not cells:
            raise Refusal(f"suite {self.suite} has no run with this algorithm and environment")
        for cell in cells:
            require_scripts([cell], self.algos)
        if self.neutral:
            changed = check.changed_since(self.neutral, cells, self.train, self.out, self.algos)
            head = [*check.HEAD[:3], f"since {self.neutral}"]
            lines = [[*check.words(cell), "changed" if new else "unchanged"] for cell, new in zip(cells, changed)]
            print(markdown.aligned([head, *lines]) + "\n")
            cells = [cell for cell, new in zip(cells, changed) if new]
            if not cells:
                return 0

        kept = report.read_baselines(self.baselines, self.suite)
        rows = check.read_rows(cells, kept, report.read_random_returns(self.baselines))
        if not rows:
            needed = f"{check.BASELINE} seeds and the score of a random or untrained policy"
            raise Refusal(f"{self.baselines} lacks what fresh seeds are compared with: {needed}")
        if self.simulate:
            text, good = check.error_rates(rows, self.simulate)
            print(text)
            return 0 if good else 1
        lines = check.compare(rows, self.train, self.out, self.algos)
        compared = [row.cell for row in rows]
        lines += [[*check.words(cell), "", "", "", "", "no baseline"] for cell in cells if cell not in compared]
        print(markdown.aligned([check.HEAD, *lines]))
        problems = [f"{line[-1]}: {' '.join(line[:3])}" for line in lines if line[-1] in ("WORSE", "failed")]
        print("\n".join(problems) or f"none of {len(rows)} rows is shown to be worse than its baseline")
        return 1 if problems else 0


@dataclass
class Report:
    """Keep finished runs and show them: RESULTS.md, the README's table, learning curves and an HTML page."""

    check: bool = False  # write nothing, exit 1 if RESULTS.md or the README is stale
    runs: Path = FOLDER / "runs"  # directories of runs
    baselines: Path = FOLDER / "baselines"  # the kept results
    results: Path = FOLDER / "RESULTS.md"  # the file of all tables
    readme: Path = FOLDER.parent / "README.md"  # the README, whose part between the marks is written
    page: Path = FOLDER / "report.html"  # the page to write
    references: Path = FOLDER / "references.csv"  # bars and published scores

    def execute(self) -> int:
        """The exit code."""
        references = report.read_references(self.references)
        if not self.check:
            report.collect(self.runs, self.baselines)
            report.keep_random_returns(self.baselines)
            pictures.draw_all(self.baselines, references)
        part = markdown.readme_part(self.baselines, references)
        texts = {
            self.results: markdown.results_file(self.baselines, references),
            self.readme: markdown.insert(self.readme.read_text(encoding="utf-8"), part),
        }
        if self.check:
            stale = [path for path, text in texts.items() if not path.exists() or path.read_text("utf-8") != text]
            for path in texts:
                print(f"{path} is {'stale: python -m benchmark report' if path in stale else 'current'}")
            return 1 if stale else 0
        for path, text in texts.items():
            run.replace_text(path, text)
        from benchmark import page  # --check does without what only the page needs

        run.replace_text(self.page, page.html(self.baselines, references))
        print(f"wrote {self.results}, {self.readme} and {self.page}")
        return 0


@dataclass
class Speed:
    """Measure against peers or a git revision in alternating runs, one thread each."""

    algo: str = ""  # only this script; the other measurements are kept
    env: str = ""  # only this environment
    peers: tuple[Literal["sb3", "sbx", "foliorl"], ...] = ("sb3", "sbx", "foliorl")  # only these
    peer_python: tuple[str, ...] = ()  # PEER=PYTHON: interpreter with a peer, made if not given
    against: str = ""  # a git revision: only print, against our scripts of that time
    rounds: int = 3  # runs of each side, with those already kept of the same script
    anew: bool = False  # measure also what is kept
    steps: int = 0  # environment steps of a run instead of those of the task, also in what is kept
    seeds: str = "1-10"  # of runs that time PPO from the command line to a solved CartPole; empty for none
    baselines: Path = FOLDER / "baselines"  # where speed.json is kept

    def execute(self) -> int:
        """The exit code."""
        tasks = speed.select(self.algo, self.env, self.peers)
        if self.against:
            speed.against(self.against, tasks, self.rounds, self.steps)
            return 0
        given = {}
        for word in self.peer_python:
            peer, _, python = word.partition("=")
            if peer not in speed.PEERS:
                raise Refusal(f"--peer-python takes words like sb3=/path/to/python, not {word}")
            given[peer] = python
        needed = dict.fromkeys(kind.split(".")[0] for task in tasks for kind in task.peers.split())
        pythons = {peer: given.get(peer) or speed.make_peer(peer) for peer in needed}
        seeds = parse_seeds(self.seeds) if self.seeds else []
        path = self.baselines / "speed.json"
        print(speed.summary(speed.measure(path, tasks, pythons, self.rounds, self.steps, seeds, self.anew)))
        return 0


@dataclass
class Scaling:
    """Measure how the scripts of several processes scale; takes minutes on an idle machine."""

    seeds: str = "1-3"  # seeds to run; what is kept already is not measured again
    baselines: Path = FOLDER / "baselines"  # where scaling.json is kept

    def execute(self) -> int:
        """The exit code."""
        print(scaling.summary(scaling.measure(self.baselines / "scaling.json", parse_seeds(self.seeds))))
        return 0


COMMANDS = {"run": Run, "check": Check, "report": Report, "speed": Speed, "scaling": Scaling}


def main(argv: list[str] | None = None) -> int:
    """The exit code of a command line."""
    chosen = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="python -m benchmark",
        description=__doc__,
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),  # a flag that is off by default needs no --no-flag
    )
    for name in ("SIGTERM", "SIGHUP"):  # a kill, a closed terminal: end the children on the way out, as Ctrl-C does
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # as under nohup
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        return chosen.execute()
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130
    except (Refusal, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
