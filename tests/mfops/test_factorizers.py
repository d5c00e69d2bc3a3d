"""FactorizedContext with factors of the image at hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import functional_call
from torch.nn import functional as F

import mfops
from mfops.factorizers import ImageFactorizer
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
@pytest.mark.parametrize("training", [True, False])
def test_one_graph_serves_every_shape(factorizer, training):
    torch.compiler.reset()
    context = make(factorizer).train(training)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(context, fullgraph=True, backend=graphs)
    for shape in [(4, 6, 4, 5), (3, 6, 4, 5), (3, 6, 5, 7), (2, 6, 9, 3)]:
        assert compiled(torch.randn(shape)).shape == shape
    assert graphs.frame_count <= 3  # one for the first shape; then its dimensions are symbols


@every_factorizer
@pytest.mark.parametrize("training", [True, False])
def test_exports(factorizer, training):
    context = make(factorizer).train(training)
    size = {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}
    program = torch.export.export(
        copy.deepcopy(context), (torch.randn(2, 6, 4, 5),), dynamic_shapes=(size,)
    )
    exported = program.module()
    for shape in [(2, 6, 4, 5), (3, 6, 7, 5)]:
        x = torch.randn(shape)
        torch.manual_seed(2)
        out = exported(x)
        torch.manual_seed(2)
        torch.testing.assert_close(out, context(x))
    torch.testing.assert_close(dict(exported.named_buffers()), dict(context.named_buffers()))


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


@pytest.mark.parametrize("name", ["vq", "cd"])
def test_compiles_traces_and_exports_with_a_temperature(name):
    context = mfops.FactorizedContext(6, 3, factorizer=name, inverse_temperature=2.0).eval()
    x = torch.randn(2, 6, 4, 5)
    expected = context(x)
    hotter = mfops.FactorizedContext(6, 3, factorizer=name).eval()(x)
    assert not torch.allclose(expected, hotter)
    for other in (
        torch.compile(context, fullgraph=True, backend="eager"),
        torch.export.export(context, (x,)).module(),
        torch.fx.symbolic_trace(nn.Sequential(context)),
    ):
        torch.testing.assert_close(other(x), expected)
    assert "inverse_temperature=2.0" in repr(context)


@pytest.mark.parametrize("init", [None, "normal", "uniform"])
def test_learned_factors_start_as_the_paper_says_or_as_its_code_does(init):
    torch.manual_seed(0)
    ctx = mfops.FactorizedContext(48, rank=16, size=(12, 10), init=init)
    y, z = ctx.factorizer.y, ctx.factorizer.z
    for factor, size in ((y, 48 * 16), (z, 120 * 16)):
        if init == "uniform":
            bound = size**-0.5
            assert 0.98 * bound < factor.abs().max() <= bound
            assert factor.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        else:
            assert factor.std().item() == pytest.approx(1, rel=0.05)
            assert factor.abs().max() > 2.5
        assert factor.mean().abs() < 0.1 * factor.std()
    expected = 16**0.5 * (16 * 3 * (48 * 120) ** 0.5) ** -1 if init == "uniform" else 16**0.5
    assert (y @ z).std().item() == pytest.approx(expected, rel=0.2)


def test_double_attention_is_the_papers_formula():
    factorizer = make("double_attention").factorizer.double()
    x = torch.randn(2, 6, 20, dtype=torch.float64)
    y, z = factorizer(x)
    parameters = {name: p.detach().numpy() for name, p in factorizer.named_parameters()}

    def scores(name: str, image: np.ndarray) -> np.ndarray:
        weight, bias = parameters[f"{name}.weight"][..., 0], parameters[f"{name}.bias"]
        return np.exp(weight @ image + bias[:, None])

    for image, image_y, image_z in zip(x.numpy(), y.detach(), z.detach(), strict=True):
        maps, shares = scores("gather", image), scores("distribute", image)
        maps = maps / maps.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(image_y.numpy(), image @ maps.T, rtol=1e-6)
        np.testing.assert_allclose(image_z.numpy(), shares / shares.sum(axis=0), rtol=1e-6)


def test_double_attentions_gradients_by_finite_differences():
    factorizer = make("double_attention").factorizer.double()
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    names, values = zip(*factorizer.named_parameters(), strict=True)

    def factors(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return functional_call(factorizer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(factors, (x, *values))


def test_a_batch_that_is_not_finite_leaves_the_bases_alone():
    context = make("em")
    x = torch.randn(2, 6, 4, 5)
    for spoilt in (float("nan"), float("inf")):
        before = context.factorizer.bases.clone()
        context(x.index_fill(2, torch.tensor(1), spoilt))
        assert torch.equal(context.factorizer.bases, before)
    context(x)
    assert not torch.equal(context.factorizer.bases, before)


@every_factorizer
def test_is_made_on_any_device_and_reset(factorizer):
    """As distributed training makes modules: on "meta", then memory, then reset_parameters."""
    torch.manual_seed(0)
    with torch.device("meta"):
        context = mfops.FactorizedContext(6, rank=3, factorizer=factorizer)
    assert all(t.is_meta for t in context.state_dict().values())
    context.to_empty(device="cpu")
    torch.manual_seed(0)
    for module in context.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.testing.assert_close(context.state_dict(), make(factorizer).state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_seeded_bases_are_drawn_on_the_cpu(method, monkeypatch):
    """A generator of the CPU cannot fill a tensor that a device context puts elsewhere."""
    devices = []
    noise = type(METHODS[method]).noise

    def record(self, *shape, generator=None, device=None):
        devices.append(device)
        return noise(self, *shape, generator=generator, device=device)

    monkeypatch.setattr(type(METHODS[method]), "noise", record)
    make(method)
    assert devices == [torch.device("cpu")]


@pytest.mark.parametrize("module", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("features", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_bases_follow_the_dtype_of_the_features(method, module, features):
    context = make(method).to(module)
    out, mse = context(torch.randn(2, 6, 4, 5).to(features), return_loss=True)
    assert out.dtype == features
    assert mse.dtype == (torch.float64 if features == torch.float64 else torch.float32)
    assert context.factorizer.bases.dtype == module


@pytest.mark.parametrize("factorizer", ["learned", "double_attention"])
def test_parameters_have_the_dtype_of_the_features(factorizer):
    context = mfops.FactorizedContext(6, 3, (4, 5), factorizer)
    with pytest.raises(TypeError, match=r"expected the dtype of .*float64"):
        context(torch.randn(2, 6, 4, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("svd", 6, 3), ValueError, "method: expected one of em, nmf, vq, cd, got 'svd'"),
        (("em", 6, 0), ValueError, "rank: expected a positive integer, got 0"),
        (("em", 6.0, 3), ValueError, r"channels: expected a positive integer, got 6\.0"),
        (("em", 6, 3, 0), ValueError, "steps: expected at least 1, got 0"),
        (("em", 6, 3, "3"), TypeError, "steps: expected an integer, got str"),
        (("em", 6, 3, True), TypeError, "steps: expected an integer, got bool"),
    ],
)
def test_bad_arguments_are_refused_when_it_is_made(arguments, error, message):
    with pytest.raises(error, match=message):
        ImageFactorizer(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "xavier"}, "init: expected normal or uniform, got 'xavier'"),
        ({"factorizer": "em", "init": "normal"}, "init: factorizer 'em' takes none, got 'normal'"),
        ({"inverse_temperature": 1}, "inverse_temperature: factorizer 'learned' takes none, got 1"),
    ],
)
def test_options_of_others_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mfops.FactorizedContext(6, 3, (4, 5), **arguments)
