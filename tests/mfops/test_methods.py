"""The methods against their papers' formulas, written anew in NumPy, float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mfops
from mfops import reference
from mfops.methods import METHODS, NMF, VQ, Method, with_temperature

Array = np.ndarray
EPS = 1e-6


def softmax_over_bases(scores: Array) -> Array:
    e = np.exp(scores - scores.max(axis=0))
    return e / e.sum(axis=0)


def lengths(columns: Array) -> Array:
    return np.sqrt((columns**2).sum(axis=0))


def unit(columns: Array, least: float) -> Array:
    return columns / np.maximum(lengths(columns), least)


def em(x: Array, y: Array, steps: int) -> tuple[Array, Array]:
    for _ in range(steps):
        z = softmax_over_bases(y.T @ x)
        y = np.stack([(x * (row / (EPS + row.sum()))).sum(axis=1) for row in z], axis=1)
        y = y / (EPS + lengths(y))
    return y, z


def nmf(x: Array, y: Array, steps: int) -> tuple[Array, Array]:
    z = softmax_over_bases(y.T @ x)
    for _ in range(steps):
        z = z * (y.T @ x) / ((y.T @ y) @ z + EPS)
        y = y * (x @ z.T) / (y @ (z @ z.T) + EPS)
    return y, z


def means(x: Array, z: Array) -> Array:
    return x @ (z / (EPS + z.sum(axis=1, keepdims=True))).T


def vq(x: Array, y: Array, steps: int, t: float = 100) -> tuple[Array, Array]:
    for _ in range(steps):
        z = softmax_over_bases(t * unit(y, EPS).T @ unit(x, 1e-12))
        y = means(x, z)
    return y, z


def cd(x: Array, y: Array, steps: int, t: float = 100) -> tuple[Array, Array]:
    for _ in range(steps):
        z = softmax_over_bases(t * y.T @ unit(x, 1e-12))
        y = unit(means(x, z), EPS)
    return y, z


# Final coefficients as functions of x alone: y, z and the lengths of `fixed` are constants.


def em_final(x: Array, y: Array, z: Array, fixed: Array) -> Array:
    return z


def nmf_final(x: Array, y: Array, z: Array, fixed: Array) -> Array:
    return z * (y.T @ x) / ((y.T @ y) @ z + EPS)


def vq_final(x: Array, y: Array, z: Array, fixed: Array, t: float = 100) -> Array:
    return softmax_over_bases(t * unit(y, EPS).T @ (x / (EPS + lengths(fixed))))


def cd_final(x: Array, y: Array, z: Array, fixed: Array) -> Array:
    return np.linalg.inv(y.T @ y + 0.1 * np.eye(y.shape[1])) @ y.T @ x


class Numpy(NamedTuple):
    rounds: Callable[[Array, Array, int], tuple[Array, Array]]
    final: Callable[[Array, Array, Array, Array], Array]


NUMPY = {
    "em": Numpy(em, em_final),
    "nmf": Numpy(nmf, nmf_final),
    "vq": Numpy(vq, vq_final),
    "cd": Numpy(cd, cd_final),
}
SHAPES = [(2, 9, 4, 30), (1, 1, 1, 1), (3, 4, 7, 5), (2, 30, 3, 1)]
every_method = pytest.mark.parametrize("method", NUMPY)


def make(shape: tuple[int, int, int, int], method: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    batch, channels, rank, pixels = shape
    x = torch.randn(batch, channels, pixels, dtype=torch.float64)
    y0 = METHODS[method].noise(channels, rank).double()
    return (x.relu() if method == "nmf" else x), y0


def test_every_method_is_tested():
    assert set(NUMPY) == set(METHODS)


@pytest.mark.parametrize("t", [1, 10.0])
def test_inverse_temperature_of_vq_and_cd(t):
    for method, rounds in (("vq", vq), ("cd", cd)):
        x, y0 = make((2, 9, 4, 30), method)
        y, z = mfops.factorize(x, y0, method, 3, inverse_temperature=t)
        module = mfops.FactorizedContext(9, 4, 30, method, steps=3, inverse_temperature=t).double()
        module.factorizer.bases.copy_(y0)
        for b, image in enumerate(x.numpy()):
            means, assigned = rounds(image, y0.numpy(), 3, t)
            final = vq_final(image, means, assigned, image, t)
            if method == "cd":
                final = cd_final(image, means, assigned, image)
            np.testing.assert_allclose(y[b].numpy(), means, rtol=1e-9)
            np.testing.assert_allclose(z[b].numpy(), final, rtol=1e-9, atol=1e-12)
            rebuilt = module.eval().factorizer.product(x)[b]
            np.testing.assert_allclose(rebuilt.numpy(), means @ final, rtol=1e-9, atol=1e-12)


def test_a_method_of_ones_own_keeps_what_it_has_at_another_temperature():
    class Weighted(VQ):
        def __init__(self, weight: float) -> None:
            super().__init__()
            self.weight = weight

    own = Weighted(0.5)
    other = with_temperature(own, 2.0)
    assert isinstance(other, Weighted)
    assert (other.weight, other.inverse_temperature) == (0.5, 2.0)
    assert own.inverse_temperature == 100
    assert with_temperature(own, 100) is own


@pytest.mark.parametrize(
    ("method", "t", "message"),
    [
        ("em", 1.0, "method 'em' takes none, got 1.0"),
        ("nmf", 1.0, "method 'nmf' takes none, got 1.0"),
        ("vq", 0, "expected a number from 1e-6 to 1e6, got 0"),
        ("cd", 1e50, "expected a number from 1e-6 to 1e6, got 1e.50"),
        ("cd", "hot", "expected a number from 1e-6 to 1e6, got 'hot'"),
    ],
)
def test_bad_inverse_temperatures(method, t, message):
    with pytest.raises(ValueError, match=f"inverse_temperature: {message}"):
        mfops.factorize(torch.rand(2, 3, 5), torch.rand(3, 2), method, inverse_temperature=t)
    with pytest.raises(ValueError, match=f"inverse_temperature: {message}"):
        mfops.FactorizedContext(3, factorizer=method, inverse_temperature=t)


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_reference_is_the_published_iteration(method, shape, steps):
    x, y0 = make(shape, method)
    y, z = reference.factorize(x, y0, method, steps)
    public_y, public_z = mfops.factorize(x, y0, method, steps)
    for b, image in enumerate(x.numpy()):
        expected_y, expected_z = NUMPY[method].rounds(image, y0.numpy(), steps)
        final = NUMPY[method].final(image, expected_y, expected_z, image)
        pairs = [(y, expected_y), (z, expected_z), (public_y, expected_y), (public_z, final)]
        for actual, expected in pairs:
            np.testing.assert_allclose(actual[b].numpy(), expected, rtol=1e-6, atol=1e-12)
    if method in ("em", "nmf"):
        solved_y, solved_z, _, x_hat, mse = reference.factorize_reconstruct(x, y0, method, steps)
        torch.testing.assert_close(solved_y, public_y)
        torch.testing.assert_close(solved_z, public_z)
        torch.testing.assert_close(x_hat, public_y @ public_z)
        torch.testing.assert_close(mse, (x - x_hat).square().mean())


@pytest.mark.parametrize(
    ("update", "result"),
    [
        ("update_coefficients", r"z of shape \(2, 3\), expected \(1, 2, 9\)"),
        ("update_bases", r"y of shape \(2, 3\), expected \(1, 6, 2\)"),
    ],
)
def test_an_update_of_another_shape_is_named(update, result, monkeypatch):
    monkeypatch.setattr(METHODS["em"], update, lambda x, y, z: torch.ones(2, 3))
    with pytest.raises(ValueError, match=f"method EM: {update} returned {result}"):
        reference.factorize(torch.rand(1, 6, 9), torch.rand(6, 2), "em", 1)


@every_method
def test_a_high_rank_on_several_threads(method):
    torch.set_num_threads(2)
    x, y0 = make((2, 9, 256, 30), method)
    _, z = mfops.factorize(x, y0, method, 1)
    for actual, image in zip(z.numpy(), x.numpy(), strict=True):
        y, before = NUMPY[method].rounds(image, y0.numpy(), 1)
        expected = NUMPY[method].final(image, y, before, image)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-12)


@every_method
@pytest.mark.parametrize("loss", [0.0, 3.0])
def test_gradients_by_finite_differences(method, loss):
    """Of X' and its mse, with what the method holds constant held constant."""
    x, _ = make((1, 6, 3, 8), method)
    weights = torch.randn_like(x)
    factorizer = mfops.FactorizedContext(6, 3, factorizer=method).eval().double().factorizer
    x.requires_grad_()
    x_hat, mse = factorizer.reconstruct(x)
    value = (weights * x_hat).sum() + loss * mse
    if value.requires_grad:
        (grad,) = torch.autograd.grad(value, x)
    else:
        assert (method, loss) == ("em", 0.0)
        grad = torch.zeros_like(x)

    image = x.detach()[0].numpy()
    y, z = NUMPY[method].rounds(image, factorizer.bases.numpy(), METHODS[method].eval_steps)

    def value_of(moved: Array) -> float:
        rebuilt = y @ NUMPY[method].final(moved, y, z, image)
        return (weights[0].numpy() * rebuilt).sum() + loss * ((moved - rebuilt) ** 2).mean()

    np.testing.assert_allclose(value.item(), value_of(image), rtol=1e-6)
    step = 1e-6
    for at in np.ndindex(*image.shape):
        if method == "nmf" and image[at] == 0:
            continue  # on relu's edge
        up, down = image.copy(), image.copy()
        up[at] += step
        down[at] -= step
        z_scale = (value_of(up) - value_of(down)) / (2 * step)
        np.testing.assert_allclose(grad[0][at].item(), z_scale, rtol=1e-5, atol=1e-7)


