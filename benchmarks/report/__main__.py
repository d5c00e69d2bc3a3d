"""The page, its plots, and the marked parts of other documents, from the rows alone.

python -m benchmarks.report            # writes what differs
python -m benchmarks.report --check    # names what differs, and writes nothing
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.report import marked
from benchmarks.report.data import Results, load
from benchmarks.report.page import PICTURES, REGIONS, region
from benchmarks.report.plots import PLOTS, Picture, digest_in, picture
from benchmarks.rows import ROOT
from mfnet.files import atomic_write


def wanted(root: Path, machines: list[Results]) -> dict[Path, str | Picture]:
    """What every file should hold, by its path from the root."""
    files: dict[Path, str | Picture] = {}
    for results in machines:
        for plot in PLOTS:
            if found := picture(plot, results):
                files[PICTURES / f"{results.machine}-{plot}.png"] = found
    for path in sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")]):
        document = path.relative_to(root)
        files[document] = rewritten(root, document, machines)
    return files


def rewritten(root: Path, document: Path, machines: list[Results]) -> str:
    """The document's text with its regions as the rows give them."""
    regions = {which: partial(region, which, document, machines) for which in ("page", *REGIONS)}
    text = (root / document).read_text(encoding="utf-8")
    return marked.rewrite(document, text, "benchmarks", regions)


def differing(root: Path, files: dict[Path, str | Picture]) -> Iterator[Path]:
    """Files that are not as wanted, and plots of ours that no rows ask for any more."""
    for path, content in files.items():
        here = root / path
        if isinstance(content, Picture):
            same = digest_in(here) == content.digest()
        else:
            same = here.read_text(encoding="utf-8") == content
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
    with atomic_write(path) as partial_file:
        if isinstance(content, Picture):
            content.save(partial_file)
        else:
            partial_file.write_text(content, encoding="utf-8")


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
