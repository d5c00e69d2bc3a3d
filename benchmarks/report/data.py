"""The rows that stand, machine by machine, as a table of each benchmark."""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
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
        newest = self.plain(benchmark)
        runs = newest[columns].drop_duplicates()
        return self.every[benchmark.name].merge(runs, on=columns)


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
    found = []
    for machine_name, every in machines.items():
        standing = {b.name: newest(every[b.name], b) for b in BENCHMARKS}
        trained = [of[ACCURACY.name] for of in machines.values()]
        standing[ACCURACY.name] = newest_of_each_seed(
            shared(pd.concat(trained, ignore_index=True), every)
        )
        found.append(Results(machine_name, every, standing))
    return found


def typed(folder: Path, benchmark: Benchmark) -> DataFrame:
    """The rows of a machine's file with what is known of their runs.

    Numbers are such (NaN where a cell is empty), everything else is text.
    """
    path, columns = folder / f"{benchmark.name}.csv", list(benchmark.columns)
    found = DataFrame(rows.read(path))
    if found.empty:
        texts = DataFrame(columns=[*columns, *PROVENANCE[1:]], dtype=str)
        return texts.astype(dict.fromkeys(benchmark.numbers, float))
    missing = [c for c in (*benchmark.case, "skipped", "run") if c not in found]
    if missing:
        raise ValueError(f"{path}: expected columns {', '.join(missing)}")
    found = found.reindex(columns=[*columns, *found.columns.difference(columns)], fill_value="")
    times = ("median_s", "q1_s", "q3_s") if benchmark.timed else ()
    required = times or ("mIoU", "fwIoU", "accuracy", "seed")
    for column in benchmark.numbers:
        text, values = found[column], found[column].map(_number).astype(float)
        wrong = np.isinf(values)
        if column in (*times, *benchmark.ratios):
            wrong |= values <= 0
        if column in required:
            wrong |= values.isna() & (found["skipped"] == "")
        if wrong.any():
            row = int(wrong.argmax())
            what = text[row] or "nothing"
            raise ValueError(f"{path}, row {row + 1}: {column}: expected a number, got {what}")
        found[column] = values
    runs = DataFrame(rows.read(folder / RUNS, "run"), columns=PROVENANCE)
    unknown = ~found["run"].isin(runs["run"])
    if unknown.any():
        row = int(unknown.argmax())
        raise ValueError(f"{path}, row {row + 1}: run: {found['run'][row]} is not in {RUNS}")
    return found.merge(runs, how="left", on="run", validate="many_to_one")


def _number(text: str) -> float:
    """NaN for an empty cell, infinity for what is no finite number."""
    try:
        value = float(text) if text else 0
    except ValueError:
        return math.inf
    if not text:
        return math.nan
    return value if math.isfinite(value) else math.inf


def newest(found: DataFrame, benchmark: Benchmark) -> DataFrame:
    """Of each case the rows of the newest run that measured any of it.

    In another environment (see `rows.VARIABLES`) a case is another one.
    """
    parts = []
    for _, own in found.groupby([*benchmark.case, "environment"], sort=False):
        runs = measured(own)["run"]
        parts.append(own[own["run"] == (runs if len(runs) else own["run"]).max()])
    return pd.concat(parts, ignore_index=True) if parts else found


def shared(trained: DataFrame, every: dict[str, DataFrame]) -> DataFrame:
    """Training runs on any machine that a machine has runs or costs of: scores, unlike times, do
    not depend on it."""
    own = pd.concat([every[b.name][RECIPE] for b in (ACCURACY, ACCURACY_COST)])
    return trained.merge(own.drop_duplicates(), on=RECIPE)


def newest_of_each_seed(trained: DataFrame) -> DataFrame:
    by_age = trained.assign(measured=trained["skipped"] == "").sort_values(["measured", "run"])
    newest_runs = by_age.drop_duplicates([*RECIPE, "baseline", "seed"], keep="last")
    return newest_runs.drop(columns="measured").sort_index()


def of_recipe(found: DataFrame, recipe: tuple[str, ...]) -> DataFrame:
    return found[(found[RECIPE] == list(recipe)).all(axis=1)]


def scores(results: Results) -> DataFrame:
    """A line for each recipe and network, the best first: scores over the seeds of the last epoch,
    mean and sample deviation ("mIoU_sd"), and what the network costs."""
    by = [*RECIPE, "baseline"]
    runs = measured(results.of(ACCURACY)).groupby(by, sort=False)
    columns = ["mIoU", "fwIoU", "accuracy"]
    found = runs[columns].mean()
    found[[f"{column}_sd" for column in columns]] = runs[columns].std()
    found["runs"] = runs.size()
    same = ["parameters", "flops", "backbone", "size", "epochs"]
    found[same] = runs[same].first()
    over = [f"over_{base}" for base in ACCURACY_COST.bases]
    costs = measured(results.plain(ACCURACY_COST)).drop_duplicates(by)  # of several, the first
    found = found.reset_index().merge(costs[[*by, "median_s", *over]], how="left", on=by)
    return found.sort_values("mIoU", ascending=False, kind="stable")


def networks(found: DataFrame) -> DataFrame:
    """Those that are no variant of MFNet Light."""
    return found[~found["baseline"].str.startswith(VARIANT)]


def light_and_variants(found: DataFrame) -> DataFrame:
    """MFNet Light and its variants; none where there are no variants."""
    ours = found[found["baseline"].str.startswith((VARIANT, LIGHT))]
    return ours if ours["baseline"].nunique() > 1 else ours.head(0)


def recipe_titles(results: Results) -> dict[tuple[str, ...], str]:
    """What the training runs of a recipe have in common, and flags where only they differ."""
    titles = {}
    for key, found in results.of(ACCURACY).groupby(RECIPE, sort=False):
        title = f"{key[0]}, recipe {key[1]}"
        for _, row in measured(found).head(1).iterrows():
            title += f", {row['backbone']}, {row['size']}, {row['epochs']:.0f} epochs"
        titles[key] = title

    def flags(key: tuple[str, ...]) -> list[str]:
        return re.split(r" (?=--)", key[-1])

    told = {}
    for key, title in titles.items():
        alike = [flags(other) for other, own in titles.items() if own == title]
        apart = [flag for flag in flags(key) if not all(flag in own for own in alike)]
        told[key] = ", ".join(filter(None, [title, " ".join(apart)]))
    return told


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
