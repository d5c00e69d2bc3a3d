"""A record of the labels and palettes of a split, filled while its masks are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from mfnet.constants import IGNORE_INDEX
from mfnet.data.files import DataError, StoredMask, packed_colors

# One for the process itself and one for each of its loader's workers, so that none waits for
# another; more workers than that share rows.
_ROWS = 65
_NONE = -1


class LabelRecord:
    """What the masks of a split hold, each counted when it is first read.

    Workers of data loaders fill the same memory.

    Args:
        masks: the split's mask files.

    Attributes:
        masks: the files.
        read: uint8 (masks,), 1 where the mask was read.
    """

    def __init__(self, masks: Sequence[Path]) -> None:
        self.masks = masks
        self.read = torch.zeros(len(masks), dtype=torch.uint8).share_memory_()
        self._counts = torch.zeros(_ROWS, 256, dtype=torch.int64).share_memory_()
        self._colors = torch.full((_ROWS, 256), _NONE, dtype=torch.int32).share_memory_()
        self._sources = torch.zeros(_ROWS, 256, dtype=torch.int32).share_memory_()

    def add(self, index: int, labels: NDArray[np.uint8], palette_of: StoredMask | None) -> None:
        """Count the labels uint8 (H, W) of a mask, and remember the colors of its numbers.

        Args:
            index: of the mask.
            labels: class indices and 255.
            palette_of: the mask, if its palette has to agree with those of the others.

        Raises:
            DataError: it does not.
        """
        if self.read[index]:
            return
        worker = get_worker_info()
        row = 0 if worker is None else 1 + worker.id % (_ROWS - 1)
        if palette_of is not None:
            self._add_palette(row, index, palette_of)
        self._counts[row] += torch.bincount(torch.from_numpy(labels).flatten(), minlength=256)
        self.read[index] = 1

    def counts(self) -> Tensor:
        """int64 (256,): pixels of each label."""
        return self._counts.sum(0)

    def colors(self) -> Tensor:
        """int32 (2, 256): the packed color of each number in use, -1 where there is none, and the
        index of a mask that it stands in."""
        first = (self._colors != _NONE).int().argmax(0)
        each = torch.arange(256)
        return torch.stack([self._colors[first, each], self._sources[first, each]])

    def _add_palette(self, row: int, index: int, mask: StoredMask) -> None:
        if mask.palette is None:
            return
        used = np.bincount(mask.pixels.ravel(), minlength=256) > 0
        used[[IGNORE_INDEX, *range(len(mask.palette), 256)]] = False
        numbers = torch.from_numpy(np.flatnonzero(used))
        colors = torch.from_numpy(packed_colors(mask.palette))[numbers]
        # What this worker has seen is written before the others' is read: of two workers that meet
        # a contradiction at once, one finds it.
        new = self._colors[row, numbers] == _NONE
        self._sources[row, numbers[new]] = index
        self._colors[row, numbers[new]] = colors[new]
        known = self._colors[:, numbers]
        for other, place in ((known != colors) & (known != _NONE)).nonzero().tolist():
            number = int(numbers[place])
            file = self.masks[self._sources[other, number]]
            raise _contradiction(
                number, int(known[other, place]), file, int(colors[place]), mask.path
            )


def check_palettes(tables: Iterable[tuple[Sequence[Path], Tensor]]) -> None:
    """Raise ``DataError`` where a number has two colors.

    Args:
        tables: mask files, and what ``LabelRecord.colors`` says of them.
    """
    first: dict[int, tuple[int, Path]] = {}
    for masks, table in tables:
        for number, (color, source) in enumerate(zip(*table.tolist(), strict=True)):
            if color == _NONE:
                continue
            known, file = first.setdefault(number, (color, masks[source]))
            if known != color:
                raise _contradiction(number, known, file, color, masks[source])


def _contradiction(number: int, known: int, file: Path, color: int, other: Path) -> DataError:
    return DataError(
        f"{other}: number {number} has the color #{color:06x}, but #{known:06x} in {file}: "
        "if the colors say what a pixel is, list them: "
        f'--data.label_map \'{{"#{known:06x}": ..., "#{color:06x}": ..., ...}}\'; '
        f"if the numbers do, list those: --data.label_map '{{{number}: {number}, ...}}'"
    )
