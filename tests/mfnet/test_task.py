"""The training task: losses, metrics, learning rates, and what it refuses."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from mfnet import SegmentationNetwork, create_model
from mfnet.contexts import EncodingContext, MFContext
from mfnet.decoder import DeepLabDecoder
from mfnet.task import SegmentationTask, segmentation_scores

CLASSES = ["sky", "road", "car"]


class TinyBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.high = nn.Conv2d(8, 8, 3, stride=4, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low(x)
        return low, self.high(low)


def tiny_network(factorizer: str = "learned") -> SegmentationNetwork:
    context = MFContext(8, 8, rank=2, context_size=(3, 3), factorizer=factorizer)
    return SegmentationNetwork(TinyBackbone(), context, DeepLabDecoder(8, 8, len(CLASSES)))


def batches(count: int, batch_size: int, size: int = 33) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, size, size, generator=generator)
    masks = torch.randint(0, len(CLASSES), (count, size, size), generator=generator)
    masks[:, ::5] = 255
    return DataLoader(TensorDataset(images, masks), batch_size)


def trainer(**options: object) -> L.Trainer:
    return quiet_trainer(num_sanity_val_steps=0, **options)


def labels(seed: int, classes: int) -> Tensor:
    return torch.randint(0, classes, (4, 9, 7), generator=torch.Generator().manual_seed(seed))


def test_scores_are_those_of_torchmetrics() -> None:
    truth, predicted = labels(0, 4), labels(1, 4)
    truth[:, 2] = 255
    seen = truth != 255
    confusion = torch.zeros(4, 4)
    confusion.index_put_((truth[seen], predicted[seen]), torch.ones(()), accumulate=True)

    scores = segmentation_scores(confusion)

    for name, average in (("IoU", "none"), ("mIoU", "macro"), ("fwIoU", "weighted")):
        metric = MulticlassJaccardIndex(4, average=average, ignore_index=255)
        torch.testing.assert_close(scores[name].float(), metric(predicted, truth))
    accuracy = MulticlassAccuracy(4, average="micro", ignore_index=255)
    torch.testing.assert_close(scores["accuracy"].float(), accuracy(predicted, truth))


def test_scores_leave_absent_classes_out() -> None:
    # Class 2 occurs nowhere, class 3 only in the predictions.
    confusion = torch.tensor([[6, 2, 0, 0], [0, 9, 0, 3], [0, 0, 0, 0], [0, 0, 0, 0]])

    scores = segmentation_scores(confusion)

    iou = [6 / 8, 9 / 14, float("nan"), 0.0]
    torch.testing.assert_close(scores["IoU"], torch.tensor(iou).double(), equal_nan=True)
    assert scores["mIoU"].item() == pytest.approx((iou[0] + iou[1] + iou[3]) / 3)
    assert scores["fwIoU"].item() == pytest.approx((8 * iou[0] + 12 * iou[1]) / 20)
    assert scores["accuracy"].item() == pytest.approx(15 / 20)


def test_validation_does_not_depend_on_the_batches() -> None:
    task = SegmentationTask(tiny_network(), CLASSES)
    results = [trainer().validate(task, batches(5, size), verbose=False)[0] for size in (1, 2, 5)]
    assert set(results[0]) == {
        "val/loss", "val/mIoU", "val/fwIoU", "val/accuracy",
        "val/IoU/sky", "val/IoU/road", "val/IoU/car",
    }  # fmt: skip
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-5)


def test_reconstruction_loss_counts_after_the_warm_up() -> None:
    class Record(Callback):
        def __init__(self) -> None:
            self.epochs: list[dict[str, float]] = []

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.epochs.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    record = Record()
    task = SegmentationTask(
        tiny_network(), CLASSES, reconstruction_weight=0.25, reconstruction_warmup=1
    )
    trainer(max_epochs=2, callbacks=[record]).fit(task, batches(2, 2))

    first, second = record.epochs
    assert first["train/reconstruction"] > 0.1
    assert first["train/loss"] == pytest.approx(first["train/ce"])
    assert second["train/loss"] == pytest.approx(
        second["train/ce"] + 0.25 * second["train/reconstruction"]
    )


def test_a_loss_that_needs_masks_gets_them_and_no_parameter_waits_for_the_warm_up() -> None:
    class Gradients(Callback):
        def __init__(self) -> None:
            self.epochs: list[Tensor] = []

        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            # As DistributedDataParallel would wait for them.
            assert all(p.grad is not None for p in pl_module.parameters())
            self.epochs.append(pl_module.network.context.classify.weight.grad.clone())

    context = EncodingContext(8, 8, num_classes=len(CLASSES), codewords=3)
    network = SegmentationNetwork(TinyBackbone(), context, DeepLabDecoder(8, 8, len(CLASSES)))
    gradients = Gradients()
    fit = trainer(max_epochs=2, callbacks=[gradients])
    fit.fit(SegmentationTask(network, CLASSES, reconstruction_warmup=1), batches(2, 2))

    first, second = gradients.epochs
    assert not first.any()
    assert second.any()
    # Not yet learned: about log 2 for each class, all of which occur in every mask.
    assert fit.callback_metrics["train/reconstruction"] == pytest.approx(0.69, abs=0.4)


def test_a_batch_without_labels_gives_no_nan() -> None:
    images = torch.randn(2, 3, 33, 33)
    masks = torch.full((2, 33, 33), 255)
    task = SegmentationTask(tiny_network(), CLASSES)
    fit = trainer()
    fit.fit(task, DataLoader(TensorDataset(images, masks), 2))
    assert fit.callback_metrics["train/ce"] == 0
    assert all(parameter.isfinite().all() for parameter in task.parameters())


def test_learning_rates_decay_by_step() -> None:
    class Rates(Callback):
        def __init__(self) -> None:
            self.seen: list[list[float]] = []

        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    rates = Rates()
    task = SegmentationTask(tiny_network(), CLASSES, backbone_lr=0.01, head_lr=0.1)
    fit = trainer(max_epochs=2, callbacks=[rates])
    fit.fit(task, batches(3, 1))

    decay = [(1 - step / 6) ** 0.9 for step in range(6)]
    expected = torch.tensor([[0.01 * d, 0.1 * d] for d in decay])
    torch.testing.assert_close(torch.tensor(rates.seen), expected)
    grouped = [p for group in fit.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in task.network.parameters()}
    assert len(grouped) == len(list(task.network.parameters()))


def test_gradient_accumulation_counts_in_the_schedule() -> None:
    task = SegmentationTask(tiny_network(), CLASSES)
    fit = trainer(accumulate_grad_batches=2, max_epochs=2)
    fit.fit(task, batches(4, 1))
    assert fit.global_step == 4
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)


@pytest.mark.parametrize("name", ["mfnet", "deeplabv3plus", "emanet"])
def test_a_last_batch_of_one_trains(name: str) -> None:
    network = create_model(name, num_classes=len(CLASSES), backbone="resnet18")
    task = SegmentationTask(network, CLASSES)
    fit = trainer(limit_train_batches=2)
    fit.fit(task, batches(3, 2))
    assert fit.global_step == 2
    assert all(parameter.isfinite().all() for parameter in task.parameters())


def test_mixed_precision() -> None:
    task = SegmentationTask(tiny_network(), CLASSES, reconstruction_warmup=0)
    fit = trainer(precision="bf16-mixed")
    fit.fit(task, batches(2, 2), batches(2, 2))
    assert fit.callback_metrics["train/loss"].isfinite()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in task.parameters())


class Foreign(nn.Module):
    """Any module that returns something: logits, if all is well."""

    def __init__(self, answer: str = "logits") -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 4, 1)
        self.classifier = nn.Conv2d(4, len(CLASSES) + (answer == "channels"), 1)
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        logits = self.classifier(self.encoder(x))
        if self.answer == "large":
            return logits.repeat(1, 1, 2, 2)
        return {"seg": logits} if self.answer == "dict" else logits


def test_any_module_trains_and_its_encoder_is_the_backbone() -> None:
    task = SegmentationTask(Foreign(), CLASSES)
    before = {name: p.clone() for name, p in task.named_parameters()}
    fit = trainer()
    fit.fit(task, batches(2, 2), batches(2, 2))
    assert all(not torch.equal(before[name], p) for name, p in task.named_parameters())
    backbone, head = (group["params"] for group in fit.optimizers[0].param_groups)
    assert {id(p) for p in backbone} == {id(p) for p in task.network.encoder.parameters()}
    assert {id(p) for p in head} == {id(p) for p in task.network.classifier.parameters()}


@pytest.mark.parametrize(
    ("answer", "got"),
    [("channels", r"\(2, 4, 33, 33\)"), ("large", r"\(2, 3, 66, 66\)"), ("dict", "dict with seg")],
)
def test_what_is_not_logits_is_refused(answer: str, got: str) -> None:
    task = SegmentationTask(Foreign(answer), CLASSES)
    expected = rf"network: expected Foreign .* \(2, 3, 33, 33\) .*, got {got}$"
    with pytest.raises(ValueError, match=expected):
        trainer().fit(task, batches(2, 2))


def test_scores_of_nothing_are_not_numbers() -> None:
    scores = segmentation_scores(torch.zeros(3, 3))
    assert all(score.isnan().all() for score in scores.values())
    data = [(torch.zeros(1, 3, 33, 33), torch.full((1, 33, 33), 255))]
    loader = DataLoader(data, batch_size=None)
    task = SegmentationTask(tiny_network(), CLASSES)
    (results,) = trainer().validate(task, loader, verbose=False)
    assert all(value != value for value in results.values()), results


class PassesOn(nn.Module):
    """As DistributedDataParallel and AveragedModel do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


