"""Which backend runs a call: one question per backend serves automatic and explicit choice.

Automatic choice takes the first of native, triton and reference that can run the call and logs,
once per reason, why an earlier one could not (a warning where the extension is missing). An
explicit choice (`use_backend`, MFOPS_BACKEND) runs there or raises that reason; it never falls
back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mfops import ops, reference

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
NO_TRITON = "this version has no Triton kernels"


def _native_obstacle(x: Tensor) -> str | None:
    if EXTENSION_ERROR is not None:
        return EXTENSION_ERROR
    if x.device.type != "cpu":
        return f"the native kernels of this version run on the CPU, x is on {x.device.type}"
    if x.dtype == torch.float64:
        return "the native kernels take float32, bfloat16 and float16, x is float64"
    return None


def _triton_obstacle(x: Tensor) -> str | None:
    return NO_TRITON


def _no_obstacle(x: Tensor) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """A name, the reason it cannot run on x (or None), and the three operators."""

    name: str
    obstacle: Callable[[Tensor], str | None]
    reconstruct: Callable[..., tuple[Tensor, Tensor]]
    mse: Callable[..., Tensor]
    reconstruct_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _backend(name: str, obstacle: Callable[[Tensor], str | None], source: object) -> Backend:
    names = ("reconstruct", "mse", "reconstruct_backward")
    return Backend(name, obstacle, *(getattr(source, function) for function in names))


BACKENDS = {
    "native": _backend("native", _native_obstacle, ops),
    "triton": _backend("triton", _triton_obstacle, ops),
    "reference": _backend("reference", _no_obstacle, reference),
}

# Process-wide on purpose: autograd runs backward passes in threads of its own.
_explicit: str | None = os.environ.get("MFOPS_BACKEND") or None


def _check_name(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")


def select(x: Tensor) -> Backend:
    """The backend for a call on x. Raises RuntimeError where an explicit choice cannot run."""
    if _explicit is not None:
        _check_name(_explicit, "MFOPS_BACKEND")  # use_backend has checked its own
        backend = BACKENDS[_explicit]
        obstacle = backend.obstacle(x)
        if obstacle is not None:
            raise RuntimeError(f"backend {_explicit!r} cannot run this call: {obstacle}")
        return backend
    for backend in BACKENDS.values():
        obstacle = backend.obstacle(x)
        if obstacle is None:
            break
        if not torch.compiler.is_compiling():
            _log_once(backend.name, obstacle)
    return backend


@functools.cache
def _log_once(name: str, obstacle: str) -> None:
    level = logging.WARNING if obstacle == EXTENSION_ERROR else logging.INFO
    logger.log(level, "backend %s passed over: %s", name, obstacle)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every mfops call inside the block on one backend, process-wide, or raises.

    Args:
        name: "native", "triton" or "reference".

    Raises:
        ValueError: an unknown name.
        RuntimeError: at the call, where the backend cannot run it. The choice of the environment
            variable MFOPS_BACKEND behaves alike, and gives way to this one.
    """
    global _explicit
    _check_name(name, "backend")
    previous, _explicit = _explicit, name
    try:
        yield
    finally:
        _explicit = previous


def available_backends() -> dict[str, str | None]:
    """For each backend None, or the reason it cannot run on this machine at all."""
    return {"native": EXTENSION_ERROR, "triton": NO_TRITON, "reference": None}
