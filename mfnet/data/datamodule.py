"""The data sets as Lightning data modules; their arguments are the ``--data.*`` flags."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from mfnet.data import synthetic, transforms, voc
from mfnet.data.dataset import (
    OrderedTrainSampler,
    SegmentationDataset,
    TrainSampler,
    collate,
    shard_sampler,
)
from mfnet.data.files import image_size
from mfnet.data.labels import LabelEntries, LabelMap
from mfnet.data.loader import ResumableLoader, init_worker
from mfnet.data.prediction import PredictionDataset, collate_one, find_images
from mfnet.data.transforms import Recipe
from mfnet.data.voc import Palette, Sample, Split
from mfnet.normalization import IMAGENET, Normalization

CHANNELS = 3  # of images in RGB
MOSTLY = 0.5  # the share of padding in a crop from which on it is worth a word


class SegmentationDataModule(L.LightningDataModule):
    """What all data sets share; a subclass says which classes and files there are.

    Batches are ``(image, mask)``: float32 (B, C, H, W), normalized as the trainer's module says in
    ``normalization`` (without one: by ImageNet's mean and standard deviation), and int64 (B, H, W)
    with 255 where a pixel is ignored. Prediction batches are ``(image, original, [path])`` of one
    image, uint8 (1, C, h, w) and (1, C, H, W), or a ``mfnet.data.prediction.Skipped``.

    A class has ``class_names``, ``num_classes`` and ``palette`` (RGB) once it is constructed.
    """

    class_names: list[str]
    palette: Palette
    # Whether the images all have one size, so that they can be batched without padding.
    uniform_size: bool = False

    def __init__(
        self,
        recipe: Recipe = "modern",
        crop_size: int | tuple[int, int] = 513,
        resize: tuple[int, int] | None = None,
        batch_size: int = 4,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        predict_images: str | list[str] | None = None,
        label_map: LabelEntries | None = None,
        channels: int = CHANNELS,
    ) -> None:
        """
        Args:
            recipe: ``paper`` (scaled and cropped, in validation too) or ``modern`` (random scale,
                crop, flip, color jitter; validation on whole images).
            crop_size: side, or (height, width), of the training crop.
            resize: (height, width) that every image and mask is resized to before all else. What
                is measured is then measured at this size.
            batch_size: images per process in a training step.
            eval_batch_size: images per process in a validation step. By default batch_size where
                all images come out at one size, else 1, so that no padding touches a result.
            num_workers: processes that load images; by default up to 4, as processors allow.
            predict_images: the images to predict: a file, a folder or a glob, or several.
            label_map: what the numbers or colors in the masks mean: a mapping ('{0: 0, 255: 1}',
                '{"#000000": sky, "#ff0000": ignore}'), or the path of a YAML or JSON file that
                holds one; see docs/data.md.
            channels: C of the images, and of the network that the command line builds: 1 is gray, 3
                RGB, any other number that of the bands in the files; see docs/data.md.
        """
        super().__init__()
        if recipe not in ("paper", "modern"):
            raise ValueError(f"recipe: expected 'paper' or 'modern', got {recipe!r}")
        _check_at_least(
            1, batch_size=batch_size, eval_batch_size=eval_batch_size, channels=channels
        )
        _check_at_least(0, num_workers=num_workers)
        self.recipe = recipe
        self.crop_size = _pair("crop_size", crop_size)
        self.resize = None if resize is None else _pair("resize", resize)
        self.batch_size = batch_size
        one_size = recipe == "paper" or resize is not None or self.uniform_size
        self.eval_batch_size = eval_batch_size or (batch_size if one_size else 1)
        available = len(os.sched_getaffinity(0))
        self.num_workers = min(4, available) if num_workers is None else num_workers
        self.predict_images = predict_images
        self.channels = channels
        self._label_entries = label_map

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @functools.cached_property
    def label_map(self) -> LabelMap | None:
        """What turns masks into labels, if not their own numbers are the labels."""
        if self._label_entries is None:
            return None
        given = self._label_entries
        entries = given if isinstance(given, LabelEntries) else LabelEntries(given)
        return LabelMap(entries.read(), self.class_names)

    def list_samples(self, split: Split) -> list[Sample]:
        """The files of a split."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if stage == "predict":
            return
        if stage == "test":
            self.test_set = self._data_set("test", transforms.eval_transform)
            return
        self.val_set = self._data_set("val", transforms.eval_transform)
        if stage in (None, "fit"):
            self.train_set = self._data_set("train", transforms.train_transform)
            self._warn_of_overlap(self.train_set.samples)
            self._warn_of_padding(self.train_set.samples[0])

    # A checkpoint is loaded between setup and these: the normalization may be another since.

    def train_dataloader(self) -> DataLoader:
        self.train_set.transform = self._transform(transforms.train_transform)
        overfits = getattr(self.trainer, "overfit_batches", 0) > 0
        kind = OrderedTrainSampler if overfits else TrainSampler
        sampler = kind(self.train_set, *self._world(), shuffle=not overfits, seed=_seed())
        if self.trainer is not None:
            # Lightning says so too, but with persistent workers only after the first has begun.
            sampler.set_epoch(self.trainer.current_epoch)
        return self._loader(self.train_set, sampler, self.batch_size, kind=ResumableLoader)

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader:
        if not self.predict_images:
            raise ValueError(
                "predict_images: expected a file, a folder or a glob, got none; for instance "
                "--data.predict_images photos"
            )
        paths = find_images(self.predict_images)
        dataset = PredictionDataset(paths, self.resize, self.channels)
        sampler = shard_sampler(dataset, *self._world())
        return self._loader(dataset, sampler, batch_size=1, collate_fn=collate_one)

    def _data_set(self, split: Split, make: Callable[..., v2.Transform]) -> SegmentationDataset:
        transform, samples = self._transform(make), self.list_samples(split)
        return SegmentationDataset(
            samples, self.num_classes, transform, self.label_map, self.channels
        )

    def _evaluation_loader(self, dataset: SegmentationDataset) -> DataLoader:
        dataset.transform = self._transform(transforms.eval_transform)
        sampler = shard_sampler(dataset, *self._world())
        return self._loader(dataset, sampler, self.eval_batch_size)

    def _warn_of_overlap(self, samples: Sequence[Sample]) -> None:
        both = {sample.image for sample in samples} & {s.image for s in self.val_set.samples}
        if both:
            rank_zero_warn(
                f"{len(both)} images are in the training and in the validation split, "
                f"{min(both)} among them: scores on them say nothing of other images"
            )

    def _warn_of_padding(self, sample: Sample) -> None:
        """Crops that are mostly padding are trained on few pixels; the recipe 'paper' scales."""
        height, width = self.resize or image_size(sample.image, self.channels)
        crop_height, crop_width = self.crop_size
        inside = min(height, crop_height) * min(width, crop_width)
        padded = 1 - inside / (crop_height * crop_width)
        if self.recipe == "modern" and padded > MOSTLY:
            smaller = f"[{min(height, crop_height)},{min(width, crop_width)}]"
            rank_zero_warn(
                f"crop_size: {padded:.0%} of a crop of {crop_height} x {crop_width} is padding "
                f"around an image of {height} x {width} ({sample.image}); for instance "
                f"--data.crop_size {smaller}"
            )

    def _loader(
        self,
        dataset: Dataset,
        sampler: Sampler,
        batch_size: int,
        collate_fn: Any = collate,
        kind: type[DataLoader] = DataLoader,
    ) -> DataLoader:
        return kind(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate_fn,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=functools.partial(init_worker, rank=self._world()[1]),
            # Its own: loading must not advance the random numbers that dropout draws from.
            generator=torch.Generator().manual_seed(_seed()),
        )

    def _transform(self, make: Callable[..., v2.Transform]) -> v2.Transform:
        return make(self.recipe, self.crop_size, self.resize, self._normalization())

    def _normalization(self) -> Normalization:
        module = None if self.trainer is None else self.trainer.lightning_module
        normalization = getattr(module, "normalization", IMAGENET.for_channels(self.channels))
        if len(normalization.mean) != self.channels:
            raise ValueError(
                f"channels: images of {self.channels} channels need as many means, the trainer's "
                f"module has {len(normalization.mean)}: SegmentationTask(..., "
                f"channels={self.channels})"
            )
        return normalization

    def _world(self) -> tuple[int, int]:
        """How many processes there are, and which of them this is."""
        return (
            (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        )


class VOCFolder(SegmentationDataModule):
    """A folder in VOC layout: images in ``JPEGImages``, masks in ``SegmentationClass``,
    ``ImageSets/Segmentation/train.txt``, ``val.txt`` and ``test.txt`` with a name per line, each
    needed where its split is, and ``classes.txt`` with a class name per line (without it, PASCAL's
    21 classes if the masks carry PASCAL's palette)."""

    def __init__(self, root: str, **kwargs: Any) -> None:
        """
        Args:
            root: the folder.

        Raises:
            FileNotFoundError: the folder or classes.txt is missing.
            ValueError: an argument or classes.txt is not as expected.
        """
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()
        self.class_names, colors = voc.read_classes(self.root)
        if self.label_map is None:
            # PASCAL's, where there are too few.
            pascal = voc.pascal_palette(self.num_classes)
            self.palette = colors[: self.num_classes] + pascal[len(colors) :]
        else:
            self.palette = self.label_map.palette(colors, self.num_classes)

    def list_samples(self, split: Split) -> list[Sample]:
        return voc.list_folder(self.root, split)


class PascalVOC(SegmentationDataModule):
    """PASCAL VOC 2012, and SBD's images and masks beside it for the 10,582-image trainaug."""

    def __init__(
        self, root: str, sbd_root: str | None = None, download: bool = False, **kwargs: Any
    ) -> None:
        """
        Args:
            root: the folder that holds, or shall hold, VOCdevkit/VOC2012.
            sbd_root: the folder that holds, or shall hold, SBD (img, cls, train.txt, val.txt);
                without it, training is on VOC's own 1,464 images.
            download: fetch what is missing (2 GB for VOC, 1.4 GB for SBD).

        Raises:
            ValueError: an argument is not as expected.
        """
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()
        self.sbd_root = None if sbd_root is None else Path(sbd_root).expanduser()
        self.download = download
        self.class_names = list(voc.PASCAL_CLASSES)
        self.palette = voc.pascal_palette(len(self.class_names))

    def prepare_data(self) -> None:
        predicting = self.trainer is not None and self.trainer.predicting
        if self.download and not predicting:
            voc.list_pascal(self.root, "train", self.sbd_root, download=True)

    def list_samples(self, split: Split) -> list[Sample]:
        return voc.list_pascal(self.root, split, self.sbd_root)


class Synthetic(SegmentationDataModule):
    """Textured shapes on a cluttered background, generated on first use (a few seconds)."""

    uniform_size = True

    def __init__(
        self,
        cache_dir: str = "data",
        train: int = 200,
        val: int = 50,
        size: int = 97,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            cache_dir: the folder to generate into; what is there already is used again.
            train: number of training images.
            val: number of validation images.
            size: height and width of the images.
            seed: another seed, other images.
        """
        super().__init__(**kwargs)
        self.arguments = {"train": train, "val": val, "size": size, "seed": seed}
        name = f"synthetic-{train}-{val}-{size}px-seed{seed}"
        self.root = Path(cache_dir).expanduser() / name
        self.class_names = list(synthetic.CLASSES)
        self.palette = voc.pascal_palette(len(self.class_names))

    def prepare_data(self) -> None:
        if not self.root.exists():
            # Processes on several machines may share the folder: the first to finish has it.
            with contextlib.suppress(FileExistsError):
                synthetic.generate(self.root, **self.arguments)

    def list_samples(self, split: Split) -> list[Sample]:
        return voc.list_folder(self.root, split)


class Photographs(SegmentationDataModule):
    """Images without masks: what ``mfnet predict`` reads where a checkpoint tells the classes."""

    def __init__(
        self, class_names: list[str] | None = None, palette: Palette | None = None, **kwargs: Any
    ) -> None:
        """
        Args:
            class_names: the classes, in the order of the logits; by default the checkpoint's.
            palette: RGB of each class; by default the checkpoint's, or else PASCAL's colors.

        Raises:
            ValueError: no class names, or not as many colors as names.
        """
        super().__init__(**kwargs)
        if not class_names:
            raise ValueError(
                "predict: nothing tells the classes: give --ckpt_path RUN, the folder or the "
                "checkpoint of a trained network; an older one needs --config RUN/config.yaml, too"
            )
        self.class_names = list(class_names)
        self.palette = [(r, g, b) for r, g, b in palette or voc.pascal_palette(len(class_names))]
        if len(self.palette) != len(self.class_names):
            raise ValueError(
                f"palette: expected {len(self.class_names)} colors, one for each class, got "
                f"{len(self.palette)}"
            )

    def list_samples(self, split: Split) -> list[Sample]:
        raise ValueError(
            "Photographs: there are no masks to train or to score with; choose a data set that "
            "has them, for instance --data VOCFolder"
        )


def _seed() -> int:
    """The seed of ``lightning.seed_everything``, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"{name}: expected a positive integer or (height, width), got {value!r}")
    return pair


def _check_at_least(minimum: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name}: expected at least {minimum}, got {value}")
