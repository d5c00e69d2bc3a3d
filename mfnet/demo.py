"""``mfnet demo``: MFNet learns on generated images, and leaves pictures of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from mfnet.checkpoint import CHECKPOINTS
from mfnet.cli import MFNetCLI
from mfnet.report import report
from mfnet.run_directory import CONFIG, METRICS, holds_run


def main(arguments: Sequence[str] = ()) -> None:
    """Train with the configuration ``demo``, print the scores before and after, draw the report.

    A demo that is there already is replaced.

    Args:
        arguments: flags of ``mfnet fit``, which override the configuration.

    Raises:
        FileExistsError: the folder holds a run that is no demo.
    """
    cli = MFNetCLI(["--config", "demo", *arguments], run=False)
    folder = Path(cli.trainer.default_root_dir)
    if holds_run(folder) and not _holds_demo(folder, cli.config.data.class_path):
        raise FileExistsError(
            f"'{folder}' holds a run that is no demo: choose another --trainer.default_root_dir"
        )
    (folder / METRICS).unlink(missing_ok=True)  # the log of a new run goes on with what is there
    best = folder / CHECKPOINTS / "best.ckpt"

    before = _validate(cli)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    after = _validate(cli, best)
    report([folder], folder)

    print(f"\n{'held-out images':<20}{'before':>10}{'after':>10}")
    for name, value in after.items():
        print(f"{name.removeprefix('val/'):<20}{before[name]:>10.3f}{value:>10.3f}")
    print(f"\nwritten: {folder}/predictions.png, {folder}/curves.png, {best}")


def _holds_demo(folder: Path, data: str) -> bool:
    """Whether the run there is on generated images, too."""
    config = folder / CONFIG
    told = yaml.safe_load(config.read_text("utf-8")) if config.is_file() else {}
    return bool(told.get("data", {}).get("class_path") == data)


def _validate(cli: MFNetCLI, checkpoint: Path | None = None) -> dict[str, float]:
    trainer = cli.trainer
    loggers, trainer.loggers = trainer.loggers, []  # these scores belong to no epoch of the run
    try:
        (scores,) = trainer.validate(
            cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, verbose=False
        )
        return dict(scores)
    finally:
        trainer.loggers = loggers
