"""Another loss, class weights, another optimizer and schedule, from Python and by class path."""

from __future__ import annotations

import re
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import yaml
from command_line import CONV, Fails, flags
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ReduceLROnPlateau
from quiet import one_step, quiet_trainer
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import DataLoader

from mfnet.__main__ import main
from mfnet.cli import MFNetCLI
from mfnet.data.dataset import SegmentationDataset
from mfnet.data.voc import list_folder
from mfnet.losses import CrossEntropy, WeightedSum, balanced_class_weights, median_frequency
from mfnet.task import SegmentationTask

CLASSES = ["a", "b", "c"]
STEPS = 4  # of an epoch


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Watch(Callback):
    """The rates of each step."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    masks = torch.randint(0, len(CLASSES), (STEPS, 2, 5, 5), generator=generator)
    masks[:, :, ::2] = 255
    masks[0, 0] = 255  # batches of different numbers of pixels
    return [(torch.randn(2, 3, 5, 5, generator=generator), mask) for mask in masks]


def fit(
    ckpt: Path | None = None,
    epochs: int = 2,
    precision: Any = "32-true",
    validate_every: int = 1,
    **arguments: Any,
) -> tuple[SegmentationTask, list[list[float]]]:
    torch.manual_seed(0)
    module = SegmentationTask(Foreign(), CLASSES, **arguments)
    watch = Watch()
    trainer = quiet_trainer(
        max_epochs=epochs,
        callbacks=[watch],
        precision=precision,
        check_val_every_n_epoch=validate_every,
    )
    loader = DataLoader(batches(), batch_size=None)
    trainer.fit(module, loader, loader, ckpt_path=ckpt if ckpt and ckpt.is_file() else None)
    if ckpt:
        trainer.save_checkpoint(ckpt)
    return module, watch.rates


def parameters(task: SegmentationTask) -> list[Tensor]:
    return [p.detach() for p in task.network.parameters()]


def adamw(groups: Any, lr: float = 0.01, **arguments: Any) -> AdamW:
    return AdamW(groups, lr=lr, **arguments)


def test_the_optimizers_rate_is_the_heads_and_decays_by_step() -> None:
    task, rates = fit(optimizer=adamw)
    decay = [(1 - step / (2 * STEPS)) ** 0.9 for step in range(2 * STEPS)]
    torch.testing.assert_close(
        torch.tensor(rates), torch.tensor([[0.001 * d, 0.01 * d] for d in decay])
    )
    assert isinstance(task.trainer.optimizers[0], AdamW)


def test_sgd_by_class_is_the_default() -> None:
    def sgd(groups: Any) -> SGD:
        return SGD(groups, lr=0.07, momentum=0.9, weight_decay=5e-4)

    for own, given in zip(parameters(fit()[0]), parameters(fit(optimizer=sgd)[0]), strict=True):
        torch.testing.assert_close(own, given)


def test_a_scheduler_steps_once_an_epoch() -> None:
    rates = fit(epochs=3, optimizer=adamw, lr_scheduler=lambda o: StepLR(o, 1, gamma=0.5))[1]
    heads = [head for _, head in rates]
    assert heads == pytest.approx([0.01] * STEPS + [0.005] * STEPS + [0.0025] * STEPS)


def plateau(optimizer: Any, **arguments: Any) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(
        optimizer, "val/loss", mode="max", **{"factor": 0.5, "patience": 0, **arguments}
    )


def test_a_plateau_watches_its_metric_and_the_flags_win(tmp_path: Path) -> None:
    ckpt = tmp_path / "run.ckpt"
    first = fit(ckpt, 3, lr_scheduler=plateau, optimizer=adamw)[1]
    assert first[-1][1] == pytest.approx(0.005)  # val/loss falls, so that mode max sees a plateau
    seldom = fit(epochs=5, validate_every=2, lr_scheduler=plateau, optimizer=adamw)[1]
    assert seldom[-1][1] == pytest.approx(0.005)  # of two scores the second is no better
    second = fit(ckpt, 5, lr_scheduler=lambda o: plateau(o, factor=0.1),
                 optimizer=lambda groups: adamw(groups, lr=0.1))[1]  # fmt: skip
    assert second[0][1] == pytest.approx(0.025)
    assert second[-1][1] == pytest.approx(0.0025)


def test_warm_up_goes_on_where_it_was(tmp_path: Path) -> None:
    rates = fit(epochs=2, lr_warmup=1.5)[1]
    factors = [min(1, step / (1.5 * STEPS)) * (1 - step / 8) ** 0.9 for step in range(8)]
    assert [head for _, head in rates] == pytest.approx([0.07 * factor for factor in factors])
    ckpt = tmp_path / "run.ckpt"
    fit(ckpt, epochs=1, lr_warmup=1.5)
    resumed = fit(ckpt, epochs=2, lr_warmup=1.5)[1]
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(rates[STEPS:]))


def test_flags_win_over_the_checkpoint(tmp_path: Path) -> None:
    ckpt = tmp_path / "run.ckpt"
    cosine = CosineAnnealingLR
    fit(ckpt, 1, optimizer=adamw, lr_scheduler=lambda o: cosine(o, T_max=2))
    task, rates = fit(
        ckpt, 2, lr_scheduler=lambda o: cosine(o, T_max=20),
        optimizer=lambda groups: adamw(groups, lr=0.1, betas=(0.5, 0.6), weight_decay=0.2),
    )  # fmt: skip
    assert rates[0] == pytest.approx([0.005, 0.05])  # half of the new rate, by the old cosine
    (optimizer,) = task.trainer.optimizers
    assert {(group["betas"], group["weight_decay"]) for group in optimizer.param_groups} == {
        ((0.5, 0.6), 0.2)
    }
    assert task.trainer.lr_scheduler_configs[0].scheduler.T_max == 20
    assert all(state["step"] == 2 * STEPS for state in optimizer.state.values())


def cosine(optimizer: Any) -> CosineAnnealingLR:
    return CosineAnnealingLR(optimizer, T_max=2)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"optimizer": adamw}, "SGD and polynomial decay; .* give this one AdamW and poly"),
        ({"optimizer": adamw}, {}, "AdamW and polynomial decay; .* give this one SGD and poly"),
        (
            {"optimizer": adamw},
            {"optimizer": torch.optim.Adam},
            "AdamW and poly.*; .* this one Adam and poly",
        ),
        ({"lr_scheduler": cosine}, {}, "SGD and CosineAnnealingLR; .* SGD and polynomial decay"),
        ({}, {"lr_scheduler": cosine}, "SGD and polynomial decay; .* SGD and CosineAnnealingLR"),
    ],
)
def test_another_class_than_the_checkpoints_is_refused(
    before: dict[str, Any], after: dict[str, Any], message: str, tmp_path: Path
) -> None:
    ckpt = tmp_path / "run.ckpt"
    fit(ckpt, 1, **before)
    with pytest.raises(ValueError, match=f"does not fit: .*{message}"):
        fit(ckpt, 2, **after)


@pytest.mark.parametrize("name", ["default", "torch"])
def test_cross_entropy_is_the_default(name: str) -> None:
    """By another path too: torch's has no ignore_index of its own."""
    loss = {"default": CrossEntropy(), "torch": nn.CrossEntropyLoss()}[name]
    own, given = fit()[0], fit(loss=loss)[0]
    for one, other in zip(parameters(own), parameters(given), strict=True):
        torch.testing.assert_close(one, other)
    metrics = own.trainer.callback_metrics
    assert given.trainer.callback_metrics["val/loss"] == pytest.approx(float(metrics["val/loss"]))
    logits, masks = (torch.cat(part) for part in zip(*batches(), strict=True))
    with torch.no_grad():
        everywhere = F.cross_entropy(own(logits), masks, ignore_index=255)
    assert float(metrics["val/loss"]) == pytest.approx(float(everywhere))
    assert ("train/ce" in given.trainer.callback_metrics) == (name == "default")


