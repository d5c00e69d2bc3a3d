"""DeepLab's context, torchvision's atrous spatial pyramid pooling, and its separable form."""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP, ASPPPooling

# Chen et al., "Encoder-Decoder with Atrous Separable Convolution", at output stride 16.
RATES = (6, 12, 18)


def aspp(in_channels: int, out_channels: int = 256) -> ASPP:
    """``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``: ``torchvision``'s own ``ASPP``.

    Same class, parameters and state dict. Only its pooling branch is exchanged for one that a
    batch of one image can train (:class:`ImagePooling`).
    """
    module = ASPP(in_channels, list(RATES), out_channels)
    module.convs[-1] = ImagePooling(in_channels, out_channels)
    return module


def aspp_separable(in_channels: int, out_channels: int = 256) -> nn.Sequential:
    """``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``: the separable form of ASPP.

    What ``segmentation_models_pytorch.DeepLabV3Plus`` has in this place, parameters and state dict
    included: :func:`aspp` with its atrous 3x3 convolutions made separable, then a separable 3x3
    convolution, BatchNorm, ReLU. The rates are DeepLab's at output stride 16.
    """
    pyramid = aspp(in_channels, out_channels)
    for branch, rate in enumerate(RATES, start=1):
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


class ImagePooling(ASPPPooling):
    """torchvision's ``ASPPPooling``, trainable with one image.

    The branch pools an image to 1x1, so a batch of one hands its BatchNorm a single value per
    channel: there is no variance to normalise by, and torch raises. Such a batch is normalised
    with the running statistics, which it leaves as they are: as in evaluation, gradient
    included. Batches of two and more, and a ``SyncBatchNorm`` that gathers several ranks,
    behave as in torchvision.
    """

    def forward(self, x: Tensor) -> Tensor:
        pool, conv, norm, activation = self
        pooled = conv(pool(x))
        if norm.training and x.shape[0] == 1 and not _gathers_ranks(norm):
            pooled = F.batch_norm(
                pooled, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        else:
            pooled = norm(pooled)
        return F.interpolate(
            activation(pooled), size=x.shape[-2:], mode="bilinear", align_corners=False
        )


def _gathers_ranks(norm: nn.Module) -> bool:
    return (
        isinstance(norm, nn.SyncBatchNorm)
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(norm.process_group) > 1
    )
