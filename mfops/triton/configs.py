"""Tile shapes, and the choice among them: timed once for each class of shapes, then kept.

Not `triton.autotune`: that times every exact key, also while a CUDA graph is captured, where
nothing can be timed, and in the interpreter, where times mean nothing.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from mfops.triton.common import INTERPRETED, Problem

MAX_BLOCK = 128  # rows and columns of a tile divide it
TIMED_LAUNCHES = 10


class Config(NamedTuple):
    """A tile's shape and how its program runs.

    Forward, block_m rows by block_n columns; backward, block_m is the strip that a program owns,
    block_n a tile across it. block_k bases are multiplied, backward also summed, at a time.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# The first of a list needs least and serves where nothing can be timed. The lists are short: each
# entry is compiled once for each class. Entries were kept if, compiled for sm_80 and sm_90 with
# rows of 4096 pixels, they spill no registers; of float32 operands that do not round to TF32
# (multiply-adds, whose operands lie in registers) that admits small blocks only. X that is not
# aligned is read by the element, whose offsets take registers: entries of bfloat16 and float16
# that then spill a hundred bytes and more on sm_90 serve aligned X alone.


def _innermost(problem: Problem) -> int | None:
    """X's dimension of consecutive elements."""
    _, by_row, by_col = problem.x.stride()
    return 2 if by_col == 1 else 1 if by_row == 1 else None


def _aligned(problem: Problem) -> bool:
    """Whether vectors of 16 bytes never cross the end of a row, or column, of X."""
    innermost = _innermost(problem)
    return innermost is not None and problem.x.shape[innermost] % 16 == 0


def forward_configs(problem: Problem) -> list[Config]:
    rank, float32 = problem.rank, problem.x.dtype == torch.float32
    if float32 and problem.precision == "ieee":
        return [Config(64, 64, 16, 4, 2), Config(128, 64, 16, 8, 2)]
    if rank > 64:  # in blocks, the next on its way while one is multiplied
        k, stages = (32 if float32 else 64), 3
    else:
        k, stages = max(16, triton.next_power_of_2(rank)), 2
    shapes = [(64, 64, 4), (128, 64, 8), (64, 128, 8)]
    if not float32 and _aligned(problem):
        shapes += [(128, 64, 4), (128, 128, 8)]
    return [Config(m, n, k, warps, stages) for m, n, warps in shapes]


def backward_configs(problem: Problem) -> list[Config]:
    rank, float32 = problem.rank, problem.x.dtype == torch.float32
    ieee = float32 and problem.precision == "ieee"
    k = max(16, triton.next_power_of_2(rank))
    if ieee:
        if k <= 64:
            shapes = [(32, 32, 4), (64, 16, 4), (32, 64, 8)]
        elif k <= 128:
            shapes = [(32, 16, 4), (32, 32, 8)]
        elif k <= 256:
            shapes = [(16, 16, 4), (32, 16, 8)]
        else:
            k, shapes = 64, [(32, 16, 4)]
    elif k <= 64:
        # A warp multiplies 16 rows of a strip.
        shapes = [(32, 32, 4), (64, 32, 4), (128, 32, 8)]
        if not float32 and _aligned(problem):
            shapes.append((64, 64, 4))
    elif k <= 128:
        shapes = [(32, 16, 4), (32, 32, 4), (64, 16, 4)]
        if not float32:
            shapes.append((64, 32, 4))
    elif k <= 256:
        shapes = [(32, 16, 4)]
        if not float32:
            shapes.append((64, 16, 4))
    else:
        k, shapes = 128, [(32, 16, 4)]
    return [Config(own, across, k, warps, 2) for own, across, warps in shapes]


