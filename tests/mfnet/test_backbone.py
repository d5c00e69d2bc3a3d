from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from mfnet import backbone as backbone_module
from mfnet.backbone import Backbone, same_padding
from mfnet.flops import count_flops

CSPNEXT = pytest.param(
    "cspnext_tiny",
    marks=pytest.mark.skipif(not timm.is_model("cspnext_tiny"), reason="a timm without CSPNeXt"),
)


@pytest.mark.parametrize(
    "name", ["resnet18", "regnetx_002", "convnext_atto", "mobilenetv3_small_050", CSPNEXT]
)
def test_features_at_strides_4_and_16(name: str) -> None:
    backbone = Backbone(name).eval()
    with torch.no_grad():
        low, high = backbone(torch.randn(1, 3, 64, 96))
    assert low.shape == (1, backbone.low_channels, 16, 24)
    assert high.shape == (1, backbone.high_channels, 4, 6)


def test_same_padding_is_tensorflows() -> None:
    """As its documentation defines it: as many windows as strides begin within the side."""
    cases = product(range(1, 70), range(1, 8), range(1, 9), range(1, 4))
    for size, kernel, stride, dilation in cases:
        windows = math.ceil(size / stride)
        end = (windows - 1) * stride + (kernel - 1) * dilation + 1
        assert same_padding(size, kernel, stride, dilation) == max(end - size, 0)


def test_every_parameter_is_used() -> None:
    backbone = Backbone("mobilenetv3_small_050").eval()
    _, high = backbone(torch.randn(1, 3, 33, 33))
    high.sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_torchvision_state_dict(tmp_path: Path) -> None:
    reference = torchvision.models.resnet18(num_classes=7).eval()
    # torchvision's own files predate the step counter of BatchNorm.
    weights = {k: v for k, v in reference.state_dict().items() if "num_batches" not in k}
    torch.save(weights, tmp_path / "resnet18.pth")

    backbone = Backbone("resnet18", tmp_path / "resnet18.pth").eval()

    x = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        stem = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
        torch.testing.assert_close(backbone(x)[0], reference.layer1(stem))
    torch.testing.assert_close(
        backbone.features["layer4"][1].conv2.weight, reference.layer4[1].conv2.weight
    )


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050", CSPNEXT])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_state_dict(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    whole = timm.create_model(name)
    if suffix == ".safetensors":
        save_file(whole.state_dict(), path)
    else:
        torch.save({"epoch": 3, "state_dict": whole.state_dict()}, path)

    backbone = Backbone(name, str(path)).eval()

    # timm loads the same file by its own rules.
    reference = timm.create_model(
        name,
        features_only=True,
        output_stride=16,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for feature in backbone(x):
            assert any(torch.equal(feature, other) for other in reference(x))


def _resnet18_weights() -> dict[str, torch.Tensor]:
    return timm.create_model("resnet18").state_dict()


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet26").state_dict(), path)
    with pytest.raises(ValueError, match="pth' does not fit backbone 'resnet18'") as error:
        Backbone("resnet18", path)
    assert "unexpected (layer1.0.bn3.bias, " in str(error.value)
    assert "layer1.0.conv1.weight (64, 64, 1, 1) instead of (64, 64, 3, 3)" in str(error.value)
    assert "\n" not in str(error.value)


def test_incomplete_weights(tmp_path: Path) -> None:
    weights = _resnet18_weights()
    del weights["layer3.1.conv2.weight"]
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"1 missing \(layer3\.1\.conv2\.weight\)$"):
        Backbone("resnet18", tmp_path / "weights.pth")


def test_weights_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"backbone_weights: no file at '.*nothing\.pth'"):
        Backbone("resnet18", tmp_path / "nothing.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pickled.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    (tmp_path / "garbage.pth").write_bytes(b"not a checkpoint")
    (tmp_path / "garbage.safetensors").write_bytes(b"not a checkpoint")
    whole = tmp_path / "whole.pth"
    torch.save(_resnet18_weights(), whole)
    (tmp_path / "truncated.pth").write_bytes(whole.read_bytes()[:1000])
    for path in sorted(tmp_path.iterdir()):
        if path != whole:
            with pytest.raises(ValueError, match=f"{path.name}' is not a file of tensors"):
                Backbone("resnet18", path)


def test_unknown_backbone() -> None:
    with pytest.raises(ValueError, match=r"unknown backbone 'resnet55': did you mean resnet50"):
        Backbone("resnet55")
    with pytest.raises(ValueError, match=r"unknown backbone 'hf-hub:a/b'"):
        Backbone("hf-hub:a/b")
    with pytest.raises(ValueError, match=r"'resnet18\.nobody': timm has no pretrained weights"):
        Backbone("resnet18.nobody")


@pytest.mark.parametrize("name", ["vgg11", "vit_tiny_patch16_224", "densenet121", "ghostnet_100"])
def test_backbone_without_output_stride(name: str) -> None:
    with pytest.raises(ValueError, match=f"backbone '{name}' does not support output_stride=16"):
        Backbone(name)


def test_backbone_that_is_not_dilated(monkeypatch: pytest.MonkeyPatch) -> None:
    undilated = timm.create_model("resnet18", features_only=True)
    monkeypatch.setattr(backbone_module, "_dilated_features", lambda *_: undilated)
    with pytest.raises(ValueError, match=r"'resnet18' gives features at strides \[2, 4, 8, 16, 32"):
        Backbone("resnet18")


def test_timm_weights_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, pretrained: bool, **kwargs: object) -> None:
        assert pretrained
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(FileNotFoundError, match=r"backbone_weights: timm's weights of 'resnet18'"):
        Backbone("resnet18", "timm")


def test_multi_grid_is_the_papers_and_costs_nothing() -> None:
    with torch.device("meta"):
        plain, grid = Backbone("resnet50"), Backbone("resnet50", multi_grid=(2, 4, 8))
        high = grid(torch.empty(1, 3, 513, 513))[1]
    assert high.shape == (1, 2048, 33, 33)
    assert [block.conv2.dilation[0] for block in plain.features["layer4"]] == [1, 2, 2]
    assert [block.conv2.dilation[0] for block in grid.features["layer4"]] == [2, 4, 8]
    assert count_flops(plain, (513, 513)) == count_flops(grid, (513, 513))
    shapes = [{key: t.shape for key, t in net.state_dict().items()} for net in (plain, grid)]
    assert shapes[0] == shapes[1]


def test_multi_grid_of_fewer_blocks_and_of_other_backbones() -> None:
    layer = Backbone("resnet18", multi_grid=(2, 4, 8)).features["layer4"]
    assert [(block.conv1.dilation[0], block.conv2.dilation[0]) for block in layer] == [
        (2, 2),
        (4, 4),
    ]
    with pytest.warns(UserWarning, match="multi_grid: backbone 'regnetx_002' is not a ResNet"):
        other = Backbone("regnetx_002", multi_grid=(2, 4, 8))
    assert str(other) == str(Backbone("regnetx_002"))


@pytest.mark.parametrize("grid", [(2, 4), (2, 4, 0), ()])
def test_bad_multi_grid(grid: tuple[int, ...]) -> None:
    message = "multi_grid: expected a dilation of at least 1 for each of the 3 blocks of 'resnet50'"
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        Backbone("resnet50", multi_grid=grid)
