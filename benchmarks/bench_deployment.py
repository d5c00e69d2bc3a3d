"""How fast is a trained network in each form that it can be used in?

    python -m pytest benchmarks/bench_deployment.py

A network of the package on one image of its size, random pixels that lie contiguous in memory, as
PyTorch runs it and as `mfnet export` writes it. What is exported runs on a CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mfnet
from benchmarks.harness import Call, why_not
from benchmarks.measure import Bench, Case, Measured, playback, time_calls
from benchmarks.schema import DEPLOYMENT, PYTORCH, TORCH_COMPILE
from mfnet.export import FORMATS, export

NETWORK = "camvid_light"
SMALL = "64x64"


@dataclass(frozen=True)
class DeploymentCase(Case):
    network: str
    size: str


def cases(device: str, small: bool) -> list[DeploymentCase]:
    return [DeploymentCase(NETWORK, SMALL if small else "360x480")] if device == "cpu" else []


def baselines(case: DeploymentCase, device: str) -> Iterable[str]:
    return (PYTORCH,) if case.size == SMALL else (PYTORCH, TORCH_COMPILE, *FORMATS)


def run_of(baseline: str, network: str, folder: Path) -> Callable[[Tensor], Tensor]:
    if baseline in FORMATS:
        for package in FORMATS[baseline].packages:
            import_module(package)
        path, _ = export(network, baseline, folder / FORMATS[baseline].name)
        return FORMATS[baseline].run(path)
    model = mfnet.load(network)
    return torch.compile(model) if baseline == TORCH_COMPILE else model


def measure(case: DeploymentCase, bench: Bench) -> Measured:
    height, width = map(int, case.size.split("x"))
    first = torch.rand(1, 3, height, width)
    images = [first, *(torch.rand_like(first) for _ in range(1, bench.machine.sets(first.nbytes)))]
    calls: dict[str, Call] = {}
    skipped: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name in baselines(case, bench.machine.device):
            try:
                run = run_of(name, case.network, Path(folder))
                run(first)
            except Exception as error:  # a package that is not installed, for instance
                skipped.append({**case.columns(), "baseline": name, "skipped": why_not(error)})
            else:
                calls[name] = Call(lambda number: images[number % len(images)], run)
        found = time_calls(DEPLOYMENT, case.columns(), calls, bench)
    return Measured([*skipped, *found.rows], found.seconds)


@pytest.mark.benchmark(**playback)
def test_deployment(case: DeploymentCase, baseline: str, play: Any) -> None:
    play(DEPLOYMENT, case, baseline, measure)
