"""The loss of the logits: cross entropy, losses of other packages, sums of them, class weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mfnet.constants import IGNORE_INDEX
from mfnet.data.dataset import SegmentationDataset
from mfnet.data.files import read_mask
from mfnet.data.labels import to_labels

_EMPTY = 1e-6  # in place of no pixel at all: the loss is then 0, and so is its gradient
_REFUSALS = (ValueError, TypeError, IndexError, AssertionError, RuntimeError)


class CrossEntropy(nn.Module):
    """The mean over the pixels that are not ignored (255), in training those of all ranks together.

    ``forward(logits, masks)`` takes float ``(B, classes, H, W)`` and int64 ``(B, H, W)`` and
    returns a scalar; n processes with batch b so take the step of one process with batch n b.
    Without a pixel that counts it is 0.

    Args:
        weight: of each class, ``(classes,)``; the mean is then a weighted one.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        total = F.cross_entropy(
            logits, masks, self.weight, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        if self.weight is None:
            counted = (masks != IGNORE_INDEX).sum().float()
        else:
            by_label = F.pad(self.weight, (0, IGNORE_INDEX + 1 - len(self.weight)))
            counted = by_label[masks].sum()
        if self.training:
            counted = _mean_over_ranks(counted)
        return total / counted.clamp(min=_EMPTY)


class WeightedSum(nn.Module):
    """``sum_i weights[i] * losses[i](logits, masks)``.

    Args:
        losses: modules called as ``loss(logits, masks)``, each with a scalar for an answer.
        weights: a number for each.

    Raises:
        ValueError: there are not as many weights as losses, or none.
    """

    def __init__(self, losses: list[nn.Module], weights: list[float]) -> None:
        super().__init__()
        if not losses or len(losses) != len(weights):
            raise ValueError(
                f"weights: expected one for each of the {len(losses)} losses, got {weights}"
            )
        self.losses = nn.ModuleList(losses)
        self.weights = list(weights)

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        pairs = zip(self.weights, self.losses, strict=True)
        return sum(weight * loss(logits, masks) for weight, loss in pairs)


def prepare(loss: nn.Module) -> nn.Module:
    """``loss``, ignoring 255, and without a trace in checkpoints: a run's flags say what it is.

    Modules in it that take ``ignore_index`` and have kept its default are given 255.

    Raises:
        ValueError: the loss has parameters, which nothing would train.
    """
    if any(True for _ in loss.parameters()):
        raise ValueError(
            f"loss: expected a module without parameters, which nothing would train, got "
            f"{type(loss).__name__}"
        )
    for module in loss.modules():
        takes = signature(type(module)).parameters.get("ignore_index")
        if takes is not None and getattr(module, "ignore_index", None) == takes.default:
            module.ignore_index = IGNORE_INDEX  # type: ignore[assignment]
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer, persistent=False)
    return loss


def with_class_weights(loss: nn.Module, weights: Tensor) -> nn.Module:
    """A copy of ``loss`` with ``weights`` (classes,) in all modules of it that take ``weight``.

    Raises:
        ValueError: there is none.
    """
    loss = copy.deepcopy(loss)
    takers = [m for m in loss.modules() if "weight" in signature(type(m)).parameters]
    if not takers:
        raise ValueError(
            f"class_weights: expected a loss that takes weight, as torch.nn.CrossEntropyLoss does, "
            f"got {type(loss).__name__}"
        )
    for module in takers:
        if hasattr(module, "weight"):
            del module.weight
        module.register_buffer("weight", weights, persistent=False)
    return loss


def check_class_weights(weights: Sequence[float], classes: int) -> Tensor:
    """The weights as float32 (classes,).

    Raises:
        ValueError: they are not as many numbers of at least 0, one of them above.
    """
    fine = all(math.isfinite(weight) and weight >= 0 for weight in weights)
    if isinstance(weights, str) or len(weights) != classes or not fine or not any(weights):
        raise ValueError(
            f"class_weights: expected 'auto' or {classes} numbers of at least 0, one for each "
            f"class and not all 0, got {weights}"
        )
    return torch.tensor(weights, dtype=torch.float32)


def balanced_class_weights(dataset: Any) -> Tensor:
    """``median_frequency`` of the masks of a split, as they are on disk; float32 (classes,).

    Raises:
        ValueError: it is not one of mfnet's data sets.
        DataError: a mask cannot be read.
    """
    if not isinstance(dataset, SegmentationDataset):
        raise ValueError(
            "class_weights: expected numbers, as 'auto' counts the masks of mfnet's own data "
            f"modules, got 'auto' with {type(dataset).__name__}"
        )
    masks = (read_mask(sample.mask) for sample in dataset.samples)
    labels = (to_labels(mask, dataset.num_classes, dataset.label_map) for mask in masks)
    return median_frequency(labels, dataset.num_classes)


def median_frequency(masks: Iterable[NDArray[Any]], classes: int) -> Tensor:
    """Class weights ``median / f_c``, float32 (classes,); 0 for a class without a pixel.

    ``f_c`` is the share of class c of the labeled pixels of the images that it occurs in (Eigen
    and Fergus, ICCV 2015), ``median`` that of all ``f_c``.

    Args:
        masks: labels uint8 (H, W), 255 where ignored.
        classes: their number.

    Raises:
        ValueError: no pixel is labeled.
    """
    pixels, around = torch.zeros(2, classes, dtype=torch.float64)
    for labels in masks:
        counts = torch.bincount(torch.from_numpy(labels).flatten(), minlength=classes)[:classes]
        pixels += counts
        around += counts.sum() * (counts > 0)
    if not pixels.any():
        raise ValueError("class_weights: expected masks with a labeled pixel, got none")
    frequency = pixels / around
    weights = frequency[pixels > 0].quantile(0.5) / frequency
    return weights.nan_to_num(0.0).float()


def evaluate(loss: nn.Module, logits: Tensor, masks: Tensor) -> Tensor:
    """``loss(logits, masks)`` in float32, a scalar; 0 where no pixel counts.

    Args:
        loss: a module that ``prepare`` has seen.
        logits: (B, classes, H, W).
        masks: int64 (B, H, W), 255 where ignored.

    Raises:
        ValueError: the loss does not take these, or returns something else.
    """
    logits, loss = logits.float(), loss.float()  # bf16-true makes class weights bfloat16
    if isinstance(loss, CrossEntropy):
        return loss(logits, masks)
    if not (masks != IGNORE_INDEX).any():  # most means are then not a number
        return 0 * logits.sum()
    name = type(loss).__name__
    try:
        value = loss(logits, masks)
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as error:
        raise ValueError(
            f"loss: expected {name} to take logits {tuple(logits.shape)} and int64 masks "
            f"{tuple(masks.shape)}, got {type(error).__name__}: {error}"
        ) from error
    if not isinstance(value, Tensor) or value.ndim:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss: expected {name} to return a scalar tensor, got {got}")
    return value


def _mean_over_ranks(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value
