"""``mfnet fit|validate|test|predict|demo|report``: the command line, on Lightning's CLI."""

from __future__ import annotations

import json
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from tqdm import tqdm

from mfnet import from_checkpoint, run_directory
from mfnet.callbacks import OverlayWriter, RunRecord
from mfnet.data import DataError, SegmentationDataModule
from mfnet.from_checkpoint import PHOTOGRAPHS
from mfnet.sync_batchnorm import SyncBatchNormPlugin
from mfnet.task import SegmentationTask

PREDICT_IMAGES = "--data.predict_images"
SIGTERM_EXIT = 143  # 128 + SIGTERM, as a shell reports it

# Lightning's own use of torch, and what is meant to be when a run is resumed.
NOISE = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"Checkpoint directory .* exists and is not empty",
)

EPILOG = """\
mfnet demo: train a small network on generated images and show what it learned.
mfnet report RUN...: curves, predictions and a table from the folders of finished runs.
"""


def shipped_configs() -> dict[str, Path]:
    """The configurations inside the package, by name."""
    folder = Path(str(resources.files("mfnet"))) / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


class ConfigAction(ActionConfigFile):
    """``--config`` with a path or the name of a configuration in the package."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        shipped = shipped_configs()
        if not Path(values).is_file():
            if values not in shipped:
                raise FileNotFoundError(
                    f"--config: no file '{values}', and none of the shipped "
                    f"configurations: {', '.join(shipped)}"
                )
            values = str(shipped[values])
        super().__call__(parser, cfg, values, option_string)


class FunctionLinkParser(LightningArgumentParser):
    """Lets an argument be linked into a network that a function builds, not only a class.

    jsonargparse hands the names of linked arguments to functions' signatures as well, which
    (up to 4.53) take no such keyword.
    """

    def add_function_arguments(
        self, function: Any, *args: Any, linked_targets: Any = None, **kwargs: Any
    ) -> list[str]:
        return super().add_function_arguments(function, *args, **kwargs)


class MFNetCLI(LightningCLI):
    """Lightning's CLI for :class:`SegmentationTask` and the data modules.

    A run lives in ``trainer.default_root_dir``; see :mod:`mfnet.run_directory`. ``ckpt_path``
    takes a file, or ``best`` or ``last`` for those of that folder.

    Args:
        args: the command line; default: the process's.
        run: ``False`` builds ``trainer``, ``model`` and ``datamodule`` without a subcommand.
    """

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        super().__init__(
            SegmentationTask,
            SegmentationDataModule,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "default_root_dir": "runs/mfnet",
                "log_every_n_steps": 1,  # all that is logged is logged once per epoch
                "sync_batchnorm": True,
                "use_distributed_sampler": False,  # the data modules bring their own
            },
            seed_everything_default=0,
            parser_kwargs={
                "prog": "mfnet",
                "description": "Semantic segmentation with factorized context.",
                "epilog": EPILOG,
                "exit_on_error": False,
            },
            args=None if args is None else list(args),
            run=run,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = FunctionLinkParser(**kwargs)
        names = ", ".join(shipped_configs())
        parser.add_argument(
            "-c", "--config", action=ConfigAction, help=f"A YAML file, or one of: {names}."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults(
            {"model.network": {"class_path": "mfnet.create_model", "init_args": {"name": "mfnet"}}}
        )
        parser.add_lightning_class_args(OverlayWriter, "overlays")
        parser.set_defaults({"overlays.output": "predictions"})
        parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")
        parser.link_arguments(
            "data.num_classes", "model.network.init_args.num_classes", apply_on="instantiate"
        )

    def setup_parser(self, add_subcommands: bool, *rest: Any) -> None:
        super().setup_parser(add_subcommands, *rest)
        if add_subcommands:
            self._parser("predict").set_defaults({"data": {"class_path": PHOTOGRAPHS}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        if self.config.get("subcommand") not in (None, "fit"):
            self._take_from_checkpoint(parser, args, self.config.subcommand)

    def _take_from_checkpoint(
        self, parser: LightningArgumentParser, args: Any, subcommand: str
    ) -> None:
        """Network and classes are the checkpoint's where flags and files do not tell them."""
        config = self.config[subcommand]
        checkpoint = _find_checkpoint(config.ckpt_path, config.trainer.default_root_dir, subcommand)
        record = {} if checkpoint is None else run_directory.read_record(checkpoint)
        if record:
            self._parser(subcommand).set_defaults(from_checkpoint.defaults(record, subcommand))
            self.config = parser.parse_args(args)
            config = self.config[subcommand]
            from_checkpoint.without_starting_weights(config.model.network)
            if subcommand == "predict" and config.data.class_path.startswith("mfnet.data."):
                config.data = from_checkpoint.photographs(config.data, record)
        config.ckpt_path = checkpoint

    def _parse_ckpt_path(self) -> None:
        """Lightning's would let a checkpoint's hyperparameters override the command line."""

    def before_instantiate_classes(self) -> None:
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        folder = Path(config.trainer.default_root_dir)
        if self.subcommand == "predict":  # what the overlays show need not be kept in memory
            config.return_predictions = bool(config.return_predictions)
        if self.subcommand != "fit":
            self.save_config_callback = None
            return
        config.ckpt_path = _find_checkpoint(config.ckpt_path, folder, self.subcommand)
        old_run = config.ckpt_path is None and (folder / run_directory.CONFIG).exists()
        if old_run and not config.trainer.fast_dev_run:
            raise FileExistsError(
                f"'{folder}' holds a run already: continue it with --ckpt_path last, "
                "or choose another --trainer.default_root_dir"
            )

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        network = self._get(self.config, "model").network
        self.model.network_config = network.as_dict()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        folder = Path(config.default_root_dir)
        plugins = [*_as_list(config.plugins), run_directory.WholeFileCheckpointIO()]
        if config.sync_batchnorm:
            plugins.append(SyncBatchNormPlugin())
        names = _network_names(self._get(self.config, "model").network)
        callbacks = [*_as_list(config.callbacks), RunRecord(*names)]
        if config.enable_checkpointing is not False:
            callbacks += run_directory.checkpoint_callbacks(folder)
        logger = config.logger
        if self.subcommand not in (None, "fit"):
            logger = logger or False
        elif logger in (None, True):
            logger = run_directory.loggers(folder)
        return super().instantiate_trainer(
            plugins=plugins, callbacks=callbacks, logger=logger, **kwargs
        )


