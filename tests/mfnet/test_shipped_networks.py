"""The trained networks in the package."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import mfnet
from mfnet.checkpoint import SHIPPED, shipped_networks

NAMES = ("camvid_light", "voc_animals_light")
LARGEST = 15_000_000  # bytes of one network


def test_their_names() -> None:
    assert tuple(shipped_networks()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_they_are_small_and_predict_at_the_images_size(name: str, tmp_path) -> None:
    folder = shipped_networks()[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) < LARGEST
    network = mfnet.load(name)
    noise = np.random.default_rng(0).integers(0, 256, (150, 211, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "street.png")
    labels = network.predict(tmp_path / "street.png")
    assert labels.shape == (150, 211)
    assert int(labels.max()) < len(network.class_names)
    probabilities = network.predict_probabilities(tmp_path / "street.png").float()
    assert bool((probabilities.std((1, 2)) > 0).any())  # it tells one pixel from another


@pytest.mark.parametrize("name", NAMES)
def test_they_tell_every_option(name: str) -> None:
    """So they stay what they are when a default changes."""
    told = json.loads((shipped_networks()[name] / "config.json").read_text("utf-8"))["network"]
    assert told == mfnet.load(name).network.network_config


def test_their_page_tells_of_each() -> None:
    page = (SHIPPED / "README.md").read_text("utf-8")
    assert all(f"## `{name}`" in page for name in NAMES)
    assert "TO BE FILLED IN" not in page
