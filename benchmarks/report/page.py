"""Rows as Markdown: the page, and tables in other documents, each a `Table` by its header."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from benchmarks import schema
from benchmarks.kernels import BOTH, FORWARD
from benchmarks.report import data, targets
from benchmarks.report.data import OURS, RECIPE, Results, measured
from benchmarks.report.plots import PARTS, picture
from benchmarks.rows import PROVENANCE
from benchmarks.schema import BEST, COMPILE, COPY, EAGER, NATIVE, TRITON, Benchmark

PAGE, PICTURES = Path("docs/benchmarks.md"), Path("docs/benchmarks")
# Whose rows documents show where several machines have some; without it the first by name. MFNet
# Light was timed with its 8 bases on the second alone.
PREFERRED, OF_LIGHT = "amd-epyc-2-threads", "intel-r-xeon-r-processor-2-threads"

Row = dict[str, Any]
Cell = Callable[[Row], str]


# Cells.


def text(value: str) -> str:
    """As it is, on a page and in a table."""
    return value.replace("<", "&lt;").replace("|", "\\|")


def show(value: float, form: str = "") -> str:
    """A number with three digits that count, or in the form given; "-" for none."""
    if pd.isna(value):
        return "-"
    if form:
        return format(value, form)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".removesuffix(".")


def number(column: str, scale: float = 1, form: str = "", per: str = "") -> Cell:
    return lambda row: show(row.get(column, float("nan")) * scale / (row[per] if per else 1), form)


def with_quartiles(row: Row) -> str:
    median, low, high = (show(row[column] * 1e3) for column in ("median_s", "q1_s", "q3_s"))
    return f"{median} [{low}, {high}]"


def mean_and_deviation(column: str) -> Cell:
    return lambda row: f"{row[column]:.3f} ({show(row[f'{column}_sd'], '.3f')})"


def part(column: str) -> Cell:
    """Of a training step, with its share."""

    def cell(row: Row) -> str:
        share = row[column] / sum(row[c] for c in PARTS)
        return "-" if pd.isna(share) else f"{show(row[column] * 1e3)} ({share:.0%})"

    return cell


def rate(row: Row) -> str:
    unit = "GB/s" if row["baseline"] == COPY else "GFLOP/s"
    return f"{show(row['rate'] * 1e-9)} {unit}"


def command(row: Row) -> str:
    """With the environment it was run in."""
    return f"`{row['environment']} {row['command']}`".replace("` ", "`")


# By their titles; others are columns of text.
COLUMNS: dict[str, Cell] = {
    **dict.fromkeys(["baseline", "model"], lambda row: text(data.name(row["baseline"]))),
    "(B, C, K, N)": lambda row: f"({', '.join(row['shape'].split())})",
    "method": lambda row: f"{row['method']}, T = {row['steps']}",
    "ms": number("median_s", 1e3),
    "us": number("median_s", 1e6),
    "ms [quartiles]": with_quartiles,
    "rate": rate,
    **{
        f"time / {data.name(base)}": number(f"over_{base}", form=".2f")
        for benchmark in schema.BENCHMARKS
        for base in benchmark.bases
    },
    **{
        f"{which}: time / {data.name(base)}": number(f"{which}/{base}", form=".2f")
        for which in (FORWARD, BOTH)
        for base in schema.CONTEXTS.bases
    },
    "of the copy": lambda row: show(1 / row[f"over_{COPY}"], ".0%"),
    "bytes / floor": number("moved_bytes", form=".2f", per="floor_bytes"),
    "extra, of X": number("extra_bytes", form=".1%", per="x_bytes"),
    "peak MiB": number("peak_bytes", 2**-20),
    "images/s": number("images_per_s"),
    "parameters": number("parameters", form=",.0f"),
    "GFLOPs": number("flops", 1e-9, ".2f"),
    **{f"{title} ms": part(column) for column, title in PARTS.items()},
    "runs": lambda row: f"seed {row['seed']:.0f}" if row["skipped"] else f"{row['runs']:.0f}",
    "mIoU (sd)": mean_and_deviation("mIoU"),
    "fwIoU (sd)": mean_and_deviation("fwIoU"),
    "pixel acc. (sd)": mean_and_deviation("accuracy"),
    "paper: mIoU / fwIoU": lambda row: f"{row['mIoU']} / {row['fwIoU']}",
    "paper: parameters": lambda row: f"{row['printed']} M",
    "command": lambda row: command(row).replace("|", "\\|"),
}


def cell(title: str, row: Row) -> str:
    if title in COLUMNS:
        return COLUMNS[title](row)
    return "-" if pd.isna(row[title]) else text(row[title])


# Tables.


@dataclass(frozen=True)
class Table:
    """What columns of which rows: "labels | on the left || numbers | on the right", by COLUMNS.

    Rows with the same `by`, a format of their columns, and the same environment have a table of
    their own. `plot` names the picture above them, `head` writes what stands between. Columns that
    rows have whose titles end with `also` are numbers, too.
    """

    rows: Callable[[Results], DataFrame]
    header: str
    by: str = ""
    plot: str = ""
    head: Callable[[Results], str] = lambda results: ""
    folded: bool = False
    also: str = ""

    def markdown(self, results: Results, document: Path) -> str:
        """Nothing where there are no rows. Documents but for the page name the rows' runs."""
        found = self.rows(results)
        if found.empty:
            return ""
        labels, numbers = (part.split(" | ") if part else [] for part in self.header.split(" || "))
        numbers += [title for title in found if self.also and title.endswith(self.also)]
        form, between = "**{}**\n\n{}", "\n\n"
        if self.folded:
            form, between = "<details>\n<summary>{}</summary>\n\n{}\n\n</details>", "\n"
        tables = [
            form.format(text(title), lines) if title else lines
            for title, own in titled(found, self.by).items()
            if (lines := table(own, labels, numbers))
        ]
        return joined(
            image(results, self.plot, document) if self.plot else "",
            self.head(results),
            between.join(tables),
            source(found) if document != PAGE else "",
        )


