"""A backend on a device, as a parameter of tests."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from cases import Operands

from mfops.backends import BACKENDS, EXTENSION_ERROR

# Why the CPU makes products of bfloat16 in float32, or "".
BFLOAT16_MISSING = EXTENSION_ERROR or importlib.import_module("mfops._C").cpu_bfloat16_missing()
BFLOAT16_UNITS = "" if EXTENSION_ERROR else importlib.import_module("mfops._C").cpu_bfloat16_units()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # set by test_triton.py
IN_PARALLEL = pytest.mark.skipif(INTERPRETED, reason="the interpreter has one thread")


class Run:
    """A backend on a device. Its operators are attributes."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend, self.device = backend, device

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        return getattr(BACKENDS[self.backend], operator)

    def __str__(self) -> str:
        return f"{self.backend} on {self.device}"

    def skip_unless_able(self, rank: int = 1, method: str | None = None) -> None:
        """A skip names what is missing."""
        reason = self.unavailable_reason(torch.zeros(1, 1, 1, device=self.device), rank, method)
        if reason is not None:
            pytest.skip(f"{self}: {reason}")

    def operands(self, kind: torch.dtype | Literal["tf32"]) -> Operands:
        """Of products of this dtype, or of float32 rounded to TF32."""
        if self.device == "cuda" or self.backend == "triton":
            return kind
        rounds = self.backend == "native" and kind == torch.bfloat16 and not BFLOAT16_MISSING
        return kind if rounds else None


def on_cpu(run: type[Run]) -> list[Run]:
    """Under TRITON_INTERPRET=1 the CPU's part is Triton's kernels in its interpreter."""
    return (
        [run("triton", "cpu")] if INTERPRETED else [run("native", "cpu"), run("reference", "cpu")]
    )


def on_cuda(run: type[Run], backend: str) -> Any:
    return pytest.param(run(backend, "cuda"), marks=pytest.mark.gpu, id=f"{backend} on cuda")
