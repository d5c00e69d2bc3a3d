"""Where Y and Z come from. A factorizer is a module: features (B, C, N or H, W) -> y, z."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LearnedFactorizer(nn.Module):
    """Y (C, K) and Z (K, h w) are parameters shared by the whole data set.

    X' = Y Z is then the same for every image: a learned spatial prior and a pull on the
    features, not context of the image at hand. Both start standard normal, as the paper's do.
    Z belongs to the grid `size`; for another it is resampled bilinearly as a (K, h, w) map.

    Args:
        channels: C. rank: K. size: the grid (h, w) that Z belongs to.
    """

    def __init__(self, channels: int, rank: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.y = nn.Parameter(torch.empty(channels, rank))
        self.z = nn.Parameter(torch.empty(rank, size[0] * size[1]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.y)
        nn.init.normal_(self.z)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        grid = tuple(x.shape[2:])
        pixels = self.size[0] * self.size[1]
        if len(grid) == 1:
            if grid[0] != pixels:
                raise ValueError(
                    f"x: expected N = {pixels} pixels for size {self.size}, got {grid[0]}; "
                    "pass (B, C, H, W) to have z resampled"
                )
            return self.y, self.z
        if grid == self.size:
            return self.y, self.z
        maps = self.z.unflatten(1, self.size).unsqueeze(0)
        z = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
        return self.y, z.squeeze(0).flatten(1)


FACTORIZERS = {"learned": LearnedFactorizer}
