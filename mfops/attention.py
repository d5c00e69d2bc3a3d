"""The two halves of double attention: bases gathered from pixels, and dealt out to pixels.

Both are plain products around a softmax, in whichever order suits the features' layout. On a CPU
and on an H200 they are faster than `scaled_dot_product_attention`, but for a gather of
channels_last features: on a CPU it is level or, forward alone, up to a fifth slower; on an H200 it
took two to three times as long when its softmax ran over pixels that lie apart
(benchmarks/bench_attention.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Proxy

from mfops.checks import check_features
from mfops.tracing import record_function


def gather(x: Tensor, queries: Tensor) -> Tensor:
    """Bases of an image: K weighted means of its pixels.

        Y = X A^T,    A = softmax over N of Q X

    (feature gathering; Chen et al., "A2-Nets: Double Attention Networks", NeurIPS 2018.)

    Args:
        x: features (B, C, N) or (B, C, H, W) with N = H W; float32, bfloat16, float16 or float64.
        queries: Q (K, C), of x's dtype and device.

    Returns:
        Y (B, C, K), of x's dtype, or the autocast dtype.

    Raises:
        TypeError: x is no tensor of a dtype listed.
        ValueError: x has another shape or no element, queries do not fit it.
    """
    if isinstance(x, Proxy):
        return record_function(gather, x, queries)
    check_features(x)
    _check_shape("queries", queries, ("K", x.shape[1]))
    rows = x if x.dim() == 3 else x.flatten(2)
    # matmul would copy all features where the queries want a gradient.
    shared = queries.expand(rows.shape[0], -1, -1)
    if _channels_innermost(rows):
        # Laid out for the softmax: over pixels that lie apart it takes most of the time on a GPU.
        scores = torch.bmm(rows.mT, shared.mT).mT.contiguous()
        weights = torch.softmax(scores, dim=2)
        return torch.bmm(weights.to(rows.dtype), rows.mT).mT
    weights = torch.softmax(torch.bmm(shared, rows), dim=2)
    return torch.bmm(rows, weights.mT.to(rows.dtype))


def distribute(y: Tensor, keys: Tensor, bias: Tensor, guide: Tensor) -> Tensor:
    """What every pixel of a guide carries of the bases.

        X' = Y Z,    Z = softmax over K of (G guide + b)

    (feature distribution; A2-Nets, as above.) The guide need not have the pixels that the bases
    were gathered from: coefficients of a finer map upsample what the bases say.

    Args:
        y: bases (B, M, K), or what a linear map made of them.
        keys: G (K, D). bias: b (K,).
        guide: features (B, D, N) or (B, D, H, W); all of one dtype and device.

    Returns:
        X' (B, M, N) or (B, M, H, W), of y's dtype, or the autocast dtype.

    Raises:
        TypeError: the guide is no tensor of a dtype that `gather` takes.
        ValueError: shapes that do not fit.
    """
    if isinstance(guide, Proxy):
        return record_function(distribute, y, keys, bias, guide)
    check_features(guide)
    _check_shape("keys", keys, ("K", guide.shape[1]))
    _check_shape("bias", bias, (keys.shape[0],))
    _check_shape("y", y, (guide.shape[0], "M", keys.shape[0]))
    rows = guide if guide.dim() == 3 else guide.flatten(2)
    shared = keys.expand(rows.shape[0], -1, -1)  # as in gather
    if _channels_innermost(rows):
        z = torch.softmax(torch.baddbmm(bias, rows.mT, shared.mT), dim=2)
        x_hat = torch.bmm(z.to(y.dtype), y.mT).mT
    else:
        z = torch.softmax(torch.baddbmm(bias[:, None], shared, rows), dim=1)
        x_hat = torch.bmm(y, z.to(y.dtype))
    return x_hat if guide.dim() == 3 else x_hat.unflatten(2, guide.shape[2:])


def _channels_innermost(rows: Tensor) -> bool:
    """Whether to multiply by transposes: results and gradients are to lie as the features do."""
    return rows.stride(1) == 1


def _check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Letters stand for any number from 1 on."""
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        size > 0 if isinstance(own, str) else size == own
        for size, own in zip(shape, expected, strict=False)
    )
    if not fits:
        wanted = str(expected).replace("'", "")
        raise ValueError(f"{name}: expected shape {wanted}, got {shape}")
