"""What can this machine do at most? The rates that the other figures are held against.

    python -m pytest benchmarks/bench_ceilings.py

A copy that reads and writes memory far larger than the caches, and a square product of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.harness import Turn, take_turns, times
from benchmarks.kernels import DTYPES, copy_turn
from benchmarks.measure import Bench, Measured, pairs, playback
from benchmarks.questions import CEILINGS, COPY

MATMUL = "matmul"
COPIED = {"cuda": 2**31, "cpu": 2**29}  # bytes, read and written together
SIDE = {"cuda": 8192, "cpu": 2048}
SMALL_COPIED, SMALL_SIDE = 2**10, 16


@dataclass(frozen=True)
class Figure:
    dtype: str

    def __str__(self) -> str:
        return self.dtype

    def columns(self) -> dict[str, Any]:
        return {"dtype": self.dtype}


def product_turn(dtype: torch.dtype, side: int, device: str) -> Turn:
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return Turn(lambda number: number, lambda _: torch.mm(a, b, out=out))


def measure(figure: Figure, bench: Bench) -> Measured:
    device = bench.machine.device
    copied = SMALL_COPIED if bench.small else COPIED[device]
    side = SMALL_SIDE if bench.small else SIDE[device]
    turns = {
        COPY: copy_turn(copied, 1, device),
        MATMUL: product_turn(getattr(torch, figure.dtype), side, device),
    }
    clock = bench.machine.clock()
    seconds = take_turns(turns, clock, bench.effort)
    work = {COPY: copied, MATMUL: 2 * side**3}
    return Measured(list(_rows(figure, seconds, work, clock.late)), seconds)


def _rows(
    figure: Figure, seconds: dict[str, list[float]], work: dict[str, int], late: int
) -> Iterator[dict[str, Any]]:
    for name in seconds:
        row = times(seconds, name, CEILINGS.bases)
        rate = work[name] / row["median_s"]
        yield {**figure.columns(), "rival": name, **row, "late": late, "rate": rate}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    figures = [Figure(dtype) for dtype in DTYPES]
    cases = pairs(figures, lambda _: [COPY, MATMUL])
    metafunc.parametrize(("figure", "rival"), cases, ids=str)


@pytest.mark.benchmark(**playback)
def test_ceiling(figure: Figure, rival: str, play: Any) -> None:
    play(CEILINGS, figure, rival, measure)
