"""The training task: losses, metrics, learning rates, and what it refuses."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from quiet import one_step, quiet_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from mfnet import SegmentationNetwork
from mfnet.contexts import EncodingContext, MFContext
from mfnet.data.prediction import collate_one
from mfnet.decoder import DeepLabDecoder
from mfnet.inference import Inference
from mfnet.task import SegmentationTask

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


def test_mixed_precision() -> None:
    task = SegmentationTask(tiny_network(), CLASSES, reconstruction_warmup=0)
    fit = trainer(precision="bf16-mixed")
    fit.fit(task, batches(2, 2), batches(2, 2))
    assert fit.callback_metrics["train/loss"].isfinite()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in task.parameters())


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 4, 1)
        self.classifier = nn.Conv2d(4, len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(x))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_losses_are_not_summed_in_the_networks_precision(precision: Any) -> None:
    """In 16 bits a sum stops growing where a batch is below its last digit, or overflows."""
    task = SegmentationTask(Foreign(), CLASSES, backbone_lr=0, head_lr=0)
    loader = batches(30, 1, size=100)
    fit = trainer(precision=precision)
    fit.fit(task, loader, loader)
    with torch.no_grad():
        logits = torch.cat([task(images.to(task.dtype)).float() for images, _ in loader])
    masks = torch.cat([masks for _, masks in loader])
    hits = (logits.argmax(1) == masks)[masks != 255]
    expected = pytest.approx(float(F.cross_entropy(logits, masks, ignore_index=255)), rel=1e-5)
    assert float(fit.callback_metrics["val/loss"]) == expected
    assert float(fit.callback_metrics["train/loss"]) == expected
    assert float(fit.callback_metrics["val/accuracy"]) == pytest.approx(float(hits.float().mean()))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_prediction_in_the_networks_precision(precision: Any) -> None:
    """Of an image shown at another size, in windows: places in it are told in float32 as well."""
    image, original = (
        torch.randint(0, 256, size, dtype=torch.uint8) for size in ((3, 300, 20), (3, 600, 40))
    )
    loader = DataLoader([(image, original, "a.png")], collate_fn=collate_one)
    task = SegmentationTask(Foreign(), CLASSES)
    task.inference = Inference(tile=280)
    task.keep_probabilities = True
    predict = trainer(precision=precision).predict
    (inside,), (outside,) = predict(task, loader), trainer().predict(task.float(), loader)
    tolerance = {"rtol": 0.05, "atol": 0.02}  # of weights in bfloat16
    torch.testing.assert_close(inside.probabilities, outside.probabilities, **tolerance)


def test_any_module_trains_and_its_encoder_is_the_backbone() -> None:
    task = SegmentationTask(Foreign(), CLASSES)
    before = {name: p.clone() for name, p in task.named_parameters()}
    fit = trainer()
    fit.fit(task, batches(2, 2), batches(2, 2))
    assert all(not torch.equal(before[name], p) for name, p in task.named_parameters())
    backbone, head = (group["params"] for group in fit.optimizers[0].param_groups)
    assert {id(p) for p in backbone} == {id(p) for p in task.network.encoder.parameters()}
    assert {id(p) for p in head} == {id(p) for p in task.network.classifier.parameters()}


def test_scores_of_nothing_are_not_numbers() -> None:
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
        batch = next(iter(batches(2, 2)))
        loss, _, task = one_step(change(network), CLASSES, batch, reconstruction_warmup=0)
        loss.backward()
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
