"""What contexts share: an auxiliary loss of their own, or a unit between two convolutions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

UNIT_CHANNELS = 512


class LossContext(nn.Module, ABC):
    """A context module with an auxiliary loss of its own.

    ``context(x)`` returns the features, as any context does, and is free to let its loss act
    through the backward pass; ``context(x, return_loss=True)`` returns ``(features, loss)`` with
    the unweighted loss, a float32 scalar, and injects nothing. One with ``needs_masks`` takes the
    images' labels as well: ``context(x, return_loss=True, masks=masks)``.
    """

    needs_masks: ClassVar[bool] = False

    @abstractmethod
    def forward(self, x: Tensor, return_loss: bool = False) -> Tensor | tuple[Tensor, Tensor]: ...


class UnitContext(nn.Module):
    """3x3 convolution to 512, BatchNorm, ReLU; a unit; 3x3 convolution, BatchNorm, ReLU.

    Args:
        in_channels: of the input ``(B, in_channels, h, w)``.
        out_channels: of the output, of the same grid.
        unit: makes a shape-preserving module of so many channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, unit: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.lower = Conv2dNormActivation(in_channels, UNIT_CHANNELS, 3)
        self.unit = unit(UNIT_CHANNELS)
        self.upper = Conv2dNormActivation(UNIT_CHANNELS, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.upper(self.unit(self.lower(x)))