def main(args: Sequence[str] | None = None) -> None:
    """Entry point. User errors end in one line on stderr; MFNET_TRACEBACK=1 shows where from."""
    arguments = sys.argv[1:] if args is None else list(args)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    try:
        _dispatch(arguments)
    except SIGTERMException:
        _say("stopped by SIGTERM; --ckpt_path last continues")
        sys.exit(SIGTERM_EXIT)
    except Exception as error:
        if _origin(error) == "jsonargparse" and isinstance(error.__cause__, Exception):
            error = error.__cause__  # what a class said when jsonargparse constructed it
        if os.environ.get("MFNET_TRACEBACK") or not _is_user_error(error):
            raise
        _say(f"error: {' '.join(str(error).split())}")
        sys.exit(2 if isinstance(error, ArgumentError) else 1)


def _dispatch(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command == "demo":
        from mfnet import demo

        demo.main(arguments[1:])
    elif command == "report":
        from mfnet import report

        report.main(arguments[1:])
    else:
        MFNetCLI(_with_image_list(arguments) or [command])


def _with_image_list(arguments: list[str]) -> list[str]:
    """``--data.predict_images a.jpg b.jpg``, which a shell makes of ``*.jpg``, with a list."""
    if PREDICT_IMAGES not in arguments:
        return arguments
    start = arguments.index(PREDICT_IMAGES) + 1
    images = list(takewhile(lambda word: not word.startswith("-"), arguments[start:]))
    if len(images) < 2 and not all(Path(image).exists() for image in images):
        return arguments  # a glob, or a list already
    return [*arguments[:start], json.dumps(images), *arguments[start + len(images) :]]


def _say(message: str) -> None:
    tqdm.write(f"mfnet: {message}", file=sys.stderr)  # on a line of its own, bars or not


def _find_checkpoint(path: str | None, folder: str | Path, subcommand: str) -> str | None:
    if path is None:
        if subcommand != "fit":
            rank_zero_warn("no --ckpt_path: the network is used as it was initialised")
        return None
    file = Path(path)
    if subcommand != "fit" and file.is_dir():  # a run's folder
        file = file / run_directory.CHECKPOINTS / "best.ckpt"
    if path in ("best", "last"):
        file = Path(folder) / run_directory.CHECKPOINTS / f"{path}.ckpt"
        if path == "last" and subcommand == "fit" and not file.is_file():
            # One command line can then start a job and, when it is run again, continue it.
            rank_zero_info(f"no '{file}' yet: starting from the beginning")
            return None
    if not file.is_file():
        raise FileNotFoundError(f"--ckpt_path: no file '{file}'")
    return str(file)


def _network_names(network: Any) -> tuple[str, str]:
    """Model and backbone, to be shown in reports."""
    arguments = network.get("init_args", {})
    name = arguments.get("name", network.class_path.rpartition(".")[2])
    own = [f"{key} {arguments[key]}" for key in ("context", "factorizer") if arguments.get(key)]
    if own:
        name = f"{name} ({', '.join(own)})"
    return name, arguments.get("backbone", "")


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _is_user_error(error: Exception) -> bool:
    """Whether the input is at fault: files, arguments, and what mfnet or mfops refuse.

    A ``ValueError`` or ``TypeError`` raised elsewhere is a bug, and keeps its traceback.
    """
    if isinstance(error, (OSError, ArgumentError, MisconfigurationException, DataError)):
        return True
    return isinstance(error, (ValueError, TypeError)) and _origin(error) in ("mfnet", "mfops")


def _origin(error: Exception) -> str:
    """The package that raised the error."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame.tb_frame.f_globals["__name__"].partition(".")[0] if frame else ""
