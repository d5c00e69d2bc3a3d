"""What only a GPU shows of the kernels: large problems, streams, devices, graphs, memory.

Agreement over the table of awkward shapes is in test_backends.py, torch's tools on CUDA tensors are
in test_gpu_torch.py.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable

import pytest
import torch
from cases import Case, U, check, make
from gpu import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    OnGpu,
    Problem,
    assert_same_bits,
    leaves,
    move,
    needs_memory,
    problem,
    relative_error,
    results,
)

import mfops
from mfops import reference
from mfops.backends import BACKENDS

pytestmark = pytest.mark.gpu


# The selection that `make gpu-sanitize` runs: few and small, every kind of load and store.
@pytest.mark.parametrize("shared", [False, True], ids=["per_image", "shared"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "every second pixel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sanitized(native, dtype, layout, shared):
    for shape in [(2, 70, 5, 33), (3, 17, 64, 129), (1, 128, 16, 64)]:
        check(OnGpu("native"), make(shape, layout, dtype, (shared, shared)), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_rank(native, dtype, layout):
    for rank in (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129):
        check(OnGpu("native"), make((2, 70, rank, 131), layout, dtype, (False, False)), dtype)
    for rank in (160, 191, 192, 193, 224, 255, 256):
        check(OnGpu("native"), make((2, 70, rank, 131), layout, dtype, (False, True)), dtype)


@pytest.mark.parametrize(
    "shape", [(70_000, 3, 16, 2), (1, 3, 16, 9_000_000), (1, 9_000_000, 16, 3)], ids=str
)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_tiles_than_a_grid_is_wide(backend, shape, layout, shared):
    """Beyond 65,535 images, or tiles of 128 pixels or channels. One of those left out makes X' and
    dX wrong by 0.003 and more of their norms."""
    needs_memory(12)
    p = problem(shape, torch.float32, layout, shared)
    exact = [t.double() for t in p]
    grad = exact[3].sum(0) if shared else exact[3]
    expected = [
        *reference.reconstruct(*exact[:3]),
        *reference.reconstruct_backward(grad, exact[4], *exact[:3], True, True, True),
    ]
    # Sums of up to 9e6 float32 terms: native kernels have a tree of blocks; Triton's dZ is one
    # chain of FMAs over the channels, whose n roundings add up to about sqrt(n) of one.
    limit = 2 * 9_000_000**0.5 * U if backend == "triton" else 1e-4
    for name, value, e in zip(("X'", "mse", "dX", "dY", "dZ"), results(p), expected, strict=True):
        e = e.expand(value.shape)
        assert relative_error(value, e) < limit, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_the_31_elements(backend, layout):
    needs_memory(16)
    batch, channels, _, pixels = shape = (3, 683, 8, 2**20 + 1)
    assert batch * channels * pixels > 2**31
    x, y, z, _, grad_mse = problem(shape, layout=layout)
    run = BACKENDS[backend]
    x_hat, mse = run.reconstruct(x, y, z)
    # s = 1: dX = X - X', dY = -dX Z^T, dZ = -Y^T dX
    grad_x, grad_y, grad_z = run.reconstruct_backward(None, grad_mse, x, y, z, True, True, True)

    total = torch.zeros((), dtype=torch.double, device=DEVICE)
    expected_y = torch.zeros_like(y, dtype=torch.float32)
    expected_z = torch.zeros_like(z, dtype=torch.float32)
    for image in range(batch):
        z_image = z[image].float()
        for first in range(0, channels, 64):
            rows = (image, slice(first, first + 64))
            y_rows = y[rows].float()
            product = y_rows @ z_image
            error = x[rows].float() - product
            # One rounding to bfloat16; products of 8 terms, each below 20, in float32.
            torch.testing.assert_close(x_hat[rows].float(), product, rtol=2**-8, atol=2e-4)
            torch.testing.assert_close(grad_x[rows].float(), error, rtol=2**-8, atol=2e-4)
            total += error.double().square().sum()
            expected_y[rows] = -(error @ z_image.mT)
            expected_z[image] -= y_rows.mT @ error
    assert relative_error(mse, total / x.numel()) < 4096 * U  # as in cases._judge
    # D and the result are rounded to bfloat16, 2^-8 each at most.
    assert relative_error(grad_y, expected_y) < 2**-7
    assert relative_error(grad_z, expected_z) < 2**-7


@pytest.mark.parametrize("far", ["images", "rows"])
def test_strides_beyond_2_to_the_31(backend, far):
    needs_memory(6)
    case = make((2, 2, 3, 100), "contiguous", torch.bfloat16, (False, False))
    strides = (2**31 + 8, 100, 1) if far == "images" else (100, 2**31 + 8, 1)
    memory = torch.empty(2**31 + 1000, dtype=torch.bfloat16, device=DEVICE)
    moved = Case(*(move(getattr(case, name), DEVICE) for name in case.__dataclass_fields__))
    moved.x = memory.as_strided((2, 2, 100), strides).copy_(moved.x)
    check(BACKENDS[backend], moved, torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_on_the_current_stream(backend, layout):
    p = problem((4, 300, 16, 1089), layout=layout)
    expected = results(p)
    late = Problem(*(torch.zeros_like(t) for t in p))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # another stream would by now have read the zeros
        for target, source in zip(late, p, strict=True):
            target.copy_(source)
        actual = results(late)
    stream.synchronize()
    assert_same_bits(actual, expected)


def test_runs_on_the_tensors_device(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    p = problem((4, 300, 16, 1089), device="cuda:0")
    other = Problem(*(t.to("cuda:1") for t in p))
    with torch.cuda.device(0):
        expected, actual = results(p), results(other)
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in actual)
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a.cpu(), b.cpu()) < 2**-8  # one rounding, should the GPUs differ


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_graph_of_forward_and_backward(backend, layout, shared):
    p = problem((4, 300, 16, 1089), layout=layout, shared=shared)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # tuning and modules loaded at the first call are no part of a graph
            results(p)
            mfops.factorized_mse(p.x, p.y, p.z)
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(p)
        captured_mse = mfops.factorized_mse(p.x, p.y, p.z)
    for seed in (1, 2):
        new = problem((4, 300, 16, 1089), layout=layout, shared=shared, seed=seed)
        for target, source in zip(p, new, strict=True):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, results(new))
        assert torch.equal(captured_mse, mfops.factorized_mse(new.x, new.y, new.z))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_same_bits_whatever_else_runs(backend, dtype, layout, shared):
    p = problem((8, 512, 16, 4225), dtype, layout, shared)
    first = results(p)
    noise, side = torch.randn(4096, 4096, device=DEVICE), torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(side):
            noise @ noise
        assert_same_bits(results(p), first)
    torch.cuda.synchronize()


def test_out_of_memory_leaves_the_next_call_working(backend):
    p = problem((4, 256, 16, 65_536))  # X has 128 MiB
    expected = [t.cpu() for t in results(p)]

    def attempt(call: Callable[[], object]) -> None:
        """Runs out of memory in the middle of a call, and holds nothing afterwards."""
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        allowed = torch.cuda.memory_reserved() + p.x.nbytes // 2
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
        try:
            # Torch before 2.13 does not hand its own message on to extensions.
            with pytest.raises(RuntimeError, match=r"out of memory|API call failed"):
                call()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        assert torch.cuda.memory_allocated() == before

    inputs = leaves(p)
    attempt(lambda: mfops.factorized_reconstruction(*inputs))
    outputs = mfops.factorized_reconstruction(*inputs)
    upstream = p.grad_x_hat, p.grad_mse
    attempt(lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True))
    assert_same_bits([t.cpu() for t in results(p)], expected)


def partials_bytes(backend: str, p: Problem) -> int:
    """Of the float32 partials of dY and dZ that Triton's backward pass adds up, by its own plan."""
    if backend != "triton":
        return 0
    common, backward = (
        importlib.import_module(f"mfops.triton.{name}") for name in ("common", "backward")
    )
    planned = common.Problem.of(p.x, p.y, p.z, tf32=False)
    counts = backward.Units.of(planned).partials(planned)
    return sum(4 * n * t.numel() for t, n in zip((p.y, p.z), counts, strict=True) if n > 1)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_is_that_of_the_results(backend, layout, shared):
    """Beyond what is returned, and the partials that Triton's gradients are planned with, no pass
    takes a hundredth of X, at any moment."""
    p = problem((8, 512, 64, 32_768), layout=layout, shared=shared)
    inputs = leaves(p)

    def requested(kind: str) -> int:
        return torch.cuda.memory_stats()[f"requested_bytes.all.{kind}"]

    def extra(call: Callable[[], object], returned: int) -> tuple[object, int]:
        torch.cuda.reset_peak_memory_stats()
        before = requested("current")
        result = call()
        return result, requested("peak") - before - returned

    results(p)  # whatever the first call keeps for the next ones
    x_bytes, x_hat_bytes = p.x.nbytes, p.x.nbytes // (8 if shared else 1)
    outputs, forward = extra(lambda: mfops.factorized_reconstruction(*inputs), x_hat_bytes + 4)
    gradients = sum(t.nbytes for t in inputs)
    upstream = p.grad_x_hat, p.grad_mse
    _, backward = extra(lambda: torch.autograd.grad(outputs, inputs, upstream), gradients)
    mse, loss_only = extra(lambda: mfops.factorized_mse(*inputs), 4)
    _, loss_backward = extra(lambda: torch.autograd.grad(mse, inputs), gradients)
    partials = partials_bytes(backend, p)
    for name, taken, planned in [
        ("forward", forward, 0),
        ("backward", backward, partials),
        ("mse", loss_only, 0),
        ("backward of mse", loss_backward, partials),
    ]:
        beyond = taken - planned
        assert beyond < x_bytes / 100, f"{name} takes {beyond} bytes, {beyond / x_bytes:.1%} of X"


def test_a_rank_beyond_the_native_kernels_goes_elsewhere(native):
    p = problem((2, 70, 300, 131), torch.float32)
    with mfops.use_backend("native"), pytest.raises(RuntimeError, match=r"'native' cannot .*256"):
        mfops.factorized_mse(p.x, p.y, p.z)
    expected = reference.mse(p.x.double(), p.y.double(), p.z.double())
    assert relative_error(mfops.factorized_mse(p.x, p.y, p.z), expected) < 1e-5


def test_float64_runs_on_the_reference(backend):
    x, y, z = (t.double() for t in problem((2, 9, 4, 33), torch.float32)[:3])
    with pytest.raises(RuntimeError, match=f"'{backend}' cannot run this call: .*float64"):
        mfops.factorized_mse(x, y, z)
    with mfops.use_backend("reference"):
        assert mfops.factorized_mse(x, y, z).dtype == torch.float64


def test_factors_on_another_device_are_named():
    p = problem((2, 9, 4, 33))
    with pytest.raises(ValueError, match="y: expected the device of x, cuda:0, got cpu"):
        mfops.factorized_reconstruction(p.x, p.y.cpu(), p.z)
