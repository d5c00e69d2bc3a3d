from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set in VOC layout, 4 + 2 images of 33 x 33; no test changes it."""
    from mfnet.data import synthetic  # `pytest -m gpu` may run without what this imports

    folder = tmp_path_factory.mktemp("data") / "voc"
    return synthetic.generate(folder, train=4, val=2, size=33)
