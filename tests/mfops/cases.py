"""The awkward cases every backend has to pass, and how far from the reference it may be.

Tolerances are not fitted: they are the textbook bounds of floating-point sums and products
(Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1: a sum of n products in any
order is off by at most n u sum|a_i b_i| / (1 - n u)), carried through the formulas of
mfops.reference, plus one rounding to the output's dtype.

GPU backends round operands of products as tensor cores take them: D to the input's dtype before it
is multiplied for the factors' gradients and, where TF32 is allowed, every operand to TF32. Rounding
a and b, each with unit roundoff v, adds (2 v + v^2) |a||b| to a product's bound. Their float32 sums
may be cut off instead of rounded, which doubles u.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from guarded import guarded
from torch import Tensor
from torch.nn.functional import pad

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


def features(
    shape: tuple[int, int, int], layout: str, dtype: torch.dtype, device: str = "cpu"
) -> Tensor:
    """The same values in every layout."""
    values = torch.randn(shape)
    if layout == "channels_last":
        return values.mT.contiguous().to(device, dtype).mT
    if layout == "sliced rows":
        return pad(values, (3, 2), mode="replicate").to(device, dtype)[:, :, 3:-2]
    if layout == "every second pixel":
        return values.repeat_interleave(2, dim=2).to(device, dtype)[:, :, ::2]
    return values.to(device, dtype)


def make(
    shape: tuple[int, int, int, int],
    layout: str,
    dtype: torch.dtype,
    shared: tuple[bool, bool],
    device: str = "cpu",
) -> Case:
    """A call's inputs; on the CPU a read or write beyond the end of one is a fault."""
    torch.manual_seed(0)
    batch, channels, rank, pixels = shape
    guard = guarded if device == "cpu" else torch.Tensor.detach
    y = torch.randn(*([] if shared[0] else [batch]), channels, rank).to(device, dtype)
    z = torch.randn(*([] if shared[1] else [batch]), rank, pixels).to(device, dtype)
    grad = features((batch, channels, pixels), layout, dtype, device)
    return Case(
        x=guard(features((batch, channels, pixels), layout, dtype, device)),
        y=guard(y),
        z=guard(z),
        grad_x_hat=guard(grad[0] if all(shared) else grad),
        # As large a share of the gradients as the other term's.
        grad_mse=torch.tensor(float(batch * channels * pixels), device=device),
    )


def _u(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


U = _u(torch.float32)  # everything accumulates in float32
U_TF32 = 2.0**-11  # ten bits after the point
# How a backend rounds the operands of its products: "tf32", the dtype of the input, or not at all.
Operands = torch.dtype | Literal["tf32"] | None


def digest(*tensors: Tensor) -> bytes:
    """Of values, shapes and dtypes: the same in every layout and on every device."""
    found = hashlib.sha256(str([(t.shape, t.dtype) for t in tensors]).encode())
    for tensor in tensors:
        # Of a single element `contiguous` keeps any stride, which no other dtype can view.
        dense = tensor.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)
        found.update(dense.view(torch.uint8).numpy())
    return found.digest()


@dataclass
class Results:
    """Of a case, or the largest admissible absolute errors of them, element by element."""

    x_hat: Tensor
    mse: Tensor
    grad_x: Tensor
    grad_y: Tensor
    grad_z: Tensor


def _to_factor(t: Tensor, factor: Tensor) -> Tensor:
    return t.sum(0) if t.dim() > factor.dim() else t


@functools.lru_cache(maxsize=8)  # the sharings of a shape and dtype, whose layouts come in turn
def _judged(values: bytes) -> dict[Any, tuple[Results, Results]]:
    return {}


def judged(case: Case, operands: Operands = None) -> tuple[Results, Results]:
    """The results in float64, and how far a backend's may be from them."""
    known = _judged(digest(case.x, case.y, case.z, case.grad_x_hat, case.grad_mse))
    key = operands, case.x.device
    if key not in known:
        known[key] = _judge(case, operands)
    return known[key]


