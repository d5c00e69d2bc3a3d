"""Concept decomposition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfops.exporting import is_exporting_onnx
from mfops.methods.base import INVERSE_TEMPERATURE, Method, normalize_columns, soft_means
from mfops.methods.vq import cosine_assignment

RIDGE = 0.1


class CD(Method):
    """Geng et al., "Is Attention Better Than Matrix Decomposition?", 2021, soft concept
    decomposition.

        Z = softmax over K of t Y^T X                       (columns of X divided by their lengths)
        Y = X (Z / (1e-6 + sum over N of Z))^T, columns divided by their lengths

    and after the last round the ridge regression Z = (Y^T Y + 0.1 I)^-1 Y^T X, through which the
    gradient reaches X, Y being constant.

    Args:
        inverse_temperature: t, as for `mfops.methods.vq.VQ`.
    """

    has_kernel = True

    def __init__(self, inverse_temperature: float = INVERSE_TEMPERATURE) -> None:
        self.inverse_temperature: float = inverse_temperature

    def update_coefficients(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return cosine_assignment(x, y, self.inverse_temperature)

    def update_bases(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return normalize_columns(soft_means(x, z))

    def final_coefficients(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        ridge = RIDGE * torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
        gram = y.mT @ y + ridge
        if is_exporting_onnx():
            return solve_by_products(gram, y.mT) @ x
        # Not linalg.solve: torch 2.14's batched LU fails on several threads from about K = 180. The
        # ridge keeps the matrix positive definite; linalg.cholesky would wait for the GPU to check.
        return torch.cholesky_solve(y.mT, torch.linalg.cholesky_ex(gram).L) @ x


def solve_by_products(gram: Tensor, right: Tensor) -> Tensor:
    """G^-1 R with G = Y^T Y + 0.1 I (B, K, K), columns of Y no longer than 1: ONNX has no solver.

    Newton and Schulz: each round of V <- V (2 I - G V) squares the error I - G V. G's eigenvalues
    lie between 0.1 and K + 0.1, from which the first V = a I and the number of rounds follow. One
    correction by what V R leaves over makes it as exact as a solver.
    """
    rank = gram.shape[-1]
    twice = torch.diag_embed(torch.full_like(gram[..., 0], 2.0))
    scale = 1 / (rank + 2 * RIDGE)
    inverse = scale * twice
    error = rank * scale  # the largest eigenvalue, at most, of I - G V
    rounds = math.ceil(math.log2(math.log(torch.finfo(gram.dtype).eps) / math.log(error)))
    for _ in range(rounds):
        inverse = inverse @ (twice - gram @ inverse)
    solution = inverse @ right
    return solution + inverse @ (right - gram @ solution)
