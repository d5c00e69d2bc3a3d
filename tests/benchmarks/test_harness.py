"""Turns, ratios, clocks, and where a figure is said to be from."""

from __future__ import annotations

import weakref

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import EventClock, Turn, WallClock, take_turns


class Ticks:
    """A clock that counts calls."""

    def __init__(self) -> None:
        self.time = 0.0
        self.settled = 0

    def measure(self, call):
        self.time += 1
        now = self.time
        return call(), lambda: now

    def settle(self) -> None:
        self.settled += 1


def test_rivals_take_turns_and_warm_up_rounds_do_not_count():
    order, clock = [], Ticks()
    turns = {
        name: Turn(lambda number: number, lambda number, name=name: order.append((name, number)))
        for name in ("a", "b")
    }
    seconds = take_turns(turns, clock, rounds=2)
    rounds = harness.WARM_UP + 2
    assert order == [("ab"[i % 2], i) for i in range(2 * rounds)]
    assert clock.settled == rounds
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
    take_turns({"a": Turn(lambda number: None, run)}, WallClock(), rounds=2, keep=keep)
    assert max(alive) == keep


def test_ratio_is_the_median_within_rounds():
    # the machine is ten times slower in the second round, for both
    assert harness.ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0
    with pytest.raises(ValueError, match="shorter"):
        harness.ratio([1.0, 2.0], [1.0])


def test_spread_is_that_of_the_middle_half():
    assert harness.spread([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 100.0, 0.0]) == 3.0 / 3.5
    assert harness.spread([2.0]) == 0.0


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


@pytest.mark.parametrize("factors", ["shared", "per image"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_textbook_lines_agree_and_the_careful_ones_keep_the_layout(factors, channels_last):
    images = () if factors == "shared" else (2,)
    x = torch.randn(2, 7, 5).mT if channels_last else torch.randn(2, 5, 7)
    y, z = torch.randn(*images, 5, 3), torch.randn(*images, 3, 7)
    x_hat, mse = harness.textbook(x, y, z)
    best, best_mse = harness.careful(x, y, z)
    torch.testing.assert_close((best, best_mse), (x_hat, mse))
    assert best.stride()[1:] == x.stride()[1:]
    if factors == "shared":
        assert x_hat.stride(0) != 0
        assert best.stride(0) == 0


def test_commit_from_the_repository_or_the_environment(monkeypatch):
    answers = {"rev-parse": "abc1234", "status": ""}
    monkeypatch.setattr(harness, "output", lambda command: answers[command[3]])
    assert harness.commit() == "abc1234"
    answers["status"] = " M csrc/ops.cpp"
    assert harness.commit() == "abc1234 with changes"
    answers["rev-parse"] = ""
    monkeypatch.setenv("COMMIT", "def5678")
    assert harness.commit() == "def5678"
    monkeypatch.delenv("COMMIT")
    assert harness.commit() == "no commit"


def test_a_command_that_is_missing_or_fails_prints_nothing():
    assert harness.output(["no-such-command"]) == ""
    assert harness.output(["false"]) == ""
    assert harness.output(["echo", "a"]) == "a"
