from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    """A test that sets torch's number of threads sets it for itself alone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class SkippedWithoutItsPackages(pytest.Module):
    """A test module that is skipped, with the reason, where a package it imports is missing."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            if not isinstance(cause, ModuleNotFoundError) or cause.name is None:
                raise
            if (ROOT / cause.name.split(".")[0]).exists():
                raise  # one of ours is never merely missing
            pytest.skip(f"{cause.name} is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    """`pytest -m gpu` runs with what a machine has; the whole suite needs all of its packages."""
    if parent.config.option.markexpr != "gpu":
        return None
    return SkippedWithoutItsPackages.from_parent(parent, path=module_path)
