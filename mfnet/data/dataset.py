"""Data sets of files, the samplers that go through them, and the collation of their samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from mfnet.constants import IGNORE_INDEX
from mfnet.data.files import read_pair
from mfnet.data.label_record import LabelRecord
from mfnet.data.labels import LabelMap, to_labels
from mfnet.data.voc import Sample


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of a normalized float32 image (C, H, W) and an int64 mask (H, W).

    An item is asked for by its index, or by ``(index, seed)``: then all that is random in the
    transform follows from the seed, in whichever process the item is made.

    Args:
        samples: the files.
        num_classes: labels are below this, or 255 (ignored).
        transform: joint transform of (image, mask), both ``tv_tensors`` of dtype uint8.
        label_map: turns masks into labels; without it, their numbers are the labels.
        channels: C; see ``mfnet.data.files.read_image``.

    Attributes:
        record: what the masks that were read hold.

    Raises:
        DataError: (by indexing) a file cannot be read, image and mask differ in size, a label is
            neither a class nor 255, or, without a label map, a palette contradicts another mask's.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        num_classes: int,
        transform: v2.Transform,
        label_map: LabelMap | None = None,
        channels: int = 3,
    ) -> None:
        self.samples = samples
        self.num_classes = num_classes
        self.transform = transform
        self.label_map = label_map
        self.channels = channels
        self.record = LabelRecord([sample.mask for sample in samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        if isinstance(key, int):
            return self._load(key)
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._load(index)

    def _load(self, index: int) -> tuple[Tensor, Tensor]:
        sample = self.samples[index]
        image, mask = read_pair(sample.image, sample.mask, self.channels)
        labels = to_labels(mask, self.num_classes, self.label_map)
        # A label map says whether the numbers or the colors count.
        self.record.add(index, labels, mask if self.label_map is None else None)
        return self.transform(image, tv_tensors.Mask(torch.from_numpy(labels)))


class TrainSampler(DistributedSampler):
    """Shuffles anew in every epoch and hands out ``(index, seed)``.

    Order and seeds depend on ``seed``, the epoch and the index alone. So a resumed training sees
    what an uninterrupted one would have seen, whatever the number of workers, and n processes with
    batch b see, step by step, what one process with batch n*b sees.
    """

    skip = 0  # indices that the next pass leaves out

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        count = len(self.dataset)  # type: ignore[arg-type]
        seeds = torch.randint(2**62, (count,), generator=generator).tolist()
        skip, self.skip = self.skip, 0
        return ((index, seeds[index]) for index in islice(super().__iter__(), skip, None))


class OrderedTrainSampler(TrainSampler, SequentialSampler):  # type: ignore[misc]
    """A ``TrainSampler(shuffle=False)``, which ``Trainer(overfit_batches=n)`` does not replace."""


def shard_sampler(dataset: Any, num_replicas: int, rank: int) -> DistributedSampler:
    """Every ``num_replicas``-th index from ``rank`` on, in order, no sample being counted twice.

    Raises:
        ValueError: there are fewer samples than replicas.
    """
    if len(dataset) < num_replicas:
        raise ValueError(
            f"expected a sample for each process, got {len(dataset)} samples for "
            f"{num_replicas} processes"
        )
    return UnrepeatedDistributedSampler(dataset, num_replicas, rank, shuffle=False)


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Batch of images (B, C, H, W) and masks (B, H, W), padded on the right and at the bottom to
    the largest H and W: images with 0, the mean color, masks with 255."""
    height = max(image.shape[-2] for image, _ in samples)
    width = max(image.shape[-1] for image, _ in samples)
    padded = []
    for image, mask in samples:
        padding = (0, width - image.shape[-1], 0, height - image.shape[-2])
        padded.append((F.pad(image, padding), F.pad(mask, padding, value=IGNORE_INDEX)))
    images, masks = default_collate(padded)
    return images, masks
