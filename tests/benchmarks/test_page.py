"""Rows in, page out: what is written agrees with the rows, and which rows stand."""

from __future__ import annotations

import dataclasses
import json

import made_up_rows
import pytest
from made_up_rows import CPU, GPU, NEWER, NOT_MEASURED, RUN, append
from PIL import Image
from repository import cells, document, folder, panels, points, region, results, run, section

from benchmarks.kernels import BOTH
from benchmarks.report import __main__ as report
from benchmarks.report.plots import PLOTS, picture
from benchmarks.schema import (
    ACCURACY,
    ACCURACY_COST,
    BENCHMARKS,
    CONTEXTS,
    FACTORIZERS,
    HOST,
    OP,
    SDPA,
)

# Agreement.


def test_the_repository_says_what_its_rows_say(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_what_was_written_agrees_and_is_not_written_again(written, capsys):
    assert run(written, "--check") == 0
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*") if path.is_file()}
    assert run(written) == 0
    assert capsys.readouterr().out == ""
    assert {path: path.stat().st_mtime_ns for path in before} == before
    readme = (written / "README.md").read_text()
    assert readme.startswith("# Title\n\nBefore.\n")
    assert readme.endswith("\nAfter.\n")
    for name in ("README.md", "docs/paper.md"):  # links are from where they stand
        links = (written / name).read_text().split("](")[1:]
        assert len(links) == 2
        assert all(((written / name).parent / link.split(")")[0]).is_file() for link in links)


def test_check_names_texts_that_were_edited(written, capsys):
    before = {}
    for file, digits in {
        "README.md": ("| 35.0 | 5.00 |", "| 35.0 | 5.01 |"),
        "docs/benchmarks.md": ("| 35.0 [31.5, 38.5] |", "| 36.0 [31.5, 38.5] |"),
    }.items():
        before[file] = (written / file).read_text()
        assert digits[0] in before[file]
        (written / file).write_text(before[file].replace(*digits, 1))
    edited = {file: (written / file).read_text() for file in before}
    assert run(written, "--check") == 1
    says = "".join(f"benchmarks.report: {file} is not what the rows give\n" for file in before)
    assert capsys.readouterr().err == says
    assert {file: (written / file).read_text() for file in before} == edited
    assert run(written) == 0
    assert {file: (written / file).read_text() for file in before} == before


def test_check_names_plots_that_were_replaced(written, capsys):
    files = {plot: written / "docs" / "benchmarks" / f"{CPU}-{plot}.png" for plot in PLOTS}
    files["pareto"].write_bytes(files["contexts"].read_bytes())  # another plot
    Image.new("RGB", (9, 9)).save(files["factorizers"])  # not ours
    files["paper"].write_bytes(files["paper"].read_bytes()[:2000])  # not a picture
    files["training"].unlink()
    assert run(written, "--check") == 1
    named = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    wrong = ("pareto", "factorizers", "paper", "training")
    assert named == [f"docs/benchmarks/{CPU}-{plot}.png" for plot in wrong]


def test_check_names_all_that_shows_a_row_that_was_changed(written, capsys):
    path = folder(written) / "contexts.csv"
    path.write_text(path.read_text().replace(",5000000,", ",6000000,"))
    assert run(written, "--check") == 1
    named = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert named == [f"docs/benchmarks/{CPU}-contexts.png", "README.md", "docs/benchmarks.md"]
    assert run(written) == 0
    assert run(written, "--check") == 0


def test_a_plot_without_rows_goes_and_a_picture_of_somebody_elses_stays(written, capsys):
    pictures = written / "docs" / "benchmarks"
    Image.new("RGB", (9, 9)).save(pictures / "photograph.png")
    (folder(written) / "training.csv").unlink()
    assert run(written, "--check") == 1
    assert f"{CPU}-training.png" in capsys.readouterr().err
    assert run(written) == 0
    assert not (pictures / f"{CPU}-training.png").exists()
    assert (pictures / "photograph.png").exists()


def test_every_plot_is_drawn_from_plain_data_with_its_digest_and_small(drawn):
    page = (drawn / "docs" / "benchmarks.md").read_text()
    for plot in PLOTS:
        found = picture(plot, results(drawn))
        plain = json.loads(json.dumps(found.panels))
        path = drawn / "docs" / "benchmarks" / f"{CPU}-{plot}.png"
        with Image.open(path) as image:
            assert image.width == 960
            digest = dataclasses.replace(found, panels=plain).digest()
            assert image.text["Description"] == digest
        assert path.stat().st_size < 150 * 1024
        assert f"![{found.title}](benchmarks/{CPU}-{plot}.png)" in page


# Rows that are not there, or damaged.


def test_no_rows_at_all(tmp_path, capsys):
    where = tmp_path / "benchmarks" / "results"
    (where / "empty").mkdir(parents=True)
    assert run(tmp_path) == 1
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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- benchmarks: speed -->\n<!-- end benchmarks -->\n", "line 1: no region 'speed'"),
        ("a\n<!-- benchmarks: op -->\nb\n", "the region 'op' has no '<!-- end benchmarks -->'"),
        ("a\n<!-- end benchmarks -->\n", "line 2: expected no '<!-- end benchmarks -->' here"),
        (region("op").splitlines()[0] + "\n" + region("op"), "line 2: expected no"),
    ],
)
def test_a_broken_region_is_named(made, tmp_path, text, says):
    (tmp_path / "guide.md").write_text(text)
    with pytest.raises(ValueError, match=f"guide.md{':' if 'has no' in says else ','} {says}"):
        report.rewritten(tmp_path, tmp_path / "guide.md", [results(made)])


