"""Gradients of X, Y and Z; X - X' is computed anew, never stored.

With D = G' - s (X - X') summed over the images that share a product, s = 2 g / (B C N):

    dX = s (X - X'),    dY = D Z^T,    dZ = Y^T D

Programs that own rows sum dY over columns, programs that own columns sum dZ over rows, in
registers, so X and G' are read twice, and dX is written once. Both kinds run in one launch, panel
by panel (a range of columns of some images): what one kind reads, the other finds in the L2.
"""

from __future__ import annotations

from typing import NamedTuple

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
    to_dtype,
)
from mfops.triton.configs import MAX_BLOCK, Config, backward_configs, choose

# X's bytes in a panel. The panels at work, with G' and dX, stay in an L2 of 40 MB.
PANEL_BYTES = 2 * 2**20


@triton.jit
def _add_image(
    d, p, x, g, dx, s, inner, image, own0, own, written, across0, across,
    ERROR: tl.constexpr, GRAD: tl.constexpr, WRITE: tl.constexpr,
    OWN: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """D + G' - inner (X - X') of one image; writes its dX, up to row `written`."""
    if GRAD == "per image":
        d += load_tile(g, image, own0, own, across0, across, OWN, ACROSS).to(tl.float32)
    if ERROR:
        tile = load_tile(x, image, own0, own, across0, across, OWN, ACROSS)
        error = tile.to(tl.float32) - p
        d -= inner * error
        if WRITE:
            store_tile(s * error, dx, image, own0, written, across0, across, OWN, ACROSS)
    return d


@triton.jit
def _strip(
    x, g, dx, a, b, da, partial, grad_mse, two_over_elements,
    first, last, batch, own0, own, across0, across1, across, k0, rank,
    ONE_PRODUCT: tl.constexpr, ERROR: tl.constexpr, GRAD: tl.constexpr, SUM: tl.constexpr,
    WRITE: tl.constexpr, PRECISION: tl.constexpr, WHOLE_K: tl.constexpr,
    OWN: tl.constexpr, ACROSS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Goes across OWN rows of X, from column across0 to across1, for products first to last - 1.

    A program that owns columns calls this with the problem transposed.
    """
    s = 0.0
    if ERROR:
        s = tl.load(grad_mse).to(tl.float32) * two_over_elements
    # Without G' the factor s is applied to the sums, so that D does not vanish in float16.
    inner = s if GRAD != "none" else 1.0
    written = tl.where(k0 == 0, own, 0)  # one program of axis 1 is enough
    total = tl.zeros((OWN, BLOCK_K), tl.float32)
    for image in range(first, last):
        if ERROR and WHOLE_K:
            left = operand(load_tile(a, image, own0, own, 0, rank, OWN, BLOCK_K), PRECISION)
        for at in tl.range(across0, across1, ACROSS, num_stages=STAGES):
            if SUM or WHOLE_K:
                right = load_tile(b, image, k0, rank, at, across, BLOCK_K, ACROSS)
                right = operand(right, PRECISION)
            p = tl.zeros((OWN, ACROSS), tl.float32)
            if ERROR and WHOLE_K:
                p = dot(left, right, p, PRECISION)
            elif ERROR:
                p = product(
                    a, b, image, own0, own, at, across, rank, OWN, ACROSS, BLOCK_K, PRECISION
                )
            d = tl.zeros((OWN, ACROSS), tl.float32)
            if GRAD == "summed":
                d += load_tile(g, image, own0, own, at, across, OWN, ACROSS).to(tl.float32)
            if ONE_PRODUCT:
                for i in tl.range(0, batch, num_stages=STAGES):
                    d = _add_image(
                        d, p, x, g, dx, s, inner, image + i, own0, own, written, at, across,
                        ERROR, GRAD, WRITE, OWN, ACROSS,
                    )  # fmt: skip
            else:
                d = _add_image(
                    d, p, x, g, dx, s, inner, image, own0, own, written, at, across,
                    ERROR, GRAD, WRITE, OWN, ACROSS,
                )  # fmt: skip
            if SUM:
                # Beyond the edges 0 times an infinity may have been subtracted.
                d = tl.where(inside(own0, own, at, across, OWN, ACROSS), d, 0.0)
                d = operand(to_dtype(d, b[0].dtype.element_ty), PRECISION)
                total = dot(d, tl.trans(right), total, PRECISION)
    if SUM:
        if GRAD == "none":
            total *= s
        store_tile(total, da, partial, own0, own, k0, rank, OWN, BLOCK_K)


# Counts are not specialized: neither 1 nor a multiple of 16 makes a kernel of its own.
@triton.jit(
    do_not_specialize=[
        "batch", "row_programs", "col_programs", "row_strips", "col_strips", "panels", "unit_images"
    ]
)  # fmt: skip
def backward_kernel(
    x, x_batch, x_row, x_col, g, g_batch, g_row, g_col, dx, dx_batch, dx_row, dx_col,
    y, y_batch, y_row, y_k, z, z_batch, z_k, z_col,
    dy, dy_partial, dy_row, dy_k, dz, dz_partial, dz_k, dz_col,
    grad_mse, two_over_elements, batch, rows, cols, rank,
    row_programs, col_programs, row_strips, col_strips, panels, panel_cols, unit_images,
    Y_PER_IMAGE: tl.constexpr, Z_PER_IMAGE: tl.constexpr, ERROR: tl.constexpr,
    GRAD: tl.constexpr, NEED_X: tl.constexpr, NEED_Y: tl.constexpr, NEED_Z: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE_K: tl.constexpr,
    OWN: tl.constexpr, ACROSS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program of axis 0 owns a strip of one unit: some images and a panel of their columns.

    Axis 1 goes through the bases, BLOCK_K at a time: each program of it sums so many.
    """
    ONE_PRODUCT: tl.constexpr = not (Y_PER_IMAGE or Z_PER_IMAGE)
    BY_ROWS: tl.constexpr = NEED_Y or not NEED_Z  # dX goes with these, if there are such programs
    program = tl.program_id(0).to(tl.int64)
    unit = program // (row_programs + col_programs)
    index = program % (row_programs + col_programs)
    chunk, panel = unit // panels, unit % panels
    k0 = tl.program_id(1).to(tl.int64) * BLOCK_K
    image0 = chunk * unit_images
    image1 = 1 if ONE_PRODUCT else tl.minimum(image0 + unit_images, batch)
    col0 = panel * panel_cols
    col1 = tl.minimum(col0 + panel_cols, cols)
    if BY_ROWS and index < row_programs:
        first, last, partial = image0, image1, chunk * panels + panel
        if Y_PER_IMAGE:
            first = image0 + index // row_strips
            last = tl.minimum(first + 1, image1)
            partial = first * panels + panel
        if first < last:
            _strip(
                (x, x_batch, x_row, x_col), (g, g_batch, g_row, g_col),
                (dx, dx_batch, dx_row, dx_col), (y, y_batch, y_row, y_k), (z, z_batch, z_k, z_col),
                (dy, dy_partial, dy_row, dy_k), partial, grad_mse, two_over_elements,
                first, last, batch, index % row_strips * OWN, rows, col0, col1, cols, k0, rank,
                ONE_PRODUCT, ERROR, GRAD, NEED_Y, NEED_X,
                PRECISION, WHOLE_K, OWN, ACROSS, BLOCK_K, STAGES,
            )  # fmt: skip
    if NEED_Z and index >= row_programs:
        index -= row_programs
        first, last, partial = image0, image1, chunk
        if Z_PER_IMAGE:
            first = image0 + index // col_strips
            last = tl.minimum(first + 1, image1)
            partial = first
        own0 = col0 + index % col_strips * OWN
        row0 = tl.full((), 0, tl.int64)
        if (first < last) & (own0 < cols):
            _strip(
                (x, x_batch, x_col, x_row), (g, g_batch, g_col, g_row),
                (dx, dx_batch, dx_col, dx_row), (z, z_batch, z_col, z_k), (y, y_batch, y_k, y_row),
                (dz, dz_partial, dz_col, dz_k), partial, grad_mse, two_over_elements,
                first, last, batch, own0, cols, row0, rows, rows, k0, rank,
                ONE_PRODUCT, ERROR, GRAD, NEED_Z, NEED_X and not BY_ROWS,
                PRECISION, WHOLE_K, OWN, ACROSS, BLOCK_K, STAGES,
            )  # fmt: skip


def _partials(factor: Tensor, count: int) -> Tensor:
    """Memory for `count` partial sums of each gradient of a factor's matrices, or for none."""
    matrices = factor.shape[0] if factor.dim() == 3 else 1
    dtype = factor.dtype if count == 1 else torch.float32
    return factor.new_empty((matrices * count, *factor.shape[-2:]), dtype=dtype)


def _add_up(partials: Tensor, factor: Tensor, count: int) -> Tensor:
    """The gradient of a factor; the order of addition depends on the number of partials only."""
    if count > 1:
        partials = partials.unflatten(0, (-1, count)).sum(1).to(factor.dtype)
    return partials.view(factor.shape)


class Units(NamedTuple):
    """How a problem is cut up: units of `images` images and `panel_cols` of their columns."""

    images: int
    panel_cols: int
    chunks: int  # of images
    panels: int  # of columns

    @classmethod
    def of(cls, problem: Problem) -> Units:
        x, y_shared, z_shared = problem.x, problem.y.dim() == 2, problem.z.dim() == 2
        batch, rows, cols = x.shape
        size = x.element_size()
        # Float32 partials of a gradient may take a quarter of X's memory: that of Y has one for so
        # many columns, counted over the images that it sums, that of Z for so many rows.
        least = ceil_div(16 * problem.rank, size)
        images = 1
        if y_shared and z_shared:
            images = batch
        elif y_shared or z_shared:
            images = min(batch, ceil_div(least, cols if y_shared else rows))
        panel_cols = max(
            ceil_div(least, images if y_shared else 1), PANEL_BYTES // (images * rows * size)
        )
        panel_cols = ceil_div(min(panel_cols, cols), MAX_BLOCK) * MAX_BLOCK
        return cls(images, panel_cols, ceil_div(batch, images), ceil_div(cols, panel_cols))

    def partials(self, problem: Problem) -> tuple[int, int]:
        """Of the gradient of each matrix of Y, and of Z."""
        y_shared, z_shared = problem.y.dim() == 2, problem.z.dim() == 2
        return self.panels * (self.chunks if y_shared else 1), self.chunks if z_shared else 1


def launch_backward(
    problem: Problem,
    grad_x_hat: Tensor | None,
    grad_mse: Tensor | None,
    grad_x: Tensor | None,
    need_y: bool,
    need_z: bool,
) -> tuple[Tensor, Tensor]:
    """Writes dX where there is a place for it; returns dY and dZ, of no elements if not needed.

    At least one of the three is wanted; dX only with grad_mse.
    """
    x, y, z = problem.x, problem.y, problem.z
    batch, rows, cols = x.shape
    rank = problem.rank
    units = Units.of(problem)
    y_count, z_count = units.partials(problem)
    dy = _partials(y, y_count if need_y else 0)
    dz = _partials(z, z_count if need_z else 0)
    g = x if grad_x_hat is None else grad_x_hat
    dx = x if grad_x is None else grad_x
    kind = "none" if grad_x_hat is None else "summed" if g.dim() == 2 else "per image"

    def launch(config: Config) -> None:
        row_strips, col_strips = ceil_div(rows, config.block_m), units.panel_cols // config.block_m
        by_rows = need_y or not need_z
        row_programs = row_strips * (units.images if y.dim() == 3 else 1) if by_rows else 0
        col_programs = col_strips * (units.images if z.dim() == 3 else 1) if need_z else 0
        grid = (
            units.chunks * units.panels * (row_programs + col_programs),
            ceil_div(rank, config.block_k) if need_y or need_z else 1,
        )
        backward_kernel[grid](
            x, *x.stride(), g, *strides(g), dx, *dx.stride(), y, *strides(y), z, *strides(z),
            dy, *dy.stride(), dz, *dz.stride(),
            grad_mse, 2.0 / x.numel(), batch, rows, cols, rank,
            row_programs, col_programs, row_strips, col_strips,
            units.panels, units.panel_cols, units.images,
            Y_PER_IMAGE=y.dim() == 3, Z_PER_IMAGE=z.dim() == 3, ERROR=grad_mse is not None,
            GRAD=kind, NEED_X=grad_x is not None, NEED_Y=need_y, NEED_Z=need_z,
            PRECISION=problem.precision, WHOLE_K=rank <= config.block_k,
            OWN=config.block_m, ACROSS=config.block_n, BLOCK_K=config.block_k,
            STAGES=config.stages,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip

    traits = "backward", kind, grad_mse is not None, grad_x is not None, need_y, need_z
    with torch.cuda.device_of(x):
        launch(choose(problem, traits, backward_configs, launch))
    return (
        _add_up(dy, y, y_count) if need_y else x.new_empty(0),
        _add_up(dz, z, z_count) if need_z else x.new_empty(0),
    )
