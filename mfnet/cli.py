"""``mfnet fit|validate|test|predict``, on Lightning's CLI."""

from __future__ import annotations

import inspect
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from mfnet import from_checkpoint, help, report, run_directory
from mfnet.callbacks import ClassScores, RunRecord
from mfnet.checkpoint import CHECKPOINTS, RECORD, find_checkpoint, read_checkpoint
from mfnet.config import ConfigAction, RunConfig, expand_all, plain, shipped_configs
from mfnet.data import SegmentationDataModule
from mfnet.data.datamodule import CHANNELS
from mfnet.errors import NO_DATA, CommandLineError, chosen_by_user, explain, refusal, user_error
from mfnet.inference import TILE, Inference
from mfnet.monitors import EpochScores, MonitorCheck, check_callbacks
from mfnet.prediction_writer import PredictionWriter
from mfnet.pretrained import forget_starting_weights
from mfnet.sync_batchnorm import SyncBatchNormPlugin
from mfnet.task import SegmentationTask

MAX_EPOCHS = 50  # the paper's; Lightning's own default is 1000

# Python keeps one object for Union[int, float] and Union[float, int], so that of a flag 1, a batch,
# would become 1.0, all of them.
_TYPES = inspect.unwrap(L.Trainer.__init__).__annotations__
_TYPES.update({name: int | float | None for name in _TYPES if name.startswith("limit_")})
_TYPES["overfit_batches"] = int | float


