"""The pages' Python blocks run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import mfops
from mfops.methods import METHODS

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


PAGES = ("README.md", "docs/data.md", "docs/factorizers.md", "docs/training.md")
BLOCKS = [(page, number) for page in PAGES for number in range(len(blocks(page)))]


@pytest.fixture
def known_methods():
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize(("page", "number"), BLOCKS)
def test_the_blocks_of_a_page(page: str, number: int, known_methods: None) -> None:
    exec(compile(blocks(page)[number], f"{page}, block {number}", "exec"), {})


def test_the_method_of_twenty_lines_is_k_means(known_methods: None) -> None:
    (block,) = [block for block in blocks("docs/factorizers.md") if "mfops.Method" in block]
    assert len([line for line in block.splitlines() if line]) <= 20
    exec(block, {})
    torch.manual_seed(0)
    x = torch.randn(2, 6, 50)
    y0 = METHODS["kmeans"].noise(6, 4)
    errors = []
    for steps in (1, 2, 5, 20):
        y, z = mfops.factorize(x, y0, "kmeans", steps)
        errors.append(mfops.factorized_mse(x, y, z).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]
    nearest = torch.cdist(x.mT, y.mT).argmin(-1)
    assert torch.equal(z.argmax(1), nearest)
