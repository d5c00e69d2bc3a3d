"""What cases have to reach: each target asks for a column of some cases, and sets a bound.

Ratios are times over mfops native's. Beside them stands what they would be, were native as fast as
a copy of the floor's bytes: no kernel that moves them all is faster.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

from pandas import DataFrame, Series

from benchmarks import bench_factorizers
from benchmarks.bench_host import MODES
from benchmarks.bench_op import BANDWIDTH_SHAPES, GPU_SHAPES
from benchmarks.kernels import BACKWARD, BOTH, DTYPES, FORWARD, LAYOUTS
from benchmarks.report.data import Results, measured
from benchmarks.schema import COPY, EAGER, FACTORIZERS, HOST, MFOPS, NATIVE, OP, TRITON, Benchmark

# Baselines by how their names begin; a family's time is that of its fastest member.
FAMILIES = {"eager": "eager", "compile": "compile", "published": EAGER, "Triton": TRITON}
AT_COPY = " at a copy's speed"


@dataclass(frozen=True)
class Target:
    """A bound for a column (see `comparisons`) of the cases whose columns are as `which` has them.

    It holds for the worst of them, or for the geometric mean of as many as `mean_of`.
    """

    which: dict[str, str]
    column: str
    bound: str
    mean_of: int = 0
    form: str = ".2f"

    def __str__(self) -> str:
        return f"{', '.join(self.which.values()) or 'all'}: {self.column}"


def _text(shape: Iterable[int]) -> str:
    return " ".join(map(str, shape))


PER_IMAGE = {"pass": BOTH, "factors": "per image"}
OP_TARGETS = [
    *(
        Target(
            {"pass": which, "shape": _text(shape), "dtype": "bfloat16"},
            "copy / mfops",
            bound,
            form=".0%",
        )
        for which, bound in ((FORWARD, ">= 0.85"), (BACKWARD, ">= 0.65"))
        for shape in BANDWIDTH_SHAPES
    ),
    Target(
        {**PER_IMAGE, "dtype": DTYPES[0], "layout": LAYOUTS[0]},
        "compile / mfops",
        ">= 1.8",
        mean_of=len(GPU_SHAPES),
    ),
    *(
        Target(
            {**PER_IMAGE, "dtype": dtype, "layout": layout},
            "eager / mfops",
            ">= 3.0",
            mean_of=len(GPU_SHAPES),
        )
        for dtype in DTYPES
        for layout in LAYOUTS
    ),
    Target(PER_IMAGE, "fastest / mfops", ">= 1"),
    Target({}, "extra memory / X", "< 0.01", form=".2%"),
    Target({}, "Triton / mfops", "<= 1.3"),
]
FACTORIZER_TARGETS = [
    Target({"method": method, "shape": _text(shape), "dtype": "bfloat16"}, column, bound)
    for method in bench_factorizers.STEPS
    for shape in bench_factorizers.GPU_SHAPES
    for column, bound in (("published / mfops", ">= 5.0"), ("compile / mfops", ">= 3.0"))
]
CPU_FACTORIZER_TARGETS = [
    Target({"method": method}, column, bound)
    for method in bench_factorizers.STEPS
    for column, bound in (("eager / mfops", ">= 1"), ("peak memory / eager", "< 1"))
]
HOST_TARGETS = [Target({"mode": mode}, "mfops / eager", "< 1") for mode in MODES]
TARGETS = {  # by benchmark, and whether the machine is a CPU
    (OP, False): OP_TARGETS,
    (FACTORIZERS, False): FACTORIZER_TARGETS,
    (FACTORIZERS, True): CPU_FACTORIZER_TARGETS,
    (HOST, False): HOST_TARGETS,
}
COLUMNS = ["target", "required", "measured", "verdict", "short by", "missed in", "cases"]
COLUMNS += ["geometric mean", "at a copy's speed", "worst case", "its runs"]
HOLDS = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


def of(results: Results, benchmark: Benchmark) -> DataFrame:
    """The benchmark's targets, a line each.

    On a CPU the median over all runs counts: from one process to the next ratios differ by more
    than they are away from 1.
    """
    rows = results.runs(benchmark) if results.cpu else results.plain(benchmark)
    cases = host(rows) if benchmark == HOST else comparisons(rows, benchmark)
    which = TARGETS.get((benchmark, results.cpu), [])
    lines = [evaluate(target, cases) for target in which]
    return DataFrame(lines, columns=COLUMNS)


def host(rows: DataFrame) -> DataFrame:
    """The automatic choice's time per call over the textbook lines', for each mode."""
    own = rows[rows["baseline"] == MFOPS]
    return own.assign(case=own["mode"], **{"mfops / eager": own[f"over_{EAGER}"]})


def comparisons(rows: DataFrame, benchmark: Benchmark) -> DataFrame:
    """A line for each case and run: native beside the families of baselines.

    A family's time is that of its fastest member, over native's, and over that of a copy.
    "fastest" is the fastest of eager and compile; peak memory is over that of the most sparing
    eager lines.
    """
    known, by = measured(rows), [*benchmark.case, "run"]

    def least(column: str, family: str) -> Series:
        own = known[known["baseline"].str.startswith(family)]
        return own.groupby(by)[column].min()

    native = known[known["baseline"] == NATIVE].set_index(by)
    found = {
        "copy / mfops": 1 / native[f"over_{COPY}"],
        "extra memory / X": native["extra_bytes"] / native["x_bytes"],
        "peak memory / eager": native["peak_bytes"] / least("peak_bytes", "eager"),
    }
    for family, beginning in FAMILIES.items():
        found[f"{family} / mfops"] = least(f"over_{NATIVE}", beginning)
        found[f"{family} / mfops{AT_COPY}"] = least(f"over_{COPY}", beginning)
    cases = known[by].drop_duplicates().join(DataFrame(found), on=by)
    shape = "(" + cases["shape"].str.replace(" ", ", ") + ")"
    case = cases.assign(shape=shape)[list(benchmark.case)].agg(", ".join, axis=1)
    fastest = cases[["eager / mfops", "compile / mfops"]].min(axis=1)
    return cases.assign(case=case, **{"fastest / mfops": fastest})


def evaluate(target: Target, cases: DataFrame) -> dict[str, str]:
    """A line of the table of targets; a case that has several runs counts by their median."""
    found = cases[(cases[list(target.which)] == list(target.which.values())).all(axis=1)]
    found = found.dropna(subset=target.column)
    values = found.groupby("case", sort=False)[target.column].median()
    sign, bound = target.bound.split()[0], float(target.bound.split()[1])

    def show(value: float) -> str:
        return f"{value:{target.form}}"

    def spread(values: Series) -> str:
        return f"{show(values.min())} to {show(values.max())}" if len(values) > 1 else "-"

    worst = values.agg("idxmin" if sign == ">=" else "idxmax") if len(values) else ""
    own = found if target.mean_of else found[found["case"] == worst]
    at_copy = own.get(f"{target.column}{AT_COPY}", Series(dtype=float)).dropna()
    line = dict.fromkeys(COLUMNS, "-") | {
        "target": str(target),
        "required": f"{sign} {show(bound)}",
        "at a copy's speed": show(geometric_mean(at_copy)) if len(at_copy) else "-",
    }
    if len(values) < (least := max(1, target.mean_of)):
        return line | {"measured": f"not evaluated: {len(values)} of {least} cases"}
    mean = geometric_mean(values)
    value = mean if target.mean_of else values[worst]
    return line | {
        "verdict": "met" if HOLDS[sign](value, bound) else "MISSED",
        "measured": show(value) + (", geometric mean" if target.mean_of else ""),
        "short by": f"{bound / value - 1:.0%}" if sign == ">=" and value < bound else "-",
        "missed in": f"{sum(not HOLDS[sign](v, bound) for v in values)} of {len(values)}",
        "cases": spread(values),
        "geometric mean": show(mean),
        "worst case": worst,
        "its runs": spread(found.loc[found["case"] == worst, target.column]),
    }


def geometric_mean(values: Series) -> float:
    return float(values.prod() ** (1 / len(values)))