def _judge(case: Case, operands: Operands) -> tuple[Results, Results]:
    dtype = case.x.dtype
    u = U if operands in (None, torch.float32) else 2 * U  # of the sums in products
    factor_rounding = d_rounding = U_TF32 if operands == "tf32" else 0.0
    d_floor = 0.0
    if operands in (torch.bfloat16, torch.float16):
        d_rounding, d_floor = _u(operands), torch.finfo(operands).tiny * _u(operands)
    c = case.double()
    batch, channels, pixels = c.x.shape
    rank = c.y.shape[-1]
    shared = c.y.dim() == 2 and c.z.dim() == 2
    images = batch if shared else 1

    x_hat, mse = reference.reconstruct(c.x, c.y, c.z)
    pair = 2 * factor_rounding + factor_rounding**2
    product_error = (2 * rank * u + pair) * (c.y.abs() @ c.z.abs())
    error = (c.x - x_hat).abs()
    error_error = product_error + U * error
    # Squares are added in lanes and then in double: at most a few thousand float additions.
    mse_error = (2 * error * error_error + error_error**2).mean() + 4096 * U * mse

    scale = 2 * c.grad_mse / c.x.numel()
    grad_x = scale * error
    grad_x_error = scale * error_error + 2 * U * grad_x
    d = (grad_x.sum(0) if shared else grad_x) + c.grad_x_hat.abs()
    d_error = (grad_x_error.sum(0) if shared else grad_x_error) + (images + 1) * U * d
    d_error = d_error + d_rounding * (d + d_error) + d_floor

    def factor_bound(a: Tensor, a_error: Tensor, n: int) -> Tensor:
        return (1 + factor_rounding) * a_error + (2 * n * batch * u + factor_rounding) * a

    grad_y = _to_factor(d @ c.z.abs().mT, c.y)
    grad_z = _to_factor(c.y.abs().mT @ d, c.z)
    out = _u(dtype)
    grads = reference.reconstruct_backward(
        c.grad_x_hat, c.grad_mse, c.x, c.y, c.z, True, True, True
    )
    limit = Results(
        x_hat=product_error + out * x_hat.abs() + torch.finfo(dtype).tiny,
        mse=mse_error,
        grad_x=grad_x_error + out * grads[0].abs() + torch.finfo(dtype).tiny,
        grad_y=factor_bound(grad_y, _to_factor(d_error @ c.z.abs().mT, c.y), pixels)
        + out * grads[1].abs(),
        grad_z=factor_bound(grad_z, _to_factor(c.y.abs().mT @ d_error, c.z), channels)
        + out * grads[2].abs(),
    )
    return Results(x_hat, mse, *grads), limit


def check(run: Any, case: Case, operands: Operands = None) -> None:
    """Asserts that run.reconstruct, run.mse and run.reconstruct_backward are as `judged` says."""
    (exact, limit), tf32 = judged(case, operands), operands == "tf32"
    factors = case.x, case.y, case.z
    x_hat, mse = run.reconstruct(*factors, tf32)
    assert x_hat.dtype == case.x.dtype
    assert mse.dtype == torch.float32
    assert_within(x_hat, exact.x_hat, limit.x_hat, "X'")
    assert_within(mse, exact.mse, limit.mse, "mse")
    assert_within(run.mse(*factors, tf32), exact.mse, limit.mse, "mse alone")

    upstream = case.grad_x_hat, case.grad_mse
    grads = run.reconstruct_backward(*upstream, *factors, True, True, True, tf32)
    for name, grad in zip(("grad_x", "grad_y", "grad_z"), grads, strict=True):
        assert grad.dtype == case.x.dtype
        assert_within(grad, getattr(exact, name), getattr(limit, name), name)


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor, what: str) -> None:
    assert actual.shape == exact.shape, f"{what}: {actual.shape} for {exact.shape}"
    excess = (actual.double() - exact).abs() - bound
    assert excess.max() <= 0, f"{what}: off by {excess.max():.3g} more than the bound"
