"""What is said where packages that mfnet needs are not installed, and what is imported without."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Stands in for an environment without the packages: the first finder says that there are none.
BLOCK = """
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing)
"""
COMMAND = "pip install 'mfops[mfnet]'"


def python(code: str, missing: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK.format(names=missing) + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("import mfnet", "torchvision"),
        ("from mfnet import load", "huggingface_hub"),
    ],
)
def test_python_names_the_command_that_installs_a_package(code: str, missing: str) -> None:
    result = python(code, (missing,))
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last == f"ModuleNotFoundError: mfnet needs {missing}: {COMMAND}"


@pytest.mark.parametrize(
    ("start", "missing"),
    [
        ("sys.argv = ['-m']; import runpy; runpy.run_module('mfnet', run_name='__main__')", "timm"),
        ("sys.argv = ['bin/mfnet', '--help']; from mfnet.__main__ import main; main()", "timm"),
        ("from mfnet.__main__ import main; main(['--help'])", "lightning"),
    ],
)
def test_the_command_line_says_so_in_one_line(start: str, missing: str) -> None:
    result = python(start, (missing,))
    assert result.returncode == 1
    assert result.stderr == f"mfnet: error: mfnet needs {missing}: {COMMAND}\n"


def test_networks_need_no_trainer() -> None:
    """Neither Lightning nor what only it needs is imported, which would take seconds."""
    code = """
import mfnet
mfnet.create_model("mfnet", backbone="resnet18")
"""
    result = python(
        code, ("lightning", "torchmetrics", "jsonargparse", "tensorboard", "matplotlib")
    )
    assert result.returncode == 0, result.stderr
