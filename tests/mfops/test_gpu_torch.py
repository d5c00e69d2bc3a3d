"""Torch's tools on CUDA tensors: TF32, compilation, export, autocast, DDP, second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from cases import U
from gpu import DEVICE, LAYOUTS, leaves, problem, relative_error, results
from torch._dynamo.utils import counters

import mfops
from mfops import reference

pytestmark = pytest.mark.gpu


@pytest.fixture
def fp32_precision() -> Iterator[Callable[[str], None]]:
    """Sets what float32 products may round to; put back afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield lambda value: setattr(matmul, "fp32_precision", value)
    matmul.fp32_precision = before


@pytest.fixture(autouse=True)
def _unscaled_losses() -> Iterator[None]:
    yield
    mfops.set_loss_scaling(None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_follows_torchs_tf32_setting(backend, layout, fp32_precision):
    p = problem((2, 96, 16, 1089), torch.float32, layout)
    exact = [t.double() for t in p]
    expected = [
        *reference.reconstruct(*exact[:3]),
        *reference.reconstruct_backward(*exact[3:], *exact[:3], True, True, True),
    ]
    size = exact[1].abs() @ exact[2].abs()
    found = {}
    for precision in ("ieee", "tf32"):
        fp32_precision(precision)
        found[precision] = results(p)
    ieee, tf32 = ((found[name][0] - expected[0]).abs() for name in ("ieee", "tf32"))
    assert (ieee <= 2 * 16 * U * size).all()
    # TF32 keeps ten bits after the point: operands are off by 2^-10 where they are cut off.
    assert (tf32 <= (2.01 * 2**-10 + 4 * 16 * U) * size).all()
    for name, *pair, e in zip(
        ("X'", "mse", "dX", "dY", "dZ"), found["ieee"], found["tf32"], expected, strict=True
    ):
        ieee_error, tf32_error = (relative_error(value, e) for value in pair)
        assert ieee_error < 1e-5, name  # float32: 6e-8 and what sums of 1089 terms add
        assert tf32_error < 1e-2, name
        if name != "mse":  # its errors cancel
            assert tf32_error > 10 * ieee_error, name


def test_compiled_code_follows_the_tf32_setting(backend, fp32_precision):
    torch.compiler.reset()
    p = problem((2, 96, 16, 1089), torch.float32)
    compiled = torch.compile(mfops.factorized_reconstruction, fullgraph=True)
    for precision in ("ieee", "tf32", "ieee"):
        fp32_precision(precision)
        expected, _ = mfops.factorized_reconstruction(p.x, p.y, p.z)
        assert torch.equal(compiled(p.x, p.y, p.z)[0], expected)


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)])
def test_one_compilation_for_every_grid(backend, dynamic, graphs):
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(mfops.factorized_reconstruction, fullgraph=True, dynamic=dynamic)
    for pixels in (33, 1000, 1089, 77):
        p = problem((2, 70, 16, pixels), torch.float32)
        for a, b in zip(results(p, compiled), results(p), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == graphs


def test_exports_with_dynamic_grid(backend):
    context = mfops.FactorizedContext(6, rank=3, size=(4, 5)).to(DEVICE).eval()

    class WithLoss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.context = context

        def forward(self, x):
            return self.context(x, return_loss=True)

    dim = torch.export.Dim("height", min=6, max=60)
    x = torch.randn(2, 6, 8, 7, device=DEVICE)
    program = torch.export.export(WithLoss(), (x,), dynamic_shapes={"x": {2: dim}})
    for height in (8, 13):
        x = torch.randn(2, 6, height, 7, device=DEVICE)
        torch.testing.assert_close(program.module()(x), context(x, return_loss=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_in_its_dtype(backend, dtype):
    p = problem((2, 70, 16, 131), torch.float32)
    x, y, z = leaves(p)
    with torch.autocast(DEVICE, dtype=dtype):
        x_hat, mse = mfops.factorized_reconstruction(x, y, z)
    expected = mfops.factorized_reconstruction(*(t.to(dtype) for t in (p.x, p.y, p.z)))
    assert x_hat.dtype == dtype
    assert mse.dtype == torch.float32
    assert torch.equal(x_hat, expected[0])
    assert torch.equal(mse, expected[1])
    mse.backward()
    assert x.grad.dtype == y.grad.dtype == z.grad.dtype == torch.float32


def test_injected_loss_under_autocast_and_grad_scaler(backend):
    torch.manual_seed(0)
    context = mfops.FactorizedContext(64, rank=8, size=(9, 11), loss_weight=0.5).to(DEVICE)
    x = torch.randn(4, 64, 9, 11, device=DEVICE)
    parameters = list(context.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    out, mse = context(x, return_loss=True)
    expected = torch.autograd.grad(out.square().mean() + 0.5 * mse, parameters)

    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    mfops.set_loss_scaling(scaler.scale)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.float16):
            out = context(x)
        scaler.scale(out.float().square().mean()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    before = [t.detach().clone() for t in parameters]
    step()
    for parameter, exact in zip(parameters, expected, strict=True):
        # X, Y, Z, D and the result are rounded to float16, 2^-11 each at most.
        assert relative_error(parameter.grad, exact) < 5 * 2**-11
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))

    scaler.update(new_scale=2.0**40)  # too large for float16: the step is left out
    before = [t.detach().clone() for t in parameters]
    step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert scaler.get_scale() == 2.0**39


def test_distributed_data_parallel(backend, tmp_path):
    if not dist.is_nccl_available():
        pytest.skip("torch was built without NCCL")
    torch.manual_seed(0)
    context = mfops.FactorizedContext(64, rank=8, size=(9, 11), loss_weight=0.5).to(DEVICE)
    x = torch.randn(4, 64, 9, 11, device=DEVICE)
    parameters = list(context.parameters())
    expected = torch.autograd.grad(context(x).square().sum(), parameters)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(context, device_ids=[0])
        wrapped(x).square().sum().backward()
        torch.testing.assert_close([t.grad for t in parameters], list(expected))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("shared", [False, True])
def test_second_derivatives(backend, shared):
    p = problem((2, 9, 4, 33), torch.float32, shared=shared)
    inputs = leaves(p)
    outputs = mfops.factorized_reconstruction(*inputs)
    grads = torch.autograd.grad(outputs, inputs, (p.grad_x_hat, p.grad_mse), create_graph=True)
    actual = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    exact = [t.detach().double().requires_grad_() for t in inputs]
    product = (exact[1] @ exact[2]).expand(exact[0].shape)
    scalar = (product * p.grad_x_hat).sum() + (exact[0] - product).square().mean() * p.grad_mse
    grads = torch.autograd.grad(scalar, exact, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in grads), exact)
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < 1e-4  # float32 sums of up to 66 terms, some of which cancel
