"""A run that goes on with other flags: its place in the epoch, fraction of the training, and rates.

Lightning counts steps and batches, which tell neither once their size is another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from inspect import signature
from typing import Any

import lightning as L
from torch.optim.lr_scheduler import LambdaLR

from mfnet.data.loader import ResumableLoader

Settings = list[list[dict[str, Any]]]
Kinds = list[str]  # the classes of optimizer and scheduler
KINDS = "optimizer"  # in a checkpoint's record
POLYNOMIAL = "LambdaLR"  # the schedule of a run that names none


@dataclass
class Resumption:
    """What a run knows of the one that it goes on with, and its own settings, which win."""

    resumed_at: Fraction = Fraction(0)  # in epochs
    stored_kinds: Kinds | None = None
    configured: Settings | None = None
    planned: list[dict[str, Any]] = field(default_factory=list)


def fraction_done(trainer: L.Trainer, resumed_at: Fraction) -> float:
    """The fraction of the training's steps that are done, in 0 to 1; 0 where nothing ends it.

    Never below the fraction at ``resumed_at`` (in epochs): where batches of another size count a
    little fewer steps at the same image, the rate waits instead of rising.
    """
    fractions = [Fraction(0)]
    if trainer.max_steps > 0:
        fractions.append(Fraction(trainer.global_step, trainer.max_steps))
    epochs = trainer.max_epochs or -1
    if epochs > 0:
        fractions.append(max(epochs_done(trainer), resumed_at) / epochs)
    return float(min(max(fractions), Fraction(1)))


def fraction_warmed_up(trainer: L.Trainer, resumed_at: Fraction, epochs: float) -> float:
    """The fraction of the first ``epochs`` that is done, in 0 to 1; 1 where there are none.

    Never below that at ``resumed_at`` (in epochs), as in ``fraction_done``.
    """
    if epochs == 0:
        return 1.0
    return float(min(max(epochs_done(trainer), resumed_at) / Fraction(epochs), Fraction(1)))


def epochs_done(trainer: L.Trainer) -> Fraction:
    """Epochs done, in optimizer steps of the one under way; exact, so that resuming is."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    started = max(1, epochs.started)
    if trainer.num_training_batches in (0, math.inf):
        return Fraction(started - 1)
    accumulated = trainer.accumulate_grad_batches
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    per_epoch = math.ceil(trainer.num_training_batches / accumulated)
    return started - 1 + Fraction(math.ceil(batches / accumulated), per_epoch)


def continue_epoch(trainer: L.Trainer) -> None:
    """At the start of training, count the batches of a restarted epoch in their size of today."""
    loader, fit_loop = trainer.train_dataloader, trainer.fit_loop
    if not isinstance(loader, ResumableLoader):
        return
    epochs: Any = fit_loop.epoch_progress.current
    inside = epochs.started > epochs.processed
    done = loader.batches_done if inside else loader.start_over()
    fit_loop.epoch_loop.restarting = inside  # with max_steps Lightning restarts finished epochs too
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


def mark_finished_epoch(checkpoint: dict[str, Any]) -> None:
    """Have an epoch that was saved at its very end counted once: with ``max_steps`` Lightning, on
    resuming, gives the next one the same number."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {})
    for counts in progress.values():
        if counts["processed"] == counts["started"]:
            counts["completed"] = counts["processed"]


def settings(trainer: L.Trainer) -> Settings:
    """The optimizers' settings of each parameter group: rates, momentum, weight decay and so on."""
    return [
        [{key: value for key, value in group.items() if key != "params"} for group in groups]
        for groups in (optimizer.param_groups for optimizer in trainer.optimizers)
    ]


def schedules(trainer: L.Trainer) -> list[dict[str, Any]]:
    """What each scheduler was constructed with, as far as it keeps that under the same name."""
    plans = []
    for config in trainer.lr_scheduler_configs:
        classes = type(config.scheduler).__mro__[:-1]
        names = {name for kind in classes for name in signature(kind).parameters}
        # last_epoch is progress; from total_steps OneCycleLR derives more, which would stay.
        names -= {"optimizer", "last_epoch", "total_steps"}
        own = vars(config.scheduler)
        plans.append({name: own[name] for name in names if name in own})
    return plans


def describe(kinds: Kinds) -> str:
    """The classes, for a message."""
    return " and ".join("polynomial decay" if kind == POLYNOMIAL else kind for kind in kinds)


def restore(trainer: L.Trainer, run: Resumption) -> None:
    """Put this run's settings in place of those that a checkpoint has brought with its states."""
    if run.configured is None:  # a trial of BatchSizeFinder comes before
        return
    for config, given in zip(trainer.lr_scheduler_configs, run.planned, strict=False):
        vars(config.scheduler).update(given)
    for optimizer, groups in zip(trainer.optimizers, run.configured, strict=True):
        for group, given in zip(optimizer.param_groups, groups, strict=False):
            # A scheduler that cycles momentum keeps its limits in the group: it is at some place.
            cycled = ("momentum", "betas") if "max_momentum" in given else ()
            kept = {key: group[key] for key in ("lr", *cycled) if key in group}
            before, now = group.get("initial_lr"), given.get("initial_lr")
            if "swa_lr" in group:  # StochasticWeightAveraging has its own rates, and goes on
                kept["initial_lr"] = now = before
            group.update({**given, **kept})
            if before and now is not None:
                # A scheduler has moved the rate from where it started; it keeps that factor.
                group["lr"] = kept["lr"] * (now / before)
            elif not trainer.lr_scheduler_configs:
                group["lr"] = given["lr"]
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if not hasattr(scheduler, "base_lrs"):  # ReduceLROnPlateau goes on from the rate it reached
            continue
        groups = scheduler.optimizer.param_groups
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        if isinstance(scheduler, LambdaLR):
            for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
