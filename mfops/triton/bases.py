"""The next Y from the partial sums X Z^T that a round leaves, added in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfops.methods.base import EPS
from mfops.triton.common import ceil_div, dot, load_tile, operand, store_tile, strides

_EPS = tl.constexpr(EPS)


@triton.jit
def _add_up(
    partials, image, count, row0, rows, col0, cols, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """A tile of the sum of an image's partial sums."""
    total = tl.zeros((ROWS, COLS), tl.float32)
    for i in tl.range(0, count, num_stages=3):
        total += load_tile(partials, image * count + i, row0, rows, col0, cols, ROWS, COLS)
    return total


@triton.jit(do_not_specialize=["count"])
def means_kernel(
    partials, partial, partial_row, partial_k, sums, sum_partial, sum_row, sum_k,
    mean, mean_batch, mean_row, mean_k, unit, unit_batch, unit_row, unit_k,
    rounded, rounded_batch, rounded_row, rounded_k, rows, rank, count,
    EM: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Means of X's columns under weights Z, and the same over their lengths.

    A program of axis 0 has an image, one of axis 1 BLOCK_K of its bases.
    """
    partials = (partials, partial, partial_row, partial_k)
    sums = (sums, sum_partial, sum_row, sum_k)
    mean, unit = (mean, mean_batch, mean_row, mean_k), (unit, unit_batch, unit_row, unit_k)
    rounded = (rounded, rounded_batch, rounded_row, rounded_k)
    image = tl.program_id(0).to(tl.int64)
    k0 = tl.program_id(1).to(tl.int64) * BLOCK_K
    zero = tl.full((), 0, tl.int64)
    weights = tl.trans(_add_up(sums, image, count, k0, rank, zero, 1, BLOCK_K, 1))
    squares = tl.zeros((1, BLOCK_K), tl.float32)
    for row0 in range(zero, rows, ROWS):
        tile = _add_up(partials, image, count, row0, rows, k0, rank, ROWS, BLOCK_K)
        tile = tile / (weights + _EPS)
        store_tile(tile, mean, image, row0, rows, k0, rank, ROWS, BLOCK_K)
        squares += tl.sum(tile * tile, 0, keep_dims=True)
    length = tl.sqrt(squares)
    length = length + _EPS if EM else tl.maximum(length, _EPS)
    tl.debug_barrier()  # the program reads what its threads have written
    for row0 in range(zero, rows, ROWS):
        tile = load_tile(mean, image, row0, rows, k0, rank, ROWS, BLOCK_K) / length
        store_tile(tile, unit, image, row0, rows, k0, rank, ROWS, BLOCK_K)
        store_tile(tile, rounded, image, row0, rows, k0, rank, ROWS, BLOCK_K)


def launch_means(x: Tensor, partials: Tensor, sums: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Y of em, vq or cd (B, C, K), and what X is multiplied by in the next round, in x's dtype."""
    batch, rows, rank = x.shape[0], x.shape[1], partials.shape[-1]
    mean, unit = (partials.new_empty(batch, rows, rank) for _ in range(2))
    rounded = torch.empty_like(unit, dtype=x.dtype)
    block_k = 8
    means_kernel[(batch, ceil_div(rank, block_k))](
        partials, *partials.stride(), sums, *sums.stride(), mean, *mean.stride(),
        unit, *unit.stride(), rounded, *rounded.stride(), rows, rank, partials.shape[0] // batch,
        EM=method == "em", ROWS=256, BLOCK_K=block_k,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return mean if method == "vq" else unit, rounded


@triton.jit(do_not_specialize=["count", "sum_count"])
def ratios_kernel(
    partials, partial, partial_row, partial_k, sums, sum_partial, sum_row, sum_k,
    y, y_batch, y_row, y_k, new, new_batch, new_row, new_k,
    rounded, rounded_batch, rounded_row, rounded_k, rows, rank, count, sum_count, row_tiles,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Y * (X Z^T) / (Y Z Z^T + 1e-6); a program has a tile of it."""
    partials = (partials, partial, partial_row, partial_k)
    sums = (sums, sum_partial, sum_row, sum_k)
    y = (y, y_batch, y_row, y_k)
    program = tl.program_id(0).to(tl.int64)
    image, row0 = program // row_tiles, program % row_tiles * ROWS
    k0 = tl.program_id(1).to(tl.int64) * BLOCK_K
    denominator = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for j0 in range(tl.full((), 0, tl.int64), rank, BLOCK_K):
        left = load_tile(y, image, row0, rows, j0, rank, ROWS, BLOCK_K)
        right = _add_up(sums, image, sum_count, j0, rank, k0, rank, BLOCK_K, BLOCK_K)
        left, right = operand(left, PRECISION), operand(right, PRECISION)
        denominator = dot(left, right, denominator, PRECISION)
    numerator = _add_up(partials, image, count, row0, rows, k0, rank, ROWS, BLOCK_K)
    tile = load_tile(y, image, row0, rows, k0, rank, ROWS, BLOCK_K)
    tile = tile * numerator / (denominator + _EPS)
    new = (new, new_batch, new_row, new_k)
    rounded = (rounded, rounded_batch, rounded_row, rounded_k)
    store_tile(tile, new, image, row0, rows, k0, rank, ROWS, BLOCK_K)
    store_tile(tile, rounded, image, row0, rows, k0, rank, ROWS, BLOCK_K)


def launch_ratios(
    x: Tensor, partials: Tensor, sums: Tensor, y: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """The next Y of nmf (B, C, K), and the same in x's dtype."""
    batch, rows, rank = x.shape[0], x.shape[1], partials.shape[-1]
    new = partials.new_empty(batch, rows, rank)
    rounded = torch.empty_like(new, dtype=x.dtype)
    tile_rows, block_k = 32, 32
    row_tiles = ceil_div(rows, tile_rows)
    ratios_kernel[(batch * row_tiles, ceil_div(rank, block_k))](
        partials, *partials.stride(), sums, *sums.stride(), y, *strides(y), new, *new.stride(),
        rounded, *rounded.stride(), rows, rank, partials.shape[0] // batch, sums.shape[0] // batch,
        row_tiles, PRECISION=precision, ROWS=tile_rows, BLOCK_K=block_k,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return new, rounded
