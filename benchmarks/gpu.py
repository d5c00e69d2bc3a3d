"""What does the op cost on a GPU, beside a copy, torch.compile and the textbook lines?

    python -m benchmarks.gpu [--only TEXT] [--compile-all] [--budget SECONDS] [--output FOLDER]

Writes op.json and op.md into benchmarks/results/<gpu>/, after every case, so that a run that is
ended leaves what it has. docs/gpu.md says how the figures are taken. `--device cpu` tries the
program out on small shapes where there is no GPU: what it prints are no figures.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mfops
from benchmarks import figures
from benchmarks.figures import (
    BACKWARD,
    BOTH,
    COPY,
    EAGER,
    FORWARD,
    MFOPS,
    NATIVE,
    PASSES,
    TRITON,
    Cell,
    Result,
)
from benchmarks.harness import (
    ROOT,
    Op,
    Turn,
    WallClock,
    careful,
    ratio,
    spread,
    take_turns,
    textbook,
)
from benchmarks.machine import Machine, clocks, environment, folder_name
from mfops import reference

RESULTS = ROOT / "benchmarks" / "results"
TRIAL = "TRIAL RUN ON THE CPU: wall-clock times of small shapes, no figures"
TRIAL_SHAPES = [(2, 24, 4, 33), (2, 16, 8, 50)]
COMPILED = ("bfloat16", "contiguous", "per image")  # compiling a case takes up to a minute
COMPILE_SHARE = 0.7  # of the budget: later torch.compile is left out
HOST_SHAPE = (2, 64, 16, 100)
HOST_CALLS = 20  # between two synchronizations: far fewer than the launch queue holds
# Relative error (Frobenius) against the float32 reference, beyond which a rival is not timed: a few
# roundings of bfloat16 (2^-8 each); in float32 a sum of up to 10^6 terms.
TOLERANCE = {"bfloat16": 3e-2, "float32": 1e-3}


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


@dataclass(frozen=True)
class Rival:
    """`keep` is False where results live in memory that the next call takes back."""

    op: Op
    keep: bool = True


def make_inputs(cell: Cell, device: str) -> Inputs:
    batch, channels, rank, pixels = cell.shape
    dtype = getattr(torch, cell.dtype)
    images = () if cell.shared else (batch,)

    def features() -> Tensor:
        if cell.layout == "channels_last":
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


def rivals_of(cell: Cell, compile_too: bool) -> dict[str, Rival]:
    rivals = {NATIVE: Rival(on_backend("native")), TRITON: Rival(on_backend("triton"))}
    rivals[EAGER] = Rival(textbook)
    if cell.shared or cell.layout == "channels_last":
        rivals[f"{EAGER}, at its best"] = Rival(careful)
    if compile_too:
        compiled = torch.compile(careful, mode="max-autotune-no-cudagraphs", dynamic=False)
        rivals["compile, max-autotune-no-cudagraphs"] = Rival(compiled)
        # CUDA graphs save launches, which the figures leave out anyway, and copy every input that
        # is not where it was: measured once, where they have the best chance.
        if cell == Cell(figures.SHAPES[0], *COMPILED):
            rivals["compile, max-autotune"] = Rival(compiled_with_graphs(), keep=False)
    return rivals


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


def expected_results(cell: Cell, inputs: Inputs) -> tuple[Tensor, ...]:
    exact = [t.detach().float() for t in inputs.leaves]
    x_hat, mse = reference.reconstruct(*exact)
    upstream = inputs.grad_x_hat.float(), inputs.grad_mse[torch.float32]
    grads = reference.reconstruct_backward(*upstream, *exact, True, True, True)
    return x_hat, mse, *grads


def turn(rival: Rival, which: str, sets: list[Inputs], machine: Machine) -> Turn:
    """A pass over rotating inputs; backward the cache is emptied of what forward left there."""

    def pick(number: int) -> Inputs:
        return sets[number % len(sets)]

    def after_forward(number: int) -> tuple[tuple[Tensor, Tensor], Inputs]:
        inputs = pick(number)
        outputs = rival.op(*inputs.leaves)
        machine.empty_cache()
        return outputs, inputs

    def both(inputs: Inputs) -> object:
        outputs = rival.op(*inputs.leaves)
        return outputs, gradients(outputs, inputs)

    prepare, run = {
        FORWARD: (pick, lambda inputs: rival.op(*inputs.leaves)),
        BACKWARD: (after_forward, lambda state: gradients(*state)),
        BOTH: (pick, both),
    }[which]

    def run_and_drop(state: Any) -> None:
        run(state)

    return Turn(prepare, run if rival.keep else run_and_drop)


def copy_turn(size: int, number_of_sets: int, device: str) -> Turn:
    """Moves `size` bytes, half of them read and half written, from one tensor to another."""
    source = torch.empty(number_of_sets, size // 2, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return Turn(lambda number: number % number_of_sets, lambda i: target[i].copy_(source[i]))


def storage_bytes(tensors: tuple[Tensor, ...]) -> int:
    """Memory behind the tensors, that of an expanded one counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def extra_memory(op: Op, inputs: Inputs) -> dict[str, int]:
    """Bytes asked of torch's allocator at most, beyond inputs, outputs and gradients."""

    def requested(kind: str) -> int:
        return torch.cuda.memory_stats()[f"requested_bytes.all.{kind}"]

    torch.cuda.reset_peak_memory_stats()
    before = requested("current")
    outputs = op(*inputs.leaves)
    forward = requested("peak") - before - storage_bytes(outputs)
    grads = gradients(outputs, inputs)
    both = requested("peak") - before - storage_bytes((*outputs, *grads))
    return {FORWARD: forward, BOTH: both}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def measure_cell(
    cell: Cell, machine: Machine, rounds: int, compile_too: bool
) -> tuple[list[Result], dict[str, str], dict[str, float]]:
    """Results of the three passes, failures by rival, seconds of first calls that compile."""
    torch.manual_seed(0)
    torch.compiler.reset()
    sets = [make_inputs(cell, machine.device)]
    size = sum(t.numel() * t.element_size() for t in sets[0].leaves)
    while len(sets) < max(2, math.ceil(machine.past_cache / size)):
        sets.append(make_inputs(cell, machine.device))

    expected = expected_results(cell, sets[0])
    rivals, unavailable, failed, first_call, extra = {}, {}, {}, {}, {}
    for name, rival in rivals_of(cell, compile_too).items():
        start = time.perf_counter()
        try:
            assert_right(rival.op, sets[0], expected, TOLERANCE[cell.dtype])
            if machine.cuda and rival.keep:
                extra[name] = extra_memory(rival.op, sets[0])
        except RuntimeError as error:
            if "cannot run this call" in str(error):
                unavailable[name] = str(error)
            else:
                failed[name] = first_line(error)
        except Exception as error:
            failed[name] = first_line(error)
        else:
            rivals[name] = rival
        if name.startswith((figures.COMPILE, TRITON)):
            first_call[f"{name}, {cell}"] = round(time.perf_counter() - start, 1)
    del expected

    base = next((name for name in (NATIVE, TRITON) if name in rivals), None)
    results = []
    for which in PASSES:
        turns = {COPY: copy_turn(cell.counted_bytes(which), len(sets), machine.device)}
        turns |= {name: turn(rival, which, sets, machine) for name, rival in rivals.items()}
        seconds = take_turns(turns, machine.clock, rounds, keep=len(sets))
        results.append(
            Result(
                cell,
                which,
                seconds={name: statistics.median(s) for name, s in seconds.items()},
                spread={name: spread(s) for name, s in seconds.items()},
                of_copy={name: ratio(seconds[COPY], s) for name, s in seconds.items()},
                over_base={
                    name: ratio(s, seconds[base]) for name, s in seconds.items() if base is not None
                },
                base=base,
                extra_bytes={name: e[which] for name, e in extra.items() if which in e},
                not_measured=unavailable | failed,
            )
        )
        del turns
    return results, failed, first_call


