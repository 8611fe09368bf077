"""The family tree of the scripts, with the number of lines in which each front differs from its parent's.

python tools/family.py                    writes the tree into the README
python tools/family.py --check            exits 1 if the README shows another
python tools/family.py diff a2c ppo_clip  prints the difference of two fronts

A front is a script up to its ruler. Compared is the algorithm: no docstring, help of Args, FAMILIES or blank lines.
A script names its parent in its docstring: "Child of parent.py: the idea."
"""

import ast
import difflib
import functools
import re
import sys
from pathlib import Path

import twins

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- family:begin -->\n", "<!-- family:end -->"


@functools.cache
def origin(source: str) -> tuple[str, str]:
    """The parent (empty for a root) and the idea that a script's docstring names."""
    docstring = ast.get_docstring(ast.parse(source))
    child = re.search(r"Child of (\w+)\.py: (.+?)\.(?: |$)", " ".join(docstring.split()))
    if child:
        return child.groups()
    title = docstring.split("\n")[0]  # "Name: the idea."
    return "", title.partition(": ")[2].rstrip(".")


def front(source: str) -> list[str]:
    """The lines of a front that are compared."""
    lines = source.splitlines()
    for field in twins.fields(source).values():
        lines[field.end - 1] = lines[field.end - 1].removesuffix(field.help).rstrip()

    docstring = ast.parse(source).body[0]
    hidden = [(docstring.lineno - 1, docstring.end_lineno)]
    pieces = twins.pieces(source)
    if "FAMILIES" in pieces:
        hidden.append((pieces["FAMILIES"].first, pieces["FAMILIES"].end))
    for first, end in hidden:
        lines[first:end] = [""] * (end - first)

    borders = twins.rulers(source)
    if borders:
        lines = lines[: borders[0]]
    return [line for line in lines if line.strip()]


def difference(parent: str, child: str, names: tuple[str, str] = ("", ""), context: int = 3) -> list[str]:
    """The unified difference of two fronts."""
    return list(difflib.unified_diff(front(parent), front(child), *names, lineterm="", n=context))


def distance(parent: str, child: str) -> int:
    """The number of lines that one of the two fronts has and the other has not."""
    lines = difference(parent, child, context=0)[2:]  # without the two names
    return sum(line[0] in "+-" for line in lines)


def tree(sources: dict[str, str], parent: str = "", depth: int = 0) -> str:
    """The scripts below a parent as a nested Markdown list."""
    text = ""
    for name in sources:
        ancestor, idea = origin(sources[name])
        if ancestor == parent:
            away = f", {distance(sources[parent], sources[name])} lines" if parent else ""
            text += f"{'  ' * depth}- [`{name}`](algos/{name}.py){away}: {idea}\n"
            text += tree(sources, name, depth + 1)
    return text


def read_scripts() -> dict[str, str]:
    """The text of every script by its name."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(twins.ALGOS.glob("*.py"))}


def shown(readme: str) -> str:
    """The README with the tree of today between its marks."""
    head, rest = readme.split(BEGIN)
    return head + BEGIN + tree(read_scripts()) + END + rest.split(END)[1]


def main(argv: list[str]) -> int:
    """Write the tree, check it or print a difference; the exit code."""
    if argv[:1] == ["diff"] and len(argv) == 3:
        sources = read_scripts()
        names = [Path(name).stem for name in argv[1:]]
        for name in names:
            if name not in sources:
                print(f"there is no script {name}: there are {', '.join(sources)}")
                return 2
        parent, child = names
        for line in difference(sources[parent], sources[child], (f"{parent}.py", f"{child}.py")):
            print(line)
        return 0

    if argv not in ([], ["--check"]):
        print(__doc__)
        return 2
    old = README.read_text(encoding="utf-8")
    new = shown(old)
    lost = [name for name in read_scripts() if f"](algos/{name}.py)" not in new]
    if lost:
        print(f"no chain of parents leads from {', '.join(lost)} to a root: see 'Child of' in the docstrings")
        return 1
    if not argv:
        README.write_text(new, encoding="utf-8")
    elif old != new:
        print("the family tree in README.md is stale: python tools/family.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
