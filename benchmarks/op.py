"""What does the op cost on the CPU, beside the textbook lines and torch.compile?

    python -m benchmarks.op [--rounds 30] [--threads 2] [--output FILE]

Peak memory is the growth of the process's resident set over what it held before the call (inputs
and upstream gradients are held before), read from Linux's own high-water mark, in a round of its
own. `benchmarks.gpu` is the same question on a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import mfops
from benchmarks.harness import Op, Turn, WallClock, careful, provenance, ratio, take_turns, textbook

SHAPES = [(4, 2048, 64, 1089), (4, 512, 64, 4225)]
OURS = "mfops (native)"


def forward(op: Op, inputs: list[Tensor], upstream: list[Tensor]) -> object:
    with torch.no_grad():
        return op(*inputs)


def forward_backward(op: Op, inputs: list[Tensor], upstream: list[Tensor]) -> object:
    outputs = op(*inputs)
    torch.autograd.backward(outputs, upstream)
    return outputs


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory needs Linux")


def peak_mib(call: Callable[[], object]) -> float:
    """MiB by which the resident set grew at most during the call."""
    ctypes.CDLL(None).malloc_trim(0)  # memory freed but kept would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM") - before
    del result
    return peak


def measure(shape: tuple[int, int, int, int], run: Callable, rounds: int) -> list[str]:
    batch, channels, rank, pixels = shape
    torch.manual_seed(0)
    inputs = [
        torch.randn(size, requires_grad=True)
        for size in ((batch, channels, pixels), (channels, rank), (rank, pixels))
    ]
    upstream = [torch.randn(batch, channels, pixels), torch.ones(())]
    torch.compiler.reset()
    rivals: dict[str, Op] = {
        OURS: mfops.factorized_reconstruction,
        "textbook lines": textbook,
        "torch.compile": torch.compile(careful, mode="max-autotune-no-cudagraphs"),
    }

    def clear_gradients(number: int = 0) -> None:
        for tensor in inputs:
            tensor.grad = None

    def turn(op: Op) -> Turn:
        return Turn(clear_gradients, lambda _: run(op, inputs, upstream))

    memory = {}
    with mfops.use_backend("native"):
        seconds = take_turns({name: turn(op) for name, op in rivals.items()}, WallClock(), rounds)
        for name, op in rivals.items():
            clear_gradients()
            memory[name] = peak_mib(lambda op=op: run(op, inputs, upstream))
    rows = []
    for name in rivals:
        rows.append(
            f"| {shape} | {run.__name__.replace('_', ' + ')} | {name} "
            f"| {1e3 * statistics.median(seconds[name]):.1f} "
            f"| {ratio(seconds[name], seconds[OURS]):.2f} | {memory[name]:.0f} |"
        )
    return rows


def table(rounds: int) -> str:
    processor = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    of = provenance()
    lines = [
        f"{processor}, {torch.get_num_threads()} threads; torch {of['torch']}, mfops "
        f"{of['mfops']} ({of['commit']}), Python {of['python']}; {of['date']}; `{of['command']}`",
        "",
        "| (B, C, K, N), float32, shared factors | pass | op | ms | time / mfops | peak MiB |",
        "|---|---|---|---:|---:|---:|",
    ]
    for shape in SHAPES:
        for run in (forward, forward_backward):
            lines += measure(shape, run, rounds)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (30)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    text = table(arguments.rounds)
    print(text, end="")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
