"""The rounds of em, vq, cd and nmf: X is read once in each, every round.

A program owns a range of columns of an image and some rows of Y. For each tile of its columns it
computes Z and adds the tile's part of X Z^T, and of what else the bases need (the row sums of Z;
Z Z^T for nmf), in registers. The rows of X that it multiplies by Z^T it has just read for Y^T X:
they come from the L1 or L2. Partial sums X Z^T go to float32 memory, and a second kernel
(`mfops.triton.bases`) adds them in order. More bases than a program holds go in blocks, along a
second axis of the grid; each program then needs Y^T X of all blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfops.methods import METHODS
from mfops.methods.base import EPS, normalize_columns
from mfops.triton.bases import launch_means, launch_ratios
from mfops.triton.common import (
    Problem,
    ceil_div,
    dot,
    dot_values,
    inside,
    load_tile,
    operand,
    store_tile,
    strides,
    to_dtype,
)
from mfops.triton.configs import Config, choose, round_configs

# Programs that ranges of columns are cut for: two for each multiprocessor of a large GPU.
PROGRAMS = 256

_EPS = tl.constexpr(EPS)


@triton.jit
def scores(
    x, y, image, rows, col0, cols, k0, rank,
    COSINE: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_K x COLS elements of Y^T X; unless COSINE is 0, times it, over X's columns' lengths."""
    s = tl.zeros((BLOCK_K, COLS), tl.float32)
    squares = tl.zeros((1, COLS), tl.float32)
    for row0 in tl.range(tl.full((), 0, tl.int64), rows, CHUNK, num_stages=STAGES):
        tile = load_tile(x, image, row0, rows, col0, cols, CHUNK, COLS)
        left = operand(load_tile(y, image, row0, rows, k0, rank, CHUNK, BLOCK_K), PRECISION)
        s = dot(tl.trans(left), operand(tile, PRECISION), s, PRECISION)
        if COSINE > 0:
            exact = tile.to(tl.float32)
            squares += tl.sum(exact * exact, 0, keep_dims=True)
    if COSINE > 0:
        s = s / tl.maximum(tl.sqrt(squares), 1e-12) * COSINE
    return s


@triton.jit
def _exp(s, top, k0, rank, BLOCK_K: tl.constexpr):
    """exp(s - top); 0 for bases that do not exist."""
    exists = (k0 + tl.arange(0, BLOCK_K))[:, None] < rank
    return tl.exp(tl.where(exists, s, float("-inf")) - top[None, :])


@triton.jit
def _largest(s, k0, rank, BLOCK_K: tl.constexpr):
    return tl.max(tl.where((k0 + tl.arange(0, BLOCK_K))[:, None] < rank, s, float("-inf")), 0)


