"""Starting from a trained network, and keeping a part of one as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mfnet.checkpoint import RECORD, find_checkpoint, read_checkpoint
from mfnet.models import unwrap
from mfnet.normalization import Normalization
from mfnet.parameter_groups import backbone_of
from mfnet.pretrained import PREFIX
from mfnet.state_dicts import differences, match_names, read_tensors
from mfops.factorizers import LearnedFactorizer, resampled

Freeze = Literal["statistics"] | bool
LISTED = 10  # names of tensors of one kind that are told


def initialize(
    network: nn.Module,
    source: str | Path,
    normalization: Normalization,
    class_names: Sequence[str],
) -> str:
    """Give a network every tensor of a trained one whose name and shape fit.

    A learned Z of another grid is resampled, bilinearly.

    Args:
        network: compiled or wrapped, or not.
        source: what ``mfnet.load`` takes, or a file of tensors by name (``.safetensors``, or
            what ``torch.load(weights_only=True)`` reads).
        normalization: of the images that the network is going to see.
        class_names: those that the network is going to tell apart.

    Returns:
        What was taken and what was left out, and whether the trained network's images were
        normalized otherwise or as many classes were others, in one line.

    Raises:
        FileNotFoundError: there is no such file, folder or name.
        ValueError: it is none of these, or nothing in it fits.
    """
    network = unwrap(network)
    state, record = _read(Path(source).expanduser())
    own = network.state_dict()
    given = match_names(own, {key.removeprefix(PREFIX): value for key, value in state.items()})
    given |= _resampled_factors(network, given, record)
    taken = {key: given[key] for key in own if key in given and given[key].shape == own[key].shape}
    if not taken:
        raise ValueError(f"init_from '{source}': none of its tensors fits the network")
    network.load_state_dict({**own, **taken})
    missing, unexpected, reshaped = differences(given, own).values()
    left = {
        "of another shape": reshaped,
        "not in it": missing,
        "in it, but not in the network": unexpected,
    }
    parts = [f"{what}: {_listed(keys)}" for what, keys in left.items() if keys]
    now = {name: list(numbers) for name, numbers in normalization._asdict().items()}
    before = record.get("normalization", now)
    if before != now:
        parts.append(
            f"its images had image_mean {before['mean']} and image_std {before['std']}, those of "
            f"this run have {now['mean']} and {now['std']}"
        )
    classes = list(record.get("class_names", class_names))
    if len(classes) == len(class_names) and classes != list(class_names):
        parts.append(f"its classes were {', '.join(classes)}, now: {', '.join(class_names)}")
    return "; ".join([f"init_from '{source}': {len(taken)} of {len(own)} tensors taken", *parts])


def frozen_modules(network: nn.Module, freeze: Freeze) -> list[nn.Module]:
    """The modules that stay in evaluation mode; their parameters no longer train.

    With ``True`` all of the backbone, with ``"statistics"`` its BatchNorm layers, whose weights go
    on training.

    Raises:
        ValueError: the network has neither a ``backbone`` nor an ``encoder``, or another value.
    """
    if freeze not in (True, False, "statistics"):
        raise ValueError(f"freeze_backbone: expected true, false or statistics, got {freeze!r}")
    if not freeze:
        return []
    backbone = backbone_of(unwrap(network))
    if backbone is None:
        raise ValueError(
            f"freeze_backbone: {type(network).__name__} has neither a backbone nor an encoder"
        )
    if freeze == "statistics":
        return [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    return [backbone]


def _read(path: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """The tensors of a trained network, and what is told beside them."""
    if not path.is_file() or path.suffix == ".ckpt":
        checkpoint = read_checkpoint(find_checkpoint(path))
        state = checkpoint.get("state_dict", {})
        return {k: v for k, v in state.items() if k.startswith(PREFIX)}, checkpoint.get(RECORD, {})
    return read_tensors(path, "init_from"), {}


def _resampled_factors(
    network: nn.Module, given: Mapping[str, Tensor], record: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The learned Z whose grid is another, on the network's grids."""
    found = {}
    for name, module in network.named_modules():
        key = f"{name}.z"
        if not isinstance(module, LearnedFactorizer) or key not in given:
            continue
        z = given[key]
        grid = _grid(z.shape[-1], record)
        if grid is not None and z.ndim == 2 and grid != tuple(module.size):
            found[key] = resampled(z, grid, module.size)
    return found


def _grid(pixels: int, record: Mapping[str, Any]) -> tuple[int, int] | None:
    """The grid of so many pixels that built the network, or else a square."""
    arguments = (record.get("network") or {}).get("init_args", {})
    for value in arguments.values():
        numbers = isinstance(value, (list, tuple)) and all(isinstance(n, int) for n in value)
        if numbers and len(value) == 2 and math.prod(value) == pixels:
            return (int(value[0]), int(value[1]))
    side = math.isqrt(pixels)
    return (side, side) if side * side == pixels else None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
