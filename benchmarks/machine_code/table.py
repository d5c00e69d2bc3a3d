"""The table of docs/kernels.md: what a build's kernels spend on a tile."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine_code import listing
from benchmarks.machine_code.kernels import ARCH, KERNELS, Kernel
from benchmarks.machine_code.paths import issued

DOCUMENT = Path("docs/kernels.md")
# By how names begin; the first class that fits. All else is integer arithmetic, moves, branches.
CLASSES = {
    "tensor core": "HMMA",
    "ldmatrix": "LDSM",
    "shared": "LDS|STS",
    "global": r"LDGSTS|LDG\.|STG|LD\.|ST\.",
    "barrier": "BAR|UCGABAR|MEMBAR|ERRBAR|CGAERRBAR|CCTL|DEPBAR|LDGDEPBAR",
    "float": "F|MUFU|I2F|HADD|HMUL|HFMA|DADD|DMUL|DFMA",
    "rest": "",
}
SCHEDULERS = 4  # of a multiprocessor, each of which issues an instruction in a cycle
COPIED = (11.5, 13.0)  # bytes that a copy moves in a cycle, for each multiprocessor of an H100
TITLES = ["kernel, or pass", "registers", "shared memory", "blocks x warps", "instructions"]
TITLES += [*CLASSES, "cycles to issue", "cycles to copy"]


class Row(NamedTuple):
    kernel: Kernel
    registers: int
    issued: Counter[str]

    def classes(self) -> dict[str, int]:
        found = dict.fromkeys(CLASSES, 0)
        for name, count in self.issued.items():
            found[next(c for c, begin in CLASSES.items() if re.match(begin, name))] += count
        return found

    def cells(self) -> list[str]:
        kernel, total = self.kernel, self.issued.total()
        to_copy = "-"
        if kernel.copied:
            fast, slow = (kernel.copied / rate for rate in reversed(COPIED))
            to_copy = f"{fast:,.0f} to {slow:,.0f}"
        numbers = [self.registers, kernel.shared, f"{kernel.blocks} x {kernel.warps}", total]
        numbers += [*self.classes().values(), kernel.warps * total // SCHEDULERS]
        return [kernel.title, *(n if isinstance(n, str) else f"{n:,}" for n in numbers), to_copy]


def measured(build: Path) -> list[Row]:
    """
    Raises:
        LookupError: the build has no code for the architecture, not those kernels, or no path
            through one does its work.
        OSError: the build cannot be listed.
    """
    if ARCH not in listing.archs(build):
        raise LookupError(f"{build.name} has no machine code for {ARCH}")
    resources = listing.resources(build, ARCH)
    names = []
    for kernel in KERNELS:
        found = [name for name in resources if re.search(kernel.pattern, name)]
        if len(found) != 1:
            raise LookupError(f"{build.name} has {len(found)} kernels like {kernel.pattern}, not 1")
        names += found
    code = listing.code(build, ARCH)
    rows = []
    for kernel, name in zip(KERNELS, names, strict=True):
        try:
            count = issued(code[name], kernel.stretches)
        except LookupError as error:
            raise LookupError(f"{kernel.title}: {error}") from None
        rows.append(Row(kernel, resources[name]["REG"], count))
    return rows


def compiler(build: Path) -> str:
    return listing.assembler(build, ARCH, next(iter(listing.resources(build, ARCH))))


def table(build: Path) -> list[str]:
    rows = measured(build)
    lines = [TITLES, ["---", *["---:"] * (len(TITLES) - 1)], *(row.cells() for row in rows)]
    source = f"Written by `python -m benchmarks.machine_code` from code for {ARCH}"
    return [
        *(f"| {' | '.join(cells)} |" for cells in lines),
        "",
        f"{source} by {compiler(build)}.",
    ]


def ceilings(document: str) -> dict[str, int]:
    """The instructions that the table in a document has, by kernel."""
    rows = [line.strip("| ").split(" | ") for line in document.splitlines() if line[:2] == "| "]
    titles = {kernel.title for kernel in KERNELS}
    column = TITLES.index("instructions")
    return {row[0]: int(row[column].replace(",", "")) for row in rows if row[0] in titles}