def first_step(**arguments: Any) -> tuple[float, list[Tensor]]:
    """Loss and gradients of the first batch."""
    torch.manual_seed(0)
    loss, _, task = one_step(Foreign(), CLASSES, batches()[0], **arguments)
    loss.backward()
    return float(loss.detach()), [p.grad for p in task.network.parameters()]


def by_hand(loss: Any) -> tuple[float, list[Tensor]]:
    torch.manual_seed(0)
    network = Foreign()
    images, masks = batches()[0]
    value = loss(network(images), masks)
    value.backward()
    return float(value.detach()), [p.grad for p in network.parameters()]


def dice(**arguments: Any) -> nn.Module:
    return smp.losses.DiceLoss("multiclass", **arguments)


def sum_by_hand(logits: Tensor, masks: Tensor) -> Tensor:
    dice_ = dice(ignore_index=255)(logits, masks)
    return 2 * F.cross_entropy(logits, masks, ignore_index=255) + 0.5 * dice_


WEIGHTS = [1.0, 0.25, 4.0]
WEIGHTED = nn.CrossEntropyLoss(torch.tensor(WEIGHTS), ignore_index=255)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"loss": dice()}, dice(ignore_index=255)),
        ({"loss": dice(ignore_index=1)}, None),
        ({"loss": WeightedSum([CrossEntropy(), dice()], [2.0, 0.5])}, sum_by_hand),
        ({"class_weights": WEIGHTS}, WEIGHTED),
        ({"class_weights": WEIGHTS, "loss": nn.CrossEntropyLoss()}, WEIGHTED),
        ({"class_weights": WEIGHTS, "loss": WeightedSum([CrossEntropy()], [1.0])}, WEIGHTED),
    ],
)
def test_loss_and_gradients_are_those_by_hand(arguments: dict[str, Any], expected: Any) -> None:
    if expected is None:  # the user's own ignore_index stays, and 255 is no class
        with pytest.raises(ValueError, match="loss: expected DiceLoss to take logits"):
            first_step(**arguments)
        return
    for given, own in zip(first_step(**arguments), by_hand(expected), strict=True):
        torch.testing.assert_close(given, own)


