from __future__ import annotations

import argparse
import sys
from pathlib import Path

import benchmarks.machine_code
from benchmarks.machine_code.kernels import ARCH
from benchmarks.machine_code.table import DOCUMENT, table
from benchmarks.report.marked import rewrite
from benchmarks.rows import ROOT
from mfnet.files import atomic_write


def builds() -> list[Path]:
    """Extensions in the tree; those for the running Python first."""
    ours = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    return sorted((ROOT / "mfops").glob("_C.*.so"), key=lambda path: ours not in path.name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.machine_code", description=benchmarks.machine_code.__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing, fail where it would")
    parser.add_argument("--build", type=Path, help="the extension, or a cubin; mfops/_C*.so")
    options = parser.parse_args(arguments)
    try:
        build = options.build or next(iter(builds()), None)
        if build is None:
            raise LookupError("mfops has no extension: run make install")
        path = ROOT / DOCUMENT
        before = path.read_text(encoding="utf-8")
        after = rewrite(DOCUMENT, before, "machine code", {ARCH: lambda: table(build)})
    except (LookupError, OSError, ValueError) as error:
        print(f"benchmarks.machine_code: {error}", file=sys.stderr)
        return 1
    if after == before:
        return 0
    if options.check:
        print(f"benchmarks.machine_code: {DOCUMENT} is not what the build gives", file=sys.stderr)
        return 1
    with atomic_write(path) as partial:
        partial.write_text(after, encoding="utf-8")
    print(DOCUMENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
