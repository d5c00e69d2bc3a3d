"""Cases for the operators that find Y and Z, and how far from the reference a backend may be.

The rounds are nonlinear: no textbook bound carries through them. What roundings do to a result is
therefore measured on the reference itself: in float64, with every operand of a product off by up to
the unit roundoff that it is rounded with, every product off by up to the bound of its sum
(Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1) and every other result by
up to two float32 roundings, all at random. A backend may be off by a multiple of what that does.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

import torch
from cases import U_TF32, Operands, U, _u, digest, features
from guarded import guarded
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mfops import reference
from mfops.methods import METHODS
from mfops.methods.base import INVERSE_TEMPERATURE

# B, C, K, N: not multiples of anything, ones, more bases than channels or pixels.
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 2, 5),
    (3, 17, 5, 33),
    (2, 70, 64, 289),
    (1, 200, 7, 700),
    (3, 129, 3, 1),
    (2, 1, 4, 77),
    (1, 5, 9, 1500),
    (2, 20, 40, 13),
    (2, 300, 12, 31),
]
STEPS = 3
# Enough for most cases. Where a basis of vq or cd is about to lose its last pixel, a rounding may
# decide it, and few samples may all fall on one side: a result they do not explain is tried again
# against many.
SAMPLES, MANY_SAMPLES = 6, 100
# Of the random perturbations' size, element by element and over all elements.
SAFETY_HERE, SAFETY_ALL = 8.0, 4.0
MATMULS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__}
# Between -1 and 1. Any stretch of it serves as noise: to draw it anew took most of a test's time.
UNIFORM = 2 * torch.rand(2**21, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1


@dataclass
class Case:
    x: Tensor
    y0: Tensor
    grad_x_hat: Tensor
    grad_mse: Tensor

    def double(self) -> Case:
        return Case(*(getattr(self, name).double() for name in self.__dataclass_fields__))


@functools.lru_cache(maxsize=24)  # as many as there are methods and types of a shape
def _known(values: bytes) -> dict[Any, tuple[list[Tensor], list[Any]]]:
    """Each result of a case of these values, in float64 and with roundings: in every layout and on
    every backend it is the same."""
    return {}


def known(case: Case) -> dict[Any, tuple[list[Tensor], list[Any]]]:
    return _known(digest(case.x, case.y0, case.grad_x_hat, case.grad_mse))


def make(
    shape: tuple[int, int, int, int],
    layout: str,
    dtype: torch.dtype,
    method: str,
    shared: bool = True,
    device: str = "cpu",
) -> Case:
    """A call's inputs; on the CPU a read or write beyond the end of one is a fault."""
    torch.manual_seed(0)
    batch, channels, rank, pixels = shape
    guard = guarded if device == "cpu" else torch.Tensor.detach
    x = features((batch, channels, pixels), layout, dtype, device)
    if METHODS[method].nonnegative:
        x.relu_()
    y0 = METHODS[method].noise(*(() if shared else (batch,)), channels, rank)
    return Case(
        x=guard(x),
        y0=guard(y0.to(device)),
        grad_x_hat=guard(features((batch, channels, pixels), layout, dtype, device)),
        grad_mse=torch.tensor(float(batch * channels * pixels), device=device),
    )


