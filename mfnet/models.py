"""Segmentation networks: a backbone, a context, a decoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

from mfnet.backbone import Backbone, Pyramid
from mfnet.contexts import CONTEXTS
from mfnet.contexts.nonlocal_ import NonLocalBlock
from mfnet.decoder import DeepLabDecoder, PointwiseDecoder, upsample
from mfnet.light import light

MIN_SIZE = 33
CONTEXT_CHANNELS = 256
torch.fx.wrap("_check_images")  # it looks at sizes, which a trace has not


class SegmentationNetwork(nn.Module):
    """Images ``(B, C, H, W)`` to logits ``(B, num_classes, H, W)``, for any H, W >= 33.

    C, ``in_channels``, is the backbone's (3 where it does not tell).

    Args:
        backbone: images to ``(low, high)`` features, the high ones as the context takes them.
        context: high-level features to context features; see ``mfnet.contexts``.
        decoder: ``(context features, low features)`` to logits at any resolution. They are
            upsampled with aligned corners, unless its ``align_corners`` is ``False``.
        auxiliary_head: features before the backbone's last stage to logits at any resolution. It
            runs in training alone.

    Attributes:
        network_config: ``class_path``, ``init_args`` and ``dict_kwargs`` that make the network
            again, with the options that were left at their defaults; of ``create_model``'s.
    """

    network_config: dict[str, Any] | None = None

    def __init__(
        self,
        backbone: Backbone | Pyramid,
        context: nn.Module,
        decoder: nn.Module,
        auxiliary_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.in_channels: int = getattr(backbone, "in_channels", 3)
        self.backbone = backbone
        self.context = context
        self.decoder = decoder
        self.auxiliary_head = auxiliary_head
        self._align_corners: bool = getattr(decoder, "align_corners", True)
        for module in self._head().modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self._head().modules():
            if isinstance(module, NonLocalBlock):  # Kaiming's weights would saturate its softmax
                module.init_weights()

    def forward(
        self, x: Tensor, return_loss: bool = False, masks: Tensor | None = None
    ) -> Tensor | dict[str, Tensor] | tuple[Tensor | dict[str, Tensor], Tensor]:
        """Logits in x's resolution or, with ``return_loss``, ``(logits, loss)``.

        With an auxiliary head, in training, the logits are ``{"out": logits, "aux": its logits}``,
        as torchvision's networks return them.

        ``loss`` is the context's own, unweighted, as a float32 scalar: MFNet's reconstruction
        error, EncNet's SE-loss, and zero for networks without one. Without ``return_loss`` in
        training, MFNet's enters through the backward pass, times its ``loss_weight``. ``masks``,
        int64 ``(B, H, W)``, are for the losses that need them (``encoding``).

        Raises:
            TypeError: x is not of a floating-point type.
            ValueError: x is not ``(B, C, H, W)`` or is smaller than 33 x 33; a loss that needs
                masks gets none, or of another shape.
        """
        _check_images(x, self.in_channels)
        auxiliary = None
        if self.training and self.auxiliary_head is not None:
            low, middle, high = self.backbone(x, with_middle=True)
            auxiliary = self._upsample(self.auxiliary_head(middle), x)
        else:
            low, high = self.backbone(x)
        # Asked of the context, not of its class: a compiled one answers for what is inside.
        needs_masks = getattr(self.context, "needs_masks", None)
        if return_loss and needs_masks is not None:
            labels = {"masks": masks} if needs_masks else {}
            context, loss = self.context(high, return_loss=True, **labels)
        else:
            context, loss = self.context(high), x.new_zeros((), dtype=torch.float32)
        logits = self._upsample(self.decoder(context, low), x)
        output = logits if auxiliary is None else {"out": logits, "aux": auxiliary}
        return (output, loss) if return_loss else output

    def backbone_parameters(self) -> list[nn.Parameter]:
        """The backbone's trainable parameters: the group with the lower learning rate."""
        return [p for p in self.backbone.parameters() if p.requires_grad]

    def head_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of context, decoder and auxiliary head."""
        return [p for p in self._head().parameters() if p.requires_grad]

    def _upsample(self, logits: Tensor, images: Tensor) -> Tensor:
        return upsample(logits, images.shape[-2:], self._align_corners)

    def _head(self) -> nn.ModuleList:
        parts = (self.context, self.decoder, self.auxiliary_head)
        return nn.ModuleList(part for part in parts if part is not None)


def evaluation_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters without those of an auxiliary head, which evaluation does not use."""
    auxiliary = getattr(network, "auxiliary_head", None)
    unused = set() if auxiliary is None else set(auxiliary.parameters())
    return [parameter for parameter in network.parameters() if parameter not in unused]


