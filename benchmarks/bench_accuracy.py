"""What does each context buy? Trains all of them under one recipe, with several seeds.

    python -m pytest benchmarks/bench_accuracy.py --data DIR [--recipe camvid] [--fit FLAGS]
        [--contexts mf,aspp] [--seeds 0,1,2] [--runs runs/accuracy]

DIR is in VOC layout, a recipe is a configuration of `mfnet fit`, FLAGS override it. A context
stands in the network of DeepLabV3+; a network of mfnet's can be named too. A run is one row, once
it has ended. A command that was stopped goes on where it was when it is run again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import rows
from benchmarks.bench_models import INFERENCE, compare
from benchmarks.machine import network_dtype
from benchmarks.measure import Bench, Measured, playback
from benchmarks.schema import ACCURACY, ACCURACY_COST
from benchmarks.trainer import Recipe, check_names, parsed
from mfnet.contexts import CONTEXTS
from mfnet.report import Run, read_run

NETWORKS = ("emanet",)  # has a decoder of its own


@dataclass(frozen=True)
class CostCase:
    """What the networks that were trained cost at the size they are validated at."""

    recipe: Recipe
    size: tuple[int, int]
    dtype: str
    networks: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.recipe.name} at {self.size[0]}x{self.size[1]}, {self.dtype}"

    def columns(self) -> dict[str, Any]:
        return {
            **self.recipe.columns(),
            "size": f"{self.size[0]}x{self.size[1]}",
            "dtype": self.dtype,
        }


def names(options: Any) -> list[str]:
    """The contexts and networks to train."""
    found = options.contexts.split(",") if options.contexts else [*CONTEXTS, *NETWORKS]
    check_names(found)
    return found


def seeds(options: Any) -> list[int]:
    try:
        return [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        raise pytest.UsageError(
            f"--seeds: expected numbers between commas, got '{options.seeds}'"
        ) from None


def run_folder(runs: Path, recipe: Recipe, network: str, seed: int) -> Path:
    """A run's folder: another recipe never continues it."""
    whole = " ".join([str(Path(recipe.data).resolve()), recipe.config, recipe.flags])
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    of_run = f"{network}-seed{seed}"
    return runs / f"{recipe.name}-{digest}" / re.sub(r"[^\w.]+", "-", of_run)


def is_done(folder: Path, recipe: Recipe, network: str, seed: int) -> bool:
    """Whether the run has its row."""
    wanted = {**recipe.columns(), "baseline": network, "seed": str(seed)}
    return any(
        not row["skipped"] and all(row[column] == value for column, value in wanted.items())
        for row in rows.read(folder / f"{ACCURACY.name}.csv")
    )


def result(run: Run, recipe: Recipe, network: str, seed: int) -> dict[str, Any]:
    """The row of a run that has ended: the scores of its last epoch, and its best mIoU."""
    epochs, miou = run.series("val/mIoU")
    best, highest = run.best
    gflops = run.summary["gflops"]
    return {
        **recipe.columns(),
        "baseline": network,
        "seed": seed,
        "network": run.summary["model"],
        "backbone": run.summary["backbone"],
        "size": "x".join(map(str, run.summary["input_size"])),
        "epochs": epochs[-1],
        "parameters": run.summary["parameters"],
        "flops": None if gflops is None else round(1e9 * gflops),
        "mIoU": miou[-1],
        "fwIoU": run.series("val/fwIoU")[1][-1],
        "accuracy": run.series("val/accuracy")[1][-1],
        "best_mIoU": highest,
        "best_epoch": best,
    }


def train(recipe: Recipe, network: str, seed: int, folder: Path, threads: int) -> None:
    """Trains, or goes on with a run that was stopped; fails the test where mfnet fails.

    Raises:
        ModuleNotFoundError: what mfnet's command line needs is not installed.
    """
    importlib.import_module("mfnet.cli")
    command = [sys.executable, "-m", "mfnet", "fit", *recipe.arguments(network)]
    command += ["--seed_everything", str(seed), "--trainer.default_root_dir", str(folder)]
    command += ["--ckpt_path", "last"]
    # Threads that wait sleep instead of spinning: the loader's processes need the processors too.
    settings = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    paths = [str(rows.ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # benchmarks.networks is there
    done = subprocess.run(command, env={**os.environ, **settings})
    if done.returncode:
        pytest.fail(f"mfnet fit ended with {done.returncode}: its output says why")


def measure(case: CostCase, bench: Bench) -> Measured:
    def network(name: str) -> nn.Module:
        return parsed(case.recipe.arguments(name)).model.network

    def images(_: nn.Module) -> list[Tensor]:
        shape = (1, 3, *case.size)
        return [torch.randn(shape, device=bench.machine.device) for _ in range(2)]

    build = {name: functools.partial(network, name) for name in case.networks}
    return compare(ACCURACY_COST, case.columns(), build, images, INFERENCE, bench)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", seeds(options))
    metafunc.parametrize("network", names(options))


def test_accuracy(seed: int, network: str, bench: Bench, pytestconfig: pytest.Config) -> None:
    recipe = Recipe.of(pytestconfig.option)
    if is_done(bench.folder, recipe, network, seed):
        return
    folder = run_folder(pytestconfig.option.runs, recipe, network, seed)
    try:
        train(recipe, network, seed, folder, bench.machine.threads)
    except ModuleNotFoundError as error:
        why = f"{error.name} not installed"
        skipped = {**recipe.columns(), "baseline": network, "seed": seed, "skipped": why}
        bench.append(ACCURACY, [skipped])
        pytest.skip(why)
    bench.append(ACCURACY, [result(read_run(folder), recipe, network, seed)])


@functools.lru_cache
def validation_size(recipe: Recipe, network: str) -> tuple[int, int]:
    data = parsed(recipe.arguments(network)).datamodule
    data.setup("validate")
    height, width = data.val_set[0][0].shape[-2:]
    return height, width


@pytest.mark.benchmark(**playback)
def test_cost(network: str, bench: Bench, play: Any, pytestconfig: pytest.Config) -> None:
    networks = tuple(names(pytestconfig.option))
    recipe = Recipe.of(pytestconfig.option)
    size = validation_size(recipe, network)
    case = CostCase(recipe, size, network_dtype(bench.machine.device), networks)
    play(ACCURACY_COST, case, network, measure)
