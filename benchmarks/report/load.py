"""The rows that stand, machine by machine, and what pages and plots ask of several of them."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks import rows
from benchmarks.kernels import BOTH, FORWARD
from benchmarks.questions import (
    ACCURACY,
    ACCURACY_COST,
    ATTENTION,
    BACKENDS,
    BEST,
    CEILINGS,
    COMPILE,
    COMPILE_GRAPHS,
    CONTEXTS,
    EAGER,
    FACTORIZERS,
    HOST,
    LIGHT,
    MODELS,
    NATIVE,
    OP,
    REFERENCE,
    TRAINING,
    TRITON,
    VARIANT,
)
from benchmarks.rows import PROVENANCE, TIMES, Question, Row, number

QUESTIONS = (
    CEILINGS,
    OP,
    FACTORIZERS,
    HOST,
    ATTENTION,
    CONTEXTS,
    MODELS,
    BACKENDS,
    TRAINING,
    ACCURACY,
    ACCURACY_COST,
)
TEXTS = {"network", "backbone", "size", "input"}  # measures that are no numbers

# What rivals are called; others by the name in their rows.
NAMES = {
    NATIVE: "mfops (native)",
    TRITON: "mfops (Triton)",
    REFERENCE: "mfops (reference)",
    EAGER: "eager, as published",
    BEST: "eager, at its best",
    COMPILE: "torch.compile",
    COMPILE_GRAPHS: "torch.compile, CUDA graphs",
    "mf": "MF",
    "em": "EM",
    "nmf": "NMF (Hamburger)",
    "vq": "VQ",
    "cd": "CD",
    "double_attention": "Double attention",
    "aspp": "ASPP",
    "aspp_separable": "ASPP, separable",
    "ppm": "PPM",
    "encoding": "Encoding",
    "nonlocal": "non-local",
    "mfnet_light": "MFNet Light",
    "mfnet": "MFNet",
    "deeplabv3plus": "DeepLabV3+",
    "emanet": "EMANet",
}
OURS = {NATIVE, TRITON, "mfops", "mf", "mfnet", "mfnet_light"}

PAPER_BACKBONE, PAPER_SIZE = "resnet50", "513x513"
# Network: mIoU, fwIoU, millions of parameters, as the paper prints them.
PAPER = {
    "mfnet": (68.97, 85.71, 29.73),
    "deeplabv3plus": (68.98, 85.31, 40.45),
    "emanet": (70.05, 85.32, 34.65),
}

Figures = dict[tuple[str, ...], list[Row]]


def name(rival: str) -> str:
    return NAMES.get(rival, rival)


def measured(found: list[Row]) -> list[Row]:
    return [row for row in found if not row["skipped"]]


@dataclass(frozen=True)
class Results:
    """One machine's rows that stand, by question: of each figure those of its newest run.

    Training runs take hours and come one by one: of those the newest of each seed.
    """

    machine: str
    by_question: dict[str, Figures]
    every: dict[str, list[Row]]  # whatever run they are of

    @property
    def cpu(self) -> bool:
        """Whether the machine is a CPU: its name ends with its threads (`Machine.name`)."""
        return self.machine.endswith("-threads")

    def figures(self, question: Question) -> Figures:
        return self.by_question[question.name]

    def plain(self, question: Question) -> Figures:
        """Those in the plainest environment: no variable set, where there are such."""
        found = self.figures(question)
        plainest = min((key[-1] for key in found), default="")
        return {key: of_figure for key, of_figure in found.items() if key[-1] == plainest}

    def earlier(self, question: Question) -> Figures:
        """Of each figure the rows of its earlier runs with the same command and commit."""
        found: Figures = {}
        for key, newest in self.figures(question).items():
            *figure, environment = key
            wanted = (*figure, environment, newest[0]["command"], newest[0]["commit"])
            columns = (*question.figure, "environment", "command", "commit")
            found[key] = [
                row
                for row in self.every[question.name]
                if row["run"] < newest[0]["run"] and tuple(row[c] for c in columns) == wanted
            ]
        return found

    def rows(self, question: Question) -> list[Row]:
        return [row for of_figure in self.figures(question).values() for row in of_figure]


def load(folder: Path) -> list[Results]:
    """Every machine that has rows, by name.

    Raises:
        ValueError: a file is damaged; names it.
    """
    machines = {}
    for machine in sorted(path for path in folder.glob("*") if path.is_dir()):
        unknown = {path.stem for path in machine.glob("*.csv")} - {q.name for q in QUESTIONS}
        if unknown:
            raise ValueError(f"{machine / min(unknown)}.csv: there is no such question")
        every = {q.name: checked(machine / f"{q.name}.csv", q) for q in QUESTIONS}
        if any(every.values()):
            machines[machine.name] = every
    trained = [row for every in machines.values() for row in every[ACCURACY.name]]
    found = []
    for name, every in machines.items():
        by_question = {q.name: rows.figures(every[q.name], q) for q in QUESTIONS}
        by_question[ACCURACY.name] = _newest_of_each_seed(_shared(trained, every))
        found.append(Results(name, by_question, every))
    return found


def _shared(trained: list[Row], every: dict[str, list[Row]]) -> list[Row]:
    """Training runs on any machine that a machine has runs or costs of: scores, unlike times, do
    not depend on it."""

    def figure(row: Row) -> tuple[str, ...]:
        return tuple(row[column] for column in ACCURACY.figure)

    own = {figure(row) for question in (ACCURACY, ACCURACY_COST) for row in every[question.name]}
    return [row for row in trained if figure(row) in own]


def checked(path: Path, question: Question) -> list[Row]:
    """The rows of a file whose cells are what they should be; columns it lacks are empty."""
    found = rows.read(path)
    timed = ("median_s", "q1_s", "q3_s") if question.timed else ()
    required = timed or ("mIoU", "fwIoU", "accuracy", "seed")
    over = tuple(f"over_{base}" for base in question.bases)
    measures = tuple(column for column in question.measures if column not in TEXTS)
    for count, row in enumerate(found, start=1):
        missing = [c for c in (*question.figure, "skipped", *PROVENANCE) if c not in row]
        if missing:
            raise ValueError(f"{path}: expected columns {', '.join(missing)}")
        for column in (*TIMES, *over, *measures):
            try:
                value = number(row, column)
            except ValueError:
                value = math.nan
            if value is None:
                wrong = column in required and not row["skipped"]
            else:
                wrong = not math.isfinite(value) or (value <= 0 and column in (*timed, *over))
            if wrong:
                text = row.get(column) or "nothing"
                raise ValueError(f"{path}, row {count}: {column}: expected a number, got {text}")
    return [dict.fromkeys(question.columns, "") | row for row in found]


def _newest_of_each_seed(found: list[Row]) -> Figures:
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        key = (*(row[c] for c in ACCURACY.figure), row["rival"], row["seed"])
        runs.setdefault(key, []).append(row)
    figures: Figures = {}
    for of_seed in runs.values():
        newest = max(of_seed, key=lambda row: (not row["skipped"], row["run"]))
        key = (*(newest[c] for c in ACCURACY.figure), "")
        figures.setdefault(key, []).append(newest)
    return figures


@dataclass(frozen=True, eq=False)
class Score:
    """A context's training runs, a seed each, and the row of what its network costs."""

    rival: str
    runs: list[Row]
    skipped: list[Row]
    cost: Row | None

    def mean(self, column: str) -> float:
        return statistics.mean(float(row[column]) for row in self.runs)

    def deviation(self, column: str) -> float | None:
        """Over the seeds, of a sample; None for a single one."""
        values = [float(row[column]) for row in self.runs]
        return statistics.stdev(values) if len(values) > 1 else None

    def counted(self, column: str) -> float | None:
        """Parameters or FLOPs: the same in every run."""
        return number(self.runs[0], column) if self.runs else None


