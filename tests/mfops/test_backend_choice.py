"""Which backend runs, who is told, and what an explicit choice does."""

from __future__ import annotations

import importlib
import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mfops
from mfops import backends

X, Y, Z = torch.randn(2, 6, 20), torch.randn(6, 3), torch.randn(3, 20)


def test_available_backends():
    found = mfops.available_backends()
    assert list(found) == ["native", "triton", "reference"]
    assert found["reference"] is None
    expected = None if torch.cuda.is_available() else "no CUDA device"
    assert found["triton"] == (backends.TRITON_ERROR or expected)
    if found["native"] is None:
        extension = importlib.import_module("mfops._C")
        assert extension.build_info()["torch_stable_abi"] == "2.11"


def test_a_missing_triton(monkeypatch):
    monkeypatch.setattr(backends, "TRITON_ERROR", "triton is not installed")
    assert mfops.available_backends()["triton"] == "triton is not installed"
    with mfops.use_backend("triton"), pytest.raises(RuntimeError, match="triton is not installed"):
        mfops.factorized_mse(X, Y, Z)


@pytest.mark.skipif(backends.TRITON_ERROR is not None, reason=str(backends.TRITON_ERROR))
def test_triton_takes_the_cuda_key_where_the_extension_has_no_kernels():
    code = (
        "import sys, torch; sys.modules['mfops._C'] = None; import mfops; "
        "has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        "print(*(has('mfops::mse', key) for key in ('CUDA', 'CPU')))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False"]


def test_automatic_choice_falls_back_and_says_why_once(caplog):
    backends._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="mfops"):
        for _ in range(2):
            mfops.factorized_mse(X.double(), Y.double(), Z.double())
    reasons = [r.message for r in caplog.records if "native" in r.message]
    assert len(reasons) == 1
    assert "passed over" in reasons[0]


def test_a_missing_extension_is_a_warning(caplog, monkeypatch):
    backends._log_once.cache_clear()
    monkeypatch.setattr(backends, "EXTENSION_ERROR", "not built")
    mfops.factorized_mse(X, Y, Z)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    with mfops.use_backend("native"), pytest.raises(RuntimeError, match="not built"):
        mfops.factorized_mse(X, Y, Z)
    assert mfops.available_backends()["native"] == "not built"


def test_two_threads_may_choose_at_once():
    """Neither block outlives the other, in whichever order they end."""
    first, second = mfops.use_backend("native"), mfops.use_backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert backends.select(X, 3).name == "reference"
    second.__exit__(None, None, None)
    assert backends.select(X.double(), 3).name == "reference"  # native would refuse it


