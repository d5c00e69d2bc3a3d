"""A generated data set in VOC layout: textured shapes on a cluttered background.

A class is a shape with a texture and a range of colors. Ranges overlap and brightness, contrast,
size, position and rotation vary, so color alone does not tell the classes apart. As in PASCAL VOC,
a thin outline between regions is 255 (ignored).
"""

from __future__ import annotations

import colorsys
import shutil
import uuid
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mfnet.constants import IGNORE_INDEX
from mfnet.data.voc import pascal_palette

CLASSES = ("background", "disc", "square", "triangle", "ring")

_HUES = (0.00, 0.22, 0.45, 0.68)  # of the foreground classes; each varies by +-_HUE_SPREAD
_HUE_SPREAD = 0.14

Array = NDArray[np.float64]


def generate(
    root: str | Path, train: int = 200, val: int = 50, size: int = 97, seed: int = 0
) -> Path:
    """Write ``train`` + ``val`` images of ``size`` x ``size`` pixels, with masks, to ``root``.

    The same arguments give the same pixels, and an image does not depend on how many others there
    are. Everything is written to a folder beside ``root`` that is renamed at the end: if ``root``
    exists, it is whole.

    Returns:
        ``root``

    Raises:
        ValueError: no images, or images smaller than 33 pixels.
        FileExistsError: ``root`` exists.
    """
    if train < 1 or val < 1 or size < 33:
        raise ValueError(
            f"expected train >= 1, val >= 1 and size >= 33, got train={train}, val={val}, "
            f"size={size}"
        )
    root = Path(root)
    if root.exists():
        raise FileExistsError(f"{root}: exists; generated data go to a new folder")
    partial = root.with_name(f"{root.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        _write(partial, {"train": train, "val": val}, size, seed)
        try:
            partial.rename(root)
        except OSError as error:
            if root.exists():  # another process was quicker
                raise FileExistsError(f"{root}: exists") from error
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def draw(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One image, uint8 (size, size, 3), and its mask, uint8 (size, size)."""
    image = _background(rng, size)
    mask = np.zeros((size, size), dtype=np.uint8)
    for label in rng.permutation(np.arange(1, len(CLASSES)))[: rng.integers(2, len(CLASSES))]:
        inside, texture = _shape(rng, size, CLASSES[label])
        image[inside] = _color(rng, _HUES[label - 1]) * texture[inside, None]
        mask[inside] = label
    light = rng.uniform(0.7, 1.2) * image + rng.uniform(-0.1, 0.1)
    noisy = light + rng.normal(0, 0.04, image.shape)
    return (noisy.clip(0, 1) * 255).astype(np.uint8), _outlined(mask)


def _write(folder: Path, counts: dict[str, int], size: int, seed: int) -> None:
    images, masks = folder / "JPEGImages", folder / "SegmentationClass"
    splits = folder / "ImageSets" / "Segmentation"
    for path in (images, masks, splits):
        path.mkdir(parents=True)
    palette = np.array(pascal_palette(256), dtype=np.uint8).tobytes()
    for number, (split, count) in enumerate(counts.items()):
        names = [f"{split}_{index:05d}" for index in range(count)]
        for index, name in enumerate(names):
            image, mask = draw(np.random.default_rng([seed, number, index]), size)
            Image.fromarray(image).save(images / f"{name}.jpg", quality=92)
            png = Image.fromarray(mask)
            png.putpalette(palette)
            png.save(masks / f"{name}.png")
        (splits / f"{split}.txt").write_text("\n".join(names) + "\n")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def _color(rng: np.random.Generator, hue: float) -> Array:
    hue = (hue + rng.uniform(-_HUE_SPREAD, _HUE_SPREAD)) % 1
    return np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.35, 0.9), rng.uniform(0.6, 1.0)))


def _background(rng: np.random.Generator, size: int) -> Array:
    """A gradient between two colors of any hue, crossed by streaks, lit in soft patches."""
    y, x = _grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = 0.5 + 0.35 * (np.cos(angle) * x + np.sin(angle) * y)[..., None]
    image = ramp * _color(rng, rng.random()) + (1 - ramp) * _color(rng, rng.random())
    for _ in range(rng.integers(2, 6)):
        angle = rng.uniform(0, 2 * np.pi)
        distance = np.cos(angle) * x + np.sin(angle) * y - rng.uniform(-0.9, 0.9)
        image[np.abs(distance) < rng.uniform(0.01, 0.04)] = _color(rng, rng.random())
    patches = Image.fromarray(rng.random((5, 5), dtype=np.float32))
    soft = np.asarray(patches.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    return image * (0.6 + 0.5 * soft[..., None])


def _shape(rng: np.random.Generator, size: int, name: str) -> tuple[NDArray[np.bool_], Array]:
    """Where a shape lies, (size, size), and its texture in 0.35 to 1, both turned at random."""
    y, x = _grid(size)
    radius = rng.uniform(0.28, 0.5)
    angle = rng.uniform(0, 2 * np.pi)
    x, y = x - rng.uniform(-0.75, 0.75), y - rng.uniform(-0.75, 0.75)
    u = (np.cos(angle) * x + np.sin(angle) * y) / radius
    v = (np.cos(angle) * y - np.sin(angle) * x) / radius
    distance = np.hypot(u, v)
    turns = 2 * np.pi * radius * rng.uniform(4, 6)  # texture periods are about 10% of the image
    if name == "disc":  # stripes
        inside, wave = distance < 1, np.sin(turns * u)
    elif name == "square":  # checks
        inside = np.maximum(np.abs(u), np.abs(v)) < 0.85
        wave = np.sign(np.sin(turns * u) * np.sin(turns * v))
    elif name == "triangle":  # dots
        inside = np.maximum.reduce([v, -0.5 * v + 0.87 * u, -0.5 * v - 0.87 * u]) < 0.6
        wave = np.where(np.cos(turns * u) + np.cos(turns * v) > 0.8, 1.0, -1.0)
    else:  # ring: plain
        inside, wave = (distance < 1) & (distance > 0.5), np.full_like(u, 0.5)
    return inside, 0.675 + 0.325 * wave


def _grid(size: int) -> tuple[Array, Array]:
    axis = np.linspace(-1, 1, size)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return y, x


def _outlined(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mask with pixels left of or above another class set to 255."""
    outlined = mask.copy()
    outlined[:, :-1][mask[:, :-1] != mask[:, 1:]] = IGNORE_INDEX
    outlined[:-1][mask[:-1] != mask[1:]] = IGNORE_INDEX
    return outlined
