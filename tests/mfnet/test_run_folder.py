"""A run's folder: where everything goes, whatever the paths, the logger and the callbacks."""

from __future__ import annotations

import csv
import re
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import pytest
import torch
from command_line import CONV, Fails, flags
from jsonargparse import Namespace

from mfnet.__main__ import main
from mfnet.cli import MAX_EPOCHS, MFNetCLI, _set_run_defaults
from mfnet.config import expand_all, expand_home, shipped_configs

CALLBACK = "--trainer.callbacks+=lightning.pytorch.callbacks."
FIELD = "--trainer.callbacks."


def small(root: Path, run: str | Path, *more: str) -> list[str]:
    return flags(root, run, "--data.recipe=paper", *CONV, *more)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def test_home_is_expanded_everywhere(images: Path, home: Path) -> None:
    shutil.copytree(images, home / "voc")
    (home / "more.yaml").write_text(
        "trainer:\n  callbacks:\n  - class_path: ModelCheckpoint\n"
        "    init_args: {dirpath: ~/mine}\n"
    )
    run = ["--config=~/more.yaml", *small(Path("~/voc"), "~/runs/x")]
    run += ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=~/logs"]
    main(["fit", *run])
    main(["fit", *run, "--ckpt_path=last", "--trainer.max_epochs=2"])
    again = small(Path("~/voc"), "~/runs/y", "--trainer.max_epochs=3")
    main(["fit", *again, "--ckpt_path=~/runs/x/checkpoints/last.ckpt"])
    main([
        *("predict", "--config=~/runs/x/config.yaml", "--ckpt_path=best"),
        *("--data.predict_images=~/voc/JPEGImages", "--overlays.output=~/overlays"),
    ])  # fmt: skip
    main(["report", "~/runs/x", "--output=~/report"])
    assert checkpoint(home / "runs" / "x")["epoch"] == 1
    assert checkpoint(home / "runs" / "y")["epoch"] == 2
    for folder in ("runs/x", "runs/y", "mine", "logs", "overlays", "report"):
        assert list((home / folder).iterdir()), folder
    assert not list(Path().iterdir())
    assert "~" not in (home / "runs" / "x" / "config.yaml").read_text()


def test_home_in_every_kind_of_value(home: Path) -> None:
    value = Namespace(
        a="~/x", b=Path("~/x"), c=["~/x", {"d": "~"}], e=Namespace(f="~/*.jpg"), g="a~/x", h=3
    )
    here = str(home)
    assert expand_all(value) == Namespace(
        a=f"{here}/x",
        b=home / "x",
        c=[f"{here}/x", {"d": here}],
        e=Namespace(f=f"{here}/*.jpg"),
        g="a~/x",
        h=3,
    )


def test_without_a_home_no_folder_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(ValueError, match="'~/x': expected a home directory"):
        expand_home("~/x")
    assert expand_home("~nobody-of-that-name/x") == "~nobody-of-that-name/x"


LOGGERS = {
    "default": [],
    "none": ["--trainer.logger=false"],
    "tensorboard": ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=elsewhere"],
    "csv": ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=elsewhere"],
}


