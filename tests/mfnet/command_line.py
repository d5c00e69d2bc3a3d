"""What tests of the command line share: flags of a run that takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mfnet.__main__ import main

Fails = Callable[..., str]  # the fixture

RESNET = "--model.network.backbone=test_resnet"  # timm's smallest
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


# What every command but fit is run with.
CPU = ["--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def predict(checkpoint: str | Path, images: str | Path, output: Path, *more: str) -> None:
    main([
        "predict", *more, f"--ckpt_path={checkpoint}", f"--data.predict_images={images}", *CPU,
        f"--overlays.output={output}",
    ])  # fmt: skip
