"""``mfnet report``: what it reads from runs, what it writes, what it refuses."""

import csv
import json

import numpy as np
import pytest

from mfnet import report as report_module
from mfnet.report import (
    best_epoch,
    comparison_table,
    label_runs,
    main,
    merge_epochs,
    read_run,
    report,
)

NAMES = ["background", "disc", "square"]


def write_metrics(folder, epochs, offset=0.0):
    """A metrics.csv as Lightning's CSVLogger writes it: rows of train, validation and lr."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(
            file, ["epoch", "lr-SGD/pg1", "step", "train/loss", "val/fwIoU", "val/mIoU"]
        )
        writer.writeheader()
        for epoch in epochs:
            value = 0.1 * (epoch + 1) + offset
            writer.writerow({"lr-SGD/pg1": 0.01, "step": 2 * epoch})
            validation = {"val/mIoU": value, "val/fwIoU": value + 0.1}
            writer.writerow({"epoch": epoch, "step": 2 * epoch + 1, **validation})
            writer.writerow({"epoch": epoch, "step": 2 * epoch + 1, "train/loss": 1 - value})


def write_record(folder, names=NAMES, seed=0, size=(12, 16), **changes):
    summary = {
        "model": "mfnet",
        "backbone": "resnet18",
        "parameters": 29_738_997,
        "trainable_parameters": 29_738_997,
        "gflops": 122.345,
        "input_size": list(size),
        "class_names": names,
        "palette": [[0, 0, 0], [200, 0, 0], [0, 0, 200]],
    }
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    rng = np.random.default_rng(seed)
    arrays = {"epoch": 2}
    for i in range(2):
        arrays[f"image_{i}"] = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        arrays[f"truth_{i}"] = rng.integers(0, 3, size, dtype=np.uint8)
        arrays[f"prediction_{i}"] = rng.integers(0, 3, size, dtype=np.uint8)
    np.savez_compressed(folder / "samples.npz", **arrays)


@pytest.fixture
def runs(tmp_path):
    """Two comparable runs of three epochs."""
    folders = [tmp_path / "runs" / name for name in ("mfnet", "emanet")]
    for offset, folder in enumerate(folders):
        write_metrics(folder, range(3), offset=0.05 * offset)
        write_record(folder, model=folder.name)
    return folders


def test_report_writes_pictures_and_table(runs, tmp_path, capsys):
    main([*map(str, runs), "--output", str(tmp_path / "out")])
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["curves.png", "predictions.png", "report.md"]
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[:4]]
    assert rows[2] == [
        "mfnet", "mfnet", "resnet18", "3", "30.00", "40.00", "30.00 (epoch 3)", "29.74", "122.3",
        "12 x 16",
    ]  # fmt: skip
    assert rows[3][0] == "emanet"
    assert rows[3][4] == "35.00"
    table = printed[: printed.index("written:")]
    assert table in (tmp_path / "out" / "report.md").read_text()


def test_table_keeps_best_apart_from_last_and_admits_unknown_flops(runs):
    with open(runs[0] / "metrics.csv", "a") as file:
        file.write("3,,8,,0.2,0.15\n")
    write_record(runs[0], gflops=None)
    table = comparison_table({"a": read_run(runs[0])})
    cells = [cell.strip() for cell in table.splitlines()[2].split("|")]
    assert cells[4:10] == ["4", "15.00", "20.00", "30.00 (epoch 3)", "29.74", "unknown"]


def test_columns_of_the_grid_and_lines_of_the_curves(runs, tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr(
        report_module, "save_figure", lambda figure, path: figures.setdefault(path.name, figure)
    )
    report(runs, tmp_path / "out")
    titles = [axes.get_title() for axes in figures["predictions.png"].axes]
    assert [title for title in titles if title] == ["image", "truth", "mfnet", "emanet"]
    miou, fwiou = figures["curves.png"].axes
    assert [line.get_label() for line in miou.lines] == ["mfnet", "emanet"]
    np.testing.assert_allclose(miou.lines[1].get_ydata(), [15, 25, 35])
    np.testing.assert_allclose(fwiou.lines[0].get_ydata(), [20, 30, 40])
    assert list(miou.lines[0].get_xdata()) == [1, 2, 3]


def test_rows_logged_again_after_a_resume_count_once():
    rows = [{"epoch": e, "val/mIoU": 0.1 * e} for e in (0, 1, 2, 3)]
    rows += [{"step": 7, "lr-SGD": 0.1}]
    rows += [{"epoch": 2, "val/mIoU": 0.9}, {"epoch": 2, "train/loss": 0.5}]
    merged = merge_epochs(rows)
    assert list(merged) == [0, 1, 2]
    assert merged[2] == {"epoch": 2, "val/mIoU": 0.9, "train/loss": 0.5}


def test_the_best_of_several_validations_in_an_epoch(runs):
    """Those of a pass that was broken off and begun again do not count."""
    header = "epoch,step,train/loss,val/mIoU,val/fwIoU\n"
    broken_off = "0,1,,0.9,0.9\n0,3,,0.8,0.8\n"
    again = "0,1,,0.1,0.1\n0,3,,0.7,0.7\n0,5,,0.2,0.2\n0,5,0.5,,\n"
    (runs[0] / "metrics.csv").write_text(f"{header}{broken_off}{again}1,7,,0.4,0.4\n1,9,,0.3,0.3\n")
    assert best_epoch(runs[0]) == (1, 0.7)
    cells = comparison_table({"a": read_run(runs[0])}).splitlines()[2].split("|")
    assert [cell.strip() for cell in cells[4:8]] == ["2", "30.00", "30.00", "70.00 (epoch 1)"]


def test_labels_are_short_and_distinct(tmp_path):
    def label(*names):
        return label_runs([tmp_path / name for name in names])

    assert label("runs/a") == ["a"]
    assert label("runs/a", "runs/b") == ["a", "b"]
    assert label("a/version_0", "b/version_0") == ["a", "b"]
    assert label("a/version_0", "a/version_1") == ["version_0", "version_1"]
    assert label("x/a/version_0", "y/b/version_1") == ["x/a/version_0", "y/b/version_1"]
    assert label("a", "a/version_0") == ["a", "a/version_0"]


def refused(error, pattern, folders, tmp_path):
    """The report is refused in one line, and nothing is written."""
    with pytest.raises(error, match=pattern) as raised:
        report(folders, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_refuses_folders_that_are_no_runs_of_their_own(runs, tmp_path):
    missing = tmp_path / "nowhere"
    refused(FileNotFoundError, "nowhere: no such run folder", [*runs, missing], tmp_path)
    (tmp_path / "empty").mkdir()
    refused(FileNotFoundError, r"empty: .*metrics\.csv", [tmp_path / "empty"], tmp_path)
    refused(ValueError, "given twice", [runs[0], runs[0]], tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "an empty file"),
        (b"epoch,step,val/mIoU,val/fwIoU\n", "an empty file"),
        (b"epoch,step,val/mIoU,val/fwIoU\n0,1,0.5,0.6\n1,2,0.", "the last line is cut short"),
        (b"epoch,step,val/mIoU,val/fwIoU\n0,1,0.5\n", "line 2: expected 4 columns, got 3"),
        (b"epoch,step,val/mIoU,val/fwIoU\n0,1,0.5,x\n", "line 2: .*'x'"),
        (b"epoch,step,val/mIoU,val/fwIoU\nnan,1,0.5,0.5\n", "line 2: .*epoch"),
        (b"step,val/mIoU\n0,1\n", "a column named epoch"),
        (b"epoch,step,train/loss\n0,1,0.5\n", "val/mIoU was never logged"),
        (b"\xff\xfe\x00\x81", "binary data"),
    ],
)
def test_refuses_a_damaged_log(runs, tmp_path, content, complaint):
    (runs[1] / "metrics.csv").write_bytes(content)
    refused(ValueError, rf"emanet/metrics\.csv.*{complaint}", runs, tmp_path)


@pytest.mark.parametrize("name", ["summary.json", "samples.npz"])
def test_refuses_a_missing_or_damaged_record(runs, tmp_path, name):
    path = runs[1] / name
    path.write_bytes(path.read_bytes()[:-40])
    refused(ValueError, rf"emanet/{name}", runs, tmp_path)
    path.unlink()
    refused(FileNotFoundError, rf"emanet/{name}: no such file", runs, tmp_path)


def test_refuses_a_record_whose_parts_do_not_fit(runs, tmp_path):
    write_record(runs[0], parameters="many")
    refused(ValueError, r"mfnet/summary\.json: the entry parameters", runs, tmp_path)
    write_record(runs[0], palette=[[0, 0, 0]], class_names=["background"])
    refused(ValueError, r"mfnet/samples\.npz: .*labels 0 to 0", runs[:1], tmp_path)


def test_refuses_runs_that_cannot_be_compared(runs, tmp_path):
    write_record(runs[1], names=["background", "disc", "ring"])
    refused(ValueError, "emanet: its classes differ", runs, tmp_path)
    write_record(runs[1], seed=1)
    refused(ValueError, "emanet: its sample images differ", runs, tmp_path)
    write_record(runs[1], size=(12, 17))
    refused(ValueError, "emanet: its sample images differ", runs, tmp_path)