def test_no_label_no_loss_whatever_the_loss() -> None:
    nothing = torch.randn(2, 3, 5, 5), torch.full((2, 5, 5), 255)
    loss, _, task = one_step(Foreign(), CLASSES, nothing, loss=nn.CrossEntropyLoss())
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in task.network.parameters())


@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss()])
def test_class_weights_in_low_precision(loss: nn.Module | None) -> None:
    task, _ = fit(epochs=1, class_weights=WEIGHTS, loss=loss, precision="bf16-true")
    assert all(p.isfinite().all() for p in parameters(task))


def test_val_loss_has_no_class_weights_and_checkpoints_no_loss(tmp_path: Path) -> None:
    ckpt = tmp_path / "run.ckpt"
    task = fit(ckpt, class_weights=WEIGHTS)[0]
    logits, masks = (torch.cat(part) for part in zip(*batches(), strict=True))
    with torch.no_grad():
        expected = F.cross_entropy(task(logits), masks, ignore_index=255)
    assert float(task.trainer.callback_metrics["val/loss"]) == pytest.approx(float(expected))
    loss = nn.CrossEntropyLoss(torch.tensor(WEIGHTS))
    stored = torch.load(ckpt, weights_only=True)["state_dict"]
    assert list(SegmentationTask(Foreign(), CLASSES, loss=loss).state_dict()) == list(stored)
    assert all(key.startswith("network.") for key in stored)


def test_median_frequency() -> None:
    masks = [np.array([[0, 0, 0, 1]], np.uint8), np.array([[2, 255, 0, 255]], np.uint8)]
    # 0: 4 of 6, 1: 1 of the 4 in its image, 2: 1 of the 2 that are labeled; the median is 1/2.
    expected = torch.tensor([0.75, 2.0, 1.0, 0.0])
    torch.testing.assert_close(median_frequency(masks, 4), expected)


def small(root: Path, run: Path, *more: str) -> list[str]:
    return flags(root, run, "--trainer.logger=false", *CONV, *more)


SUM = {
    "class_path": "mfnet.losses.WeightedSum",
    "init_args": {
        "losses": [
            {"class_path": "torch.nn.CrossEntropyLoss"},
            {
                "class_path": "segmentation_models_pytorch.losses.DiceLoss",
                "init_args": {"mode": "multiclass"},
            },
        ],
        "weights": [1.0, 0.5],
    },
}


def test_by_class_path_and_again(images: Path, tmp_path: Path) -> None:
    sums = tmp_path / "sum.yaml"
    sums.write_text(yaml.safe_dump({"model": {"loss": SUM, "class_weights": "auto"}}))
    more = [
        f"--config={sums}", "--optimizer=torch.optim.AdamW", "--optimizer.lr=1e-4",
        "--optimizer.weight_decay=0.02",
        "--lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR", "--lr_scheduler.T_max=10",
    ]  # fmt: skip
    run = tmp_path / "run"
    main(["fit", *small(images, run, *more)])
    again = ["--ckpt_path=last", "--trainer.max_epochs=2", "--optimizer.lr=1e-3"]
    main(["fit", *small(images, run, *more, *again)])
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["mfnet"]["optimizer"] == ["AdamW", "CosineAnnealingLR"]
    (state,) = checkpoint["optimizer_states"]
    groups = [(g["name"], g["initial_lr"], g["weight_decay"]) for g in state["param_groups"]]
    assert groups == [("head", 1e-3, 0.02)]
    assert all(value["step"] == 4 for value in state["state"].values())
    main(["validate", f"--config={run}/config.yaml", "--ckpt_path=best"])


