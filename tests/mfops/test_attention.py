"""Bases gathered from pixels and dealt out to pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mfops

SHAPES = ((2, 5, 7, 3), (1, 1, 1, 1), (3, 33, 129, 64))  # B, C, N, K


def problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64, outputs: int = 4
) -> tuple[Tensor, ...]:
    """x, queries, y, keys, bias, guide."""
    torch.manual_seed(0)
    batch, channels, pixels, rank = shape
    sizes = (
        (batch, channels, pixels),
        (rank, channels),
        (batch, outputs, rank),
        (rank, channels),
        (rank,),
        (batch, channels, 2 * pixels),
    )
    return tuple(torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_are_attention(shape: tuple[int, int, int, int]) -> None:
    """Of K queries to the pixels, and of the pixels to K keys: torch's own, without scaling."""
    x, queries, y, keys, bias, guide = problem(shape)
    batch, _, pixels = guide.shape
    expected = F.scaled_dot_product_attention(
        queries.expand(batch, -1, -1), x.mT, x.mT, scale=1.0
    ).mT
    torch.testing.assert_close(mfops.gather(x, queries), expected)
    mask = bias.expand(batch, pixels, -1)
    expected = F.scaled_dot_product_attention(
        guide.mT, keys.expand(batch, -1, -1), y.mT, attn_mask=mask, scale=1.0
    ).mT
    torch.testing.assert_close(mfops.distribute(y, keys, bias, guide), expected)
    residual = torch.randn_like(expected)
    found = mfops.distribute(y, keys, bias, guide, residual)
    torch.testing.assert_close(found, residual + expected)


def test_maps_and_memory_layouts() -> None:
    x, queries, y, keys, bias, guide = problem((2, 5, 12, 3))
    maps, fine = x.unflatten(2, (3, 4)), guide.unflatten(2, (4, 6))
    bases = mfops.gather(x, queries)
    dealt = mfops.distribute(y, keys, bias, guide).unflatten(2, (4, 6))
    for layout in (torch.contiguous_format, torch.channels_last):
        found = mfops.gather(maps.contiguous(memory_format=layout), queries)
        torch.testing.assert_close(found, bases)
        found = mfops.distribute(y, keys, bias, fine.contiguous(memory_format=layout))
        torch.testing.assert_close(found, dealt)
        for residual in (dealt, dealt.contiguous(memory_format=layout)):
            found = mfops.distribute(y, keys, bias, fine.contiguous(memory_format=layout), residual)
            torch.testing.assert_close(found, 2 * dealt)
            assert found.is_contiguous(memory_format=layout)


def test_gradients() -> None:
    x, queries, y, keys, bias, guide = (t.requires_grad_() for t in problem((2, 3, 5, 4)))
    assert torch.autograd.gradcheck(mfops.gather, (x, queries))
    residual = torch.randn(2, 4, 10, dtype=torch.float64, requires_grad=True)
    for given in ((y, keys, bias, guide), (y, keys, bias, guide, residual)):
        assert torch.autograd.gradcheck(mfops.distribute, given)
        assert torch.autograd.gradgradcheck(mfops.distribute, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision(dtype: torch.dtype) -> None:
    """Scores, weights and results are each rounded once: scores up to 20 to 20 u."""
    x, queries, y, keys, bias, guide = problem((2, 17, 65, 9), dtype)
    residual = torch.randn(2, 4, 130).to(dtype)
    exact = [t.double() for t in (x, queries, y, keys, bias, guide)]
    unit = torch.finfo(dtype).eps
    for found, expected in (
        (mfops.gather(x, queries), mfops.gather(*exact[:2])),
        (mfops.distribute(y, keys, bias, guide), mfops.distribute(*exact[2:])),
        (
            mfops.distribute(y, keys, bias, guide, residual),
            mfops.distribute(*exact[2:], residual.double()),
        ),
    ):
        assert found.dtype == dtype
        error = (found.double() - expected).norm() / expected.norm()
        assert error < 20 * unit


def test_autocast_and_compile() -> None:
    x, queries, y, keys, bias, guide = problem((2, 16, 60, 8), torch.float32)

    residual = torch.randn(2, 4, 120)

    def both() -> tuple[Tensor, ...]:
        dealt = mfops.distribute(y, keys, bias, guide)
        return mfops.gather(x, queries), dealt, mfops.distribute(y, keys, bias, guide, residual)

    with torch.autocast("cpu", torch.bfloat16):
        for found in both():
            assert found.dtype == torch.bfloat16
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(), both(), strict=True):
        torch.testing.assert_close(found, expected)


