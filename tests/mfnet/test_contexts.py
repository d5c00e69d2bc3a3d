from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from mfnet.contexts import CONTEXTS, LossContext, MFContext, aspp, aspp_separable, none


# The last two are grids on which nothing but a batch of one value per channel is refused.
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("shape", [(2, 8, 3, 3), (1, 8, 5, 7), (1, 8, 1, 2), (2, 8, 1, 1)])
def test_any_grid_trains(name: str, shape: tuple[int, ...]) -> None:
    context = CONTEXTS[name](8, 16).train()
    x = torch.randn(shape, requires_grad=True)
    out = context(x)
    assert out.shape == (shape[0], 16, *shape[2:])
    out.square().sum().backward()
    for tensor in (x, *(p for p in context.parameters() if p.requires_grad)):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("name", ["em", "nmf", "vq", "cd", "double_attention", "nonlocal"])
def test_every_pixel_sees_the_whole_image(name: str) -> None:
    torch.manual_seed(0)
    context = CONTEXTS[name](8, 4).double().eval()
    if name == "nonlocal":  # it starts as the identity
        nn.init.normal_(context.unit.w[1].weight)
    x = torch.randn(1, 8, 12, 12, dtype=torch.float64)
    changed = x.clone()
    changed[..., 0, 0] += 3
    moved = (context(changed) - context(x)).abs().sum(1)[0]
    assert moved[11, 11] > 0  # beyond the reach of the 3x3 convolutions


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("em", {"bases": 0}, "bases: expected a positive integer, got 0"),
        ("encoding", {"codewords": 0}, "codewords: expected a positive integer, got 0"),
        ("encoding", {"num_classes": 0}, "num_classes: expected a positive integer, got 0"),
        ("ppm", {}, "in_channels: expected at least 4, got 3"),
        ("nmf", {"inverse_temperature": 1}, "inverse_temperature: method 'nmf' takes none, got 1"),
        *(
            (name, {"rank": 0}, "rank: expected a positive integer, got 0")
            for name in ("nmf", "vq", "cd", "double_attention")
        ),
        *(
            (name, {"steps": 0}, "steps: expected at least 1, got 0")
            for name in ("em", "nmf", "vq", "cd")
        ),
    ],
)
def test_bad_arguments_are_named(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CONTEXTS[name](3, **options)


@pytest.mark.parametrize("name", CONTEXTS)
def test_state_dict_loads_strictly(name: str) -> None:
    source, target = CONTEXTS[name](8, 16).eval(), CONTEXTS[name](8, 16).eval()
    target.load_state_dict(source.state_dict())
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(target(x), source(x))


# mf


def test_mf_is_the_papers_equations() -> None:
    context = MFContext(6, 4, rank=3, context_size=(2, 5)).double().eval()
    x = torch.randn(2, 6, 2, 5, dtype=torch.float64)

    out, loss = context(x, return_loss=True)

    weight, bias = context.lower.weight[:, :, 0, 0], context.lower.bias
    xin = torch.einsum("oi,bihw->bohw", weight, x) + bias.view(1, -1, 1, 1)
    factors = context.factorized.factorizer
    rebuilt = (factors.y @ factors.z).view(1, 6, 2, 5)
    expected = context.upper(rebuilt.relu() + xin)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(loss.double(), (xin - rebuilt).square().mean())
    torch.testing.assert_close(context(x), expected)


@pytest.mark.parametrize("factorizer", ["em", "nmf", "vq", "cd", "double_attention"])
@pytest.mark.parametrize("shape", [(2, 8, 3, 3), (1, 8, 5, 7)])
def test_mf_takes_factors_of_the_image(factorizer: str, shape: tuple[int, ...]) -> None:
    context = MFContext(8, 4, rank=3, factorizer=factorizer)
    x = torch.randn(shape, requires_grad=True)
    out, loss = context(x, return_loss=True)
    (out.square().mean() + loss).backward()
    assert all(p.grad is not None for p in context.parameters())
    context.eval()
    other = torch.randn(shape)
    rebuilt = [context.factorized.factorizer.product(t) for t in (x, other)]
    assert not torch.allclose(*rebuilt)
    assert torch.equal(context(x), context(x))


def test_mf_injects_its_weighted_loss_in_training_only_without_return_loss() -> None:
    x = torch.randn(2, 6, 2, 5)

    def gradient(loss_weight: float, returned: bool) -> Tensor:
        torch.manual_seed(0)
        context = MFContext(6, 4, rank=3, context_size=(2, 5), loss_weight=loss_weight)
        if returned:
            out, loss = context(x, return_loss=True)
            (out.square().mean() + 0.3 * loss).backward()
        else:
            context(x).square().mean().backward()
        grad = context.lower.weight.grad
        assert grad is not None
        return grad

    torch.testing.assert_close(gradient(0.3, returned=False), gradient(0.7, returned=True))
    assert not torch.allclose(gradient(0.3, returned=False), gradient(0.0, returned=False))


# aspp


def test_aspp_is_torchvisions() -> None:
    with torch.device("meta"):
        large = aspp(2048)
    assert type(large) is ASPP
    assert sum(p.numel() for p in large.parameters()) == 15_535_104

    context, reference = aspp(8, 16), ASPP(8, [6, 12, 18], 16)
    context.load_state_dict(reference.state_dict())
    x = torch.randn(2, 8, 9, 9)
    for training in (True, False):
        outputs = []
        for module in (context, reference):
            torch.manual_seed(0)  # of the dropout
            outputs.append(module.train(training)(x))
        torch.testing.assert_close(*outputs)
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(context.state_dict()[key], value)


@pytest.mark.parametrize("synchronized", [False, True])
def test_aspp_trains_on_one_image(synchronized: bool) -> None:
    context: nn.Module = aspp(8, 16)
    if synchronized:  # outside of a process group it is a plain BatchNorm
        context = nn.SyncBatchNorm.convert_sync_batchnorm(context)
    _, conv, norm, _ = context.convs[-1]
    assert isinstance(norm, nn.SyncBatchNorm) == synchronized
    nn.init.normal_(norm.running_mean)
    mean = norm.running_mean.clone()
    x = torch.randn(1, 8, 9, 9)

    pooling = context.convs[-1].train()
    trained = pooling(x)
    trained.sum().backward()
    assert conv.weight.grad is not None
    assert norm.weight.grad is not None
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(trained, pooling.eval()(x))
    assert context.train()(x).isfinite().all()


def test_only_contexts_with_a_loss_say_so() -> None:
    assert isinstance(MFContext(4, 4, rank=2), LossContext)
    assert not isinstance(aspp(4), LossContext)


# aspp_separable


@pytest.mark.parametrize("rates", [(6, 12, 18), (12, 24, 36)])
def test_separable_aspp_is_that_of_segmentation_models_pytorch(rates: tuple[int, ...]) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="smp is not installed")
    decoder = smp.DeepLabV3Plus("resnet18", encoder_weights=None, decoder_atrous_rates=rates)
    theirs = decoder.decoder.aspp.eval()
    ours = aspp_separable(512, 256, rates=rates).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 512, 37, 25)
    torch.testing.assert_close(ours(x), theirs(x))


# none


def test_no_context_looks_at_one_pixel_only() -> None:
    torch.manual_seed(0)
    module = none(8, 16).eval()
    x = torch.randn(1, 8, 5, 5)
    changed = x.clone()
    changed[..., 2, 2] += 1
    moved = (module(changed) - module(x)).abs().sum(1)[0]
    assert moved[2, 2] > 0
    moved[2, 2] = 0
    assert not moved.any()
