"""Whether a program is being made that will run on other shapes, elsewhere, without this code."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Inside of torch.export, torch.onnx.export or torch.jit.trace.

    A comparison of sizes made in Python is frozen there: what an example's size decides, decides
    for all others too.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


@torch.compiler.assume_constant_result  # torch.compile takes it for False
def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


def is_exporting_onnx() -> bool:
    """Inside of torch.onnx.export, of either exporter: torch's operators alone have a meaning."""
    return is_exporting() and _in_onnx_export()
