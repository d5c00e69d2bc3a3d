"""Contexts whose factors are found on the image: em, nmf, vq, cd, double attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mfops
from mfnet import create_model
from mfnet.contexts import CONTEXTS
from mfnet.contexts.double_attention import DoubleAttention
from mfnet.contexts.em import EMAUnit
from mfnet.contexts.hamburger import Hamburger
from mfops.factorizers import ImageFactorizer

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
    start = unit.factorizer.bases.clone()
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    features = unit.conv1(x).flatten(2).numpy()
    out = unit(x)

    results = [_em(image, start.numpy(), steps=3) for image in features]
    bases = torch.from_numpy(np.stack([mu for mu, _ in results]))
    rebuilt = torch.from_numpy(np.stack([x_hat for _, x_hat in results])).view(2, 8, 3, 4)
    torch.testing.assert_close(out, (x + unit.conv2(rebuilt.relu())).relu())
    torch.testing.assert_close(unit.factorizer.bases, 0.9 * start + 0.1 * bases.mean(dim=0))


def test_em_bases_start_normalized_and_rest_in_evaluation() -> None:
    unit = EMAUnit(8, bases=5).eval()
    torch.testing.assert_close(unit.factorizer.bases.norm(dim=0), torch.ones(5))
    start = unit.factorizer.bases.clone()
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(unit(x), unit(x), rtol=0, atol=0)
    torch.testing.assert_close(unit.factorizer.bases, start, rtol=0, atol=0)


def test_em_freezes_what_it_cannot_train() -> None:
    unit = EMAUnit(8)
    assert {name for name, p in unit.named_parameters() if not p.requires_grad} == {
        "conv1.weight",
        "conv1.bias",
    }
    unit(torch.randn(2, 8, 4, 4)).sum().backward()
    assert all(p.grad is not None for p in unit.parameters() if p.requires_grad)


# The kernels may round what they multiply to bfloat16: tests/mfops has the bounds for that.
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.bfloat16, partial(mfops.use_backend, "reference")), (torch.float16, nullcontext)],
)
def test_em_steps_run_in_float32_under_autocast(
    dtype: torch.dtype, backend: Callable[[], AbstractContextManager[None]]
) -> None:
    unit = EMAUnit(8, bases=5, steps=3)
    start = unit.factorizer.bases.clone()
    x = torch.randn(2, 8, 3, 4)
    with torch.autocast("cpu", dtype), backend():
        features = unit.conv1(x)
        rebuilt = unit.factorizer.product(features)
    assert features.dtype == rebuilt.dtype == dtype
    flat = features.float().flatten(2).detach().numpy()
    results = [_em(image, start.numpy(), steps=3) for image in flat]
    # float32's accuracy, which no step in the 16-bit type would reach
    bases = torch.from_numpy(np.stack([mu for mu, _ in results]))
    torch.testing.assert_close(
        unit.factorizer.bases, 0.9 * start + 0.1 * bases.mean(dim=0), rtol=0, atol=1e-6
    )


def test_em_in_half_precision() -> None:
    unit = EMAUnit(8).to(torch.bfloat16)
    out = unit(torch.randn(2, 8, 4, 4, dtype=torch.bfloat16))
    assert out.dtype == unit.factorizer.bases.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_em_of_constant_and_zero_features_is_finite() -> None:
    unit = EMAUnit(8)
    for x in (torch.zeros(2, 8, 4, 4), torch.ones(2, 8, 4, 4)):
        assert unit(x).isfinite().all()
    assert unit.factorizer.bases.isfinite().all()


def _conv(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    out = torch.einsum("oi,bin->bon", weight[:, :, 0, 0], x)
    return out if bias is None else out + bias[None, :, None]


def test_em_unit_loads_emanets_emau() -> None:
    """Names, shapes and formulas of EMANet's network.py."""
    torch.manual_seed(0)
    mu = torch.randn(1, 8, 5, dtype=torch.float64)
    published = {
        "mu": mu / mu.norm(dim=1, keepdim=True),
        "conv1.weight": torch.randn(8, 8, 1, 1, dtype=torch.float64),
        "conv1.bias": torch.randn(8, dtype=torch.float64),
        "conv2.0.weight": torch.randn(8, 8, 1, 1, dtype=torch.float64),
        "conv2.1.weight": torch.rand(8, dtype=torch.float64),
        "conv2.1.bias": torch.randn(8, dtype=torch.float64),
        "conv2.1.running_mean": torch.randn(8, dtype=torch.float64),
        "conv2.1.running_var": torch.rand(8, dtype=torch.float64) + 0.5,
    }
    unit = EMAUnit(8, bases=5).double().eval()
    unit.load_state_dict(published, strict=True)
    assert "mu" in published  # the caller's dictionary is left alone
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    features = _conv(published["conv1.weight"], published["conv1.bias"], x.flatten(2))
    rebuilt = [_em(image, published["mu"][0].numpy(), steps=3)[1] for image in features.numpy()]
    out = _conv(published["conv2.0.weight"], None, torch.from_numpy(np.stack(rebuilt)).relu())
    scale, shift, mean, var = (
        published[f"conv2.1.{name}"][None, :, None]
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    out = (out - mean) / (var + 1e-5).sqrt() * scale + shift
    torch.testing.assert_close(unit(x), (x + out.unflatten(2, (3, 4))).relu())


@pytest.mark.parametrize("unit", [EMAUnit(256), Hamburger("nmf", 256)], ids=["em", "hamburger"])
def test_convolutions_start_as_published(unit: nn.Module) -> None:
    convolutions = [m for m in unit.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) >= 2
    for conv in convolutions:
        assert conv.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)


