"""From the numbers or colors of a stored mask to class indices, and a record of what occurs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from mfnet.constants import IGNORE_INDEX
from mfnet.data.files import DataError, StoredMask, packed_colors
from mfnet.data.voc import Palette, pascal_palette

IGNORE = "ignore"
OTHER = "other"

Key = int | str

_UNLISTED = -1
_NO_COLOR = -1  # of a number outside its palette
_SHOWN = 8  # values named in an error
_JPEG = " (JPEG changes labels at the edges: save masks as PNG)"


class LabelEntries:
    """What ``label_map`` was given: a mapping, or the path of a YAML or JSON file that holds one.

    A class of its own so that the command line keeps the entries, not the path, in its record.
    """

    def __init__(self, source: Mapping[Key, Key] | str | Path) -> None:
        self.source = source

    def read(self) -> dict[Key, Key]:
        """The entries, as they were written.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no mapping.
        """
        entries: Any = self.source
        name = "label_map"
        if isinstance(entries, str | Path):
            file = Path(entries).expanduser()
            name = f"label_map: {file}"
            if not file.is_file():
                raise FileNotFoundError(
                    f"{name}: no such file; a mapping is written '{{0: 0, 255: 1}}'"
                )
            try:
                entries = yaml.safe_load(file.read_bytes())
            except (yaml.YAMLError, UnicodeError) as error:
                raise ValueError(f"{name}: cannot read as YAML: {error}") from error
        if not isinstance(entries, Mapping) or not entries:
            raise ValueError(
                f"{name}: expected entries like '255: 1' or '\"#ff0000\": road' (in quotes, as # "
                f"begins a comment), got {entries!r}"
            )
        return dict(entries)


with suppress(ImportError):  # only the command line needs it
    from jsonargparse.typing import register_type

    register_type(LabelEntries, serializer=LabelEntries.read, deserializer=LabelEntries)


class LabelMap:
    """Turns the numbers or the colors of a mask into class indices.

    Keys are all numbers, or all colors (``"#ff0000"`` or ``"255,0,0"``), and values a class index,
    a class name, or ``ignore``. What a mask holds and no key names is refused, unless there is a
    key ``other``. Numbers apply to palette, gray, bilevel, 16 and 32-bit masks; colors to RGB and
    RGBA masks, to palette masks by their palettes and to gray ones, whose number v is v, v, v.

    Args:
        entries: the mapping.
        class_names: the classes, in the order of their indices.

    Raises:
        ValueError: a key or value is none of these, or keys contradict each other.
    """

    def __init__(self, entries: Mapping[Key, Key], class_names: Sequence[str]) -> None:
        self._other = _UNLISTED
        numbers: dict[int, int] = {}
        colors: dict[int, int] = {}
        for key, value in entries.items():
            label = _label(key, value, class_names)
            if key == OTHER:
                self._other = label
                continue
            kind, code = _parse_key(key)
            codes = colors if kind == "color" else numbers
            if codes.setdefault(code, label) != label:
                raise ValueError(f"label_map: {kind} {key!r} is listed twice, for two classes")
        if bool(numbers) == bool(colors):
            raise ValueError(
                f"label_map: expected keys that are all numbers or all colors, got {[*entries]}"
            )
        self.by_color = bool(colors)
        listed = sorted((colors or numbers).items())
        self._codes = np.array([code for code, _ in listed], dtype=np.int32 if colors else np.int64)
        self._labels = np.array([label for _, label in listed], dtype=np.int16)

    def __call__(self, mask: StoredMask) -> NDArray[np.uint8]:
        """Class indices uint8 (H, W), 255 where ignored.

        Raises:
            DataError: the mask holds what is not listed, or numbers where colors are listed, or
                the reverse.
        """
        codes = _codes(mask, self.by_color)
        if codes is None:
            listed, got = ("colors", "numbers") if self.by_color else ("numbers", "colors")
            others = _codes(mask, not self.by_color)
            assert others is not None  # a mask has numbers or colors
            found = _describe(others, mask, not self.by_color)
            raise DataError(
                f"{mask.path}: expected {listed}, as label_map lists {listed}, got a mask of mode "
                f"{mask.mode} with {got} {found}"
            )
        labels = self._look_up(codes)
        unlisted = labels == _UNLISTED
        if unlisted.any():
            raise DataError(
                f"{mask.path}: label_map does not list "
                f"{_describe(codes, mask, self.by_color, unlisted)}; give each its class or "
                f"'{IGNORE}', or say with '{OTHER}' what all that is not listed is"
            )
        if mask.jpeg:
            # By folder, so that it is said once.
            warnings.warn(f"{mask.path.parent}: masks are JPEGs{_JPEG}", stacklevel=2)
        return labels.astype(np.uint8)

    def palette(self, stored: Palette, num_classes: int) -> Palette:
        """A color for each class: its first one in the map or, where the map lists numbers, that
        of its first number in a mask's palette ``stored``; PASCAL's where there is none."""
        result = pascal_palette(num_classes)
        listed = zip(self._codes.tolist(), self._labels.tolist(), strict=True)
        for code, label in reversed(list(listed)):
            if label == IGNORE_INDEX:
                continue
            if self.by_color:
                result[label] = (code >> 16, code >> 8 & 255, code & 255)
            elif 0 <= code < len(stored):
                result[label] = stored[code]
        return result

    def _look_up(self, codes: NDArray[Any]) -> NDArray[np.int16]:
        if codes.dtype.itemsize <= 2:  # a table of all there can be is quicker
            return self._search(np.arange(256**codes.dtype.itemsize))[codes]
        return self._search(codes)

    def _search(self, codes: NDArray[Any]) -> NDArray[np.int16]:
        places = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        return np.where(self._codes[places] == codes, self._labels[places], self._other)


def to_labels(
    mask: StoredMask, num_classes: int, label_map: LabelMap | None = None
) -> NDArray[np.uint8]:
    """Class indices uint8 (H, W), 255 where ignored: what ``label_map`` makes of the mask, else its
    own numbers.

    Raises:
        DataError: the mask does not fit; the message says how a label map would say what it means.
    """
    if label_map is not None:
        return label_map(mask)
    codes = _codes(mask, colors=False)
    if codes is None:
        codes = packed_colors(mask.pixels)
        raise DataError(
            f"{mask.path}: expected a palette (P) or gray (L) mask of class indices, got mode "
            f"{mask.mode} with colors {_describe(codes, mask, True)}; say what each color is, "
            f"a class or '{IGNORE}': {_flag(codes, True)}"
        )
    if mask.jpeg:
        raise DataError(f"{mask.path}: expected class indices, got a JPEG{_JPEG}")
    wrong = (codes < 0) | ((codes >= num_classes) & (codes != IGNORE_INDEX))
    if wrong.any():
        values = np.unique(codes[wrong]).tolist()
        more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
        hint = _flag(codes, False)
        if values == [num_classes]:
            shifted = f"{{0: {IGNORE}, 1: 0, 2: 1, ...}}"
            hint += f" (if 0 is unlabeled and the classes begin with 1: '{shifted}')"
        raise DataError(
            f"{mask.path}: expected labels 0 to {num_classes - 1} or {IGNORE_INDEX}, "
            f"got {values[:_SHOWN]}{more}; say what each number is, a class or '{IGNORE}': {hint}"
        )
    return codes.astype(np.uint8)


def _label(key: Key, value: Key, class_names: Sequence[str]) -> int:
    names = list(class_names)
    if value == IGNORE:
        return IGNORE_INDEX
    if value in names:
        return names.index(value)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if type(value) is int and (0 <= value < len(names) or value == IGNORE_INDEX):
        return value
    raise ValueError(
        f"label_map: {key!r}: expected a class index (0 to {len(names) - 1}), the name of a class, "
        f"or {IGNORE_INDEX} or '{IGNORE}', got {value!r}"
    )


def _parse_key(key: Key) -> tuple[str, int]:
    """``("number", n)`` or ``("color", 0xrrggbb)``."""
    text = str(key).strip() if type(key) in (int, str) else ""
    # Digits in a string too: JSON has no other keys than strings.
    if re.fullmatch(r"-?[0-9]+", text) and abs(int(text)) < 2**32:
        return "number", int(text)
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return "color", int(text[1:], 16)
    channels = re.fullmatch(r"([0-9]{1,3})\s*,\s*([0-9]{1,3})\s*,\s*([0-9]{1,3})", text)
    if channels and max(map(int, channels.groups())) <= 255:
        red, green, blue = map(int, channels.groups())
        return "color", red << 16 | green << 8 | blue
    raise ValueError(
        f'label_map: expected as keys numbers (255), colors in quotes ("#ff0000", '
        f"\"255,0,0\") or '{OTHER}', got {key!r}"
    )


def _codes(mask: StoredMask, colors: bool) -> NDArray[Any] | None:
    """The pixels (H, W) as packed colors or as numbers; None if the mask has no such thing."""
    if mask.pixels.ndim == 3:
        return packed_colors(mask.pixels) if colors else None
    if not colors:
        return mask.pixels
    if mask.palette is not None:
        table = np.full(256, _NO_COLOR, np.int32)
        table[: len(mask.palette)] = packed_colors(mask.palette)
        return table[mask.pixels]
    if mask.pixels.dtype == np.uint8:
        return mask.pixels * np.int32(0xFFFFFF if mask.mode == "1" else 0x010101)
    return None


def _found(codes: NDArray[Any], colors: bool) -> tuple[list[str], NDArray[np.intp]]:
    """Numbers or packed colors, as a label map writes them, and their counts, largest first."""
    values, counts = np.unique(codes, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    written = '"#{:06x}"' if colors else "{}"
    names = [written.format(v) if v >= 0 or not colors else "no color" for v in values[order]]
    return names, counts[order]


def _describe(
    codes: NDArray[Any],
    mask: StoredMask,
    colors: bool,
    where: NDArray[np.bool_] | None = None,
) -> str:
    """What is found, with shares of the mask: ``"#000000" (61 %), "#ff0000" (39 %)``."""
    found, counts = _found(codes if where is None else codes[where], colors)
    shares = 100 * counts / codes.size
    shown = ", ".join(f"{f} ({s:.3g} %)" for f, s in zip(found[:_SHOWN], shares, strict=False))
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"{shown}{more}{_JPEG if mask.jpeg else ''}"


def _flag(codes: NDArray[Any], colors: bool) -> str:
    """The flag to fill in."""
    found = _found(codes, colors)[0] if colors else np.unique(codes).tolist()
    more = ", ..." if len(found) > _SHOWN else ""
    entries = ", ".join(f"{name}: ..." for name in found[:_SHOWN])
    return f"--data.label_map '{{{entries}{more}}}'"
