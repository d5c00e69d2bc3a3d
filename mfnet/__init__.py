"""MFNet: semantic segmentation with a factorized context, and the networks it is compared with."""

from typing import TYPE_CHECKING, Any

from mfnet.models import SegmentationNetwork, create_model, list_models

if TYPE_CHECKING:
    from mfnet.pretrained import TrainedNetwork, load

__all__ = ["SegmentationNetwork", "TrainedNetwork", "create_model", "list_models", "load"]


def __getattr__(name: str) -> Any:
    # Only when they are asked for: they import Lightning, which takes seconds.
    if name in ("TrainedNetwork", "load"):
        from mfnet import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module 'mfnet' has no attribute '{name}'")
