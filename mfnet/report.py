"""``mfnet report RUN...``: curves, predictions and the comparison table of finished runs.

Everything is drawn from what the runs logged: ``metrics.csv``, ``summary.json``,
``samples.npz``, ``confusion.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mfnet.callbacks import SAMPLES, SUMMARY
from mfnet.files import atomic_write
from mfnet.run_directory import METRICS
from mfnet.scores import CONFUSION, class_table, markdown_table, read_confusion
from mfnet.visualize import Array, draw_confusion, draw_curves, draw_grid, save_figure

CURVES = {"mIoU": "val/mIoU", "fwIoU": "val/fwIoU"}
SUMMARY_KEYS: dict[str, Any] = {
    "model": str,
    "backbone": str,
    "parameters": int,
    "trainable_parameters": int,
    "gflops": (int, float, type(None)),
    "input_size": list,
    "class_names": list,
    "palette": list,
}


@dataclass(frozen=True)
class Samples:
    """The validation images a run was shown last: uint8 (H, W, 3) and masks (H, W), by image."""

    images: list[Array]
    truths: list[Array]
    predictions: list[Array]


@dataclass(frozen=True)
class Run:
    """What one training run left behind.

    ``epochs`` maps an epoch to what was logged in it last; ``best`` is the highest val/mIoU of all
    validations, behind its epoch (counted from 1).
    """

    folder: Path
    epochs: dict[int, dict[str, float]]
    best: tuple[int, float]
    summary: dict[str, Any]
    samples: Samples
    confusion: Tensor | None = None  # of runs from before it was recorded

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Epochs (counted from 1) in which ``metric`` was logged, and its values."""
        found = [(epoch + 1, row[metric]) for epoch, row in self.epochs.items() if metric in row]
        return [epoch for epoch, _ in found], [value for _, value in found]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a ``metrics.csv``, without their empty cells.

    Raises ``ValueError`` naming the file when it is empty, cut short or holds no numbers.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected CSV text, got binary data") from None
    header, *rows = list(csv.reader(text.splitlines())) or [[]]
    if not rows:
        raise ValueError(f"{path}: expected a header and rows of metrics, got an empty file")
    if not text.endswith("\n"):
        raise ValueError(f"{path}: the last line is cut short")
    if "epoch" not in header:
        raise ValueError(f"{path}: expected a column named epoch, got {', '.join(header)}")
    parsed = []
    for line, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: expected {len(header)} columns, got {len(row)}")
        try:
            cells = zip(header, row, strict=True)
            parsed.append({name: float(cell) for name, cell in cells if cell})
            if not parsed[-1].get("epoch", 0.0).is_integer():
                raise ValueError(f"expected a whole epoch, got {parsed[-1]['epoch']}")
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
    return parsed


def merge_epochs(rows: Sequence[dict[str, float]]) -> dict[int, dict[str, float]]:
    """Gather the rows that count by epoch; of several validations in one, the last remains."""
    epochs: dict[int, dict[str, float]] = {}
    for row in _that_count(rows):
        epochs.setdefault(int(row["epoch"]), {}).update(row)
    return epochs


def _that_count(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The rows of epochs; where the log goes back, what it had told from there on is void.

    A run resumed from an older checkpoint logs the steps after it once more: what counts is the
    last pass over them.
    """

    def place(row: dict[str, float]) -> tuple[float, float]:
        return row["epoch"], row.get("step", 0.0)

    kept: list[dict[str, float]] = []
    for row in rows:
        if "epoch" not in row:  # the learning-rate monitor's rows carry a step only
            continue
        if kept and place(row) < place(kept[-1]):
            kept = [earlier for earlier in kept if place(earlier) < place(row)]
        kept.append(row)
    return kept


def best_epoch(folder: Path) -> tuple[int, float]:
    """The epoch (counted from 1) with the highest val/mIoU that was logged, and that mIoU.

    Raises ``FileNotFoundError`` or ``ValueError`` naming the log when there is none in it.
    """
    rows = _that_count(read_metrics(folder / METRICS))
    scores = [(int(row["epoch"]) + 1, row["val/mIoU"]) for row in rows if "val/mIoU" in row]
    if not scores:
        raise ValueError(f"{folder / METRICS}: val/mIoU was never logged")
    return max(scores, key=lambda score: -math.inf if math.isnan(score[1]) else score[1])


def read_run(folder: Path) -> Run:
    """Read what a run left in its folder.

    Raises ``FileNotFoundError`` or ``ValueError`` naming the folder or the file at fault.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    path = folder / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected a run folder with {METRICS}, found none")
    epochs = merge_epochs(read_metrics(path))
    for metric in CURVES.values():
        if not any(metric in row for row in epochs.values()):
            raise ValueError(f"{path}: {metric} was never logged")
    summary = _read_summary(folder / SUMMARY)
    samples = _read_samples(folder / SAMPLES)
    path = folder / CONFUSION
    confusion = read_confusion(path, summary["class_names"]) if path.is_file() else None
    return Run(folder, epochs, best_epoch(folder), summary, samples, confusion)


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it is written at the first validation")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path}: expected JSON: {error}") from None
    for key, kind in SUMMARY_KEYS.items():
        if not isinstance(summary, dict) or not isinstance(summary.get(key, ...), kind):
            raise ValueError(f"{path}: the entry {key} is missing or of the wrong type")
    return summary


def _read_samples(path: Path) -> Samples:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it is written at every validation")
    try:
        with np.load(path) as archive:
            count = sum(name.startswith("image_") for name in archive.files)
            return Samples(
                *(
                    [archive[f"{kind}_{index}"] for index in range(count)]
                    for kind in ("image", "truth", "prediction")
                )
            )
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a whole samples file: {error}") from None


