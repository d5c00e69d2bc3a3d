"""What the files of the suite share: a session's settings, what a measurement gives, playback."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import rows
from benchmarks.harness import Call, Effort, fastest, measure_rounds, times
from benchmarks.machine import Machine
from benchmarks.schema import Benchmark


@dataclass(eq=False)  # one is like no other, and a key of caches
class Bench:
    """One session: where it measures, how long, and where its rows go.

    `small` is for trying the suite out: tiny sizes, no compiling. Without `compiles` the baselines
    under torch.compile take no part in the op's and the factorizers' cases.
    """

    machine: Machine
    effort: Effort
    small: bool
    folder: Path
    provenance: dict[str, str]
    started: float = field(default_factory=time.perf_counter)
    written: dict[Path, int] = field(default_factory=dict)
    compiles: bool = True

    def __post_init__(self) -> None:
        if self.small:
            self.machine.past_cache = 0  # two sets of inputs, and no cache to empty

    @functools.cached_property
    def run(self) -> str:
        """The session's run, written with its first rows."""
        return rows.add_run(self.folder, self.provenance)

    def append(self, benchmark: Benchmark, new: Iterable[Mapping[str, Any]]) -> None:
        new = [{**row, "run": self.run} for row in new]
        path = rows.append(benchmark, self.folder, new)
        self.written[path] = self.written.get(path, 0) + len(new)


@dataclass(frozen=True)
class Case:
    """What baselines are compared on. Its fields are columns of rows; `which` is "pass" there."""

    def columns(self) -> dict[str, Any]:
        return {"pass" if name == "which" else name: value for name, value in vars(self).items()}

    def __str__(self) -> str:
        return ", ".join(map(str, self.columns().values()))


@dataclass
class Measured:
    """A case's rows, without where they are from, and the seconds of every round, by baseline.

    A row with a text in "skipped" has no seconds: a named reason, or "failed: ...". `broken` says
    why there are no rows at all.
    """

    rows: list[dict[str, Any]]
    seconds: dict[str, list[float]]
    broken: str = ""


def time_calls(
    benchmark: Benchmark,
    columns: dict[str, Any],
    calls: dict[str, Call],
    bench: Bench,
    keep: int = 0,
) -> Measured:
    """Calls in rounds, and a row for each with its time and its ratios."""
    clock = bench.machine.clock()
    seconds = measure_rounds(calls, clock, bench.effort, keep) if calls else {}
    rows = [
        {**columns, "baseline": name, **times(seconds, name, benchmark.bases), "late": clock.late}
        for name in calls
    ]
    return Measured(rows, seconds)


class Tape:
    """Plays readings that were taken elsewhere back to pytest-benchmark, as its timer.

    pytest-benchmark times one test after the other; baselines here are called in rounds, on a GPU
    between events. `play` is then the benchmark's function: it moves the timer on by one reading.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def load(self, readings: list[float]) -> Callable[[], tuple[tuple[float], dict]]:
        """pytest-benchmark's `setup`: the arguments of the next call of `play`."""
        following = iter(readings)
        return lambda: ((next(following),), {})

    def play(self, seconds: float) -> None:
        self.now += seconds

    def timer(self) -> float:
        return self.now


tape = Tape()
playback = {"timer": tape.timer}  # of pytest.mark.benchmark


# How users run networks at their fastest, by name: memory format, torch.compile on top of it.
SETTINGS = {
    "contiguous": (torch.contiguous_format, False),
    "channels_last": (torch.channels_last, False),
    "channels_last, compile": (torch.channels_last, True),
}


@dataclass
class Contender:
    """A network in a case: a call in its fastest setting, and what is counted of it."""

    network: nn.Module
    setting: str
    call: Call

    def counted(self, bench: Bench) -> dict[str, int]:
        """Parameters and peak memory; its FLOPs are counted by `mfnet.flops.call_flops`."""
        state = self.call.prepare(0)
        return {
            "peak_bytes": bench.machine.peak_bytes(lambda: self.call.run(state)),
            "parameters": sum(p.numel() for p in self.network.parameters()),
        }


def contend(
    network: nn.Module,
    inputs: list[Tensor],
    make: Callable[[Callable[..., Any], list[Tensor]], Call],
    bench: Bench,
    compile_too: bool = True,
) -> Contender:
    """The network in whichever of SETTINGS is the fastest here, by a trial of a few calls.

    `make` makes a call of the network, compiled or not, and inputs laid out as the setting says.
    """

    def ready(setting: str) -> Call:
        memory_format, compiled = SETTINGS[setting]
        network.to(memory_format=memory_format)
        ready_network = torch.compile(network, dynamic=False) if compiled else network
        return make(ready_network, [x.contiguous(memory_format=memory_format) for x in inputs])

    def trial(setting: str) -> Callable[[], Any]:
        own = ready(setting)
        return lambda: own.run(own.prepare(0))

    tried = {
        setting: functools.partial(trial, setting)
        for setting, (_, compiled) in SETTINGS.items()
        if compile_too or not compiled
    }
    setting, failed = fastest(tried, bench.machine.clock())
    notes = [f"{name} failed: {why}" for name, why in failed.items()]
    return Contender(network, "; ".join([setting, *notes]), ready(setting))
