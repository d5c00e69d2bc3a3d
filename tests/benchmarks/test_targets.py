"""What cases have to reach, evaluated on made-up rows: arithmetic done by hand."""

from __future__ import annotations

import pytest
from pandas import DataFrame

from benchmarks.bench_op import BANDWIDTH_SHAPES, GPU_SHAPES
from benchmarks.kernels import BOTH, FORWARD
from benchmarks.report import targets
from benchmarks.schema import BEST, COMPILE, EAGER, FACTORIZERS, NATIVE, OP, TRITON

CASE = {
    "shape": "4 10 3 7",
    "dtype": "bfloat16",
    "layout": "contiguous",
    "factors": "per image",
    "pass": BOTH,
}
EM = {
    "method": "em",
    "steps": "3",
    "shape": "16 512 64 1089",
    "dtype": "bfloat16",
    "layout": "contiguous",
    "pass": FORWARD,
}


def text(shape: tuple[int, ...]) -> str:
    return " ".join(map(str, shape))


def case(
    of_copy: float = 0.5, extra: float = 0, peaks: dict | None = None, **ratios: float
) -> list[dict]:
    """Native takes a second and a kilobyte, the others so many (bytes: two, unless named)."""
    columns = {key: ratios.pop(key) for key in [*CASE, *EM, "run"] if key in ratios}
    columns = {"run": "now", "skipped": "", **(EM if "method" in columns else CASE), **columns}
    rows = []
    for baseline, ratio in {NATIVE: 1.0, **ratios}.items():
        row = {"baseline": baseline, "median_s": ratio, f"over_{NATIVE}": ratio}
        row |= {"over_copy": ratio / of_copy, "extra_bytes": extra, "x_bytes": 100}
        row |= {"peak_bytes": (peaks or {}).get(baseline, 1 if baseline == NATIVE else 2)}
        rows.append(columns | row)
    return rows


def find(name: str, cases: list[list[dict]], which: list, benchmark=OP) -> dict[str, str]:
    rows = DataFrame([row for of_case in cases for row in of_case])
    (target,) = [target for target in which if target.name == name]
    return targets.evaluate(target, targets.comparisons(rows, benchmark))


def test_a_familys_time_is_its_fastest_members_and_of_what_was_measured():
    rows = case(**{EAGER: 4.0, BEST: 3.0, COMPILE: 2.0})
    rows.append({**rows[0], "baseline": TRITON, "skipped": "failed: no compiler"})
    (line,) = targets.comparisons(DataFrame(rows), OP).to_dict("records")
    assert (line["eager"], line["compile"], line["fastest"], line["published"]) == (3, 2, 2, 4)
    assert line["triton"] != line["triton"]
    assert line["eager at a copy's speed"] == 6


@pytest.mark.parametrize(("worst", "verdict"), [(0.85, "met"), (0.849, "MISSED")])
def test_bandwidth_target_is_the_lowest_of_all_layouts(worst, verdict):
    shape = BANDWIDTH_SHAPES[0]
    own = {"shape": text(shape), "pass": FORWARD}
    cases = [
        case(of_copy=0.9, **own),
        case(of_copy=worst, layout="channels_last", factors="shared", **own),
        case(**own | {"dtype": "float32"}),
    ]
    found = find(f"forward {shape}, bfloat16", cases, targets.OP_TARGETS)
    assert found[""] == verdict
    assert "channels_last, shared, forward; missed in" in found["measured"]
    assert found["required"] == ">= 85% of the copy"
    for other in (f"forward {BANDWIDTH_SHAPES[1]}, bfloat16", f"backward {shape}, bfloat16"):
        assert find(other, cases, targets.OP_TARGETS)["measured"] == "not evaluated: 0 cases"


@pytest.mark.parametrize(
    ("ratios", "measured", "verdict"),
    [
        (
            [1.5, 6.0, 1.5, 6.0, 3.0, 3.1],
            "3.02x: from 1.50x to 6.00x; at a copy's speed 6.03x",
            "met",
        ),
        (
            [1.5, 6.0, 1.5, 6.0, 3.0, 2.0],
            "2.80x (short by 7%): from 1.50x to 6.00x; at a copy's speed 5.61x",
            "MISSED",
        ),
        ([9.0] * 5, "not evaluated: 5 of 6 cases; at a copy's speed 18.00x", "-"),
    ],
)
def test_speed_target_is_a_geometric_mean_over_six_shapes(ratios, measured, verdict):
    cases = [
        case(shape=text(shape), **{EAGER: ratio})
        for shape, ratio in zip(GPU_SHAPES, ratios, strict=False)
    ]
    name = "forward + backward against eager, bfloat16, contiguous, per image"
    found = find(name, cases, targets.OP_TARGETS)
    assert (found["measured"], found[""]) == (measured, verdict)


