from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.harness import Effort
from benchmarks.machine import Machine
from benchmarks.measure import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A session that measures small sizes for a moment, without torch.compile."""
    return Bench(Machine("cpu", 1), Effort(seconds=0, least=2), True, tmp_path, {"run": "now"})


def make(root: Path) -> Path:
    """A repository with made-up rows, before the report was written."""
    import repository  # here: without pandas, test modules that need it are skipped, others run

    return repository.make(root)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make(tmp_path)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, for tests that only read."""
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import repository

    root = make(tmp_path_factory.mktemp("drawn"))
    assert repository.run(root) == 0
    return root


@pytest.fixture
def written(drawn: Path, tmp_path: Path) -> Path:
    """Such a repository with its report."""
    return shutil.copytree(drawn, tmp_path / "root")
