"""MFNet: semantic segmentation with a factorized context, and the networks it is compared with."""

from mfnet.models import SegmentationNetwork, create_model, list_models

__all__ = ["SegmentationNetwork", "create_model", "list_models"]
