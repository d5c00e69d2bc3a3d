"""Drawing masks, overlays, prediction grids and training curves. Nothing here reads or logs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from mfnet.constants import IGNORE_INDEX
from mfnet.files import atomic_write

Color = tuple[int, int, int]
Array = NDArray[Any]

IGNORE_COLOR: Color = (224, 224, 224)

# Okabe and Ito's colors, distinct under the common color-vision deficiencies; their yellow is
# left out, too pale for a line on white. Line styles and markers repeat the distinction.
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def colorize(mask: Array, palette: Sequence[Color]) -> Array:
    """Paint a mask of class indices (H, W) with ``palette``: uint8 RGB (H, W, 3).

    Ignored pixels (255) become light gray. Raises ``ValueError`` for another rank and for a label
    that is neither a class nor 255.
    """
    return np.array(_painted(np.asarray(mask), palette))


def _painted(mask: Array, palette: Sequence[Color]) -> Image.Image:
    if mask.ndim != 2:
        raise ValueError(f"mask: expected shape (H, W), got {mask.shape}")
    wrong = mask[((mask < 0) | (mask >= len(palette))) & (mask != IGNORE_INDEX)]
    if wrong.size:
        raise ValueError(
            f"mask: expected labels 0 to {len(palette) - 1} or {IGNORE_INDEX}, got "
            f"{wrong.min() if wrong.min() < 0 else wrong.max()}"
        )
    colors = np.full((IGNORE_INDEX + 1, 3), IGNORE_COLOR, np.uint8)
    colors[: len(palette)] = palette
    picture = Image.fromarray(np.ascontiguousarray(mask, np.uint8))
    picture.putpalette(colors.tobytes())
    return picture.convert("RGB")


def overlay(image: Array, mask: Array, palette: Sequence[Color], opacity: float = 0.55) -> Array:
    """Blend the painted mask (H, W) over a uint8 RGB image (H, W, 3) of the same size.

    Ignored pixels (255) show the image alone. Raises ``ValueError`` when the shapes differ.
    """
    image, mask = np.asarray(image), np.asarray(mask)
    if image.shape != (*mask.shape, 3):
        raise ValueError(f"image: expected shape {(*mask.shape, 3)} as the mask, got {image.shape}")
    # Pillow works on bytes, where torchvision's draw_segmentation_masks takes ten times the memory.
    picture = Image.fromarray(np.ascontiguousarray(image))
    blended = Image.blend(picture, _painted(mask, palette), opacity)
    return np.array(Image.composite(blended, picture, Image.fromarray(mask != IGNORE_INDEX)))


def save_image(image: Array, path: Path) -> None:
    """Write a uint8 RGB image (H, W, 3); no half-written file is left behind."""
    with atomic_write(path) as partial:
        Image.fromarray(np.ascontiguousarray(image)).save(partial)


def save_mask(mask: Array, palette: Sequence[Color], path: Path) -> None:
    """Write class indices uint8 (H, W) as a palette PNG; no half-written file is left behind."""
    picture = Image.fromarray(np.ascontiguousarray(mask))
    picture.putpalette(np.asarray(palette, np.uint8).tobytes())
    with atomic_write(path) as partial:
        picture.save(partial)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; no half-written file is left behind."""
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=100, facecolor="white")


def _legend_shape(entries: int, width: float, entry_width: float) -> tuple[int, int]:
    """Rows, and entries per row, of a legend that fits ``width`` with rows of even length."""
    rows = math.ceil(entries / max(1, int(width / entry_width)))
    return rows, math.ceil(entries / rows)


def _class_patches(
    masks: Sequence[Array], class_names: Sequence[str], palette: Sequence[Color]
) -> list[Patch]:
    """Entries of a legend, for the classes that occur in the masks."""
    labels = np.unique(np.concatenate([np.unique(mask) for mask in masks]))
    entries = [(class_names[i], palette[i]) for i in labels if i != IGNORE_INDEX]
    if IGNORE_INDEX in labels:
        entries.append(("ignored", IGNORE_COLOR))
    return [
        Patch(facecolor=np.divide(color, 255), edgecolor="#555555", label=name)
        for name, color in entries
    ]


