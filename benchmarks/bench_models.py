"""What does each network cost, whole?

    python -m pytest benchmarks/bench_models.py [-k inference]

Every network of mfnet.create_model, and those of segmentation_models_pytorch on the same backbone.
Inference is latency; training is forward, cross entropy and backward of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfnet
from benchmarks.harness import Call, why_not
from benchmarks.machine import network_dtype
from benchmarks.measure import (
    Bench,
    Case,
    Contender,
    Measured,
    contend,
    playback,
    time_calls,
)
from benchmarks.networks import smp
from benchmarks.schema import MODELS, Benchmark
from mfnet.flops import call_flops

INFERENCE, TRAINING = PASSES = ("inference", "training")
# At least two images to train on: the networks of smp normalize one value per image.
BATCHES = {
    "cuda": {INFERENCE: (1, 16), TRAINING: (16,)},
    "cpu": {INFERENCE: (1,), TRAINING: (2,)},
}
SMP_NETWORKS = ("DeepLabV3Plus", "PSPNet", "FPN", "Unet", "UPerNet")
NUM_CLASSES = 21


@dataclass(frozen=True)
class NetworkCase(Case):
    backbone: str
    size: str
    batch: int
    dtype: str
    which: str

    @property
    def side(self) -> int:
        return int(self.size.split("x")[0])


def cases(device: str, small: bool) -> list[NetworkCase]:
    backbone, side = ("test_resnet", 33) if small else ("resnet50", 513)
    dtype = network_dtype(device)
    return [
        NetworkCase(backbone, f"{side}x{side}", batch, dtype, which)
        for which in PASSES
        for batch in BATCHES[device][which]
    ]


def builders(backbone: str) -> dict[str, Callable[[], nn.Module]]:
    """The baselines by name."""
    build: dict[str, Callable[[], nn.Module]] = {
        name: partial(mfnet.create_model, name, NUM_CLASSES, backbone)
        for name in mfnet.list_models()
    }
    for name in SMP_NETWORKS:
        build[f"smp {name}"] = lambda name=name: smp(name, NUM_CLASSES, backbone).network
    return build


def baselines(case: NetworkCase, device: str) -> Iterable[str]:
    return builders(case.backbone)


def input_side(network: nn.Module, side: int) -> int:
    """One pixel less for networks of smp that want a multiple of their stride."""
    check = getattr(network, "check_input_shape", None)
    try:
        if check is not None:
            check(torch.empty(1, 3, side, side, device="meta"))
    except RuntimeError:
        return side - 1
    return side


def call_of(network: nn.Module, which: str, bench: Bench) -> Callable[..., Call]:
    """Makes the call of one pass of a network on images, for `contend`."""

    def make(call: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> Call:
        def pick(number: int) -> Tensor:
            network.zero_grad(set_to_none=True)
            return inputs[number % len(inputs)]

        def infer(x: Tensor) -> Tensor:
            with torch.no_grad(), bench.machine.autocast():
                return call(x)

        def train(x: Tensor) -> Tensor:
            with bench.machine.autocast():
                logits = call(x)
            loss = F.cross_entropy(logits.float(), masks)
            loss.backward()
            return loss.detach()

        network.train(which == TRAINING)
        shape = (inputs[0].shape[0], *inputs[0].shape[-2:])
        masks = torch.randint(0, NUM_CLASSES, shape, device=inputs[0].device)
        return Call(pick, infer if which == INFERENCE else train)

    return make


def compare(
    benchmark: Benchmark,
    columns: dict[str, Any],
    build: dict[str, Callable[[], nn.Module]],
    images: Callable[[nn.Module], list[Tensor]],
    which: str,
    bench: Bench,
    compile_too: bool = True,
    call_of: Callable[..., Callable[..., Call]] = call_of,
) -> Measured:
    """The rows of a case whose baselines are networks, each on the inputs that it takes."""
    torch.manual_seed(0)
    torch.compiler.reset()
    contenders: dict[str, Contender] = {}
    inputs: dict[str, list[Tensor]] = {}
    rows: list[dict[str, Any]] = []
    for name, builder in build.items():
        try:
            network = builder().to(bench.machine.device)
            inputs[name] = images(network)
            make = call_of(network, which, bench)
            contenders[name] = contend(
                network, inputs[name], make, bench, compile_too and not bench.small
            )
        except Exception as error:  # one that breaks must not take the others with it
            rows.append({**columns, "baseline": name, "skipped": why_not(error)})

    calls = {name: contender.call for name, contender in contenders.items()}
    found = time_calls(benchmark, columns, calls, bench)
    for row in found.rows:
        contender, batch = contenders[row["baseline"]], inputs[row["baseline"]][0]
        row |= {"setting": contender.setting, **contender.counted(bench)}
        if "input" in benchmark.columns:
            row["input"] = f"{batch.shape[-2]}x{batch.shape[-1]}"
            row["images_per_s"] = len(batch) / row["median_s"]
        with torch.no_grad(), bench.machine.autocast():
            row["flops"] = call_flops(partial(contender.network.eval(), batch[:1]))
    return Measured([*rows, *found.rows], found.seconds)


def images_of(case: NetworkCase, bench: Bench) -> Callable[[nn.Module], list[Tensor]]:
    """Makes the images of a case that a network takes, for `compare`."""

    def images(network: nn.Module) -> list[Tensor]:
        side = input_side(network, case.side)
        x = torch.randn((case.batch, 3, side, side), device=bench.machine.device)
        return [x, *(torch.randn_like(x) for _ in range(1, bench.machine.sets(x.nbytes)))]

    return images


def measure(case: NetworkCase, bench: Bench) -> Measured:
    build, images = builders(case.backbone), images_of(case, bench)
    compile_too = bench.machine.cuda or case.which == INFERENCE
    return compare(MODELS, case.columns(), build, images, case.which, bench, compile_too)


@pytest.mark.benchmark(**playback)
def test_model(case: NetworkCase, baseline: str, play: Any) -> None:
    play(MODELS, case, baseline, measure)
