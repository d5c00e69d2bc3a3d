"""What figures have to reach: each target, required and measured, from rows.

A rival's name begins with its family, "compile" or "eager"; a family's figure is that of its
fastest member. Ratios are times over mfops native's. Beside them stands what they would be, were
native as fast as a copy of the floor's bytes: no kernel that moves them all is faster.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks import bench_factorizers, kernels
from benchmarks.bench_op import BANDWIDTH_SHAPES, FACTORS, GPU_SHAPES, Case
from benchmarks.kernels import BACKWARD, BOTH, DTYPES, FORWARD, LAYOUTS
from benchmarks.questions import COPY, EAGER, MFOPS, NATIVE, TRITON
from benchmarks.report.load import Figures
from benchmarks.rows import Row, number

# Shares of the copy's bandwidth.
BANDWIDTH_TARGETS = {FORWARD: 0.85, BACKWARD: 0.65}
SPEED_TARGETS = {"compile": 1.8, "eager": 3.0}
MEMORY_TARGET = 0.01
TRITON_TARGET = 1.3
FACTORIZER_TARGETS = {EAGER: 5.0, "compile": 3.0}  # on a GPU

OVER_NATIVE, OVER_COPY, OVER_EAGER = (f"over_{base}" for base in (NATIVE, COPY, EAGER))


@dataclass(frozen=True)
class Figure:
    """One pass over one case: the rows of the rivals that were measured, by name."""

    case: kernels.Case
    which: str
    rivals: dict[str, Row]
    earlier: tuple[Figure, ...] = ()  # runs of it with the same command and commit

    @classmethod
    def of(
        cls, rows: list[Row], case: type[kernels.Case], more: str, earlier: Iterable[Row] = ()
    ) -> Figure:
        """`more`: the column that such a case has beside shape, dtype and layout."""
        first = rows[0]
        shape = tuple(map(int, first["shape"].split()))
        own = case(shape, first["dtype"], first["layout"], first[more])
        runs: dict[str, list[Row]] = {}
        for row in earlier:
            runs.setdefault(row["run"], []).append(row)
        before = tuple(cls.of(run, case, more) for run in runs.values())
        known = {row["rival"]: row for row in rows if not row["skipped"]}
        return cls(own, first["pass"], known, before)

    def of_every_run(self, value: Callable[[Figure], float | None]) -> list[float]:
        found = [value(figure) for figure in (self, *self.earlier)]
        return [one for one in found if one is not None]

    def members(self, family: str) -> list[Row]:
        return [row for name, row in self.rivals.items() if name.startswith(family)]

    def over(self, base: str, family: str) -> float | None:
        """The fastest member's time over the base's, None where one of them was not measured."""
        members = self.members(family)
        if not members:
            return None
        return number(min(members, key=lambda row: float(row["median_s"])), base)

    def over_native(self, family: str) -> float | None:
        return self.over(OVER_NATIVE, family)

    def ceiling(self, family: str) -> float | None:
        """The same of a copy of the floor's bytes in native's place."""
        return self.over(OVER_COPY, family)

    def of_copy(self) -> float | None:
        """The copy's time over native's."""
        over = number(self.rivals.get(NATIVE, {}), OVER_COPY)
        return None if over is None else 1 / over

    def extra(self) -> float | None:
        """Native's extra memory, over the memory of X."""
        row = self.rivals.get(NATIVE, {})
        extra, x = number(row, "extra_bytes"), number(row, "x_bytes")
        return None if extra is None or not x else extra / x

    def peak_over(self, family: str) -> float | None:
        """Native's peak memory over that of the family's most sparing member."""
        own = number(self.rivals.get(NATIVE, {}), "peak_bytes")
        peaks = [number(row, "peak_bytes") for row in self.members(family)]
        known = [peak for peak in peaks if peak]
        return None if own is None or not known else own / min(known)


@dataclass
class Target:
    """`met` is None where it could not be evaluated; `measured` then says why."""

    name: str
    required: str
    measured: str
    met: bool | None

    @classmethod
    def missing(cls, name: str, required: str, why: str) -> Target:
        return cls(name, required, f"not evaluated: {why}", None)

    @property
    def verdict(self) -> str:
        return {True: "met", False: "MISSED", None: "-"}[self.met]