class Roundings(TorchFunctionMode):
    """Perturbs what float64 torch functions compute as a backend's roundings may."""

    def __init__(self, operands: Operands, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        # Tensor cores may cut sums off instead of rounding them.
        self.sums = U if operands in (None, torch.float32) else 2 * U
        self.operands = 0.0
        if operands == "tf32":
            self.operands = U_TF32
        elif operands in (torch.bfloat16, torch.float16):
            self.operands = _u(operands)

    def noise(self, t: Tensor, size: float | Tensor) -> Tensor:
        start = self.random.randrange(len(UNIFORM) - t.numel())
        return UNIFORM[start : start + t.numel()].view(t.shape).to(t.device) * size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            if func in MATMULS:
                a, b = (t * (1 + self.noise(t, self.operands)) for t in args)
                out = a @ b
                return out + self.noise(out, a.shape[-1] * self.sums * (a.abs() @ b.abs()))
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float64 and func is not Tensor.to:
                out = out * (1 + self.noise(out, 2 * U))
            return out


def _assert_close(actual: Tensor, exact: Tensor, samples: list[Tensor], what: str) -> None:
    """Within a multiple of what roundings do to the result, and one rounding to its dtype."""
    assert actual.shape == exact.shape, f"{what}: {tuple(actual.shape)} for {tuple(exact.shape)}"
    if actual.numel() == 0:
        return
    spread = torch.stack([(s - exact).square() for s in samples]).mean(0)
    dtype = torch.finfo(actual.dtype)
    allowed = SAFETY_HERE * spread.sqrt() + SAFETY_ALL * spread.mean().sqrt()
    allowed = allowed + dtype.eps / 2 * exact.abs() + dtype.tiny
    excess = (actual.double() - exact).abs() - allowed
    assert excess.max() <= 0, f"{what}: off by {excess.max():.3g} more than roundings explain"


def _check(
    names: tuple[str, ...], actual: Any, run: Any, case: Case, operands: Operands, what: str
) -> None:
    """`run` computes on float64 what `actual` is on a backend; `what` says what that is."""
    exact, samples = known(case).setdefault((what, operands), ([], []))
    if not exact:
        exact.extend(run())

    def explain(count: int) -> None:
        for seed in range(len(samples), count):
            with Roundings(operands, seed):
                samples.append(run())
        for i, name in enumerate(names):
            _assert_close(actual[i], exact[i], [s[i] for s in samples], f"{what}: {name}")

    try:
        explain(SAMPLES)
    except AssertionError:
        explain(MANY_SAMPLES)


def check(
    run: Any,
    case: Case,
    method: str,
    operands: Operands = None,
    steps: int = STEPS,
    temperature: float = INVERSE_TEMPERATURE,
) -> None:
    """Asserts that `run` factorizes and, with em and nmf, reconstructs and differentiates right."""
    c, tf32, dtype = case.double(), operands == "tf32", case.x.dtype
    actual = run.factorize(case.x, case.y0, method, steps, tf32, temperature)
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == dtype
    _check(
        ("y", "z"),
        actual,
        lambda: reference.factorize(c.x, c.y0, method, steps, False, temperature),
        case,
        operands,
        f"factorize {method}, {steps} steps at {temperature}",
    )
    if not METHODS[method].fused:
        return
    actual = run.factorize_reconstruct(case.x, case.y0, method, steps, tf32)
    assert [t.dtype for t in actual] == [torch.float32, dtype, dtype, dtype, torch.float32]
    what = f"factorize_reconstruct {method}, {steps} steps"
    _check(
        ("y", "z", "z_scale", "X'", "mse"),
        actual,
        lambda: reference.factorize_reconstruct(c.x, c.y0, method, steps),
        case,
        operands,
        what,
    )
    if not METHODS[method].one_step_gradient:
        return
    (y, z, z_scale, *_), _ = known(case)[what, operands]
    factors = case.x, y.float(), z.to(dtype), z_scale.to(dtype)
    for upstream in [
        {"X'": case.grad_x_hat, "mse": case.grad_mse},
        {"X'": None, "mse": case.grad_mse},
        {"X'": case.grad_x_hat, "mse": None},
    ]:
        arguments = *upstream.values(), *factors
        doubles = [None if t is None else t.double() for t in arguments]
        grad_x = run.nmf_backward(*arguments, tf32)
        assert grad_x.dtype == dtype
        given = " and ".join(name for name, grad in upstream.items() if grad is not None)
        _check(
            ("dX",),
            (grad_x,),
            lambda doubles=doubles: (reference.nmf_backward(*doubles),),
            case,
            operands,
            f"nmf_backward of {given}, {steps} steps",
        )
