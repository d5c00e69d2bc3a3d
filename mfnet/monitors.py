"""Callbacks that watch a training for its user: scores on the console, and checks of the user's
own callbacks before hours are spent on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tqdm import tqdm

SCORES = ("mIoU", "fwIoU", "accuracy")
COUNTERS = ("step", "epoch")  # by which Lightning's ModelCheckpoint keeps the latest


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse what cannot work with this trainer, or would do the opposite of what is meant.

    Raises:
        MisconfigurationException: a callback that finds or changes learning rates by means that
            ``mfnet.task.SegmentationTask`` does not offer; a score watched with the mode of
            a loss, or a loss with that of a score.
    """
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, LearningRateFinder):
            raise MisconfigurationException(
                f"{name}: there are two learning rates, and it finds one; "
                "set --model.backbone_lr and --model.head_lr"
            )
        if isinstance(callback, BaseFinetuning):
            raise MisconfigurationException(
                f"{name}: the optimizer holds the backbone from the start; "
                "--model.backbone_lr sets its rate (0 keeps its weights)"
            )
        if isinstance(callback, (EarlyStopping, ModelCheckpoint)):
            mode = _mode(callback.monitor)
            if mode is not None and callback.mode != mode:
                raise MisconfigurationException(
                    f"{name}: mode '{callback.mode}' with {callback.monitor}, which is best at its "
                    f"{mode}imum: expected mode '{mode}'"
                )


def _mode(metric: str | None) -> str | None:
    """Whether a metric of the task is to be small or large; ``None`` where that is not known."""
    stage, _, name = (metric or "").partition("/")
    if stage not in ("train", "val"):
        return None
    if name in SCORES or name.startswith("IoU/"):
        return "max"
    return "min" if name in ("loss", "ce", "reconstruction") else None


class MonitorCheck(Callback):
    """Stop after the sanity check, not after an epoch, where a callback watches a validation
    metric that is not logged."""

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        logged = sorted(trainer.callback_metrics)
        for callback in trainer.callbacks:
            metric = getattr(callback, "monitor", None)
            if not isinstance(metric, str) or metric.startswith(("train/", "lr-")):
                continue  # what training logs is not known yet
            if isinstance(callback, ModelCheckpoint) and metric in COUNTERS:
                continue
            if metric not in logged:
                raise MisconfigurationException(
                    f"{type(callback).__name__}: nothing logs '{metric}': monitor one of "
                    f"{', '.join([*logged, 'train/loss'])}"
                )


class EpochScores(Callback):
    """Print the scores of each validation in a line of their own, with a progress bar or not."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._print("val", trainer)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._print("test", trainer)

    def _print(self, stage: str, trainer: L.Trainer) -> None:
        logged = trainer.callback_metrics
        shown = [name for name in SCORES if f"{stage}/{name}" in logged]
        if not shown or trainer.sanity_checking or not trainer.is_global_zero:
            return
        scores = ", ".join(f"{name} {logged[f'{stage}/{name}']:.3f}" for name in shown)
        epoch = ""
        if trainer.state.fn == TrainerFn.FITTING:
            last = f" of {trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
            epoch = f"epoch {trainer.current_epoch + 1}{last}: "
        tqdm.write(f"{epoch}{stage} {scores}")
