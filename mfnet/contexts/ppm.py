"""PSPNet's context: means over regions of several sizes, beside the features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from mfnet.contexts.pooling import ImagePooling

BINS = (1, 2, 3, 6)


class PPMContext(nn.Module):
    """``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``: the pyramid pooling module.

    As in Zhao et al., "Pyramid Scene Parsing Network", section 3.2: means over 1x1, 2x2, 3x3 and
    6x6 bins, each through a 1x1 convolution to ``in_channels / 4``, BatchNorm, ReLU and bilinear
    upsampling (``mfnet.contexts.pooling.ImagePooling``), are concatenated to the features;
    then a 3x3 convolution, BatchNorm, ReLU.

    Raises:
        ValueError: fewer than 4 ``in_channels``.
    """

    def __init__(self, in_channels: int, out_channels: int = 256) -> None:
        super().__init__()
        if in_channels < len(BINS):
            raise ValueError(f"in_channels: expected at least {len(BINS)}, got {in_channels}")
        branch = in_channels // len(BINS)
        self.branches = nn.ModuleList(ImagePooling(in_channels, branch, bins) for bins in BINS)
        self.bottleneck = Conv2dNormActivation(in_channels + len(BINS) * branch, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(torch.cat([x, *(branch(x) for branch in self.branches)], dim=1))