def table(found: DataFrame, labels: list[str], numbers: list[str]) -> str:
    """A line for each row; one that was not measured says why in place of its first number.

    Numbers that no row has are left out.
    """
    lines = []
    for row in found.to_dict("records"):
        why = row.get("skipped")
        line = {title: cell(title, row) for title in labels} | dict.fromkeys(numbers, "-")
        line |= {title: cell(title, row) for title in numbers if not why}
        if why:
            line[numbers[0]] = f"not measured: {text(why)}"
        lines.append(line)
    cells = DataFrame(lines)
    known = cells[numbers].ne("-").any()
    return markdown(cells[[*labels, *known.index[known]]], len(labels))


def markdown(cells: DataFrame, labels: int) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (cells.columns, *cells.to_numpy())]
    lines.insert(1, "|" + ":---|" * labels + "---:|" * (cells.shape[1] - labels))
    return "\n".join(lines)


def titled(found: DataFrame, by: str) -> dict[str, DataFrame]:
    """Rows by what they have in common, the environment included."""
    titles = [
        ", ".join(filter(None, [by.format_map(row), row.get("environment")]))
        for row in found.to_dict("records")
    ]
    return dict(iter(found.groupby(Series(titles, index=found.index, dtype=str), sort=False)))


def joined(*parts: str) -> str:
    return "\n\n".join(filter(None, parts))


def source(found: DataFrame) -> str:
    """For each run that rows are from: device, versions, commit, date, command."""
    if "command" not in found:
        return ""
    lines = [
        f"{row['device']}; {row['versions']}; commit {row['commit']}; {row['run'][:10]}; "
        f"{command(row)}."
        for row in measured(found).drop_duplicates(list(PROVENANCE)).to_dict("records")
    ]
    fill = partial(textwrap.fill, width=100, break_long_words=False, break_on_hyphens=False)
    return joined(*map(fill, lines))


def image(results: Results, plot: str, document: Path) -> str:
    path = os.path.relpath(PICTURES / f"{results.machine}-{plot}.png", document.parent)
    found = picture(plot, results)
    return f"![{found.title}]({path})" if found else ""


# Rows.


def rows_of(benchmark: Benchmark) -> Callable[[Results], DataFrame]:
    return lambda results: results.of(benchmark)


def runs(results: Results) -> DataFrame:
    """Each run of each benchmark, with the system it ran on and its number."""
    every = pd.concat([results.of(b).assign(benchmark=b.name) for b in schema.BENCHMARKS])
    here = every["run"].isin(pd.concat(list(results.every.values()))["run"])
    found = every[here].drop_duplicates(["benchmark", *PROVENANCE]).assign(skipped="")
    found["system"] = found["device"] + "; CPU threads: " + found["threads"]
    found["system"] += "; " + found["versions"] + "; " + found["built"]
    found["on"] = (pd.factorize(found["system"])[0] + 1).astype(str)
    found["command"] = (found["environment"] + " " + found["command"]).str.strip()
    return found.assign(environment="")


def systems(results: Results) -> str:
    known = runs(results).drop_duplicates("on")
    return "\n".join(known["on"] + ". " + known["system"].map(text))


