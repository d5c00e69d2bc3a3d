"""Trainers, and single steps, that leave neither files nor words."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor, nn

from mfnet.task import SegmentationTask


def quiet_trainer(**options: Any) -> L.Trainer:
    """One epoch on the CPU unless told else, without log, checkpoints, bars and tables."""
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, **dict.fromkeys(silent, False)}
    return L.Trainer(**{**defaults, **options})


def one_step(
    network: nn.Module, class_names: list[str], batch: tuple[Tensor, Tensor], **arguments: Any
) -> tuple[Tensor, dict[str, float], SegmentationTask]:
    """The loss of a training step without a run, what it logs for the epoch, and its task."""
    task = SegmentationTask(network, class_names, **arguments)
    task.trainer = quiet_trainer()
    logged: dict[str, float] = {}
    task.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    task.log_dict = lambda values, **kwargs: logged.update(values)  # type: ignore[method-assign]
    return task.training_step(batch, 0), logged, task