def forward_parameters(network: nn.Module) -> Mapping[str, Parameter]:
    """What the network's ``forward`` takes; nothing where a traced one does not tell."""
    try:
        return signature(network.forward).parameters
    except ValueError:
        return {}


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside ``torch.compile``, ``DistributedDataParallel`` and averaging wrappers."""
    while True:
        takes = forward_parameters(network).values()
        passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes)
        inner = getattr(network, "_orig_mod", None)
        if inner is None and passes_on:
            inner = getattr(network, "module", None)
        if not isinstance(inner, nn.Module):
            return network
        network = inner


class _Recipe(NamedTuple):
    context: str
    decoder: Callable[[int, int, int], nn.Module]


LIGHT = "mfnet_light"
_DILATED = {
    "mfnet": _Recipe("mf", DeepLabDecoder),
    "deeplabv3plus": _Recipe("aspp", DeepLabDecoder),
    "emanet": _Recipe("em", PointwiseDecoder),
}


def list_models() -> list[str]:
    """The names ``create_model`` knows."""
    return [LIGHT, *_DILATED]


def create_model(
    name: str,
    num_classes: int = 21,
    backbone: str = "resnet50",
    backbone_weights: str | Path | None = None,
    context: str | None = None,
    factorizer: str | None = None,
    context_size: tuple[int, int] | None = None,
    init: Literal["normal", "uniform"] | None = None,
    multi_grid: Sequence[int] | None = None,
    in_channels: int = 3,
    auxiliary_head: bool = False,
    **kwargs: Any,
) -> SegmentationNetwork:
    """Build a segmentation network.

    ``"mfnet_light"`` (``mfnet.light``) is the one to start with: nothing in it is dilated. The
    others, those of MFNet's paper, have a backbone at output stride 16.

    Args:
        name: ``"mfnet_light"``, ``"mfnet"``, ``"deeplabv3plus"`` or ``"emanet"``.
        num_classes: number of classes, and of the logits' channels.
        backbone: a timm model, for example ``"resnet18"``: for mfnet_light one with features at
            strides 4 to 32, for the others one that supports ``output_stride``.
        backbone_weights: ``None`` (random), ``"timm"`` (pretrained, downloaded when not cached)
            or the path of a torchvision or timm state-dict file; see
            ``mfnet.backbone.Backbone``.
        context: another context in place of a dilated network's own, by its name in
            ``mfnet.contexts.CONTEXTS``: ``"mf"`` (mfnet's), ``"em"`` (emanet's), ``"nmf"``,
            ``"vq"``, ``"cd"`` (Hamburger's), ``"double_attention"`` (A2-Net's), ``"aspp"``
            (deeplabv3plus's), ``"aspp_separable"``, ``"ppm"`` (PSPNet's), ``"encoding"``
            (EncNet's), ``"nonlocal"``, ``"none"``. mfnet is thus deeplabv3plus with
            ``context="mf"``.
        factorizer: where the factors of mf come from: ``"learned"``, as in the paper, or, from the
            image, ``"em"``, ``"nmf"``, ``"vq"``, ``"cd"``, ``"double_attention"``.
        context_size: the stride-16 feature grid ``(h, w)`` that the learned Z of mf belongs to, a
            sixteenth of the training images' size; ``None``: (33, 33), that of 513 x 513 images.
            No other context looks at it.
        init: what the learned factors of mf start from, ``"normal"`` (``None`` means it) or
            ``"uniform"``; see ``mfops.FactorizedContext``. No other context looks at it.
        multi_grid: dilations of the blocks of a ResNet's last layer, (2, 4, 8) in the paper's code
            (timm's own: 1, 2, 2); see ``mfnet.backbone.Backbone``.
        in_channels: channels of the images; the backbone's weights for RGB are adapted, see
            ``mfnet.backbone.Backbone``. The command line has ``--data.channels``.
        auxiliary_head: an FCN head on the features before the backbone's last stage, whose logits
            the network returns beside its own in training; see ``SegmentationNetwork``.
        **kwargs: mfnet_light: ``rank=8`` and ``width=256``. The others: options of the network's
            context. mf: ``rank=64``, ``loss_weight=0.1`` (where the caller does not take the loss),
            ``steps`` and ``inverse_temperature`` of a factorizer that has them. em: ``bases=64``
            and ``steps=3``. nmf, vq, cd: ``rank=64`` and ``steps``; vq, cd:
            ``inverse_temperature=100``. double_attention: ``rank=64``. aspp, aspp_separable:
            ``rates=(6, 12, 18)``. encoding: ``codewords=32``.

    Returns:
        The network, in training mode: floating images ``(B, in_channels, H, W)`` to logits
        ``(B, num_classes, H, W)``, H and W from 33 on.

    Raises:
        ValueError: unknown model, backbone or context, a value out of range, weights that do not
            fit.
        TypeError: an argument or keyword that the network does not take, a factorizer for a
            context other than mf.
        FileNotFoundError: no file at ``backbone_weights``, or timm's cannot be downloaded.
    """
    # Whatever starting weights there were: a checkpoint brings its own.
    arguments = {**locals(), "backbone_weights": None}
    del arguments["kwargs"]
    if name not in list_models():
        raise ValueError(f"unknown model '{name}': choose from {', '.join(list_models())}")
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    trunk: Backbone | Pyramid
    if name == LIGHT:
        _check_light(kwargs, context=context, factorizer=factorizer, multi_grid=multi_grid)
        trunk = Pyramid(backbone, backbone_weights, in_channels)
        unit, decoder = _light(trunk, num_classes, kwargs)
    else:
        recipe = _DILATED[name]
        build = _context_builder(
            name, recipe.context if context is None else context, kwargs, num_classes=num_classes,
            factorizer=factorizer, context_size=context_size, init=init,
        )  # fmt: skip
        trunk = Backbone(backbone, backbone_weights, multi_grid, in_channels)
        unit = build(trunk.high_channels, CONTEXT_CHANNELS)
        decoder = recipe.decoder(CONTEXT_CHANNELS, trunk.low_channels, num_classes)
    head = FCNHead(trunk.middle_channels, num_classes) if auxiliary_head else None
    network = SegmentationNetwork(trunk, unit, decoder, head)
    made_by = light if name == LIGHT else CONTEXTS[context or _DILATED[name].context]
    options = {key: value for key, value in _defaults(made_by).items() if key not in arguments}
    network.network_config = {
        "class_path": "mfnet.create_model",
        "init_args": arguments,
        "dict_kwargs": {**options, **kwargs},
    }
    return network


def _defaults(build: Callable[..., Any]) -> dict[str, Any]:
    parameters = list(signature(build).parameters.items())[2:]  # after channels in and out
    return {key: p.default for key, p in parameters if p.default not in (None, p.empty)}


def _check_light(options: Mapping[str, Any], **refused: Any) -> None:
    for option, value in refused.items():
        if value is not None:
            raise TypeError(f"{option}: model '{LIGHT}' takes none, got {value!r}")
    _check_keywords(f"model '{LIGHT}'", options, ["rank", "width"], [])


def _light(
    trunk: Pyramid, num_classes: int, options: Mapping[str, int]
) -> tuple[nn.Module, nn.Module]:
    # No **options above: the command line would take light's parameters for every network's.
    return light(trunk.low_channels, trunk.high_channels, num_classes, **options)


def _context_builder(
    model: str, context: str, options: Mapping[str, Any], *, factorizer: str | None, **own: Any
) -> Callable[[int, int], nn.Module]:
    """Makes the context of that name, of channels in and out, with those of ``own`` it takes."""
    if context not in CONTEXTS:
        raise ValueError(f"unknown context '{context}': choose from {', '.join(CONTEXTS)}")
    build = CONTEXTS[context]
    if factorizer is not None and context != "mf":
        raise TypeError(f"factorizer: only context 'mf' takes one, this is '{context}'")
    takes = list(signature(build).parameters)[2:]  # after in_, out_channels
    _check_keywords(
        f"model '{model}' with context '{context}'",
        options,
        takes,
        ["multi_grid", "init", "context", "context_size"],
    )
    own["factorizer"] = factorizer
    if factorizer not in (None, "learned"):
        del own["init"]
    given = {name: value for name, value in own.items() if name in takes and value is not None}
    return functools.partial(build, **options, **given)


def _check_keywords(
    model: str, kwargs: Mapping[str, Any], options: Sequence[str], arguments: Sequence[str]
) -> None:
    """Refuses a keyword that is none of the options, which it lists behind the arguments."""
    common = ["num_classes", "backbone", "backbone_weights", "in_channels", "auxiliary_head"]
    for keyword in kwargs:
        if keyword not in options:
            known = ", ".join(dict.fromkeys([*common, *arguments, *options]))
            raise TypeError(f"unknown keyword '{keyword}' for {model}: choose from {known}")


def _check_images(x: Tensor, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x: expected images (B, {channels}, H, W), got shape {tuple(x.shape)}")
    height, width = x.shape[-2:]
    if height < MIN_SIZE or width < MIN_SIZE:  # min() of the two would freeze which is smaller
        raise ValueError(
            f"x: expected images of at least {MIN_SIZE} x {MIN_SIZE}, got {height} x {width}"
        )
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
