"""What does it cost to find the factors on each image, beside the published code?

    python -m pytest benchmarks/bench_factorizers.py [-k "nmf and forward"]

From X to X' = Y Z by em and by nmf, with as many rounds as published. nmf is measured with its
one-step gradient to X, too; em has none. The published code computes no reconstruction error,
mfops's times include it. Baselines are checked against the reference before they are timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import mfops
from benchmarks import kernels
from benchmarks.kernels import (
    BOTH,
    DTYPES,
    FORWARD,
    LAYOUTS,
    Case,
    Op,
    Prepared,
    compiled,
    compiled_with_graphs,
    on_channels_last,
)
from benchmarks.measure import Bench, Measured, playback
from benchmarks.schema import (
    BEST,
    COMPILE,
    COMPILE_GRAPHS,
    COPY,
    EAGER,
    FACTORIZERS,
    NATIVE,
    TRITON,
)
from mfops import factorize_reconstruct, reference
from mfops.methods import METHODS

STEPS = {"em": 3, "nmf": 6}
PASSES = {"em": (FORWARD,), "nmf": (FORWARD, BOTH)}

CPU_SHAPES = [(4, 512, 64, 1089)]
GPU_SHAPES = [(16, 512, 64, 1089), (16, 512, 64, 4225)]
SMALL_SHAPES = [(2, 6, 3, 20)]
COMPILED = ("bfloat16", "contiguous")  # on a GPU, where one takes minutes
# Relative error (Frobenius) against the reference in float32, beyond which a baseline is not timed.
# An iteration too few moves Y by 3e-2 and more. float32: sums of up to 4225 terms, handed on from
# one to the next. bfloat16: lines that keep every factor and product in it, half of 2^-8 each time,
# reach 1.4e-2 with em, whose softmax takes the rounding of its logits as a factor.
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}
EPS = 1e-6


@dataclass(frozen=True)
class Problem(kernels.Problem):
    """And the method."""

    method: str

    def __str__(self) -> str:
        return f"{self.method}, {self.steps} rounds, {super().__str__()}"

    @property
    def steps(self) -> int:
        return STEPS[self.method]

    @property
    def has_gradient(self) -> bool:
        return BOTH in PASSES[self.method]

    def columns(self) -> dict[str, Any]:
        return {"method": self.method, "steps": self.steps, **super().columns()}

    def floor_bytes(self, which: str) -> int:
        """Backward needs X' no more than X: G', Y and the scale W of nmf's last update give dX."""
        batch, channels, rank, pixels = self.shape
        x, mse = self.x_bytes(), 4
        start, y = self.bytes(channels * rank), self.bytes(batch * channels * rank)
        w = self.bytes(batch * rank * pixels) if self.has_gradient else 0
        forward = (x + start) + (x + y + w + mse)
        backward = (x + y + w) + x
        return {FORWARD: forward, BOTH: forward + backward}[which]


def cases(device: str, small: bool) -> list[Case]:
    """All of them, those that targets speak of first."""
    shapes = SMALL_SHAPES if small else GPU_SHAPES if device == "cuda" else CPU_SHAPES
    return [
        Case(Problem(shape, dtype, layout, method), which)
        for dtype in DTYPES
        for layout in LAYOUTS
        for shape in shapes
        for method in STEPS
        for which in PASSES[method]
    ]


# The lines of the published code. X is (B, C, N), coefficients are (B, N, K) as they have them.


