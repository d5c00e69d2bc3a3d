"""Training and evaluating a segmentation network, as a LightningModule."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from mfnet import resume
from mfnet.data.prediction import Skipped
from mfnet.label_check import LabelCheck
from mfnet.models import forward_parameters, unwrapped
from mfnet.normalisation import IMAGENET, Normalisation, Numbers, normalisation_of
from mfnet.parameter_groups import Grouping, Groups, parameter_groups
from mfnet.scores import segmentation_scores
from mfops import collect_losses

IGNORE_INDEX = 255
RECORD = "mfnet"  # a checkpoint's entry
EPOCHS_DONE = "epochs_done"  # another, a fraction


class SegmentationTask(L.LightningModule):
    """Cross entropy, plus a network's own auxiliary loss, by SGD with polynomial decay.

    The loss is ``CE + reconstruction_weight * auxiliary``, the weight being 0 for the first
    ``reconstruction_warmup`` epochs. The auxiliary loss is what the network returns where its
    ``forward`` takes ``return_loss``, and the losses that ``FactorizedContext`` modules in it would
    inject, with this weight in place of their own (one of weight 0 stays without a loss). CE is
    the mean over the pixels that are not ignored (255) in the batches of all ranks together, so
    that n processes with batch b take the step of one process with batch n b; a batch without any
    such pixel has CE 0.

    Batches are ``(images (B, C, H, W), masks int64 (B, H, W))``. Per epoch, ``train/loss``,
    ``train/ce``, ``train/reconstruction`` (unweighted), ``lr-<group>`` (``backbone``, ``head``),
    ``val/loss`` (CE over all pixels of the set) and the scores of :func:`segmentation_scores`
    are logged: ``val/mIoU``, ``val/fwIoU``, ``val/accuracy``, ``val/IoU/<class>``.

    On resuming, the learning rates, momentum and weight decay given here win over the
    checkpoint's, and the decay goes on from the share of training that is done.

    Args:
        network: a :class:`mfnet.SegmentationNetwork` or any module that maps images to logits
            ``(B, classes, H, W)``; compiled, distributed or averaging wrappers of one too.
        class_names: the classes, in the order of the logits' channels.
        backbone_lr: learning rate of ``network.backbone_parameters()``; in another module, of
            its submodule ``backbone`` or ``encoder``.
        head_lr: learning rate of all other parameters.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay.
        power: the rates are multiplied by ``(1 - share) ** power`` at every step, ``share`` being
            that of the epochs (or of ``max_steps``, if those end first) that are done.
        parameter_groups: ``"two_rates"``, those above, or ``"published"``: as the code of MFNet's
            paper has them, :func:`mfnet.parameter_groups.published`.
        reconstruction_weight: weight of the auxiliary loss (the paper's lambda; EncNet's SE-loss
            has 0.2, without a warm-up).
        reconstruction_warmup: epochs trained without it.
        image_mean: mean of each channel that images are normalised with, in 0 to 1. ``None``: what
            timm's configuration says of the weights of the timm model inside the network,
            ImageNet's where there is none, and, where images are not of 3 channels, the mean of
            those three numbers in every channel; after a checkpoint was loaded, the checkpoint's.
        image_std: standard deviation, likewise.
        channels: C, those of the images; the data module's on the command line.

    Raises:
        ValueError: image_mean or image_std has another number of channels.

    Attributes:
        normalisation: the mean and standard deviation in effect. The data modules look here.
        confusion_counts: int64 (classes, classes), rows the truth, of the last validation or test,
            all ranks' together; ``None`` before.
        network_config: ``class_path`` and ``init_args`` that built the network, if known.

    A checkpoint's entry ``"mfnet"`` holds what a prediction needs beside the weights:
    ``class_names``, ``palette`` and ``resize`` of the trainer's data module, ``normalisation``, and
    ``network``, which is ``network_config``.
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
        parameter_groups: Grouping = "two_rates",
        reconstruction_weight: float = 0.1,
        reconstruction_warmup: int = 10,
        image_mean: Numbers | None = None,
        image_std: Numbers | None = None,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.network = network
        self.class_names = list(class_names)
        self.backbone_lr = backbone_lr
        self.head_lr = head_lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.power = power
        self.parameter_groups = parameter_groups
        self.reconstruction_weight = reconstruction_weight
        self.reconstruction_warmup = reconstruction_warmup
        for name, given in (("image_mean", image_mean), ("image_std", image_std)):
            if given is not None and len(given) != channels:
                raise ValueError(
                    f"{name}: expected {channels} numbers, one for each channel of the images, got "
                    f"{list(given)}"
                )
        self.channels = channels
        self._given = image_mean, image_std
        self.normalisation = self._unless_given(normalisation_of(network).for_channels(channels))
        self.network_config: dict[str, Any] | None = None
        self._seed = torch.initial_seed()
        self._resumed_at = Fraction(0)  # in epochs
        self._configured: resume.Settings | None = None
        # Labels were checked where they were read; validate_args would wait for the GPU.
        self.confusion = MulticlassConfusionMatrix(
            len(self.class_names), ignore_index=IGNORE_INDEX, validate_args=False
        )
        self.pixel_loss = MeanMetric()
        self.confusion_counts: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of images (B, C, H, W).

        Raises:
            ValueError: the network returns something else.
        """
        return self._checked(self.network(images), images)

    def configure_callbacks(self) -> list[L.Callback]:
        return [LabelCheck()]

    def setup(self, stage: str) -> None:  # before the callbacks' on_fit_start: they may train
        self._seed = torch.initial_seed()
        self._resumed_at = Fraction(0)  # a checkpoint, loaded next, tells otherwise
        self._configured = None

    def on_fit_start(self) -> None:
        # As configured: a checkpoint that is loaded next brings those of its own run.
        self._configured = resume.settings(self.trainer)

    def on_train_start(self) -> None:
        resume.continue_epoch(self.trainer)
        if self._configured is not None:  # a trial of BatchSizeFinder comes before
            resume.restore(self.trainer, self._configured)

    def on_train_epoch_start(self) -> None:
        optimizers = self.trainer.optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for index, group in enumerate(groups):
            self.log(f"lr-{group.get('name', index)}", group["lr"], sync_dist=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout draws from (seed, rank, epoch, batch) alone: a resumed run repeats exactly what
        # an uninterrupted one does.
        state = f"{self._seed} {self.global_rank} {self.current_epoch} {batch_idx}"
        torch.manual_seed(random.Random(state).getrandbits(63))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, masks = batch
        # Weighted by 0 rather than left out: parameters that only this loss reaches would else
        # have no gradient during the warm-up, which DistributedDataParallel does not accept.
        warming_up = self.current_epoch < self.reconstruction_warmup
        weight = 0.0 if warming_up else self.reconstruction_weight
        takes = forward_parameters(unwrapped(self.network))
        with collect_losses() as losses:
            if "return_loss" in takes:
                labels = {"masks": masks} if "masks" in takes else {}
                logits, own = self.network(images, return_loss=True, **labels)
                losses.append(own)
            else:
                logits = self.network(images)
        auxiliary = sum(losses) if losses else None
        total, pixels = self._cross_entropy(self._checked(logits, images), masks)
        ce = total / _mean_over_ranks(pixels).clamp(min=1)
        loss = ce
        if auxiliary is not None:
            loss = ce + weight * auxiliary

        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        per_epoch = {"train/loss": loss.detach(), "train/ce": ce.detach()}
        if auxiliary is not None:
            per_epoch["train/reconstruction"] = auxiliary.detach()
        self.log_dict(
            per_epoch, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images)
        )
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # Activation checkpoints call modules again, as they did at first.
        with collect_losses():
            super().backward(loss, *args, **kwargs)

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

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor | Skipped:
        """Logits of a batch ``(images, originals, paths)`` of one image."""
        if isinstance(batch, Skipped):
            return batch
        try:
            return self(batch[0])
        # What one image is too small or too large for is no reason to leave out the others.
        except (ValueError, RuntimeError) as error:
            return Skipped(batch[2][0], str(error))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(
            self._groups(), momentum=self.momentum, weight_decay=self.weight_decay
        )

        # LambdaLR rather than PolynomialLR, which counts steps: a run that goes on with more epochs
        # or with batches of another size is still at the share of training that it has reached.
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: self._decay())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        record = checkpoint.get(RECORD, {})
        # Before checkpoints told, ImageNet's was used for every network.
        stored = Normalisation(**record.get("normalisation", IMAGENET._asdict()))
        if len(stored.mean) != self.channels:
            raise ValueError(
                f"checkpoint '{self.trainer.ckpt_path}' does not fit: its images have "
                f"{len(stored.mean)} channels; those of the data have {self.channels} "
                "(--data.channels)"
            )
        own = self.state_dict()
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = _named_as(own, checkpoint["state_dict"])
        fault = _misfit(checkpoint.get("state_dict"), own) or self._misfit_of_groups(checkpoint)
        if fault:
            raise ValueError(f"checkpoint '{self.trainer.ckpt_path}' does not fit: {fault}")
        classes = record.get("class_names", self.class_names)
        if classes != self.class_names:
            raise ValueError(
                f"checkpoint '{self.trainer.ckpt_path}' does not fit: its classes are "
                f"{', '.join(classes)}; those of the data are {', '.join(self.class_names)}"
            )
        self.normalisation = self._unless_given(stored)
        self._resumed_at = Fraction(*checkpoint.get(EPOCHS_DONE, (0, 1)))
        resume.mark_finished_epoch(checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        resume.mark_unfinished_epoch(self.trainer, checkpoint)
        checkpoint[EPOCHS_DONE] = list(resume.epochs_done(self.trainer).as_integer_ratio())
        data = self.trainer.datamodule
        palette, resize = getattr(data, "palette", None), getattr(data, "resize", None)
        checkpoint[RECORD] = {
            "class_names": self.class_names,
            "palette": palette and [list(map(int, colour)) for colour in palette],
            "resize": resize and list(resize),
            "normalisation": {
                name: list(value) for name, value in self.normalisation._asdict().items()
            },
            "network": self.network_config,
        }

    def _groups(self) -> Groups:
        return parameter_groups(self.network, self.parameter_groups, self.backbone_lr, self.head_lr)

    def _misfit_of_groups(self, checkpoint: dict[str, Any]) -> str:
        """What keeps the state of this class's own optimizer from being loaded, if anything."""
        states = checkpoint.get("optimizer_states", [])
        stored = [group.get("name") for state in states for group in state["param_groups"]]
        own = [group["name"] for group in self._groups()]
        if not stored or None in stored or stored == own:
            return ""
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return ""  # the optimizer's state is not looked at
        return (
            f"its optimizer has the groups {', '.join(stored)}; with parameter_groups "
            f"'{self.parameter_groups}' they are {', '.join(own)}"
        )

    def _unless_given(self, normalisation: Normalisation) -> Normalisation:
        pairs = zip(self._given, normalisation, strict=True)
        return Normalisation(*(tuple(own if given is None else given) for given, own in pairs))

    def _decay(self) -> float:
        return (1 - resume.share_done(self.trainer, self._resumed_at)) ** self.power

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
        counts = self.confusion.compute()
        self.confusion_counts = counts.cpu()
        scores = segmentation_scores(counts)
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


def _named_as(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``given`` under the names that the network has for them, compiled or not.

    Bases had no method in their name before: ``bases``, now ``em_bases``.
    """
    names = {re.sub(r"\.[^.]+_bases$", ".bases", _uncompiled(key)): key for key in own}
    names |= {_uncompiled(key): key for key in own}
    return {names.get(_uncompiled(key), key): tensor for key, tensor in given.items()}


def _uncompiled(key: str) -> str:
    return key.replace("_orig_mod.", "")


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