def geometric_mean(values: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def _at_most(ceilings: list[float | None]) -> str:
    known = [ceiling for ceiling in ceilings if ceiling is not None]
    return f"; at a copy's speed {geometric_mean(known):.2f}x" if known else ""


def _missed_by(value: float, required: float) -> str:
    """How far a value is from the one required, where it falls short."""
    return f" (short by {required / value - 1:.0%})" if value < required else ""


def _known(
    figures: list[Figure], value: Callable[[Figure], float | None]
) -> list[tuple[Figure, float]]:
    pairs = [(figure, value(figure)) for figure in figures]
    return [(figure, found) for figure, found in pairs if found is not None]


def _where(pair: tuple[Figure, float]) -> str:
    return f"{pair[0].which}, {pair[0].case}"


def _bandwidth(figures: list[Figure]) -> list[Target]:
    """The lowest share over layouts and factors, for each shape and pass."""
    targets = []
    for which, required in BANDWIDTH_TARGETS.items():
        for shape in BANDWIDTH_SHAPES:
            name, wanted = f"{which} {shape}, bfloat16", f">= {required:.0%} of the copy"
            asked = (shape, "bfloat16", which)
            here = [f for f in figures if (f.case.shape, f.case.dtype, f.which) == asked]
            shares = _known(here, Figure.of_copy)
            if not shares:
                targets.append(Target.missing(name, wanted, f"no figure of {NATIVE}"))
                continue
            lowest, share = min(shares, key=lambda pair: pair[1])
            measured = (
                f"{share:.0%}{_missed_by(share, required)}, {lowest.case.layout}, "
                f"{lowest.case.factors}, the lowest of {len(shares)} of "
                f"{len(LAYOUTS) * len(FACTORS)}"
            )
            targets.append(Target(name, wanted, measured, share >= required))
    return targets


def _speed(figures: list[Figure]) -> list[Target]:
    """Geometric means over the shapes, per-image factors, forward + backward."""
    targets = []
    for family, required in SPEED_TARGETS.items():
        for dtype in DTYPES:
            for layout in LAYOUTS:
                name = f"{BOTH} against {family}, {dtype}, {layout}, per image"
                wanted = f">= {required}x, geometric mean of {len(GPU_SHAPES)} shapes"
                here = [
                    f
                    for f in figures
                    if (f.case.dtype, f.case.layout) == (dtype, layout)
                    and (f.case.factors, f.which) == ("per image", BOTH)
                    and f.case.shape in GPU_SHAPES
                ]
                pairs = _known(here, lambda f, family=family: f.over_native(family))
                ratios = [ratio for _, ratio in pairs]
                if not ratios and (dtype, layout) != (DTYPES[0], LAYOUTS[0]):
                    continue  # this family was not asked for there
                ceiling = _at_most([f.ceiling(family) for f, _ in pairs])
                if len(ratios) < len(GPU_SHAPES):
                    why = f"{len(ratios)} of {len(GPU_SHAPES)} shapes measured{ceiling}"
                    targets.append(Target.missing(name, wanted, why))
                    continue
                mean = geometric_mean(ratios)
                measured = (
                    f"{mean:.2f}x{_missed_by(mean, required)}, from {min(ratios):.2f}x "
                    f"to {max(ratios):.2f}x{ceiling}"
                )
                targets.append(Target(name, wanted, measured, mean >= required))
    return targets


def _nowhere_slower(figures: list[Figure]) -> Target:
    name, wanted = f"{BOTH}, per image: slower nowhere", ">= 1x, every case"
    here = [f for f in figures if (f.which, f.case.factors) == (BOTH, "per image")]
    ratios = {
        f"{family}, {figure.case}": ratio
        for family in SPEED_TARGETS
        for figure, ratio in _known(here, lambda f, family=family: f.over_native(family))
    }
    if not ratios:
        return Target.missing(name, wanted, f"no figure of {NATIVE}")
    worst = min(ratios, key=ratios.__getitem__)
    slower = sum(value < 1 for value in ratios.values())
    measured = f"{ratios[worst]:.2f}x ({worst}); slower in {slower} of {len(ratios)}"
    return Target(name, wanted, measured, slower == 0)


def _memory(figures: list[Figure]) -> Target:
    name, wanted = "extra memory", f"< {MEMORY_TARGET:.0%} of X"
    shares = _known(figures, Figure.extra)
    if not shares:
        return Target.missing(name, wanted, f"no figure of {NATIVE}")
    worst = max(shares, key=lambda pair: pair[1])
    over = sum(share >= MEMORY_TARGET for _, share in shares)
    measured = f"at most {worst[1]:.2%} ({_where(worst)}); over in {over} of {len(shares)}"
    return Target(name, wanted, measured, over == 0)


def _triton(figures: list[Figure]) -> Target:
    name, wanted = "Triton against native", f"<= {TRITON_TARGET}x, every case"
    ratios = _known(figures, lambda f: f.over_native(TRITON))
    if not ratios:
        return Target.missing(name, wanted, "native and Triton were not both measured")
    worst = max(ratios, key=lambda pair: pair[1])
    over = sum(ratio > TRITON_TARGET for _, ratio in ratios)
    measured = (
        f"{worst[1]:.2f}x at most ({_where(worst)}), geometric mean "
        f"{geometric_mean([ratio for _, ratio in ratios]):.2f}x; over in {over} of {len(ratios)}"
    )
    return Target(name, wanted, measured, over == 0)


def _host(figures: Iterable[list[Row]]) -> list[Target]:
    """The automatic choice's time per call over the textbook lines', for each mode."""
    targets = []
    for rows in figures:
        name, wanted = f"host time per call, {rows[0]['mode']}", "< 1x the textbook lines"
        ratio = next((number(row, OVER_EAGER) for row in rows if row["rival"] == MFOPS), None)
        if ratio is None:
            targets.append(Target.missing(name, wanted, f"no figure of {MFOPS}"))
            continue
        targets.append(Target(name, wanted, f"{ratio:.2f}x", ratio < 1))
    return targets


def targets(op: Iterable[list[Row]], host: Iterable[list[Row]]) -> list[Target]:
    """One by one, from the rows of every figure of the op and of the host."""
    figures = [Figure.of(rows, Case, "factors") for rows in op]
    return [
        *_bandwidth(figures),
        *_speed(figures),
        _nowhere_slower(figures),
        _memory(figures),
        _triton(figures),
        *_host(host),
    ]


def _several_times_faster(figures: list[Figure], method: str) -> list[Target]:
    """The lowest ratio over layouts and passes, for each shape and family, in bfloat16."""
    targets = []
    for shape in bench_factorizers.GPU_SHAPES:
        for family, required in FACTORIZER_TARGETS.items():
            name, wanted = f"{method} {shape}, bfloat16, against {family}", f">= {required}x"
            here = [f for f in figures if (f.case.shape, f.case.dtype) == (shape, "bfloat16")]
            ratios = _known(here, lambda f, family=family: f.over_native(family))
            if not ratios:
                why = f"no figure of {NATIVE} and {family}"
                targets.append(Target.missing(name, wanted, why))
                continue
            lowest = min(ratios, key=lambda pair: pair[1])
            ratio = lowest[1]
            measured = f"{ratio:.2f}x{_missed_by(ratio, required)} ({_where(lowest)}), the lowest "
            measured += f"of {len(ratios)}{_at_most([lowest[0].ceiling(family)])}"
            targets.append(Target(name, wanted, measured, ratio >= required))
    return targets


def _no_slower_and_smaller(figures: list[Figure], method: str) -> list[Target]:
    """Against the fastest of the textbook lines, and against those that need the least memory."""
    slower, larger = f"{method}: never slower than eager", f"{method}: less peak memory than eager"

    def time(figure: Figure) -> float | None:
        return figure.over_native("eager")

    def peak(figure: Figure) -> float | None:
        return figure.peak_over("eager")

    def median(value: Callable[[Figure], float | None]) -> Callable[[Figure], float | None]:
        def of_runs(figure: Figure) -> float | None:
            found = figure.of_every_run(value)
            return statistics.median(found) if found else None

        return of_runs

    def words(pair: tuple[Figure, float], value: Callable[[Figure], float | None]) -> str:
        runs = pair[0].of_every_run(value)
        spread = f", {min(runs):.2f} to {max(runs):.2f} in {len(runs)} runs" if runs[1:] else ""
        return f"{pair[1]:.2f}x{spread} ({_where(pair)})"

    ratios, peaks = _known(figures, median(time)), _known(figures, median(peak))
    if not ratios or not peaks:
        why = f"no figure of {NATIVE} and eager"
        return [Target.missing(slower, ">= 1x", why), Target.missing(larger, "< 1x", why)]
    lowest = min(ratios, key=lambda pair: pair[1])
    highest = max(peaks, key=lambda pair: pair[1])
    return [
        Target(slower, ">= 1x", words(lowest, time), lowest[1] >= 1),
        Target(larger, "< 1x", words(highest, peak), highest[1] < 1),
    ]


def factorizers(found: Figures, earlier: Figures, cpu: bool) -> list[Target]:
    """Those of a GPU, or those of a CPU.

    On a CPU the median over all runs counts: from one process to the next ratios differ by more
    than they are away from 1.
    """
    figures = [
        Figure.of(rows, bench_factorizers.Case, "method", earlier.get(key, ()))
        for key, rows in found.items()
    ]
    evaluate = _no_slower_and_smaller if cpu else _several_times_faster
    return [
        target
        for method in bench_factorizers.STEPS
        for target in evaluate([f for f in figures if f.case.method == method], method)
    ]


def table(found: list[Target]) -> list[str]:
    return [
        "| target | required | measured | |",
        "|---|---|---|---|",
        *(f"| {t.name} | {t.required} | {t.measured} | {t.verdict} |" for t in found),
    ]