def test_em_by_itself_tells_the_parts_of_an_image_apart() -> None:
    """Perplexity of the responsibilities, 1 to K: 64 of 64 with torch's start of conv1."""
    torch.manual_seed(0)
    unit = EMAUnit(512)
    parts = torch.randn(16, 512).relu()
    pixels = parts[torch.randint(16, (4, 33, 33))] + 0.3 * torch.randn(4, 33, 33, 512)
    features = unit.conv1(pixels.relu().permute(0, 3, 1, 2)).detach()
    for _ in range(30):
        _, z = unit.factorizer(features)
    entropy = -(z * z.clamp(min=1e-30).log()).sum(1)
    assert entropy.mean().exp() < 8


# hamburger

HAMS = ("nmf", "vq", "cd")


def _softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(axis=0))
    return e / e.sum(axis=0)


def _unit(columns: np.ndarray, least: float) -> np.ndarray:
    return columns / np.maximum(np.sqrt((columns**2).sum(axis=0)), least)


def _ham(method: str, x: np.ndarray, y: np.ndarray, steps: int) -> np.ndarray:
    """The published ham on one image (C, N), from bases y."""
    if method == "nmf":
        z = _softmax(y.T @ x)
        for _ in range(steps):
            z = z * (y.T @ x) / (y.T @ y @ z + 1e-6)
            y = y * (x @ z.T) / (y @ (z @ z.T) + 1e-6)
        return y @ (z * (y.T @ x) / (y.T @ y @ z + 1e-6))
    for _ in range(steps):
        bases = _unit(y, 1e-6) if method == "vq" else y
        z = _softmax(100 * bases.T @ _unit(x, 1e-12))
        y = x @ (z / (1e-6 + z.sum(axis=1, keepdims=True))).T
        if method == "cd":
            y = _unit(y, 1e-6)
    if method == "cd":
        return y @ np.linalg.inv(y.T @ y + 0.1 * np.eye(y.shape[1])) @ y.T @ x
    lengths = np.sqrt((x**2).sum(axis=0))
    return y @ _softmax(100 * _unit(y, 1e-6).T @ (x / (1e-6 + lengths)))


def _batch_norm(norm: nn.BatchNorm2d) -> dict[str, Tensor]:
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm.state_dict()


def _published(method: str, version: str, channels: int) -> dict[str, Tensor]:
    """A state dict as Hamburger's code (versions 1 and 2), mmsegmentation or SegNeXt writes it."""
    weight, cheese, upper = torch.randn(3, channels, channels, 1, 1, dtype=torch.float64)
    bias = torch.randn(channels, dtype=torch.float64)
    norm = _batch_norm(nn.BatchNorm2d(channels).double())
    if version in ("mmseg", "segnext"):  # mmcv's modules, with BatchNorm or with GroupNorm
        names = {"ham_in.conv.weight": weight, "ham_in.conv.bias": bias}
        names["ham_out.conv.weight"] = upper
        if version == "segnext":
            return names | {f"ham_out.gn.{key}": norm[key] for key in ("weight", "bias")}
        return names | {f"ham_out.bn.{key}": value for key, value in norm.items()}
    lower = "lower_bread.0" if method == "nmf" else "lower_bread"
    names = {f"{lower}.weight": weight, f"{lower}.bias": bias}
    if version == "v1":
        names["upper_bread.0.weight"] = upper
        return names | {f"upper_bread.1.{key}": value for key, value in norm.items()}
    names |= {"cheese.conv.weight": cheese, "upper_bread.weight": upper}
    return names | {f"cheese.bn.{key}": value for key, value in norm.items()}


