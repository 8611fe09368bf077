"""Twins: a function or class whose name occurs in two scripts is the same text, to the letter, in both.

python tests/twins.py                  reports drift and exits 1 if there is any
python tests/twins.py algos/edited.py  rewrites the other scripts' copies from the edited one and says which

Fields of `Args` with the same name have the same type and the same help (the comment behind them); their defaults are
the algorithm's own.
"""

import ast
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

ALGOS = Path(__file__).parents[1] / "algos"
ALGORITHM = {"Args", "Agent", "train", "update"}  # what the algorithm itself changes: hyperparameters, networks, loops


def segment(lines: list[str], node: ast.expr) -> str:
    """The text of an expression (ast.get_source_segment splits the whole source each time; columns count bytes)."""
    rows = [line.encode() for line in lines[node.lineno - 1 : node.end_lineno]]
    rows[-1] = rows[-1][: node.end_col_offset]
    rows[0] = rows[0][node.col_offset :]
    return b"".join(rows).decode()


@cache
def blocks(source: str) -> dict[str, tuple[int, int, str]]:
    """First line, line after the last, and text of every top-level function and class, decorators included."""
    lines, found = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            found[node.name] = first, node.end_lineno, "".join(lines[first : node.end_lineno])
    return found


@cache
def fields(source: str) -> dict[str, tuple[int, int, str, str, str]]:
    """First line, line after the last, type, default and help of every field of Args."""
    lines, found = source.splitlines(keepends=True), {}
    args = next((node for node in ast.parse(source).body if getattr(node, "name", "") == "Args"), None)
    for node in args.body if args else ():
        if isinstance(node, ast.AnnAssign) and node.value:
            kind, default = segment(lines, node.annotation), segment(lines, node.value)
            comment = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
            found[node.target.id] = node.lineno - 1, node.end_lineno, kind, default, comment
    return found


def repair(edited: str, other: str) -> tuple[str, list[str]]:
    """`other` with its copies taken from `edited`, and the names of those that were different."""
    lines, changes, original = other.splitlines(keepends=True), [], blocks(edited)
    for name, (first, end, text) in blocks(other).items():
        if name in original and name not in ALGORITHM and text != original[name][2]:
            changes.append((first, end, name, original[name][2]))
    original = fields(edited)
    for name, (first, end, kind, default, comment) in fields(other).items():
        if name in original and (kind, comment) != (original[name][2], original[name][4]):
            line = f"    {name}: {original[name][2]} = {default}  {original[name][4]}".rstrip() + "\n"
            changes.append((first, end, f"Args.{name}", line))
    for first, end, _, text in sorted(changes, reverse=True):  # from the bottom, so that line numbers stay true
        lines[first:end] = [text]
    return "".join(lines), [name for _, _, name, _ in sorted(changes)]


def drift(scripts: list[Path]) -> list[str]:
    """A sentence for every name that means two things."""
    sources = {path: path.read_text(encoding="utf-8") for path in scripts}
    return [
        f"{name} differs between {one.name} and {two.name}"
        for one, two in combinations(sources, 2)
        for name in repair(sources[one], sources[two])[1]
    ]


def main(argv: list[str]) -> int:
    """Report drift, or repair it from the script in argv; the exit code."""
    if not argv:
        found = drift(sorted(ALGOS.glob("*.py")))
        print("\n".join(found) or "no drift")
        return int(bool(found))
    edited = Path(argv[0])
    if not edited.is_file():
        print(f"there is no script {edited}")
        return 2
    for path in sorted(ALGOS.glob("*.py")):
        text, names = repair(edited.read_text(encoding="utf-8"), path.read_text(encoding="utf-8"))
        if names:
            path.write_text(text, encoding="utf-8")
            print(f"{path.name}: {', '.join(names)} now as in {edited.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
