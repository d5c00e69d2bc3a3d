"""A repository with made-up rows, its report, and parts of both."""

from __future__ import annotations

from pathlib import Path

import made_up_rows
from made_up_rows import CPU

from benchmarks.report import __main__ as report
from benchmarks.report import load
from benchmarks.report.load import Results
from benchmarks.report.plots import PLOTS, Picture

NEWER = {"run": "2026-11-25T08:00:00Z", "commit": "def5678"}


def region(name: str) -> str:
    return f"<!-- benchmarks: {name} -->\n<!-- end benchmarks -->\n"


def make(root: Path) -> Path:
    """A repository with rows of every question, and with every region in both documents."""
    made_up_rows.write(root / "benchmarks" / "results")
    (root / "docs").mkdir()
    regions = "\n".join(
        map(region, ("op", "factorizers", "contexts", "paper", "accuracy", "ablation", "pictures"))
    )
    (root / "README.md").write_text(f"# Title\n\nBefore.\n\n{regions}\nAfter.\n")
    (root / "docs" / "paper.md").write_text(region("paper") + region("pictures"))
    return root


def run(root: Path, *arguments: str) -> int:
    return report.main(["--root", str(root), *arguments])


def folder(root: Path, machine: str = CPU) -> Path:
    return root / "benchmarks" / "results" / machine


def document(root: Path, name: str) -> str:
    """A document as its rows give it, without drawing plots."""
    found = report.wanted(root, load.load(root / "benchmarks" / "results"))[Path(name)]
    assert isinstance(found, str)
    return found


def page(root: Path) -> str:
    return document(root, "docs/benchmarks.md")


def section(root: Path, title: str, machine: str = CPU) -> str:
    """A section of a machine's part of the page."""
    part = page(root).split(f"## {machine}\n")[1].split("\n## ")[0]
    return part.split(f"### {title}\n")[1].split("\n### ")[0]


def cells(text: str, *first: str) -> list[str]:
    """The cells of the one line of a table that begins with these."""
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    (found,) = [line for line in lines if line[: len(first)] == list(first)]
    return found[len(first) :]


def results(root: Path, machine: str = CPU) -> Results:
    return next(r for r in load.load(root / "benchmarks" / "results") if r.machine == machine)


def picture(root: Path, plot: str, machine: str = CPU) -> dict:
    """What a plot is drawn from."""
    found = PLOTS[plot](results(root, machine))
    assert isinstance(found, Picture)
    return found.content


def points(panel: dict) -> dict[str, tuple[float, float]]:
    return {p["name"]: (p["x"], p["y"]) for p in panel["points"] if p["name"]}