def host_times(machine: Machine, rounds: int) -> dict[str, Any]:
    """Microseconds from call to return, while the queue of launches is short."""
    cell = Cell(HOST_SHAPE, "float32", "contiguous", "per image")
    inputs = make_inputs(cell, machine.device)
    ops: dict[str, Op] = {EAGER: textbook}
    for name, op in ((MFOPS, mfops.factorized_reconstruction), (TRITON, on_backend("triton"))):
        with contextlib.suppress(Exception):  # measure_cell says why it does not run
            op(*inputs.leaves)
            ops[name] = op

    def calls(op: Op, leaves: tuple[Tensor, ...]) -> None:
        for _ in range(HOST_CALLS):
            op(*leaves)

    microseconds, over_textbook = {}, {}
    for mode, leaves in {
        "no gradients": tuple(t.detach() for t in inputs.leaves),
        "gradients wanted": inputs.leaves,
    }.items():
        turns = {
            name: Turn(
                lambda _: machine.synchronize(),
                lambda _, op=op, leaves=leaves: calls(op, leaves),
            )
            for name, op in ops.items()
        }
        seconds = take_turns(turns, WallClock(), rounds)
        microseconds[mode] = {
            name: 1e6 * statistics.median(s) / HOST_CALLS for name, s in seconds.items()
        }
        over_textbook[mode] = {name: ratio(s, seconds[EAGER]) for name, s in seconds.items()}
    return {
        "shape": HOST_SHAPE,
        "dtype": cell.dtype,
        "microseconds": microseconds,
        "over_textbook": over_textbook,
    }


