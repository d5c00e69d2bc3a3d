"""csrc/cpu's bfloat16 kernels on any processor: its sources, with emulated AMX and AVX512-BF16.

What this cannot see: time, and how the compiler combines the real instructions.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulator
import pytest

HERE = Path(__file__).parent
# The tables of all that is bfloat16, and special values. The units differ in the product of a block
# alone, so one of them takes the op's table only.
FILES = {
    "amx_bf16": ("cpu_bfloat16", "backends", "factor_backends", "factor_ops"),
    "avx512_bf16": ("cpu_bfloat16", "backends"),
}
TESTS = """
native and agrees and not temperatures
and (bfloat16 or any_shape or factor_backends and not (sliced or second))
or native and bfloat16 and (nan or infinite or a_channel_of_many or no_gradient)
or lie_otherwise or unrounded_features or any_number_of_threads and bfloat16
""".replace("\n", " ")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulated")
    emulator.package_with_bfloat16(folder)
    return folder


# Not parametrized: two workers would compile the package twice.
def test_numerics(package):
    for products, names in FILES.items():
        check_numerics(package, products, names)


def check_numerics(package: Path, products: str, names: tuple[str, ...]) -> None:
    files = (f"test_{name}.py" for name in names)
    environment = {"PYTHONPATH": str(package), "MFOPS_CPU_PRODUCTS": products}
    options = ("-q", "-p", "no:cacheprovider", "-m", "not gpu", "-k", TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(HERE / file for file in files)],
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        cwd=package,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout  # as where the instruction is missing
