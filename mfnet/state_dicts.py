"""Tensors by name: read from files, brought to a network's names, compared with what it takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from timm.models import load_state_dict
from torch import Tensor


def read_tensors(path: Path, flag: str) -> dict[str, Tensor]:
    """The tensors in a file, ``.safetensors`` or what ``torch.load(weights_only=True)`` reads.

    Raises:
        ValueError: there are none; the message begins with the flag that named the file.
    """
    try:
        # Also unwraps {"state_dict": ...} and the "module." prefix of DataParallel.
        given = load_state_dict(str(path))
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        if not tensors:
            raise ValueError("no tensor in it")
        return tensors
    except Exception as error:  # torch.load and safetensors fail in a dozen ways on a bad file
        raise ValueError(f"{flag}: '{path}' is not a file of tensors by name") from error


def match_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``given`` under the names that the network has for them, compiled or not.

    Bases had no method in their name before: ``bases``, now ``em_bases``.
    """
    names = {re.sub(r"\.[^.]+_bases$", ".bases", uncompiled(key)): key for key in own}
    names |= {uncompiled(key): key for key in own}
    return {names.get(uncompiled(key), key): tensor for key, tensor in given.items()}


def uncompiled(key: str) -> str:
    """A tensor's name in the network that ``torch.compile`` was given."""
    return key.replace("_orig_mod.", "")


def differences(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names that do not fit: ``missing``, ``unexpected``, ``of another shape`` (and which)."""
    return {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "of another shape": [
            f"{key} {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in given and given[key].shape != own[key].shape
        ],
    }


def mismatch(given: Mapping[str, Tensor] | None, own: Mapping[str, Tensor]) -> str:
    """What keeps a checkpoint's tensors from being loaded, in a few words; empty if nothing."""
    if given is None:
        return "it holds no 'state_dict', so it was not written by a training run"
    faults = differences(given, own)
    return "; ".join(
        f"{len(keys)} tensors {what} (first: {keys[0]})" for what, keys in faults.items() if keys
    )