def test_slower_nowhere_names_the_worst_case():
    name = "forward + backward, per image: slower nowhere"
    cases = [case(shape="a", **{EAGER: 1.1}), case(shape="b", **{EAGER: 2.0, COMPILE: 0.9})]
    # Shared factors, or forward alone, are no part of it.
    cases += [case(factors="shared", **{EAGER: 0.5}), case(**{"pass": FORWARD, EAGER: 0.5})]
    found = find(name, cases, targets.OP_TARGETS)
    assert found["measured"].startswith("0.90x (short by 11%): (b), bfloat16, contiguous, per")
    assert "missed in 1 of 2" in found["measured"]
    assert find(name, cases[:1], targets.OP_TARGETS)[""] == "met"


@pytest.mark.parametrize(("extra", "verdict"), [(0.9, "met"), (1, "MISSED")])
def test_memory_target_is_below_a_hundredth_of_x(extra, verdict):
    found = find("extra memory", [case(extra=extra)], targets.OP_TARGETS)
    assert found[""] == verdict
    assert found["measured"].startswith(f"{extra / 100:.2%}: ")


def test_triton_target_and_its_absence():
    cases = [case(**{TRITON: 1.2}), case(**{"pass": FORWARD, TRITON: 1.31})]
    found = find("Triton against native", cases, targets.OP_TARGETS)
    assert found["measured"].startswith("1.31x: (4, 10, 3, 7), bfloat16, contiguous, per image, fo")
    assert found[""] == "MISSED"
    assert find("Triton against native", cases[:1], targets.OP_TARGETS)[""] == "met"
    assert find("Triton against native", [case()], targets.OP_TARGETS)[""] == "-"


@pytest.mark.parametrize(("ratio", "verdict"), [(0.8, "met"), (1, "MISSED"), (None, "-")])
def test_host_target(ratio, verdict):
    rows = DataFrame({"baseline": ["mfops"], "mode": ["no gradients"], f"over_{EAGER}": [ratio]})
    assert targets.evaluate(targets.HOST_TARGETS[0], targets.host(rows))[""] == verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(5.0, "met"), (4.9, "MISSED")])
def test_on_a_gpu_the_lowest_ratio_over_the_published_lines_counts(ratio, verdict):
    cases = [
        case(method="em", of_copy=1 / 3, **{EAGER: 9.0, BEST: 4.0}),
        case(method="em", of_copy=1 / 3, layout="channels_last", **{EAGER: ratio}),
    ]
    name = "em (16, 512, 64, 1089), bfloat16, against "
    found = find(f"{name}published", cases, targets.FACTORIZER_TARGETS, FACTORIZERS)
    assert found[""] == verdict
    assert "channels_last" in found["measured"]
    assert found["measured"].endswith(f"; at a copy's speed {3 * ratio:.2f}x")
    assert find(f"{name}compile", cases, targets.FACTORIZER_TARGETS, FACTORIZERS)[""] == "-"


@pytest.mark.parametrize(("ratio", "fast"), [(1.0, "met"), (0.9, "MISSED")])
@pytest.mark.parametrize(("peak", "small"), [(1.1, "met"), (1.0, "MISSED")])
def test_on_a_cpu_neither_time_nor_memory_is_more_than_the_best_lines(ratio, fast, peak, small):
    """The fastest lines need not be the most sparing ones."""
    own = case(method="em", peaks={NATIVE: 1, EAGER: peak, BEST: 3}, **{EAGER: 2.0, BEST: ratio})
    for name, verdict in {"never slower": fast, "less peak memory": small}.items():
        found = find(f"em: {name} than eager", [own], targets.CPU_FACTORIZER_TARGETS, FACTORIZERS)
        assert found[""] == verdict


def test_on_a_cpu_the_median_of_all_runs_counts():
    runs = {"now": (1.2, 4.0), "a": (0.8, 2.0), "b": (0.9, 0.8)}
    cases = [
        case(method="em", run=run, peaks={NATIVE: 1, EAGER: peak}, **{EAGER: ratio})
        for run, (ratio, peak) in runs.items()
    ]
    which = targets.CPU_FACTORIZER_TARGETS
    time = find("em: never slower than eager", cases, which, FACTORIZERS)
    assert time["measured"].startswith("0.90x (short by 11%): em, 3, (16, 512, 64, 1089)")
    assert "; 0.80x to 1.20x in 3 runs" in time["measured"]
    peak = find("em: less peak memory than eager", cases, which, FACTORIZERS)
    assert peak[""] == "met"
    assert peak["measured"].startswith("0.50x: ")
    assert peak["measured"].endswith("; 0.25x to 1.25x in 3 runs")


def test_nothing_measured_meets_nothing():
    nothing = DataFrame(case()).head(0)
    cases = targets.comparisons(nothing, OP)
    assert {targets.evaluate(target, cases)[""] for target in targets.OP_TARGETS} == {"-"}
