"""The layout of PASCAL VOC: which files belong to a split, class names and palettes."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn
from torchvision.datasets import SBDataset, VOCSegmentation

from mfnet.data.files import DataError, has_image_suffix, read_palette
from mfnet.data.textfiles import Line, read_class_names, read_lines

Split = Literal["train", "val", "test"]
Palette = list[tuple[int, int, int]]

PASCAL_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip


class Sample(NamedTuple):
    """The files of one image and its mask."""

    image: Path
    mask: Path


def pascal_palette(num_classes: int) -> Palette:
    """PASCAL's colors: the bits of the class index, dealt out to R, G, B from the top bit down."""

    def channel(index: int, first: int) -> int:
        return sum((index >> (first + 3 * bit) & 1) << (7 - bit) for bit in range(3))

    return [(channel(i, 0), channel(i, 1), channel(i, 2)) for i in range(num_classes)]


def list_folder(root: str | Path, split: Split) -> list[Sample]:
    """Files of a split, in the order of ``ImageSets/Segmentation/<split>.txt``.

    A line names an image by its place below ``JPEGImages``, with or without its extension; its
    mask has that place below ``SegmentationClass``. Both may have any extension that Pillow reads.

    Raises:
        FileNotFoundError: the folder, the split file, an image or a mask is missing.
        ValueError: the split file names no image, or a line fits more than one file.
    """
    root = Path(root)
    _require(root)
    split_file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not split_file.exists():
        hint = "; 'mfnet validate' scores the validation split" if split == "test" else ""
        raise FileNotFoundError(
            f"{split_file}: no such file; it names the images of the {split} split{hint}"
        )
    lines = read_lines(split_file)
    images, masks = _Folder(root / "JPEGImages"), _Folder(root / "SegmentationClass")
    samples = [
        Sample(images.find(line, split_file), masks.mask_of(line, split_file)) for line in lines
    ]
    if not samples:
        raise ValueError(f"{split_file}: names no image")
    _warn_of_repetitions(samples, lines, split_file)
    return samples


class _Folder:
    """Finds the files that lines of a split name, from one listing of each folder."""

    def __init__(self, path: Path) -> None:
        self.path = _require(path)
        self._by_name: dict[Path, list[Path]] = {}
        self._by_stem: dict[Path, list[Path]] = {}
        self._listed: set[Path] = set()

    def find(self, line: Line, split_file: Path) -> Path:
        """The file that a line names, with or without its extension.

        Raises ``FileNotFoundError`` or ``ValueError``, naming the split file's line.
        """
        name = self._place(line, split_file)
        found = self._by_name.get(name) or self._by_stem.get(name, [])
        return self._only(found, name, f"{split_file}, line {line.number}", "write the extension")

    def mask_of(self, line: Line, split_file: Path) -> Path:
        """The mask of the image that a line names, whose extension need not be the image's."""
        name = self._place(line, split_file)
        found = self._by_stem.get(name, [])
        if not found and has_image_suffix(name):
            found = self._by_stem.get(name.with_suffix(""), [])
        return self._only(found, name, f"{split_file}, line {line.number}", "keep one of them")

    def _place(self, line: Line, split_file: Path) -> Path:
        relative = Path(line.text.removeprefix("JPEGImages/"))
        if relative.is_absolute():
            raise ValueError(
                f"{split_file}, line {line.number}: expected a name below {self.path}, got "
                f"'{relative}'"
            )
        name = self.path / relative
        if name.parent not in self._listed:
            self._list(name.parent)
        return name

    def _list(self, folder: Path) -> None:
        self._listed.add(folder)
        for path in sorted(folder.iterdir() if folder.is_dir() else ()):
            # As lines are read: file systems differ in how they compose letters.
            name = path.with_name(unicodedata.normalize("NFC", path.name))
            if has_image_suffix(name):
                self._by_name.setdefault(name, []).append(path)
                self._by_stem.setdefault(name.with_suffix(""), []).append(path)

    def _only(self, found: list[Path], name: Path, where: str, remedy: str) -> Path:
        if not found:
            raise FileNotFoundError(f"{name}: no file of that name, but {where}, names it")
        if len(found) > 1:
            names = " and ".join(str(path) for path in found)
            raise ValueError(f"{where}: '{name.name}' fits {names}; {remedy}")
        return found[0]


def _warn_of_repetitions(samples: list[Sample], lines: list[Line], split_file: Path) -> None:
    first: dict[Path, int] = {}
    for sample, line in zip(samples, lines, strict=True):
        if sample.image in first:
            rank_zero_warn(
                f"{split_file}, line {line.number}: '{line.text}' stands in line "
                f"{first[sample.image]} already; it counts twice"
            )
            return
        first[sample.image] = line.number


