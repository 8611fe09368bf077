"""Twins: a function, class or constant whose name occurs in two scripts is the same text, to the letter, in both.

python tools/twins.py                  reports drift and exits 1 if there is any
python tools/twins.py algos/edited.py  first rewrites the other scripts' copies from the edited one and says which

Only what the algorithm itself changes may differ, and only on the front, above the ruler (see `may_differ`). Behind the
ruler all text is compared, comments included, and the twins of two scripts stand in one order, which only a human can
repair. Fields of `Args` with the same name have the same type and the same help (the comment behind them); their
defaults are the algorithm's own. Scripts that learn from texts or from demonstrations count and name some things in
another way than the others; there they are twins among themselves (see `KINDS`).
"""

import ast
import functools
import sys
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

ALGOS = Path(__file__).parents[1] / "algos"
RULER = "# " + 116 * "="  # below it stands what all scripts share; below a second one what a single script needs
MAY_DIFFER = {"Args", "Agent", "Actor", "Critic", "train", "FAMILIES"}  # and the losses
KINDS = {  # by a field that all scripts of a kind have: the names that have a text of this kind's own
    "max_new_tokens": {"evaluate", "parse_args", "pick_device"}
    | {f"Args.{name}" for name in ("env_id", "seed", "device", "compile", "total_timesteps", "checkpoint_every")}
    | {f"Args.{name}" for name in ("learning_rate", "batch_size", "hidden_size", "target_kl", "eval_episodes")}
    | {"Args.num_demonstrations"},
    "top_fraction": {"Args.total_timesteps", "Args.log_every", "Args.checkpoint_every"},
}
NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


class Piece(NamedTuple):
    """A statement at top level, with the comment above it."""

    first: int  # its first line, counted from 0
    end: int  # the line after its last
    part: int  # the number of rulers above it: 0 on the front
    text: str


class Field(NamedTuple):
    """A field of Args."""

    first: int
    end: int
    kind: str
    help: str  # the comment behind it


def is_loss(name: str) -> bool:
    """Whether a function of this name is a loss."""
    return name == "loss" or name.endswith("_loss")


def may_differ(name: str, piece: Piece) -> bool:
    """Whether this is the algorithm itself, which is different in every script."""
    return piece.part == 0 and (name in MAY_DIFFER or is_loss(name))


def name_of(node: ast.stmt) -> str:
    """The name that a statement defines; of other statements their first line."""
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.target)
    return getattr(node, "name", "") or ast.unparse(node).split("\n")[0]


def first_line(node: ast.stmt) -> int:
    """The first line of a statement, decorators included, counted from 0."""
    decorators = getattr(node, "decorator_list", [])
    return min(part.lineno for part in [node, *decorators]) - 1


def rulers(source: str) -> list[int]:
    """The lines that are rulers, counted from 0."""
    return [number for number, line in enumerate(source.splitlines()) if line == RULER]


@functools.cache
def pieces(source: str) -> dict[str, Piece]:
    """By name: the definitions of the front with the comments right above them, and everything behind the ruler."""
    lines = source.splitlines(keepends=True)
    borders = rulers(source)
    back = borders[0] if borders else len(lines)
    found = {}

    def add(name: str, first: int, end: int) -> None:
        part = sum(border <= first for border in borders)
        found[name] = Piece(first, end, part, "".join(lines[first:end]))

    end = 0
    body = ast.parse(source).body
    for node in body:
        first = first_line(node)
        if first < back:
            end = node.end_lineno
            if isinstance(node, NAMED):
                while first > 0 and lines[first - 1].startswith("#"):
                    first -= 1
                add(name_of(node), first, end)
        else:
            if end <= back:
                end = back
                while lines[end].startswith("#"):
                    end += 1
                add("the comment under the ruler", back, end)
            first = end  # so that no comment between two definitions is left out
            while not lines[first].strip():
                first += 1
            end = len(lines) if node is body[-1] else node.end_lineno
            add(name_of(node), first, end)
    return found


