"""EncNet's context: channels weighed by what the whole image is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torchvision.ops import Conv2dNormActivation

from mfnet.constants import IGNORE_INDEX
from mfnet.contexts.base import LossContext
from mfops.autocast import without_autocast
from mfops.checks import check_positive
from mfops.tracing import record_module

CHANNELS = 512


class Encoding(nn.Module):
    """Residuals to learned codewords, summed over the pixels: ``(B, C, h, w)`` to ``(B, K, C)``.

    With codewords d_k and smoothing factors s_k (Zhang et al., "Context Encoding for Semantic
    Segmentation", CVPR 2018, section 2.1), of pixels x_i::

        e_k = sum_i a_ik (x_i - d_k),    a_ik = softmax over k of -s_k |x_i - d_k|^2

    Squares and sums are multiplied out, ``|x|^2 - 2 x.d + |d|^2`` and ``A^T X - (sum_i a_ik) d_k``:
    none of the N K C residuals is written to memory. All of it runs in float32 or wider, under
    autocast too, the softmax in float64; the result has the parameters' dtype.

    Args:
        channels: C.
        codewords: K.

    Raises:
        ValueError: ``codewords`` below 1.
    """

    def __init__(self, channels: int, codewords: int = 32) -> None:
        super().__init__()
        check_positive("codewords", codewords)
        bound = (codewords * channels) ** -0.5
        self.codewords = nn.Parameter(torch.empty(codewords, channels).uniform_(-bound, bound))
        self.smoothing = nn.Parameter(torch.rand(codewords))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return record_module(self, x)
        with without_autocast(x.device.type):
            pixels = x.flatten(2)
            pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
            codewords = self.codewords.to(pixels.dtype)
            squares = pixels.square().sum(1, keepdim=True)
            lengths = squares + codewords.square().sum(1, keepdim=True)
            # matmul would have to view the expanded codewords: it binds an example's batch of 1.
            expanded = codewords.expand(pixels.shape[0], -1, -1)
            distances = torch.baddbmm(lengths, expanded, pixels, alpha=-2)
            smoothing = self.smoothing.to(pixels.dtype)
            # Most pixels belong to one codeword all but wholly. The gradient of s is in what is
            # left, which float32 cannot tell from 0; Apple's GPUs have nothing wider.
            wide = pixels.dtype if pixels.is_mps else torch.float64
            shares = torch.softmax(-smoothing[:, None] * distances, dim=1, dtype=wide)
            shares = shares.to(pixels.dtype)
            encoded = shares @ pixels.mT - shares.sum(2, keepdim=True) * codewords
        return encoded.to(self.codewords.dtype)


class EncodingContext(LossContext):
    """``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``: the context encoding module.

    3x3 convolution to 512, BatchNorm, ReLU gives X; then, as in the published code of Zhang et
    al., "Context Encoding for Semantic Segmentation" (CVPR 2018)::

        e = mean over k of relu(BN(Encoding(relu(BN(conv1x1(X))))))_k
        gamma = sigmoid(W e + b);    X + X gamma

    and a 1x1 convolution to ``out_channels``, BatchNorm, ReLU. (The paper writes the sum over k,
    and ``X gamma``.)

    The loss is their SE-loss: a linear layer on e tells which classes occur in the image, binary
    cross entropy against those that occur in its mask (in one of nothing but 255, none: as in the
    published code). It needs ``num_classes`` and the masks;
    without ``num_classes`` the module has neither the layer nor a loss.

    Args:
        num_classes: number of classes; None: no SE-loss.
        codewords: number of codewords K.

    Raises:
        ValueError: ``num_classes`` or ``codewords`` below 1.
    """

    needs_masks = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        num_classes: int | None = None,
        codewords: int = 32,
    ) -> None:
        super().__init__()
        if num_classes is not None:
            check_positive("num_classes", num_classes)
        self.lower = Conv2dNormActivation(in_channels, CHANNELS, 3)
        self.encode = nn.Sequential(
            Conv2dNormActivation(CHANNELS, CHANNELS, 1),
            Encoding(CHANNELS, codewords),
            nn.BatchNorm1d(codewords),
            nn.ReLU(),
        )
        self.attend = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.Sigmoid())
        self.classify = None if num_classes is None else nn.Linear(CHANNELS, num_classes)
        self.upper = Conv2dNormActivation(CHANNELS, out_channels, 1)

    def forward(
        self, x: Tensor, return_loss: bool = False, masks: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The features; with ``return_loss``, ``(features, SE-loss)``.

        ``masks`` are the images' labels, integers ``(B, H, W)`` of any resolution; 255 is ignored.

        Raises:
            ValueError: ``return_loss`` without ``num_classes`` or ``masks``, or masks of another
                shape.
            TypeError: masks that are no integers.
        """
        x = self.lower(x)
        encoded = self.encode(x).mean(1)
        gamma = self.attend(encoded)[:, :, None, None]
        features = self.upper(x + x * gamma)
        return (features, self._se_loss(encoded, masks)) if return_loss else features

    def _se_loss(self, encoded: Tensor, masks: Tensor | None) -> Tensor:
        if self.classify is None:
            raise ValueError("num_classes: the SE-loss needs it, got None")
        scores = self.classify(encoded).float()
        return F.binary_cross_entropy_with_logits(scores, _occurring(masks, *scores.shape))


def _occurring(masks: Tensor | None, batch: int, num_classes: int) -> Tensor:
    """``(batch, num_classes)``, 1 where a class occurs in an image and 0 elsewhere."""
    if masks is None:
        raise ValueError(f"masks: the SE-loss needs them, ({batch}, H, W), got None")
    if masks.ndim != 3 or len(masks) != batch:
        raise ValueError(f"masks: expected ({batch}, H, W), got shape {tuple(masks.shape)}")
    if masks.is_floating_point() or masks.is_complex():
        raise TypeError(f"masks: expected integers, got {masks.dtype}")
    labels = masks.flatten(1).long()
    counts = labels != IGNORE_INDEX
    occurring = torch.zeros(batch, num_classes, device=masks.device)
    return occurring.scatter_reduce_(1, labels.where(counts, 0), counts.float(), "amax")
