"""Lone images to be predicted: which files, and what becomes of those that cannot be read."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mfnet.data.files import DataError, has_image_suffix, read_image
from mfnet.data.transforms import resized


class Skipped(NamedTuple):
    """An image that is not predicted, and why: in place of a sample, a batch or a prediction."""

    path: str
    reason: str


class PredictionDataset(Dataset[tuple[Tensor, Tensor, str] | Skipped]):
    """Triples of a uint8 image (C, h, w) for the network, the original (C, H, W), upright as its
    EXIF orientation says, and its path; ``Skipped`` where the file cannot be read.

    Args:
        paths: image files.
        resize: (h, w); by default the image is the original.
        channels: C; see ``mfnet.data.files.read_image``.
    """

    def __init__(
        self, paths: Sequence[Path], resize: tuple[int, int] | None = None, channels: int = 3
    ) -> None:
        self.paths = paths
        self.resize = resize
        self.channels = channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str] | Skipped:
        path = self.paths[index]
        try:
            original = read_image(path, self.channels)
        except DataError as error:
            return Skipped(str(path), str(error).removeprefix(f"{path}: "))
        image = original if self.resize is None else resized(original, self.resize)
        return image.as_subclass(torch.Tensor), original.as_subclass(torch.Tensor), str(path)


def collate_one(samples: Sequence[tuple[Tensor, Tensor, str] | Skipped]) -> object:
    """The batch of one sample, without a copy; one that is skipped stays as it is."""
    (sample,) = samples
    if isinstance(sample, Skipped):
        return sample
    image, original, path = sample
    return image[None], original[None], [path]


def find_images(patterns: str | Sequence[str]) -> list[Path]:
    """The images that are named: by files, folders or globs (``**`` too), each once.

    A file or folder of that very name comes before a glob, so that brackets may stand in names.
    Dot files are passed over in folders and by globs.

    Raises:
        FileNotFoundError: one of them names no image.
    """
    found: dict[Path, Path] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for path in _find(pattern):
            found.setdefault(Path(os.path.abspath(path)), path)  # without a/../
    return list(found.values())


def _find(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    candidates: Iterable[Path]
    if path.is_dir():
        candidates = path.iterdir()
    else:
        candidates = map(Path, glob.glob(str(path), recursive=True))
    found = sorted(p for p in candidates if has_image_suffix(p) and p.is_file())
    if not found:
        raise FileNotFoundError(f"{pattern}: expected an image, a folder or a glob of images")
    return found