def test_markers_in_a_code_block_are_text(made, tmp_path):
    text = f"```\n{region('speed')}```\n"
    (tmp_path / "guide.md").write_text(text)
    assert report.rewritten(tmp_path, tmp_path / "guide.md", []) == text


def test_missing_rows_are_said_to_be_missing(root):
    for name in ("accuracy_cost", "training", "ceilings", "factorizers"):
        (folder(root) / f"{name}.csv").unlink()
    page = document(root, "docs/benchmarks.md")
    missing = ["Ceilings", "Factorizers", "Training", "MFNet Light, a part at a time"]
    lines = "\n".join(f"- {title}" for title in missing)
    assert f"### No rows yet\n\n{lines}\n\n## {GPU}" in page
    assert "pareto.png" not in page
    assert cells(section(root, "Accuracy"), "MF", "3")[-1] == "20.50"  # GFLOPs, and no time
    text = "<!-- benchmarks: factorizers -->\n\nNo rows yet.\n\n<!-- end benchmarks -->"
    assert text in document(root)


# What rows give.

CASE = ["(4, 512, 64, 1089)", "float32", "channels_last", "nmf, T = 6", "forward + backward"]
SHAPE = "(4, 2048, 64, 1089)"


@pytest.fixture(scope="session")
def texts(made) -> dict[str, str]:
    return {name: document(made, name) for name in ("docs/benchmarks.md", "README.md")}


