"""Drawing, from panels of plain data: points with names, bars, a roofline."""

from __future__ import annotations

import math
import textwrap
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from benchmarks.kernels import FORWARD
from benchmarks.report import data
from benchmarks.schema import BEST, COMPILE, COMPILE_GRAPHS, COPY, EAGER, NATIVE, TRITON

Panel = dict[str, Any]

WIDTH, DPI = 8.0, 120
# Okabe and Ito's colors, told apart with any eyes. Ours are always the first.
VERMILION, BLUE, GREEN, ORANGE, SKY, PURPLE = (
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#E69F00",
    "#56B4E9",
    "#CC79A7",
)
GRAY, LIGHT = "#767676", "#C8C8C8"
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
    NATIVE: ("D", VERMILION),
    TRITON: ("D", PURPLE),
    COMPILE: ("s", GREEN),
    COMPILE_GRAPHS: ("s", ORANGE),
    EAGER: ("o", BLUE),
    BEST: ("o", SKY),
}


def _canvas(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def scatter(panels: list[Panel]) -> Figure:
    """Panels of points with their names; in some a line joins those that no other beats."""
    rows = math.ceil(len(panels) / 2)
    figure, every = _canvas(rows, 2, 3.5 * rows + 0.3)
    for axes, panel in zip(every, panels, strict=False):
        axes.plot(
            *zip(*panel["line"], strict=True) if panel["line"] else ([], []),
            color=GRAY,
            linewidth=1,
        )
        for p in panel["points"]:
            color = VERMILION if p["ours"] else BLUE
            if p["sd"]:
                axes.errorbar(p["x"], p["y"], p["sd"], color=color, capsize=3, linewidth=1)
            face = "white" if p["hollow"] else color
            marker = "D" if p["ours"] else "o"
            axes.plot(p["x"], p["y"], marker, color=color, markerfacecolor=face, zorder=3)
        axes.set(title=textwrap.fill(panel["title"], 46), xlabel=panel["x"], ylabel=panel["y"])
        axes.margins(0.18, 0.16)
        if panel["log"]:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        if panel["from_zero"]:
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
    for axes in every[len(panels) :]:
        axes.remove()
    figure.draw_without_rendering()  # after it places are known
    for axes, panel in zip(every, panels, strict=False):
        _name_points(axes, panel["points"], panel["line"])
    return figure


# Where a name may stand, in points from its own: beside, above and below, then further off.
PLACES = [
    (distance * dx, distance * dy)
    for distance in (7, 12, 20, 30)
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
]


# From a name that stands further off to its point.
LEADER = {"arrowstyle": "-", "color": GRAY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}


def _name_points(axes: Axes, points: list[Panel], line: list[tuple[float, float]]) -> None:
    """Each name at the first place around its point where nothing else is, or the least."""

    def pixels(x: float, y: float) -> tuple[float, float]:
        return tuple(axes.transData.transform((x, y)))

    centers = [pixels(p["x"], p["y"]) for p in points]
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in centers]
    for p in points:
        ends = [pixels(p["x"], p["y"] + sign * p["sd"]) for sign in (-1, 1)]
        taken.append(Bbox(ends).padded(3))
    for (x0, y0), (x1, y1) in pairwise(pixels(x, y) for x, y in line):
        steps = [n / 60 for n in range(61)]
        taken += [Bbox([[x0 + (x1 - x0) * t, y0 + (y1 - y0) * t]] * 2).padded(1) for t in steps]
    frame = axes.get_window_extent()
    for p in points:
        best: tuple[int, Annotation, Bbox] | None = None
        for dx, dy in PLACES:
            note = axes.annotate(
                p["name"],
                (p["x"], p["y"]),
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="bottom" if dy > 0 else "top" if dy < 0 else "center",
                fontsize=8,
                fontweight="bold" if p["ours"] else "normal",
            )
            note.set_in_layout(False)
            box = note.get_window_extent()
            hits = sum(box.overlaps(other) for other in taken)
            hits += 9 * (box.x0 < frame.x0 or box.x1 > frame.x1)
            hits += 9 * (box.y0 < frame.y0 or box.y1 > frame.y1)
            if best is None or hits < best[0]:
                if best:
                    best[1].remove()
                best = hits, note, box
            else:
                note.remove()
            if not hits:
                break
        _, note, box = best
        taken.append(box)
        if max(map(abs, note.xyann)) > 12:
            axes.annotate(
                "", note.xy, note.xyann, textcoords="offset points", arrowprops=LEADER
            ).set_in_layout(False)


