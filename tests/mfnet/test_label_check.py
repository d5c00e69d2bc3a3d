"""Labels that nothing can be learned or measured from are found while they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image
from quiet import quiet_trainer
from torch import Tensor, nn

from mfnet.data import DataError, VOCFolder
from mfnet.run_directory import checkpoint_callbacks
from mfnet.task import SegmentationTask

CLASSES = ["background", "road", "car"]
WIDTH, HEIGHT = 24, 20
BINARY = (
    r"masks hold only class 0 'background' \(50 %\) and 255 = ignored \(50 %\): expected at least "
    r"two classes; .* --data\.label_map '\{0: 0, 255: 1\}'"
)

Colors = Sequence[tuple[int, int, int]]


def write(
    root: Path,
    masks: dict[str, Sequence[int]],
    classes: Sequence[str] = CLASSES,
    palettes: dict[str, Colors] | None = None,
) -> Path:
    """A data set; the mask of each image (train*, val*) has columns of the numbers given."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name, numbers in masks.items():
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages" / f"{name}.jpg")
        columns = np.array(numbers, np.uint8)[np.arange(WIDTH) * len(numbers) // WIDTH]
        mask = Image.fromarray(np.tile(columns, (HEIGHT, 1)))
        if palettes:
            mask.putpalette(np.array(palettes[name], np.uint8).tobytes())
        mask.save(root / "SegmentationClass" / f"{name}.png")
    for split in ("train", "val", "test"):
        prefix = "val" if split == "test" else split
        names = [name for name in masks if name.startswith(prefix)]
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    return root


def run(
    root: Path,
    how: str = "fit",
    workers: int = 0,
    label_map: dict[int, int] | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> L.Trainer:
    data = VOCFolder(
        str(root), crop_size=33, batch_size=1, num_workers=workers, label_map=label_map
    )
    task = SegmentationTask(nn.Conv2d(3, data.num_classes, 1), data.class_names)
    trainer = quiet_trainer(**options)
    getattr(trainer, how)(task, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def said(caught: pytest.WarningsRecorder) -> list[str]:
    """The warnings of labels."""
    return [str(w.message) for w in caught if " masks hold " in str(w.message)] + [
        str(w.message) for w in caught if "occur in no" in str(w.message)
    ]


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """0 and 255, as most tools write masks of two classes."""
    masks = {name: [0, 255] for name in ("train0", "train1", "train2", "val0")}
    return write(tmp_path / "data", masks, ["background", "road"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 0}, {"num_sanity_val_steps": 0}])
def test_0_and_255_are_refused_before_there_is_a_score(
    binary: Path, tmp_path: Path, workers: int, options: dict[str, Any]
) -> None:
    class Score(Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert trainer.sanity_checking

    callbacks = [*checkpoint_callbacks(tmp_path / "run"), Score()]
    options |= {"enable_checkpointing": True, "callbacks": callbacks}
    with pytest.raises(DataError, match=f"the training {BINARY}"):
        run(binary, workers=workers, **options)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["validate", "test"])
def test_0_and_255_cannot_be_scored(binary: Path, how: str, workers: int) -> None:
    split = "validation" if how == "validate" else how
    with pytest.raises(DataError, match=f"the {split} {BINARY}"):
        run(binary, how, workers)


def test_the_remedy_serves(binary: Path, recwarn: pytest.WarningsRecorder) -> None:
    trainer = run(binary, label_map={0: 0, 255: 1})
    assert "val/mIoU" in trainer.callback_metrics
    assert not said(recwarn)


def test_one_class_and_nothing_ignored_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "data", {"train": [1], "val": [0, 1]})
    with pytest.raises(DataError, match=r"hold only class 1 'road' \(100 %\).* two classes$"):
        run(tmp_path / "data")


def test_classes_that_never_occur_are_named(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    masks = {"train0": [0, 255], "train1": [0, 1], "val": [0, 2]}
    write(tmp_path / "data", masks, [*CLASSES, "tree"])
    run(tmp_path / "data", max_epochs=3)
    assert said(recwarn) == [
        "classes that occur in no training mask: 2 'car', 3 'tree'",
        "classes that occur in no validation mask: 1 'road', 3 'tree'",
    ]


def test_what_a_crop_leaves_out_occurs(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    masks = {"train": [*[0] * (WIDTH - 1), 1], "val": [0, 1]}
    write(tmp_path / "data", masks, CLASSES[:2])
    run(tmp_path / "data")
    assert not said(recwarn)


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 1},
        {"max_steps": 1, "max_epochs": -1},
        {"fast_dev_run": 2},
        {"overfit_batches": 1},
        {"limit_train_batches": 0},
    ],
)
def test_from_a_part_nothing_is_concluded(
    tmp_path: Path, options: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    write(tmp_path / "data", {"train0": [0], "train1": [0], "val0": [0], "val1": [0]})
    run(tmp_path / "data", **{"limit_val_batches": 1, **options})
    assert not said(recwarn)


def test_a_run_resumed_inside_its_epoch_is_not_judged_by_the_rest(tmp_path: Path) -> None:
    """Of masks with one class each, a resumed epoch may read those of a single class."""
    write(tmp_path / "data", {"train0": [0], "train1": [1], "val": [0, 1]}, CLASSES[:2])

    class Save(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
            if trainer.global_step == 1:
                trainer.save_checkpoint(tmp_path / "part.ckpt")

    run(tmp_path / "data", callbacks=[Save()])
    resumed = run(tmp_path / "data", ckpt_path=tmp_path / "part.ckpt", limit_val_batches=0)
    assert resumed.global_step == 2
    run(tmp_path / "data", ckpt_path=tmp_path / "part.ckpt", max_epochs=3)


def test_nothing_to_score_is_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    write(tmp_path / "data", {"train": [0, 1], "val": [255]}, CLASSES[:2])
    trainer = run(tmp_path / "data", "validate")
    assert len(said(recwarn)) == 1
    assert "the validation masks hold no class, every pixel is 255 = ignored" in said(recwarn)[0]
    assert trainer.callback_metrics["val/mIoU"].isnan()


@pytest.mark.parametrize("permuted", [True, False])
def test_palettes_of_the_splits_are_compared(tmp_path: Path, permuted: bool) -> None:
    colors = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    swapped = [colors[i] for i in (0, 2, 1)] if permuted else colors
    palettes = {"train": colors, "val": swapped}
    write(tmp_path / "data", {"train": [0, 1, 2], "val": [0, 1, 2]}, palettes=palettes)
    if not permuted:
        run(tmp_path / "data")
        return
    with pytest.raises(DataError, match=r"val\.png: number 1 has .*00ff00, .*ff0000 in .*train"):
        run(tmp_path / "data")


class TwoRanks(SingleDeviceStrategy):
    """Stands in for a group of two, whose other rank has read another half."""

    def __init__(self, other: dict[str, Tensor]) -> None:
        super().__init__()
        self.other = other

    def reduce(self, tensor: Tensor, *_: Any, reduce_op: str = "mean") -> Tensor:
        if tensor.ndim == 0:  # Lightning's own questions
            return tensor
        assert reduce_op == "sum"
        return tensor + self.other["counts" if tensor.numel() == 256 else "read"]

    def all_gather(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.stack([tensor, self.other["colors"]])


@pytest.mark.parametrize("case", ["half", "one class", "two classes", "contradiction"])
def test_ranks_are_judged_together(
    tmp_path: Path, case: str, recwarn: pytest.WarningsRecorder
) -> None:
    black = {"train": [(0, 0, 0)], "val0": [(0, 0, 0)], "val1": [(0, 0, 0)]}
    write(tmp_path / "data", {"train": [0], "val0": [0], "val1": [0]}, palettes=black)
    counts = torch.zeros(256, dtype=torch.int64)
    counts[0 if case == "one class" else 1] = WIDTH * HEIGHT
    colors = torch.full((2, 256), -1)
    colors[:, 0] = torch.tensor([0xFF0000 if case == "contradiction" else 0, 1])
    read = torch.tensor([0, 0 if case == "half" else 1])
    strategy = TwoRanks({"read": read, "counts": counts, "colors": colors})
    options = {"strategy": strategy, "limit_val_batches": 1}
    if case == "one class":
        with pytest.raises(DataError, match=r"class 0 'background' \(100 %\)"):
            run(tmp_path / "data", "validate", **options)
    elif case == "contradiction":
        with pytest.raises(DataError, match=r"val1\.png: number 0 .*#ff0000, .* in .*val0\.png"):
            run(tmp_path / "data", "validate", **options)
    else:
        run(tmp_path / "data", "validate", **options)
        missing = ["classes that occur in no validation mask: 2 'car'"]
        assert said(recwarn) == ([] if case == "half" else missing)
