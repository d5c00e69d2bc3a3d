"""The parts of other documents that rows give, between two lines that stay where they are:

<!-- benchmarks: op -->
<!-- end benchmarks -->
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.kernels import BOTH, FORWARD
from benchmarks.questions import (
    ACCURACY,
    BEST,
    COMPILE,
    COPY,
    EAGER,
    FACTORIZERS,
    NATIVE,
    OP,
    TRITON,
)
from benchmarks.report import load
from benchmarks.report.load import Figures, Results
from benchmarks.report.plots import PLOTS, Picture
from benchmarks.report.tables import (
    CONTEXT,
    GFLOPS,
    METHOD,
    NAME,
    OVER_NATIVE,
    PARAMETERS,
    PASS,
    PEAK,
    SHAPE,
    Column,
    accuracy,
    command,
    label,
    name,
    of,
    paper,
    paragraph,
    share,
    source,
    table,
    text,
)
from benchmarks.rows import Row, number

# Whose rows are shown where several machines have some; without it the first by name.
PREFERRED = "amd-epyc-2-threads"
PAGE, PICTURES = Path("docs/benchmarks.md"), Path("docs/benchmarks")
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE=1"
START, END = re.compile(r"<!-- benchmarks: (.*) -->"), "<!-- end benchmarks -->"


def rewrite(document: Path, before: str, machines: list[Results]) -> str:
    """The document's text with its regions as the rows give them; `document` is its path from root.

    Raises:
        ValueError: a region has no end or no beginning, or none has its name.
    """
    after: list[str] = []
    begun = ""
    fenced = False
    for count, line in enumerate(before.splitlines(keepends=True), start=1):
        fenced ^= line.startswith("```") and not begun
        start = None if fenced else START.fullmatch(line.rstrip("\n"))
        end = not fenced and line.rstrip("\n") == END
        if (start and begun) or (end and not begun):
            raise ValueError(f"{document}, line {count}: expected no '{line.strip()}' here")
        if start:
            begun = start[1]
            if begun not in REGIONS:
                known = ", ".join(REGIONS)
                raise ValueError(f"{document}, line {count}: no region '{begun}': one of {known}")
            after += [line, "\n", *(f"{own}\n" for own in _region(begun, document, machines)), "\n"]
        if end:
            begun = ""
        if not begun:
            after.append(line)
    if begun:
        raise ValueError(f"{document}: the region '{begun}' has no '{END}'")
    return "".join(after)


def _region(which: str, document: Path, machines: list[Results]) -> list[str]:
    for results in sorted(machines, key=lambda r: (r.machine != PREFERRED, r.machine)):
        if lines := REGIONS[which](results, document):
            return lines
    return ["No rows yet."]


def image(picture: Picture, results: Results, plot: str, document: Path) -> str:
    path = os.path.relpath(PICTURES / f"{results.machine}-{plot}.png", document.parent)
    return f"![{picture.alt}]({path})"


def _notes(words: Iterable[str]) -> list[str]:
    return [line for note in words for line in ["", *paragraph(note)]]


def _what_most_call(figures: Figures) -> list[Row]:
    return [
        row
        for (_, dtype, layout, factors, which, _), found in figures.items()
        if (dtype, layout, factors) == ("float32", "contiguous", "shared")
        if which in (FORWARD, BOTH)
        for row in found
        if row["rival"] != COPY
    ]


def _op(results: Results, document: Path) -> list[str]:
    """float32, contiguous, shared factors, and in a sentence the same under huge pages."""
    found = _what_most_call(results.plain(OP))
    if not found:
        return []
    measured = load.measured(found)
    columns = [SHAPE, PASS, NAME, Column("ms", of("median_s", 1e3)), OVER_NATIVE, PEAK]
    notes = [f"{line}." for line in source(measured)]
    skipped = {f"{name(row)}: {text(row['skipped'])}" for row in found if row["skipped"]}
    notes += [f"Not measured: {why}." for why in sorted(skipped)]
    notes += _everywhere(results.plain(OP))
    figures = results.figures(OP)
    under = _what_most_call({k: v for k, v in figures.items() if HUGE_PAGES in k[-1].split()})
    if under and HUGE_PAGES not in found[0]["environment"].split():
        notes += _huge_pages(load.measured(under))
    return [*table(measured, columns), *_notes(notes)]


def _everywhere(figures: Figures) -> list[str]:
    """How often mfops is the fastest, and where it is least so: a table shows but a part."""
    closest = {}
    for (shape, dtype, layout, factors, which, _), found in figures.items():
        rivals = {
            row["rival"]: float(row[f"over_{NATIVE}"])
            for row in load.measured(found)
            if row["rival"] not in (NATIVE, TRITON, COPY) and row[f"over_{NATIVE}"]
        }
        if rivals:
            best = min(rivals, key=rivals.__getitem__)
            where = f"({', '.join(shape.split())}), {dtype}, {layout}, {factors} factors, {which}"
            closest[where] = rivals[best], best
    if not closest:
        return []
    ahead = sum(ratio > 1 for ratio, _ in closest.values())
    worst = min(closest, key=closest.__getitem__)
    ratio, rival = closest[worst]
    return [
        f"Of all {len(closest)} figures of the op (both layouts, shared and per-image factors, "
        f"forward, backward, both together) mfops is the fastest in {ahead}; at worst "
        f"{load.name(rival)} takes {ratio:.2f} of its time: {worst}."
    ]


def _huge_pages(found: list[Row]) -> list[str]:
    ranges = []
    for rival in (EAGER, COMPILE):
        ratios = [number(row, f"over_{NATIVE}") for row in found if row["rival"] == rival]
        known = [ratio for ratio in ratios if ratio is not None]
        if known:
            ranges.append(f"{load.name(rival)} {min(known):.2f} to {max(known):.2f}")
    if not ranges:
        return []
    from_ = "; ".join(
        {f"`{command(row)}`, commit {row['commit']}, {row['run'][:10]}": None for row in found}
    )
    return [
        "Where torch asks for huge pages for all of its memory, as mfops does for its outputs, "
        f"time / mfops is: {'; '.join(ranges)} ({from_})."
    ]


def _factorizers(results: Results, document: Path) -> list[str]:
    """A line of ours for each figure: time over rivals', memory over the published lines'."""
    figures = results.plain(FACTORIZERS)
    found = []
    for rows in figures.values():
        by_rival = {row["rival"]: row for row in rows}
        ours = next((row for row in load.measured(rows) if row["rival"] in (NATIVE, TRITON)), None)
        row = ours or by_rival.get(NATIVE)
        if row:
            published = by_rival.get(EAGER, {}).get("peak_bytes", "")
            found.append({**row, "published_bytes": published})
    if not found:
        return []
    columns = [SHAPE, label("dtype"), label("layout"), METHOD, PASS, NAME]
    columns.append(Column("ms", of("median_s", 1e3)))
    bases = {"published": EAGER, "its best": BEST, "torch.compile": COMPILE}
    columns += [
        Column(f"time / {title}", of(f"over_{base}", form=".2f")) for title, base in bases.items()
    ]
    columns += [PEAK, Column("peak / published", share("peak_bytes", "published_bytes", ".2f"))]
    measured = [row for rows in figures.values() for row in load.measured(rows)]
    return [*table(found, columns), *_notes(f"{line}." for line in source(measured))]


def _contexts(results: Results, document: Path) -> list[str]:
    """A line for each size and context, with the ratios of both passes."""
    ratios = [(which, base) for which in (FORWARD, BOTH) for base in ("aspp", "em")]
    found = []
    for size, passes in load.context_passes(results).items():
        for rival, row in passes[FORWARD].items():
            over = {f"{w}/{b}": passes[w].get(rival, {}).get(f"over_{b}", "") for w, b in ratios}
            found.append({**row, "size": size, **over})
    if not found:
        return []
    columns = [label("size"), CONTEXT, PARAMETERS, Column("GFLOPs, forward", GFLOPS.cell)]
    columns += [
        Column(f"{which}: time / {load.name(base)}", of(f"{which}/{base}", form=".2f"))
        for which, base in ratios
    ]
    lines = table(found, columns)
    return [*lines, *_notes(f"{line}." for line in source(found))]


def _accuracy(results: Results, document: Path) -> list[str]:
    lines = accuracy(results)
    if not lines:
        return []
    what = "Mean and standard deviation over the seeds, last epoch; time: forward, batch 1."
    return [*lines, *_notes([what, *(f"{line}." for line in source(results.rows(ACCURACY)))])]


def _paper(results: Results, document: Path) -> list[str]:
    lines = paper(results)
    rows = load.paper_counts(results).values()
    return [*lines, *_notes(f"{line}." for line in source(rows))]


def _pictures(results: Results, document: Path) -> list[str]:
    """Accuracy against cost, where networks were trained, and what contexts cost."""
    lines = []
    for plot in ("pareto", "contexts"):
        if isinstance(picture := PLOTS[plot](results), Picture):
            lines += [image(picture, results, plot, document), ""]
    if not lines:
        return []
    page = os.path.relpath(PAGE, document.parent)
    return [*lines, f"All tables and plots, and where they are from: [{PAGE}]({page})."]


REGIONS: dict[str, Callable[[Results, Path], list[str]]] = {
    "op": _op,
    "factorizers": _factorizers,
    "contexts": _contexts,
    "paper": _paper,
    "accuracy": _accuracy,
    "pictures": _pictures,
}
