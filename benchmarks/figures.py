"""The arithmetic behind the GPU's figures: bytes counted, targets evaluated, the table drawn.

A rival's name begins with its family, "mfops native", "mfops triton", "eager", "compile" or
"copy"; a family's figure is that of its fastest member.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

FORWARD, BACKWARD, BOTH = PASSES = ("forward", "backward", "forward + backward")
NATIVE, TRITON, COMPILE, EAGER, COPY = "mfops native", "mfops triton", "compile", "eager", "copy"
MFOPS = "mfops"  # whichever backend the automatic choice takes

SHAPES = [
    (4, 2048, 64, 1089),
    (16, 512, 64, 1089),
    (16, 512, 64, 4225),
    (8, 512, 64, 32768),
    (16, 256, 128, 16384),
    (2, 2048, 256, 4225),
]
# Where the share of the copy's bandwidth has a target.
BANDWIDTH_SHAPES = [(8, 512, 64, 32768), (16, 256, 128, 16384)]
BANDWIDTH_TARGETS = {FORWARD: 0.85, BACKWARD: 0.65}
SPEED_TARGETS = {COMPILE: 1.8, EAGER: 3.0}
MEMORY_TARGET = 0.01
TRITON_TARGET = 1.3

DTYPES = ("bfloat16", "float32")
LAYOUTS = ("contiguous", "channels_last")
FACTORS = ("per image", "shared")
ITEMSIZE = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Cell:
    """What is measured: (B, C, K, N), the dtype, the layout of X, whose factors."""

    shape: tuple[int, int, int, int]
    dtype: str
    layout: str
    factors: str

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} {self.layout} {self.factors}"

    @property
    def shared(self) -> bool:
        return self.factors == "shared"

    def x_bytes(self) -> int:
        batch, channels, _, pixels = self.shape
        return batch * channels * pixels * ITEMSIZE[self.dtype]

    def counted_bytes(self, which: str) -> int:
        """Bytes that a pass has to move: each input read once, each output written once."""
        batch, channels, rank, pixels = self.shape
        images = 1 if self.shared else batch
        x, mse = self.x_bytes(), 4
        x_hat = x // batch * images
        factors = images * rank * (channels + pixels) * ITEMSIZE[self.dtype]
        forward = x + factors + x_hat + mse
        backward = (x + factors + x + mse) + (x + factors)  # X, Y, Z, G', g; dX, dY, dZ
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[which]


def cells(shapes: list[tuple[int, int, int, int]]) -> list[Cell]:
    """All of them, those that most targets speak of first."""
    return [
        Cell(shape, dtype, layout, factors)
        for factors in FACTORS
        for layout in LAYOUTS
        for dtype in DTYPES
        for shape in shapes
    ]


@dataclass
class Result:
    """One cell, one pass. Dictionaries are by rival; those missing say why in `not_measured`."""

    cell: Cell
    which: str
    seconds: dict[str, float]  # medians
    spread: dict[str, float]  # of the middle half of the rounds, over the median
    of_copy: dict[str, float]  # the copy's time over the rival's
    over_base: dict[str, float]  # the rival's time over the base's
    base: str | None = None  # mfops native, or mfops triton where that could not run
    extra_bytes: dict[str, int] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)

    def gb_per_s(self, name: str) -> float:
        return self.cell.counted_bytes(self.which) / self.seconds[name] / 1e9

    def best(self, figures: dict[str, float], family: str) -> float | None:
        """The figure of the fastest rival of a family, None where none was measured."""
        names = [name for name in figures if name.startswith(family)]
        return figures[min(names, key=self.seconds.__getitem__)] if names else None


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


def _missed_by(value: float, required: float) -> str:
    """How far a value is from the one required, where it falls short."""
    return f" (short by {required / value - 1:.0%})" if value < required else ""


def _bandwidth(results: list[Result]) -> list[Target]:
    """The lowest share over layouts and factors, for each shape and pass."""
    targets = []
    for which, required in BANDWIDTH_TARGETS.items():
        for shape in BANDWIDTH_SHAPES:
            name, wanted = f"{which} {shape}, bfloat16", f">= {required:.0%} of the copy"
            shares = {
                r.cell: r.of_copy[NATIVE]
                for r in results
                if (r.cell.shape, r.cell.dtype, r.which) == (shape, "bfloat16", which)
                and NATIVE in r.of_copy
            }
            if not shares:
                targets.append(Target.missing(name, wanted, f"no figure of {NATIVE}"))
                continue
            cell = min(shares, key=shares.__getitem__)
            measured = (
                f"{shares[cell]:.0%}{_missed_by(shares[cell], required)}, {cell.layout}, "
                f"{cell.factors}, the lowest of {len(shares)} of {len(LAYOUTS) * len(FACTORS)}"
            )
            targets.append(Target(name, wanted, measured, shares[cell] >= required))
    return targets


def _speed(results: list[Result]) -> list[Target]:
    """Geometric means over the six shapes, per-image factors, forward + backward."""
    targets = []
    for family, required in SPEED_TARGETS.items():
        for dtype in DTYPES:
            for layout in LAYOUTS:
                name = f"{BOTH} against {family}, {dtype}, {layout}, per image"
                wanted = f">= {required}x, geometric mean of {len(SHAPES)} shapes"
                found = {
                    r.cell.shape: r.best(r.over_base, family)
                    for r in results
                    if (r.cell.dtype, r.cell.layout, r.cell.factors) == (dtype, layout, "per image")
                    and r.which == BOTH
                    and r.base == NATIVE
                }
                ratios = [found[s] for s in SHAPES if found.get(s) is not None]
                if not ratios and (dtype, layout) != (DTYPES[0], LAYOUTS[0]):
                    continue  # this family was not asked for there
                if len(ratios) < len(SHAPES):
                    why = f"{len(ratios)} of {len(SHAPES)} shapes measured"
                    targets.append(Target.missing(name, wanted, why))
                    continue
                mean = geometric_mean(ratios)
                measured = (
                    f"{mean:.2f}x{_missed_by(mean, required)}, from {min(ratios):.2f}x "
                    f"to {max(ratios):.2f}x"
                )
                targets.append(Target(name, wanted, measured, mean >= required))
    return targets


def _nowhere_slower(results: list[Result]) -> Target:
    name, wanted = f"{BOTH}, per image: slower nowhere", ">= 1x, every case"
    ratios = {}
    for r in results:
        if r.which == BOTH and r.cell.factors == "per image" and r.base == NATIVE:
            for family in SPEED_TARGETS:
                value = r.best(r.over_base, family)
                if value is not None:
                    ratios[f"{family}, {r.cell}"] = value
    if not ratios:
        return Target.missing(name, wanted, f"no figure of {NATIVE}")
    worst = min(ratios, key=ratios.__getitem__)
    slower = sum(value < 1 for value in ratios.values())
    measured = f"{ratios[worst]:.2f}x ({worst}); slower in {slower} of {len(ratios)}"
    return Target(name, wanted, measured, slower == 0)


def _memory(results: list[Result]) -> Target:
    name, wanted = "extra memory", f"< {MEMORY_TARGET:.0%} of X"
    shares = {
        f"{r.which}, {r.cell}": r.extra_bytes[NATIVE] / r.cell.x_bytes()
        for r in results
        if NATIVE in r.extra_bytes
    }
    if not shares:
        return Target.missing(name, wanted, f"no figure of {NATIVE}")
    worst = max(shares, key=shares.__getitem__)
    over = sum(share >= MEMORY_TARGET for share in shares.values())
    measured = f"at most {shares[worst]:.2%} ({worst}); over in {over} of {len(shares)}"
    return Target(name, wanted, measured, over == 0)


def _triton(results: list[Result]) -> Target:
    name, wanted = "Triton against native", f"<= {TRITON_TARGET}x, every case"
    ratios = {
        f"{r.which}, {r.cell}": r.over_base[TRITON]
        for r in results
        if r.base == NATIVE and TRITON in r.over_base
    }
    if not ratios:
        return Target.missing(name, wanted, "native and Triton were not both measured")
    worst = max(ratios, key=ratios.__getitem__)
    over = sum(value > TRITON_TARGET for value in ratios.values())
    measured = (
        f"{ratios[worst]:.2f}x at most ({worst}), geometric mean "
        f"{geometric_mean(list(ratios.values())):.2f}x; over in {over} of {len(ratios)}"
    )
    return Target(name, wanted, measured, over == 0)


def _host(host: dict[str, dict[str, float]]) -> list[Target]:
    """`host`: by mode, every rival's time per call over the textbook lines'."""
    targets = []
    for mode, ratios in host.items():
        name, wanted = f"host time per call, {mode}", "< 1x the textbook lines"
        if MFOPS not in ratios:
            targets.append(Target.missing(name, wanted, f"no figure of {MFOPS}"))
            continue
        targets.append(Target(name, wanted, f"{ratios[MFOPS]:.2f}x", ratios[MFOPS] < 1))
    return targets


def targets(results: list[Result], host: dict[str, dict[str, float]]) -> list[Target]:
    """What issue and design ask for, one by one."""
    return [
        *_bandwidth(results),
        *_speed(results),
        _nowhere_slower(results),
        _memory(results),
        _triton(results),
        *_host(host),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def row(result: Result) -> str:
    cell, ours = result.cell, result.base
    extra = result.extra_bytes.get(ours) if ours else None
    columns = [
        str(cell.shape),
        cell.dtype,
        cell.layout,
        cell.factors,
        result.which,
        _number(result.gb_per_s(COPY) if COPY in result.seconds else None, ".0f"),
        ours or "-",
        _number(result.seconds[ours] * 1e3 if ours else None, ".4f"),
        _number(result.gb_per_s(ours) if ours else None, ".0f"),
        _number(result.of_copy[ours] if ours else None, ".0%"),
        *(
            _number(result.best(result.over_base, family), ".2f")
            for family in (TRITON, COMPILE, EAGER)
        ),
        _number(None if extra is None else extra / cell.x_bytes(), ".2%"),
    ]
    return "| " + " | ".join(columns) + " |"


def line(results: list[Result]) -> str:
    """The passes of one cell, in short."""
    ours = [r for r in results if r.base is not None]
    text = f"{results[0].cell}: of the copy {', '.join(f'{r.of_copy[r.base]:.0%}' for r in ours)}"
    for r in ours:
        if r.which == BOTH:
            ratios = (f"{f} {_number(r.best(r.over_base, f), '.2f')}" for f in SPEED_TARGETS)
            text += f"; {BOTH}: {', '.join(ratios)}"
    return text


def omissions(report: dict[str, Any]) -> list[str]:
    """What failed or was not measured, and why, with the cases."""
    texts = []
    for kind in ("failed", "not_measured"):
        for what, where in report[kind].items():
            cases = "; ".join(where) if len(where) < 4 else f"{len(where)} cases"
            texts.append(f"{kind.replace('_', ' ')}: {what} ({cases})")
    return texts


def target_table(found: list[Target]) -> list[str]:
    return [
        "| target | required | measured | |",
        "|---|---|---|---|",
        *(f"| {t.name} | {t.required} | {t.measured} | {t.verdict} |" for t in found),
    ]


def markdown(report: dict[str, Any], results: list[Result], found: list[Target]) -> str:
    """The page: where the figures are from, the targets, a row for each cell and pass."""
    lines = [f"# {report['title']}", ""]
    lines += [f"- {name}: {value}" for name, value in report["provenance"].items()]
    lines += ["", "## Targets", "", *target_table(found)]
    lines += [
        "",
        "## Times",
        "",
        "Medians of GPU time. GB/s from counted bytes: each input and output once. The copy moves "
        "as many bytes in the same rounds. Other rivals' columns are their time over mfops'.",
        "",
        "| (B, C, K, N) | dtype | layout | factors | pass | copy GB/s | mfops | ms | GB/s "
        "| of the copy | triton | torch.compile | eager | extra memory, of X |",
        "|---|---|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
        *map(row, results),
        "",
        "## Host time per call",
        "",
        "From call to return, microseconds, (B, C, K, N) = "
        f"{report['host']['shape']}, {report['host']['dtype']}.",
        "",
        "| | op | us | over the textbook lines |",
        "|---|---|---:|---:|",
        *(
            f"| {mode} | {name} | {us:.1f} | {report['host']['over_textbook'][mode][name]:.2f} |"
            for mode, times in report["host"]["microseconds"].items()
            for name, us in times.items()
        ),
    ]
    left_out = omissions(report)
    if left_out:
        lines += ["", "## Left out", "", *(f"- {text}" for text in left_out)]
    return "\n".join(lines) + "\n"
