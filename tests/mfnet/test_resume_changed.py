"""A run that is resumed with other flags: they win, and no image is lost or seen twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import Dataset

from mfnet.data.dataset import TrainSampler, collate
from mfnet.data.loader import ResumableLoader
from mfnet.errors import user_error
from mfnet.run_directory import LastCheckpoint
from mfnet.task import SegmentationTask

IMAGES = 24
EPOCHS = 4


class Numbered(Dataset[tuple[Tensor, Tensor]]):
    """Images that show their number."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return torch.full((3, 2, 2), float(key[0])), torch.ones(2, 2, dtype=torch.int64)


class Watch(Callback):
    """What is seen, at which rates; SIGTERM after as many batches as asked for."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.seen: dict[int, list[int]] = {}
        self.rates: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        (optimizer,) = trainer.optimizers
        self.rates.append(tuple(group["lr"] for group in optimizer.param_groups))

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        images = self.seen.setdefault(trainer.current_epoch, [])
        images += [int(image[0, 0, 0]) for image in batch[0]]
        if len(self.rates) == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1))


def fit(
    folder: Path,
    batch_size: int = 4,
    ranks: int = 1,
    stop_after: int | None = None,
    arguments: dict[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    **trainer_arguments: Any,
) -> tuple[Watch, SegmentationTask]:
    """One start of a command that goes on with ``last.ckpt``; as rank 0 of ``ranks``."""
    L.seed_everything(0, verbose=False)
    task = SegmentationTask(network(), ["a", "b"], **(arguments or {}))
    watch = Watch(stop_after)
    sampler = TrainSampler(Numbered(), ranks, 0, seed=0)
    loader = ResumableLoader(Numbered(), batch_size=batch_size, sampler=sampler, collate_fn=collate)
    trainer = quiet_trainer(
        enable_checkpointing=True,
        callbacks=[watch, *callbacks, LastCheckpoint(folder, "last", save_on_train_epoch_end=True,
                                         enable_version_counter=False)],
        **{"max_epochs": EPOCHS, **trainer_arguments},
    )  # fmt: skip
    last = folder / "last.ckpt"
    trainer.fit(task, loader, ckpt_path=last if last.is_file() else None)
    return watch, task


def rate(share: float, base: float = 0.07) -> float:
    return base * (1 - share) ** 0.9


CHANGES = [
    {"batch_size": 2},
    {"batch_size": 8},
    {"batch_size": 5},
    {"accumulate_grad_batches": 3},
    {"ranks": 2},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_the_rate_follows_the_share_of_training_done(tmp_path: Path, change: dict) -> None:
    fit(tmp_path, max_epochs=2)
    watch, _ = fit(tmp_path, **change)  # to the end, 4 epochs
    assert sorted(watch.seen) == [2, 3]
    assert watch.rates[0][-1] == pytest.approx(rate(0.5))
    rates = [rates[-1] for rates in watch.rates]
    assert rates == sorted(rates, reverse=True)
    assert rate(1.0) < rates[-1] < rate(0.75)


@pytest.mark.parametrize("epochs", [6, 8])
def test_a_finished_run_is_extended_at_the_rate_of_its_share(tmp_path: Path, epochs: int) -> None:
    fit(tmp_path)
    watch, _ = fit(tmp_path, max_epochs=epochs)
    assert sorted(watch.seen) == list(range(4, epochs))
    assert watch.rates[0][-1] == pytest.approx(rate(4 / epochs))


@pytest.mark.parametrize("change", [{}, *CHANGES, {"batch_size": 8, "ranks": 2}], ids=str)
@pytest.mark.parametrize("way", ["SIGTERM", "max_steps"])
def test_no_image_is_seen_twice_or_left_out(tmp_path: Path, way: str, change: dict) -> None:
    if way == "SIGTERM":  # two batches into the second epoch
        with pytest.raises(SIGTERMException):
            fit(tmp_path, stop_after=8)
    else:
        fit(tmp_path, max_steps=8)
    watch, _ = fit(tmp_path, max_epochs=3, **change)
    assert sorted(watch.seen) == [1, 2]
    whole = order_of(1)
    ranks = change.get("ranks", 1)
    assert watch.seen[1] == whole[8::ranks]
    assert watch.seen[2] == order_of(2)[::ranks]
    share = (1 + 2 / 6) / 3
    assert watch.rates[0][-1] == pytest.approx(rate(share), rel=0.1)


def order_of(epoch: int) -> list[int]:
    sampler = TrainSampler(Numbered(), 1, 0, seed=0)
    sampler.set_epoch(epoch)
    return [index for index, _ in sampler]


def test_sigterm_waits_for_accumulated_gradients(tmp_path: Path) -> None:
    with pytest.raises(SIGTERMException):
        fit(tmp_path, stop_after=2, accumulate_grad_batches=3)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1
    watch, _ = fit(tmp_path, max_epochs=1, accumulate_grad_batches=3)
    assert watch.seen[0] == order_of(0)[12:]


def test_part_of_an_epoch_by_choice_is_no_interruption(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=1, limit_train_batches=3)
    watch, _ = fit(tmp_path, max_epochs=2, limit_train_batches=3)
    assert watch.seen == {1: order_of(1)[:12]}


def test_the_command_line_wins_over_the_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=2)
    momentum = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    arguments = {"head_lr": 0.7, "backbone_lr": 0.1, "weight_decay": 0.25, "momentum": 0.5}
    watch, task = fit(tmp_path, arguments=arguments)
    assert watch.rates[0] == pytest.approx([rate(0.5, 0.7)])
    (optimizer,) = task.trainer.optimizers
    for group in optimizer.param_groups:
        assert (group["weight_decay"], group["momentum"]) == (0.25, 0.5)
    assert momentum  # which is kept
    record = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert record["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.25
    assert record["lr_schedulers"][0]["base_lrs"] == [0.7]


class PowerCut(Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError


def test_averaging_goes_on_at_its_own_rates(tmp_path: Path) -> None:
    def averaging() -> Callback:
        return StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=3)

    whole, task = fit(tmp_path / "whole", callbacks=[averaging()])
    with pytest.raises(RuntimeError):
        fit(tmp_path, callbacks=[averaging(), PowerCut()])
    resumed, again = fit(tmp_path, callbacks=[averaging()])
    assert resumed.rates == whole.rates[12:]
    for own, other in zip(task.parameters(), again.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("ends", [{"max_epochs": 2}, {"max_steps": 9}])
def test_a_training_without_an_end_is_told(
    tmp_path: Path, ends: dict, recwarn: pytest.WarningsRecorder
) -> None:
    def fit_until(**end: Any) -> str:
        recwarn.clear()
        with pytest.raises(SIGTERMException):
            fit(tmp_path, stop_after=1, max_time=timedelta(hours=1), **{"max_epochs": None, **end})
        return " ".join(str(warning.message) for warning in recwarn)

    told = "the learning rates do not decay"
    assert told not in fit_until(**ends)
    assert told in fit_until()


def test_a_last_batch_of_one_image_names_the_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    monkeypatch.setitem(fit.__globals__, "network", lambda: pooling)
    with pytest.raises(ValueError, match=r"^Sequential does not train on a batch") as error:
        fit(tmp_path, batch_size=23)
    said = user_error(error.value)
    assert said is not None
    assert said.endswith("24 images in batches of 23 end with: choose another --data.batch_size")


def test_an_older_checkpoint_tells_batches(tmp_path: Path) -> None:
    with pytest.raises(SIGTERMException):
        fit(tmp_path, stop_after=8)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    fit_loop = checkpoint["loops"]["fit_loop"]
    assert fit_loop["state_dict"]["combined_loader"] == [{"samples": 8}]
    fit_loop["state_dict"]["combined_loader"] = [{"batches": 2}]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    watch, _ = fit(tmp_path, max_epochs=2)
    assert watch.seen == {1: order_of(1)[8:]}


class OwnOptimizer(SegmentationTask):
    def setup(self, stage: str) -> None:
        """Without super's."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.head_lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize("restored", [False, True])
