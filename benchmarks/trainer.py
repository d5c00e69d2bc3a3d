"""What the benchmarks about training share: mfnet's own trainer, set up by its command line."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from torch import nn

from benchmarks.networks import SMP_NETWORKS, smp
from benchmarks.schema import VARIANT
from benchmarks.variants import VARIANTS, variant
from mfnet.backbone import HIGH_STRIDE
from mfnet.contexts import CONTEXTS
from mfnet.models import list_models

if TYPE_CHECKING:
    from mfnet.cli import MFNetCLI


# Networks that functions of this package build, of a name.
BUILT: dict[str, tuple[Callable[..., nn.Module], str]] = {
    **{f"smp {name}": (smp, name) for name in SMP_NETWORKS},
    **{f"{VARIANT}{name}": (variant, name) for name in VARIANTS},
}


@dataclass(frozen=True)
class Recipe:
    """A data set, a configuration of mfnet's, and flags that override it.

    `data` is the folder and `name` what rows call it.
    """

    data: str
    name: str
    config: str
    flags: str

    @classmethod
    def of(cls, options: Any) -> Recipe:
        """That of the suite's options; skips a test where they name no data."""
        if options.data is None:
            pytest.skip("no --data: no data set to train on")
        return cls(str(options.data), options.data.resolve().name, options.recipe, options.fit)

    def columns(self) -> dict[str, Any]:
        return {"data": self.name, "recipe": self.config, "flags": self.flags}

    def arguments(self, network: str) -> list[str]:
        """Flags of `mfnet fit`, for a network or a context in the network of DeepLabV3+."""
        common = ["--config", self.config, "--data.root", self.data, *shlex.split(self.flags)]
        if network in BUILT:
            build, name = BUILT[network]
            path = f"{build.__module__}.{build.__name__}"
            return [*common, "--model.network", path, "--model.network.name", name]
        if network in list_models():
            return [*common, "--model.network.name", network]
        named = ["--model.network.name", "deeplabv3plus", "--model.network.context", network]
        if network == "mf":  # its coefficients belong to one grid: that of the training crops
            height, width = parsed(common).datamodule.crop_size
            grid = [-(-height // HIGH_STRIDE), -(-width // HIGH_STRIDE)]
            named += ["--model.network.context_size", str(grid)]
        return [*common, *named]


def parsed(arguments: list[str]) -> MFNetCLI:
    """Trainer, task and data module of a command line, nothing run and nothing written.

    Raises:
        ModuleNotFoundError: what the command line needs is not installed (jsonargparse).
    """
    quiet = {
        "logger": "false",
        "enable_checkpointing": "false",
        "enable_progress_bar": "false",
        "enable_model_summary": "false",
        "limit_val_batches": "0",
    }
    flags = [word for name, value in quiet.items() for word in (f"--trainer.{name}", value)]
    return importlib.import_module("mfnet.cli").MFNetCLI([*arguments, *flags], run=False)


def check_names(names: list[str]) -> None:
    """Raises `pytest.UsageError` for what is neither a context nor a network."""
    known = [*CONTEXTS, *list_models(), *BUILT]
    for name in names:
        if name not in known:
            raise pytest.UsageError(f"--contexts: unknown '{name}': choose from {', '.join(known)}")
