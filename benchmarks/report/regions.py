"""The parts of documents that rows give: the page, and tables with where they are from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from pandas import DataFrame, Series

from benchmarks.kernels import BOTH, FORWARD
from benchmarks.report import data
from benchmarks.report.data import RECIPE, Results, measured
from benchmarks.report.page import (
    GFLOPS,
    MEDIAN_MS,
    METHOD,
    PAGE,
    PARAMETERS,
    PASS,
    PEAK,
    SHAPE,
    Cell,
    Row,
    ablation,
    image,
    joined,
    label,
    markdown,
    mean_and_deviation,
    name,
    number,
    over,
    page,
    paper,
    shape,
    source,
    table,
    wrapped,
)
from benchmarks.schema import BEST, COMPILE, COPY, EAGER, FACTORIZERS, LIGHT, NATIVE, OP, TRITON

# Whose rows are shown where several machines have some; without it the first by name.
PREFERRED = "amd-epyc-2-threads"
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE=1"


def op_region(results: Results, document: Path) -> str:
    """Contiguous, shared factors; of all cases how often mfops is the fastest; huge pages."""
    every = results.plain(OP)
    shown = measured(what_most_call(every))
    if shown.empty:
        return ""
    labels = {"dtype": label("dtype"), **SHAPE, **PASS, "op": name}
    own = table(shown, labels, MEDIAN_MS | over(NATIVE, "mfops") | PEAK)
    under = what_most_call(with_huge_pages(results.of(OP)))
    ratios = {
        f"{data.name(base)} / mfops": under[under["baseline"] == base][f"over_{NATIVE}"]
        for base in (EAGER, COMPILE)
    }
    return joined(own, source(shown), all_cases(every), huge_pages(under, ratios))


def what_most_call(found: DataFrame) -> DataFrame:
    return found[
        (found["layout"] == "contiguous")
        & (found["factors"] == "shared")
        & found["pass"].isin([FORWARD, BOTH])
        & (found["baseline"] != COPY)
    ]


def all_cases(found: DataFrame) -> str:
    """How often mfops is the fastest, and where it is least so: a table shows but a part."""
    others = measured(found[~found["baseline"].isin([NATIVE, TRITON, COPY])])
    others = others.dropna(subset=f"over_{NATIVE}")
    if others.empty:
        return ""
    best = others.loc[others.groupby(list(OP.case))[f"over_{NATIVE}"].idxmin()]
    row = best.loc[best[f"over_{NATIVE}"].idxmin()].to_dict()
    case = f"{shape(row)}, {row['dtype']}, {row['layout']}, {row['factors']} factors, {row['pass']}"
    cells = {
        "cases": str(len(best)),
        "mfops is the fastest in": str((best[f"over_{NATIVE}"] > 1).sum()),
        "at worst": f"{name(row)}, time / mfops {row[f'over_{NATIVE}']:.2f}: {case}",
    }
    return markdown(DataFrame([cells]), labels=3)


def with_huge_pages(found: DataFrame) -> DataFrame:
    return found[[HUGE_PAGES in words.split() for words in found["environment"]]]


def huge_pages(found: DataFrame, ratios: dict[str, Series]) -> str:
    """The range of each ratio under huge pages."""
    lines = [
        {f"time, {HUGE_PAGES}": title, "from": f"{own.min():.2f}", "to": f"{own.max():.2f}"}
        for title, own in ratios.items()
        if own.notna().any()
    ]
    return joined(markdown(DataFrame(lines), 1), source(measured(found))) if lines else ""


def factorizer_region(results: Results, document: Path) -> str:
    """Our line of each case: time and memory over baselines', medians of all its runs."""
    bases = {"published": EAGER, "its best": BEST, "torch.compile": COMPILE}
    newest, every = results.plain(FACTORIZERS), results.runs(FACTORIZERS)
    if newest.empty:
        return ""
    case = list(FACTORIZERS.case)
    ours = newest[newest["baseline"].isin([NATIVE, TRITON])]
    ours = ours.assign(first=ours["skipped"] != "").sort_values("first", kind="stable")
    ours = ours.drop_duplicates(case).sort_index()
    peaks = every[[*case, "run", "baseline", "peak_bytes"]]
    runs = ours[[*case, "baseline"]].merge(measured(every), on=[*case, "baseline"])
    for base in bases.values():
        of_base = peaks[peaks["baseline"] == base].drop(columns="baseline")
        runs = runs.merge(of_base, "left", [*case, "run"], suffixes=("", f"_{base}"))
        runs[f"peak/{base}"] = runs["peak_bytes"] / runs[f"peak_bytes_{base}"]
    columns = [f"{what}{base}" for what in ("over_", "peak/") for base in bases.values()]
    typical = runs.groupby(case, sort=False)[columns].agg(median_and_range).reset_index()
    found = ours.drop(columns=columns, errors="ignore").merge(typical, "left", on=case)
    labels = {**SHAPE, "dtype": label("dtype"), "layout": label("layout"), **METHOD, **PASS}
    numbers = MEDIAN_MS | {f"time / {t}": label(f"over_{base}") for t, base in bases.items()}
    numbers |= PEAK | {f"peak / {t}": label(f"peak/{base}") for t, base in bases.items()}
    under = with_huge_pages(results.of(FACTORIZERS))
    under = under[under["baseline"] == NATIVE]
    ratios = {f"mfops / {title}": under[f"over_{base}"] for title, base in bases.items()}
    return joined(
        table(found, labels | {"op": name}, numbers),
        source(measured(newest)),
        huge_pages(under, ratios),
    )


