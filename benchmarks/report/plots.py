"""Rows as pictures. What a picture shows is data first, so that a digest can stand for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.kernels import BOTH, FORWARD
from benchmarks.questions import (
    CEILINGS,
    COPY,
    EAGER,
    FACTORIZERS,
    MODELS,
    OP,
    TRAINING,
)
from benchmarks.report import draw, load
from benchmarks.report.draw import Content
from benchmarks.report.load import OURS, PAPER, PAPER_BACKBONE, PAPER_SIZE, Results
from benchmarks.report.tables import PARTS, accuracy_titles, training_title
from benchmarks.rows import Row, number

MARK = "rows drawn, sha256 "  # of a picture's description


@dataclass(frozen=True)
class Picture:
    """`content`: numbers, titles and labels, all that `draw` draws from."""

    title: str
    alt: str
    content: Content
    draw: Callable[[Content], Figure]

    def digest(self) -> str:
        drawn = json.dumps([self.title, self.content], sort_keys=True, separators=(",", ":"))
        return MARK + hashlib.sha256(drawn.encode()).hexdigest()

    def save(self, path: Path) -> None:
        with matplotlib.rc_context(draw.STYLE):
            figure = self.draw(self.content)
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

FRONT_SEEDS = 3  # a mean of fewer says too little to stand on the line


def _point(rival: str, x: float, y: float, sd: float = 0, hollow: bool = False) -> Content:
    place = {"x": _round(x), "y": _round(y), "sd": _round(sd)}
    return {"name": load.name(rival), "ours": rival in OURS, "hollow": hollow, **place}


def _panel(title: str, x: str, y: str, points: list[Content], **more: Any) -> Content:
    labels = {"title": title, "x": x, "y": y}
    return {**labels, "points": points, "line": [], "from_zero": False, "log": False, **more}


def _pareto_optimal(points: list[Content]) -> list[tuple[float, float]]:
    """Those that no other is both at most as far right as and at least as high as."""
    best = []
    for p in sorted(points, key=lambda p: (p["x"], -p["y"])):
        if not best or p["y"] > best[-1][1]:
            best.append((p["x"], p["y"]))
    return best


def pareto(results: Results) -> Picture | str:
    by_cost: dict[str, list[Content]] = {}
    groups = load.scores(results)
    titles = accuracy_titles(groups)
    for key, every in groups.items():
        found = [s for s in load.networks(every) if s.runs]
        flops = {s: s.counted("flops") for s in found}
        seconds = {s: number(s.cost or {}, "median_s") for s in found}
        costs = {
            "GFLOPs per image": {s: own / 1e9 for s, own in flops.items() if own},
            "latency, ms per image": {s: own * 1e3 for s, own in seconds.items() if own},
            "millions of parameters": {s: s.counted("parameters") / 1e6 for s in found},
        }
        if not all(costs.values()):
            continue
        for x, by_score in costs.items():
            points = []
            for s, cost in by_score.items():
                few = len(s.runs) < FRONT_SEEDS
                sd = s.deviation("mIoU") or 0
                points.append(_point(s.rival, cost, s.mean("mIoU"), sd=sd, hollow=few))
            line = _pareto_optimal([p for p in points if not p["hollow"]])
            panel = _panel(titles[key], x, "mIoU", points, line=line, log=True)
            by_cost.setdefault(x, []).append(panel)
    panels = [panel for of_cost in by_cost.values() for panel in of_cost]
    if not panels:
        return "accuracy, and accuracy_cost of the same data, recipe and flags"
    title = "Mean mIoU over seeds against cost, bars of one standard deviation"
    alt = "Mean mIoU of networks against their GFLOPs, latency and parameters"
    if any(p["hollow"] for panel in panels for p in panel["points"]):
        title += f"; hollow: fewer than {FRONT_SEEDS} seeds"
    if any(panel["line"] for panel in panels):
        alt += "; a line joins those that no other beats in both"
    return Picture(title, f"{alt}.", {"panels": panels}, draw.scatter)


def models(results: Results) -> Picture | str:
    panels = []
    for (backbone, size, batch, dtype, which, _), found in results.plain(MODELS).items():
        points = [
            _point(row["rival"], flops / 1e9, float(row["median_s"]) * 1e3)
            for row in load.measured(found)
            if (flops := number(row, "flops"))
        ]
        if points:
            title = f"{which}, {backbone}, {size}, batch {batch}, {dtype}"
            y = f"ms per batch of {batch}"
            panels.append(_panel(title, "GFLOPs per image, forward", y, points, from_zero=True))
    if not panels:
        return "models"
    alt = "Time of whole networks, for inference and for training, against their GFLOPs."
    return Picture("Whole networks: time against FLOPs", alt, {"panels": panels}, draw.scatter)


def paper(results: Results) -> Picture | str:
    counted = load.paper_counts(results)
    if len(counted) < len(PAPER):
        return f"models: {', '.join(map(load.name, PAPER))} with {PAPER_BACKBONE} at {PAPER_SIZE}"
    by_parameters, by_flops = [], []
    for network, row in counted.items():
        miou, _, printed = PAPER[network]
        hollow = _point(network, printed, miou, hollow=True)
        by_parameters += [{**hollow, "name": ""}]
        by_parameters += [_point(network, float(row["parameters"]) / 1e6, miou)]
        by_flops += [_point(network, float(row["flops"]) / 1e9, miou)]
    y = "mIoU on VOC 2012 as printed, %"
    hollow = "hollow: as printed, filled: counted"
    panels = [
        _panel(hollow, "millions of parameters", y, by_parameters),
        _panel("counted", "GFLOPs of one 513x513 image, forward", y, by_flops),
    ]
    alt = "The paper's mIoU of MFNet, DeepLabV3+ and EMANet against parameters, printed and "
    alt += "counted, and against the GFLOPs counted here."
    title = "The paper's Figure 6, and what is counted here"
    return Picture(title, alt, {"panels": panels}, draw.scatter)


# Bars.


def contexts(results: Results) -> Picture | str:
    sizes = load.context_passes(results)
    if not sizes:
        return "contexts, forward and forward + backward"
    size = "33x33" if "33x33" in sizes else next(iter(sizes))
    rows = sizes[size]
    rivals = [
        rival
        for rival in rows[FORWARD]
        if not any(rows[which].get(rival, {"skipped": "-"})["skipped"] for which in (FORWARD, BOTH))
    ]
    if not rivals:
        return "contexts, forward and forward + backward"
    columns = {
        "parameters, millions": (FORWARD, "parameters", 1e-6),
        "GFLOPs, forward": (FORWARD, "flops", 1e-9),
        "time / ASPP, forward": (FORWARD, "over_aspp", 1),
        "time / ASPP,\nforward + backward": (BOTH, "over_aspp", 1),
    }
    panels = []
    for title, (which, column, scale) in columns.items():
        values = [number(rows[which][rival], column) for rival in rivals]
        if any(value is None for value in values):
            return f"contexts: {column} of every context"
        values = [_round(value * scale) for value in values]
        panels.append({"title": title, "values": values, "one": column == "over_aspp"})
    content = {
        "names": [load.name(rival) for rival in rivals],
        "ours": [rival in OURS for rival in rivals],
        "panels": panels,
    }
    of = rows[FORWARD][rivals[0]]
    channels = f"{of['in_channels']} to {of['out_channels']} channels"
    title = f"What a context costs: {channels}, {size}, batch {of['batch']}, {of['dtype']}"
    alt = "Bars for each context: parameters, GFLOPs, and time over ASPP's, forward and with "
    alt += "backward."
    return Picture(title, alt, content, draw.bars)


def factorizers(results: Results) -> Picture | str:
    """Over the published lines, for the shape, dtype and layout that come first."""
    first: list[str] | None = None
    passes: dict[str, dict[str, Row]] = {}
    for (method, steps, *case, which, _), found in results.plain(FACTORIZERS).items():
        known = {row["rival"]: row for row in load.measured(found) if row["rival"] != COPY}
        first = first or case
        if case == first and EAGER in known:
            backward = "" if which == FORWARD else ",\nwith backward"
            passes[f"{method}, T = {steps}{backward}"] = known
    # Of a rival with CUDA graphs no memory is counted.
    shown = [
        rival
        for rival in (next(iter(passes.values())) if passes else ())
        if all(known.get(rival, {}).get("peak_bytes") for known in passes.values())
    ]
    if not first or not shown:
        return f"factorizers, {EAGER} among them"

    def panel(title: str, over_published: list[float]) -> Content:
        return {"title": title, "values": [_round(v) for v in over_published], "one": True}

    panels = [
        panel(f"time: {title}", [float(known[rival][f"over_{EAGER}"]) for rival in shown])
        for title, known in passes.items()
    ]
    title, known = list(passes.items())[-1]
    peaks = {rival: float(known[rival]["peak_bytes"]) for rival in shown}
    panels.append(panel(f"memory: {title}", [peak / peaks[EAGER] for peak in peaks.values()]))
    content = {
        "names": [load.name(rival) for rival in shown],
        "ours": [rival in OURS for rival in shown],
        "panels": panels,
    }
    shape, dtype, layout = first
    case = f"({', '.join(shape.split())}), {dtype}, {layout}"
    title = f"Factors of an image, over the published lines: {case}"
    alt = "Bars for each way to run em and nmf: time, and peak memory, over that of the published "
    alt += "lines."
    return Picture(title, alt, content, draw.bars)


def training(results: Results) -> Picture | str:
    panels = []
    for key, found in results.plain(TRAINING).items():
        known = [r for r in load.measured(found) if all(r[part] for part in PARTS)]
        if known:
            parts = {t: [_round(float(r[c]) * 1e3) for r in known] for c, t in PARTS.items()}
            names = [load.name(row["rival"]) for row in known]
            panels.append({"title": training_title(key), "names": names, "parts": parts})
    if not panels:
        return "training, with the parts of a step"
    alt = "For each network the milliseconds of a training step: loader, forward, backward, "
    alt += "optimiser, other."
    return Picture("Where the time of a training step goes", alt, {"panels": panels}, draw.stacked)


# The roofline.


def roofline(results: Results) -> Picture | str:
    """Contiguous inputs: in another layout the same points again."""
    rates: dict[str, dict[str, float]] = {}
    for (dtype, _), found in results.plain(CEILINGS).items():
        known = [row for row in load.measured(found) if row["rate"]]
        rates[dtype] = {row["rival"]: float(row["rate"]) for row in known}
    panels = {
        dtype: {"title": dtype, "ceilings": ceilings, "points": []}
        for dtype, ceilings in rates.items()
        if ceilings.keys() == {COPY, "matmul"}
    }
    for (_, dtype, layout, _, which, _), found in results.plain(OP).items():
        if dtype not in panels or layout != "contiguous":
            continue
        for row in load.measured(found):
            flops, floor = number(row, "flops"), number(row, "floor_bytes")
            if row["rival"] in draw.RIVALS and flops and floor:
                x, y = _round(flops / floor), _round(flops / float(row["median_s"]))
                point = {"rival": row["rival"], "pass": which, "x": x, "y": y}
                panels[dtype]["points"].append(point)
    drawn = [panel for panel in panels.values() if panel["points"]]
    if not drawn:
        return "ceilings (copy and matmul) and op, of one dtype"
    alt = "Speed of the op's rivals against the FLOPs they have for each byte that has to move, "
    alt += "under what the machine's memory and its matrix products allow."
    title = "The op under its roofline: contiguous, shared and per-image factors"
    return Picture(title, alt, {"panels": drawn}, draw.rooflines)


PLOTS: dict[str, Callable[[Results], Picture | str]] = {
    "pareto": pareto,
    "contexts": contexts,
    "factorizers": factorizers,
    "roofline": roofline,
    "paper": paper,
    "training": training,
    "models": models,
}
