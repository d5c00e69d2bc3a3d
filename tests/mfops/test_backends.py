"""Every backend against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    SHARING,
    Case,
    assert_within,
    bounds,
    features,
    make,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mfops import reference
from mfops.dispatch import BACKENDS, NO_TRITON


def backends() -> list:
    x = torch.zeros(1, 1, 1)
    marked = []
    for name, backend in BACKENDS.items():
        reason = backend.obstacle(x)
        if reason == NO_TRITON:  # nothing to test or to skip yet
            continue
        skip = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
        marked.append(pytest.param(name, marks=skip))
    return marked


def check(backend: str, case: Case) -> None:
    run, c, limit = BACKENDS[backend], case.double(), bounds(case)
    x_hat, mse = run.reconstruct(case.x, case.y, case.z)
    exact, exact_mse = reference.reconstruct(c.x, c.y, c.z)
    assert x_hat.dtype == case.x.dtype
    assert mse.dtype == torch.float32
    assert_within(x_hat, exact, limit.x_hat, "X'")
    assert_within(mse, exact_mse, limit.mse, "mse")
    assert_within(run.mse(case.x, case.y, case.z), exact_mse, limit.mse, "mse alone")

    factors = case.x, case.y, case.z
    grads = run.reconstruct_backward(case.grad_x_hat, case.grad_mse, *factors, True, True, True)
    exact_grads = reference.reconstruct_backward(
        c.grad_x_hat, c.grad_mse, c.x, c.y, c.z, True, True, True
    )
    for name, grad, exact_grad in zip("xyz", grads, exact_grads, strict=True):
        assert grad.dtype == case.x.dtype
        assert_within(grad, exact_grad, getattr(limit, f"grad_{name}"), f"gradient of {name}")


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64_reference(backend, shape, layout, dtype):
    for shared in SHARING:
        check(backend, make(shape, layout, dtype, shared))


@pytest.mark.parametrize("backend", backends())
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (4, 70, 20, 150))),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    shared=st.sampled_from(SHARING),
)
def test_agrees_on_any_shape(backend, shape, layout, dtype, shared):
    check(backend, make(shape, layout, dtype, shared))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shared", SHARING)
def test_gradients_only_when_asked_for(backend, layout, shared):
    case = make((3, 17, 5, 33), layout, torch.float32, shared)
    run, factors = BACKENDS[backend].reconstruct_backward, (case.x, case.y, case.z)
    every = run(case.grad_x_hat, case.grad_mse, *factors, True, True, True)
    for needs in [(True, False, False), (False, True, False), (False, False, True)]:
        some = run(case.grad_x_hat, case.grad_mse, *factors, *needs)
        for need, grad, full in zip(needs, some, every, strict=True):
            if need:
                torch.testing.assert_close(grad, full, rtol=1e-6, atol=1e-6)
            else:
                assert grad.numel() == 0


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("shared", SHARING)
def test_missing_and_expanded_gradients(backend, shared):
    case = make((3, 17, 5, 33), "contiguous", torch.float32, shared)
    run, factors = BACKENDS[backend].reconstruct_backward, (case.x, case.y, case.z)
    ones = torch.ones(()).expand_as(case.grad_x_hat)
    for upstream, mse in [(None, case.grad_mse), (ones, None), (ones, case.grad_mse)]:
        needs = (mse is not None, True, True)
        exact = reference.reconstruct_backward(
            None if upstream is None else upstream.double(),
            None if mse is None else mse.double(),
            *(t.double() for t in factors),
            *needs,
        )
        for grad, expected in zip(run(upstream, mse, *factors, *needs), exact, strict=True):
            torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_shared_factors_per_image_or_summed(backend, layout):
    case = make((3, 17, 5, 33), layout, torch.float32, (True, True))
    run, factors = BACKENDS[backend].reconstruct_backward, (case.x, case.y, case.z)
    images = features((3, 17, 33), layout, torch.float32)
    for mse in (case.grad_mse, None):
        needs = (mse is not None, True, True)
        summed = run(images.sum(0), mse, *factors, *needs)
        for a, b in zip(run(images, mse, *factors, *needs), summed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", backends())
def test_expanded_factors_are_per_image(backend):
    case = make((3, 17, 5, 33), "contiguous", torch.float32, (True, True))
    y, z = case.y.expand(3, -1, -1), case.z.expand(3, -1, -1)
    x_hat, _ = BACKENDS[backend].reconstruct(case.x, y, z)
    torch.testing.assert_close(x_hat, (case.y @ case.z).expand(3, -1, -1))
    grads = BACKENDS[backend].reconstruct_backward(
        case.grad_x_hat.expand(3, -1, -1), case.grad_mse, case.x, y, z, True, True, True
    )
    copies = BACKENDS["reference"].reconstruct_backward(
        case.grad_x_hat.expand(3, -1, -1), case.grad_mse, case.x, y, z, True, True, True
    )
    torch.testing.assert_close(grads, copies, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shared", SHARING)
def test_same_bits_every_run(backend, layout, shared):
    case = make((4, 300, 16, 1089), layout, torch.float32, shared)
    run, factors = BACKENDS[backend], (case.x, case.y, case.z)

    def results():
        return *run.reconstruct(*factors), *run.reconstruct_backward(
            case.grad_x_hat, case.grad_mse, *factors, True, True, True
        )

    first = results()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("shared", SHARING)
def test_any_number_of_threads(backend, threads, shared):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(backend, make((3, 300, 4, 700), "contiguous", torch.float32, shared))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", backends())
def test_nan_and_inf_go_through(backend):
    case = make((2, 9, 3, 40), "contiguous", torch.float32, (True, True))
    case.x[1, 4, 7] = float("nan")
    x_hat, mse = BACKENDS[backend].reconstruct(case.x, case.y, case.z)
    assert mse.isnan()
    assert x_hat.isfinite().all()
    case.x[1, 4, 7] = float("inf")
    assert BACKENDS[backend].mse(case.x, case.y, case.z) == float("inf")
    grad_x, *_ = BACKENDS[backend].reconstruct_backward(
        None, case.grad_mse, case.x, case.y, case.z, True, True, True
    )
    assert grad_x[1, 4, 7] == float("inf")
    assert grad_x[0].isfinite().all()
    case.y[2, 0] = float("nan")
    x_hat, _ = BACKENDS[backend].reconstruct(case.x, case.y, case.z)
    assert x_hat[2].isnan().all()
    assert x_hat[3].isfinite().all()
