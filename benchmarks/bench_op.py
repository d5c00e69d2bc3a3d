"""What does the op cost, beside a copy, the textbook lines and torch.compile?

    python -m pytest benchmarks/bench_op.py [-k "forward and shared"]

A figure is one pass over one case; its rivals are checked against the reference before they are
timed. What is counted in bytes, and why backward begins with a cold cache, is in README.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import mfops
from benchmarks.harness import Turn, first_line, take_turns, times
from benchmarks.measure import Bench, Measured, pairs, playback
from benchmarks.questions import BEST, COMPILE, COMPILE_GRAPHS, COPY, EAGER, NATIVE, OP, TRITON
from mfops import reference

FORWARD, BACKWARD, BOTH = PASSES = ("forward", "backward", "forward + backward")

CPU_SHAPES = [(4, 2048, 64, 1089), (4, 512, 64, 4225)]
GPU_SHAPES = [
    (4, 2048, 64, 1089),
    (16, 512, 64, 1089),
    (16, 512, 64, 4225),
    (8, 512, 64, 32768),
    (16, 256, 128, 16384),
    (2, 2048, 256, 4225),
]
SMALL_SHAPES = [(2, 6, 3, 20)]
DTYPES = {"cuda": ("bfloat16", "float32"), "cpu": ("float32",)}
LAYOUTS = ("contiguous", "channels_last")
FACTORS = ("per image", "shared")
COMPILED = ("bfloat16", "contiguous", "per image")  # on a GPU, where a case takes up to a minute
# Relative error (Frobenius) against the float32 reference, beyond which a rival is not timed: a few
# roundings of bfloat16 (2^-8 each); in float32 a sum of up to 10^6 terms.
TOLERANCE = {"bfloat16": 3e-2, "float32": 1e-3}

Op = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """(B, C, K, N), the dtype, the layout of X, whose factors."""

    shape: tuple[int, int, int, int]
    dtype: str
    layout: str
    factors: str

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} {self.layout}, {self.factors}"

    @property
    def shared(self) -> bool:
        return self.factors == "shared"

    def x_bytes(self) -> int:
        batch, channels, _, pixels = self.shape
        return batch * channels * pixels * getattr(torch, self.dtype).itemsize

    def floor_bytes(self, which: str) -> int:
        """Bytes that a pass has to move: each input read once, each output written once."""
        batch, channels, rank, pixels = self.shape
        images = 1 if self.shared else batch
        x, mse = self.x_bytes(), 4
        x_hat = x // batch * images
        factors = images * rank * (channels + pixels) * getattr(torch, self.dtype).itemsize
        forward = x + factors + x_hat + mse
        backward = (x + factors + x + mse) + (x + factors)  # X, Y, Z, G', g; dX, dY, dZ
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[which]


@dataclass(frozen=True)
class Figure:
    """One pass over a case."""

    case: Case
    which: str

    def __str__(self) -> str:
        return f"{self.case}: {self.which}"

    def columns(self) -> dict[str, Any]:
        case = self.case
        return {
            "shape": " ".join(map(str, case.shape)),
            "dtype": case.dtype,
            "layout": case.layout,
            "factors": case.factors,
            "pass": self.which,
        }


def figures(device: str, small: bool) -> list[Figure]:
    """All of them, those that most targets speak of first."""
    shapes = SMALL_SHAPES if small else GPU_SHAPES if device == "cuda" else CPU_SHAPES
    return [
        Figure(Case(shape, dtype, layout, factors), which)
        for factors in FACTORS
        for layout in LAYOUTS
        for dtype in DTYPES[device]
        for shape in shapes
        for which in PASSES
    ]


def textbook(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The lines of the published code: X' of shared factors is copied for every image."""
    x_hat = y @ z
    if x_hat.dim() < x.dim():
        x_hat = x_hat.repeat(x.shape[0], 1, 1)
    return x_hat, F.mse_loss(x, x_hat)


