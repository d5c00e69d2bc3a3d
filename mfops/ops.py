"""The operators: schemas, fakes and FLOP formulas. They exist with or without the extension.

The extension registers its kernels straight at the dispatcher's device keys; where a device has
none, the operators run the reference. Each has a twin, `triton_..`, that runs Triton's kernels.
Shapes: x (B, C, N); y (C, K) or (B, C, K); z (K, N) or (B, K, N). X' is (C, N) where both factors
are shared, else (B, C, N). `tf32` allows products of float32 operands on a GPU to round those to
TF32. Nothing is checked here: `mfops.checks` does that once, before dispatch.

`factorize` finds the factors on each image, `factorize_reconstruct` X' and the error too: y0 (C, K)
or (B, C, K), in the accumulation dtype (float32, float64 for float64 x), as is the y (B, C, K) they
return; z and z_scale (B, K, N) in x's dtype, contiguous. nmf's last update: z = z_scale * (Y^T X).
`factorize_reconstruct` and its gradient `nmf_backward` know "em" and "nmf" alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from mfops import reference
from mfops.methods import METHODS
from mfops.methods.base import INVERSE_TEMPERATURE
from mfops.reference import empty_like_x

# Triton's kernels run on the CPU, and only there, where Triton is told to interpret them.
_INTERPRET = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
TRITON_DEVICE = "CPU" if _INTERPRET else "CUDA"

SCHEMAS = {
    "reconstruct": "(Tensor x, Tensor y, Tensor z, bool tf32=False) -> (Tensor x_hat, Tensor mse)",
    "mse": "(Tensor x, Tensor y, Tensor z, bool tf32=False) -> Tensor",
    # A gradient that is not needed comes back with no elements: operators cannot return None.
    "reconstruct_backward": (
        "(Tensor? grad_x_hat, Tensor? grad_mse, Tensor x, Tensor y, Tensor z, bool need_x, "
        "bool need_y, bool need_z, bool tf32=False) "
        "-> (Tensor grad_x, Tensor grad_y, Tensor grad_z)"
    ),
    # em and nmf have no temperature.
    "factorize": (
        "(Tensor x, Tensor y0, str method, int steps, bool tf32=False, "
        f"float inverse_temperature={INVERSE_TEMPERATURE}) -> (Tensor y, Tensor z)"
    ),
    "factorize_reconstruct": (
        "(Tensor x, Tensor y0, str method, int steps, bool tf32=False) "
        "-> (Tensor y, Tensor z, Tensor z_scale, Tensor x_hat, Tensor mse)"
    ),
    "nmf_backward": (
        "(Tensor? grad_x_hat, Tensor? grad_mse, Tensor x, Tensor y, Tensor z, Tensor z_scale, "
        "bool tf32=False) -> Tensor"
    ),
}


def _on_triton(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        from mfops import triton  # at the first call: it takes a while, and may not be there

        return getattr(triton, name)(*args)

    return run


LIBRARY = torch.library.Library("mfops", "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)
    LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    LIBRARY.define(f"triton_{_name}{_schema}")
    LIBRARY.impl(f"triton_{_name}", _on_triton(_name), TRITON_DEVICE)


def use_triton_for_cuda() -> None:
    """Registers Triton's kernels for CUDA where the extension has registered none."""
    for name in SCHEMAS:
        LIBRARY.impl(name, _on_triton(name), "CUDA")


def _register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        for op in (name, f"triton_{name}"):
            torch.library.register_fake(f"mfops::{op}", fake, lib=LIBRARY)
        return fake

    return register


