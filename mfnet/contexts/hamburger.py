"""Hamburger: features rebuilt from factors found on the image, between two layers of bread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from mfnet.contexts.base import UnitContext
from mfnet.contexts.published import init_convolutions, rename_keys
from mfops.checks import check_positive
from mfops.factorizers import ImageFactorizer


class Hamburger(nn.Module):
    """Geng et al., "Is Attention Better Than Matrix Decomposition?", ICLR 2021; shape-preserving.

    ``relu(x + upper(cheese(Y Z)))``, where Y and Z are found on ``X = lower(x)`` by a method of
    ``mfops.methods``, whose docstring has the formulas. ``lower`` and ``upper`` are 1x1
    convolutions, ``cheese`` a 1x1 convolution with BatchNorm and ReLU; for "nmf" X is
    ``relu(lower(x))``. The gradient reaches ``lower`` through the last update of Z alone.

    In training every pass starts from random bases; in evaluation always from the buffer
    ``factorizer.bases``, so that the same image has the same result. Published code draws them anew
    there too, and its scores change from run to run; with its RAND_INIT off, as it is meant for
    "cd", it keeps bases instead and moves them in evaluation, which is not to be had here.

    Loads the state dicts of the published code as they are: version 2 with the cheese, version 1
    and SegNeXt's (``norm_layer=partial(nn.GroupNorm, 32)``) without. They hold no bases as a rule:
    the buffer then stays as constructed, which is the same in every process. SegNeXt trains with
    the gradient of all rounds, which is not to be had here.

    Args:
        method: ``"nmf"``, ``"vq"`` or ``"cd"``.
        channels: C of the input ``(B, C, h, w)``.
        rank: number of bases K.
        steps: number of rounds T; ``None``: 6 in training, 7 in evaluation.
        cheese: whether there is one; without it the normalization follows ``upper``.
        norm_layer: makes the normalization of so many channels.
        inverse_temperature: of "vq" and "cd"; ``None``: 100, as in the published class. The
            published settings have 1; the authors advise 10 or 100.

    Raises:
        ValueError: an unknown method; ``rank`` or ``steps`` below 1; an inverse temperature for
            "nmf" or beyond 1e-6 to 1e6.
    """

    def __init__(
        self,
        method: str,
        channels: int,
        rank: int = 64,
        steps: int | None = None,
        cheese: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        inverse_temperature: float | None = None,
    ) -> None:
        super().__init__()
        check_positive("rank", rank)
        self.lower = nn.Conv2d(channels, channels, 1)
        self.factorizer = ImageFactorizer(method, channels, rank, steps, inverse_temperature)
        if cheese:
            self.cheese: nn.Module = Conv2dNormActivation(
                channels, channels, 1, norm_layer=norm_layer
            )
            self.upper: nn.Module = nn.Conv2d(channels, channels, 1, bias=False)
        else:
            self.cheese = nn.Identity()
            self.upper = Conv2dNormActivation(
                channels, channels, 1, norm_layer=norm_layer, activation_layer=None
            )
        init_convolutions(self)
        self.register_load_state_dict_pre_hook(_published_names)

    def forward(self, x: Tensor) -> Tensor:
        rebuilt = self.factorizer.product(self.lower(x))
        return F.relu(x + self.upper(self.cheese(rebuilt)))


_NAMES = {
    "lower_bread.0": "lower",  # nmf's, before its ReLU
    "lower_bread": "lower",
    "ham_in.conv": "lower",  # SegNeXt and mmsegmentation; ham_out's norm is named after its kind
    "ham.bases": "factorizer.bases",
    "cheese.conv": "cheese.0",
    "cheese.bn": "cheese.1",
    "upper_bread": "upper",
    "ham_out.conv": "upper.0",
    "ham_out.bn": "upper.1",
    "ham_out.gn": "upper.1",
}


def _published_names(module: Hamburger, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if rename_keys(state_dict, prefix, _NAMES):
        state_dict.setdefault(f"{prefix}factorizer.bases", module.factorizer.bases)


class HamburgerContext(UnitContext):
    """``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``: HamNet's head without classifier.

    3x3 convolution to 512, BatchNorm, ReLU; ``Hamburger``; 3x3 convolution to
    ``out_channels``, BatchNorm, ReLU.

    Args:
        rank: number of bases K.
        steps: number of rounds T; ``None``: 6 in training, 7 in evaluation.
        inverse_temperature: of "vq" and "cd"; ``None``: 100.

    Raises:
        ValueError: ``rank`` or ``steps`` below 1, an inverse temperature for "nmf" or
            beyond 1e-6 to 1e6.
    """

    def __init__(
        self,
        method: str,
        in_channels: int,
        out_channels: int = 256,
        rank: int = 64,
        steps: int | None = None,
        inverse_temperature: float | None = None,
    ) -> None:
        unit = partial(
            Hamburger, method, rank=rank, steps=steps, inverse_temperature=inverse_temperature
        )
        super().__init__(in_channels, out_channels, unit)


nmf = partial(HamburgerContext, "nmf")
vq = partial(HamburgerContext, "vq")
cd = partial(HamburgerContext, "cd")
