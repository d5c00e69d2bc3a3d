"""Rows as pictures: a function for each plot finds what it shows, `draw` draws it.

What a picture shows is plain data first, so that a digest in its file can stand for it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from pandas import DataFrame, Series
from PIL import Image

from benchmarks.kernels import BOTH, FORWARD
from benchmarks.report import data, draw
from benchmarks.report.data import OURS, PAPER, Results, measured
from benchmarks.report.draw import Panel
from benchmarks.schema import (
    CEILINGS,
    COPY,
    EAGER,
    FACTORIZERS,
    MODELS,
    OP,
    TRAINING,
)

MARK = "rows drawn, sha256 "  # of a picture's description
FRONT_SEEDS = 3  # a mean of fewer says too little to stand on the line
PARTS = {  # of a training step
    "loader_s": "loader",
    "forward_s": "forward",
    "backward_s": "backward",
    "optimizer_s": "optimizer",
    "other_s": "other",
}


@dataclass(frozen=True)
class Picture:
    """`panels`: numbers, titles and labels, all that `draw` draws from."""

    title: str
    alt: str
    panels: list[Panel]
    draw: Callable[[list[Panel]], Figure]

    def digest(self) -> str:
        drawn = json.dumps([self.title, self.panels], sort_keys=True, separators=(",", ":"))
        return MARK + hashlib.sha256(drawn.encode()).hexdigest()

    def save(self, path: Path) -> None:
        with matplotlib.rc_context(draw.STYLE):
            figure = self.draw(self.panels)
            figure.suptitle(self.title)
            figure.savefig(path, dpi=draw.DPI, metadata={"Description": self.digest()})


def digest_in(path: Path) -> str | None:
    """What a file says it was drawn from; None where it is not one of ours."""
    try:
        with Image.open(path) as image:
            image.load()
            found = image.info.get("Description", "")
    except (OSError, SyntaxError):
        return None
    return found if found.startswith(MARK) else None


def _round(value: float) -> float:
    """As many digits as a row has: a digest must not hang on the last bits of a sum."""
    return float(f"{value:.6g}")


# Points with their names.


def _point(baseline: str, x: float, y: float, sd: float = 0, hollow: bool = False) -> Panel:
    place = {"x": _round(x), "y": _round(y), "sd": _round(0 if math.isnan(sd) else sd)}
    return {"name": data.name(baseline), "ours": baseline in OURS, "hollow": hollow, **place}


def _panel(title: str, x: str, y: str, points: list[Panel], **more: Any) -> Panel:
    labels = {"title": title, "x": x, "y": y}
    return {**labels, "points": points, "line": [], "from_zero": False, "log": False, **more}


def _pareto_front(points: list[Panel]) -> list[tuple[float, float]]:
    """Points that no other beats in both cost and score."""
    best: list[tuple[float, float]] = []
    for p in sorted(points, key=lambda p: (p["x"], -p["y"])):
        if not best or p["y"] > best[-1][1]:
            best.append((p["x"], p["y"]))
    return best


def pareto(results: Results) -> Picture | None:
    panels: dict[str, list[Panel]] = {}
    every = data.networks(data.scores(results))
    for key, title in data.recipe_titles(results).items():
        found = data.of_recipe(every, key)
        costs = {
            "GFLOPs per image": found["flops"] / 1e9,
            "latency, ms per image": found["median_s"] * 1e3,
            "millions of parameters": found["parameters"] / 1e6,
        }
        if any(cost.isna().all() for cost in costs.values()):
            continue
        for x, cost in costs.items():
            points = [
                _point(s["baseline"], cost[i], s["mIoU"], s["mIoU_sd"], s["runs"] < FRONT_SEEDS)
                for i, s in found[cost.notna()].iterrows()
            ]
            line = _pareto_front([p for p in points if not p["hollow"]])
            panels.setdefault(x, []).append(_panel(title, x, "mIoU", points, line=line, log=True))
    if not panels:
        return None
    return Picture(
        "Mean mIoU over seeds against cost, bars of one standard deviation; hollow: fewer than "
        f"{FRONT_SEEDS} seeds",
        "Mean mIoU of networks against their GFLOPs, latency and parameters; a line joins those "
        "that no other beats in both.",
        [panel for of_cost in panels.values() for panel in of_cost],
        draw.scatter,
    )


def models(results: Results) -> Picture | None:
    found = measured(results.plain(MODELS)).dropna(subset="flops")
    panels = []
    case = ["pass", "backbone", "size", "batch", "dtype"]
    for (which, backbone, size, batch, dtype), own in found.groupby(case, sort=False):
        points = [
            _point(row["baseline"], row["flops"] / 1e9, row["median_s"] * 1e3)
            for _, row in own.iterrows()
        ]
        title = f"{which}, {backbone}, {size}, batch {batch}, {dtype}"
        y = f"ms per batch of {batch}"
        panels.append(_panel(title, "GFLOPs per image, forward", y, points, from_zero=True))
    alt = "Time of whole networks, for inference and for training, against their GFLOPs."
    return (
        Picture("Whole networks: time against FLOPs", alt, panels, draw.scatter) if panels else None
    )


def paper(results: Results) -> Picture | None:
    counted = data.paper_counts(results)
    if len(counted) < len(PAPER):
        return None
    by_parameters, by_flops = [], []
    for network, row in counted.iterrows():
        hollow = _point(network, row["printed"], row["mIoU"], hollow=True)
        by_parameters += [{**hollow, "name": ""}]
        by_parameters += [_point(network, row["parameters"] / 1e6, row["mIoU"])]
        by_flops += [_point(network, row["flops"] / 1e9, row["mIoU"])]
    y = "mIoU on VOC 2012 as printed, %"
    hollow_and_filled = "hollow: as printed, filled: counted"
    return Picture(
        "The paper's Figure 6, and what is counted here",
        "The paper's mIoU of MFNet, DeepLabV3+ and EMANet against parameters, printed and counted, "
        "and against the GFLOPs counted here.",
        [
            _panel(hollow_and_filled, "millions of parameters", y, by_parameters),
            _panel("counted", "GFLOPs of one 513x513 image, forward", y, by_flops),
        ],
        draw.scatter,
    )


# Bars.


def _bar_panel(title: str, values: Series, one: bool) -> Panel:
    """`values` by baseline; a line at 1 where they are ratios."""
    names = [data.name(baseline) for baseline in values.index]
    ours = [baseline in OURS for baseline in values.index]
    return {
        "title": title,
        "names": names,
        "ours": ours,
        "values": [_round(value) for value in values],
        "one": one,
    }


def contexts(results: Results) -> Picture | None:
    found = data.context_passes(results)
    if found.empty:
        return None
    size = "33x33" if "33x33" in found["size"].to_list() else found["size"].iloc[0]
    columns = {
        "parameters, millions": ("parameters", 1e-6),
        "GFLOPs, forward": ("flops", 1e-9),
        "time / ASPP, forward": (f"{FORWARD}/aspp", 1),
        "time / ASPP,\nforward + backward": (f"{BOTH}/aspp", 1),
    }
    shown = measured(found[(found["size"] == size) & (found["skipped_both"] == "")])
    shown = shown.dropna(subset=[column for column, _ in columns.values()])
    if shown.empty:
        return None
    own = shown.set_index("baseline")
    of = shown.iloc[0]
    channels = f"{of['in_channels']} to {of['out_channels']} channels"
    return Picture(
        f"What a context costs: {channels}, {size}, batch {of['batch']}, {of['dtype']}",
        "Bars for each context: parameters, GFLOPs, and time over ASPP's, forward and with "
        "backward.",
        [
            _bar_panel(title, own[column] * scale, one="/" in column)
            for title, (column, scale) in columns.items()
        ],
        draw.bars,
    )


def factorizers(results: Results) -> Picture | None:
    """Over the published lines, for the shape, dtype and layout that come first."""
    case = ["shape", "dtype", "layout"]
    found = measured(results.plain(FACTORIZERS))
    found = found.merge(found[case].head(1), on=case)
    found = found[found["baseline"] != COPY]
    passes: dict[str, DataFrame] = {}
    for (method, steps, which), own in found.groupby(["method", "steps", "pass"], sort=False):
        if EAGER in own["baseline"].to_list():
            backward = "" if which == FORWARD else ",\nwith backward"
            passes[f"{method}, T = {steps}{backward}"] = own.set_index("baseline")
    if not passes:
        return None
    # Of a baseline with CUDA graphs no memory is counted.
    counted = [own.index[own["peak_bytes"].notna()] for own in passes.values()]
    shown = [baseline for baseline in counted[0] if all(baseline in own for own in counted)]
    panels = [
        _bar_panel(f"time: {title}", own.loc[shown, f"over_{EAGER}"], one=True)
        for title, own in passes.items()
    ]
    title, own = list(passes.items())[-1]
    peaks = own.loc[shown, "peak_bytes"] / own.loc[EAGER, "peak_bytes"]
    panels.append(_bar_panel(f"memory: {title}", peaks, one=True))
    shape, dtype, layout = found[case].iloc[0]
    return Picture(
        "Factors of an image, over the published lines: "
        f"({', '.join(shape.split())}), {dtype}, {layout}",
        "Bars for each way to run em and nmf: time, and peak memory, over that of the published "
        "lines.",
        panels,
        draw.bars,
    )


def training(results: Results) -> Picture | None:
    found = measured(results.plain(TRAINING)).dropna(subset=list(PARTS))
    panels = []
    for key, own in found.groupby(list(TRAINING.case), sort=False):
        title = "{}, {}, {}, batch {}, {}, loader workers: {}".format(*key)
        parts = {part: [_round(v * 1e3) for v in own[c]] for c, part in PARTS.items()}
        names = [data.name(baseline) for baseline in own["baseline"]]
        panels.append({"title": title, "names": names, "parts": parts})
    alt = "For each network the milliseconds of a training step: loader, forward, backward, "
    alt += "optimizer, other."
    title = "Where the time of a training step goes"
    return Picture(title, alt, panels, draw.stacked) if panels else None


# The roofline.


def roofline(results: Results) -> Picture | None:
    """Contiguous inputs: in another layout the same points again."""
    rates = measured(results.plain(CEILINGS)).dropna(subset="rate")
    rows = measured(results.plain(OP)).dropna(subset=["flops", "floor_bytes"])
    rows = rows[(rows["layout"] == "contiguous") & rows["baseline"].isin(list(draw.BASELINES))]
    panels = []
    for dtype, own in rates.groupby("dtype", sort=False):
        ceilings = own.set_index("baseline")["rate"].to_dict()
        points = [
            {
                "baseline": row["baseline"],
                "pass": row["pass"],
                "x": _round(row["flops"] / row["floor_bytes"]),
                "y": _round(row["flops"] / row["median_s"]),
            }
            for _, row in rows[rows["dtype"] == dtype].iterrows()
        ]
        if points and ceilings.keys() == {COPY, "matmul"}:
            panels.append({"title": dtype, "ceilings": ceilings, "points": points})
    if not panels:
        return None
    return Picture(
        "The op under its roofline: contiguous, shared and per-image factors",
        "Speed of the op's baselines against the FLOPs they have for each byte that has to move, "
        "under what the machine's memory and its matrix products allow.",
        panels,
        draw.rooflines,
    )


PLOTS: dict[str, Callable[[Results], Picture | None]] = {
    "pareto": pareto,
    "contexts": contexts,
    "factorizers": factorizers,
    "roofline": roofline,
    "paper": paper,
    "training": training,
    "models": models,
}
