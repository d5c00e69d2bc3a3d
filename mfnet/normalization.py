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

    def replaced(self, mean: Numbers | None, std: Numbers | None) -> Normalization:
        """Itself, with the given numbers in place of its own.

        Raises:
            ValueError: there is not one for each channel, or a deviation is not above 0.
        """
        channels = len(self.mean)
        for name, given in (("image_mean", mean), ("image_std", std)):
            if given is not None and len(given) != channels:
                raise ValueError(
                    f"{name}: expected {channels} numbers, one for each channel of the images, got "
                    f"{list(given)}"
                )
        if std is not None and not all(number > 0 for number in std):
            raise ValueError(f"image_std: expected numbers above 0, got {list(std)}")
        return Normalization(tuple(mean or self.mean), tuple(std or self.std))


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
