"""The benchmark harness: trains suites, keeps their results, measures speed."""

import argparse
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

from benchmark import report, speed
from benchmark.run import Cell, Local, file_name, parse_seeds, read_result, run_cells, suite_cells
from benchmark.suites import SUITES

FOLDER = Path(__file__).parent


def launch(cells: list[Cell], args: argparse.Namespace) -> list[Cell]:
    """Train what is missing, here or on a Ray cluster; returns the cells that failed."""
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers must be at least 1, but is {args.workers}")
    if args.address and args.launcher == "local":
        raise ValueError("--address is that of a Ray cluster, for --launcher ray")
    if args.launcher == "local":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        launcher = Local(args.out, args.algos)
    else:
        try:
            from benchmark.launch_ray import Ray
        except ImportError as error:
            raise ValueError("--launcher ray needs ray: pip install -r requirements-ray.txt") from error
        cores = len(cells)  # the cluster knows how many it has
        launcher = Ray(args.address, args.out, args.algos)
    with contextlib.closing(launcher):  # also on Ctrl-C: no cell outlives the harness
        return run_cells(cells, args.workers or cores, args.out, launcher)


def run_command(args: argparse.Namespace) -> int:
    """Train what is missing and print the table; exit code 1 if a run failed or an algorithm is below its bar."""
    if args.steps < 0:
        raise ValueError(f"--steps may not be negative, but is {args.steps}")
    cells = suite_cells(args.suite, args.algo, args.env, args.seeds, args.steps)
    if not cells:
        raise ValueError(f"suite {args.suite} has no run with this algorithm, environment and seeds")
    failed = launch(cells, args)
    references, planned, lines = report.read_references(args.references), suite_cells(args.suite), []
    for row in dict.fromkeys(cell.row for cell in cells):
        results = [result for cell in cells if cell.row == row and (result := read_result(args.out / cell.name))]
        if results:
            lines.append(report.summarise(row, results, sum(cell.row == row for cell in planned), references))
    print(report.table(lines))
    problems = [f"failed: {cell.name}" for cell in failed]
    problems += [f"below the bar: {file_name(line['row'])}" for line in lines if line["verdict"] == "FAIL"]
    print("\n".join(problems) or "every run finished, none is below its bar")
    return 1 if problems else 0


def check_command(args: argparse.Namespace) -> int:
    """Hold fresh seeds against the baselines; exit code 1 if a row is worse or a run failed."""
    from benchmark import check  # the other commands do without PyTorch, which takes a second to import

    cells = suite_cells(args.suite, args.algo, args.env, seeds="0")
    if not cells:
        raise ValueError(f"suite {args.suite} has no run with this algorithm and environment")

    def run(cells: list[Cell]) -> list[Cell]:
        return launch(cells, argparse.Namespace(**vars(args) | dict(algos=args.out))) if cells else []

    if args.neutral:
        changed = check.changed_since(args.neutral, cells, run, args.out, args.algos)
        lines = [[*check.words(cell), "changed" if new else "unchanged"] for cell, new in zip(cells, changed)]
        print(report.aligned([[*check.HEAD[:3], f"since {args.neutral}"], *lines]) + "\n")
        cells = [cell for cell, new in zip(cells, changed) if new]
        if not cells:
            return 0
    kept, path = report.read_baselines(args.baselines, args.suite), args.baselines / "random.json"
    rows = check.read_rows(cells, kept, json.loads(path.read_text()) if path.exists() else {})
    if not rows:
        raise ValueError(f"{args.baselines} has no baseline for these rows; benchmark run and report make them")
    if args.simulate:
        text, good = check.error_rates(rows, args.simulate)
        print(text)
        return 0 if good else 1
    lines = check.compare(rows, run, args.out, args.algos)
    compared = [row.cell for row in rows]
    lines += [[*check.words(cell), *[""] * 4, "no baseline"] for cell in cells if cell not in compared]
    print(report.aligned([check.HEAD, *lines]))
    problems = [f"{line[-1]}: {' '.join(line[:3])}" for line in lines if line[-1] in ("WORSE", "failed")]
    print("\n".join(problems) or f"none of {len(rows)} rows is shown to be worse than its baseline")
    return 1 if problems else 0


def report_command(args: argparse.Namespace) -> int:
    """Keep finished runs and rewrite what shows them; with --check exit code 1 if the README does not."""
    if not args.check:
        report.collect(args.runs, args.baselines)
        report.keep_random_returns(args.baselines)
        report.draw_curves(args.baselines)
    old = args.readme.read_text()
    new = report.insert(old, report.markdown(args.baselines, report.read_references(args.references)))
    if args.check:
        print(f"the results in {args.readme} are {'current' if old == new else 'stale: python -m benchmark report'}")
        return 0 if old == new else 1
    args.readme.write_text(new)
    from benchmark import page  # --check does without what only the page needs

    args.page.write_text(page.html(args.baselines, report.read_references(args.references)), encoding="utf-8")
    return 0


