"""That what is written agrees with the rows, and which rows stand."""

from __future__ import annotations

import made_up_rows
import pytest
from made_up_rows import CPU, GPU
from PIL import Image
from repository import (
    NEWER,
    cells,
    document,
    folder,
    page,
    region,
    run,
    section,
)

from benchmarks.bench_op import Problem
from benchmarks.kernels import BOTH, FORWARD
from benchmarks.report import __main__ as report
from benchmarks.schema import (
    ACCURACY,
    COMPILE,
    CONTEXTS,
    COPY,
    EAGER,
    HOST,
    NATIVE,
    OP,
)

# Agreement.


def test_the_repository_says_what_its_rows_say(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_what_was_written_agrees_and_is_not_written_again(root, capsys):
    assert run(root, "--check") == 1
    assert "mfops (native)" not in (root / "docs" / "benchmarks.md").read_text()
    assert run(root) == 0
    assert run(root, "--check") == 0
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(root) == 0
    assert capsys.readouterr().out == ""
    assert {path: path.stat().st_mtime_ns for path in before} == before
    readme = (root / "README.md").read_text()
    assert readme.startswith("# Title\n\nBefore.\n")
    assert readme.endswith("\nAfter.\n")


@pytest.mark.parametrize(
    ("file", "digits"),
    [
        ("docs/benchmarks.md", ("| 35.0 [31.5, 38.5] |", "| 36.0 [31.5, 38.5] |")),
        ("README.md", ("| 35.0 | 5.00 |", "| 35.0 | 5.01 |")),
        ("docs/paper.md", ("29,738,997", "29,738,998")),
    ],
)
def test_check_names_a_text_that_was_edited(written, file, digits, capsys):
    path = written / file
    before = path.read_text()
    assert digits[0] in before
    edited = before.replace(digits[0], digits[1], 1)
    path.write_text(edited)
    assert run(written, "--check") == 1
    assert capsys.readouterr().err == f"benchmarks.report: {file} is not what the rows give\n"
    assert path.read_text() == edited
    assert run(written) == 0
    assert path.read_text() == before


@pytest.mark.parametrize("wrong", ["another plot", "not ours", "not a picture", "missing"])
def test_check_names_a_plot_that_was_replaced(written, wrong, capsys):
    path = written / "docs" / "benchmarks" / f"{CPU}-contexts.png"
    if wrong == "another plot":
        path.write_bytes(path.with_name(f"{CPU}-pareto.png").read_bytes())
    elif wrong == "not ours":
        Image.new("RGB", (9, 9)).save(path)
    elif wrong == "not a picture":
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.unlink()
    assert run(written, "--check") == 1
    named = f"docs/benchmarks/{CPU}-contexts.png"
    assert capsys.readouterr().err == f"benchmarks.report: {named} is not what the rows give\n"
    assert run(written) == 0
    assert run(written, "--check") == 0


def test_check_names_all_that_shows_a_row_that_was_changed(written, capsys):
    path = folder(written) / "contexts.csv"
    path.write_text(path.read_text().replace(",5000000,", ",6000000,"))
    assert run(written, "--check") == 1
    named = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    plot = f"docs/benchmarks/{CPU}-contexts.png"
    assert named == [plot, "README.md", "docs/benchmarks.md"]


def test_a_plot_without_rows_goes_and_a_picture_of_somebody_elses_stays(written, capsys):
    theirs = written / "docs" / "benchmarks" / "photograph.png"
    Image.new("RGB", (9, 9)).save(theirs)
    assert run(written, "--check") == 0
    (folder(written) / "training.csv").unlink()
    assert run(written, "--check") == 1
    plot = written / "docs" / "benchmarks" / f"{CPU}-training.png"
    assert plot.name in capsys.readouterr().err
    assert run(written) == 0
    assert not plot.exists()
    assert theirs.exists()


# Rows that are not there, or damaged.


def test_no_rows_at_all(tmp_path, capsys):
    (tmp_path / "benchmarks" / "results" / "empty").mkdir(parents=True)
    for arguments in ((), ("--check",)):
        assert run(tmp_path, *arguments) == 1
        where = tmp_path / "benchmarks" / "results"
        expected = f"benchmarks.report: no rows in {where}: run make bench first\n"
        assert capsys.readouterr().err == expected
    assert not (tmp_path / "docs").exists()


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("op.csv", lambda text: text[: len(text) // 2], "cells"),
        ("op.csv", lambda text: text.replace("0.007", "fast", 1), "row 1: median_s"),
        ("op.csv", lambda text: text.replace("0.007", "", 1), "row 1: median_s"),
        ("op.csv", lambda text: text.replace("0.007", "nan", 1), "row 1: median_s"),
        ("op.csv", lambda text: text.replace("layout", "order", 1), "expected columns layout"),
        ("models.csv", lambda text: "\x00" + text, "models.csv"),
        ("accuracy.csv", lambda text: text.replace("0.82", "high", 1), "row 2: fwIoU"),
        ("surprise.csv", lambda text: "a,b\n", "no such benchmark"),
        ("op.csv", lambda text: text.replace("T08:00:00Z", "T09:00:00Z", 1), "row 1: run: 2026-"),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_written(root, file, damage, says, capsys):
    path = folder(root) / file
    path.write_text(damage(path.read_text() if path.exists() else ""))
    assert run(root) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.report: {path}")
    assert says in line
    assert "mfops (native)" not in (root / "README.md").read_text()


def test_missing_rows_are_said_to_be_missing(root):
    for name in ("accuracy_cost", "training", "ceilings"):
        (folder(root) / f"{name}.csv").unlink()
    missing = "### No rows yet\n\n- Ceilings\n- Training\n- MFNet Light, a part at a time\n\n## "
    assert missing in page(root)
    assert "### Ceilings" not in page(root).split(f"## {GPU}")[0]
    assert "pareto.png" not in page(root)
    assert cells(section(root, "Accuracy"), "MF", "3")[-1] == "20.50"  # GFLOPs, and no time


def test_a_region_without_rows_says_so(root):
    (folder(root) / "accuracy.csv").unlink()
    readme = document(root, "README.md")
    assert "<!-- benchmarks: accuracy -->\n\nNo rows yet.\n\n<!-- end benchmarks -->" in readme
    assert "-pareto.png" not in readme


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- benchmarks: speed -->\n<!-- end benchmarks -->\n", "line 1: no region 'speed'"),
        ("a\n<!-- benchmarks: op -->\nb\n", "the region 'op' has no '<!-- end benchmarks -->'"),
        ("a\n<!-- end benchmarks -->\n", "line 2: expected no '<!-- end benchmarks -->' here"),
        (region("op").splitlines()[0] + "\n" + region("op"), "line 2: expected no"),
    ],
)
def test_a_broken_region_is_named_before_anything_is_written(root, text, says, capsys):
    (root / "docs" / "guide.md").write_text(text)
    assert run(root) == 1
    assert f"docs/guide.md{':' if 'has no' in says else ','} {says}" in capsys.readouterr().err
    assert "mfops (native)" not in (root / "README.md").read_text()


def test_markers_in_a_code_block_are_text(root):
    text = f"```\n{region('speed')}```\n"
    (root / "docs" / "guide.md").write_text(text)
    assert document(root, "docs/guide.md") == text


def test_a_baseline_that_was_skipped_is_shown_with_its_reason(root):
    made_up_rows.append(
        ACCURACY,
        folder(root),
        [made_up_rows.accuracy()[0] | {"seed": 3, "mIoU": None, "skipped": "failed: a | b <c>"}],
    )
    why = "not measured: backend 'triton' cannot run this call"
    op = section(root, "The op")
    assert op.count(f"mfops (Triton) | {why} | - | - | - | - | - |") == 2 * 2 * 3
    assert "not measured: segmentation_models_pytorch not installed" in section(root, "Networks")
    assert "| MF | seed 3 | not measured: failed: a \\| b &lt;c> |" in section(root, "Accuracy")
    assert cells(section(root, "Accuracy"), "MF", "3")[0] == "0.620 (0.020)"


# Which rows stand.


def test_a_newer_run_replaces_an_older_in_its_cases_alone(root):
    problem = Problem(made_up_rows.SHAPE, "float32", "contiguous", "shared")
    newer = made_up_rows.op_case(problem, FORWARD, {NATIVE: 0.005, EAGER: 0.015, COPY: 0.004})
    made_up_rows.append(OP, folder(root), [row | NEWER for row in newer])
    readme = document(root, "README.md")
    shape = "(4, 2048, 64, 1089)"
    eager = "eager, as published"
    assert cells(readme, "float32", shape, "forward", eager)[:2] == ["15.0", "3.00"]
    assert cells(readme, "float32", shape, "forward + backward", eager)[:2] == ["105", "5.00"]
    assert readme.count("| torch.compile | ") == 1
    assert "commit def5678; 2026-11-25" in readme
    op = [line for line in page(root).splitlines() if line.startswith("| op |")]
    assert ["def5678" in line for line in op] == [False, True, False]  # the third is the GPU's


def test_a_run_that_measured_nothing_replaces_nothing(root):
    before = section(root, "Host")
    skipped = {"skipped": "--budget 1 was used up", "median_s": None, "q1_s": None, "q3_s": None}
    made_up_rows.append(HOST, folder(root), [row | NEWER | skipped for row in made_up_rows.host()])
    assert section(root, "Host") == before


def test_of_training_runs_the_newest_of_each_seed_stands(root):
    one = made_up_rows.accuracy()[:1]  # mf, seed 0
    made_up_rows.append(ACCURACY, folder(root), [row | NEWER | {"mIoU": 0.66} for row in one])
    # 0.66, 0.62, 0.64: their mean, and the root of (0.02^2 + 0.02^2) / 2
    assert cells(section(root, "Accuracy"), "MF", "3")[0] == "0.640 (0.020)"
    (folder(root) / "accuracy.csv").unlink()
    made_up_rows.append(ACCURACY, folder(root), one)
    assert cells(section(root, "Accuracy"), "MF", "1")[0] == "0.600 (-)"


def test_another_environment_is_another_case(root):
    assert "THP_MEM" not in page(root) + document(root, "README.md")
    command = {"environment": "THP_MEM_ALLOC_ENABLE=1", **NEWER}
    problem = Problem(made_up_rows.SHAPE, "float32", "contiguous", "shared")
    both = {NATIVE: 0.01, EAGER: 0.037, COMPILE: 0.0122}
    new = made_up_rows.op_case(problem, FORWARD, {NATIVE: 0.01, EAGER: 0.021, COMPILE: 0.0095})
    new += made_up_rows.op_case(problem, BOTH, both)
    made_up_rows.append(OP, folder(root), [row | command for row in new])
    assert "float32, contiguous, shared factors, THP_MEM_ALLOC_ENABLE=1" in page(root)
    readme = document(root, "README.md")
    assert cells(readme, "eager, as published / mfops") == ["2.10", "3.70"]
    assert cells(readme, "torch.compile / mfops") == ["0.95", "1.22"]
    said = "commit def5678; 2026-11-25; `THP_MEM_ALLOC_ENABLE=1 python -m pytest benchmarks`."
    assert said in " ".join(readme.split())
    assert (
        cells(readme, "float32", "(4, 2048, 64, 1089)", "forward", "eager, as published")[0]
        == "35.0"
    )


def test_tables_name_an_environment_that_rows_have(root):
    waits = {"environment": "OMP_WAIT_POLICY=active", "median_s": 1e-5}
    made_up_rows.append(HOST, folder(root), [row | NEWER | waits for row in made_up_rows.host()])
    text = section(root, "Host")
    where = ("(2, 64, 16, 100)", "float32", "no gradients")
    assert cells(text, *where, "", "mfops")[0] == "20.0"
    assert cells(text, *where, "OMP_WAIT_POLICY=active", "mfops")[0] == "10.0"
    assert "environment" not in section(root, "Ceilings")


def test_the_preferred_machine_is_shown_where_it_has_rows(root, monkeypatch):
    monkeypatch.setattr("benchmarks.report.regions.PREFERRED", "z-cpu")
    made_up_rows.append(
        CONTEXTS, folder(root, "z-cpu"), [r | NEWER for r in made_up_rows.contexts()]
    )
    readme = document(root, "README.md")
    assert "def5678" in readme.split("benchmarks: contexts")[1].split("end benchmarks")[0]
    assert "abc1234" in readme.split("benchmarks: op")[1].split("end benchmarks")[0]
