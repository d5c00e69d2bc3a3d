"""The pages' Python blocks run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mfops.methods import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "factorizers.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def known_methods():
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_factorizers_page(number: int, known_methods: None) -> None:
    exec(compile(BLOCKS[number], f"docs/factorizers.md, block {number}", "exec"), {})


def test_a_method_takes_twenty_lines() -> None:
    (block,) = [block for block in BLOCKS if "mfops.Method" in block]
    lines = [line for line in block.splitlines() if line]
    assert len(lines) <= 20