@pytest.mark.parametrize(
    ("title", "first", "expected"),
    [
        ("Where the rows are from", [b.name], f"{RUN['run']} | abc1234 | 1 | `{RUN['command']}`")
        for b in BENCHMARKS
    ]
    + [
        ("Ceilings", ["float32", "copy"], "13.0 GB/s | 40.0 [36.0, 44.0]"),
        ("Ceilings", ["float32", "matmul"], "170 GFLOP/s | 100 [90.0, 110]"),
        # X has 4 * 2048 * 1089 floats, 34.03 MiB; the copy takes 5.6 ms.
        (
            "float32, contiguous, per image factors",
            [SHAPE, "forward", "mfops (native)"],
            "7.00 [6.30, 7.70] | 1.00 | 80% | 1.00 | 34.0 | 0.1%",
        ),
        (
            "float32, contiguous, per image factors",
            [SHAPE, "forward", "eager, as published"],
            "35.0 [31.5, 38.5] | 5.00 | 16% | 3.00 | 68.1 | 10.0%",
        ),
        (
            "float32, contiguous, per image factors",
            [SHAPE, "forward + backward", "copy"],
            "16.8 [15.1, 18.5] | 0.80 | 100% | - | - | -",
        ),
        (
            "float32, contiguous",
            ["(4, 512, 64, 1089)", "nmf, T = 6", "forward", "mfops (native)"],
            "20.0 [18.0, 22.0] | 1.00 | 20% | - | 8.51 | 0.1%",
        ),
        ("Host", ["(2, 64, 16, 100)", "float32", "no gradients", "mfops"], "20.0 | 0.80"),
        (
            "Gather and distribute",
            ["gather", "(8, 256, 32, 1600)", "float32", "contiguous", "forward", SDPA],
            "5.00 [4.50, 5.50] | 2.50",
        ),
        (
            "2048 to 256 channels, batch 1, float32",
            ["33x33", "forward + backward", "MF"],
            "channels_last | 180 [162, 198] | 0.60 | 1.20 | 5,000,000 | 10.50 | 16.0",
        ),
        (  # 3 s over 4.8 s, 3 s over 2.4 s
            "Networks",
            ["training", "MFNet"],
            "513x513 | channels_last | 29,738,997 | 122.26 | 3000 [2700, 3300] | 0.333 | 0.62 | "
            "1.25 | 16.0",
        ),
        (
            "Networks, with and without kernels",
            ["emanet", "inference", "mfops (reference)"],
            "contiguous | 300 [270, 330] | 1.50",
        ),
        ("Deployment", ["camvid_light", "360x480", "onnx"], "20.0 [18.0, 22.0] | 0.40"),
        (
            "Training",
            ["DeepLabV3+"],
            "5.00 | 1600 [1440, 1760] | 1.00 | 160 (10%) | 480 (30%) | 800 (50%) | 128 (8%) | "
            "32.0 (2%)",
        ),
        (  # 0.55, 0.56, 0.60: 0.57, and the root of (0.02^2 + 0.01^2 + 0.03^2) / 2 = 0.0007
            "Accuracy",
            ["none", "3"],
            "0.570 (0.026) | 0.770 (0.026) | 0.820 (0.026) | 16,000,000 | 11.10 | 110 | 0.55",
        ),
        (
            "The paper's Figure 6",
            ["DeepLabV3+"],
            "68.98 / 85.31 | 40.45 M | 40,352,181 | 144.39",
        ),
        ("README.md", ["none"], "16,000,000 | 11.10 | 0.570 (0.026), 3"),
        ("README.md", ["float32", SHAPE, "forward", "eager, as published"], "35.0 | 5.00 | 68.1"),
        (
            "README.md",
            [*CASE, "mfops (native)"],
            "60.0 | 0.20 | 0.25 | 0.40 | 8.51 | 0.50 | 0.50 | 0.50",
        ),
        (
            "README.md",
            ["33x33", "MF"],
            "5,000,000 | 10.50 | 0.60 | 1.20 | 0.60 | 1.20",
        ),
    ],
)
def test_tables_show_what_rows_give(texts, title, first, expected):
    text = texts.get(title) or texts["docs/benchmarks.md"].split(f"## {GPU}")[0]
    heading = next((h for h in (f"### {title}\n", f">{title}<", f"**{title}**") if h in text), "")
    text = text.split(heading, 1)[1] if heading else text
    text = text.split("\n### ")[0].split("</details>")[0]
    assert " | ".join(cells(text, *first)) == expected


def test_a_baseline_that_was_skipped_is_shown_with_its_reason(root):
    skipped = {"seed": 3, "mIoU": None, "skipped": "failed: a | b <c>"}
    append(ACCURACY, folder(root), [made_up_rows.accuracy()[0] | skipped])
    why = "not measured: backend 'triton' cannot run this call"
    op = section(root, "The op")
    assert op.count(f"mfops (Triton) | {why} | - | - | - | - | - |") == 2 * 2 * 2 * 3
    assert "not measured: segmentation_models_pytorch not installed" in section(root, "Networks")
    accuracy = section(root, "Accuracy")
    assert "| MF | seed 3 | not measured: failed: a \\| b &lt;c> |" in accuracy
    assert cells(accuracy, "MF", "3")[0] == "0.620 (0.020)"
    (folder(root) / "factorizers.csv").unlink()
    append(FACTORIZERS, folder(root), made_up_rows.factorizers(ours=None))
    why = "not measured: backend 'native' cannot run this call"
    assert cells(document(root), *CASE, "mfops (native)")[0] == why
    target = cells(section(root, "Factorizers"), "em: eager / mfops")
    assert target[1:3] == ["not evaluated: 0 of 1 cases", "-"]


def test_calls_that_came_late_are_counted(root):
    late = [row | NEWER | {"late": 3} for row in made_up_rows.op(dtype="bfloat16")]
    append(OP, folder(root, GPU), late)
    # 24 cases with 5 baselines of 10 rounds each
    assert "Calls not queued when the GPU came to them: 72 of 1200." in section(root, "The op", GPU)
    assert "not queued" not in section(root, "The op")


# Which rows stand.


def test_a_newer_run_replaces_an_older_in_its_cases_alone(root):
    newer = [row | NEWER | {"median_s": 0.001} for row in made_up_rows.op() if row["pass"] == BOTH]
    append(OP, folder(root), newer)
    readme = document(root)
    where = "float32", SHAPE
    assert cells(readme, *where, "forward", "eager, as published")[:2] == ["35.0", "5.00"]
    assert cells(readme, *where, "forward + backward", "eager, as published")[:1] == ["1.00"]
    assert "commit def5678; 2026-11-25" in readme
    lines = section(root, "Where the rows are from").splitlines()
    op = [line for line in lines if line.startswith("| op |")]
    assert ["def5678" in line for line in op] == [False, True]


