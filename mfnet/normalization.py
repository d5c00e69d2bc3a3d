"""The mean and standard deviation that a network wants its images normalized with."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

Numbers = tuple[float, ...]


class Normalization(NamedTuple):
    """``(image - mean) / std``, one number for each channel, of images in 0 to 1."""

    mean: Numbers
    std: Numbers

    def for_channels(self, channels: int) -> Normalization:
        """Itself where it has so many numbers, else their mean in every channel, as timm does."""
        if len(self.mean) == channels:
            return self
        return Normalization(*((sum(three) / len(three),) * channels for three in self))


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalization_of(network: nn.Module) -> Normalization:
    """What timm's configuration says of the weights of the timm model inside ``network``.

    ImageNet's mean and standard deviation where there is no timm model inside.
    """
    for module in network.modules():
        config: dict[str, Any] | None = getattr(module, "pretrained_cfg", None)
        if config:
            return Normalization(tuple(config["mean"]), tuple(config["std"]))
    return IMAGENET
