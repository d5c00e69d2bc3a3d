"""X' = Y Z and its reconstruction error in plain PyTorch: the specification of every backend.

    X'  = Y Z                                   (accumulated in float32, float64 for float64 input)
    mse = mean over B, C, N of (X - X')^2       (X' not yet rounded to the input's dtype)

and, for the gradients G' of X' and g of mse, with s = 2 g / (B C N),

    dX = s (X - X'),   D = G' - s (X - X')  (summed over the batch where both factors are shared),
    dY = D Z^T,        dZ = Y^T D           (each summed over the batch where that factor is shared)

Then the methods that find Y and Z on each image (`mfops.methods`): the loop over their two updates,
and what follows it. Everything between the inputs and the results is kept in the accumulation
dtype; results are rounded once, to x's dtype, except for Y, which stays as it is.

Shapes are those of `mfops.ops`. Works for any device and floating dtype, and is differentiable.
`tf32` is ignored: float32 products follow torch's own setting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from mfops.autocast import without_autocast
from mfops.methods import METHODS, Method, with_temperature
from mfops.methods.base import INVERSE_TEMPERATURE
from mfops.methods.nmf import NMF

F = TypeVar("F", bound=Callable[..., Any])


def _accumulating(function: F) -> F:
    """Without autocast, which would round the operands of products to 16 bits."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        with without_autocast(device):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def channels_innermost(x: Tensor) -> bool:
    """Whether x (B, C, ..) lies in memory as channels_last images do."""
    return x.stride(-1) != 1 and x.stride(1) == 1


def empty_like_x(x: Tensor, shape: list[int]) -> Tensor:
    """Memory laid out as x is: channels innermost where x has them so, else pixels."""
    if channels_innermost(x):
        return x.new_empty([*shape[:-2], shape[-1], shape[-2]]).mT
    return x.new_empty(shape)


def product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Y Z in y's dtype, laid out in memory as x is."""
    if channels_innermost(x):
        return (z.mT @ y.mT).mT
    return y @ z


def _factors(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x)
    y, z = y.to(dtype), z.to(dtype)
    x_hat = product(x, y, z)
    return y, z, x_hat, x.to(dtype) - x_hat


@_accumulating
def reconstruct(x: Tensor, y: Tensor, z: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
    """X' in x's dtype and layout, (C, N) where both factors are shared; mse, a scalar."""
    _, _, x_hat, error = _factors(x, y, z)
    return x_hat.to(x.dtype), error.square().mean()


@_accumulating
def mse(x: Tensor, y: Tensor, z: Tensor, tf32: bool = False) -> Tensor:
    """The error alone."""
    return _factors(x, y, z)[-1].square().mean()


@_accumulating
def reconstruct_backward(
    grad_x_hat: Tensor | None,
    grad_mse: Tensor | None,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    need_x: bool,
    need_y: bool,
    need_z: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y, z in their dtypes; one that is not needed has no elements.

    G' may come for every image, (B, C, N), or, where both factors are shared, summed, (C, N).
    """
    y_acc, z_acc, _, error = _factors(x, y, z)
    shared = y.dim() == 2 and z.dim() == 2
    grad_x = torch.zeros_like(error)
    if grad_mse is not None:
        grad_x = error * (grad_mse * (2.0 / x.numel()))
    grad_product = -(grad_x.sum(0) if shared else grad_x)
    if grad_x_hat is not None:
        per_image = shared and grad_x_hat.dim() == 3
        grad_product = grad_product + (grad_x_hat.sum(0) if per_image else grad_x_hat)
    grad_y = grad_product @ z_acc.mT if need_y else x.new_empty(0)
    grad_z = y_acc.mT @ grad_product if need_z else x.new_empty(0)
    if need_y and grad_y.dim() > y.dim():
        grad_y = grad_y.sum(0)
    if need_z and grad_z.dim() > z.dim():
        grad_z = grad_z.sum(0)
    grad_x = grad_x.to(x.dtype) if need_x else x.new_empty(0)
    return grad_x, grad_y.to(y.dtype), grad_z.to(z.dtype)


def _shaped(result: Tensor, like: Tensor, updates: Method, what: str) -> Tensor:
    """What a method's update returned; a method of one's own may return anything."""
    if result.shape != like.shape:
        got, expected = tuple(result.shape), tuple(like.shape)
        name = type(updates).__name__
        raise ValueError(f"method {name}: {what} of shape {got}, expected {expected}")
    return result


def _rounds(x: Tensor, y0: Tensor, updates: Method, steps: int) -> tuple[Tensor, Tensor]:
    y = y0.expand(x.shape[0], -1, -1).clone()  # a method may return it as it is
    z = updates.first_coefficients(x, y)
    for _ in range(steps):
        new = updates.update_coefficients(x, y, z)
        z = _shaped(new, z, updates, "update_coefficients returned z")
        y = _shaped(updates.update_bases(x, y, z), y, updates, "update_bases returned y")
    return y, z


@_accumulating
def factorize(
    x: Tensor,
    y0: Tensor,
    method: str,
    steps: int,
    tf32: bool = False,
    inverse_temperature: float = INVERSE_TEMPERATURE,
) -> tuple[Tensor, Tensor]:
    """`steps` rounds of the method's updates from y0: Y, in the accumulation dtype, and Z."""
    dtype = accumulation_dtype(x)
    updates = with_temperature(METHODS[method], inverse_temperature)
    y, z = _rounds(x.to(dtype), y0.to(dtype), updates, steps)
    return y.contiguous(), z.to(x.dtype).contiguous()


@_accumulating
def factorize_reconstruct(
    x: Tensor, y0: Tensor, method: str, steps: int, tf32: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The rounds of "em" or "nmf" and what follows them: Y, final Z, W, X' = Y Z and mse.

    nmf's final Z is W * (Y^T X), with W = Z / (Y^T Y Z + 1e-6) of the last round's Y and Z. W of em
    has no elements.
    """
    dtype = accumulation_dtype(x)
    exact = x.to(dtype)
    updates = METHODS[method]
    y, z = _rounds(exact, y0.to(dtype), updates, steps)
    z_scale = x.new_empty(0)
    if isinstance(updates, NMF):
        z_scale = updates.z_scale(y, z)
        z = z_scale * (y.mT @ exact)
    x_hat = product(x, y, z)
    error = (exact - x_hat).square().mean()
    z_scale, z = z_scale.to(x.dtype).contiguous(), z.to(x.dtype).contiguous()
    return y.contiguous(), z, z_scale, x_hat.to(x.dtype), error


@_accumulating
def nmf_backward(
    grad_x_hat: Tensor | None,
    grad_mse: Tensor | None,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    z_scale: Tensor,
    tf32: bool = False,
) -> Tensor:
    """dX of nmf's X': with E = s (X - X') and D = G' - E it is E + Y (W * (Y^T D))."""
    dtype = accumulation_dtype(x)
    y, z = y.to(dtype), z.to(dtype)
    grad_x = torch.zeros_like(x, dtype=dtype)
    if grad_mse is not None:
        grad_x = (x.to(dtype) - product(x, y, z)) * (grad_mse * (2.0 / x.numel()))
    d = -grad_x if grad_x_hat is None else grad_x_hat - grad_x
    return (grad_x + product(x, y, z_scale.to(dtype) * (y.mT @ d))).to(x.dtype)