def test_a_run_that_measured_nothing_replaces_nothing(root):
    """But is shown where there is no other."""
    before = section(root, "Host")
    skipped = {"skipped": "--budget 1 was used up", **NOT_MEASURED}
    append(HOST, folder(root), [row | NEWER | skipped for row in made_up_rows.host()])
    assert section(root, "Host") == before
    (folder(root) / "host.csv").unlink()
    append(HOST, folder(root), [row | NEWER | skipped for row in made_up_rows.host()])
    assert "not measured: --budget 1 was used up" in section(root, "Host")


def test_of_training_runs_the_newest_of_each_seed_stands(root):
    one = made_up_rows.accuracy()[0]  # mf, seed 0
    append(ACCURACY, folder(root), [one | NEWER | {"mIoU": 0.66}])
    # 0.66, 0.62, 0.64: their mean, and the root of (0.02^2 + 0.02^2) / 2
    assert cells(section(root, "Accuracy"), "MF", "3")[0] == "0.640 (0.020)"
    (folder(root) / "accuracy.csv").unlink()
    append(ACCURACY, folder(root), [one])
    assert cells(section(root, "Accuracy"), "MF", "1")[0] == "0.600 (-)"


def test_another_environment_is_another_case(root):
    before = document(root)
    setting = {"environment": "THP_MEM_ALLOC_ENABLE=1", **NEWER}
    append(OP, folder(root), [row | setting for row in made_up_rows.op()])
    faster = [row | setting | {"median_s": 1e-5} for row in made_up_rows.host()]
    append(HOST, folder(root), faster)
    assert document(root) == before
    title = "<summary>float32, contiguous, shared factors, THP_MEM_ALLOC_ENABLE=1</summary>"
    assert title in section(root, "The op")
    plain, own = section(root, "Host").split("**THP_MEM_ALLOC_ENABLE=1**")
    where = "(2, 64, 16, 100)", "float32", "no gradients", "mfops"
    assert (cells(plain, *where)[0], cells(own, *where)[0]) == ("20.0", "10.0")
    command = "`THP_MEM_ALLOC_ENABLE=1 python -m pytest benchmarks`"
    assert command in section(root, "Where the rows are from")


def test_the_preferred_machine_is_shown_where_it_has_rows(root, monkeypatch):
    monkeypatch.setattr("benchmarks.report.page.PREFERRED", "z-cpu")
    append(CONTEXTS, folder(root, "z-cpu"), [r | NEWER for r in made_up_rows.contexts()])
    readme = document(root)
    assert "def5678" in readme.split("benchmarks: contexts")[1].split("end benchmarks")[0]
    assert "abc1234" in readme.split("benchmarks: op")[1].split("end benchmarks")[0]


def test_a_document_has_the_median_of_all_runs_of_a_commit(root):
    for run_, ours in {"2026-11-24T09:00:00Z": 0.03, "2026-11-24T10:00:00Z": 0.01}.items():
        append(FACTORIZERS, folder(root), made_up_rows.factorizers(ours=ours, run=run_))
    other = made_up_rows.factorizers(ours=0.09, run="2026-11-24T09:30:00Z", commit="def5678")
    append(FACTORIZERS, folder(root), other)
    case = ("(4, 512, 64, 1089)", "float32", "contiguous", "em, T = 3", "forward")
    median = ["10.0", "0.20 (0.10 to 0.30)", "0.25 (0.12 to 0.38)"]
    assert cells(document(root), *case, "mfops (native)")[:3] == median
    target = cells(section(root, "Factorizers"), "em: eager / mfops")
    assert (target[1], target[-1]) == ("4.00", "2.67 to 8.00")


def test_contexts_have_the_ratios_of_both_passes(root):
    found = [r | {"over_aspp": 0.7 if r["pass"] == BOTH else 0.6} for r in made_up_rows.contexts()]
    append(CONTEXTS, folder(root), [row | NEWER for row in found])
    assert cells(document(root), "33x33", "MF")[2:] == ["0.60", "1.20", "0.70", "1.20"]


