"""The command line: configurations, a run's life, and one line for every user error."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import RESNET, fails, flags
from jsonargparse import Namespace
from PIL import Image

from mfnet.__main__ import main
from mfnet.cli import _network_names
from mfnet.commands import SIGTERM_EXIT
from mfnet.config import shipped_configs
from mfnet.contexts import CONTEXTS
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


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "mfnet demo", "mfnet report RUN"):
        assert command in text


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
        ("paper_voc", "factorizer=em"),
        ("modern_voc", "factorizer=nmf"),
        ("camvid", "factorizer=vq"),
        ("camvid", "factorizer=double_attention"),
        ("demo", "factorizer=cd"),
        *(("demo", f"context={context}") for context in CONTEXTS),
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
        f"--model.network.{choice}", "--model.network.backbone=resnet18",
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


def test_predict_writes_overlays(run: Path, images: Path, tmp_path: Path) -> None:
    main([
        "predict", "--config", str(run / "config.yaml"), "--ckpt_path=last",
        "--data.predict_images", str(images / "JPEGImages" / "val_*.jpg"),
        f"--overlays.output={tmp_path}",
    ])  # fmt: skip
    for name in ("val_00000.png", "val_00001.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (33, 33)


def test_report_is_a_command(run: Path, tmp_path: Path) -> None:
    main(["report", str(run), "--output", str(tmp_path)])
    assert (tmp_path / "curves.png").is_file()


def test_last_resumes(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = small(images, tmp_path / "run")
    main(["fit", *flags, "--ckpt_path=last"])  # there is none yet
    assert "holds a run already" in fails(["fit", *flags], capsys)
    main(["fit", *flags, "--ckpt_path=last", "--trainer.max_epochs=2"])
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["epoch"], last["global_step"]) == (1, 4)


def test_any_class_path_trains(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    flags = [flag for flag in small(images, tmp_path / "run") if "network" not in flag]
    network = "--model.network=segmentation_models_pytorch.Unet"
    options = {"encoder_name": "resnet18", "encoder_depth": 3, "encoder_weights": "null"}
    options |= {"decoder_channels": "[16,16,16]", "classes": 5}
    size = ["--data.resize=[64,64]", "--data.crop_size=64"]
    options_flags = [f"--model.network.{key}={value}" for key, value in options.items()]
    main(["fit", *flags, network, *options_flags, *size])
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["network"]["class_path"] == "segmentation_models_pytorch.Unet"
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config=nowhere.yaml", "nowhere.yaml"),
        ("--data.root=nowhere", "nowhere"),
        ("--model.network.name=unet", "unknown model 'unet'"),
        ("--model.network.backbone=resnet19", "unknown backbone 'resnet19'"),
        ("--model.network=nowhere.Net", "nowhere.Net"),
        ("--trainer.max_epochs=many", "trainer.max_epochs"),
        ("--nonsense=1", "--nonsense"),
        ("--ckpt_path=nowhere.ckpt", "nowhere.ckpt"),
        ("--data.num_workers=-1", "num_workers"),
    ],
)
def test_wrong_arguments(
    flag: str, message: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(["fit", *small(images, tmp_path / "run"), flag], capsys)
    assert not (tmp_path / "run").exists()


def test_unknown_backend(images: Path, tmp_path: Path) -> None:
    """In a process of its own: mfops reads the variable when it is imported."""
    command = [sys.executable, "-m", "mfnet", "fit", *small(images, tmp_path / "run")]
    environment = {**os.environ, "MFOPS_BACKEND": "abacus"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("mfnet: error: ")
    assert "'abacus'" in last


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def narrower(file: Path) -> None:
    Image.open(file).crop((0, 0, 30, 33)).save(file)


def another_label(file: Path) -> None:
    mask = np.array(Image.open(file))
    mask[5, 5] = 99
    Image.fromarray(mask).save(file)


@pytest.mark.parametrize(
    "file", ["ImageSets/Segmentation/val.txt", "SegmentationClass/val_00000.png"]
)
def test_missing_files(file: str, broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (broken / file).unlink()
    named = str(broken / file).removesuffix(".png")  # any extension would do
    assert named in fails(["validate", *small(broken, broken / "run")], capsys)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("JPEGImages/val_00000.jpg", cut_short),
        ("SegmentationClass/val_00000.png", narrower),
        ("SegmentationClass/val_00000.png", another_label),
    ],
)
def test_damaged_files(
    file: str,
    damage: Callable[[Path], None],
    workers: int,
    broken: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(broken / file)
    flags = [*small(broken, broken / "run"), f"--data.num_workers={workers}"]
    assert str(broken / file) in fails(["validate", *flags], capsys)


def test_checkpoint_of_another_architecture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run / "checkpoints" / "best.ckpt"
    flags = ["--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)]
    line = fails(["validate", *flags, "--model.network.name=emanet"], capsys)
    assert str(checkpoint) in line
    assert "network.context" in line


@pytest.mark.parametrize("content", ["not a checkpoint", None])
def test_what_is_no_checkpoint(
    content: str | None, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.ckpt"
    file.write_bytes((content or "").encode() or _half(run / "checkpoints" / "best.ckpt"))
    flags = ["--config", str(run / "config.yaml"), "--ckpt_path", str(file)]
    assert str(file) in fails(["validate", *flags], capsys)


def _half(file: Path) -> bytes:
    return file.read_bytes()[: file.stat().st_size // 2]


def test_a_full_disk_leaves_the_previous_checkpoint(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = small(images, tmp_path / "run")
    main(["fit", *flags])
    folder = tmp_path / "run" / "checkpoints"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        line = fails(["fit", *flags, "--ckpt_path=last", "--trainer.max_epochs=2"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert ".ckpt" in line
    assert "could not be written" in line
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    main(["fit", *flags, "--ckpt_path=last", "--trainer.max_epochs=2"])


def test_bugs_keep_their_traceback(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object) -> None:
        torch.zeros(2).view(3)  # RuntimeError

    monkeypatch.setattr(SegmentationTask, "training_step", fault)
    with pytest.raises(RuntimeError):
        main(["fit", *small(images, tmp_path / "run")])


def test_sigterm_leaves_a_checkpoint_and_resumes(images: Path, tmp_path: Path) -> None:
    flags = [*small(images, tmp_path / "run"), "--trainer.max_epochs=10000"]
    command = [sys.executable, "-m", "mfnet", "fit", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.csv").is_file() and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()

    assert process.returncode == SIGTERM_EXIT
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "mfnet: stopped by SIGTERM; --ckpt_path last continues"
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    step = torch.load(last, weights_only=True)["global_step"]
    assert step > 0
    main(["fit", *flags, "--ckpt_path=last", f"--trainer.max_steps={step + 1}"])
    assert torch.load(last, weights_only=True)["global_step"] == step + 1


def test_reports_name_the_context_that_stands_in_a_network() -> None:
    arguments = Namespace(name="deeplabv3plus", backbone="resnet18", context="none")
    network = Namespace(class_path="mfnet.create_model", init_args=arguments)
    assert _network_names(network) == ("deeplabv3plus (context none)", "resnet18")
    arguments.context = None
    assert _network_names(network) == ("deeplabv3plus", "resnet18")
    arguments.factorizer = "em"
    assert _network_names(network) == ("deeplabv3plus (factorizer em)", "resnet18")
