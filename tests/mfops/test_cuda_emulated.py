"""csrc/cuda's operators without a GPU: the same kernels and launches, run by the emulator.

What this cannot see: the real instructions' rounding, and time. Every test compiles nothing anew;
the library is made once a session.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import emulator
import pytest
import torch
from cases import LAYOUTS, SHAPES, SHARING, Case, assert_within, check, features, judged, make
from hypothesis import given, settings
from hypothesis import strategies as st

from mfops import reference

TYPES = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.float32, "tf32", id="tf32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float16, torch.float16, id="float16"),
]
# The table's largest take the emulator a minute; these reach as many tiles, strips and sums.
SMALL_SHAPES = [s for s in SHAPES if s not in [(4, 70, 64, 1089), (1, 5, 9, 9000)]]
RANK_SHAPES = [(2, 40, 256, 70), (2, 136, 128, 72), (2, 140, 96, 200), (1, 64, 200, 128)]
KIB = 1024


@pytest.fixture(scope="session")
def run() -> SimpleNamespace:
    return emulator.operators(factors=False)


def results(run: SimpleNamespace, case: Case, tf32: bool) -> list[torch.Tensor]:
    factors = case.x, case.y, case.z
    needs = (True, True, True)
    return [
        *run.reconstruct(*factors, tf32),
        run.mse(*factors, tf32),
        *run.reconstruct_backward(case.grad_x_hat, case.grad_mse, *factors, *needs, tf32),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)  # the first to change: float64 results stay known
@pytest.mark.parametrize(("dtype", "operands"), TYPES)
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_agrees_with_float64_reference(run, shape, layout, dtype, operands):
    for shared in SHARING:
        check(run, make(shape, layout, dtype, shared), operands)


# 99, 163 and 227 KiB are what a block has on compute capability 8.6 and 8.9, 8.0, and 9.0.
@pytest.mark.parametrize(("dtype", "operands"), TYPES)
@pytest.mark.parametrize("kib", [99, 163, 227])
@pytest.mark.parametrize("shape", RANK_SHAPES, ids=str)
def test_every_rank_on_every_gpu(run, monkeypatch, shape, kib, dtype, operands):
    monkeypatch.setenv("MFOPS_EMULATOR_SHARED_BYTES", str(kib * KIB))
    for layout in LAYOUTS[:2]:
        for shared in [(True, True), (False, False)]:
            check(run, make(shape, layout, dtype, shared), operands)


# From one stage of the pipeline, where nothing is loaded ahead, to four.
@pytest.mark.parametrize(("dtype", "operands"), TYPES)
@pytest.mark.parametrize("kib", [34, 60, 80, 130])
@pytest.mark.parametrize("shape", [(3, 65, 16, 331), (3, 72, 16, 336)], ids=str)
def test_same_bits_in_any_order_of_threads(run, monkeypatch, shape, kib, dtype, operands):
    monkeypatch.setenv("MFOPS_EMULATOR_SHARED_BYTES", str(kib * KIB))
    tf32 = operands == "tf32"
    for layout in LAYOUTS[:2]:
        for shared in [(True, True), (False, False)]:
            case = make(shape, layout, dtype, shared)
            check(run, case, operands)
            first, *others = (
                (monkeypatch.setenv("MFOPS_EMULATOR_ORDER", order), results(run, case, tf32))[1]
                for order in ("ascending", "descending", "7")
            )
            for other in others:
                assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
            monkeypatch.delenv("MFOPS_EMULATOR_ORDER")


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (4, 150, 80, 200))),
    layout=st.sampled_from(LAYOUTS),
    type_=st.sampled_from([p.values for p in TYPES]),
    shared=st.sampled_from(SHARING),
)
def test_agrees_on_any_shape(run, shape, layout, type_, shared):
    dtype, operands = type_
    check(run, make(shape, layout, dtype, shared), operands)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shared", SHARING)
def test_gradients_only_when_asked_for(run, layout, shared):
    case = make((3, 17, 5, 133), layout, torch.float32, shared)
    upstream, factors = (case.grad_x_hat, case.grad_mse), (case.x, case.y, case.z)
    exact, limit = judged(case, torch.float32)
    for needs in itertools.product((True, False), repeat=3):
        some = run.reconstruct_backward(*upstream, *factors, *needs, False)
        for name, need, grad in zip(("grad_x", "grad_y", "grad_z"), needs, some, strict=True):
            if need:
                assert_within(grad, getattr(exact, name), getattr(limit, name), name)
            else:
                assert grad.numel() == 0


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shared", SHARING)
def test_missing_expanded_and_summed_gradients(run, layout, shared):
    case = make((3, 17, 5, 133), layout, torch.float32, shared)
    factors = case.x, case.y, case.z
    images = features((3, 17, 133), LAYOUTS[layout == LAYOUTS[0]], torch.float32)
    upstreams = [None, torch.ones(()).expand(3, 17, 133), images]  # the other layout than x's
    if all(shared):
        upstreams.append(images.sum(0))
    for upstream in upstreams:
        for mse in (None, case.grad_mse):
            needs = (True, True, True)
            exact = reference.reconstruct_backward(
                None if upstream is None else upstream.double(),
                None if mse is None else mse.double(),
                *(t.double() for t in factors),
                *needs,
            )
            grads = run.reconstruct_backward(upstream, mse, *factors, *needs, False)
            for grad, expected in zip(grads, exact, strict=True):
                torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_expanded_factors_are_per_image(run):
    case = make((3, 17, 5, 133), "contiguous", torch.float32, (True, True))
    y, z = case.y.expand(3, -1, -1), case.z.expand(3, -1, -1)
    upstream = features((3, 17, 133), "contiguous", torch.float32)
    arguments = (upstream, case.grad_mse, case.x, y, z, True, True, True)
    exact = reference.reconstruct_backward(*arguments)
    for grad, expected in zip(run.reconstruct_backward(*arguments, False), exact, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bases_whose_lines_lie_apart(run, dtype):
    """As the kernels that find bases leave them, their lines aligned."""
    case = make((3, 72, 5, 133), "contiguous", dtype, (False, False))
    case.y = torch.nn.functional.pad(case.y, (0, 11), value=torch.nan)[..., :5]
    check(run, case, dtype)


def test_small_gradients_do_not_vanish_in_float16(run):
    case = make((2, 40, 4, 300), "contiguous", torch.float16, (True, True))
    tiny = torch.tensor(1e-3)  # 2 g / elements is below float16's smallest number
    exact = reference.reconstruct_backward(None, tiny, case.x, case.y, case.z, False, True, True)
    grads = run.reconstruct_backward(None, tiny, case.x, case.y, case.z, False, True, True, False)
    for grad, expected in zip(grads[1:], exact[1:], strict=True):
        torch.testing.assert_close(grad, expected, rtol=2e-3, atol=2**-24)
        assert grad.any()


@pytest.mark.parametrize("shape", [(2, 9, 3, 40), (2, 72, 16, 136)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_inf_go_through(run, shape, dtype):
    case = make(shape, "contiguous", dtype, (True, True))
    case.x[1, 4, 7] = float("nan")
    x_hat, mse = run.reconstruct(case.x, case.y, case.z, False)
    assert mse.isnan()
    assert x_hat.isfinite().all()
    case.x[1, 4, 7] = float("inf")
    assert run.mse(case.x, case.y, case.z, False) == float("inf")
    grad_x, *_ = run.reconstruct_backward(
        None, case.grad_mse, case.x, case.y, case.z, True, True, True, False
    )
    assert grad_x[1, 4, 7] == float("inf")
    assert grad_x[0].isfinite().all()
    case.y[2, 0] = float("nan")
    x_hat, _ = run.reconstruct(case.x, case.y, case.z, False)
    assert x_hat[2].isnan().all()
    assert x_hat[3].isfinite().all()
    case.y[2, 0] = float("inf")
    assert run.mse(case.x, case.y, case.z, False) == float("inf")


def test_more_bases_than_the_kernels_take(run):
    x, y, z = torch.zeros(1, 3, 5), torch.zeros(3, 257), torch.zeros(257, 5)
    with pytest.raises(RuntimeError, match="K <= 256, got 257"):
        run.mse(x, y, z, False)


def test_what_lies_beyond_the_edges_does_not_turn_inf_into_nan(run):
    x, y, z = torch.ones(1, 5, 33), torch.ones(5, 1), torch.ones(1, 33)
    z[0, 7] = float("inf")
    arguments = (None, torch.tensor(1.0), x, y, z, True, True, True)
    exact = reference.reconstruct_backward(*arguments)
    assert exact[2][0, 7] == float("inf")
    for layout in (x, x.mT.contiguous().mT):
        grads = run.reconstruct_backward(*arguments[:2], layout, *arguments[3:], False)
        for grad, expected in zip(grads, exact, strict=True):
            assert torch.equal(grad.isinf(), expected.isinf())
            assert torch.equal(grad.isnan(), expected.isnan())
