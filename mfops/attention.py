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

from mfops.autocast import autocasts
from mfops.checks import check_device, check_features, check_kind, check_tensor
from mfops.reference import channels_innermost
from mfops.tracing import one_node


@one_node
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
        TypeError: not a tensor, a dtype not listed or, outside autocast, dtypes that differ.
        ValueError: shapes or devices that do not fit, an empty x.
    """
    check_features(x)
    _check("queries", queries, ("K", x.shape[1]), "x", x)
    rows = x if x.dim() == 3 else x.flatten(2)
    # matmul would copy all features where the queries want a gradient.
    shared = queries.expand(rows.shape[0], -1, -1)
    if channels_innermost(rows):
        # Laid out for the softmax: over pixels that lie apart it takes most of the time on a GPU.
        scores = torch.bmm(rows.mT, shared.mT).mT.contiguous()
        weights = torch.softmax(scores, dim=2)
        return torch.bmm(weights.to(rows.dtype), rows.mT).mT
    weights = torch.softmax(torch.bmm(shared, rows), dim=2)
    return torch.bmm(rows, weights.mT.to(rows.dtype))


@one_node
def distribute(
    y: Tensor, keys: Tensor, bias: Tensor, guide: Tensor, residual: Tensor | None = None
) -> Tensor:
    """What every pixel of a guide carries of the bases.

        X' = R + Y Z,    Z = softmax over K of (V G + b)

    (feature distribution; A2-Nets, as above.) The guide need not have the pixels that the bases
    were gathered from: coefficients of a finer map upsample what the bases say.

    Args:
        y: bases (B, M, K), or what a linear map made of them.
        keys: V (K, D).
        bias: b (K,).
        guide: features G (B, D, N) or (B, D, H, W).
        residual: R, of the shape of X', or none. All are of one dtype and device.

    Returns:
        X' (B, M, N) or (B, M, H, W), of y's dtype, or the autocast dtype.

    Raises:
        TypeError: not a tensor, a dtype that `gather` does not take or, outside autocast, dtypes
            that differ.
        ValueError: shapes or devices that do not fit, an empty guide.
    """
    check_features(guide, "guide")
    _check("keys", keys, ("K", guide.shape[1]), "the guide", guide)
    _check("bias", bias, (keys.shape[0],), "the guide", guide)
    _check("y", y, (guide.shape[0], "M", keys.shape[0]), "the guide", guide)
    if residual is not None:
        shape = (*y.shape[:2], *guide.shape[2:])
        _check("residual", residual, shape, "the guide", guide)
        residual = residual.flatten(2)
    rows = guide if guide.dim() == 3 else guide.flatten(2)
    shared = keys.expand(rows.shape[0], -1, -1)  # as in gather
    if channels_innermost(rows):
        z = torch.softmax(torch.baddbmm(bias, rows.mT, shared.mT), dim=2)
        x_hat = _product(z.to(y.dtype), y.mT, None if residual is None else residual.mT).mT
    else:
        z = torch.softmax(torch.baddbmm(bias[:, None], shared, rows), dim=1)
        x_hat = _product(y, z.to(y.dtype), residual)
    return x_hat if guide.dim() == 3 else x_hat.unflatten(2, guide.shape[2:])


def _product(a: Tensor, b: Tensor, residual: Tensor | None) -> Tensor:
    """A B, or R + A B."""
    return torch.bmm(a, b) if residual is None else torch.baddbmm(residual, a, b)


def _check(
    name: str, tensor: Tensor, expected: tuple[int | str, ...], like: str, features: Tensor
) -> None:
    """Of that shape, where letters stand for any number from 1 on, and of the features' kind."""
    check_tensor(name, tensor)
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        size > 0 if isinstance(own, str) else size == own
        for size, own in zip(shape, expected, strict=False)
    )
    if not fits:
        wanted = str(expected).replace("'", "")
        raise ValueError(f"{name}: expected shape {wanted}, got {shape}")
    (check_device if autocasts(features) else check_kind)(name, tensor, like, features)
