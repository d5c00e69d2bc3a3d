"""Rows as Markdown: the page, with a table of each benchmark."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from benchmarks.report import data, targets
from benchmarks.report.data import OURS, Results, measured
from benchmarks.report.plots import PARTS, PLOTS
from benchmarks.rows import PROVENANCE
from benchmarks.schema import (
    ACCURACY,
    ACCURACY_COST,
    ATTENTION,
    BACKENDS,
    BENCHMARKS,
    CEILINGS,
    CONTEXTS,
    COPY,
    EAGER,
    FACTORIZERS,
    HOST,
    MFOPS,
    MODELS,
    NATIVE,
    OP,
    TRAINING,
    Benchmark,
)

PAGE, PICTURES = Path("docs/benchmarks.md"), Path("docs/benchmarks")
MIB = 2**-20

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


def number(column: str, scale: float = 1, form: str = "") -> Cell:
    return lambda row: show(row[column] * scale, form)


def label(column: str) -> Cell:
    return lambda row: text(row[column])


def name(row: Row) -> str:
    return text(data.name(row["baseline"]))


def shape(row: Row) -> str:
    return f"({', '.join(row['shape'].split())})"


def method(row: Row) -> str:
    return f"{row['method']}, T = {row['steps']}"


def milliseconds(row: Row) -> str:
    """Median and quartiles."""
    median, low, high = (show(row[column] * 1e3) for column in ("median_s", "q1_s", "q3_s"))
    return f"{median} [{low}, {high}]"


def over(base: str, title: str = "") -> dict[str, Cell]:
    return {f"time / {title or data.name(base)}": number(f"over_{base}", form=".2f")}


SHAPE: dict[str, Cell] = {"(B, C, K, N)": shape}
METHOD: dict[str, Cell] = {"method": method}
PASS = {"pass": label("pass")}
SETTING = {"setting": label("setting")}
MS: dict[str, Cell] = {"ms": milliseconds}
MEDIAN_MS = {"ms": number("median_s", 1e3)}
PEAK = {"peak MiB": number("peak_bytes", MIB)}
PARAMETERS = number("parameters", form=",.0f")
GFLOPS = number("flops", 1e-9, ".2f")


# Tables.


def markdown(cells: DataFrame, labels: int) -> str:
    """The first columns are labels, to the left, the others are numbers."""
    align = ["left"] * labels + ["right"] * (cells.shape[1] - labels)
    wide = cells.to_markdown(index=False, disable_numparse=True, colalign=align)
    # Without its padding: one wide cell would widen every line.
    return re.sub(" {2,}", " ", re.sub("-{3,}", "---", wide))


def table(found: DataFrame, labels: dict[str, Cell], numbers: dict[str, Cell]) -> str:
    """A line for each row; one that was not measured says why in place of its first number."""
    if found.empty:
        return ""
    lines = []
    for row in found.to_dict("records"):
        line = {title: cell(row) for title, cell in labels.items()}
        if why := row.get("skipped"):
            line |= dict.fromkeys(numbers, "-")
            line[next(iter(numbers))] = f"not measured: {text(why)}"
        else:
            line |= {title: cell(row) for title, cell in numbers.items()}
        lines.append(line)
    return markdown(DataFrame(lines), len(labels))


def by_title(found: DataFrame, title: Callable[[Row], str]) -> dict[str, DataFrame]:
    """Rows by what they have in common, the environment included."""
    titles = []
    for row in found.to_dict("records"):
        titles.append(", ".join(filter(None, [title(row), row["environment"]])))
    return dict(iter(found.groupby(Series(titles, index=found.index, dtype=str), sort=False)))


def titled(tables: dict[str, str]) -> str:
    return "\n\n".join(f"**{text(title)}**\n\n{own}" for title, own in tables.items() if own)


def folded(tables: dict[str, str]) -> str:
    return "\n".join(
        f"<details>\n<summary>{text(title)}</summary>\n\n{own}\n\n</details>"
        for title, own in tables.items()
    )


def environment(found: DataFrame) -> dict[str, Cell]:
    """A label, where some rows have one."""
    return {"environment": label("environment")} if found["environment"].any() else {}


# Where rows are from.


def command(row: Row) -> str:
    """With the environment it was run in."""
    return f"{row['environment']} {row['command']}".strip()


def source(found: DataFrame) -> str:
    """For each run that rows are from: device, versions, commit, date, command."""
    runs = found.drop_duplicates(list(PROVENANCE)).to_dict("records")
    lines = [
        f"{row['device']}; {row['versions']}; commit {row['commit']}; {row['run'][:10]}; "
        f"`{command(row)}`."
        for row in runs
    ]
    return "\n\n".join(map(wrapped, lines))


def wrapped(words: str) -> str:
    return textwrap.fill(words, 100, break_long_words=False, break_on_hyphens=False)


def sources(results: Results) -> str:
    """What the rows were measured on, then a line for each run of each benchmark."""
    every = pd.concat([results.of(b).assign(benchmark=b.name) for b in BENCHMARKS])
    runs = every.drop_duplicates(["benchmark", *PROVENANCE]).assign(skipped="")
    system = runs["device"] + "; CPU threads: " + runs["threads"]
    system += "; " + runs["versions"] + "; " + runs["built"]
    numbers, systems = pd.factorize(system)
    lines = [f"{number}. {text(words)}" for number, words in enumerate(systems, start=1)]
    labels: dict[str, Cell] = {
        "rows of": label("benchmark"),
        "run": label("run"),
        "commit": label("commit"),
        "on": lambda row: str(row["on"] + 1),
        "command": lambda row: f"`{command(row)}`".replace("|", "\\|"),
    }
    return "\n".join([*lines, "", table(runs.assign(on=numbers), labels, {})])


# The page's sections.


def ceilings(results: Results) -> str:
    def rate(row: Row) -> str:
        return f"{show(row['rate'] * 1e-9)} {'GB/s' if row['baseline'] == COPY else 'GFLOP/s'}"

    found = results.of(CEILINGS)
    labels = {"dtype": label("dtype"), **environment(found), "of": name}
    return table(found, labels, {"rate": rate, **MS})


OPERATION: dict[str, Cell] = {  # what is measured of baselines in calls with a copy
    **MS,
    **over(NATIVE, "mfops"),
    "of the copy": lambda row: show(1 / row[f"over_{COPY}"], ".0%"),
    "bytes / floor": lambda row: show(row["moved_bytes"] / row["floor_bytes"], ".2f"),
    **PEAK,
    "extra, of X": lambda row: show(row["extra_bytes"] / row["x_bytes"], ".1%"),
}


def op(results: Results) -> str:
    """What a GPU has to reach, and a table for each dtype, layout and kind of factors."""
    groups = by_title(
        results.of(OP), lambda row: f"{row['dtype']}, {row['layout']}, {row['factors']} factors"
    )
    tables = {t: table(own, SHAPE | PASS | {"op": name}, OPERATION) for t, own in groups.items()}
    required = targets.of_op(results) if groups and not results.cpu else DataFrame()
    return joined(late(results, OP), target_table(required), folded(tables))


def factorizers(results: Results) -> str:
    """What has to be reached, and a table for each dtype and layout."""
    found = results.of(FACTORIZERS)
    if found.empty:
        return ""
    # What one operator reads again and again inside is not counted as moved.
    found = found.assign(moved_bytes=found["moved_bytes"].mask(found["baseline"].isin(OURS)))
    groups = by_title(found, lambda row: f"{row['dtype']}, {row['layout']}")
    labels = SHAPE | METHOD | PASS | {"op": name}
    tables = {title: table(own, labels, OPERATION) for title, own in groups.items()}
    required = target_table(targets.of_factorizers(results))
    return joined(late(results, FACTORIZERS), required, folded(tables))


def joined(*parts: str) -> str:
    return "\n\n".join(filter(None, parts))


def target_table(required: DataFrame) -> str:
    return "" if required.empty else markdown(required, labels=4)


def late(results: Results, benchmark: Benchmark) -> str:
    """Calls of a GPU in whose time the host's own may be."""
    found = measured(results.of(benchmark))
    calls = found["rounds"].sum()
    count = found.drop_duplicates([*benchmark.case, "environment"])["late"].sum()
    return (
        f"Calls not queued when the GPU came to them: {count:.0f} of {calls:.0f}." if count else ""
    )


