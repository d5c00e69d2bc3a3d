"""FactorizedContext with factors of the image at hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfops
from mfops.methods import METHODS

ON_IMAGES = [*METHODS, "double_attention"]
every_factorizer = pytest.mark.parametrize("factorizer", ON_IMAGES)


def make(factorizer: str, **options) -> mfops.FactorizedContext:
    torch.manual_seed(0)
    return mfops.FactorizedContext(6, rank=3, factorizer=factorizer, **options)


@every_factorizer
def test_adds_the_rectified_product_of_the_factors(factorizer):
    context = make(factorizer).eval()
    x = torch.randn(2, 6, 4, 5)
    y, z = context.factorizer(x)
    assert (y.shape, z.shape) == ((2, 6, 3), (2, 3, 20))
    out, mse = context(x, return_loss=True)
    torch.testing.assert_close(out, x + F.relu(y @ z).unflatten(2, (4, 5)))
    taken = F.relu(x) if factorizer == "nmf" else x
    torch.testing.assert_close(mse, F.mse_loss(taken.flatten(2), y @ z))
    torch.testing.assert_close(context(x.flatten(2)), out.flatten(2))
    assert torch.equal(context(x), context(x))


@every_factorizer
@pytest.mark.parametrize("training", [True, False])
def test_keeps_memory_format_and_dtype(factorizer, training):
    context = make(factorizer).train(training).bfloat16()
    x = torch.randn(2, 6, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    out = context(x)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)


@every_factorizer
def test_injected_loss_has_the_gradients_of_the_sum(factorizer):
    context = make(factorizer, loss_weight=0.5)
    x = torch.randn(2, 6, 4, 5, requires_grad=True)

    def gradient(returned: bool) -> Tensor:
        torch.manual_seed(1)  # of the noise that training starts from
        fresh = make(factorizer, loss_weight=0.5)
        fresh.load_state_dict(context.state_dict())
        torch.manual_seed(1)
        if returned:
            out, mse = fresh(x, return_loss=True)
            (out.square().sum() + 0.5 * mse).backward()
        else:
            fresh(x).square().sum().backward()
        grad, x.grad = x.grad, None
        return grad

    torch.testing.assert_close(gradient(returned=False), gradient(returned=True))


def test_em_moves_its_bases_in_training_only():
    context = make("em")
    bases = context.factorizer.bases
    start = bases.clone()
    x = torch.randn(2, 6, 4, 5)
    y, _ = mfops.factorize(x, start, "em", 3)
    context.eval()(x)
    assert torch.equal(bases, start)
    context.train()(x)
    torch.testing.assert_close(bases, 0.9 * start + 0.1 * y.mean(0))


@pytest.mark.parametrize("factorizer", ["nmf", "vq", "cd"])
def test_others_train_from_noise_and_evaluate_from_a_seeded_buffer(factorizer):
    context = make(factorizer)
    bases = context.factorizer.bases.clone()
    x = torch.rand(2, 6, 4, 5)
    assert not torch.equal(context(x), context(x))
    assert torch.equal(context.factorizer.bases, bases)
    torch.manual_seed(123)
    other = mfops.FactorizedContext(6, rank=3, factorizer=factorizer)
    assert torch.equal(other.factorizer.bases, bases)
    assert torch.equal(context.eval()(x), other.eval()(x))


@pytest.mark.parametrize("method", METHODS)
def test_steps(method):
    x = torch.rand(2, 6, 4, 5)
    own = (3, 3) if method == "em" else (6, 7)
    assert (METHODS[method].train_steps, METHODS[method].eval_steps) == own
    context = make(method).eval()
    y0 = context.factorizer.bases
    for steps, expected in ((None, own[1]), (2, 2)):
        y, z = mfops.factorize(x, y0, method, expected)
        rebuilt = make(method, steps=steps).eval().factorizer.product(x)
        torch.testing.assert_close(rebuilt.flatten(2), y @ z)


@every_factorizer
@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (1, 6, 1, 2), (2, 6, 3, 7)])
def test_more_bases_than_channels_or_pixels(factorizer, shape):
    context = mfops.FactorizedContext(6, rank=9, factorizer=factorizer)
    x = torch.randn(shape, requires_grad=True)
    out, mse = context(x, return_loss=True)
    (out.sum() + mse).backward()
    assert out.shape == shape
    assert x.grad.isfinite().all()


@every_factorizer
@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(factorizer, training):
    torch.compiler.reset()
    context = make(factorizer).train(training)
    state = {k: v.clone() for k, v in context.state_dict().items()}
    net = nn.Sequential(nn.Conv2d(3, 6, 1), context)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 5)
    results = []
    for call in (net, compiled):
        context.load_state_dict(state)
        torch.manual_seed(2)
        out = call(x)
        out.square().sum().backward()
        results.append((out, net[0].weight.grad, dict(context.state_dict())))
        net.zero_grad()
    torch.testing.assert_close(results[0], results[1])


@every_factorizer
def test_exports(factorizer):
    context = make(factorizer).eval()
    x = torch.randn(2, 6, 4, 5)
    exported = torch.export.export(context, (x,))
    torch.testing.assert_close(exported.module()(x), context(x))


@every_factorizer
def test_autocast_and_state_dict(factorizer):
    context = make(factorizer)
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, mse = context(x, return_loss=True)
    (out.float().sum() + mse).backward()
    assert x.grad.dtype == mse.dtype == torch.float32
    other = make(factorizer)
    nn.init.zeros_(next(iter(other.state_dict().values())))
    other.load_state_dict(context.state_dict(), strict=True)
    torch.testing.assert_close(other.eval()(x), context.eval()(x))


def test_double_attention_is_the_papers_formula():
    factorizer = make("double_attention").factorizer
    x = torch.randn(2, 6, 20)
    y, z = factorizer(x)

    def scores(conv: nn.Conv1d) -> Tensor:
        return torch.einsum("kc,bcn->bkn", conv.weight[..., 0], x) + conv.bias[:, None]

    maps = scores(factorizer.gather).exp()
    maps = maps / maps.sum(2, keepdim=True)
    torch.testing.assert_close(y, torch.einsum("bcn,bkn->bck", x, maps))
    shares = scores(factorizer.distribute).exp()
    torch.testing.assert_close(z, shares / shares.sum(1, keepdim=True))
    x.requires_grad_()
    factorizer.reconstruct(x)[0].sum().backward()
    assert all(p.grad is not None for p in factorizer.parameters())
