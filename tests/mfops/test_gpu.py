"""What only a GPU shows: streams, devices, graphs, memory, TF32, and torch's tools on CUDA tensors.

Agreement over the table of awkward shapes is in test_backends.py.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from cases import Case, U, check, make
from torch import Tensor
from torch._dynamo.utils import counters

import mfops
from mfops import reference
from mfops.backends import BACKENDS

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last"]


class Problem(NamedTuple):
    x: Tensor
    y: Tensor
    z: Tensor
    grad_x_hat: Tensor
    grad_mse: Tensor


def problem(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "contiguous",
    shared: bool = False,
    device: str = DEVICE,
    seed: int = 0,
) -> Problem:
    """Random tensors for a forward and a backward pass, both terms of the gradients of one size."""
    torch.manual_seed(seed)
    batch, channels, rank, pixels = shape
    images = [] if shared else [batch]

    def features() -> Tensor:
        if layout == "channels_last":
            return torch.randn(batch, pixels, channels, device=device, dtype=dtype).mT
        return torch.randn(batch, channels, pixels, device=device, dtype=dtype)

    return Problem(
        x=features(),
        y=torch.randn(*images, channels, rank, device=device, dtype=dtype),
        z=torch.randn(*images, rank, pixels, device=device, dtype=dtype),
        grad_x_hat=features(),
        grad_mse=torch.tensor(batch * channels * pixels / 2, device=device),
    )


def leaves(p: Problem) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in (p.x, p.y, p.z)]


def results(p: Problem, op: Callable = mfops.factorized_reconstruction) -> list[Tensor]:
    """X', mse and the gradients of x, y and z."""
    inputs = leaves(p)
    outputs = op(*inputs)
    grads = torch.autograd.grad(outputs, inputs, (p.grad_x_hat, p.grad_mse))
    return [t.detach() for t in (*outputs, *grads)]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(("X'", "mse", "dX", "dY", "dZ"), actual, expected, strict=True):
        assert torch.equal(a, b), f"{name} differs by up to {(a.float() - b.float()).abs().max()}"


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def needs_memory(gib: float) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free:.1f} GiB are there")


def runs_or_skips(name: str) -> None:
    """Under `use_backend(name)`: skips the test, with the reason, where the backend can't run."""
    one = torch.ones(1, 1, 1, device=DEVICE)
    try:
        mfops.factorized_mse(one, one[0], one[0])
    except RuntimeError as error:
        if "cannot run this call" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(params=["native", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that the whole test runs on, by explicit choice."""
    with mfops.use_backend(request.param):
        runs_or_skips(request.param)
        yield request.param


@pytest.fixture
def native() -> None:
    """For tests of the native kernels alone."""
    with mfops.use_backend("native"):
        runs_or_skips("native")


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


def move(t: Tensor, device: str) -> Tensor:
    """The tensor on a device, with the strides it has."""
    memory = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    return memory.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


class OnGpu:
    """A backend's operators for tensors of the CPU; the kernels run on the GPU."""

    def __init__(self, name: str) -> None:
        self.backend = BACKENDS[name]

    def __getattr__(self, operator: str) -> Callable:
        def run(*arguments: Any) -> Any:
            moved = [move(t, DEVICE) if isinstance(t, Tensor) else t for t in arguments]
            found = getattr(self.backend, operator)(*moved)
            return found.cpu() if isinstance(found, Tensor) else [t.cpu() for t in found]

        return run


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
    assert relative_error(mse, total / x.numel()) < 4096 * U  # as in cases.bounds
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
