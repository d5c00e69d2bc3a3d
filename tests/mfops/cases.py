"""The awkward cases every backend has to pass, and how far from the reference it may be.

Tolerances are not fitted: they are the textbook bounds of floating-point sums and products
(Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1: a sum of n products in any
order is off by at most n u sum|a_i b_i| / (1 - n u)), carried through the formulas of
mfops.reference, plus one rounding to the output's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mfops import reference

# B, C, K, N: not multiples of anything, ones, odd grids, more bases than channels or pixels.
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 2, 5),
    (3, 17, 5, 33),
    (4, 70, 64, 1089),
    (1, 200, 7, 2500),
    (5, 129, 3, 1),
    (2, 1, 4, 77),
    (1, 5, 9, 9000),
    (3, 2300, 2, 31),
]
LAYOUTS = ["contiguous", "channels_last", "sliced rows", "every second pixel"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Whether y, z are shared by the batch.
SHARING = [(True, True), (True, False), (False, True), (False, False)]


@dataclass
class Case:
    x: Tensor
    y: Tensor
    z: Tensor
    grad_x_hat: Tensor
    grad_mse: Tensor

    def double(self) -> Case:
        return Case(*(getattr(self, name).double() for name in self.__dataclass_fields__))


def features(shape: tuple[int, int, int], layout: str, dtype: torch.dtype) -> Tensor:
    batch, channels, pixels = shape
    if layout == "channels_last":
        return torch.randn(batch, pixels, channels).to(dtype).mT
    if layout == "sliced rows":
        return torch.randn(batch, channels, pixels + 5).to(dtype)[:, :, 3 : pixels + 3]
    if layout == "every second pixel":
        return torch.randn(batch, channels, 2 * pixels).to(dtype)[:, :, ::2]
    return torch.randn(shape).to(dtype)


def make(
    shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype, shared: tuple[bool, bool]
) -> Case:
    torch.manual_seed(0)
    batch, channels, rank, pixels = shape
    y = torch.randn(*([] if shared[0] else [batch]), channels, rank).to(dtype)
    z = torch.randn(*([] if shared[1] else [batch]), rank, pixels).to(dtype)
    grad = features((batch, channels, pixels), layout, dtype)
    return Case(
        x=features((batch, channels, pixels), layout, dtype),
        y=y,
        z=z,
        grad_x_hat=grad[0] if all(shared) else grad,
        # As large a share of the gradients as the other term's.
        grad_mse=torch.tensor(float(batch * channels * pixels)),
    )


def _u(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


U = _u(torch.float32)  # everything accumulates in float32


@dataclass
class Bounds:
    """Largest admissible absolute errors, element by element."""

    x_hat: Tensor
    mse: Tensor
    grad_x: Tensor
    grad_y: Tensor
    grad_z: Tensor


def _to_factor(t: Tensor, factor: Tensor) -> Tensor:
    return t.sum(0) if t.dim() > factor.dim() else t


def bounds(case: Case) -> Bounds:
    dtype = case.x.dtype
    c = case.double()
    batch, channels, pixels = c.x.shape
    rank = c.y.shape[-1]
    shared = c.y.dim() == 2 and c.z.dim() == 2
    images = batch if shared else 1

    x_hat, mse = reference.reconstruct(c.x, c.y, c.z)
    product_error = 2 * rank * U * (c.y.abs() @ c.z.abs())
    error = (c.x - x_hat).abs()
    error_error = product_error + U * error
    # Squares are added in lanes and then in double: at most a few thousand float additions.
    mse_error = (2 * error * error_error + error_error**2).mean() + 4096 * U * mse

    scale = 2 * c.grad_mse / c.x.numel()
    grad_x = scale * error
    grad_x_error = scale * error_error + 2 * U * grad_x
    d = (grad_x.sum(0) if shared else grad_x) + c.grad_x_hat.abs()
    d_error = (grad_x_error.sum(0) if shared else grad_x_error) + (images + 1) * U * d

    def factor_bound(a: Tensor, a_error: Tensor, n: int) -> Tensor:
        return a_error + 2 * n * batch * U * a

    grad_y = _to_factor(d @ c.z.abs().mT, c.y)
    grad_z = _to_factor(c.y.abs().mT @ d, c.z)
    out = _u(dtype)
    exact = reference.reconstruct_backward(
        c.grad_x_hat, c.grad_mse, c.x, c.y, c.z, True, True, True
    )
    return Bounds(
        x_hat=product_error + out * x_hat.abs() + torch.finfo(dtype).tiny,
        mse=mse_error,
        grad_x=grad_x_error + out * exact[0].abs() + torch.finfo(dtype).tiny,
        grad_y=factor_bound(grad_y, _to_factor(d_error @ c.z.abs().mT, c.y), pixels)
        + out * exact[1].abs(),
        grad_z=factor_bound(grad_z, _to_factor(c.y.abs().mT @ d_error, c.z), channels)
        + out * exact[2].abs(),
    )


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor, what: str) -> None:
    assert actual.shape == exact.shape, f"{what}: {actual.shape} for {exact.shape}"
    excess = (actual.double() - exact).abs() - bound
    assert excess.max() <= 0, f"{what}: off by {excess.max():.3g} more than the bound"