@functools.cache
def fields(source: str) -> dict[str, Field]:
    """The fields of Args by name."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if getattr(node, "name", "") != "Args":
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and field.value:
                first = lines[field.lineno - 1].encode()  # the parser counts bytes
                last = lines[field.end_lineno - 1].encode()
                kind = first[field.annotation.col_offset : field.annotation.end_col_offset].decode()
                comment = last[field.end_col_offset :].decode().strip()
                found[field.target.id] = Field(field.lineno - 1, field.end_lineno, kind, comment)
    return found


def key(name: str, source: str) -> str:
    """The name under which a piece or a field of this script is compared."""
    for field, names in KINDS.items():
        if name in names and field in fields(source):
            return f"{name} with {field}"
    return name


def contract(source: str) -> dict[str, str]:
    """The text by name that must be the same in every script with that name."""
    texts = {name: piece.text for name, piece in pieces(source).items() if not may_differ(name, piece)}
    texts |= {f"Args.{name}": f"{field.kind}  {field.help}" for name, field in fields(source).items()}
    return {key(name, source): text for name, text in texts.items()}


def back(source: str) -> list[str]:
    """The names between the ruler and the next, in their order."""
    return [name for name, piece in pieces(source).items() if piece.part == 1]


def drift(scripts: list[Path]) -> list[str]:
    """A sentence for every name that means two things and for every two scripts with another order of their backs."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in scripts}
    versions = {}
    for script, source in sources.items():
        for name, text in contract(source).items():
            versions.setdefault(name, {}).setdefault(text, []).append(script)
    sentences = []
    for name, texts in versions.items():
        if len(texts) > 1:
            sentences.append(f"{name} differs: " + " | ".join(", ".join(holders) for holders in texts.values()))

    backs = {script: back(source) for script, source in sources.items()}
    for one, two in combinations(backs, 2):
        here = [name for name in backs[one] if name in backs[two]]
        there = [name for name in backs[two] if name in backs[one]]
        for left, right in zip(here, there):
            if left != right:
                sentences.append(f"{left} stands before {right} in {one}, but behind it in {two}")
                break
    return sentences


def repair(edited: str, other: str) -> tuple[str, list[str]]:
    """`other` with its copies taken from `edited`, and the names of those that were different."""
    lines = other.splitlines(keepends=True)
    wanted = contract(edited)
    given = contract(other)
    changed = {name for name in given if name in wanted and given[name] != wanted[name]}
    changes = []
    for name, piece in pieces(other).items():
        if key(name, other) in changed:
            changes.append((piece.first, piece.end, name, wanted[key(name, other)]))
    originals = fields(edited)
    for name, field in fields(other).items():
        if key(f"Args.{name}", other) in changed:
            original = originals[name]
            text = "".join(lines[field.first : field.end]).rstrip().removesuffix(field.help).rstrip()
            text = text.replace(f"{name}: {field.kind}", f"{name}: {original.kind}", 1)
            changes.append((field.first, field.end, f"Args.{name}", f"{text}  {original.help}".rstrip() + "\n"))

    for first, end, _, text in sorted(changes, reverse=True):  # from the bottom, so that line numbers stay true
        lines[first:end] = [text]
    return "".join(lines), [name for _, _, name, _ in sorted(changes)]


def main(argv: list[str]) -> int:
    """Repair drift from the script in argv, if there is one, and report what is left; the exit code."""
    if any(word.startswith("-") for word in argv):
        print(__doc__)
        return 2
    scripts = sorted(ALGOS.glob("*.py"))
    for edited in map(Path, argv):
        if not edited.is_file():
            print(f"there is no script {edited}")
            return 2
        for path in scripts:
            text, names = repair(edited.read_text(encoding="utf-8"), path.read_text(encoding="utf-8"))
            if names:
                path.write_text(text, encoding="utf-8")
                print(f"{path.name}: {', '.join(names)} now as in {edited.name}")
    found = drift(scripts)
    print("\n".join(found) or "no drift")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
