"""Whether autocast is on, and regions without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mfops.exporting import constant_for_the_compiler


@constant_for_the_compiler  # torch 2.11 cannot trace it
def _has_autocast(device: str) -> bool:
    """False for devices such as "meta", which refuse to be asked whether autocast is on."""
    return torch.amp.is_autocast_available(device)


def _autocast_is_on(device: str) -> bool:
    return _has_autocast(device) and torch.is_autocast_enabled(device)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    return _autocast_is_on(x.device.type)


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast an op runs in the autocast dtype, float64 excepted, as matmul does."""
    if not autocasts(tensors[0]) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Switches autocast off on a type of device, where it is on.

    Where it is off already a region without it would be one more thing in an exported program.
    """
    return torch.autocast(device, enabled=False) if _autocast_is_on(device) else nullcontext()
