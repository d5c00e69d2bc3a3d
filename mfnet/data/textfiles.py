"""Small text files as people write them: lists of classes and of images."""

from __future__ import annotations

import codecs
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

MAX_CLASSES = 255  # 255 itself is the label that is ignored

_NUMBERED = re.compile(r"(\d+)\s*([:=,;.)]|\s)\s*(\S.*)")
_LINE_END = re.compile(r"\r\n|\r|\n")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Line(NamedTuple):
    """A line's number, from 1, and what it says."""

    number: int
    text: str


def read_lines(path: Path) -> list[Line]:
    """The lines of a text file, less blank ones and comments (``#``), in Unicode's composed form.

    UTF-8, or UTF-16 with a byte-order mark; line ends of any system.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: other text; the message names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    raw = path.read_bytes()
    encoding = "utf-16" if raw.startswith(_UTF16) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        bad = len(_LINE_END.split(raw[: error.start].decode("latin-1")))
        raise ValueError(
            f"{path}, line {bad}: expected UTF-8 text, got byte 0x{raw[error.start]:02x}; "
            "save the file as UTF-8"
        ) from error
    lines = []
    for number, written in enumerate(_LINE_END.split(text), start=1):
        if "\0" in written:
            raise ValueError(
                f"{path}, line {number}: expected text, got a zero byte; save the file as UTF-8"
            )
        line = unicodedata.normalize("NFC", written.strip())
        if line and not line.startswith("#"):
            lines.append(Line(number, line))
    return lines


def read_class_names(path: Path) -> list[str]:
    """Class names, one per line, in the order of the class indices.

    All lines may be numbered, as in ``0: sky`` or ``0 sky``, if the numbers are 0, 1, 2, ...

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not 2 to 255 different names, or numbers that are not in order; the message
            names file and line.
    """
    lines = read_lines(path)
    if not 2 <= len(lines) <= MAX_CLASSES:
        raise ValueError(
            f"{path}: expected 2 to {MAX_CLASSES} class names, one per line (the background is a "
            f"class, too), got {len(lines)}"
        )
    lines = _without_numbers(path, lines)
    seen: dict[str, int] = {}
    for number, name in lines:
        if name in seen:
            raise ValueError(
                f"{path}, line {number}: expected different names, got '{name}' as in line "
                f"{seen[name]}"
            )
        seen[name] = number
    return list(seen)


def _without_numbers(path: Path, lines: list[Line]) -> list[Line]:
    found = [_NUMBERED.fullmatch(line.text) for line in lines]
    # A name may begin with a number; with a colon behind it, the number is an index.
    numbered = all(found) or any(match and match[2] in ":=" for match in found)
    if not numbered:
        return lines
    names = []
    for index, (line, match) in enumerate(zip(lines, found, strict=True)):
        if match is None or int(match[1]) != index:
            raise ValueError(
                f"{path}, line {line.number}: expected number {index} in a numbered list of "
                f"classes (0, 1, 2, ...), got '{line.text}'"
            )
        names.append(Line(line.number, match[3]))
    return names
