"""The operators: schemas, fakes and FLOP formulas. They exist with or without the extension.

The extension registers its kernels straight at the dispatcher's device keys; where a device has
none, the operators run the reference. Shapes: x (B, C, N); y (C, K) or (B, C, K); z (K, N) or
(B, K, N). X' is (C, N) where both factors are shared, else (B, C, N). Nothing is checked here:
`mfops.checks` does that once, before dispatch.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from mfops import reference

LIBRARY = torch.library.Library("mfops", "DEF")
LIBRARY.define("reconstruct(Tensor x, Tensor y, Tensor z) -> (Tensor x_hat, Tensor mse)")
LIBRARY.define("mse(Tensor x, Tensor y, Tensor z) -> Tensor")
# A gradient that is not needed comes back with no elements: operators cannot return None.
LIBRARY.define(
    "reconstruct_backward(Tensor? grad_x_hat, Tensor? grad_mse, Tensor x, Tensor y, Tensor z, "
    "bool need_x, bool need_y, bool need_z) -> (Tensor grad_x, Tensor grad_y, Tensor grad_z)"
)
for _name in ("reconstruct", "mse", "reconstruct_backward"):
    LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def _empty_like_x(x: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Memory laid out as x is: channels innermost where x has them so, else pixels."""
    if reference.channels_innermost(x):
        return x.new_empty([*shape[:-2], shape[-1], shape[-2]]).mT
    return x.new_empty(shape)


@torch.library.register_fake("mfops::reconstruct", lib=LIBRARY)
def _reconstruct_fake(
    x: torch.Tensor, y: torch.Tensor, z: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    shared = y.dim() == 2 and z.dim() == 2
    x_hat = _empty_like_x(x, list(x.shape[1:] if shared else x.shape))
    return x_hat, _mse_fake(x, y, z)


@torch.library.register_fake("mfops::mse", lib=LIBRARY)
def _mse_fake(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return x.new_empty((), dtype=reference.accumulation_dtype(x))


@torch.library.register_fake("mfops::reconstruct_backward", lib=LIBRARY)
def _reconstruct_backward_fake(
    grad_x_hat: torch.Tensor | None,
    grad_mse: torch.Tensor | None,
    x: torch.Tensor,
    y: torch.Tensor,
    z: torch.Tensor,
    need_x: bool,
    need_y: bool,
    need_z: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        _empty_like_x(x, list(x.shape)) if need_x else x.new_empty(0),
        y.new_empty(y.shape) if need_y else x.new_empty(0),
        z.new_empty(z.shape) if need_z else x.new_empty(0),
    )


def _product_flops(x_shape: list[int], y_shape: list[int], z_shape: list[int]) -> int:
    """FLOPs of one Y Z, a multiply-add counted as 2."""
    batch, channels, pixels = x_shape
    products = 1 if len(y_shape) == 2 and len(z_shape) == 2 else batch
    return 2 * products * channels * y_shape[-1] * pixels


@register_flop_formula([torch.ops.mfops.reconstruct, torch.ops.mfops.mse])
def _forward_flops(x_shape, y_shape, z_shape, *, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _product_flops(x_shape, y_shape, z_shape)


@register_flop_formula(torch.ops.mfops.reconstruct_backward)
def _backward_flops(  # type: ignore[no-untyped-def]
    grad_x_hat_shape,
    grad_mse_shape,
    x_shape,
    y_shape,
    z_shape,
    need_x,
    need_y,
    need_z,
    *,
    out_shape=None,
    **kwargs,
) -> int:
    # X' is computed anew where the error is needed; then one product for each factor's gradient.
    products = (grad_mse_shape is not None) + bool(need_y) + bool(need_z)
    return products * _product_flops(x_shape, y_shape, z_shape)


# Overloads rather than packets: a call then need not look for the one that fits.
reconstruct = torch.ops.mfops.reconstruct.default
mse = torch.ops.mfops.mse.default
reconstruct_backward = torch.ops.mfops.reconstruct_backward.default
