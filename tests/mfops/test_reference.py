"""The specification itself: against the formulas in NumPy, and against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import LAYOUTS, SHARING, make

import mfops
from mfops import reference


@pytest.mark.parametrize("shared", SHARING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_formulas(layout, shared):
    case = make((3, 7, 4, 11), layout, torch.float64, shared)
    x, y, z = (t.numpy() for t in (case.x, case.y, case.z))
    x_hat, mse = reference.reconstruct(case.x, case.y, case.z)
    expected = np.einsum("...ck,...kn->...cn", y, z)
    np.testing.assert_allclose(x_hat.numpy(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(mse.numpy(), ((x - expected) ** 2).mean(), rtol=1e-12)
    np.testing.assert_allclose(reference.mse(case.x, case.y, case.z).numpy(), mse.numpy())


@pytest.mark.parametrize("shared", SHARING)
def test_backward_is_the_derivative(shared):
    case = make((2, 5, 3, 4), "contiguous", torch.float64, shared)
    factors = [t.clone().requires_grad_() for t in (case.x, case.y, case.z)]
    x_hat, mse = reference.reconstruct(*factors)
    torch.autograd.backward([x_hat, mse], [case.grad_x_hat, case.grad_mse.double()])
    grads = reference.reconstruct_backward(
        case.grad_x_hat, case.grad_mse.double(), case.x, case.y, case.z, True, True, True
    )
    for factor, grad in zip(factors, grads, strict=True):
        torch.testing.assert_close(grad, factor.grad)


@pytest.mark.parametrize("shared", SHARING)
def test_gradcheck_first_and_second_order(shared):
    case = make((2, 5, 3, 4), "contiguous", torch.float64, shared)
    factors = [t.requires_grad_() for t in (case.x, case.y, case.z)]
    for function in (mfops.factorized_reconstruction, mfops.factorized_mse):
        assert torch.autograd.gradcheck(function, factors)
        assert torch.autograd.gradgradcheck(function, factors)


def test_low_precision_accumulates_in_float32():
    # 4096 products of 1 * 1: exact in float32, stuck at 256 in bfloat16 sums.
    y, z = torch.ones(1, 4096, dtype=torch.bfloat16), torch.ones(4096, 1, dtype=torch.bfloat16)
    x = torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    x_hat, mse = reference.reconstruct(x, y, z)
    assert x_hat.item() == 4096
    assert mse.item() == 4096.0**2
    assert x_hat.dtype == torch.bfloat16
    assert mse.dtype == torch.float32
