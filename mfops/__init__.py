"""Fused low-rank reconstruction X' = Y Z and its loss, for global context in vision networks."""

from mfops.attention import distribute, gather
from mfops.backends import available_backends, use_backend
from mfops.functional import (
    factorize,
    factorize_reconstruct,
    factorized_mse,
    factorized_reconstruction,
)
from mfops.loss_injection import set_loss_scaling
from mfops.methods import Method, register_method
from mfops.modules import FactorizedContext, collect_losses

__version__ = "0.1.0"

__all__ = [
    "FactorizedContext",
    "Method",
    "available_backends",
    "collect_losses",
    "distribute",
    "factorize",
    "factorize_reconstruct",
    "factorized_mse",
    "factorized_reconstruction",
    "gather",
    "register_method",
    "set_loss_scaling",
    "use_backend",
]
