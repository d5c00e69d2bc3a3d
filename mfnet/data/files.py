"""Reading images and masks, with errors that name the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors

IGNORE_INDEX = 255

# What Pillow raises on damaged files, and on files too large to be images.
_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class DataError(ValueError):
    """A file of the data set cannot be used; ``str(error)`` is one line that names the file.

    A ``DataLoader`` re-creates an exception of its worker from the worker's whole traceback.
    This class keeps the line at its end, so the message is the same with and without workers.
    """

    def __init__(self, message: str) -> None:
        *_, line = message.strip().split(f"{__name__}.{type(self).__name__}: ")
        super().__init__(" ".join(line.split()))


def read_image(path: str | Path, upright: bool = False) -> tv_tensors.Image:
    """RGB image, uint8 (3, H, W); grey and CMYK files are converted.

    Args:
        path: an image file.
        upright: turn the image as its EXIF orientation says. Masks are drawn on the stored pixels,
            so images that belong to a mask are left as they are.

    Raises:
        DataError: the file is missing, truncated or no image.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file) if upright else file
            pixels = np.array(image.convert("RGB"))
    except _BROKEN as error:
        raise _unreadable(path, "image", error) from error
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())


def read_mask(path: str | Path) -> tv_tensors.Mask:
    """Class indices, uint8 (H, W), from a palette or grey PNG, or from a ``.mat`` file of SBD.

    Raises:
        DataError: the file is missing, truncated or no mask.
    """
    if Path(path).suffix == ".mat":
        return tv_tensors.Mask(torch.from_numpy(_read_sbd_mask(path)))
    try:
        with Image.open(path) as file:
            mode, pixels = file.mode, np.array(file)
    except _BROKEN as error:
        raise _unreadable(path, "mask", error) from error
    if mode not in ("P", "L"):
        raise DataError(
            f"{path}: expected a palette (P) or grey (L) mask of class indices, got mode {mode}"
        )
    return tv_tensors.Mask(torch.from_numpy(pixels))


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) as stored; only the file's head is read. Raises ``DataError``."""
    try:
        with Image.open(path) as file:
            return file.height, file.width
    except _BROKEN as error:
        raise _unreadable(path, "image", error) from error


def read_palette(path: str | Path) -> list[tuple[int, int, int]]:
    """RGB colours of a palette image; empty for a grey one. Raises ``DataError``."""
    try:
        with Image.open(path) as file:
            flat = file.getpalette("RGB") if file.mode == "P" else None
    except _BROKEN as error:
        raise _unreadable(path, "mask", error) from error
    return [tuple(flat[i : i + 3]) for i in range(0, len(flat), 3)] if flat else []


def has_image_suffix(path: Path) -> bool:
    """Whether Pillow reads files that are called so; dot files (``._x.jpg``) are no images."""
    extensions = Image.registered_extensions()
    return not path.name.startswith(".") and extensions.get(path.suffix.lower()) in Image.OPEN


def _read_sbd_mask(path: str | Path) -> np.ndarray:
    from scipy.io import loadmat  # only SBD needs scipy

    try:
        mask = loadmat(path)["GTcls"][0]["Segmentation"][0]
    except Exception as error:  # scipy's own errors have no base class but this one
        raise _unreadable(path, "mask", error) from error
    return np.ascontiguousarray(mask, dtype=np.uint8)


def _unreadable(path: str | Path, kind: str, error: BaseException) -> DataError:
    return DataError(f"{path}: cannot read {kind}: {error}")