def careful(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The same at its best, without the copies and with X' laid out as x is."""
    channels_last = x.stride(-1) != 1 and x.stride(-2) == 1
    x_hat = ((z.mT @ y.mT).mT if channels_last else y @ z).expand(x.shape)
    return x_hat, F.mse_loss(x, x_hat)


def on_backend(name: str) -> Op:
    def op(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        with mfops.use_backend(name):
            return mfops.factorized_reconstruction(x, y, z)

    return op


def compiled_with_graphs() -> Op:
    compiled = torch.compile(careful, mode="max-autotune", dynamic=False)

    def op(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x, y, z)

    return op


def names(case: Case, device: str) -> list[str]:
    """The rivals in the figures of a case, ours first."""
    found = [NATIVE, TRITON, EAGER]
    if case.shared or case.layout == "channels_last":
        found.append(BEST)  # else it is the published one
    if device == "cpu" or (case.dtype, case.layout, case.factors) == COMPILED:
        found.append(COMPILE)
    # CUDA graphs save launches, which the figures leave out anyway, and copy every input that is
    # not where it was: measured where they have the best chance.
    if case == Case(GPU_SHAPES[0], "bfloat16", "contiguous", "per image"):
        found.append(COMPILE_GRAPHS)
    return [*found, COPY]


def ops(case: Case, device: str, small: bool) -> dict[str, Op]:
    made: dict[str, Callable[[], Op]] = {
        NATIVE: lambda: on_backend("native"),
        TRITON: lambda: on_backend("triton"),
        EAGER: lambda: textbook,
        BEST: lambda: careful,
        COMPILE: lambda: torch.compile(careful, mode="max-autotune-no-cudagraphs", dynamic=False),
        COMPILE_GRAPHS: compiled_with_graphs,
    }
    return {name: careful if small and name == COMPILE else made[name]()
            for name in names(case, device) if name != COPY}  # fmt: skip


@dataclass
class Inputs:
    x: Tensor
    y: Tensor
    z: Tensor
    grad_x_hat: Tensor
    grad_mse: dict[torch.dtype, Tensor]  # by the dtype of mse: the textbook lines' is x's

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.y, self.z


def make_inputs(case: Case, device: str) -> Inputs:
    batch, channels, rank, pixels = case.shape
    dtype = getattr(torch, case.dtype)
    images = () if case.shared else (batch,)

    def features() -> Tensor:
        if case.layout == "channels_last":
            return torch.randn(batch, pixels, channels, device=device, dtype=dtype).mT
        return torch.randn(batch, channels, pixels, device=device, dtype=dtype)

    # Both terms of the gradients are then of one size.
    grad_mse = torch.tensor(batch * channels * pixels / 2, device=device)
    return Inputs(
        x=features().requires_grad_(),
        y=torch.randn(*images, channels, rank, device=device, dtype=dtype).requires_grad_(),
        z=torch.randn(*images, rank, pixels, device=device, dtype=dtype).requires_grad_(),
        grad_x_hat=features(),
        grad_mse={torch.float32: grad_mse, dtype: grad_mse.to(dtype)},
    )


def gradients(outputs: tuple[Tensor, Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    upstream = inputs.grad_x_hat, inputs.grad_mse[outputs[1].dtype]
    return torch.autograd.grad(outputs, inputs.leaves, upstream)


def expected_results(inputs: Inputs) -> tuple[Tensor, ...]:
    exact = [t.detach().float() for t in inputs.leaves]
    x_hat, mse = reference.reconstruct(*exact)
    upstream = inputs.grad_x_hat.float(), inputs.grad_mse[torch.float32]
    grads = reference.reconstruct_backward(*upstream, *exact, True, True, True)
    return x_hat, mse, *grads


def relative_error(value: Tensor, exact: Tensor) -> float:
    exact = exact.expand(value.shape)  # X' of shared factors
    return ((value.float() - exact).norm() / exact.norm()).item()


def assert_right(op: Op, inputs: Inputs, expected: tuple[Tensor, ...], tolerance: float) -> None:
    """One forward and backward pass: what is timed is what was asked for."""
    outputs = op(*inputs.leaves)
    results = *outputs, *gradients(outputs, inputs)
    for name, value, exact in zip(("X'", "mse", "dX", "dY", "dZ"), results, expected, strict=True):
        error = relative_error(value.detach(), exact)
        if not error <= tolerance:
            raise RuntimeError(f"{name} is wrong: relative error {error:.3g}")


class MovedBytes(TorchDispatchMode):
    """Bytes of every operator's tensors: each read or written once by each operator.

    A view moves nothing, an expanded tensor is as large as its memory. What an operator reads
    again inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total += storage_bytes([args, kwargs]) + storage_bytes(result)
        return result


def storage_bytes(tree: Any) -> int:
    """Memory behind the tensors, what they share counted once."""
    sizes: dict[int, int] = {}
    for tensor in tree_leaves(tree):
        if isinstance(tensor, Tensor):
            elements = 1
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                elements *= size if stride else min(size, 1)
            own = elements * tensor.element_size()
            sizes[tensor.data_ptr()] = max(own, sizes.get(tensor.data_ptr(), 0))
    return sum(sizes.values())


@dataclass
class Prepared:
    """A case's rotating inputs, the rivals that are right, and why others take no part."""

    sets: list[Inputs]
    ops: dict[str, Op]
    skipped: dict[str, str]


@functools.lru_cache(maxsize=1)  # the passes over one case follow each other
def prepare(case: Case, bench: Bench) -> Prepared:
    torch.manual_seed(0)
    torch.compiler.reset()
    machine = bench.machine
    sets = [make_inputs(case, machine.device)]
    size = storage_bytes(sets[0].leaves)
    while len(sets) < (2 if bench.small else machine.sets(size)):
        sets.append(make_inputs(case, machine.device))
    expected = expected_results(sets[0])
    right, skipped = {}, {}
    for name, op in ops(case, machine.device, bench.small).items():
        try:
            assert_right(op, sets[0], expected, TOLERANCE[case.dtype])
            right[name] = op
        except Exception as error:  # a rival that breaks must not take the others with it
            unavailable = "cannot run this call" in str(error)
            skipped[name] = str(error) if unavailable else f"failed: {first_line(error)}"
    return Prepared(sets, right, skipped)


def turn(op: Op, which: str, sets: list[Inputs], empty_cache: Callable[[], None]) -> Turn:
    """A pass over rotating inputs; backward the cache is emptied of what forward left there."""

    def pick(number: int) -> Inputs:
        return sets[number % len(sets)]

    def after_forward(number: int) -> tuple[tuple[Tensor, Tensor], Inputs]:
        inputs = pick(number)
        outputs = op(*inputs.leaves)
        empty_cache()
        return outputs, inputs

    def both(inputs: Inputs) -> object:
        outputs = op(*inputs.leaves)
        return outputs, gradients(outputs, inputs)

    prepare, run = {
        FORWARD: (pick, lambda inputs: op(*inputs.leaves)),
        BACKWARD: (after_forward, lambda state: gradients(*state)),
        BOTH: (pick, both),
    }[which]
    return Turn(prepare, run)


def dropping(turn: Turn) -> Turn:
    """The same, for results in memory that the next call takes back."""

    def run(state: Any) -> None:
        turn.run(state)

    return Turn(turn.prepare, run)


def copy_turn(size: int, number_of_sets: int, device: str) -> Turn:
    """Moves `size` bytes, half of them read and half written, from one tensor to another."""
    source = torch.empty(number_of_sets, size // 2, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return Turn(lambda number: number % number_of_sets, lambda i: target[i].copy_(source[i]))


def moved_bytes(turn: Turn) -> int:
    """Bytes the operators of one call move (`MovedBytes`)."""
    state = turn.prepare(0)
    with MovedBytes() as moved:
        turn.run(state)
    return moved.total


def memory(turn: Turn, bench: Bench) -> dict[str, int]:
    """Peak memory of one call, and what of it is neither results nor gradients."""
    state = turn.prepare(0)
    kept: list[Any] = []
    peak = bench.machine.peak_bytes(lambda: kept.append(turn.run(state)))
    return {"peak_bytes": peak, "extra_bytes": max(0, peak - storage_bytes(kept))}


def measure(figure: Figure, bench: Bench) -> Measured:
    case, which, machine = figure.case, figure.which, bench.machine
    ready = prepare(case, bench)
    turns = {}
    for name, op in ready.ops.items():
        own = turn(op, which, ready.sets, machine.empty_cache)
        turns[name] = dropping(own) if name == COMPILE_GRAPHS else own
    turns[COPY] = copy_turn(case.floor_bytes(which), len(ready.sets), machine.device)
    clock = machine.clock()
    seconds = take_turns(turns, clock, bench.effort, keep=len(ready.sets))

    shared = {"x_bytes": case.x_bytes(), "floor_bytes": case.floor_bytes(which)}
    state = turns[EAGER].prepare(0)
    with FlopCounterMode(display=False) as counted:
        turns[EAGER].run(state)
    rows = [
        {
            **figure.columns(),
            "rival": name,
            **times(seconds, name, OP.bases),
            "late": clock.late,
            **shared,
        }
        for name in turns
    ]
    for row in rows:
        name = row["rival"]
        if name == COPY:
            continue
        row["flops"] = counted.get_total_flops()
        if name != COMPILE_GRAPHS:
            row |= memory(turns[name], bench)
        if not name.startswith("compile") or bench.small:
            row["moved_bytes"] = moved_bytes(turns[name])
    rows += [
        {**figure.columns(), "rival": name, "skipped": why} for name, why in ready.skipped.items()
    ]
    return Measured(rows, seconds)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    found = figures(options.device, options.small)
    cases = pairs(found, lambda figure: names(figure.case, options.device))
    metafunc.parametrize(("figure", "rival"), cases, ids=str)


@pytest.mark.benchmark(**playback)
def test_op(figure: Figure, rival: str, play: Any) -> None:
    play(OP, figure, rival, measure)
