"""What does the op cost, beside a copy, the textbook lines and torch.compile?

    python -m pytest benchmarks/bench_op.py [-k "forward and shared"]

A case is one pass over one problem; its baselines are checked against the reference before they
are timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mfops
from benchmarks import kernels
from benchmarks.kernels import (
    BACKWARD,
    BOTH,
    DTYPES,
    FORWARD,
    LAYOUTS,
    PASSES,
    Case,
    Op,
    Prepared,
    compiled,
    compiled_with_graphs,
    on_channels_last,
)
from benchmarks.measure import Bench, Measured, playback
from benchmarks.schema import BEST, COMPILE, COMPILE_GRAPHS, COPY, EAGER, NATIVE, OP, TRITON
from mfops import reference

CPU_SHAPES = [(4, 2048, 64, 1089), (4, 512, 64, 4225)]
GPU_SHAPES = [
    (4, 2048, 64, 1089),
    (16, 512, 64, 1089),
    (16, 512, 64, 4225),
    (8, 512, 64, 32768),
    (16, 256, 128, 16384),
    (2, 2048, 256, 4225),
]
BANDWIDTH_SHAPES = [(8, 512, 64, 32768), (16, 256, 128, 16384)]  # of a target, in bfloat16
SMALL_SHAPES = [(2, 6, 3, 20)]
FACTORS = ("per image", "shared")
COMPILED = ("bfloat16", "contiguous", "per image")  # on a GPU, where one takes up to a minute
# Relative error (Frobenius) against the float32 reference, beyond which a baseline is not timed:
# a few roundings of bfloat16 (2^-8 each); in float32 a sum of up to 10^6 terms.
TOLERANCE = {"bfloat16": 3e-2, "float32": 1e-3}


@dataclass(frozen=True)
class Problem(kernels.Problem):
    """And whose the factors are."""

    factors: str

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.factors}"

    @property
    def shared(self) -> bool:
        return self.factors == "shared"

    def columns(self) -> dict[str, Any]:
        return {**super().columns(), "factors": self.factors}

    def floor_bytes(self, which: str) -> int:
        batch, channels, rank, pixels = self.shape
        images = 1 if self.shared else batch
        x, mse = self.x_bytes(), 4
        x_hat = x // batch * images
        factors = self.bytes(images * rank * (channels + pixels))
        forward = x + factors + x_hat + mse
        backward = (x + factors + x + mse) + (x + factors)  # X, Y, Z, G', g; dX, dY, dZ
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[which]


def cases(device: str, small: bool) -> list[Case]:
    """All of them, those that targets speak of first: of bandwidth, then of factors per image."""
    shapes = SMALL_SHAPES if small else GPU_SHAPES if device == "cuda" else CPU_SHAPES
    found = [
        Case(Problem(shape, dtype, layout, factors), which)
        for factors in FACTORS
        for layout in LAYOUTS
        for dtype in DTYPES
        for shape in shapes
        for which in PASSES
    ]

    def later(case: Case) -> bool:
        problem = case.problem
        return problem.shape not in BANDWIDTH_SHAPES or problem.dtype != "bfloat16"

    return sorted(found, key=later)


def textbook(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The lines of the published code: X' of shared factors is copied for every image."""
    x_hat = y @ z
    if x_hat.dim() < x.dim():
        x_hat = x_hat.repeat(x.shape[0], 1, 1)
    return x_hat, F.mse_loss(x, x_hat)


def careful(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The same at its best, without the copies and with X' laid out as x is."""
    x_hat = ((z.mT @ y.mT).mT if on_channels_last(x) else y @ z).expand(x.shape)
    return x_hat, F.mse_loss(x, x_hat)


def on_backend(name: str) -> Op:
    def op(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        with mfops.use_backend(name):
            return mfops.factorized_reconstruction(x, y, z)

    return op


def names(problem: Problem, device: str) -> list[str]:
    """The baselines in the cases of a problem, ours first."""
    found = [NATIVE, TRITON, EAGER]
    if problem.shared or problem.layout == "channels_last":
        found.append(BEST)  # else it is the published one
    if device == "cpu" or (problem.dtype, problem.layout, problem.factors) == COMPILED:
        found.append(COMPILE)
    # CUDA graphs save launches, which the times leave out anyway, and copy every input that is
    # not where it was: measured where they have the best chance.
    if device == "cuda" and problem == Problem(GPU_SHAPES[0], *COMPILED):
        found.append(COMPILE_GRAPHS)
    return [*found, COPY]


def ops(problem: Problem, device: str, small: bool) -> dict[str, Op]:
    made: dict[str, Callable[[], Op]] = {
        NATIVE: lambda: on_backend("native"),
        TRITON: lambda: on_backend("triton"),
        EAGER: lambda: textbook,
        BEST: lambda: careful,
        COMPILE: lambda: careful if small else compiled(careful),
        COMPILE_GRAPHS: lambda: compiled_with_graphs(careful),
    }
    return {name: made[name]() for name in names(problem, device) if name != COPY}


@dataclass
class OpInputs:
    outputs: ClassVar = ("X'", "mse")
    grads: ClassVar = ("dX", "dY", "dZ")

    x: Tensor
    y: Tensor
    z: Tensor
    grad_x_hat: Tensor
    grad_mse: dict[torch.dtype, Tensor]  # by the dtype of mse: the textbook lines' is x's

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.y, self.z

    def gradients(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        upstream = self.grad_x_hat, self.grad_mse[outputs[1].dtype]
        return torch.autograd.grad(outputs, self.leaves, upstream)

    def expected(self) -> dict[str, Tensor]:
        exact = [t.detach().float() for t in self.leaves]
        upstream = self.grad_x_hat.float(), self.grad_mse[torch.float32]
        grads = reference.reconstruct_backward(*upstream, *exact, True, True, True)
        results = *reference.reconstruct(*exact), *grads
        return dict(zip((*self.outputs, *self.grads), results, strict=True))


def make_inputs(problem: Problem, device: str) -> OpInputs:
    batch, channels, rank, pixels = problem.shape
    dtype = getattr(torch, problem.dtype)
    images = () if problem.shared else (batch,)
    # Both terms of the gradients are then of one size.
    grad_mse = torch.tensor(batch * channels * pixels / 2, device=device)
    return OpInputs(
        x=problem.features(device).requires_grad_(),
        y=torch.randn(*images, channels, rank, device=device, dtype=dtype).requires_grad_(),
        z=torch.randn(*images, rank, pixels, device=device, dtype=dtype).requires_grad_(),
        grad_x_hat=problem.features(device),
        grad_mse={torch.float32: grad_mse, dtype: grad_mse.to(dtype)},
    )


@functools.lru_cache(maxsize=1)  # the passes over a problem follow each other
def prepare(problem: Problem, bench: Bench) -> Prepared:
    return kernels.prepare(problem, bench, make_inputs, ops, TOLERANCE)


def measure(case: Case, bench: Bench) -> Measured:
    return kernels.compare(OP, case, prepare(case.problem, bench), bench)


def baselines(case: Case, device: str) -> list[str]:
    return names(case.problem, device)


@pytest.mark.benchmark(**playback)
def test_op(case: Case, baseline: str, play: Any) -> None:
    play(OP, case, baseline, measure)
