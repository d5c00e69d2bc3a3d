"""What follows the rounds of nmf, and its gradient: one pass over X or the gradient each.

A program owns a tile of columns: it goes through X's rows for Y^T X, has then what their new
elements need, and goes through the rows again, which are then still in the L1 or L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfops.methods.base import EPS
from mfops.triton.common import (
    Problem,
    ceil_div,
    dot,
    dot_values,
    inside,
    load_tile,
    operand,
    product,
    store_tile,
    strides,
    to_dtype,
)
from mfops.triton.configs import Config, choose, finish_configs, nmf_backward_configs
from mfops.triton.rounds import gram_product, scores

_EPS = tl.constexpr(EPS)


@triton.jit
def _last_update(
    x, y, gram, old, z_scale, z, image, rows, k0, rank, col0, cols,
    PRECISION: tl.constexpr, GRAM_PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """W = Z / (Y^T Y Z + 1e-6) and Z = W * (Y^T X) of a block of bases, written and returned."""
    s = scores(
        x, y, image, rows, col0, cols, k0, rank, False, PRECISION, CHUNK, COLS, BLOCK_K, STAGES
    )
    denominator = gram_product(
        gram, old, 0.0, 0.0, x, y, image, rows, k0, rank, col0, cols,
        False, PRECISION, GRAM_PRECISION, CHUNK, COLS, BLOCK_K, STAGES,
    )  # fmt: skip
    w = load_tile(old, image, k0, rank, col0, cols, BLOCK_K, COLS) / (denominator + _EPS)
    store_tile(w, z_scale, image, k0, rank, col0, cols, BLOCK_K, COLS)
    store_tile(w * s, z, image, k0, rank, col0, cols, BLOCK_K, COLS)
    return w * s


@triton.jit(do_not_specialize=["col_tiles"])
def finish_kernel(
    x, x_batch, x_row, x_col, y, y_batch, y_row, y_k,
    gram, gram_batch, gram_row, gram_k, old, old_batch, old_k, old_col,
    z_scale, z_scale_batch, z_scale_k, z_scale_col, z, z_batch, z_k, z_col,
    x_hat, out_batch, out_row, out_col, errors, per_element, rows, cols, rank, col_tiles,
    PRECISION: tl.constexpr, GRAM_PRECISION: tl.constexpr, WHOLE_K: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The last update of Z, X' = Y Z and the tile's part of the error."""
    x, y = (x, x_batch, x_row, x_col), (y, y_batch, y_row, y_k)
    gram, old = (gram, gram_batch, gram_row, gram_k), (old, old_batch, old_k, old_col)
    z_scale, z = (z_scale, z_scale_batch, z_scale_k, z_scale_col), (z, z_batch, z_k, z_col)
    x_hat = (x_hat, out_batch, out_row, out_col)
    program = tl.program_id(0).to(tl.int64)
    image, col0 = program // col_tiles, program % col_tiles * COLS
    zero = tl.full((), 0, tl.int64)
    if WHOLE_K:
        values = _last_update(
            x, y, gram, old, z_scale, z, image, rows, zero, rank, col0, cols,
            PRECISION, GRAM_PRECISION, CHUNK, COLS, BLOCK_K, STAGES,
        )  # fmt: skip
        right = operand(to_dtype(values, y[0].dtype.element_ty), PRECISION)
    else:
        for k0 in range(zero, rank, BLOCK_K):
            _last_update(
                x, y, gram, old, z_scale, z, image, rows, k0, rank, col0, cols,
                PRECISION, GRAM_PRECISION, CHUNK, COLS, BLOCK_K, STAGES,
            )  # fmt: skip
        tl.debug_barrier()  # the program reads what its threads have written
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for row0 in tl.range(zero, rows, ROWS, num_stages=STAGES):
        tile = load_tile(x, image, row0, rows, col0, cols, ROWS, COLS)
        if WHOLE_K:
            left = operand(load_tile(y, image, row0, rows, 0, rank, ROWS, BLOCK_K), PRECISION)
            p = dot(left, right, None, PRECISION)
        else:
            p = product(y, z, image, row0, rows, col0, cols, rank, ROWS, COLS, BLOCK_K, PRECISION)
        store_tile(p, x_hat, image, row0, rows, col0, cols, ROWS, COLS)
        error = tile.to(tl.float32) - p
        # Beyond the edges X' may be 0 times an infinity.
        squares += tl.where(inside(row0, rows, col0, cols, ROWS, COLS), error * error, 0.0)
    tl.store(errors + program, tl.sum(squares) * per_element)


