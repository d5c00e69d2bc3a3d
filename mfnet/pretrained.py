"""A trained network in Python: loaded, applied to photographs, saved, shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors

from mfnet.checkpoint import RECORD, WEIGHTS, find_checkpoint, read_checkpoint
from mfnet.data import voc
from mfnet.data.files import picture_to_image, read_image
from mfnet.data.transforms import resized
from mfnet.inference import TILE, Inference, Prediction, like_images_of
from mfnet.normalization import Normalization
from mfnet.outputs import read_output
from mfnet.state_dicts import match_names, mismatch

SOURCE = "a run's folder, a checkpoint, a folder of weights or a shipped network's name"
PREFIX = "network."  # of the network's tensors, in a checkpoint and here
# Arguments that only say where training started; what is loaded next are all of the weights.
STARTING_WEIGHTS = ("backbone_weights", "encoder_weights", "weights", "weights_backbone")


_CARD = """\
---
{{ card_data }}
---

A network for semantic segmentation, trained with mfnet.

```python
import mfnet

network = mfnet.TrainedNetwork.from_pretrained("...")  # this repository, or a local copy of it
labels = network.predict("photo.jpg")
```
"""


class TrainedNetwork(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="mfnet",
    pipeline_tag="image-segmentation",
    tags=["semantic-segmentation"],
    model_card_template=_CARD,
):
    """A segmentation network with all that its use needs.

    ``forward`` takes normalized images (B, C, H, W) and returns the network's logits; for
    photographs there is ``predict``. ``save_pretrained(folder)``, ``from_pretrained(folder)``
    and ``push_to_hub(name)`` are huggingface_hub's: ``config.json`` holds the arguments below,
    ``model.safetensors`` the weights; neither of them can hold code.

    Args:
        network: ``class_path`` of an ``nn.Module`` or of a function that returns one, ``init_args``
            and ``dict_kwargs``, as the command line's ``--model.network`` takes them.
        class_names: the classes, in the order of the logits.
        palette: RGB of each class; default: PASCAL's colors.
        normalization: ``mean`` and ``std`` that images are normalized with, C numbers each.
        resize: (height, width) that images were resized to in training; ``predict`` does so.

    Attributes:
        network: the network itself, for instance a ``mfnet.SegmentationNetwork``.
        channels: C, those of the images.

    Raises:
        ValueError: ``network`` does not make an ``nn.Module``.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        class_names: Sequence[str],
        normalization: Mapping[str, Sequence[float]],
        palette: Sequence[Sequence[int]] | None = None,
        resize: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.network = build(network)
        self.class_names = list(class_names)
        given = voc.pascal_palette(len(class_names)) if palette is None else palette
        self.palette = [(red, green, blue) for red, green, blue in given]
        self.normalization = Normalization(*(tuple(normalization[k]) for k in ("mean", "std")))
        self.resize = None if resize is None else (resize[0], resize[1])
        self.channels = len(self.normalization.mean)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images, float (B, C, H, W), to logits (B, classes, h, w)."""
        return read_output(self.network(images), images, len(self.class_names), self.network)[0]

    @torch.inference_mode()
    def predict(self, image: Image.Image | str | Path | Tensor, **options: Any) -> Tensor:
        """Class indices, uint8 (H, W), at the image's own size, upright as its EXIF says.

        Args:
            image: a PIL image, the path of one, or a uint8 tensor (C, H, W).
            **options: those of ``mfnet.inference.Inference``: ``tile`` (1025; ``None`` shows
                large images as a whole, too), ``overlap``, ``scales``, ``flip``.

        Raises:
            DataError: the file or the PIL image cannot be used.
            TypeError: the image is none of these, the tensor is not uint8, an unknown option.
            ValueError: the tensor has another shape, or an option is out of range.
        """
        return self._predict(image, options).labels

    @torch.inference_mode()
    def predict_probabilities(
        self, image: Image.Image | str | Path | Tensor, **options: Any
    ) -> Tensor:
        """Probabilities, float16 (classes, H, W); otherwise as ``predict``."""
        probabilities = self._predict(image, options, probabilities=True).probabilities
        assert probabilities is not None  # they were asked for
        return probabilities

    def _predict(self, image: Any, options: dict[str, Any], **keep: bool) -> Prediction:
        inference = Inference(**{"tile": TILE, **options})
        pixels = _pixels(image, self.channels)
        shown = pixels if self.resize is None else resized(pixels, self.resize)
        training = self.training
        self.eval()
        try:
            size = pixels.shape[-2:]
            like = like_images_of(self)
            return inference.predict(self, shown, self.normalization, like, size, **keep)
        finally:
            self.train(training)

    def _save_pretrained(self, save_directory: Path) -> None:
        file = save_directory / WEIGHTS
        file.touch()
        mode = file.stat().st_mode  # by the umask, as other files; safetensors' are 0600
        super()._save_pretrained(save_directory)
        file.chmod(mode)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> TrainedNetwork:
        # The mixin's own default leaves what the file lacks as it was initialized; its versions
        # differ in the mode that they leave a network in.
        return super()._from_pretrained(strict=strict, **kwargs).eval()


def load(source: str | Path) -> TrainedNetwork:
    """A trained network, in evaluation mode, on the CPU.

    Args:
        source: the folder of a run (its best checkpoint), a checkpoint, a folder that
            ``save_pretrained`` or ``mfnet export --to weights`` wrote or, where no such path
            exists, the name of a network in the package, for instance ``"camvid_light"``.

    Raises:
        FileNotFoundError: it is none of these; the message lists the names.
        ValueError: it does not tell what network it holds (an early version did not store that,
            and see ``SegmentationTask.network_config``), or its tensors do not fit.
    """
    path = find_checkpoint(source)
    checkpoint = read_checkpoint(path)
    arguments = arguments_of(checkpoint.get(RECORD, {}), path)
    network = TrainedNetwork(**arguments)
    own = network.state_dict()
    state = match_names(own, checkpoint.get("state_dict", {}))
    state = {key: value for key, value in state.items() if key.startswith(PREFIX)}
    fault = mismatch(state, own)
    if fault:
        raise ValueError(f"checkpoint '{path}' does not fit: {fault}")
    network.load_state_dict(state)
    return network.eval()


def arguments_of(record: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """A ``TrainedNetwork``'s arguments, of a checkpoint's record; plain values.

    Raises:
        ValueError: the record does not tell the network.
    """
    if not record.get("network"):
        raise ValueError(
            f"checkpoint '{path}' does not tell the network that it holds: set its task's "
            "network_config, for instance {'class_path': 'package.Network', 'init_args': {...}}, "
            "before it is saved"
        )
    network = dict(record["network"])
    given = dict(network.get("init_args", {}))
    forget_starting_weights(given)
    if "num_classes" in given:  # the command line takes the data's, whatever stands here
        given["num_classes"] = len(record["class_names"])
    told = {
        name: record.get(name) for name in ("class_names", "palette", "normalization", "resize")
    }
    return {**told, "network": {**network, "init_args": given}}


def forget_starting_weights(arguments: Any) -> None:
    """Lets a network start anywhere: no file is read and nothing is fetched.

    Args:
        arguments: a mapping or a jsonargparse Namespace; changed in place.
    """
    for name in STARTING_WEIGHTS:
        if isinstance(arguments.get(name), (str, Path, Enum)):  # torchvision's weights are an Enum
            arguments[name] = None


def build(network: Mapping[str, Any]) -> nn.Module:
    """The network of a ``class_path`` with ``init_args`` and ``dict_kwargs``.

    Raises:
        ValueError: they do not make an ``nn.Module``; nothing else is called.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    try:
        config = parser.parse_object({"network": dict(network)})
    except ArgumentError as error:
        raise ValueError(f"network: {' '.join(str(error).split())}") from error
    return parser.instantiate(config).network


def _pixels(image: Any, channels: int) -> Tensor:
    if isinstance(image, (str, Path)):
        return read_image(Path(image).expanduser(), channels)
    if isinstance(image, Image.Image):
        return picture_to_image(image, channels)
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image: expected a PIL image, a path or a uint8 tensor, got {got}")
    if image.ndim != 3 or image.shape[0] != channels:
        raise ValueError(f"image: expected a tensor ({channels}, H, W), got {tuple(image.shape)}")
    return tv_tensors.Image(image)
