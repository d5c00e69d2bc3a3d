"""The suite's options, and how a case gets from a measurement into pytest-benchmark and a file.

The first test of a case measures all of its baselines and appends their rows; each test
then plays its baseline's readings back to pytest-benchmark, which shows and saves them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rows
from benchmarks.harness import Effort, first_line
from benchmarks.kernels import taking_part
from benchmarks.machine import Machine, processors
from benchmarks.measure import Bench, Measured, tape
from benchmarks.schema import Benchmark

WRITTEN = pytest.StashKey[dict[Path, int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("measurements", "measurements (benchmarks/README.md)")
    group.addoption("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    group.addoption("--threads", type=int, help="of the CPU; default: as many as there are")
    group.addoption("--seconds", type=float, default=6.0, help="per case, about (6)")
    group.addoption("--budget", type=float, help="seconds after which no further case begins")
    group.addoption("--results", type=Path, help="folder for the rows; benchmarks/results")
    group.addoption(
        "--small", action="store_true", help="tiny sizes, to try the suite out; needs --results"
    )
    group.addoption(
        "--no-compile",
        action="store_true",
        help="leave torch.compile out of the op and the factorizers, where it takes minutes",
    )
    group.addoption("--data", type=Path, help="a data set in VOC layout, to train on")
    group.addoption("--recipe", default="camvid", help="configuration to train with (camvid)")
    group.addoption("--fit", default="", help="flags of mfnet fit that override the recipe's")
    group.addoption("--contexts", help="contexts and networks to train; default: all contexts")
    group.addoption("--seeds", default="0,1,2", help="seeds to train with (0,1,2)")
    group.addoption("--runs", type=Path, default=Path("runs/accuracy"), help="training folders")


def pytest_configure(config: pytest.Config) -> None:
    options = config.option
    if hasattr(config, "workerinput"):  # of pytest-xdist: rows tell the command that was given
        sys.argv[:] = config.workerinput["mainargv"]
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: no CUDA device")
    if options.threads is None:
        options.threads = processors()
    elif options.threads < 1:
        raise pytest.UsageError(f"--threads: expected at least 1, got {options.threads}")
    if options.data is not None and not options.data.is_dir():
        raise pytest.UsageError(f"--data: no folder '{options.data}'")
    if options.results is None:
        options.results = rows.RESULTS
    if options.small and options.results.resolve().is_relative_to(rows.RESULTS):
        raise pytest.UsageError("--small gives no figures for benchmarks/results: add --results")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case of a file with each of its baselines, those of one case next to each other."""
    if not {"case", "baseline"} <= set(metafunc.fixturenames):
        return
    options, of = metafunc.config.option, metafunc.module
    found = [
        (case, baseline)
        for case in of.cases(options.device, options.small)
        for baseline in taking_part(of.baselines(case, options.device), not options.no_compile)
    ]
    metafunc.parametrize(("case", "baseline"), found, ids=str)


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> Bench:
    options = pytestconfig.option
    machine = Machine(options.device, options.threads)
    effort = Effort(seconds=0.01, least=2) if options.small else Effort(options.seconds)
    bench = Bench(
        machine,
        effort,
        options.small,
        options.results / machine.folder(),
        rows.provenance(machine),
        compiles=not options.no_compile,
    )
    pytestconfig.stash[WRITTEN] = bench.written
    return bench


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for path, count in config.stash.get(WRITTEN, {}).items():
        terminalreporter.write_line(f"{count} rows appended to {path}")


@pytest.fixture(scope="session")
def measured() -> dict[Any, Measured]:
    """What this session measured, by benchmark and case."""
    return {}


@pytest.fixture
def play(
    request: pytest.FixtureRequest, benchmark: Any, bench: Bench, measured: dict[Any, Measured]
) -> Callable[..., None]:
    """`play(of, case, baseline, measure)`: the baseline's readings for the case.

    `measure(case, bench)` runs once for a case; `str(case)` is its title.
    """

    def run(
        of: Benchmark,
        case: Any,
        baseline: str,
        measure: Callable[[Any, Bench], Measured],
    ) -> None:
        def leave_out(why: str) -> None:
            bench.append(of, [{**case.columns(), "baseline": baseline, "skipped": why}])

        key = of.name, case
        if key not in measured:
            budget = request.config.option.budget
            if budget is not None and time.perf_counter() - bench.started > budget:
                leave_out(f"--budget {budget:.0f} was used up")
                pytest.skip(f"--budget {budget:.0f} was used up")
            try:
                measured[key] = measure(case, bench)
            except Exception as error:
                measured[key] = Measured([], {}, broken=f"failed: {first_line(error)}")
                leave_out(measured[key].broken)
                raise
            finally:
                bench.machine.release()
            bench.append(of, measured[key].rows)
        found = measured[key]
        if found.broken:
            leave_out(found.broken)
            pytest.fail(found.broken)
        row = next(row for row in found.rows if row["baseline"] == baseline)
        if row.get("skipped"):
            (pytest.fail if row["skipped"].startswith("failed") else pytest.skip)(row["skipped"])
        benchmark.group = f"{of.name}: {case}"
        benchmark.extra_info |= row
        readings = found.seconds[baseline]
        benchmark.pedantic(tape.play, setup=tape.load(readings), rounds=len(readings))

    return run
