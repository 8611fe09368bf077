"""The HTML page of the report: read as a file, and shown by a browser where there is one."""

import html
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmark import markdown, page, report
from benchmark.__main__ import main
from benchmark.run import file_name
from benchmark.suites import SUITES

ROOT = Path(__file__).parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
EVIL = '<b>&"</script>'
SCORES = {"nine": 9.5, "ten": 10.2, "minus": -100.7, EVIL: 8.0}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
LOOK = """
onload = () => setTimeout(() => {
  const seen = [...document.querySelectorAll("iframe")].map(({contentWindow: {document: page, innerWidth}}) => {
    const names = (all) => [...all].filter((one) => one.getClientRects().length).map((one) => one.textContent)
    const found = {
      error: page.documentElement.dataset.error ?? null, lines: page.querySelectorAll(".scatterlayer .js-line").length,
      overflow: page.documentElement.scrollWidth - innerWidth, order: names(page.querySelectorAll(".opener")),
      legend: names(page.querySelectorAll(".legendtext")).sort(),
    }
    page.querySelector(".opener").click()
    return Object.assign(found, {seeds: names(page.querySelectorAll(".more tbody tr")).length})
  })
  document.body.textContent = JSON.stringify(seen)
}, 500)
"""


def write_results(folder: Path, suite: str) -> None:
    """Two seeds of each row, half a point around its algorithm's score, and a script of its own."""
    for i, row in enumerate(report.suite_rows(suite)):
        score = SCORES.get(row[0], 0.0)
        run = dict(eval_returns=[score], train_return=1.25, wall_time=7.0, script=f"{i:08}ff", sps=1234.0)
        curve = [[10.0, 1.0], [500.0, 4.5], [1000.0, score]]
        run |= dict(date=f"2026-01-0{2 + i}", versions=dict(torch="2.13"), curve=curve)
        seeds = [run | dict(seed=1, eval_mean=score - 0.5), run | dict(seed=2, eval_mean=score + 0.5)]
        (folder / f"{file_name(row)}.json").write_text(json.dumps(dict(row=row, hyperparameters={}, seeds=seeds)))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results, and the references of one of them."""
    for suite in list(SUITES):
        monkeypatch.setitem(SUITES, suite, [])
    rows = [("nine ten minus", "Toy/Env-v0", 1000, "1-2", ""), (EVIL, f"{EVIL}-v0", 1000, "1-2", "")]
    monkeypatch.setitem(SUITES, "toy", rows)
    monkeypatch.setattr(report, "TABULATED", ["toy"])
    paper = "| Setting | Toy |\n|---|---|\n| TRPO | 77 (3) |\n| A2C |  |\n"
    monkeypatch.setattr(markdown, "paper_table", lambda _: paper)
    write_results(tmp_path, "toy")
    told = dict(bar="9", best_published="30", protocol="single run", note=EVIL, source="me/it@0123abc:a/*.md (Table 1)")
    return tmp_path, {("ten", "Toy/Env-v0", 1000): told}


class Reader(HTMLParser):
    """Checks that tags are balanced; keeps them with their attributes, and the text of cells and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.cells, self.styles = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> in line {self.getpos()[0]}"

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data
        if self.open[-1:] == ["style"]:
            self.styles += data


def test_the_page_has_every_cell_of_the_table(results):
    text = page.html(*results)
    cells = [cell.strip() for cell in Reader(text).cells]
    for row, runs in report.read_baselines(results[0], "toy").items():
        expected = markdown.table_row(report.summarise(row, runs, [1, 2], results[1]))
        start = next(i for i in range(len(cells)) if cells[i : i + 2] == expected[:2])
        found = cells[start : start + len(expected)]
        assert [cell.removesuffix("me/it") for cell in found] == expected
        seeds = [f"{run['eval_mean']:.1f}" for run in runs]
        assert [cells[start + 12], cells[start + 20]] == seeds
        assert cells[start + 18] == cells[start + 26] == runs[0]["script"][:8]
    assert cells[-4:] == ["TRPO", "77 (3)", "A2C", ""]
    assert "Runs of 2026-01-02 to 2026-01-05;" in text
    assert "; torch 2.13</p>" in text
    assert '<a href="https://github.com/me/it/blob/0123abc/a">me/it@0123abc:a/*.md</a> (Table 1)' in text