def em_textbook(x: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
    """EMANet's: X' and the bases."""
    y = y0.repeat(x.shape[0], 1, 1)
    with torch.no_grad():
        for _ in range(STEPS["em"]):
            z = torch.softmax(torch.bmm(x.permute(0, 2, 1), y), dim=2)
            weights = z / (EPS + z.sum(dim=1, keepdim=True))
            y = torch.bmm(x, weights)
            y = y / (EPS + y.norm(dim=1, keepdim=True))
    return torch.matmul(y, z.permute(0, 2, 1)), y


def nmf_textbook(x: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
    """Hamburger's, with its one-step gradient: X' and the bases."""
    y = y0.repeat(x.shape[0], 1, 1)

    def coefficients(z: Tensor) -> Tensor:
        numerator = torch.bmm(x.transpose(1, 2), y)
        denominator = z.bmm(y.transpose(1, 2).bmm(y))
        return z * numerator / (denominator + EPS)

    with torch.no_grad():
        z = torch.softmax(torch.bmm(x.transpose(1, 2), y), dim=-1)
        for _ in range(STEPS["nmf"]):
            z = coefficients(z)
            numerator = torch.bmm(x, z)
            denominator = y.bmm(z.transpose(1, 2).bmm(z))
            y = y * numerator / (denominator + EPS)
    z = coefficients(z)
    return torch.bmm(y, z.transpose(1, 2)), y


# The same optimized by hand: X' laid out as x is, no copies of the bases, what can be done to few
# bases is not done to many coefficients, and intermediate results are written over.


def product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (z @ y.mT).mT if on_channels_last(x) else y @ z.mT


def em_careful(x: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
    y = y0.expand(x.shape[0], -1, -1)
    with torch.no_grad():
        for _ in range(STEPS["em"]):
            z = torch.softmax(x.mT @ y, dim=-1)
            y = (x @ z).div_(z.sum(1, keepdim=True).add_(EPS))
            y = y.div_(torch.linalg.vector_norm(y, dim=1, keepdim=True).add_(EPS))
        return product(x, y, z), y


def nmf_careful(x: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
    y = y0.expand(x.shape[0], -1, -1)
    with torch.no_grad():
        z = torch.softmax(x.mT @ y, dim=-1)
        for _ in range(STEPS["nmf"]):
            z = (x.mT @ y).mul_(z).div_((z @ (y.mT @ y)).add_(EPS))
            y = (x @ z).mul_(y).div_((y @ (z.mT @ z)).add_(EPS))
        z_scale = z.div_((z @ (y.mT @ y)).add_(EPS))
    return product(x, y, (x.mT @ y) * z_scale), y


TEXTBOOK = {"em": em_textbook, "nmf": nmf_textbook}
CAREFUL = {"em": em_careful, "nmf": nmf_careful}


def on_backend(name: str, method: str) -> Op:
    def op(x: Tensor, y0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with mfops.use_backend(name):
            x_hat, mse, y = factorize_reconstruct(x, y0, method, STEPS[method])
        return x_hat, y, mse

    return op


def names(problem: Problem, device: str) -> list[str]:
    """The baselines in the cases of a problem, ours first."""
    found = [NATIVE, TRITON, EAGER, BEST]
    if device == "cpu" or (problem.dtype, problem.layout) == COMPILED:
        found.append(COMPILE)
    # The smallest kernels: where CUDA graphs have the best chance.
    if (problem.shape, problem.dtype, problem.layout) == (GPU_SHAPES[0], *COMPILED):
        found.append(COMPILE_GRAPHS)
    return [*found, COPY]


def ops(problem: Problem, device: str, small: bool) -> dict[str, Op]:
    careful = CAREFUL[problem.method]
    made: dict[str, Callable[[], Op]] = {
        NATIVE: lambda: on_backend("native", problem.method),
        TRITON: lambda: on_backend("triton", problem.method),
        EAGER: lambda: TEXTBOOK[problem.method],
        BEST: lambda: careful,
        COMPILE: lambda: careful if small else compiled(careful),
        COMPILE_GRAPHS: lambda: compiled_with_graphs(careful),
    }
    return {name: made[name]() for name in names(problem, device) if name != COPY}


@dataclass
class FactorizerInputs:
    """dX is that of X' alone: the published code has no error."""

    outputs: ClassVar = ("X'", "Y", "mse")

    problem: Problem
    x: Tensor
    y0: Tensor
    grad_x_hat: Tensor | None

    @property
    def grads(self) -> tuple[str, ...]:
        return () if self.grad_x_hat is None else ("dX",)

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y0

    def gradients(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.grad_x_hat is None:
            return ()
        return torch.autograd.grad(outputs[0], self.x, self.grad_x_hat)

    def expected(self) -> dict[str, Tensor]:
        x, y0 = self.x.detach().float(), self.y0.float()
        y, z, z_scale, x_hat, mse = reference.factorize_reconstruct(
            x, y0, self.problem.method, self.problem.steps
        )
        found = {"X'": x_hat, "Y": y, "mse": mse}
        if self.grad_x_hat is not None:
            upstream = self.grad_x_hat.float()
            found["dX"] = reference.nmf_backward(upstream, None, x, y, z, z_scale)
        return found


def make_inputs(problem: Problem, device: str) -> FactorizerInputs:
    """Standard normal features (nmf: their positive part, as behind a ReLU), bases as at first."""
    _, channels, rank, _ = problem.shape
    method = METHODS[problem.method]
    y0 = method.noise(channels, rank, device=torch.device(device))
    x = problem.features(device)
    return FactorizerInputs(
        problem=problem,
        x=(x.relu() if method.nonnegative else x).requires_grad_(),
        y0=y0.to(x.dtype),
        grad_x_hat=problem.features(device) if problem.has_gradient else None,
    )


@functools.lru_cache(maxsize=1)  # the passes over a problem follow each other
def prepare(problem: Problem, bench: Bench) -> Prepared:
    return kernels.prepare(problem, bench, make_inputs, ops, TOLERANCE)


def measure(case: Case, bench: Bench) -> Measured:
    return kernels.compare(FACTORIZERS, case, prepare(case.problem, bench), bench)


def baselines(case: Case, device: str) -> list[str]:
    return names(case.problem, device)


@pytest.mark.benchmark(**playback)
def test_factorizer(case: Case, baseline: str, play: Any) -> None:
    play(FACTORIZERS, case, baseline, measure)