def test_nmf_can_be_differentiated_twice():
    """Against autograd through the same formulas, and its own by finite differences."""
    x, y0 = make((2, 5, 3, 7), "nmf")
    x.requires_grad_()
    weights, direction = torch.randn_like(x), torch.randn_like(x)

    def curvature(x_hat: Tensor, mse: Tensor) -> Tensor:
        value = (weights * x_hat.square()).sum() + 50 * mse
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        return torch.autograd.grad((direction * grad).sum(), x)[0]

    y, z = mfops.factorize(x, y0, "nmf", 2)
    expected = curvature(*mfops.factorized_reconstruction(x, y, z))
    solved = mfops.factorize_reconstruct(x, y0, "nmf", 2)
    torch.testing.assert_close(curvature(*solved[:2]), expected)


@every_method
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_features_give_finite_factors_and_gradients(method, value):
    x = torch.full((2, 5, 12), value, requires_grad=True)
    y, z = mfops.factorize(x, METHODS[method].noise(5, 3), method, 4)
    assert y.isfinite().all()
    assert z.isfinite().all()
    if z.requires_grad:
        z.sum().backward()
        assert x.grad.isfinite().all()


@every_method
def test_nan_stays_in_its_image(method):
    x, y0 = make((3, 6, 4, 20), method)
    spoilt = x.clone()
    spoilt[1, 2, 3] = float("nan")
    for clean, actual in zip(
        mfops.factorize(x, y0, method), mfops.factorize(spoilt, y0, method), strict=True
    ):
        assert actual[1].isnan().any()
        torch.testing.assert_close(actual[[0, 2]], clean[[0, 2]])


