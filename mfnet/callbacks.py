"""The Lightning callback that writes a run's record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from tqdm import tqdm

from mfnet.data import as_rgb, denormalize
from mfnet.files import atomic_write
from mfnet.flops import count_flops
from mfnet.models import evaluation_parameters, unwrap
from mfnet.normalization import IMAGENET
from mfnet.scores import CONFUSION, class_table, write_class_scores, write_confusion

SUMMARY = "summary.json"
SAMPLES = "samples.npz"


class RunRecord(Callback):
    """Write ``summary.json``, ``samples.npz`` and ``confusion.csv`` into the run's folder.

    ``summary.json``: model, backbone, parameters, trainable_parameters (both without those of an
    auxiliary head, which only trains), gflops
    (``mfnet.flops.count_flops``, at the validation images' size; null where it cannot be
    counted), input_size, class_names, palette; written at the first validation.
    ``samples.npz``: ``image_i`` uint8 (H, W, 3), ``truth_i`` and ``prediction_i`` uint8 (H, W) for
    a few validation images, always the same, and ``epoch``; refreshed at every validation, by the
    weights that it scores (averaged ones, where a callback puts those in place for it).
    ``confusion.csv``: see ``mfnet.scores.write_confusion``; of the last validation, where the
    module has counts (``mfnet.task.SegmentationTask.confusion_counts``).
    Rank 0 alone writes, only while fitting, and not in the sanity check.

    Args:
        model: name of the model; default: the class name of the module's ``network``.
        backbone: name of the backbone; default: empty.
        samples: number of validation images.
        folder: the run's folder; default: ``trainer.log_dir``, which is the first logger's.
    """

    def __init__(
        self,
        model: str = "",
        backbone: str = "",
        samples: int = 4,
        folder: str | Path | None = None,
    ) -> None:
        self.model = model
        self.backbone = backbone
        self.samples = samples
        self.folder = folder
        self._chosen: list[tuple[Tensor, Tensor]] = []
        self._predictions: list[Tensor] = []

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        folder = None if batch_idx or dataloader_idx else self._folder_now(trainer)
        if folder is None:
            return
        if not self._chosen:
            dataset = trainer.val_dataloaders.dataset
            count = min(self.samples, len(dataset))
            self._chosen = [dataset[index * len(dataset) // count] for index in range(count)]
            self._write_summary(folder / SUMMARY, trainer, pl_module)
        # Callbacks that average weights take them away again when the epoch ends.
        plugin = trainer.precision_plugin
        with torch.no_grad(), plugin.val_step_context():
            images = (image[None].to(pl_module.device) for image, _ in self._chosen)
            logits = (pl_module(plugin.convert_input(image)) for image in images)
            self._predictions = [scores[0].argmax(0).cpu() for scores in logits]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        folder = self._folder_now(trainer)
        if folder is None:
            return
        self._write_samples(folder / SAMPLES, trainer, pl_module)
        counts = getattr(pl_module, "confusion_counts", None)
        if counts is not None:
            write_confusion(counts, pl_module.class_names, folder / CONFUSION)

    def _folder_now(self, trainer: Any) -> Path | None:
        """Where to record; ``None`` on other ranks, and where nothing is to be recorded."""
        if trainer.sanity_checking or trainer.fast_dev_run or trainer.state.fn != TrainerFn.FITTING:
            return None
        # A broadcast: every rank has to ask.
        log_dir = trainer.log_dir if self.folder is None else self.folder
        return Path(log_dir) if log_dir is not None and trainer.is_global_zero else None

    def _write_summary(self, path: Path, trainer: Any, pl_module: Any) -> None:
        network = unwrap(pl_module.network)
        channels, height, width = self._chosen[0][0].shape
        try:
            gflops = count_flops(network, (height, width), channels) / 1e9
        except Exception as error:
            # A foreign network may not run on the meta device; that must not end its training.
            rank_zero_warn(f"the FLOPs of {type(network).__name__} cannot be counted: {error}")
            gflops = None
        parameters = evaluation_parameters(network)
        summary = {
            "model": self.model or type(network).__name__,
            "backbone": self.backbone,
            "parameters": sum(p.numel() for p in parameters),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "gflops": gflops,
            "input_size": [height, width],
            "class_names": list(trainer.datamodule.class_names),
            "palette": [list(map(int, color)) for color in trainer.datamodule.palette],
        }
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def _write_samples(self, path: Path, trainer: Any, pl_module: Any) -> None:
        arrays: dict[str, Any] = {"epoch": trainer.current_epoch}
        normalization = getattr(pl_module, "normalization", IMAGENET)
        for index, (image, mask) in enumerate(self._chosen):
            shown = as_rgb(denormalize(image, normalization))
            arrays[f"image_{index}"] = shown.permute(1, 2, 0).numpy()
            arrays[f"truth_{index}"] = mask.numpy().astype(np.uint8)
            arrays[f"prediction_{index}"] = self._predictions[index].numpy().astype(np.uint8)
        with atomic_write(path) as partial:
            np.savez_compressed(partial, **arrays)


class ClassScores(Callback):
    """Print the scores of each class after ``validate`` and ``test``, and write them as CSV.

    The files are ``scores-val.csv`` and ``scores-test.csv``; see
    ``mfnet.scores.write_class_scores``. Where the folder cannot be written to, that is a
    warning. Rank 0 alone prints and writes.

    Args:
        folder: the folder of the files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._put_out("val", trainer, pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._put_out("test", trainer, pl_module)

    def _put_out(self, stage: str, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        counts, names = pl_module.confusion_counts, pl_module.class_names
        tqdm.write(f"images shown {pl_module.inference}")
        tqdm.write(class_table(counts, names), end="")
        path = self.folder / f"scores-{stage}.csv"
        try:
            write_class_scores(counts, names, path)
        except OSError as error:  # the folder of someone else's run
            rank_zero_warn(f"{path} was not written: {error.strerror}")
        else:
            tqdm.write(f"written: {path}")
