"""What cases have to reach: each target asks for a column of some cases, and sets a bound.

Ratios are times over mfops native's. Beside them stands what they would be, were native as fast as
a copy of the floor's bytes: no kernel that moves them all is faster.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from pandas import DataFrame, Series

from benchmarks import bench_factorizers
from benchmarks.bench_host import MODES
from benchmarks.bench_op import BANDWIDTH_SHAPES, GPU_SHAPES
from benchmarks.kernels import BACKWARD, BOTH, DTYPES, FORWARD, LAYOUTS
from benchmarks.report.data import Results, measured
from benchmarks.schema import COPY, EAGER, FACTORIZERS, HOST, MFOPS, NATIVE, OP, TRITON, Benchmark

# Baselines by how their names begin; a family's time is that of its fastest member.
FAMILIES = {"eager": "eager", "compile": "compile", "published": EAGER}


@dataclass(frozen=True)
class Target:
    """A bound for a column of the cases that a query selects (see `comparisons`).

    It holds for the worst of them, or for the geometric mean of as many as `mean_of`.
    """

    name: str
    query: str
    column: str
    bound: str
    mean_of: int = 0
    form: str = ".2f"


def _text(shape: Iterable[int]) -> str:
    return " ".join(map(str, shape))


OP_TARGETS = [
    *(
        Target(
            f"{which} {shape}, bfloat16",
            f"which == '{which}' and shape == '{_text(shape)}' and dtype == 'bfloat16'",
            "of the copy",
            f">= {required}",
            form=".0%",
        )
        for which, required in {FORWARD: 0.85, BACKWARD: 0.65}.items()
        for shape in BANDWIDTH_SHAPES
    ),
    *(
        Target(
            f"{BOTH} against {family}, {dtype}, {layout}, per image",
            f"which == '{BOTH}' and factors == 'per image' and dtype == '{dtype}' "
            f"and layout == '{layout}' and shape in {[_text(shape) for shape in GPU_SHAPES]}",
            family,
            f">= {required}",
            mean_of=len(GPU_SHAPES),
        )
        for family, required, dtypes, layouts in (
            ("compile", 1.8, DTYPES[:1], LAYOUTS[:1]),
            ("eager", 3.0, DTYPES, LAYOUTS),
        )
        for dtype in dtypes
        for layout in layouts
    ),
    Target(
        f"{BOTH}, per image: slower nowhere",
        f"which == '{BOTH}' and factors == 'per image'",
        "fastest",
        ">= 1",
    ),
    Target("extra memory", "", "of X", "< 0.01", form=".2%"),
    Target("Triton against native", "", "triton", "<= 1.3"),
]
FACTORIZER_TARGETS = [
    Target(
        f"{method} {shape}, bfloat16, against {family}",
        f"method == '{method}' and shape == '{_text(shape)}' and dtype == 'bfloat16'",
        family,
        f">= {required}",
    )
    for method in bench_factorizers.STEPS
    for shape in bench_factorizers.GPU_SHAPES
    for family, required in {"published": 5.0, "compile": 3.0}.items()
]
CPU_FACTORIZER_TARGETS = [
    Target(f"{method}: {what}", f"method == '{method}'", column, bound)
    for method in bench_factorizers.STEPS
    for what, column, bound in (
        ("never slower than eager", "eager", ">= 1"),
        ("less peak memory than eager", "peak", "< 1"),
    )
]
HOST_TARGETS = [
    Target(f"host time over eager's, {mode}", f"mode == '{mode}'", "eager", "< 1") for mode in MODES
]


def comparisons(rows: DataFrame, benchmark: Benchmark) -> DataFrame:
    """A line for each case and run: native beside the families of baselines.

    A family has its time over native's, and over that of a copy; "fastest" is the fastest of eager
    and compile, "peak" native's peak memory over that of the most sparing eager lines.
    """
    lines = []
    for (*key, _), own in measured(rows).groupby([*benchmark.case, "run"], sort=False):
        line = dict(zip(benchmark.case, key, strict=True))
        shape = f"({', '.join(line['shape'].split())})"
        line |= {"which": line["pass"], "case": ", ".join({**line, "shape": shape}.values())}
        for family, beginning in FAMILIES.items():
            members = own[own["baseline"].str.startswith(beginning)]
            if len(members):
                fastest = members.loc[members["median_s"].idxmin()]
                line[family] = fastest[f"over_{NATIVE}"]
                line[f"{family} at a copy's speed"] = fastest[f"over_{COPY}"]
        for _, triton in own[own["baseline"] == TRITON].iterrows():
            line["triton"] = triton[f"over_{NATIVE}"]
        for _, native in own[own["baseline"] == NATIVE].iterrows():
            eager = own[own["baseline"].str.startswith("eager")]
            line["of the copy"] = 1 / native[f"over_{COPY}"]
            line["of X"] = native["extra_bytes"] / native["x_bytes"]
            line["peak"] = native["peak_bytes"] / eager["peak_bytes"].min()
        lines.append(line)
    columns = [*benchmark.case, "which", "case", "of the copy", "of X", "peak", "triton"]
    columns += [f"{family}{of}" for family in FAMILIES for of in ("", " at a copy's speed")]
    found = DataFrame(lines, columns=columns)
    return found.assign(fastest=found[["eager", "compile"]].min(axis=1))


def host(rows: DataFrame) -> DataFrame:
    """The automatic choice's time per call over the textbook lines', for each mode."""
    own = rows[rows["baseline"] == MFOPS]
    return DataFrame({"mode": own["mode"], "case": own["mode"], "eager": own[f"over_{EAGER}"]})


def evaluate(target: Target, cases: DataFrame) -> dict[str, str]:
    """A line of the table of targets; a case that has several runs counts by their median."""
    found = cases.query(target.query) if target.query else cases
    found = found.dropna(subset=target.column)
    values = found.groupby("case", sort=False)[target.column].median()
    sign, bound = target.bound.split()[0], float(target.bound.split()[1])

    def show(value: float, form: str = target.form) -> str:
        return f"{value:{form}}" + ("x" if form.endswith("f") else "")

    required = f"{target.bound}x" if target.form == ".2f" else f"{sign} {bound:.0%} {target.column}"
    if target.mean_of:
        required += f", geometric mean of {target.mean_of} cases"
    line = {"target": target.name, "required": required, "measured": "", "": "-"}
    copy = at_a_copys_speed(found, target)
    if len(values) < max(1, target.mean_of):
        of = f" of {target.mean_of}" if target.mean_of else ""
        return line | {"measured": f"not evaluated: {len(values)}{of} cases{copy}"}
    if target.mean_of:
        value = geometric_mean(values)
        spread = f"from {show(values.min())} to {show(values.max())}"
    else:
        worst = values.idxmin() if sign == ">=" else values.idxmax()
        value, found = values[worst], found[found["case"] == worst]
        copy = at_a_copys_speed(found, target)
        missed = sum(not HOLDS[sign](own, bound) for own in values)
        spread = f"{worst}; missed in {missed} of {len(values)}"
        if len(values) > 1 and target.form == ".2f":
            spread += f", geometric mean {show(geometric_mean(values))}"
        if len(runs := found[target.column]) > 1:
            spread += f"; {show(runs.min())} to {show(runs.max())} in {len(runs)} runs"
    short = f" (short by {bound / value - 1:.0%})" if sign == ">=" and value < bound else ""
    line["measured"] = f"{show(value)}{short}: {spread}{copy}"
    line[""] = "met" if HOLDS[sign](value, bound) else "MISSED"
    return line


HOLDS = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


def at_a_copys_speed(found: DataFrame, target: Target) -> str:
    ratios = found.get(f"{target.column} at a copy's speed", Series(dtype=float)).dropna()
    return f"; at a copy's speed {geometric_mean(ratios):.2f}x" if len(ratios) else ""


def geometric_mean(values: Series) -> float:
    return float(np.exp(np.log(values).mean()))


def of_op(results: Results) -> DataFrame:
    """The targets of a GPU, a line each."""
    cases, calls = comparisons(results.plain(OP), OP), host(results.plain(HOST))
    lines = [evaluate(target, cases) for target in OP_TARGETS]
    return DataFrame([*lines, *(evaluate(target, calls) for target in HOST_TARGETS)])


def of_factorizers(results: Results) -> DataFrame:
    """Those of a GPU, or those of a CPU.

    On a CPU the median over all runs counts: from one process to the next ratios differ by more
    than they are away from 1.
    """
    if results.cpu:
        cases = comparisons(results.runs(FACTORIZERS), FACTORIZERS)
        return DataFrame([evaluate(target, cases) for target in CPU_FACTORIZER_TARGETS])
    cases = comparisons(results.plain(FACTORIZERS), FACTORIZERS)
    return DataFrame([evaluate(target, cases) for target in FACTORIZER_TARGETS])
