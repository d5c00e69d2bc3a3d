"""Bytes counted, targets evaluated, the page written: arithmetic done by hand."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import figures
from benchmarks.figures import (
    BACKWARD,
    BOTH,
    COMPILE,
    COPY,
    EAGER,
    FORWARD,
    NATIVE,
    TRITON,
    Cell,
    Result,
)

CELL = Cell((4, 10, 3, 7), "bfloat16", "contiguous", "per image")


def result(cell: Cell = CELL, which: str = BOTH, **over_base: float) -> Result:
    """Every rival's time over native's, by name with underscores; the copy takes half of it."""
    ratios = {NATIVE: 1.0} | {name.replace("_", " "): r for name, r in over_base.items()}
    return Result(
        cell,
        which,
        seconds={COPY: 0.5} | ratios,
        spread={},
        of_copy={name: 0.5 / r for name, r in ratios.items()},
        over_base=ratios,
        base=NATIVE,
    )


def find(results: list[Result], name: str, host: dict | None = None) -> figures.Target:
    return next(t for t in figures.targets(results, host or {}) if t.name.startswith(name))


def test_bytes_of_per_image_factors():
    x, y, z, mse = 4 * 10 * 7 * 2, 4 * 10 * 3 * 2, 4 * 3 * 7 * 2, 4
    assert CELL.x_bytes() == x
    forward = (x + y + z) + (x + mse)
    backward = (x + y + z + x + mse) + (x + y + z)
    assert CELL.counted_bytes(FORWARD) == forward
    assert CELL.counted_bytes(BACKWARD) == backward
    assert CELL.counted_bytes(BOTH) == forward + backward


def test_bytes_of_shared_factors():
    cell = Cell(CELL.shape, "float32", "channels_last", "shared")
    x, x_hat, y, z, mse = 4 * 10 * 7 * 4, 10 * 7 * 4, 10 * 3 * 4, 3 * 7 * 4, 4
    assert cell.counted_bytes(FORWARD) == (x + y + z) + (x_hat + mse)
    # the gradient of the expanded X' comes for every image
    assert cell.counted_bytes(BACKWARD) == (x + y + z + x + mse) + (x + y + z)


def test_bandwidth_comes_from_counted_bytes():
    r = dataclasses.replace(result(which=FORWARD), seconds={NATIVE: 1e-6})
    assert r.gb_per_s(NATIVE) == pytest.approx(CELL.counted_bytes(FORWARD) / 1e3)


def test_cells_are_every_combination_once():
    found = figures.cells(figures.SHAPES)
    assert len(found) == len(set(found)) == 6 * 2 * 2 * 2
    assert [c.shape for c in found[:6]] == figures.SHAPES
    assert {(c.dtype, c.layout, c.factors) for c in found[:6]} == {
        ("bfloat16", "contiguous", "per image")
    }


def test_a_familys_figure_is_its_fastest_members():
    r = result(**{"eager": 4.0, "eager, at its best": 3.0, "compile, max-autotune": 2.0})
    assert r.best(r.over_base, EAGER) == 3.0
    assert r.best(r.over_base, COMPILE) == 2.0
    assert r.best(r.over_base, TRITON) is None


@pytest.mark.parametrize(("worst", "met"), [(0.85, True), (0.849, False)])
def test_bandwidth_target_is_the_lowest_of_all_layouts(worst, met):
    shape = figures.BANDWIDTH_SHAPES[0]
    shares = {("contiguous", "per image"): 0.9, ("channels_last", "shared"): worst}
    results = []
    for (layout, factors), share in shares.items():
        r = result(Cell(shape, "bfloat16", layout, factors), FORWARD)
        results.append(dataclasses.replace(r, of_copy={NATIVE: share}))
    results.append(result(Cell(shape, "float32", "contiguous", "per image"), FORWARD))
    target = find(results, f"forward {shape}")
    assert target.met is met
    assert "channels_last, shared, the lowest of 2 of 4" in target.measured
    assert find(results, f"forward {figures.BANDWIDTH_SHAPES[1]}").met is None
    assert find(results, f"backward {shape}").met is None


def six(ratios: list[float], family: str = EAGER) -> list[Result]:
    return [
        result(Cell(shape, "bfloat16", "contiguous", "per image"), **{family: r})
        for shape, r in zip(figures.SHAPES, ratios, strict=True)
    ]


def test_speed_target_is_a_geometric_mean_over_six_shapes():
    assert figures.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    name = "forward + backward against eager, bfloat16, contiguous"
    met = find(six([1.5, 6.0, 1.5, 6.0, 3.0, 3.1]), name)
    assert met.met
    assert met.measured.startswith("3.02x, from 1.50x to 6.00x")
    missed = find(six([1.5, 6.0, 1.5, 6.0, 3.0, 2.0]), name)
    assert missed.met is False
    assert "short by 7%" in missed.measured  # 3 / 2.804
    assert find(six([9.0] * 6)[:5], name).measured == "not evaluated: 5 of 6 shapes measured"
    assert find(six([9.0] * 6), "forward + backward against compile").met is None


def test_slower_nowhere_names_the_worst_case():
    results = six([1.1, 1.2, 0.9, 1.3, 1.4, 1.5])
    target = find(results, "forward + backward, per image: slower nowhere")
    assert target.met is False
    assert str(results[2].cell) in target.measured
    assert "slower in 1 of 6" in target.measured
    # A shared factor's figures, or forward alone, are no part of it.
    others = [
        result(dataclasses.replace(CELL, factors="shared"), eager=0.5),
        result(which=FORWARD, eager=0.5),
    ]
    assert find(six([2.0] * 6) + others, target.name).met


@pytest.mark.parametrize(("extra", "met"), [(5, True), (6, False)])
def test_memory_target_is_below_a_hundredth_of_x(extra, met):
    r = dataclasses.replace(result(), extra_bytes={NATIVE: extra, EAGER: 10**6})
    assert CELL.x_bytes() == 560
    target = find([r], "extra memory")
    assert target.met is met
    assert f"{extra / 560:.2%}" in target.measured


def test_triton_target_and_its_absence():
    results = [result(mfops_triton=1.2), result(which=FORWARD, mfops_triton=1.31)]
    target = find(results, "Triton against native")
    assert target.met is False
    assert target.measured.startswith("1.31x at most (forward, ")
    assert find(results[:1], "Triton against native").met
    assert find([result()], "Triton against native").met is None


def test_host_target():
    host = {"no gradients": {"mfops": 0.8, "eager": 1.0}, "gradients wanted": {"eager": 1.0}}
    assert find([], "host time per call, no gradients", host).met
    assert find([], "host time per call, gradients wanted", host).met is None


def test_nothing_measured_meets_nothing():
    assert {t.met for t in figures.targets([], {})} == {None}


def test_page_has_a_row_for_each_result_and_says_what_is_left_out():
    r = dataclasses.replace(result(eager=3.25), extra_bytes={NATIVE: 28})
    nothing = Result(CELL, FORWARD, seconds={COPY: 1.0}, spread={}, of_copy={}, over_base={})
    report = {
        "title": "Title",
        "provenance": {"GPU": "a GPU"},
        "host": {
            "shape": (1, 2, 3, 4),
            "dtype": "float32",
            "microseconds": {"no gradients": {"mfops": 12.34}},
            "over_textbook": {"no gradients": {"mfops": 0.5}},
        },
        "not_measured": {"mfops triton: no Triton": ["a", "b", "c", "d"]},
        "failed": {"eager: wrong": ["e"]},
    }
    page = figures.markdown(report, [r, nothing], figures.targets([r], {}))
    header = next(line for line in page.splitlines() if line.startswith("| (B, C, K, N)"))
    for row in (figures.row(r), figures.row(nothing)):
        assert row in page
        assert row.count("|") == header.count("|")
    assert "| 50% | - | - | 3.25 | 5.00% |" in figures.row(r)
    assert "| no gradients | mfops | 12.3 | 0.50 |" in page
    assert "- not measured: mfops triton: no Triton (4 cases)" in page
    assert "- failed: eager: wrong (e)" in page
    assert "- GPU: a GPU" in page
