"""Do gather and distribute have to be kernels? Beside scaled_dot_product_attention, which is one.

    python -m pytest benchmarks/bench_attention.py [-k "gather and forward"]

Shapes are MFNet Light's with 32 bases: they are gathered from the pixels of stride 8 and dealt out
to those of stride 4. An attention wants channels innermost, so it is also measured on channels_last
features, which it takes as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mfops
from benchmarks.harness import Call
from benchmarks.kernels import BOTH, DTYPES, FORWARD, LAYOUTS
from benchmarks.measure import Bench, Case, Measured, playback, time_calls
from benchmarks.schema import ATTENTION, MFOPS, SDPA, SDPA_CHANNEL

WIDTH, RANK, CLASSES = 256, 32, 21
CASES = {  # operation: (batch, pixels); images of 320 x 320 and 512 x 512
    "gather": ((1, 40 * 40), (8, 40 * 40), (8, 64 * 64)),
    "distribute": ((1, 80 * 80), (8, 80 * 80), (8, 128 * 128)),
}
SMALL = {"gather": ((2, 20),), "distribute": ((2, 20),)}


@dataclass(frozen=True)
class AttentionCase(Case):
    operation: str
    shape: str
    dtype: str
    layout: str
    which: str

    @property
    def batch(self) -> int:
        return int(self.shape.split()[0])

    @property
    def pixels(self) -> int:
        return int(self.shape.split()[-1])


def cases(device: str, small: bool) -> list[AttentionCase]:
    return [
        AttentionCase(operation, f"{batch} {WIDTH} {RANK} {pixels}", dtype, layout, which)
        for operation, sizes in (SMALL if small else CASES).items()
        for batch, pixels in sizes
        for dtype in DTYPES
        for layout in LAYOUTS
        for which in (FORWARD, BOTH)
    ]


def gather_by_attention(x: Tensor, queries: Tensor) -> Tensor:
    rows = x.mT[:, None]
    shared = queries.expand(len(x), -1, -1)[:, None]
    return F.scaled_dot_product_attention(shared, rows, rows, scale=1.0)[:, 0].mT


def distribute_by_attention(y: Tensor, keys: Tensor, bias: Tensor, guide: Tensor) -> Tensor:
    """The bias is a mask, the same for every pixel."""
    shared = keys.expand(len(y), -1, -1)[:, None]
    mask = bias.expand(len(y), 1, guide.shape[2], -1)
    rows, columns = guide.mT[:, None], y.mT[:, None]
    out = F.scaled_dot_product_attention(rows, shared, columns, attn_mask=mask, scale=1.0)
    return out[:, 0].mT


def distribute_with_channel(y: Tensor, keys: Tensor, bias: Tensor, guide: Tensor) -> Tensor:
    """The bias is the key of eight more channels, one of them 1: fused kernels take no mask that
    wants a gradient, and want multiples of eight; values are padded to the keys' channels."""
    channels = guide.shape[1] + 8
    rows = F.pad(guide.mT, (0, 8))
    rows[..., -8] = 1
    shared = torch.cat([keys, bias[:, None], keys.new_zeros(len(keys), 7)], 1)
    columns = F.pad(y.mT, (0, channels - y.shape[1]))[:, None]
    out = F.scaled_dot_product_attention(
        rows[:, None], shared.expand(len(y), -1, -1)[:, None], columns, scale=1.0
    )
    return out[:, 0, :, : y.shape[1]].mT


BASELINES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "gather": {MFOPS: mfops.gather, SDPA: gather_by_attention},
    "distribute": {
        MFOPS: mfops.distribute,
        SDPA: distribute_by_attention,
        SDPA_CHANNEL: distribute_with_channel,
    },
}


def make_inputs(case: AttentionCase, device: str) -> tuple[Tensor, ...]:
    """Those of one call: features of variance 1, scores too."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device, dtype=getattr(torch, case.dtype)) * scale

    features = random(case.batch, WIDTH, case.pixels)
    if case.layout == "channels_last":
        features = features.mT.contiguous().mT
    rows = random(RANK, WIDTH, scale=WIDTH**-0.5)
    if case.operation == "gather":
        return features, rows
    return random(case.batch, CLASSES, RANK), rows, random(RANK), features


def call_of(call: Callable[..., Tensor], inputs: list[tuple[Tensor, ...]], which: str) -> Call:
    if which == FORWARD:
        return Call(lambda number: inputs[number % len(inputs)], lambda own: call(*own))
    upstream = torch.randn_like(call(*inputs[0]))

    def leaves(number: int) -> tuple[Tensor, ...]:
        return tuple(t.detach().requires_grad_() for t in inputs[number % len(inputs)])

    def both(own: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*own), own, upstream)

    return Call(leaves, both)


def measure(case: AttentionCase, bench: Bench) -> Measured:
    torch.manual_seed(0)
    first = make_inputs(case, bench.machine.device)
    sets = bench.machine.sets(sum(t.nbytes for t in first))
    inputs = [first, *(make_inputs(case, bench.machine.device) for _ in range(1, sets))]
    functions = BASELINES[case.operation]
    expected = functions[MFOPS](*first)
    for call in functions.values():  # what is timed is right
        torch.testing.assert_close(call(*first), expected, atol=3e-2, rtol=3e-2)
    calls = {name: call_of(call, inputs, case.which) for name, call in functions.items()}
    return time_calls(ATTENTION, case.columns(), calls, bench)


def baselines(case: AttentionCase, device: str) -> Iterable[str]:
    return BASELINES[case.operation]


@pytest.mark.benchmark(**playback)
def test_attention(case: AttentionCase, baseline: str, play: Any) -> None:
    play(ATTENTION, case, baseline, measure)
