"""Rows of results: CSV files that only measurements write, a file for each benchmark.

A row is one baseline in one case, or one training run. It names its run, a row of runs.csv: when it
began (UTC), the command, commit, device and versions. Numbers are SI: seconds, bytes, FLOPs.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import itertools
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock

import mfops
from benchmarks.machine import Machine, backends, extension, output
from benchmarks.schema import Benchmark
from mfnet.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, str]

PROVENANCE = ("run", "commit", "environment", "command", "device", "threads", "versions", "built")
RUNS = "runs.csv"
# Libraries whose version can move a time.
LIBRARIES = (
    "torch",
    "torchvision",
    "triton",
    "timm",
    "segmentation-models-pytorch",
    "lightning",
)
# Environment variables that can.
VARIABLES = (
    "MFOPS_BACKEND",
    "THP_MEM_ALLOC_ENABLE",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "NVIDIA_TF32_OVERRIDE",
)


def read(path: Path, key: str = "baseline") -> list[Row]:
    """The rows of a file, none where there is no file.

    Raises:
        ValueError: the file has no column `key`, or a row is not whole.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            header = reader.fieldnames or ()
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    if key not in header:
        raise ValueError(f"{path}: expected a header with a column '{key}'")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(f"{path}, row {number}: expected {len(header)} cells")
    return rows


def append(benchmark: Benchmark, folder: Path, new: Iterable[Mapping[str, Any]]) -> Path:
    """Adds rows to the benchmark's file: all of them, or none where it is stopped.

    Columns that the file does not have yet are empty in its older rows; none is ever lost.

    Raises:
        ValueError: a row has a column that the benchmark does not name.
    """
    path = folder / f"{benchmark.name}.csv"
    new = [{name: _text(value) for name, value in row.items()} for row in new]
    for row in new:
        unknown = [name for name in row if name not in benchmark.columns]
        if unknown:
            raise ValueError(f"{benchmark.name}: no such columns: {', '.join(unknown)}")
    with _locked(path):
        _write(path, benchmark.columns, [*read(path), *new])
    return path


def add_run(folder: Path, provenance: Mapping[str, str]) -> str:
    """The id of a run in the folder's runs.csv, where it is added unless it is there.

    An id is the time of its start, and a number where another run began in that second.
    """
    path, start = folder / RUNS, provenance["run"]
    with _locked(path):
        known = {row["run"]: row for row in read(path, "run")}
        ids = itertools.chain([start], (f"{start}-{count}" for count in itertools.count(2)))
        for run in ids:
            own = dict.fromkeys(PROVENANCE, "") | provenance | {"run": run}
            if run not in known:
                _write(path, PROVENANCE, [*known.values(), own])
                return run
            if known[run] == own:
                return run
    raise AssertionError("ids do not end")


def _write(path: Path, columns: Iterable[str], rows: list[Row]) -> None:
    kept = (column for column in (rows[0] if rows else ()) if column not in columns)
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *kept], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _locked(path: Path) -> FileLock:
    """Several processes may train side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(_lock_of(path))


def _lock_of(path: Path) -> Path:
    """Apart from the results: it stays when the lock is released."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"mfops-rows-{digest}.lock"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def environment() -> str:
    """The variables of VARIABLES that are set, as a shell takes them."""
    return " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)


def command() -> str:
    """The command line, with paths outside the repository by their last part."""
    module = sys.modules["__main__"].__spec__
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose main module is xdist's
        words = ["python", "-m", "pytest", *sys.argv[1:]]
    elif module:
        words = ["python", "-m", module.name.removesuffix(".__main__"), *sys.argv[1:]]
    else:
        words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return shlex.join(map(_inside, words))


def _inside(word: str) -> str:
    flag, equals, value = word.rpartition("=")
    path = Path(value)
    if not (path.is_absolute() or ".." in path.parts):
        return word
    path = path.resolve()
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)
    return f"{flag}{equals}{shown}"


def commit() -> str:
    """The commit measured; $COMMIT says it where the tree came without its repository."""

    def git(*arguments: str) -> str:
        return output(["git", "-C", str(ROOT), *arguments])

    head = git("rev-parse", "--short", "HEAD")
    if not head:
        return os.environ.get("COMMIT") or "no commit"
    measured = ("csrc", "mfops", "mfnet", "setup.py", "benchmarks", ":!benchmarks/results")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *measured)
    return f"{head} with changes" if changed else head


def versions() -> str:
    """Versions of what can move a time, without what is not installed."""
    found = [f"Python {platform.python_version()}", f"mfops {mfops.__version__}"]
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def provenance(machine: Machine) -> dict[str, str]:
    """Where rows are from: a row of runs.csv."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "run": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "environment": environment(),
        "command": command(),
        "device": machine.description(),
        "threads": str(machine.threads),
        "versions": versions(),
        "built": f"{extension()}; backends: {backends()}",
    }