def test_the_page_needs_no_other_file(results):
    """Nothing is fetched, which a policy also tells the browser."""
    read = Reader(page.html(*results))
    assert {tag for tag, _ in read.tags}.isdisjoint(
        {"link", "img", "iframe", "object", "embed", "video", "audio", "base"}
    )
    assert [given for _, given in read.tags if {"src", "srcset", "data", "background", "style"} & given.keys()] == []
    assert [given["href"] for tag, given in read.tags if tag != "a" and "href" in given] == []
    assert not re.search(r"@import|url\(", read.styles)
    policy = next(given["content"] for tag, given in read.tags if "http-equiv" in given)
    assert policy == "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"


def test_names_are_text(results):
    read = Reader(page.html(*results))
    assert "b" not in {tag for tag, _ in read.tags}
    assert [tag for tag, _ in read.tags].count("script") == 3
    assert {EVIL, f"{EVIL}-v0"} <= set(read.cells)
    names = [given["id"] for _, given in read.tags if "id" in given]
    assert len(names) == len(set(names))
    places = {html.unescape(given["href"]) for tag, given in read.tags if tag == "a"}
    assert {"#sort=results,0", "#nine__Toy-Env-v0__1000", "#chart-Toy/Env-v0"} <= places


def test_equal_results_give_equal_pages(tmp_path):
    """Also in a process that orders its sets differently."""
    write_results(tmp_path, "classic")
    program = "import pathlib, sys; from benchmark import page; print(page.html(pathlib.Path(sys.argv[1]), {}), end='')"
    words, env = [sys.executable, "-c", program, str(tmp_path)], os.environ | dict(PYTHONHASHSEED="1")
    other = subprocess.run(words, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert page.html(tmp_path, {}) == other


def test_report_writes_the_page_and_check_does_without(tmp_path):
    (tmp_path / "README.md").write_text(f"{markdown.BEGIN}\n{markdown.END}\n")
    words = ["report"]
    places = dict(runs="runs", baselines="baselines", readme="README.md", results="RESULTS.md", page="page.html")
    for flag, name in places.items():
        words += [f"--{flag}", str(tmp_path / name)]
    assert main(words) == 0
    Reader((tmp_path / "page.html").read_text())  # a page without results
    (tmp_path / "page.html").unlink()
    program = "import sys; sys.modules |= dict.fromkeys(['plotly', 'jinja2', 'benchmark.page']); "
    program += "from benchmark.__main__ import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", program, *words, "--check"]
    assert subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    assert not (tmp_path / "page.html").exists()


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_in_a_browser_390_pixels_wide(results, tmp_path):
    """It draws, sorts by number, unfolds and does not scroll sideways; pages with a fault are told apart."""
    faults = {
        "error": [("Plotly.newPlot(", "Plotly.nowPlot("), ("</h1>", "</h1><img src=picture.png>")],
        "order": [('typeof a === "number" &&', "false &&")],
        "overflow": [("overflow-x: auto", "")],
    }
    pages = [page.html(*results)]
    for right, wrong in itertools.chain(*faults.values()):
        assert right in pages[0]
        pages.append(pages[0].replace(right, wrong))
    frames = ""
    for i, text in enumerate(pages):
        (tmp_path / f"{i}.html").write_text(text)
        frames += f'<iframe src="{i}.html#sort=results,3" style="width: 390px; height: 2000px"></iframe>'
    (tmp_path / "look.html").write_text(f"<!doctype html><body>{frames}<script>{LOOK}</script></body>")
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=9000"]
    words += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    words = [BROWSER, *words, (tmp_path / "look.html").as_uri()]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=100).stdout
    seen, *broken = json.loads(html.unescape(re.search("<body>(.*)</body>", shown, re.DOTALL)[1]))
    assert seen == dict(
        error=None,
        lines=4 * 3,  # a line for each seed and one for the mean
        overflow=0,
        order=["minus", EVIL, "nine", "ten"],
        legend=[EVIL, "minus", "nine", "ten"],
        seeds=2,
    )
    assert all(broken[i][key] != seen[key] for i, key in enumerate(key for key in faults for _ in faults[key]))