@pytest.mark.parametrize("version", ["v1", "v2", "mmseg", "segnext"])
@pytest.mark.parametrize("method", HAMS)
@pytest.mark.parametrize("with_bases", [False, True])
def test_hamburger_loads_published_weights(method: str, version: str, with_bases: bool) -> None:
    torch.manual_seed(0)
    published = _published(method, version, 8)
    norm_layer = partial(nn.GroupNorm, 2) if version == "segnext" else nn.BatchNorm2d
    unit = Hamburger(method, 8, rank=5, cheese=version == "v2", norm_layer=norm_layer)
    unit = unit.double().eval()
    seeded = unit.factorizer.bases.clone()
    if with_bases:
        published["ham.bases"] = torch.rand(1, 8, 5, dtype=torch.float64)
    unit.load_state_dict(published, strict=True)
    bases = published["ham.bases"][0] if with_bases else seeded
    assert torch.equal(unit.factorizer.bases, bases)

    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    flat = _conv(*list(published.values())[:2], x.flatten(2))
    if method == "nmf":
        flat = flat.relu()
    rebuilt = [_ham(method, image, bases.numpy(), steps=7) for image in flat.numpy()]
    out = torch.from_numpy(np.stack(rebuilt)).view_as(x)

    def norm(t: Tensor, name: str) -> Tensor:
        if version == "segnext":
            shift, scale = (published[f"ham_out.gn.{k}"][:, None, None] for k in ("bias", "weight"))
            groups = t.unflatten(1, (2, 4))
            variance, mean = torch.var_mean(groups, (2, 3, 4), keepdim=True, correction=0)
            return ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2) * scale + shift
        parts = (published[f"{name}.{k}"] for k in ("running_mean", "running_var"))
        scale, shift = (published[f"{name}.{k}"] for k in ("weight", "bias"))
        return nn.functional.batch_norm(t, *parts, scale, shift)

    if version == "v2":
        out = norm(nn.functional.conv2d(out, published["cheese.conv.weight"]), "cheese.bn").relu()
        out = nn.functional.conv2d(out, published["upper_bread.weight"])
    else:
        conv, bn = {
            "v1": ("upper_bread.0", "upper_bread.1"),
            "mmseg": ("ham_out.conv", "ham_out.bn"),
            "segnext": ("ham_out.conv", "ham_out.gn"),
        }[version]
        out = norm(nn.functional.conv2d(out, published[f"{conv}.weight"]), bn)
    torch.testing.assert_close(unit(x), (x + out).relu())


def test_hamburger_names_what_is_missing() -> None:
    published = _published("nmf", "v2", 8)
    del published["upper_bread.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"upper.weight"'):
        Hamburger("nmf", 8, rank=5).load_state_dict(published)
    own = Hamburger("nmf", 8, rank=5).state_dict()
    del own["factorizer.nmf_bases"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"factorizer.nmf_bases"'):
        Hamburger("nmf", 8, rank=5).load_state_dict(own)


@pytest.mark.parametrize("method", HAMS)
def test_hamburger_is_random_in_training_and_rests_in_evaluation(method: str) -> None:
    unit = Hamburger(method, 8, rank=5)
    start = unit.factorizer.bases.clone()
    x = torch.randn(2, 8, 4, 4)
    assert not torch.equal(unit.factorizer.product(x), unit.factorizer.product(x))
    unit.eval()
    assert torch.equal(unit(x), unit(x))
    assert torch.equal(unit.factorizer.bases, start)
    other = Hamburger(method, 8, rank=5)  # whatever the state of the generator
    assert torch.equal(other.factorizer.bases, start)


# double attention


def test_double_attention_is_the_papers_equations() -> None:
    torch.manual_seed(0)
    unit = DoubleAttention(8, rank=3).double().eval()
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    project, norm = unit.project
    out = []
    for image in x.flatten(2):

        def part(conv: nn.Conv2d, image: Tensor = image) -> np.ndarray:
            return _conv(conv.weight, conv.bias, image[None])[0].detach().numpy()

        a, b, v = part(unit.value), part(unit.gather), part(unit.distribute)
        assert a.shape == (2, 12)
        maps = _softmax(b.T).T  # over the pixels
        bases = np.stack([(a * row).sum(axis=1) for row in maps], axis=1)
        out.append(bases @ _softmax(v))
    rebuilt = torch.from_numpy(np.stack(out)).view(2, 2, 3, 4)
    expected = norm(nn.functional.conv2d(rebuilt, project.weight))
    torch.testing.assert_close(unit(x), (x + expected).relu())


@pytest.mark.parametrize("context", ["vq", "cd", "mf"])
def test_inverse_temperature_reaches_the_method(context: str) -> None:
    options = {"factorizer": "vq"} if context == "mf" else {}
    x = torch.randn(1, 8, 5, 6)
    results = []
    for inverse_temperature in (1, 100, None):
        torch.manual_seed(0)
        module = CONTEXTS[context](8, inverse_temperature=inverse_temperature, **options)
        results.append(module.eval()(x))
    assert not torch.allclose(results[0], results[1])
    assert torch.equal(results[1], results[2])
    model = create_model(
        "mfnet", backbone="test_resnet", context=context, inverse_temperature=1, **options
    )
    (method,) = (m for m in model.modules() if isinstance(m, ImageFactorizer))
    assert method.inverse_temperature == 1
