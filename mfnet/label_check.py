"""A Lightning callback that refuses labels which nothing can be learned or measured from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from mfnet.constants import IGNORE_INDEX
from mfnet.data.dataset import SegmentationDataset
from mfnet.data.files import DataError
from mfnet.data.label_record import check_palettes

# For the remedy: what most masks with a single class are.
_BINARY = f"if {IGNORE_INDEX} is a class, say so: --data.label_map '{{0: 0, {IGNORE_INDEX}: 1}}'"


class LabelCheck(Callback):
    """Look at the labels of a split once all of its masks have been read.

    A class that occurs in none of them is warned of. Training masks are looked at before the
    first validation after the whole split was read (or, without one, at that epoch's end), those
    of validation and test at the end of a whole pass, before there are scores. Where only a part is
    read (``limit_train_batches``, ``fast_dev_run``, the sanity check, the rest of an epoch that a
    resumed run begins with) nothing is concluded. Data sets other than mfnet's are left alone.

    Raises:
        DataError: a split's labels are of fewer than two classes (none in validation or test: a
            warning, as every score is nan), or palettes contradict each other, between
            ranks and splits too.
    """

    def __init__(self) -> None:
        self._done: set[str] = set()
        self._tables: list[tuple[Sequence[Path], Tensor]] = []

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._check("training", trainer.train_dataloader, trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._check("training", trainer.train_dataloader, trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._check("validation", trainer.val_dataloaders, trainer, pl_module)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._check("test", trainer.test_dataloaders, trainer, pl_module)

    def _check(self, split: str, loader: Any, trainer: Any, pl_module: Any) -> None:
        dataset = getattr(loader, "dataset", None)
        skip = trainer.sanity_checking or trainer.fast_dev_run or split in self._done
        if skip or not isinstance(dataset, SegmentationDataset):
            return

        def over_ranks(value: Tensor) -> Tensor:
            return trainer.strategy.reduce(value.to(pl_module.device), reduce_op="sum").cpu()

        record = dataset.record
        if not over_ranks(record.read.int()).all():
            return
        self._done.add(split)
        _check_classes(split, over_ranks(record.counts()), pl_module.class_names)
        tables = trainer.strategy.all_gather(record.colors().to(pl_module.device)).cpu()
        self._tables += [(record.masks, table) for table in tables.reshape(-1, 2, 256)]
        check_palettes(self._tables)


def _check_classes(split: str, counts: Tensor, class_names: Sequence[str]) -> None:
    """Warn of classes without a pixel; refuse where fewer than two have any."""
    names = [f"{label} '{name}'" for label, name in enumerate(class_names)]
    present = [name for name, count in zip(names, counts.tolist(), strict=False) if count]
    if not present and split != "training":
        rank_zero_warn(
            f"the {split} masks hold no class, every pixel is {IGNORE_INDEX} = ignored: there is "
            "nothing to score, and every score is nan"
        )
    elif len(present) < 2:
        shares = (100 * counts / counts.sum()).tolist()
        found = [f"class {n} ({s:.3g} %)" for n, s in zip(names, shares, strict=False) if s]
        if shares[IGNORE_INDEX]:
            found.append(f"{IGNORE_INDEX} = ignored ({shares[IGNORE_INDEX]:.3g} %)")
        raise DataError(
            f"the {split} masks hold only {' and '.join(found)}: expected at least two classes"
            + (f"; {_BINARY}" if shares[IGNORE_INDEX] else "")
        )
    elif len(present) < len(names):
        missing = [name for name in names if name not in present]
        rank_zero_warn(f"classes that occur in no {split} mask: {', '.join(missing)}")