def test_auto_counts_the_training_masks(images: Path, tmp_path: Path) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a mask is not transformed to be counted")

    dataset = SegmentationDataset(list_folder(images, "train"), 5, never)
    weights = balanced_class_weights(dataset)
    seen: list[Tensor] = []

    class Recorded(SegmentationTask):
        def on_train_start(self) -> None:
            super().on_train_start()
            seen.append(self.training_loss.weight)

    arguments = small(images, tmp_path, "--model.class_weights=auto", "--trainer.fast_dev_run=true")
    MFNetCLI(["fit", *arguments], model_class=Recorded)
    torch.testing.assert_close(seen, [weights])
    assert weights.median() == pytest.approx(1)


class Rates(SegmentationTask):
    """A task of one's own, with an argument and an optimizer of its own."""

    def __init__(self, network: nn.Module, class_names: list[str], rate: float = 0.1) -> None:
        super().__init__(network, class_names)
        self.rate = rate

    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(self.network.parameters(), lr=self.rate)


class KeepsArguments(SegmentationTask):
    def __init__(self, *args: Any, rate: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rate = rate

    configure_optimizers = Rates.configure_optimizers


@pytest.mark.parametrize("kind", [Rates, KeepsArguments])
def test_a_task_of_ones_own(kind: type, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("--model.rate=0.3",)
    cli = MFNetCLI(["fit", *small(images, run, *more)], model_class=kind)
    assert type(cli.model) is kind
    again = ["--ckpt_path=last", "--trainer.max_epochs=2", "--model.rate=0.2"]
    cli = MFNetCLI(["fit", *small(images, run, *again)], model_class=kind)
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is torch.optim.Adagrad
    assert optimizer.param_groups[0]["lr"] == 0.2
    if kind is KeepsArguments:
        arguments = small(images, tmp_path / "other", "--optimizer=AdamW")
        with pytest.raises(ArgumentError, match="--optimizer: expected none, as KeepsArguments"):
            MFNetCLI(["fit", *arguments], model_class=kind)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optimizer=AdmW"], "--optimizer: no class 'AdmW'"),
        (["--optimizer=AdamW", "--optimizer.lr=fast"], "--optimizer.lr: expected float, got fast"),
        (["--optimizer=AdamW", "--optimizer.lrr=1"], "--optimizer.lrr: did you mean --optimizer."),
        (["--optimizer=AdamW", "--optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
        (["--optimizer=AdamW", "--model.head_lr=0"], "head_lr: expected a rate above 0"),
        (["--lr_scheduler=ReduceLROnPlateau"], "--lr_scheduler.monitor is missing"),
        (
            ["--lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau"],
            "lr_scheduler: expected lightning.pytorch.cli.ReduceLROnPlateau",
        ),
        (["--model.lr_warmup=-1"], "lr_warmup: expected at least 0"),
        (["--model.loss=DiceLos"], "--model.loss: no class 'DiceLos'"),
        (["--model.loss=torch.nn.Linear", "--model.loss.in_features=1",
          "--model.loss.out_features=1"], "loss: expected a module without parameters"),
        (["--model.loss=segmentation_models_pytorch.losses.DiceLoss", "--model.loss.mode=all"],
         "losses.DiceLoss: it refuses"),
        (["--model.loss=torch.nn.MultiMarginLoss", "--model.loss.p=1"],
         "loss: expected MultiMarginLoss to take logits"),
        (["--model.loss=torch.nn.CrossEntropyLoss", "--model.loss.reduction=none"],
         "loss: expected CrossEntropyLoss to return a scalar tensor, got \\(2, 33, 33\\)"),
        (["--model.class_weights=[1,2]"], "class_weights: expected 'auto' or 5 numbers"),
        (["--model.class_weights=none"], "--model.class_weights: expected list or 'auto'"),
        (["--model.loss=torch.nn.GaussianNLLLoss", "--model.class_weights=auto"],
         "class_weights: expected a loss that takes weight, .*, got GaussianNLLLoss"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line(
    more: list[str],
    message: str,
    images: Path,
    tmp_path: Path,
    fails: Fails,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["fit", *small(images, tmp_path, "--trainer.fast_dev_run=true", *more)]
    assert re.search(message, fails(command))
