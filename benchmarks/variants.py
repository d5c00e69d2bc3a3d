"""MFNet Light with 32 bases and one part exchanged or left out: what each of them buys.

mfnet fit ... --model.network benchmarks.variants.variant --model.network.name 'bases of em'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfnet.backbone import Pyramid
from mfnet.light import FactorizedDecoder, Projection, PyramidContext
from mfnet.models import SegmentationNetwork
from mfops import factorized_mse
from mfops.factorizers import ImageFactorizer
from mfops.loss_injection import inject_loss


class Em(FactorizedDecoder):
    """Bases that EMANet's rounds find in X."""

    method: ClassVar[str] = "em"

    def __init__(self, width: int, low_channels: int, num_classes: int, rank: int) -> None:
        super().__init__(width, low_channels, num_classes, rank)
        del self.queries
        self.factorizer = ImageFactorizer(self.method, width, rank)

    def bases(self, x: Tensor) -> Tensor:
        bases: Tensor = self.factorizer(x)[0]
        return bases.to(x.dtype)


class Nmf(Em):
    """Hamburger's."""

    method = "nmf"


class Learned(FactorizedDecoder):
    """Bases that are parameters, the same for every image, as in MFNet's paper."""

    def bases(self, x: Tensor) -> Tensor:
        return self.queries.mT.repeat(len(x), 1, 1)


class Linear(FactorizedDecoder):
    """No factorization: what is linear in the features is all."""

    def __init__(self, width: int, low_channels: int, num_classes: int, rank: int) -> None:
        super().__init__(width, low_channels, num_classes, rank)
        del self.queries, self.keys, self.key_bias, self.columns, self.coarse

    def forward(self, summed: Tensor, low: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.guide(summed, low))
        return logits


class Pointwise(FactorizedDecoder):
    """Pixels of stride 4 do not see their neighbors."""

    def __init__(self, width: int, low_channels: int, num_classes: int, rank: int) -> None:
        super().__init__(width, low_channels, num_classes, rank)
        self.neighbours = nn.Identity()


class Mixed(FactorizedDecoder):
    """Bases that attend to each other before they become logits."""

    def __init__(self, width: int, low_channels: int, num_classes: int, rank: int) -> None:
        super().__init__(width, low_channels, num_classes, rank)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.MultiheadAttention(width, 8, batch_first=True)

    def bases(self, x: Tensor) -> Tensor:
        bases = super().bases(x).mT
        normed = self.norm(bases)
        mixed: Tensor = bases + self.mix(normed, normed, normed, need_weights=False)[0]
        return mixed.mT


class Blind(FactorizedDecoder):
    """Coefficients and logits at stride 8, without low-level features."""

    def __init__(self, width: int, low_channels: int, num_classes: int, rank: int) -> None:
        super().__init__(width, low_channels, num_classes, rank)
        del self.low, self.fine, self.neighbours

    def guide(self, summed: Tensor, low: Tensor) -> Tensor:
        guide: Tensor = self.coarse(summed)
        return guide


class Reconstruction(FactorizedDecoder):
    """With the paper's loss, 0.1 mse(X, Y Z): Z is averaged over the pixels of stride 8."""

    def logits(self, x: Tensor, guide: Tensor) -> Tensor:
        logits = super().logits(x, guide)
        if not self.training:
            return logits
        scores = torch.einsum("kd,bdhw->bkhw", self.keys, guide) + self.key_bias[:, None, None]
        z = F.adaptive_avg_pool2d(scores.softmax(1), x.shape[-2:]).flatten(2)
        y = self.bases(x)
        return inject_loss(logits, 0.1 * factorized_mse(x, y, z.to(y.dtype)))


class Corners(FactorizedDecoder):
    """Upsampling with aligned corners, as the dilated networks have it."""

    align_corners = True


class CornersBelow(PyramidContext):
    align_corners = True


class DeepestContext(PyramidContext):
    """The features of stride 32 alone."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__(channels[-1:], width)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return super().forward(features[-1:])


class Classifier(FactorizedDecoder):
    """Little more than the backbone: a linear classifier where the features are."""

    def __init__(self, width: int, low_channels: int, num_classes: int, rank: int) -> None:
        super().__init__(width, low_channels, num_classes, rank)
        del self.queries, self.keys, self.key_bias, self.columns
        del self.low, self.fine, self.neighbours

    def forward(self, summed: Tensor, low: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.coarse(summed))
        return logits


def one_matrix(network: nn.Module) -> None:
    """Exchanges each projection for a convolution."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Projection):
                width, channels = child.inner.shape
                module.register_module(name, nn.Conv2d(channels, width, 1, bias=False))


@dataclass(frozen=True)
class Variant:
    """What differs from mfnet_light.

    The variants of parts have 32 bases, which was the default when the first of them were trained:
    they compare with "K = 32".
    """

    decoder: type[FactorizedDecoder] = FactorizedDecoder
    context: type[PyramidContext] = PyramidContext
    rank: int = 32
    width: int = 256
    change: Callable[[nn.Module], None] | None = None


VARIANTS = {
    "no factorization": Variant(Linear),
    "bases of em": Variant(Em),
    "bases of nmf": Variant(Nmf),
    "learned bases": Variant(Learned),
    "K = 16": Variant(rank=16),
    "K = 32": Variant(),
    "K = 64": Variant(rank=64),
    "width 128": Variant(width=128),
    "no low-level features": Variant(Blind),
    "no depthwise convolution": Variant(Pointwise),
    "attention among bases": Variant(Mixed),
    "one matrix in projections": Variant(change=one_matrix),
    "reconstruction loss": Variant(Reconstruction),
    "aligned corners": Variant(Corners, CornersBelow),
    "stride 32 alone": Variant(Classifier, DeepestContext),
}


def variant(
    name: str,
    num_classes: int = 21,
    backbone: str = "resnet50",
    backbone_weights: str | Path | None = None,
    in_channels: int = 3,
) -> SegmentationNetwork:
    """mfnet_light with the change of that name in VARIANTS; the rest as for `create_model`.

    Raises:
        ValueError: an unknown name, and what `create_model` raises.
    """
    if name not in VARIANTS:
        raise ValueError(f"name: expected one of {', '.join(VARIANTS)}, got {name!r}")
    chosen = VARIANTS[name]
    trunk = Pyramid(backbone, backbone_weights, in_channels)
    context = chosen.context(trunk.high_channels, chosen.width)
    decoder = chosen.decoder(chosen.width, trunk.low_channels, num_classes, chosen.rank)
    if chosen.change is not None:
        for part in (context, decoder):
            chosen.change(part)
    return SegmentationNetwork(trunk, context, decoder)
