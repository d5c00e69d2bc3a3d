"""EMANet's context: features rebuilt from bases found by expectation-maximization."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

EPS = 1e-6


class EMAUnit(nn.Module):
    """Expectation-maximization attention (Li et al., ICCV 2019, section 3), shape-preserving.

    With ``X = conv1(x)`` as ``(B, C, N)`` and bases ``Y`` started at the buffer ``mu``,
    ``steps`` times::

        Z = softmax over bases of Y^T X           (their equation 12, lambda = 1)
        Y = X (Z / (1e-6 + sum over N of Z))^T    (equation 13), columns l2-normalised

    and then ``relu(x + BN(conv2(relu(Y Z))))``. As published, no gradient passes through the
    steps or ``Y Z``: nothing can ever train ``conv1``, so it is frozen at its random start and
    ``DistributedDataParallel`` finds no unused parameters.

    In training every forward moves ``mu`` towards the mean over the batch (and over the ranks of
    an initialised process group) of the final bases, ``mu = 0.9 mu + 0.1 mean(Y)``, in place and,
    as published, without normalising it again. The steps run in float32 or wider, under autocast
    and in half-precision networks too.

    Args:
        channels: C of the input ``(B, C, h, w)``.
        bases: number of bases K.
        steps: number of EM steps T.
        momentum: weight of the old bases in the update of ``mu``.

    Raises:
        ValueError: ``bases`` or ``steps`` below 1.
    """

    mu: Tensor

    def __init__(
        self, channels: int, bases: int = 64, steps: int = 3, momentum: float = 0.9
    ) -> None:
        super().__init__()
        for name, value in (("bases", bases), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.steps = steps
        self.momentum = momentum
        self.conv1 = nn.Conv2d(channels, channels, 1).requires_grad_(False)
        self.conv2 = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )
        self.register_buffer("mu", F.normalize(torch.randn(1, channels, bases), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self._reconstruct(x))))

    @torch.no_grad()
    def _reconstruct(self, x: Tensor) -> Tensor:
        features = self.conv1(x)
        with _without_autocast(x.device.type):
            flat = features.flatten(2)
            flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
            y = self.mu.to(flat.dtype).expand(flat.shape[0], -1, -1)
            for _ in range(self.steps):
                z = torch.softmax(y.mT @ flat, dim=1)
                y = flat @ (z / (EPS + z.sum(dim=2, keepdim=True))).mT
                y = y / (EPS + torch.linalg.vector_norm(y, dim=1, keepdim=True))
            rebuilt = y @ z
            if self.training:
                self._update(y.mean(dim=0, keepdim=True))
        return rebuilt.view_as(features).to(features.dtype)

    def _update(self, mean: Tensor) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean = mean / dist.get_world_size()
        self.mu.lerp_(mean.to(self.mu.dtype), 1 - self.momentum)


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    # torch.autocast refuses devices that have none, such as "meta".
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class EMContext(nn.Module):
    """``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``: EMANet's head without classifier.

    3x3 convolution to 512, BatchNorm, ReLU; :class:`EMAUnit`; 3x3 convolution to
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
        super().__init__()
        self.lower = Conv2dNormActivation(in_channels, 512, 3)
        self.unit = EMAUnit(512, bases, steps)
        self.upper = Conv2dNormActivation(512, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.upper(self.unit(self.lower(x)))
