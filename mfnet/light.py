"""MFNet Light: context and upsampling are one factorization of the logits.

Logits of many pixels have a low rank: L = P Z, classes x K times K x pixels. The bases, and with
them P, come from where features are semantic and few, at stride 8; the coefficients Z from where
pixels are many, at stride 4. No wide map ever exists there: what a decoder of the DeepLab family
spends 1.3 million multiply-adds a pixel on costs some ten thousand.

Mask classification (MaskFormer: class scores times masks) is the same formula with bases that are
learned; here they are gathered from the image, as in double attention (A2-Net).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from mfnet.decoder import upsample
from mfops import distribute, gather
from mfops.checks import check_positive

HEADS = 4


def _separable(channels: int, kernel_size: int) -> nn.Sequential:
    """Each channel by itself, BatchNorm; then across them, BatchNorm, ReLU."""
    return nn.Sequential(
        Conv2dNormActivation(
            channels, channels, kernel_size, groups=channels, activation_layer=None
        ),
        Conv2dNormActivation(channels, channels, 1),
    )


class PyramidContext(nn.Module):
    """Features at strides 8, 16 and 32 as one map X at stride 8.

    1x1 convolutions to ``width`` channels come first, as they commute with bilinear upsampling;
    then their sum, BatchNorm, ReLU, and a residual separable 5x5 convolution.

    ``forward`` takes ``[(B, C_i, h_i, w_i), ...]``, finest first, and returns
    ``(B, width, h_0, w_0)``.
    """

    align_corners: ClassVar[bool] = False

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1, bias=False) for c in channels)
        self.norm = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
        self.local = _separable(width, 5)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = self.summed(features)
        return x + self.local(x)

    def summed(self, features: Sequence[Tensor]) -> Tensor:
        """The projected features' sum, normalised."""
        first, *others = (
            lateral(feature) for lateral, feature in zip(self.laterals, features, strict=True)
        )
        for other in others:
            first = first + upsample(other, first.shape[-2:], self.align_corners)
        summed: Tensor = self.norm(first)
        return summed


class FactorizedDecoder(nn.Module):
    """Logits P Z, plus what is linear in X and in the guide::

        Y = X softmax over N of (Q X)^T       bases, gathered at stride 8
        P = W attention(Y)                    K columns of logits
        G = separable(low + X, squeezed)      the guide, at stride 4
        Z = softmax over K of (V G + b)       coefficients
        L = P Z + A X + B G

    The bases see each other in one pre-norm transformer layer: they are K tokens, so that it costs
    next to nothing.

    ``forward(x, low)`` takes X ``(B, width, h, w)`` and low-level features
    ``(B, low_channels, H, W)`` and returns logits ``(B, num_classes, H, W)``.

    Args:
        width: channels of X, a multiple of 8; the guide has half of them.
        rank: K, the number of bases.

    Raises:
        ValueError: ``rank`` below 1, another ``width``.
    """

    align_corners: ClassVar[bool] = False  # pixels are squares: their centres lie between corners

    def __init__(self, width: int, low_channels: int, num_classes: int, rank: int) -> None:
        super().__init__()
        check_positive("rank", rank)
        if check_positive("width", width) % 8:
            raise ValueError(f"width: expected a multiple of 8, got {width}")
        inner = width // 2
        self.low = nn.Conv2d(low_channels, inner, 1, bias=False)
        self.squeeze = nn.Conv2d(width, inner, 1, bias=False)
        self.norm = nn.Sequential(nn.BatchNorm2d(inner), nn.ReLU())
        self.guide = _separable(inner, 3)
        # Scores of variance 1 from features whose squares are 0.5 on average, as after a ReLU.
        self.queries = nn.Parameter(torch.randn(rank, width) * (2 / width) ** 0.5)
        self.keys = nn.Parameter(torch.randn(rank, inner) * (2 / inner) ** 0.5)
        self.key_bias = nn.Parameter(torch.zeros(rank))
        self.attention = Block(width, HEADS, mlp_ratio=2, qkv_bias=True)
        self.classes = nn.Conv1d(width, num_classes, 1, bias=False)
        self.linear = nn.Conv2d(width, num_classes, 1)
        self.detail = nn.Conv2d(inner, num_classes, 1, bias=False)

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        guide = self.guided(x, low)
        linear = self._resampled(self.linear(x), guide) + self.detail(guide)
        return linear + self.context(x, guide)

    def guided(self, x: Tensor, low: Tensor) -> Tensor:
        """G ``(B, width / 2, H, W)``."""
        low = self.low(low)
        guide: Tensor = self.guide(self.norm(low + self._resampled(self.squeeze(x), low)))
        return guide

    def bases(self, x: Tensor) -> Tensor:
        """Y ``(B, width, K)``."""
        return gather(x, self.queries)

    def context(self, x: Tensor, guide: Tensor) -> Tensor:
        """P Z."""
        columns = self.classes(self.attention(self.bases(x).mT).mT)
        return distribute(columns, self.keys, self.key_bias, guide)

    def _resampled(self, x: Tensor, like: Tensor) -> Tensor:
        return upsample(x, like.shape[-2:], self.align_corners)


def light(
    low_channels: int,
    high_channels: Sequence[int],
    num_classes: int,
    rank: int = 64,
    width: int = 128,
) -> tuple[PyramidContext, FactorizedDecoder]:
    """Context and decoder of MFNet Light, for features of so many channels."""
    decoder = FactorizedDecoder(width, low_channels, num_classes, rank)
    return PyramidContext(high_channels, width), decoder
