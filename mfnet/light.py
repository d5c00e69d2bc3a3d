"""MFNet Light: context and upsampling are one factorization of the logits.

Logits of many pixels have a low rank: L = P Z, classes x K times K x pixels. The bases, and with
them P, come from where features are semantic and few, at stride 8; the coefficients Z from where
pixels are many, at stride 4. Mask classification (MaskFormer: class scores times masks) is the same
formula with bases that are learned; here they are gathered from the image, as in double attention
(A2-Net), and a linear classifier has its say beside them.

The features themselves are SegFormer's, relu(BN(conv(concat(upsampled)))), in an order that costs a
twentieth: 1x1 convolutions commute with bilinear upsampling, so each level is projected at its own
resolution and added to the next finer one, and two that follow each other are one whose weight is a
product. At stride 4 run the projection of the low-level features, a depthwise convolution and the
classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfnet.decoder import upsample
from mfops import distribute, gather
from mfops.checks import check_positive

LEVELS = 4  # strides 4, 8, 16, 32


class Projection(nn.Module):
    """A 1x1 convolution without bias, whose weight is a product of two matrices, M = B A.

    Learning can be faster than with one matrix ("On the Optimization of Deep Networks: Implicit
    Acceleration by Overparameterization", Arora et al., ICML 2018) and costs the same, but for the
    product of the weights.

    ``forward`` takes ``(B, in_channels, h, w)`` and returns ``(B, out_channels, h, w)``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.empty(out_channels, in_channels))
        self.outer = nn.Parameter(torch.empty(out_channels, out_channels))
        nn.init.xavier_uniform_(self.inner)
        bound = (6 / (LEVELS * out_channels)) ** 0.5  # Kaiming's: the levels are summed, then ReLU
        nn.init.uniform_(self.outer, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, (self.outer @ self.inner)[:, :, None, None])


class PyramidContext(nn.Module):
    """Features at strides 8, 16 and 32, projected and summed at stride 8.

    ``forward`` takes ``[(B, C_i, h_i, w_i), ...]``, finest first, and returns
    ``(B, width, h_0, w_0)``.
    """

    align_corners: ClassVar[bool] = False

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(Projection(c, width) for c in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        projected = [
            lateral(feature) for lateral, feature in zip(self.laterals, features, strict=True)
        ]
        total = projected.pop()
        while projected:
            finer = projected.pop()
            total = finer + upsample(total, finer.shape[-2:], self.align_corners)
        return total


class FactorizedDecoder(nn.Module):
    """Logits P Z, plus what is linear in the features::

        X = relu(BN(S))                        at stride 8, of the sum S of the coarser levels
        Y = X softmax over N of (Q X)^T        K bases
        P = W2 (W1 Y + c)                      K columns of logits
        G = relu(BN(D (project(low) + S)))     at stride 4, D: 3x3, each channel by itself
        Z = softmax over K of (V G + b)        coefficients
        L = P Z + U G + u

    ``forward(summed, low)`` takes S ``(B, width, h, w)`` and low-level features
    ``(B, low_channels, H, W)`` and returns logits ``(B, num_classes, H, W)``.

    Args:
        width: channels of S.
        rank: K, the number of bases.
    """

    align_corners: ClassVar[bool] = False  # pixels are squares: their centers lie between corners

    def __init__(self, width: int, low_channels: int, num_classes: int, rank: int) -> None:
        super().__init__()
        self.low = Projection(low_channels, width)
        self.coarse = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
        # Named as in the weights that are trained already, hence the spelling.
        self.neighbours = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        with torch.no_grad():
            self.neighbours.weight[:, :, 1, 1] += 1  # training begins near the pixel alone
        self.fine = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
        # Scores of variance 1 from features whose squares are 0.5 on average, as after a ReLU.
        self.queries = nn.Parameter(torch.randn(rank, width) * (2 / width) ** 0.5)
        self.keys = nn.Parameter(torch.randn(rank, width) * (2 / width) ** 0.5)
        self.key_bias = nn.Parameter(torch.zeros(rank))
        inner = max(width // 2, 1)
        self.columns = nn.Sequential(
            nn.Linear(width, inner), nn.Linear(inner, num_classes, bias=False)
        )
        self.linear = nn.Conv2d(width, num_classes, 1)

    def forward(self, summed: Tensor, low: Tensor) -> Tensor:
        guide = self.guide(summed, low)
        return self.logits(self.coarse(summed), guide)

    def guide(self, summed: Tensor, low: Tensor) -> Tensor:
        """G."""
        low = self.low(low)
        total = low + upsample(summed, low.shape[-2:], self.align_corners)
        guide: Tensor = self.fine(self.neighbours(total))
        return guide

    def bases(self, x: Tensor) -> Tensor:
        """Y ``(B, width, K)``."""
        return gather(x, self.queries)

    def logits(self, x: Tensor, guide: Tensor) -> Tensor:
        """L."""
        columns = self.columns(self.bases(x).mT).mT
        # The sum is distribute's: written out, torch.compile forms it anew for every neighbor
        # that the upsampling reads, a tenth of the network's time.
        return distribute(columns, self.keys, self.key_bias, guide, self.linear(guide))


def light(
    low_channels: int,
    high_channels: Sequence[int],
    num_classes: int,
    rank: int = 8,
    width: int = 256,
) -> tuple[PyramidContext, FactorizedDecoder]:
    """Context and decoder of MFNet Light, for features of so many channels.

    Raises:
        ValueError: ``rank`` or ``width`` is not a positive integer.
    """
    check_positive("rank", rank)
    check_positive("width", width)
    decoder = FactorizedDecoder(width, low_channels, num_classes, rank)
    return PyramidContext(high_channels, width), decoder
