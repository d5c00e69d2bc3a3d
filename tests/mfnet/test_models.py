from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import mfnet
from mfnet import SegmentationNetwork, create_model
from mfnet.contexts import CONTEXTS
from mfnet.flops import count_flops

MODELS = mfnet.list_models()


def small(name: str, **kwargs: object) -> SegmentationNetwork:
    return create_model(name, num_classes=3, backbone="test_resnet", **kwargs)


@pytest.mark.parametrize(
    ("name", "parameters", "gflops"),
    [
        ("mfnet", 29_738_997, 122.26),
        ("deeplabv3plus", 40_352_181, 144.39),
        ("emanet", 34_657_621, 92.95),
    ],
)
def test_the_papers_table(name: str, parameters: int, gflops: float) -> None:
    with FakeTensorMode():
        model = create_model(name).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            logits = model(torch.empty(1, 3, 513, 513))
    assert logits.shape == (1, 21, 513, 513)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, abs=0.005)


LABELS = {
    "mf": "MF",
    "em": "EM",
    "nmf": "NMF (Hamburger)",
    "vq": "VQ",
    "cd": "CD",
    "double_attention": "Double attention",
    "aspp": "ASPP",
    "aspp_separable": "ASPP, separable",
    "ppm": "PPM",
    "encoding": "Encoding",
    "nonlocal": "non-local",
    "none": "none",
}


@pytest.mark.parametrize("context", LABELS)
def test_the_table_of_contexts_in_networks(context: str) -> None:
    """Of docs/paper.md: GFLOPs of one 513 x 513 image."""
    page = (Path(__file__).parents[2] / "docs" / "paper.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {LABELS[context]} |")]
    for network, printed in zip(("deeplabv3plus", "emanet"), row.split("|")[2:4], strict=True):
        with torch.device("meta"):
            model = create_model(network, context=context)
        assert f"{count_flops(model, (513, 513)) / 1e9:.2f}" == printed.strip()


def test_an_unknown_factorizer() -> None:
    with pytest.raises(ValueError, match="factorizer: expected one of learned, double_attention"):
        small("mfnet", factorizer="svd")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_logits_have_the_images_size(name: str, training: bool) -> None:
    model = small(name).train(training)
    with torch.no_grad():
        for height, width in ((33, 33), (34, 71), (65, 48), (90, 37)):
            assert model(torch.randn(2, 3, height, width)).shape == (2, 3, height, width)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_training_step_reaches_every_trainable_parameter(name: str, batch: int) -> None:
    model = small(name).train()
    logits = model(torch.randn(batch, 3, 33, 33))
    logits.square().mean().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", MODELS)
