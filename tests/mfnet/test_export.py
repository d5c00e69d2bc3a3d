"""Contexts and networks, exported at one size, are themselves at every other."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from export_cases import FREE, in_onnxruntime, saved_and_loaded, traced, with_awkward_norms
from timm.layers import StdConv2dSame, create_conv2d, create_pool2d
from timm.models import register_model
from torch import nn

import mfnet
from mfnet.contexts import CONTEXTS
from mfnet.contexts.pooling import AdaptiveMeans
from mfops import exporting
from mfops.methods import METHODS

# An older torch exports of a network that pools, as ResNets do, whether its sizes are even.
pooling_of_free_sizes = pytest.mark.xfail(
    torch.__version__ < "2.13",
    reason="torch's pooling of free sizes is for those like the example's",
)
SIZES = [(2, 8, 9, 9), (1, 8, 7, 11), (3, 8, 12, 5)]  # the first is the example's grid


# Those with something of their own to export: the Hamburgers differ in their methods, all of which
# tests/mfops/test_export_factors.py exports; all of ASPP is in the separable one, of none in each.
OWN = [name for name in CONTEXTS if name not in ("nmf", "vq", "aspp", "none")]


def context_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, object] = {"context_size": (9, 9)} if name == "mf" else {}
    if name in METHODS:
        options["steps"] = 2
    return with_awkward_norms(CONTEXTS[name](8, 16, **options))


@pytest.mark.parametrize("name", OWN)
def test_onnx_of_a_context_from_one_image(name: str) -> None:
    context = context_of(name)
    run = in_onnxruntime(context, torch.randn(1, 8, 9, 9))
    for size in SIZES:
        x = torch.randn(size)
        torch.testing.assert_close(run(x), context(x), rtol=1e-4, atol=1e-4)


# Strictly, torch.export traces as torch.compile does, which other tests try on every context.
@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in OWN), ("em", True), ("ppm", True)]
)
def test_a_saved_program_of_a_context(name: str, strict: bool) -> None:
    context = context_of(name)
    run = saved_and_loaded(context, torch.randn(2, 8, 9, 9), strict)
    for size in SIZES:
        x = torch.randn(size)
        torch.testing.assert_close(run(x), context(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.filterwarnings("ignore")  # torch's of jit: that it is deprecated, that sizes are read
def test_a_traced_context(name: str) -> None:
    context = context_of(name)
    run = traced(context, torch.randn(1, 8, 9, 9))
    for size in SIZES:
        x = torch.randn(size)
        torch.testing.assert_close(run(x), context(x), rtol=1e-5, atol=1e-5)


def network(name: str, context: str | None = None, backbone: str = "test_resnet") -> nn.Module:
    torch.manual_seed(0)
    size = (5, 7) if name == "mfnet" else None
    model = mfnet.create_model(name, 5, backbone, context=context, context_size=size)
    return with_awkward_norms(model)


@pooling_of_free_sizes
def test_onnx_of_a_network_from_one_image() -> None:
    model = network("deeplabv3plus", "nonlocal")
    run = in_onnxruntime(model, torch.randn(1, 3, 65, 97))
    for size in [(2, 3, 65, 97), (1, 3, 99, 64), (3, 3, 33, 81)]:
        x = torch.randn(size)
        logits = model(x)
        assert (run(x) - logits).abs().max() < 1e-4 * logits.abs().max()


@pooling_of_free_sizes
@pytest.mark.parametrize("name", ["mfnet", "emanet"])
def test_a_saved_program_of_a_network_for_upright_and_wide_images(name: str) -> None:
    model = network(name)
    run = saved_and_loaded(model, torch.randn(2, 3, 65, 97), strict=False)
    for size in [(2, 3, 65, 97), (1, 3, 99, 64), (3, 3, 33, 81)]:
        x = torch.randn(size)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


@register_model
def tiny_tf_efficientnet(pretrained: bool = False, **options: Any) -> nn.Module:
    """timm's tiny EfficientNet, padded as those that were trained in TensorFlow."""
    return timm.create_model("test_efficientnet", pretrained, pad_type="same", **options)


# Odd, even, and multiples of 32: TensorFlow's padding is another for each of them, in each stage.
AWKWARD = [(2, 3, 97, 129), (1, 3, 33, 34), (2, 3, 95, 66), (1, 3, 64, 96)]


def test_onnx_of_mfnet_light_on_a_backbone_with_same_padding() -> None:
    model = network("mfnet_light", backbone="tiny_tf_efficientnet")
    run = in_onnxruntime(model, torch.randn(AWKWARD[0]))
    for size in AWKWARD:
        x = torch.randn(size)
        logits = model(x)
        assert (run(x) - logits).abs().max() < 1e-4 * logits.abs().max()


def test_a_saved_program_of_a_network_on_a_padded_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether there is anything to pad, and to cut off again, is asked of each image anew."""
    monkeypatch.setattr("mfnet.backbone._multiple_of_sizes", lambda *_: 32)
    model = network("mfnet_light")
    run = saved_and_loaded(model, torch.randn(AWKWARD[0]), strict=False)
    for size in AWKWARD:
        x = torch.randn(size)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


def sizes_of(*layers: nn.Module) -> list[str]:
    """The expressions that torch.export finds for the sizes of what the layers return."""
    program = torch.export.export(
        nn.Sequential(*layers), (torch.randn(2, 3, 97, 129),), dynamic_shapes=(FREE,)
    )
    (result,) = next(iter(reversed(program.graph.nodes))).args[0]
    return [str(size) for size in result.meta["val"].shape]


def test_free_sizes_behind_same_padding_are_those_behind_fixed_padding() -> None:
    """Longer expressions grow with each layer until torch.export does not end."""
    same = (
        create_conv2d(3, 3, 3, stride=2, padding="same"),
        StdConv2dSame(3, 3, 1, 2, "same"),
        create_pool2d("max", 3, 2, padding="same"),
    )
    fixed = (nn.Conv2d(3, 3, 3, 2, 1), nn.Conv2d(3, 3, 1, 2), nn.MaxPool2d(3, 2, 1))
    assert sizes_of(*same) == sizes_of(*fixed)


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(9, 7), (12, 33), (1, 5)])
def test_exported_means_are_torchs(
    bins: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = AdaptiveMeans(bins)
    x = torch.randn(2, 4, *size)
    expected = nn.AdaptiveAvgPool2d(bins)(x)
    assert torch.equal(pool(x), expected)
    monkeypatch.setattr("mfnet.contexts.pooling.is_exporting", lambda: True)
    torch.testing.assert_close(pool(x), expected, rtol=1e-6, atol=1e-6)


def test_nothing_is_exported_in_eager_mode() -> None:
    assert not exporting.is_exporting()
    assert not exporting.is_exporting_onnx()
