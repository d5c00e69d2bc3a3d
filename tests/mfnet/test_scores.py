"""Scores of each class, the confusion matrix, and the files and pictures that show them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import CPU, RESNET, flags
from matplotlib.colors import to_rgb
from torch import Tensor
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MulticlassPrecision,
    MulticlassRecall,
)

from mfnet.__main__ import main
from mfnet.data import synthetic
from mfnet.report import report
from mfnet.run_directory import folder_of
from mfnet.scores import (
    class_table,
    read_confusion,
    segmentation_scores,
    write_class_scores,
    write_confusion,
)
from mfnet.visualize import IGNORE_COLOR, draw_confusion

NAMES = ["sky", "road", "car", "a, b"]


def masks(seed: int) -> Tensor:
    return torch.randint(0, 4, (3, 9, 7), generator=torch.Generator().manual_seed(seed))


def counted(truth: Tensor, predicted: Tensor) -> Tensor:
    return MulticlassConfusionMatrix(4, ignore_index=255)(predicted, truth)


def test_scores_of_classes_are_those_of_torchmetrics() -> None:
    truth, predicted = masks(0), masks(1)
    truth[:, 2:4] = 255
    scores = segmentation_scores(counted(truth, predicted))
    for name, kind, average in (
        ("IoU", MulticlassJaccardIndex, "none"),
        ("mIoU", MulticlassJaccardIndex, "macro"),
        ("fwIoU", MulticlassJaccardIndex, "weighted"),
        ("accuracy", MulticlassAccuracy, "micro"),
        ("Dice", MulticlassF1Score, "none"),
        ("precision", MulticlassPrecision, "none"),
        ("recall", MulticlassRecall, "none"),
    ):
        expected = kind(4, average=average, ignore_index=255)(predicted, truth)
        torch.testing.assert_close(scores[name].float(), expected)
    torch.testing.assert_close(scores["Dice"], 2 * scores["IoU"] / (1 + scores["IoU"]))


def test_what_would_divide_by_zero_is_not_a_number() -> None:
    # Class 1 is never predicted, class 2 only predicted, class 3 absent.
    confusion = torch.tensor([[6, 0, 2, 0], [4, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = segmentation_scores(confusion)
    nan = float("nan")
    for name, expected in {
        "IoU": [6 / 12, 0, 0, nan],
        "Dice": [12 / 18, 0, 0, nan],
        "precision": [6 / 10, nan, 0, nan],
        "recall": [6 / 8, 0, nan, nan],
        "mIoU": 1 / 6,
        "fwIoU": 8 / 12 * 6 / 12,
        "accuracy": 6 / 12,
    }.items():
        torch.testing.assert_close(
            scores[name], torch.tensor(expected, dtype=torch.float64), equal_nan=True, msg=name
        )
    assert all(score.isnan().all() for score in segmentation_scores(torch.zeros(3, 3)).values())


def test_tables_leave_undefined_scores_empty(tmp_path: Path) -> None:
    confusion = torch.tensor([[6, 0, 2, 0], [4, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    path = tmp_path / "scores-val.csv"
    write_class_scores(confusion, NAMES, path)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["class", "pixels", "IoU", "Dice", "precision", "recall"],
        ["sky", "8", "0.500000", "0.666667", "0.600000", "0.750000"],
        ["road", "4", "0.000000", "0.000000", "", "0.000000"],
        ["car", "0", "0.000000", "0.000000", "0.000000", ""],
        ["a, b", "0", "", "", "", ""],
    ]
    lines = class_table(confusion, NAMES).splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert table[2] == ["sky", "8", "50.00", "66.67", "60.00", "75.00"]
    assert table[-1] == ["*mean*", "", "16.67", "22.22", "30.00", "37.50"]


def test_a_confusion_matrix_is_read_as_it_was_written(tmp_path: Path) -> None:
    confusion = counted(masks(0), masks(1))
    path = tmp_path / "confusion.csv"
    write_confusion(confusion, NAMES, path)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["truth", *NAMES]
    seen = ((masks(0) == 1) & (masks(1) == 2)).sum()
    assert rows[2][0] == "road"
    assert rows[2][3] == str(int(seen))
    assert torch.equal(read_confusion(path, NAMES), confusion)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "a line and a column for each of sky, road"),
        (b"truth,sky,road\nsky,1,2\n", "a line and a column for each of sky, road"),
        (b"truth,sky,car\nsky,1,2\ncar,3,4\n", "a line and a column for each of sky, road"),
        (b"truth,sky,road\nsky,1,2\nroad,3\n", "whole numbers of pixels"),
        (b"truth,sky,road\nsky,1,2\nroad,3,x\n", "whole numbers of pixels"),
        (b"truth,sky,road\nsky,1,2\nroad,3,-4\n", "2 x 2 numbers of pixels"),
        (b"\xff\xfe\x00", "whole numbers of pixels"),
    ],
)
def test_a_damaged_confusion_matrix_is_refused(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    path = tmp_path / "confusion.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"confusion\.csv: expected .*{complaint}") as raised:
        read_confusion(path, ["sky", "road"])
    assert "\n" not in str(raised.value)


def test_the_picture_shows_shares_of_rows() -> None:
    figure = draw_confusion(np.array([[6, 2, 0], [0, 0, 0], [1, 999, 0]]), NAMES[:3])
    (axes,) = figure.axes
    (picture,) = axes.images
    shares = picture.get_array().filled(-1)
    np.testing.assert_allclose(shares, [[0.75, 0.25, 0], [-1, -1, -1], [0.001, 0.999, 0]])
    assert [(t.get_text(), t.get_position()) for t in axes.texts] == [
        ("75", (0, 0)), ("25", (1, 0)), ("100", (1, 2))
    ]  # fmt: skip
    assert to_rgb(axes.get_facecolor()) == to_rgb(np.divide(IGNORE_COLOR, 255))
    assert [label.get_text() for label in axes.get_yticklabels()] == NAMES[:3]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prediction", "truth")


def test_the_folder_of_a_checkpoint() -> None:
    assert folder_of("/runs/x/checkpoints/best.ckpt") == Path("/runs/x")
    assert folder_of("/elsewhere/best.ckpt") == Path("/elsewhere")


# From the command line


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = synthetic.generate(tmp_path_factory.mktemp("data") / "voc", train=2, val=3, size=33)
    splits = root / "ImageSets" / "Segmentation"
    shutil.copy(splits / "val.txt", splits / "test.txt")
    return root


def score(command: str, data: Path, checkpoint: Path) -> None:
    place = ["--data=VOCFolder", f"--data.root={data}", f"--ckpt_path={checkpoint}"]
    main([command, *place, *CPU])


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["fit", *flags(data, folder, RESNET)])
    return folder


def test_a_run_keeps_the_confusion_matrix_of_its_last_validation(finished: Path) -> None:
    names = json.loads((finished / "summary.json").read_text())["class_names"]
    confusion = read_confusion(finished / "confusion.csv", names)
    with (finished / "metrics.csv").open(newline="") as file:
        logged = [row["val/mIoU"] for row in csv.DictReader(file) if row["val/mIoU"]]
    assert segmentation_scores(confusion)["mIoU"].item() == pytest.approx(float(logged[-1]))
    assert int(confusion.sum()) <= 3 * 33 * 33
    assert int(confusion.sum()) > 2 * 33 * 33  # not only a part of the set


@pytest.mark.parametrize(("command", "stage"), [("validate", "val"), ("test", "test")])
def test_scores_of_classes_go_into_the_folder_of_the_checkpoint(
    finished: Path, data: Path, command: str, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    score(command, data, finished)
    names = json.loads((finished / "summary.json").read_text())["class_names"]
    confusion = read_confusion(finished / "confusion.csv", names)  # one epoch: the best is the last
    path = finished / f"scores-{stage}.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == names
    assert [int(row["pixels"]) for row in rows] == confusion.sum(1).tolist()
    printed = capsys.readouterr().out
    assert class_table(confusion, names) in printed
    assert f"written: {path}" in printed


def test_a_folder_that_cannot_be_written_to_is_a_warning(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copytree(finished / "checkpoints", folder / "checkpoints")
    (folder / "scores-val.csv").mkdir()
    with pytest.warns(UserWarning, match=r"scores-val\.csv was not written: Is a directory"):
        score("validate", data, folder)
    assert "| *mean*" in capsys.readouterr().out


def test_the_report_has_classes_and_a_picture_where_the_run_kept_them(
    finished: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old one"
    shutil.copytree(finished, old)
    (old / "confusion.csv").unlink()
    report([finished, old], tmp_path / "both")
    named = [path.name for path in (tmp_path / "both").glob("confusion-*")]
    assert len(named) == 1
    text = (tmp_path / "both" / "report.md").read_text()
    names = json.loads((finished / "summary.json").read_text())["class_names"]
    assert class_table(read_confusion(finished / "confusion.csv", names), names) in text
    assert f"({named[0]})" in text
    assert text.count("## Classes") == 1
    report([old], tmp_path / "alone")
    assert not list((tmp_path / "alone").glob("confusion-*"))
    assert "## Classes" not in (tmp_path / "alone" / "report.md").read_text()

    shutil.copy(finished / "confusion.csv", old)
    report([old], tmp_path / "spaces")
    assert (tmp_path / "spaces" / "confusion-old-one.png").is_file()
    (old / "confusion.csv").write_text("truth,sky\nsky,1\n")
    with pytest.raises(ValueError, match=r"old one/confusion\.csv: expected a line"):
        report([old], tmp_path / "none")
    assert not (tmp_path / "none").exists()
