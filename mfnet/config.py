"""Configurations: those in the package, ``--config``, ``~`` in their paths, a run's record."""

from __future__ import annotations

import json
import os
from enum import Enum
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ActionConfigFile, Namespace
from jsonargparse.typing import register_type
from lightning.pytorch.cli import SaveConfigCallback

from mfnet.errors import CommandLineError
from mfnet.files import atomic_write
from mfnet.run_directory import CONFIG, holds_run

PREDICT_IMAGES = "--data.predict_images"
# What Lightning's callbacks have among their defaults, for config.yaml.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_str(value.name))
register_type(torch.device)


def shipped_configs() -> dict[str, Path]:
    """The configurations inside the package, by name."""
    folder = Path(str(resources.files("mfnet"))) / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


class ConfigAction(ActionConfigFile):
    """``--config`` with a path or the name of a configuration in the package."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        shipped = shipped_configs()
        path = Path(expand_home(values))
        if not path.is_file():
            if values not in shipped:
                raise FileNotFoundError(
                    f"--config: no file '{values}', and none of the shipped "
                    f"configurations: {', '.join(shipped)}"
                )
            path = shipped[values]
        _check_yaml(path)
        super().__call__(parser, cfg, str(path), option_string)
        if path.name == CONFIG and holds_run(path.parent):
            # What it recorded is where the run was before it was moved or copied.
            cfg["trainer.default_root_dir"] = str(path.parent)


def _check_yaml(path: Path) -> None:
    """jsonargparse's errors name neither the file nor its line."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise CommandLineError(f"--config {path}: expected YAML, got binary data") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise CommandLineError(f"--config {path}{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise CommandLineError(f"--config {path}: expected YAML: {error}") from None
    if not isinstance(content, dict):
        got = "none" if content is None else repr(content)
        raise CommandLineError(f"--config {path}: expected lines 'name: value', got {got}")


def with_image_list(arguments: list[str]) -> list[str]:
    """``--data.predict_images a.jpg b.jpg``, which a shell makes of ``*.jpg``, with a list."""
    if PREDICT_IMAGES not in arguments:
        return arguments
    start = arguments.index(PREDICT_IMAGES) + 1
    images = list(takewhile(lambda word: not word.startswith("-"), arguments[start:]))
    if len(images) < 2 and not all(Path(image).exists() for image in images):
        return arguments  # a glob, or a list already
    return [*arguments[:start], json.dumps(images), *arguments[start + len(images) :]]


def expand_home(path: str) -> str:
    """``~`` and ``~user`` at the start of a path, as a shell expands them.

    Raises:
        ValueError: there is no home directory, so that a folder named ``~`` would be made.
    """
    expanded = os.path.expanduser(path)
    if expanded == "~" or expanded.startswith("~/"):
        raise ValueError(f"'{path}': expected a home directory for ~, but HOME is not set")
    return expanded


def expand_all(value: Any) -> Any:
    """Expand every string that begins with ``~``, at any depth; containers in place.

    Before anything is made of the configuration and before it is recorded: libraries that expand
    it themselves, and those that do not, then mean one folder.
    """
    if isinstance(value, str):
        return expand_home(value) if value.startswith("~") else value
    if isinstance(value, Path):
        return Path(expand_all(str(value)))
    if isinstance(value, list):
        value[:] = map(expand_all, value)
    items = vars(value) if isinstance(value, Namespace) else value
    if isinstance(items, dict):
        items.update({key: expand_all(item) for key, item in items.items()})
    return value


def plain(value: Any) -> Any:
    """``value`` with enums, at any depth, as their names: a checkpoint is read without classes."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


class RunConfig(SaveConfigCallback):
    """Save the configuration in the run's folder; Lightning's goes where the logger logs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        config = self.config.clone()
        if "ckpt_path" in config:
            config.ckpt_path = None  # what this run went on from; another is to begin by itself
        with atomic_write(Path(trainer.default_root_dir) / CONFIG) as partial:
            partial.write_text(self.parser.dump(config, skip_none=False), encoding="utf-8")
