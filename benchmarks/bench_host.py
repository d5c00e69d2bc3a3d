"""What does a call of the op cost the host? From call to return, on small tensors.

    python -m pytest benchmarks/bench_host.py

On a GPU the queue of launches is kept short, so that no call waits for room in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

import mfops
from benchmarks.bench_op import Problem, make_inputs, on_backend, textbook
from benchmarks.harness import Call, WallClock, measure_rounds, times, why_not
from benchmarks.kernels import Op
from benchmarks.measure import Bench, Case, Measured, playback
from benchmarks.schema import EAGER, HOST, MFOPS, TRITON

OPS: dict[str, Op] = {
    MFOPS: mfops.factorized_reconstruction,
    TRITON: on_backend("triton"),
    EAGER: textbook,
}
PROBLEM = Problem((2, 64, 16, 100), "float32", "contiguous", "per image")
CALLS = 20  # between two synchronizations: far fewer than the launch queue holds
MODES = ("no gradients", "gradients wanted")


@dataclass(frozen=True)
class HostCase(Case):
    shape: str
    dtype: str
    mode: str


def call_of(op: Op, leaves: tuple[Tensor, ...], synchronize: Callable[[], None]) -> Call:
    def calls(_: Any) -> None:
        for _ in range(CALLS):
            op(*leaves)

    return Call(lambda number: synchronize(), calls)


def measure(case: HostCase, bench: Bench) -> Measured:
    leaves = make_inputs(PROBLEM, bench.machine.device).leaves
    if case.mode == MODES[0]:
        leaves = tuple(t.detach() for t in leaves)
    calls, rows = {}, []
    for name, op in OPS.items():
        try:
            op(*leaves)
            calls[name] = call_of(op, leaves, bench.machine.synchronize)
        except Exception as error:  # a backend that is not there, or breaks, leaves the others
            rows.append({**case.columns(), "baseline": name, "skipped": why_not(error)})
    seconds = measure_rounds(calls, WallClock(), bench.effort)
    seconds = {name: [s / CALLS for s in found] for name, found in seconds.items()}
    rows += [
        {**case.columns(), "baseline": name, **times(seconds, name, HOST.bases), "late": 0}
        for name in seconds
    ]
    return Measured(rows, seconds)


def cases(device: str, small: bool) -> list[HostCase]:
    return [HostCase(PROBLEM.columns()["shape"], PROBLEM.dtype, mode) for mode in MODES]


def baselines(case: HostCase, device: str) -> Iterable[str]:
    return OPS


@pytest.mark.benchmark(**playback)
def test_host(case: HostCase, baseline: str, play: Any) -> None:
    play(HOST, case, baseline, measure)
