"""torch.func's transforms and torch.fx, through the functions and FactorizedContext."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torchvision.models.feature_extraction import create_feature_extractor

import mfops
from mfops.methods import METHODS

FACTORIZERS = ["learned", "double_attention", *METHODS]
every_factorizer = pytest.mark.parametrize("factorizer", FACTORIZERS)
in_both_modes = pytest.mark.parametrize("training", [True, False])


@pytest.fixture(autouse=True)
def _float64():
    """The path without transforms then computes gradients by formula, to be compared closely."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
    mfops.set_loss_scaling(None)


def make(factorizer: str, training: bool = True) -> mfops.FactorizedContext:
    torch.manual_seed(0)
    context = mfops.FactorizedContext(6, 3, (4, 5), factorizer, loss_weight=0.5).train(training)
    if factorizer == "em":
        context.factorizer.eval()
    return context


def loss(context: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    torch.manual_seed(1)  # of the noise that training starts from
    return functional_call(context, parameters, (x,)).sin().sum()


def by_autograd(context: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the parameters and of x, without torch.func."""
    x = x.clone().requires_grad_()
    parameters = dict(context.named_parameters())
    total = loss(context, parameters, x)
    grads = torch.autograd.grad(total, [*parameters.values(), x])
    return dict(zip(parameters, grads[:-1], strict=True)), grads[-1]


def detached(context: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in context.named_parameters()}


@every_factorizer
@in_both_modes
def test_gradients_of_a_context(factorizer, training):
    context = make(factorizer, training)
    x = torch.randn(2, 6, 4, 5)
    found = grad(lambda p, x: loss(context, p, x), argnums=(0, 1))(detached(context), x)
    torch.testing.assert_close(found, by_autograd(context, x))


@every_factorizer
@in_both_modes
def test_gradients_of_each_sample(factorizer, training):
    context = make(factorizer, training)
    batch = torch.randn(3, 6, 4, 5)
    each = vmap(
        grad(lambda p, x: loss(context, p, x[None]), argnums=(0, 1)),
        in_dims=(None, 0),
        randomness="same",
    )
    parameters, of_x = each(detached(context), batch)
    for i, x in enumerate(batch):
        expected, expected_x = by_autograd(context, x[None])
        torch.testing.assert_close({name: g[i] for name, g in parameters.items()}, expected)
        torch.testing.assert_close(of_x[i], expected_x[0])


@every_factorizer
@in_both_modes
def test_vmap_of_a_context_inside_a_gradient(factorizer, training):
    context = make(factorizer, training)
    batches = torch.randn(3, 2, 6, 4, 5)

    def total(batches: Tensor) -> Tensor:
        return vmap(lambda x: loss(context, {}, x), randomness="same")(batches).sum()

    expected = torch.stack([by_autograd(context, x)[1] for x in batches])
    torch.testing.assert_close(grad(total)(batches), expected)


@every_factorizer
def test_forward_and_reverse_mode_agree(factorizer):
    context = make(factorizer, training=False)
    x, v, u = torch.randn(3, 2, 6, 4, 5)
    _, forward = jvp(context, (x,), (v,))
    out, backward = vjp(context, x)
    torch.testing.assert_close(out, context(x))
    torch.testing.assert_close((u * forward).sum(), (backward(u)[0] * v).sum())
    x = x[:1, :, :2, :2]
    torch.testing.assert_close(jacfwd(context)(x), jacrev(context)(x))


@every_factorizer
def test_forward_mode_without_torch_func(factorizer):
    context = make(factorizer, training=False)
    x, v = torch.randn(2, 2, 6, 4, 5)
    expected = jvp(lambda x: context(x, return_loss=True), (x,), (v,))[1]
    with forward_ad.dual_level():
        results = context(forward_ad.make_dual(x, v), return_loss=True)
        found = tuple(forward_ad.unpack_dual(result).tangent for result in results)
    torch.testing.assert_close(found, expected)


def test_an_injected_loss_in_forward_mode_is_refused():
    context = make("learned")
    x, v = torch.randn(2, 2, 6, 4, 5)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="loss_weight: an injected"):
        context(forward_ad.make_dual(x, v))


@pytest.mark.parametrize("method", ["nmf", "vq", "cd"])
def test_each_sample_may_start_from_noise_of_its_own(method):
    context = make(method)
    context.loss_weight = 0.0
    same = torch.rand(1, 6, 4, 5).expand(2, 1, 6, 4, 5)
    first, second = vmap(context, randomness="different")(same)
    assert not torch.equal(first, second)


def test_em_in_training_under_a_transform_is_refused():
    context = make("em")
    context.factorizer.train()
    start = context.factorizer.bases.clone()
    x = torch.randn(2, 6, 4, 5)
    message = "'em' moves its bases in training, which torch.func's transforms do not allow: .*eval"
    with pytest.raises(RuntimeError, match=message):
        vmap(context)(x[None])
    with pytest.raises(RuntimeError, match=message):
        grad(lambda x: context(x).sum())(x)
    assert torch.equal(context.factorizer.bases, start)


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
def test_an_injected_loss_under_several_derivatives_at_once_is_refused(transform):
    context = make("learned")
    with pytest.raises(RuntimeError, match=r"loss_weight: .*jac.*return_loss=True.*eval") as caught:
        transform(context)(torch.randn(1, 6, 4, 5))
    assert "\n" not in str(caught.value)
    context.loss_weight = 0.0
    transform(context)(torch.randn(1, 6, 4, 5))


def test_an_injected_loss_under_batched_gradients_is_refused():
    x = torch.randn(1, 6, 4, 5, requires_grad=True)
    out = make("learned")(x)
    upstream = torch.ones(2, *out.shape)
    with pytest.raises(RuntimeError, match=r"loss_weight: .*is_grads_batched"):
        torch.autograd.grad(out, x, upstream, is_grads_batched=True)


@pytest.mark.parametrize("each", [False, True])
def test_loss_scaling_reaches_an_injected_loss(each):
    context = make("learned")
    x = torch.randn(2, 6, 4, 5)

    def gradient(scale: float) -> Tensor:
        mfops.set_loss_scaling(lambda loss: loss * scale)
        run = grad(lambda p, x: loss(context, p, x))
        run = vmap(run, (None, 0)) if each else run
        return run(detached(context), x[:, None] if each else x)["factorizer.y"]

    torch.testing.assert_close(gradient(3.0) - gradient(0.0), 3 * (gradient(1.0) - gradient(0.0)))
    assert not torch.equal(gradient(1.0), gradient(0.0))


def factors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 2, 6, 20), torch.randn(6, 3), torch.randn(3, 2, 3, 20)


FUNCTIONS = {
    "reconstruction": lambda x, y, z: sum(
        t.sin().sum() for t in mfops.factorized_reconstruction(x, y, z)
    ),
    "mse": mfops.factorized_mse,
    "factorize": lambda x, y, z: mfops.factorize(x, y, "cd")[1].mul(z).sum(),
    "factorize_reconstruct": lambda x, y, z: sum(
        t.sin().sum() for t in mfops.factorize_reconstruct(x.relu(), y.abs(), "nmf")
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function = FUNCTIONS[name]
    x, y, z = factors()
    argnums = (0,) if name.startswith("factorize") else (0, 1, 2)
    found = vmap(grad(function, argnums), (0, None, 0))(x, y, z)
    for i in range(3):
        inputs = [t.clone().requires_grad_() for t in (x[i], y, z[i])]
        expected = torch.autograd.grad(function(*inputs), [inputs[n] for n in argnums])
        torch.testing.assert_close(tuple(g[i] for g in found), expected)


def test_shared_factors_are_expanded_to_the_batch():
    x, y, z = factors()
    x_hat, mse = vmap(mfops.factorized_reconstruction, (0, None, None))(x, y, z[0, 0])
    assert x_hat.shape == x.shape
    assert mse.shape == (3,)


def test_second_derivatives():
    x, y, z = (t[0] for t in factors())
    y = factors()[1]

    def function(y: Tensor) -> Tensor:
        return mfops.factorized_mse(x, y, z).sin()

    expected = torch.autograd.functional.hessian(function, y)
    torch.testing.assert_close(hessian(function)(y), expected)
    torch.testing.assert_close(jacrev(jacrev(function))(y), expected)


def test_compiles_whole_under_a_transform():
    context = make("nmf", training=False)
    torch.compiler.reset()
    x = torch.rand(2, 1, 6, 4, 5)
    each = vmap(grad(lambda x: context(x).sin().sum()))
    compiled = torch.compile(each, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), each(x))


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_an_explicit_choice_is_refused_under_a_transform(backend):
    tensors = [t.float() for t in factors()]
    message = f"backend '{backend}' cannot run this call: "
    with mfops.use_backend(backend), pytest.raises(RuntimeError, match=message):
        vmap(mfops.factorized_mse, (0, None, 0))(*tensors)


def test_kernels_give_way_to_the_reference_under_a_transform():
    """In float32, where there are kernels."""
    x, y, z = (t.float() for t in factors())
    found = vmap(grad(mfops.factorized_mse), (0, None, 0))(x, y, z)
    assert found.dtype == torch.float32
    exact = vmap(grad(mfops.factorized_mse), (0, None, 0))(*factors())
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)


class Network(nn.Module):
    def __init__(self, factorizer: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.context = make(factorizer)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.context(self.stem(x)))


@every_factorizer
def test_fx_traces_a_context_as_one_node(factorizer):
    network = Network(factorizer)
    traced = torch.fx.symbolic_trace(network)
    traced.graph.lint()
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == [
        "stem",
        "context",
        "head",
    ]
    x = torch.randn(2, 3, 4, 5)
    for training in (True, False):  # the mode is not baked into the graph
        grads = []
        for module in (network.train(training), copy.deepcopy(traced).train(training)):
            module.zero_grad()
            torch.manual_seed(1)
            module(x).sin().sum().backward()
            grads.append({name: p.grad for name, p in module.named_parameters()})
        torch.testing.assert_close(grads[0], grads[1])


def test_fx_keeps_a_returned_loss():
    class Losses(Network):
        def forward(self, x: Tensor) -> Tensor:
            out, mse = self.context(self.stem(x), return_loss=True)
            return self.head(out).sum() + mse

    network = Losses("learned")
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), network(x))


@every_factorizer
def test_fx_traces_each_call_of_a_factorizer(factorizer):
    class Calls(Network):
        def forward(self, x: Tensor) -> Tensor:
            y, z = self.context.factorizer(x)
            x_hat, mse = self.context.factorizer.reconstruct(x)
            return (y @ z).sum() + x_hat.sum() + mse + self.context.factorizer.product(x).sum()

    network = Calls(factorizer).eval()
    x = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), network(x))


def test_fx_feature_extractor():
    network = Network("em").eval()
    x = torch.randn(2, 3, 4, 5)
    found = create_feature_extractor(network, ["context"])(x)
    torch.testing.assert_close(found["context"], network.context(network.stem(x)))


def test_fx_does_not_trace_a_context_by_itself():
    with pytest.raises(TypeError, match=r"torch.fx traces .* inside of a network") as caught:
        torch.fx.symbolic_trace(make("learned"))
    assert "\n" not in str(caught.value)


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.y = nn.Parameter(torch.randn(6, 3))
        self.z = nn.Parameter(torch.randn(3, 20))
        self.x = nn.Parameter(torch.randn(2, 6, 20))

    def forward(self, x: Tensor) -> Tensor:
        x_hat, mse = mfops.factorized_reconstruction(x, self.y, self.z)
        y, z = mfops.factorize(x, self.y, method="em", steps=2)
        again, _, _ = mfops.factorize_reconstruct(x, self.y, "em", 2)
        of_others = mfops.factorized_mse(self.x, y, z)  # of a constant by factors of what is traced
        return x_hat.sum() + mse + mfops.factorized_mse(x, y, z) + again.sum() + of_others


def test_fx_traces_functions_as_one_node_each():
    network = Functions()
    traced = torch.fx.symbolic_trace(network)
    x = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(traced(x), network(x))
    called = {n.target for n in traced.graph.nodes if n.op == "call_function"}
    assert called >= {
        mfops.factorized_reconstruction,
        mfops.factorized_mse,
        mfops.factorize,
        mfops.factorize_reconstruct,
    }
