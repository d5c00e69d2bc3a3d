"""Figures of contexts and whole networks: everybody takes part, in the best setting, counted."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mfnet
from benchmarks import bench_backends, bench_contexts, bench_models, measure, networks
from benchmarks.schema import CONTEXTS as BENCHMARK
from benchmarks.schema import MFOPS, MODELS, REFERENCE
from mfnet.contexts import CONTEXTS
from mfnet.flops import call_flops
from mfops import backends

SMALL = bench_contexts.cases("cpu", small=True)


def by_baseline(measured):
    return {row["baseline"]: row for row in measured.rows}


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_new_context_takes_part_by_itself(bench, monkeypatch, case):
    def widest(in_channels, out_channels):
        return nn.Conv2d(in_channels, out_channels, 5, padding=2)

    monkeypatch.setitem(CONTEXTS, "widest", widest)
    measured = bench_contexts.measure(case, bench)
    rows = by_baseline(measured)
    assert set(rows) == set(CONTEXTS) == set(measured.seconds)
    assert rows["widest"]["parameters"] == 25 * 16 * 8 + 8
    assert rows["mf"]["parameters"] == 16 * 17 + 64 * (16 + case.side**2) + 16 * 8 + 2 * 8
    assert rows["widest"]["flops"] == 2 * 25 * 16 * 8 * 5 * 5
    for row in rows.values():
        assert row["setting"] in ("contiguous", "channels_last")
        assert row["flops"] > 0
        assert row.keys() <= set(BENCHMARK.columns)
    assert rows["aspp"]["over_aspp"] == rows["em"]["over_em"] == 1


def test_forward_and_backward_reach_features_and_parameters(bench):
    module = CONTEXTS["mf"](16, 8, rank=4, context_size=(5, 5))
    x = torch.randn(1, 16, 5, 5)
    call = bench_contexts.call_of(module, bench_contexts.BOTH, bench)(module, [x])
    features = call.prepare(0)
    call.run(features)
    assert module.training
    assert features.grad is not None
    assert all(p.grad is not None for p in module.parameters())
    call.prepare(1)
    assert all(p.grad is None for p in module.parameters())  # no call finds the last one's

    forward = bench_contexts.call_of(module, bench_contexts.FORWARD, bench)(module, [x])
    assert not forward.run(forward.prepare(0)).requires_grad
    assert not module.training


def test_the_papers_place():
    cases = bench_contexts.cases("cpu", small=False)
    assert {(f.in_channels, f.out_channels, f.side) for f in cases} == {
        (2048, 256, 33),
        (2048, 256, 65),
    }


def test_flops_of_the_papers_context_by_hand(bench):
    with FakeTensorMode():
        module = CONTEXTS["mf"](2048, 256).eval()
        x = torch.empty(1, 2048, 33, 33)
        counted = call_flops(lambda: module(x))
    assert counted == 2 * 33 * 33 * (2048 * 2048 + 2048 * 64 + 2048 * 256)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "convolutions", "products", "of_bases"),
    [  # 1x1 convolutions; products with X; those that K x K matrices come from and go into
        ("em", 2, 3 * 2 + 1, 0),
        ("nmf", 3, 1 + 7 * 2 + 2, 7 * 2 + 1),
    ],
)
def test_flops_of_the_contexts_that_find_their_factors(name, convolutions, products, of_bases):
    with FakeTensorMode(), torch.no_grad():
        module = CONTEXTS[name](2048, 256).eval()
        x = torch.empty(1, 2048, 33, 33)
        counted = call_flops(lambda: module(x))
    n, c, k = 33 * 33, 512, 64
    around = 9 * 2048 * c + convolutions * c * c + 9 * c * 256
    assert counted == 2 * (n * around + products * c * k * n + of_bases * k * k * (c + n))


@pytest.mark.parametrize(
    ("name", "side", "gflops"),
    [
        ("mfnet", 513, 122.26),
        ("deeplabv3plus", 513, 144.39),
        ("emanet", 513, 92.95),
        ("smp DeepLabV3Plus", 512, 73.3),
    ],
)
def test_flops_of_the_networks_agree_with_the_hand_counts(name, side, gflops):
    with torch.device("meta"):
        network = bench_models.builders("resnet50")[name]().eval()
        assert bench_models.input_side(network, 513) == side
        x = torch.empty(1, 3, side, side)
        counted = call_flops(lambda: network(x))
    assert counted / 1e9 == pytest.approx(gflops, abs=0.006 if side == 513 else 0.06)


def test_every_network_takes_part():
    names = bench_models.baselines(bench_models.cases("cpu", small=False)[0], "cpu")
    assert list(names) == [
        *mfnet.list_models(),
        *(f"smp {name}" for name in ("DeepLabV3Plus", "PSPNet", "FPN", "Unet", "UPerNet")),
    ]


def test_a_missing_library_is_named_and_a_broken_network_takes_none_with_it(bench, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    real = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda n: missing(n) if n == networks.SMP else real(n)
    )

    def broken(name, *arguments):
        if name == "emanet":
            raise RuntimeError("out of luck\nmore")
        return real("mfnet.models").create_model(name, *arguments)

    monkeypatch.setattr(mfnet, "create_model", broken)
    case = bench_models.cases("cpu", small=True)[0]
    measured = bench_models.measure(case, bench)
    rows = by_baseline(measured)
    assert rows["smp Unet"]["skipped"] == "segmentation_models_pytorch not installed"
    assert rows["emanet"]["skipped"] == "failed: RuntimeError: out of luck"
    assert set(measured.seconds) == {"mfnet_light", "mfnet", "deeplabv3plus"}
    assert rows["mfnet"]["input"] == "33x33"
    assert rows["mfnet"]["images_per_s"] == pytest.approx(1 / rows["mfnet"]["median_s"])
    assert rows["mfnet"].keys() <= set(MODELS.columns)


def test_training_is_a_whole_step_of_the_network(bench):
    network = mfnet.create_model("mfnet", num_classes=21, backbone="resnet18")
    call = bench_models.call_of(network, bench_models.TRAINING, bench)(
        network, [torch.randn(2, 3, 65, 65)]
    )
    call.run(call.prepare(0))
    assert network.training
    assert all(p.grad is not None for p in network.parameters())


def test_the_fastest_setting_is_chosen_and_named(bench, monkeypatch):
    tried = []

    def first(candidates, clock):
        for name, make in candidates.items():
            make()()
            tried.append(name)
        return "channels_last", {"channels_last, compile": "RuntimeError: no compiler"}

    monkeypatch.setattr(measure, "fastest", first)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    network = nn.Conv2d(3, 4, 3)
    make = bench_models.call_of(network, bench_models.INFERENCE, bench)
    contender = measure.contend(network, [torch.randn(1, 3, 9, 9)], make, bench)
    assert tried == ["contiguous", "channels_last", "channels_last, compile"]
    assert contender.setting == (
        "channels_last; channels_last, compile failed: RuntimeError: no compiler"
    )
    assert network.weight.is_contiguous(memory_format=torch.channels_last)
    assert contender.call.prepare(0).is_contiguous(memory_format=torch.channels_last)


def test_a_network_runs_on_the_backend_it_is_named_for(monkeypatch):
    monkeypatch.setattr(backends, "_explicit", None)

    class Network(nn.Module):
        def forward(self, x):
            return backends.select(x, 4, "nmf").name, (x @ x).dtype

    x = torch.ones(4, 4)
    reference = bench_backends.OnBackend(Network(), REFERENCE)
    assert reference(x) == ("reference", torch.bfloat16)
    chosen = bench_backends.OnBackend(Network(), MFOPS)
    assert chosen(x) == (backends.select(x, 4, "nmf").name, torch.bfloat16)
