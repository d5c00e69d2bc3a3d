"""The non-local block: every pixel gathers from all pixels that are like it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from mfnet.contexts.base import UnitContext
from mfops.exporting import is_exporting


class NonLocalBlock(nn.Module):
    """The embedded Gaussian block of Wang et al., "Non-local Neural Networks" (CVPR 2018).

    Shape-preserving. With 1x1 convolutions theta, phi, g to half of the channels and W back, and
    x_i the features of pixel i::

        y_i = sum_j f(x_i, x_j) g(x_j) / sum_j f(x_i, x_j)    (their equation 1)
        f(x_i, x_j) = exp(theta(x_i)^T phi(x_j))              (equation 3, embedded Gaussian)
        z_i = BN(W y_i) + x_i                                 (equation 6; BN: section 4.1)

    It starts as published: BN's scale at zero, so that the block is the identity, and convolutions
    with a standard deviation of 0.01, so that the softmax is almost uniform. y is attention without
    scaling, by torch's fused kernels: no N x N matrix is written to memory.

    Args:
        channels: C of the input ``(B, C, h, w)``, even.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 2
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(channels, inner, 1)
        self.g = nn.Conv2d(channels, inner, 1)
        self.w = nn.Sequential(nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.zeros_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        # (B, 1, N, C / 2), one head: the layout that the fused kernels take.
        query, key, value = (
            embed(x).flatten(2).mT.contiguous()[:, None] for embed in (self.theta, self.phi, self.g)
        )
        y = F.scaled_dot_product_attention(query, key, value, scale=1.0)[:, 0].mT
        if is_exporting():  # a view of transposed features would bind an example's batch of 1
            y = y.contiguous()
        return x + self.w(y.unflatten(2, x.shape[-2:]))


class NonLocalContext(UnitContext):
    """``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)`` through a non-local block.

    3x3 convolution to 512, BatchNorm, ReLU; ``NonLocalBlock``; 3x3 convolution to
    ``out_channels``, BatchNorm, ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int = 256) -> None:
        super().__init__(in_channels, out_channels, NonLocalBlock)


def _forward_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return sdpa_flop_count(query, key, value)


def _backward_flops(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return sdpa_backward_flop_count(grad, query, key, value)


# torch's FLOP counter knows the fused attention of GPUs; of the CPU's it takes no notice.
for _op, _formula in (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, _forward_flops),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, _backward_flops),
):
    if _op not in flop_registry:
        register_flop_formula(_op)(_formula)
