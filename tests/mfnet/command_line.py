"""What tests of the command line share: flags of a run that takes seconds, and a user's errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from mfnet.__main__ import main

RESNET = "--model.network.backbone=resnet18"
# The smallest network that there is.
CONV = ["--model.network=torch.nn.Conv2d", "--model.network.in_channels=3",
        "--model.network.out_channels=5", "--model.network.kernel_size=1"]  # fmt: skip


def flags(root: Path, run: str | Path, *more: str) -> list[str]:
    """One epoch in batches of two, on the data in ``root``, into the folder ``run``."""
    return [
        "--data=VOCFolder", f"--data.root={root}", "--data.crop_size=33", "--data.batch_size=2",
        "--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        *([f"--trainer.default_root_dir={run}"] if run else []), *more,
    ]  # fmt: skip


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that a user error ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code in (1, 2)
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    errors = [line for line in stderr.splitlines() if line.startswith("mfnet: error: ")]
    assert len(errors) == 1
    assert stderr.splitlines()[-1] == errors[0]
    return errors[0]
