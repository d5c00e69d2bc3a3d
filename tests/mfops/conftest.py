from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from gpu import runs_or_skips

import mfops

if os.environ.get("TRITON_INTERPRET") == "1":  # set by test_triton.py
    from interpreter import patch_language_once

    patch_language_once()


@pytest.fixture(params=["native", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that the whole test runs on, by explicit choice."""
    with mfops.use_backend(request.param):
        runs_or_skips(request.param)
        yield request.param


@pytest.fixture
def native() -> None:
    """For tests of the native kernels alone."""
    with mfops.use_backend("native"):
        runs_or_skips("native")
