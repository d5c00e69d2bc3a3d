"""Non-negative matrix factorization by multiplicative updates."""

from __future__ import annotations

import torch
from torch import Tensor

from mfops.methods.base import EPS, Method


class NMF(Method):
    """Geng et al., "Is Attention Better Than Matrix Decomposition?", 2021; X, Y, Z >= 0.

        Z = softmax over K of Y0^T X                        (the published code's start)
        Z = Z * (Y^T X) / (Y^T Y Z + 1e-6)                  (their algorithm 2; Lee and Seung,
        Y = Y * (X Z^T) / (Y Z Z^T + 1e-6)                  2001, equation 4)

    and after the last round one more update of Z, through which alone the gradient reaches X, Y
    and the Z before being constants (the paper's one-step gradient). Each update
    uses the factors of the one before it. Negative X breaks the method, not the formulas: they are
    computed as they stand, and may leave infinities.
    """

    nonnegative = True
    has_kernel = fused = one_step_gradient = True

    distribution = staticmethod(torch.rand)

    def first_coefficients(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.softmax(y.mT @ x, dim=-2)

    def update_coefficients(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.z_scale(y, z) * (y.mT @ x)

    def update_bases(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return y * (x @ z.mT) / (y @ (z @ z.mT) + EPS)

    def z_scale(self, y: Tensor, z: Tensor) -> Tensor:
        """W in the update Z = W * (Y^T X), and so the z_scale of its gradient."""
        return z / (y.mT @ y @ z + EPS)

    def final_coefficients(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.update_coefficients(x, y, z)