def read_classes(root: str | Path) -> tuple[list[str], Palette]:
    """Class names of a folder in VOC layout, and the colors of its first mask, by name.

    Names are the lines of ``classes.txt``. Without it, the classes are PASCAL's 21 if that mask
    carries PASCAL's palette. A gray mask has no colors.

    Raises:
        FileNotFoundError: no ``root``; no ``classes.txt``, and the palette is not PASCAL's.
        ValueError: ``classes.txt`` does not hold 2 to 255 different names.
        DataError: the mask cannot be read.
    """
    file = _require(Path(root)) / "classes.txt"
    folder = Path(root) / "SegmentationClass"
    masks = [path for path in folder.iterdir() if has_image_suffix(path)] if folder.is_dir() else []
    colors = read_palette(min(masks)) if masks else []
    if file.is_file():
        names = read_class_names(file)
    elif colors[: len(PASCAL_CLASSES)] == pascal_palette(len(PASCAL_CLASSES)):
        names = list(PASCAL_CLASSES)
    else:
        raise FileNotFoundError(
            f"{file}: missing, and the masks do not carry PASCAL's palette; "
            "expected one class name per line, in the order of the class indices"
        )
    return names, colors


def list_pascal(
    root: str | Path, split: Split, sbd_root: str | Path | None = None, download: bool = False
) -> list[Sample]:
    """Files of PASCAL VOC 2012, found through torchvision.

    With ``sbd_root``, ``train`` is the usual *trainaug*: VOC's 1,464 training images with VOC's
    masks, then those of SBD's 11,355 that are in neither VOC's ``train`` nor ``val`` (9,118), with
    SBD's masks: 10,582.

    Args:
        root: the folder that holds, or shall hold, ``VOCdevkit/VOC2012``.
        split: ``train`` or ``val``.
        sbd_root: the folder that holds, or shall hold, SBD's ``img``, ``cls``, ``train.txt``,
            ``val.txt``.
        download: fetch what is missing with torchvision, which compares checksums.

    Raises:
        FileNotFoundError: a folder, split file, image or mask is missing.
        ValueError: the test split is asked for.
        DataError: SBD is asked for and scipy, which reads its masks, is not installed.
    """
    if split == "test":
        raise ValueError(
            f"{root}: the masks of PASCAL VOC's test images are not public; 'mfnet validate' "
            "scores the validation split"
        )
    if not download and (split == "val" or sbd_root is None):
        return _list_voc2012(root, split, download)
    voc = {name: _list_voc2012(root, name, download) for name in ("train", "val")}
    if sbd_root is None:
        return voc[split]
    known = {sample.image.stem for samples in voc.values() for sample in samples}
    extra = [s for s in _list_sbd(sbd_root, download) if s.image.stem not in known]
    return voc["train"] + extra


def _list_voc2012(root: str | Path, split: str, download: bool) -> list[Sample]:
    split_file = Path(root, "VOCdevkit", "VOC2012", "ImageSets", "Segmentation", f"{split}.txt")
    fetch = _is_to_fetch(split_file, download)
    data = VOCSegmentation(root, year="2012", image_set=split, download=fetch)
    return _checked(data, split_file)


def _list_sbd(root: str | Path, download: bool) -> list[Sample]:
    try:
        import scipy.io  # noqa: F401
    except ImportError as error:
        raise DataError(f"{root}: reading SBD's .mat masks needs scipy: {error}") from error
    root = Path(root)
    samples = []
    for split in ("train", "val"):
        split_file = root / f"{split}.txt"
        fetch = _is_to_fetch(split_file, download)
        data = SBDataset(root, image_set=split, mode="segmentation", download=fetch)
        samples += _checked(data, split_file)
    return samples


def _is_to_fetch(split_file: Path, download: bool) -> bool:
    if not download:
        _require(split_file)
    return not split_file.is_file()


def _require(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    return path


def _checked(data: VOCSegmentation | SBDataset, split_file: Path) -> list[Sample]:
    """The samples, after making sure that all their files are there."""
    samples = [Sample(Path(i), Path(m)) for i, m in zip(data.images, data.masks, strict=True)]
    if not samples:
        raise ValueError(f"{split_file}: names no image")
    # One listing per folder instead of one question per file: quicker on network disks.
    folders = {path.parent for sample in samples for path in sample}
    present = {path for folder in folders for path in _require(folder).iterdir()}
    for sample in samples:
        for path in sample:
            if path not in present:
                raise FileNotFoundError(f"{path}: no such file, but {split_file} names it")
    return samples
