"""How many images does the trainer see in a second, and where does the time go?

    python -m pytest benchmarks/bench_training.py [--data DIR --recipe camvid --fit FLAGS]

mfnet's own trainer and loader, on the data set, or on generated images without one. Networks take
turns, some steps each, with a new loader each time; the first steps, which find batches loaded
ahead, do not count. Where the time goes is taken in steps of their own, which wait for the device
after each part.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest

from benchmarks.harness import times, why_not
from benchmarks.measure import Bench, Measured, playback
from benchmarks.schema import TRAINING
from benchmarks.trainer import Recipe, parsed
from mfnet.models import list_models

if TYPE_CHECKING:
    from mfnet.cli import MFNetCLI

PARTS = ("loader", "forward", "backward", "optimizer", "other")
ROUNDS = 3
STEPS = {"cuda": (20, 60), "cpu": (4, 6)}  # that do not count, that do


class Stopwatch(L.Callback):
    """Seconds per step, and of its parts, over the steps after the first `warm_up`.

    Loader: until the batch is there, on the device. Forward: with the loss. Optimizer: its step,
    the learning rate's and the logging. Other: what is between the others.
    """

    def __init__(self, warm_up: int, synchronize: Callable[[], None], parts: bool) -> None:
        self.warm_up = warm_up
        self.synchronize = synchronize
        self.parts = parts
        self.steps = 0
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last: float | None = None

    def _lap(self, part: str) -> None:
        if self._last is None or not self.parts:
            return
        self.synchronize()
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now

    def on_train_batch_start(self, *_: Any) -> None:
        self._lap("loader")

    def on_before_zero_grad(self, *_: Any) -> None:
        self._lap("forward")

    def on_before_backward(self, *_: Any) -> None:
        self._lap("other")

    def on_after_backward(self, *_: Any) -> None:
        self._lap("backward")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._lap("other")

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._lap("optimizer")
        self.steps = batch_idx + 1 - self.warm_up
        if self.steps == 0:
            self.synchronize()
            self._begin = self._last = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        self.synchronize()
        self.total = time.perf_counter() - self._begin

    def per_step(self) -> float:
        return self.total / self.steps


@dataclass(frozen=True)
class TrainingCase:
    """`recipe` is None for generated images, in `folder`."""

    recipe: Recipe | None
    folder: Path
    small: bool
    device: str

    def __str__(self) -> str:
        return self.recipe.name if self.recipe else "generated images"

    def columns(self) -> dict[str, Any]:
        """What is known before there is a trainer."""
        return {"data": str(self)}

    def command_line(self, network: str) -> MFNetCLI:
        if self.recipe:
            arguments = self.recipe.arguments(network)
        else:
            generated = {
                "data": "mfnet.data.Synthetic",
                "data.cache_dir": self.folder,
                "data.train": 20 if self.small else 200,
                "data.val": 1,
                "data.size": 33 if self.small else 161,
                "data.crop_size": 33 if self.small else 161,
                "data.batch_size": 4 if self.small else 8,
                "model.network.name": network,
                "model.network.backbone": "resnet18",
            }
            arguments = [word for k, v in generated.items() for word in (f"--{k}", str(v))]
        return parsed(
            [
                *arguments,
                *("--trainer.default_root_dir", str(self.folder)),
                *("--trainer.max_epochs", "1"),
                *("--trainer.limit_train_batches", str(sum(self.steps))),
            ]
        )

    @property
    def steps(self) -> tuple[int, int]:
        """Steps that do not count, and that do."""
        return (1, 2) if self.small else STEPS[self.device]


def steps(case: TrainingCase, network: str, bench: Bench, parts: bool) -> Stopwatch:
    """Some steps of the trainer from a new start."""
    cli = case.command_line(network)
    watch = Stopwatch(case.steps[0], bench.machine.synchronize, parts)
    cli.trainer.callbacks.append(watch)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    if watch.steps < 1:
        raise ValueError(
            f"data: expected more than {watch.warm_up} batches of {cli.datamodule.batch_size} "
            f"images, got {cli.trainer.num_training_batches}"
        )
    return watch


def measure(case: TrainingCase, bench: Bench) -> Measured:
    networks = list_models()
    try:
        case.command_line(networks[0])
    except ModuleNotFoundError as error:
        why = {**case.columns(), "skipped": why_not(error)}
        return Measured([{**why, "baseline": name} for name in networks], {})
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(1 if case.small else ROUNDS):
        for name in networks:
            seconds[name].append(steps(case, name, bench, parts=False).per_step())
    rows = []
    for name in networks:
        watch = steps(case, name, bench, parts=True)
        cli = case.command_line(name)
        data, network = cli.datamodule, cli.config.model.network
        row = times(seconds, name, TRAINING.bases)
        rows.append(
            {
                **case.columns(),
                "backbone": network.init_args.backbone,
                "size": "x".join(map(str, data.crop_size)),
                "batch": data.batch_size,
                "precision": cli.trainer.precision,
                "workers": data.num_workers,
                "baseline": name,
                **row,
                "images_per_s": data.batch_size / row["median_s"],
                **{f"{part}_s": watch.seconds[part] / watch.steps for part in PARTS},
            }
        )
    return Measured(rows, seconds)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("baseline", list_models())


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generated")


@pytest.mark.benchmark(**playback)
def test_training(baseline: str, play: Any, pytestconfig: pytest.Config, generated: Path) -> None:
    options = pytestconfig.option
    recipe = Recipe.of(options) if options.data else None
    play(
        TRAINING, TrainingCase(recipe, generated, options.small, options.device), baseline, measure
    )
