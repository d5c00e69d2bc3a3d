"""Training and evaluating a segmentation network, as a LightningModule."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any, Literal, Self

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from mfnet import losses, optimizers, resume
from mfnet.checkpoint import RECORD, read_checkpoint
from mfnet.constants import IGNORE_INDEX
from mfnet.data.prediction import Skipped
from mfnet.fine_tuning import Freeze, frozen_modules, initialize
from mfnet.inference import Inference, Prediction, like_images_of
from mfnet.label_check import LabelCheck
from mfnet.models import forward_parameters, unwrap
from mfnet.normalization import IMAGENET, Normalization, Numbers, normalization_of
from mfnet.outputs import lone_image_told, read_output
from mfnet.parameter_groups import Grouping, Groups, parameter_groups
from mfnet.pretrained import arguments_of, build
from mfnet.scores import segmentation_scores
from mfnet.state_dicts import match_names, mismatch
from mfops import collect_losses

EPOCHS_DONE = "epochs_done"  # an entry of a checkpoint, a fraction


class SegmentationTask(L.LightningModule):
    """Cross entropy, plus a network's own losses, by SGD with polynomial decay, unless told else.

    The loss is ``L(logits) + auxiliary_weight * L(auxiliary logits) + reconstruction_weight *
    reconstruction``, the last weight being 0 for the first ``reconstruction_warmup`` epochs. L is
    cross entropy (CE) or ``loss``. Auxiliary logits are a network's that returns them in training;
    see ``mfnet.outputs``. The reconstruction loss is what the network returns where its
    ``forward`` takes ``return_loss``, and the losses that ``FactorizedContext`` modules in it would
    inject, with this weight in place of their own (one of weight 0 stays without a loss). CE is
    the mean over the pixels that are not ignored (255) in the batches of all ranks together, so
    that n processes with batch b take the step of one process with batch n b; another loss is
    that of each rank's batch, and its gradients are averaged. A batch without any such pixel has
    L 0.

    Batches are ``(images (B, C, H, W), masks int64 (B, H, W))``. Per epoch, ``train/loss``,
    ``train/ce`` (with another loss ``train/<its class>``), ``train/auxiliary`` and
    ``train/reconstruction`` (unweighted), ``lr-<group>`` (``backbone``, ``head``), ``val/loss`` and
    the scores of ``segmentation_scores`` are logged: ``val/mIoU``, ``val/fwIoU``,
    ``val/accuracy``, ``val/IoU/<class>``. ``val/loss`` is L of the logits alone, without class
    weights, so that runs with other weights compare: CE over all pixels of the set; of another
    loss, the mean over the batches, weighted by their pixels that are not ignored.

    On resuming, the rates and other settings of optimizer and schedule given here win over the
    checkpoint's, and the polynomial decay goes on from the share of training that is done; a
    checkpoint of an optimizer or schedule of another class is refused.

    Args:
        network: a ``mfnet.SegmentationNetwork`` or any module that maps images to logits
            ``(B, classes, h, w)``, by themselves or as ``mfnet.outputs`` reads them; compiled,
            distributed or averaging wrappers of one too.
        class_names: the classes, in the order of the logits' channels.
        backbone_lr: learning rate of ``network.backbone_parameters()``; in another module, of
            its submodule ``backbone`` or ``encoder``.
        head_lr: learning rate of all other parameters.
        momentum: SGD's momentum; of the task's own SGD alone, as is the next.
        weight_decay: SGD's weight decay.
        power: the rates are multiplied by ``(1 - share) ** power`` at every step, ``share`` being
            that of the epochs (or of ``max_steps``, if those end first) that are done.
        parameter_groups: ``"two_rates"``, those above, or ``"published"``: as the code of MFNet's
            paper has them, ``mfnet.parameter_groups.published``.
        reconstruction_weight: weight of the reconstruction loss (the paper's lambda; EncNet's
            SE-loss has 0.2, without a warm-up).
        reconstruction_warmup: epochs trained without it.
        image_mean: mean of each channel that images are normalized with, in 0 to 1. ``None``: what
            timm's configuration says of the weights of the timm model inside the network,
            ImageNet's where there is none, and, where images are not of 3 channels, the mean of
            those three numbers in every channel; after a checkpoint was loaded, the checkpoint's.
        image_std: standard deviation, likewise.
        channels: C, those of the images; the data module's on the command line.
        lr_warmup: epochs, or a part of one, in which the rates are also multiplied by a factor that
            rises linearly from 0 to 1. The schedule of ``lr_scheduler`` has none.
        optimizer: makes another optimizer of parameter groups. Its rate is that of the head, and
            the backbone's keeps its ratio, ``backbone_lr / head_lr``, to it.
        lr_scheduler: makes the scheduler of an optimizer, in place of polynomial decay; it steps
            once an epoch.
        loss: a module called as ``loss(logits float32 (B, classes, H, W), masks)`` that returns a
            scalar and ignores 255: where one takes ``ignore_index`` and has its default, it is
            given 255. ``None``: ``mfnet.losses.CrossEntropy``.
        class_weights: a number for each class, for a loss that takes ``weight``; ``"auto"``:
            ``mfnet.losses.median_frequency`` of the training masks, counted before training.
        auxiliary_weight: weight of the loss of auxiliary logits.
        init_from: a trained network to start from, ``mfnet.fine_tuning.initialize``; read when
            training starts. On the command line not where it goes on from a checkpoint.
        freeze_backbone: whether the backbone stays as it is, parameters and statistics;
            ``"statistics"``: its BatchNorm statistics alone.

    Raises:
        ValueError: class weights do not fit the classes or the loss, a loss has parameters, a
            rate, ``power`` or a warm-up is below 0, a warm-up is given beside a scheduler,
            image_mean or image_std has another number of channels, image_std a number not above 0.

    Attributes:
        normalization: the mean and standard deviation in effect. The data modules look here.
        confusion_counts: int64 (classes, classes), rows the truth, of the last validation or test,
            all ranks' together; ``None`` before.
        network_config: ``class_path`` and ``init_args`` that built the network, if known: those of
            ``mfnet.create_model``'s, of a network on the command line or in a checkpoint that was
            loaded. Of others they are to be set, for ``mfnet.load`` to read the checkpoints.
        inference: how images are shown to the network in evaluation and prediction; a loss is then
            that of the averaged probabilities.
        keep_probabilities: whether predictions hold probabilities beside the classes.

    A checkpoint's entry ``"mfnet"`` holds what a prediction needs beside the weights:
    ``class_names``, ``palette`` and ``resize`` of the trainer's data module, ``normalization``, and
    ``network``, which is ``network_config``; ``optimizer``, the classes of optimizer and scheduler,
    unless a subclass configures them.
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
        lr_warmup: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        loss: nn.Module | None = None,
        class_weights: list[float] | Literal["auto"] | None = None,
        auxiliary_weight: float = 0.4,
        init_from: str | None = None,
        freeze_backbone: Freeze = False,
    ) -> None:
        super().__init__()
        for name, value in (("backbone_lr", backbone_lr), ("head_lr", head_lr), ("power", power)):
            if not value >= 0:
                raise ValueError(f"{name}: expected a number from 0 on, got {value}")
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
        self.channels = channels
        self._given = image_mean, image_std
        self.normalization = normalization_of(network).for_channels(channels).replaced(*self._given)
        self.lr_warmup = optimizers.check_warm_up(lr_warmup, lr_scheduler)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.loss = losses.prepare(losses.CrossEntropy() if loss is None else loss)
        self.class_weights = class_weights
        self.training_loss = self._weighted(class_weights)
        self.auxiliary_weight = auxiliary_weight
        self.init_from = init_from
        self.freeze_backbone = freeze_backbone
        self._keep_frozen()
        told = getattr(unwrap(network), "network_config", None)
        self.network_config: dict[str, Any] | None = told
        self.inference = Inference()
        self.keep_probabilities = False
        self._seed = torch.initial_seed()
        self._resumption = resume.Resumption()
        self._kinds: resume.Kinds | None = None  # of a subclass's own they are not known
        # Labels were checked where they were read; validate_args would wait for the GPU.
        self.confusion = MulticlassConfusionMatrix(
            len(self.class_names), ignore_index=IGNORE_INDEX, validate_args=False
        )
        self.pixel_loss = MeanMetric(nan_strategy=float("nan"))  # a NaN is to be seen
        self.confusion_counts: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of images (B, C, H, W).

        Raises:
            ValueError: the network returns something else.
        """
        return read_output(self.network(images), images, len(self.class_names), self.network)[0]

    def configure_callbacks(self) -> list[L.Callback]:
        # Here, as callbacks that average weights copy the network in their setup, the next hook.
        if self.init_from is not None and self.trainer.state.fn == TrainerFn.FITTING:
            normalization, names = self.normalization, self.class_names
            rank_zero_info(initialize(self.network, self.init_from, normalization, names))
            self.init_from = None  # a second fit goes on with what the first has trained
        return [LabelCheck()]

    def setup(self, stage: str) -> None:  # before the callbacks' on_fit_start: they may train
        self._seed = torch.initial_seed()
        self._resumption = resume.Resumption()  # a checkpoint, loaded next, tells otherwise
        if stage == "fit" and self.class_weights == "auto":
            data = getattr(self._data(), "train_set", None)
            self.training_loss = self._weighted(losses.balanced_class_weights(data).tolist())

    def on_fit_start(self) -> None:
        # As configured: a checkpoint that is loaded next brings those of its own run.
        self._resumption.configured = resume.settings(self.trainer)
        self._resumption.planned = resume.schedules(self.trainer)

    def on_train_start(self) -> None:
        resume.continue_epoch(self.trainer)
        resume.restore(self.trainer, self._resumption)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self._keep_frozen()
        return self

    def _keep_frozen(self) -> None:
        for module in frozen_modules(self.network, self.freeze_backbone):
            module.eval()

    def on_train_epoch_start(self) -> None:
        self._keep_frozen()  # synchronized BatchNorm has put modules of its own there
        optimizers = self.trainer.optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for index, group in enumerate(groups):
            self.log(f"lr-{group.get('name', index)}", group["lr"], sync_dist=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout draws from (seed, rank, epoch, batch) alone: a resumed run repeats exactly what
        # an uninterrupted one does.
        state = f"{self._seed} {self.global_rank} {self.current_epoch} {batch_idx}"
        torch.manual_seed(random.Random(state).getrandbits(63))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Lightning scores what a stop cuts short, but not what max_steps does.
        trial = self._resumption.configured is None  # of BatchSizeFinder, before on_fit_start
        if self.trainer.global_step == self.trainer.max_steps and not trial:
            self.trainer.should_stop = True

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, masks = batch
        # Weighted by 0 rather than left out: parameters that only this loss reaches would else
        # have no gradient during the warm-up, which DistributedDataParallel does not accept.
        warming_up = self.current_epoch < self.reconstruction_warmup
        weight = 0.0 if warming_up else self.reconstruction_weight
        takes = forward_parameters(unwrap(self.network))
        loader = self.trainer.train_dataloader
        with collect_losses() as collected, lone_image_told(images, self.network, loader):
            if "return_loss" in takes:
                labels = {"masks": masks} if "masks" in takes else {}
                output, own = self.network(images, return_loss=True, **labels)
                collected.append(own)
            else:
                output = self.network(images)
        logits, auxiliary = read_output(output, images, len(self.class_names), self.network)
        loss = losses.evaluate(self.training_loss, logits, masks)
        name = "ce" if isinstance(self.loss, losses.CrossEntropy) else type(self.loss).__name__
        per_epoch = {"train/loss": loss.detach(), f"train/{name}": loss.detach()}
        if auxiliary is not None:
            beside = losses.evaluate(self.training_loss, auxiliary, masks)
            per_epoch["train/auxiliary"] = beside.detach()
            loss = loss + self.auxiliary_weight * beside
        if collected:
            reconstruction: Any = sum(collected)
            per_epoch["train/reconstruction"] = reconstruction.detach()
            loss = loss + weight * reconstruction

        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        per_epoch["train/loss"] = loss.detach()
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

    def predict_step(self, batch: Any, batch_idx: int) -> Prediction | Skipped:
        """The classes of a batch ``(image, original, [path])``, at the original's size."""
        if isinstance(batch, Skipped):
            return batch
        (image,), (original,), (path,) = batch
        how = like_images_of(self), original.shape[-2:], self.keep_probabilities
        try:
            return self.inference.predict(self, image, self.normalization, *how)
        # What one image is too small or too large for is no reason to leave out the others.
        except (ValueError, RuntimeError) as error:
            return Skipped(path, str(error))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer: torch.optim.Optimizer
        if self.lr_scheduler is None and self.trainer.max_epochs == self.trainer.max_steps == -1:
            rank_zero_warn(
                "the learning rates do not decay, as polynomial decay needs to know the end: "
                "--trainer.max_epochs or --trainer.max_steps, with --trainer.max_time or alone"
            )
        if self.optimizer is None:
            optimizer = torch.optim.SGD(
                self._groups(), momentum=self.momentum, weight_decay=self.weight_decay
            )
        else:
            optimizer = optimizers.build_optimizer(self._groups(), self.optimizer, self.head_lr)
        every = self.trainer.check_val_every_n_epoch or 1
        config = optimizers.build_scheduler(optimizer, self.lr_scheduler, self._rate_factor, every)
        parts = (optimizer, config["lr_scheduler"]["scheduler"])
        self._kinds = [type(part).__name__ for part in parts]
        stored = self._resumption.stored_kinds
        if stored is not None and stored != self._kinds:
            raise ValueError(
                f"checkpoint '{self.trainer.ckpt_path}' does not fit: optimizer and schedule of "
                f"its run are {resume.describe(stored)}; --optimizer and --lr_scheduler give this "
                f"one {resume.describe(self._kinds)}"
            )
        return config

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Lightning's; network and class names are the checkpoint's where they are not given."""
        if not {"network", "class_names"} <= kwargs.keys():
            record = read_checkpoint(checkpoint_path).get(RECORD, {})
            told = arguments_of(record, checkpoint_path)
            kwargs.setdefault("class_names", told["class_names"])
            kwargs.setdefault("channels", len(told["normalization"]["mean"]))
            if "network" not in kwargs:
                task = cls.load_from_checkpoint(
                    checkpoint_path, *args, network=build(told["network"]), **kwargs
                )
                task.network_config = told["network"]
                return task
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        path = None if self._trainer is None else self._trainer.ckpt_path
        where = "the checkpoint" if path is None else f"checkpoint '{path}'"
        record = checkpoint.get(RECORD, {})
        # Before checkpoints told, ImageNet's was used for every network.
        stored = Normalization(**record.get("normalization", IMAGENET._asdict()))
        if len(stored.mean) != self.channels:
            raise ValueError(
                f"{where} does not fit: its images have "
                f"{len(stored.mean)} channels; those of the data have {self.channels} "
                "(--data.channels)"
            )
        own = self.state_dict()
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = match_names(own, checkpoint["state_dict"])
        fault = mismatch(checkpoint.get("state_dict"), own) or self._group_mismatch(checkpoint)
        if fault:
            raise ValueError(f"{where} does not fit: {fault}")
        classes = record.get("class_names", self.class_names)
        if classes != self.class_names:
            raise ValueError(
                f"{where} does not fit: its classes are "
                f"{', '.join(classes)}; those of the data are {', '.join(self.class_names)}"
            )
        self.normalization = stored.replaced(*self._given)
        self._resumption.resumed_at = Fraction(*checkpoint.get(EPOCHS_DONE, (0, 1)))
        self._resumption.stored_kinds = record.get(resume.KINDS)
        resume.mark_finished_epoch(checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        resume.mark_unfinished_epoch(self.trainer, checkpoint)
        checkpoint[EPOCHS_DONE] = list(resume.epochs_done(self.trainer).as_integer_ratio())
        data = self._data()
        palette, resize = getattr(data, "palette", None), getattr(data, "resize", None)
        checkpoint[RECORD] = {
            "class_names": self.class_names,
            "palette": palette and [list(map(int, color)) for color in palette],
            "resize": resize and list(resize),
            "normalization": {
                name: list(value) for name, value in self.normalization._asdict().items()
            },
            "network": self.network_config,
        }
        if self._kinds is not None:
            checkpoint[RECORD][resume.KINDS] = self._kinds

    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _groups(self) -> Groups:
        return parameter_groups(self.network, self.parameter_groups, self.backbone_lr, self.head_lr)

    def _group_mismatch(self, checkpoint: dict[str, Any]) -> str:
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

    def _rate_factor(self) -> float:
        start = self._resumption.resumed_at
        warmed_up = resume.fraction_warmed_up(self.trainer, start, self.lr_warmup)
        return warmed_up * (1 - resume.fraction_done(self.trainer, start)) ** self.power

    def _weighted(self, class_weights: list[float] | Literal["auto"] | None) -> nn.Module:
        if class_weights is None:
            return self.loss
        classes = len(self.class_names)
        if class_weights == "auto":  # until training begins, when the masks are counted
            class_weights = [1.0] * classes
        weights = losses.check_class_weights(class_weights, classes)
        return losses.with_class_weights(self.loss, weights.to(self.device))

    @torch.inference_mode(False)  # else a later fit could not update what a validation created
    def _reset_metrics(self) -> None:
        self.confusion.reset()
        self.pixel_loss.reset()
        self.pixel_loss.set_dtype(torch.float32)  # with bf16-true and 16-true, its sums were cast

    def _evaluate(self, batch: tuple[Tensor, Tensor]) -> None:
        images, masks = batch
        if self.inference.is_plain:
            logits = self(images)
        else:
            probabilities = self.inference.probabilities(self, images)
            logits = probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
        pixels = (masks != IGNORE_INDEX).sum().float()
        self.pixel_loss.update(losses.evaluate(self.loss, logits, masks), pixels)
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
