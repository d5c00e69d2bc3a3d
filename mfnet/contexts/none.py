"""No context at all: what every other module is to be compared with."""

from __future__ import annotations

from torchvision.ops import Conv2dNormActivation


def none(in_channels: int, out_channels: int = 256) -> Conv2dNormActivation:
    """``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``, each pixel by itself.

    The 1x1 convolution, BatchNorm and ReLU that a decoder needs to get its channels.
    """
    return Conv2dNormActivation(in_channels, out_channels, 1)