def host(results: Results) -> str:
    found = results.of(HOST)
    labels = {**SHAPE, "dtype": label("dtype"), "mode": label("mode"), **environment(found)}
    numbers = {"us": number("median_s", 1e6), **over(EAGER, "eager")}
    return table(found, labels | {"op": name}, numbers)


def attention(results: Results) -> str:
    found = results.of(ATTENTION)
    labels = {"operation": label("operation"), **SHAPE, "dtype": label("dtype")}
    labels |= {"layout": label("layout"), **PASS, **environment(found), "lines": name}
    return table(found, labels, MS | over(MFOPS))


def contexts(results: Results) -> str:
    def title(row: Row) -> str:
        channels = f"{row['in_channels']} to {row['out_channels']} channels"
        return f"{channels}, batch {row['batch']}, {row['dtype']}"

    numbers = {**MS, **over("aspp"), **over("em"), "parameters": PARAMETERS, "GFLOPs": GFLOPS}
    labels = {"size": label("size"), **PASS, "context": name, **SETTING}
    groups = by_title(results.of(CONTEXTS), title)
    return titled({title: table(own, labels, numbers | PEAK) for title, own in groups.items()})


def models(results: Results) -> str:
    labels = {**PASS, "network": name, "input": label("input"), **SETTING}
    numbers = {"parameters": PARAMETERS, "GFLOPs / image": GFLOPS, **MS}
    numbers |= {"images/s": number("images_per_s"), **over("deeplabv3plus"), **over("emanet")}
    return whole_networks(results.of(MODELS), labels, numbers | PEAK)


