"""DeepLab's context: torchvision's atrous spatial pyramid pooling."""

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
