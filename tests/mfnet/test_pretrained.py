"""A trained network in Python."""

import json

import numpy as np
import pytest
import torch
from command_line import CPU
from PIL import Image
from quiet import quiet_trainer
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import mfnet
from mfnet.__main__ import main
from mfnet.checkpoint import read_checkpoint
from mfnet.cli import MFNetCLI
from mfnet.data import DataError
from mfnet.pretrained import TrainedNetwork, build
from mfnet.task import SegmentationTask

# A network as small as they come: as many classes as colors.
TINY = {"class_path": "mfops.FactorizedContext", "init_args": {"channels": 3, "rank": 2}}
TOLD = {
    "class_names": ["sky", "road", "car"],
    "normalization": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
    "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return TrainedNetwork(network=TINY, **TOLD).eval()


@pytest.fixture
def photo(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_every_kind_of_image(network, photo, monkeypatch):
    labels = network.predict(photo)
    assert labels.dtype == torch.uint8
    assert labels.shape == (40, 50)
    with Image.open(photo) as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert torch.equal(network.predict(picture), labels)
        assert torch.equal(network.predict(picture.convert("RGBA")), labels)
    assert torch.equal(network.predict(pixels), labels)
    monkeypatch.setenv("HOME", str(photo.parent))
    assert torch.equal(network.predict("~/photo.png"), labels)
    mean, std = (torch.tensor(TOLD["normalization"][k])[:, None, None] for k in ("mean", "std"))
    logits = network(((pixels / 255 - mean) / std)[None])
    assert torch.equal(logits.argmax(1)[0], labels)
    probabilities = network.predict_probabilities(photo)
    torch.testing.assert_close(probabilities, logits.softmax(1)[0].half(), rtol=2e-3, atol=1e-3)
    assert torch.equal(network.train().predict(photo), labels)
    assert network.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_of_another_precision(network, photo, dtype):
    expected = network.predict_probabilities(photo)
    got = network.to(dtype).predict_probabilities(photo)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02)


def test_upright_and_resized_as_in_training(network, photo):
    labels = network.predict(photo)
    with Image.open(photo) as picture:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        picture.rotate(90, expand=True).save(photo.parent / "turned.png", exif=exif)
    assert torch.equal(network.predict(photo.parent / "turned.png"), labels)
    seen = []
    network.resize = (20, 24)
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    assert network.predict(photo).shape == (40, 50)
    assert network.predict(photo, tile=16).shape == (40, 50)
    assert seen[0] == (1, 3, 20, 24)
    assert max(max(shape[-2:]) for shape in seen[1:]) == 16


@pytest.mark.parametrize(
    ("image", "options", "error", "message"),
    [
        (np.zeros((4, 4, 3)), {}, TypeError, "image: expected a PIL image, a path or a uint8"),
        (torch.zeros(3, 4, 4), {}, TypeError, "a uint8 tensor, got torch.float32"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), {}, ValueError, r"\(3, H, W\), got \(4, 4, 3\)"),
        ("nothing.png", {}, DataError, "nothing.png: cannot read image"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), {"tile": 0}, ValueError, "tile: expected"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), {"tiles": 9}, TypeError, "'tiles'"),
    ],
)
def test_bad_images_and_options(network, image, options, error, message):
    with pytest.raises(error, match=message):
        network.predict(image, **options)


def test_a_folder_without_a_line_of_code_in_it(network, photo, tmp_path):
    network.save_pretrained(tmp_path / "weights")
    config = json.loads((tmp_path / "weights" / "config.json").read_text())
    assert config == {"network": TINY, "resize": None, **TOLD}
    for loaded in (
        mfnet.load(tmp_path / "weights"),
        TrainedNetwork.from_pretrained(tmp_path / "weights"),
    ):
        assert torch.equal(loaded.predict(photo), network.predict(photo))
        assert not loaded.training
        assert loaded.palette == [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    file = tmp_path / "weights" / "model.safetensors"
    assert file.stat().st_mode == (tmp_path / "weights" / "config.json").stat().st_mode
    tensors = load_file(file)
    del tensors[next(iter(tensors))]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="does not fit: 1 tensors missing"):
        mfnet.load(tmp_path / "weights")


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("os.system", "os.system does not correspond to a subclass of Module"),
        ("mfnet.NoSuchThing", "NoSuchThing"),
        ("builtins.exec", "does not correspond to a subclass of Module"),
    ],
)
def test_a_configuration_calls_nothing_but_networks(class_path, message):
    with pytest.raises(ValueError, match=message):
        build({"class_path": class_path, "init_args": {"command": "touch pwned"}})


