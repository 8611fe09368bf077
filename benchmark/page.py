"""Fills page.html with the kept results: one file, charts included, that opens from disk without a network."""

import re
from collections import defaultdict
from pathlib import Path
from urllib.parse import quote

import jinja2
import numpy as np
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from benchmark import markdown, report
from benchmark.run import file_name

SEEDS = ["Seed", "Evaluation", "Episodes", "Last 100 of training", "Steps/s", "Seconds", "Date", "Script"]


def prose(text: str, label: str = r"\g<0>") -> Markup:
    """Plain text as HTML; a source such as owner/name@commit:path becomes a link, `words` become code."""
    link = rf'<a href="https://github.com/\1/blob/\2/\3">{label}</a>'
    text = re.sub(r"([\w.-]+/[\w.-]+)@([0-9a-f]{7,40}):([\w./-]*\w)(?:/\*[\w.*]*)?", link, str(escape(text)))
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", text))


def blocks(text: str) -> list[tuple[str, list[list[str]]]]:
    """The paragraphs of a Markdown text, each as it is and, if it is a table, as rows of cells, head first."""
    found = []
    for block in filter(None, text.strip().split("\n\n")):
        rows = []
        if block.startswith("|"):
            rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
            del rows[1]  # the rule under the head
        found.append((block, rows))
    return found


def traces(algo: str, runs: list[dict]) -> list[dict]:
    """Plotly's lines for the learning curves of an algorithm: all seeds as one thin line with gaps, and their mean."""
    curves = [np.array(run["curve"]).T for run in runs if run["curve"]]
    if not curves:  # no episode ended
        return []
    colour, dash = report.styles()[algo]
    name = str(escape(algo))
    x, y = zip(*(point for run in runs for point in [*run["curve"], (None, None)]))
    steps, returns = report.mean_curve(curves)
    common = dict(mode="lines", name=name, legendgroup=name)
    thin = dict(x=x, y=y, opacity=0.35, hoverinfo="skip", showlegend=False)
    shown = f"<b>{name}</b>, mean of {len(curves)}<br>%{{x:,}} steps<br>return %{{y:,.1f}}<extra></extra>"
    thick = dict(x=steps.round().tolist(), y=returns.round(2).tolist(), hovertemplate=shown)
    thin["line"] = dict(color=colour, dash=dash, width=0.7)
    thick["line"] = dict(color=colour, dash=dash, width=2.5)
    return [common | thin, common | thick]


def result(line: dict, runs: list[dict]) -> dict:
    """A row of the table of results: its anchor, its cells, and what it unfolds to."""
    reference = line["reference"]
    name = file_name(line["row"])
    cells = markdown.table_row(line)
    algo, *flags = cells[0].split(" --")
    cells[0] = Markup('<a class="opener" href="#{}">{}</a>').format(quote(name), algo)
    cells[0] += Markup().join(Markup("<br><small>--{}</small>").format(flag) for flag in flags)
    cells[1] = Markup('<a href="#{}">{}</a>').format(quote(f"chart-{cells[1]}"), cells[1])
    if reference["source"]:
        cells[6] += Markup("<br><small>{}</small>").format(prose(reference["source"].split(" ")[0], r"\1"))
    seeds = []
    for run in runs:
        last = "" if run["train_return"] is None else f"{run['train_return']:.1f}"
        scores = [f"{run['eval_mean']:.1f}", len(run["eval_returns"]), last]
        costs = [f"{run['sps']:,.0f}", f"{run['wall_time']:,.0f}"]
        seeds.append(dict(cells=[run["seed"], *scores, *costs, run.get("date", ""), (run.get("script") or "")[:8]]))
    about = "; ".join(filter(None, [reference["source"], reference["note"]]))
    return dict(id=name, cells=cells, about=about, seeds=seeds)


def html(baselines: Path, references: dict[report.Row, dict[str, str]]) -> str:
    """The page; equal results give equal pages."""
    kept = report.read_baselines(baselines, *report.TABULATED)
    charts = defaultdict(list)
    for row, runs in kept.items():
        charts[row[1]] += traces(row[0], runs)
    every = [run for runs in kept.values() for run in runs]
    facts = {name: {run["versions"][name] for run in every if name in run["versions"]} for name in report.PACKAGES}
    loader = jinja2.FileSystemLoader(report.FOLDER)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = prose
    environment.tests["number"] = re.compile(r"-?\d[\d.,]*( [\[(][^a-z]*[\])])?").fullmatch
    return environment.get_template("page.html").render(
        head=markdown.HEAD,
        results=[result(line, kept[row]) for row, line in report.results(kept, references).items()],
        seeds_head=SEEDS,
        charts={env_id: lines for env_id, lines in charts.items() if lines},
        comparisons=blocks(f"{markdown.paper_section(baselines)}\n{markdown.speed_section(baselines)}"),
        dates=sorted(run["date"] for run in every if "date" in run),
        facts="; ".join(f"{name} {', '.join(sorted(found))}" for name, found in facts.items() if found),
        plotly=get_plotlyjs(),
    )
