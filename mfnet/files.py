"""Writing files so that a reader never meets half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def refuse_to_replace(source: str | Path, output: Path) -> None:
    """Raise ``ValueError`` where ``output`` is the source itself, by whatever path."""
    if output.exists() and output.samefile(source):
        raise ValueError(f"{output}: expected another file than what it is made of, {source}")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and rename it to ``path`` once the block succeeds.

    The folder is created. When the block (or the disk) fails, the temporary file is removed and
    what stood at ``path`` before stays; an ``OSError`` without a file name gets ``path``. The
    suffix is kept, since writers choose a format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.filename is None:  # a full disk is reported without the file
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