def factorizers(results: Results) -> DataFrame:
    """What one operator reads again and again inside is not counted as moved."""
    found = results.of(schema.FACTORIZERS)
    return found.assign(moved_bytes=found["moved_bytes"].mask(found["baseline"].isin(OURS)))


def shared_contiguous(results: Results) -> DataFrame:
    """The op as most call it."""
    found = measured(results.plain(schema.OP))
    found = found[(found["layout"] == "contiguous") & (found["factors"] == "shared")]
    return found[found["pass"].isin([FORWARD, BOTH]) & (found["baseline"] != COPY)]


ACROSS = "mIoU, mean (sd), runs"
OTHERS = {"published": EAGER, "its best": BEST, "compile": COMPILE}


def ours_over_others(results: Results) -> DataFrame:
    """Our line of each case of the factorizers: time and memory over baselines', medians and
    ranges of all its runs."""
    newest, every = results.plain(schema.FACTORIZERS), results.runs(schema.FACTORIZERS)
    case = list(schema.FACTORIZERS.case)
    ours = newest[newest["baseline"].isin([NATIVE, TRITON])]
    measured_first = ours.sort_values("skipped", kind="stable", key=lambda why: why != "")
    ours = measured_first.drop_duplicates(case).sort_index()
    peaks = every.pivot_table("peak_bytes", [*case, "run"], "baseline", aggfunc="first")
    runs = ours[[*case, "baseline"]].merge(measured(every), on=[*case, "baseline"])
    for title, base in OTHERS.items():
        runs[f"time / {title}"] = runs[f"over_{base}"]
        others = peaks.reindex(columns=[base]).rename(columns={base: "other"})
        runs[f"peak / {title}"] = runs["peak_bytes"] / runs.join(others, [*case, "run"])["other"]
    ratios = list(runs.filter(regex="^(time|peak) / "))
    typical = runs.groupby(case)[ratios].agg(median_and_range).reset_index()
    return ours.merge(typical, "left", case)


def median_and_range(ratios: Series) -> str:
    """The median and, of several, the range."""
    known = ratios.dropna()
    spread = f" ({known.min():.2f} to {known.max():.2f})" if len(known) > 1 else ""
    return f"{known.median():.2f}{spread}" if len(known) else "-"


def smallest_contexts(results: Results) -> DataFrame:
    found = data.context_passes(results)
    return found[found["size"] == found["size"].iloc[0]] if len(found) else found


def across_data_sets(results: Results) -> DataFrame:
    """A line for each network, with its scores on each data set under the recipe that the most
    networks were trained with, two at least. Costs are at the size of the first one's images."""
    every = data.networks(measured(data.scores(results)))
    recipes = every.groupby(RECIPE, sort=False).size()
    parts: list[DataFrame] = []
    for name, recipe in recipes[recipes > 1].groupby("data", sort=False).idxmax().items():
        own = every[(every[RECIPE] == list(recipe)).all(axis=1)]
        scores = [f"{cell('mIoU (sd)', row)}, {row['runs']:.0f}" for row in own.to_dict("records")]
        own = own if not parts else own[["baseline", "skipped"]]
        parts.append(own.assign(**{f"{name} {ACROSS}": scores}))
    return (
        pd.concat([every.head(0), *parts]).groupby("baseline", sort=False, as_index=False).first()
    )


def late(results: Results, benchmark: Benchmark) -> str:
    """Calls of a GPU in whose time the host's own may be."""
    found = measured(results.of(benchmark))
    count = found.drop_duplicates([*benchmark.case, "environment"])["late"].sum()
    calls = f"{count:.0f} of {found['rounds'].sum():.0f}"
    return f"Calls not queued when the GPU came to them: {calls}." if count else ""


def required(benchmark: Benchmark) -> Callable[[Results], str]:
    """What the benchmark has to reach on the machine."""

    def head(results: Results) -> str:
        found = targets.of(results, benchmark)
        return joined(late(results, benchmark), markdown(found, 4) if len(found) else "")

    return head


# The page, and the regions of documents.

SHAPE = "(B, C, K, N)"
TIMED = (
    "ms [quartiles] | time / mfops (native) | of the copy | bytes / floor | peak MiB | extra, of X"
)
SCORES = "model | runs || mIoU (sd) | fwIoU (sd) | pixel acc. (sd) | parameters | GFLOPs | ms"
SCORES += " | time / MFNet Light | time / ASPP"
NETWORK = "{backbone}, {size}, batch {batch}, {dtype}"