def write(folder: Path, report: dict[str, Any], results: list[Result]) -> None:
    found = figures.targets(results, report["host"]["over_textbook"])
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        **report,
        "targets": [dataclasses.asdict(t) for t in found],
        "results": [
            dataclasses.asdict(r) | {"counted_bytes": r.cell.counted_bytes(r.which)}
            for r in results
        ],
    }
    (folder / "op.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "op.md").write_text(figures.markdown(report, results, found))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has TEXT")
    parser.add_argument(
        "--compile-all",
        action="store_true",
        help="torch.compile everywhere, not only for bfloat16, contiguous, per-image factors",
    )
    parser.add_argument("--rounds", type=int, default=25, help="timed rounds (25)")
    parser.add_argument(
        "--budget", type=float, default=240, help="seconds after which no case begins (240)"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for op.json and op.md (--only, --device cpu: none)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("no CUDA device")
        if parsed.output is None and not parsed.only:
            parsed.output = RESULTS / folder_name(torch.cuda.get_device_name())
    elif parsed.output is not None and parsed.output.resolve().is_relative_to(RESULTS):
        parser.error("a trial on the CPU gives no figures for benchmarks/results")
    return parsed


def measure_all(
    options: argparse.Namespace, machine: Machine, report: dict[str, Any]
) -> list[Result]:
    """Every case that was asked for and is begun in time; enters the rest into the report."""
    start = time.perf_counter()
    results: list[Result] = []
    usable = True

    def left_out(kind: str, what: str, cell: Cell) -> None:
        report[kind].setdefault(what, []).append(str(cell))

    for cell in figures.cells(figures.SHAPES if machine.cuda else TRIAL_SHAPES):
        if options.only not in str(cell):
            continue
        elapsed = time.perf_counter() - start
        if not usable or elapsed > options.budget:
            why = f"--budget {options.budget:.0f} was used up" if usable else "the GPU broke down"
            left_out("not_measured", f"everything: {why}", cell)
            continue
        compile_too = options.compile_all or (cell.dtype, cell.layout, cell.factors) == COMPILED
        if compile_too and elapsed > COMPILE_SHARE * options.budget:
            compile_too = False
            why = f"{COMPILE_SHARE:.0%} of --budget {options.budget:.0f} were used up"
            left_out("not_measured", f"torch.compile: {why}", cell)
        try:
            new, failed, seconds = measure_cell(cell, machine, options.rounds, compile_too)
        except Exception as error:
            left_out("failed", f"everything: {first_line(error)}", cell)
            print(f"{cell} FAILED: {first_line(error)}", flush=True)
            usable = machine.release()
            continue
        usable = machine.release()
        results += new
        report["first_call_seconds"] |= seconds
        for name, why in new[0].not_measured.items():
            left_out("failed" if name in failed else "not_measured", f"{name}: {why}", cell)
        print(f"{time.perf_counter() - start:4.0f} s  {figures.line(new)}", flush=True)
        if options.output:
            write(options.output, report, results)

    if machine.cuda and usable:
        report["provenance"]["clocks after"] = clocks()
        report["provenance"]["calls not queued in time"] = (
            f"{machine.clock.late} of {machine.clock.calls}"
        )
    return results


def main(arguments: list[str] | None = None) -> int:
    """1 where a rival gave wrong results or broke, else 0, whatever the targets."""
    options = parse(arguments)
    machine = Machine(options.device)
    config = importlib.import_module("torch._inductor.config")
    for name in ("autotune_num_choices_displayed", "max_autotune_report_choices_stats"):
        if hasattr(config, name):  # a table for every product would bury the output
            setattr(config, name, 0)
    report: dict[str, Any] = {
        "title": f"The op on {torch.cuda.get_device_name()}" if machine.cuda else TRIAL,
        "provenance": environment(machine),
        "settings": {"rounds": options.rounds, "budget": options.budget, "only": options.only},
        "host": host_times(machine, rounds=100),
        "not_measured": {},
        "failed": {},
        "first_call_seconds": {},
    }
    results = measure_all(options, machine, report)
    if options.output:
        write(options.output, report, results)
        print(f"{options.output}/op.md, op.json")
    print(report["title"])
    for t in figures.targets(results, report["host"]["over_textbook"]):
        print(f"{t.verdict:>6}  {t.name}: {t.measured}; required {t.required}")
    print(*figures.omissions(report), sep="\n")
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