def backends(results: Results) -> str:
    labels = {"network": label("network"), **PASS, "backend": name, **SETTING}
    return whole_networks(results.of(BACKENDS), labels, MS | over(MFOPS) | PEAK)


def whole_networks(found: DataFrame, labels: dict[str, Cell], numbers: dict[str, Cell]) -> str:
    groups = by_title(
        found, lambda r: f"{r['backbone']}, {r['size']}, batch {r['batch']}, {r['dtype']}"
    )
    return titled({title: table(own, labels, numbers) for title, own in groups.items()})


def training(results: Results) -> str:
    def part(column: str) -> Cell:
        def cell(row: Row) -> str:
            whole = sum(row[c] for c in PARTS)
            return (
                "-" if pd.isna(whole) else f"{show(row[column] * 1e3)} ({row[column] / whole:.0%})"
            )

        return cell

    numbers = {"images/s": number("images_per_s"), **MS, **over("deeplabv3plus")}
    numbers |= {f"{title} ms": part(column) for column, title in PARTS.items()}
    groups = by_title(results.of(TRAINING), training_title)
    return titled({t: table(own, {"network": name}, numbers) for t, own in groups.items()})


def accuracy(results: Results) -> str:
    return score_tables(results, data.networks)


def ablation(results: Results) -> str:
    """MFNet Light with one part exchanged or left out, beside itself."""
    return score_tables(results, data.light_and_variants)


def score_tables(results: Results, shown: Callable[[DataFrame], DataFrame]) -> str:
    """A table for each recipe; runs that were skipped come last."""
    runs = results.of(ACCURACY)
    skipped = runs[runs["skipped"] != ""]
    skipped = skipped.assign(runs=[f"seed {seed:.0f}" for seed in skipped["seed"]])
    scores = data.scores(results)
    every = pd.concat([scores.assign(runs=scores["runs"].astype(str), skipped=""), skipped])
    tables = {}
    for key, title in data.recipe_titles(results).items():
        found = shown(data.of_recipe(every, key))
        tables[title] = score_table(found)
    return titled(tables)


def score_table(found: DataFrame) -> str:
    labels = {"context or network": name, "runs": label("runs")}
    numbers: dict[str, Cell] = {
        f"{title} (sd)": mean_and_deviation(column)
        for column, title in (("mIoU", "mIoU"), ("fwIoU", "fwIoU"), ("accuracy", "pixel acc."))
    }
    numbers |= {"parameters": PARAMETERS, "GFLOPs": GFLOPS}
    if found["median_s"].notna().any():
        bases = [base for base in ACCURACY_COST.bases if found[f"over_{base}"].notna().any()]
        numbers |= MEDIAN_MS | (over(bases[0]) if bases else {})
    return table(found, labels, numbers)


def mean_and_deviation(column: str) -> Cell:
    return lambda row: f"{row[column]:.3f} ({show(row[f'{column}_sd'], '.3f')})"


def paper(results: Results) -> str:
    """The paper's table beside what is counted here."""
    labels: dict[str, Cell] = {
        "network": name,
        "paper: mIoU / fwIoU": lambda row: f"{row['mIoU']} / {row['fwIoU']}",
        "paper: parameters": lambda row: f"{row['printed']} M",
    }
    numbers = {"counted: parameters": PARAMETERS, "counted: GFLOPs": GFLOPS}
    return table(data.paper_counts(results), labels, numbers)


def training_title(row: Row) -> str:
    return (
        f"{row['data']}, {row['backbone']}, {row['size']}, batch {row['batch']}, "
        f"{row['precision']}, loader workers: {row['workers']}"
    )


SECTIONS: dict[str, tuple[Callable[[Results], str], str]] = {  # title: table, plot
    "Where the rows are from": (sources, ""),
    "Ceilings": (ceilings, ""),
    "The op": (op, "roofline"),
    "Factorizers": (factorizers, "factorizers"),
    "Host": (host, ""),
    "Gather and distribute": (attention, ""),
    "Contexts": (contexts, "contexts"),
    "Networks": (models, "models"),
    "Networks, with and without kernels": (backends, ""),
    "Training": (training, "training"),
    "Accuracy": (accuracy, "pareto"),
    "MFNet Light, a part at a time": (ablation, ""),
    "The paper's Figure 6": (paper, "paper"),
}


def page(machines: list[Results]) -> str:
    """Every section that has rows, machine by machine."""
    blocks = []
    for results in machines:
        blocks.append(f"## {results.machine}")
        missing = []
        for title, (section, plot) in SECTIONS.items():
            if body := section(results):
                blocks += [f"### {title}", image(results, plot, PAGE) if plot else "", body]
            else:
                missing.append(f"- {title}")
        if missing:
            blocks += ["### No rows yet", "\n".join(missing)]
    return joined(*blocks)


def image(results: Results, plot: str, document: Path) -> str:
    picture = PLOTS[plot](results)
    if picture is None:
        return ""
    path = os.path.relpath(PICTURES / f"{results.machine}-{plot}.png", document.parent)
    return f"![{picture.alt}]({path})"
