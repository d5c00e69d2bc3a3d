"""``mfnet demo`` from end to end, in miniature."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import RESNET

from mfnet.__main__ import main


def test_a_run_that_is_no_demo_is_not_replaced(
    tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "run" / "metrics.csv"
    log.parent.mkdir()
    log.write_text("epoch,val/mIoU\n")
    error = fails(["demo", f"--trainer.default_root_dir={log.parent}"])
    assert f"'{log.parent}' holds a run that is no demo" in error
    assert log.is_file()


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    flags = [
        f"--trainer.default_root_dir={folder}", f"--data.cache_dir={tmp_path}", "--data.train=4",
        "--data.val=2", "--data.size=33", "--data.crop_size=33", "--data.batch_size=2", RESNET,
        "--trainer.accelerator=cpu", "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    for _ in range(2):  # the second replaces the first
        main(["demo", *flags])
        for name in ("predictions.png", "curves.png", "metrics.csv"):
            assert (folder / name).is_file()
        best = folder / "checkpoints" / "best.ckpt"
        assert "state_dict" in torch.load(best, weights_only=True)
        rows = (folder / "metrics.csv").read_text().splitlines()
        assert len(rows) == 1 + 2  # a header; validation and training

        table = dict(
            (line.split()[0], [float(word) for word in line.split()[1:]])
            for line in capsys.readouterr().out.splitlines()
            if len(line.split()) == 3 and line.split()[0] in ("mIoU", "fwIoU", "accuracy")
        )
        assert set(table) == {"mIoU", "fwIoU", "accuracy"}
        for before, after in table.values():
            assert 0 <= before <= 1
            assert 0 <= after <= 1
