"""The parts of other documents that rows give, marked by "benchmarks" (marked.py)."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from benchmarks.kernels import BOTH, FORWARD
from benchmarks.questions import (
    BEST,
    COMPILE,
    COPY,
    EAGER,
    FACTORIZERS,
    NATIVE,
    OP,
    TRITON,
)
from benchmarks.report import load, marked
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
    ablation,
    accuracy,
    command,
    label,
    name,
    of,
    paper,
    paragraph,
    source,
    table,
    text,
)
from benchmarks.rows import Row, number

# Whose rows are shown where several machines have some; without it the first by name.
PREFERRED = "amd-epyc-2-threads"
PAGE, PICTURES = Path("docs/benchmarks.md"), Path("docs/benchmarks")
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE=1"


def rewrite(document: Path, before: str, machines: list[Results]) -> str:
    """The document's text with its regions as the rows give them; `document` is its path from root.

    Raises:
        ValueError: a region has no end or no beginning, or none has its name.
    """
    regions = {which: partial(_region, which, document, machines) for which in REGIONS}
    return marked.rewrite(document, before, "benchmarks", regions)


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
        for (_, _, layout, factors, which, _), found in figures.items()
        if (layout, factors) == ("contiguous", "shared")
        if which in (FORWARD, BOTH)
        for row in found
        if row["rival"] != COPY
    ]


def _op(results: Results, document: Path) -> list[str]:
    """Contiguous, shared factors, and in a sentence the same under huge pages."""
    found = _what_most_call(results.plain(OP))
    if not found:
        return []
    measured = load.measured(found)
    columns = [
        label("dtype"),
        SHAPE,
        PASS,
        NAME,
        Column("ms", of("median_s", 1e3)),
        OVER_NATIVE,
        PEAK,
    ]
    notes = [f"{line}." for line in source(measured)]
    skipped = {f"{name(row)}: {text(row['skipped'])}" for row in found if row["skipped"]}
    notes += [f"Not measured: {why}." for why in sorted(skipped)]
    notes += _everywhere(results.plain(OP))
    figures = results.figures(OP)
    under = _what_most_call(_with_huge_pages(figures))
    if under and HUGE_PAGES not in found[0]["environment"].split():
        ratios = {rival: [r for r in under if r["rival"] == rival] for rival in (EAGER, COMPILE)}
        notes += _huge_pages(
            "time / mfops",
            {load.name(rival): (rows, f"over_{NATIVE}") for rival, rows in ratios.items()},
        )
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


def _with_huge_pages(figures: Figures) -> Figures:
    return {key: found for key, found in figures.items() if HUGE_PAGES in key[-1].split()}


def _huge_pages(what: str, ratios: dict[str, tuple[list[Row], str]]) -> list[str]:
    """The range of each ratio, a column of rows, under huge pages."""
    ranges, from_ = [], {}
    for title, (found, column) in ratios.items():
        known = {ratio: row for row in found if (ratio := number(row, column)) is not None}
        if known:
            ranges.append(f"{title} {min(known):.2f} to {max(known):.2f}")
        for row in known.values():
            from_[f"`{command(row)}`, commit {row['commit']}, {row['run'][:10]}"] = None
    if not ranges:
        return []
    return [
        "Where torch asks for huge pages for all of its memory, as mfops does for its outputs, "
        f"{what} is: {'; '.join(ranges)} ({'; '.join(from_)})."
    ]


def _factorizers(results: Results, document: Path) -> list[str]:
    """A line of ours for each figure: time and memory over rivals', the medians of all its runs."""
    bases = {"published": EAGER, "its best": BEST, "torch.compile": COMPILE}
    figures, earlier = results.plain(FACTORIZERS), results.earlier(FACTORIZERS)
    found, runs = [], 1
    for key, rows in figures.items():
        ours = next((row for row in load.measured(rows) if row["rival"] in (NATIVE, TRITON)), None)
        row = ours or next((row for row in rows if row["rival"] == NATIVE), None)
        if row is None:
            continue
        every = [*rows, *earlier[key]]
        own = [r for r in every if r["rival"] == row["rival"] and not r["skipped"]]
        runs = max(runs, len(own))
        times = {f"over_{base}": _typical(number(r, f"over_{base}") for r in own)
                 for base in bases.values()}  # fmt: skip
        peaks = {f"peak/{base}": _typical(_peak_ratio(every, r, base) for r in own)
                 for base in bases.values()}  # fmt: skip
        found.append({**row, **times, **peaks})
    if not found:
        return []
    columns = [SHAPE, label("dtype"), label("layout"), METHOD, PASS, NAME]
    columns.append(Column("ms", of("median_s", 1e3)))
    for what, column in (("time", "over_"), ("peak", "peak/")):
        columns += [
            Column(f"{what} / {title}", lambda row, cell=f"{column}{base}": row[cell])
            for title, base in bases.items()
        ]
        if what == "time":
            columns.append(PEAK)
    notes = [
        f"{line}." for line in source([r for rows in figures.values() for r in load.measured(rows)])
    ]
    if runs > 1:
        notes.insert(0, f"Ratios: the median of up to {runs} runs, each a process, and its range.")
    under = [row for rows in _with_huge_pages(results.figures(FACTORIZERS)).values()
             for row in load.measured(rows) if row["rival"] == NATIVE]  # fmt: skip
    notes += _huge_pages(
        "mfops's time", {f"over {t}": (under, f"over_{base}") for t, base in bases.items()}
    )
    return [*table(found, columns), *_notes(notes)]