@triton.jit
def _softmax_terms(
    s, x, y, image, rows, col0, cols, rank,
    COSINE: tl.constexpr, PRECISION: tl.constexpr, WHOLE_K: tl.constexpr,
    CHUNK: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of each column of Y^T X the largest element, and the sum of exp(element - largest)."""
    if WHOLE_K:  # s is all of it
        top = _largest(s, 0, rank, BLOCK_K)
        total = tl.sum(_exp(s, top, 0, rank, BLOCK_K), 0)
    else:
        top = tl.full((COLS,), float("-inf"), tl.float32)
        total = tl.zeros((COLS,), tl.float32)
        for k0 in range(tl.full((), 0, tl.int64), rank, BLOCK_K):
            s = scores(
                x, y, image, rows, col0, cols, k0, rank,
                COSINE, PRECISION, CHUNK, COLS, BLOCK_K, STAGES,
            )  # fmt: skip
            higher = tl.maximum(top, _largest(s, k0, rank, BLOCK_K))
            total = total * tl.exp(top - higher) + tl.sum(_exp(s, higher, k0, rank, BLOCK_K), 0)
            top = higher
    return top, total


@triton.jit
def gram_product(
    gram, old, top, total, x, y, image, rows, k0, rank, col0, cols,
    FIRST: tl.constexpr, PRECISION: tl.constexpr, GRAM_PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_K x COLS elements of (Y^T Y) Z; FIRST: of the softmax of Y^T X, else Z from memory."""
    product = tl.zeros((BLOCK_K, COLS), tl.float32)
    for j0 in range(tl.full((), 0, tl.int64), rank, BLOCK_K):
        if FIRST:
            s = scores(
                x, y, image, rows, col0, cols, j0, rank,
                0.0, PRECISION, CHUNK, COLS, BLOCK_K, STAGES,
            )  # fmt: skip
            right = _exp(s, top, j0, rank, BLOCK_K) / total[None, :]
        else:
            right = load_tile(old, image, j0, rank, col0, cols, BLOCK_K, COLS)
        left = load_tile(gram, image, k0, rank, j0, rank, BLOCK_K, BLOCK_K)
        product = dot_values(left, right, product, GRAM_PRECISION)
    return product


@triton.jit
def _coefficients(
    x, y, gram, old, image, rows, k0, rank, col0, cols,
    NMF: tl.constexpr, COSINE: tl.constexpr, FIRST: tl.constexpr,
    PRECISION: tl.constexpr, GRAM_PRECISION: tl.constexpr, WHOLE_K: tl.constexpr,
    CHUNK: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_K x COLS elements of the round's Z, 0 beyond the edges."""
    s = scores(
        x, y, image, rows, col0, cols, k0, rank,
        COSINE, PRECISION, CHUNK, COLS, BLOCK_K, STAGES,
    )  # fmt: skip
    top, total = 0.0, 0.0
    if FIRST or not NMF:
        top, total = _softmax_terms(
            s, x, y, image, rows, col0, cols, rank,
            COSINE, PRECISION, WHOLE_K, CHUNK, COLS, BLOCK_K, STAGES,
        )  # fmt: skip
        values = _exp(s, top, k0, rank, BLOCK_K) / total[None, :]
    else:
        values = load_tile(old, image, k0, rank, col0, cols, BLOCK_K, COLS)
    if NMF:
        if WHOLE_K:
            left = load_tile(gram, image, 0, rank, 0, rank, BLOCK_K, BLOCK_K)
            denominator = dot_values(left, values, None, GRAM_PRECISION)
        else:
            denominator = gram_product(
                gram, old, top, total, x, y, image, rows, k0, rank, col0, cols,
                FIRST, PRECISION, GRAM_PRECISION, CHUNK, COLS, BLOCK_K, STAGES,
            )  # fmt: skip
        values = values * s / (denominator + _EPS)
    # Columns beyond the edge are no pixels.
    return tl.where(inside(k0, rank, col0, cols, BLOCK_K, COLS), values, 0.0)


# Counts are not specialized: neither 1 nor a multiple of 16 makes a kernel of its own.
@triton.jit(do_not_specialize=["parts", "ranges"])
def round_kernel(
    x, x_batch, x_row, x_col, y, y_batch, y_row, y_k,
    gram, gram_batch, gram_row, gram_k, old, old_batch, old_k, old_col,
    z, z_batch, z_k, z_col, partials, partial, partial_row, partial_k,
    sums, sum_partial, sum_row, sum_k,
    rows, cols, rank, parts, ranges, range_cols,
    NMF: tl.constexpr, COSINE: tl.constexpr, FIRST: tl.constexpr, WRITE: tl.constexpr,
    PRECISION: tl.constexpr, GRAM_PRECISION: tl.constexpr, WHOLE_K: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Writes one partial of X Z^T and of the sums, and Z itself where it is wanted.

    Programs of axis 0 that run at the same time read the same columns of X.
    """
    x, y = (x, x_batch, x_row, x_col), (y, y_batch, y_row, y_k)
    gram, old = (gram, gram_batch, gram_row, gram_k), (old, old_batch, old_k, old_col)
    program = tl.program_id(0).to(tl.int64)
    part = program % parts
    unit = program // parts
    image, row0 = unit // ranges, part * ROWS
    k0 = tl.program_id(1).to(tl.int64) * BLOCK_K
    col0 = unit % ranges * range_cols
    col1 = tl.minimum(col0 + range_cols, cols)
    written = tl.where(part == 0, rank, 0)  # one part is enough
    products = tl.zeros((ROWS, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    weights = tl.zeros((BLOCK_K, 1), tl.float32)
    for at in range(col0, col1, COLS):
        values = _coefficients(
            x, y, gram, old, image, rows, k0, rank, at, col1, NMF, COSINE, FIRST,
            PRECISION, GRAM_PRECISION, WHOLE_K, CHUNK, COLS, BLOCK_K, STAGES,
        )  # fmt: skip
        if WRITE:
            where = (z, z_batch, z_k, z_col)
            store_tile(values, where, image, k0, written, at, col1, BLOCK_K, COLS)
        tile = load_tile(x, image, row0, rows, at, col1, ROWS, COLS)
        products = dot_values(tile, tl.trans(values), products, PRECISION)
        if NMF and WHOLE_K:
            left = to_dtype(values, gram[0].dtype.element_ty)
            squares = dot_values(left, tl.trans(values), squares, GRAM_PRECISION)
        if not NMF:
            weights += tl.sum(values, 1, keep_dims=True)
    partials = (partials, partial, partial_row, partial_k)
    store_tile(products, partials, unit, row0, rows, k0, rank, ROWS, BLOCK_K)
    sums = (sums, sum_partial, sum_row, sum_k)
    if NMF and WHOLE_K:
        store_tile(squares, sums, unit, 0, written, 0, rank, BLOCK_K, BLOCK_K)
    if not NMF:
        store_tile(weights, sums, unit, k0, written, 0, 1, BLOCK_K, 1)


def cut_columns(problem: Problem, config: Config) -> tuple[int, int]:
    """How many ranges the columns of an image are cut into, and of how many columns each."""
    batch, rows, cols = problem.x.shape
    # The float32 partial sums X Z^T may take half of X's memory.
    least = ceil_div(8 * problem.rank, problem.x.element_size())
    others = batch * ceil_div(rows, config.block_m) * ceil_div(problem.rank, config.block_k)
    most = max(1, PROGRAMS // others)
    each = min(max(least, ceil_div(cols, most)), cols)
    each = ceil_div(each, config.block_n) * config.block_n
    return ceil_div(cols, each), each


def launch_round(
    problem: Problem,
    config: Config,
    nmf: bool,
    cosine: float,
    gram: Tensor,
    old: Tensor | None,
    write: bool,
) -> tuple[Tensor, Tensor]:
    """Partials of X Z^T (B R, C, K), R ranges of columns, and of the sums that the bases need.

    Those are the row sums of Z (B R, K, 1); of nmf Z Z^T (B R, K, K), but (B, K, K) where a
    program does not hold all bases. nmf takes `gram`, Y^T Y, and, after the first round, the `old`
    Z. The new one is written to problem.z if told to; nmf with blocks of bases needs it there.
    """
    x, y, z = problem.x, problem.y, problem.z
    batch, rows, cols = x.shape
    rank = problem.rank
    ranges, range_cols = cut_columns(problem, config)
    parts = ceil_div(rows, config.block_m)
    whole_k = rank <= config.block_k
    partials = torch.empty(batch * ranges, rows, rank, dtype=torch.float32, device=x.device)
    sums = partials.new_empty(batch * ranges, rank, rank if nmf and whole_k else 1)
    before = z if old is None else old
    round_kernel[(batch * ranges * parts, ceil_div(rank, config.block_k))](
        x, *x.stride(), y, *strides(y), gram, *strides(gram), before, *strides(before),
        z, *strides(z), partials, *partials.stride(), sums, *sums.stride(),
        rows, cols, rank, parts, ranges, range_cols,
        NMF=nmf, COSINE=cosine, FIRST=old is None, WRITE=write,
        PRECISION=problem.precision, GRAM_PRECISION=problem.gram_precision, WHOLE_K=whole_k,
        CHUNK=problem.chunk, ROWS=config.block_m, COLS=config.block_n, BLOCK_K=config.block_k,
        STAGES=config.stages,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if nmf and not whole_k:
        exact = z.to(torch.float32)
        sums = exact @ exact.mT
    return partials, sums


class Bases(NamedTuple):
    y: Tensor  # float32
    rounded: Tensor  # the same in x's dtype; of vq over the lengths of its columns
    gram: Tensor  # Y^T Y of nmf


def factorize(
    x: Tensor,
    y0: Tensor,
    method: str,
    steps: int,
    z: Tensor,
    tf32: bool,
    inverse_temperature: float = 0.0,
) -> Bases:
    """`steps` rounds from y0. Z of the last one goes to z, of any dtype."""
    nmf = method == "nmf"
    cosine = 0.0 if METHODS[method].inverse_temperature is None else inverse_temperature
    start = normalize_columns(y0) if method == "vq" else y0
    problem = Problem.of(x, start.to(x.dtype), z, tf32)
    gram = (y0.mT @ y0).to(problem.gram_dtype) if nmf else y0
    y, old = y0, None

    def launch(config: Config) -> None:
        launch_round(problem, config, nmf, cosine, gram, old, nmf)

    with torch.cuda.device_of(x):
        traits = "round", nmf, cosine > 0
        config = choose(problem, traits, lambda p: round_configs(p, nmf), launch)
        for step in range(steps):
            last = step == steps - 1
            # Between rounds Z of nmf is float32; in the last one it goes where it is wanted.
            new = torch.empty_like(z, dtype=torch.float32) if nmf and not last else z
            problem = problem._replace(z=new)
            partials, sums = launch_round(problem, config, nmf, cosine, gram, old, nmf or last)
            if nmf:
                y, rounded = launch_ratios(x, partials, sums, y, problem.gram_precision)
                gram, old = (y.mT @ y).to(problem.gram_dtype), new
            else:
                y, rounded = launch_means(x, partials, sums, method)
            problem = problem._replace(y=rounded)
    return Bases(y, rounded, gram)
