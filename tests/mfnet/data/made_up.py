"""Writes small data sets in VOC layout."""

import numpy as np
from PIL import Image

from mfnet.data import VOCFolder
from mfnet.data.voc import pascal_palette


def write_image(path, size=(40, 50), value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)


def write_mask(path, mask, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(mask, dtype=np.uint8))
    image.putpalette([channel for color in palette or pascal_palette(256) for channel in color])
    image.save(path)


def write_voc(root, splits, size=(40, 50), classes=None, palette=None):
    """A folder in VOC layout; the mask of an image is its number modulo 3, with an ignored row."""
    for split, names in splits.items():
        for number, name in enumerate(names):
            mask = np.full(size, number % 3)
            mask[0] = 255
            write_image(root / "JPEGImages" / f"{name}.jpg", size, value=10 * number)
            write_mask(root / "SegmentationClass" / f"{name}.png", mask, palette)
        file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{name}\n" for name in names))
    if classes:
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    return root


def first_sample(root, **arguments):
    """Image and labels of the first one in the validation split."""
    data = VOCFolder(str(root), **arguments)
    data.setup("validate")
    return data.val_set[0]
