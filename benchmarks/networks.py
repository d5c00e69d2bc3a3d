"""Networks of segmentation_models_pytorch, built by the arguments that mfnet.create_model takes.

mfnet fit ... --model.network benchmarks.networks.smp --model.network.name FPN
"""

from __future__ import annotations

import importlib
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from mfnet.backbone import load_weights

SMP = "segmentation_models_pytorch"
SMP_NETWORKS = ("DeepLabV3Plus", "FPN", "UPerNet", "Segformer", "PAN", "Unet", "PSPNet")
STRIDE = 32  # of the deepest features that one of them takes


class Padded(nn.Module):
    """A network that wants sizes that are multiples of 32, for any: it sees 0, the mean color, on
    the right and at the bottom, and those logits are cut off.

    ``encoder`` is the network's, so that it gets the backbone's learning rate.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def encoder(self) -> nn.Module:
        return self.network.encoder

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, -width % STRIDE, 0, -height % STRIDE))
        return self.network(padded)[..., :height, :width]


def smp(
    name: str,
    num_classes: int = 21,
    backbone: str = "resnet50",
    backbone_weights: str | Path | None = None,
    in_channels: int = 3,
) -> Padded:
    """A network of segmentation_models_pytorch with its defaults, on a backbone of timm's.

    Args:
        name: one of SMP_NETWORKS.
        backbone_weights: a file of the backbone's weights, as `mfnet.create_model` takes it.

    Raises:
        ValueError: an unknown name, or weights that do not fit.
        ModuleNotFoundError: segmentation_models_pytorch is not installed.
    """
    if name not in SMP_NETWORKS:
        raise ValueError(f"name: expected one of {', '.join(SMP_NETWORKS)}, got {name!r}")
    network = getattr(importlib.import_module(SMP), name)(
        f"tu-{backbone}", encoder_weights=None, classes=num_classes, in_channels=in_channels
    )
    if backbone_weights is not None:
        load_weights(network.encoder.model, backbone, Path(backbone_weights), in_channels)
    return Padded(network)