SECTIONS = {
    "Where the rows are from": Table(
        runs, "benchmark | run | commit | on | command || ", head=systems
    ),
    "Ceilings": Table(rows_of(schema.CEILINGS), "dtype | baseline || rate | ms [quartiles]"),
    "The op": Table(
        rows_of(schema.OP),
        f"{SHAPE} | pass | baseline || {TIMED}",
        by="{dtype}, {layout}, {factors} factors",
        plot="roofline",
        head=required(schema.OP),
        folded=True,
    ),
    "Factorizers": Table(
        factorizers,
        f"{SHAPE} | method | pass | baseline || {TIMED}",
        by="{dtype}, {layout}",
        plot="factorizers",
        head=required(schema.FACTORIZERS),
        folded=True,
    ),
    "Host": Table(
        rows_of(schema.HOST),
        f"{SHAPE} | dtype | mode | baseline || us | time / eager, as published",
        head=required(schema.HOST),
    ),
    "Gather and distribute": Table(
        rows_of(schema.ATTENTION),
        f"operation | {SHAPE} | dtype | layout | pass | baseline || ms [quartiles] | time / mfops",
    ),
    "Contexts": Table(
        rows_of(schema.CONTEXTS),
        "size | pass | baseline | setting || ms [quartiles] | time / ASPP | time / EM | parameters"
        " | GFLOPs | peak MiB",
        by="{in_channels} to {out_channels} channels, batch {batch}, {dtype}",
        plot="contexts",
    ),
    "Networks": Table(
        rows_of(schema.MODELS),
        "pass | model | input | setting || parameters | GFLOPs | ms [quartiles] | images/s"
        " | time / DeepLabV3+ | time / EMANet | peak MiB",
        by=NETWORK,
        plot="models",
    ),
    "Networks, with and without kernels": Table(
        rows_of(schema.BACKENDS),
        "network | pass | baseline | setting || ms [quartiles] | time / mfops | peak MiB",
        by=NETWORK,
    ),
    "Deployment": Table(
        rows_of(schema.DEPLOYMENT),
        "network | size | baseline || ms [quartiles] | time / PyTorch",
    ),
    "Training": Table(
        rows_of(schema.TRAINING),
        "model || images/s | ms [quartiles] | time / DeepLabV3+ | loader ms | forward ms"
        " | backward ms | optimizer ms | other ms",
        by="{data}, {backbone}, {size}, batch {batch}, {precision}, loader workers: {workers}",
        plot="training",
    ),
    "Accuracy": Table(
        lambda results: data.networks(data.scores(results)), SCORES, by="{title}", plot="pareto"
    ),
    "MFNet Light, a part at a time": Table(
        lambda results: data.light_and_variants(data.scores(results)), SCORES, by="{title}"
    ),
    "The paper's Figure 6": Table(
        data.paper_counts,
        "model | paper: mIoU / fwIoU | paper: parameters || parameters | GFLOPs",
        plot="paper",
    ),
}
REGIONS = {
    "op": Table(
        shared_contiguous,
        f"dtype | {SHAPE} | pass | baseline || ms | time / mfops (native) | peak MiB",
    ),
    "factorizers": Table(
        ours_over_others,
        f"{SHAPE} | dtype | layout | method | pass | baseline || ms | time / published"
        " | time / its best | time / compile | peak MiB | peak / published | peak / its best"
        " | peak / compile",
    ),
    "contexts": Table(
        smallest_contexts,
        "size | baseline || parameters | GFLOPs | forward: time / ASPP | forward: time / EM"
        " | forward + backward: time / ASPP | forward + backward: time / EM",
    ),
    "paper": SECTIONS["The paper's Figure 6"],
    "accuracy": Table(
        across_data_sets,
        "model || parameters | GFLOPs | time / MFNet Light",
        also=ACROSS,
        plot="pareto",
    ),
    "ablation": SECTIONS["MFNet Light, a part at a time"],
}


def page(machines: list[Results]) -> str:
    """Every section that has rows, machine by machine."""
    blocks = []
    for results in machines:
        sections = {title: own.markdown(results, PAGE) for title, own in SECTIONS.items()}
        blocks.append(f"## {results.machine}")
        blocks += [joined(f"### {title}", body) for title, body in sections.items() if body]
        if missing := [f"- {title}" for title, body in sections.items() if not body]:
            blocks += ["### No rows yet", "\n".join(missing)]
    return joined(*blocks)


def region(which: str, document: Path, machines: list[Results]) -> list[str]:
    """The page, or a table of the first machine that has rows for it."""
    if which == "page":
        return page(machines).splitlines()
    preferred = OF_LIGHT if which in ("accuracy", "ablation") else PREFERRED
    for results in sorted(machines, key=lambda r: (r.machine != preferred, r.machine)):
        if words := REGIONS[which].markdown(results, document):
            return words.splitlines()
    return ["No rows yet."]
