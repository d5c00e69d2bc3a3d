"""Products of bfloat16 features on the CPU: by its own instruction where it has one, else float32.

The tables of test_backends.py and test_factor_backends.py take the way that this processor takes;
here some of them take the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, check
from runs import BFLOAT16_MISSING, Run

HERE = Path(__file__).parent
native_instruction = pytest.mark.skipif(bool(BFLOAT16_MISSING), reason=BFLOAT16_MISSING)


def run_with(products: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "MFOPS_CPU_PRODUCTS": products, "OMP_NUM_THREADS": "1"},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=600,
    )


@native_instruction
def test_numerics_of_products_in_float32():
    """As on a processor without the instruction: within the tighter bounds of float32."""
    cases = "native and cpu and bfloat16 or native and cpu and 33 and contiguous"
    done = run_with(
        "float32",
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"agrees_with and ({cases})"),
        *("test_backends.py", "test_factor_backends.py"),
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@native_instruction
def test_the_products_differ():
    """Or the test above would run the instruction again."""
    code = (
        "import torch, mfops; torch.manual_seed(0);"
        "x, y, z = (torch.randn(2, *s).bfloat16() for s in ((40, 50), (40, 7), (7, 50)));"
        "from mfops.backends import BACKENDS as b;"
        "one = torch.tensor(4e3), x, y, z, False, True, False;"
        "print(b['native'].reconstruct_backward(None, *one)[1].double().sum().item())"
    )
    sums = [run_with(products, "-c", code).stdout for products in ("float32", "bfloat16")]
    assert sums[0] != sums[1]
    assert float(sums[0]) == pytest.approx(float(sums[1]), rel=0.1)


@pytest.mark.parametrize(
    ("products", "message"),
    [
        ("bf16", "MFOPS_CPU_PRODUCTS: expected float32 or bfloat16, got 'bf16'"),
        pytest.param(
            "bfloat16",
            f"MFOPS_CPU_PRODUCTS=bfloat16: {BFLOAT16_MISSING}",
            marks=pytest.mark.skipif(not BFLOAT16_MISSING, reason="the processor has AVX512-BF16"),
        ),
    ],
)
def test_impossible_wishes(products, message):
    code = "import torch, mfops; x = torch.ones(1, 1, 1).bfloat16(); mfops.factorized_mse(x, x, x)"
    done = run_with(products, "-c", code)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"RuntimeError: {message}"
    assert message in run_with(products, "-m", "mfops").stdout


def test_the_report_says_which():
    assert "multiplied in float32: MFOPS_CPU_PRODUCTS=float32" in (
        run_with("float32", "-m", "mfops").stdout
    )
    which = f"in float32: {BFLOAT16_MISSING}" if BFLOAT16_MISSING else "by AVX512-BF16"
    assert which in run_with("", "-m", "mfops").stdout


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_that_lie_otherwise(layout):
    """G' of one value, of other strides than X, or of every second pixel: products are float32."""
    torch.manual_seed(0)
    shape, run = (2, 30, 40), Run("native", "cpu")
    x = torch.randn(shape) if layout == "contiguous" else torch.randn(2, 40, 30).mT
    for grad_x_hat in (
        torch.ones(()).expand(shape),
        torch.randn(2, 40, 30).mT,
        torch.randn(shape),
        torch.randn(2, 30, 80)[..., ::2],
    ):
        tensors = x, torch.randn(2, 30, 5), torch.randn(2, 5, 40), grad_x_hat
        case = Case(*(t.bfloat16() for t in tensors), torch.tensor(2400.0))
        check(run, case, run.operands(torch.bfloat16))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_error_is_of_unrounded_features(layout):
    """X = Y Z to the last bit but one of X': an error of the rounded X' would be zero."""
    x = torch.full((1, 8, 64), 1.0, dtype=torch.bfloat16)
    x = x if layout == "contiguous" else x.mT.contiguous().mT
    y = torch.full((1, 8, 2), 1.0, dtype=torch.bfloat16)
    z = torch.stack([torch.full((64,), 1.0), torch.full((64,), 2.0**-10)])[None].bfloat16()
    x_hat, mse = Run("native", "cpu").reconstruct(x, y, z)
    assert torch.equal(x_hat, x)
    assert mse.item() == pytest.approx(2.0**-20, rel=1e-6)
