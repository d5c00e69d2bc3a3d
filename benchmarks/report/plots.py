"""Rows as pictures: for each plot, what it shows and how it is drawn.

What a picture shows is plain data first, so that a digest in its file can stand for it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path as Segments
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox
from pandas import DataFrame, Series
from PIL import Image

from benchmarks import schema
from benchmarks.kernels import BOTH, FORWARD
from benchmarks.report import data
from benchmarks.report.data import OURS, PAPER, RECIPE, Results, measured
from benchmarks.schema import BEST, COMPILE, COMPILE_GRAPHS, COPY, EAGER, NATIVE, TRITON

Panel = dict[str, Any]

MARK = "rows drawn, sha256 "  # of a picture's description
FRONT_SEEDS = 3  # a mean of fewer says too little to stand on the line
PARTS = {  # of a training step
    "loader_s": "loader",
    "forward_s": "forward",
    "backward_s": "backward",
    "optimizer_s": "optimizer",
    "other_s": "other",
}
WIDTH, DPI = 8.0, 120
# Okabe and Ito's colors, told apart with any eyes. Ours are always the first.
VERMILION, BLUE, GREEN, ORANGE = "#D55E00", "#0072B2", "#009E73", "#E69F00"
SKY, PURPLE, GRAY, LIGHT = "#56B4E9", "#CC79A7", "#767676", "#C8C8C8"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
}
BASELINES = {  # marker and color
    COMPILE: ("s", GREEN),
    COMPILE_GRAPHS: ("s", ORANGE),
    EAGER: ("o", BLUE),
    BEST: ("o", SKY),
    TRITON: ("D", PURPLE),
    NATIVE: ("D", VERMILION),
}


@dataclass(frozen=True)
class Picture:
    """`panels`: numbers, titles and labels, all that `draw` draws from."""

    title: str
    panels: list[Panel]
    draw: Callable[[list[Panel]], Figure]

    def digest(self) -> str:
        drawn = json.dumps([self.title, self.panels], sort_keys=True, separators=(",", ":"))
        return MARK + hashlib.sha256(drawn.encode()).hexdigest()

    def save(self, path: Path) -> None:
        with matplotlib.rc_context(STYLE):
            figure = self.draw(self.panels)
            figure.suptitle(self.title)
            figure.savefig(path, dpi=DPI, metadata={"Description": self.digest()})


def digest_in(path: Path) -> str | None:
    """What a file says it was drawn from; None where it is not one of ours."""
    try:
        with Image.open(path) as image:
            image.load()
            found = image.info.get("Description", "")
    except (OSError, SyntaxError):
        return None
    return found if found.startswith(MARK) else None


def _round(values: Series) -> list[float]:
    """As many digits as a row has: a digest must not hang on the last bits of a sum."""
    return [float(f"{value:.6g}") for value in values]


# What is shown.


def _points(found: DataFrame, xs: Series, ys: Series, **panel: Any) -> Panel:
    """Points with their names, and a bar where there is an "sd"."""
    columns = {
        "name": found["baseline"].map(data.name),
        "ours": found["baseline"].isin(OURS),
        "x": _round(xs),
        "y": _round(ys),
        "sd": _round(found.get("sd", 0 * xs).fillna(0)),
        "hollow": found.get("hollow", False),
    }
    points = found[[]].assign(**columns).to_dict("records")
    return {"points": points, "line": [], **panel}


def _front(points: list[Panel]) -> list[tuple[float, float]]:
    """Points that no other beats in both cost and score."""
    best: list[tuple[float, float]] = []
    for p in sorted(points, key=lambda p: (p["x"], -p["y"])):
        if not best or p["y"] > best[-1][1]:
            best.append((p["x"], p["y"]))
    return best


def pareto(results: Results) -> list[Panel]:
    scores = data.networks(measured(data.scores(results)))
    scores = scores.assign(sd=scores["mIoU_sd"], hollow=scores["runs"] < FRONT_SEEDS)
    costs = {
        "GFLOPs per image": ("flops", 1e-9),
        "latency, ms per image": ("median_s", 1e3),
        "millions of parameters": ("parameters", 1e-6),
    }
    panels: list[Panel] = []
    if scores["median_s"].isna().all():  # costs were measured on another machine
        return panels
    for x, (column, scale) in costs.items():
        for _, every in scores.groupby(RECIPE, sort=False):
            own = every.dropna(subset=column)
            if len(own) < 2:  # nothing to compare
                continue
            labels = {"title": own["title"].iloc[0], "x": x, "y": "mIoU"}
            panel = _points(own, own[column] * scale, own["mIoU"], **labels, axes="log")
            panel["line"] = _front([p for p in panel["points"] if not p["hollow"]])
            panels.append(panel)
    return panels


def models(results: Results) -> list[Panel]:
    found = measured(results.plain(schema.MODELS)).dropna(subset="flops")
    return [
        _points(
            own,
            own["flops"] / 1e9,
            own["median_s"] * 1e3,
            title="{pass}, {backbone}, {size}, batch {batch}, {dtype}".format(**own.iloc[0]),
            x="GFLOPs per image, forward",
            y="ms per batch",
            axes="from zero",
        )
        for _, own in found.groupby(list(schema.MODELS.case), sort=False)
    ]


def paper(results: Results) -> list[Panel]:
    counted = data.paper_counts(results)
    if len(counted) < len(PAPER):
        return []
    printed = counted.assign(parameters=counted["printed"] * 1e6, hollow=True)
    both = pd.concat([printed, counted.assign(hollow=False)])
    y = "mIoU on VOC 2012 as printed, %"
    first = {"title": "hollow: as printed, filled: counted", "x": "millions of parameters", "y": y}
    second = {"title": "counted", "x": "GFLOPs of one 513x513 image, forward", "y": y}
    panel = _points(both, both["parameters"] / 1e6, both["mIoU"], **first)
    for point in panel["points"]:
        point["name"] *= not point["hollow"]
    return [panel, _points(counted, counted["flops"] / 1e9, counted["mIoU"], **second)]


def _bars(title: str, values: Series, **panel: Any) -> Panel:
    """`values` by baseline."""
    return {
        "title": title,
        "names": [data.name(baseline) for baseline in values.index],
        "ours": [baseline in OURS for baseline in values.index],
        "values": _round(values),
        **panel,
    }


def contexts(results: Results) -> list[Panel]:
    found = data.context_passes(results)
    if found.empty:
        return []
    size = "33x33" if "33x33" in found["size"].to_list() else found["size"].iloc[0]
    columns = {
        "parameters, millions": ("parameters", 1e-6),
        "GFLOPs, forward": ("flops", 1e-9),
        "time / ASPP, forward": (f"{FORWARD}/aspp", 1),
        "time / ASPP,\nforward + backward": (f"{BOTH}/aspp", 1),
    }
    shown = measured(found[(found["size"] == size) & (found["skipped_both"] == "")])
    own = shown.dropna(subset=[column for column, _ in columns.values()]).set_index("baseline")
    if own.empty:
        return []
    case = "{in_channels} to {out_channels} channels, {size}, batch {batch}, {dtype}"
    return [
        _bars(title, own[column] * scale, one="/" in column, case=case.format(**own.iloc[0]))
        for title, (column, scale) in columns.items()
    ]


def factorizers(results: Results) -> list[Panel]:
    """Over the published code, for the shape, dtype and layout that come first."""
    case = ["shape", "dtype", "layout"]
    found = measured(results.plain(schema.FACTORIZERS))
    found = found.merge(found[case].head(1), on=case)
    found = found[found["baseline"] != COPY]
    times: dict[str, DataFrame] = {}
    for (method, steps, which), own in found.groupby(["method", "steps", "pass"], sort=False):
        if EAGER in own["baseline"].to_list():
            backward = "" if which == FORWARD else ",\nwith backward"
            times[f"{method}, T = {steps}{backward}"] = own.set_index("baseline")
    if not times:
        return []
    # Of a baseline with CUDA graphs no memory is counted.
    counted = [own.index[own["peak_bytes"].notna()] for own in times.values()]
    shown = [baseline for baseline in counted[0] if all(baseline in own for own in counted)]
    shape, dtype, layout = found[case].iloc[0]
    panel = {"one": True, "case": f"({', '.join(shape.split())}), {dtype}, {layout}"}
    last, own = list(times.items())[-1]
    peaks = own.loc[shown, "peak_bytes"] / own.loc[EAGER, "peak_bytes"]
    return [
        *(_bars(f"time: {t}", f.loc[shown, f"over_{EAGER}"], **panel) for t, f in times.items()),
        _bars(f"memory: {last}", peaks, **panel),
    ]


def training(results: Results) -> list[Panel]:
    found = measured(results.plain(schema.TRAINING)).dropna(subset=list(PARTS))
    return [
        {
            "title": "{}, {}, {}, batch {}, {}, loader workers: {}".format(*key),
            "names": own["baseline"].map(data.name).to_list(),
            "parts": {part: _round(own[column] * 1e3) for column, part in PARTS.items()},
        }
        for key, own in found.groupby(list(schema.TRAINING.case), sort=False)
    ]


def roofline(results: Results) -> list[Panel]:
    """Contiguous inputs: in another layout the same points again."""
    rates = measured(results.plain(schema.CEILINGS)).dropna(subset="rate")
    rows = measured(results.plain(schema.OP)).dropna(subset=["flops", "floor_bytes"])
    rows = rows[(rows["layout"] == "contiguous") & rows["baseline"].isin(list(BASELINES))]
    rows = rows.assign(x=_round(rows["flops"] / rows["floor_bytes"]))
    rows = rows.assign(y=_round(rows["flops"] / rows["median_s"]))
    panels = []
    for dtype, own in rates.groupby("dtype", sort=False):
        points = rows.loc[rows["dtype"] == dtype, ["baseline", "pass", "x", "y"]]
        ceilings = own.set_index("baseline")["rate"].to_dict()
        if len(points) and ceilings.keys() == {COPY, "matmul"}:
            points = points.to_dict("records")
            panels.append({"title": dtype, "ceilings": ceilings, "points": points})
    return panels


# How it is drawn.


def _canvas(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def _logarithmic(axis: Axis) -> None:
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,.10g}")
    axis.set_minor_formatter(NullFormatter())


def scatter(panels: list[Panel]) -> Figure:
    """Panels of points with their names; in some a line joins those that no other beats."""
    rows = math.ceil(len(panels) / 2)
    figure, every = _canvas(rows, 2, 3.5 * rows + 0.3)
    for axes, panel in zip(every, panels, strict=False):
        if panel["line"]:
            axes.plot(*zip(*panel["line"], strict=True), color=GRAY, linewidth=1)
        for p in panel["points"]:
            color, marker = (VERMILION, "D") if p["ours"] else (BLUE, "o")
            if p["sd"]:
                axes.errorbar(p["x"], p["y"], p["sd"], color=color, capsize=3, linewidth=1)
            face = "white" if p["hollow"] else color
            axes.plot(p["x"], p["y"], marker, color=color, markerfacecolor=face, zorder=3)
        axes.set(title=textwrap.fill(panel["title"], 46), xlabel=panel["x"], ylabel=panel["y"])
        axes.margins(0.18, 0.16)
        if panel.get("axes") == "log":
            _logarithmic(axes.xaxis)
        if panel.get("axes") == "from zero":
            axes.set(xlim=(0, None), ylim=(0, None))
    for axes in every[len(panels) :]:
        axes.remove()
    figure.draw_without_rendering()  # after it places are known
    for axes, panel in zip(every, panels, strict=False):
        _name_points(axes, panel["points"], panel["line"])
    return figure


# Where a name may stand, in points from its own: beside, above and below, then further off.
PLACES = [
    (distance * dx, distance * dy)
    for distance in (7, 12, 20)
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
]


def _name_points(axes: Axes, points: list[Panel], line: list[tuple[float, float]]) -> None:
    """Each name at the first place around its point where nothing else is, or the least."""
    frame, to_pixels = axes.get_window_extent(), axes.transData
    centers = to_pixels.transform([(p["x"], p["y"]) for p in points])
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in centers]
    bars = [[(p["x"], p["y"] + sign * p["sd"]) for sign in (-1, 1)] for p in points]
    lines = [to_pixels.transform_path(Segments(ends)) for ends in [*bars, line] if ends]
    for p in points:
        place = {"textcoords": "offset points", "xytext": (0, 0), "size": 8}
        weight = "bold" if p["ours"] else "normal"
        note = axes.annotate(p["name"], (p["x"], p["y"]), **place, weight=weight)
        note.set_in_layout(False)

        def in_the_way(place: tuple[int, int], note: Annotation = note) -> int:
            dx, dy = place
            note.set(position=place, ha=("center", "left", "right")[(dx > 0) - (dx < 0)])
            note.set_va(("center", "bottom", "top")[(dy > 0) - (dy < 0)])
            box = note.get_window_extent()
            found = sum(box.overlaps(other) for other in taken)
            found += sum(own.intersects_bbox(box, filled=False) for own in lines)
            outside = [box.x0 < frame.x0, box.x1 > frame.x1, box.y0 < frame.y0, box.y1 > frame.y1]
            return found + 9 * sum(outside)

        free = (place for place in PLACES if not in_the_way(place))
        in_the_way(next(free, None) or min(PLACES, key=in_the_way))
        taken.append(note.get_window_extent())


def bars(panels: list[Panel]) -> Figure:
    names = panels[0]["names"]
    figure, every = _canvas(1, len(panels), 1.3 + 0.3 * len(names), sharey=True)
    colors = [VERMILION if ours else BLUE for ours in panels[0]["ours"]]
    for axes, panel in zip(every, panels, strict=True):
        values = panel["values"]
        bars = axes.barh(names, values, color=colors, height=0.65)
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # not through a number
        axes.bar_label(bars, [f"{v:.3g}" for v in values], padding=3, fontsize=8, bbox=behind)
        axes.set_xlim(0, max(*values, panel["one"]) * 1.32)
        if panel["one"]:
            axes.axvline(1, color=GRAY, linewidth=1, linestyle="--")
        axes.set_title(panel["title"])
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=4)
    every[0].invert_yaxis()
    return figure


def stacked(panels: list[Panel]) -> Figure:
    sizes = [len(panel["names"]) for panel in panels]
    height = 0.9 + 0.33 * sum(sizes) + 0.75 * len(panels)
    ratios = [size + 1 for size in sizes]
    figure, every = _canvas(len(panels), 1, height, height_ratios=ratios)
    colors = (SKY, PURPLE, GREEN, ORANGE, LIGHT)
    for axes, panel in zip(every, panels, strict=True):
        parts = DataFrame(panel["parts"], index=panel["names"])
        ends, shares = parts.cumsum(axis=1), parts.div(parts.sum(axis=1), axis=0)
        for color, part in zip(colors, parts, strict=True):
            left = ends[part] - parts[part]
            drawn = axes.barh(parts.index, parts[part], 0.65, left, color=color, label=part)
            words = [f"{share:.0%}" if share >= 0.06 else "" for share in shares[part]]
            axes.bar_label(drawn, words, label_type="center", fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(title=panel["title"], xlabel="ms per step")
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def rooflines(panels: list[Panel]) -> Figure:
    figure, every = _canvas(1, len(panels), 4.3)
    drawn: dict[str, Any] = {}
    for axes, panel in zip(every, panels, strict=True):
        copy, product = panel["ceilings"][COPY] / 1e9, panel["ceilings"]["matmul"] / 1e9
        xs, knee = [p["x"] for p in panel["points"]], product / copy
        low, high = min(*xs, knee) / 2.5, max(*xs, knee) * 1.6
        axes.plot([low, knee, high], [low * copy, product, product], color="black", linewidth=1.2)
        middle = math.sqrt(low * knee)
        copied = f"copy {copy:{'.3g' if copy < 100 else ',.0f'}} GB/s "
        axes.text(middle, middle * copy, copied, fontsize=8, ha="right", va="bottom")
        most = f"matmul {product:,.0f} GFLOP/s"
        axes.text(high, product * 1.05, most, fontsize=8, ha="right", va="bottom")
        for baseline, (marker, color) in BASELINES.items():
            for p in panel["points"]:
                if p["baseline"] == baseline:
                    face = color if p["pass"] == FORWARD else "white"
                    size = 7 if baseline == NATIVE else 5
                    axes.plot(p["x"], p["y"] / 1e9, marker, color=color, mfc=face, ms=size)
                    drawn[data.name(baseline)] = Line2D([], [], marker=marker, color=color, ls="")
        axes.set(title=panel["title"], xlabel="FLOPs / byte that has to move", ylabel="GFLOP/s")
        axes.margins(y=0.12)
        _logarithmic(axes.xaxis)
        _logarithmic(axes.yaxis)
    hollow = {"color": GRAY, "markerfacecolor": "white", "linestyle": ""}
    drawn["hollow: with backward"] = Line2D([], [], marker="o", **hollow)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=4)
    return figure


PLOTS: dict[str, tuple[str, Callable[[Results], list[Panel]], Callable[[list[Panel]], Figure]]] = {
    "pareto": (
        "Mean mIoU over seeds against cost, bars of one standard deviation; hollow: fewer than "
        f"{FRONT_SEEDS} seeds",
        pareto,
        scatter,
    ),
    "contexts": ("What a context costs: {case}", contexts, bars),
    "factorizers": ("Factors of an image, over the published code: {case}", factorizers, bars),
    "roofline": (
        "The op under its roofline: contiguous, shared and per-image factors",
        roofline,
        rooflines,
    ),
    "paper": ("The paper's Figure 6, and what is counted here", paper, scatter),
    "training": ("Where the time of a training step goes", training, stacked),
    "models": ("Whole networks: time against FLOPs", models, scatter),
}


@functools.lru_cache
def picture(plot: str, results: Results) -> Picture | None:
    """None where there is nothing to show."""
    title, panels, draw = PLOTS[plot]
    found = panels(results)
    return Picture(title.format(**found[0]), found, draw) if found else None
