"""A data loader that a resumed training continues in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


class ResumableLoader(DataLoader):
    """A training ``DataLoader`` whose place in the epoch goes into Lightning's checkpoints.

    Its sampler has an attribute ``skip``: the number of indices that its next pass leaves out.
    The pass begins with the first batch that is asked for, not with ``iter``: a resumed Lightning
    creates the iterator before it tells the sampler the epoch.
    """

    _served = 0
    _skip = 0

    def __iter__(self) -> Iterator[Any]:
        self._served, self._skip = self._skip, 0
        self.sampler.skip = self._served * self.batch_size
        for batch in super().__iter__():
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"batches": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["batches"] % len(self)
