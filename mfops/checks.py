"""Refuses bad input once, before dispatch: every message names the argument and what came."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mfops.methods import METHODS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _as_integer(value: Any) -> int | None:
    """An integer of Python or numpy as Python's; None: it is something else, a bool included."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_positive(name: str, value: int) -> int:
    """An integer >= 1, which is returned."""
    integer = _as_integer(value)
    if integer is None or integer < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return integer


def check_weight(name: str, value: float) -> float:
    """A finite number >= 0, which is returned."""
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a number >= 0, got {value!r}")
    return float(value)


def check_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(h, w), of such a pair or of one number for both."""
    pair = size if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or _as_integer(pair[0]) is None:
        raise ValueError(f"size: expected one integer or (h, w), got {size!r}")
    return check_positive("size", pair[0]), check_positive("size", pair[1])


def check_tensor(name: str, tensor: Tensor) -> None:
    """A tensor whose elements have strides."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}")


def check_features(x: Tensor, name: str = "x") -> None:
    """x: a floating tensor (B, C, N) or (B, C, H, W) with elements."""
    check_tensor(name, x)
    if x.dim() not in (3, 4):
        raise ValueError(f"{name}: expected shape (B, C, N) or (B, C, H, W), got {_shape(x)}")
    if x.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        got = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected one of {names}, got {got}")
    if x.numel() == 0:
        raise ValueError(f"{name}: expected at least one element, got shape {_shape(x)}")


def check_kind(name: str, tensor: Tensor, like: str, x: Tensor) -> None:
    """A tensor of the dtype and the device of x, which is called `like`."""
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected the dtype of {like}, {x.dtype}, got {tensor.dtype}")
    check_device(name, tensor, like, x)


def check_device(name: str, tensor: Tensor, like: str, x: Tensor) -> None:
    """A tensor on the device of x, which is called `like`."""
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected the device of {like}, {x.device}, got {tensor.device}")


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


def _check_rows_and_rank(name: str, y: Tensor, x: Tensor) -> None:
    if y.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one basis (K >= 1), got {_shape(y)}")
    if y.shape[-2] != x.shape[1]:
        hint = _layout_hint(x, y.shape[-2])
        raise ValueError(
            f"{name}: expected C = {x.shape[1]} rows as x has channels, got {_shape(y)}{hint}"
        )


def check_factors(x: Tensor, y: Tensor, z: Tensor) -> None:
    """y (C, K) or (B, C, K) and z (K, N) or (B, K, N), of x's dtype and device."""
    for name, factor, form in (("y", y, "(C, K) or (B, C, K)"), ("z", z, "(K, N) or (B, K, N)")):
        check_tensor(name, factor)
        if factor.dim() not in (2, 3):
            raise ValueError(f"{name}: expected shape {form}, got {_shape(factor)}")
        check_kind(name, factor, "x", x)
        if factor.dim() == 3 and factor.shape[0] != x.shape[0]:
            raise ValueError(
                f"{name}: expected the batch size of x, {x.shape[0]}, got {_shape(factor)}"
            )
    pixels = x.shape[2] if x.dim() == 3 else x.shape[2] * x.shape[3]
    _check_rows_and_rank("y", y, x)
    if z.shape[-2] != y.shape[-1]:
        raise ValueError(f"z: expected K = {y.shape[-1]} rows as y has columns, got {_shape(z)}")
    if z.shape[-1] != pixels:
        raise ValueError(f"z: expected N = {pixels} columns as x has pixels, got {_shape(z)}")


def check_method(method: str) -> None:
    """A name that is known."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")


def check_steps(steps: int) -> int:
    """An integer >= 1, which is returned."""
    integer = _as_integer(steps)
    if integer is None:
        raise TypeError(f"steps: expected an integer, got {type(steps).__name__}")
    if integer < 1:
        raise ValueError(f"steps: expected at least 1, got {integer}")
    return integer


def check_temperature(method: str, given: float | None) -> float | None:
    """The inverse temperature of a method: given, 1e-6 to 1e6, or its own; None: it has none."""
    own = METHODS[method].inverse_temperature
    if given is None:
        return own
    if own is None:
        raise ValueError(f"inverse_temperature: method {method!r} takes none, got {given!r}")
    if not _is_number(given) or not 1e-6 <= given <= 1e6:
        raise ValueError(f"inverse_temperature: expected a number from 1e-6 to 1e6, got {given!r}")
    return float(given)


def check_bases(x: Tensor, y0: Tensor) -> None:
    """y0 (C, K) or (B, C, K), of x's dtype or float32, on x's device."""
    check_tensor("y0", y0)
    if y0.dim() not in (2, 3) or (y0.dim() == 3 and y0.shape[0] != x.shape[0]):
        raise ValueError(
            f"y0: expected shape (C, K) or (B, C, K) with B = {x.shape[0]}, got {_shape(y0)}"
        )
    if y0.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"y0: expected the dtype of x, {x.dtype}, or float32, got {y0.dtype}")
    check_device("y0", y0, "x", x)
    _check_rows_and_rank("y0", y0, x)
