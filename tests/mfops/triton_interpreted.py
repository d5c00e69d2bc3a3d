"""Triton's kernels as torch sees them; test_triton.py runs this file under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, SHARING, check, make
from factor_cases import make as make_factor_case

import mfops
from mfops import reference
from mfops.backends import BACKENDS
from mfops.methods import METHODS
from mfops.triton import backward

OPS = torch.ops.mfops


@pytest.fixture(autouse=True)
def _on_triton():
    with mfops.use_backend("triton"):
        yield


def test_runs_here():
    assert mfops.available_backends()["triton"] is None


@pytest.mark.parametrize("shared", SHARING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, shared):
    case = make((2, 6, 3, 20), layout, torch.float32, shared)
    factors = case.x, case.y, case.z
    torch.library.opcheck(OPS.triton_reconstruct.default, factors)
    torch.library.opcheck(OPS.triton_mse.default, (*factors, True))
    for upstream, mse, needs in [
        (case.grad_x_hat, case.grad_mse, (True, True, True)),
        (None, case.grad_mse, (True, False, True)),
        (case.grad_x_hat, None, (False, True, False)),
    ]:
        arguments = (upstream, mse, *factors, *needs)
        torch.library.opcheck(OPS.triton_reconstruct_backward.default, arguments)


@pytest.mark.parametrize("shared", SHARING)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_gradients_through_the_public_function_compiled_and_not(layout, shared):
    case = make((2, 6, 3, 20), layout, torch.float32, shared)

    def step(x, y, z):
        x_hat, mse = mfops.factorized_reconstruction(x, y, z)
        return (x_hat.square().sum() + 10 * mse).unsqueeze(0)

    leaves = [t.requires_grad_() for t in (case.x, case.y, case.z)]
    with mfops.use_backend("reference"):
        exact = step(*leaves)
        expected = torch.autograd.grad(exact, leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for run in (step, compiled):
        out = run(*leaves)
        torch.testing.assert_close(out, exact)
        torch.testing.assert_close(torch.autograd.grad(out, leaves), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_opcheck_of_the_methods(layout, method):
    case = make_factor_case((2, 6, 3, 20), layout, torch.float32, method)
    arguments = case.x, case.y0, method, 2
    torch.library.opcheck(OPS.triton_factorize.default, arguments)
    if method not in ("em", "nmf"):
        return
    torch.library.opcheck(OPS.triton_factorize_reconstruct.default, (*arguments, True))
    if method == "em":
        return
    y, z, z_scale, *_ = OPS.triton_factorize_reconstruct(*arguments)
    for upstream, mse in [
        (case.grad_x_hat, case.grad_mse),
        (None, case.grad_mse),
        (case.grad_x_hat, None),
    ]:
        torch.library.opcheck(
            OPS.triton_nmf_backward.default, (upstream, mse, case.x, y, z, z_scale)
        )


@pytest.mark.parametrize("method", ["em", "nmf"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_gradients_through_the_module_compiled_and_not(layout, method):
    x = make_factor_case((2, 6, 3, 20), layout, torch.float32, method).x.requires_grad_()
    context = mfops.FactorizedContext(6, 3, (4, 5), method).eval()

    def step(x):
        x_hat, mse = context(x, return_loss=True)
        return x_hat.square().sum() + 10 * mse

    with mfops.use_backend("reference"):
        exact = step(x)
        expected = torch.autograd.grad(exact, x)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for run in (step, compiled):
        out = run(x)
        torch.testing.assert_close(out, exact)
        torch.testing.assert_close(torch.autograd.grad(out, x), expected)


def test_compiled_graph_holds_the_operator():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(mfops.factorized_mse, fullgraph=True, backend=count)
    for pixels in (20, 21, 33):
        case = make((2, 6, 3, pixels), "contiguous", torch.float32, (True, True))
        compiled(case.x, case.y, case.z)
    assert len(graphs) <= 2  # one for the first size, one for every size
    targets = [node.target for node in graphs[-1].graph.nodes]
    assert OPS.triton_mse.default in targets


def test_second_derivative():
    case = make((2, 6, 3, 20), "contiguous", torch.float32, (True, True))
    x = case.x.requires_grad_()
    mse = mfops.factorized_mse(x, case.y, case.z)
    (grad_x,) = torch.autograd.grad(mse, x, create_graph=True)
    (again,) = torch.autograd.grad(grad_x.sum(), x)
    torch.testing.assert_close(again, torch.full_like(x, 2 / x.numel()))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shared", SHARING)
def test_many_panels(layout, shared, monkeypatch):
    """Units of work as in large problems: several ranges of columns, the last one shorter."""
    monkeypatch.setattr(backward, "PANEL_BYTES", 1)
    check(BACKENDS["triton"], make((2, 40, 60, 300), layout, torch.float32, shared), torch.float32)


def test_nothing_asked_for_and_nothing_given():
    case = make((2, 6, 3, 20), "contiguous", torch.float32, (True, True))
    run, factors = BACKENDS["triton"].reconstruct_backward, (case.x, case.y, case.z)
    assert [g.numel() for g in run(None, case.grad_mse, *factors, False, False, False)] == [0] * 3
    grads = run(None, None, *factors, True, True, True)
    expected = reference.reconstruct_backward(None, None, *factors, True, True, True)
    for grad, zeros in zip(grads, expected, strict=True):
        assert torch.equal(grad, zeros)