def launch_finish(
    problem: Problem, gram: Tensor, old: Tensor, z_scale: Tensor, x_hat: Tensor
) -> Tensor:
    """Writes problem.z, W and X' from the last round's Z; returns the mean squared error."""
    x, y, z = problem.x, problem.y, problem.z
    batch, rows, cols = x.shape

    def launch(config: Config) -> Tensor:
        col_tiles = ceil_div(cols, config.block_n)
        errors = torch.empty(batch * col_tiles, dtype=torch.float32, device=x.device)
        finish_kernel[(batch * col_tiles,)](
            x, *x.stride(), y, *strides(y), gram, *strides(gram), old, *old.stride(),
            z_scale, *z_scale.stride(), z, *z.stride(), x_hat, *x_hat.stride(),
            errors, 1.0 / x.numel(), rows, cols, problem.rank, col_tiles,
            PRECISION=problem.precision, GRAM_PRECISION=problem.gram_precision,
            WHOLE_K=problem.rank <= config.block_k, CHUNK=problem.chunk, ROWS=config.block_m,
            COLS=config.block_n, BLOCK_K=config.block_k, STAGES=config.stages,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
        return errors.sum()  # in an order that depends on their number only

    with torch.cuda.device_of(x):
        return launch(choose(problem, ("finish",), finish_configs, launch))


@triton.jit
def _error(
    x, y, z, s, image, row0, rows, col0, cols, rank, PRECISION: tl.constexpr,
    WHOLE_K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """E = s (X - X')."""
    tile = load_tile(x, image, row0, rows, col0, cols, ROWS, COLS)
    if WHOLE_K:
        left = operand(load_tile(y, image, row0, rows, 0, rank, ROWS, BLOCK_K), PRECISION)
        right = operand(load_tile(z, image, 0, rank, col0, cols, BLOCK_K, COLS), PRECISION)
        p = dot(left, right, None, PRECISION)
    else:
        p = product(y, z, image, row0, rows, col0, cols, rank, ROWS, COLS, BLOCK_K, PRECISION)
    return s * (tile.to(tl.float32) - p)


@triton.jit
def _z_scale_product(
    x, y, z, g, z_scale, s, image, rows, k0, rank, col0, cols,
    ERROR: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr, WHOLE_K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """V = W * (Y^T D) of a block of bases."""
    total = tl.zeros((BLOCK_K, COLS), tl.float32)
    for row0 in tl.range(tl.full((), 0, tl.int64), rows, ROWS, num_stages=STAGES):
        d = tl.zeros((ROWS, COLS), tl.float32)
        if GRAD:
            d += load_tile(g, image, row0, rows, col0, cols, ROWS, COLS).to(tl.float32)
        if ERROR:
            d -= _error(
                x, y, z, s, image, row0, rows, col0, cols, rank,
                PRECISION, WHOLE_K, ROWS, COLS, BLOCK_K,
            )  # fmt: skip
            # Beyond the edges 0 times an infinity may have been subtracted.
            d = tl.where(inside(row0, rows, col0, cols, ROWS, COLS), d, 0.0)
        left = load_tile(y, image, row0, rows, k0, rank, ROWS, BLOCK_K)
        total = dot_values(tl.trans(left), d, total, PRECISION)
    w = load_tile(z_scale, image, k0, rank, col0, cols, BLOCK_K, COLS)
    return w.to(tl.float32) * total


@triton.jit(do_not_specialize=["col_tiles"])
def nmf_backward_kernel(
    x, x_batch, x_row, x_col, y, y_batch, y_row, y_k, z, z_batch, z_k, z_col,
    g, g_batch, g_row, g_col, z_scale, z_scale_batch, z_scale_k, z_scale_col,
    v, v_batch, v_k, v_col, dx, dx_batch, dx_row, dx_col,
    grad_mse, two_over_elements, rows, cols, rank, col_tiles,
    ERROR: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr, WHOLE_K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dX = E + Y V of a tile of columns."""
    x, y, z = (x, x_batch, x_row, x_col), (y, y_batch, y_row, y_k), (z, z_batch, z_k, z_col)
    g, z_scale = (g, g_batch, g_row, g_col), (z_scale, z_scale_batch, z_scale_k, z_scale_col)
    v, dx = (v, v_batch, v_k, v_col), (dx, dx_batch, dx_row, dx_col)
    program = tl.program_id(0).to(tl.int64)
    image, col0 = program // col_tiles, program % col_tiles * COLS
    zero = tl.full((), 0, tl.int64)
    s = 0.0
    if ERROR:
        s = tl.load(grad_mse).to(tl.float32) * two_over_elements
    if WHOLE_K:
        values = _z_scale_product(
            x, y, z, g, z_scale, s, image, rows, zero, rank, col0, cols,
            ERROR, GRAD, PRECISION, WHOLE_K, ROWS, COLS, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        for k0 in range(zero, rank, BLOCK_K):
            values = _z_scale_product(
                x, y, z, g, z_scale, s, image, rows, k0, rank, col0, cols,
                ERROR, GRAD, PRECISION, WHOLE_K, ROWS, COLS, BLOCK_K, STAGES,
            )  # fmt: skip
            store_tile(values, v, image, k0, rank, col0, cols, BLOCK_K, COLS)
        tl.debug_barrier()  # the program reads what its threads have written
    for row0 in tl.range(zero, rows, ROWS, num_stages=STAGES):
        total = tl.zeros((ROWS, COLS), tl.float32)
        if WHOLE_K:
            left = load_tile(y, image, row0, rows, 0, rank, ROWS, BLOCK_K)
            total = dot_values(left, values, total, PRECISION)
        else:
            for k0 in range(zero, rank, BLOCK_K):
                left = load_tile(y, image, row0, rows, k0, rank, ROWS, BLOCK_K)
                right = load_tile(v, image, k0, rank, col0, cols, BLOCK_K, COLS)
                total = dot_values(left, right, total, PRECISION)
        if ERROR:
            total += _error(
                x, y, z, s, image, row0, rows, col0, cols, rank,
                PRECISION, WHOLE_K, ROWS, COLS, BLOCK_K,
            )  # fmt: skip
        store_tile(total, dx, image, row0, rows, col0, cols, ROWS, COLS)


def launch_nmf_backward(
    problem: Problem,
    grad_x_hat: Tensor | None,
    grad_mse: Tensor | None,
    z_scale: Tensor,
    grad_x: Tensor,
) -> None:
    """Writes dX."""
    x, y, z = problem.x, problem.y, problem.z
    batch, rows, cols = x.shape
    g = x if grad_x_hat is None else grad_x_hat

    def launch(config: Config) -> None:
        whole_k = problem.rank <= config.block_k
        # V, where it is more than a program holds.
        v = z_scale if whole_k else torch.empty_like(z_scale, dtype=torch.float32)
        col_tiles = ceil_div(cols, config.block_n)
        nmf_backward_kernel[(batch * col_tiles,)](
            x, *x.stride(), y, *strides(y), z, *z.stride(), g, *g.stride(),
            z_scale, *z_scale.stride(), v, *v.stride(), grad_x, *grad_x.stride(),
            grad_mse, 2.0 / x.numel(), rows, cols, problem.rank, col_tiles,
            ERROR=grad_mse is not None, GRAD=grad_x_hat is not None, PRECISION=problem.precision,
            WHOLE_K=whole_k, ROWS=config.block_m, COLS=config.block_n, BLOCK_K=config.block_k,
            STAGES=config.stages,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip

    traits = "nmf_backward", grad_x_hat is not None, grad_mse is not None
    with torch.cuda.device_of(x):
        launch(choose(problem, traits, nmf_backward_configs, launch))
