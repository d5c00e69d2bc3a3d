"""What does each context module cost in the place that it has in a network?

    python -m pytest benchmarks/bench_contexts.py [-k 33x33]

Every module of mfnet.contexts takes part. 33 x 33 are the features of a 513 x 513 image at output
stride 16, 65 x 65 those at output stride 8. Forward and backward together are a training step's
share: the module in training mode, gradients of parameters and features, a context's own loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.bench_models import compare
from benchmarks.harness import Call
from benchmarks.kernels import BOTH, FORWARD
from benchmarks.machine import network_dtype
from benchmarks.measure import Bench, Case, Measured, playback
from benchmarks.schema import CONTEXTS as BENCHMARK
from mfnet.contexts import CONTEXTS

PASSES = (FORWARD, BOTH)
SIDES = (33, 65)
CHANNELS = (2048, 256)
BATCHES = {"cuda": (1, 16), "cpu": (1,)}


@dataclass(frozen=True)
class ContextCase(Case):
    in_channels: int
    out_channels: int
    size: str
    batch: int
    dtype: str
    which: str

    @property
    def side(self) -> int:
        return int(self.size.split("x")[0])


def cases(device: str, small: bool) -> list[ContextCase]:
    channels, sides = ((16, 8), (5,)) if small else (CHANNELS, SIDES)
    dtype = network_dtype(device)
    return [
        ContextCase(*channels, f"{side}x{side}", batch, dtype, which)
        for side in sides
        for batch in BATCHES[device]
        for which in PASSES
    ]


def call_of(network: nn.Module, which: str, bench: Bench) -> Callable[..., Call]:
    """Makes the call of one pass of a network on features, for `contend`."""

    def make(call: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> Call:
        if which == FORWARD:

            def forward(x: Tensor) -> Tensor:
                with torch.no_grad(), bench.machine.autocast():
                    return call(x)

            network.eval()
            return Call(lambda number: inputs[number % len(inputs)], forward)

        with torch.no_grad(), bench.machine.autocast():
            upstream = torch.randn_like(network(inputs[0]))

        def clean(number: int) -> Tensor:
            network.zero_grad(set_to_none=True)
            return inputs[number % len(inputs)].detach().requires_grad_()

        def both(x: Tensor) -> Tensor:
            with bench.machine.autocast():
                out = call(x)
            out.backward(upstream)
            return out

        network.train()
        return Call(clean, both)

    return make


def measure(case: ContextCase, bench: Bench) -> Measured:
    def build(name: str) -> nn.Module:
        # Learned coefficients of the features' own grid: no pass has to resample them.
        grid = {"context_size": (case.side, case.side)}
        options = grid if "context_size" in signature(CONTEXTS[name]).parameters else {}
        return CONTEXTS[name](case.in_channels, case.out_channels, **options)

    def features(_: nn.Module) -> list[Tensor]:
        shape = (case.batch, case.in_channels, case.side, case.side)
        x = torch.randn(shape, device=bench.machine.device)
        return [x, *(torch.randn_like(x) for _ in range(1, bench.machine.sets(x.nbytes)))]

    builders = {name: partial(build, name) for name in CONTEXTS}
    return compare(
        BENCHMARK, case.columns(), builders, features, case.which, bench, call_of=call_of
    )


def baselines(case: ContextCase, device: str) -> Iterable[str]:
    return CONTEXTS


@pytest.mark.benchmark(**playback)
def test_context(case: ContextCase, baseline: str, play: Any) -> None:
    play(BENCHMARK, case, baseline, measure)
