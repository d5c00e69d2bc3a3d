"""Which backend runs a call. Each backend says why it cannot: that serves both kinds of choice.

Automatic choice takes the first of native, triton and reference that can run the call and logs,
once per reason, why an earlier one could not (a warning where the extension is missing). On a GPU
the backward pass of 16-bit factors that are given is then Triton's, which is the faster one. An
explicit choice (`use_backend`, MFOPS_BACKEND) runs there or raises that reason; it never falls
back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mfops import ops, reference
from mfops.exporting import constant_for_the_compiler, is_exporting_onnx
from mfops.methods import METHODS

logger = logging.getLogger("mfops")


@functools.cache
def extension_error() -> str | None:
    """Loads the compiled extension; None, or why it is not there."""
    try:
        importlib.import_module("mfops._C")
    except ModuleNotFoundError:
        return "the extension mfops._C was not built: reinstall mfops with a C++ compiler present"
    except ImportError as error:
        return f"the extension mfops._C does not load: {error}"
    return None


EXTENSION_ERROR = extension_error()
# The native CUDA kernels need tensor cores with bfloat16, Triton supports nothing older.
MIN_CAPABILITY = (8, 0)
MAX_NATIVE_CUDA_RANK = 256


def _cuda_error() -> str | None:
    """None, or why there are no native kernels for CUDA."""
    if EXTENSION_ERROR is not None:
        return EXTENSION_ERROR
    missing = importlib.import_module("mfops._C").build_info()["cuda_missing"]
    return None if missing is None else f"the extension was built without CUDA kernels: {missing}"


CUDA_ERROR = _cuda_error()
TRITON_ERROR = None if importlib.util.find_spec("triton") else "triton is not installed"
if CUDA_ERROR is not None and TRITON_ERROR is None and ops.TRITON_DEVICE == "CUDA":
    ops.use_triton_for_cuda()


@functools.cache
def _ask_gpu(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability >= MIN_CAPABILITY:
        return None
    needed, found = (".".join(map(str, c)) for c in (MIN_CAPABILITY, capability))
    name = torch.cuda.get_device_name(index)
    return f"needs compute capability {needed} or later, {name} (cuda:{index}) has {found}"


@constant_for_the_compiler  # torch.compile cannot trace it, cached or not
def _gpu_reason(index: int) -> str | None:
    """None, or why Triton's kernels do not run on this GPU."""
    return _ask_gpu(index)


@functools.cache
def _ask_build(index: int) -> str | None:
    reason = _ask_gpu(index)
    if reason is not None:
        return reason
    words = importlib.import_module("mfops._C").cuda_unavailable_reason(index)
    name = torch.cuda.get_device_name(index)
    return f"the extension has no code for {name} (cuda:{index}): {words}" if words else None


@constant_for_the_compiler
def _native_gpu_reason(index: int) -> str | None:
    """None, or why the native CUDA kernels do not run on this GPU."""
    return _ask_build(index)


def in_forward_mode() -> bool:
    """Within torch.autograd.forward_ad, which torch.func.jvp uses, too."""
    return forward_ad._current_level >= 0


