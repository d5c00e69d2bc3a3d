"""Folders of weights, and the names of those in the package, wherever a trained network goes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import CPU, Fails
from PIL import Image
from torch import nn

import mfnet
from mfnet import checkpoint
from mfnet.__main__ import main
from mfnet.data import synthetic
from mfnet.fine_tuning import initialize
from mfnet.normalization import IMAGENET
from mfnet.pretrained import TrainedNetwork
from mfnet.scores import write_class_scores


def save(folder: Path, seed: int = 0) -> TrainedNetwork:
    """A network as small as they come, of the synthetic data's classes."""
    torch.manual_seed(seed)
    arguments = {"in_channels": 3, "out_channels": len(synthetic.CLASSES), "kernel_size": 1}
    network = TrainedNetwork(
        network={"class_path": "torch.nn.Conv2d", "init_args": arguments},
        class_names=list(synthetic.CLASSES),
        normalization={"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
        resize=[20, 24],
    )
    network.save_pretrained(folder)
    return network


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainedNetwork:
    """The one network in the package, ``tiny``; ``shipped/tiny`` is its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "shipped")
    return save(tmp_path / "shipped" / "tiny")


@pytest.mark.parametrize("source", ["tiny", "shipped/tiny"])
def test_predict(source: str, network: TrainedNetwork, images: Path) -> None:
    photo = images / "JPEGImages" / "val_00000.jpg"
    expected = network.predict(photo)
    assert expected.shape == (33, 33)
    assert len(expected.unique()) > 1
    assert torch.equal(mfnet.load(source).predict(photo), expected)
    flags = [f"--data.predict_images={photo}", "--overlays.kinds=[mask]", *CPU]
    main(["predict", "--ckpt_path", source, *flags])
    with Image.open("predictions/val_00000.png") as mask:
        assert np.array_equal(np.array(mask), expected.numpy())


@pytest.mark.parametrize("source", ["tiny", "shipped/tiny"])
def test_validate_and_test(source: str, network: TrainedNetwork, images: Path) -> None:
    """The scores are those of what Python predicts, and nothing is written beside the weights."""
    before = sorted(Path("shipped").rglob("*"))
    Path("data").mkdir()
    for part in ("JPEGImages", "SegmentationClass", "classes.txt"):
        Path("data", part).symlink_to(images / part)
    lists = Path("data", "ImageSets", "Segmentation")
    lists.mkdir(parents=True)
    network.resize = None
    predicted = network.predict("data/JPEGImages/val_00000.jpg").long()
    with Image.open("data/SegmentationClass/val_00000.png") as mask:
        truth = torch.from_numpy(np.array(mask)).long()
    pairs = (truth * len(synthetic.CLASSES) + predicted)[truth != 255]
    counts = torch.bincount(pairs, minlength=len(synthetic.CLASSES) ** 2)
    expected = Path("expected.csv")
    write_class_scores(counts.view(len(synthetic.CLASSES), -1), synthetic.CLASSES, expected)
    flags = ["--data=VOCFolder", "--data.root=data", "--data.resize=null", *CPU]
    flags += ["--trainer.default_root_dir=run"]
    for command, split in (("validate", "val"), ("test", "test")):
        (lists / f"{split}.txt").write_text("val_00000\n")
        main([command, "--ckpt_path", source, *flags])
        assert Path("run", f"scores-{split}.csv").read_text() == expected.read_text()
    assert sorted(Path("shipped").rglob("*")) == before


def test_export(network: TrainedNetwork) -> None:
    main(["export", "tiny", "--to", "weights"])
    exported = mfnet.load("weights")
    assert exported.class_names == network.class_names
    assert torch.equal(exported.network.weight, network.network.weight)


def test_weights_leave_what_somebody_wrote_beside_them(
    network: TrainedNetwork, fails: Fails
) -> None:
    Path("mine").mkdir()
    Path("mine", "README.md").write_text("of my project")
    main(["export", "tiny", "--to", "weights", "--output", "mine"])
    assert Path("mine", "README.md").read_text() == "of my project"
    Path("run").mkdir()
    Path("run", "metrics.csv").write_text("epoch\n")
    line = fails(["export", "tiny", "--to", "weights", "--output", "run"])
    assert "run: expected a folder of the weights' own, but it holds a run" in line


def test_training_starts_from_a_name(network: TrainedNetwork, images: Path, fails: Fails) -> None:
    fresh = nn.Conv2d(3, len(synthetic.CLASSES), 1)
    assert (
        initialize(fresh, "tiny", network.normalization, synthetic.CLASSES)
        == "init_from 'tiny': 2 of 2 tensors taken"
    )
    assert torch.equal(fresh.weight, network.network.weight)
    flags = ["fit", "--data=VOCFolder", f"--data.root={images}", *CPU]
    assert "--model.init_from" in fails([*flags, "--ckpt_path=tiny"])


def test_a_path_wins_over_a_name(network: TrainedNetwork, tmp_path: Path) -> None:
    mine = save(tmp_path / "tiny", seed=1)
    assert torch.equal(mfnet.load("tiny").network.weight, mine.network.weight)
    assert not torch.equal(mine.network.weight, network.network.weight)
    (tmp_path / "elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "elsewhere")
        assert torch.equal(mfnet.load("tiny").network.weight, network.network.weight)


def test_what_is_neither_path_nor_name(
    network: TrainedNetwork, tmp_path: Path, fails: Fails
) -> None:
    save(tmp_path / "shipped" / "other")
    (tmp_path / "shipped" / "README.md").write_text("no network")
    said = "no file or folder 'tyni', and none of the shipped networks: other, tiny"
    for command in (
        ["predict", "--ckpt_path=tyni", "--data.predict_images=a.jpg"],
        ["export", "tyni", "--to=onnx"],
        ["video", "tyni", "in.mp4", "out.mp4"],
    ):
        assert said in fails(command)
    with pytest.raises(FileNotFoundError, match=said):
        initialize(nn.Conv2d(3, 3, 1), "tyni", IMAGENET, "abc")


def test_help_names_what_is_shipped(
    network: TrainedNetwork, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert "or a shipped network: tiny\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b'{"model_type": "bert"}'),  # of another library
        ("config.json", b"\xff{"),
        ("model.safetensors", None),
        ("model.safetensors", 100),
    ],
)
def test_damaged_folders(
    file: str, content: bytes | int | None, network: TrainedNetwork, fails: Fails
) -> None:
    damaged = Path("shipped/tiny", file)
    if content is None:
        damaged.unlink()
    else:
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:content] if isinstance(content, int) else content)
    for command in (
        ["predict", "--ckpt_path=tiny", "--data.predict_images=a.jpg"],
        ["export", "shipped/tiny", "--to=weights"],
    ):
        assert f"tiny/{file}" in fails(command)


class Tied(nn.Module):
    """Two names for one tensor, which is saved under one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_tensors_of_two_names(tmp_path: Path) -> None:
    tied = TrainedNetwork(
        network={"class_path": f"{__name__}.Tied"},
        class_names=["a", "b", "c"],
        normalization={"mean": [0.5] * 3, "std": [0.5] * 3},
    )
    tied.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 4, 4)
    assert torch.equal(mfnet.load(tmp_path)(images), tied(images))
    assert initialize(Tied(), tmp_path, tied.normalization, tied.class_names).endswith(
        "4 of 4 tensors taken"
    )
