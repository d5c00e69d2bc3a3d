"""How a time is taken: clocks, calls, rounds, ratios. benchmarks/README.md says why.

Baselines are called in turn, once each in a round, so that a machine that speeds up or slows down
does so for all of them. Times are medians; ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


class WallClock:
    """Time from call to return."""

    def __init__(self) -> None:
        self.calls = self.late = 0

    def measure(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        """What `call` returned, and a function that gives its seconds once `settle` has run."""
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        self.calls += 1
        return result, lambda: elapsed

    def settle(self) -> None:
        pass


class EventClock:
    """Time on the GPU, between events before and after the call.

    A kernel that only waits goes in front, so that the host has queued the whole call when the
    GPU comes to it: the host's own time is no part of the time. `late` of `calls` were not
    queued in time; each makes the wait of those that follow twice as long.
    """

    SHORTEST, LONGEST = 2_000_000, 400_000_000  # cycles of the GPU, about 1 and 200 milliseconds

    def __init__(self) -> None:
        self.calls = self.late = 0
        self.wait = self.SHORTEST

    def measure(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self.wait)
        start.record()
        result = call()
        end.record()
        self.calls += 1
        if start.query():
            self.late += 1
            self.wait = min(2 * self.wait, self.LONGEST)
        return result, lambda: start.elapsed_time(end) / 1e3

    def settle(self) -> None:
        torch.cuda.synchronize()


Clock = WallClock | EventClock

WARM_UP = 3  # rounds that do not count
WARM_UP_SLOW = 2  # where a round takes longer than SLOW
SLOW = 2.0  # seconds
TRIALS = 3  # timed calls of a setting that is tried,
LONG = 0.5  # but a single one where it takes longer than so many seconds


@dataclass(frozen=True)
class Call:
    """One baseline's call: `run` is timed on what `prepare` makes of the number of the call."""

    prepare: Callable[[int], Any]
    run: Callable[[Any], Any]


@dataclass(frozen=True)
class Effort:
    """How long a case is measured: as many rounds as fit the seconds, within limits."""

    seconds: float = 6
    least: int = 5
    least_slow: int = 3  # where a round takes longer than SLOW
    most: int = 60

    def rounds(self, round_seconds: float) -> int:
        least = self.least_slow if round_seconds > SLOW else self.least
        return min(self.most, max(least, round(self.seconds / round_seconds)))


def measure_rounds(
    calls: dict[str, Call], clock: Clock, effort: Effort, keep: int = 0
) -> dict[str, list[float]]:
    """Seconds of every baseline's call in every round, after rounds that do not count.

    The last `keep` results stay alive, so that the next ones are written elsewhere in memory.
    Warm-up calls are not among those that the clock has counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    kept: deque[Any] = deque(maxlen=keep)
    numbers = itertools.count()

    def one_round() -> tuple[dict[str, Callable[[], float]], float]:
        start = time.perf_counter()
        readings = {}
        for name, own in calls.items():
            state = own.prepare(next(numbers))
            result, readings[name] = clock.measure(lambda own=own, state=state: own.run(state))
            kept.append(result)
            del state, result
        clock.settle()
        return readings, time.perf_counter() - start

    one_round()  # takes longer than any later one
    _, elapsed = one_round()
    for _ in range((WARM_UP_SLOW if elapsed > SLOW else WARM_UP) - 2):
        one_round()
    clock.calls = clock.late = 0
    for _ in range(effort.rounds(elapsed)):
        readings, _ = one_round()
        for name, read in readings.items():
            seconds[name].append(read())
    return seconds


def fastest(
    candidates: dict[str, Callable[[], Callable[[], Any]]], clock: Clock
) -> tuple[str, dict[str, str]]:
    """The candidate whose quickest call is the shortest, and why others took no part.

    A candidate is made ready, and called once before it counts: that is where it is compiled.
    Raises what the last one raised where none of them runs.
    """
    best: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, make in candidates.items():
        try:
            call = make()
            call()
            clock.settle()
            reads = [clock.measure(call)[1]]
            clock.settle()
            if reads[0]() < LONG:
                reads += [clock.measure(call)[1] for _ in range(TRIALS - 1)]
                clock.settle()
            best[name] = min(read() for read in reads)
        except Exception as error:  # compilers fail in many ways; the others still run
            failed[name] = first_line(error)
            if len(failed) == len(candidates):
                raise
    return min(best, key=best.__getitem__), failed


def ratio(seconds: list[float], base: list[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(s / b for s, b in zip(seconds, base, strict=True))


def times(seconds: dict[str, list[float]], name: str, bases: tuple[str, ...]) -> dict[str, float]:
    """What a row says of one baseline's time: median, quartiles, and its time over the bases'."""
    own = seconds[name]
    low, _, high = statistics.quantiles(own, n=4, method="inclusive") if own[1:] else own * 3
    over = {f"over_{base}": ratio(own, seconds[base]) for base in bases if base in seconds}
    return {
        "rounds": len(own),
        "median_s": statistics.median(own),
        "q1_s": low,
        "q3_s": high,
        **over,
    }


def why_not(error: Exception) -> str:
    """What a row says of a baseline that raised: it is not there, or it breaks."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} not installed"
    return str(error) if "cannot run this call" in str(error) else f"failed: {first_line(error)}"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
