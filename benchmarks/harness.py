"""What every measurement shares: the rivals' code, clocks, turns, ratios, where a figure is from.

Rivals take turns, one call each per round, so that a machine that speeds up or slows down does so
for all of them. Times are medians; ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mfops

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3
Op = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


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


class WallClock:
    """Time from call to return."""

    def measure(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        """What `call` returned, and a function that gives its seconds once `settle` has run."""
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        return result, lambda: elapsed

    def settle(self) -> None:
        pass


class EventClock:
    """Time on the GPU, between events before and after the call.

    A kernel that only waits goes in front, so that the host has queued the whole call when the
    GPU comes to it: the host's own time is no part of the figure. `late` of `calls` were not
    queued in time.
    """

    WAIT = 2_000_000  # cycles of the GPU, about a millisecond

    def __init__(self) -> None:
        self.calls = self.late = 0

    def measure(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self.WAIT)
        start.record()
        result = call()
        end.record()
        self.calls += 1
        self.late += start.query()
        return result, lambda: start.elapsed_time(end) / 1e3

    def settle(self) -> None:
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Turn:
    """One rival's call: `run` is timed on what `prepare` makes of the number of the call."""

    prepare: Callable[[int], Any]
    run: Callable[[Any], Any]


def take_turns(
    turns: dict[str, Turn], clock: WallClock | EventClock, rounds: int, keep: int = 0
) -> dict[str, list[float]]:
    """Seconds of every rival's call in every round, after WARM_UP rounds that do not count.

    The last `keep` results stay alive, so that the next ones are written elsewhere in memory.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    kept: deque[Any] = deque(maxlen=keep)
    number = 0
    for i in range(WARM_UP + rounds):
        readings = {}
        for name, turn in turns.items():
            state = turn.prepare(number)
            result, readings[name] = clock.measure(lambda turn=turn, state=state: turn.run(state))
            kept.append(result)
            del state, result
            number += 1
        clock.settle()
        if i >= WARM_UP:
            for name, read in readings.items():
                seconds[name].append(read())
    return seconds


def ratio(seconds: list[float], base: list[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(s / b for s, b in zip(seconds, base, strict=True))


def spread(seconds: list[float]) -> float:
    """How far the middle half of the rounds lies apart, over the median: smaller is noise."""
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / statistics.median(ordered)


def output(command: list[str]) -> str:
    """What a command prints; nothing where it fails or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit measured; $COMMIT says it where the tree came without its repository."""

    def git(*arguments: str) -> str:
        return output(["git", "-C", str(ROOT), *arguments])

    head = git("rev-parse", "--short", "HEAD")
    if not head:
        return os.environ.get("COMMIT") or "no commit"
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", "csrc", "mfops", "setup.py"
    )
    return f"{head} with changes" if changed else head


def provenance() -> dict[str, str]:
    """Where a figure is from, the machine apart."""
    module = sys.modules["__main__"].__spec__
    name = f"-m {module.name}" if module else sys.argv[0]
    return {
        "command": " ".join(["python", name, *sys.argv[1:]]),
        "date": str(datetime.date.today()),
        "commit": commit(),
        "mfops": mfops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
