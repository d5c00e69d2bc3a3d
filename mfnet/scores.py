"""Scores from a confusion matrix, and the two files that keep them: ``confusion.csv`` and the
per-class table ``scores-<stage>.csv``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mfnet.files import atomic_write

CONFUSION = "confusion.csv"
PER_CLASS = ("IoU", "Dice", "precision", "recall")


def segmentation_scores(confusion: Tensor) -> dict[str, Tensor]:
    """The usual scores of a confusion matrix (classes, classes), rows the truth, float64.

    With ``tp_c`` the diagonal, ``truth_c`` the sums of rows, ``predicted_c`` those of columns:

    - ``IoU_c = tp_c / (truth_c + predicted_c - tp_c)`` (Jaccard, 1912; the score of PASCAL VOC);
    - ``Dice_c = 2 tp_c / (truth_c + predicted_c)`` (Dice, 1945), which is F1, the harmonic mean of
      the next two;
    - ``precision_c = tp_c / predicted_c``;
    - ``recall_c = tp_c / truth_c``, which others call the accuracy of a class;
    - ``mIoU``: the mean of IoU_c over the classes that occur in the truth or in the predictions;
    - ``fwIoU = sum_c truth_c / all IoU_c``; ``accuracy = sum_c tp_c / all``.

    A score that would divide by zero is NaN: an absent class has no IoU and no Dice, one that is
    never predicted no precision, one without a pixel no recall. ``mIoU``, ``fwIoU`` and
    ``accuracy`` are NaN where no pixel has a truth. All are taken over the whole set, not averaged
    per image.
    """
    confusion = confusion.double()
    hits, truth, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    iou = hits / (truth + predicted - hits)
    frequency = truth / truth.sum()
    return {
        "IoU": iou,
        "Dice": 2 * hits / (truth + predicted),
        "precision": hits / predicted,
        "recall": hits / truth,
        "mIoU": iou.nanmean(),
        "fwIoU": (frequency * iou).nansum() + 0 * frequency[0],  # NaN where there is no truth
        "accuracy": hits.sum() / truth.sum(),
    }


def class_table(confusion: Tensor, class_names: Sequence[str]) -> str:
    """Pixels (of the truth) and scores in percent of each class, and their means, in Markdown.

    A score that is not defined is an empty cell, and no part of the mean.
    """
    scores = segmentation_scores(confusion)
    pixels = [f"{int(count):,}" for count in confusion.sum(1)]
    columns = [(scores[name], scores[name].nanmean()) for name in PER_CLASS]
    rows = [
        (name, pixels[index], *(_cell(100 * each[index], 2) for each, _ in columns))
        for index, name in enumerate(class_names)
    ]
    mean = ("*mean*", "", *(_cell(100 * mean, 2) for _, mean in columns))
    return markdown_table(("Class", "Pixels", *(f"{n} (%)" for n in PER_CLASS)), [*rows, mean])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are as wide in the source as on the page."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (header, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def write_class_scores(confusion: Tensor, class_names: Sequence[str], path: Path) -> None:
    """One line per class: its pixels and its scores, 0 to 1, empty where not defined."""
    scores = segmentation_scores(confusion)
    pixels = confusion.sum(1).tolist()
    _write(path, [
        ["class", "pixels", *PER_CLASS],
        *(
            [name, pixels[index], *(_cell(scores[score][index], 6) for score in PER_CLASS)]
            for index, name in enumerate(class_names)
        ),
    ])  # fmt: skip


def write_confusion(confusion: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Numbers of pixels: a line for each class of the truth, a column for each prediction."""
    counts = confusion.tolist()
    rows = [[name, *row] for name, row in zip(class_names, counts, strict=True)]
    _write(path, [["truth", *class_names], *rows])


def read_confusion(path: Path, class_names: Sequence[str]) -> Tensor:
    """What ``write_confusion`` wrote: int64 (classes, classes).

    Raises ``ValueError`` naming the file when it is not whole or has other classes.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        counts = torch.tensor([[int(cell) for cell in row[1:]] for row in rows])
    except ValueError as error:  # UnicodeDecodeError and rows of different lengths too
        raise ValueError(f"{path}: expected whole numbers of pixels: {error}") from None
    names = list(class_names)
    if header[1:] != names or [row[0] for row in rows if row] != names:
        raise ValueError(f"{path}: expected a line and a column for each of {', '.join(names)}")
    if counts.shape != (len(names), len(names)) or counts.min() < 0:
        raise ValueError(f"{path}: expected {len(names)} x {len(names)} numbers of pixels")
    return counts


def _cell(value: Tensor, digits: int) -> str:
    return "" if value.isnan() else f"{float(value):.{digits}f}"


def _write(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
