"""What ``mfnet predict`` leaves behind: overlays, masks, probabilities."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from mfnet.data import DataError, as_rgb
from mfnet.data.prediction import Skipped
from mfnet.files import atomic_write
from mfnet.inference import Prediction
from mfnet.visualize import overlay, save_image, save_mask

Kind = Literal["overlay", "mask", "probabilities"]
SUFFIXES: dict[Kind, str] = {"overlay": ".png", "mask": ".png", "probabilities": ".npz"}


class PredictionWriter(BasePredictionWriter):
    """Write what was predicted for each image, at the image's own size.

    ``overlay``: the image with its classes painted over it, in the data module's ``palette``.
    ``mask``: a palette PNG of class indices, as masks to train on are. ``probabilities``: an
    ``.npz`` with ``probabilities`` float16 (classes, H, W) and ``class_names``. The overlay of
    ``<stem>.<any>`` is ``<output>/<stem>.png``; where several kinds are asked for, each has a
    folder of its name in ``output``. Images from several folders keep their place below the folder
    they share.

    A prediction is a ``mfnet.inference.Prediction`` of a batch ``(image, original, [path])``
    of one image, the original uint8 (1, C, H, W).

    Raises ``ValueError`` before anything is predicted when two images would share a file, or a
    file would replace one of the images; ``DataError`` at the end, naming the images that could
    not be predicted (``mfnet.data.prediction.Skipped``), all others being written.
    """

    def __init__(self, output: str | Path, kinds: Sequence[Kind] = ("overlay",)) -> None:
        super().__init__("batch")
        self.output = Path(output)
        self.kinds = list(dict.fromkeys(kinds))
        if not self.kinds or not set(self.kinds) <= SUFFIXES.keys():
            raise ValueError(
                f"kinds: expected some of {', '.join(SUFFIXES)}, got {', '.join(self.kinds)}"
            )
        self._targets: dict[Kind, dict[Path, Path]] = {}
        self._skipped: list[Skipped] = []
        self._written = 0

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._skipped, self._written = [], 0
        pl_module.keep_probabilities = "probabilities" in self.kinds
        paths = trainer.predict_dataloaders.dataset.paths
        folders = {kind: self.output / kind for kind in self.kinds}
        if len(folders) == 1:
            folders = dict.fromkeys(folders, self.output)
        self._targets = {
            kind: output_files(paths, folder, SUFFIXES[kind]) for kind, folder in folders.items()
        }
        self.output.mkdir(parents=True, exist_ok=True)

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Prediction | Skipped,
        batch_indices: Sequence[int] | None,
        batch: tuple[Tensor, Tensor, Sequence[str]],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if isinstance(prediction, Skipped):
            self._skipped.append(prediction)
            return
        _, (original,), (name,) = batch
        data = trainer.datamodule
        labels = prediction.labels.numpy()
        for kind in self.kinds:
            path = self._targets[kind][Path(name)]
            if kind == "overlay":
                picture = as_rgb(original).permute(1, 2, 0).cpu().numpy()
                save_image(overlay(picture, labels, data.palette), path)
            elif kind == "mask":
                save_mask(labels, data.palette, path)
            else:
                assert prediction.probabilities is not None  # asked for in on_predict_start
                arrays: dict[str, Any] = {
                    "probabilities": prediction.probabilities.numpy(),
                    "class_names": np.array(data.class_names),
                }
                with atomic_write(path) as partial:
                    np.savez_compressed(partial, **arrays)
        self._written += 1

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        of_ranks = [(self._written, self._skipped)]
        if dist.is_available() and dist.is_initialized():
            of_ranks *= dist.get_world_size()
            dist.all_gather_object(of_ranks, (self._written, self._skipped))
        written = sum(count for count, _ in of_ranks)
        skipped = [one for _, some in of_ranks for one in some]
        if trainer.is_global_zero:
            count = "1 image" if written == 1 else f"{written} images"
            print(f"{count} predicted, see {self.output.absolute()}")
        if skipped:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in skipped)
            raise DataError(
                f"{len(skipped)} of {written + len(skipped)} images were not predicted: {reasons}"
            )


def output_files(paths: Sequence[str | Path], output: Path, suffix: str) -> dict[Path, Path]:
    """The file in ``output`` for each image; see ``PredictionWriter``.

    Raises:
        ValueError: two images would share a file, or a file would replace an image.
    """
    sources = [Path(path) for path in paths]
    if not sources:
        raise ValueError("predict: expected at least one image, got none")
    absolute = {source: Path(os.path.abspath(source)) for source in sources}
    root = Path(os.path.commonpath([path.parent for path in absolute.values()]))
    taken: dict[Path, Path] = {}
    for source, path in absolute.items():
        target = output / path.relative_to(root).with_suffix(suffix)
        if target in taken:
            raise ValueError(f"{source} and {taken[target]}: both predictions would be {target}")
        taken[target] = source
    images = {path.resolve() for path in sources}
    for target, source in taken.items():
        if target.resolve() in images:
            raise ValueError(f"{target}: the prediction of {source} would replace an image")
    return {source: target for target, source in taken.items()}
