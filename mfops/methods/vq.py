"""Soft vector quantization."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mfops.methods.base import EPS, INVERSE_TEMPERATURE, Method, normalize_columns, soft_means


def cosine_assignment(x: Tensor, y: Tensor, inverse_temperature: float) -> Tensor:
    """softmax over K of t Y^T X with the columns of X divided by their lengths."""
    return torch.softmax(inverse_temperature * (y.mT @ F.normalize(x, dim=-2)), dim=-2)


class VQ(Method):
    """Geng et al., "Is Attention Better Than Matrix Decomposition?", 2021, algorithm 1.

        Z = softmax over K of t cos(Y, X)                   (cosines of columns)
        Y = X (Z / (1e-6 + sum over N of Z))^T

    and after the last round Z once more, from X / (1e-6 + length of its columns): through this Z
    the gradient reaches X, the lengths and Y being constants, as in the published code.

    Args:
        inverse_temperature: t. The published class has 100, the published settings 1; its authors
            advise 10 or 100.
    """

    has_kernel = True

    def __init__(self, inverse_temperature: float = INVERSE_TEMPERATURE) -> None:
        self.inverse_temperature: float = inverse_temperature

    def update_coefficients(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return cosine_assignment(x, normalize_columns(y), self.inverse_temperature)

    def update_bases(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return soft_means(x, z)

    def final_coefficients(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(x.detach(), dim=-2, keepdim=True)
        cosines = normalize_columns(y).mT @ (x / (EPS + lengths))
        return torch.softmax(self.inverse_temperature * cosines, dim=-2)
