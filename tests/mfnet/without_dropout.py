"""Trainings without dropout, whose draws differ between ranks, as they should, and validations.

A script, since Lightning starts it anew for each further rank.
"""

import json
import sys
from pathlib import Path

from torch import nn

from mfnet.cli import MFNetCLI


def train(arguments: list[str]) -> None:
    """Flags of ``mfnet fit``; the scores go to ``scores.json`` in the run's folder."""
    cli = MFNetCLI(arguments, run=False)
    for module in cli.model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    scores = cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    if cli.trainer.is_global_zero:
        Path(cli.trainer.default_root_dir, "scores.json").write_text(json.dumps(scores[0]))


if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        train(arguments)
