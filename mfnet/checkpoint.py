"""Reading checkpoints of training runs, and what keeps their tensors from being loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHECKPOINTS = "checkpoints"  # their folder in a run's
RECORD = "mfnet"  # the entry of a checkpoint that tells network, classes and normalisation


def find_checkpoint(path: str | Path) -> Path:
    """The file that a run's folder (its best checkpoint) or a file means.

    Raises:
        FileNotFoundError: there is none.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / CHECKPOINTS / "best.ckpt"
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint '{file}': no such file")
    return file


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", weights_only: bool = True
) -> dict[str, Any]:
    """Raises ``FileNotFoundError``, or ``ValueError`` for what is not a checkpoint of a run."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint '{path}': no such file")
    try:
        checkpoint = torch.load(path, map_location, weights_only=weights_only)
    except Exception as error:  # a damaged file fails in a dozen ways
        raise ValueError(f"checkpoint '{path}' is not a whole checkpoint file") from error
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(f"checkpoint '{path}' was not written by a training run")
    return checkpoint


def named_as(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``given`` under the names that the network has for them, compiled or not.

    Bases had no method in their name before: ``bases``, now ``em_bases``.
    """
    names = {re.sub(r"\.[^.]+_bases$", ".bases", uncompiled(key)): key for key in own}
    names |= {uncompiled(key): key for key in own}
    return {names.get(uncompiled(key), key): tensor for key, tensor in given.items()}


def uncompiled(key: str) -> str:
    """A tensor's name in the network that ``torch.compile`` was given."""
    return key.replace("_orig_mod.", "")


def misfit(given: Mapping[str, Tensor] | None, own: Mapping[str, Tensor]) -> str:
    """What keeps a checkpoint's tensors from being loaded, in a few words; empty if nothing."""
    if given is None:
        return "it holds no 'state_dict', so it was not written by a training run"
    faults = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "of another shape": [
            f"{key} {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in given and given[key].shape != own[key].shape
        ],
    }
    return "; ".join(
        f"{len(keys)} tensors {what} (first: {keys[0]})" for what, keys in faults.items() if keys
    )
