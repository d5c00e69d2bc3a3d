"""Finding and reading trained networks.

A trained network is a checkpoint of a training run or a folder of weights, as
``mfnet export RUN --to weights`` writes it; some of these are in the package.
"""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors import SafetensorError, safe_open

CHECKPOINTS = "checkpoints"  # their folder in a run's
RECORD = "mfnet"  # the entry of a checkpoint that tells network, classes and normalization
TOLD = {"network", "class_names", "normalization"}  # at least, in a record of weights
CONFIG = "config.json"  # huggingface_hub's names of the files in a folder of weights
WEIGHTS = "model.safetensors"
SHIPPED = Path(str(resources.files("mfnet"))) / "trained"


def shipped_networks() -> dict[str, Path]:
    """The folders of weights inside the package, by name."""
    return {path.parent.name: path.parent for path in sorted(SHIPPED.glob(f"*/{CONFIG}"))}


def find_checkpoint(source: str | Path) -> Path:
    """What ``read_checkpoint`` takes, a checkpoint or a folder of weights, of what a user says.

    Args:
        source: the folder of a run (its best checkpoint), a checkpoint, a folder of weights or,
            where no such path exists, the name of a network in the package.

    Raises:
        FileNotFoundError: it is none of these.
    """
    path = Path(source).expanduser()
    if not path.exists():
        shipped = shipped_networks()
        if str(source) not in shipped:
            raise FileNotFoundError(
                f"no file or folder '{path}', and none of the shipped networks: "
                f"{', '.join(shipped)}"
            )
        return shipped[str(source)]
    if not path.is_dir() or (path / CONFIG).is_file():
        return path
    best = path / CHECKPOINTS / "best.ckpt"
    if not best.is_file():
        last = best.with_name("last.ckpt")
        hint = f", but '{last}' is there" if last.is_file() else ""
        raise FileNotFoundError(
            f"'{path}' is no folder of weights, and '{best}': no such file{hint}"
        )
    return best


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", weights_only: bool = True
) -> dict[str, Any]:
    """The checkpoint in a file; of a folder of weights, what a checkpoint would hold of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole file, or written by something else.
    """
    if (Path(path) / CONFIG).is_file():
        return _read_weights(Path(path))
    checkpoint = _read_file(path, map_location, weights_only)
    _respelt(checkpoint.get(RECORD, {}))
    return checkpoint


def _respelt(record: dict[str, Any]) -> dict[str, Any]:
    """The record, changed in place: files written before November 28, 2026, have another key."""
    if "normalisation" in record:
        record["normalization"] = record.pop("normalisation")
    return record


def _read_file(path: str | Path, map_location: Any, weights_only: bool) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint '{path}': no such file")
    try:
        checkpoint = torch.load(path, map_location, weights_only=weights_only)
    except Exception as error:  # a damaged file fails in a dozen ways
        if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"checkpoint '{path}' holds a {found[1]}, perhaps the state of a callback of your "
                "own: expected tensors and plain values, as others run code when they are read"
            ) from error
        raise ValueError(f"checkpoint '{path}' is not a whole checkpoint file") from error
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(f"checkpoint '{path}' was not written by a training run")
    return checkpoint


def _read_weights(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / CONFIG).read_text("utf-8"))
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"'{folder / CONFIG}': expected JSON: {error}") from None
    if not isinstance(record, dict) or not _respelt(record).keys() >= TOLD:
        raise ValueError(f"'{folder / CONFIG}' was not written by mfnet export or save_pretrained")
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping
            # A tensor that has several names is stored under one of them.
            names = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"'{folder / WEIGHTS}' is not a whole file of tensors: {error}") from None
    state |= {name: state[stored] for name, stored in names.items() if stored in state}
    return {"pytorch-lightning_version": L.__version__, "state_dict": state, RECORD: record}
