"""The factorizers in exported programs: ONNX, saved, traced; in training; in another process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from export_cases import FREE, in_onnxruntime, saved_and_loaded, traced
from torch import Tensor, nn

import mfops
from mfops.methods import METHODS
from mfops.methods.cd import RIDGE, solve_by_products

SIZES = [(2, 6, 4, 5), (1, 6, 7, 3), (3, 6, 5, 9)]


class WithLoss(nn.Module):
    def __init__(self, factorizer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        steps = 2 if factorizer in METHODS else None
        self.context = mfops.FactorizedContext(
            6, rank=3, size=(4, 5), factorizer=factorizer, steps=steps
        )

    def forward(self, x: Tensor) -> Tensor:
        out, mse = self.context(x, return_loss=True)
        return out + mse


@pytest.mark.parametrize("factorizer", ["learned", "nmf", "vq"])
def test_onnx_with_the_loss_from_one_image(factorizer):
    module = WithLoss(factorizer).eval()
    run = in_onnxruntime(module, torch.rand(1, 6, 4, 5))
    for size in SIZES:
        x = torch.rand(size)
        torch.testing.assert_close(run(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factorizer", ["learned", *METHODS])
def test_a_saved_program_with_the_loss(factorizer):
    module = WithLoss(factorizer).eval()
    run = saved_and_loaded(module, torch.rand(2, 6, 4, 5), strict=False)
    for size in SIZES:
        x = torch.rand(size)
        torch.testing.assert_close(run(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factorizer", ["learned", "em", "nmf"])
@pytest.mark.filterwarnings("ignore")  # torch's of jit: that it is deprecated, that sizes are read
def test_a_traced_file_with_the_loss(factorizer):
    module = WithLoss(factorizer).eval()
    run = traced(module, torch.rand(1, 6, 4, 5))
    for size in SIZES:
        x = torch.rand(size)
        torch.testing.assert_close(run(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factorizer", ["em", "vq"])
def test_a_saved_program_in_training_moves_its_bases_or_draws_noise(factorizer):
    context = mfops.FactorizedContext(6, rank=3, factorizer=factorizer, loss_weight=0).train()
    run = saved_and_loaded(context, torch.rand(2, 6, 4, 5), strict=False)
    x = torch.rand(3, 6, 7, 5)
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs.append(run(x))
        torch.manual_seed(seed)
        torch.testing.assert_close(outputs[-1], context(x))
    assert not torch.equal(*outputs)


def test_a_saved_program_runs_in_a_process_that_imports_mfops_alone(tmp_path):
    context = mfops.FactorizedContext(6, rank=3, factorizer="em").eval()
    x = torch.rand(2, 6, 4, 5)
    program = torch.export.export(context, (x,), dynamic_shapes=(FREE,))
    assert "mfops.factorize" in str(program.graph)  # the kernels stay
    torch.export.save(program, tmp_path / "em.pt2")
    torch.save((x, context(x)), tmp_path / "case.pt")
    code = (
        "import torch, mfops; x, out = torch.load('case.pt'); "
        "torch.testing.assert_close(torch.export.load('em.pt2').module()(x), out)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_onnx_of_a_backend_that_has_no_words_in_it_is_refused():
    context = mfops.FactorizedContext(6, rank=3, factorizer="em").eval()
    with mfops.use_backend("native"), pytest.raises(Exception, match="written to ONNX"):
        in_onnxruntime(context, torch.rand(1, 6, 4, 5))


@pytest.mark.parametrize("rank", [1, 2, 16, 64, 256])
@pytest.mark.parametrize("kind", ["random", "twins", "alike", "zero"])
def test_equations_solved_by_products(rank, kind):
    torch.manual_seed(0)
    y = torch.randn(2, 40, rank)
    if kind == "twins":
        y = y[..., torch.arange(rank) // 2]
    elif kind == "alike":  # the most ill-conditioned there is
        y = y[..., :1] + 1e-4 * torch.randn(2, 40, rank)
    y = y * 0 if kind == "zero" else nn.functional.normalize(y, dim=1)
    gram = y.mT @ y + RIDGE * torch.eye(rank)
    expected = torch.cholesky_solve(y.mT.double(), torch.linalg.cholesky(gram.double()))
    error = (solve_by_products(gram, y.mT) - expected).norm()
    # A solver in float32 may be off by so much; how much less LAPACK's is depends on the processor.
    allowed = 4 * torch.linalg.cond(gram.double()).max() * 2**-24
    assert error <= allowed * expected.norm()
