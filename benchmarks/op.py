"""What does the op cost on the CPU, beside the textbook lines and torch.compile?

    python -m benchmarks.op [--rounds 30] [--threads 2] [--output FILE]

Rivals take turns, one call each per round, so that a machine that speeds up or slows down does so
for all of them. Times are medians; the ratios are medians of the ratios within a round. Peak
memory is the growth of the process's resident set over what it held before the call (inputs and
upstream gradients are held before), read from Linux's own high-water mark, in a round of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import mfops

SHAPES = [(4, 2048, 64, 1089), (4, 512, 64, 4225)]
WARM_UP = 3
Op = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def textbook(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The lines of the published code."""
    x_hat = (y @ z).repeat(x.shape[0], 1, 1)
    return x_hat, F.mse_loss(x, x_hat)


def expanded(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The same without the copies: what torch.compile is given."""
    x_hat = (y @ z).expand(x.shape[0], -1, -1)
    return x_hat, F.mse_loss(x, x_hat)


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
        "mfops (native)": mfops.factorized_reconstruction,
        "textbook lines": textbook,
        "torch.compile": torch.compile(expanded, mode="max-autotune-no-cudagraphs"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    memory = {}

    def call(op: Op) -> object:
        for tensor in inputs:
            tensor.grad = None
        return run(op, inputs, upstream)

    with mfops.use_backend("native"):
        for i in range(WARM_UP + rounds):
            for name, op in rivals.items():
                start = time.perf_counter()
                result = call(op)
                elapsed = time.perf_counter() - start
                del result
                if i >= WARM_UP:
                    seconds[name].append(elapsed)
        for name, op in rivals.items():
            for tensor in inputs:
                tensor.grad = None
            memory[name] = peak_mib(lambda op=op: call(op))
    ours = seconds["mfops (native)"]
    rows = []
    for name in rivals:
        ratio = statistics.median(s / o for s, o in zip(seconds[name], ours, strict=True))
        rows.append(
            f"| {shape} | {run.__name__.replace('_', ' + ')} | {name} "
            f"| {1e3 * statistics.median(seconds[name]):.1f} | {ratio:.2f} | {memory[name]:.0f} |"
        )
    return rows


def table(rounds: int) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    processor = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    lines = [
        f"{processor}, {torch.get_num_threads()} threads; torch {torch.__version__}, mfops "
        f"{mfops.__version__} ({commit or 'no commit'}), Python {platform.python_version()}; "
        f"{datetime.date.today()}; `python -m benchmarks.op {' '.join(sys.argv[1:])}`".rstrip(),
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
