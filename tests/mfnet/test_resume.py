"""A resumed run equals an uninterrupted one, and its folder goes on."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from quiet import quiet_trainer
from torch import Tensor, nn

from mfnet import SegmentationNetwork
from mfnet.contexts.mf import MFContext
from mfnet.data import Synthetic
from mfnet.decoder import DeepLabDecoder
from mfnet.run_directory import AtomicCheckpointIO, checkpoint_callbacks, loggers
from mfnet.task import SegmentationTask

EPOCHS = 4


class TinyBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.high = nn.Sequential(nn.Conv2d(8, 8, 3, stride=4, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low(x)
        return low, self.high(low)


class Crash(Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("power cut")


class Terminate(Callback):
    """SIGTERM in the middle of the second epoch."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: object
    ) -> None:
        if trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(folder: Path, workers: int = 0, interruption: Callback | None = None) -> SegmentationTask:
    """One start of the same command: from ``last.ckpt`` where there is one."""
    L.seed_everything(3, workers=True, verbose=False)
    data = Synthetic(
        cache_dir=str(folder.parent / "data"),
        train=10,
        val=2,
        size=33,
        crop_size=33,
        batch_size=2,
        num_workers=workers,
    )
    context = MFContext(8, 8, rank=2, context_size=(3, 3))
    network = SegmentationNetwork(TinyBackbone(), context, DeepLabDecoder(8, 8, data.num_classes))
    task = SegmentationTask(network, data.class_names, reconstruction_warmup=1)
    trainer = quiet_trainer(
        enable_checkpointing=True,
        max_epochs=EPOCHS,
        callbacks=[*checkpoint_callbacks(folder), *([interruption] if interruption else [])],
        logger=loggers(folder),
        plugins=[AtomicCheckpointIO()],
        log_every_n_steps=1,
    )
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(task, datamodule=data, ckpt_path=last if last.is_file() else None)
    return task


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The last checkpoint of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(folder)
    return checkpoint(folder)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("interruption", "error"), [(Crash(), RuntimeError), (Terminate(), SIGTERMException)]
)
def test_resumed_equals_uninterrupted(
    tmp_path: Path, whole: dict, interruption: Callback, error: type[BaseException], workers: int
) -> None:
    with pytest.raises(error):
        fit(tmp_path / "parts", workers, interruption)
    interrupted_at = checkpoint(tmp_path / "parts")["global_step"]
    fit(tmp_path / "parts", workers)

    assert interrupted_at == (10 if error is RuntimeError else 7)
    parts = checkpoint(tmp_path / "parts")
    assert whole["global_step"] == parts["global_step"] == 5 * EPOCHS
    for key, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, parts["state_dict"][key]), key
    momenta = [c["optimizer_states"][0]["state"] for c in (whole, parts)]
    for index, state in momenta[0].items():
        assert torch.equal(state["momentum_buffer"], momenta[1][index]["momentum_buffer"])
    with (tmp_path / "parts" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/mIoU"]]
    assert [int(row["epoch"]) for row in rows] == list(range(EPOCHS))