def label_runs(folders: Sequence[Path]) -> list[str]:
    """Short names that tell the folders apart: their paths without the shared ends.

    Raises ``ValueError`` for a folder given twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    for index, path in enumerate(parts):
        if path in parts[:index]:
            raise ValueError(f"{folders[index]}: the run is given twice")
    if len(parts) == 1:
        return [parts[0][-1]]
    start = _shared(parts)
    end = _shared([path[start:][::-1] for path in parts])
    return ["/".join(path[start : len(path) - end]) for path in parts]


def _shared(paths: Sequence[tuple[str, ...]]) -> int:
    """How many leading parts all paths share, leaving at least one part to each."""
    longest = min(map(len, paths)) - 1
    levels = list(zip(*paths, strict=False))[:longest]
    return sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))


def _check_comparable(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if run.summary["class_names"] != first.summary["class_names"]:
            raise ValueError(f"{run.folder}: its classes differ from those of {first.folder}")
        ours = [*run.samples.images, *run.samples.truths]
        theirs = [*first.samples.images, *first.samples.truths]
        if len(ours) != len(theirs) or not all(map(np.array_equal, ours, theirs)):
            raise ValueError(f"{run.folder}: its sample images differ from those of {first.folder}")


def comparison_table(runs: dict[str, Run]) -> str:
    """The runs as a Markdown table: the last epoch's metrics, the best mIoU, the model's costs."""
    header = (
        "Run", "Model", "Backbone", "Epochs", "mIoU (%)", "fwIoU (%)", "Best mIoU (%)",
        "Parameters (M)", "GFLOPs", "Input",
    )  # fmt: skip
    rows = []
    for name, run in runs.items():
        epochs, miou = run.series("val/mIoU")
        _, fwiou = run.series("val/fwIoU")
        best, highest = run.best
        gflops = run.summary["gflops"]
        rows.append((
            name,
            run.summary["model"],
            run.summary["backbone"],
            str(epochs[-1]),
            f"{100 * miou[-1]:.2f}",
            f"{100 * fwiou[-1]:.2f}",
            f"{100 * highest:.2f} (epoch {best})",
            f"{run.summary['parameters'] / 1e6:.2f}",
            "unknown" if gflops is None else f"{gflops:.1f}",
            " x ".join(map(str, run.summary["input_size"])),
        ))  # fmt: skip
    return markdown_table(header, rows)


def class_section(name: str, run: Run, picture: str) -> str:
    """The scores of a run's classes and the place of its confusion matrix, in Markdown."""
    assert run.confusion is not None
    return (
        f"\n## Classes: {name}\n\n"
        f"{class_table(run.confusion, run.summary['class_names'])}\n"
        "Of the last validation; pixels are those of the truth. A score without a pixel to divide "
        "by is not defined, and left empty.\n\n"
        f"![confusion matrix of {name}]({picture})\n"
    )


def report(folders: Sequence[str | Path], output: str | Path = "report") -> str:
    """Write ``curves.png``, ``predictions.png``, ``confusion-<run>.png`` and ``report.md``.

    A run from before ``confusion.csv`` was recorded is without its part.

    Everything is read and checked before the first file is written. Returns the comparison
    table. Raises ``FileNotFoundError`` or ``ValueError`` naming the folder or file at fault.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("report: expected at least one run folder, got none")
    labels = label_runs(paths)
    runs = dict(zip(labels, map(read_run, paths), strict=True))
    _check_comparable(list(runs.values()))

    first = next(iter(runs.values()))
    classes = first.summary["class_names"]
    try:
        grid = draw_grid(
            first.samples.images,
            first.samples.truths,
            {
                name if len(runs) > 1 else "prediction": run.samples.predictions
                for name, run in runs.items()
            },
            classes,
            first.summary["palette"],
        )
    except ValueError as error:
        raise ValueError(f"{first.folder / SAMPLES}: {error}") from None
    curves = draw_curves(
        {
            title: {name: run.series(metric) for name, run in runs.items()}
            for title, metric in CURVES.items()
        }
    )
    table = comparison_table(runs)
    pictures = {
        name: "confusion-" + re.sub(r"[^\w.-]+", "-", name) + ".png"
        for name, run in runs.items()
        if run.confusion is not None
    }

    output = Path(output)
    save_figure(curves, output / "curves.png")
    save_figure(grid, output / "predictions.png")
    for name, picture in pictures.items():
        save_figure(draw_confusion(np.asarray(runs[name].confusion), classes), output / picture)
    with atomic_write(output / "report.md") as partial:
        partial.write_text(
            "# Comparison\n\n"
            f"{table}\n"
            "mIoU and fwIoU are those of the last epoch. GFLOPs: forward pass of one image, "
            "2 per multiply-add.\n\n"
            "![mIoU and fwIoU over epochs](curves.png)\n\n"
            "![image, truth, predictions](predictions.png)\n"
            + "".join(class_section(name, runs[name], pictures[name]) for name in pictures),
            encoding="utf-8",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``mfnet report``; user errors are raised, for the caller to print."""
    parser = argparse.ArgumentParser(
        prog="mfnet report",
        description="Draw curves, predictions and confusion matrices, and write tables, of runs.",
    )
    path: Any = {"type": lambda text: Path(text).expanduser()}
    parser.add_argument("runs", nargs="+", metavar="RUN", **path, help="run folder")
    parser.add_argument(
        "--output", **path, default=Path("report"), metavar="DIR", help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    print(report(options.runs, options.output), end="")
    print(f"written: {options.output}/report.md and its pictures")