@pytest.mark.parametrize("logger", LOGGERS)
def test_the_record_is_in_the_folder_whatever_the_logger(
    logger: str, images: Path, home: Path, fails: Fails, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("run")
    command = small(images, run, *LOGGERS[logger], f"{CALLBACK}ModelCheckpoint")
    main(["fit", *command])
    output = capsys.readouterr().out
    assert "epoch 1 of 1: val mIoU 0." in output
    assert "best val/mIoU 0." in output
    assert "in epoch 1: run/checkpoints/best.ckpt" in output
    for name in ("config.yaml", "metrics.csv", "summary.json", "samples.npz"):
        assert (run / name).is_file()
    assert len(list((run / "checkpoints").glob("*.ckpt"))) == 3
    assert list(Path("elsewhere").rglob("*.ckpt")) == []
    before = (run / "checkpoints" / "best.ckpt").read_bytes()
    assert "'run' holds a run already" in fails(["fit", *command])
    assert (run / "checkpoints" / "best.ckpt").read_bytes() == before
    main(["report", "run"])


def test_no_other_log_in_the_place_of_the_record(images: Path, home: Path, fails: Fails) -> None:
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=run"]
    logger += ["--trainer.logger.name=", "--trainer.logger.version="]
    assert "metrics.csv" in fails(["fit", *small(images, "run", *logger)])


def test_a_run_that_died_before_its_first_step_blocks_nothing(
    images: Path, home: Path, fails: Fails
) -> None:
    broken = Path(shutil.copytree(images, "broken"))
    mask = next((broken / "SegmentationClass").glob("val*"))
    mask.write_bytes(b"no image")
    assert mask.name in fails(["fit", *small(broken, "run")])
    assert Path("run/config.yaml").is_file()
    main(["fit", *small(images, "run")])
    assert checkpoint(Path("run"))["epoch"] == 0


def test_a_finished_run_without_its_log_is_still_finished(images: Path, home: Path) -> None:
    main(["fit", *small(images, "run")])
    Path("run/metrics.csv").unlink()
    with pytest.warns(UserWarning, match="metrics.csv"):
        main(["fit", *small(images, "run", "--ckpt_path=last")])


def test_last_starts_where_there_is_no_checkpoint_yet(
    images: Path, home: Path, fails: Fails
) -> None:
    main(["fit", *small(images, "run", "--trainer.enable_checkpointing=false")])
    again = ["fit", *small(images, "run")]
    assert "continue it with --ckpt_path last" in fails(again)
    main([*again, "--ckpt_path=last"])
    Path("run/checkpoints/last.ckpt").unlink()
    assert "continue it with --ckpt_path best" in fails([*again, "--ckpt_path=last"])


def test_a_run_that_overfits_batches_is_resumed(images: Path, home: Path) -> None:
    overfit = small(images, "run", "--trainer.overfit_batches=1")
    main(["fit", *overfit])
    main(["fit", *overfit, "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert checkpoint(Path("run"))["global_step"] == 2


def test_steps_that_end_inside_an_epoch_are_scored(images: Path, home: Path) -> None:
    def scored() -> list[str]:
        with Path("run/metrics.csv").open() as file:
            return [row["step"] for row in csv.DictReader(file) if row["val/mIoU"]]

    command = ["fit", *small(images, "run", "--trainer.max_epochs=3", "--ckpt_path=last")]
    main([*command, "--trainer.max_steps=1"])
    assert checkpoint(Path("run"), "best")["global_step"] == 1
    assert scored() == ["0"]
    main([*command, "--trainer.max_steps=5"])
    assert scored() == ["0", "1", "3", "4"]


def test_barebones(images: Path, home: Path) -> None:
    main(["fit", *small(images, "run", "--trainer.barebones=true")])
    assert [path.name for path in Path("run").iterdir()] == ["config.yaml"]


def test_a_checkpoint_from_elsewhere_does_not_open_a_folder(
    images: Path, home: Path, fails: Fails
) -> None:
    main(["fit", *small(images, "one")])
    main(["fit", *small(images, "two")])
    command = small(images, "two", "--ckpt_path=one/checkpoints/last.ckpt")
    assert "'two' holds a run already" in fails(["fit", *command])


def best_after_resuming(images: Path, run: Path) -> float:
    """The best score that a resumed run knows, of which an epoch at rate 0 adds none better."""
    rates = ["--model.backbone_lr=0", "--model.head_lr=0"]
    resumed = small(images, run, "--trainer.max_epochs=2", "--ckpt_path=last", *rates)
    main(["fit", *resumed])
    states = checkpoint(run)["callbacks"]
    return float(next(s["best_model_score"] for k, s in states.items() if k.startswith("BestC")))


def with_a_best_of_2(run: Path) -> None:
    """Pretend that best.ckpt reached a score that no later epoch will."""
    last = checkpoint(run)
    states = last["callbacks"]
    own = next(name for name in states if name.startswith("BestCheckpoint"))
    state = states[own]
    score = torch.tensor(2.0)
    state |= {"best_model_score": score, "kth_value": score}
    state["best_k_models"] = dict.fromkeys(state["best_k_models"], score)
    torch.save(last, run / "checkpoints" / "last.ckpt")


def test_the_best_score_of_a_folder_that_was_moved(images: Path, home: Path) -> None:
    main(["fit", *small(images, "before")])
    with_a_best_of_2(Path("before"))
    best = Path("before/checkpoints/best.ckpt").read_bytes()
    Path("before").rename("after")
    assert best_after_resuming(images, Path("after")) == 2
    assert Path("after/checkpoints/best.ckpt").read_bytes() == best


def test_a_resumed_run_is_repeated_from_its_beginning(images: Path, home: Path) -> None:
    main(["fit", *small(images, "first")])
    main(["fit", *small(images, "first", "--ckpt_path=last", "--trainer.max_epochs=2")])
    again = ["fit", "--config=first/config.yaml", "--trainer.default_root_dir=second"]
    main([*again, "--trainer.max_epochs=1"])
    assert checkpoint(Path("second"))["epoch"] == 0
    assert Path("second", "metrics.csv").is_file()


def test_a_row_that_was_cut_short_is_dropped(images: Path, home: Path) -> None:
    main(["fit", *small(images, "run")])
    log = Path("run", "metrics.csv")
    rows = log.read_bytes()
    log.write_bytes(rows[:-7])
    main(["fit", *small(images, "run", "--ckpt_path=last", "--trainer.max_epochs=2")])
    found = list(csv.DictReader(log.open()))
    assert all(None not in row and None not in row.values() for row in found)
    assert [row["epoch"] for row in found if row["val/mIoU"]] == ["0", "1"]


def test_a_runs_configuration_means_the_folder_that_it_lies_in(
    images: Path, home: Path, fails: Fails
) -> None:
    """Of a copy, the copy; a flag or a later file says otherwise."""
    Path("copy").mkdir()
    Path("copy/config.yaml").write_text("trainer: {default_root_dir: original}\n")
    Path("later.yaml").write_text("trainer: {default_root_dir: later}\n")
    data = small(images, "")
    assert "'original/checkpoints/best.ckpt'" in fails(  # of no run that has begun
        ["validate", "--config=copy/config.yaml", *data, "--ckpt_path=best"]
    )
    Path("copy/metrics.csv").write_text("epoch,step,val/mIoU\n0,1,0.5\n")
    for more, folder in (
        ([], "copy"),
        (["--trainer.default_root_dir=flag"], "flag"),
        (["--config=later.yaml"], "later"),
    ):
        command = ["--config=copy/config.yaml", *more, *data, "--ckpt_path=best"]
        for subcommand in ("validate", "fit"):
            assert f"no file '{folder}/checkpoints/best.ckpt'" in fails([subcommand, *command])


@pytest.mark.parametrize(
    "callbacks",
    [
        [
            f"{CALLBACK}ModelCheckpoint", f"{FIELD}monitor=val/mIoU", f"{FIELD}mode=max",
            f"{CALLBACK}ModelCheckpoint", f"{FIELD}monitor=step", f"{FIELD}mode=max",
            f"{CALLBACK}EarlyStopping", f"{FIELD}monitor=val/mIoU", f"{FIELD}mode=max",
            f"{CALLBACK}Timer", f"{FIELD}duration=00:00:10:00",
            f"{CALLBACK}ModelSummary", f"{FIELD}max_depth=2",
            f"{CALLBACK}GradientAccumulationScheduler", f"{FIELD}scheduling={{0: 2}}",
        ],
        [
            f"{CALLBACK}EarlyStopping", f"{FIELD}monitor=train/loss",
            f"{CALLBACK}LearningRateMonitor", "--trainer.logger=false",
            f"{CALLBACK}BatchSizeFinder", f"{FIELD}steps_per_trial=1",
        ],
        [
            f"{CALLBACK}StochasticWeightAveraging", f"{FIELD}swa_lrs=0.05",
            "--trainer.max_epochs=2",
        ],
    ],
    ids=["scores and clocks", "losses and sizes", "averages"],
)  # fmt: skip
def test_callbacks_that_work(callbacks: list[str], images: Path, home: Path) -> None:
    main(["fit", *small(images, "run", *callbacks)])
    main(["validate", "--config=run/config.yaml", "--ckpt_path=best"])
    main(["fit", "--config=run/config.yaml", "--ckpt_path=last", "--trainer.max_epochs=3"])
    assert checkpoint(Path("run"))["epoch"] in (2, 3)  # the average takes one epoch more


@pytest.mark.skipif(
    not hasattr(lightning.pytorch.callbacks, "EMAWeightAveraging"),
    reason="Lightning before 2.6 has no EMAWeightAveraging",
)
def test_averaged_weights_are_scored_kept_and_gone_on_with(images: Path, home: Path) -> None:
    average = [f"{CALLBACK}EMAWeightAveraging", f"{FIELD}decay=0.5"]
    main(["fit", *small(images, "run", *average)])
    main(["fit", *small(images, "run", *average, "--trainer.max_epochs=2", "--ckpt_path=last")])
    last = checkpoint(Path("run"))
    trained, averaged = last["current_model_state"], last["state_dict"]
    assert any(not torch.equal(trained[name], averaged[name]) for name in averaged)
    rows = csv.DictReader(Path("run", "metrics.csv").read_text().splitlines())
    loss = float([row["val/loss"] for row in rows if row["val/loss"]][-1])
    cli = MFNetCLI(["validate", "--config=run/config.yaml", "--ckpt_path=last"])
    assert float(cli.trainer.callback_metrics["val/loss"]) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (f"{CALLBACK}EarlyStopping {FIELD}monitor=val_loss", "nothing logs 'val_loss': .*val/loss"),
        (f"{CALLBACK}EarlyStopping {FIELD}monitor=step", "nothing logs 'step'"),
        (f"{CALLBACK}ModelCheckpoint {FIELD}monitor=mIoU", "nothing logs 'mIoU': .*val/mIoU"),
        (f"{CALLBACK}EarlyStopping {FIELD}monitor=train/los", "`train/los` which is not available"),
        (f"{CALLBACK}EarlyStopping {FIELD}monitor=val/mIoU", "mode 'min' with val/mIoU"),
        (f"{CALLBACK}ModelCheckpoint {FIELD}monitor=val/loss {FIELD}mode=max", "mode 'max' with"),
        (f"{CALLBACK}ModelCheckpoint {CALLBACK}ModelCheckpoint", "more than one stateful callback"),
        (f"{CALLBACK}LearningRateFinder", "two learning rates.*--model.head_lr"),
        (f"{CALLBACK}BackboneFinetuning", "BackboneFinetuning: .*--model.backbone_lr"),
    ],
)
def test_callbacks_that_are_refused(
    callback: str, message: str, images: Path, home: Path, fails: Fails
) -> None:
    line = fails(["fit", *small(images, "run", *callback.split())])
    assert line.startswith("mfnet: error: ")
    assert re.search(message, line)
    assert not Path("run/checkpoints").exists()


def test_epochs_unless_given() -> None:
    def epochs(**given: Any) -> int | None:
        trainer = {"max_epochs": None, "max_steps": -1, "max_time": None, "default_root_dir": "x"}
        config = Namespace(trainer=Namespace(**{**trainer, **given}))
        _set_run_defaults(config)
        return config.trainer.max_epochs

    assert epochs() == MAX_EPOCHS == 50
    assert epochs(max_epochs=3) == 3
    assert epochs(max_epochs=-1) == -1
    assert epochs(max_steps=10) is None
    assert epochs(max_time=timedelta(hours=1)) is None


@pytest.mark.parametrize(
    ("configs", "network", "folder"),
    [
        ("", {"name": "mfnet"}, "mfnet"),
        ("", {"name": "deeplabv3plus", "context": "em"}, "deeplabv3plus-context-em"),
        ("", {"encoder_name": "resnet18"}, "Unet"),
        ("paper_voc", {"name": "mfnet"}, "paper_voc"),
        ("paper_voc", {"name": "emanet"}, "paper_voc-emanet"),
        ("paper_voc", {"name": "mfnet", "factorizer": "em"}, "paper_voc-mfnet-factorizer-em"),
        ("camvid_light", {"name": "mfnet_light"}, "camvid_light"),
        ("camvid_light", {"name": "mfnet"}, "camvid_light-mfnet"),
        ("my", {"name": "mfnet"}, "my"),
        ("camvid my", {"name": "mfnet"}, "camvid-my"),
        ("my camvid_light", {"name": "mfnet_light"}, "my-camvid_light"),
    ],
)
def test_the_folder_unless_given(
    configs: str, network: dict[str, str], folder: str, home: Path
) -> None:
    Path("my.yaml").write_text("trainer:\n  max_epochs: 3\n")
    files = {**shipped_configs(), "my": Path("my.yaml")}
    config = Namespace(
        config=[str(files[name]) for name in configs.split()],
        trainer=Namespace(max_epochs=1, default_root_dir=None),
        model=Namespace(network=Namespace(class_path="smp.Unet", init_args=Namespace(**network))),
    )
    _set_run_defaults(config)
    assert config.trainer.default_root_dir == f"runs/{folder}"
