"""What a context with an auxiliary loss promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn


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
