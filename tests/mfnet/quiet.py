"""Trainers that leave neither files nor words, for tests of what they train."""

from __future__ import annotations

from typing import Any

import lightning as L


def quiet_trainer(**options: Any) -> L.Trainer:
    """One epoch on the CPU unless told else, without log, checkpoints, bars and tables."""
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, **dict.fromkeys(silent, False)}
    return L.Trainer(**{**defaults, **options})
