"""EMANet's context: features rebuilt from bases found by expectation-maximization."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mfnet.contexts.base import UnitContext
from mfnet.contexts.published import init_convolutions, rename_keys
from mfops.checks import check_positive
from mfops.factorizers import ImageFactorizer


class EMAUnit(nn.Module):
    """Expectation-maximization attention (Li et al., ICCV 2019), shape-preserving.

    ``relu(x + BN(conv2(relu(Y Z))))``, where Y and Z are found on ``X = conv1(x)`` by
    ``mfops.methods.em.EM``, which has the formulas. As published, no gradient passes through
    ``Y Z``: nothing can ever train ``conv1``, so it is frozen at its random start and
    ``DistributedDataParallel`` finds no unused parameters.

    In training every forward moves the bases that the next one starts from,
    ``factorizer.bases``, toward the mean over the batch (and over the ranks of an initialized
    process group) of those found; as published, without normalizing them again. The rounds
    accumulate in float32 or wider, under autocast and in half-precision networks too.

    Loads the state dict of EMANet's ``EMAU`` as it is.

    Args:
        channels: C of the input ``(B, C, h, w)``.
        bases: number of bases K.
        steps: number of EM steps T.

    Raises:
        ValueError: ``bases`` or ``steps`` below 1.
    """

    def __init__(self, channels: int, bases: int = 64, steps: int = 3) -> None:
        super().__init__()
        check_positive("bases", bases)
        self.conv1 = nn.Conv2d(channels, channels, 1).requires_grad_(False)
        self.factorizer = ImageFactorizer("em", channels, bases, steps)
        self.conv2 = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )
        init_convolutions(self)
        self.register_load_state_dict_pre_hook(_published_names)

    def forward(self, x: Tensor) -> Tensor:
        rebuilt = self.factorizer.product(self.conv1(x.detach()))
        return F.relu(x + self.conv2(F.relu(rebuilt)))


def _published_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    rename_keys(state_dict, prefix, {"mu": "factorizer.bases"})


class EMContext(UnitContext):
    """``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``: EMANet's head without classifier.

    3x3 convolution to 512, BatchNorm, ReLU; ``EMAUnit``; 3x3 convolution to
    ``out_channels``, BatchNorm, ReLU.

    Args:
        bases: number of bases K of the unit.
        steps: number of its EM steps T.

    Raises:
        ValueError: ``bases`` or ``steps`` below 1.
    """

    def __init__(
        self, in_channels: int, out_channels: int = 256, bases: int = 64, steps: int = 3
    ) -> None:
        super().__init__(in_channels, out_channels, partial(EMAUnit, bases=bases, steps=steps))
