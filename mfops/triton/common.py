"""What the kernels share: tiles in memory, products, and the problem as the host sees it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Problem(NamedTuple):
    """X (B, C, N) and its factors; to the kernels, C rows and N columns of any strides."""

    x: Tensor
    y: Tensor
    z: Tensor
    precision: str

    @classmethod
    def of(cls, x: Tensor, y: Tensor, z: Tensor, tf32: bool) -> Problem:
        return cls(x, y, z, "tf32" if tf32 and x.dtype == torch.float32 else "ieee")

    @property
    def rank(self) -> int:
        return self.y.shape[-1]

    @property
    def gram_dtype(self) -> torch.dtype:
        """Of K x K matrices, whose range may be beyond float16."""
        return torch.bfloat16 if self.x.dtype == torch.bfloat16 else torch.float32

    @property
    def gram_precision(self) -> str:
        """Of products of K x K matrices: of those that stay float32 in TF32, but for float32 X."""
        return self.precision if self.x.dtype == torch.float32 else "tf32"

    @property
    def chunk(self) -> int:
        """Rows of X that Y^T X is summed over at a time: 128 bytes of them.

        Float32 operands that do not round to TF32 lie in registers, which hold fewer.
        """
        size = self.x.element_size()
        return (
            64 // size
            if self.x.dtype == torch.float32 and self.precision == "ieee"
            else 128 // size
        )

    @property
    def one_product(self) -> bool:
        """Whether all images have the same X'."""
        return self.y.dim() == 2 and self.z.dim() == 2


def strides(t: Tensor) -> tuple[int, ...]:
    """Of a batch of matrices; 0 for the batch where one matrix serves all images."""
    return t.stride() if t.dim() == 3 else (0, *t.stride())


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# Kernels pass matrices about as tuples (pointer, stride of the batch, of rows, of columns). A tile
# has its first element at row0, col0 of a matrix of rows x cols; positions are int64, so that
# offsets are.


@triton.jit
def inside(row0, rows, col0, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which elements of a tile belong to the matrix."""
    r = row0 + tl.arange(0, ROWS)[:, None]
    c = col0 + tl.arange(0, COLS)[None, :]
    return (r < rows) & (c < cols)


@triton.jit
def _pointers(matrix, image, row0, col0, ROWS: tl.constexpr, COLS: tl.constexpr):
    pointer, batch, row, col = matrix
    r = tl.arange(0, ROWS).to(tl.int64)[:, None]
    c = tl.arange(0, COLS).to(tl.int64)[None, :]
    return pointer + image * batch + row0 * row + col0 * col + (r * row + c * col)


@triton.jit
def load_tile(matrix, image, row0, rows, col0, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Zeros beyond the matrix."""
    where = _pointers(matrix, image, row0, col0, ROWS, COLS)
    return tl.load(where, mask=inside(row0, rows, col0, cols, ROWS, COLS), other=0.0)


@triton.jit
def store_tile(tile, matrix, image, row0, rows, col0, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rounds float32 to the matrix's dtype."""
    where = _pointers(matrix, image, row0, col0, ROWS, COLS)
    tile = to_dtype(tile, where.dtype.element_ty)
    tl.store(where, tile, mask=inside(row0, rows, col0, cols, ROWS, COLS))


@triton.jit
def _round_off(tile, BITS: tl.constexpr):
    """float32 rounded to nearest, ties to even, with its last BITS bits zero."""
    bits = tile.to(tl.int32, bitcast=True)
    bits = (bits + (1 << (BITS - 1)) - 1 + ((bits >> BITS) & 1)) & -(1 << BITS)
    # The bits of a NaN may overflow.
    return tl.where(tile == tile, bits.to(tl.float32, bitcast=True), tile)


@triton.jit
def to_dtype(tile, DTYPE: tl.constexpr):
    """A float32 tile rounded to a dtype."""
    if INTERPRETED and tl.bfloat16 == DTYPE:  # the interpreter cuts off instead
        tile = _round_off(tile, 16)
    return tile.to(DTYPE)


@triton.jit
def operand(tile, PRECISION: tl.constexpr):
    """A tile as an operand of a product."""
    if PRECISION == "tf32" and tile.dtype == tl.float32:  # tensor cores cut off, not round
        tile = _round_off(tile, 13)
    # The interpreter multiplies the bits of bfloat16 as integers.
    return tile.to(tl.float32) if INTERPRETED else tile


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b, of operands."""
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def dot_values(tile, values, total, PRECISION: tl.constexpr):
    """total + a tile in x's dtype times float32 values, which float16 may not hold."""
    if tile.dtype == tl.float16:  # TF32 holds a float16 as it is, and the range of float32
        return dot(tile.to(tl.float32), operand(values, "tf32"), total, "tf32")
    values = to_dtype(values, tile.dtype)
    return dot(operand(tile, PRECISION), operand(values, PRECISION), total, PRECISION)


@triton.jit
def product(
    a, b, image, row0, rows, col0, cols, rank,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of A B in float32, BLOCK_K bases at a time."""
    total = tl.zeros((ROWS, COLS), tl.float32)
    for k0 in range(tl.full((), 0, tl.int64), rank, BLOCK_K):
        left = load_tile(a, image, row0, rows, k0, rank, ROWS, BLOCK_K)
        right = load_tile(b, image, k0, rank, col0, cols, BLOCK_K, COLS)
        total = dot(operand(left, PRECISION), operand(right, PRECISION), total, PRECISION)
    return total
