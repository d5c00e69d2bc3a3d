"""The command line: configurations, a run's life, and one line for every user error."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from command_line import RESNET, Fails, flags
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mfnet.__main__ import main
from mfnet.cli import MFNetCLI
from mfnet.commands import SIGTERM_EXIT
from mfnet.config import shipped_configs
from mfnet.task import SegmentationTask


@pytest.fixture
def broken(images: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(images, tmp_path / "broken"))


def small(root: Path, run: Path) -> list[str]:
    """Flags for one epoch of two steps, on the data in ``root``, into the folder ``run``."""
    return ["--config=camvid", *flags(root, run, "--seed_everything=1", RESNET)]


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["fit", *small(images, folder)])
    return folder


def test_shipped_configs() -> None:
    named = {"camvid_light", "voc_light", "paper_voc", "modern_voc", "camvid", "demo"}
    assert set(shipped_configs()) == named


def test_paper_config_is_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "paper_voc", "--data.batch_size", "3", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    data, model = config["data"]["init_args"], config["model"]
    assert (data["recipe"], data["crop_size"], data["batch_size"]) == ("paper", 513, 3)
    assert config["trainer"]["max_epochs"] == 50
    # Of a loss that is not divided by the batch: test_paper_recipe compares the steps.
    assert (model["backbone_lr"], model["head_lr"], model["power"]) == (0.007 / 4, 0.07 / 4, 0.9)
    assert (model["momentum"], model["weight_decay"]) == (0.9, 4 * 5e-4)
    assert model["network"]["init_args"]["multi_grid"] == [2, 4, 8]
    assert model["parameter_groups"] == "published"
    assert (model["reconstruction_weight"], model["reconstruction_warmup"]) == (0.1, 10)


@pytest.mark.parametrize(
    ("config", "choice"),
    [
        *((config, "name=mfnet") for config in ("paper_voc", "modern_voc", "camvid", "demo")),
        *((config, "name=mfnet_light") for config in ("camvid_light", "voc_light")),
        ("demo", "factorizer=em"),
        ("demo", "context=encoding"),
        ("demo", "name=emanet"),
        ("demo", "dict_kwargs.rank=3"),
    ],
)
def test_shipped_configs_train(config: str, choice: str, images: Path, tmp_path: Path) -> None:
    flags = ["--data.root", str(images)]
    if config.endswith("voc"):
        (tmp_path / "VOCdevkit").mkdir()
        (tmp_path / "VOCdevkit" / "VOC2012").symlink_to(images)
        flags = ["--data.root", str(tmp_path), "--model.network.backbone_weights", "null"]
    elif config.endswith("light"):
        flags += ["--model.network.backbone_weights", "null"]
    elif config == "demo":
        flags = ["--data.cache_dir", str(tmp_path), "--data.train=2", "--data.val=1"]
    main([
        "fit", "--config", config, *flags,
        f"--model.network.{choice}", RESNET,
        "--data.crop_size=33", "--data.batch_size=2", "--data.num_workers=0",
        "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}",
    ])  # fmt: skip


def test_a_run_leaves_its_record(run: Path) -> None:
    for name in ("config.yaml", "metrics.csv", "summary.json", "samples.npz"):
        assert (run / name).is_file()
    assert list(run.glob("events.out.tfevents.*"))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_validate_repeats_the_runs_score(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    main(["validate", "--config", str(run / "config.yaml"), "--ckpt_path", "best"])
    table = capsys.readouterr().out
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["callbacks"]
    score = next(state["best_model_score"] for key, state in best.items() if "val/mIoU" in key)
    printed = next(line.split()[1] for line in table.splitlines() if "val/mIoU" in line)
    assert float(printed) == pytest.approx(float(score))
    (run / "scores-val.csv").unlink()  # all that it writes
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == files


def test_unknown_backend(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    monkeypatch.setattr("mfops.backends._explicit", "abacus")  # as MFOPS_BACKEND sets it
    assert "'abacus'" in fails(["fit", *small(images, tmp_path / "run")])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file(workers: int, broken: Path, fails: Fails) -> None:
    file = broken / "JPEGImages" / "val_00000.jpg"
    file.write_bytes(_half(file))
    flags = [*small(broken, broken / "run"), f"--data.num_workers={workers}"]
    assert str(file) in fails(["validate", *flags])


def test_checkpoint_of_another_architecture(run: Path, fails: Fails) -> None:
    checkpoint = run / "checkpoints" / "best.ckpt"
    flags = ["--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)]
    line = fails(["validate", *flags, "--model.network.name=emanet"])
    assert str(checkpoint) in line
    assert "network.context" in line


def test_half_a_checkpoint(run: Path, tmp_path: Path, fails: Fails) -> None:
    file = tmp_path / "weights.ckpt"
    file.write_bytes(_half(run / "checkpoints" / "best.ckpt"))
    flags = ["--config", str(run / "config.yaml"), "--ckpt_path", str(file)]
    assert str(file) in fails(["validate", *flags])


def _half(file: Path) -> bytes:
    return file.read_bytes()[: file.stat().st_size // 2]


def test_a_full_disk_leaves_the_previous_checkpoint(
    images: Path, tmp_path: Path, fails: Fails
) -> None:
    flags = small(images, tmp_path / "run")
    main(["fit", *flags])
    folder = tmp_path / "run" / "checkpoints"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        line = fails(["fit", *flags, "--ckpt_path=last", "--trainer.max_epochs=2"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert ".ckpt" in line
    assert "could not be written" in line
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    main(["fit", *flags, "--ckpt_path=last", "--trainer.max_epochs=2"])


def test_sigterm_for_all_processes_of_a_job_leaves_a_checkpoint(
    images: Path, tmp_path: Path
) -> None:
    """As systemd and SLURM send it: to those that load images, too."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "mfnet", "fit", *small(images, run)]
    command += ["--trainer.max_epochs=10000", "--data.num_workers=2"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            deadline = time.monotonic() + 120
            while not (run / "metrics.csv").is_file() and time.monotonic() < deadline:
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGTERM)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == SIGTERM_EXIT, stderr
    assert stderr.splitlines()[-1] == "mfnet: stopped by SIGTERM; --ckpt_path last continues"


