"""What networks return, ours and those of others: logits, and auxiliary logits beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


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
