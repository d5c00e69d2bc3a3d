"""Problems on a GPU, and what tests there have in common."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import mfops
from mfops.backends import BACKENDS

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last"]


class Problem(NamedTuple):
    x: Tensor
    y: Tensor
    z: Tensor
    grad_x_hat: Tensor
    grad_mse: Tensor


def problem(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "contiguous",
    shared: bool = False,
    device: str = DEVICE,
    seed: int = 0,
) -> Problem:
    """Random tensors for a forward and a backward pass, both terms of the gradients of one size."""
    torch.manual_seed(seed)
    batch, channels, rank, pixels = shape
    images = [] if shared else [batch]

    def features() -> Tensor:
        if layout == "channels_last":
            return torch.randn(batch, pixels, channels, device=device, dtype=dtype).mT
        return torch.randn(batch, channels, pixels, device=device, dtype=dtype)

    return Problem(
        x=features(),
        y=torch.randn(*images, channels, rank, device=device, dtype=dtype),
        z=torch.randn(*images, rank, pixels, device=device, dtype=dtype),
        grad_x_hat=features(),
        grad_mse=torch.tensor(batch * channels * pixels / 2, device=device),
    )


def leaves(p: Problem) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in (p.x, p.y, p.z)]


def results(p: Problem, op: Callable = mfops.factorized_reconstruction) -> list[Tensor]:
    """X', mse and the gradients of x, y and z."""
    inputs = leaves(p)
    outputs = op(*inputs)
    grads = torch.autograd.grad(outputs, inputs, (p.grad_x_hat, p.grad_mse))
    return [t.detach() for t in (*outputs, *grads)]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(("X'", "mse", "dX", "dY", "dZ"), actual, expected, strict=True):
        assert torch.equal(a, b), f"{name} differs by up to {(a.float() - b.float()).abs().max()}"


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def needs_memory(gib: float) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free:.1f} GiB are there")


def runs_or_skips(name: str) -> None:
    """Under `use_backend(name)`: skips the test, with the reason, where the backend can't run."""
    few = torch.ones(1, 4, 4, device=DEVICE)
    try:
        mfops.factorized_mse(few, few[0], few[0])
    except RuntimeError as error:
        if "cannot run this call" not in str(error):
            raise
        pytest.skip(str(error))


def move(t: Tensor, device: str) -> Tensor:
    """The tensor on a device, with the strides it has.

    In whole 16 bytes: kernels copy so many at a time, those beyond the tensor are filled with zeros
    and not read, but compute-sanitizer's memcheck takes all of them for read.
    """
    elements = t.untyped_storage().nbytes() // t.element_size()
    whole = -(-elements * t.element_size() // 16) * 16 // t.element_size()
    memory = torch.empty(whole, dtype=t.dtype, device=device)
    memory[:elements] = t.as_strided((elements,), (1,), 0)
    return memory.as_strided(t.shape, t.stride(), t.storage_offset())


class OnGpu:
    """A backend's operators for tensors of the CPU; the kernels run on the GPU."""

    def __init__(self, name: str) -> None:
        self.backend = BACKENDS[name]

    def __getattr__(self, operator: str) -> Callable:
        def run(*arguments: Any) -> Any:
            moved = [move(t, DEVICE) if isinstance(t, Tensor) else t for t in arguments]
            found = getattr(self.backend, operator)(*moved)
            return found.cpu() if isinstance(found, Tensor) else [t.cpu() for t in found]

        return run