def test_trains_under_autocast(name: str) -> None:
    model = small(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(torch.randn(2, 3, 33, 33), return_loss=True)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    (logits.float().square().mean() + loss).backward()
    assert all(p.grad.isfinite().all() for p in model.head_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_return_loss(name: str) -> None:
    model = small(name).eval()
    x = torch.randn(2, 3, 49, 65)
    logits, loss = model(x, return_loss=True)
    torch.testing.assert_close(logits, model(x))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert (loss > 0) == (name == "mfnet")


@pytest.mark.parametrize("name", MODELS)
def test_parameter_groups(name: str) -> None:
    model = small(name)
    backbone = {id(p) for p in model.backbone_parameters()}
    head = {id(p) for p in model.head_parameters()}
    assert backbone
    assert head
    assert not backbone & head
    assert backbone | head == {id(p) for p in model.parameters() if p.requires_grad}
    assert backbone == {id(p) for p in model.backbone.parameters()}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", ["deeplabv3plus", "emanet"])  # mfnet: deeplabv3plus, see below
def test_any_context_in_any_network(name: str, context: str) -> None:
    model = small(name, context=context).train()
    masks = torch.randint(3, (2, 33, 33))
    logits, loss = model(torch.randn(2, 3, 33, 33), return_loss=True, masks=masks)
    (logits.square().mean() + loss).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_mfnet_is_deeplabv3plus_with_its_context() -> None:
    mfnet_itself = small("mfnet", rank=4)
    same = small("deeplabv3plus", context="mf", rank=4)
    same.load_state_dict(mfnet_itself.state_dict())
    x = torch.randn(1, 3, 65, 65)
    torch.testing.assert_close(same.eval()(x), mfnet_itself.eval()(x))


def test_heads_start_kaiming_and_factors_standard_normal() -> None:
    model = create_model("mfnet", backbone="resnet18")
    weight = model.context.lower.weight
    assert weight.std().item() == pytest.approx((2 / weight.shape[1]) ** 0.5, rel=0.02)
    assert not model.context.lower.bias.any()
    factors = model.context.factorized.factorizer
    for factor in (factors.y, factors.z):
        assert factor.std().item() == pytest.approx(1, abs=0.02)
        assert factor.mean().item() == pytest.approx(0, abs=0.02)


def test_the_start_of_learned_factors_is_passed_over_by_the_others() -> None:
    for name, options in (
        ("mfnet", {"factorizer": "em"}),
        ("deeplabv3plus", {}),
        ("emanet", {"context": "nmf"}),
    ):
        small(name, init="uniform", **options)
    factors = small("mfnet", init="uniform").context.factorized.factorizer
    assert factors.y.abs().max() <= (96 * 64) ** -0.5
    with pytest.raises(ValueError, match="init: expected normal or uniform, got 'zeros'"):
        small("mfnet", init="zeros")


def test_mfnet_options() -> None:
    model = small("mfnet", rank=5, context_size=(4, 6), loss_weight=0.2)
    factorized = model.context.factorized
    assert factorized.factorizer.y.shape == (96, 5)
    assert factorized.factorizer.z.shape == (5, 24)
    assert factorized.loss_weight == 0.2


@pytest.mark.parametrize("name", MODELS)
def test_compiles_without_graph_breaks(name: str) -> None:
    model = small(name).train()
    logits = torch.compile(model, fullgraph=True, backend="eager")(torch.randn(2, 3, 33, 33))
    logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 65, 65), ValueError, r"expected images \(B, 3, H, W\), got shape \(3, 65"),
        (torch.zeros(1, 4, 65, 65), ValueError, r"\(B, 3, H, W\), got shape \(1, 4, 65, 65\)"),
        (torch.zeros(1, 3, 65, 32), ValueError, "at least 33 x 33, got 65 x 32"),
        (torch.zeros(1, 3, 65, 65, dtype=torch.uint8), TypeError, "floating-point.*uint8"),
    ],
)
def test_bad_images(x: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small("mfnet")(x)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("unet", {}, ValueError, "unknown model 'unet': choose from mfnet_light, mfnet, "),
        (
            "mfnet",
            {"rnk": 3},
            TypeError,
            "'rnk' for model 'mfnet' .*num_cl.*size, rank, loss_w",
        ),
        ("deeplabv3plus", {"rank": 3}, TypeError, "context 'aspp': .*context_size, rates$"),
        ("mfnet", {"context": "em", "rank": 3}, TypeError, "context 'em': .*, bases, steps$"),
        ("mfnet", {"context": "encoding", "k": 3}, TypeError, "from num_c.*_size, codewords$"),
        ("mfnet", {"context": "ppm", "bins": 3}, TypeError, "'ppm': .*context, context_size$"),
        ("mfnet", {"context": "pyramid"}, ValueError, "unknown context 'pyramid': .*mf, em, nmf"),
        ("emanet", {"rank": 3}, TypeError, "choose from .*, bases, steps$"),
        ("emanet", {"num_classes": 0}, ValueError, "num_classes: expected at least 1, got 0"),
        ("emanet", {"factorizer": "em"}, TypeError, "only context 'mf' takes one, this is 'em'"),
        ("emanet", {"bases": 2.5}, ValueError, r"bases: expected a positive integer, got 2\.5"),
        ("mfnet", {"context": "nmf", "rank": "3"}, ValueError, "rank: expected .*, got '3'"),
        ("mfnet", {"context": "cd", "steps": 2.5}, TypeError, "steps: expected an integer"),
        ("mfnet_light", {"context": "em"}, TypeError, "context: model 'mfnet_light' takes none"),
        ("mfnet_light", {"factorizer": "em"}, TypeError, "factorizer: model 'mfnet_light' takes"),
        ("mfnet_light", {"multi_grid": (1, 2)}, TypeError, "multi_grid: model 'mfnet_light' takes"),
        ("mfnet_light", {"steps": 3}, TypeError, "'steps' for model 'mfnet_light': .*rank, width$"),
        ("mfnet_light", {"rank": 0}, ValueError, "rank: expected a positive integer, got 0"),
        ("mfnet_light", {"width": 2.5}, ValueError, r"width: expected a positive .*, got 2\.5"),
        ("mfnet", {"backbone": "resnet19"}, ValueError, "unknown backbone 'resnet19'"),
        ("mfnet", {"backbone": "resnet18", "rank": 0}, ValueError, "rank: .*got 0"),
        ("mfnet", {"backbone_weights": "no.pth"}, FileNotFoundError, "no file at 'no.pth'"),
    ],
)
def test_bad_arguments(
    name: str, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        create_model(name, **options)
    assert "\n" not in str(caught.value)
