"""Whether a program is being made that will run on other shapes, elsewhere, without this code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant_for_the_compiler(function: F) -> F:
    """What torch.compile calls while it traces, to keep the result as a constant of the graph.

    The mark of `torch.compiler.assume_constant_result`, which would import all of the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_exporting() -> bool:
    """Inside of torch.export, torch.onnx.export or torch.jit.trace.

    A comparison of sizes made in Python is frozen there: what an example's size decides, decides
    for all others too.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


@constant_for_the_compiler  # torch.compile takes it for False
def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


def is_exporting_onnx() -> bool:
    """Inside of torch.onnx.export, of either exporter: torch's operators alone have a meaning."""
    return is_exporting() and _in_onnx_export()
