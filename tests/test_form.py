"""The form of the scripts: the page and its two parts, twins, imports, flags, headers, hints. Nothing is trained."""

import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

import family
import pytest
import twins
from conftest import SCRIPTS

ROOT = Path(__file__).parents[1]
MAX_FRONT = 300  # lines
LONGER_FRONTS = dict(npg=400, trpo=400, ppo_kl=320, trpo_penalty=320)  # conjugate gradient, line search, penalties
LONGER_FRONTS |= dict(rainbow=400, prioritized_dqn=310)  # six algorithms; a sum tree
LONGER_FRONTS |= dict(ddppo=340, a3c=310, impala=320)  # the average over processes; a worker beside train()
SECOND_RULER = {"td_prediction"}  # scripts that end with something that no other script needs
SECOND_RULER |= {"a3c", "ddppo", "impala"}  # their processes
LONGER_FRONTS |= dict(ppo_rlhf=400)  # a reward model besides PPO
SECOND_RULER |= {"ppo_rlhf", "grpo"}  # rewards that are given; problems with a check
SECOND_RULER |= {"behavior_cloning"}  # files of demonstrations
ROOTS = {"reinforce", "td_prediction", "behavior_cloning"}  # scripts without a parent
MAX_DOCSTRING = 30  # lines
MAX_TOKENS = 40  # in a line of the front
MAX_MEAN_TOKENS = 11.5  # per line of code, over the whole script
LOSSES = {"policy_loss", "value_loss", "critic_loss", "actor_loss", "temperature_loss", "loss"}
LOSSES |= {"supervised_loss", "reward_loss"}  # of language models
GONE = {"Adam", "RMSprop", "Target", "follow", "Dot", "actor_layers"}  # what PyTorch has, or what hides who learns
ALLOWED = {"filelock", "gymnasium", "numpy", "torch", "tyro", "tqdm"}  # beside the standard library
OPTIONAL = {
    "ale_py",
    "minatar.gym",
    "moviepy",
    "wandb",
    "gymnasium.utils.save_video",
    "transformers",
    "datasets",
    "h5py",
    "ray",
}  # imported where needed, by importlib
HEAVY = ["ale_py", "minatar", "wandb", "moviepy", "mujoco", "Box2D"]  # no plain run should wait for them or need them
HEAVY += ["transformers", "datasets", "h5py", "ray"]

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def for_language(script: Path) -> bool:
    """Whether the script learns to write (see conftest.is_language)."""
    return "max_new_tokens" in twins.fields(script.read_text(encoding="utf-8"))


def for_imitation(script: Path) -> bool:
    """Whether the script learns from demonstrations (see conftest.is_imitation)."""
    return "top_fraction" in twins.fields(script.read_text(encoding="utf-8"))


def tree_of(script: Path) -> ast.Module:
    """The parsed script."""
    return ast.parse(script.read_text(encoding="utf-8"))


# The page. Each rule takes a page and returns a sentence for everything that is wrong with it.

PAGE = f"""# /// script
# requires-python = ">=3.10"
# ///
\"\"\"Small: an algorithm of one line.

Author et al. 1999, a paper. Child of parent.py: the idea.

    L = E[x^2]

    python algos/small.py --env-id CartPole-v1    # 500

Read to the end of train(); what follows is plumbing that the scripts share.
\"\"\"

import torch.nn as nn
from torch import Tensor


class Args:
    seed: int = 1  # of all that is random
    gamma: float = 0.99  # discount


def mlp() -> nn.Sequential:
    return nn.Sequential()


class Agent(nn.Module):
    pass


def td_target(rewards: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    return rewards + gamma * next_values


def loss(x: Tensor) -> Tensor:
    return x.square().mean()


def train(args: Args) -> dict:
    first, second = evaluate(args)
    first, second = second, first
    best = first if first > second else second
    return dict(best=best)


# Defaults by family.
FAMILIES = {{}}


{twins.RULER}
# Plumbing.


def evaluate(args: Args) -> list:
    return [1, 2]


class Run:
    pass


if __name__ == "__main__":
    train(Args())
"""


class Page(NamedTuple):
    """A script and the texts of the others."""

    name: str
    source: str
    others: list[str]

    @property
    def body(self) -> list[ast.stmt]:
        return ast.parse(self.source).body

    @property
    def front(self) -> int:
        """The number of lines above the ruler."""
        rulers = twins.rulers(self.source)
        return rulers[0] if rulers else len(self.source.splitlines())

    @property
    def docstring(self) -> str:
        return ast.get_docstring(ast.parse(self.source))


