"""Starting from a trained network, and keeping its backbone as it is."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from command_line import CONV, RESNET, Fails, flags
from lightning.pytorch.callbacks import Callback
from quiet import quiet_trainer
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

import mfnet
from mfnet.__main__ import main
from mfnet.cli import MFNetCLI
from mfnet.fine_tuning import initialize
from mfnet.normalization import IMAGENET, Normalization
from mfnet.pretrained import TrainedNetwork
from mfnet.task import SegmentationTask


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of three classes and a Z of the grid 3 x 5."""
    torch.manual_seed(7)
    arguments = {"num_classes": 3, "backbone": "test_resnet", "context_size": [3, 5]}
    network = TrainedNetwork(
        network={"class_path": "mfnet.create_model", "init_args": {"name": "mfnet", **arguments}},
        class_names=["a", "b", "c"],
        normalization={"mean": [0.5] * 3, "std": [0.5] * 3},
    )
    folder = tmp_path_factory.mktemp("trained")
    network.save_pretrained(folder)
    return folder


def ours(num_classes: int, size: tuple[int, int]) -> mfnet.SegmentationNetwork:
    return mfnet.create_model("mfnet", num_classes, backbone="test_resnet", context_size=size)


def test_what_fits_is_taken_and_what_does_not_is_told(trained: Path, tmp_path: Path) -> None:
    given = mfnet.load(trained).network.state_dict()
    network = ours(5, (6, 10))
    own = {key: value.clone() for key, value in network.state_dict().items()}
    told = initialize(network, trained, Normalization((0.5,) * 3, (0.5,) * 3), "abcde")
    after = network.state_dict()
    classifier = {"decoder.classifier.weight", "decoder.classifier.bias"}
    (z,) = [key for key in own if key.endswith(".z")]
    for key in own:
        if key in classifier:
            assert torch.equal(after[key], own[key])
        elif key != z:
            assert torch.equal(after[key], given[key])
    maps = given[z].unflatten(1, (3, 5))[None]
    expected = nn.functional.interpolate(maps, (6, 10), mode="bilinear")[0].flatten(1)
    assert torch.equal(after[z], expected)
    assert told == (
        f"init_from '{trained}': {len(own) - 2} of {len(own)} tensors taken; of another shape: "
        "decoder.classifier.weight (3, 256, 1, 1) instead of (5, 256, 1, 1), "
        "decoder.classifier.bias (3,) instead of (5,)"
    )
    assert initialize(network, trained, IMAGENET, "abcde") == (
        f"{told}; its images had image_mean [0.5, 0.5, 0.5] and image_std [0.5, 0.5, 0.5], those "
        "of this run have [0.485, 0.456, 0.406] and [0.229, 0.224, 0.225]"
    )


def test_other_classes_of_the_same_number_are_told(trained: Path) -> None:
    told = initialize(ours(3, (3, 5)), trained, Normalization((0.5,) * 3, (0.5,) * 3), "cba")
    assert told.endswith("tensors taken; its classes were a, b, c, now: c, b, a")


def test_a_context_named_by_two_letters(tmp_path: Path) -> None:
    """A grid is looked for among what built the network, and "mf" is no grid."""
    given = {"num_classes": 3, "backbone": "test_resnet", "context": "mf", "context_size": [3, 5]}
    TrainedNetwork(
        network={
            "class_path": "mfnet.create_model",
            "init_args": {"name": "deeplabv3plus", **given},
        },
        class_names=["a", "b", "c"],
        normalization=IMAGENET._asdict(),
    ).save_pretrained(tmp_path)
    network = mfnet.create_model("deeplabv3plus", **{**given, "context_size": (6, 10)})
    told = initialize(network, tmp_path, IMAGENET, "abc")
    count = len(network.state_dict())
    assert told == f"init_from '{tmp_path}': {count} of {count} tensors taken"