def round_configs(problem: Problem, nmf: bool) -> list[Config]:
    """block_m rows of Y, and of the sum X Z^T; block_n columns of a tile of X.

    Beyond 64 bases nmf, which holds Z Z^T and Y^T Y too, takes them in blocks of 64; the others,
    which compute Y^T X anew for each block, do so beyond 128.
    """
    rank, float32 = problem.rank, problem.x.dtype == torch.float32
    k = min(max(16, triton.next_power_of_2(rank)), 64 if nmf else 128)
    few = rank <= 64
    if float32 and problem.precision == "ieee":
        shapes = [(128, 16, 8)] if nmf else [(64, 16, 8)] if few else [(32, 16, 4)]
    elif nmf and problem.x.dtype == torch.bfloat16:
        shapes = [(128, 32, 8), (64, 16, 4)] if few else [(128, 32, 8)]
    elif nmf:
        shapes = [(128, 16, 8), (64, 16, 8)]
    elif float32:
        shapes = [(128, 32, 8), (64, 16, 8)] if few else [(64, 16, 8)]
    else:
        shapes = [(128, 32, 8)] if few else [(64, 32, 8)]
        if few and _aligned(problem):
            shapes.append((256, 32, 8))
    return [Config(m, n, k, warps, 2) for m, n, warps in shapes]


def finish_configs(problem: Problem) -> list[Config]:
    """block_m rows at a time of the block_n columns that a program owns."""
    rank, float32 = problem.rank, problem.x.dtype == torch.float32
    k = min(max(16, triton.next_power_of_2(rank)), 64)
    if float32 and problem.precision == "ieee":
        shapes = [(32, 16, 4), (16, 16, 4)] if rank <= 64 else [(16, 16, 4)]
    elif float32:
        shapes = [(32, 16, 4), (32, 32, 8)] if rank <= 64 else [(32, 16, 4)]
    elif rank <= 64:
        shapes = [(64, 32, 4), (64, 64, 8)]
    elif rank <= 128:
        k, shapes = 128, [(32, 16, 4)]
    else:
        shapes = [(64, 32, 8), (32, 32, 4)]
    return [Config(m, n, k, warps, 2) for m, n, warps in shapes]


def nmf_backward_configs(problem: Problem) -> list[Config]:
    """As finish_configs; the kernel holds a tile of the gradient, too, and has fewer registers."""
    if problem.rank > 64 or problem.x.dtype == torch.float32:
        return finish_configs(problem)
    k = max(16, triton.next_power_of_2(problem.rank))
    return [Config(m, n, k, warps, 2) for m, n, warps in [(32, 32, 4), (64, 32, 8)]]


_chosen: dict[Hashable, Config] = {}


def _shape_class(problem: Problem) -> Hashable:
    """What the best configuration depends on: sizes count by powers of four."""
    x = problem.x
    layout = _innermost(problem), _aligned(problem)
    sharing = problem.y.dim(), problem.z.dim()
    sizes = tuple((size - 1).bit_length() // 2 for size in x.shape)
    k = triton.next_power_of_2(problem.rank)
    return x.device, x.dtype, problem.precision, *layout, sharing, sizes, k


def choose(
    problem: Problem,
    traits: tuple[Hashable, ...],
    configs: Callable[[Problem], list[Config]],
    launch: Callable[[Config], Any],
) -> Config:
    """The fastest configuration for problems like this one, found out by the first such call.

    `traits` say which kernel it is and what it does. It is the first configuration where nothing
    can be timed (in the interpreter, while a CUDA graph is captured) and where a choice that may
    differ from run to run, and with it the last bits, is unwelcome
    (torch.use_deterministic_algorithms).
    """
    if INTERPRETED or torch.are_deterministic_algorithms_enabled():
        return configs(problem)[0]
    key = (traits, _shape_class(problem))
    config = _chosen.get(key)
    if config is None:
        if torch.cuda.is_current_stream_capturing():
            return configs(problem)[0]
        config = min(configs(problem), key=lambda candidate: _milliseconds(launch, candidate))
        _chosen[key] = config
    return config


def _milliseconds(launch: Callable[[Config], Any], config: Config) -> float:
    """Median time of a launch; infinite where the GPU has too little memory on chip for it."""
    try:
        launch(config)  # compiles
    except (OutOfResources, PTXASError):
        return float("inf")
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED_LAUNCHES + 1)]
    events[0].record()
    for event in events[1:]:
        launch(config)
        event.record()
    events[-1].synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))