class FunctionLinkParser(LightningArgumentParser):
    """Lets an argument be linked into a network that a function builds, not only a class.

    jsonargparse hands the names of linked arguments to functions' signatures as well, which
    (up to 4.53) take no such keyword.
    """

    def add_function_arguments(
        self, function: Any, *args: Any, linked_targets: Any = None, **kwargs: Any
    ) -> list[str]:
        return super().add_function_arguments(function, *args, **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Without the names of all the classes that an argument's value may have, 1400 lines."""
        return re.sub(r",\s+known\s+subclasses:[^)]*\)", ")", super().format_help(*args, **kwargs))


class MFNetCLI(LightningCLI):
    """Lightning's CLI for ``SegmentationTask`` and the data modules.

    A run lives in ``trainer.default_root_dir``; see ``mfnet.run_directory``. ``ckpt_path``
    takes a file, or ``best`` or ``last`` for those of that folder, and to evaluate or predict
    all that ``mfnet.load`` takes.

    Args:
        args: the command line; default: the process's.
        run: ``False`` builds ``trainer``, ``model`` and ``datamodule`` without a subcommand.
        model_class: the task, a subclass with more arguments or an optimizer of its own; see
            docs/training.md.
    """

    def __init__(
        self,
        args: Sequence[str] | None = None,
        run: bool = True,
        model_class: type[SegmentationTask] = SegmentationTask,
    ) -> None:
        arguments = sys.argv[1:] if args is None else list(args)
        self._command = arguments[0] if arguments else ""
        super().__init__(
            model_class,
            SegmentationDataModule,
            subclass_mode_data=True,
            save_config_callback=RunConfig,
            trainer_defaults={
                "log_every_n_steps": 1,  # all that is logged is logged once per epoch
                "sync_batchnorm": True,
                "use_distributed_sampler": False,  # the data modules bring their own
            },
            seed_everything_default=0,
            parser_kwargs={
                "prog": "mfnet",
                "description": "Semantic segmentation with factorized context.",
                "exit_on_error": False,
            },
            args=arguments,
            run=run,
            auto_configure_optimizers=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one on the command line alone: each has a parser that takes a while to build."""
        every = LightningCLI.subcommands()
        return {self._command: every[self._command]} if self._command in every else every

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = FunctionLinkParser(**kwargs, allow_abbrev=False)
        names = ", ".join(shipped_configs())
        parser.add_argument(
            "-c", "--config", action=ConfigAction, help=f"A YAML file, or one of: {names}."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults(
            {"model.network": {"class_path": "mfnet.create_model", "init_args": {"name": "mfnet"}}}
        )
        parser.add_lightning_class_args(PredictionWriter, "overlays")
        parser.set_defaults({"overlays.output": "predictions"})
        taken = vars(parser.get_defaults().model)
        if "optimizer" in taken:  # a task of one's own may not take them
            parser.add_optimizer_args((Optimizer,), link_to="model.optimizer")
        if "lr_scheduler" in taken:
            parser.add_lr_scheduler_args(link_to="model.lr_scheduler")
        links = [
            ("class_names", "class_names"),
            ("num_classes", "network.init_args.num_classes"),
            ("channels", "network.init_args.in_channels"),
        ]
        links += [("channels", "channels")] if "channels" in taken else []
        for source, target in links:
            parser.link_arguments(f"data.{source}", f"model.{target}", apply_on="instantiate")

    def setup_parser(self, add_subcommands: bool, *rest: Any) -> None:
        super().setup_parser(add_subcommands, *rest)
        if add_subcommands:
            for subcommand, parser in self._subcommand_parsers.items():
                if subcommand != "fit":
                    parser.add_class_arguments(Inference, as_group=True)
                if subcommand == "predict":
                    parser.set_defaults(
                        {
                            "data": {"class_path": from_checkpoint.PHOTOGRAPHS},
                            "tile": TILE,
                            "trainer.devices": 1,  # Lightning's wants an image for each GPU
                        }
                    )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = self._parsed(parser, args)
        if self.config.get("subcommand") not in (None, "fit"):
            self._take_from_checkpoint(parser, args, self.config.subcommand)

    def _parsed(self, parser: LightningArgumentParser, args: Any) -> Namespace:
        try:
            parsed = parser.parse_args(args)
        except CommandLineError:
            raise
        except ArgumentError as error:
            known = (
                getattr(self, "_subcommand_parsers", {}).get(self._command, parser).get_defaults()
            )
            flags = [f"--{key}" for key in vars(known.as_flat())] + help.nested_flags()
            raise CommandLineError(explain(str(error), flags, help.data_classes())) from None
        subcommand = parsed.get("subcommand")
        config = parsed[subcommand] if subcommand else parsed
        if config.data.class_path.rpartition(".")[2] == SegmentationDataModule.__name__:
            raise CommandLineError(NO_DATA)  # options of a data set, but no data set
        expand_all(config)
        _set_run_defaults(config)
        return parsed

    def _take_from_checkpoint(
        self, parser: LightningArgumentParser, args: Any, subcommand: str
    ) -> None:
        """Network and classes are the checkpoint's where flags and files do not tell them."""
        config = self.config[subcommand]
        folder = Path(config.trainer.default_root_dir)
        checkpoint = _find_checkpoint(config.ckpt_path, folder, subcommand)
        record = {} if checkpoint is None else read_checkpoint(checkpoint).get(RECORD, {})
        # Lightning on the states of callbacks, which matter to fit alone.
        for message in ("The dirpath has changed from", "Be aware that when using `ckpt_path`"):
            warnings.filterwarnings("ignore", message=message)
        if record:
            defaults = from_checkpoint.defaults(record, subcommand, config.data)
            self._parser(subcommand).set_defaults(defaults)
            given = config.model.network
            self.config = self._parsed(parser, args)
            config = self.config[subcommand]
            from_checkpoint.take_own_options(config.model.network, record, given)
            forget_starting_weights(config.model.network.get("init_args", Namespace()))
            if subcommand == "predict" and config.data.class_path.startswith("mfnet.data."):
                config.data = from_checkpoint.photographs(config.data, record)
            else:
                config.data = from_checkpoint.with_channels(config.data, record)
        config.ckpt_path = checkpoint

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise CommandLineError(f"--seed_everything: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Lightning's would let a checkpoint's hyperparameters override the command line."""

    def _add_instantiators(self) -> None:
        """Lightning's would write this command line's classes into every checkpoint.

        Its ``load_from_checkpoint_support=False`` does the same, but is not in Lightning 2.5.0.
        """

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
        asked = config.ckpt_path
        config.ckpt_path = _find_checkpoint(asked, folder, self.subcommand)
        if not config.trainer.fast_dev_run:
            _guard(folder, asked, config.ckpt_path)

    def instantiate_classes(self) -> None:
        _check_channels(self._get(self.config, "model").network, self._get(self.config, "data"))
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, KeyError) as error:
            if user_error(error) is not None or not chosen_by_user(error):
                raise
            raise CommandLineError(f"{refusal(error)} (MFNET_TRACEBACK=1 shows where)") from error
        own = type(self.model).configure_optimizers is not SegmentationTask.configure_optimizers
        for key in ("optimizer", "lr_scheduler"):
            if own and self._get(self.config, key):
                raise CommandLineError(
                    f"--{key}: expected none, as {type(self.model).__name__} configures its "
                    f"optimizer itself, got {self._get(self.config, key).class_path}"
                )
        if self._get(self.config, "ckpt_path") is not None:
            self.model.init_from = None  # which a continuation does not need
        told = plain(self._get(self.config, "model").network.as_dict())
        # A function of one's own may have changed what create_model made, which tells its options.
        if self.model.network_config is None or told["class_path"] != "mfnet.create_model":
            arguments = told.get("init_args", {})
            if "in_channels" in arguments:
                arguments["in_channels"] = self.model.channels
            self.model.network_config = told
        if self.subcommand not in (None, "fit"):
            config = self.config[self.subcommand]
            self.model.inference = Inference(*(config[field.name] for field in fields(Inference)))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        folder = Path(config.default_root_dir)
        for key in ("check_val_every_n_epoch", "accumulate_grad_batches"):  # Lightning divides by
            if config[key] is not None and config[key] < 1:
                raise CommandLineError(f"--trainer.{key}: expected at least 1, got {config[key]}")
        plugins = [*_as_list(config.plugins), run_directory.AtomicCheckpointIO()]
        if config.sync_batchnorm:
            plugins.append(SyncBatchNormPlugin())
        callbacks = _as_list(config.callbacks)
        check_callbacks(callbacks)
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str((folder / CHECKPOINTS).resolve())
        names = _network_names(self._get(self.config, "model").network)
        if config.barebones:  # Lightning refuses all that logs
            kwargs["log_every_n_steps"] = None
        else:
            callbacks += [RunRecord(*names, folder=folder), MonitorCheck(), EpochScores()]
        if self.subcommand in ("validate", "test"):
            checkpoint = self._get(self.config, "ckpt_path")
            # Weights are no run, and those in the package are not this user's alone.
            of_run = checkpoint is not None and Path(checkpoint).is_file()
            callbacks.append(ClassScores(run_directory.folder_of(checkpoint) if of_run else folder))
        if config.enable_checkpointing is not False and not config.barebones:
            callbacks += run_directory.checkpoint_callbacks(folder)
        logger = config.logger
        if self.subcommand not in (None, "fit") or config.barebones:
            logger = logger or False
        else:
            chosen = None if logger in (None, True) else _as_list(logger or None)
            logger = run_directory.loggers(folder, chosen)
        try:
            return super().instantiate_trainer(
                plugins=plugins, callbacks=callbacks, logger=logger, **kwargs
            )
        except (ValueError, TypeError, RuntimeError) as error:  # of what the flags ask for
            raise MisconfigurationException(f"trainer: {error}") from error

    def after_fit(self) -> None:
        """Say where the best checkpoint is."""
        folder = Path(self.trainer.default_root_dir)
        best = folder / CHECKPOINTS / "best.ckpt"
        trainer: Any = self.trainer
        if trainer.fast_dev_run or not trainer.is_global_zero or not best.is_file():
            return
        try:
            epoch, score = report.best_epoch(folder)
        except (OSError, ValueError) as error:  # a log that was cut short; the run is done
            rank_zero_warn(f"{error}")
            return
        print(f"best val/mIoU {score:.3f} in epoch {epoch}: {best}")


def _set_run_defaults(config: Namespace) -> None:
    """How long and where to train, where neither flags nor configuration say so."""
    trainer = config.trainer
    if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
        trainer.max_epochs = MAX_EPOCHS
    if trainer.default_root_dir is None:
        name, _ = _network_names(config.model.network)
        configs = [Path(str(path)) for path in config.get("config") or [] if path]
        parts = [path.stem for path in configs]
        if not configs or name != _name_in(configs):  # else two networks would share a folder
            parts.append(re.sub(r"[^\w.]+", "-", name).strip("-"))
        trainer.default_root_dir = os.path.join("runs", "-".join(parts))


def _name_in(configs: Sequence[Path]) -> str:
    """The network of the configurations by themselves; mfnet where they name none."""
    name = "mfnet"
    for path in configs:
        model = yaml.safe_load(path.read_text(encoding="utf-8")).get("model") or {}
        network = model.get("network")
        if isinstance(network, dict) and "class_path" in network:
            name, _ = _network_names(network)
    return name


def _guard(folder: Path, asked: str | None, checkpoint: str | None) -> None:
    """Let no run replace another one, its own continuation apart.

    ``last``, where there is no checkpoint at all, is a continuation from the beginning.
    """
    inside = checkpoint is not None and folder.resolve() in Path(checkpoint).resolve().parents
    if inside or (asked == "last" and not run_directory.has_checkpoints(folder)):
        return
    if run_directory.holds_run(folder):
        raise FileExistsError(
            f"'{folder}' holds a run already: continue it with --ckpt_path "
            f"{'best' if asked == 'last' else 'last'}, or choose another --trainer.default_root_dir"
        )
    if (folder / run_directory.CONFIG).exists():
        rank_zero_info(f"'{folder}': the run in it ended before its first epoch; starting anew")


def _find_checkpoint(path: str | None, folder: Path, subcommand: str) -> str | None:
    if path is None:
        if subcommand != "fit":
            rank_zero_warn("no --ckpt_path: the network is used as it was initialized")
        return None
    if path in ("best", "last"):
        file = Path(folder) / CHECKPOINTS / f"{path}.ckpt"
        if path == "last" and subcommand == "fit" and not file.is_file():
            # One command line can then start a job and, when it is run again, continue it.
            rank_zero_info(f"no '{file}' yet: starting from the beginning")
            return None
        if not file.is_file():
            raise FileNotFoundError(f"--ckpt_path {path}: no file '{file}'")
        return str(file)
    if subcommand != "fit":
        return str(find_checkpoint(path))
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"--ckpt_path: no file '{path}', which fit would continue; --model.init_from starts "
            "from a trained network"
        )
    return path


def _network_names(network: Any) -> tuple[str, str]:
    """Model and backbone, to be shown in reports."""
    arguments = network.get("init_args") or {}
    # A class of somebody else's may call other things so.
    words = {key: value for key, value in arguments.items() if isinstance(value, str)}
    name = words.get("name", network["class_path"].rpartition(".")[2])
    own = [f"{key} {words[key]}" for key in ("context", "factorizer") if key in words]
    if own:
        name = f"{name} ({', '.join(own)})"
    return name, words.get("backbone", "")


def _check_channels(network: Any, data: Any) -> None:
    """Refuse a number of channels that the data's, which the network gets, would replace."""
    asked = network.get("init_args", {}).get("in_channels", CHANNELS)
    if asked not in (CHANNELS, data.get("init_args", {}).get("channels")):
        raise CommandLineError(
            f"--model.network.in_channels {asked}: a network has as many channels as the images: "
            f"--data.channels {asked}"
        )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
