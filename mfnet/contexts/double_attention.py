"""A2-Net's context: bases gathered over the image, then dealt out to its pixels."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from mfnet.contexts.base import UnitContext
from mfops.checks import check_positive


class DoubleAttention(nn.Module):
    """Chen et al., "A2-Nets: Double Attention Networks", NeurIPS 2018; shape-preserving.

    With A, B, V three 1x1 convolutions of x, flattened to (.., N)::

        Y = A softmax over N of B^T     (feature gathering)
        Z = softmax over K of V         (feature distribution)

    and ``relu(x + BN(conv(Y Z)))``. ``mfops.FactorizedContext`` has the same factors of X
    itself (``factorizer="double_attention"``).

    Args:
        channels: C of the input ``(B, C, h, w)``; A has C / 4 channels.
        rank: K, the number of gathered bases.

    Raises:
        ValueError: ``rank`` below 1.
    """

    def __init__(self, channels: int, rank: int = 64) -> None:
        super().__init__()
        check_positive("rank", rank)
        inner = max(channels // 4, 1)
        self.value = nn.Conv2d(channels, inner, 1)
        self.gather = nn.Conv2d(channels, rank, 1)
        self.distribute = nn.Conv2d(channels, rank, 1)
        self.project = Conv2dNormActivation(inner, channels, 1, activation_layer=None)

    def forward(self, x: Tensor) -> Tensor:
        a, b, v = (conv(x).flatten(2) for conv in (self.value, self.gather, self.distribute))
        y = a @ torch.softmax(b, dim=-1).mT
        rebuilt = (y @ torch.softmax(v, dim=-2)).unflatten(2, x.shape[2:])
        return F.relu(x + self.project(rebuilt))


class DoubleAttentionContext(UnitContext):
    """``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``.

    3x3 convolution to 512, BatchNorm, ReLU; ``DoubleAttention``; 3x3 convolution to
    ``out_channels``, BatchNorm, ReLU.

    Args:
        rank: K, the number of gathered bases.

    Raises:
        ValueError: ``rank`` below 1.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, rank: int = 64) -> None:
        super().__init__(in_channels, out_channels, partial(DoubleAttention, rank=rank))
