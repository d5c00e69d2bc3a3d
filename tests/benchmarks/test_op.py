"""The op's benchmark: what is timed is right, cold, counted by hand, and named where it is not."""

from __future__ import annotations

import resource
import time
from types import SimpleNamespace

import pytest
import torch

import mfops
from benchmarks import bench_op, kernels, machine
from benchmarks.bench_op import FACTORS, Problem
from benchmarks.harness import Call, Effort, EventClock
from benchmarks.kernels import BACKWARD, BOTH, FORWARD, LAYOUTS, PASSES, Case
from benchmarks.schema import BEST, COMPILE, COMPILE_GRAPHS, COPY, EAGER, NATIVE, OP, TRITON

PROBLEM = Problem((2, 6, 3, 20), "float32", "contiguous", "shared")
X, X_HAT, Y, Z, MSE = 2 * 6 * 20 * 4, 6 * 20 * 4, 6 * 3 * 4, 3 * 20 * 4, 4

pytestmark = pytest.mark.skipif(
    mfops.available_backends()["native"] is not None, reason="the extension was not built"
)


@pytest.fixture(autouse=True)
def _nothing_prepared():
    bench_op.prepare.cache_clear()


def by_baseline(measured):
    return {row["baseline"]: row for row in measured.rows}


def test_bytes_of_shared_factors():
    assert PROBLEM.floor_bytes(FORWARD) == (X + Y + Z) + (X_HAT + MSE)
    # the gradient of the expanded X' comes for every image
    assert PROBLEM.floor_bytes(BACKWARD) == (X + Y + Z + X + MSE) + (X + Y + Z)
    assert PROBLEM.floor_bytes(BOTH) == PROBLEM.floor_bytes(FORWARD) + PROBLEM.floor_bytes(BACKWARD)


def test_bytes_of_per_image_factors():
    problem = Problem((4, 10, 3, 7), "bfloat16", "contiguous", "per image")
    x, y, z = 4 * 10 * 7 * 2, 4 * 10 * 3 * 2, 4 * 3 * 7 * 2
    assert problem.x_bytes() == x
    assert problem.floor_bytes(FORWARD) == (x + y + z) + (x + MSE)
    assert problem.floor_bytes(BACKWARD) == (x + y + z + x + MSE) + (x + y + z)


@pytest.mark.parametrize("which", PASSES)
def test_rows_hold_what_was_counted_and_timed(bench, which):
    measured = bench_op.measure(Case(PROBLEM, which), bench)
    rows = by_baseline(measured)
    assert set(rows) == {NATIVE, TRITON, EAGER, BEST, COMPILE, COPY}
    assert "runs on cuda" in rows[TRITON]["skipped"]
    for name in (NATIVE, EAGER, BEST, COMPILE):
        row = rows[name]
        assert row["x_bytes"] == X
        assert row["floor_bytes"] == PROBLEM.floor_bytes(which)
        assert row["rounds"] == len(measured.seconds[name]) >= 2
        assert row["over_" + NATIVE] > 0
        assert row["peak_bytes"] >= row["extra_bytes"] >= 0
        products = {FORWARD: 1, BACKWARD: 2, BOTH: 3}[which]  # of the textbook lines
        assert row["flops"] == products * 2 * 6 * 3 * 20
        # The textbook lines move more than they have to, in the forward pass X' twice at least.
        assert row["moved_bytes"] >= row["floor_bytes"]
    assert rows[NATIVE]["moved_bytes"] == PROBLEM.floor_bytes(which)
    assert rows[EAGER]["moved_bytes"] > PROBLEM.floor_bytes(which)
    assert rows[COPY].keys() <= set(OP.columns)


