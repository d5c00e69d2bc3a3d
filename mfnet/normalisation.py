"""The mean and standard deviation that a network wants its images normalised with."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

Numbers = tuple[float, ...]


class Normalisation(NamedTuple):
    """``(image - mean) / std``, one number for each channel, of images in 0 to 1."""

    mean: Numbers
    std: Numbers

    def for_channels(self, channels: int) -> Normalisation:
        """Itself where it has so many numbers, else their mean in every channel, as timm does."""
        if len(self.mean) == channels:
            return self
        return Normalisation(*((sum(three) / len(three),) * channels for three in self))


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalisation_of(network: nn.Module) -> Normalisation:
    """What timm's configuration says of the weights of the timm model inside ``network``.

    ImageNet's mean and standard deviation where there is no timm model inside.
    """
    for module in network.modules():
        config: dict[str, Any] | None = getattr(module, "pretrained_cfg", None)
        if config:
            return Normalisation(tuple(config["mean"]), tuple(config["std"]))
    return IMAGENET
