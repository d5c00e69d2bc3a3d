"""Products of bfloat16 features on the CPU: by AMX or AVX512-BF16 where it has them, else float32.

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
from runs import BFLOAT16_MISSING, BFLOAT16_UNITS, Run

HERE = Path(__file__).parent
NO_AMX = "the processor has no AMX with bfloat16"
has_units = pytest.mark.skipif(bool(BFLOAT16_MISSING), reason=BFLOAT16_MISSING)
has_amx = pytest.mark.skipif(BFLOAT16_UNITS != "AMX", reason="the processor has no AMX")


def run_with(products: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "MFOPS_CPU_PRODUCTS": products, "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],  # in `tests` a folder has the package's name
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    "products",
    [pytest.param("float32", marks=has_units), pytest.param("avx512_bf16", marks=has_amx)],
)
def test_numerics_of_products_as_on_a_lesser_processor(products):
    """In float32 within the tighter bounds of that."""
    cases = "native and cpu and bfloat16 or native and cpu and 33 and contiguous"
    done = run_with(
        products,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"agrees_with and ({cases})"),
        *map(str, (HERE / "test_backends.py", HERE / "test_factor_backends.py")),
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@has_units
def test_the_products_differ():
    """Or the test above would run the processor's best units again.

    In float32 products D is not rounded. Of 1 + 2^30 + 0 - 2^30 only AMX keeps the 1: it sums every
    second product apart.
    """
    code = (
        "import torch, mfops; torch.manual_seed(0);"
        "x, y, z = (torch.randn(2, *s).bfloat16() for s in ((40, 50), (40, 7), (7, 50)));"
        "from mfops.backends import BACKENDS as b;"
        "one = torch.tensor(4e3), x, y, z, False, True, False;"
        "print(b['native'].reconstruct_backward(None, *one)[1].double().sum().item());"
        "y = torch.tensor([[[1.0, 2.0**15, 0.0, -(2.0**15)]]]).bfloat16(); z = y.abs().mT;"
        "print(b['native'].reconstruct(torch.ones(1, 1, 1).bfloat16(), y, z)[0].item())"
    )
    every = ["float32", "avx512_bf16", *(["amx_bf16"] if BFLOAT16_UNITS == "AMX" else [])]
    results = [run_with(products, "-c", code).stdout for products in every]
    assert len(set(results)) == len(every)
    sums = [float(result.split()[0]) for result in results]
    assert sums == pytest.approx([sums[0]] * len(every), rel=0.1)


@pytest.mark.parametrize(
    ("products", "message"),
    [
        ("bf16", "MFOPS_CPU_PRODUCTS: expected float32, avx512_bf16 or amx_bf16, got 'bf16'"),
        pytest.param(
            "avx512_bf16",
            f"MFOPS_CPU_PRODUCTS=avx512_bf16: {BFLOAT16_MISSING}",
            marks=pytest.mark.skipif(not BFLOAT16_MISSING, reason="the processor has AVX512-BF16"),
        ),
        pytest.param(
            "amx_bf16",
            f"MFOPS_CPU_PRODUCTS=amx_bf16: {BFLOAT16_MISSING or NO_AMX}",
            marks=pytest.mark.skipif(BFLOAT16_UNITS == "AMX", reason="the processor has AMX"),
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
    which = f"in float32: {BFLOAT16_MISSING}" if BFLOAT16_MISSING else f"by {BFLOAT16_UNITS}"
    assert which in run_with("", "-m", "mfops").stdout


def test_torchs_own_products_stay_right():
    """They may use the same registers, AMX's, whose setting is the thread's."""
    torch.manual_seed(0)
    a, b = torch.randn(96, 200).bfloat16(), torch.randn(200, 72).bfloat16()
    expected = a @ b
    for rank in (7, 32, 33):
        x, y, z = (torch.randn(1, *s).bfloat16() for s in ((50, 70), (50, rank), (rank, 70)))
        x_hat = Run("native", "cpu").reconstruct(x, y, z)[0]
        assert torch.equal(a @ b, expected)
        assert torch.equal(Run("native", "cpu").reconstruct(x, y, z)[0], x_hat)


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
