"""The benchmark harness: trains suites, keeps their results, measures speed."""

import argparse
import json
import signal
import sys
from pathlib import Path

from benchmark import report, speed
from benchmark.run import file_name, parse_seeds, read_result, run_cells, suite_cells
from benchmark.suites import SUITES

FOLDER = Path(__file__).parent


def run_command(args: argparse.Namespace) -> int:
    """Train what is missing and print the table; exit code 1 if a run failed or an algorithm is below its bar."""
    cells = suite_cells(args.suite, args.algo, args.env, args.seeds, args.steps)
    if not cells:
        raise ValueError(f"suite {args.suite} has no run with this algorithm, environment and seeds")
    failed = run_cells(cells, args.workers, args.out, args.algos)
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
    return 0


def speed_command(args: argparse.Namespace) -> int:
    """Measure, keep the raw values, print their summary."""
    path, seeds = args.baselines / "speed.json", parse_seeds(args.seeds) if args.seeds else []
    kept = json.loads(path.read_text()) if path.exists() else {}
    peer = args.peer_python or speed.make_peer()
    found = speed.measure(peer, args.rounds, args.steps, seeds, args.algo, args.env, kept)
    args.baselines.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(speed.summary(found))
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
    sub.add_argument("--workers", type=int, default=2, help="processes at once")
    sub.add_argument("--out", type=Path, default=FOLDER / "runs", help="a directory per run, shared by all suites")
    sub.add_argument("--algos", type=Path, default=FOLDER.parent / "algos", help="folder of the scripts")
    sub = command("report", report_command, "keep finished runs, draw learning curves, write the table of the README")
    sub.add_argument("--check", action="store_true", help="write nothing, exit 1 if the README is stale")
    sub.add_argument("--runs", type=Path, default=FOLDER / "runs", help="directories of runs")
    sub.add_argument("--baselines", type=Path, default=FOLDER / "baselines", help="the kept results")
    sub.add_argument("--readme", type=Path, default=FOLDER.parent / "README.md", help="the file with the marks")
    sub = command("speed", speed_command, "measure against stable-baselines3 in turn, one thread each")
    sub.add_argument("--algo", default="", help="only this script; the other measurements are kept")
    sub.add_argument("--env", default="", help="only this environment")
    sub.add_argument("--peer-python", default="", help="interpreter with stable-baselines3, made if not given")
    sub.add_argument("--rounds", type=int, default=3, help="runs of each side")
    sub.add_argument("--steps", type=int, default=1_000_000, help="environment steps of a run")
    sub.add_argument(
        "--seeds", default="1-10", help="of PPO's runs from the command line to a solved CartPole, may be empty"
    )
    sub.add_argument("--baselines", type=Path, default=FOLDER / "baselines", help="where speed.json is kept")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit code of a command line."""
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # end the children on the way out, as Ctrl-C does
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