def median_and_range(ratios: Series) -> str:
    """The median and, of several, the range."""
    known = ratios.dropna()
    spread = f" ({known.min():.2f} to {known.max():.2f})" if len(known) > 1 else ""
    return f"{known.median():.2f}{spread}" if len(known) else "-"


def context_region(results: Results, document: Path) -> str:
    """A line for each context, at the size that comes first, with the ratios of both passes."""
    found = data.context_passes(results)
    found = found[found["size"] == found["size"].iloc[0]] if len(found) else found
    labels = {"size": label("size"), "context": name}
    numbers = {"parameters": PARAMETERS, "GFLOPs, forward": GFLOPS}
    for which in (FORWARD, BOTH):
        for base in ("aspp", "em"):
            title = f"{which}: time / {data.name(base)}"
            numbers[title] = number(f"{which}/{base}", form=".2f")
    return joined(table(found, labels, numbers), source(found))


def paper_region(results: Results, document: Path) -> str:
    return joined(paper(results), source(data.paper_counts(results)))


DATA_SETS = {"camvid": "CamVid", "voc_animals": "VOC animals"}


def accuracy_region(results: Results, document: Path) -> str:
    """The picture, and one table of all data sets, of each the recipe with the most networks."""
    chosen: dict[str, DataFrame] = {}
    every = data.networks(data.scores(results))
    for key in data.recipe_titles(results):
        own = data.of_recipe(every, key)
        if len(own) > max(1, len(chosen.get(key[0], ()))):
            chosen[key[0]] = own
    if not chosen:
        return ""
    first = next(iter(chosen))
    found = pd.concat(chosen.values()).drop_duplicates("baseline")
    costs = ["parameters", "flops", f"over_{LIGHT}"]
    found[costs] = found[costs].where(found["data"] == first)  # of one size of images
    size = " x ".join(chosen[first]["size"].iloc[0].split("x"))
    numbers = {
        "parameters": PARAMETERS,
        f"GFLOPs ({data_set(first)}, {size})": GFLOPS,
        **over(LIGHT),
    }
    for which, own in chosen.items():
        by_network = own.set_index("baseline").to_dict("index")
        numbers[f"{data_set(which)} mIoU, mean (sd), runs"] = mean_over_runs(by_network)
    titles = data.recipe_titles(results)
    recipes = [titles[tuple(own[RECIPE].iloc[0])] for own in chosen.values()]
    return joined(
        image(results, "pareto", document),
        table(found, {"network": name}, numbers),
        wrapped(f"{'; '.join(recipes)}; last epoch; time: forward, batch 1. {trained(document)}"),
    )


def data_set(folder: str) -> str:
    return DATA_SETS.get(folder, folder)


def mean_over_runs(by_network: dict[str, Row]) -> Cell:
    def cell(row: Row) -> str:
        own = by_network.get(row["baseline"])
        return f"{mean_and_deviation('mIoU')(own)}, {own['runs']}" if own else "-"

    return cell


def trained(document: Path) -> str:
    """Where training runs are from."""
    link = f"[{PAGE}]({os.path.relpath(PAGE, document.parent)})"
    return f"Every run's machine, commit and command: {link}."


def ablation_region(results: Results, document: Path) -> str:
    tables = ablation(results)
    return joined(tables, wrapped(trained(document))) if tables else ""


REGIONS: dict[str, Callable[[Results, Path], str]] = {
    "op": op_region,
    "factorizers": factorizer_region,
    "contexts": context_region,
    "paper": paper_region,
    "accuracy": accuracy_region,
    "ablation": ablation_region,
}


def region(which: str, document: Path, machines: list[Results]) -> list[str]:
    """The page, or a region's rows of the first machine that has some."""
    if which == "page":
        return page(machines).splitlines()
    for results in sorted(machines, key=lambda r: (r.machine != PREFERRED, r.machine)):
        if words := REGIONS[which](results, document):
            return words.splitlines()
    return ["No rows yet."]
