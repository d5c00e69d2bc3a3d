"""A data loader that a resumed training continues in the middle of an epoch, and its processes."""

from __future__ import annotations

import math
import signal
from typing import Any

from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader


def init_worker(worker_id: int, rank: int) -> None:
    """Begin a process that loads: random numbers of its own, and no end by SIGTERM.

    Whoever stops a job signals all of its processes. Those that load stay until theirs has finished
    the step at hand; it ends them then.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pl_worker_init_function(worker_id, rank)


class ResumableLoader(DataLoader):
    """A training ``DataLoader`` whose place in the epoch goes into Lightning's checkpoints.

    The place is the number of samples that all ranks together have taken, so that a run goes on
    with batches of another size or on another number of devices.

    Its sampler is a ``DistributedSampler`` with an attribute ``skip``: the number of indices that
    its next pass leaves out. The pass begins with the first batch that is asked for, not with
    ``iter``: a resumed Lightning creates the iterator before it tells the sampler the epoch.
    """

    sampler: Any
    batch_size: int
    _served = 0  # samples of this rank
    _skip = 0

    def __iter__(self) -> Any:  # torch asks for a class of its own
        self._served, self._skip = self._skip, 0
        self.sampler.skip = self._served
        for batch in super().__iter__():
            self._served = min(self._served + self.batch_size, len(self.sampler))
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"samples": self._served * self.sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        ranks = self.sampler.num_replicas
        # Before samples were counted, a checkpoint told the number of batches.
        samples = state.get("samples", state.get("batches", 0) * self.batch_size * ranks)
        self._skip = samples // ranks % len(self.sampler)
        if self._skip and samples % ranks:
            rank_zero_warn(
                f"resuming inside an epoch on {ranks} processes, after {samples} images: "
                f"{samples % ranks} of them are seen twice in this epoch"
            )

    @property
    def batches_done(self) -> int:
        """How many of ``len(loader)`` batches the next pass leaves out."""
        return len(self) - math.ceil((len(self.sampler) - self._skip) / self.batch_size)

    def start_over(self) -> int:
        """Begin the next pass at its first batch; return 0, the batches it leaves out."""
        self._skip = 0
        return 0
