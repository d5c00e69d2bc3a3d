"""Joint transforms of image and mask, on torchvision's ``transforms.v2`` and ``tv_tensors``.

Two recipes, both ending in a normalized float32 image (C, H, W) and an int64 mask (H, W):

``paper``
    MFNet was trained with the loaders of the DeepLab family around pytorch-deeplab-xception.
    Training: horizontal flip; rescaling so that the shorter side is 0.5 to 2 times the crop; a
    random crop, padded where the image is smaller; Gaussian blur of every other image. Evaluation:
    rescaling so that the shorter side is the crop size, then the center crop, so accuracy is
    measured on that crop and not on whole images. docs/paper.md lists what those loaders do
    otherwise; above all, they pad masks with class 0, here it is 255 (ignored).
``modern``
    Training: rescaling by 0.5 to 2 times the image's own size, padding and random crop, horizontal
    flip, color jitter of images in RGB. Evaluation: the whole image at its own size.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from mfnet.constants import IGNORE_INDEX
from mfnet.normalization import IMAGENET, Normalization

Recipe = Literal["paper", "modern"]


class Rescale(v2.Transform):
    """Resize with the aspect ratio kept, by a factor drawn uniformly from ``scale``.

    The factor is relative to the image's own size, or to the smallest size that covers
    ``cover`` (h, w).
    """

    def __init__(
        self, scale: tuple[float, float] = (1.0, 1.0), cover: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.scale = scale
        self.cover = cover

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        factor = float(torch.empty(()).uniform_(*self.scale))
        if self.cover is not None:
            factor *= max(self.cover[0] / height, self.cover[1] / width)
        return {"size": (max(1, round(height * factor)), max(1, round(width * factor)))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return resized(inpt, params["size"])


def train_transform(
    recipe: Recipe,
    crop_size: tuple[int, int],
    resize: tuple[int, int] | None = None,
    normalization: Normalization = IMAGENET,
) -> v2.Transform:
    """Augmentation of (image, mask) to ``crop_size`` (h, w); ``resize`` (h, w) comes first."""
    # The mean color is 0 after normalization.
    color = tuple(round(255 * mean) for mean in normalization.mean)
    fill = {tv_tensors.Image: color, tv_tensors.Mask: IGNORE_INDEX}
    crop = v2.RandomCrop(crop_size, pad_if_needed=True, fill=fill)
    flip = v2.RandomHorizontalFlip()
    if recipe == "paper":
        blur = v2.RandomApply([v2.GaussianBlur(7, sigma=(0.01, 1.0))], p=0.5)
        steps = [flip, Rescale((0.5, 2.0), cover=crop_size), crop, blur]
    else:
        jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.05)
        steps = [Rescale((0.5, 2.0)), crop, flip, *([jitter] if len(color) == 3 else [])]
    return v2.Compose([*_resize(resize), *steps, *_to_normalized_tensors(normalization)])


def eval_transform(
    recipe: Recipe,
    crop_size: tuple[int, int],
    resize: tuple[int, int] | None = None,
    normalization: Normalization = IMAGENET,
) -> v2.Transform:
    """Deterministic transform of (image, mask): center crop (paper) or whole image (modern)."""
    steps = [Rescale(cover=crop_size), v2.CenterCrop(crop_size)] if recipe == "paper" else []
    return v2.Compose([*_resize(resize), *steps, *_to_normalized_tensors(normalization)])


def denormalize(image: Tensor, normalization: Normalization = IMAGENET) -> Tensor:
    """Undo the normalization: float (..., C, H, W) -> uint8 of the same shape."""
    mean, std = (image.new_tensor(v).view(-1, 1, 1) for v in normalization)
    return ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def as_rgb(image: Tensor) -> Tensor:
    """An image (C, H, W) as it is shown, (3, H, W): its first three channels, or one as gray."""
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)


def _resize(size: tuple[int, int] | None) -> list[v2.Transform]:
    return [] if size is None else [v2.Lambda(partial(resized, size=size))]


def resized(inpt: Any, size: tuple[int, int]) -> Any:
    """Images bilinearly, masks by the nearest neighbor.

    torchvision resizes a Mask in a mode of its own, which rounds down where images, PIL and the
    exact mode look at pixel centers: labels would move by up to half a pixel against their image.
    """
    if not isinstance(inpt, tv_tensors.Mask):
        return F.resize(inpt, list(size), antialias=True)
    channelled = inpt.as_subclass(Tensor).unsqueeze(0)
    exact = F.resize_image(channelled, list(size), InterpolationMode.NEAREST_EXACT)
    return tv_tensors.wrap(exact.squeeze(0), like=inpt)


def _to_normalized_tensors(normalization: Normalization) -> list[v2.Transform]:
    dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
    return [
        v2.ToDtype(dtypes, scale=True),
        v2.Normalize(*normalization),
        v2.ToPureTensor(),
    ]
