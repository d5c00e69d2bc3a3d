"""The rows that stand, machine by machine, as a table of each benchmark."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from pandas import DataFrame

from benchmarks import rows
from benchmarks.kernels import BOTH, FORWARD
from benchmarks.rows import PROVENANCE, RUNS
from benchmarks.schema import (
    ACCURACY,
    ACCURACY_COST,
    BENCHMARKS,
    BEST,
    COMPILE,
    COMPILE_GRAPHS,
    CONTEXTS,
    EAGER,
    LIGHT,
    MODELS,
    NATIVE,
    REFERENCE,
    TRITON,
    VARIANT,
    Benchmark,
)

# What baselines are called; others by the name in their rows.
NAMES = {
    NATIVE: "mfops (native)",
    TRITON: "mfops (Triton)",
    REFERENCE: "mfops (reference)",
    EAGER: "eager, as published",
    BEST: "eager, at its best",
    COMPILE: "torch.compile",
    COMPILE_GRAPHS: "torch.compile, CUDA graphs",
    "mf": "MF",
    "em": "EM",
    "nmf": "NMF (Hamburger)",
    "vq": "VQ",
    "cd": "CD",
    "double_attention": "Double attention",
    "aspp": "ASPP",
    "aspp_separable": "ASPP, separable",
    "ppm": "PPM",
    "encoding": "Encoding",
    "nonlocal": "non-local",
    "mfnet_light": "MFNet Light",
    "mfnet": "MFNet",
    "deeplabv3plus": "DeepLabV3+",
    "emanet": "EMANet",
}
OURS = {NATIVE, TRITON, "mfops", "mf", "mfnet", "mfnet_light"}

PAPER_BACKBONE, PAPER_SIZE = "resnet50", "513x513"
# Network: mIoU, fwIoU, millions of parameters, as the paper prints them.
PAPER = {
    "mfnet": (68.97, 85.71, 29.73),
    "deeplabv3plus": (68.98, 85.31, 40.45),
    "emanet": (70.05, 85.32, 34.65),
}

RECIPE = ["data", "recipe", "flags"]  # what training runs that are compared have in common


def name(baseline: str) -> str:
    return NAMES.get(baseline, baseline)


def measured(found: DataFrame) -> DataFrame:
    return found[found["skipped"] == ""]


@dataclass(frozen=True, eq=False)  # one is like no other, and a key of caches
class Results:
    """One machine's rows by benchmark: all of them, and those that stand.

    Of each case those of its newest run stand; of training runs, which take hours and come one by
    one, the newest of each seed.
    """

    machine: str
    every: dict[str, DataFrame]
    standing: dict[str, DataFrame]

    @property
    def cpu(self) -> bool:
        """Whether the machine is a CPU: its name ends with its threads (`Machine.name`)."""
        return self.machine.endswith("-threads")

    def of(self, benchmark: Benchmark) -> DataFrame:
        return self.standing[benchmark.name]

    def plain(self, benchmark: Benchmark) -> DataFrame:
        """Those in the plainest environment: no variable set, where there are such."""
        found = self.of(benchmark)
        return found[found["environment"] == found["environment"].min()]

    def runs(self, benchmark: Benchmark) -> DataFrame:
        """The plain rows, with those of earlier runs of the same command and commit."""
        columns = [*benchmark.case, "environment", "command", "commit"]
        newest = self.plain(benchmark)[columns].drop_duplicates()
        return self.every[benchmark.name].merge(newest, on=columns)


def load(folder: Path) -> list[Results]:
    """Every machine that has rows, by name.

    Raises:
        ValueError: a file is damaged; names it.
    """
    machines: dict[str, dict[str, DataFrame]] = {}
    for machine in sorted(path for path in folder.glob("*") if path.is_dir()):
        known = {RUNS, *(f"{b.name}.csv" for b in BENCHMARKS)}
        unknown = {path.name for path in machine.glob("*.csv")} - known
        if unknown:
            raise ValueError(f"{machine / min(unknown)}: there is no such benchmark")
        every = {b.name: typed(machine, b) for b in BENCHMARKS}
        if any(len(found) for found in every.values()):
            machines[machine.name] = every
    found, scored = [], trained(machines) if machines else DataFrame()
    for machine_name, every in machines.items():
        standing = {b.name: newest(every[b.name], b) for b in BENCHMARKS}
        standing[ACCURACY.name] = scored
        found.append(Results(machine_name, every, standing))
    return found


def typed(folder: Path, benchmark: Benchmark) -> DataFrame:
    """The rows of a machine's file with what is known of their runs.

    Numbers are such (NaN where a cell is empty), everything else is text.
    """
    path, columns = folder / f"{benchmark.name}.csv", list(benchmark.columns)
    found = DataFrame(rows.read(path))
    if found.empty:
        found = DataFrame(columns=columns, dtype=str)
    missing = [c for c in (*benchmark.case, "skipped", "run") if c not in found]
    if missing:
        raise ValueError(f"{path}: expected columns {', '.join(missing)}")
    found = found.reindex(columns=[*columns, *found.columns.difference(columns)], fill_value="")
    times = ("median_s", "q1_s", "q3_s") if benchmark.timed else ()
    required = times or ("mIoU", "fwIoU", "accuracy", "seed")
    complete = found["skipped"].to_numpy(object) == ""
    numbers: dict[str, np.ndarray] = {}
    for column in benchmark.numbers:
        text = found[column].to_numpy(object)  # whose comparisons take a tenth of a Series's time
        values = np.asarray(pd.to_numeric(text, errors="coerce"), float)
        missing = np.isnan(values)
        wrong = np.isinf(values) | (missing & (text != ""))
        if column in (*times, *benchmark.ratios):
            wrong |= values <= 0
        if column in required:
            wrong |= missing & complete
        if wrong.any():
            row = int(wrong.argmax())
            what = text[row] or "nothing"
            raise ValueError(f"{path}, row {row + 1}: {column}: expected a number, got {what}")
        numbers[column] = values
    found = found.assign(**numbers)
    runs = DataFrame(rows.read(folder / RUNS, "run"), columns=PROVENANCE)
    unknown = ~found["run"].isin(runs["run"])
    if unknown.any():
        row = int(unknown.argmax())
        raise ValueError(f"{path}, row {row + 1}: run: {found['run'][row]} is not in {RUNS}")
    return found.merge(runs, how="left", on="run", validate="many_to_one")


def newest(found: DataFrame, benchmark: Benchmark) -> DataFrame:
    """Of each case the rows of the newest run that measured any of it.

    In another environment (see `rows.VARIABLES`) a case is another one.
    """
    cases = found.groupby([*benchmark.case, "environment"], sort=False).ngroup()
    age = found["run"].where(found["skipped"] != "", "measured " + found["run"])
    last = age.groupby(cases).transform("max").str.removeprefix("measured ")
    standing = found[found["run"] == last]
    return standing.loc[cases[standing.index].sort_values(kind="stable").index].reset_index(
        drop=True
    )


def trained(machines: dict[str, dict[str, DataFrame]]) -> DataFrame:
    """The newest training run of each seed, on whichever machine: scores, unlike times, do not
    depend on it."""
    every = pd.concat([of[ACCURACY.name] for of in machines.values()], ignore_index=True)
    by_age = every.assign(measured=every["skipped"] == "").sort_values(["measured", "run"])
    last = by_age.drop_duplicates([*RECIPE, "baseline", "seed"], keep="last")
    return last.drop(columns="measured").sort_index()


@functools.lru_cache
def scores(results: Results) -> DataFrame:
    """A line for each recipe and network, of a recipe the best first: scores over the seeds of the
    last epoch, mean and sample deviation ("mIoU_sd"), and what the network costs. Runs that were
    skipped come last. "title" names the recipe."""
    by, columns = [*RECIPE, "baseline"], ["mIoU", "fwIoU", "accuracy"]
    every = results.of(ACCURACY)
    runs = measured(every).groupby(by, sort=False)
    found = runs[columns].mean().join(runs[columns].std().add_suffix("_sd"))
    found = found.join(runs[["parameters", "flops", "size"]].first()).assign(runs=runs.size())
    over = [f"over_{base}" for base in ACCURACY_COST.bases]
    costs = measured(results.plain(ACCURACY_COST)).drop_duplicates(by)  # of several, the first
    found = found.reset_index().merge(costs[[*by, "median_s", *over]], how="left", on=by)
    found = found.assign(recipe_number=found.groupby(RECIPE, sort=False).ngroup(), skipped="")
    found = found.sort_values(["recipe_number", "mIoU"], ascending=[True, False])
    skipped = every.loc[every["skipped"] != "", [*by, "seed", "skipped"]]
    found = pd.concat([found, skipped], ignore_index=True)
    titles = recipe_titles(every)
    return found.assign(title=[titles[key] for key in found[RECIPE].itertuples(index=False)])


def recipe_titles(trained: DataFrame) -> dict[tuple[str, ...], str]:
    """What the training runs of a recipe have in common, and flags where only they differ."""
    titles, flags = {}, {}
    first = trained.sort_values("skipped", kind="stable").drop_duplicates(RECIPE)
    for row in first.to_dict("records"):
        key = tuple(row[column] for column in RECIPE)
        epochs = "" if pd.isna(row["epochs"]) else f"{row['epochs']:.0f} epochs"
        words = [row["data"], f"recipe {row['recipe']}", row["backbone"], row["size"], epochs]
        titles[key] = ", ".join(filter(None, words))
        flags[key] = re.split(r" (?=--)", row["flags"])
    told = {}
    for key, title in titles.items():
        alike = [flags[other] for other, own in titles.items() if own == title]
        apart = [flag for flag in flags[key] if not all(flag in own for own in alike)]
        told[key] = ", ".join(filter(None, [title, " ".join(apart)]))
    return told


def networks(found: DataFrame) -> DataFrame:
    """Those that are no variant of MFNet Light."""
    return found[~found["baseline"].str.startswith(VARIANT)]


def light_and_variants(found: DataFrame) -> DataFrame:
    """MFNet Light and its variants, of the recipes that there are variants of."""
    found = found[found["baseline"].str.startswith((VARIANT, LIGHT))]
    several = found.groupby(RECIPE)["baseline"].transform("nunique") > 1
    return found[several]


def context_passes(results: Results) -> DataFrame:
    """A line for each size and context, of the channels, batch and dtype that come first, with
    the ratios of both passes ("forward/aspp"), empty where one of them has no rows."""
    found = results.plain(CONTEXTS)
    if found.empty:
        return found
    place = ["in_channels", "out_channels", "batch", "dtype"]
    found = found.merge(found[place].head(1), on=place)
    both = found[found["pass"] == BOTH]
    found = found[(found["pass"] == FORWARD) & found["size"].isin(both["size"])]
    columns = ["size", "baseline", "skipped", "over_aspp", "over_em"]
    found = found.merge(both[columns], how="left", on=columns[:2], suffixes=("", "_both"))
    names = {f"over_{base}": f"{FORWARD}/{base}" for base in ("aspp", "em")}
    names |= {f"over_{base}_both": f"{BOTH}/{base}" for base in ("aspp", "em")}
    return found.rename(columns=names)


def paper_counts(results: Results) -> DataFrame:
    """Of each network in the paper's table a row with what is counted here."""
    found = measured(results.plain(MODELS)).dropna(subset=["parameters", "flops"])
    here = (found["backbone"] == PAPER_BACKBONE) & (found["size"] == PAPER_SIZE)
    counted = found[here].drop_duplicates("baseline").set_index("baseline", drop=False)
    counted = counted.loc[[network for network in PAPER if network in counted.index]]
    printed = DataFrame.from_dict(PAPER, orient="index", columns=["mIoU", "fwIoU", "printed"])
    return counted.join(printed)
