"""Fused low-rank reconstruction X' = Y Z and its loss, for global context in vision networks."""

from mfops.attention import distribute, gather
from mfops.autograd import set_loss_scaling
from mfops.dispatch import available_backends, use_backend
from mfops.functional import factorize, factorized_mse, factorized_reconstruction
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
    "factorized_mse",
    "factorized_reconstruction",
    "gather",
    "register_method",
    "set_loss_scaling",
    "use_backend",
]
