"""MFNet Light with one part exchanged or left out: what each of them buys.

mfnet fit ... --model.network benchmarks.variants.variant --model.network.name em
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfnet.backbone import Pyramid
from mfnet.light import FactorizedDecoder, PyramidContext
from mfnet.models import SegmentationNetwork
from mfops import factorized_mse
from mfops.autograd import inject_loss
from mfops.factorizers import ImageFactorizer


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
    """No factorization: what is linear in X and in the guide is all."""

    def __init__(self, width: int, low_channels: int, num_classes: int, rank: int) -> None:
        super().__init__(width, low_channels, num_classes, rank)
        del self.queries, self.keys, self.key_bias, self.attention, self.classes

    def context(self, x: Tensor, guide: Tensor) -> Tensor:
        return x.new_zeros(())


class Alone(FactorizedDecoder):
    """Bases that do not see each other."""

    def __init__(self, width: int, low_channels: int, num_classes: int, rank: int) -> None:
        super().__init__(width, low_channels, num_classes, rank)
        self.attention = nn.Identity()


class Blind(FactorizedDecoder):
    """A guide of X alone, at stride 8, without low-level features."""

    def __init__(self, width: int, low_channels: int, num_classes: int, rank: int) -> None:
        super().__init__(width, low_channels, num_classes, rank)
        del self.low

    def guided(self, x: Tensor, low: Tensor) -> Tensor:
        guide: Tensor = self.guide(self.norm(self.squeeze(x)))
        return guide


class Reconstruction(FactorizedDecoder):
    """With the paper's loss, 0.1 mse(X, Y Z): Z is averaged over the pixels of stride 8."""

    def context(self, x: Tensor, guide: Tensor) -> Tensor:
        context = super().context(x, guide)
        if not self.training:
            return context
        scores = torch.einsum("kd,bdhw->bkhw", self.keys, guide) + self.key_bias[:, None, None]
        z = F.adaptive_avg_pool2d(scores.softmax(1), x.shape[-2:]).flatten(2)
        y = self.bases(x)
        return inject_loss(context, 0.1 * factorized_mse(x, y, z.to(y.dtype)))


class Corners(FactorizedDecoder):
    """Upsampling with aligned corners, as the dilated networks have it."""

    align_corners = True


class CornersBelow(PyramidContext):
    align_corners = True


class Direct(PyramidContext):
    """Without the 5x5 convolution."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__(channels, width)
        del self.local

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.summed(features)


class Coarse(PyramidContext):
    """X at stride 16."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__(channels[1:], width)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return super().forward(features[1:])


@dataclass(frozen=True)
class Variant:
    """What differs from mfnet_light."""

    decoder: type[FactorizedDecoder] = FactorizedDecoder
    context: type[PyramidContext] = PyramidContext
    rank: int = 64
    width: int = 128


VARIANTS = {
    "no factorization": Variant(Linear),
    "bases of em": Variant(Em),
    "bases of nmf": Variant(Nmf),
    "learned bases": Variant(Learned),
    "no attention among bases": Variant(Alone),
    "K = 16": Variant(rank=16),
    "K = 32": Variant(rank=32),
    "K = 128": Variant(rank=128),
    "width 64": Variant(width=64),
    "width 256": Variant(width=256),
    "no guide at stride 4": Variant(Blind),
    "no 5x5 convolution": Variant(context=Direct),
    "X at stride 16": Variant(context=Coarse),
    "reconstruction loss": Variant(Reconstruction),
    "aligned corners": Variant(Corners, CornersBelow),
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
    decoder = chosen.decoder(chosen.width, trunk.low_channels, num_classes, chosen.rank)
    return SegmentationNetwork(trunk, chosen.context(trunk.high_channels, chosen.width), decoder)
