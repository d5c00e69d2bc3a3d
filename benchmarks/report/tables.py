"""Rows as Markdown: a table for each question."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.questions import (
    ACCURACY_COST,
    ATTENTION,
    BACKENDS,
    CEILINGS,
    CONTEXTS,
    COPY,
    EAGER,
    FACTORIZERS,
    HOST,
    MFOPS,
    MODELS,
    NATIVE,
    OP,
    TRAINING,
)
from benchmarks.report import load, targets
from benchmarks.report.load import PAPER, QUESTIONS, Results, Score, Scores
from benchmarks.rows import PROVENANCE, Question, Row, number

MIB = 2**-20
PARTS = {  # of a training step
    "loader_s": "loader",
    "forward_s": "forward",
    "backward_s": "backward",
    "optimizer_s": "optimiser",
    "other_s": "other",
}


# Cells.


def text(value: str) -> str:
    """As it is, on a page and in a table."""
    return value.replace("<", "&lt;").replace("|", "\\|")


def show(value: float | None, form: str = "") -> str:
    """A number with three digits that count, or in the form given; "-" for none."""
    if value is None:
        return "-"
    if form:
        return format(value, form)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".removesuffix(".")


def of(column: str, scale: float = 1, form: str = "") -> Callable[[Row], str]:
    """The column's number times `scale`."""

    def cell(row: Row) -> str:
        value = number(row, column)
        return show(None if value is None else value * scale, form)

    return cell


