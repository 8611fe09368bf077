"""The family tree of the scripts, with the number of lines in which each differs from its parent.

python tests/family.py          writes it into the README
python tests/family.py --check  exits 1 if the README shows another

A script names its parent in its docstring: "Child of parent.py: the idea."
"""

import ast
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- family:begin -->\n", "<!-- family:end -->"


def origin(source: str) -> tuple[str, str]:
    """The parent (empty for a root) and the idea that a script's docstring names."""
    docstring = " ".join(ast.get_docstring(ast.parse(source)).split())
    child = re.search(r"Child of (\w+)\.py: (.+?)\.(?: |$)", docstring)
    return child.groups() if child else ("", docstring.split(":")[1].split("(")[0].strip())


def differing(parent: str, child: str) -> int:
    """Lines that one of the two scripts has and the other has not, as `diff parent child` counts them."""
    lines = difflib.unified_diff(parent.splitlines(), child.splitlines(), lineterm="", n=0)
    return sum(line[0] in "+-" and line[:3] not in ("+++", "---") for line in lines)


def tree(sources: dict[str, str], parent: str = "", depth: int = 0) -> str:
    """The scripts below a parent as a nested Markdown list."""
    text = ""
    for name in sources:
        ancestor, idea = origin(sources[name])
        if ancestor == parent:
            distance = f" ({differing(sources[parent], sources[name])} lines differ)" if parent else ""
            text += f"{'  ' * depth}- [`{name}.py`](algos/{name}.py){distance}: {idea}\n"
            text += tree(sources, name, depth + 1)
    return text


def shown(readme: str) -> str:
    """The README with the tree of today between its marks."""
    head, rest = readme.split(BEGIN)
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "algos").glob("*.py"))}
    return head + BEGIN + tree(sources) + END + rest.split(END)[1]


def main(argv: list[str]) -> int:
    """Write the tree or check it; the exit code."""
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = shown(old)
    if argv != ["--check"]:
        readme.write_text(new, encoding="utf-8")
    elif old != new:
        print("the family tree in README.md is stale: python tests/family.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
