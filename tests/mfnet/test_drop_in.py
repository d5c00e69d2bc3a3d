"""Contexts in networks of other libraries, and the page that tells how."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_resnet50

from mfnet.contexts import CONTEXTS, LossContext

CLASSES = 5
PAGE = (Path(__file__).parents[2] / "docs" / "drop_in.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def smp_network() -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="smp is not installed")
    return smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=CLASSES)


@pytest.fixture(scope="module")
def torchvision_network() -> nn.Module:
    return deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)


def train_and_evaluate(network: nn.Module, logits_of: Any, images: Tensor) -> None:
    network.train().zero_grad()
    logits_of(network(images)).square().mean().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    with torch.no_grad():
        logits = logits_of(network.eval()(images))
    assert logits.shape == (len(images), CLASSES, *images.shape[-2:])
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", CONTEXTS)
def test_in_deeplabv3plus_of_segmentation_models_pytorch(smp_network: nn.Module, name: str) -> None:
    smp_network.decoder.aspp[0] = CONTEXTS[name](smp_network.encoder.out_channels[-1], 256)
    train_and_evaluate(smp_network, lambda out: out, torch.randn(1, 3, 64, 80))


@pytest.mark.parametrize("name", ["mf", "em"])  # what they all take and give is the same
def test_in_deeplabv3_of_torchvision(torchvision_network: nn.Module, name: str) -> None:
    torchvision_network.classifier[0] = CONTEXTS[name](2048, 256)
    train_and_evaluate(torchvision_network, lambda out: out["out"], torch.randn(1, 3, 65, 65))


# The page


def of_mmseg(block: str) -> bool:
    return "mmseg" in block or "ContextHead" in block


@pytest.mark.parametrize("number", [n for n, block in enumerate(BLOCKS) if not of_mmseg(block)])
def test_the_pages_blocks_run(number: int) -> None:
    block = BLOCKS[number]
    if "segmentation_models_pytorch" in block:
        pytest.importorskip("segmentation_models_pytorch", reason="smp is not installed")
    exec(compile(block, f"docs/drop_in.md, block {number}", "exec"), {})


def test_the_page_names_every_context() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows))) == set(CONTEXTS)


class StandIn(nn.Module):
    """As much of mmsegmentation 1.x's BaseDecodeHead as a head relies on, by its signatures."""

    def __init__(
        self, in_channels: int, channels: int, *, num_classes: int, in_index: int = -1
    ) -> None:
        super().__init__()
        self.in_channels, self.channels, self.in_index = in_channels, channels, in_index
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def _transform_inputs(self, inputs: list[Tensor]) -> Tensor:
        return inputs[self.in_index]

    def cls_seg(self, feat: Tensor) -> Tensor:
        return self.conv_seg(feat)

    def _stack_batch_gt(self, batch_data_samples: list[Any]) -> Tensor:
        return torch.stack([sample.gt_sem_seg.data for sample in batch_data_samples])

    def loss(
        self, inputs: list[Tensor], batch_data_samples: list[Any], train_cfg: Any
    ) -> dict[str, Tensor]:
        return self.loss_by_feat(self.forward(inputs), batch_data_samples)

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list[Any]) -> dict[str, Tensor]:
        labels = self._stack_batch_gt(batch_data_samples)
        logits = F.interpolate(seg_logits, labels.shape[2:], mode="bilinear")
        return {"loss_ce": F.cross_entropy(logits, labels.squeeze(1), ignore_index=255)}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What mmsegmentation's blocks define, with a stand-in in its place."""
    registered = SimpleNamespace(register_module=lambda: lambda head: head)
    contents = {
        "mmseg": {},
        "mmseg.models": {},
        "mmseg.models.decode_heads": {},
        "mmseg.models.decode_heads.decode_head": {"BaseDecodeHead": StandIn},
        "mmseg.registry": {"MODELS": registered},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    namespace: dict[str, Any] = {}
    for block in filter(of_mmseg, BLOCKS):
        exec(compile(block, "docs/drop_in.md, mmsegmentation", "exec"), namespace)
    return namespace


def head_of(recipe: dict[str, Any], **changes: Any) -> nn.Module:
    settings = {**recipe["decode_head"], "in_channels": 8, "channels": 16, **changes}
    assert settings.pop("type") == "ContextHead"
    return recipe["ContextHead"](**settings)


def features_and_samples() -> tuple[list[Tensor], list[Any]]:
    features = [torch.randn(2, 8, 5, 6) for _ in range(4)]
    masks = torch.randint(21, (2, 1, 40, 48))
    return features, [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=mask)) for mask in masks]


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_recipe_for_mmsegmentation_on_a_stand_in(recipe: dict[str, Any], name: str) -> None:
    options = {"num_classes": 21} if name == "encoding" else {}
    head = head_of(recipe, context=name, options=options, loss_weight=0.3)
    features, samples = features_and_samples()
    assert head(features).shape == (2, 21, 5, 6)

    losses = head.loss(features, samples, train_cfg={})
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in head.parameters() if p.requires_grad)
    own = isinstance(head.context, LossContext)
    assert losses.keys() == ({"loss_ce", "loss_recon"} if own else {"loss_ce"})


def test_the_recipes_loss_is_the_contexts_own_with_its_weight(recipe: dict[str, Any]) -> None:
    head = head_of(recipe, loss_weight=0.3).eval()
    assert head.context.factorized.size == (64, 64)
    features, samples = features_and_samples()
    _, expected = head.context(features[3], return_loss=True)
    losses = head.loss(features, samples, train_cfg={})
    torch.testing.assert_close(losses["loss_recon"], 0.3 * expected)
    torch.testing.assert_close(
        losses["loss_ce"], StandIn.loss(head, features, samples, {})["loss_ce"]
    )