Scores = dict[tuple[str, ...], list[Score]]


def networks(found: list[Score]) -> list[Score]:
    """Those that are no variant of MFNet Light."""
    return [score for score in found if not score.rival.startswith(VARIANT)]


def variants(found: list[Score]) -> list[Score]:
    """Variants of MFNet Light and itself; none where there are no variants."""
    ours = [score for score in found if score.rival.startswith((VARIANT, LIGHT))]
    return ours if len(ours) > 1 else []


def scores(results: Results) -> Scores:
    """By data, recipe and flags, the best first."""
    costs = {
        (*key[: len(ACCURACY.figure)], row["rival"]): row
        for key, found in reversed(results.plain(ACCURACY_COST).items())  # of several, the first
        for row in measured(found)
    }
    groups = {}
    for (*key, _), found in results.figures(ACCURACY).items():
        rivals: dict[str, list[Row]] = {}
        for row in found:
            rivals.setdefault(row["rival"], []).append(row)
        found_scores = [
            Score(
                rival,
                measured(own),
                [row for row in own if row["skipped"]],
                costs.get((*key, rival)),
            )
            for rival, own in rivals.items()
        ]
        groups[tuple(key)] = sorted(found_scores, key=lambda s: -s.mean("mIoU") if s.runs else 0)
    return groups


def context_passes(results: Results) -> dict[str, dict[str, dict[str, Row]]]:
    """Rows by size, pass and context, of the channels, batch and dtype that come first."""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    first = None
    for (*channels, size, batch, dtype, which, _), own in results.plain(CONTEXTS).items():
        first = first or (channels, batch, dtype)
        if (channels, batch, dtype) == first:
            found.setdefault(size, {})[which] = {row["rival"]: row for row in own}
    return {size: passes for size, passes in found.items() if passes.keys() == {FORWARD, BOTH}}


def paper_counts(results: Results) -> dict[str, Row]:
    """Of each network in the paper's table a row with what is counted here."""
    counted = {}
    for (backbone, size, *_), found in results.plain(MODELS).items():
        if (backbone, size) == (PAPER_BACKBONE, PAPER_SIZE):
            for row in measured(found):
                if row["rival"] in PAPER and row["parameters"] and row["flops"]:
                    counted.setdefault(row["rival"], row)
    return {network: counted[network] for network in PAPER if network in counted}
