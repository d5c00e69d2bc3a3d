"""Which parameters train at which rate: the groups of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import nn

from mfnet.decoder import PointwiseDecoder
from mfnet.models import unwrap
from mfops.factorizers import LearnedFactorizer

Groups = list[dict[str, Any]]
Grouping = Literal["two_rates", "published"]


def two_rates(network: nn.Module, backbone_lr: float, head_lr: float) -> Groups:
    """Those of ``network.backbone`` (or ``encoder``) at one rate, all others at another."""
    backbone = backbone_of(network)
    inside = set() if backbone is None else _ids(backbone.parameters())
    trainable = [p for p in network.parameters() if p.requires_grad]
    return [
        {
            "name": "backbone",
            "params": [p for p in trainable if id(p) in inside],
            "lr": backbone_lr,
        },
        {"name": "head", "params": [p for p in trainable if id(p) not in inside], "lr": head_lr},
    ]


def published(network: nn.Module, backbone_lr: float, head_lr: float) -> Groups:
    """The groups of the code of MFNet's paper, with all parameters in one (docs/paper.md).

    MFNet and DeepLabV3+: backbone and learned factors Y, Z at ``backbone_lr``, the others at
    ``head_lr``. EMANet, known by its decoder: the weights of convolutions at ``backbone_lr``; those
    of normalizations, and all biases, at ``head_lr`` without weight decay.
    """
    trainable = [p for p in network.parameters() if p.requires_grad]
    if isinstance(getattr(network, "decoder", None), PointwiseDecoder):
        vectors = [p for p in trainable if p.ndim < 2]
        return [
            {"name": "weights", "params": [p for p in trainable if p.ndim > 1], "lr": backbone_lr},
            {"name": "vectors", "params": vectors, "lr": head_lr, "weight_decay": 0.0},
        ]
    learned = [m for m in network.modules() if isinstance(m, LearnedFactorizer)]
    inside = _ids(p for module in learned for p in module.parameters())
    backbone, head = two_rates(network, backbone_lr, head_lr)
    factors = [p for p in trainable if id(p) in inside]
    head["params"] = [p for p in head["params"] if id(p) not in inside]
    return [backbone, {"name": "factors", "params": factors, "lr": backbone_lr}, head]


_GROUPINGS: dict[Grouping, Callable[[nn.Module, float, float], Groups]] = {
    "two_rates": two_rates,
    "published": published,
}


def parameter_groups(
    network: nn.Module, grouping: Grouping, backbone_lr: float, head_lr: float
) -> Groups:
    """The groups that hold something, of a network that may be compiled or wrapped."""
    groups = _GROUPINGS[grouping](unwrap(network), backbone_lr, head_lr)
    return [group for group in groups if group["params"]]


def backbone_of(network: nn.Module) -> nn.Module | None:
    """The module that is called so, or ``encoder``."""
    backbone = getattr(network, "backbone", getattr(network, "encoder", None))
    return backbone if isinstance(backbone, nn.Module) else None


def _ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(p) for p in parameters}
