"""Decoders: context features (and low-level features) to class logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation


def upsample(x: Tensor, size: torch.Size, align_corners: bool = True) -> Tensor:
    """Bilinear resampling of ``(B, C, h, w)`` to ``size``, two numbers.

    Strided convolutions sample a ``16 k + 1`` wide image (513, say) at the pixels 0, 16, ...,
    16 k: aligned corners put the features back exactly there. At any other size they stretch, by up
    to a stride at the far end; the centers of pixels, ``align_corners=False``, then lie closer.
    """
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


class DeepLabDecoder(nn.Module):
    """The decoder of DeepLabV3+ (Chen et al., ECCV 2018).

    ``forward(context, low)`` takes context features ``(B, context_channels, h, w)`` and low-level
    features ``(B, low_channels, H, W)`` and returns logits ``(B, num_classes, H, W)``.
    """

    def __init__(self, context_channels: int, low_channels: int, num_classes: int) -> None:
        super().__init__()
        self.low = Conv2dNormActivation(low_channels, 48, 1)
        self.fuse = nn.Sequential(
            Conv2dNormActivation(context_channels + 48, 256, 3),
            nn.Dropout(0.5),
            Conv2dNormActivation(256, 256, 3),
            nn.Dropout(0.1),
        )
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def forward(self, context: Tensor, low: Tensor) -> Tensor:
        low = self.low(low)
        context = upsample(context, low.shape[-2:])
        return self.classifier(self.fuse(torch.cat((context, low), dim=1)))


class PointwiseDecoder(nn.Module):
    """EMANet's: dropout and a 1x1 classifier on the context features alone.

    ``forward(context, low)`` takes ``(B, context_channels, h, w)``, does not look at ``low``, and
    returns logits ``(B, num_classes, h, w)``.
    """

    def __init__(self, context_channels: int, low_channels: int, num_classes: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(context_channels, num_classes, 1)

    def forward(self, context: Tensor, low: Tensor) -> Tensor:
        return self.classifier(self.dropout(context))
