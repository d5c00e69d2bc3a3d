"""Expectation-maximization attention."""

from __future__ import annotations

import torch
from torch import Tensor

from mfops.methods.base import EPS, Method, soft_means


class EM(Method):
    """Li et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", 2019.

        Z = softmax over K of Y^T X                         (their equation 12, lambda = 1)
        Y = X (Z / (1e-6 + sum over N of Z))^T              (equation 13)
        Y = Y / (1e-6 + length of its columns)              (the paper's normalization of bases)

    X' = Y Z with the Z that the last Y was computed from. No gradient passes through
    the rounds or through Y Z, as in the published code. In training the bases of the next pass
    move towards those found: 0.9 of the old and 0.1 of their mean over the batch.
    """

    train_steps = eval_steps = 3
    momentum = 0.9
    has_kernel = fused = True

    def update_coefficients(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.softmax(y.mT @ x, dim=-2)

    def update_bases(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        y = soft_means(x, z)
        return y / (EPS + torch.linalg.vector_norm(y, dim=-2, keepdim=True))
