"""torch.fx and torch.func through the contexts and a whole network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap
from torchvision.models.feature_extraction import create_feature_extractor

import mfnet
from mfnet.contexts import CONTEXTS


def network(context: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), CONTEXTS[context](8, 8))


def results(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    module.zero_grad()
    torch.manual_seed(1)  # of the noise that training starts from
    out = module(x)
    out.sin().sum().backward()
    return out, {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", CONTEXTS)
def test_fx_traces_contexts(context, training):
    net = network(context).train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(net))
    x = torch.randn(2, 3, 7, 7)
    out, grads = results(net, x)
    traced_out, traced_grads = results(traced, x)
    torch.testing.assert_close(traced_out, out)
    # A trace leaves out parameters that nothing uses.
    torch.testing.assert_close(traced_grads, {name: grads[name] for name in traced_grads})
    assert all(grads[name] is None for name in grads.keys() - traced_grads.keys())


@pytest.mark.parametrize("name", ["mfnet", "mfnet_light"])
def test_fx_traces_a_network(name):
    model = mfnet.create_model(name, 3, "test_resnet", context_size=(3, 3)).eval()
    arguments = {"return_loss": False, "masks": None}
    x = torch.randn(1, 3, 40, 41)
    traced = torch.fx.symbolic_trace(model, concrete_args=arguments)
    torch.testing.assert_close(traced(x), model(x))
    with pytest.raises(ValueError, match="x: expected images of at least 33 x 33, got 8 x 8"):
        traced(x[..., :8, :8])
    features = create_feature_extractor(model, ["context"], concrete_args=arguments)(x)
    torch.testing.assert_close(features["context"], model.context(model.backbone(x)[1]))


@pytest.mark.parametrize("context", CONTEXTS)
def test_gradients_of_each_sample(context):
    """In evaluation; in training torch.func refuses BatchNorm and em for what they move."""
    net = network(context).double().eval()
    parameters = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}
    batch = torch.randn(2, 3, 7, 7, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, parameters, (x[None],)).sin().sum()

    each = vmap(grad(loss), (None, 0))(parameters, batch)
    for i, x in enumerate(batch):
        _, expected = results(net, x[None])
        for name, gradient in each.items():
            wanted = torch.zeros_like(gradient[i]) if expected[name] is None else expected[name]
            torch.testing.assert_close(gradient[i], wanted)


def test_training_without_running_statistics_has_gradients_of_each_sample():
    net = replace_all_batch_norm_modules_(network("mf"))
    batch = torch.randn(2, 1, 3, 7, 7)
    each = vmap(grad(lambda x: net(x).sin().sum()))(batch)
    for found, x in zip(each, batch, strict=True):
        x.requires_grad_()
        net(x).sin().sum().backward()
        torch.testing.assert_close(found, x.grad)
