"""Parts of documents that a command writes, between two lines that stay where they are:

<!-- benchmarks: op -->
<!-- end benchmarks -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path


def rewrite(
    document: Path, before: str, kind: str, regions: Mapping[str, Callable[[], list[str]]]
) -> str:
    """The document's text with the regions of a kind, such as "benchmarks", as `regions` have them.

    Raises:
        ValueError: a region has no end or no beginning, or none has its name.
    """
    head, end = re.compile(f"<!-- {kind}: (.*) -->"), f"<!-- end {kind} -->"
    after: list[str] = []
    begun = ""
    fenced = False
    for count, line in enumerate(before.splitlines(keepends=True), start=1):
        fenced ^= line.startswith("```") and not begun
        start = None if fenced else head.fullmatch(line.rstrip("\n"))
        ends = not fenced and line.rstrip("\n") == end
        if (start and begun) or (ends and not begun):
            raise ValueError(f"{document}, line {count}: expected no '{line.strip()}' here")
        if start:
            begun = start[1]
            if begun not in regions:
                known = ", ".join(regions)
                raise ValueError(f"{document}, line {count}: no region '{begun}': one of {known}")
            after += [line, "\n", *(f"{own}\n" for own in regions[begun]()), "\n"]
        if ends:
            begun = ""
        if not begun:
            after.append(line)
    if begun:
        raise ValueError(f"{document}: the region '{begun}' has no '{end}'")
    return "".join(after)