WRAPPERS = {
    "compiled": lambda network: torch.compile(network, backend="eager"),
    "passed on": PassesOn,
    "averaged": lambda network: torch.optim.swa_utils.AveragedModel(network),
    "compiled inside": lambda network: PassesOn(torch.compile(network, backend="eager")),
}


def compiled_context(network: SegmentationNetwork) -> SegmentationNetwork:
    network.context = torch.compile(network.context, backend="eager")
    return network


@pytest.mark.parametrize("wrap", [*WRAPPERS.values(), compiled_context], ids=[*WRAPPERS, "context"])
def test_a_wrapped_network_trains_with_the_same_loss(wrap: object) -> None:
    gradients = []
    for change in (lambda network: network, wrap):
        torch.manual_seed(0)
        network = tiny_network().eval()  # dropout would draw other numbers
        task = SegmentationTask(change(network), CLASSES, reconstruction_warmup=0)
        task.trainer = trainer()
        task.log = task.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
        task.training_step(next(iter(batches(2, 2))), 0).backward()
        gradients.append({p: p.grad for p in task.network.parameters()})
        (optimizer,) = [task.configure_optimizers()["optimizer"]]
        assert [len(group["params"]) for group in optimizer.param_groups] == [4, 18]
    for plain, wrapped in zip(gradients[0].values(), gradients[1].values(), strict=True):
        torch.testing.assert_close(plain, wrapped)


def test_compiled_and_plain_load_each_others_checkpoints() -> None:
    plain = SegmentationTask(tiny_network(), CLASSES)
    compiled = SegmentationTask(torch.compile(tiny_network()), CLASSES)
    for giver, taker in ((plain, compiled), (compiled, plain)):
        checkpoint = {"state_dict": giver.state_dict()}
        taker.on_load_checkpoint(checkpoint)
        taker.load_state_dict(checkpoint["state_dict"])


def test_bases_without_the_name_of_their_method_load_and_those_of_another_do_not() -> None:
    """A checkpoint of the version before names them "bases" whatever the method."""
    em, nmf = (SegmentationTask(tiny_network(method), CLASSES) for method in ("em", "nmf"))
    of_em = {"state_dict": em.state_dict()}
    nmf.trainer = trainer()
    with pytest.raises(ValueError, match=r"does not fit: .*nmf_bases\).*em_bases\)"):
        nmf.on_load_checkpoint(of_em)
    before = {k.replace("em_bases", "bases"): t for k, t in em.state_dict().items()}
    checkpoint = {"state_dict": before}
    em.on_load_checkpoint(checkpoint)
    em.load_state_dict(checkpoint["state_dict"])