def test_another_optimizer_needs_no_names(tmp_path: Path, restored: bool) -> None:
    L.seed_everything(0, verbose=False)
    for epochs in (1, 2) if restored else (1,):
        sampler = TrainSampler(Numbered(), 1, 0, seed=0)
        loader = ResumableLoader(Numbered(), 4, sampler=sampler, collate_fn=collate)
        trainer = quiet_trainer(max_epochs=epochs, default_root_dir=tmp_path)
        task = OwnOptimizer(network(), ["a", "b"], head_lr=0.01 * epochs)
        file = tmp_path / "run.ckpt"
        trainer.fit(task, loader, ckpt_path=file if file.is_file() else None)
        trainer.save_checkpoint(file)
    assert "lr-0" in trainer.logged_metrics
    if restored:  # twice the rate, a tenth of it after the first epoch
        assert float(trainer.logged_metrics["lr-0"]) == pytest.approx(0.002)


@pytest.mark.parametrize(("before", "after", "now"), [(4, 1, 3), (5, 3, 4), (12, 1, 5)])
def test_smaller_batches_do_not_raise_the_rate(
    tmp_path: Path, before: int, after: int, now: int
) -> None:
    with pytest.raises(SIGTERMException):
        fit(tmp_path, batch_size=before, stop_after=after)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    reached = saved["optimizer_states"][0]["param_groups"][0]["lr"]
    rates = [group[0] for group in fit(tmp_path, batch_size=now)[0].rates]
    assert rates[0] <= reached
    assert rates == sorted(rates, reverse=True)


def test_max_steps_at_the_end_of_an_epoch_counts_it_once(tmp_path: Path) -> None:
    fit(tmp_path, max_steps=2 * IMAGES // 4)
    watch, _ = fit(tmp_path, max_steps=EPOCHS * IMAGES // 4)
    whole, _ = fit(tmp_path / "whole", max_steps=EPOCHS * IMAGES // 4)
    assert watch.seen == {epoch: whole.seen[epoch] for epoch in (2, 3)}


class Scheduled(SegmentationTask):
    """Another scheduler than the task's."""

    kind = ""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.network.parameters(), self.head_lr, momentum=0.9)
        if self.kind == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.5, patience=0)
            return {"optimizer": optimizer,
                    "lr_scheduler": {"scheduler": plateau, "monitor": "train/loss"}}  # fmt: skip
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=24)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


@pytest.mark.parametrize("kind", ["plateau", "one cycle"])
def test_another_scheduler_goes_on_where_it_was(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Settings(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[float, float]] = []

        def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
            (group,) = trainer.optimizers[0].param_groups
            self.seen.append((group["lr"], group["momentum"]))

    monkeypatch.setattr(Scheduled, "kind", kind)
    monkeypatch.setitem(fit.__globals__, "SegmentationTask", Scheduled)
    settings = [Settings(), Settings()]
    monkeypatch.setitem(fit.__globals__, "Watch", lambda stop: settings[0])
    fit(tmp_path, max_epochs=3)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]
    monkeypatch.setitem(fit.__globals__, "Watch", lambda stop: settings[1])
    fit(tmp_path, max_epochs=4)
    (group,) = saved["param_groups"]
    assert settings[1].seen[0] == (group["lr"], group["momentum"])
    assert group["lr"] != 0.07 or kind != "plateau"
