"""The factorizers' cases: baselines that are right, counted by hand, left out by name."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_factorizers, kernels
from benchmarks.bench_factorizers import CAREFUL, PASSES, STEPS, TEXTBOOK, Problem
from benchmarks.kernels import BOTH, FORWARD, LAYOUTS, Case
from benchmarks.schema import (
    BEST,
    COMPILE,
    COMPILE_GRAPHS,
    COPY,
    EAGER,
    FACTORIZERS,
    NATIVE,
    TRITON,
)
from mfnet.flops import call_flops
from mfops import backends
from mfops.methods import METHODS

SHAPE = (2, 60, 5, 200)
X, Y0, Y, Z, MSE = 2 * 60 * 200 * 4, 60 * 5 * 4, 2 * 60 * 5 * 4, 2 * 5 * 200 * 4, 4
CASES = [(method, which) for method, passes in PASSES.items() for which in passes]

on_backend = bench_factorizers.on_backend


@pytest.fixture(autouse=True)
def _nothing_prepared():
    bench_factorizers.prepare.cache_clear()


def problem(method: str, dtype: str = "float32", layout: str = "contiguous") -> Problem:
    return Problem(SHAPE, dtype, layout, method)


def test_bytes_by_hand():
    assert problem("em").floor_bytes(FORWARD) == (X + Y0) + (X + Y + MSE)
    # nmf's z_scale W is left for the backward pass, which takes G', Y and W to dX
    forward = (X + Y0) + (X + Y + Z + MSE)
    assert problem("nmf").floor_bytes(FORWARD) == forward
    assert problem("nmf").floor_bytes(BOTH) == forward + (X + Y + Z) + X
    assert problem("nmf", "bfloat16").x_bytes() == X / 2


@pytest.mark.parametrize(("method", "which"), CASES)
def test_rows_hold_what_was_counted_and_timed(bench, monkeypatch, method, which):
    # The reference stands for kernels, whether there are some or not.
    reference = on_backend("reference", method)
    monkeypatch.setattr(bench_factorizers, "on_backend", lambda name, method: reference)
    measured = bench_factorizers.measure(Case(problem(method), which), bench)
    rows = {row["baseline"]: row for row in measured.rows}
    assert set(rows) == {NATIVE, TRITON, EAGER, BEST, COMPILE, COPY} == set(measured.seconds)
    for name, row in rows.items():
        assert row.keys() <= set(FACTORIZERS.columns)
        assert (row["method"], row["steps"]) == (method, STEPS[method])
        assert row["floor_bytes"] == problem(method).floor_bytes(which)
        if name != COPY:
            assert row["peak_bytes"] >= row["extra_bytes"] >= 0
            assert row["moved_bytes"] > row["floor_bytes"]  # X is read in every round
            assert row[f"over_{EAGER}"] > 0


@pytest.mark.parametrize("method", STEPS)
def test_flops_of_the_lines_are_those_of_the_operators(method):
    inputs = bench_factorizers.make_inputs(problem(method), "cpu")
    x, y0, steps = inputs.x.detach(), inputs.y0, STEPS[method]
    own = call_flops(lambda: torch.ops.mfops.factorize_reconstruct(x, y0, method, steps))
    for lines in (TEXTBOOK[method], CAREFUL[method]):
        assert call_flops(lambda lines=lines: lines(x, y0)) == own
    big, rank = 2 * 2 * 60 * 5 * 200, 2 * 2 * 5 * 5 * (60 + 200)
    by_hand = {
        "em": 3 * 2 * big + big,  # Y^T X and X Z^T in each round, Y Z
        "nmf": big + 6 * 2 * (big + rank) + (big + rank) + big,  # and Y^T Y Z, Y Z Z^T
    }
    assert own == by_hand[method]


def test_flops_of_the_gradient_are_those_of_the_operator():
    inputs = bench_factorizers.make_inputs(problem("nmf"), "cpu")
    y, z, z_scale, *_ = torch.ops.mfops.factorize_reconstruct(
        inputs.x.detach(), inputs.y0, "nmf", STEPS["nmf"]
    )
    gradient = inputs.grad_x_hat, None, inputs.x.detach(), y, z, z_scale
    own = call_flops(lambda: torch.ops.mfops.nmf_backward(*gradient))
    for lines in (TEXTBOOK["nmf"], CAREFUL["nmf"]):
        outputs = lines(*inputs.leaves)
        assert call_flops(lambda o=outputs: inputs.gradients(o)) == own == 2 * 2 * 2 * 60 * 5 * 200


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", STEPS)
def test_every_baseline_is_right(method, layout, dtype):
    own = problem(method, dtype, layout)
    torch.manual_seed(0)
    inputs = bench_factorizers.make_inputs(own, "cpu")
    assert inputs.x.stride()[1:] == ((1, 60) if layout == "channels_last" else (200, 1))
    expected = inputs.expected()
    assert expected.keys() == {"X'", "Y", "mse", *inputs.grads}
    for op in (TEXTBOOK[method], CAREFUL[method], on_backend("reference", method)):
        kernels.assert_right(op, inputs, expected, bench_factorizers.TOLERANCE[dtype])
    assert CAREFUL[method](*inputs.leaves)[0].stride()[1:] == inputs.x.stride()[1:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", STEPS)
def test_a_round_too_few_is_wrong(method, dtype, monkeypatch):
    own = Problem((1, 512, 64, 1089), dtype, "contiguous", method)
    torch.manual_seed(0)
    inputs = bench_factorizers.make_inputs(own, "cpu")
    expected = inputs.expected()
    monkeypatch.setitem(STEPS, method, STEPS[method] - 1)
    with pytest.raises(RuntimeError, match="is wrong: relative error"):
        kernels.assert_right(CAREFUL[method], inputs, expected, bench_factorizers.TOLERANCE[dtype])


@pytest.mark.parametrize("method", STEPS)
def test_inputs_are_as_they_were(method):
    """Lines that write over what they made must not write over what they were given."""
    inputs = bench_factorizers.make_inputs(problem(method), "cpu")
    before = [t.detach().clone() for t in inputs.leaves]
    CAREFUL[method](*inputs.leaves)
    for leaf, was in zip(inputs.leaves, before, strict=True):
        assert torch.equal(leaf, was)


def test_a_backend_without_kernels_is_left_out_with_its_reason(bench, monkeypatch):
    for method in METHODS.values():
        monkeypatch.setattr(method, "has_kernel", False)
    monkeypatch.setattr(backends, "EXTENSION_ERROR", None)
    measured = bench_factorizers.measure(Case(problem("em"), FORWARD), bench)
    skipped = {row["baseline"]: row["skipped"] for row in measured.rows if "skipped" in row}
    assert skipped.keys() == {NATIVE, TRITON}
    assert skipped[NATIVE] == (
        "backend 'native' cannot run this call: has no kernels for method 'em'"
    )
    assert EAGER in measured.seconds


def test_what_is_measured():
    cpu = bench_factorizers.cases("cpu", small=False)
    assert {f.problem.shape for f in cpu} == {(4, 512, 64, 1089)}
    assert len(cpu) == len(set(cpu)) == 2 * 2 * 3
    gpu = bench_factorizers.cases("cuda", small=False)
    assert {f.problem.shape for f in gpu} == {(16, 512, 64, 1089), (16, 512, 64, 4225)}
    assert len(gpu) == len(set(gpu)) == 2 * 2 * 2 * 3
    baselines = [bench_factorizers.names(case.problem, "cuda") for case in gpu]
    assert sum(COMPILE in of for of in baselines) == 2 * 3
    assert sum(COMPILE_GRAPHS in of for of in baselines) == 3
    assert all({NATIVE, TRITON, EAGER, BEST, COPY} <= set(of) for of in baselines)
