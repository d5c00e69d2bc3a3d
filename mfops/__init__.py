"""Fused low-rank reconstruction X' = Y Z and its loss, for global context in vision networks."""

from mfops.autograd import set_loss_scaling
from mfops.dispatch import available_backends, use_backend
from mfops.functional import factorized_mse, factorized_reconstruction
from mfops.modules import FactorizedContext

__version__ = "0.1.0"

__all__ = [
    "FactorizedContext",
    "available_backends",
    "factorized_mse",
    "factorized_reconstruction",
    "set_loss_scaling",
    "use_backend",
]
