"""The public functions: shapes, layouts, autocast, gradients, and every documented error."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import SHARING, make

import mfops
from mfops import reference


def factors(shared=(True, True), dtype=torch.float32, shape=(2, 6, 3, 20)):
    case = make(shape, "contiguous", dtype, shared)
    return case.x, case.y, case.z


@pytest.mark.parametrize("shared", SHARING)
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_and_rows_agree(shared, channels_last):
    x, y, z = factors(shared)
    images = x.unflatten(2, (4, 5))
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    x_hat, mse = mfops.factorized_reconstruction(images, y, z)
    rows, rows_mse = mfops.factorized_reconstruction(x, y, z)
    assert x_hat.shape == images.shape
    torch.testing.assert_close(x_hat.flatten(2), rows)
    torch.testing.assert_close(mse, rows_mse)
    torch.testing.assert_close(mfops.factorized_mse(images, y, z), mse)
    if not all(shared):
        assert x_hat.stride() == images.stride()


def test_shared_factors_give_one_expanded_product():
    x, y, z = factors()
    x_hat, _ = mfops.factorized_reconstruction(x, y, z)
    assert x_hat.stride(0) == 0
    assert x_hat.untyped_storage().nbytes() == 6 * 20 * 4


@pytest.mark.parametrize("images", [False, True])
def test_the_product_of_each_image_may_change_in_place(images):
    x, y, z = factors((False, True))
    x = (x.unflatten(2, (4, 5)) if images else x).requires_grad_()
    y.requires_grad_()

    def gradients(relu):
        x_hat, mse = mfops.factorized_reconstruction(x, y, z)
        return torch.autograd.grad(relu(x_hat).square().sum() + mse, (x, y))

    torch.testing.assert_close(gradients(torch.relu_), gradients(torch.relu))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_accumulates_in_float32_under_autocast(dtype):
    """Forward, in a second derivative, and where an operator has no kernels."""
    torch.manual_seed(0)
    y, z = torch.randn(6, 3).to(dtype), torch.randn(3, 20).to(dtype)
    x = (y.float() @ z.float()).expand(2, -1, -1).to(dtype)  # all the error is of rounding
    y.requires_grad_()
    big = torch.full((6, 3), 200.0, dtype=dtype), torch.full((3, 20), 200.0, dtype=dtype)

    def results():
        mse = mfops.factorized_mse(x, y, z)
        (gradient,) = torch.autograd.grad(mse, y, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), y)
        operator = torch.ops.mfops.factorize_reconstruct(x, y.detach().float(), "em", 2)[-1]
        return mse, gradient, second, operator, mfops.factorized_mse(x, *big)

    with mfops.use_backend("reference"):
        expected = results()
        assert expected[0] > 0
        with torch.autocast("cpu", dtype):
            found = results()
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("shared", SHARING)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_match_autograd_of_the_textbook_lines(shared, channels_last, dtype):
    case = make((2, 6, 3, 20), "contiguous", dtype, shared)
    leaves = [t.requires_grad_() for t in (case.x, case.y, case.z)]
    images = leaves[0].unflatten(2, (4, 5))
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    x_hat, mse = mfops.factorized_reconstruction(images, *leaves[1:])
    weight = torch.randn(images.shape, dtype=torch.double)
    ((x_hat * weight).sum() + 100 * mse).backward()

    exact = [t.detach().double().requires_grad_() for t in leaves]
    product = exact[1] @ exact[2]
    error = (exact[0] - product).square().mean()
    ((product * weight.flatten(2)).sum() + 100 * error).backward()
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    for leaf, expected in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == dtype
        scale = expected.grad.abs().max().item()
        torch.testing.assert_close(leaf.grad.double(), expected.grad, rtol=rtol, atol=rtol * scale)


def test_only_the_gradients_asked_for():
    x, y, z = factors()
    y.requires_grad_()
    x_hat, mse = mfops.factorized_reconstruction(x, y, z)
    (x_hat.sum() + mse).backward()
    assert x.grad is None
    assert z.grad is None
    assert y.grad is not None
    x.requires_grad_()
    x_hat, _ = mfops.factorized_reconstruction(x, y, z)
    assert torch.autograd.grad(x_hat.sum(), x, allow_unused=True) == (None,)


def test_second_derivative_in_float32():
    x, y, z = (t.requires_grad_() for t in factors())
    mse = mfops.factorized_mse(x, y, z)
    (grad_x,) = torch.autograd.grad(mse, x, create_graph=True)
    (again,) = torch.autograd.grad(grad_x.sum(), x)
    torch.testing.assert_close(again, torch.full_like(x, 2 / x.numel()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_in_its_dtype(dtype):
    x, y, z = factors()
    with torch.autocast("cpu", dtype=dtype):
        x_hat, mse = mfops.factorized_reconstruction(x, y.requires_grad_(), z)
    low = [t.to(dtype) for t in (x, y, z)]
    expected, expected_mse = mfops.factorized_reconstruction(*low)
    assert x_hat.dtype == dtype
    assert mse.dtype == torch.float32
    assert torch.equal(x_hat, expected)
    assert torch.equal(mse, expected_mse)
    mse.backward()
    assert y.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_hat, mse = mfops.factorized_reconstruction(*factors(dtype=torch.float64))
        x, y, z = factors()
        with pytest.raises(TypeError, match=r"y: expected .* torch.float64, got torch.float32"):
            mfops.factorized_mse(x.double(), y, z)
        context = mfops.FactorizedContext(6, 3, (4, 5), "double_attention")
        with pytest.raises(TypeError, match=r"x: expected .* torch.float32, got torch.float64"):
            context(torch.randn(2, 6, 4, 5, dtype=torch.float64))
    assert x_hat.dtype == mse.dtype == torch.float64


def test_meta_tensors_give_shapes():
    tensors = [t.to("meta").requires_grad_() for t in factors()]
    x_hat, mse = mfops.factorized_reconstruction(*tensors)
    assert x_hat.shape == (2, 6, 20)
    (x_hat.sum() + mse).backward()
    assert tensors[1].grad.shape == (6, 3)


def test_inputs_are_left_as_they_were():
    tensors = factors()
    before = copy.deepcopy(tensors)
    mfops.factorized_reconstruction(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def test_no_temporary_of_the_size_of_x():
    from torch.profiler import ProfilerActivity, profile

    x, y, z = (t.requires_grad_() for t in factors(shape=(8, 256, 4, 1000)))
    with (
        mfops.use_backend("native"),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace,
    ):
        mse = mfops.factorized_mse(x, y, z)
        mse.backward()
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in trace.key_averages())
    size = x.numel() * x.element_size()
    assert size <= allocated < 1.1 * size  # the gradient of x and little else


def test_reference_backend_agrees():
    tensors = factors()
    native = mfops.factorized_reconstruction(*tensors)
    with mfops.use_backend("reference"):
        torch.testing.assert_close(mfops.factorized_reconstruction(*tensors), native)
    torch.testing.assert_close(reference.reconstruct(*tensors)[1], native[1])


X, Y, Z = torch.zeros(2, 6, 20), torch.zeros(6, 3), torch.zeros(3, 20)
BAD = {
    "x: expected a torch.Tensor, got list": (TypeError, ([1.0], Y, Z)),
    "x: expected shape (B, C, N) or (B, C, H, W), got (6, 20)": (ValueError, (X[0], Y, Z)),
    "x: expected one of float32, bfloat16, float16, float64, got int64": (
        TypeError,
        (X.long(), Y, Z),
    ),
    "x: expected at least one element, got shape (0, 6, 20)": (ValueError, (X[:0], Y, Z)),
    "y: expected a torch.Tensor, got NoneType": (TypeError, (X, None, Z)),
    "y: expected shape (C, K) or (B, C, K), got (6,)": (ValueError, (X, Y[:, 0], Z)),
    "y: expected the dtype of x, torch.float32, got torch.float64": (TypeError, (X, Y.double(), Z)),
    "y: expected the device of x, cpu, got meta": (ValueError, (X, Y.to("meta"), Z)),
    "y: expected the batch size of x, 2, got (3, 6, 3)": (ValueError, (X, Y.expand(3, 6, 3), Z)),
    "y: expected at least one basis (K >= 1), got (6, 0)": (ValueError, (X, Y[:, :0], Z[:0])),
    "y: expected C = 6 rows as x has channels, got (5, 3)": (ValueError, (X, Y[:5], Z)),
    "z: expected a torch.Tensor, got str": (TypeError, (X, Y, "z")),
    "z: expected shape (K, N) or (B, K, N), got (1, 1, 3, 20)": (ValueError, (X, Y, Z[None, None])),
    "z: expected the dtype of x, torch.float32, got torch.bfloat16": (
        TypeError,
        (X, Y, Z.bfloat16()),
    ),
    "z: expected K = 3 rows as y has columns, got (2, 20)": (ValueError, (X, Y, Z[:2])),
    "z: expected N = 20 columns as x has pixels, got (3, 19)": (ValueError, (X, Y, Z[:, :19])),
}


@pytest.mark.parametrize("function", [mfops.factorized_reconstruction, mfops.factorized_mse])
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(function, message):
    error, arguments = BAD[message]
    with pytest.raises(error) as caught:
        function(*arguments)
    assert str(caught.value) == message
