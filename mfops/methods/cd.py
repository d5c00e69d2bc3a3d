"""Concept decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from mfops.methods.base import Method, normalize_columns, soft_means
from mfops.methods.vq import cosine_assignment

RIDGE = 0.1


class CD(Method):
    """Geng et al., "Is Attention Better Than Matrix Decomposition?", 2021, soft concept
    decomposition.

        Z = softmax over K of 100 Y^T X                     (columns of X divided by their lengths)
        Y = X (Z / (1e-6 + sum over N of Z))^T, columns divided by their lengths

    and after the last round the ridge regression Z = (Y^T Y + 0.1 I)^-1 Y^T X, through which the
    gradient reaches X, Y being constant.
    """

    def update_coefficients(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return cosine_assignment(x, y)

    def update_bases(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return normalize_columns(soft_means(x, z))

    def final_coefficients(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        ridge = RIDGE * torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
        # The ridge keeps the matrix regular; solve itself would wait for the GPU to make sure.
        return torch.linalg.solve_ex(y.mT @ y + ridge, y.mT).result @ x
