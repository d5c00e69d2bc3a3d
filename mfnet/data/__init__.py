"""Data sets in VOC layout, PASCAL VOC with SBD, generated images; transforms; data modules."""

from mfnet.constants import IGNORE_INDEX
from mfnet.data.datamodule import (
    PascalVOC,
    Photographs,
    SegmentationDataModule,
    Synthetic,
    VOCFolder,
)
from mfnet.data.files import DataError
from mfnet.data.transforms import as_rgb, denormalize

__all__ = [
    "IGNORE_INDEX",
    "DataError",
    "PascalVOC",
    "Photographs",
    "SegmentationDataModule",
    "Synthetic",
    "VOCFolder",
    "as_rgb",
    "denormalize",
]
