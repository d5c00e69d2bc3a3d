"""What a method is: two updates, and how they start and end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6
INVERSE_TEMPERATURE = 100.0  # of vq and cd


class Method(ABC):
    """A way to find X ~ Y Z on each image: T rounds of two updates, coefficients then bases.

    Tensors are x (B, C, N), y (B, C, K) and z (B, K, N), of one floating dtype (float32, or
    float64). The rounds run without gradient; `final_coefficients` carries what gradient there is.
    A method holds no state: the bases it starts from are given (`mfops.factorize`) or kept in a
    buffer (`mfops.FactorizedContext`). A new one is a subclass and `mfops.register_method`.
    """

    train_steps = 6
    eval_steps = 7
    # Weight of the old bases where the found ones move the buffer in training. None: the buffer
    # rests, and training starts from fresh noise in every pass.
    momentum: float | None = None
    # Whether X has to be >= 0; a module then takes relu(X).
    nonnegative = False
    # What bases start from before their columns are scaled to length 1.
    distribution: Callable[..., Tensor] = staticmethod(torch.randn)
    # Of the softmax over cosines. None: the method has none.
    inverse_temperature: float | None = None
    # Kernels know the methods of this package by name: `register_method` sets both to False.
    has_kernel = False  # for the rounds
    fused = False  # for all of the way from X to X' and its error
    # Whether the last Z is z_scale * (Y^T X), with a gradient through Y^T X alone.
    one_step_gradient = False

    def noise(
        self,
        *shape: int,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Bases (.., C, K) to start from, columns of length 1, float32."""
        # randn takes none beside sizes that torch.compile leaves open, not even None.
        seeded: dict[str, Any] = {} if generator is None else {"generator": generator}
        return F.normalize(self.distribution(*shape, device=device, **seeded), dim=-2)

    def first_coefficients(self, x: Tensor, y: Tensor) -> Tensor:
        """Z (B, K, N) before the first round: for methods whose updates look at the Z before."""
        return x.new_zeros(x.shape[0], y.shape[-1], x.shape[-1])

    @abstractmethod
    def update_coefficients(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """The next Z (B, K, N), of x's dtype."""

    @abstractmethod
    def update_bases(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """The next Y (B, C, K), of x's dtype, from the Z just updated."""

    def final_coefficients(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """The Z of X' = Y Z after the last round, differentiable in x; y and z are constants."""
        return z

    @property
    def changes_last_coefficients(self) -> bool:
        """Whether the method has a `final_coefficients` of its own."""
        return type(self).final_coefficients is not Method.final_coefficients


def normalize_columns(y: Tensor) -> Tensor:
    """Columns over their length, or over 1e-6 where that is shorter."""
    return F.normalize(y, dim=-2, eps=EPS)


def soft_means(x: Tensor, z: Tensor) -> Tensor:
    """X (Z / (1e-6 + sum over N of Z))^T: the mean of x's columns under each base's weights."""
    return x @ (z / (EPS + z.sum(-1, keepdim=True))).mT