def draw_grid(
    images: Sequence[Array],
    truths: Sequence[Array],
    predictions: Mapping[str, Sequence[Array]],
    class_names: Sequence[str],
    palette: Sequence[Color],
) -> Figure:
    """One row per image: the image, the truth, one column per entry of ``predictions``.

    ``images`` are uint8 (H, W, 3), masks integer (H, W). The legend below names the classes
    that occur in the masks shown.
    """
    columns = {"image": list(images)}
    for title, masks in {"truth": truths, **predictions}.items():
        if len(masks) != len(images):
            raise ValueError(f"{title}: expected {len(images)} masks, got {len(masks)}")
        columns[title] = [colorize(mask, palette) for mask in masks]
    if not images:
        raise ValueError("images: expected at least one, got none")

    shown = [*truths, *(mask for masks in predictions.values() for mask in masks)]
    handles = _class_patches(shown, class_names, palette)

    # Everything is laid out in inches, so that rows of any aspect ratio leave no empty bands.
    width = max(2.4 * len(columns), 7.2)
    cell = width / len(columns)
    heights = [cell * image.shape[0] / image.shape[1] for image in images]
    longest = max(len(str(patch.get_label())) for patch in handles)
    rows, per_row = _legend_shape(len(handles), width, 0.55 + 0.085 * longest)
    legend = 0.15 + 0.23 * rows
    title_height = 0.3
    total = title_height + sum(heights) + legend
    figure = Figure(figsize=(width, total))
    grid = figure.add_gridspec(
        len(images),
        len(columns),
        height_ratios=heights,
        left=0.005,
        right=0.995,
        top=1 - title_height / total,
        bottom=legend / total,
        wspace=0.02,
        hspace=0.03,
    )
    for column, (title, pictures) in enumerate(columns.items()):
        for row, picture in enumerate(pictures):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(picture, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=11, pad=4)
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=per_row,
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
    return figure


def draw_curves(
    panels: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]],
) -> Figure:
    """Percentages over epochs: one panel per title, one line (epochs, fractions) per run.

    The runs' legend lies below the panels, clear of every line.
    """
    runs = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    longest = max(map(len, runs))
    width = 4.8 * len(panels)
    rows, per_row = _legend_shape(len(runs), width, 0.8 + 0.09 * longest)
    legend = 0.1 + 0.25 * rows
    total = 3.4 + legend
    figure = Figure(figsize=(width, total), layout="constrained")
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)  # asked for above
    engine.set(rect=(0, legend / total, 1, 0.98 - legend / total))
    handles = {}
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for name, (epochs, values) in lines.items():
            index = runs.index(name)
            (handles[name],) = axes.plot(
                epochs,
                100 * np.asarray(values, dtype=float),
                color=LINE_COLORS[index % len(LINE_COLORS)],
                linestyle=LINE_STYLES[index % len(LINE_STYLES)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                markevery=max(1, len(epochs) // 12),
                linewidth=1.6,
                label=name,
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"{title} (%)")
        axes.set_xlim(0, 1.02 * max(max(epochs) for epochs, _ in lines.values()))
        axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(True, color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles=[handles[name] for name in runs],
        loc="lower center",
        ncols=per_row,
        frameon=False,
        fontsize=10,
    )
    return figure


def draw_confusion(counts: Array, class_names: Sequence[str]) -> Figure:
    """A confusion matrix (classes, classes), rows the truth: the share of each row, in percent.

    A class without a pixel in the truth has a gray row. A cell below half a percent has no number.
    """
    counts = np.asarray(counts, dtype=float)
    pixels = counts.sum(1, keepdims=True)
    shares = np.divide(counts, pixels, out=np.full_like(counts, np.nan), where=pixels > 0)
    # Everything is laid out in inches, so that a cell holds its number whatever the matrix's size.
    cell, margin = 0.42, 0.5 + 0.075 * max(map(len, class_names))
    side = max(cell * len(class_names), 2.4)
    width, height = margin + side + 0.2, margin + side + 0.5
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(
        (margin / width, margin / height, side / width, side / height),
        facecolor=np.divide(IGNORE_COLOR, 255),
    )
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005:
            color = "white" if share > 0.55 else "black"
            text = f"{100 * share:.0f}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    ticks = range(len(class_names))
    axes.set_xticks(ticks, class_names, rotation=90, fontsize=9)
    axes.set_yticks(ticks, class_names, fontsize=9)
    axes.set_xlabel("prediction", fontsize=10)
    axes.set_ylabel("truth", fontsize=10)
    axes.set_title("% of each true class's pixels", fontsize=11)
    return figure