def bars(panels: list[Panel]) -> Figure:
    names = panels[0]["names"]
    figure, every = _canvas(1, len(panels), 1.3 + 0.3 * len(names), sharey=True)
    colors = [VERMILION if ours else BLUE for ours in panels[0]["ours"]]
    for axes, panel in zip(every, panels, strict=True):
        values = panel["values"]
        bars = axes.barh(range(len(names)), values, color=colors, height=0.65)
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # not through a number
        axes.bar_label(bars, [f"{v:.3g}" for v in values], padding=3, fontsize=8, bbox=behind)
        axes.set_xlim(0, max(*values, 1 if panel["one"] else 0) * 1.32)
        if panel["one"]:
            axes.axvline(1, color=GRAY, linewidth=1, linestyle="--")
        axes.set_title(panel["title"])
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=4)
    every[0].set_yticks(range(len(names)), names)
    every[0].invert_yaxis()
    return figure


def stacked(panels: list[Panel]) -> Figure:
    bars = sum(len(panel["names"]) for panel in panels)
    height = 0.9 + 0.33 * bars + 0.75 * len(panels)
    ratios = [len(panel["names"]) + 1 for panel in panels]
    figure, every = _canvas(len(panels), 1, height, height_ratios=ratios)
    colors = (SKY, PURPLE, GREEN, ORANGE, LIGHT)
    for axes, panel in zip(every, panels, strict=True):
        places = range(len(panel["names"]))
        left = [0.0] * len(places)
        totals = [sum(values) for values in zip(*panel["parts"].values(), strict=True)]
        for color, (part, values) in zip(colors, panel["parts"].items(), strict=True):
            drawn = axes.barh(places, values, left=left, color=color, height=0.65, label=part)
            shares = [value / total for value, total in zip(values, totals, strict=True)]
            words = [f"{share:.0%}" if share >= 0.06 else "" for share in shares]
            axes.bar_label(drawn, words, label_type="center", fontsize=8)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.set_yticks(places, panel["names"])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(title=panel["title"], xlabel="ms per step")
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def rooflines(panels: list[Panel]) -> Figure:
    figure, every = _canvas(1, len(panels), 4.3)
    shown = {p["baseline"] for panel in panels for p in panel["points"]}
    for axes, panel in zip(every, panels, strict=True):
        copy, product = panel["ceilings"][COPY], panel["ceilings"]["matmul"]
        xs = [p["x"] for p in panel["points"]]
        knee = product / copy
        low, high = min(*xs, knee) / 2.5, max(*xs, knee) * 1.6
        roof = [low * copy, product, product]
        axes.plot([low, knee, high], [y / 1e9 for y in roof], color="black", linewidth=1.2)
        middle = math.sqrt(low * knee)
        copied = f"copy {copy / 1e9:{'.3g' if copy < 1e11 else ',.0f'}} GB/s "
        axes.text(middle, middle * copy / 1e9, copied, fontsize=8, ha="right", va="bottom")
        most = f"matmul {product / 1e9:,.0f} GFLOP/s"
        axes.text(high, product / 1e9 * 1.05, most, fontsize=8, ha="right", va="bottom")
        for p in sorted(panel["points"], key=lambda p: p["baseline"] == NATIVE):
            marker, color = BASELINES[p["baseline"]]
            face = color if p["pass"] == FORWARD else "white"
            size = 7 if p["baseline"] == NATIVE else 5
            own = {"color": color, "markerfacecolor": face, "markersize": size}
            axes.plot(p["x"], p["y"] / 1e9, marker, linestyle="", **own)
        axes.set(xscale="log", yscale="log", title=panel["title"])
        axes.set(xlabel="FLOPs / byte that has to move", ylabel="GFLOP/s")
        axes.margins(y=0.12)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:,.10g}")
            axis.set_minor_formatter(NullFormatter())
    handles = [
        Line2D(
            [], [], marker=BASELINES[r][0], color=BASELINES[r][1], linestyle="", label=data.name(r)
        )
        for r in BASELINES
        if r in shown
    ]
    hollow = {"color": GRAY, "markerfacecolor": "white", "linestyle": ""}
    handles.append(Line2D([], [], marker="o", **hollow, label="hollow: with backward"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure
