"""The operators as torch sees them: opcheck, FLOPs, compile and export."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, SHARING, make
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import mfops

OPS = torch.ops.mfops


@pytest.mark.parametrize("shared", SHARING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, shared):
    case = make((2, 6, 3, 20), layout, torch.float32, shared)
    factors = case.x, case.y, case.z
    torch.library.opcheck(OPS.reconstruct.default, factors)
    torch.library.opcheck(OPS.mse.default, factors)
    backward = OPS.reconstruct_backward.default
    for upstream, mse, needs in [
        (case.grad_x_hat, case.grad_mse, (True, True, True)),
        (None, case.grad_mse, (True, False, True)),
        (case.grad_x_hat, None, (False, True, False)),
    ]:
        torch.library.opcheck(backward, (upstream, mse, *factors, *needs))


@pytest.mark.parametrize("shared", SHARING)
def test_flops_are_counted_by_hand(shared):
    batch, channels, rank, pixels = 3, 8, 4, 25
    case = make((batch, channels, rank, pixels), "contiguous", torch.float32, shared)
    product = 2 * channels * rank * pixels * (1 if all(shared) else batch)
    factors = [t.requires_grad_() for t in (case.x, case.y, case.z)]
    with FlopCounterMode(display=False) as counter:
        x_hat, mse = mfops.factorized_reconstruction(*factors)
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        (x_hat.sum() + mse).backward()
    assert counter.get_total_flops() == 3 * product  # X' anew, dY, dZ
    with FlopCounterMode(display=False) as counter:
        mfops.factorized_mse(factors[0], *(t.detach() for t in factors[1:])).backward()
    assert counter.get_total_flops() == 2 * product  # X' and X' anew


def test_no_operator_counts_for_nothing():
    """An operator without a formula would count 0 FLOPs, silently."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mfops::")]
    packets = {getattr(OPS, name.removeprefix("mfops::").partition(".")[0]) for name in names}
    assert len(packets) >= 6
    assert packets <= set(flop_registry)
    case = make((2, 6, 3, 20), "contiguous", torch.float32, (True, True))
    for op, args in {
        OPS.reconstruct: (),
        OPS.mse: (),
        OPS.reconstruct_backward: (True, True, True),
    }.items():
        upstream = (case.grad_x_hat, case.grad_mse) if args else ()
        with FlopCounterMode(display=False) as counter:
            op(*upstream, case.x, case.y, case.z, *args)
        assert counter.get_total_flops() > 0


@pytest.mark.parametrize("shared", SHARING)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_compiles_whole_and_agrees(layout, shared):
    case = make((2, 6, 3, 20), layout, torch.float32, shared)

    def step(x, y, z):
        x_hat, mse = mfops.factorized_reconstruction(x, y, z)
        return (x_hat.square().sum() + 10 * mse).unsqueeze(0)

    leaves = [t.requires_grad_() for t in (case.x, case.y, case.z)]
    eager = step(*leaves)
    expected = torch.autograd.grad(eager, leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), expected)


def test_compiles_once_for_many_grids():
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(mfops.factorized_reconstruction, fullgraph=True, backend=count)
    for pixels in (20, 21, 33, 50, 77):
        case = make((2, 6, 3, pixels), "contiguous", torch.float32, (True, True))
        compiled(case.x, case.y, case.z)
    assert len(graphs) <= 2  # one for the first size, one for every size


def test_inductor_keeps_the_fused_operator():
    torch.compiler.reset()
    case = make((2, 6, 3, 20), "contiguous", torch.float32, (True, True))
    y = case.y.requires_grad_()
    compiled = torch.compile(mfops.factorized_mse, fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(case.x, y, case.z), y)
    (expected,) = torch.autograd.grad(mfops.factorized_mse(case.x, y, case.z), y)
    torch.testing.assert_close(grad, expected)


def test_exports_with_dynamic_grid():
    context = mfops.FactorizedContext(6, rank=3, size=(4, 5)).eval()

    class WithLoss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.context = context

        def forward(self, x):
            return self.context(x, return_loss=True)

    dim = torch.export.Dim("height", min=6, max=60)
    x = torch.randn(2, 6, 8, 7)
    program = torch.export.export(WithLoss(), (x,), dynamic_shapes={"x": {2: dim}})
    assert "mfops.reconstruct" in str(program.graph)
    for height in (8, 13):
        x = torch.randn(2, 6, height, 7)
        torch.testing.assert_close(program.module()(x), context(x, return_loss=True))
