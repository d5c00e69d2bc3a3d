"""Images without masks, for prediction alone."""

from __future__ import annotations

from typing import Any

from mfnet.data import voc
from mfnet.data.datamodule import SegmentationDataModule
from mfnet.data.voc import Palette, Sample, Split


class Photographs(SegmentationDataModule):
    """Images without masks: what ``mfnet predict`` reads where a checkpoint tells the classes."""

    def __init__(
        self, class_names: list[str] | None = None, palette: Palette | None = None, **kwargs: Any
    ) -> None:
        """
        Args:
            class_names: the classes, in the order of the logits; by default the checkpoint's.
            palette: RGB of each class; by default the checkpoint's, or else PASCAL's colors.

        Raises:
            ValueError: no class names, or not as many colors as names.
        """
        super().__init__(**kwargs)
        if not class_names:
            raise ValueError(
                "predict: nothing tells the classes: give --ckpt_path RUN, the folder or the "
                "checkpoint of a trained network; an older one needs --config RUN/config.yaml, too"
            )
        self.class_names = list(class_names)
        self.palette = [(r, g, b) for r, g, b in palette or voc.pascal_palette(len(class_names))]
        if len(self.palette) != len(self.class_names):
            raise ValueError(
                f"palette: expected {len(self.class_names)} colors, one for each class, got "
                f"{len(self.palette)}"
            )

    def list_samples(self, split: Split) -> list[Sample]:
        raise ValueError(
            "Photographs: there are no masks to train or to score with; choose a data set that "
            "has them, for instance --data VOCFolder"
        )
