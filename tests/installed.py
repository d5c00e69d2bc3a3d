"""What an installation has to do, apart from the source tree: `.ci/run` names this file to pytest.

It runs in an environment that held what builds the package, torch above all, when the package's
wheel went in: without the extra `mfnet` (`-k "not mfnet"`), then with it (`-k mfnet`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mfops


def test_mfops_is_the_installed_one() -> None:
    assert Path(mfops.__file__).is_relative_to(sys.prefix)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_kernels_were_built() -> None:
    assert mfops.available_backends()["native"] is None


def test_the_report_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "mfops"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout


def test_forward_and_backward() -> None:
    x = torch.randn(2, 48, 5, 7, requires_grad=True)
    y = torch.randn(48, 8, requires_grad=True)
    z = torch.randn(8, 35, requires_grad=True)
    x_hat, mse = mfops.factorized_reconstruction(x, y, z)
    torch.testing.assert_close(mse, torch.nn.functional.mse_loss(x_hat.expand_as(x), x))
    (x_hat.square().mean() + mse).backward()
    assert all(tensor.grad.isfinite().all() and tensor.grad.any() for tensor in (x, y, z))


def test_the_module() -> None:
    x = torch.randn(2, 48, 5, 7)
    context = mfops.FactorizedContext(48, rank=8, size=(5, 7))
    out = context(x)
    assert out.shape == x.shape
    out.mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in context.parameters())


def test_torch_is_required() -> None:
    requirements = importlib.metadata.requires("mfops")
    assert any(requirement.startswith("torch>") for requirement in requirements)


def test_the_op_alone_brings_no_trainer() -> None:
    names = ("lightning", "timm", "torchvision", "matplotlib", "scipy", "tensorboard")
    assert [name for name in names if importlib.util.find_spec(name)] == []


def test_a_missing_extra_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", "import mfnet"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install 'mfops[mfnet]'" in done.stderr.splitlines()[-1]


def test_mfnet_predicts_with_packed_weights() -> None:
    import mfnet

    package = Path(mfnet.__file__).parent
    assert package.is_relative_to(sys.prefix)
    assert list(package.glob("configs/*.yaml"))
    street = torch.zeros(3, 90, 120, dtype=torch.uint8)
    assert mfnet.load("camvid_light").predict(street).shape == (90, 120)


def test_mfnet_has_a_command_line() -> None:
    command = [Path(sys.executable).parent / "mfnet", "--help"]
    assert subprocess.run(command, capture_output=True).returncode == 0
