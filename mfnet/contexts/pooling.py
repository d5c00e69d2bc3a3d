"""Pooled features, spread over their image again: the branch that ASPP and PPM share."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torchvision.models.segmentation.deeplabv3 import ASPPPooling

from mfnet.decoder import upsample
from mfops.exporting import is_exporting
from mfops.tracing import record_module


class ImagePooling(ASPPPooling):
    """``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``, through ``bins`` x ``bins`` means.

    Adaptive average pooling, 1x1 convolution, BatchNorm, ReLU, bilinear upsampling (corners
    aligned): torchvision's ``ASPPPooling``, parameters and state dict included, for any number of
    bins. On a grid smaller than the bins these overlap, and the "upsampling" picks among them.

    Of one image and one bin, BatchNorm gets a single value per channel: there is no variance to
    normalize by, and torch raises. Such a batch is normalized with the running statistics, which
    it leaves as they are: as in evaluation, gradient included. All others, and a
    ``SyncBatchNorm`` that gathers several ranks, behave as in torchvision.
    """

    def __init__(self, in_channels: int, out_channels: int, bins: int = 1) -> None:
        super().__init__(in_channels, out_channels)
        self[0] = AdaptiveMeans(bins)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return record_module(self, x)
        pool, conv, norm, activation = self
        pooled = conv(pool(x))
        one_value = pooled.shape[0] * pooled.shape[2] * pooled.shape[3] == 1
        if norm.training and one_value and not _gathers_ranks(norm):
            pooled = F.batch_norm(
                pooled, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        else:
            pooled = norm(pooled)
        return upsample(activation(pooled), x.shape[-2:])


class AdaptiveMeans(nn.AdaptiveAvgPool2d):
    """``AdaptiveAvgPool2d`` to ``n`` x ``n`` means, which is right in ONNX for every grid.

    ONNX has no adaptive pooling: torch writes one of a fixed window, which fits no grid but those
    that the bins of the example's divide alike. Two matrix products say the same for all.
    """

    output_size: int

    def forward(self, x: Tensor) -> Tensor:
        if not is_exporting() or self.output_size == 1:
            return super().forward(x)
        rows, columns = (self._weights(x, size) for size in x.shape[-2:])
        return rows @ x @ columns.mT

    def _weights(self, x: Tensor, size: int) -> Tensor:
        """(n, size): what each pixel of a row or column counts in the mean of each bin.

        Bin i has the pixels from floor(i size / n) to before ceil((i + 1) size / n).
        """
        bins = torch.arange(self.output_size, device=x.device)[:, None]
        pixels = torch.arange(size, device=x.device)
        inside = ((pixels + 1) * self.output_size > bins * size) & (
            pixels * self.output_size < (bins + 1) * size
        )
        weights = inside.to(x.dtype)
        return weights / weights.sum(1, keepdim=True)


def _gathers_ranks(norm: nn.Module) -> bool:
    return (
        isinstance(norm, nn.SyncBatchNorm)
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(norm.process_group) > 1
    )
