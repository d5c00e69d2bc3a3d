"""Tokens (B, N, C) of transformers: views without a copy, and contexts in a ViT of timm."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mfops
from mfops.methods import METHODS

BATCH, TOKENS, CHANNELS, RANK = 2, 30, 16, 4
FACTORIZERS = ("learned", "double_attention", *METHODS)
# What torch calls where it moves elements without computing anything.
COPIES = {"clone", "copy_", "_to_copy", "contiguous", "cat", "stack"}


class Watch(TorchDispatchMode):
    """Notes the operators that copy as many elements as x has or more, and what mfops is given."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.copies: list[str] = []
        self.features: list[Tensor] = []
        self.turned: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.elements and name in COPIES:
                self.copies.append(name)
        if func.namespace == "mfops":
            given = {
                argument.name: value
                for argument, value in zip(func._schema.arguments, args, strict=False)
            }
            self.features.append(given["x"])
        if name == "sum":
            (summed,) = [value for value in args if isinstance(value, Tensor)]
            if summed.numel() >= self.elements and summed.stride(-1) != 1:
                self.turned.append(name)
        return out


def tokens(sliced: bool) -> Tensor:
    torch.manual_seed(1)
    whole = torch.randn(BATCH, TOKENS + 1, CHANNELS)
    return whole[:, 1:] if sliced else whole[:, 1:].contiguous()


@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "sliced"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("factorizer", FACTORIZERS)
def test_a_context_reads_and_writes_tokens_where_they_lie(
    factorizer: str, training: bool, sliced: bool
) -> None:
    context = mfops.FactorizedContext(CHANNELS, RANK, (5, 6), factorizer).train(training)
    x = tokens(sliced).requires_grad_()
    with Watch(x.numel()) as watch:
        torch.manual_seed(2)
        out = context(x.mT).mT
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    assert out.is_contiguous()
    assert x.grad is not None
    assert x.grad.stride()[1:] == (CHANNELS, 1)
    assert not watch.copies
    assert not watch.turned
    assert bool(watch.features) == (training or factorizer not in ("learned", "double_attention"))
    for given in watch.features:
        assert given.stride()[1:] == (1, CHANNELS)
        if factorizer != "nmf":  # it takes relu(X)
            assert given.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("factorizer", FACTORIZERS)
def test_tokens_get_what_the_features_of_a_convolution_get(factorizer: str) -> None:
    context = mfops.FactorizedContext(CHANNELS, RANK, (5, 6), factorizer)
    weight = torch.linspace(-1, 1, TOKENS * CHANNELS).view(TOKENS, CHANNELS)
    found = []
    for contiguous in (False, True):
        x = tokens(sliced=False).requires_grad_()
        features = x.mT.contiguous() if contiguous else x.mT
        context.zero_grad()
        torch.manual_seed(2)
        if factorizer == "em":
            context.factorizer.reset_parameters()
        out = context(features).mT
        (out * weight).sum().backward()
        found.append([out, x.grad, *(p.grad for p in context.parameters())])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("method", METHODS)
def test_factors_of_tokens(method: str) -> None:
    x = tokens(sliced=True).abs()
    y0 = METHODS[method].noise(CHANNELS, RANK)
    with Watch(x.numel()) as watch:
        y, z = mfops.factorize(x.mT, y0, method)
    assert not watch.copies
    expected = mfops.factorize(x.mT.contiguous(), y0, method)
    torch.testing.assert_close((y, z), expected)
    assert z.mT.shape == (BATCH, TOKENS, RANK)


# In a ViT


class TokenContext(nn.Module):
    """As in docs/drop_in.md."""

    def __init__(self, context: nn.Module, prefix: int = 0) -> None:
        super().__init__()
        self.context, self.prefix = context, prefix

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.prefix:
            return self.context(tokens.mT).mT
        first, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        return torch.cat((first, self.context(patches.mT).mT), dim=1)


@pytest.mark.parametrize("prefix", [0, 1], ids=["class token too", "class token alone"])
@pytest.mark.parametrize("factorizer", ["learned", "em", "nmf"])
def test_in_a_vision_transformer(factorizer: str, prefix: int) -> None:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=64, depth=2, num_classes=5
    )
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = vit.eval()(images)
    size = (4, 4) if prefix else (1, 17)
    context = mfops.FactorizedContext(vit.embed_dim, 8, size, factorizer)
    module = TokenContext(context, prefix)
    vit.blocks.insert(1, module)
    seen: list[tuple[Tensor, Tensor]] = []
    module.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))

    with mfops.collect_losses() as losses:
        logits = vit.train()(images)
    (logits.square().mean() + 0.1 * losses[0]).backward()
    wanted = {name: p.grad for name, p in vit.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in wanted.values())
    before, after = seen[0]
    assert after.shape == before.shape == (2, 17, 192)
    assert torch.equal(after[:, 0], before[:, 0]) == bool(prefix)
    assert not torch.equal(after[:, 1:], before[:, 1:])

    vit.zero_grad()
    if factorizer == "learned":  # the others draw noise or move their bases
        vit(images).square().mean().backward()  # the loss joins in here
        torch.testing.assert_close({n: p.grad for n, p in vit.named_parameters()}, wanted)

    with torch.no_grad():
        first, second = vit.eval()(images), vit(images)
    assert torch.equal(first, second)
    assert not torch.allclose(first, plain)
