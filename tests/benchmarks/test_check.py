"""The guard against getting slower: it has to see something made slower on purpose."""

from __future__ import annotations

import pickle

import pytest

import mfops
from benchmarks import bench_op, check, rows
from benchmarks.bench_op import Problem
from benchmarks.harness import Effort
from benchmarks.kernels import BOTH, PASSES, Case
from benchmarks.machine import Machine
from benchmarks.measure import Bench, Measured
from benchmarks.schema import EAGER, NATIVE, OP, TRITON

PROBLEM = Problem((2, 256, 32, 900), "float32", "contiguous", "shared")
CASE = Case(PROBLEM, BOTH)


@pytest.fixture
def bench(tmp_path):
    # small: torch.compile stays out of it
    return Bench(Machine("cpu", 2), Effort(seconds=0.2), True, tmp_path, {})


def guard(measure=bench_op.measure):
    return check.Guard(OP, CASE, measure, (NATIVE, TRITON), EAGER)


def row(ratio: float, baseline: str = NATIVE) -> dict:
    return {**CASE.columns(), "baseline": baseline, f"over_{EAGER}": ratio}


def scripted(*ratios: float):
    """A measurement that finds these ratios, one after the other."""
    following = iter(ratios)
    return lambda case, bench: Measured([row(next(following))], {})


def commit(bench: Bench, ratio: float) -> None:
    of = {"run": "2026-01-01T00:00:00Z", "environment": rows.environment()}
    run = {"run": rows.add_run(bench.folder, of), "median_s": 1, "q1_s": 1, "q3_s": 1}
    rows.append(OP, bench.folder, [row(ratio) | run])


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Measures in this process, briefly and without torch.compile."""
    monkeypatch.setattr(check, "EFFORT", Effort(seconds=0.2))
    monkeypatch.setattr(check, "measure_apart", lambda watched: check.measure(watched, small=True))


@pytest.mark.timed
@pytest.mark.skipif(
    mfops.available_backends()["native"] is not None, reason="the extension was not built"
)
def test_an_op_made_slower_is_seen_and_an_honest_one_passes(bench, monkeypatch, capsys):
    (honest,) = check.measure([guard()], small=True)
    commit(bench, 1.3 * honest[NATIVE])  # room for a noisy machine
    assert check.check([guard()], bench.folder) == []
    assert "    ok" in capsys.readouterr().out

    op = mfops.factorized_reconstruction

    def slowed(x, y, z):
        for _ in range(8):
            op(x.detach(), y.detach(), z.detach())
        return op(x, y, z)

    monkeypatch.setattr(mfops, "factorized_reconstruction", slowed)
    (grown,) = check.check([guard()], bench.folder)
    assert f"{NATIVE} over {EAGER}" in grown
    assert "SLOWER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ratios", "passes"),
    [
        ((0.57,), True),  # 14% more
        ((0.30,), True),
        ((0.58, 0.58, 0.58), False),  # 16% more, each time
        ((0.90, 0.58, 0.57), True),  # the best of three
    ],
)
def test_a_growth_of_15_percent_is_allowed_and_a_case_has_three_tries(bench, ratios, passes):
    commit(bench, 0.5)
    measure = scripted(*ratios)
    assert (check.check([guard(measure)], bench.folder) == []) == passes
    with pytest.raises(StopIteration):  # and no more than were needed
        measure(CASE, bench)


def test_a_backend_that_runs_no_more_is_a_loss(bench):
    commit(bench, 0.5)

    def nothing(case, bench):
        return Measured([{**CASE.columns(), "baseline": NATIVE, "skipped": "failed: broken"}], {})

    (grown,) = check.check([guard(nothing)], bench.folder)
    assert "does not run now" in grown


def test_rows_of_another_environment_are_no_yardstick(bench, monkeypatch, capsys):
    commit(bench, 0.5)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    assert check.check([guard(scripted())], bench.folder) == []
    assert "skip" in capsys.readouterr().out


def test_no_rows_is_said_in_one_line(tmp_path, capsys):
    assert check.main(["--results", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("benchmarks.check: no rows of this machine in ")
    assert message.count("\n") == 1


def test_the_command_fails_where_a_guard_does(bench, monkeypatch, capsys):
    commit(bench, 0.5)
    monkeypatch.setattr(Machine, "folder", lambda self: "")
    for ratios, status in [((0.5,), 0), ((0.6, 0.6, 0.6), 1)]:
        monkeypatch.setattr(check, "guards", lambda _, r=ratios: [guard(scripted(*r))])
        assert check.main(["--results", str(bench.folder)]) == status
    assert "ratios that have grown by more than 15%" in capsys.readouterr().err


def test_guards_travel_to_another_process(monkeypatch):
    for own in check.guards("cpu"):
        assert pickle.loads(pickle.dumps(own)) == own


def test_what_is_watched():
    cases = [str(g.case) for g in check.guards("cpu")]
    passes = [f"{case}" for case in cases if case.endswith(PASSES)]
    # Dtypes; shapes, factors, passes; em's forward and nmf's two passes; a context's forward.
    assert len(passes) == 2 * (2 * 2 * 2 + 3) + 1
    assert all("channels_last" not in case for case in cases)
