from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import Effort
from benchmarks.machine import Machine
from benchmarks.measure import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A session that measures small sizes for a moment, without torch.compile."""
    return Bench(Machine("cpu", 2), Effort(seconds=0, least=2), True, tmp_path, {"run": "now"})
