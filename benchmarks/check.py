"""Has the op become slower than its rivals? `make bench-check`, minutes on two processor cores.

    python -m benchmarks.check [--results DIR]

Compares ratios, not times: our time over a rival's, measured now in a short run, with the ratio in
the rows that are there for this machine. Fails where one has grown by more than 15%. A figure that
seems to fail is measured again, and its best ratio counts: what made a run slower was then not us.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_contexts, bench_op, rows
from benchmarks.harness import Effort
from benchmarks.machine import Machine, processors
from benchmarks.measure import Bench, Measured
from benchmarks.questions import CONTEXTS, EAGER, NATIVE, OP, TRITON

ALLOWED = 1.15  # a ratio over the one in the rows
TRIES = 3
EFFORT = Effort(seconds=2)


@dataclass(frozen=True)
class Guard:
    """One figure, and whose time over whose must not grow."""

    question: rows.Question
    figure: Any
    measure: Callable[[Any, Bench], Measured]
    ours: tuple[str, ...]
    base: str

    def ratios(self, found: list[dict[str, Any]] | list[rows.Row]) -> dict[str, float]:
        """Those of a figure's rows, by rival."""
        column = f"over_{self.base}"
        return {
            row["rival"]: float(row[column])
            for row in found
            if row["rival"] in self.ours and row.get(column)
        }

    def committed(self, folder: Path) -> dict[str, float]:
        columns = self.figure.columns()
        key = (*(str(columns[name]) for name in self.question.figure), rows.environment())
        known = rows.figures(rows.read(folder / f"{self.question.name}.csv"), self.question)
        return self.ratios(known.get(key, []))


def guards(device: str) -> list[Guard]:
    """The op in every pass over contiguous features; contexts of ours, forward, at 33 x 33."""
    found = [
        Guard(OP, figure, bench_op.measure, (NATIVE, TRITON), EAGER)
        for figure in bench_op.figures(device, small=False)
        if figure.case.layout == "contiguous"
    ]
    place = bench_contexts.figures(device, small=False)[0]
    return [*found, Guard(CONTEXTS, place, bench_contexts.measure, ("mf", "em"), "aspp")]


def check(guard: Guard, folder: Path, bench: Bench) -> list[str]:
    """Prints how a figure's ratios compare; returns those that have grown too much."""
    before = guard.committed(folder)
    now: dict[str, float] = {}
    for _ in range(TRIES if before else 0):
        measured = guard.ratios(guard.measure(guard.figure, bench).rows)
        now = {name: min(r, now.get(name, r)) for name, r in measured.items()}
        if all(now.get(name, 0) <= ALLOWED * r for name, r in before.items()):
            break
    grown = []
    for name, ratio in before.items():
        text = f"{guard.figure}: {name} over {guard.base}"
        if name not in now:
            grown.append(f"{text}: {ratio:.3f} in the rows, does not run now")
            continue
        change = now[name] / ratio - 1
        text += f": {ratio:.3f} in the rows, {now[name]:.3f} now ({change:+.0%})"
        if now[name] > ALLOWED * ratio:
            grown.append(text)
        print("SLOWER" if now[name] > ALLOWED * ratio else "    ok", text, flush=True)
    if not before:
        print("  skip", f"{guard.figure}: no rows", flush=True)
    return grown


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.check", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    machine = Machine("cuda" if torch.cuda.is_available() else "cpu", processors())
    bench = Bench(machine, EFFORT, False, options.results / machine.folder(), {})
    watched = guards(machine.device)
    if not any(guard.committed(bench.folder) for guard in watched):
        where = f"{options.results.name}/{machine.folder()}"
        print(
            f"benchmarks.check: no rows of this machine in {where}: run make bench first",
            file=sys.stderr,
        )
        return 1
    grown = [text for guard in watched for text in check(guard, bench.folder, bench)]
    if grown:
        print(f"{len(grown)} ratios have grown by more than {ALLOWED - 1:.0%}:", file=sys.stderr)
        print(*grown, sep="\n", file=sys.stderr)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
