"""Drawing: exact colors, readable refusals, whole files."""

import errno

import numpy as np
import pytest
from PIL import Image

from mfnet.files import atomic_write
from mfnet.visualize import (
    IGNORE_COLOR,
    colorize,
    draw_curves,
    draw_grid,
    overlay,
    save_figure,
    save_image,
)

PALETTE = [(0, 0, 0), (200, 10, 30), (0, 0, 250)]
NAMES = ["background", "disc", "square"]


def test_colorize_paints_classes_and_ignored_pixels():
    painted = colorize(np.array([[0, 1], [2, 255]]), PALETTE)
    assert painted.dtype == np.uint8
    assert painted.tolist() == [
        [list(PALETTE[0]), list(PALETTE[1])],
        [list(PALETTE[2]), list(IGNORE_COLOR)],
    ]


@pytest.mark.parametrize("label", [3, -1])
def test_colorize_refuses_unknown_labels(label):
    with pytest.raises(ValueError, match=rf"mask: expected labels 0 to 2 or 255, got {label}"):
        colorize(np.array([[0, label]]), PALETTE)


def test_colorize_refuses_other_ranks():
    with pytest.raises(ValueError, match=r"mask: expected shape \(H, W\), got \(1, 2, 2\)"):
        colorize(np.zeros((1, 2, 2), dtype=int), PALETTE)


def test_overlay_blends_classes_and_keeps_ignored_pixels():
    image = np.full((1, 2, 3), 100, dtype=np.uint8)
    blended = overlay(image, np.array([[1, 255]]), PALETTE, opacity=0.5)
    assert blended.tolist() == [[[150, 55, 65], [100, 100, 100]]]


def test_overlay_refuses_another_size():
    with pytest.raises(ValueError, match=r"image: expected shape \(4, 5, 3\) as the mask"):
        overlay(np.zeros((5, 4, 3), np.uint8), np.zeros((4, 5), int), PALETTE)


def grid_of(predictions, sizes=((8, 12), (16, 8))):
    images = [np.zeros((*size, 3), np.uint8) for size in sizes]
    truths = [np.zeros(size, int) for size in sizes]
    truths[0][0, 0] = 255
    return draw_grid(images, truths, predictions, NAMES, PALETTE)


def test_grid_has_a_column_per_run_and_names_the_classes_shown():
    first, second = [np.full(size, 2) for size in ((8, 12), (16, 8))], None
    second = [np.zeros_like(mask) for mask in first]
    figure = grid_of({"mfnet": first, "emanet": second})
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["image", "truth", "mfnet", "emanet"]
    assert len(figure.axes) == 2 * 4
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["background", "square", "ignored"]
    assert figure.axes[4].images[0].get_array()[0, 0].tolist() == list(PALETTE[2])


def test_grid_refuses_a_run_with_fewer_predictions():
    with pytest.raises(ValueError, match="mfnet: expected 2 masks, got 1"):
        grid_of({"mfnet": [np.zeros((8, 12), int)]})


def test_figures_legend_lies_below_every_panel():
    lines = {f"a rather long name of run {i}": ([1, 2, 3], [0.1, 0.2, 0.1 * i]) for i in range(9)}
    figure = draw_curves({"mIoU": lines, "fwIoU": lines})
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.y0 >= 0
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1
    assert all(legend.y1 <= axes.get_tightbbox().y0 for axes in figure.axes)


def test_curves_are_percentages_and_runs_differ_in_look():
    lines = {"a": ([1, 2], [0.25, 0.5]), "b": ([1, 2], [0.1, float("nan")])}
    (axes,) = draw_curves({"mIoU": lines}).axes
    a, b = axes.lines
    assert a.get_ydata().tolist() == [25, 50]
    assert a.get_color() != b.get_color()
    assert a.get_linestyle() != b.get_linestyle()
    assert a.get_marker() != b.get_marker()


def test_saved_pictures_open(tmp_path):
    save_image(np.full((4, 6, 3), 7, np.uint8), tmp_path / "new" / "a.png")
    assert Image.open(tmp_path / "new" / "a.png").size == (6, 4)
    save_figure(draw_curves({"mIoU": {"a": ([1], [0.5])}}), tmp_path / "new" / "b.png")
    assert Image.open(tmp_path / "new" / "b.png").width > 100
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.png", "b.png"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fill_the_disk():
        with atomic_write(target) as partial:
            partial.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*a\.txt'"):
        fill_the_disk()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
