"""The GPU's targets, evaluated on made-up rows: arithmetic done by hand."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import bench_factorizers, bench_op
from benchmarks.bench_op import BANDWIDTH_SHAPES, GPU_SHAPES, Case
from benchmarks.kernels import BOTH, FORWARD, PASSES
from benchmarks.kernels import Figure as KernelFigure
from benchmarks.questions import COMPILE, EAGER, NATIVE, TRITON
from benchmarks.report import targets
from benchmarks.report.targets import Figure, Target
from benchmarks.rows import Row

CASE = Case((4, 10, 3, 7), "bfloat16", "contiguous", "per image")
BEST = "eager, at its best"


def figure(
    case: Case = CASE, which: str = BOTH, of_copy: float = 0.5, extra: int = 0, **ratios: float
) -> list[Row]:
    """Native takes a second, the others so many times that."""
    columns = KernelFigure(case, which).columns() | {"skipped": ""}
    native = {
        "rival": NATIVE,
        "extra_bytes": str(extra),
        "x_bytes": str(case.x_bytes()),
    }
    others = [{"rival": name, "extra_bytes": "1000000"} for name in ratios]
    rows = []
    for row, ratio in zip([native, *others], [1.0, *ratios.values()], strict=True):
        time = {"median_s": ratio, f"over_{NATIVE}": ratio, "over_copy": ratio / of_copy}
        time = {column: str(value) for column, value in time.items()}
        rows.append({**columns, **time, **row})
    return rows


def find(op: list[list[Row]], name: str, host: list[list[Row]] | None = None) -> Target:
    return next(t for t in targets.targets(op, host or []) if t.name.startswith(name))


def test_a_gpu_is_measured_on_every_combination_once():
    found = bench_op.figures("cuda", small=False)
    assert len(found) == len(set(found)) == 6 * 2 * 2 * 2 * len(PASSES)
    cases = [f.case for f in found]
    assert cases[:: len(PASSES)] == list(dict.fromkeys(cases))  # a case's passes, one by one
    bandwidth, rest = cases[: 8 * len(PASSES)], cases[8 * len(PASSES) :]
    assert {(c.shape, c.dtype) for c in bandwidth} == {(s, "bfloat16") for s in BANDWIDTH_SHAPES}
    assert [c.shared for c in rest] == sorted(c.shared for c in rest)


def test_a_familys_figure_is_its_fastest_members():
    f = Figure.of(figure(**{EAGER: 4.0, BEST: 3.0, COMPILE: 2.0}), Case, "factors")
    assert f.over_native("eager") == 3.0
    assert f.over_native("compile") == 2.0
    assert f.over_native(TRITON) is None


def test_a_rival_that_was_not_measured_is_in_no_figure():
    rows = figure(**{EAGER: 4.0})
    rows.append({**rows[0], "rival": COMPILE, "median_s": "", "skipped": "failed: no compiler"})
    f = Figure.of(rows, Case, "factors")
    assert f.over_native("compile") is None
    assert list(f.rivals) == [NATIVE, EAGER]


@pytest.mark.parametrize(("worst", "met"), [(0.85, True), (0.849, False)])
def test_bandwidth_target_is_the_lowest_of_all_layouts(worst, met):
    shape = BANDWIDTH_SHAPES[0]
    shares = {("contiguous", "per image"): 0.9, ("channels_last", "shared"): worst}
    figures = [
        figure(Case(shape, "bfloat16", *where), FORWARD, of_copy=share)
        for where, share in shares.items()
    ]
    figures.append(figure(Case(shape, "float32", "contiguous", "per image"), FORWARD))
    target = find(figures, f"forward {shape}")
    assert target.met is met
    assert "channels_last, shared, the lowest of 2 of 4" in target.measured
    assert find(figures, f"forward {BANDWIDTH_SHAPES[1]}").met is None
    assert find(figures, f"backward {shape}").met is None


def six(ratios: list[float]) -> list[list[Row]]:
    return [
        figure(Case(shape, "bfloat16", "contiguous", "per image"), **{EAGER: ratio})
        for shape, ratio in zip(GPU_SHAPES, ratios, strict=True)
    ]


def test_speed_target_is_a_geometric_mean_over_six_shapes():
    assert targets.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    name = "forward + backward against eager, bfloat16, contiguous"
    met = find(six([1.5, 6.0, 1.5, 6.0, 3.0, 3.1]), name)
    assert met.met
    assert met.measured == "3.02x, from 1.50x to 6.00x; at a copy's speed 6.03x"
    missed = find(six([1.5, 6.0, 1.5, 6.0, 3.0, 2.0]), name)
    assert missed.met is False
    assert "short by 7%" in missed.measured  # 3 / 2.804
    five = find(six([9.0] * 6)[:5], name)
    assert five.measured == "not evaluated: 5 of 6 shapes measured; at a copy's speed 18.00x"
    assert find(six([9.0] * 6), "forward + backward against compile").met is None


def test_slower_nowhere_names_the_worst_case():
    figures = six([1.1, 1.2, 0.9, 1.3, 1.4, 1.5])
    target = find(figures, "forward + backward, per image: slower nowhere")
    assert target.met is False
    assert str(Figure.of(figures[2], Case, "factors").case) in target.measured
    assert "slower in 1 of 6" in target.measured
    # A shared factor's figures, or forward alone, are no part of it.
    others = [
        figure(dataclasses.replace(CASE, factors="shared"), **{EAGER: 0.5}),
        figure(which=FORWARD, **{EAGER: 0.5}),
    ]
    assert find(six([2.0] * 6) + others, target.name).met


@pytest.mark.parametrize(("extra", "met"), [(5, True), (6, False)])
def test_memory_target_is_below_a_hundredth_of_x(extra, met):
    assert CASE.x_bytes() == 560
    target = find([figure(extra=extra, **{EAGER: 2.0})], "extra memory")
    assert target.met is met
    assert f"{extra / 560:.2%}" in target.measured


def test_triton_target_and_its_absence():
    figures = [figure(**{TRITON: 1.2}), figure(which=FORWARD, **{TRITON: 1.31})]
    target = find(figures, "Triton against native")
    assert target.met is False
    assert target.measured.startswith("1.31x at most (forward, ")
    assert find(figures[:1], "Triton against native").met
    assert find([figure()], "Triton against native").met is None


@pytest.mark.parametrize(("ratio", "met"), [("0.8", True), ("1", False), ("", None)])
def test_host_target(ratio, met):
    mode = {"mode": "no gradients", f"over_{EAGER}": "1"}
    rows = [{**mode, "rival": EAGER}, {**mode, "rival": "mfops", f"over_{EAGER}": ratio}]
    assert find([], "host time per call, no gradients", [rows]).met is met
    assert find([], "host time per call, no gradients", [rows[:1]]).met is None


def factorizer(
    case: bench_factorizers.Case,
    peaks: dict[str, float] | None = None,
    which: str = FORWARD,
    run: str = "now",
    **ratios: float,
) -> list[Row]:
    """Native takes a second and a kilobyte, the others so many (bytes: two, unless named)."""
    columns = KernelFigure(case, which).columns() | {"skipped": "", "run": run}
    columns["shape"] = "16 512 64 1089"
    return [
        {
            **columns,
            "rival": name,
            "median_s": str(ratio),
            f"over_{NATIVE}": str(ratio),
            "over_copy": str(3 * ratio),
            "peak_bytes": str(1000 * (peaks or {}).get(name, 2.0 if name != NATIVE else 1.0)),
        }
        for name, ratio in {NATIVE: 1.0, **ratios}.items()
    ]


EM = bench_factorizers.Case((16, 512, 64, 1089), "bfloat16", "contiguous", "em")
EM_LAST = dataclasses.replace(EM, layout="channels_last")


def find_factorizer(
    figures: list[list[Row]],
    name: str,
    earlier: list[list[Row]] | None = None,
    cpu: bool = False,
) -> Target:
    found = {(str(i),): rows for i, rows in enumerate(figures)}
    before = {(str(i),): rows for i, rows in enumerate(earlier or [])}
    return next(t for t in targets.factorizers(found, before, cpu) if t.name.startswith(name))


@pytest.mark.parametrize(("ratio", "met"), [(5.0, True), (4.9, False)])
def test_on_a_gpu_the_lowest_ratio_over_the_published_lines_counts(ratio, met):
    figures = [factorizer(EM, **{EAGER: 9.0, BEST: 4.0}), factorizer(EM_LAST, **{EAGER: ratio})]
    target = find_factorizer(figures, "em (16, 512, 64, 1089), bfloat16, against eager")
    assert target.met is met
    assert "channels_last" in target.measured
    assert target.measured.endswith(f"the lowest of 2; at a copy's speed {3 * ratio:.2f}x")
    for name in ("em (16, 512, 64, 1089), bfloat16, against compile", "em (16, 512, 64, 4225)"):
        assert find_factorizer(figures, name).met is None
    assert find_factorizer(figures, "nmf").met is None


@pytest.mark.parametrize(("ratio", "fast"), [(1.0, True), (0.9, False)])
@pytest.mark.parametrize(("peak", "small"), [(1.1, True), (1.0, False)])
def test_on_a_cpu_neither_time_nor_memory_is_more_than_the_best_lines(ratio, fast, peak, small):
    """The fastest lines need not be the most sparing ones."""
    figures = [factorizer(EM, {EAGER: peak, BEST: 3.0}, **{EAGER: 2.0, BEST: ratio})]
    assert find_factorizer(figures, "em: never slower than eager", cpu=True).met is fast
    assert find_factorizer(figures, "em: less peak memory", cpu=True).met is small


def test_on_a_cpu_the_median_of_all_runs_counts():
    newest = factorizer(EM, {EAGER: 4.0}, **{EAGER: 1.2})
    earlier = factorizer(EM, {EAGER: 2.0}, run="a", **{EAGER: 0.8})
    earlier += factorizer(EM, {EAGER: 0.8}, run="b", **{EAGER: 0.9})
    time = find_factorizer([newest], "em: never slower than eager", [earlier], cpu=True)
    assert time.met is False
    assert time.measured.startswith("0.90x, 0.80 to 1.20 in 3 runs (forward, em")
    peak = find_factorizer([newest], "em: less peak memory", [earlier], cpu=True)
    assert peak.met is True
    assert peak.measured.startswith("0.50x, 0.25 to 1.25 in 3 runs")


def test_nothing_measured_meets_nothing():
    assert {t.met for t in targets.targets([], [])} == {None}
    assert {t.met for t in targets.factorizers({}, {}, cpu=False)} == {None}
