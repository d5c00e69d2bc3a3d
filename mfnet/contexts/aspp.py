"""DeepLab's context, torchvision's atrous spatial pyramid pooling, and its separable form."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from mfnet.contexts.pooling import ImagePooling

# Chen et al., "Encoder-Decoder with Atrous Separable Convolution", at output stride 16.
RATES = (6, 12, 18)


def aspp(in_channels: int, out_channels: int = 256, rates: Sequence[int] = RATES) -> ASPP:
    """``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``: ``torchvision``'s own ``ASPP``.

    Same class, parameters and state dict. Only its pooling branch is exchanged for one that a
    batch of one image can train (``mfnet.contexts.pooling.ImagePooling``).

    Args:
        rates: dilations of the 3x3 convolutions: DeepLab's at output stride 16; (12, 24, 36) at 8.
    """
    module = ASPP(in_channels, list(rates), out_channels)
    module.convs[-1] = ImagePooling(in_channels, out_channels)
    return module


def aspp_separable(
    in_channels: int, out_channels: int = 256, rates: Sequence[int] = RATES
) -> nn.Sequential:
    """``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``: the separable form of ASPP.

    What ``segmentation_models_pytorch.DeepLabV3Plus`` has in this place, parameters and state dict
    included: ``aspp`` with its atrous 3x3 convolutions made separable, then a separable 3x3
    convolution, BatchNorm, ReLU.

    Args:
        rates: as for ``aspp``; segmentation_models_pytorch's default is (12, 24, 36).
    """
    pyramid = aspp(in_channels, out_channels, rates)
    for branch, rate in enumerate(rates, start=1):
        pyramid.convs[branch] = nn.Sequential(
            _separable(in_channels, out_channels, rate), nn.BatchNorm2d(out_channels), nn.ReLU()
        )
    return nn.Sequential(
        pyramid, _separable(out_channels, out_channels, 1), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


def _separable(in_channels: int, out_channels: int, rate: int) -> nn.Sequential:
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across them."""
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            in_channels,
            3,
            padding=rate,
            dilation=rate,
            groups=in_channels,
            bias=False,
        ),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
    )
