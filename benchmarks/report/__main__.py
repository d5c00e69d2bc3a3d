"""The page, its plots, and the marked parts of other documents, from the rows alone.

python -m benchmarks.report            # writes what differs
python -m benchmarks.report --check    # names what differs, and writes nothing
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import tables
from benchmarks.report.load import Results, load
from benchmarks.report.plots import PLOTS, Picture, digest_in
from benchmarks.report.regions import PAGE, PICTURES, image, rewrite
from benchmarks.rows import ROOT
from mfnet.files import written_whole

INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks.report` from the rows in `benchmarks/results`: new rows change it,
nothing else. How they are measured is in [benchmarks/README.md](../benchmarks/README.md).

Times are medians, with quartiles in brackets; "time / X" is the median over the rounds of the time
over that of X in the same round. MiB are what a call adds to memory at most, its results included.
GFLOPs are of convolutions and matrix products, a multiply-add counted as two.
"""


@dataclass(frozen=True)
class Section:
    """A question's part of a machine's page."""

    title: str
    note: str
    lines: Callable[[Results], list[str]]
    plot: str = ""


SECTIONS = (
    Section("Where the rows are from", "", tables.sources),
    Section(
        "Ceilings",
        "What the machine does at most: a copy of memory far larger than the caches, bytes read "
        "and bytes written together, and a product of square matrices.",
        tables.ceilings,
    ),
    Section(
        "The op",
        'The copy moves as many bytes as the pass has to; "of the copy" is its time over the '
        "rival's. The floor of bytes is each input read once and each output written once; beside "
        "it the bytes of all operators' tensors. Extra memory holds neither results nor gradients.",
        tables.op,
        "roofline",
    ),
    Section(
        "Factorizers",
        "From X to X' = Y Z by the methods that find the factors on each image, T rounds. mfops's "
        "figures include the reconstruction error, which the published lines do not compute. "
        "Floor, bytes and extra memory as above; the floor reads X once, whatever T is. mfops "
        "reads it in every round and once more, inside one operator: its bytes are not counted. "
        "With backward: the gradient of X' that reaches X, nmf's alone.",
        tables.factorizers,
        "factorizers",
    ),
    Section("Host", "Microseconds from call to return, on small tensors.", tables.host),
    Section(
        "Gather and distribute",
        "mfops's lines are products around a softmax; an attention is one kernel. The shape is "
        "(batch, channels, K, pixels).",
        tables.attention,
    ),
    Section(
        "Contexts",
        "A context module on the features it has in a network: 33x33 are those of a 513x513 image "
        "at stride 16, 65x65 those at stride 8. FLOPs are those of the forward pass. Rows of "
        "commits before e80c96d have MF at 65x65 resample coefficients of 33x33 in every pass.",
        tables.contexts,
        "contexts",
    ),
    Section("Networks", "Whole networks, on images.", tables.models, "models"),
    Section(
        "Networks, with and without kernels",
        "The same network with its factors on mfops's automatic backend, and on the reference: "
        "lines of PyTorch. Neither is compiled.",
        tables.backends,
    ),
    Section(
        "Training",
        "Steps of the trainer. The parts are from a run of their own, in which each waits for the "
        "device; percentages are of their sum.",
        tables.training,
        "training",
    ),
    Section(
        "Accuracy",
        "Networks trained under one recipe, scored on whole validation images, shown once, after "
        "the last epoch: mean and standard deviation over the seeds. The time is that of a forward "
        "pass, batch 1, at the size of the validation images.",
        tables.accuracy,
        "pareto",
    ),
    Section(
        "MFNet Light, a part at a time",
        "Each row is MFNet Light with one part exchanged or left out (benchmarks/variants.py), "
        "trained and scored as above.",
        tables.ablation,
    ),
    Section(
        "The paper's Figure 6",
        "The paper's scores and parameters beside what is counted here, of one 513x513 image. The "
        "scores have not been reproduced.",
        tables.paper,
        "paper",
    ),
)


def page(machines: list[Results]) -> str:
    blocks = [INTRODUCTION.strip()]
    for results in machines:
        blocks.append(f"## {results.machine}")
        missing = []
        for section in SECTIONS:
            picture = PLOTS[section.plot](results) if section.plot else None
            if body := section.lines(results):
                blocks += [f"### {section.title}", "\n".join(tables.paragraph(section.note))]
                if isinstance(picture, Picture):
                    blocks.append(image(picture, results, section.plot, PAGE))
                blocks.append("\n".join(body))
            else:
                missing.append(f"- {section.title}: no rows yet")
            if isinstance(picture, str):
                missing.append(f"- the plot '{section.plot}' needs rows of {picture}")
        if missing:
            blocks += ["### Not here yet", "\n".join(missing)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def wanted(root: Path, machines: list[Results]) -> dict[Path, str | Picture]:
    """What every file should hold, by its path from the root."""
    files: dict[Path, str | Picture] = {PAGE: page(machines)}
    for results in machines:
        for plot, draw in PLOTS.items():
            if isinstance(picture := draw(results), Picture):
                files[PICTURES / f"{results.machine}-{plot}.png"] = picture
    for path in sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")]):
        document = path.relative_to(root)
        if document != PAGE:
            text = path.read_text(encoding="utf-8")
            files[document] = rewrite(document, text, machines)
    return files


def differing(root: Path, files: dict[Path, str | Picture]) -> Iterator[Path]:
    """Files that are not as wanted, and plots of ours that no rows ask for any more."""
    for path, content in files.items():
        here = root / path
        if isinstance(content, Picture):
            same = digest_in(here) == content.digest()
        else:
            same = here.is_file() and here.read_text(encoding="utf-8") == content
        if not same:
            yield path
    for here in sorted((root / PICTURES).glob("*.png")):
        path = here.relative_to(root)
        if path not in files and digest_in(here):
            yield path


def write(path: Path, content: str | Picture | None) -> None:
    if content is None:
        path.unlink()
        return
    with written_whole(path) as partial:
        if isinstance(content, Picture):
            content.save(partial)
        else:
            partial.write_text(content, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing, fail where it would")
    parser.add_argument("--root", type=Path, default=ROOT, help="holds README.md and docs")
    parser.add_argument("--results", type=Path, help="the rows; benchmarks/results in the root")
    options = parser.parse_args(arguments)
    root, results = options.root, options.results or options.root / "benchmarks" / "results"
    try:
        machines = load(results)
        if not machines:
            raise ValueError(f"no rows in {results}: run make bench first")
        files = wanted(root, machines)
        paths = list(differing(root, files))
        for path in paths:
            if options.check:
                print(f"benchmarks.report: {path} is not what the rows give", file=sys.stderr)
            else:
                write(root / path, files.get(path))
                print(path)
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    return 1 if options.check and paths else 0


if __name__ == "__main__":
    sys.exit(main())
