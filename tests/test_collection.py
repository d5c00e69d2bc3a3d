"""tests/conftest.py: what `pytest -m gpu` does where a package is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

MARKED = "import pytest\n\n@pytest.mark.gpu\ndef test_gpu():\n    pass\n"


def test_a_missing_package_skips_gpu_tests_and_nothing_else(tmp_path: Path):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tmp_path / "ours").mkdir()
    shutil.copy(Path(__file__).parent / "conftest.py", tests)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gpu: g']\n")
    (tests / "test_here.py").write_text(MARKED)
    (tests / "test_theirs.py").write_text(f"import no_such_package.part\n{MARKED}")
    (tests / "test_ours.py").write_text(f"import ours.missing\n{MARKED}")

    # Both in one process, as its imports take seconds.
    both = "import pytest; pytest.main(['-m', 'gpu', '-rsE']); pytest.main(['-rsE'])"
    command = [sys.executable, "-c", both]
    environment = {**os.environ, "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    _, gpu, everything = done.stdout.split("test session starts")
    assert "collected 1 item / 1 error / 1 skipped" in gpu
    assert "no_such_package is not installed" in gpu
    assert "ERROR tests/test_ours.py" in gpu
    assert "collected 1 item / 2 errors" in everything
    assert "ERROR tests/test_theirs.py" in everything