def test_negative_features_follow_nmfs_formulas():
    """They are not looked for; the module takes relu(X)."""
    x, y0 = make((1, 6, 3, 10), "em")
    y, z = mfops.factorize(x, y0.abs(), "nmf", 2)
    expected_y, expected_z = nmf(x[0].numpy(), y0.abs().numpy(), 2)
    np.testing.assert_allclose(y[0].numpy(), expected_y, rtol=1e-6)
    np.testing.assert_allclose(
        z[0].numpy(), nmf_final(x[0].numpy(), expected_y, expected_z, x[0].numpy()), rtol=1e-6
    )


@every_method
def test_shapes_dtypes_and_layouts(method):
    x = torch.rand(2, 6, 4, 5).to(memory_format=torch.channels_last)
    y0 = METHODS[method].noise(6, 3)
    y, z = mfops.factorize(x, y0, method)
    flat = mfops.factorize(x.flatten(2), y0.expand(2, -1, -1), method)
    torch.testing.assert_close((y, z), flat)
    assert y.shape == (2, 6, 3)
    assert z.shape == (2, 3, 20)
    y, z = mfops.factorize(x.bfloat16(), y0, method)
    assert (y.dtype, z.dtype) == (torch.float32, torch.bfloat16)
    y, z = mfops.factorize(x.bfloat16(), y0.bfloat16(), method)
    assert (y.dtype, z.dtype) == (torch.bfloat16, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        rounds_in_float32 = mfops.factorize(x, y0, method)
    expected = mfops.factorize(x.bfloat16(), y0, method)
    assert all(torch.equal(a, b) for a, b in zip(rounds_in_float32, expected, strict=True))


class CountFloatCopies(TorchDispatchMode):
    """How many tensors of some size a block of code makes float32."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **keywords or {})
        if function is torch.ops.aten._to_copy.default:
            self.count += result.numel() == self.numel and result.dtype == torch.float32
        return result


@pytest.mark.parametrize(("method", "copies"), [("em", 0), ("nmf", 1)])
def test_features_become_float32_only_for_an_update_in_the_end(method, copies):
    """em has none, and X is most of the memory."""
    x, y0 = torch.rand(2, 6, 20).bfloat16(), METHODS[method].noise(6, 3)
    with mfops.use_backend("native"), CountFloatCopies(x.numel()) as counted:
        mfops.factorize(x, y0, method)
    assert counted.count == copies


X, Y0 = torch.rand(2, 6, 20), torch.rand(6, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, Y0, "svd"), ValueError, "method: expected one of em, nmf, vq, cd, got 'svd'"),
        ((X, Y0, "em", 0), ValueError, "steps: expected at least 1, got 0"),
        ((X, Y0, "em", 1.5), TypeError, "steps: expected an integer, got float"),
        ((X, Y0, "em", True), TypeError, "steps: expected an integer, got bool"),
        ((X, [1]), TypeError, "y0: expected a torch.Tensor, got list"),
        ((X, Y0[0]), ValueError, r"y0: expected shape \(C, K\) or \(B, C, K\) with B = 2, got"),
        ((X, Y0.expand(3, 6, 3)), ValueError, r"with B = 2, got \(3, 6, 3\)"),
        ((X, Y0[:5]), ValueError, r"y0: expected C = 6 rows as x has channels, got \(5, 3\)"),
        ((X, Y0[:, :0]), ValueError, r"y0: expected at least one basis \(K >= 1\), got \(6, 0\)"),
        ((X, Y0.double()), TypeError, "y0: expected the dtype of x, torch.float32, or float32"),
        ((X, Y0.to("meta")), ValueError, "y0: expected the device of x, cpu, got meta"),
        ((X[:0], Y0), ValueError, "x: expected at least one element"),
        ((X.int(), Y0), TypeError, "x: expected one of float32"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        mfops.factorize(*arguments)


class Halves(Method):
    """Y: means of the two halves of the pixels that lie nearer to either base."""

    def update_coefficients(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.softmax(-torch.cdist(y.mT, x.mT), dim=-2)

    def update_bases(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return x @ (z / z.sum(-1, keepdim=True)).mT


@pytest.fixture
def halves():
    mfops.register_method("halves", Halves())
    yield "halves"
    del METHODS["halves"]


def test_a_method_of_ones_own(halves):
    y, z = mfops.factorize(X, Y0, halves, 2)
    assert y.shape == (2, 6, 3)
    torch.testing.assert_close(z.sum(1), torch.ones(2, 20))
    context = mfops.FactorizedContext(6, 3, factorizer=halves)
    context(X.clone().requires_grad_()).sum().backward()
    assert torch.equal(context.eval()(X), context(X))
    with mfops.use_backend("native"), pytest.raises(RuntimeError, match="kernels for method 'halv"):
        mfops.factorize(X, Y0, halves)


class OwnNMF(NMF):
    pass


@pytest.mark.parametrize("method", [METHODS["em"], OwnNMF()])
def test_kernels_take_no_method_for_another(method):
    """They know methods by name, and nothing of what a subclass changes."""
    mfops.register_method("own", method)
    x, y0 = X.relu(), Y0.abs()
    try:
        y, z = mfops.factorize(x, y0, "own", 2)
        x_hat, _, same_y = mfops.factorize_reconstruct(x, y0, "own", 2)
        with (
            mfops.use_backend("native"),
            pytest.raises(RuntimeError, match=r"kernels for .* 'own"),
        ):
            mfops.factorize_reconstruct(x, y0, "own", 2)
    finally:
        del METHODS["own"]
    torch.testing.assert_close((x_hat, same_y), (y @ z, y))
    assert METHODS["em"].has_kernel


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_reconstruction_of_found_factors(method, dtype):
    """As in two steps, with kernels for all of it and without."""
    x, y0 = (t.to(dtype) for t in make((2, 5, 3, 28), method))
    x = x.unflatten(2, (4, 7)).requires_grad_()
    y, z = mfops.factorize(x, y0, method, 2)
    expected = *mfops.factorized_reconstruction(x, y, z), y
    found = mfops.factorize_reconstruct(x, y0, method, 2)
    torch.testing.assert_close(found, expected)
    assert [t.requires_grad for t in found] == [method != "em", True, False]
    grads = [torch.autograd.grad(mse * x.numel(), x)[0] for _, mse, _ in (found, expected)]
    torch.testing.assert_close(*grads)


@every_method
def test_dtypes_of_the_reconstruction(method):
    x, y0 = (t.float() for t in make((2, 5, 3, 28), method))
    results = mfops.factorize_reconstruct(x.bfloat16(), y0, method, 2)
    assert [t.dtype for t in results] == [torch.bfloat16, torch.float32, torch.float32]
    results = mfops.factorize_reconstruct(x.bfloat16(), y0.bfloat16(), method, 2)
    assert [t.dtype for t in results] == [torch.bfloat16, torch.float32, torch.bfloat16]
    with torch.autocast("cpu", torch.bfloat16):
        results = mfops.factorize_reconstruct(x, y0, method, 2)
    assert [t.dtype for t in results] == [torch.bfloat16, torch.float32, torch.float32]


def test_reconstruction_of_found_factors_takes_a_temperature():
    x, y0 = make((2, 5, 3, 28), "vq")
    at_1, at_100 = (mfops.factorize_reconstruct(x, y0, "vq", 2, t)[0] for t in (1.0, 100.0))
    assert not torch.allclose(at_1, at_100)
    with pytest.raises(ValueError, match="inverse_temperature: method 'em' takes none"):
        mfops.factorize_reconstruct(x, y0, "em", 2, 1.0)


def test_registration():
    with pytest.raises(TypeError, match=r"method: expected an mfops.Method, got ABCMeta"):
        mfops.register_method("mine", Halves)
    for taken in ("em", "learned"):
        with pytest.raises(ValueError, match=f"name: '{taken}' is taken"):
            mfops.register_method(taken, Halves())