def test_explicit_choice_never_falls_back():
    with mfops.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' cannot run"):
        mfops.factorized_mse(X, Y, Z)
    with mfops.use_backend("native"), pytest.raises(RuntimeError, match="'native' cannot run"):
        mfops.factorized_mse(X.double(), Y.double(), Z.double())


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of capability 9.0 that is not there, with native kernels for it; x, y, z on it."""
    caches = backends._ask_gpu, backends._ask_build, backends._log_once
    for cache in caches:
        cache.cache_clear()
    for error in ("EXTENSION_ERROR", "CUDA_ERROR", "TRITON_ERROR"):
        monkeypatch.setattr(backends, error, None)
    extension = SimpleNamespace(cuda_unavailable_reason=lambda index: None)
    monkeypatch.setitem(sys.modules, "mfops._C", extension)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU 3000")
    with FakeTensorMode():
        yield [torch.empty(t.shape, device="cuda") for t in (X, Y, Z)]
    for cache in caches:
        cache.cache_clear()


def reasons(x: torch.Tensor, rank: int = 3) -> dict[str, str | None]:
    return {
        name: backend.unavailable_reason(x, rank) for name, backend in backends.BACKENDS.items()
    }


def test_a_gpu_runs_everything(gpu):
    assert set(reasons(gpu[0]).values()) == {None}
    assert backends.select(gpu[0], 256).name == "native"


def test_a_gpus_backward_pass_in_16_bits_is_tritons(gpu, monkeypatch):
    half = gpu[0].bfloat16()
    triton = backends.BACKENDS["triton"]
    chosen = backends.select(half, 3)
    assert chosen.name == "native"
    assert chosen.reconstruct == backends.BACKENDS["native"].reconstruct
    assert chosen.reconstruct_backward == triton.reconstruct_backward
    assert backends.select(half, 3, "em") is backends.BACKENDS["native"]
    with mfops.use_backend("native"):
        assert backends.select(half, 3) is backends.BACKENDS["native"]
    monkeypatch.setattr(backends, "TRITON_ERROR", "triton is not installed")
    assert backends.select(half, 3) is backends.BACKENDS["native"]


def test_more_bases_than_the_native_kernels_take(gpu, caplog):
    assert reasons(gpu[0], 257)["native"] == "on CUDA it takes K <= 256, K is 257"
    with caplog.at_level(logging.INFO, logger="mfops"):
        assert backends.select(gpu[0], 257).name == "triton"
    assert "backend native passed over: on CUDA it takes K <= 256" in caplog.text
    assert backends.BACKENDS["native"].unavailable_reason(X, 257) is None  # on the CPU


def test_an_extension_without_cuda(gpu, monkeypatch):
    monkeypatch.setattr(backends, "CUDA_ERROR", "built without CUDA kernels: no nvcc")
    assert backends.select(gpu[0], 3).name == "triton"
    message = "backend 'native' cannot run this call: built without CUDA kernels: no nvcc"
    with mfops.use_backend("native"), pytest.raises(RuntimeError, match=message):
        mfops.factorized_mse(*gpu)


def test_an_extension_built_for_other_gpus(gpu, monkeypatch):
    extension = SimpleNamespace(cuda_unavailable_reason=lambda index: "no kernel image")
    monkeypatch.setitem(sys.modules, "mfops._C", extension)
    assert reasons(gpu[0]) == {
        "native": "the extension has no code for GPU 3000 (cuda:0): no kernel image",
        "triton": None,
        "reference": None,
    }


def test_a_gpu_that_is_too_old(gpu, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    reason = "needs compute capability 8.0 or later, GPU 3000 (cuda:0) has 7.5"
    assert reasons(gpu[0]) == {"native": reason, "triton": reason, "reference": None}
    with caplog.at_level(logging.INFO, logger="mfops"):
        for _ in range(2):
            mfops.factorized_mse(*gpu)  # on the reference
    assert [m for m in caplog.messages if "native" in m] == [
        f"backend native passed over: {reason}"
    ]
    for name in ("native", "triton"):
        with mfops.use_backend(name), pytest.raises(RuntimeError, match=re.escape(reason)):
            mfops.factorized_mse(*gpu)


def test_float64_on_a_gpu(gpu):
    found = reasons(gpu[0].double())
    assert (
        found["native"] == found["triton"] == ("takes float32, bfloat16 and float16, x is float64")
    )


def traced(inputs: list[torch.Tensor]) -> list[torch.fx.Node]:
    """What torch.compile makes of a call, its backward pass too where a gradient is wanted."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    torch.compile(mfops.factorized_reconstruction, fullgraph=True, backend=keep)(*inputs)
    parts = (part for part in graphs[0].modules() if isinstance(part, torch.fx.GraphModule))
    return [node for part in parts for node in part.graph.nodes]


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_compiles_for_a_gpu_with_its_precision(gpu, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        nodes = traced(gpu)
    finally:
        torch.set_float32_matmul_precision(before)
    (call,) = (node for node in nodes if node.target == torch.ops.mfops.reconstruct.default)
    assert call.args[3] == (precision == "high")


def test_compiles_for_a_gpu_with_tritons_backward_pass(gpu):
    nodes = traced([t.bfloat16().requires_grad_() for t in gpu])
    operators = {node.target for node in nodes}
    assert torch.ops.mfops.reconstruct.default in operators
    assert torch.ops.mfops.triton_reconstruct_backward.default in operators


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
    for word in (
        "mfops",
        "torch",
        "triton",
        "GPU",
        "extension",
        "backend native",
        "backend reference",
    ):
        assert word in done.stdout
    assert torch.__version__ in done.stdout