def speed_command(args: argparse.Namespace) -> int:
    """Measure against the peers, keep the raw values and print their summary; or only print, against a revision."""
    tasks = speed.select(args.algo, args.env, args.peers)
    if args.against:
        speed.against(args.against, tasks, args.rounds, args.steps)
        return 0
    given = dict(text.partition("=")[::2] for text in args.peer_python)
    if unknown := given.keys() - speed.PEERS:
        raise ValueError(f"--peer-python takes words like sb3=/path/to/python, not {unknown.pop()}")
    needed = dict.fromkeys(kind.split(".")[0] for task in tasks for kind in task.peers.split())
    pythons = {peer: given.get(peer) or speed.make_peer(peer) for peer in needed}
    seeds = parse_seeds(args.seeds) if args.seeds else []
    path = args.baselines / "speed.json"
    print(speed.summary(speed.measure(path, tasks, pythons, args.rounds, args.steps, seeds, args.anew)))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmark", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True)

    def command(name: str, function, text: str) -> argparse.ArgumentParser:
        style = argparse.ArgumentDefaultsHelpFormatter
        sub = commands.add_parser(name, help=text, description=text, formatter_class=style, allow_abbrev=False)
        sub.set_defaults(function=function)
        sub.add_argument("--references", type=Path, default=FOLDER / "references.csv", help="bars and published scores")
        return sub

    sub = command("run", run_command, "train what is missing of a suite; exits 1 on a failure or below a bar")
    sub.add_argument("--suite", choices=SUITES, required=True, help="which rows of benchmark/suites.py")
    sub.add_argument("--algo", default="", help="only this algorithm")
    sub.add_argument("--env", default="", help="only this environment")
    sub.add_argument("--seeds", default="", help="instead of those of the suite, like 1-3,7")
    sub.add_argument("--steps", type=int, default=0, help="instead of those of the suite")
    sub.add_argument("--workers", type=int, help="runs at once; if None, one per core, here or of the cluster")
    sub.add_argument("--launcher", choices=("local", "ray"), default="local", help="where to train")
    sub.add_argument("--address", default="", help="Ray cluster: auto, ray://... or host:port; if empty, one made here")
    sub.add_argument("--out", type=Path, default=FOLDER / "runs", help="a directory per run, shared by all suites")
    sub.add_argument("--algos", type=Path, default=FOLDER.parent / "algos", help="folder of the scripts")
    sub = command("check", check_command, "train fresh seeds; exits 1 where they are worse than the baselines")
    sub.add_argument("--suite", choices=SUITES, required=True, help="which rows of benchmark/suites.py")
    sub.add_argument("--algo", default="", help="only this algorithm")
    sub.add_argument("--env", default="", help="only this environment")
    sub.add_argument("--neutral", default="", metavar="BASE", help="leave out scripts that do what they did there")
    sub.add_argument("--simulate", type=int, default=0, metavar="DRAWS", help="train nothing, print the error rates")
    sub.add_argument("--workers", type=int, help="runs at once; if None, one per core")
    sub.add_argument("--out", type=Path, default=FOLDER / "runs" / "check", help="a directory per script and run")
    sub.add_argument("--algos", type=Path, default=FOLDER.parent / "algos", help="folder of the scripts")
    sub.add_argument("--baselines", type=Path, default=FOLDER / "baselines", help="the kept results")
    sub.set_defaults(launcher="local", address="")
    sub = command("report", report_command, "keep finished runs; draw them as curves, HTML page and README table")
    sub.add_argument("--check", action="store_true", help="write nothing, exit 1 if the README is stale")
    sub.add_argument("--runs", type=Path, default=FOLDER / "runs", help="directories of runs")
    sub.add_argument("--baselines", type=Path, default=FOLDER / "baselines", help="the kept results")
    sub.add_argument("--readme", type=Path, default=FOLDER.parent / "README.md", help="the file with the marks")
    sub.add_argument("--page", type=Path, default=FOLDER / "report.html", help="the page to write")
    sub = command("speed", speed_command, "measure against peers or a git revision in turn, one thread each")
    sub.add_argument("--algo", default="", help="only this script; the other measurements are kept")
    sub.add_argument("--env", default="", help="only this environment")
    sub.add_argument("--peers", nargs="+", choices=speed.PEERS, default=[*speed.PEERS], help="only these")
    sub.add_argument(
        "--peer-python", nargs="+", default=[], metavar="PEER=PYTHON", help="interpreter with a peer, made if not given"
    )
    sub.add_argument("--against", default="", metavar="REVISION", help="only print, against our scripts of that time")
    sub.add_argument("--rounds", type=int, default=3, help="runs of each side; those kept of the same script count")
    sub.add_argument("--anew", action="store_true", help="measure also what is kept")
    sub.add_argument("--steps", type=int, default=0, help="environment steps of a run instead of those of the task")
    sub.add_argument(
        "--seeds", default="1-10", help="of PPO's runs from the command line to a solved CartPole, may be empty"
    )
    sub.add_argument("--baselines", type=Path, default=FOLDER / "baselines", help="where speed.json is kept")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit code of a command line."""
    args = parse_args(argv)
    for name in ("SIGTERM", "SIGHUP"):  # a kill, a closed terminal: end the children on the way out, as Ctrl-C does
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # as under nohup
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        return args.function(args)
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
