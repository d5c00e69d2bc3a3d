"""What do the kernels buy a whole network under bfloat16 autocast?

    python -m pytest benchmarks/bench_backends.py [-k inference]

Networks that find their factors on each image, on mfops's automatic backend and, with the same
weights, on the reference: the lines of PyTorch that the kernels stand for. Everything else about a
pass is as in bench_models.py, but that neither is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfnet
import mfops
from benchmarks import bench_models
from benchmarks.machine import AUTOCAST
from benchmarks.measure import Bench, Measured, playback
from benchmarks.schema import BACKENDS as BENCHMARK
from benchmarks.schema import MFOPS, REFERENCE

NETWORKS = {
    "mfnet (factorizer nmf)": {"name": "mfnet", "factorizer": "nmf"},
    "emanet": {"name": "emanet"},
}
BACKENDS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    MFOPS: nullcontext,
    REFERENCE: functools.partial(mfops.use_backend, "reference"),
}


@dataclass(frozen=True)
class BackendCase(bench_models.NetworkCase):
    network: str


def cases(device: str, small: bool) -> list[BackendCase]:
    return [
        BackendCase(
            "test_resnet" if small else of.backbone, of.size, of.batch, AUTOCAST, of.which, network
        )
        for network in NETWORKS
        for of in bench_models.cases(device, small)
    ]


class OnBackend(nn.Module):
    """A network on one of BACKENDS, in autocast on a CPU, too.

    A backward pass runs on the backend that its forward pass ran on.
    """

    def __init__(self, network: nn.Module, backend: str) -> None:
        super().__init__()
        self.network = network
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        with BACKENDS[self.backend](), torch.autocast(x.device.type, torch.bfloat16):
            return self.network(x)


def measure(case: BackendCase, bench: Bench) -> Measured:
    def build(backend: str) -> nn.Module:
        torch.manual_seed(0)
        network = mfnet.create_model(
            **NETWORKS[case.network],
            num_classes=bench_models.NUM_CLASSES,
            backbone=case.backbone,
        )
        return OnBackend(network, backend)

    baselines = {backend: functools.partial(build, backend) for backend in BACKENDS}
    images = bench_models.images_of(case, bench)
    return bench_models.compare(
        BENCHMARK, case.columns(), baselines, images, case.which, bench, compile_too=False
    )


def baselines(case: BackendCase, device: str) -> Iterable[str]:
    return BACKENDS


@pytest.mark.benchmark(**playback)
def test_backend(case: BackendCase, baseline: str, play: Any) -> None:
    play(BENCHMARK, case, baseline, measure)