def test_moved_bytes_are_those_of_each_operators_tensors():
    a, b = torch.ones(10, 4), torch.ones(10, 4)
    with kernels.MovedBytes() as moved:
        (a + b).view(40).neg_()  # two read, one written; a view; one read and written in place
    assert moved.total == 3 * 160 + 2 * 160
    with kernels.MovedBytes() as moved:
        torch.add(a, torch.ones(1, 4).expand(10, 4))  # ones written, then 4 numbers of it read
    assert moved.total == 16 + 160 + 16 + 160
    x, y = torch.ones(2, 10, 4), torch.ones(2, 4, 5)
    with kernels.MovedBytes() as moved:
        x @ y
    assert moved.total == 4 * (2 * 10 * 4 + 2 * 4 * 5 + 2 * 10 * 5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factors", FACTORS)
def test_every_baseline_is_right(layout, factors):
    problem = Problem(PROBLEM.shape, "bfloat16", layout, factors)
    inputs = bench_op.make_inputs(problem, "cpu")
    assert inputs.x.stride()[1:] == ((1, 6) if layout == "channels_last" else (20, 1))
    expected = inputs.expected()
    for name, op in bench_op.ops(problem, "cpu", small=True).items():
        if name != TRITON:
            kernels.assert_right(op, inputs, expected, bench_op.TOLERANCE["bfloat16"])


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_careful_lines_keep_the_layout_and_copy_nothing(layout, factors):
    inputs = bench_op.make_inputs(Problem(PROBLEM.shape, "float32", layout, factors), "cpu")
    x_hat, mse = bench_op.textbook(*inputs.leaves)
    best, best_mse = bench_op.careful(*inputs.leaves)
    torch.testing.assert_close((best, best_mse), (x_hat, mse))
    assert best.stride()[1:] == inputs.x.stride()[1:]
    if factors == "shared":
        assert x_hat.stride(0) != 0
        assert best.stride(0) == 0


def test_a_baseline_with_wrong_results_is_not_timed(bench, monkeypatch):
    def wrong(x, y, z):
        x_hat, mse = mfops.factorized_reconstruction(x, y, z)
        return 1.01 * x_hat, mse

    monkeypatch.setattr(bench_op, "careful", wrong)
    measured = bench_op.measure(Case(PROBLEM, FORWARD), bench)
    assert BEST not in measured.seconds
    assert by_baseline(measured)[BEST]["skipped"] == (
        "failed: RuntimeError: X' is wrong: relative error 0.01"
    )
    assert NATIVE in measured.seconds


def test_inputs_rotate_through_more_than_the_cache(bench, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda op, **options: op)
    bench.small = False
    bench.machine.past_cache = 10_000  # a set has X + Y + Z = 1272 bytes
    sets = bench_op.prepare(PROBLEM, bench).sets
    assert len({inputs.x.data_ptr() for inputs in sets}) == len(sets) == 8
    assert bench.machine.sets(10**6) == 2


def test_backward_is_timed_without_forward():
    calls = []

    def op(x, y, z):
        calls.append("forward")
        return mfops.factorized_reconstruction(x, y, z)

    sets = [bench_op.make_inputs(PROBLEM, "cpu")]
    for which, before, during in [
        (FORWARD, [], ["forward"]),
        (BACKWARD, ["forward", "cache"], []),
        (BOTH, [], ["forward"]),
    ]:
        call = kernels.call_of(op, which, sets, lambda: calls.append("cache"))
        state = call.prepare(0)
        assert calls == before
        calls.clear()
        result = call.run(state)
        assert calls == during
        calls.clear()
        if which != FORWARD:
            grads = result if which == BACKWARD else result[1]
            assert [g.shape for g in grads] == [leaf.shape for leaf in sets[0].leaves]
    dropped = kernels.dropping(call)
    assert dropped.run(dropped.prepare(0)) is None


def test_copy_moves_half_of_the_bytes():
    call = kernels.copy_call(100, 3, "cpu")
    assert [call.prepare(i) for i in range(4)] == [0, 1, 2, 0]
    assert call.run(1).numel() == 50


def test_memory_leaves_out_what_is_returned(bench):
    kept = torch.ones(1 << 20)  # 4 MiB

    def run(_):
        scratch = torch.ones(4 << 20)  # 16 MiB
        return kept + scratch[: 1 << 20]

    call = Call(lambda number: number, run)
    found = kernels.memory(call, bench)
    # Linux counts a process's pages in batches: half a MiB may be missing.
    assert 19.5 <= found["peak_bytes"] / 2**20 < 24
    assert 15.5 <= found["extra_bytes"] / 2**20 < 20


def test_what_a_cpu_measures():
    cases = bench_op.cases("cpu", small=False)
    assert len(cases) == len(set(cases)) == 2 * 2 * 2 * 2 * 3
    baselines = [bench_op.names(case.problem, "cpu") for case in cases]
    assert all(COMPILE in of and COMPILE_GRAPHS not in of for of in baselines)


def test_what_a_gpu_measures():
    cases = bench_op.cases("cuda", small=False)
    assert len(cases) == len(set(cases)) == 6 * 2 * 2 * 2 * 3
    problems = [case.problem for case in cases]
    # A problem's passes follow each other.
    assert problems[:: len(PASSES)] == list(dict.fromkeys(problems))
    # What targets speak of comes first.
    bandwidth, rest = problems[: 8 * len(PASSES)], problems[8 * len(PASSES) :]
    shapes = bench_op.BANDWIDTH_SHAPES
    assert {(c.shape, c.dtype) for c in bandwidth} == {(s, "bfloat16") for s in shapes}
    assert [c.shared for c in rest] == sorted(c.shared for c in rest)
    baselines = [bench_op.names(case.problem, "cuda") for case in cases]
    # Autotuning takes up to a minute a problem: of one kind, and with CUDA graphs of one problem.
    assert sum(COMPILE in of for of in baselines) == 6 * len(PASSES)
    assert sum(COMPILE_GRAPHS in of for of in baselines) == len(PASSES)
    assert all({NATIVE, TRITON, EAGER, COPY} <= set(of) for of in baselines)
    without = {name for of in baselines for name in kernels.taking_part(of, compiles=False)}
    assert without == {NATIVE, TRITON, EAGER, BEST, COPY}
    assert all(kernels.taking_part(of, compiles=True) == of for of in baselines)


def test_a_gpu_that_is_played(bench, monkeypatch):
    """Everything but what only a GPU can do: its calls are replaced, tensors stay on the CPU."""

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.time = time.perf_counter()

        def query(self):
            return False

        def elapsed_time(self, end):
            return 1e3 * (end.time - self.time)

    class Stats(dict):
        def __missing__(self, key):
            return 1000 + (50_000 if key.endswith("peak") else 0)

    properties = SimpleNamespace(
        name="Some GPU", multi_processor_count=1, total_memory=2**33, L2_cache_size=2**20, uuid="1"
    )
    for name, value in {
        "Event": Event,
        "_sleep": lambda cycles: None,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_stats": Stats,
        "get_device_properties": lambda: properties,
        "get_device_name": lambda: "NVIDIA H100 80GB HBM3",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(machine, "output", lambda command: "")
    bench.machine.cuda = True
    bench.effort = Effort(seconds=0, least=2)

    assert isinstance(bench.machine.clock(), EventClock)
    assert bench.machine.folder() == "nvidia-h100-80gb-hbm3"
    assert bench.machine.description() == (
        "Some GPU, 1 multiprocessors, 8 GiB, L2 1 MiB, driver unknown, nvidia-smi did not answer"
    )
    rows = by_baseline(bench_op.measure(Case(PROBLEM, BOTH), bench))
    results = X_HAT + MSE + X + Y + Z
    assert rows[NATIVE]["peak_bytes"] == 50_000
    assert rows[NATIVE]["extra_bytes"] == 50_000 - results
    assert rows[NATIVE]["late"] == 0


def test_clocks_are_nvidia_smis_or_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    properties = SimpleNamespace(uuid="1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    answer = "1980 MHz, 1980 MHz, 2619 MHz, 2619 MHz, 41, 700.00 W"
    asked = []
    monkeypatch.setattr(machine, "output", lambda command: asked.append(command) or answer)
    assert machine.clocks() == (
        "SM 1980 MHz, of at most 1980 MHz, memory 2619 MHz, of at most 2619 MHz, "
        "degrees C 41, power limit 700.00 W"
    )
    assert "--id=GPU-1-2" in asked[0]


def test_peak_memory_is_that_of_the_call_and_nothing_else(bench):
    before = torch.ones(8 << 20)
    grown = bench.machine.peak_bytes(lambda: torch.ones(16 << 20).sum() + before.sum())
    assert 63.5 <= grown / 2**20 < 72
    assert bench.machine.peak_bytes(lambda: None) < 2**20


def test_freed_memory_is_kept_for_the_next_call(bench):
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 << 20)  # 64 MiB, 16384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # The first ones may not fit into what the ones before them left.
    assert [faults() for _ in range(12)][-1] < 1000


def test_a_command_that_is_missing_or_fails_prints_nothing():
    assert machine.output(["no-such-command"]) == ""
    assert machine.output(["false"]) == ""
    assert machine.output(["echo", "a"]) == "a"
