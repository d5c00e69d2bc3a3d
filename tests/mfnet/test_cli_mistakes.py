"""A new user's first mistakes, each told in one line, and the help that prevents them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import Fails

from mfnet import help
from mfnet.__main__ import main
from mfnet.errors import explain

YAML = {
    "syntax.yaml": "trainer:\n  max_epochs: [3\n",
    "key.yaml": "trianer:\n  max_epochs: 3\n",
    "nested.yaml": "trainer:\n  max_epoch: 3\n",
    "empty.yaml": "",
    "list.yaml": "- a\n- b\n",
    "type.yaml": "trainer:\n  max_epochs: many\n",
}
CALLBACK = "--trainer.callbacks+=lightning.pytorch.callbacks."
CONV = "--model.network torch.nn.Conv2d --model.network.kernel_size 1 --model.network.in_channels"


@pytest.fixture(scope="module")
def folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set and some bad configurations."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "voc").symlink_to(images)
    for name, text in YAML.items():
        (folder / name).write_text(text)
    (folder / "binary.yaml").write_bytes(b"\x89PNG\xff\x00")
    return folder


NO_DATA = "no data: give --config NAME"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        *((command, NO_DATA) for command in ("fit", "validate", "test")),
        ("predict", "give --ckpt_path RUN"),
        ("predict --data.predict_images photos", "give --ckpt_path RUN"),
        ("fit --data VOCFolder", "--data.root is missing; for example --data VOCFolder"),
        ("fit --data mfnet.data.VOCFolder", "--data.root is missing; for example"),
        ("fit --data.root voc", "--data.root: of which data"),
        ("ftt", "unknown command 'ftt': did you mean fit"),
        ("train --config camvid", "unknown command 'train'; mfnet --help lists them"),
        ("--config camvid fit", "expected a command first, got --config: mfnet fit --config"),
        ("fit camvid", "'camvid' belongs to no flag; a configuration is given as --config camvid"),
        ("SMALL --seed_everything -1", "--seed_everything: -1 is not in bounds"),
        ("fit --config syntax.yaml", "syntax.yaml, line 3: "),
        (
            "fit --config key.yaml",
            "unknown argument --trianer.max_epochs: did you mean --trainer.max",
        ),
        ("fit --config nested.yaml", "unknown argument --trainer.max_epoch: did you mean"),
        ("fit --config empty.yaml", "empty.yaml: expected lines 'name: value', got none"),
        ("fit --config list.yaml", "list.yaml: expected lines 'name: value', got"),
        ("fit --config binary.yaml", "binary.yaml: expected YAML, got binary data"),
        ("fit --config type.yaml", "--trainer.max_epochs: expected int, got many"),
        ("SMALL --batch_size 4", "unknown argument --batch_size: did you mean --data.batch_size"),
        ("SMALL --data.batchsize 4", "--data.batchsize: did you mean --data.batch_size"),
        ("SMALL --trainer.max_epoch 4", "--trainer.max_epoch: did you mean --trainer.max_epochs"),
        ("SMALL --model.lr 1", "--model.lr: did you mean --model.backbone_lr or --model.head_lr"),
        ("SMALL --model.network.rank 3", "did you mean --model.network.dict_kwargs.rank"),
        ("SMALL --data.batch_size four", "--data.batch_size: expected int, got four"),
        ("SMALL --data.crop_size [3,3,3]", "--data.crop_size: expected int or tuple"),
        ("SMALL --data.recipe classic", "--data.recipe: expected 'paper', 'modern', got classic"),
        ("SMALL --overlays.kinds mask", r"kinds: expected a list, for instance \[mask\], got mask"),
        ("SMALL --data VOCFoldr", "no class 'VOCFoldr': .*did you mean VOCFolder"),
        ("SMALL --model.network emanet", "chosen by --model.network.name"),
        ("SMALL --model.network nowhere.Net", "--model.network: no class 'nowhere.Net'"),
        ("SMALL --trainer.logger TensorBoardLogger", "--trainer.logger.save_dir is missing"),
        ("SMALL --trainer.callbacks EarlyStopping", "--trainer.callbacks.monitor is missing"),
        ("SMALL --config nowhere.yaml", "no file 'nowhere.yaml', and none of the shipped"),
        ("SMALL --data.root nowhere", "nowhere"),
        ("SMALL --data.num_workers -1", "num_workers: expected at least 0, got -1"),
        ("SMALL --model.network.name unet", "unknown model 'unet'"),
        ("SMALL --model.network.backbone resnet19", "unknown backbone 'resnet19'"),
        ("SMALL --nonsense 1", "unknown argument --nonsense"),
        ("SMALL --model.backbone_lr -1", "backbone_lr: expected a number from 0 on, got -1"),
        ("SMALL --model.power -1", "power: expected a number from 0 on, got -1"),
        ("SMALL --model.image_std [0,1,1]", r"image_std: expected numbers above 0, got \[0.0, 1"),
        (
            "SMALL --trainer.accumulate_grad_batches 0",
            "accumulate_grad_batches: expected at least 1",
        ),
        (
            "SMALL --trainer.check_val_every_n_epoch 0",
            "check_val_every_n_epoch: expected at least 1",
        ),
        ("SMALL --ckpt_path nowhere.ckpt", "no file 'nowhere.ckpt', which fit would continue"),
        (f"SMALL {CALLBACK}Timer --trainer.callbacks.duratoin 3", "did you mean .*duration"),
        (f"SMALL {CONV} 3 --model.network.out_channels 4 --model.network.groups 2", "by groups"),
        (
            f"SMALL {CONV} 3 --model.network.out_channels 5 --trainer.strategy foo",
            "invalid",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(
    line: str,
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Fails,
) -> None:
    monkeypatch.chdir(folder)
    small = f"fit --config camvid --data.root voc --trainer.default_root_dir {tmp_path}/run"
    said = fails(line.replace("SMALL", small).split(), alone=True)
    assert re.search(message, said)
    assert len(said) < 450
    assert not (tmp_path / "run").exists()


def printed(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(line.split())
    assert exit_.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "demo"])
def test_help_is_one_screen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(f"{command} --help", capsys)
    assert len(text.splitlines()) <= 60
    assert all(len(line) <= 100 for line in text.splitlines())
    for word in ("crop_size", "batch_size", "backbone", "context_size", "--help_all"):
        assert word in text


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_help_names_flags_that_there_are(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    screen = printed(f"{command} --help", capsys)
    full = printed(f"{command} --help_all", capsys) + " ".join(help.nested_flags())
    flags = set(re.findall(r"--[a-z][\w.]*", screen))
    flags -= {"--help_all", "--model.network.help"}
    flags = {flag for flag in flags if not flag.startswith("--trainer.callbacks.")}  # of a class
    assert [flag for flag in sorted(flags) if flag not in full] == []
    assert "torch.nn.Identity" not in full
    assert len(full.splitlines()) < 600


def test_help_of_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("fit --config camvid --model.network.help", capsys)
    for word in ("--model.network.backbone_weights", "a timm model", "em: bases", "rank"):
        assert word in text


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("--help", capsys)
    for command in ("fit", "validate", "test", "predict", "mfnet demo", "mfnet report RUN"):
        assert command in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("--version", capsys)
    assert re.fullmatch(r"mfnet \S+, mfops \S+, torch \S+, lightning \S+\n", text)


def test_an_account_that_nobody_foresaw_is_one_line() -> None:
    assert explain("never heard of,\n  in two lines", [], []) == "never heard of, in two lines"
