"""``mfnet demo``: MFNet learns on generated images, and leaves pictures of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mfnet.checkpoint import CHECKPOINTS
from mfnet.cli import MFNetCLI
from mfnet.report import report
from mfnet.run_directory import METRICS


def main(arguments: Sequence[str] = ()) -> None:
    """Train with the configuration ``demo``, print the scores before and after, draw the report.

    A demo that is there already is replaced.

    Args:
        arguments: flags of ``mfnet fit``, which override the configuration.
    """
    cli = MFNetCLI(["--config", "demo", *arguments], run=False)
    folder = Path(cli.trainer.default_root_dir)
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