def _typical(ratios: Iterable[float | None]) -> str:
    """The median and, of several, the range."""
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return "-"
    spread = f" ({min(known):.2f} to {max(known):.2f})" if known[1:] else ""
    return f"{statistics.median(known):.2f}{spread}"


def _peak_ratio(every: Iterable[Row], own: Row, base: str) -> float | None:
    """A row's peak memory over the base's in the same run."""
    of_base = next((r for r in every if (r["rival"], r["run"]) == (base, own["run"])), {})
    peak, whole = number(own, "peak_bytes"), number(of_base, "peak_bytes")
    return None if peak is None or not whole else peak / whole


def _contexts(results: Results, document: Path) -> list[str]:
    """A line for each context, at the size that comes first, with the ratios of both passes."""
    ratios = [(which, base) for which in (FORWARD, BOTH) for base in ("aspp", "em")]
    found = []
    for size, passes in list(load.context_passes(results).items())[:1]:
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
    lines = accuracy(results, least=2)
    picture = PLOTS["pareto"](results)
    if lines and isinstance(picture, Picture):
        lines += ["", image(picture, results, "pareto", document)]
    return _trained(lines, document)


def _ablation(results: Results, document: Path) -> list[str]:
    return _trained(ablation(results), document)


def _trained(lines: list[str], document: Path) -> list[str]:
    if not lines:
        return []
    page = os.path.relpath(PAGE, document.parent)
    what = (
        "Mean and standard deviation over the seeds, last epoch; ms: forward, batch 1. Every run's "
        f"machine, commit and command: [{PAGE}]({page})."
    )
    return [*lines, *_notes([what])]


def _paper(results: Results, document: Path) -> list[str]:
    lines = paper(results)
    rows = load.paper_counts(results).values()
    return [*lines, *_notes(f"{line}." for line in source(rows))]


def _pictures(results: Results, document: Path) -> list[str]:
    """What contexts cost."""
    picture = PLOTS["contexts"](results)
    if not isinstance(picture, Picture):
        return []
    page = os.path.relpath(PAGE, document.parent)
    where = f"All tables and plots, and where they are from: [{PAGE}]({page})."
    return [image(picture, results, "contexts", document), "", where]


REGIONS: dict[str, Callable[[Results, Path], list[str]]] = {
    "op": _op,
    "factorizers": _factorizers,
    "contexts": _contexts,
    "paper": _paper,
    "accuracy": _accuracy,
    "ablation": _ablation,
    "pictures": _pictures,
}