def test_fx_traces_each_as_one_node() -> None:
    class Both(torch.nn.Module):
        def forward(self, x: Tensor, queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
            return mfops.distribute(mfops.gather(x, queries), keys, bias, x)

    x, queries, _, keys, bias, _ = problem((2, 5, 7, 3))
    traced = torch.fx.symbolic_trace(Both())
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert calls == [mfops.gather, mfops.distribute]
    torch.testing.assert_close(traced(x, queries, keys, bias), Both()(x, queries, keys, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x: expected shape \(B, C, N\) or \(B, C, H, W\), got \(2, 3"),
        ({"queries": torch.zeros(3, 6)}, r"queries: expected shape \(K, 5\), got \(3, 6\)"),
        ({"queries": torch.zeros(0, 5)}, r"queries: expected shape \(K, 5\), got \(0, 5\)"),
        ({"y": torch.zeros(2, 4, 2)}, r"y: expected shape \(2, M, 3\), got \(2, 4, 2\)"),
        ({"keys": torch.zeros(3, 6)}, r"keys: expected shape \(K, 5\), got \(3, 6\)"),
        ({"bias": torch.zeros(3, 1)}, r"bias: expected shape \(3,\), got \(3, 1\)"),
        ({"residual": torch.zeros(2, 4, 1)}, r"residual: expected shape \(2, 4, 14\), got \(2, 4"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    names = ("x", "queries", "y", "keys", "bias", "guide")
    given = dict(zip(names, problem((2, 5, 7, 3), torch.float32), strict=True)) | change

    def both() -> None:
        mfops.gather(given["x"], given["queries"])
        mfops.distribute(*(given[name] for name in names[2:]), given.get("residual"))

    with pytest.raises(ValueError, match=message):
        both()


@pytest.mark.parametrize("name", ["x", "queries", "y", "keys", "bias", "guide", "residual"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.tolist(), "expected a torch.Tensor, got list"),
        (lambda t: t.double(), "expected the dtype of (x|the guide), torch.float"),
        (lambda t: t.to("meta"), "expected the device of (x|the guide), (cpu|meta)"),
        (lambda t: t.to_sparse(), "expected a dense tensor, got one of layout torch.sparse_coo"),
    ],
)
def test_what_is_no_tensor_or_of_another_kind_is_refused(name, change, message) -> None:
    """A guide or x of another kind is told by what has to be like it."""
    names = ("x", "queries", "y", "keys", "bias", "guide", "residual")
    tensors = (*problem((2, 5, 7, 3), torch.float32), torch.zeros(2, 4, 14))
    given = dict(zip(names, tensors, strict=True))
    given[name] = change(given[name])
    own = {"x": "(x|queries)", "guide": "(guide|y|keys|bias)"}.get(name, name)
    function, arguments = (
        (mfops.gather, names[:2]) if name in names[:2] else (mfops.distribute, names[2:])
    )
    with pytest.raises((TypeError, ValueError), match=f"{own}: {message}"):
        function(*(given[argument] for argument in arguments))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_and_gradients_lie_as_the_features_do(memory_format):
    """Else the layers around would turn every map."""
    x = torch.randn(2, 6, 4, 5).contiguous(memory_format=memory_format).requires_grad_()
    y = mfops.gather(x, torch.randn(3, 6))
    x_hat = mfops.distribute(y, torch.randn(3, 6), torch.randn(3), x)
    assert x_hat.is_contiguous(memory_format=memory_format)
    for out in (y, x_hat):
        (gradient,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
        assert gradient.is_contiguous(memory_format=memory_format)
