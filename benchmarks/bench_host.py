"""What does a call of the op cost the host? From call to return, on small tensors.

    python -m pytest benchmarks/bench_host.py

On a GPU the queue of launches is kept short, so that no call waits for room in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

import mfops
from benchmarks.bench_op import Case, make_inputs, on_backend, textbook
from benchmarks.harness import Turn, WallClock, first_line, take_turns, times
from benchmarks.kernels import Op
from benchmarks.measure import Bench, Measured, pairs, playback
from benchmarks.questions import EAGER, HOST, MFOPS, TRITON

OPS: dict[str, Op] = {
    MFOPS: mfops.factorized_reconstruction,
    TRITON: on_backend("triton"),
    EAGER: textbook,
}
CASE = Case((2, 64, 16, 100), "float32", "contiguous", "per image")
CALLS = 20  # between two synchronizations: far fewer than the launch queue holds
MODES = ("no gradients", "gradients wanted")


@dataclass(frozen=True)
class Figure:
    mode: str

    def __str__(self) -> str:
        return f"{CASE}: {self.mode}"

    def columns(self) -> dict[str, Any]:
        shape = " ".join(map(str, CASE.shape))
        return {"shape": shape, "dtype": CASE.dtype, "mode": self.mode}


def turn(op: Op, leaves: tuple[Tensor, ...], synchronize: Callable[[], None]) -> Turn:
    def calls(_: Any) -> None:
        for _ in range(CALLS):
            op(*leaves)

    return Turn(lambda number: synchronize(), calls)


def measure(figure: Figure, bench: Bench) -> Measured:
    leaves = make_inputs(CASE, bench.machine.device).leaves
    if figure.mode == MODES[0]:
        leaves = tuple(t.detach() for t in leaves)
    turns, rows = {}, []
    for name, op in OPS.items():
        try:
            op(*leaves)
            turns[name] = turn(op, leaves, bench.machine.synchronize)
        except Exception as error:  # a backend that is not there, or breaks, leaves the others
            unavailable = "cannot run this call" in str(error)
            why = str(error) if unavailable else f"failed: {first_line(error)}"
            rows.append({**figure.columns(), "rival": name, "skipped": why})
    seconds = take_turns(turns, WallClock(), bench.effort)
    seconds = {name: [s / CALLS for s in found] for name, found in seconds.items()}
    rows += [
        {**figure.columns(), "rival": name, **times(seconds, name, HOST.bases), "late": 0}
        for name in seconds
    ]
    return Measured(rows, seconds)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = pairs([Figure(mode) for mode in MODES], lambda _: OPS)
    metafunc.parametrize(("figure", "rival"), cases, ids=str)


@pytest.mark.benchmark(**playback)
def test_host(figure: Figure, rival: str, play: Any) -> None:
    play(HOST, figure, rival, measure)