def one_ruler(page: Page) -> list[str]:
    """One ruler, and a second one only in scripts that have something for themselves."""
    faults = []
    for line in page.source.splitlines():
        if line.startswith("# ==") and line != twins.RULER:
            faults.append("a ruler is '# ' and 116 times '='")
    count = len(twins.rulers(page.source))
    wanted = 2 if page.name in SECOND_RULER else 1
    if count != wanted:
        faults.append(f"{count} rulers instead of {wanted}")
    return faults


def back_of_twins(page: Page) -> list[str]:
    """Behind the ruler stand only functions and classes that another script has word for word, and the start."""
    faults = []
    others = [twins.pieces(other) for other in page.others]
    for name, piece in twins.pieces(page.source).items():
        copies = [other[name].text for other in others if name in other]
        if piece.part == 1 and piece.text not in copies:
            faults.append(f"no other script has {name} word for word")
    for node in page.body[:-1]:
        if node.lineno > page.front and not isinstance(node, ast.FunctionDef | ast.ClassDef):
            faults.append(f"{twins.name_of(node)} is no function or class")
    if twins.name_of(page.body[-1]) != "if __name__ == '__main__':":
        faults.append("the last statement is not the start of the script")
    return faults


def stage(node: ast.stmt) -> str:
    """What a statement of the front belongs to."""
    name = twins.name_of(node)
    if name in ("Args", "train", "FAMILIES"):
        return name
    if isinstance(node, ast.Expr):
        return "docstring"
    if isinstance(node, ast.Import | ast.ImportFrom):
        return "imports"
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return "constants"
    if isinstance(node, ast.ClassDef):
        return "networks"
    builds_a_network = node.returns is not None and "nn." in ast.unparse(node.returns)
    return "networks" if builds_a_network else "functions"


def order_of_the_front(page: Page) -> list[str]:
    """Docstring, imports, Args, networks, functions, train, FAMILIES; constants may stand before any of them."""
    order = ["docstring", "imports", "Args", "networks", "functions", "train", "FAMILIES"]
    stages = [stage(node) for node in page.body if node.lineno <= page.front]
    if stages[-2:] != ["train", "FAMILIES"]:
        return ["the front does not end with train and FAMILIES"]
    places = [order.index(name) for name in stages if name != "constants"]
    return [f"{order[right]} behind {order[left]}" for left, right in zip(places, places[1:]) if left > right]


def length_of_the_front(page: Page) -> list[str]:
    """The front is one sitting's reading."""
    limit = LONGER_FRONTS.get(page.name, MAX_FRONT)
    return [f"the front has {page.front} lines, more than {limit}"] if page.front > limit else []


def docstring_of_the_page(page: Page) -> list[str]:
    """Title, paper, parent with the idea, formula and commands on lines of their own, and how far to read."""
    wanted = {
        "no title 'Name: what it is.'": r"\A\S.*: .+\.\n",
        "no paper with its year": r"[A-Z]\w+(?: et al\.)?,? \(?(?:19|20)\d\d",
        "no formula on an indented line of its own": r"(?m)^ {4}(?!python ).*(=|<-|E\[)",
        "no command on an indented line of its own": rf"(?m)^ {{4}}python algos/{page.name}\.py --env-id \S",
    }
    faults = [fault for fault, pattern in wanted.items() if not re.search(pattern, page.docstring)]
    parent, _ = family.origin(page.source)
    if not parent and page.name not in ROOTS:
        faults.append("no parent and idea")
    ending = " ".join(page.docstring.split("\n\n")[-1].split())
    if not re.fullmatch(r"Read .*to the end of train\(\); what follows .*is plumbing that the scripts share\.", ending):
        faults.append("the last paragraph does not say how far to read")
    if len(page.docstring.splitlines()) > MAX_DOCSTRING:
        faults.append(f"the docstring has more than {MAX_DOCSTRING} lines")
    return faults


def one_thing_per_assignment(page: Page) -> list[str]:
    """No tuple is assigned to a tuple, unless two names swap their values."""
    faults = []
    for node in ast.walk(ast.parse(page.source)):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        values = sorted(ast.unparse(value) for value in node.value.elts)
        for target in node.targets:
            if isinstance(target, ast.Tuple) and sorted(ast.unparse(part) for part in target.elts) != values:
                faults.append(f"line {node.lineno} assigns several values at once")
    return faults


def no_chained_conditions(page: Page) -> list[str]:
    """No conditional expression inside another one."""
    faults = []
    for node in ast.walk(ast.parse(page.source)):
        if isinstance(node, ast.IfExp) and sum(isinstance(part, ast.IfExp) for part in ast.walk(node)) > 1:
            faults.append(f"line {node.lineno} chains conditional expressions")
    return faults


