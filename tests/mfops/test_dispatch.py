"""Which backend runs, who is told, and what an explicit choice does."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys

import pytest
import torch

import mfops
from mfops import dispatch

X, Y, Z = torch.randn(2, 6, 20), torch.randn(6, 3), torch.randn(3, 20)


def test_available_backends():
    found = mfops.available_backends()
    assert list(found) == ["native", "triton", "reference"]
    assert found["reference"] is None
    assert found["triton"] == dispatch.NO_TRITON
    if found["native"] is None:
        extension = importlib.import_module("mfops._C")
        assert extension.build_info()["torch_stable_abi"] == "2.11"


def test_automatic_choice_falls_back_and_says_why_once(caplog):
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="mfops"):
        for _ in range(2):
            mfops.factorized_mse(X.double(), Y.double(), Z.double())
    reasons = [r.message for r in caplog.records if "native" in r.message]
    assert len(reasons) == 1
    assert "passed over" in reasons[0]


def test_a_missing_extension_is_a_warning(caplog, monkeypatch):
    dispatch._log_once.cache_clear()
    monkeypatch.setattr(dispatch, "EXTENSION_ERROR", "not built")
    mfops.factorized_mse(X, Y, Z)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    with mfops.use_backend("native"), pytest.raises(RuntimeError, match="not built"):
        mfops.factorized_mse(X, Y, Z)
    assert mfops.available_backends()["native"] == "not built"


def test_explicit_choice_never_falls_back():
    with mfops.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' cannot run"):
        mfops.factorized_mse(X, Y, Z)
    with mfops.use_backend("native"), pytest.raises(RuntimeError, match="'native' cannot run"):
        mfops.factorized_mse(X.double(), Y.double(), Z.double())


def test_choices_nest_and_end_with_the_block():
    with mfops.use_backend("triton"):
        with mfops.use_backend("reference"):
            mfops.factorized_mse(X, Y, Z)
        with pytest.raises(RuntimeError):
            mfops.factorized_mse(X, Y, Z)
    mfops.factorized_mse(X, Y, Z)


def test_unknown_backend():
    message = "backend: expected one of native, triton, reference, got 'cuda'"
    with pytest.raises(ValueError, match=message), mfops.use_backend("cuda"):
        pass


def test_backward_runs_where_forward_ran():
    y = Y.clone().requires_grad_()
    with mfops.use_backend("reference"):
        mse = mfops.factorized_mse(X, y, Z)
    with mfops.use_backend("triton"):
        mse.backward()
    assert y.grad is not None


@pytest.mark.parametrize(
    ("name", "error"),
    [("foo", "ValueError: MFOPS_BACKEND: expected one of"), ("triton", "RuntimeError: backend")],
)
def test_environment_variable(name, error):
    code = (
        "import torch, mfops; mfops.factorized_mse(*(torch.ones(1, 1, 1)[i:] for i in (0, 0, 0)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MFOPS_BACKEND": name},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(error)


def test_report_names_versions_and_backends():
    done = subprocess.run(
        [sys.executable, "-m", "mfops"], capture_output=True, text=True, check=True
    )
    for word in ("mfops", "torch", "GPU", "extension", "backend native", "backend reference"):
        assert word in done.stdout
    assert torch.__version__ in done.stdout
