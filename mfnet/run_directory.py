"""What a training run keeps in its folder: checkpoints and logs that outlive interruptions.

``<folder>/config.yaml``, ``metrics.csv``, ``checkpoints/best.ckpt`` (by val/mIoU) and
``checkpoints/last.ckpt`` (after every epoch, and on SIGTERM), whatever logger the user chose;
without one, TensorBoard's event files too.
"""

from __future__ import annotations

import csv
import io
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mfnet.checkpoint import CHECKPOINTS, read_checkpoint
from mfnet.files import atomic_write

CONFIG = "config.yaml"
METRICS = "metrics.csv"


def has_checkpoints(folder: Path) -> bool:
    return any((folder / CHECKPOINTS).glob("*.ckpt"))


def folder_of(checkpoint: str) -> Path:
    """The folder of the run that a checkpoint is from; of one that lies elsewhere, its own."""
    parent = Path(checkpoint).absolute().parent
    return parent.parent if parent.name == CHECKPOINTS else parent


def holds_run(folder: Path) -> bool:
    """Whether something would be lost if another run began in ``folder``.

    A configuration alone is what a run leaves that died before its first step.
    """
    return (folder / METRICS).exists() or has_checkpoints(folder)


def checkpoint_callbacks(folder: Path) -> list[Callback]:
    """Keep ``best.ckpt`` and ``last.ckpt`` in the run's folder."""
    where: dict[str, Any] = {"dirpath": folder / CHECKPOINTS, "enable_version_counter": False}
    best = BestCheckpoint(filename="best", monitor="val/mIoU", mode="max", **where)
    return [best, LastCheckpoint(filename="last", save_on_train_epoch_end=True, **where)]


def loggers(folder: Path, chosen: Sequence[Logger] | None = None) -> list[Logger]:
    """Log to ``metrics.csv`` in the run's folder, and to the ``chosen``; default: TensorBoard.

    Raises:
        ValueError: a chosen logger would write that very file (and delete what is in it).
    """
    if chosen is None:
        chosen = [TensorBoardLogger(folder, name="", version="")]
    for logger in chosen:
        if isinstance(logger, CSVLogger) and Path(logger.log_dir).resolve() == folder.resolve():
            raise ValueError(
                f"{type(logger).__name__}: every run writes '{folder / METRICS}' anyway; "
                "leave it out, or give it another save_dir"
            )
    return [
        *chosen,
        ContinuedCSVLogger(folder, name="", version="", flush_logs_every_n_steps=1),
    ]


class BestCheckpoint(ModelCheckpoint):
    """The run's own checkpoint of the best epoch; a class of its own, so that the user may have a
    ``ModelCheckpoint`` of the same metric: Lightning tells the two by their class."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best score where ``best.ckpt`` is, though its folder has been moved."""
        best = Path(self.dirpath or "") / Path(state_dict["best_model_path"]).name
        if best.is_file():
            path = str(best)
            state_dict = {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": path,
                "kth_best_model_path": path,
                "best_k_models": dict.fromkeys([path], state_dict["best_model_score"]),
            }
        super().load_state_dict(state_dict)


class LastCheckpoint(ModelCheckpoint):
    """A checkpoint after every epoch and, on SIGTERM, after the step at hand.

    Whichever rank gets the signal, all of them stop after the same step, with a
    ``SIGTERMException``. Lightning's own handler communicates at whatever point it interrupts,
    which can leave the ranks waiting for one another. On other errors nothing is saved: one
    rank's failure would wait for the others in vain.
    """

    _terminated = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)  # Lightning puts the old one back

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # Gradients that wait for more batches are in no checkpoint: their images would be lost.
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches
        if accumulating and not trainer.is_last_batch:
            return
        if trainer.strategy.reduce_boolean_decision(self._terminated, all=False):
            raise SIGTERMException

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.save_on_exception = isinstance(exception, SIGTERMException)
        super().on_exception(trainer, pl_module, exception)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self._terminated = True


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are either whole or not there, and load without running code.

    Lightning writes to the system's temporary folder and moves the file; across file systems
    that is a copy over the previous checkpoint, which a full disk destroys.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write beside ``path``, then rename. Raises ``OSError`` naming ``path``."""
        buffer = io.BytesIO()  # torch.save into a full file raises a RuntimeError without a reason
        torch.save(checkpoint, buffer)
        try:
            with atomic_write(Path(path)) as partial, partial.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"checkpoint '{path}' could not be written: {error.strerror}") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """See ``mfnet.checkpoint.read_checkpoint``."""
        return read_checkpoint(path, map_location, weights_only is not False)


class ContinuedCSVLogger(CSVLogger):
    """A CSV log that a resumed run goes on with; Lightning's deletes the rows that are there."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:  # the base's is of another class in Fabric
        if self._experiment is None:
            self._experiment = _AppendingWriter(self.log_dir)
        return self._experiment


class _AppendingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            lines = path.read_bytes()
            if not lines.endswith(b"\n"):  # a full disk or a kill cut its last row short
                with atomic_write(path) as partial:
                    partial.write_bytes(lines[: lines.rfind(b"\n") + 1])
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])