def density(page: Page) -> list[str]:
    """Lines are short: in the mean of the script, and each one of the front."""
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT)
    tokens: dict[int, int] = {}  # by line
    for token in tokenize.generate_tokens(io.StringIO(page.source).readline):
        if token.type not in layout:
            line = token.start[0]
            tokens[line] = tokens.get(line, 0) + 1
    faults = []
    for line, count in tokens.items():
        if line <= page.front and count > MAX_TOKENS:
            faults.append(f"line {line} has {count} tokens, more than {MAX_TOKENS}")
    mean = sum(tokens.values()) / len(tokens)
    if mean >= MAX_MEAN_TOKENS:
        faults.append(f"{mean:.1f} tokens per line of code, not below {MAX_MEAN_TOKENS}")
    return faults


def textbook_names(page: Page) -> list[str]:
    """Nothing is defined under the names of what PyTorch has or of what has gone."""
    defined = set()
    for node in ast.walk(ast.parse(page.source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            defined.add(node.attr)
    return [f"{name} is defined" for name in sorted(defined & GONE)]


def names_of_losses(page: Page) -> list[str]:
    """Losses have one name over all scripts, or that of the algorithm or of the script that they are taken from."""
    allowed = LOSSES | {f"{page.name}_loss"} | {f"{word}_loss" for word in page.name.split("_")}
    own = twins.pieces(page.source)
    for other in map(twins.pieces, page.others):  # a child may have the loss of its parent, as it is
        allowed |= {name for name in own.keys() & other.keys() if own[name].text == other[name].text}
    losses = [node.name for node in page.body if isinstance(node, ast.FunctionDef) and node.name.endswith("loss")]
    if not losses:
        return ["no function is called a loss"]
    return [f"{name} is no name for a loss" for name in losses if name not in allowed]


RULES = [
    one_ruler,
    back_of_twins,
    order_of_the_front,
    length_of_the_front,
    docstring_of_the_page,
    one_thing_per_assignment,
    no_chained_conditions,
    density,
    textbook_names,
    names_of_losses,
]


@each_script
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_page_keeps_the_rule(rule, script):
    """No script breaks a rule of the form."""
    others = [other.read_text(encoding="utf-8") for other in SCRIPTS if other != script]
    assert rule(Page(script.stem, script.read_text(encoding="utf-8"), others)) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_page_has_no_faults(rule):
    """The small page above keeps every rule."""
    assert rule(Page("small", PAGE, [PAGE])) == []


START = 'if __name__ == "__main__":'
FUNCTION = "def other() -> Tensor:\n    return 1\n\n\n"


@pytest.mark.parametrize(
    ("rule", "old", "new", "fault"),
    [
        (one_ruler, twins.RULER, "# Plumbing", "0 rulers instead of 1"),
        (one_ruler, twins.RULER, twins.RULER + "=", "a ruler is '# ' and 116 times '='"),
        (one_ruler, START, f"{twins.RULER}\n{START}", "2 rulers instead of 1"),
        (back_of_twins, "return [1, 2]", "return [1, 3]", "no other script has evaluate word for word"),
        (back_of_twins, "class Run:", "# The run.\n\n\nclass Run:", "no other script has Run word for word"),
        (back_of_twins, "# Plumbing.", "# Pipes.", "no other script has the comment under the ruler word for word"),
        (back_of_twins, "class Run:", FUNCTION + "class Run:", "no other script has other word for word"),
        (back_of_twins, "class Run:", "FIXED = 1\n\n\nclass Run:", "FIXED is no function or class"),
        (back_of_twins, START, "if True:", "the last statement is not the start of the script"),
        (order_of_the_front, "class Args:", "class Extra:\n    pass\n\n\nclass Args:", "Args behind networks"),
        (order_of_the_front, "class Agent(", FUNCTION + "class Agent(", "networks behind functions"),
        (order_of_the_front, "class Agent(", "import os\n\n\nclass Agent(", "imports behind networks"),
        (order_of_the_front, "# Defaults by", FUNCTION + "# Defaults by",
         "the front does not end with train and FAMILIES"),
        (order_of_the_front, twins.RULER, f"LIMIT = 1\n\n\n{twins.RULER}",
         "the front does not end with train and FAMILIES"),
        (length_of_the_front, "# Defaults by family.", "# Defaults.\n" * 300, "lines, more than 300"),
        (docstring_of_the_page, "Small: an", "An", "no title 'Name: what it is.'"),
        (docstring_of_the_page, "Author et al. 1999, a", "A", "no paper with its year"),
        (docstring_of_the_page, "\n    L = E[x^2]\n", "L = E[x^2]\n", "no formula on an indented line of its own"),
        (docstring_of_the_page, "    L = E[x^2]\n\n", "", "no formula on an indented line of its own"),
        (docstring_of_the_page, "algos/small.py", "algos/parent.py", "no command on an indented line of its own"),
        (docstring_of_the_page, "Child of", "Like", "no parent and idea"),
        (docstring_of_the_page, "parent.py: the idea.", "parent.py.", "no parent and idea"),
        (docstring_of_the_page, "Read to the end", "Read the whole", "the last paragraph does not say how far to read"),
        (docstring_of_the_page, "scripts share.\n", "scripts share.\n\nMore.\n",
         "the last paragraph does not say how far to read"),
        (docstring_of_the_page, "a paper.", "a paper." + 30 * "\n", "the docstring has more than 30 lines"),
        (one_thing_per_assignment, "first, second = second, first", "first, second = second, 0",
         "assigns several values at once"),
        (no_chained_conditions, "else second\n", "else second if second else 0\n", "chains conditional expressions"),
        (density, "dict(best=best)", f"dict(best=best, rest=[{', '.join('0' * 20)}])",
         "tokens, more than 40"),
        (density, "    return [1, 2]", f"    return [{', '.join('0' * 400)}]", "tokens per line of code"),
        (textbook_names, "class Run:", "class Adam:", "Adam is defined"),
        (textbook_names, "class Run:", "class Run:\n    def follow(self):\n        pass\n", "follow is defined"),
        (textbook_names, "best = first", "args.actor_layers = best = first", "actor_layers is defined"),
        (names_of_losses, "def loss(", "def my_loss(", "my_loss is no name for a loss"),
        (names_of_losses, "def loss(", "def error(", "no function is called a loss"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(rule, old, new, fault):
    """Each rule sees what breaks it."""
    assert PAGE.count(old) == 1
    faults = rule(Page("small", PAGE.replace(old, new), [PAGE]))
    assert any(fault in found for found in faults), faults


def test_exceptions_of_the_form(monkeypatch):
    """A second ruler, a longer front and no parent are for the scripts on the lists, a loss may be the algorithm's."""
    long = PAGE.replace("# Defaults by family.", "# Defaults.\n" * 300)
    assert length_of_the_front(Page("trpo", long, [])) == []
    root = PAGE.replace("Child of", "Like").replace("small.py", "td_prediction.py")
    assert docstring_of_the_page(Page("td_prediction", root, [])) == []
    for name in ("ppo_loss", "ppo_clip_loss"):
        assert names_of_losses(Page("ppo_clip", PAGE.replace("def loss(", f"def {name}("), [])) == []

    monkeypatch.setitem(globals(), "SECOND_RULER", {"small"})
    own = f"{twins.RULER}\n# Only here.\n\n\ndef own() -> int:\n    return 1\n\n\n{START}"
    page = Page("small", PAGE.replace(START, own), [PAGE])
    assert one_ruler(page) == back_of_twins(page) == order_of_the_front(page) == []
    assert one_ruler(Page("small", PAGE, [PAGE])) == ["1 rulers instead of 2"]


# Twins


@pytest.fixture
def copies(tmp_path, monkeypatch, capsys):
    """Two copies of the page in a tree of their own, and a function that runs the command there."""
    parent = tmp_path / "algos" / "parent.py"
    child = tmp_path / "algos" / "child.py"
    parent.parent.mkdir()
    parent.write_text(PAGE)
    child.write_text(PAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(twins, "ALGOS", tmp_path / "algos")

    def run(*argv: str) -> tuple[int, str]:
        return twins.main(list(argv)), capsys.readouterr().out

    return parent, child, run


def plant(script: Path, old: str, new: str) -> None:
    """Replace the one `old` in the script by `new`."""
    assert script.read_text().count(old) == 1, f"{old!r} must occur once"
    script.write_text(script.read_text().replace(old, new))


def test_no_drift():
    """Same name, same text, in all scripts; same order behind the ruler."""
    assert twins.drift(SCRIPTS) == []


def test_exceptions_are_few_and_used():
    """The list of names that may differ stays short, and every name on it exists."""
    names = set().union(*(twins.pieces(script.read_text()) for script in SCRIPTS))
    assert names >= twins.MAY_DIFFER
    assert len(twins.MAY_DIFFER) <= 6
    for field, own in twins.KINDS.items():
        contracts = [twins.contract(script.read_text()) for script in SCRIPTS]
        texts = [{name for name in contract if name.endswith(f" with {field}")} for contract in contracts]
        assert {name.removesuffix(f" with {field}") for name in set().union(*texts)} == own


def test_equal_copies_have_no_drift(copies):
    """Two equal scripts: exit code 0, and the repair changes nothing."""
    parent, child, run = copies
    assert run() == (0, "no drift\n")
    assert run("algos/parent.py") == (0, "no drift\n")
    assert parent.read_text() == child.read_text() == PAGE


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("    return nn.Sequential()\n", "    return nn.Sequential()  # empty\n", "mlp"),
        ("def mlp()", "@cache\ndef mlp()", "mlp"),
        ("def mlp()", "# Layers.\ndef mlp()", "mlp"),
        ("class Run:\n", "class Run(dict):\n", "Run"),
        ("    return [1, 2]\n", "    # two\n    return [1, 2]\n", "evaluate"),
        ("class Run:\n", "# The run.\n\n\nclass Run:\n", "Run"),
        ("# Plumbing.\n", "# Pipes.\n# And more.\n", "the comment under the ruler"),
        ("    train(Args())\n", "    train(Args(seed=2))\n", "if __name__ == '__main__':"),
        ("    train(Args())\n", "    train(Args())\n# The end.\n", "if __name__ == '__main__':"),
        ("  # of all that is random\n", "  # of everything, \u00fcberall\n", "Args.seed"),
        ("    seed: int =", "    seed: int | None =", "Args.seed"),
        ("  # of all that is random\n", "\n", "Args.seed"),
    ],
)
def test_drift_is_found_and_repaired(copies, old, new, name):
    """An edit of one copy is reported; the command carries it to the other copy, to the letter, and says so."""
    parent, child, run = copies
    plant(parent, old, new)
    assert run() == (1, f"{name} differs: child.py | parent.py\n")
    assert run("algos/parent.py") == (0, f"child.py: {name} now as in parent.py\nno drift\n")
    assert child.read_text() == parent.read_text() != PAGE


def test_constants_are_twins(copies):
    """All constants but FAMILIES are, with the comment above them."""
    parent, child, run = copies
    for script in (parent, child):
        plant(script, "class Agent(", "# Of sigma.\nLIMIT = 1\nOTHER: int = 2\n\n\nclass Agent(")
    plant(parent, "LIMIT = 1", "LIMIT = 3")
    plant(parent, "OTHER: int = 2", "OTHER: int = 4")
    assert run()[1] == "LIMIT differs: child.py | parent.py\nOTHER differs: child.py | parent.py\n"
    assert run("algos/parent.py") == (0, "child.py: LIMIT, OTHER now as in parent.py\nno drift\n")
    assert child.read_text() == parent.read_text()


def test_many_drifts_at_once_are_repaired_and_defaults_stay(copies):
    """Edits of several pieces and fields, some longer and some shorter, against a child with defaults of its own."""
    parent, child, run = copies
    plant(child, "seed: int = 1 ", "seed: int = 77 ")
    expected = child.read_text()
    edits = [
        ("  # of all that is random\n", "  # of weights\n"),
        ("  # discount\n", "  # how much the future counts\n"),
        ("    return nn.Sequential()\n", "    # one\n    # two\n    return nn.Sequential()\n"),
        ("    return rewards + gamma * next_values\n", "    return rewards\n"),
        ("    return [1, 2]\n", "    return [1]\n"),
    ]
    for old, new in edits:
        plant(parent, old, new)
        expected = expected.replace(old, new)
    assert run()[1].count("differs") == 5
    changed = "child.py: Args.seed, Args.gamma, mlp, td_target, evaluate now as in parent.py\n"
    assert run("algos/parent.py") == (0, changed + "no drift\n")
    assert child.read_text() == expected
    assert "seed: int = 1 " in parent.read_text()


def test_the_algorithms_own_names_may_differ_on_the_front(copies):
    """Args' defaults and methods, train, the losses and the other exceptions are no twins; behind the ruler all are."""
    parent, child, run = copies
    plant(parent, "class Agent(nn.Module):", "class Agent(torch.nn.Module):")
    plant(parent, "def train(args: Args) -> dict:\n", "def train(args: Args) -> dict:\n    # another algorithm\n")
    plant(parent, "    return x.square().mean()\n", "    return x.abs().mean()\n")
    plant(parent, "FAMILIES = {}", "FAMILIES = dict(a=1)")
    plant(parent, "gamma: float = 0.99", "gamma: float = 0.9")
    assert run() == (0, "no drift\n")
    assert run("algos/parent.py") == (0, "no drift\n")
    assert child.read_text() == PAGE

    for script in (parent, child):
        plant(script, "class Run:", "def huber_loss() -> int:\n    return 1\n\n\nclass Run:")
    plant(parent, "    return 1\n", "    return 2\n")
    assert run() == (1, "huber_loss differs: child.py | parent.py\n")


def test_scripts_of_a_kind_are_twins_among_themselves(copies):
    """What is on the kind's list may differ between the kinds, but not within one; the rest is one text."""
    parent, child, run = copies
    plant(child, "  # of all that is random\n", "  # of texts\n    max_new_tokens: int = 5\n")
    plant(child, "    return [1, 2]\n", "    return [2]\n")
    assert run() == (0, "no drift\n")
    assert run("algos/parent.py") == (0, "no drift\n")
    plant(parent, "  # discount\n", "  # discount\n    max_new_tokens: int = 5\n")
    names = ("evaluate", "Args.seed")
    assert run() == (1, "".join(f"{name} with max_new_tokens differs: child.py | parent.py\n" for name in names))
    changed = "child.py: Args.seed, evaluate now as in parent.py\n"
    assert run("algos/parent.py") == (0, changed + "no drift\n")
    plant(parent, "    return nn.Sequential()\n", "    return nn.Sequential()  # empty\n")
    assert run() == (1, "mlp differs: child.py | parent.py\n")


def test_the_order_of_the_backs_is_one(copies):
    """Another order is reported, and left to the reader to repair; what only one of the two has does not count."""
    _, child, run = copies
    plant(child, "class Run:\n    pass\n\n\n", "")
    plant(child, "def evaluate", "class Run:\n    pass\n\n\nclass Mine:\n    pass\n\n\ndef evaluate")
    before = child.read_text()
    sentence = "Run stands before evaluate in child.py, but behind it in parent.py\n"
    assert run() == (1, sentence)
    assert run("algos/parent.py") == (1, sentence)
    assert child.read_text() == before


def test_the_command(copies, tmp_path):
    """`python tools/twins.py` exits 1 on drift, 0 after the repair, and 2 if there is no such script."""
    parent, child, _ = copies
    plant(parent, "    return [1, 2]\n", "    return [1]\n")
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "twins.py", tmp_path / "tools")
    command = [sys.executable, "tools/twins.py"]
    assert subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, timeout=60).returncode == 1
    assert subprocess.run([*command, "algos/nobody.py"], cwd=tmp_path, stdout=subprocess.PIPE).returncode == 2
    assert subprocess.run([*command, "algos/parent.py"], cwd=tmp_path, stdout=subprocess.PIPE).returncode == 0
    assert subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, timeout=60).returncode == 0
    assert child.read_text() == parent.read_text()


# Imports


@each_script
def test_imports_are_on_the_allow_list(script):
    """Standard library, the few packages allowed, the optional ones through importlib; nothing of this repository."""
    imported, by_name = set(), set()
    for node in ast.walk(tree_of(script)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            imported.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            assert isinstance(node.args[0], ast.Constant), f"line {node.lineno} imports what it does not say"
            by_name.add(node.args[0].value)
    assert {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) <= ALLOWED
    assert by_name <= OPTIONAL


@each_script
def test_all_functions_are_used(script):
    """Every top-level function and class is used in its script: nothing is carried along from the parent."""
    tree = tree_of(script)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert defined <= used


@pytest.fixture(scope="module")
def imports(tmp_path_factory):
    """What importing the scripts does, one after the other in a fresh process with a nonsense command line."""
    folder = tmp_path_factory.mktemp("imports")
    probe = f"""
import contextlib, importlib.util, io, json, os, sys
import numpy as np, torch
report, heavy = {{}}, {HEAVY}
for path in {[str(script) for script in SCRIPTS]}:
    def state():
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), torch.get_num_threads(),
            str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.get_float32_matmul_precision(),
            os.getcwd(), dict(os.environ), sys.argv]
    before, out, err = state(), io.StringIO(), io.StringIO()
    spec = importlib.util.spec_from_file_location("script", path)
    sys.modules["script"] = module = importlib.util.module_from_spec(spec)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        spec.loader.exec_module(module)
    report[path] = dict(printed=out.getvalue() + err.getvalue(), unchanged=before == state(), files=os.listdir(),
        heavy=[name for name in heavy if name in sys.modules])
print(json.dumps(report))
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", probe, "--nonsense", "7"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@each_script
def test_import_has_no_side_effects(imports, script):
    """No output, no files, no parsing of the command line, no global setting of torch, numpy or the process changed."""
    report = imports[str(script)]
    assert report["printed"] == ""
    assert report["files"] == []
    assert report["unchanged"]


@each_script
def test_import_leaves_optional_packages_alone(imports, script):
    """A run that films, tracks and plays nothing special neither needs nor loads the packages for that."""
    assert imports[str(script)]["heavy"] == []


# Arguments


def args_uses(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names read from args outside Args, or by its properties; and every name read from args or Args anywhere."""
    used, read = set(), set()

    def is_args(node: ast.expr) -> bool:
        return getattr(node, "id", getattr(node, "attr", "")) in ("args", "Args")

    for top in tree.body:
        inside = isinstance(top, ast.ClassDef) and top.name == "Args"
        for part in top.body if inside else [top]:
            for node in ast.walk(part):
                own = inside and isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self"
                if own or (isinstance(node, ast.Attribute) and is_args(node.value)):
                    read.add(node.attr)
                    if not (inside and part.name == "__post_init__"):  # to check a value is not to use it
                        used.add(node.attr)
    return used, read


@each_script
def test_every_flag_is_used_and_every_use_declared(script):
    """No flag without effect, no args.x without a flag."""
    tree = tree_of(script)
    declared = set(twins.fields(script.read_text()))
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    methods = {node.name for node in args.body if isinstance(node, ast.FunctionDef)}
    used, read = args_uses(tree)
    assert len(declared) >= 10
    assert declared - used == set(), "flags without effect"
    assert read - declared - methods == set(), "undeclared flags"


@each_script
def test_every_flag_has_a_help_and_a_default(script):
    """One line per field, with its help as the comment behind it."""
    args = next(node for node in tree_of(script).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    found = twins.fields(script.read_text())
    assert set(found) == {node.target.id for node in args.body if isinstance(node, ast.AnnAssign)}
    for name, field in found.items():
        assert field.end == field.first + 1, f"{name} takes several lines"
        assert re.fullmatch(r"# \S.{5,}", field.help), f"{name} has no help"


@each_script
def test_the_common_flags_exist(script):
    """The flags that the harness and the user find in every script."""
    common = """env_id total_timesteps seed device torch_threads run_dir track wandb_project wandb_entity eval_episodes
    checkpoint_every resume"""
    of_environments = {"env_kwargs", "num_envs", "capture_video"}
    of_language = {"model", "prompts", "temperature", "max_new_tokens"}
    found = set(twins.fields(script.read_text()))
    assert set(common.split()) <= found
    if for_language(script):
        assert of_language <= found
        assert found.isdisjoint(of_environments)
    elif for_imitation(script):
        assert of_environments - {"num_envs"} <= found
        assert {"demonstrations", "num_demonstrations"} <= found
    else:
        assert of_environments <= found


# Header, docstring, length, hints


def header(script: Path) -> str:
    """The TOML text of the PEP 723 header (the expression is the specification's)."""
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (match,) = re.finditer(pattern, script.read_text())
    assert match["type"] == "script"
    assert match.start() == 0, "the header comes first"
    return "".join(line[2:] if line.startswith("# ") else line[1:] for line in match["content"].splitlines(True))


def pins(lines: list[str]) -> dict[str, str]:
    """Version by package of `name[extras]==version  # why`."""
    found = {}
    for line in lines:
        if requirement := line.split("#")[0].strip():
            name, version = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?==([\w.]+)", requirement).groups()
            found[name.lower().replace("_", "-")] = version
    return found


@each_script
def test_header_agrees_with_requirements(script):
    """Each dependency of the header has in requirements.txt the same version, and what is imported is in the header."""
    required = pins((ROOT / "requirements.txt").read_text().splitlines())
    if for_language(script):
        required |= pins((ROOT / "requirements-lm.txt").read_text().splitlines())
    if for_imitation(script):
        required |= pins((ROOT / "requirements-imitation.txt").read_text().splitlines())
    if 'import_module("ray")' in script.read_text():
        required |= pins((ROOT / "requirements-ray.txt").read_text().splitlines())
    listed = pins(re.findall(r'"([^"]*==[^"]*)"', header(script)))
    assert {"torch", "gymnasium", "numpy", "tyro"} <= set(listed)
    assert listed == {name: required.get(name) for name in listed}
    used = {name for name in ALLOWED if re.search(rf"^(import|from) {name}\b", script.read_text(), re.MULTILINE)}
    used |= {
        name.split(".")[0].replace("_", "-") for name in OPTIONAL if f'import_module("{name}")' in script.read_text()
    }
    assert used - set(listed) == set()


@each_script
def test_header_extras_agree_with_requirements(script):
    """The extras of gymnasium, too, are those of requirements.txt; no script for language has any."""
    if for_language(script):
        assert "gymnasium[" not in header(script)
        return
    pattern = r"^gymnasium\[(.*?)\]"
    (extras,) = re.findall(r"gymnasium\[(.*?)\]", header(script))
    assert re.findall(pattern, (ROOT / "requirements.txt").read_text(), re.MULTILINE) == [extras]


@each_script
def test_header_is_toml(script):
    """What `uv run` will read."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later")
    parsed = tomllib.loads(header(script))
    assert set(parsed) == {"requires-python", "dependencies"}
    assert len(parsed["dependencies"]) == len(re.findall(r'"[^"]*==', header(script)))


@each_script
def test_python_version(script):
    """The header asks for the Python that ruff checks for, and the script is written in it."""
    ((major, minor),) = re.findall(r'requires-python = ">=(\d+)\.(\d+),<3\.14"', header(script))
    assert f'target-version = "py{major}{minor}"' in (ROOT / "pyproject.toml").read_text()
    ast.parse(script.read_text(), feature_version=(int(major), int(minor)))


@each_script
def test_hints_and_docstrings(script):
    """Functions and methods have types on all parameters and a return type; the public ones say what they do."""
    missing = []
    for top in tree_of(script).body:
        for node in [top, *(top.body if isinstance(top, ast.ClassDef) else [])]:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            # the class says what forward does, and the fields what Args is
            public = not node.name.startswith("_") and node.name not in ("forward", "Args")
            if public and not ast.get_docstring(node):
                missing.append(f"{node.name}: docstring")
            if isinstance(node, ast.FunctionDef):
                spec = node.args
                every = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
                parameters = [p for p in every if p and p.arg != "self"]
                missing += [f"{node.name}: type of {p.arg}" for p in parameters if not p.annotation]
                if not node.returns:
                    missing.append(f"{node.name}: return type")
    assert missing == []


# The family tree


def test_family_tree_in_the_readme():
    """The README shows every script below its parent, with the distance of today."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert family.shown(readme) == readme, "stale: python tools/family.py"
    for script in SCRIPTS:
        assert f"](algos/{script.name})" in readme, f"{script.name} names no parent in its docstring"


def test_the_tree_finds_ideas_and_orphans():
    """A root, its child with one line changed and one added, and a script whose parent is missing."""
    root = '"""Root: the idea."""\na\nb\n'
    child = '"""Child.\n\nChild of root.py: more\nideas. Then text.\n"""\na\nc\nd\n'
    orphan = '"""O: o. Child of lost.py: x."""'
    assert family.tree(dict(child=child, orphan=orphan, root=root)).splitlines() == [
        "- [`root`](algos/root.py): the idea",
        "  - [`child`](algos/child.py), 3 lines: more ideas",
    ]


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ("a paper.", "a paper.\nAnd more.", []),
        ("  # discount\n", "  # how much the future counts\n", []),
        ("FAMILIES = {}", "FAMILIES = dict(\n    a=1,\n)", []),
        ("# Defaults by family.\n", "# One.\n# Two.\n", []),
        ("    return [1, 2]\n", "    return [1]\n", []),
        ("    pass\n\n\ndef td_target", "    pass\n\n\n\n\ndef td_target", []),
        ("gamma: float = 0.99  # discount\n", "gamma: float = 0.9  # discount\n",
         ["-    gamma: float = 0.99", "+    gamma: float = 0.9"]),
        ("    return dict(best=best)\n", "    # why\n    return dict(best=best)  # here\n",
         ["-    return dict(best=best)", "+    # why", "+    return dict(best=best)  # here"]),
    ],
)  # fmt: skip
def test_fronts_are_compared(old, new, lines):
    """Without docstring, help, FAMILIES, backs and blank lines, but with the comments of the code."""
    assert PAGE.count(old) == 1
    found = family.difference(PAGE, PAGE.replace(old, new), context=0)
    assert [line for line in found[2:] if line[0] in "+-"] == lines
    assert family.distance(PAGE, PAGE.replace(old, new)) == len(lines)


def test_the_family_command(tmp_path, monkeypatch, capsys):
    """It prints a difference, writes the tree, and exits 1 if the tree is stale and 2 on what it does not know."""
    child = PAGE.replace("gamma: float = 0.99", "gamma: float = 0.9").replace("parent.py", "root.py")
    (tmp_path / "root.py").write_text(PAGE.replace("Child of parent.py: the idea.", ""))
    (tmp_path / "child.py").write_text(child)
    readme = tmp_path / "README.md"
    readme.write_text(f"# Head\n{family.BEGIN}old\n{family.END}\nTail\n")
    monkeypatch.setattr(twins, "ALGOS", tmp_path)
    monkeypatch.setattr(family, "README", readme)

    def run(*argv: str) -> tuple[int, str]:
        return family.main(list(argv)), capsys.readouterr().out

    code, printed = run("diff", "root", "algos/child.py")
    assert code == 0
    assert printed.startswith("--- root.py\n+++ child.py\n")
    assert "\n-    gamma: float = 0.99\n+    gamma: float = 0.9\n" in printed

    names = "there are child, root"
    assert run("diff", "root", "nobody") == (2, f"there is no script nobody: {names}\n")
    assert run("nonsense")[0] == 2
    assert "old" in readme.read_text()

    assert run("--check")[0] == 1
    assert run() == (0, "")
    assert run("--check") == (0, "")
    tree = "- [`root`](algos/root.py): an algorithm of one line\n"
    tree += "  - [`child`](algos/child.py), 2 lines: the idea\n"
    assert readme.read_text() == f"# Head\n{family.BEGIN}{tree}{family.END}\nTail\n"

    (tmp_path / "child.py").write_text(child.replace("root.py", "rood.py"))
    assert run() == (1, "no chain of parents leads from child to a root: see 'Child of' in the docstrings\n")
    assert "`child`" in readme.read_text()


def test_a_declared_child_is_near():
    """A change of one line in the target is a few lines of difference."""
    sources = family.read_scripts()
    assert family.distance(sources["dqn"], sources["double_dqn"]) <= 6
