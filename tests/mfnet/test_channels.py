"""Images of other than three channels: networks, weights, files, normalization, whole runs."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from command_line import CPU, Fails, flags, predict
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from mfnet import create_model
from mfnet.__main__ import main
from mfnet.backbone import Backbone
from mfnet.cli import MFNetCLI
from mfnet.data import DataError, VOCFolder, as_rgb, denormalize, synthetic
from mfnet.data.files import image_size, read_image, read_pair
from mfnet.data.transforms import train_transform
from mfnet.normalization import IMAGENET, Normalization
from mfnet.task import RECORD, SegmentationTask

BANDS = np.random.default_rng(0).integers(0, 2**16, (5, 40, 50), dtype=np.uint16)
BANDS[:, 0, 0] = 2**16 - 1

RESNET = "--model.network.backbone=resnet18"  # its weights want ImageNet's mean and deviation


# Networks and weights


@pytest.mark.parametrize("channels", [1, 4])
def test_a_network_takes_images_of_its_channels_alone(channels: int) -> None:
    network = create_model("mfnet", 3, "resnet18", in_channels=channels).eval()
    with torch.no_grad():
        assert network(torch.randn(1, channels, 33, 40)).shape == (1, 3, 33, 40)
    with pytest.raises(ValueError, match=rf"images \(B, {channels}, H, W\), got shape \(1, 3, 33"):
        network(torch.randn(1, 3, 33, 40))
    with pytest.raises(ValueError, match="in_channels: expected at least 1, got 0"):
        create_model("mfnet", backbone="resnet18", in_channels=0)


@pytest.mark.parametrize(
    ("name", "channels"), [("resnet18", 1), ("resnet18", 5), ("convnext_atto", 4)]
)
def test_weights_for_rgb_are_adapted_as_timm_does_it(
    name: str, channels: int, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model(name).state_dict(), path)
    backbone = Backbone(name, path, in_channels=channels)
    reference = timm.create_model(
        name,
        features_only=True,
        output_stride=16,
        in_chans=channels,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
    )
    first, expected = (next(net.parameters()) for net in (backbone.features, reference))
    assert first.shape[1] == channels
    torch.testing.assert_close(backbone.state_dict(), {
        f"features.{key}": value for key, value in reference.state_dict().items()
    })  # fmt: skip
    assert torch.equal(first, expected)


def test_weights_of_as_many_channels_load_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    weights = timm.create_model("resnet18", in_chans=4).state_dict()
    torch.save(weights, path)
    backbone = Backbone("resnet18", path, in_channels=4)
    assert torch.equal(backbone.features["conv1"].weight, weights["conv1.weight"])
    with pytest.raises(ValueError, match=r"conv1\.weight \(64, 4, 7, 7\) instead of \(64, 1, 7"):
        Backbone("resnet18", path, in_channels=1)


# Normalization and transforms


def test_normalization_of_other_channels_is_the_mean_of_three() -> None:
    assert IMAGENET.for_channels(3) is IMAGENET
    assert IMAGENET.for_channels(1) == ((pytest.approx(0.449),), (pytest.approx(0.226),))
    assert IMAGENET.for_channels(5).std == (pytest.approx(0.226),) * 5
    network = create_model("mfnet", 2, "tf_efficientnet_lite0", in_channels=4)
    task = SegmentationTask(network, ["a", "b"], channels=4)
    assert task.normalization == Normalization((0.5,) * 4, (0.5,) * 4)
    task = SegmentationTask(network, ["a", "b"], image_mean=(0.1, 0.2, 0.3, 0.4), channels=4)
    assert task.normalization == Normalization((0.1, 0.2, 0.3, 0.4), (0.5,) * 4)
    with pytest.raises(ValueError, match=r"image_std: expected 4 numbers, .* got \[0\.5\]"):
        SegmentationTask(network, ["a", "b"], image_std=(0.5,), channels=4)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("recipe", ["modern", "paper"])
def test_training_images_keep_their_channels(recipe: Any, channels: int) -> None:
    normalization = IMAGENET.for_channels(channels)
    transform = train_transform(recipe, (48, 64), None, normalization)
    values = torch.arange(1, channels + 1) * 40
    image = tv_tensors.Image(values[:, None, None].expand(-1, 8, 8).to(torch.uint8))
    torch.manual_seed(0)
    out, _ = transform(image, tv_tensors.Mask(torch.zeros(8, 8, dtype=torch.uint8)))
    assert out.shape == (channels, 48, 64)
    seen = denormalize(out, normalization)
    assert (seen[:, 24, 32] == values).all() == (recipe == "paper" or channels != 3)
    if recipe == "modern" and channels != 3:  # of the padding, which is the mean
        assert out[:, 0, 0].abs().max() < 0.02


def test_an_image_is_shown_in_three_of_its_channels_or_gray() -> None:
    image = torch.arange(5)[:, None, None].expand(5, 2, 2)
    assert as_rgb(image)[:, 0, 0].tolist() == [0, 1, 2]
    assert as_rgb(image[4:])[:, 0, 0].tolist() == [4, 4, 4]
    assert as_rgb(image[3:])[:, 0, 0].tolist() == [3, 3, 3]


# Files


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1"])
def test_one_channel_is_gray(mode: str, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), (255, 255, 255)).convert(mode).save(tmp_path / "i.png")
    image = read_image(tmp_path / "i.png", channels=1)
    assert image.shape == (1, 40, 50)
    assert image.dtype == torch.uint8
    assert (image == 255).all()


def test_gray_of_16_bits_and_of_colors(tmp_path: Path) -> None:
    Image.fromarray(BANDS[0]).save(tmp_path / "deep.png")
    deep = read_image(tmp_path / "deep.png", channels=1)
    assert torch.equal(deep, scaled(BANDS[:1]))
    Image.new("RGB", (5, 4), (255, 0, 0)).save(tmp_path / "red.png")
    assert (read_image(tmp_path / "red.png", channels=1) == 76).all()  # 0.299 of 255


def test_four_channels_are_those_of_rgba(tmp_path: Path) -> None:
    Image.new("RGBA", (50, 40), (10, 20, 30, 40)).save(tmp_path / "i.png")
    image = read_image(tmp_path / "i.png", channels=4)
    assert image.shape == (4, 40, 50)
    assert image[:, 3, 4].tolist() == [10, 20, 30, 40]
    with pytest.raises(DataError, match=r"i\.png: expected 5 channels, got 4 \(mode RGBA\)$"):
        read_image(tmp_path / "i.png", channels=5)
    Image.fromarray(BANDS[0]).save(tmp_path / "i.png")
    with pytest.raises(DataError, match=r"i\.png: expected 4 channels, got 1 \(mode I;16\)$"):
        read_image(tmp_path / "i.png", channels=4)


def scaled(bands: np.ndarray) -> Tensor:
    return torch.from_numpy((bands / 257).round()).byte()


def write_tiff(path: Path, bands: np.ndarray) -> Path:
    rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed")
    count, height, width = bands.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", "GTiff", width, height, count, dtype=bands.dtype, compress="lzw"
        ) as file:
            file.write(bands)
    return path


def test_the_bands_of_a_tiff(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = write_tiff(tmp_path / "i.tif", BANDS)
    assert torch.equal(read_image(path, 5), scaled(BANDS))
    assert image_size(path, 5) == (40, 50)
    eight = write_tiff(tmp_path / "eight.TIF", (BANDS[:4] >> 8).astype(np.uint8))
    assert torch.equal(read_image(eight, 4), torch.from_numpy(BANDS[:4] >> 8).byte())
    assert not recwarn.list

    mask = tmp_path / "mask.png"
    Image.fromarray(np.ones((40, 50), np.uint8)).save(mask)
    image, stored = read_pair(path, mask, 5)
    assert image.shape == (5, 40, 50)
    assert stored.pixels.shape == (40, 50)
    Image.fromarray(np.ones((50, 40), np.uint8)).save(mask)
    with pytest.raises(DataError, match=r"mask\.png: expected the size of its image, 40 x 50, got"):
        read_pair(path, mask, 5)


def test_what_a_tiff_is_refused_for(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "i.tif", BANDS)
    with pytest.raises(DataError, match=r"i\.tif: expected 4 channels, got 5$"):
        read_image(path, 4)
    with pytest.raises(DataError, match=r"i\.tif: cannot read image: .*--data\.channels N$"):
        read_image(path)
    floats = write_tiff(tmp_path / "f.tif", BANDS.astype(np.float32))
    with pytest.raises(DataError, match=r"f\.tif: expected 8 or 16 bits a channel, got float32"):
        read_image(floats, 5)
    whole = path.read_bytes()
    for read, length in ((read_image, len(whole) // 2), (image_size, 4)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"i\.tif: cannot read image: ") as raised:
            read(path, 5)
        assert "\n" not in str(raised.value)


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(DataError, match=r"i\.tif: .* needs rasterio: pip install rasterio"):
        read_image(tmp_path / "i.tif", 5)


# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in RGBA, whose alpha tells nothing."""
    root = synthetic.generate(tmp_path_factory.mktemp("data") / "voc", train=2, val=1, size=40)
    for path in (root / "JPEGImages").iterdir():
        with Image.open(path) as file:
            file.convert("RGBA").save(path.with_suffix(".png"))
        path.unlink()
    return root


