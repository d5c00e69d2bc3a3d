"""What only a GPU shows of the operators that find factors: streams, graphs, memory, repeated runs.

Agreement over the table of awkward shapes is in test_factor_backends.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from factor_cases import check, make
from gpu import DTYPES, LAYOUTS, OnGpu, needs_memory, runs_or_skips
from torch import Tensor

import mfops
from mfops import reference
from mfops.backends import BACKENDS
from mfops.methods import METHODS

pytestmark = pytest.mark.gpu

NATIVE = BACKENDS["native"]


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    with mfops.use_backend("native"):
        runs_or_skips("native")
        yield


def features(shape: tuple[int, int, int], dtype: torch.dtype, layout: str, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    batch, channels, pixels = shape
    if layout == "channels_last":
        return torch.randn(batch, pixels, channels, device="cuda", dtype=dtype).mT.relu_()
    return torch.randn(batch, channels, pixels, device="cuda", dtype=dtype).relu_()


def bases(channels: int, rank: int, method: str) -> Tensor:
    torch.manual_seed(1)
    return METHODS[method].noise(channels, rank).cuda()


def results(x: Tensor, y0: Tensor, method: str, steps: int = 3) -> list[Tensor]:
    """Everything the method's operators compute."""
    found = list(NATIVE.factorize(x, y0, method, steps))
    if method in ("em", "nmf"):
        found += NATIVE.factorize_reconstruct(x, y0, method, steps)
    if method == "nmf":
        y, z, z_scale, x_hat, mse = found[2:]
        found.append(NATIVE.nmf_backward(x_hat, mse, x, y, z, z_scale))
    return found


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"result {i}"


# The selection that `make gpu-sanitize` runs: few and small, every kind of load and store.
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", [*LAYOUTS, "every second pixel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sanitized(dtype, layout, method):
    for shape in [(2, 70, 5, 33), (2, 530, 64, 41), (1, 40, 100, 64)]:
        check(OnGpu("native"), make(shape, layout, dtype, method), method, dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_rank(dtype, layout, method):
    for rank in (1, 15, 16, 17, 32, 33, 64, 65, 127, 128, 129, 192, 255, 256):
        check(OnGpu("native"), make((2, 150, rank, 131), layout, dtype, method), method, dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_bit_pattern_in_100_runs(layout, method):
    x, y0 = features((4, 512, 1089), torch.bfloat16, layout), bases(512, 64, method)
    first = results(x, y0, method)
    for _ in range(99):
        assert_same_bits(results(x, y0, method), first)


@pytest.mark.parametrize("method", ["em", "nmf"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_size_that_stays_in_a_cluster_and_one_that_does_not(layout, method):
    """The first image's pixels twice over have the same bases, by either kernel: on compute
    capability 9.0 and later (512, 1089, 64) stays in shared memory, 2178 pixels do not."""
    x, y0 = features((2, 512, 1089), torch.bfloat16, layout), bases(512, 64, method)
    twice = torch.cat([x, x], dim=-1)
    if layout == "channels_last":
        twice = twice.mT.contiguous().mT
    y, z, _, x_hat, mse = NATIVE.factorize_reconstruct(x, y0, method, 3)
    y_twice, z_twice, _, x_hat_twice, mse_twice = NATIVE.factorize_reconstruct(twice, y0, method, 3)
    torch.testing.assert_close(y_twice, y, rtol=0.05, atol=0.01)
    torch.testing.assert_close(z_twice[..., :1089], z, rtol=0.05, atol=0.02)
    torch.testing.assert_close(x_hat_twice[..., 1089:], x_hat, rtol=0.05, atol=0.05)
    torch.testing.assert_close(mse_twice, mse, rtol=1e-2, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_runs_on_the_current_stream(method):
    x, y0 = features((4, 300, 1089), torch.bfloat16, "contiguous"), bases(300, 16, method)
    expected = results(x, y0, method)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # another stream would by now have read the zeros
        late.copy_(x)
        actual = results(late, y0, method)
    stream.synchronize()
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_graph(layout, method):
    x, y0 = features((4, 512, 1089), torch.bfloat16, layout), bases(512, 64, method)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(x, y0, method)  # modules loaded at the first call are no part of a graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(x, y0, method)
    for seed in (1, 2):
        new = features((4, 512, 1089), torch.bfloat16, layout, seed)
        x.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, results(new, y0, method))


@pytest.mark.parametrize("method", ["em", "nmf"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_the_31_elements(layout, method):
    """The last image lies beyond 2^31 elements."""
    needs_memory(40)
    x, y0 = features((3, 683, 2**20 + 1), torch.bfloat16, layout), bases(683, 8, method)
    assert x.numel() > 2**31
    y, z, *_ = NATIVE.factorize_reconstruct(x, y0, method, 2)
    expected = reference.factorize(x[2:].float(), y0, method, 2)[0]
    torch.testing.assert_close(y[2:], expected, rtol=2e-2, atol=2e-3)
    assert z[2].isfinite().all()


@pytest.mark.parametrize("method", ["em", "nmf"])
def test_gradients_of_the_module_reach_its_input(method):
    x = features((2, 512, 1089), torch.bfloat16, "contiguous").requires_grad_()
    context = mfops.FactorizedContext(512, rank=64, size=(33, 33), factorizer=method).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        out, mse = context(x, return_loss=True)
    (out.float().square().mean() + mse).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.any()
