"""Networks that return dictionaries or small logits, and our own auxiliary heads, in training."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import flags, predict
from quiet import one_step
from torch import Tensor, nn
from torchvision.models import WeightsEnum, mobilenet_v3_large
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.transforms.v2 import functional as tv

from mfnet import create_model
from mfnet.__main__ import main
from mfnet.flops import count_flops
from mfnet.normalization import IMAGENET
from mfnet.outputs import read_output
from mfnet.task import SegmentationTask

CLASSES = ["a", "b", "c"]
IMAGES = torch.randn(2, 3, 33, 37, generator=torch.Generator().manual_seed(0))
MASKS = torch.randint(0, 3, (2, 33, 37), generator=torch.Generator().manual_seed(0))
MASKS[:, :7] = 255


class Answers(nn.Module):
    """Logits in different ways."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.answer = answer
        self.backbone = nn.Conv2d(3, 4, 3, stride=4)
        self.head = nn.Conv2d(4, 3, 1)
        self.aux = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Any:
        features = self.backbone(x)
        logits = self.head(features)
        full = F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=False)
        return {
            "small": logits,
            "out": OrderedDict(out=full),
            "aux": {"out": full, "aux": self.aux(features)},
            "object": SimpleNamespace(logits=logits),
            "wrong aux": {"out": full, "aux": self.aux(features)[:, :2]},
            "too small": full[:, :, 0],
            "too large": full.repeat(1, 1, 2, 2),
            "channels": full[:, :2],
            "dict": {"seg": full},
        }[self.answer]


def step(network: nn.Module, **arguments: Any) -> tuple[Tensor, dict[str, float], SegmentationTask]:
    return one_step(network, CLASSES, (IMAGES, MASKS), **arguments)


def full_size(logits: Tensor) -> Tensor:
    return F.interpolate(logits, IMAGES.shape[-2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("answer", ["small", "out", "object", "aux"])
def test_every_kind_of_answer_trains_and_predicts(answer: str) -> None:
    network = Answers(answer)
    loss, logged, task = step(network)
    features = network.backbone(IMAGES)
    expected = full_size(network.head(features))
    ce = F.cross_entropy(expected, MASKS, ignore_index=255)
    torch.testing.assert_close(logged["train/ce"], ce.detach())
    if answer == "aux":
        own = F.cross_entropy(full_size(network.aux(features)), MASKS, ignore_index=255)
        torch.testing.assert_close(logged["train/auxiliary"], own.detach())
        ce = ce + 0.4 * own
    torch.testing.assert_close(loss, ce)
    torch.testing.assert_close(task(IMAGES), expected)
    task._evaluate((IMAGES, MASKS))
    assert task.confusion.compute().sum() == (MASKS != 255).sum()
    shown = torch.randint(0, 256, (1, 3, *IMAGES.shape[-2:]), dtype=torch.uint8)
    normalized = tv.normalize(shown / 255, *IMAGENET)
    labels = task.predict_step((shown, shown, ["x"]), 0).labels
    assert torch.equal(labels, task(normalized).argmax(1)[0].byte())


def test_the_weight_of_an_auxiliary_output() -> None:
    loss, logged, _ = step(Answers("aux"), auxiliary_weight=0.25)
    expected = logged["train/ce"] + 0.25 * logged["train/auxiliary"]
    torch.testing.assert_close(loss.detach(), expected)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("wrong aux", r"return auxiliary logits of shape \(2, 3, 33, 37\) .* got \(2, 2, 8, 9\)$"),
        ("too small", r"return logits of shape \(2, 3, 33, 37\) .*, got \(2, 3, 37\)$"),
        ("too large", r"return logits .*, got \(2, 3, 66, 74\)$"),
        ("channels", r"return logits .*, got \(2, 2, 33, 37\)$"),
        ("dict", "return logits .*, got dict with seg$"),
    ],
)
def test_what_is_wrong_is_named(answer: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"network: expected Answers to {message}"):
        step(Answers(answer))


def test_logits_at_full_size_stay_as_they_are() -> None:
    logits = torch.randn(2, 3, 33, 37)
    assert read_output(logits, IMAGES, 3, nn.Identity()) == (logits, None)


@pytest.mark.parametrize("name", ["mfnet", "emanet"])
def test_our_auxiliary_head(name: str) -> None:
    torch.manual_seed(0)
    network = create_model(name, num_classes=3, backbone="test_resnet", auxiliary_head=True)
    out = network(IMAGES)
    assert {key: logits.shape for key, logits in out.items()} == {
        key: (2, 3, 33, 37) for key in ("out", "aux")
    }
    output, _ = network(IMAGES, return_loss=True)
    assert set(output) == {"out", "aux"}
    head = network.auxiliary_head
    assert isinstance(head, FCNHead)
    assert (head[0].in_channels, head[0].out_channels, head[3].p) == (192, 48, 0.1)

    loss, logged, task = step(network, reconstruction_warmup=0)
    loss.backward()
    assert head[0].weight.grad.any()
    assert "train/auxiliary" in logged
    head_group = task.configure_optimizers()["optimizer"].param_groups[-1]["params"]
    assert {id(p) for p in head.parameters()} <= {id(p) for p in head_group}


def test_without_training_there_is_no_head() -> None:
    """Evaluation gives the same logits without it, and a checkpoint without one loads as before."""
    plain = create_model("mfnet", num_classes=3, backbone="test_resnet").eval()
    assert not [key for key in plain.state_dict() if "auxiliary" in key]
    network = create_model("mfnet", num_classes=3, backbone="test_resnet", auxiliary_head=True)
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith("auxiliary_head.") for key in missing)
    network.auxiliary_head.forward = None  # type: ignore[assignment, method-assign]
    with torch.no_grad():
        assert torch.equal(network.eval()(IMAGES), plain(IMAGES))


def small(root: Path, run: Path, *more: str) -> list[str]:
    once = ("--trainer.limit_train_batches=1", "--trainer.logger=false")
    return flags(root, run, *once, *more)


def test_torchvisions_network_by_class_path(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, fetched = mobilenet_v3_large(weights=None).state_dict(), []
    monkeypatch.setattr(
        WeightsEnum, "get_state_dict", lambda *_, **__: fetched.append(0) or weights
    )
    run = tmp_path / "run"
    path = "--model.network=torchvision.models.segmentation.deeplabv3_mobilenet_v3_large"
    main(["fit", *small(images, run, path, "--model.network.aux_loss=true")])
    assert len(fetched) == 1  # ImageNet's, torchvision's default: predict below needs no others
    assert "train/auxiliary" in (run / "metrics.csv").read_text()
    weights = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert len(weights["network.classifier.4.bias"]) == 5  # as many as the data's classes
    image = next((images / "JPEGImages").iterdir())
    predict(run, image, tmp_path / "seen")
    assert len(list((tmp_path / "seen").iterdir())) == len(fetched) == 1


def test_the_summary_is_of_the_network_that_predicts(images: Path, tmp_path: Path) -> None:
    more = ["--model.network.backbone=test_resnet", "--model.network.auxiliary_head=true"]
    main(["fit", *small(images, tmp_path, *more)])
    assert "auxiliary" in (tmp_path / "metrics.csv").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    plain = create_model("mfnet", num_classes=5, backbone="test_resnet")
    parameters = sum(p.numel() for p in plain.parameters())
    assert (summary["parameters"], summary["trainable_parameters"]) == (parameters, parameters)
    assert summary["gflops"] == count_flops(plain, (33, 33)) / 1e9
