"""MFNet: semantic segmentation with a factorized context, and the networks it is compared with."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mfnet.pretrained import TrainedNetwork, load

__all__ = ["SegmentationNetwork", "TrainedNetwork", "create_model", "list_models", "load"]


def installation(error: ModuleNotFoundError) -> str:
    """Which command installs a package that mfnet does not find."""
    return f"mfnet needs {error.name}: pip install 'mfops[mfnet]'"


try:
    from mfnet.models import SegmentationNetwork, create_model, list_models
except ModuleNotFoundError as error:
    # `mfnet` and `python -m mfnet` import this package before they can catch anything.
    if Path(sys.argv[0]).stem in ("mfnet", "-m"):
        sys.exit(f"mfnet: error: {installation(error)}")
    raise ModuleNotFoundError(installation(error), name=error.name) from None


def __getattr__(name: str) -> Any:
    # Only when they are asked for: they import Lightning, which takes seconds.
    if name not in ("TrainedNetwork", "load"):
        raise AttributeError(f"module 'mfnet' has no attribute '{name}'")
    try:
        return getattr(import_module("mfnet.pretrained"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(installation(error), name=error.name) from None
