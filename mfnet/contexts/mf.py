"""MFNet's context: features rebuilt from two factors, learned ones in the paper."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from mfnet.contexts.base import LossContext
from mfops import FactorizedContext


class MFContext(LossContext):
    """``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)`` through ``X' = Y Z``.

    ``xin = conv1x1(x)``; ``relu(Y Z) + xin``; ``conv1x1``, BatchNorm, ReLU (Gurram, "Learning
    context with factorization techniques in semantic segmentation"). In the paper Y and Z are
    parameters, so X' is the same for every image; with another ``factorizer`` they are found on
    the image at hand. The loss is the mean squared error between ``xin`` (with "nmf"
    ``relu(xin)``) and X'.

    Args:
        rank: number of bases K.
        factorizer: ``"learned"``, ``"em"``, ``"nmf"``, ``"vq"``, ``"cd"`` or
            ``"double_attention"``; see ``mfops.FactorizedContext``.
        steps: rounds T of ``"em"``, ``"nmf"``, ``"vq"`` and ``"cd"``; ``None``: as published.
        context_size: ``(h, w)`` of the grid that a learned Z belongs to; on another it is
            resampled bilinearly.
        init: what learned factors start from, ``"normal"`` (the paper's words; ``None`` means it)
            or ``"uniform"`` (its code); see ``mfops.FactorizedContext``.
        inverse_temperature: of ``"vq"`` and ``"cd"``; ``None``: 100.
        loss_weight: weight of the loss where it enters through the backward pass
            (``return_loss=False``, in training).

    Raises:
        ValueError: a rank, size, weight or number of steps out of range; an unknown factorizer.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        rank: int = 64,
        context_size: tuple[int, int] = (33, 33),
        loss_weight: float = 0.1,
        factorizer: str = "learned",
        steps: int | None = None,
        init: str | None = None,
        inverse_temperature: float | None = None,
    ) -> None:
        super().__init__()
        self.lower = nn.Conv2d(in_channels, in_channels, 1)
        self.factorized = FactorizedContext(
            in_channels,
            rank=rank,
            size=context_size,
            factorizer=factorizer,
            loss_weight=loss_weight,
            steps=steps,
            init=init,
            inverse_temperature=inverse_temperature,
        )
        self.upper = Conv2dNormActivation(in_channels, out_channels, 1)

    def forward(self, x: Tensor, return_loss: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = self.lower(x)
        if return_loss:
            x, loss = self.factorized(x, return_loss=True)
            return self.upper(x), loss
        return self.upper(self.factorized(x))