def share(column: str, whole: str, form: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value, total = number(row, column), number(row, whole)
        return show(None if value is None or not total else value / total, form)

    return cell


def milliseconds(row: Row) -> str:
    """Median and quartiles."""
    median, low, high = (show(float(row[c]) * 1e3) for c in ("median_s", "q1_s", "q3_s"))
    return f"{median} [{low}, {high}]"


def name(row: Row) -> str:
    return text(load.name(row["rival"]))


def command(row: Row) -> str:
    """With the environment it was run in."""
    return f"{row['environment']} {row['command']}".strip()


@dataclass(frozen=True)
class Column:
    """`measured`: a number, to the right; a rival that was skipped has none."""

    title: str
    cell: Callable[[Row], str]
    measured: bool = True


def label(column: str, title: str | None = None) -> Column:
    """A column that says which row it is."""
    return Column(title or column, lambda row: text(row[column]), measured=False)


NAME = Column("op", name, measured=False)
CONTEXT = Column("context", name, measured=False)
NETWORK = Column("network", name, measured=False)
SHAPE = Column("(B, C, K, N)", lambda row: f"({', '.join(row['shape'].split())})", measured=False)
PASS = label("pass")
METHOD = Column("method", lambda row: f"{row['method']}, T = {row['steps']}", measured=False)
SETTING = label("setting")
MS = Column("ms", milliseconds)
OVER_NATIVE = Column("time / mfops", of(f"over_{NATIVE}", form=".2f"))
PEAK = Column("peak MiB", of("peak_bytes", MIB))
PARAMETERS = Column("parameters", of("parameters", form=",.0f"))
GFLOPS = Column("GFLOPs", of("flops", 1e-9, ".2f"))


def over(base: str, title: str = "time") -> Column:
    return Column(f"{title} / {load.name(base)}", of(f"over_{base}", form=".2f"))


def table(found: Iterable[Row], columns: list[Column]) -> list[str]:
    """A line for each row; one that was not measured says why in its first measured column.

    Nothing without rows.
    """
    found = list(found)
    if not found:
        return []
    rules = ("---:" if column.measured else "---" for column in columns)
    lines = [_line(column.title for column in columns), f"|{'|'.join(rules)}|"]
    first = next((column for column in columns if column.measured), None)
    for row in found:
        if row.get("skipped") and first:
            why = f"not measured: {text(row['skipped'])}"
            cells = [why if c is first else "-" if c.measured else c.cell(row) for c in columns]
        else:
            cells = [column.cell(row) for column in columns]
        lines.append(_line(cells))
    return lines


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def titled(groups: dict[str, list[str]]) -> list[str]:
    """Tables below each other, with what their rows have in common above each."""
    lines = []
    for title, own in groups.items():
        lines += [*([""] if lines else []), f"**{text(title)}**", "", *own]
    return lines


def paragraph(words: str) -> list[str]:
    return textwrap.wrap(words, 100, break_long_words=False, break_on_hyphens=False)


def _under(environment: str) -> str:
    return f", {environment}" if environment else ""


def _where(found: list[Row]) -> list[Column]:
    """The environment, where some rows have one."""
    return [label("environment")] if any(row["environment"] for row in found) else []


# Where rows are from.


def source(found: Iterable[Row]) -> list[str]:
    """For each run that rows are from: device, versions, commit, date, command."""
    runs = {tuple(row[c] for c in PROVENANCE): row for row in found}
    return [
        f"{row['device']}; {row['versions']}; commit {row['commit']}; {row['run'][:10]}; "
        f"`{command(row)}`"
        for row in runs.values()
    ]


def sources(results: Results) -> list[str]:
    """What the rows were measured on, then a line for each run of each question."""
    systems: dict[tuple[str, ...], str] = {}
    runs: dict[tuple[str, ...], Row] = {}
    for question in QUESTIONS:
        for row in results.rows(question):
            system = row["device"], row["threads"], row["versions"], row["built"]
            on = systems.setdefault(system, str(len(systems) + 1))
            key = question.name, row["run"], row["commit"], on, command(row)
            runs.setdefault(key, {"question": question.name, "on": on, **row, "skipped": ""})
    lines = [
        f"{on}. {text(device)}; CPU threads: {threads}; {text(versions)}; {text(built)}"
        for (device, threads, versions, built), on in systems.items()
    ]
    columns = [
        label("question", "rows of"),
        label("run"),
        label("commit"),
        label("on"),
        Column("command", lambda row: f"`{command(row)}`".replace("|", "\\|"), measured=False),
    ]
    return [*lines, "", *table(runs.values(), columns)]


# Questions.


def ceilings(results: Results) -> list[str]:
    def rate(row: Row) -> str:
        unit = "GB/s" if row["rival"] == COPY else "GFLOP/s"
        return f"{of('rate', 1e-9)(row)} {unit}"

    found = results.rows(CEILINGS)
    what = Column("of", name, measured=False)
    return table(found, [label("dtype"), *_where(found), what, Column("rate", rate), MS])


def _of_copy(row: Row) -> str:
    over_copy = number(row, f"over_{COPY}")
    return show(None if over_copy is None else 1 / over_copy, ".0%")


OPERATION = [  # what is measured of rivals in turns with a copy
    PASS,
    NAME,
    MS,
    OVER_NATIVE,
    Column("of the copy", _of_copy),
    Column("bytes / floor", share("moved_bytes", "floor_bytes", ".2f")),
    PEAK,
    Column("extra, of X", share("extra_bytes", "x_bytes", ".1%")),
]


def _folded(groups: dict[str, list[Row]], columns: list[Column]) -> list[str]:
    """A table for each title, folded."""
    lines = []
    for title, found in groups.items():
        lines += ["<details>", f"<summary>{text(title)}</summary>", ""]
        lines += [*table(found, columns), "", "</details>"]
    return lines


def op(results: Results) -> list[str]:
    """A table, folded, for each dtype, layout, kind of factors and environment.

    Above them what a GPU has to reach.
    """
    groups: dict[str, list[Row]] = {}
    for (_, dtype, layout, factors, _, environment), found in results.figures(OP).items():
        title = f"{dtype}, {layout}, {factors} factors{_under(environment)}"
        groups.setdefault(title, []).extend(found)
    lines = _late(results, OP)
    plain = results.plain(OP)
    if plain and not results.cpu:
        lines += targets.table(targets.targets(plain.values(), results.plain(HOST).values()))
        lines.append("")
    return [*lines, *_folded(groups, [SHAPE, *OPERATION])]


def factorizers(results: Results) -> list[str]:
    """A table, folded, for each dtype, layout and environment, below what has to be reached."""
    groups: dict[str, list[Row]] = {}
    for key, found in results.figures(FACTORIZERS).items():
        _, _, _, dtype, layout, _, environment = key
        # What one operator reads again and again inside is not counted as moved.
        shown = [row | {"moved_bytes": ""} if row["rival"] in load.OURS else row for row in found]
        groups.setdefault(f"{dtype}, {layout}{_under(environment)}", []).extend(shown)
    if not groups:
        return []
    required = targets.table(
        targets.factorizers(results.plain(FACTORIZERS), results.earlier(FACTORIZERS), results.cpu)
    )
    lines = [*_late(results, FACTORIZERS), *required, ""]
    return [*lines, *_folded(groups, [SHAPE, METHOD, *OPERATION])]


def _late(results: Results, question: Question) -> list[str]:
    """Calls of a GPU in whose time the host's own may be."""
    figures = [load.measured(found) for found in results.figures(question).values()]
    late = sum(number(found[0], "late") or 0 for found in figures if found)
    calls = sum(number(row, "rounds") or 0 for found in figures for row in found)
    words = f"{late:.0f} of {calls:.0f} calls were not queued when the GPU came to them."
    return [words, ""] if late else []


def host(results: Results) -> list[str]:
    found = results.rows(HOST)
    columns = [
        SHAPE,
        label("dtype"),
        label("mode"),
        *_where(found),
        NAME,
        Column("us", of("median_s", 1e6)),
        Column("time / eager", of(f"over_{EAGER}", form=".2f")),
    ]
    return table(found, columns)


def attention(results: Results) -> list[str]:
    found = results.rows(ATTENTION)
    columns = [label("operation"), SHAPE, label("dtype"), label("layout"), PASS, *_where(found)]
    columns += [Column("lines", name, measured=False), MS, over(MFOPS)]
    return table(found, columns)


def contexts(results: Results) -> list[str]:
    columns = [label("size"), PASS, CONTEXT, SETTING, MS, over("aspp"), over("em")]
    columns += [PARAMETERS, GFLOPS, PEAK]
    groups: dict[str, list[Row]] = {}
    for key, found in results.figures(CONTEXTS).items():
        in_channels, out_channels, _, batch, dtype, _, environment = key
        title = f"{in_channels} to {out_channels} channels, batch {batch}, {dtype}"
        groups.setdefault(title + _under(environment), []).extend(found)
    return titled({title: table(found, columns) for title, found in groups.items()})


def models(results: Results) -> list[str]:
    columns = [PASS, NETWORK, label("input"), SETTING, PARAMETERS]
    columns += [Column("GFLOPs / image", GFLOPS.cell), MS]
    columns += [Column("images/s", of("images_per_s")), over("deeplabv3plus"), over("emanet"), PEAK]
    return _whole_networks(results, MODELS, columns)


def backends(results: Results) -> list[str]:
    columns = [label("network"), PASS, Column("backend", name, measured=False), SETTING, MS]
    return _whole_networks(results, BACKENDS, [*columns, over(MFOPS), PEAK])


def _whole_networks(results: Results, question: Question, columns: list[Column]) -> list[str]:
    groups: dict[str, list[Row]] = {}
    for (backbone, size, batch, dtype, *_, environment), found in results.figures(question).items():
        title = f"{backbone}, {size}, batch {batch}, {dtype}{_under(environment)}"
        groups.setdefault(title, []).extend(found)
    return titled({title: table(found, columns) for title, found in groups.items()})


def training_title(key: tuple[str, ...]) -> str:
    data, backbone, size, batch, precision, workers, environment = key
    words = f"{data}, {backbone}, {size}, batch {batch}, {precision}, loader workers: {workers}"
    return words + _under(environment)


def training(results: Results) -> list[str]:
    def part(column: str) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            whole = sum(number(row, c) or 0 for c in PARTS)
            value = number(row, column)
            return (
                "-" if value is None or not whole else f"{show(value * 1e3)} ({value / whole:.0%})"
            )

        return cell

    columns = [NETWORK, Column("images/s", of("images_per_s")), MS, over("deeplabv3plus")]
    columns += [Column(f"{title} ms", part(column)) for column, title in PARTS.items()]
    return titled(
        {
            training_title(key): table(found, columns)
            for key, found in results.figures(TRAINING).items()
        }
    )


def accuracy_titles(scores: Scores) -> dict[tuple[str, ...], str]:
    """What the training runs of a group have in common, and flags where only they differ."""

    def title(data: str, recipe: str, found: list[Score]) -> str:
        row = next((run for score in found for run in score.runs), None)
        of_runs = f", {row['backbone']}, {row['size']}, {row['epochs']} epochs" if row else ""
        return f"{data}, recipe {recipe}{of_runs}"

    def split(flags: str) -> list[str]:
        return re.split(r" (?=--)", flags)

    titles = {key: title(*key[:2], found) for key, found in scores.items()}
    told = {}
    for key, own in titles.items():
        alike = [split(flags) for (*_, flags), other in titles.items() if other == own]
        apart = [flag for flag in split(key[-1]) if not all(flag in flags for flags in alike)]
        told[key] = ", ".join(filter(None, [own, " ".join(apart)]))
    return told


def accuracy(results: Results, least: int = 1) -> list[str]:
    """Networks that were trained alike, where there are at least so many; variants of MFNet Light
    have tables of their own."""
    found = load.scores(results)
    shown = {key: load.networks(own) for key, own in found.items()}
    return _scores(found, {key: own for key, own in shown.items() if len(own) >= least})


def ablation(results: Results) -> list[str]:
    """MFNet Light with one part exchanged or left out, beside itself."""
    found = load.scores(results)
    return _scores(found, {key: load.variants(own) for key, own in found.items()})


def _scores(every: Scores, shown: Scores) -> list[str]:
    """Means and sample standard deviations over the seeds, of the last epoch.

    `every` has what `shown` is a part of: titles tell apart all that was trained.
    """

    def with_deviation(score: Score, column: str) -> str:
        return f"{score.mean(column):.3f} ({show(score.deviation(column), '.3f')})"

    over_bases = [f"over_{base}" for base in ACCURACY_COST.bases]

    def lines(score: Score) -> list[Row]:
        skips = [row | {"runs": f"seed {row['seed']}"} for row in score.skipped]
        if not score.runs:
            return skips
        cost = score.cost or {}
        cells = {
            "rival": score.rival,
            "runs": str(len(score.runs)),
            **{c: with_deviation(score, c) for c in ("mIoU", "fwIoU", "accuracy")},
            "parameters": score.runs[0]["parameters"],
            "flops": score.runs[0]["flops"],
            **{column: cost.get(column, "") for column in ("median_s", *over_bases)},
        }
        return [cells, *skips]

    shared = [
        Column("context or network", name, measured=False),
        label("runs"),
        *(
            Column(f"{title} (sd)", lambda row, column=column: row[column])
            for column, title in (("mIoU", "mIoU"), ("fwIoU", "fwIoU"), ("accuracy", "pixel acc."))
        ),
        PARAMETERS,
        GFLOPS,
    ]
    titles = accuracy_titles(every)
    tables = {}
    for key, found in shown.items():
        costs = [score.cost for score in found if score.cost]
        known = [b for b in ACCURACY_COST.bases if any(cost.get(f"over_{b}") for cost in costs)]
        latency = [Column("ms", of("median_s", 1e3)), *map(over, known[:1])] if costs else []
        tables[titles[key]] = table([row for s in found for row in lines(s)], [*shared, *latency])
    return titled({title: own for title, own in tables.items() if own})


def paper(results: Results) -> list[str]:
    """The paper's table beside what is counted here."""
    found = [
        row | dict(zip(("mIoU", "fwIoU", "printed"), map(str, PAPER[network]), strict=True))
        for network, row in load.paper_counts(results).items()
    ]
    scores = Column(
        "paper: mIoU / fwIoU", lambda row: f"{row['mIoU']} / {row['fwIoU']}", measured=False
    )
    printed = Column("paper: parameters", lambda row: f"{row['printed']} M", measured=False)
    counted = [
        Column("counted: parameters", PARAMETERS.cell),
        Column("counted: GFLOPs", GFLOPS.cell),
    ]
    return table(found, [NETWORK, scores, printed, *counted])