def test_bugs_keep_their_traceback(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object) -> None:
        torch.zeros(2).view(3)  # RuntimeError

    monkeypatch.setattr(SegmentationTask, "training_step", fault)
    with pytest.raises(RuntimeError):
        main(["fit", *small(images, tmp_path / "run")])


def test_sigterm_leaves_nothing_to_continue_but_of_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def terminated(*_: str) -> None:
        raise SIGTERMException

    monkeypatch.setattr("mfnet.commands._dispatch", terminated)
    with pytest.raises(SystemExit):
        main(["validate"])
    assert capsys.readouterr().err == "mfnet: stopped by SIGTERM\n"


def test_sigterm_leaves_a_checkpoint_and_resumes(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def terminate(_: SegmentationTask) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    flags = small(images, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentationTask, "on_after_backward", terminate)
        with pytest.raises(SystemExit) as exit_:
            main(["fit", *flags])
    assert exit_.value.code == SIGTERM_EXIT
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "mfnet: stopped by SIGTERM; --ckpt_path last continues"
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 1
    main(["fit", *flags, "--ckpt_path=last"])
    assert torch.load(last, weights_only=True)["global_step"] == 2


@pytest.mark.parametrize(("given", "kind"), [("1", int), ("0.5", float)])
def test_one_batch_is_not_all_of_them(given: str, kind: type, images: Path, tmp_path: Path) -> None:
    limits = ("limit_train_batches", "limit_val_batches", "overfit_batches")
    flags = [f"--trainer.{name}={given}" for name in limits]
    cli = MFNetCLI([*small(images, tmp_path / "run"), *flags], run=False)
    assert [type(cli.config.trainer[name]) for name in limits] == [kind] * 3
