"""The two halves of double attention: bases gathered from pixels, and dealt out to pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def gather(x: Tensor, queries: Tensor) -> Tensor:
    """Bases of an image: K weighted means of its pixels.

        Y = X A^T,    A = softmax over N of Q X

    (feature gathering; Chen et al., "A2-Nets: Double Attention Networks", NeurIPS 2018.)

    Args:
        x: features (B, C, N) or (B, C, H, W) with N = H W.
        queries: Q (K, C), of x's dtype and device.

    Returns:
        Y (B, C, K), of x's dtype.
    """
    rows = x if x.dim() == 3 else x.flatten(2)
    return rows @ torch.softmax(torch.matmul(queries, rows), dim=-1).mT


def distribute(y: Tensor, keys: Tensor, bias: Tensor, guide: Tensor) -> Tensor:
    """What every pixel of a guide carries of the bases.

        X' = Y Z,    Z = softmax over K of (G guide + b)

    (feature distribution; A2-Nets, as above. Y and the guide may be of any two resolutions.)

    Args:
        y: bases (B, M, K).
        keys: G (K, D). bias: b (K,).
        guide: features (B, D, N) or (B, D, H, W).

    Returns:
        X' (B, M, N) or (B, M, H, W), of the guide's dtype.
    """
    rows = guide if guide.dim() == 3 else guide.flatten(2)
    z = torch.softmax(torch.matmul(keys, rows) + bias[:, None], dim=1)
    x_hat = y @ z
    return x_hat if guide.dim() == 3 else x_hat.unflatten(2, guide.shape[2:])
