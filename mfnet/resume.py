"""A run that goes on with other flags: its place in the epoch, share of the training, and rates.

Lightning counts steps and batches, which tell neither once their size is another.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from mfnet.data.loader import ResumableLoader

Settings = list[list[dict[str, Any]]]


def share_done(trainer: L.Trainer) -> float:
    """The share of the training's steps that are done, in 0 to 1; 0 where nothing ends it."""
    shares = [0.0]
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    epochs = trainer.max_epochs or -1
    if epochs > 0 and trainer.num_training_batches != math.inf:
        accumulated = trainer.accumulate_grad_batches
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        per_epoch = max(1, math.ceil(trainer.num_training_batches / accumulated))
        steps = trainer.current_epoch * per_epoch + math.ceil(batches / accumulated)
        shares.append(steps / (epochs * per_epoch))
    return min(1.0, max(shares))


def continue_epoch(trainer: L.Trainer) -> None:
    """At the start of training, count the batches of a restarted epoch in their size of today."""
    loader, fit_loop = trainer.train_dataloader, trainer.fit_loop
    if not isinstance(loader, ResumableLoader):
        return
    inside = fit_loop.epoch_progress.current.started > fit_loop.epoch_progress.current.processed
    done = loader.batches_done if inside else loader.start_over()
    progress = fit_loop.epoch_loop.batch_progress.current
    shift = done - progress.ready
    for count in ("ready", "started", "processed", "completed"):
        setattr(progress, count, getattr(progress, count) + shift)


def mark_unfinished_epoch(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Say in a checkpoint that ``max_steps`` has cut its epoch short: Lightning calls it done."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress")
    if progress is None or not 0 < batches < trainer.num_training_batches:
        return
    for counts in (progress["current"], progress["total"]):
        if counts["processed"] == counts["started"]:
            counts["processed"] -= 1
        counts["completed"] = min(counts["completed"], counts["processed"])


def settings(trainer: L.Trainer) -> Settings:
    """The optimizers' settings of each parameter group: rates, momentum, weight decay and so on."""
    return [
        [{key: value for key, value in group.items() if key != "params"} for group in groups]
        for groups in (optimizer.param_groups for optimizer in trainer.optimizers)
    ]


def restore(trainer: L.Trainer, configured: Settings) -> None:
    """Put this run's settings in place of those that a checkpoint has brought with its states."""
    for optimizer, groups in zip(trainer.optimizers, configured, strict=True):
        for group, given in zip(optimizer.param_groups, groups, strict=False):
            before = group.get("initial_lr", group["lr"])
            now = given.get("initial_lr", given["lr"])
            # A scheduler has moved the rate from where it started; it keeps that factor.
            rate = group["lr"] * (now / before) if before else now
            group.update({**given, "lr": rate})
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if not isinstance(scheduler, LRScheduler):
            continue
        groups = scheduler.optimizer.param_groups
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        if isinstance(scheduler, LambdaLR):
            for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
