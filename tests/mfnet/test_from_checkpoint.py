"""A checkpoint tells network, classes and normalization: no command line needs to repeat them."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import CPU, flags, predict
from PIL import Image

import mfnet
from mfnet.__main__ import main
from mfnet.checkpoint import RECORD
from mfnet.cli import MFNetCLI
from mfnet.data import synthetic
from mfnet.task import SegmentationTask


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: an unusual network, from weights in a file, whose data are gone since."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    root = folder.parent / "data"
    shutil.copytree(images, root)
    weights = folder.parent / "resnet18.pth"
    cli = MFNetCLI(["--data=VOCFolder", f"--data.root={root}", *NETWORK], run=False)
    torch.save(_of_timm(cli.model.network.backbone.features.state_dict()), weights)
    main([
        "fit", *flags(root, folder, *NETWORK, "--data.resize=[40,48]"),
        f"--model.network.backbone_weights={weights}",
    ])  # fmt: skip
    shutil.rmtree(root)
    weights.unlink()
    return folder


NETWORK = [
    "--model.network.name=emanet",
    "--model.network.backbone=resnet18",
    "--model.network.dict_kwargs.bases=5",
]


def _of_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if "num_batches" not in key}


def test_predict_needs_only_the_checkpoint(run: Path, images: Path, tmp_path: Path) -> None:
    photo = images / "JPEGImages" / "val_00000.jpg"
    pictures = []
    for name, checkpoint, more in (
        ("alone", run / "checkpoints" / "best.ckpt", []),
        ("folder", run, []),
        ("config", "best", [f"--config={run / 'config.yaml'}"]),
    ):
        predict(checkpoint, photo, tmp_path / name, *more)
        with Image.open(tmp_path / name / "val_00000.png") as picture:
            pictures.append((picture.size, picture.tobytes()))
    assert pictures[0][0] == (33, 33)
    assert pictures[0] == pictures[1] == pictures[2]


def test_validate_takes_the_network_from_the_checkpoint(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the size that its images had, where neither a flag nor a file tells another."""
    config = run.parent / "own_size.yaml"
    config.write_text("data: {class_path: VOCFolder, init_args: {resize: null}}")
    data = ["--data=VOCFolder", f"--data.root={images}", *CPU]
    losses = []
    for given in (["--data.resize=[40,48]"], [], [f"--config={config}"]):
        main(["validate", f"--ckpt_path={run}", *given, *data])
        losses += re.findall(r"val/loss\W+([\d.]+)", capsys.readouterr().out)
    assert losses[0] == losses[1] != losses[2]


def test_windows_scales_and_flips_from_the_command_line(
    run: Path, images: Path, tmp_path: Path
) -> None:
    """What the command line writes is what Python returns, and masks can be trained on."""
    with Image.open(images / "JPEGImages" / "val_00000.jpg") as photo:
        photo.resize((70, 90)).save(tmp_path / "photo.png")
    flags = ["--tile=48", "--overlap=0.5", "--scales=[1,1.5]", "--flip=true"]
    kinds = ["--data.resize=null", "--overlays.kinds=[mask,probabilities]"]
    predict(run, tmp_path / "photo.png", tmp_path / "out", *kinds, *flags)
    network = mfnet.load(run)
    network.resize = None
    options = {"tile": 48, "overlap": 0.5, "scales": [1, 1.5], "flip": True}
    expected = network.predict_probabilities(tmp_path / "photo.png", **options).numpy()
    with np.load(tmp_path / "out" / "probabilities" / "photo.npz") as file:
        assert np.array_equal(file["probabilities"], expected)
    assert not np.array_equal(network.predict_probabilities(tmp_path / "photo.png"), expected)

    root = tmp_path / "pseudo"
    for folder, file in (
        ("JPEGImages", tmp_path / "photo.png"),
        ("SegmentationClass", tmp_path / "out" / "mask" / "photo.png"),
    ):
        (root / folder).mkdir(parents=True)
        shutil.copy(file, root / folder)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "test.txt").write_text("photo\n")
    shutil.copy(images / "classes.txt", root)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        data = ["--data=VOCFolder", f"--data.root={root}", "--data.resize=null", *CPU]
        main(["test", f"--ckpt_path={run}", *data, *flags])
    shown = "in windows of 48 x 48, overlap 0.5, where larger; at scale 1, 1.5; mirrored, too"
    assert f"images shown {shown}" in printed.getvalue()
    assert re.search(r"test/accuracy\W+1\.0\W", printed.getvalue())


def test_load_gives_what_was_trained(run: Path, tmp_path: Path) -> None:
    network = mfnet.load(run)
    assert not network.training
    assert network.class_names == list(synthetic.CLASSES)
    assert network.resize == (40, 48)
    task = SegmentationTask.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert task.class_names == network.class_names
    images = torch.randn(2, 3, 40, 48)
    torch.testing.assert_close(task.eval()(images), network(images))
    network.save_pretrained(tmp_path / "weights")
    assert {p.suffix for p in (tmp_path / "weights").iterdir()} == {".json", ".md", ".safetensors"}
    assert "resnet18.pth" not in (tmp_path / "weights" / "config.json").read_text()
    again = mfnet.load(tmp_path / "weights")
    assert torch.equal(again(images), network(images))
    told = ("class_names", "palette", "normalization", "resize")
    assert all(getattr(again, name) == getattr(network, name) for name in told)


def test_the_record_of_a_checkpoint(run: Path) -> None:
    record = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)[RECORD]
    assert record["class_names"] == list(synthetic.CLASSES)
    assert record["resize"] == [40, 48]
    assert record["network"]["class_path"] == "mfnet.create_model"
    assert record["network"]["init_args"]["name"] == "emanet"


def test_without_a_record_the_classes_are_asked_for(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    del checkpoint[RECORD]  # as one of the version before
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(SystemExit):
        predict(tmp_path / "old.ckpt", images / "JPEGImages", tmp_path)
    assert "nothing tells the classes" in capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_be_predicted_is_named_and_all_else_written(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos [1]"
    photos.mkdir()
    good = images / "JPEGImages" / "val_00000.jpg"
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        shutil.copy(good, photos / name)
    (photos / "._a.jpg").write_bytes(b"what a Mac leaves")
    (photos / "broken.jpg").write_bytes(good.read_bytes()[:300])
    Image.new("RGB", (9, 9)).save(photos / "small.png")
    flags = [f"--ckpt_path={run}", "--data.resize=null", f"--overlays.output={tmp_path / 'out'}"]
    names = sorted(str(path) for path in photos.glob("[!.]*"))  # as a shell expands *
    with pytest.raises(SystemExit) as exit_:
        main(["predict", "--data.predict_images", *names, *flags, *CPU])
    assert exit_.value.code == 1
    printed = capsys.readouterr()
    assert f"3 images predicted, see {tmp_path / 'out'}" in printed.out
    line = printed.err.splitlines()[-1]
    assert line.startswith("mfnet: error: 2 of 5 images were not predicted: ")
    assert f"{photos / 'broken.jpg'}: cannot read image" in line
    assert f"{photos / 'small.png'}: x: expected images of at least 33 x 33" in line
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "c.png"]
    predict(run, photos / "a.jpg", tmp_path / "again")
