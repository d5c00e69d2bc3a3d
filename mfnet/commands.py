"""What ``mfnet`` does with its command line: which command it is, and what is said of errors."""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import import_module

from lightning.pytorch.utilities.exceptions import SIGTERMException
from tqdm import tqdm

from mfnet import help
from mfnet.checkpoint import shipped_networks
from mfnet.cli import MAX_EPOCHS, MFNetCLI
from mfnet.config import shipped_configs, with_image_list
from mfnet.errors import CommandLineError, user_error

SIGTERM_EXIT = 143  # 128 + SIGTERM, as a shell reports it

# Lightning's own use of torch, and what is meant to be when a run is resumed.
NOISE = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"Checkpoint directory .* exists and is not empty",
)

# Commands that are not Lightning's: modules of their names, imported where they are called.
_OTHERS = ("demo", "report", "export", "video")


def run(arguments: Sequence[str]) -> None:
    """User errors end in one line on stderr; MFNET_TRACEBACK=1 shows where from."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    try:
        _dispatch(*arguments or ["--help"])
    except SIGTERMException:
        continues = "; --ckpt_path last continues" if arguments[0] == "fit" else ""
        _say(f"stopped by SIGTERM{continues}")
        sys.exit(SIGTERM_EXIT)
    except Exception as error:
        said = user_error(error)
        if os.environ.get("MFNET_TRACEBACK") or said is None:
            raise
        _say(f"error: {said}")
        sys.exit(2 if isinstance(error, ArgumentError) else 1)


def _dispatch(command: str, *rest: str) -> None:
    text = _information(command, rest)
    if text is not None:
        print(text)
        sys.exit(0)
    if command.startswith("-"):
        raise CommandLineError(f"expected a command first, got {command}: mfnet fit {command} ...")
    flags = ["--help" if argument == "--help_all" else argument for argument in rest]
    if command in _OTHERS:
        import_module(f"mfnet.{command}").main(flags)
    else:
        MFNetCLI([command, *with_image_list(flags)])


def _information(command: str, rest: Sequence[str]) -> str | None:
    if command in ("-h", "--help"):
        return help.COMMANDS
    if command == "--version":
        return help.versions()
    if command in help.SUMMARIES and not {"-h", "--help"}.isdisjoint(rest):
        return help.screen(command, [*shipped_configs()], [*shipped_networks()], MAX_EPOCHS)
    if command in help.SUMMARIES and rest[-1:] == ("--model.network.help",):
        return help.network_options()
    return None


def _say(message: str) -> None:
    tqdm.write(f"mfnet: {message}", file=sys.stderr)  # on a line of its own, bars or not
