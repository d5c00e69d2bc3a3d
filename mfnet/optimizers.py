"""The optimizer of a run and the schedule of its rates, the task's own or the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from mfnet.parameter_groups import Groups


def check_warm_up(epochs: float, make: LRSchedulerCallable | None) -> float:
    """``epochs``, if a warm-up may last so long beside what makes the scheduler.

    Raises:
        ValueError: it is below 0, or given beside a scheduler.
    """
    if epochs < 0 or (epochs and make is not None):
        raise ValueError(
            "lr_warmup: expected at least 0, and 0 beside lr_scheduler, whose schedule has "
            f"none, got {epochs}"
        )
    return epochs


def build_optimizer(groups: Groups, make: OptimizerCallable, head_lr: float) -> Optimizer:
    """The optimizer that ``make`` makes of the groups.

    Its own rate is that of the groups at ``head_lr``; the others keep their ratio to it.

    Raises:
        ValueError: ``head_lr`` is 0, or the optimizer does not take what it is given.
    """
    if head_lr <= 0:
        raise ValueError(
            "head_lr: expected a rate above 0: the optimizer's lr is the head's, and the "
            f"backbone's is lr * backbone_lr / head_lr; got {head_lr}"
        )
    ratios = [group["lr"] / head_lr for group in groups]
    bare = [{key: value for key, value in group.items() if key != "lr"} for group in groups]
    optimizer = _made("optimizer", make, bare)
    for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
        # initial_lr: where a rate has got to is told from it on resuming; plateaus do not set it.
        group["lr"] = group["initial_lr"] = group["lr"] * ratio
    return optimizer


def build_scheduler(
    optimizer: Optimizer,
    make: LRSchedulerCallable | None,
    factor: Callable[[], float],
    validate_every: int,
) -> Any:
    """What ``configure_optimizers`` returns: the scheduler that ``make`` makes steps once an epoch.

    Without one, the rates are multiplied by ``factor()`` at every step. One that watches a metric
    of the validation steps after each, once in ``validate_every`` epochs.

    Raises:
        ValueError: the scheduler does not take what it is given, or watches no metric but has to.
    """
    if make is None:
        # LambdaLR rather than PolynomialLR, which counts steps: a run that goes on with more epochs
        # or with batches of another size is still at the share of training that it has reached.
        scheduler = LambdaLR(optimizer, lambda _: factor())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
    scheduler = _made("lr_scheduler", make, optimizer)
    config: dict[str, Any] = {"scheduler": scheduler}
    if isinstance(scheduler, ReduceLROnPlateau):
        if not hasattr(scheduler, "monitor"):
            raise ValueError(
                "lr_scheduler: expected lightning.pytorch.cli.ReduceLROnPlateau, which takes the "
                "metric to monitor, got torch's, which does not"
            )
        config["monitor"] = scheduler.monitor
        if scheduler.monitor.startswith("val/"):
            config["frequency"] = validate_every
    return {"optimizer": optimizer, "lr_scheduler": config}


def _made(name: str, make: Callable[[Any], Any], of: Any) -> Any:
    try:
        return make(of)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error
