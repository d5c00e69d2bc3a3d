"""The operators that find Y and Z as torch sees them, and what the CPU's kernels depend on."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS
from factor_cases import check, make
from runs import Run
from torch.utils.flop_counter import FlopCounterMode

from mfops import reference
from mfops.backends import BACKENDS, EXTENSION_ERROR
from mfops.methods import METHODS

OPS = torch.ops.mfops
NATIVE = BACKENDS["native"]
FUSED_METHODS = [name for name, method in METHODS.items() if method.fused]
# More than one tile an image, and more than one group of tiles where there are several threads.
TILED = [(1, 2500, 2, 200), (1, 30, 5, 14000)]
needs_extension = pytest.mark.skipif(EXTENSION_ERROR is not None, reason=str(EXTENSION_ERROR))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(method, layout, dtype):
    for shared in (True, False):
        case = make((2, 6, 3, 20), layout, dtype, method, shared)
        torch.library.opcheck(OPS.factorize.default, (case.x, case.y0, method, 2))
        torch.library.opcheck(OPS.factorize.default, (case.x, case.y0, method, 2, False, 7.0))
        if method in FUSED_METHODS:
            torch.library.opcheck(OPS.factorize_reconstruct.default, (case.x, case.y0, method, 2))
    if method != "nmf":
        return
    factors = OPS.factorize_reconstruct(case.x, case.y0, method, 2)[:3]
    for upstream in [
        (case.grad_x_hat, case.grad_mse),
        (None, case.grad_mse),
        (case.grad_x_hat, None),
    ]:
        torch.library.opcheck(OPS.nmf_backward.default, (*upstream, case.x, *factors))


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_of_the_products_in_the_reference(method):
    case = make((3, 8, 5, 25), "contiguous", torch.float32, method)

    def flops(run, *args) -> int:
        with FlopCounterMode(display=False) as counter:
            run(*args)
        return counter.get_total_flops()

    for steps in (1, 4):
        arguments = case.x, case.y0, method, steps
        expected = flops(reference.factorize, *arguments)
        assert flops(OPS.factorize, *arguments) == expected > 0
        if method in FUSED_METHODS:
            assert (
                flops(OPS.factorize_reconstruct, *arguments)
                == flops(reference.factorize_reconstruct, *arguments)
                > expected
            )
    if method != "nmf":
        return
    factors = reference.factorize_reconstruct(case.x, case.y0, method, 2)[:3]
    for upstream in [
        (case.grad_x_hat, case.grad_mse),
        (None, case.grad_mse),
        (case.grad_x_hat, None),
    ]:
        arguments = *upstream, case.x, *factors
        expected = flops(reference.nmf_backward, *arguments)
        assert flops(OPS.nmf_backward, *arguments) == expected > 0


THREADS = [1, 3, 8]


@needs_extension
@pytest.mark.parametrize("shape", TILED, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("layout", "dtype"), [("contiguous", torch.float32), ("channels_last", torch.bfloat16)], ids=str
)
def test_any_number_of_threads(method, shape, layout, dtype):
    case = make(shape, layout, dtype, method)
    for threads in THREADS:
        torch.set_num_threads(threads)
        check(NATIVE, case, method, Run("native", "cpu").operands(dtype), steps=2)


@needs_extension
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("method", FUSED_METHODS)
def test_same_bits_every_run_with_tiles_and_threads(method, threads):
    torch.set_num_threads(threads)
    case = make((3, 2500, 3, 400), "contiguous", torch.float32, method)
    first = NATIVE.factorize_reconstruct(case.x, case.y0, method, 3)
    for _ in range(10):
        again = NATIVE.factorize_reconstruct(case.x, case.y0, method, 3)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_gradients_in_other_layouts(layout):
    case = make((2, 6, 3, 20), layout, torch.float32, "nmf")
    factors = NATIVE.factorize_reconstruct(case.x, case.y0, "nmf", 2)[:3]
    other = case.grad_x_hat.mT.contiguous().mT if layout == "contiguous" else case.grad_x_hat
    for upstream in (
        other.contiguous() if layout == "channels_last" else other,
        torch.ones(()).expand_as(case.x),
        torch.ones(6, 1).expand_as(case.x),
    ):
        arguments = upstream, case.grad_mse, case.x, *factors
        expected = reference.nmf_backward(*arguments)
        actual = NATIVE.nmf_backward(*arguments)
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == case.x.stride()


@needs_extension
@pytest.mark.parametrize("method", METHODS)
def test_bases_of_any_strides(method):
    case = make((2, 6, 3, 20), "contiguous", torch.float32, method)
    expected = NATIVE.factorize(case.x, case.y0, method, 2)
    for y0 in (
        case.y0.mT.contiguous().mT,
        case.y0.expand(2, -1, -1),
        torch.stack([case.y0, case.y0], -1)[..., 0],
    ):
        torch.testing.assert_close(NATIVE.factorize(case.x, y0, method, 2), expected)


@needs_extension
def test_a_method_without_kernels_is_refused_by_name():
    x, y0 = torch.rand(1, 4, 5), torch.rand(4, 2)
    with pytest.raises(RuntimeError, match="expected em, nmf, vq or cd, got pca"):
        OPS.factorize(x, y0, "pca", 1)
    with pytest.raises(RuntimeError, match="expected em or nmf, got vq"):
        OPS.factorize_reconstruct(x, y0, "vq", 1)
