"""What a user error is, and the one line that is said about it."""

from __future__ import annotations

import difflib
import inspect
import pydoc
import re
import traceback
from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mfnet.data import DataError

EXAMPLE = "--data VOCFolder --data.root DIR"
NO_DATA = f"no data: give --config NAME, --config RUN/config.yaml or {EXAMPLE}"
LONGEST = 400  # characters of a message that nobody here foresaw

# What Lightning checks with errors of other kinds, though the user's configuration is at fault.
_LIGHTNING = ("Early stopping conditioned on metric", "`val_check_interval` (")

# jsonargparse's accounts, of versions 4.52 and 4.53.
_MISSING = r"arguments are required: ([\w.]+)"
_UNKNOWN = r"unrecognized arguments: (.*)|[Oo]ption '(.+?)'"
_NO_CLASS = (
    r"dot import path string: (\S+)|class_path '(\S+)':\s+(?:No module|module '|cannot import)"
)
_REFUSED = r"given class_path '(\S+)':\s*(.*?)\s*- Expected a <class 'NoneType'>"


class CommandLineError(ArgumentError):
    """The command line cannot be understood; ``str(error)`` is the one line to print."""

    def __init__(self, message: str) -> None:
        super().__init__(None, message)


def user_error(error: BaseException | None) -> str | None:
    """What to say of an error that the user's input caused; ``None`` for a bug of the program.

    Files, arguments, and what mfnet or mfops refuse. A ``ValueError`` or ``TypeError`` raised
    elsewhere is a bug, and keeps its traceback. What a class said when jsonargparse constructed it
    is behind jsonargparse's own account of it.
    """
    while error is not None:
        if _is_user_error(error):
            own = _origin(error) in ("mfnet", "mfops")  # whose messages are as long as they need
            return " ".join(str(error).split()) if own else _one_line(str(error))
        error = error.__cause__ if _origin(error) == "jsonargparse" else None
    return None


def chosen_by_user(error: BaseException) -> bool:
    """Whether a class that is none of mfnet's refused what it was constructed with.

    Its arguments are the user's, whatever kind of error it raises.
    """
    return not any(name.startswith("mfnet.") and name != "mfnet.cli" for name in _modules(error))


def explain(message: str, flags: Sequence[str], classes: Sequence[str]) -> str:
    """jsonargparse's account of a wrong command line, in a line that says what to write instead.

    Args:
        message: the account.
        flags: all flags there are, ``--a.b``.
        classes: the names of the data sets.
    """
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    key = ".".join(keys)
    prefix = f"{key}." if key else ""
    if found := re.search(_MISSING, message):
        missing = found[1]
        if missing.rpartition(".")[2] == "data":
            return NO_DATA
        example = f"; for example {EXAMPLE}" if key == "data" else ""
        return f"--{prefix}{missing} is missing{example}"
    if found := re.search(_UNKNOWN, message):
        given = (found[1] or f"--{prefix}{found[2]}").split()[0].partition("=")[0]
        if not given.startswith("-"):
            return f"'{given}' belongs to no flag; a configuration is given as --config {given}"
        if "class_path 'mfnet.data.SegmentationDataModule'" in message:
            return f"{given}: of which data? {NO_DATA}"
        return (
            f"unknown argument {given}{_did_you_mean(given, [*_own_flags(message, key), *flags])}"
        )
    if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
        near = _nearest(found[1], found[2].replace("'", "").split(", "))
        hint = f": did you mean {near[0]}?" if near else "; mfnet --help lists them"
        return f"unknown command '{found[1]}'{hint}"
    number = "Expected a <class 'float'>" in message  # or a tensor, for what torch.optim calls lr
    if (found := re.search(_NO_CLASS, message)) and not number:
        known = f", or one of {', '.join(classes)}" if key == "data" else ""
        near = _nearest((found[1] or found[2]).rpartition(".")[2], classes)
        hint = f"; did you mean {near[0]}?" if near and key == "data" else ""
        if key == "model.network":
            hint = "; create_model's networks are chosen by --model.network.name"
        return f"--{key}: no class '{found[1] or found[2]}': expected a class path{known}{hint}"
    expected = [
        re.sub(r"typing\.Literal\[(.+)\]|<class '(\w+)'>", r"\1\2", kind)
        for kind in re.findall(r"Expected an? (.+?)(?:\. Got value.*)?$", message, re.M)
        if not any(words in kind for words in ("NoneType", "path but", "path string"))
    ]
    found = re.search(r"(?:Given value|Got value): (?!NestedArg)(.*)", message)
    if found and expected:
        kinds = " or ".join(dict.fromkeys(expected)).replace(
            "<class 'collections.abc.Sequence'>", f"a list, for instance [{found[1]}]"
        )
        return f"--{key}: expected {kinds}, got {found[1]}"
    return _one_line(message)


def refusal(error: Exception) -> str:
    """What a class said of its arguments, without jsonargparse's account of an optional one."""
    said = str(error.args[0]) if error.args else type(error).__name__
    found = re.search(_REFUSED, said, re.DOTALL)
    return f"{found[1]}: {found[2] or 'it refuses its arguments'}" if found else said


def _own_flags(message: str, key: str) -> list[str]:
    """The arguments of the class that does not accept one."""
    found = re.search(r"class_path '([\w.]+)'", message)
    kind: Any = pydoc.locate(found[1]) if found else None
    return [f"--{key}.{name}" for name in inspect.signature(kind).parameters] if kind else []


def _did_you_mean(flag: str, flags: Sequence[str]) -> str:
    """Flags of the same name elsewhere, of a name that ends so, or written much alike."""
    name = flag.lstrip("-").rpartition(".")[2]
    ends = [known for known in flags if re.search(rf"[-._]{re.escape(name)}$", known)]
    near = ends or _nearest(flag, flags, 0.8)
    if not near:
        names = {known.rpartition(".")[2].lstrip("-"): known for known in flags}
        near = [names[known] for known in _nearest(name, list(names), 0.7)]
    near = [known for known in dict.fromkeys(near) if known != flag][:3]
    return f": did you mean {' or '.join(near)}?" if near else "; --help names the usual ones"


def _nearest(name: str, known: Sequence[str], cutoff: float = 0.6) -> list[str]:
    return difflib.get_close_matches(name, known, 2, cutoff)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def _is_user_error(error: BaseException) -> bool:
    if isinstance(error, (CommandLineError, OSError, MisconfigurationException, DataError)):
        return True
    if isinstance(error, (RuntimeError, ValueError)) and str(error).strip().startswith(_LIGHTNING):
        return True
    if isinstance(error, ImportError):  # an optional package of Lightning's is not installed
        return _origin(error).startswith("lightning")
    return isinstance(error, (ValueError, TypeError)) and _origin(error) in ("mfnet", "mfops")


def _origin(error: BaseException) -> str:
    """The package that raised the error."""
    *_, last = ["", *_modules(error)]
    return last.partition(".")[0]


def _modules(error: BaseException) -> list[str]:
    """Those that the error has passed, the one that raised it last."""
    frames = traceback.walk_tb(error.__traceback__)
    return [frame.f_globals.get("__name__", "") for frame, _ in frames]
