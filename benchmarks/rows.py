"""Rows of results: CSV files that only measurements write, a file for each question.

A row is one rival in one figure, or one training run. It carries where it is from: the run (UTC
time of its start), command, commit, device and versions. Numbers are SI: seconds, bytes, FLOPs.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock

import mfops
from benchmarks.machine import Machine, backends, extension, output
from mfnet.files import written_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, str]

PROVENANCE = ("run", "commit", "environment", "command", "device", "threads", "versions", "built")
# `late`: how many of the figure's calls, all rivals', were not queued when a GPU came to them.
TIMES = ("rounds", "median_s", "q1_s", "q3_s", "late")
# Libraries whose version can move a figure.
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


@dataclass(frozen=True)
class Question:
    """What a file of rows answers.

    `figure` names the columns that say what is compared (rows with equal ones stand side by side),
    `measures` what is measured beside the time. Ratios are over each of `bases`.
    """

    name: str
    figure: tuple[str, ...]
    measures: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    timed: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        over = tuple(f"over_{base}" for base in self.bases)
        timed = (*TIMES, *over) if self.timed else ()
        return (*self.figure, "rival", "setting", *timed, *self.measures, "skipped", *PROVENANCE)


def read(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file.

    Raises:
        ValueError: the file is not one of rows, or a row is not whole.
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
    if "rival" not in header:
        raise ValueError(f"{path}: expected a header with a column 'rival'")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(f"{path}, row {number}: expected {len(header)} cells")
    return rows


def append(question: Question, folder: Path, new: Iterable[Mapping[str, Any]]) -> Path:
    """Adds rows to the question's file: all of them, or none where it is stopped.

    Columns that the file does not have yet are empty in its older rows; none is ever lost.

    Raises:
        ValueError: a row has a column that the question does not name.
    """
    path = folder / f"{question.name}.csv"
    new = [{name: _text(value) for name, value in row.items()} for row in new]
    for row in new:
        unknown = [name for name in row if name not in question.columns]
        if unknown:
            raise ValueError(f"{question.name}: no such columns: {', '.join(unknown)}")
    folder.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(_lock_of(path)),  # several processes may train side by side
        written_whole(path) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        old = read(path)
        kept = (c for c in (old[0] if old else ()) if c not in question.columns)
        header = [*question.columns, *kept]
        writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, *new])
    return path


def _lock_of(path: Path) -> Path:
    """Apart from the results: it stays when the lock is released."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"mfops-rows-{digest}.lock"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def number(row: Mapping[str, str], column: str) -> float | None:
    """A cell's number, None where it is empty or there is no such column."""
    text = row.get(column, "")
    return float(text) if text else None


def figures(rows: Iterable[Row], question: Question) -> dict[tuple[str, ...], list[Row]]:
    """Rows that stand side by side, by figure: those of the newest run that measured any of it.

    Runs in another environment (see VARIABLES) are other figures: its settings come last in a key.
    """
    found: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        key = (*(row[column] for column in question.figure), row["environment"])
        found.setdefault(key, {}).setdefault(row["run"], []).append(row)

    def newest(runs: dict[str, list[Row]]) -> list[Row]:
        measured = [run for run, rows in runs.items() if not all(row["skipped"] for row in rows)]
        return runs[max(measured or runs)]

    return {key: newest(runs) for key, runs in found.items()}


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
    """Versions of what can move a figure, without what is not installed."""
    found = [f"Python {platform.python_version()}", f"mfops {mfops.__version__}"]
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def provenance(machine: Machine) -> dict[str, str]:
    """Where a row is from."""
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
