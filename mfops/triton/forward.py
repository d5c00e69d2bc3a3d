"""X' = Y Z and its squared error in one pass over X; without X', the error alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfops.triton.common import (
    Problem,
    ceil_div,
    dot,
    inside,
    load_tile,
    operand,
    product,
    store_tile,
    strides,
)
from mfops.triton.configs import Config, choose, forward_configs


# Counts are not specialized: neither 1 nor a multiple of 16 makes a kernel of its own.
@triton.jit(do_not_specialize=["batch", "row_tiles", "col_tiles"])
def forward_kernel(
    x, x_batch, x_row, x_col, y, y_batch, y_row, y_k, z, z_batch, z_k, z_col,
    x_hat, out_batch, out_row, out_col, errors, per_element,
    batch, rows, cols, rank, row_tiles, col_tiles,
    ONE_PRODUCT: tl.constexpr, WRITE: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE_K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program computes one tile of X' and its part of the error, over all images that have it.

    Row tiles come first: programs that run at the same time then read the same columns of Z.
    """
    x = (x, x_batch, x_row, x_col)
    y, z = (y, y_batch, y_row, y_k), (z, z_batch, z_k, z_col)
    program = tl.program_id(0).to(tl.int64)
    image = program // row_tiles // col_tiles
    row0 = program % row_tiles * ROWS
    col0 = program // row_tiles % col_tiles * COLS
    # On its way while the product is computed.
    tile = load_tile(x, image, row0, rows, col0, cols, ROWS, COLS)
    if WHOLE_K:
        left = load_tile(y, image, row0, rows, 0, rank, ROWS, BLOCK_K)
        right = load_tile(z, image, 0, rank, col0, cols, BLOCK_K, COLS)
        p = dot(operand(left, PRECISION), operand(right, PRECISION), None, PRECISION)
    else:
        p = product(y, z, image, row0, rows, col0, cols, rank, ROWS, COLS, BLOCK_K, PRECISION)
    if WRITE:
        x_hat = (x_hat, out_batch, out_row, out_col)
        store_tile(p, x_hat, image, row0, rows, col0, cols, ROWS, COLS)
    error = tile.to(tl.float32) - p
    squares = error * error
    if ONE_PRODUCT:
        for i in tl.range(1, batch, num_stages=STAGES):
            tile = load_tile(x, image + i, row0, rows, col0, cols, ROWS, COLS)
            error = tile.to(tl.float32) - p
            squares += error * error
    # Beyond the edges X' may be 0 times an infinity.
    squares = tl.where(inside(row0, rows, col0, cols, ROWS, COLS), squares, 0.0)
    tl.store(errors + program, tl.sum(squares) * per_element)


def launch_forward(problem: Problem, x_hat: Tensor | None) -> Tensor:
    """Writes X' where there is a place for it; returns the mean squared error."""
    x, y, z = problem.x, problem.y, problem.z
    batch, rows, cols = x.shape
    products = 1 if problem.one_product else batch
    out = x if x_hat is None else x_hat

    def launch(config: Config) -> Tensor:
        row_tiles, col_tiles = ceil_div(rows, config.block_m), ceil_div(cols, config.block_n)
        programs = products * row_tiles * col_tiles
        errors = torch.empty(programs, dtype=torch.float32, device=x.device)
        forward_kernel[(programs,)](
            x, *x.stride(), y, *strides(y), z, *strides(z), out, *strides(out),
            errors, 1.0 / x.numel(), batch, rows, cols, problem.rank, row_tiles, col_tiles,
            ONE_PRODUCT=problem.one_product, WRITE=x_hat is not None, PRECISION=problem.precision,
            WHOLE_K=problem.rank <= config.block_k,
            ROWS=config.block_m, COLS=config.block_n, BLOCK_K=config.block_k, STAGES=config.stages,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
        return errors.sum()  # in an order that depends on their number only

    with torch.cuda.device_of(x):
        return launch(choose(problem, ("forward", x_hat is not None), forward_configs, launch))