def under_transform() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ..) or forward mode runs this call."""
    return torch._C._are_functorch_transforms_active() or in_forward_mode()


def _kernel_reason(x: Tensor, method: str | None) -> str | None:
    if is_exporting_onnx():
        return "its operators cannot be written to ONNX"
    if under_transform():
        return "its operators take no part in torch.func's transforms"
    if x.dtype == torch.float64:
        return "takes float32, bfloat16 and float16, x is float64"
    if method is not None and not METHODS[method].has_kernel:
        return f"has no kernels for method {method!r}"
    return None


def _native_reason(x: Tensor, rank: int, method: str | None = None) -> str | None:
    if EXTENSION_ERROR is not None:
        return EXTENSION_ERROR
    if x.is_cuda:
        if CUDA_ERROR is not None:
            return CUDA_ERROR
        reason = _native_gpu_reason(x.device.index)
        if reason is not None:
            return reason
        if rank > MAX_NATIVE_CUDA_RANK:
            return f"on CUDA it takes K <= {MAX_NATIVE_CUDA_RANK}, K is {rank}"
    elif not x.is_cpu:
        return f"runs on cpu and cuda, x is on {x.device.type}"
    return _kernel_reason(x, method)


def _triton_reason(x: Tensor, rank: int, method: str | None = None) -> str | None:
    if TRITON_ERROR is not None:
        return TRITON_ERROR
    device = ops.TRITON_DEVICE.lower()
    if x.device.type != device:
        return f"runs on {device}, x is on {x.device.type}"
    if device == "cuda":
        reason = _gpu_reason(x.device.index)
        if reason is not None:
            return reason
    return _kernel_reason(x, method)


def _always_available(x: Tensor, rank: int, method: str | None = None) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """A name, why it cannot run a call (or None), and the operators.

    `unavailable_reason` takes x, K and, where no factors are given, the method that finds them.
    """

    name: str
    unavailable_reason: Callable[..., str | None]
    reconstruct: Callable[..., tuple[Tensor, Tensor]]
    mse: Callable[..., Tensor]
    reconstruct_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    factorize: Callable[..., tuple[Tensor, Tensor]]
    factorize_reconstruct: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    nmf_backward: Callable[..., Tensor]


def _backend(
    name: str,
    unavailable_reason: Callable[..., str | None],
    operator: Callable[[str], Callable[..., Any]],
) -> Backend:
    return Backend(name, unavailable_reason, **{name: operator(name) for name in ops.SCHEMAS})


BACKENDS = {
    "native": _backend("native", _native_reason, ops.operator),
    "triton": _backend("triton", _triton_reason, lambda name: ops.operator(f"triton_{name}")),
    "reference": _backend("reference", _always_available, lambda name: getattr(reference, name)),
}

# Triton's backward pass took 0.57 to 0.89 of native's time in the ten cases measured on an H200, in
# bfloat16; the forward passes are about equal, and native's takes less of the host (docs/gpu.md).
NATIVE_WITH_TRITON_BACKWARD = replace(
    BACKENDS["native"], reconstruct_backward=BACKENDS["triton"].reconstruct_backward
)

# Process-wide on purpose: autograd runs backward passes in threads of its own.
_OF_ENVIRONMENT: str | None = os.environ.get("MFOPS_BACKEND") or None
_explicit = _OF_ENVIRONMENT
# The blocks of use_backend that are open, in whichever threads: the last one's name is the choice.
_open_blocks: list[list[str]] = []


def _check_name(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")


def select(x: Tensor, rank: int, method: str | None = None) -> Backend:
    """The backend for a call on x with K = rank bases, to be found by `method` or given.

    Raises RuntimeError where an explicit choice cannot run.
    """
    if _explicit is not None:
        _check_name(_explicit, "MFOPS_BACKEND")  # use_backend has checked its own
        backend = BACKENDS[_explicit]
        reason = backend.unavailable_reason(x, rank, method)
        if reason is not None:
            raise RuntimeError(f"backend {_explicit!r} cannot run this call: {reason}")
        return backend
    for backend in BACKENDS.values():
        reason = backend.unavailable_reason(x, rank, method)
        if reason is None:
            break
        if not torch.compiler.is_compiling():
            _log_once(backend.name, reason)
    if (
        x.is_cuda
        and method is None
        and backend.name == "native"
        and x.dtype in (torch.bfloat16, torch.float16)
        and _triton_reason(x, rank) is None
    ):
        return NATIVE_WITH_TRITON_BACKWARD
    return backend


@functools.cache
def _log_once(name: str, reason: str) -> None:
    level = logging.WARNING if reason == EXTENSION_ERROR else logging.INFO
    logger.log(level, "backend %s passed over: %s", name, reason)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every mfops call inside the block on one backend, process-wide, or raises.

    `gather`, `distribute` and X' of learned factors without its error are PyTorch's everywhere.

    Args:
        name: "native", "triton" or "reference".

    Raises:
        ValueError: an unknown name.
        RuntimeError: at the call, where the backend cannot run it. The choice of the environment
            variable MFOPS_BACKEND behaves alike, and gives way to this one.
    """
    global _explicit
    _check_name(name, "backend")
    block = [name]
    _open_blocks.append(block)
    _explicit = name
    try:
        yield
    finally:  # blocks of two threads need not be nested: each takes itself away, and nothing else
        _open_blocks[:] = [other for other in _open_blocks if other is not block]
        _explicit = _open_blocks[-1][0] if _open_blocks else _OF_ENVIRONMENT


def available_backends() -> dict[str, str | None]:
    """Which backends run on this machine, and why others do not.

    Returns:
        For "native", "triton" and "reference" None, or the reason it cannot run here at all. Where
        "native" runs it may still lack CUDA kernels: `python -m mfops` says what was built.
    """
    triton = TRITON_ERROR
    if triton is None and ops.TRITON_DEVICE == "CUDA" and not torch.cuda.is_available():
        triton = "no CUDA device"
    return {"native": EXTENSION_ERROR, "triton": triton, "reference": None}
