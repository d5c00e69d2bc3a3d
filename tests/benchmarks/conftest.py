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


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with made-up rows, before the report was written, for tests that only read."""
    import repository  # here: without pandas, test modules that need it are skipped, others run

    return repository.make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """One to change."""
    return shutil.copytree(made, tmp_path / "root")


@pytest.fixture(scope="session")
def drawn(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its report, for tests that only read."""
    import repository

    root = shutil.copytree(made, tmp_path_factory.mktemp("drawn") / "root")
    assert repository.run(root) == 0
    return root


@pytest.fixture
def written(drawn: Path, tmp_path: Path) -> Path:
    """One with its report to change."""
    return shutil.copytree(drawn, tmp_path / "root")