def test_a_network_that_was_trained_in_python(photo, tmp_path):
    """It tells itself how it was made; of another's, the error says what to tell."""
    made = {"backbone": "resnet10t", "rank": 4, "width": 8, "multi_grid": None}
    networks = (mfnet.create_model("mfnet_light", 3, **made), torch.nn.Conv2d(3, 3, 1))
    batch = (torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64)))
    for network, name in zip(networks, ("ours", "other"), strict=True):
        trainer = quiet_trainer()
        task = SegmentationTask(torch.compile(network, backend="eager"), TOLD["class_names"])
        trainer.fit(task, DataLoader([batch], batch_size=None))
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    loaded = mfnet.load(tmp_path / "ours.ckpt")
    images = batch[0]
    expected = networks[0].eval()(images)
    torch.testing.assert_close(loaded(images), expected)
    again = SegmentationTask.load_from_checkpoint(tmp_path / "ours.ckpt", map_location="cpu")
    torch.testing.assert_close(again.eval()(images), expected)
    main([
        "predict", f"--ckpt_path={tmp_path / 'ours.ckpt'}", f"--data.predict_images={photo}", *CPU,
        "--data.resize=[64,64]", f"--overlays.output={tmp_path / 'overlays'}",
    ])  # fmt: skip
    assert (tmp_path / "overlays" / "photo.png").is_file()
    with pytest.raises(ValueError, match="network that it holds: set its task's network_config, "):
        mfnet.load(tmp_path / "other.ckpt")
    arguments = {"in_channels": 3, "out_channels": 3, "kernel_size": 1}
    task.network_config = {"class_path": "torch.nn.Conv2d", "init_args": arguments}
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    again = SegmentationTask.load_from_checkpoint(tmp_path / "other.ckpt", map_location="cpu")
    assert again.network_config == task.network_config


@pytest.mark.parametrize(
    ("name", "given", "options"),
    [
        ("mfnet_light", {"rank": 4}, {"rank": 4, "width": 256}),
        ("mfnet", {}, {"rank": 64, "loss_weight": 0.1}),
        ("mfnet", {"context": "encoding"}, {"codewords": 32}),
    ],
)
def test_a_network_tells_the_options_it_was_not_given(name, given, options):
    """Another version of mfnet may have other defaults."""
    network = mfnet.create_model(name, 3, backbone="test_resnet", **given)
    assert network.network_config["dict_kwargs"] == options
    again = build(network.network_config)
    assert again.network_config == network.network_config


def narrowed(num_classes: int) -> torch.nn.Module:
    """A function of one's own, which changes what create_model has made."""
    network = mfnet.create_model("mfnet_light", num_classes, "resnet10t", rank=4, width=8)
    network.decoder.fine[1] = torch.nn.SiLU()
    return network


def test_a_function_that_changes_our_network_is_recorded_itself(images):
    path = f"{__name__}.narrowed"
    cli = MFNetCLI(
        ["--data=VOCFolder", f"--data.root={images}", f"--model.network={path}"], run=False
    )
    assert cli.model.network_config["class_path"] == path
    rebuilt = build({**cli.model.network_config, "init_args": {"num_classes": 3}})
    assert isinstance(rebuilt.decoder.fine[1], torch.nn.SiLU)


def test_files_with_the_former_spelling(network, tmp_path):
    """Of a checkpoint, too, else images would be normalized as ImageNet's."""
    folder = tmp_path / "weights"
    network.save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("normalization", "normalisation"))
    checkpoint = read_checkpoint(folder)
    record = checkpoint["mfnet"]
    record["normalisation"] = record.pop("normalization")
    torch.save(checkpoint, tmp_path / "old.ckpt")
    for path in (folder, tmp_path / "old.ckpt"):
        assert mfnet.load(path).normalization == network.normalization


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"best\.ckpt': no such file"):
        mfnet.load(tmp_path)
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    with pytest.raises(FileNotFoundError, match=f"no such file, but '{last}' is there"):
        mfnet.load(tmp_path)
    (tmp_path / "a.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        mfnet.load(tmp_path / "a.ckpt")
    checkpoint = {"pytorch-lightning_version": "2.5", "state_dict": {}}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="does not tell the network"):
        mfnet.load(tmp_path / "old.ckpt")
    torch.save({**checkpoint, "mfnet": {"network": TINY, **TOLD}}, tmp_path / "empty.ckpt")
    with pytest.raises(ValueError, match="does not fit: 2 tensors missing"):
        mfnet.load(tmp_path / "empty.ckpt")
