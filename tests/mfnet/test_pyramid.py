"""Backbones as they are, with features at strides 4 to 32: of mfnet_light."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from mfnet import create_model
from mfnet.backbone import PYRAMID, Pyramid

# One of each kind: plain, patches and windows whose maps have their channels last, sums that want
# multiples of 32, windows of a fixed size, channels last.
BACKBONES = (
    "resnet18",
    "tf_efficientnet_lite0",
    "swin_tiny_patch4_window7_224",
    "pvt_v2_b0",
    "hrnet_w18_small",
    "maxvit_nano_rw_256",
    "mambaout_femto",
)


@pytest.mark.parametrize("name", BACKBONES)
def test_features_at_strides_4_to_32_of_any_size(name: str) -> None:
    backbone = Pyramid(name).eval()
    for height, width in ((64, 96), (97, 75)):
        with torch.no_grad():
            low, high = backbone(torch.randn(1, 3, height, width))
        channels = (backbone.low_channels, *backbone.high_channels)
        for feature, stride, expected in zip((low, *high), PYRAMID, channels, strict=True):
            assert feature.shape[:2] == (1, expected)
            for side, pixels in zip(feature.shape[2:], (height, width), strict=True):
                assert side in (pixels // stride, -(-pixels // stride))


def test_a_padded_image_gives_the_features_of_the_whole() -> None:
    """Of a convolutional network whose features see no further than the padding."""
    backbone = Pyramid("swin_tiny_patch4_window7_224").eval()
    image = torch.randn(1, 3, 96, 64)
    image[..., 90:, :] = 0
    with torch.no_grad():
        whole, _ = backbone(image)
        cut, _ = backbone(image[..., :90, :])
    torch.testing.assert_close(cut, whole[..., :23, :])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224", r"features at strides \[16, 16, 16\]; strides 4, 8, 16, 32 are"),
        ("levit_128s", r"features at strides \[16, 32, 64\]; strides 4, 8, 16, 32 are needed"),
        ("efficientformerv2_s0", "takes images of 224 x 224 pixels alone"),
        ("resnet19", "unknown backbone 'resnet19': did you mean"),
    ],
)
def test_backbones_that_do_not_serve(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pyramid(name)


def test_trying_sizes_leaves_the_backbone_as_it_is() -> None:
    torch.manual_seed(0)
    features = Pyramid("resnet18").features
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", features_only=True)
    assert features.training
    for name, value in plain.state_dict().items():
        assert torch.equal(features.state_dict()[name], value), name


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_a_file_of_timms_weights(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model(name).state_dict(), path)
    backbone = Pyramid(name, path).eval()
    options = {"strict_img_size": False} if name.startswith("swin") else {}
    reference = timm.create_model(
        name,
        features_only=True,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        **options,
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        last = reference(x)[-1]
        _, high = backbone(x)
    expected = last.permute(0, 3, 1, 2) if name.startswith("swin") else last
    torch.testing.assert_close(high[-1], expected)
    with pytest.raises(ValueError, match="does not fit backbone 'resnet34'"):
        Pyramid("resnet34", path)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "pvt_v2_b0"])
def test_a_network_on_a_transformer_trains(name: str) -> None:
    model = create_model("mfnet_light", num_classes=3, backbone=name).train()
    logits = model(torch.randn(2, 3, 65, 75))
    assert logits.shape == (2, 3, 65, 75)
    logits.square().mean().backward()
    for key, parameter in model.named_parameters():
        if not key.startswith("backbone"):  # a transformer's own norm of features stays unused
            assert parameter.grad is not None, key