def test_a_run_of_four_channels(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(["fit", *flags(data, run, RESNET, "--data.channels=4")])
    record = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)[RECORD]
    assert record["network"]["init_args"]["in_channels"] == 4
    assert record["normalization"]["mean"] == pytest.approx([0.449] * 4)
    photograph = data / "JPEGImages" / "val_00000.png"
    with np.load(run / "samples.npz") as samples, Image.open(photograph) as original:
        np.testing.assert_allclose(samples["image_0"], np.array(original)[..., :3], atol=1)

    predict(run, photograph, tmp_path)
    with Image.open(tmp_path / "val_00000.png") as overlay:
        assert (overlay.mode, overlay.size) == ("RGB", (40, 40))

    # The checkpoint tells the channels too.
    main(["validate", "--data=VOCFolder", f"--data.root={data}", f"--ckpt_path={run}", *CPU])
    assert (run / "scores-val.csv").is_file()


def test_the_data_say_how_many_channels_a_network_has(data: Path, fails: Fails) -> None:
    cli = MFNetCLI(flags(data, "", RESNET, "--data.channels=1"), run=False)
    assert cli.model.network.in_channels == cli.model.channels == 1
    cli.datamodule.setup("validate")
    assert cli.datamodule.val_set[0][0].shape == (1, 40, 40)
    assert fails(["fit", *flags(data, "", RESNET, "--model.network.in_channels=4")]) == (
        "mfnet: error: --model.network.in_channels 4: a network has as many channels as the "
        "images: --data.channels 4"
    )


