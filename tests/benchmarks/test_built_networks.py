"""Networks that the accuracy benchmark builds: smp's, padded, and variants of MFNet Light."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.networks import smp
from benchmarks.trainer import BUILT
from benchmarks.variants import VARIANTS, variant
from mfnet import create_model


@pytest.fixture(scope="module")
def light() -> nn.Module:
    return create_model("mfnet_light", 3, "test_resnet")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_from_mfnet_light_and_trains(light, name):
    network = variant(name, 3, "test_resnet").train()
    changed = {key: value.shape for key, value in network.state_dict().items()}
    if name not in ("learned bases", "reconstruction loss", "aligned corners"):
        assert changed != {key: value.shape for key, value in light.state_dict().items()}
    logits = network(torch.randn(2, 3, 65, 97))
    assert logits.shape == (2, 3, 65, 97)
    logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_a_network_of_smp_takes_any_size_and_a_file_of_weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("resnet18").state_dict(), path)
    network = smp("FPN", 3, "resnet18", path).eval()
    given = create_model("mfnet_light", 3, "resnet18", path).backbone.features.state_dict()
    found = network.encoder.model.state_dict()
    assert found.keys() == given.keys()
    assert all(torch.equal(found[key], given[key]) for key in given)
    image = torch.randn(1, 3, 70, 41)
    padded = torch.nn.functional.pad(image, (0, 23, 0, 26))
    with torch.no_grad():
        torch.testing.assert_close(network(image), network.network(padded)[..., :70, :41])


@pytest.mark.parametrize("build", [smp, variant])
def test_an_unknown_name(build):
    with pytest.raises(ValueError, match=r"name: expected one of .*, got 'no such'"):
        build("no such")


def test_every_one_has_a_name_on_the_command_line():
    assert {"smp PAN", "light: no factorization"} <= BUILT.keys()
    for build, name in BUILT.values():
        assert build in (smp, variant)
        assert "," not in name  # --contexts takes names between commas