def test_callbacks_copy_the_network_that_was_read(tmp_path: Path) -> None:
    """As ``WeightAveraging`` does in its ``setup``."""

    class Copy(Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            self.weight = pl_module.network.weight.detach().clone()

    trained, copy = nn.Conv2d(3, 2, 1), Copy()
    save_file(trained.state_dict(), tmp_path / "a.safetensors")
    task = SegmentationTask(
        nn.Conv2d(3, 2, 1), ["a", "b"], init_from=str(tmp_path / "a.safetensors")
    )
    batch = torch.zeros(2, 3, 5, 5), torch.zeros(2, 5, 5, dtype=torch.int64)
    trainer = quiet_trainer(callbacks=[copy])
    loader = DataLoader([batch], batch_size=None)
    trainer.validate(task, loader, verbose=False)
    assert not torch.equal(copy.weight, trained.weight)
    trainer.fit(task, loader)
    assert torch.equal(copy.weight, trained.weight)


def test_files_of_tensors_and_wrapped_networks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, own = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    tensors = {f"0.{key}": value for key, value in layer.state_dict().items()}
    tensors["extra"] = torch.zeros(1)
    torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}}, tmp_path / "a.pth")
    save_file(
        {f"network.{key}": value for key, value in tensors.items()}, tmp_path / "a.safetensors"
    )
    for file in ("a.pth", "a.safetensors"):
        network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        told = initialize(torch.compile(network), tmp_path / file, IMAGENET, "abc")
        assert torch.equal(network[0].weight, layer.weight)
        assert "2 of 4 tensors taken; not in it: 1.weight, 1.bias; in it, but not" in told
        assert told.endswith("network: extra")
    (tmp_path / "bad.pth").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"bad.pth' is not a file of tensors by name"):
        initialize(own, tmp_path / "bad.pth", IMAGENET, "abc")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        initialize(own, tmp_path / "nothing.pth", IMAGENET, "abc")
    with pytest.raises(ValueError, match="none of its tensors fits"):
        initialize(nn.Conv2d(1, 1, 1), tmp_path / "a.pth", IMAGENET, "abc")


def small(root: Path, run: Path) -> list[str]:
    return flags(
        root, run, "--model.network.name=mfnet", RESNET, "--model.network.context_size=[3,3]"
    )


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_frozen_backbone_leaves_training_as_it_entered(
    images: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    given = mfnet.load(trained).state_dict()
    tune = ["fit", *small(images, tmp_path / "run"), f"--model.init_from={trained}"]
    main([*tune, "--model.freeze_backbone=true"])
    after = state(tmp_path / "run")
    backbone = [key for key in after if key.startswith("network.backbone.")]
    assert len(backbone) > 80
    assert all(torch.equal(after[key], given[key]) for key in backbone)
    assert not torch.equal(
        after["network.decoder.fuse.0.0.weight"], given["network.decoder.fuse.0.0.weight"]
    )
    assert "tensors taken; of another shape: decoder.classifier" in caplog.text
    # A continuation needs neither the file nor its tensors.
    main([
        "fit", *small(images, tmp_path / "run"), "--model.init_from=gone", "--ckpt_path=last",
        "--model.freeze_backbone=true", "--trainer.max_epochs=2",
    ])  # fmt: skip
    assert all(torch.equal(state(tmp_path / "run")[key], given[key]) for key in backbone)


def test_frozen_statistics_alone(images: Path, trained: Path, tmp_path: Path) -> None:
    given = mfnet.load(trained).state_dict()
    tune = ["fit", *small(images, tmp_path / "run"), f"--model.init_from={trained}"]
    main([*tune, "--model.freeze_backbone=statistics"])
    after = state(tmp_path / "run")
    statistics = [k for k in after if ".backbone." in k and ("running" in k or "num_batches" in k)]
    assert len(statistics) > 20
    assert all(torch.equal(after[key], given[key]) for key in statistics)
    weight = "network.backbone.features.layer4.0.bn2.weight"
    assert not torch.equal(after[weight], given[weight])
    outside = "network.decoder.fuse.0.1.running_mean"
    assert not torch.equal(after[outside], given[outside])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model.freeze_backbone=some"], "freeze_backbone: expected"),
        (["--model.init_from=nothing.ckpt"], "no file or folder 'nothing.ckpt', and none of"),
        (
            [*CONV, "--model.freeze_backbone=true"],
            "freeze_backbone: Conv2d has neither a backbone nor an encoder",
        ),
    ],
)  # fmt: skip
def test_mistakes(
    given: list[str], message: str, images: Path, tmp_path: Path, fails: Fails
) -> None:
    base = [flag for flag in small(images, tmp_path) if "network" not in flag or len(given) < 2]
    assert message in fails(["fit", *base, *given])


def test_a_frozen_network_of_others(images: Path, tmp_path: Path) -> None:
    cli = MFNetCLI(
        [
            *[flag for flag in small(images, tmp_path) if "network" not in flag],
            "--model.network=segmentation_models_pytorch.Unet", "--model.network.classes=5",
            "--model.network.encoder_name=resnet18", "--model.network.encoder_weights=null",
            "--model.freeze_backbone=true",
        ],
        run=False,
    )  # fmt: skip
    task = cli.model
    assert not any(p.requires_grad for p in task.network.encoder.parameters())
    assert all(p.requires_grad for p in task.network.decoder.parameters())
    task.eval()
    task.train()
    assert not any(module.training for module in task.network.encoder.modules())
    assert task.network.decoder.training
