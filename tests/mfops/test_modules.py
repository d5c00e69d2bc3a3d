"""FactorizedContext: what it adds, how its loss reaches the optimizer, other grids, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import mfops
from mfops.methods import METHODS

FACTORIZERS = ["learned", "double_attention", *METHODS]


@pytest.fixture
def context():
    torch.manual_seed(0)
    return mfops.FactorizedContext(6, rank=3, size=(4, 5), loss_weight=0.5)


@pytest.fixture(autouse=True)
def _unscaled_losses():
    yield
    mfops.set_loss_scaling(None)


def grads(module: nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    return found


def test_adds_the_rectified_product(context):
    x = torch.randn(2, 6, 4, 5)
    y, z = context.factorizer.y, context.factorizer.z
    expected = x + F.relu(y @ z).unflatten(1, (4, 5))
    out, mse = context(x, return_loss=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(mse, F.mse_loss(x.flatten(2), (y @ z).expand(2, -1, -1)))
    torch.testing.assert_close(context(x), expected)
    torch.testing.assert_close(context.eval()(x), expected)
    torch.testing.assert_close(context(x.flatten(2)), expected.flatten(2))


@pytest.mark.parametrize("training", [True, False])
def test_keeps_memory_format(context, training):
    x = torch.randn(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    out = context.train(training)(x)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_starts_standard_normal_with_the_papers_count():
    context = mfops.FactorizedContext(2048)
    y, z = context.factorizer.y, context.factorizer.z
    assert y.shape == (2048, 64)
    assert z.shape == (64, 1089)
    for factor in (y, z):
        assert abs(factor.mean()) < 0.02
        assert abs(factor.std() - 1) < 0.02


def test_injected_loss_has_the_gradients_of_the_sum(context):
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    context(x).square().sum().backward()
    injected, injected_x = grads(context), x.grad.clone()
    x.grad = None
    out, mse = context(x, return_loss=True)
    (out.square().sum() + 0.5 * mse).backward()
    torch.testing.assert_close(injected, grads(context))
    torch.testing.assert_close(injected_x, x.grad)


def test_nothing_is_injected_beside_a_returned_loss_or_in_evaluation(context):
    x = torch.randn(2, 6, 4, 5)
    context.loss_weight = 0.0
    context(x).sum().backward()
    plain = grads(context)
    context.loss_weight = 0.5
    context(x, return_loss=True)[0].sum().backward()
    torch.testing.assert_close(grads(context), plain)
    context.eval()(x).sum().backward()
    torch.testing.assert_close(grads(context), plain)
    context.train()(x).sum().backward()
    assert not torch.allclose(grads(context)[0], plain[0])


def test_injected_loss_follows_grad_scaler_and_accumulation(context):
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    optimizer = torch.optim.SGD(context.parameters(), lr=0.1)
    batches = torch.randn(4, 2, 6, 4, 5).unbind()

    def loss_of(out):
        return out.square().mean()

    expected = sum(
        loss_of(out) + 0.5 * mse for out, mse in (context(x, return_loss=True) for x in batches)
    )
    (expected / 4).backward()
    wanted = grads(context)

    mfops.set_loss_scaling(lambda loss: scaler.scale(loss / 4))
    for x in batches:
        scaler.scale(loss_of(context(x)) / 4).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(grads(context), wanted)

    # and follows a scale that changes
    scaler.update(new_scale=8.0)
    for x in batches:
        scaler.scale(loss_of(context(x)) / 4).backward()
    for grad, expected_grad in zip(grads(context), wanted, strict=True):
        torch.testing.assert_close(grad, 8 * expected_grad)


def test_accumulated_micro_batches_add_up(context):
    batches = torch.randn(3, 2, 6, 4, 5).unbind()
    for x in batches:
        context(x).sum().backward()
    accumulated = grads(context)
    for x in batches:
        out, mse = context(x, return_loss=True)
        (out.sum() + 0.5 * mse).backward()
    torch.testing.assert_close(accumulated, grads(context))


def test_loss_scaling_must_be_callable():
    with pytest.raises(TypeError, match="scale: expected a callable or None, got float"):
        mfops.set_loss_scaling(2.0)


@pytest.mark.parametrize("result", [None, 2.0])
def test_a_loss_scaling_that_returns_no_tensor_is_named(context, result):
    """Nothing, where a `return` was forgotten, would switch the loss off."""
    mfops.set_loss_scaling(lambda loss: result)
    name = type(result).__name__
    with pytest.raises(TypeError, match=f"set_loss_scaling: .* to return a tensor, got {name}"):
        context(torch.randn(2, 6, 4, 5)).sum().backward()


def test_gradient_checkpointing_injects_once(context):
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    context(x).sum().backward()
    expected = grads(context)
    checkpoint(context, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(grads(context), expected)


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("x_requires_grad", [True, False])
@pytest.mark.parametrize("factorizer", FACTORIZERS)
def test_checkpointing_hands_out_a_collected_loss_once(factorizer, x_requires_grad, within):
    """Whether the backward pass, which runs the forward pass anew, is inside of the block."""
    torch.manual_seed(0)
    context = mfops.FactorizedContext(6, 3, (4, 5), factorizer).train()
    context.factorizer.eval()  # as in the second pass em's bases have moved
    network = nn.Sequential(context, nn.Conv2d(6, 6, 1))
    x = torch.randn(2, 6, 4, 5, requires_grad=x_requires_grad)

    def step(forward, within):
        with mfops.collect_losses() as losses:
            loss = forward(x).square().mean() + 0.25 * sum(losses)
            if within:
                loss.backward()
        if not within:
            loss.backward()
        return grads(network)

    expected = step(network, within=True)
    again = step(lambda x: checkpoint(network, x, use_reentrant=False), within)
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("factorizer", FACTORIZERS)
def test_what_follows_may_work_in_place(factorizer, training):
    context = mfops.FactorizedContext(6, 3, (4, 5), factorizer, loss_weight=0.5).train(training)
    context.factorizer.eval()  # the same bases in every pass
    weight = torch.randn(2, 6, 4, 5)

    def gradient(relu):
        x = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (relu(context(x)) * weight).sum().backward()
        return x.grad, *(p.grad.clone() for p in context.parameters())

    expected = gradient(nn.ReLU())
    context.zero_grad()
    torch.testing.assert_close(gradient(nn.ReLU(inplace=True)), expected)


def test_two_threads_may_collect_losses_at_once(context):
    """Neither block outlives the other, in whichever order they end."""
    first, second = mfops.collect_losses(), mfops.collect_losses()
    first.__enter__()
    losses = second.__enter__()
    first.__exit__(None, None, None)
    context(torch.randn(2, 6, 4, 5))
    assert len(losses) == 1
    second.__exit__(None, None, None)
    context(torch.randn(2, 6, 4, 5)).sum().backward()
    assert len(losses) == 1
    context.loss_weight = 0.0
    with_loss = grads(context)
    context(torch.randn(2, 6, 4, 5)).sum().backward()
    assert not torch.allclose(grads(context)[0], with_loss[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("factorizer", FACTORIZERS)
def test_hooks_of_the_factorizer_run(factorizer, training):
    context = mfops.FactorizedContext(6, 3, (4, 5), factorizer).train(training)
    called = []
    context.factorizer.register_forward_hook(lambda *_: called.append(1))
    context.factorizer.register_forward_pre_hook(lambda _, args: args[0] * 1.0)
    context(torch.randn(2, 6, 4, 5))
    assert called == [1]


def test_a_pruned_factor_trains_and_counts(context):
    prune.random_unstructured(context.factorizer, "y", 0.5)
    x = torch.randn(2, 6, 4, 5)
    for _ in range(2):
        context(x).sum().backward()
    with torch.no_grad():
        context.factorizer.y_orig.zero_()
    torch.testing.assert_close(context.eval()(x), x)


def test_other_grids_resample_the_coefficients(context):
    maps = context.factorizer.z.unflatten(1, (4, 5))[None]
    for grid in [(8, 10), (3, 7), (1, 1)]:
        z = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)[0].flatten(1)
        x = torch.randn(2, 6, *grid)
        expected = x + F.relu(context.factorizer.y @ z).unflatten(1, grid)
        torch.testing.assert_close(context(x), expected)
    context(x).sum().backward()
    assert context.factorizer.z.grad is not None


def test_in_sequential_under_compile():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), mfops.FactorizedContext(6, 3, 4), nn.Conv2d(6, 2, 1))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 4)
    net(x).square().sum().backward()
    expected = grads(net)
    compiled(x).square().sum().backward()
    torch.testing.assert_close(grads(net), expected)


def test_autocast_and_state_dict(context):
    x = torch.randn(2, 6, 4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context(x).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in context.parameters())
    other = mfops.FactorizedContext(6, rank=3, size=(4, 5))
    other.load_state_dict(context.state_dict(), strict=True)
    torch.testing.assert_close(other(x), context(x))


@pytest.mark.parametrize("method", METHODS)
def test_bases_of_another_method_are_refused(method):
    bases = mfops.FactorizedContext(6, 3, factorizer=method).factorizer.bases
    for other in METHODS.keys() - {method}:
        loaded = mfops.FactorizedContext(6, 3, factorizer=other)
        before = loaded.factorizer.bases.clone()
        state = nn.Sequential(mfops.FactorizedContext(6, 3, factorizer=method)).state_dict()
        named = rf'Missing .*"0\.factorizer\.{other}_bases"(.|\n)*Unexpected .*{method}_bases"'
        with pytest.raises(RuntimeError, match=named):
            nn.Sequential(loaded).load_state_dict(state)
        missing, unexpected = nn.Sequential(loaded).load_state_dict(state, strict=False)
        assert missing == [f"0.factorizer.{other}_bases"]
        assert unexpected == [f"0.factorizer.{method}_bases"]
        assert torch.equal(loaded.factorizer.bases, before)
        loaded.load_state_dict(loaded.state_dict() | {f"factorizer.{other}_bases": bases})
        assert torch.equal(loaded.factorizer.bases, bases)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_without_the_methods_name_loads(method, tmp_path):
    """As the version before wrote them."""
    torch.save({"factorizer.bases": torch.rand(6, 3)}, tmp_path / "before.pt")
    state = torch.load(tmp_path / "before.pt", weights_only=True)
    context = mfops.FactorizedContext(6, 3, factorizer=method)
    context.load_state_dict(state, strict=True)
    assert torch.equal(context.factorizer.bases, state["factorizer.bases"])
    torch.save(context.state_dict(), tmp_path / "now.pt")
    other = mfops.FactorizedContext(6, 3, factorizer=method)
    other.load_state_dict(torch.load(tmp_path / "now.pt", weights_only=True))
    assert torch.equal(other.factorizer.bases, context.factorizer.bases)
    with pytest.raises(RuntimeError, match="Missing key"):
        context.load_state_dict({})


BAD_ARGUMENTS = {
    "channels: expected a positive integer, got 0": {"channels": 0},
    "rank: expected a positive integer, got 1.5": {"rank": 1.5},
    "size: expected a positive integer, got 0": {"size": (3, 0)},
    "size: expected one integer or (h, w), got (1, 2, 3)": {"size": (1, 2, 3)},
    "factorizer: expected one of learned, double_attention, em, nmf, vq, cd, got 'svd'": {
        "factorizer": "svd"
    },
    "steps: expected at least 1, got 0": {"factorizer": "em", "steps": 0},
    "steps: factorizer 'learned' takes none, got 3": {"steps": 3},
    "loss_weight: expected a number >= 0, got -1.0": {"loss_weight": -1.0},
    "loss_weight: expected a number >= 0, got None": {"loss_weight": None},
    "loss_weight: expected a number >= 0, got inf": {"loss_weight": float("inf")},
    "size: expected one integer or (h, w), got 3.0": {"size": 3.0},
    "size: expected one integer or (h, w), got None": {"size": None},
    "factorizer: expected one of learned, double_attention, em, nmf, vq, cd, got ['em']": {
        "factorizer": ["em"]
    },
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named(message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        mfops.FactorizedContext(**{"channels": 6, **BAD_ARGUMENTS[message]})
    assert str(caught.value) == message


def test_numbers_of_numpy_are_numbers():
    three = np.int64(3)
    context = mfops.FactorizedContext(
        three, three, three, "vq", np.float32(0.5), three, inverse_temperature=np.float32(2)
    )
    assert context.size == (3, 3)
    out, _ = context(torch.randn(2, 3, 3, 3), return_loss=True)
    assert out.shape == (2, 3, 3, 3)
    mfops.factorize(torch.randn(1, 3, 5), torch.randn(3, 2), "em", three)


@pytest.mark.parametrize("training", [True, False])
def test_bad_features_are_named(context, training):
    context.train(training)
    with pytest.raises(ValueError, match=r"x: expected 6 channels, got \(2, 5, 4, 5\)"):
        context(torch.randn(2, 5, 4, 5))
    with pytest.raises(ValueError, match="x: expected N = 20 pixels"):
        context(torch.randn(2, 6, 21))
    with pytest.raises(TypeError, match="x: expected the dtype of the parameters"):
        context(torch.randn(2, 6, 4, 5).double())
    with pytest.raises(TypeError, match="x: expected a dense tensor, got one of layout"):
        context(torch.randn(2, 6, 4, 5).to_sparse())


TOKENS = "; x is (B, C, N): tokens (B, N, C) need x.mT"
MAPS = "; x is (B, C, H, W): maps (B, H, W, C) need x.permute(0, 3, 1, 2)"
Y, Z = torch.zeros(6, 3), torch.zeros(3, 20)
TAKES_FEATURES = {
    "context": (mfops.FactorizedContext(6, 3, (4, 5)), "x: expected 6 channels, got"),
    "em": (mfops.FactorizedContext(6, 3, factorizer="em"), "x: expected 6 channels, got"),
    "factorize": (lambda x: mfops.factorize(x, Y), "y0: expected C = "),
    "reconstruction": (lambda x: mfops.factorized_reconstruction(x, Y, Z), "y: expected C = "),
    "mse": (lambda x: mfops.factorized_mse(x, Y, Z), "y: expected C = "),
}


@pytest.mark.parametrize("name", TAKES_FEATURES)
@pytest.mark.parametrize(
    ("shape", "hint"),
    [((2, 20, 6), TOKENS), ((2, 4, 5, 6), MAPS), ((2, 7, 20), ""), ((2, 7, 6, 5), "")],
)
def test_channels_in_the_last_dimension_have_a_hint(name, shape, hint):
    function, begin = TAKES_FEATURES[name]
    with pytest.raises(ValueError, match="expected") as caught:
        function(torch.randn(shape))
    message = str(caught.value)
    assert message.startswith(begin)
    assert message.endswith(")" + hint)


def test_tokens_are_taken_by_a_view():
    """As the hint says, without a copy."""
    tokens = torch.randn(2, 20, 6)
    context = mfops.FactorizedContext(6, 3, (4, 5)).eval()
    maps = tokens.mT.unflatten(2, (4, 5))
    assert maps.data_ptr() == tokens.data_ptr()
    out = context(tokens.mT).mT
    assert out.is_contiguous()
    torch.testing.assert_close(out, context(maps).flatten(2).mT)
