"""What cases have to reach, evaluated on made-up rows: arithmetic done by hand."""

from __future__ import annotations

import pytest
from pandas import DataFrame

from benchmarks.bench_op import BANDWIDTH_SHAPES, GPU_SHAPES
from benchmarks.kernels import BOTH, FORWARD
from benchmarks.report.data import Results
from benchmarks.report.targets import of
from benchmarks.schema import BEST, COMPILE, EAGER, FACTORIZERS, HOST, NATIVE, OP, TRITON

OF_OP = {"dtype": "bfloat16", "layout": "contiguous", "factors": "per image", "pass": BOTH}
OF_EM = {"method": "em", "steps": "3", "shape": "16 512 64 1089"}
OF_EM |= {"dtype": "bfloat16", "layout": "contiguous", "pass": FORWARD}


def text(shape: tuple[int, ...]) -> str:
    return " ".join(map(str, shape))


def case(
    columns: dict, of_copy: float = 0.5, extra: float = 0, peaks: dict | None = None, **ratios
) -> list[dict]:
    """Native takes a second and a kilobyte, the others so many (bytes: two, unless named)."""
    rows = []
    for baseline, ratio in {NATIVE: 1.0, **ratios}.items():
        row = {"run": "now", "skipped": "", "environment": "", "command": "c", "commit": "c"}
        row |= {"baseline": baseline, "median_s": ratio, f"over_{NATIVE}": ratio, **columns}
        row |= {"over_copy": ratio / of_copy, "extra_bytes": extra, "x_bytes": 100}
        row |= {"peak_bytes": (peaks or {}).get(baseline, 1 if baseline == NATIVE else 2)}
        rows.append(row)
    return rows


def op(shape="4 10 3 7", columns=None, **case_: object) -> list[dict]:
    return case({**OF_OP, "shape": shape, **(columns or {})}, **case_)


def em(columns=None, **case_: object) -> list[dict]:
    return case({**OF_EM, **(columns or {})}, **case_)


def find(name: str, cases: list[list[dict]], benchmark=OP, machine="a-gpu") -> dict[str, str]:
    rows = DataFrame([row for of_case in cases for row in of_case])
    found = of(Results(machine, {benchmark.name: rows}, {benchmark.name: rows}), benchmark)
    return found.set_index("target").loc[name].to_dict()


@pytest.mark.parametrize(("worst", "verdict"), [(0.85, "met"), (0.849, "MISSED")])
def test_bandwidth_target_is_the_lowest_of_all_layouts(worst, verdict):
    shape, other = map(text, BANDWIDTH_SHAPES)
    forward = {"pass": FORWARD}
    cases = [
        op(shape, forward, of_copy=0.9),
        op(shape, {**forward, "layout": "channels_last", "factors": "shared"}, of_copy=worst),
        op(shape, {**forward, "dtype": "float32"}),
    ]
    found = find(f"forward, {shape}, bfloat16: copy / mfops", cases)
    assert (found["required"], found["verdict"]) == (">= 85%", verdict)
    assert found["worst case"].endswith("channels_last, shared, forward")
    for target in (f"forward, {other}", f"backward, {shape}"):
        found = find(f"{target}, bfloat16: copy / mfops", cases)
        assert found["measured"] == "not evaluated: 0 of 1 cases"


@pytest.mark.parametrize(
    ("ratios", "measured", "short", "verdict", "at_copy"),
    [
        ([1.5, 6.0, 1.5, 6.0, 3.0, 3.1], "3.02, geometric mean", "-", "met", "6.03"),
        ([1.5, 6.0, 1.5, 6.0, 3.0, 2.0], "2.80, geometric mean", "7%", "MISSED", "5.61"),
        ([9.0] * 5, "not evaluated: 5 of 6 cases", "-", "-", "18.00"),
    ],
)
def test_speed_target_is_a_geometric_mean_over_six_shapes(
    ratios, measured, short, verdict, at_copy
):
    cases = [op(text(shape), **{EAGER: r}) for shape, r in zip(GPU_SHAPES, ratios, strict=False)]
    found = find("forward + backward, per image, bfloat16, contiguous: eager / mfops", cases)
    assert (found["measured"], found["verdict"], found["short by"]) == (measured, verdict, short)
    assert found["at a copy's speed"] == at_copy
    assert found["cases"] == ("1.50 to 6.00" if len(ratios) == 6 else "-")


