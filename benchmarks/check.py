"""Have the op and the factorizers become slower? `make bench-check`, minutes on two cores.

    python -m benchmarks.check [--results DIR]

Compares ratios, not times: our time over a baseline's, measured now in a short run, with the ratio
in the rows that are there for this machine. Fails where one has grown by more than 15%. A case that
seems to fail is measured again, in another process, and its best ratio counts: what made a run
slower was then not us.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_contexts, bench_factorizers, bench_op, kernels, rows
from benchmarks.harness import Effort
from benchmarks.machine import Machine, processors
from benchmarks.measure import Bench, Measured
from benchmarks.report.data import newest, typed
from benchmarks.schema import CONTEXTS, EAGER, FACTORIZERS, NATIVE, OP, TRITON, Benchmark

ALLOWED = 1.15  # a ratio over the one in the rows
TRIES = 3
EFFORT = Effort(seconds=2)


@dataclass(frozen=True)
class Guard:
    """One case, and whose time over whose must not grow."""

    benchmark: Benchmark
    case: Any
    measure: Callable[[Any, Bench], Measured]
    ours: tuple[str, ...]
    base: str

    def ratios(self, found: list[dict[str, Any]]) -> dict[str, float]:
        """Those of a case's rows, by baseline."""
        known = {row["baseline"]: row.get(f"over_{self.base}") for row in found}
        return {name: known[name] for name in self.ours if (known.get(name) or nan) > 0}

    def committed(self, folder: Path) -> dict[str, float]:
        known = newest(typed(folder, self.benchmark), self.benchmark)
        columns = {name: str(value) for name, value in self.case.columns().items()}
        here = {**columns, "environment": rows.environment()}
        return self.ratios(
            known[(known[list(here)] == list(here.values())).all(axis=1)].to_dict("records")
        )


def guards(device: str) -> list[Guard]:
    """The op and the factorizers over contiguous features; contexts of ours, forward, at 33 x 33.

    Backward alone is not watched, but as a part of forward + backward: it varies the most.
    """
    found = [
        Guard(benchmark, case, bench.measure, (NATIVE, TRITON), EAGER)
        for benchmark, bench in ((OP, bench_op), (FACTORIZERS, bench_factorizers))
        for case in bench.cases(device, small=False)
        if case.problem.layout == "contiguous" and case.which != kernels.BACKWARD
    ]
    place = bench_contexts.cases(device, small=False)[0]
    return [*found, Guard(CONTEXTS, place, bench_contexts.measure, ("mf", "em"), "aspp")]


def measure(watched: list[Guard], small: bool = False) -> list[dict[str, float]]:
    """The ratios of each case, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(Machine(device, processors()), EFFORT, small, Path(), {})
    return [guard.ratios(guard.measure(guard.case, bench).rows) for guard in watched]


def measure_apart(watched: list[Guard]) -> list[dict[str, float]]:
    """The same in a process of its own: where memory lies there moves ratios, too."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(measure, watched).result()


def grown(before: dict[str, float], now: dict[str, float]) -> list[str]:
    """Baselines whose ratio is more than is allowed, or that do not run any more."""
    return [name for name, ratio in before.items() if not now.get(name, inf) <= ALLOWED * ratio]


def check(watched: list[Guard], folder: Path) -> list[str]:
    """Prints how the cases' ratios compare; returns those that have grown too much."""
    before = {guard: guard.committed(folder) for guard in watched}
    now: dict[Guard, dict[str, float]] = {guard: {} for guard in watched}
    for _ in range(TRIES):
        again = [guard for guard in watched if grown(before[guard], now[guard])]
        for guard, found in zip(again, measure_apart(again) if again else [], strict=True):
            best = {name: min(r, now[guard].get(name, inf)) for name, r in found.items()}
            now[guard] |= best
    lines = []
    for guard in watched:
        slower = grown(before[guard], now[guard])
        for name, ratio in before[guard].items():
            text = f"{guard.case}: {name} over {guard.base}: {ratio:.3f} in the rows, "
            if name in now[guard]:
                text += f"{now[guard][name]:.3f} now ({now[guard][name] / ratio - 1:+.0%})"
            else:
                text += "does not run now"
            print("SLOWER" if name in slower else "    ok", text, flush=True)
            lines += [text] if name in slower else []
        if not before[guard]:
            print("  skip", f"{guard.case}: no rows", flush=True)
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.check", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    machine = Machine("cuda" if torch.cuda.is_available() else "cpu", processors())
    folder = options.results / machine.folder()
    watched = guards(machine.device)
    if not any(guard.committed(folder) for guard in watched):
        print(
            f"benchmarks.check: no rows of this machine in {folder.parent.name}/{folder.name}: "
            "run make bench first",
            file=sys.stderr,
        )
        return 1
    lines = check(watched, folder)
    if lines:
        print(f"ratios that have grown by more than {ALLOWED - 1:.0%}:", file=sys.stderr)
        print(*lines, sep="\n", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
