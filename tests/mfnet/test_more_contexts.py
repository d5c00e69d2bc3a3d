"""PPM, the context encoding module and the non-local block, against their papers' equations."""

from __future__ import annotations

import itertools
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mfnet import create_model
from mfnet.contexts import CONTEXTS, EncodingContext, LossContext, PPMContext
from mfnet.contexts.encoding import Encoding
from mfnet.contexts.nonlocal_ import NonLocalBlock
from mfnet.contexts.pooling import ImagePooling
from mfnet.flops import call_flops

NEW = ("ppm", "encoding", "nonlocal")
Array = np.ndarray


def unlike_its_start(module: nn.Module) -> nn.Module:
    """Float64, every norm's scale, shift and statistics at random: nothing hides in a 0 or 1."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.double()


def numbers(*tensors: Tensor) -> list[Array]:
    return [tensor.detach().numpy() for tensor in tensors]


def normalized(values: Array, norm: nn.Module, training: bool) -> Array:
    """BatchNorm over axis 1."""
    axes = tuple(axis for axis in range(values.ndim) if axis != 1)
    shape = [1, -1] + [1] * (values.ndim - 2)
    mean, var, scale, shift = numbers(norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if training:
        mean, var = values.mean(axes), values.var(axes)
    mean, var, scale, shift = (array.reshape(shape) for array in (mean, var, scale, shift))
    return (values - mean) / np.sqrt(var + norm.eps) * scale + shift


def convolved(values: Array, conv: nn.Conv2d) -> Array:
    """A 1x1 convolution."""
    (weight,) = numbers(conv.weight)
    out = np.einsum("oi,bihw->bohw", weight[:, :, 0, 0], values)
    return out if conv.bias is None else out + numbers(conv.bias)[0].reshape(1, -1, 1, 1)


class Largest(TorchDispatchMode):
    """Notes the most elements that a tensor has which an operator makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def largest_tensor(module: nn.Module, x: Tensor) -> int:
    """Forward and backward."""
    with Largest() as mode:
        module(x).sum().backward()
    return mode.elements


# All three


@pytest.mark.parametrize("name", NEW)
def test_a_single_pixel_evaluates_and_does_not_train(name: str) -> None:
    context = CONTEXTS[name](8, 16)
    x = torch.randn(1, 8, 1, 1)
    assert context.eval()(x).isfinite().all()
    with pytest.raises(ValueError, match="more than 1 value per channel"):  # torch's BatchNorm
        context.train()(x)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("batch", [1, 2])
def test_trains_under_autocast(name: str, batch: int) -> None:
    context = CONTEXTS[name](8, 16).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = context(torch.randn(batch, 8, 5, 7))
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in context.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", NEW)
def test_in_half_precision(name: str) -> None:
    context = CONTEXTS[name](8, 16).eval()
    x = torch.randn(2, 8, 5, 7)
    expected = context(x)
    out = context.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    # Five layers in a row, each of which rounds its weights and its result to 2^-9.
    bound = 10 * 2**-9 * expected.max().item()
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", NEW)
def test_layout_does_not_matter(name: str) -> None:
    context = unlike_its_start(CONTEXTS[name](8, 16)).eval()
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    expected = context(x)
    context.to(memory_format=torch.channels_last)
    torch.testing.assert_close(context(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("name", NEW)
def test_compiles_without_graph_breaks(name: str) -> None:
    context = CONTEXTS[name](8, 16).eval()
    x = torch.randn(2, 8, 5, 7)
    compiled = torch.compile(context, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), context(x))
    compiled.train()(x).sum().backward()


@pytest.mark.parametrize("name", NEW)
def test_flops_are_the_same_wherever_they_are_counted(name: str) -> None:
    counts = {}
    for device in ("cpu", "meta"):
        context = CONTEXTS[name](8, 16).eval().to(device)
        with torch.no_grad():
            counts[device] = call_flops(partial(context, torch.empty(2, 8, 5, 7, device=device)))
    assert counts["cpu"] == counts["meta"]


# ppm


def pooled(values: Array, bins: int) -> Array:
    """Means over bins from floor(i h / bins) to ceil((i + 1) h / bins)."""
    batch, channels, *size = values.shape
    out = np.empty((batch, channels, bins, bins))
    for i, j in itertools.product(range(bins), repeat=2):
        rows, columns = (
            slice(k * n // bins, -(-(k + 1) * n // bins)) for k, n in zip((i, j), size, strict=True)
        )
        out[:, :, i, j] = values[:, :, rows, columns].mean((2, 3))
    return out


def resampled(values: Array, size: tuple[int, int]) -> Array:
    """Bilinearly, corners on corners, one axis after the other."""
    for axis, new in zip((2, 3), size, strict=True):
        old = values.shape[axis]
        at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0)
        below = np.floor(at).astype(int)
        above = np.minimum(below + 1, old - 1)
        share = (at - below).reshape([-1 if a == axis else 1 for a in range(4)])
        values = (1 - share) * values.take(below, axis) + share * values.take(above, axis)
    return values


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(7, 8), (2, 5)])
def test_ppm_is_the_pyramid_of_its_paper(training: bool, size: tuple[int, int]) -> None:
    context = unlike_its_start(PPMContext(8, 4)).train(training)
    x = torch.randn(2, 8, *size, dtype=torch.float64)

    parts = numbers(x)
    for bins, branch in zip((1, 2, 3, 6), context.branches, strict=True):
        _, conv, norm, _ = branch
        assert conv.weight.shape == (2, 8, 1, 1)
        level = np.maximum(normalized(convolved(pooled(parts[0], bins), conv), norm, training), 0)
        parts.append(resampled(level, size))
    expected = context.bottleneck(torch.from_numpy(np.concatenate(parts, axis=1)))
    torch.testing.assert_close(context(x), expected)


