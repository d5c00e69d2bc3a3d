from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torchvision.models.segmentation.deeplabv3 import ASPP

from mfnet.contexts import CONTEXTS, EMContext, LossContext, MFContext, aspp, aspp_separable, none
from mfnet.contexts.em import EMAUnit


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("shape", [(2, 8, 3, 3), (1, 8, 5, 7)])
def test_shapes_and_gradients(name: str, shape: tuple[int, ...]) -> None:
    context = CONTEXTS[name](8, 16).train()
    x = torch.randn(shape, requires_grad=True)
    y = context(x)
    assert y.shape == (shape[0], 16, *shape[2:])
    y.square().sum().backward()
    assert all(p.grad is not None for p in context.parameters() if p.requires_grad)
    assert x.grad is not None
    assert x.grad.isfinite().all()


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


# em


def _em(x: np.ndarray, mu: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The published iteration on one image (C, N): the final bases and their reconstruction."""
    for _ in range(steps):
        scores = np.exp(mu.T @ x)
        z = scores / scores.sum(axis=0)
        mu = x @ (z / (1e-6 + z.sum(axis=1, keepdims=True))).T
        mu = mu / (1e-6 + np.sqrt((mu**2).sum(axis=0)))
    return mu, mu @ z


def test_em_unit_is_the_published_iteration() -> None:
    unit = EMAUnit(8, bases=5, steps=3).double()
    start = unit.mu.clone()
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    features = unit.conv1(x).flatten(2).numpy()

    out = unit(x)

    results = [_em(image, start[0].numpy(), steps=3) for image in features]
    bases = torch.from_numpy(np.stack([mu for mu, _ in results]))
    rebuilt = torch.from_numpy(np.stack([x_hat for _, x_hat in results])).view(2, 8, 3, 4)
    torch.testing.assert_close(out, (x + unit.conv2(rebuilt.relu())).relu())
    torch.testing.assert_close(unit.mu, 0.9 * start + 0.1 * bases.mean(dim=0))


def test_em_bases_start_normalised_and_rest_in_evaluation() -> None:
    unit = EMAUnit(8, bases=5).eval()
    torch.testing.assert_close(unit.mu.norm(dim=1), torch.ones(1, 5))
    start = unit.mu.clone()
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(unit(x), unit(x), rtol=0, atol=0)
    torch.testing.assert_close(unit.mu, start, rtol=0, atol=0)


def test_em_freezes_what_it_cannot_train() -> None:
    unit = EMAUnit(8)
    assert {name for name, p in unit.named_parameters() if not p.requires_grad} == {
        "conv1.weight",
        "conv1.bias",
    }
    unit(torch.randn(2, 8, 4, 4)).sum().backward()
    assert all(p.grad is not None for p in unit.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_em_steps_run_in_float32_under_autocast(dtype: torch.dtype) -> None:
    unit = EMAUnit(8, bases=5, steps=3)
    start = unit.mu.clone()
    x = torch.randn(2, 8, 3, 4)
    with torch.autocast("cpu", dtype):
        features = unit.conv1(x)
        rebuilt = unit._reconstruct(x)
    assert features.dtype == rebuilt.dtype == dtype
    flat = features.float().flatten(2).detach().numpy()
    results = [_em(image, start[0].numpy(), steps=3) for image in flat]
    # float32's accuracy, which no step in the 16-bit type would reach
    bases = torch.from_numpy(np.stack([mu for mu, _ in results]))
    torch.testing.assert_close(unit.mu, 0.9 * start + 0.1 * bases.mean(dim=0), rtol=0, atol=1e-6)


def test_em_in_half_precision() -> None:
    unit = EMAUnit(8).to(torch.bfloat16)
    out = unit(torch.randn(2, 8, 4, 4, dtype=torch.bfloat16))
    assert out.dtype == unit.mu.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_em_of_constant_and_zero_features_is_finite() -> None:
    unit = EMAUnit(8)
    for x in (torch.zeros(2, 8, 4, 4), torch.ones(2, 8, 4, 4)):
        assert unit(x).isfinite().all()
    assert unit.mu.isfinite().all()


def test_em_arguments() -> None:
    with pytest.raises(ValueError, match="bases: expected at least 1, got 0"):
        EMContext(8, bases=0)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        EMContext(8, steps=0)


def _train_em_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    unit = EMAUnit(8, bases=5)
    unit.load_state_dict(torch.load(f"{folder}/start.pt"))
    unit(torch.load(f"{folder}/x.pt")[rank])
    torch.save(unit.mu, f"{folder}/mu{rank}.pt")
    dist.destroy_process_group()


def test_em_bases_agree_across_ranks(tmp_path: Path) -> None:
    unit = EMAUnit(8, bases=5)
    x = torch.randn(2, 2, 8, 3, 4)
    torch.save(unit.state_dict(), tmp_path / "start.pt")
    torch.save(x, tmp_path / "x.pt")
    spawn(_train_em_on_rank, (str(tmp_path),), nprocs=2)
    unit(x.flatten(0, 1))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"mu{rank}.pt"), unit.mu)


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


@pytest.mark.parametrize("synchronised", [False, True])
def test_aspp_trains_on_one_image(synchronised: bool) -> None:
    context: nn.Module = aspp(8, 16)
    if synchronised:  # outside of a process group it is a plain BatchNorm
        context = nn.SyncBatchNorm.convert_sync_batchnorm(context)
    _, conv, norm, _ = context.convs[-1]
    assert isinstance(norm, nn.SyncBatchNorm) == synchronised
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


def test_separable_aspp_is_that_of_segmentation_models_pytorch() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="smp is not installed")
    decoder = smp.DeepLabV3Plus("resnet18", encoder_weights=None, decoder_atrous_rates=(6, 12, 18))
    theirs = decoder.decoder.aspp.eval()
    ours = aspp_separable(512, 256).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 512, 9, 11)
    torch.testing.assert_close(ours(x), theirs(x))


def test_separable_aspp_has_its_parameters() -> None:
    pyramid = 2 * 2048 * 256 + 3 * (9 * 2048 + 2048 * 256) + 5 * 256 * 256 + 6 * 2 * 256
    last = 9 * 256 + 256 * 256 + 2 * 256
    assert sum(p.numel() for p in aspp_separable(2048).parameters()) == pyramid + last


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
