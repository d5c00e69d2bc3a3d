"""Clocks, calls, rounds, ratios, quartiles, and the choice of a setting."""

from __future__ import annotations

import weakref

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Call, Effort, EventClock, WallClock, measure_rounds

TWO = Effort(seconds=0, least=2)


class Ticks:
    """A clock that counts calls."""

    def __init__(self) -> None:
        self.time = 0.0
        self.settled = self.calls = self.late = 0

    def measure(self, call):
        self.time += 1
        self.calls += 1
        now = self.time
        return call(), lambda: now

    def settle(self) -> None:
        self.settled += 1


def test_baselines_are_called_in_turn_and_warm_up_rounds_do_not_count():
    order, clock = [], Ticks()
    calls = {
        name: Call(lambda number: number, lambda number, name=name: order.append((name, number)))
        for name in ("a", "b")
    }
    seconds = measure_rounds(calls, clock, TWO)
    rounds = harness.WARM_UP + 2
    assert order == [("ab"[i % 2], i) for i in range(2 * rounds)]
    assert clock.settled == rounds
    assert clock.calls == 2 * 2  # warm-up calls are not counted
    first = 2 * harness.WARM_UP
    assert seconds == {"a": [first + 1, first + 3], "b": [first + 2, first + 4]}


@pytest.mark.parametrize("keep", [0, 2])
def test_the_last_results_stay_alive(keep):
    alive = []

    def run(state):
        alive.append(sum(ref() is not None for ref in made))
        result = torch.zeros(1)
        made.append(weakref.ref(result))
        return result

    made: list = []
    measure_rounds({"a": Call(lambda number: None, run)}, WallClock(), TWO, keep=keep)
    assert max(alive) == keep


def test_ratio_is_the_median_within_rounds():
    # the machine is ten times slower in the second round, for both
    assert harness.ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0
    with pytest.raises(ValueError, match="shorter"):
        harness.ratio([1.0, 2.0], [1.0])


def test_times_are_medians_quartiles_and_ratios():
    seconds = {"a": [4.0, 1.0, 2.0, 3.0, 5.0], "b": [2.0, 1.0, 1.0, 1.0, 1.0]}
    assert harness.times(seconds, "a", ("b", "not measured")) == {
        "rounds": 5,
        "median_s": 3.0,
        "q1_s": 2.0,
        "q3_s": 4.0,
        "over_b": 2.0,
    }
    assert harness.times({"a": [2.0]}, "a", ()) == dict(rounds=1, median_s=2, q1_s=2, q3_s=2)


def test_rounds_fit_the_seconds_within_limits():
    effort = Effort(seconds=6, least=5, least_slow=3, most=60)
    assert [effort.rounds(s) for s in (0.001, 0.5, 1.5, 10)] == [60, 12, 5, 3]


def test_a_slow_round_is_warmed_up_once_less(monkeypatch):
    monkeypatch.setattr(harness, "SLOW", 0.0)
    calls = []
    call = Call(lambda number: number, calls.append)
    measure_rounds({"a": call}, WallClock(), Effort(seconds=0, least_slow=1))
    assert len(calls) == harness.WARM_UP_SLOW + 1


def test_the_fastest_setting_is_the_one_with_the_shortest_call():
    class Scripted(Ticks):
        def measure(self, call):
            seconds = call()
            return None, lambda: seconds

    def make(*seconds):
        script = iter(seconds)
        return lambda: lambda: next(script)

    def broken():
        raise ValueError("no such\nthing")

    candidates = {
        "slow at first": make(9.0, 0.4, 0.2, 0.4),  # the first call never counts
        "steady": make(0.3, 0.3, 0.3, 0.3),
        "long": make(0.6, 0.6),  # is not tried again
        "broken": broken,
    }
    name, failed = harness.fastest(candidates, Scripted())
    assert name == "slow at first"
    assert failed == {"broken": "ValueError: no such"}
    with pytest.raises(ValueError, match="no such"):
        harness.fastest({"broken": broken}, Scripted())


def test_wall_clock_times_the_call():
    result, read = WallClock().measure(lambda: sum(range(1000)))
    assert result == 499500
    assert 0 < read() < 10


def test_event_clock_reads_milliseconds_and_counts_late_calls(monkeypatch):
    log = []

    class Event:
        reached = False

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def query(self):
            return Event.reached

        def elapsed_time(self, end):
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("wait"))
    clock = EventClock()
    result, read = clock.measure(lambda: log.append("call") or 7)
    assert log == ["wait", "event", "call", "event"]
    assert result == 7
    assert read() == pytest.approx(0.0025)
    Event.reached = True
    clock.measure(lambda: None)
    assert (clock.late, clock.calls) == (1, 2)
    assert log.count("wait") == 2
    assert clock.wait == 2 * EventClock.SHORTEST  # the next call has longer to be queued
    clock.wait = EventClock.LONGEST
    clock.measure(lambda: None)
    assert clock.wait == EventClock.LONGEST