def test_pooling_of_one_image_uses_running_statistics_for_one_bin_alone() -> None:
    x = torch.randn(1, 8, 6, 6)
    for bins in (1, 2):
        pooling = ImagePooling(8, 4, bins)
        norm = pooling[2]
        nn.init.normal_(norm.running_mean)
        before = norm.running_mean.clone()
        pooling.train()(x)
        assert torch.equal(norm.running_mean, before) == (bins == 1)


# encoding


def encoded(pixels: Array, codewords: Array, smoothing: Array) -> Array:
    """The paper's residual encoder of one image (C, N), residual by residual: (K, C)."""
    out = np.zeros_like(codewords)
    for pixel in pixels.T:
        residuals = pixel - codewords
        scores = np.exp(-smoothing * (residuals**2).sum(1))
        out += (scores / scores.sum())[:, None] * residuals
    return out


def test_encoding_layer_is_the_papers_residual_encoder() -> None:
    layer = Encoding(6, codewords=4).double()
    nn.init.normal_(layer.codewords)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    parameters = numbers(layer.codewords, layer.smoothing)
    expected = np.stack([encoded(image, *parameters) for image in x.flatten(2).numpy()])
    torch.testing.assert_close(layer(x).detach(), torch.from_numpy(expected))
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


def test_encoding_starts_as_published() -> None:
    layer = Encoding(512, codewords=32)
    assert layer.codewords.abs().max().item() == pytest.approx((32 * 512) ** -0.5, rel=1e-3)
    assert 0 <= layer.smoothing.min() < layer.smoothing.max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encoding_runs_in_float32_under_autocast(dtype: torch.dtype) -> None:
    layer = Encoding(64, codewords=5)
    x = torch.randn(1, 64, 4, 6, dtype=dtype)
    with torch.autocast("cpu", dtype):
        out = layer(x)
    assert out.dtype == torch.float32
    parameters = [array.astype(np.float64) for array in numbers(layer.codewords, layer.smoothing)]
    expected = encoded(x[0].flatten(1).double().numpy(), *parameters)
    # float32's accuracy, which no step in the 16-bit type would reach
    scale = np.abs(expected).max()
    np.testing.assert_allclose(out[0].detach().numpy(), expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("deviation", [None, 0.1, 1.0])
def test_encodings_gradients_have_float32s_accuracy(deviation: float | None) -> None:
    """The smoothing factors' is in what is left where pixels belong to one codeword all but wholly:
    with a float32 softmax it was off by more than a quarter at the first two deviations."""
    torch.manual_seed(0)
    layer = Encoding(512)
    if deviation is not None:
        nn.init.normal_(layer.codewords, std=deviation)
    x, weights = torch.randn(2, 512, 24, 24).relu(), torch.randn(2, 32, 512)
    found, exact = (
        torch.autograd.grad((net(x.to(dtype)) * weights.to(dtype)).sum(), list(net.parameters()))
        for net, dtype in ((layer, torch.float32), (deepcopy(layer).double(), torch.float64))
    )
    for gradient, reference in zip(found, exact, strict=True):
        error = (gradient.double() - reference).abs().max() / reference.abs().max()
        assert error < 2e-5


@pytest.mark.parametrize("training", [True, False])
def test_encoding_context_is_the_papers_module(training: bool) -> None:
    context = unlike_its_start(EncodingContext(4, 6, num_classes=3, codewords=5)).train(training)
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    masks = torch.tensor([[[2, 255, 2]], [[0, 2, 0]]])

    out, loss = context(x, return_loss=True, masks=masks)

    (project, project_norm, _), layer, norm, _ = context.encode
    (lower,) = numbers(context.lower(x))
    features = np.maximum(normalized(convolved(lower, project), project_norm, training), 0)
    parameters = numbers(layer.codewords, layer.smoothing)
    codes = np.stack([encoded(image, *parameters) for image in features.reshape(2, 512, -1)])
    code = np.maximum(normalized(codes, norm, training), 0).mean(1)
    weight, bias = numbers(context.attend[0].weight, context.attend[0].bias)
    gamma = 1 / (1 + np.exp(-(code @ weight.T + bias)))
    published = np.maximum(lower + lower * gamma[:, :, None, None], 0)
    torch.testing.assert_close(out, context.upper(torch.from_numpy(published)))
    torch.testing.assert_close(context(x), out)

    weight, bias = numbers(context.classify.weight, context.classify.bias)
    probability = 1 / (1 + np.exp(-(code @ weight.T + bias)))
    occurs = np.array([[0, 0, 1], [1, 0, 1]])
    entropy = -(occurs * np.log(probability) + (1 - occurs) * np.log(1 - probability))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), entropy.mean(), rtol=1e-6, atol=0)