def test_another_library_s_network_has_them_too(data: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="smp is not installed")
    unet = "--model.network=segmentation_models_pytorch.Unet"
    given = [flag for flag in flags(data, "") if not flag.startswith("--model.")]
    options = ["--model.network.encoder_name=resnet18", "--model.network.encoder_weights=null"]
    cli = MFNetCLI([*given, "--data.channels=1", unet, *options], run=False)
    assert next(cli.model.network.parameters()).shape[1] == 1


def test_a_module_of_other_channels_is_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="channels: expected at least 1, got 0"):
        VOCFolder(str(data), channels=0)
    module = VOCFolder(str(data), channels=1)
    task = SegmentationTask(torch.nn.Conv2d(1, 3, 1), module.class_names)
    module.trainer = type("Runner", (), {"lightning_module": task})()
    with pytest.raises(ValueError, match=r"the trainer's module has 3: SegmentationTask\(.*=1\)"):
        module.setup("validate")


def test_a_checkpoint_of_other_channels_is_refused() -> None:
    task = SegmentationTask(torch.nn.Conv2d(3, 2, 1), ["a", "b"])
    task.trainer = type("Runner", (), {"ckpt_path": "best.ckpt"})()
    record = {"normalization": {"mean": [0.5], "std": [0.5]}}
    with pytest.raises(ValueError, match=r"its images have 1 channels; those of the data have 3"):
        task.on_load_checkpoint({RECORD: record})
