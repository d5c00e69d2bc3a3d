"""What networks return, ours and those of others: logits, and auxiliary logits beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mfnet.data.loader import ResumableLoader


def read_output(
    output: Any, images: Tensor, classes: int, network: nn.Module
) -> tuple[Tensor, Tensor | None]:
    """Logits and, where there are any, auxiliary logits, both ``(B, classes, H, W)``.

    Logits of a lower resolution are resized bilinearly, with ``align_corners=False``.

    Args:
        output: logits ``(B, classes, h, w)``, a mapping with logits ``"out"`` and perhaps
            ``"aux"``, as torchvision's networks return it, or an object with ``.logits``, as those
            of transformers do.
        images: ``(B, 3, H, W)``.
        classes: their number.
        network: what returned the output, for the message.

    Raises:
        ValueError: it is something else.
    """
    output = getattr(output, "logits", output)
    auxiliary = None
    if isinstance(output, Mapping) and "out" in output:
        output, auxiliary = output["out"], output.get("aux")
    name = type(network).__name__
    logits = _at_size(output, "logits", images, classes, name)
    if auxiliary is None:
        return logits, None
    return logits, _at_size(auxiliary, "auxiliary logits", images, classes, name)


@contextmanager
def lone_image_told(images: Tensor, network: nn.Module, loader: Any) -> Iterator[None]:
    """Say what to change where BatchNorm refuses the one image of an epoch's last batch.

    Raises:
        ValueError: it does, as the network has pooled that image to one pixel.
    """
    try:
        yield
    except ValueError as error:
        refused = "Expected more than 1 value per channel when training" in str(error)
        if not refused or len(images) > 1 or not isinstance(loader, ResumableLoader):
            raise
        raise ValueError(
            f"{type(network).__name__} does not train on a batch of 1 image, which "
            f"{len(loader.sampler)} images in batches of {loader.batch_size} end with: choose "
            "another --data.batch_size"
        ) from error


def _at_size(logits: Any, kind: str, images: Tensor, classes: int, network: str) -> Tensor:
    size = images.shape[-2:]
    expected = (images.shape[0], classes, *size)  # len() would freeze it in an export
    got: Any = type(logits).__name__
    if isinstance(logits, Tensor):
        got = tuple(logits.shape)
        if got == expected:
            return logits
        within = all(0 < own <= full for own, full in zip(got[2:], size, strict=False))
        if len(got) == 4 and got[:2] == expected[:2] and within:
            return F.interpolate(logits, size, mode="bilinear", align_corners=False)
    elif isinstance(logits, Mapping):
        got = f"{got} with {', '.join(map(str, logits)) or 'nothing'}"
    raise ValueError(
        f"network: expected {network} to return {kind} of shape {expected} (batch, classes, "
        f"height, width), of lower resolution at most, got {got}"
    )
