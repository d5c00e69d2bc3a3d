"""Imports run one way: no module reaches itself, lazy imports inside of functions included."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mfops", "mfnet", "benchmarks")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")
}


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST) -> Iterator[str]:
    """The modules of ours that a tree imports; those that types alone need are left out."""
    for node in ast.iter_child_nodes(tree):
        if is_for_types(node):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module
        else:
            yield from imports(node)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_circles(package: str) -> None:
    graph = {
        name: set(imports(ast.parse(path.read_text("utf-8"))))
        for name, path in MODULES.items()
        if name.split(".")[0] == package
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle
    assert set(order) >= set(graph)


@pytest.mark.parametrize(("package", "above"), [("mfops", ("mfnet", "benchmarks")),
                                                ("mfnet", ("benchmarks",))])  # fmt: skip
def test_a_package_knows_nothing_of_those_above(package: str, above: tuple[str, ...]) -> None:
    for name, path in MODULES.items():
        if name.split(".")[0] == package:
            found = imports(ast.parse(path.read_text("utf-8")))
            assert not [other for other in found if other.split(".")[0] in above], name
