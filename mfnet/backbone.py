"""Feature extractors: timm backbones, dilated to output stride 16 or as they are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import timm.layers.padding
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn import functional as F

from mfnet.state_dicts import differences, read_tensors

LOW_STRIDE = 4
HIGH_STRIDE = 16
PYRAMID = (4, 8, 16, 32)


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> int:
    """The pixels that TensorFlow's "same" padding adds to a side, the number that timm finds.

    Of a free size, torch.export simplifies this floor division to what a convolution with fixed
    padding gives. timm's ``ceil`` and ``max`` stay, and each layer's size holds that of the layer
    before several times over, so that an export of a deep network would not end.
    """
    reach = (kernel - 1) * dilation
    if reach == 0:
        return 0
    padding = (size - 1) // stride * stride + reach + 1 - size
    # Strides without gaps between the windows need no max(), which torch.export could not resolve.
    return padding if reach >= stride - 1 else max(padding, 0)


# Every layer of timm with such a padding, a convolution or a pooling, asks this function of timm's.
timm.layers.padding.get_same_padding = same_padding  # type: ignore[assignment]


class Backbone(nn.Module):
    """The low- and high-level features of a timm backbone at output stride 16.

    ``forward`` takes images ``(B, in_channels, H, W)`` and returns ``(low, high)``: the last
    features at stride 4, ``(B, low_channels, ~H/4, ~W/4)``, and those at stride 16,
    ``(B, high_channels, ~H/16, ~W/16)``; with ``with_middle``, between them, those before the last
    stage, ``(B, middle_channels, h, w)``, in ResNets at stride 16 too.

    Args:
        name: a timm model that supports ``output_stride``, for example ``"resnet50"``.
        weights: ``None`` (random), ``"timm"`` (timm's pretrained weights, downloaded if they are
            not in its cache: the only choice that touches the network) or the path of a
            state-dict file (``.safetensors`` or anything ``torch.load(weights_only=True)`` reads)
            with the keys of timm's model; those of torchvision's ResNets are the same. The
            classifier in it is ignored.
        multi_grid: dilations of the 3x3 convolutions in the blocks of a ResNet's ``layer4``, one
            for each block: (2, 4, 8) in the code of MFNet's paper and of DeepLab, (1, 4, 8) in
            EMANet's; ``None``: timm's, 1, 2, 2. Parameters and FLOPs stay as they are. A layer
            with fewer blocks takes the first ones; another backbone stays as it is, with a warning.
        in_channels: channels of the images. Weights for RGB are adapted as timm does it: the first
            convolution's are summed for one channel, else repeated and scaled by 3 / in_channels. A
            file whose first convolution has so many channels is loaded as it is.

    Raises:
        ValueError: unknown backbone, no output stride 16, no pretrained weights in timm, a file
            that does not fit the backbone, or a multi-grid of fewer dilations than blocks or with
            one below 1.
        FileNotFoundError: no file at ``weights``, or timm's weights are out of reach.
    """

    def __init__(
        self,
        name: str = "resnet50",
        weights: str | Path | None = None,
        multi_grid: Sequence[int] | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        _check_arguments(weights, in_channels)
        self.in_channels = in_channels
        self.features = _dilated_features(name, weights == "timm", in_channels)
        info = self.features.feature_info
        strides = info.reduction()
        if LOW_STRIDE not in strides or strides[-1] != HIGH_STRIDE:
            raise ValueError(
                f"backbone '{name}' gives features at strides {list(strides)}; "
                f"strides {LOW_STRIDE} and, last, {HIGH_STRIDE} are needed"
            )
        self._low = len(strides) - 1 - strides[::-1].index(LOW_STRIDE)
        self.low_channels: int = info.channels()[self._low]
        self.high_channels: int = info.channels()[-1]
        self.middle_channels: int = info.channels()[-2]
        if multi_grid is not None:
            _set_multi_grid(self.features, name, multi_grid)
        if weights not in (None, "timm"):
            load_weights(self.features, name, Path(weights), in_channels)

    def forward(self, x: Tensor, with_middle: bool = False) -> tuple[Tensor, ...]:
        features = self.features(x)
        middle = (features[-2],) if with_middle else ()
        return (features[self._low], *middle, features[-1])


class Pyramid(nn.Module):
    """The features of a timm backbone, as it is, at strides 4, 8, 16 and 32.

    ``forward`` takes images ``(B, in_channels, H, W)`` and returns ``(low, high)``: the last
    features at stride 4, ``(B, low_channels, ~H/4, ~W/4)``, and a tuple of the last at strides 8,
    16 and 32, whose channels are ``high_channels``; with ``with_middle``, between them, those at
    stride 16, of ``middle_channels``. Nothing is dilated, so hierarchical transformers serve as
    well as convolutional networks. Images of a size that the backbone does not take are padded
    with 0, the mean color, on the right and at the bottom.

    Args:
        name: a timm model that gives features at strides 4 to 32, for example ``"resnet50"``,
            ``"tf_efficientnet_lite0"`` or ``"swin_tiny_patch4_window7_224"``.
        weights, in_channels: see ``Backbone``.

    Raises:
        ValueError: unknown backbone, features missing at one of the strides, images of one size
            alone, no pretrained weights in timm or a file that does not fit the backbone.
        FileNotFoundError: no file at ``weights``, or timm's weights are out of reach.
    """

    def __init__(
        self,
        name: str = "resnet50",
        weights: str | Path | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        _check_arguments(weights, in_channels)
        self.in_channels = in_channels
        self.features = _whole_features(name, weights == "timm", in_channels)
        info = self.features.feature_info
        strides = info.reduction()
        if not set(PYRAMID) <= set(strides):
            raise ValueError(
                f"backbone '{name}' gives features at strides {list(strides)}; "
                f"strides {', '.join(map(str, PYRAMID))} are needed"
            )
        self._picked = [len(strides) - 1 - strides[::-1].index(stride) for stride in PYRAMID]
        channels = [info.channels()[index] for index in self._picked]
        self.low_channels: int = channels[0]
        self.middle_channels: int = channels[2]
        self.high_channels: tuple[int, ...] = tuple(channels[1:])
        self._channels_last = getattr(self.features, "output_fmt", None) == "NHWC"
        self._multiple = _multiple_of_sizes(self.features, name, in_channels)
        if weights not in (None, "timm"):
            load_weights(self.features, name, Path(weights), in_channels)

    def forward(self, x: Tensor, with_middle: bool = False) -> tuple[Any, ...]:
        height, width = x.shape[-2:]
        if self._multiple > 1:
            rows, columns = (_steps(side, self._multiple) for side in (height, width))
            x = _padded_to(x, rows * self._multiple, columns * self._multiple)
        features = self.features(x)
        low, *high = (features[index] for index in self._picked)
        if self._channels_last:
            low, *high = (feature.permute(0, 3, 1, 2) for feature in (low, *high))
        if self._multiple > 1:
            low, *high = (
                _padded_to(feature, _steps(height, stride), _steps(width, stride))
                for feature, stride in zip((low, *high), PYRAMID, strict=True)
            )
        middle = (high[1],) if with_middle else ()
        return (low, *middle, tuple(high))


def _steps(side: int, step: int) -> int:
    """How many steps of so many pixels cover a side."""
    return (side + step - 1) // step


def _padded_to(x: Tensor, height: int, width: int) -> Tensor:
    """x with zeros on the right and at the bottom or, where it is too large, with those cut off.

    Cut by padding too: of a slice, torch.export would make it a condition on all images whether
    there was something to cut off in its example.
    """
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))


def _check_arguments(weights: str | Path | None, in_channels: int) -> None:
    if weights not in (None, "timm") and not Path(weights).is_file():
        raise FileNotFoundError(
            f"backbone_weights: no file at '{weights}' (expected None, 'timm' or a file)"
        )
    if in_channels < 1:
        raise ValueError(f"in_channels: expected at least 1, got {in_channels}")


def _dilated_features(name: str, pretrained: bool, in_channels: int) -> Any:
    try:
        return _timm_features(name, pretrained, in_channels, output_stride=HIGH_STRIDE)
    # How timm's families say that they cannot be dilated: an unknown argument or an assertion.
    except (AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"backbone '{name}' does not support output_stride={HIGH_STRIDE} in timm; "
            "ResNets, RegNets, ConvNeXts, EfficientNets and MobileNets do"
        ) from error


def _whole_features(name: str, pretrained: bool, in_channels: int) -> Any:
    try:  # Swin's families take images of other sizes than their own only where they are told to
        return _timm_features(name, pretrained, in_channels, strict_img_size=False)
    except TypeError:
        pass
    try:
        return _timm_features(name, pretrained, in_channels)
    except (AttributeError, AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(f"backbone '{name}' gives no features in timm: {error}") from error


def _timm_features(name: str, pretrained: bool, in_channels: int, **options: Any) -> Any:
    if not timm.is_model(name):
        close = get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise ValueError(f"unknown backbone '{name}': {hint}")
    tag = name.partition(".")[2]
    if (tag or pretrained) and not timm.models.is_model_pretrained(name):
        raise ValueError(f"backbone '{name}': timm has no pretrained weights of that name")
    try:
        return timm.create_model(
            name, pretrained=pretrained, features_only=True, in_chans=in_channels, **options
        )
    except OSError as error:
        raise FileNotFoundError(
            f"backbone_weights: timm's weights of '{name}' are neither in its cache nor could be "
            f"downloaded ({type(error).__name__})"
        ) from error


def _multiple_of_sizes(features: Any, name: str, in_channels: int) -> int:
    """What heights and widths have to be multiples of, found by trying.

    Patches, windows and the sums of some convolutional networks want 32, windows of a fixed number
    of pixels the size that the weights were trained at.
    """
    native = features.pretrained_cfg["input_size"][-1]
    training = features.training
    features.eval()
    try:
        for multiple in (1, PYRAMID[-1], native):
            height, width = (129, 97) if multiple == 1 else (multiple, 2 * multiple)
            try:
                with torch.no_grad():
                    features(torch.zeros(1, in_channels, height, width))
            except (AssertionError, IndexError, RuntimeError):
                continue
            return multiple
    finally:
        features.train(training)
    raise ValueError(f"backbone '{name}' takes images of {native} x {native} pixels alone")


def _set_multi_grid(features: Any, name: str, dilations: Sequence[int]) -> None:
    if not timm.models.is_model_in_modules(name.partition(".")[0], ("resnet",)):
        warnings.warn(f"multi_grid: backbone '{name}' is not a ResNet and has none", stacklevel=3)
        return
    blocks = features["layer4"]
    if len(dilations) < len(blocks) or min(dilations) < 1:
        raise ValueError(
            f"multi_grid: expected a dilation of at least 1 for each of the {len(blocks)} blocks "
            f"of '{name}', got {list(dilations)}"
        )
    for block, dilation in zip(blocks, dilations, strict=False):
        for module in block.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)


def load_weights(features: Any, name: str, path: Path, in_channels: int) -> None:
    """Loads a file of weights of timm's backbone ``name`` into its feature network.

    Raises:
        ValueError: the file does not fit.
    """
    given = read_tensors(path, "backbone_weights")
    for key in _first_convolutions(features):
        if key in given and given[key].shape[1:2] == (3,):
            given[key] = adapt_input_conv(in_channels, given[key])
    own = features.state_dict()
    in_file = {key: key if key in given else _unflattened(key) for key in own}
    faults = differences(given, {source: own[key] for key, source in in_file.items()})
    # Files written before 2018 (torchvision's ResNets among them) lack BatchNorm's step counter.
    faults["missing"] = [k for k in faults["missing"] if not k.endswith("num_batches_tracked")]
    if faults["unexpected"]:  # what the whole model has and the features do not is its classifier
        whole = timm.create_model(name).state_dict()
        faults["unexpected"] = sorted(set(faults["unexpected"]) - set(whole))
    told = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in faults.items()
        if keys
    ]
    if told:
        raise ValueError(
            f"backbone_weights: '{path}' does not fit backbone '{name}': {'; '.join(told)}"
        )
    features.load_state_dict({key: given[src] for key, src in in_file.items() if src in given})


def _first_convolutions(features: Any) -> list[str]:
    """The names of the weights that images meet, in the whole model."""
    names = features.pretrained_cfg["first_conv"]
    return [f"{name}.weight" for name in ([names] if isinstance(names, str) else names or ())]


def _unflattened(key: str) -> str:
    """The whole model's name of a feature net's parameter.

    timm's feature nets call ``stages.0.x`` ``stages_0.x`` or ``model.stages.0.x``.
    """
    return re.sub(r"^(\w+)_(\d+)\.", r"\1.\2.", key.removeprefix("model."))
