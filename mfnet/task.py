"""Training and evaluating a segmentation network, as a LightningModule."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from mfnet.models import SegmentationNetwork

IGNORE_INDEX = 255


def segmentation_scores(confusion: Tensor) -> dict[str, Tensor]:
    """The usual scores of a confusion matrix (classes, classes), rows the truth, float64.

    With ``tp`` the diagonal: ``IoU_c = tp_c / (truth_c + predicted_c - tp_c)``;
    ``mIoU`` = mean of IoU_c over the classes that occur in the truth or in the predictions (an
    absent one has no IoU: NaN, left out); ``fwIoU = sum_c truth_c / all IoU_c``;
    ``accuracy = sum_c tp_c / all``. All are taken over the whole set, not averaged per image.
    """
    confusion = confusion.double()
    hits, truth, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    iou = hits / (truth + predicted - hits)
    frequency = truth / truth.sum()
    return {
        "IoU": iou,
        "mIoU": iou.nanmean(),
        "fwIoU": (frequency * iou).nansum(),
        "accuracy": hits.sum() / truth.sum(),
    }


class SegmentationTask(L.LightningModule):
    """Cross entropy, plus a network's own auxiliary loss, by SGD with polynomial decay.

    The loss is ``CE + reconstruction_weight * auxiliary``, the weight being 0 for the first
    ``reconstruction_warmup`` epochs. CE is the mean over the pixels that are not
    ignored (255) in the batches of all ranks together, so that n processes with batch b take the
    step of one process with batch n b; a batch without any such pixel has CE 0.

    Batches are ``(images (B, 3, H, W), masks int64 (B, H, W))``. Per epoch, ``train/loss``,
    ``train/ce``, ``train/reconstruction`` (unweighted), ``lr-backbone``, ``lr-head``,
    ``val/loss`` (CE over all pixels of the set) and the scores of :func:`segmentation_scores`
    are logged: ``val/mIoU``, ``val/fwIoU``, ``val/accuracy``, ``val/IoU/<class>``.

    Args:
        network: a :class:`mfnet.SegmentationNetwork` or any module that maps images to logits
            ``(B, classes, H, W)``.
        class_names: the classes, in the order of the logits' channels.
        backbone_lr: learning rate of ``network.backbone_parameters()``; in another module, of
            its submodule ``backbone`` or ``encoder``.
        head_lr: learning rate of all other parameters.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay.
        power: the rates are multiplied by ``(1 - step / steps) ** power`` at every step.
        reconstruction_weight: weight of the auxiliary loss (the paper's lambda; EncNet's SE-loss
            has 0.2, without a warm-up).
        reconstruction_warmup: epochs trained without it.
    """

    def __init__(
        self,
        network: nn.Module,
        class_names: list[str],
        backbone_lr: float = 0.007,
        head_lr: float = 0.07,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        power: float = 0.9,
        reconstruction_weight: float = 0.1,
        reconstruction_warmup: int = 10,
    ) -> None:
        super().__init__()
        self.network = network
        self.class_names = list(class_names)
        self.backbone_lr = backbone_lr
        self.head_lr = head_lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.power = power
        self.reconstruction_weight = reconstruction_weight
        self.reconstruction_warmup = reconstruction_warmup
        # Labels were checked where they were read; validate_args would wait for the GPU.
        self.confusion = MulticlassConfusionMatrix(
            len(self.class_names), ignore_index=IGNORE_INDEX, validate_args=False
        )
        self.pixel_loss = MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of images (B, 3, H, W).

        Raises:
            ValueError: the network returns something else.
        """
        return self._checked(self.network(images), images)

    def setup(self, stage: str) -> None:  # before the callbacks' on_fit_start: they may train
        self._seed = torch.initial_seed()

    def on_train_start(self) -> None:
        # Not in configure_optimizers: asking builds the training loader, which has to wait until
        # a resumed run knows its epoch.
        self._steps = self.trainer.estimated_stepping_batches

    def on_train_epoch_start(self) -> None:
        for group in self.optimizers().param_groups:
            self.log(f"lr-{group['name']}", group["lr"], sync_dist=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout draws from (seed, rank, epoch, batch) alone: a resumed run repeats exactly what
        # an uninterrupted one does.
        state = f"{self._seed} {self.global_rank} {self.current_epoch} {batch_idx}"
        torch.manual_seed(random.Random(state).getrandbits(63))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, masks = batch
        if isinstance(self.network, SegmentationNetwork):
            logits, auxiliary = self.network(images, return_loss=True, masks=masks)
        else:
            logits, auxiliary = self.network(images), None
        total, pixels = self._cross_entropy(self._checked(logits, images), masks)
        ce = total / _mean_over_ranks(pixels).clamp(min=1)
        loss = ce
        if auxiliary is not None:
            # Weighted by 0 rather than left out: parameters that only this loss reaches would else
            # have no gradient during the warm-up, which DistributedDataParallel does not accept.
            warming_up = self.current_epoch < self.reconstruction_warmup
            loss = ce + (0.0 if warming_up else self.reconstruction_weight) * auxiliary

        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        per_epoch = {"train/loss": loss.detach(), "train/ce": ce.detach()}
        if auxiliary is not None:
            per_epoch["train/reconstruction"] = auxiliary.detach()
        self.log_dict(
            per_epoch, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images)
        )
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_start(self) -> None:
        self._reset_metrics()

    def on_test_epoch_start(self) -> None:
        self._reset_metrics()

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits of a batch whose first item are the images."""
        return self(batch[0])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        backbone, head = _parameter_groups(self.network)
        groups = [
            {"name": "backbone", "params": backbone, "lr": self.backbone_lr},
            {"name": "head", "params": head, "lr": self.head_lr},
        ]
        optimizer = torch.optim.SGD(
            [group for group in groups if group["params"]],
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

        def decay(step: int) -> float:
            return max(0.0, 1 - step / self._steps) ** self.power if step else 1.0

        # LambdaLR rather than PolynomialLR, whose checkpoint would fix the number of steps: a run
        # continued with more epochs follows the longer schedule.
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fault = _misfit(checkpoint.get("state_dict"), self.state_dict())
        if fault:
            raise ValueError(f"checkpoint '{self.trainer.ckpt_path}' does not fit: {fault}")

    @torch.inference_mode(False)  # else a later fit could not update what a validation created
    def _reset_metrics(self) -> None:
        self.confusion.reset()
        self.pixel_loss.reset()

    def _evaluate(self, batch: tuple[Tensor, Tensor]) -> None:
        images, masks = batch
        logits = self(images)
        total, pixels = self._cross_entropy(logits, masks)
        self.pixel_loss.update(total / pixels.clamp(min=1), pixels)
        self.confusion.update(logits.argmax(1), masks)

    def _log_scores(self, stage: str) -> None:
        scores = segmentation_scores(self.confusion.compute())
        values = {f"{stage}/loss": self.pixel_loss.compute()}
        values |= {f"{stage}/{name}": scores[name] for name in ("mIoU", "fwIoU", "accuracy")}
        values |= {
            f"{stage}/IoU/{name}": iou
            for name, iou in zip(self.class_names, scores["IoU"], strict=True)
        }
        self.log_dict({name: value.float() for name, value in values.items()}, sync_dist=True)

    def _cross_entropy(self, logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over the pixels that count, and their number, both float32 scalars."""
        total = F.cross_entropy(logits.float(), masks, ignore_index=IGNORE_INDEX, reduction="sum")
        return total, (masks != IGNORE_INDEX).sum().float()

    def _checked(self, logits: Any, images: Tensor) -> Tensor:
        expected = (len(images), len(self.class_names), *images.shape[-2:])
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if got != expected:
            raise ValueError(
                f"network: expected {type(self.network).__name__} to return logits of shape "
                f"{expected} (batch, classes, height, width), got {got}"
            )
        return logits


def _mean_over_ranks(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def _parameter_groups(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters that take the backbone's learning rate, and the others."""
    if isinstance(network, SegmentationNetwork):
        return network.backbone_parameters(), network.head_parameters()
    backbone = getattr(network, "backbone", getattr(network, "encoder", None))
    inner = set(backbone.parameters()) if isinstance(backbone, nn.Module) else set()
    trainable = [p for p in network.parameters() if p.requires_grad]
    return [p for p in trainable if p in inner], [p for p in trainable if p not in inner]


def _misfit(given: Mapping[str, Tensor] | None, own: Mapping[str, Tensor]) -> str:
    """What keeps a checkpoint's tensors from being loaded, in a few words; empty if nothing."""
    if given is None:
        return "it holds no 'state_dict', so it was not written by a training run"
    faults = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "of another shape": [
            f"{key} {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in given and given[key].shape != own[key].shape
        ],
    }
    return "; ".join(
        f"{len(keys)} tensors {what} (first: {keys[0]})" for what, keys in faults.items() if keys
    )
