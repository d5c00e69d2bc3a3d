"""Methods that find Y and Z on each image, one file each; their names are those of `METHODS`."""

from __future__ import annotations

from copy import copy

from mfops.methods.base import Method
from mfops.methods.cd import CD
from mfops.methods.em import EM
from mfops.methods.nmf import NMF
from mfops.methods.vq import VQ

METHODS: dict[str, Method] = {"em": EM(), "nmf": NMF(), "vq": VQ(), "cd": CD()}
# Factorizers that are no methods: mfops.factorizers.
WITH_PARAMETERS = ("learned", "double_attention")


def with_temperature(method: Method, inverse_temperature: float) -> Method:
    """The method at that inverse temperature; itself, where it has none."""
    if method.inverse_temperature in (None, inverse_temperature):
        return method
    for own in (VQ, CD):  # Dynamo of torch 2.11 does not trace copy
        if type(method) is own:
            return own(inverse_temperature)
    other = copy(method)
    other.inverse_temperature = inverse_temperature
    return other


def register_method(name: str, method: Method) -> None:
    """Makes a method of your own known to `mfops.factorize` and `mfops.FactorizedContext`.

    It runs in plain PyTorch on every device. See docs/factorizers.md for one in 20 lines.

    Args:
        name: what to call it there.
        method: an instance of a subclass of `mfops.Method`.

    Raises:
        TypeError: `method` is not a Method.
        ValueError: the name is taken.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method: expected an mfops.Method, got {type(method).__name__}")
    if name in METHODS or name in WITH_PARAMETERS:
        raise ValueError(f"name: {name!r} is taken")
    own = copy(method)
    own.has_kernel = own.fused = False
    METHODS[name] = own


__all__ = ["METHODS", "WITH_PARAMETERS", "Method", "register_method", "with_temperature"]