def test_encoding_writes_no_residuals_to_memory() -> None:
    side = 24
    elements = largest_tensor(Encoding(512, codewords=32), torch.randn(1, 512, side, side))
    assert elements <= 512 * side**2


def test_without_classes_there_is_no_se_loss_and_nothing_untrained() -> None:
    context = EncodingContext(4, 6)
    assert isinstance(context, LossContext)
    assert context.classify is None
    with pytest.raises(ValueError, match="num_classes: the SE-loss needs it, got None"):
        context(torch.randn(1, 4, 3, 4), return_loss=True, masks=torch.zeros(1, 3, 4).long())


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        (None, ValueError, r"masks: the SE-loss needs them, \(2, H, W\), got None"),
        (torch.zeros(1, 5, 5).long(), ValueError, r"expected \(2, H, W\), got shape \(1, 5, 5\)"),
        (torch.zeros(2, 1, 5, 5).long(), ValueError, r"\(2, H, W\), got shape \(2, 1, 5, 5\)"),
        (torch.zeros(2, 5, 5), TypeError, "masks: expected integers, got torch.float32"),
        (torch.full((2, 5, 5), 3), RuntimeError, "index 3 is out of bounds .* size 3"),
    ],
)
def test_bad_masks(masks: Tensor | None, error: type[Exception], message: str) -> None:
    context = EncodingContext(4, 6, num_classes=3)
    with pytest.raises(error, match=message):
        context(torch.randn(2, 4, 3, 4), return_loss=True, masks=masks)


def test_networks_hand_classes_and_masks_on() -> None:
    network = create_model(
        "deeplabv3plus", num_classes=3, backbone="test_resnet", context="encoding", codewords=4
    )
    assert network.context.classify.out_features == 3
    assert network.context.encode[1].codewords.shape == (4, 512)
    images, masks = torch.randn(2, 3, 33, 33), torch.randint(3, (2, 33, 33))
    logits, loss = network(images, return_loss=True, masks=masks)
    assert logits.shape == (2, 3, 33, 33)
    assert loss > 0
    with pytest.raises(ValueError, match="masks: the SE-loss needs them"):
        network(images, return_loss=True)


# nonlocal


@pytest.mark.parametrize("training", [True, False])
def test_nonlocal_block_is_the_papers_equations(training: bool) -> None:
    block = unlike_its_start(NonLocalBlock(6)).train(training)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)

    (values,) = numbers(x)
    theta, phi, g = (
        convolved(values, conv).reshape(2, 3, -1) for conv in (block.theta, block.phi, block.g)
    )
    affinity = np.exp(np.einsum("bci,bcj->bij", theta, phi))
    affinity /= affinity.sum(2, keepdims=True)
    y = np.einsum("bij,bcj->bci", affinity, g).reshape(2, 3, 3, 5)
    conv, norm = block.w
    expected = normalized(convolved(y, conv), norm, training) + values
    torch.testing.assert_close(block(x).detach(), torch.from_numpy(expected))


def test_nonlocal_block_starts_as_the_identity() -> None:
    x = torch.randn(2, 6, 3, 5)
    block = NonLocalBlock(6)
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def test_nonlocal_starts_in_a_network_as_by_itself() -> None:
    """Kaiming's weights, which other convolutions of a head get, would saturate its softmax."""
    network = create_model("emanet", num_classes=3, backbone="test_resnet", context="nonlocal")
    block = network.context.unit
    assert not block.w[1].weight.any()
    for conv in (block.theta, block.phi, block.g, block.w[0]):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
    x = torch.randn(1, 512, 9, 9)
    scores = block.theta(x).flatten(2).mT @ block.phi(x).flatten(2)
    assert torch.softmax(scores, -1).amax(-1).mean() < 0.1  # 0.8 with Kaiming's


def test_nonlocal_writes_no_matrix_of_pixels_to_memory() -> None:
    pixels = 40 * 40
    assert largest_tensor(NonLocalBlock(64), torch.randn(1, 64, 40, 40)) < pixels**2 / 4


def test_nonlocal_flops_by_hand() -> None:
    with torch.device("meta"):
        block, x = NonLocalBlock(512).eval(), torch.empty(1, 512, 33, 33)
    pixels = 33 * 33
    assert call_flops(lambda: block(x)) == 2 * pixels * 256 * (4 * 512 + 2 * pixels)
