"""The command line, ``mfnet`` or ``python -m mfnet``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from mfnet import installation


def main(args: Sequence[str] | None = None) -> None:
    """Entry point; ``args`` are the process's by default."""
    try:
        # Here rather than above: a missing package ends in one line, too.
        run = import_module("mfnet.commands").run
    except ModuleNotFoundError as error:
        sys.exit(f"mfnet: error: {installation(error)}")
    run(sys.argv[1:] if args is None else list(args))


if __name__ == "__main__":
    main()