def test_slower_nowhere_is_of_the_fastest_lines_and_names_the_worst_case():
    name = "forward + backward, per image: fastest / mfops"
    broken = {"baseline": BEST, "skipped": "failed: no compiler", f"over_{NATIVE}": 0.1}
    cases = [op("a", **{EAGER: 1.1}), op("b", **{EAGER: 2.0, BEST: 1.5, COMPILE: 0.9})]
    cases[0].append({**cases[0][0], **broken})
    # Shared factors, or forward alone, are no part of it.
    cases += [op(columns={"factors": "shared"}, **{EAGER: 0.5})]
    cases += [op(columns={"pass": FORWARD}, **{EAGER: 0.5})]
    found = find(name, cases)
    assert (found["measured"], found["short by"], found["missed in"]) == ("0.90", "11%", "1 of 2")
    assert found["worst case"] == "(b), bfloat16, contiguous, per image, forward + backward"
    assert find(name, cases[:1])["verdict"] == "met"


@pytest.mark.parametrize(("extra", "verdict"), [(0.9, "met"), (1, "MISSED")])
def test_memory_target_is_below_a_hundredth_of_x(extra, verdict):
    found = find("all: extra memory / X", [op(extra=extra)])
    assert (found["verdict"], found["measured"]) == (verdict, f"{extra / 100:.2%}")


@pytest.mark.parametrize(("ratio", "verdict"), [(1.3, "met"), (1.31, "MISSED"), (None, "-")])
def test_triton_target_and_its_absence(ratio, verdict):
    cases = [op(**({TRITON: ratio} if ratio else {})), op(columns={"pass": FORWARD})]
    assert find("all: Triton / mfops", cases)["verdict"] == verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(0.8, "met"), (1, "MISSED"), (None, "-")])
def test_host_target(ratio, verdict):
    row = {"baseline": "mfops", "mode": "no gradients", "environment": "", f"over_{EAGER}": ratio}
    assert find("no gradients: mfops / eager", [[row]], HOST)["verdict"] == verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(5.0, "met"), (4.9, "MISSED")])
def test_on_a_gpu_the_lowest_ratio_over_the_published_lines_counts(ratio, verdict):
    other = em({"layout": "channels_last"}, of_copy=1 / 3, **{EAGER: ratio})
    cases = [em(of_copy=1 / 3, **{EAGER: 9.0, BEST: 4.0}), other]
    found = find("em, 16 512 64 1089, bfloat16: published / mfops", cases, FACTORIZERS)
    assert (found["verdict"], found["at a copy's speed"]) == (verdict, f"{3 * ratio:.2f}")
    assert "channels_last" in found["worst case"]


@pytest.mark.parametrize(("ratio", "fast"), [(1.0, "met"), (0.9, "MISSED")])
@pytest.mark.parametrize(("peak", "small"), [(1.1, "met"), (1.0, "MISSED")])
def test_on_a_cpu_neither_time_nor_memory_is_more_than_the_best_lines(ratio, fast, peak, small):
    """The fastest lines need not be the most sparing ones."""
    own = em(peaks={NATIVE: 1, EAGER: peak, BEST: 3}, **{EAGER: 2.0, BEST: ratio})
    for name, verdict in {"eager / mfops": fast, "peak memory / eager": small}.items():
        assert find(f"em: {name}", [own], FACTORIZERS, "a-2-threads")["verdict"] == verdict


def test_on_a_cpu_the_median_of_all_runs_counts():
    runs = {"now": (1.2, 4.0), "a": (0.8, 2.0), "b": (0.9, 0.8)}
    cases = [
        em({"run": run}, peaks={NATIVE: 1, EAGER: peak}, **{EAGER: ratio})
        for run, (ratio, peak) in runs.items()
    ]
    time = find("em: eager / mfops", cases, FACTORIZERS, "a-2-threads")
    assert (time["measured"], time["its runs"]) == ("0.90", "0.80 to 1.20")
    peak = find("em: peak memory / eager", cases, FACTORIZERS, "a-2-threads")
    assert (peak["measured"], peak["its runs"]) == ("0.50", "0.25 to 1.25")


def test_a_cpu_has_no_targets_of_the_op():
    rows = DataFrame(op(**{EAGER: 0.5}))
    assert of(Results("a-2-threads", {OP.name: rows}, {OP.name: rows}), OP).empty