@_register_fake("reconstruct")
def _reconstruct_fake(
    x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, tf32: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    shared = y.dim() == 2 and z.dim() == 2
    x_hat = empty_like_x(x, list(x.shape[1:] if shared else x.shape))
    return x_hat, _mse_fake(x, y, z)


@_register_fake("mse")
def _mse_fake(
    x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, tf32: bool = False
) -> torch.Tensor:
    return x.new_empty((), dtype=reference.accumulation_dtype(x))


@_register_fake("reconstruct_backward")
def _reconstruct_backward_fake(
    grad_x_hat: torch.Tensor | None,
    grad_mse: torch.Tensor | None,
    x: torch.Tensor,
    y: torch.Tensor,
    z: torch.Tensor,
    need_x: bool,
    need_y: bool,
    need_z: bool,
    tf32: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        empty_like_x(x, list(x.shape)) if need_x else x.new_empty(0),
        y.new_empty(y.shape) if need_y else x.new_empty(0),
        z.new_empty(z.shape) if need_z else x.new_empty(0),
    )


@_register_fake("factorize")
def _factorize_fake(
    x: torch.Tensor,
    y0: torch.Tensor,
    method: str,
    steps: int,
    tf32: bool = False,
    inverse_temperature: float = INVERSE_TEMPERATURE,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, channels, pixels = x.shape
    rank = y0.shape[-1]
    y = x.new_empty((batch, channels, rank), dtype=reference.accumulation_dtype(x))
    return y, x.new_empty((batch, rank, pixels))


@_register_fake("factorize_reconstruct")
def _factorize_reconstruct_fake(
    x: torch.Tensor, y0: torch.Tensor, method: str, steps: int, tf32: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, z = _factorize_fake(x, y0, method, steps)
    z_scale = x.new_empty(z.shape if METHODS[method].one_step_gradient else 0)
    return y, z, z_scale, empty_like_x(x, list(x.shape)), _mse_fake(x, y, z)


@_register_fake("nmf_backward")
def _nmf_backward_fake(
    grad_x_hat: torch.Tensor | None,
    grad_mse: torch.Tensor | None,
    x: torch.Tensor,
    y: torch.Tensor,
    z: torch.Tensor,
    z_scale: torch.Tensor,
    tf32: bool = False,
) -> torch.Tensor:
    return empty_like_x(x, list(x.shape))


def _product_flops(x_shape: list[int], y_shape: list[int], z_shape: list[int]) -> int:
    """FLOPs of one Y Z, a multiply-add counted as 2."""
    batch, channels, pixels = x_shape
    products = 1 if len(y_shape) == 2 and len(z_shape) == 2 else batch
    return 2 * products * channels * y_shape[-1] * pixels


_OPS = torch.ops.mfops


@register_flop_formula([_OPS.reconstruct, _OPS.mse, _OPS.triton_reconstruct, _OPS.triton_mse])
def _forward_flops(  # type: ignore[no-untyped-def]
    x_shape, y_shape, z_shape, tf32=False, **kwargs
) -> int:
    return _product_flops(x_shape, y_shape, z_shape)


@register_flop_formula([_OPS.reconstruct_backward, _OPS.triton_reconstruct_backward])
def _backward_flops(  # type: ignore[no-untyped-def]
    grad_x_hat_shape, grad_mse_shape, x_shape, y_shape, z_shape, need_x, *need_factors, **kwargs
) -> int:
    # X' is computed anew where the error is needed; then one product for each factor's gradient.
    products = (grad_mse_shape is not None) + sum(need_factors[:2])
    return products * _product_flops(x_shape, y_shape, z_shape)


def _gram_flops(x_shape: list[int], rank: int) -> int:
    """The K x K Gram matrices of Y and Z, and the products of each with one of the factors."""
    batch, channels, pixels = x_shape
    return 2 * 2 * batch * rank * rank * (channels + pixels)


@register_flop_formula([_OPS.factorize, _OPS.triton_factorize])
def _factorize_flops(  # type: ignore[no-untyped-def]
    x_shape, y0_shape, method, steps, *args, **kwargs
) -> int:
    batch, channels, pixels = x_shape
    rank = y0_shape[-1]
    each = 2 * 2 * batch * channels * rank * pixels
    if method != "nmf":
        return steps * each
    each += _gram_flops(x_shape, rank)
    return steps * each + 2 * batch * channels * rank * pixels


@register_flop_formula([_OPS.factorize_reconstruct, _OPS.triton_factorize_reconstruct])
def _factorize_reconstruct_flops(  # type: ignore[no-untyped-def]
    x_shape, y0_shape, method, steps, tf32=False, **kwargs
) -> int:
    batch, channels, pixels = x_shape
    rank = y0_shape[-1]
    product = 2 * batch * channels * rank * pixels
    flops = _factorize_flops(x_shape, y0_shape, method, steps) + product
    if method == "nmf":
        flops += product + 2 * batch * rank * rank * (channels + pixels)
    return flops


@register_flop_formula([_OPS.nmf_backward, _OPS.triton_nmf_backward])
def _nmf_backward_flops(  # type: ignore[no-untyped-def]
    grad_x_hat_shape, grad_mse_shape, x_shape, y_shape, z_shape, *args, **kwargs
) -> int:
    return (2 + (grad_mse_shape is not None)) * _product_flops(x_shape, y_shape, z_shape)


def operator(name: str) -> Callable[..., Any]:
    """The overload rather than the packet: a call need not look for the one that fits."""
    overload: Callable[..., Any] = getattr(_OPS, name).default
    return overload
