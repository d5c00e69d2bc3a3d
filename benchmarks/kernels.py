"""What benchmarks of operations share: problems, baselines that are right, bytes, memory, rows.

Such a benchmark names its problems and its baselines and makes their inputs; `compare` does the
rest. What is counted in bytes, and why backward begins with a cold cache, is in README.md.
"""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import Call, why_not
from benchmarks.measure import Bench, Measured, time_calls
from benchmarks.schema import COMPILE, COMPILE_GRAPHS, COPY, EAGER, Benchmark
from mfnet.flops import call_flops

FORWARD, BACKWARD, BOTH = PASSES = ("forward", "backward", "forward + backward")
LAYOUTS = ("contiguous", "channels_last")
DTYPES = ("bfloat16", "float32")
MEMORY_CALLS = 7

Op = Callable[..., tuple[Tensor, ...]]  # of the leaves of inputs


@dataclass(frozen=True)
class Problem(ABC):
    """(B, C, K, N), the dtype, the layout of X; what else there is belongs to a subclass."""

    shape: tuple[int, int, int, int]
    dtype: str
    layout: str

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} {self.layout}"

    def columns(self) -> dict[str, Any]:
        """What a row says of the problem."""
        shape = " ".join(map(str, self.shape))
        return {"shape": shape, "dtype": self.dtype, "layout": self.layout}

    def bytes(self, *elements: int) -> int:
        """Of so many elements in the problem's dtype."""
        return sum(elements) * getattr(torch, self.dtype).itemsize

    def x_bytes(self) -> int:
        batch, channels, _, pixels = self.shape
        return self.bytes(batch * channels * pixels)

    @abstractmethod
    def floor_bytes(self, which: str) -> int:
        """Bytes that a pass has to move: each input read once, each output written once."""

    def features(self, device: str) -> Tensor:
        """Standard normal, of X's shape, dtype and layout."""
        batch, channels, _, pixels = self.shape
        dtype = getattr(torch, self.dtype)
        if self.layout == "channels_last":
            return torch.randn(batch, pixels, channels, device=device, dtype=dtype).mT
        return torch.randn(batch, channels, pixels, device=device, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One pass over a problem."""

    problem: Problem
    which: str

    def __str__(self) -> str:
        return f"{self.problem}: {self.which}"

    def columns(self) -> dict[str, Any]:
        return {**self.problem.columns(), "pass": self.which}


class Inputs(Protocol):
    """What a pass takes, and the names of what an op gives: first outputs, then gradients."""

    outputs: ClassVar[tuple[str, ...]]

    @property
    def grads(self) -> tuple[str, ...]: ...

    @property
    def leaves(self) -> tuple[Tensor, ...]: ...

    def gradients(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]: ...

    def expected(self) -> dict[str, Tensor]: ...  # by the reference in float32


def on_channels_last(x: Tensor) -> bool:
    return x.stride(-1) != 1 and x.stride(-2) == 1


# Baselines under torch.compile.


def compiled(op: Op) -> Op:
    return torch.compile(op, mode="max-autotune-no-cudagraphs", dynamic=False)


def compiled_with_graphs(op: Op) -> Op:
    graphs = torch.compile(op, mode="max-autotune", dynamic=False)

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return graphs(*leaves)

    return run


def taking_part(baselines: Iterable[str], compiles: bool) -> list[str]:
    """All of them, or without torch.compile's."""
    return [name for name in baselines if compiles or name not in (COMPILE, COMPILE_GRAPHS)]


# What is timed is what was asked for.


def relative_error(value: Tensor, exact: Tensor) -> float:
    exact = exact.expand(value.shape)  # X' of shared factors
    return ((value.float() - exact).norm() / exact.norm()).item()


def assert_right(op: Op, inputs: Inputs, expected: dict[str, Tensor], tolerance: float) -> None:
    """One forward and backward pass against the results expected, by relative error (Frobenius).

    An op may leave out the last of the outputs.
    """
    outputs = op(*inputs.leaves)
    results = dict(zip(inputs.outputs, outputs, strict=False))
    results |= zip(inputs.grads, inputs.gradients(outputs), strict=True)
    for name, value in results.items():
        error = relative_error(value.detach(), expected[name])
        if not error <= tolerance:
            raise RuntimeError(f"{name} is wrong: relative error {error:.3g}")


@dataclass
class Prepared:
    """A problem's rotating inputs, the baselines that are right, and why others take no part."""

    sets: list[Inputs]
    ops: dict[str, Op]
    skipped: dict[str, str]


def prepare(
    problem: Problem,
    bench: Bench,
    make_inputs: Callable[[Any, str], Inputs],
    ops: Callable[[Any, str, bool], dict[str, Op]],
    tolerance: dict[str, float],
) -> Prepared:
    """`make_inputs(problem, device)`, `ops(problem, device, small)`, relative errors by dtype."""
    torch.manual_seed(0)
    torch.compiler.reset()
    device = bench.machine.device
    sets = [make_inputs(problem, device)]
    size = storage_bytes(sets[0].leaves)
    while len(sets) < bench.machine.sets(size):
        sets.append(make_inputs(problem, device))
    expected = sets[0].expected()
    right, skipped = {}, {}
    made = ops(problem, device, bench.small)
    for name in taking_part(made, bench.compiles):
        op = made[name]
        try:
            assert_right(op, sets[0], expected, tolerance[problem.dtype])
            right[name] = op
        except Exception as error:  # a baseline that breaks must not take the others with it
            skipped[name] = why_not(error)
    return Prepared(sets, right, skipped)


# What ends a batched `@` is a view, too, though torch does not say so.
UNSAFE_VIEW = torch.ops.aten._unsafe_view.default


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
        if not func.is_view and func is not UNSAFE_VIEW:
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


def call_of(op: Op, which: str, sets: list[Inputs], empty_cache: Callable[[], None]) -> Call:
    """A pass over rotating inputs; backward the cache is emptied of what forward left there."""

    def pick(number: int) -> Inputs:
        return sets[number % len(sets)]

    def after_forward(number: int) -> tuple[tuple[Tensor, ...], Inputs]:
        inputs = pick(number)
        outputs = op(*inputs.leaves)
        empty_cache()
        return outputs, inputs

    def both(inputs: Inputs) -> object:
        outputs = op(*inputs.leaves)
        return outputs, inputs.gradients(outputs)

    prepare, run = {
        FORWARD: (pick, lambda inputs: op(*inputs.leaves)),
        BACKWARD: (after_forward, lambda state: state[1].gradients(state[0])),
        BOTH: (pick, both),
    }[which]
    return Call(prepare, run)


def dropping(call: Call) -> Call:
    """The same, for results in memory that the next call takes back."""

    def run(state: Any) -> None:
        call.run(state)

    return Call(call.prepare, run)


def copy_call(size: int, number_of_sets: int, device: str) -> Call:
    """Moves `size` bytes, half of them read and half written, from one tensor to another."""
    source = torch.empty(number_of_sets, size // 2, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return Call(lambda number: number % number_of_sets, lambda i: target[i].copy_(source[i]))


def moved_bytes(call: Call) -> int:
    """Bytes the operators of one call move (`MovedBytes`)."""
    state = call.prepare(0)
    with MovedBytes() as moved:
        call.run(state)
    return moved.total


def memory(call: Call, bench: Bench) -> dict[str, int]:
    """Peak memory of a call, and what of it is neither results nor gradients.

    The median of several calls: on a CPU it depends on what the heap happens to hold.
    """

    def one(number: int) -> tuple[int, int]:
        state = call.prepare(number)
        kept: list[Any] = []
        peak = bench.machine.peak_bytes(lambda: kept.append(call.run(state)))
        return peak, max(0, peak - storage_bytes(kept))

    calls = [one(number) for number in range(1 if bench.small else MEMORY_CALLS)]
    peak, extra = (int(statistics.median(column)) for column in zip(*calls, strict=True))
    return {"peak_bytes": peak, "extra_bytes": extra}


def compare(benchmark: Benchmark, case: Case, ready: Prepared, bench: Bench) -> Measured:
    """The rows of a case: the baselines that are right, and a copy of as many bytes as it moves."""
    problem, which, machine = case.problem, case.which, bench.machine
    calls = {}
    for name, op in ready.ops.items():
        own = call_of(op, which, ready.sets, machine.empty_cache)
        calls[name] = dropping(own) if name == COMPILE_GRAPHS else own
    calls[COPY] = copy_call(problem.floor_bytes(which), len(ready.sets), machine.device)
    found = time_calls(benchmark, case.columns(), calls, bench, keep=len(ready.sets))
    plainest = EAGER if EAGER in calls else next(iter(calls))
    state = calls[plainest].prepare(0)
    flops = call_flops(lambda: calls[plainest].run(state))
    for row in found.rows:
        name = row["baseline"]
        row |= {"x_bytes": problem.x_bytes(), "floor_bytes": problem.floor_bytes(which)}
        if name == COPY:
            continue
        row["flops"] = flops
        if name != COMPILE_GRAPHS:
            row |= memory(calls[name], bench)
        if not name.startswith("compile") or bench.small:
            row["moved_bytes"] = moved_bytes(calls[name])
    found.rows += [
        {**case.columns(), "baseline": name, "skipped": why} for name, why in ready.skipped.items()
    ]
    return found
