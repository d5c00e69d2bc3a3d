"""What can this machine do at most? The rates that other figures are held against.

    python -m pytest benchmarks/bench_ceilings.py

A copy that reads and writes memory far larger than the caches, and a square product of matrices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.harness import Call
from benchmarks.kernels import DTYPES, copy_call
from benchmarks.measure import Bench, Case, Measured, playback, time_calls
from benchmarks.schema import CEILINGS, COPY

MATMUL = "matmul"
COPIED = {"cuda": 2**31, "cpu": 2**29}  # bytes, read and written together
SIDE = {"cuda": 8192, "cpu": 2048}
SMALL_COPIED, SMALL_SIDE = 2**10, 16


@dataclass(frozen=True)
class CeilingCase(Case):
    dtype: str


def product_call(dtype: torch.dtype, side: int, device: str) -> Call:
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return Call(lambda number: number, lambda _: torch.mm(a, b, out=out))


def measure(case: CeilingCase, bench: Bench) -> Measured:
    device = bench.machine.device
    copied = SMALL_COPIED if bench.small else COPIED[device]
    side = SMALL_SIDE if bench.small else SIDE[device]
    calls = {
        COPY: copy_call(copied, 1, device),
        MATMUL: product_call(getattr(torch, case.dtype), side, device),
    }
    work = {COPY: copied, MATMUL: 2 * side**3}
    found = time_calls(CEILINGS, case.columns(), calls, bench)
    for row in found.rows:
        row["rate"] = work[row["baseline"]] / row["median_s"]
    return found


def cases(device: str, small: bool) -> list[CeilingCase]:
    return [CeilingCase(dtype) for dtype in DTYPES]


def baselines(case: CeilingCase, device: str) -> Iterable[str]:
    return COPY, MATMUL


@pytest.mark.benchmark(**playback)
def test_ceiling(case: CeilingCase, baseline: str, play: Any) -> None:
    play(CEILINGS, case, baseline, measure)
