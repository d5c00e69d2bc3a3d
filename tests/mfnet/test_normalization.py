"""Images are normalized as the network's weights want it, and a checkpoint says how."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from quiet import quiet_trainer
from torch import Tensor, nn

from mfnet import create_model
from mfnet.checkpoint import RECORD
from mfnet.data import Synthetic
from mfnet.normalization import IMAGENET, Normalization, normalization_of
from mfnet.task import SegmentationTask

HALF = Normalization((0.5,) * 3, (0.5,) * 3)


class Wants(nn.Module):
    """Logits of one convolution; its weights want a mean and standard deviation of one half."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.pretrained_cfg = HALF._asdict()
        self.conv = nn.Conv2d(3, classes, 1)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach().clone()
        return self.conv(x)


@pytest.fixture
def data(tmp_path: Path) -> Synthetic:
    arguments = {"train": 2, "val": 1, "size": 33, "crop_size": 33, "num_workers": 0}
    return Synthetic(cache_dir=str(tmp_path), batch_size=2, **arguments)


def trainer(folder: Path) -> L.Trainer:
    return quiet_trainer(default_root_dir=folder, enable_checkpointing=True)


def test_timm_says_what_the_weights_want() -> None:
    network = create_model("mfnet", num_classes=3, backbone="tf_efficientnet_lite0")
    assert normalization_of(network) == HALF
    assert normalization_of(nn.Sequential(network)) == HALF
    assert normalization_of(create_model("mfnet", backbone="resnet18")) == IMAGENET
    assert normalization_of(nn.Conv2d(3, 3, 1)) == IMAGENET


def test_training_validation_and_prediction_share_it(data: Synthetic, tmp_path: Path) -> None:
    task = SegmentationTask(Wants(data.num_classes), data.class_names)
    runner = trainer(tmp_path)
    runner.fit(task, datamodule=data)
    file = data.list_samples("val")[0].image
    data.predict_images = str(file)
    (_, originals, _), *_ = data.predict_dataloader()
    expected = (originals / 255 - 0.5) / 0.5
    runner.validate(task, datamodule=data, verbose=False)
    torch.testing.assert_close(task.network.seen, expected)
    task.network.seen = None
    runner.predict(task, datamodule=data)
    torch.testing.assert_close(task.network.seen, expected)
    assert task.network.seen.min() < -0.9  # with ImageNet's it would reach -2


def test_it_travels_in_the_checkpoint(data: Synthetic, tmp_path: Path) -> None:
    task = SegmentationTask(Wants(data.num_classes), data.class_names, image_std=(0.25,) * 3)
    runner = trainer(tmp_path)
    runner.fit(task, datamodule=data)
    runner.save_checkpoint(tmp_path / "run.ckpt")
    record = torch.load(tmp_path / "run.ckpt", weights_only=True)[RECORD]
    assert record["normalization"] == {"mean": [0.5] * 3, "std": [0.25] * 3}
    assert record["class_names"] == data.class_names
    assert record["palette"] == [list(color) for color in data.palette]

    plain = nn.Module()  # whose weights say nothing
    plain.conv = nn.Conv2d(3, data.num_classes, 1)
    plain.forward = plain.conv.forward
    other = SegmentationTask(plain, data.class_names)
    assert other.normalization == IMAGENET
    trainer(tmp_path).validate(
        other, datamodule=data, ckpt_path=tmp_path / "run.ckpt", verbose=False
    )
    assert other.normalization == Normalization((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    ("record", "given", "expected"),
    [
        ({}, None, IMAGENET),  # written before checkpoints told
        ({"normalization": {"mean": [0.1] * 3, "std": [1.0] * 3}}, None, ((0.1,) * 3, (1.0,) * 3)),
        ({}, (0.2,) * 3, ((0.2,) * 3, IMAGENET.std)),
    ],
)
def test_what_is_set_by_hand_comes_first_then_the_checkpoint(
    record: dict, given: tuple[float, float, float] | None, expected: Normalization
) -> None:
    task = SegmentationTask(Wants(2), ["a", "b"], image_mean=given)
    assert task.normalization == ((given or HALF.mean), HALF.std)
    task.on_load_checkpoint({"state_dict": task.state_dict(), RECORD: record})
    assert task.normalization == expected


def test_a_checkpoint_of_other_classes_is_refused() -> None:
    task = SegmentationTask(Wants(2), ["road", "sky"])
    task.trainer = SimpleNamespace(ckpt_path="best.ckpt")
    checkpoint = {"state_dict": task.state_dict(), RECORD: {"class_names": ["sky", "road"]}}
    with pytest.raises(ValueError, match="its classes are sky, road; those of the data are road"):
        task.on_load_checkpoint(checkpoint)
