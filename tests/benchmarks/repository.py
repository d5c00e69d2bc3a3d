"""A repository with made-up rows, its report, and parts of both."""

from __future__ import annotations

import functools
from pathlib import Path

import made_up_rows
from made_up_rows import CPU

from benchmarks.report import __main__ as report
from benchmarks.report.data import Results, load
from benchmarks.report.page import PAGE, REGIONS, SECTIONS
from benchmarks.report.plots import picture


def region(name: str) -> str:
    return f"<!-- benchmarks: {name} -->\n<!-- end benchmarks -->\n"


def make(root: Path) -> Path:
    """A repository with rows of every benchmark, and with every region in its README."""
    made_up_rows.write(root / "benchmarks" / "results")
    (root / "docs").mkdir()
    regions = "\n".join(map(region, REGIONS))
    (root / "README.md").write_text(f"# Title\n\nBefore.\n\n{regions}\nAfter.\n")
    (root / "docs" / "paper.md").write_text(region("paper") + region("accuracy"))
    (root / "docs" / "benchmarks.md").write_text("# Benchmarks\n\n" + region("page"))
    return root


def run(root: Path, *arguments: str) -> int:
    return report.main(["--root", str(root), *arguments])


def folder(root: Path, machine: str = CPU) -> Path:
    return root / "benchmarks" / "results" / machine


@functools.lru_cache(maxsize=2)
def loaded(folder: Path, *files: bytes) -> list[Results]:
    return load(folder)


def machines(root: Path) -> list[Results]:
    """Its rows, loaded anew where one of the files has changed."""
    where = root / "benchmarks" / "results"
    return loaded(where, *(path.read_bytes() for path in sorted(where.rglob("*.csv"))))


def results(root: Path, machine: str = CPU) -> Results:
    return next(r for r in machines(root) if r.machine == machine)


def document(root: Path, name: str = "README.md") -> str:
    """A document as its rows give it."""
    return report.rewritten(root, Path(name), machines(root))


def section(root: Path, title: str, machine: str = CPU) -> str:
    """A section of a machine's part of the page."""
    return SECTIONS[title].markdown(results(root, machine), PAGE)


def cells(text: str, *first: str) -> list[str]:
    """The cells of the one line of a table that begins with these."""
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    (found,) = [line for line in lines if line[: len(first)] == list(first)]
    return found[len(first) :]


def panels(root: Path, plot: str) -> list[dict]:
    """What a plot is drawn from."""
    found = picture(plot, results(root))
    return found.panels if found else []


def points(panel: dict) -> dict[str, tuple[float, float]]:
    return {p["name"]: (p["x"], p["y"]) for p in panel["points"] if p["name"]}
