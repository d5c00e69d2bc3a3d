"""Refuses bad input once, before dispatch: every message names the argument and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from mfops.methods import METHODS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_positive(name: str, value: int) -> int:
    """An integer >= 1, which is returned."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return value


def check_features(x: Tensor) -> None:
    """x: a floating tensor (B, C, N) or (B, C, H, W) with elements."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.dim() not in (3, 4):
        raise ValueError(f"x: expected shape (B, C, N) or (B, C, H, W), got {_shape(x)}")
    if x.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"x: expected one of {names}, got {str(x.dtype).removeprefix('torch.')}")
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one element, got shape {_shape(x)}")


def _layout_hint(x: Tensor, channels: int) -> str:
    """What to do where x has the channels last; empty where it has not."""
    if x.shape[-1] != channels:
        return ""
    if x.dim() == 3:
        return "; x is (B, C, N): tokens (B, N, C) need x.mT"
    return "; x is (B, C, H, W): maps (B, H, W, C) need x.permute(0, 3, 1, 2)"


def check_channels(x: Tensor, channels: int) -> None:
    """x, which `check_features` has passed: so many channels."""
    if x.shape[1] != channels:
        hint = _layout_hint(x, channels)
        raise ValueError(f"x: expected {channels} channels, got {_shape(x)}{hint}")


def check_factors(x: Tensor, y: Tensor, z: Tensor) -> None:
    """y (C, K) or (B, C, K) and z (K, N) or (B, K, N), of x's dtype and device."""
    for name, factor, form in (("y", y, "(C, K) or (B, C, K)"), ("z", z, "(K, N) or (B, K, N)")):
        if not isinstance(factor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(factor).__name__}")
        if factor.dim() not in (2, 3):
            raise ValueError(f"{name}: expected shape {form}, got {_shape(factor)}")
        if factor.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {factor.dtype}")
        if factor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {factor.device}")
        if factor.dim() == 3 and factor.shape[0] != x.shape[0]:
            raise ValueError(
                f"{name}: expected the batch size of x, {x.shape[0]}, got {_shape(factor)}"
            )
    pixels = x.shape[2] if x.dim() == 3 else x.shape[2] * x.shape[3]
    if y.shape[-1] == 0:
        raise ValueError(f"y: expected at least one basis (K >= 1), got {_shape(y)}")
    if y.shape[-2] != x.shape[1]:
        hint = _layout_hint(x, y.shape[-2])
        raise ValueError(
            f"y: expected C = {x.shape[1]} rows as x has channels, got {_shape(y)}{hint}"
        )
    if z.shape[-2] != y.shape[-1]:
        raise ValueError(f"z: expected K = {y.shape[-1]} rows as y has columns, got {_shape(z)}")
    if z.shape[-1] != pixels:
        raise ValueError(f"z: expected N = {pixels} columns as x has pixels, got {_shape(z)}")


def check_method(method: str, steps: int) -> None:
    """method: a name that is known; steps: an integer >= 1."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps: expected an integer, got {type(steps).__name__}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")


def check_temperature(method: str, given: float | None) -> float | None:
    """The inverse temperature of a method: given, 1e-6 to 1e6, or its own; None: it has none."""
    own = METHODS[method].inverse_temperature
    if given is None:
        return own
    if own is None:
        raise ValueError(f"inverse_temperature: method {method!r} takes none, got {given!r}")
    if isinstance(given, bool) or not isinstance(given, int | float) or not 1e-6 <= given <= 1e6:
        raise ValueError(f"inverse_temperature: expected a number from 1e-6 to 1e6, got {given!r}")
    return float(given)


def check_bases(x: Tensor, y0: Tensor) -> None:
    """y0 (C, K) or (B, C, K), of x's dtype or float32, on x's device."""
    if not isinstance(y0, Tensor):
        raise TypeError(f"y0: expected a torch.Tensor, got {type(y0).__name__}")
    if y0.dim() not in (2, 3) or (y0.dim() == 3 and y0.shape[0] != x.shape[0]):
        raise ValueError(
            f"y0: expected shape (C, K) or (B, C, K) with B = {x.shape[0]}, got {_shape(y0)}"
        )
    if y0.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"y0: expected the dtype of x, {x.dtype}, or float32, got {y0.dtype}")
    if y0.device != x.device:
        raise ValueError(f"y0: expected the device of x, {x.device}, got {y0.device}")
    if y0.shape[-1] == 0:
        raise ValueError(f"y0: expected at least one basis (K >= 1), got {_shape(y0)}")
    if y0.shape[-2] != x.shape[1]:
        hint = _layout_hint(x, y0.shape[-2])
        raise ValueError(
            f"y0: expected C = {x.shape[1]} rows as x has channels, got {_shape(y0)}{hint}"
        )