def test_contexts_that_all_failed_are_no_plot(root):
    (folder(root) / "contexts.csv").unlink()
    nothing = {"skipped": "failed: no memory", **NOT_MEASURED}
    append(CONTEXTS, folder(root), [row | nothing for row in made_up_rows.contexts()])
    assert panels(root, "contexts") == []
    assert "failed: no memory" in section(root, "Contexts")


def test_scores_and_costs_need_not_be_of_the_same_networks(root):
    new = {"baseline": "nmf", "mIoU": 0.7}
    (folder(root) / "accuracy.csv").unlink()
    few = [row for row in made_up_rows.accuracy() if row["baseline"] in ("mf", "none")]
    append(ACCURACY, folder(root), [*few, few[0] | new])
    text = section(root, "Accuracy")
    assert cells(text, "MF", "3")[-2:] == ["160", "0.80"]  # ASPP's time is there, its score not
    assert "| ASPP |" not in text
    assert cells(text, "NMF (Hamburger)", "1")[-2:] == ["-", "-"]
    drawn = [set(points(panel)) for panel in panels(root, "pareto")]
    networks = {"MF", "none"}
    assert drawn == [networks | {"NMF (Hamburger)"}, networks, networks | {"NMF (Hamburger)"}]


def test_variants_have_a_table_of_their_own(root):
    """MFNet Light stands in both, and they are no points of the picture."""
    light, variant = (
        [row | {"baseline": baseline} for row in made_up_rows.accuracy() if row["baseline"] == of]
        for baseline, of in (("mfnet_light", "aspp"), ("light: K = 32", "em"))
    )
    append(ACCURACY, folder(root), [*light, *variant])
    networks = section(root, "Accuracy")
    parts = section(root, "MFNet Light, a part at a time")
    assert "light: K = 32" not in networks
    assert "| MF |" not in parts
    assert cells(networks, "MFNet Light", "3")[0] == "0.660 (0.010)"
    assert cells(parts, "MFNet Light", "3")[:5] == cells(networks, "MFNet Light", "3")[:5]
    assert cells(parts, "light: K = 32", "3")[0] == "0.620 (0.010)"
    assert cells(document(root), "light: K = 32", "3")[0] == "0.620 (0.010)"
    assert all("light: K = 32" not in points(panel) for panel in panels(root, "pareto"))


def test_a_score_counts_wherever_it_was_trained(root):
    """A latency does not: it is this machine's own."""
    elsewhere = {"baseline": "nmf", "device": "a GPU"} | NEWER
    new = [row | elsewhere for row in made_up_rows.accuracy() if row["baseline"] == "mf"]
    append(ACCURACY, folder(root, GPU), new)
    text = section(root, "Accuracy")
    assert cells(text, "NMF (Hamburger)", "3")[0] == cells(text, "MF", "3")[0]
    assert cells(text, "NMF (Hamburger)", "3")[-2:] == ["-", "-"]
    assert text.count("NMF (Hamburger)") == 1
    assert "a GPU" not in section(root, "Where the rows are from")
    assert "a GPU" in section(root, "Where the rows are from", GPU)


def test_latency_is_that_of_the_same_data_recipe_and_flags(root):
    other = {"flags": "--trainer.max_epochs 40 --data.resize [180,240]"}
    append(ACCURACY, folder(root), made_up_rows.accuracy(**other))
    append(ACCURACY_COST, folder(root), made_up_rows.accuracy_cost(0.1, **other))
    first, second = section(root, "Accuracy").split(f", {other['flags']}**")
    assert cells(first, "MF", "3")[-2:] == ["160", "0.80"]
    assert cells(second, "MF", "3")[-2:] == ["16.0", "0.80"]
    drawn = [points(panel)["MF"][0] for panel in panels(root, "pareto")]
    assert drawn == [20.5, 20.5, 160, 16, 16, 16]


def test_a_document_shows_the_recipe_with_the_most_networks_of_each_data_set(root):
    voc = made_up_rows.accuracy(data="voc", flags="--few")[:6]  # mf and em
    more = [row | {"mIoU": 0.9} for row in made_up_rows.accuracy(data="voc")[:9]]
    new = [row | {"baseline": "nmf"} for row in made_up_rows.accuracy(data="voc")[:3]]
    append(ACCURACY, folder(root), [*voc, *more, *new])
    readme = document(root)
    assert cells(readme, "MF")[-2:] == ["0.620 (0.020), 3", "0.900 (0.000), 3"]
    assert cells(readme, "none")[-2:] == ["0.570 (0.026), 3", "-"]
    assert cells(readme, "NMF (Hamburger)")[-2:] == ["-", "0.620 (0.020), 3"]
