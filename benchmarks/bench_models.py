"""What does each network cost, whole?

    python -m pytest benchmarks/bench_models.py [-k inference]

Every network of mfnet.create_model, and those of segmentation_models_pytorch on the same backbone.
Inference is latency; training is forward, cross entropy and backward of a batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfnet
from benchmarks.harness import Turn, first_line, take_turns, times
from benchmarks.machine import network_dtype
from benchmarks.measure import Bench, Contender, Measured, contend, count_flops, pairs, playback
from benchmarks.networks import SMP
from benchmarks.questions import MODELS
from benchmarks.rows import Question

INFERENCE, TRAINING = PASSES = ("inference", "training")
# At least two images to train on: the networks of smp normalise one value per image.
BATCHES = {
    "cuda": {INFERENCE: (1, 16), TRAINING: (16,)},
    "cpu": {INFERENCE: (1,), TRAINING: (2,)},
}
SMP_NETWORKS = ("DeepLabV3Plus", "PSPNet", "FPN", "Unet", "UPerNet")
NUM_CLASSES = 21


@dataclass(frozen=True)
class Figure:
    backbone: str
    side: int
    batch: int
    dtype: str
    which: str

    def __str__(self) -> str:
        return (
            f"{self.backbone}, {self.side}x{self.side}, batch {self.batch}, {self.dtype}: "
            f"{self.which}"
        )

    def columns(self) -> dict[str, Any]:
        return {
            "backbone": self.backbone,
            "size": f"{self.side}x{self.side}",
            "batch": self.batch,
            "dtype": self.dtype,
            "pass": self.which,
        }


def figures(device: str, small: bool) -> list[Figure]:
    backbone, side = ("resnet18", 65) if small else ("resnet50", 513)
    dtype = network_dtype(device)
    return [
        Figure(backbone, side, batch, dtype, which)
        for which in PASSES
        for batch in BATCHES[device][which]
    ]


def builders(backbone: str) -> dict[str, Callable[[], nn.Module]]:
    """The rivals by name."""

    def smp(name: str) -> Callable[[], nn.Module]:
        return lambda: getattr(importlib.import_module(SMP), name)(
            encoder_name=backbone, encoder_weights=None, classes=NUM_CLASSES
        )

    def own(name: str) -> Callable[[], nn.Module]:
        return lambda: mfnet.create_model(name, num_classes=NUM_CLASSES, backbone=backbone)

    return {name: own(name) for name in mfnet.list_models()} | {
        f"smp {name}": smp(name) for name in SMP_NETWORKS
    }


def names(figure: Figure) -> list[str]:
    return list(builders(figure.backbone))


def input_side(network: nn.Module, side: int) -> int:
    """One pixel less for networks of smp that want a multiple of their stride."""
    check = getattr(network, "check_input_shape", None)
    try:
        if check is not None:
            check(torch.empty(1, 3, side, side, device="meta"))
    except RuntimeError:
        return side - 1
    return side


def turn_of(network: nn.Module, which: str, bench: Bench) -> Callable[..., Turn]:
    """Makes the turn of one pass of a network on images, for `contend`."""

    def make(call: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> Turn:
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
        return Turn(pick, infer if which == INFERENCE else train)

    return make


def compare(
    question: Question,
    columns: dict[str, Any],
    build: dict[str, Callable[[], nn.Module]],
    images: Callable[[nn.Module], list[Tensor]],
    which: str,
    bench: Bench,
    compile_too: bool = True,
) -> Measured:
    """The rows of a figure whose rivals are networks, each on the images that it takes."""
    torch.manual_seed(0)
    torch.compiler.reset()
    compile_too = compile_too and not bench.small and (bench.machine.cuda or which == INFERENCE)
    contenders: dict[str, Contender] = {}
    inputs: dict[str, list[Tensor]] = {}
    rows: list[dict[str, Any]] = []
    for name, builder in build.items():
        try:
            network = builder().to(bench.machine.device)
            inputs[name] = images(network)
            make = turn_of(network, which, bench)
            contenders[name] = contend(network, inputs[name], make, bench, compile_too)
        except ModuleNotFoundError as error:
            rows.append({**columns, "rival": name, "skipped": f"{error.name} not installed"})
        except Exception as error:  # one that breaks must not take the others with it
            why = f"failed: {first_line(error)}"
            rows.append({**columns, "rival": name, "skipped": why})

    clock = bench.machine.clock()
    turns = {name: contender.turn for name, contender in contenders.items()}
    seconds = take_turns(turns, clock, bench.effort) if turns else {}
    for name, contender in contenders.items():
        row = {
            **columns,
            "rival": name,
            "setting": contender.setting,
            **times(seconds, name, question.bases),
            "late": clock.late,
            **contender.counted(bench),
        }
        batch = inputs[name][0]
        row["input"] = f"{batch.shape[-2]}x{batch.shape[-1]}"
        row["images_per_s"] = len(batch) / row["median_s"]
        plain = turn_of(contender.network, INFERENCE, bench)(contender.network, [batch[:1]])
        row["flops"] = count_flops(lambda plain=plain: plain.run(plain.prepare(0)))
        rows.append(row)
    return Measured(rows, seconds)


def images_of(figure: Figure, bench: Bench) -> Callable[[nn.Module], list[Tensor]]:
    """Makes the images of a figure that a network takes, for `compare`."""

    def images(network: nn.Module) -> list[Tensor]:
        side = input_side(network, figure.side)
        x = torch.randn((figure.batch, 3, side, side), device=bench.machine.device)
        rotated = 2 if bench.small else bench.machine.sets(x.nbytes)
        return [x, *(torch.randn_like(x) for _ in range(1, rotated))]

    return images


def measure(figure: Figure, bench: Bench) -> Measured:
    build, images = builders(figure.backbone), images_of(figure, bench)
    return compare(MODELS, figure.columns(), build, images, figure.which, bench)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    cases = pairs(figures(options.device, options.small), names)
    metafunc.parametrize(("figure", "rival"), cases, ids=str)


@pytest.mark.benchmark(**playback)
def test_model(figure: Figure, rival: str, play: Any) -> None:
    play(MODELS, figure, rival, measure)
