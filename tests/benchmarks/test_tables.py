"""Tables of the page and of other documents, from made-up rows."""

from __future__ import annotations

import made_up_rows
import pytest
from made_up_rows import GPU, RUN
from repository import NEWER, cells, document, folder, page, panels, points, section

from benchmarks import bench_factorizers
from benchmarks.bench_op import GPU_SHAPES, Problem
from benchmarks.kernels import BOTH, FORWARD
from benchmarks.report.data import BENCHMARKS
from benchmarks.schema import (
    ACCURACY,
    ACCURACY_COST,
    COMPILE,
    CONTEXTS,
    COPY,
    EAGER,
    FACTORIZERS,
    HOST,
    NATIVE,
    OP,
    SDPA,
    TRITON,
)


def test_where_rows_are_from(made):
    assert made_up_rows.RUN["environment"] == ""
    text = section(made, "Where the rows are from")
    assert (
        "1. A CPU, 2 threads; CPU threads: 2; Python 3.11.7, torch 2.14.1; extension without CUDA; "
        "backends: native, reference" in text
    )
    command = "`python -m pytest benchmarks`"
    for benchmark in BENCHMARKS:
        assert cells(text, benchmark.name) == [RUN["run"], "abc1234", "1", command]


CASE = ["(4, 512, 64, 1089)", "float32", "channels_last", "nmf, T = 6", "forward + backward"]


@pytest.mark.parametrize(
    ("title", "first", "expected"),
    [
        ("Ceilings", ["float32", "copy"], "13.0 GB/s | 40.0 [36.0, 44.0]"),
        ("Ceilings", ["float32", "matmul"], "170 GFLOP/s | 100 [90.0, 110]"),
        ("Host", ["(2, 64, 16, 100)", "float32", "no gradients", "mfops"], "20.0 | 0.80"),
        (
            "Gather and distribute",
            ["gather", "(8, 256, 32, 1600)", "float32", "contiguous", "forward", SDPA],
            "5.00 [4.50, 5.50] | 2.50",
        ),
        (
            "Contexts",
            ["33x33", "forward + backward", "MF"],
            "channels_last | 180 [162, 198] | 0.60 | 1.20 | 5,000,000 | 31.50 | 16.0",
        ),
        (  # 3 s over 4.8 s, 3 s over 2.4 s
            "Networks",
            ["training", "MFNet"],
            "513x513 | channels_last | 29,738,997 | 122.26 | 3000 [2700, 3300] | 0.667 | 0.62 | "
            "1.25 | 512",
        ),
        (
            "Networks, with and without kernels",
            ["emanet", "inference", "mfops (reference)"],
            "contiguous | 300 [270, 330] | 1.50 | -",
        ),
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
    ],
)
def test_sections_show_what_rows_give(made, title, first, expected):
    assert " | ".join(cells(section(made, title), *first)) == expected


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (["none"], "16,000,000 | 11.10 | - | 0.570 (0.026), 3"),
        (["DeepLabV3+"], "68.98 / 85.31 | 40.45 M | 40,352,181 | 144.39"),
        ([*CASE, "mfops (native)"], "40.0 | 0.20 | 0.25 | 0.40 | 8.51 | 0.25 | 0.25 | 0.25"),
    ],
)
def test_regions_show_what_rows_give(made, first, expected):
    assert " | ".join(cells(document(made, "README.md"), *first)) == expected


def test_op_shows_the_medians_and_ratios_of_its_rows(made):
    text = section(made, "The op")
    table = text.split("<summary>float32, contiguous, per image factors</summary>")[1]
    table = table.split("</details>")[0]
    shape = "(4, 2048, 64, 1089)"
    # X has 4 * 2048 * 1089 floats, 34.03 MiB; the copy takes 5.6 ms.
    native = ["7.00 [6.30, 7.70]", "1.00", "80%", "1.00", "68.1", "0.1%"]
    eager = ["35.0 [31.5, 38.5]", "5.00", "16%", "3.00", "68.1", "10.0%"]
    assert cells(table, shape, "forward", "mfops (native)") == native
    assert cells(table, shape, "forward", "eager, as published") == eager
    copy = ["16.8 [15.1, 18.5]", "0.80", "100%", "-", "-", "-"]
    assert cells(table, shape, "forward + backward", "copy") == copy
    assert "target" not in text


def test_where_mfops_is_not_the_fastest_is_said(root):
    assert cells(document(root, "README.md"), "12", "12")
    problem = Problem(made_up_rows.SHAPE, "float32", "channels_last", "per image")
    seconds = {NATIVE: 0.005, TRITON: 0.001, EAGER: 0.006, COMPILE: 0.004, COPY: 0.002}
    newer = made_up_rows.op_case(problem, BOTH, seconds)
    made_up_rows.append(OP, folder(root), [row | NEWER for row in newer])
    assert cells(document(root, "README.md"), "12", "11") == [
        "torch.compile, time / mfops 0.80: (4, 2048, 64, 1089), float32, channels_last, "
        "per image factors, forward + backward"
    ]


def test_calls_that_came_late_are_counted(root):
    made_up_rows.append(
        OP, folder(root, GPU), [r | NEWER | {"late": 3} for r in made_up_rows.op("bfloat16")]
    )
    # 12 cases with 5 baselines of 10 rounds each
    assert "Calls not queued when the GPU came to them: 36 of 600." in section(root, "The op", GPU)
    assert "not queued" not in section(root, "The op")


def test_a_gpu_has_its_targets(root):
    made_up_rows.append(OP, folder(root, GPU), made_up_rows.op("bfloat16", tuple(GPU_SHAPES)))
    made_up_rows.append(HOST, folder(root, GPU), made_up_rows.host())
    text = section(root, "The op", GPU)
    assert cells(text, "forward (8, 512, 64, 32768), bfloat16")[::2] == [
        ">= 85% of the copy",
        "MISSED",
    ]
    compiled = "forward + backward against compile, bfloat16, contiguous, per image"
    ratio = "1.50x (short by 20%): from 1.50x to 1.50x; at a copy's speed 1.88x"  # 1.5 / 80%
    assert cells(text, compiled)[1] == ratio
    assert cells(text, "host time over eager's, no gradients")[2] == "met"


def test_factorizers_show_the_medians_and_ratios_of_their_rows(made):
    text = section(made, "Factorizers")
    table = text.split("<summary>float32, contiguous</summary>")[1].split("</details>")[0]
    case = ("(4, 512, 64, 1089)", "nmf, T = 6", "forward")
    # X has 4 * 512 * 1089 floats, 8.51 MiB; the copy takes 4 ms.
    native = ["20.0 [18.0, 22.0]", "1.00", "20%", "-", "8.51", "0.0%"]
    assert cells(table, *case, "mfops (native)") == native
    published = ["100 [90.0, 110]", "5.00", "4%", "1.00", "17.0", "0.0%"]
    assert cells(table, *case, "eager, as published") == published
    assert cells(table, *case, "mfops (Triton)")[0].startswith("not measured: backend 'triton'")


def test_what_the_factorizers_have_to_reach_on_a_cpu(made):
    text = section(made, "Factorizers")
    required, measured, verdict = cells(text, "nmf: never slower than eager")
    assert (required, measured.split(":")[0], verdict) == (">= 1x", "4.00x", "met")
    required, measured, verdict = cells(text, "em: less peak memory than eager")
    assert (required, measured.split(":")[0], verdict) == ("< 1x", "0.50x", "met")


def test_a_cpu_that_is_measured_in_bfloat16_has_a_cpus_targets(root):
    made_up_rows.append(OP, folder(root), made_up_rows.op("bfloat16"))
    made_up_rows.append(FACTORIZERS, folder(root), made_up_rows.factorizers("bfloat16", ours=0.2))
    op = section(root, "The op")
    assert "<summary>bfloat16, contiguous, shared factors</summary>" in op
    assert "| target |" not in op
    measured = cells(section(root, "Factorizers"), "nmf: never slower than eager")[1]
    assert measured.startswith("0.40x (short by 150%): nmf, 6, (4, 512, 64, 1089), bfloat16")


def test_what_the_factorizers_have_to_reach_on_a_gpu(root):
    assert "### Factorizers" not in page(root).split(f"## {GPU}")[1]
    shapes = tuple(bench_factorizers.GPU_SHAPES)
    found = made_up_rows.factorizers("bfloat16", shapes, device="A GPU", late=2)
    made_up_rows.append(FACTORIZERS, folder(root, GPU), found)
    text = section(root, "Factorizers", GPU)
    required, measured, verdict = cells(text, "nmf (16, 512, 64, 4225), bfloat16, against compile")
    assert (required, measured.split()[0], verdict) == (">= 3.0x", "2.50x", "MISSED")
    # 12 cases of 5 baselines and 10 rounds
    assert "Calls not queued when the GPU came to them: 24 of 600." in text


def test_a_document_has_the_median_of_all_runs_of_a_commit(root):
    seconds = {"2026-11-24T09:00:00Z": 0.03, "2026-11-24T10:00:00Z": 0.01}
    for run, ours in seconds.items():
        found = made_up_rows.factorizers(ours=ours, run=run)
        made_up_rows.append(FACTORIZERS, folder(root), found)
    other = made_up_rows.factorizers(ours=0.09, run="2026-11-24T09:30:00Z", commit="def5678")
    made_up_rows.append(FACTORIZERS, folder(root), other)
    readme = document(root, "README.md")
    case = ("(4, 512, 64, 1089)", "float32", "contiguous", "em, T = 3", "forward")
    assert cells(readme, *case, "mfops (native)")[:3] == [
        "10.0",
        "0.20 (0.10 to 0.30)",
        "0.25 (0.12 to 0.38)",
    ]
    target = cells(section(root, "Factorizers"), "em: never slower than eager")[1]
    assert target.startswith("4.00x: em, 3, ")
    assert "; 2.67x to 8.00x in 3 runs" in target


def test_factorizers_under_huge_pages_are_told(root):
    more = {"environment": "THP_MEM_ALLOC_ENABLE=1", "command": "python -m pytest other"}
    found = made_up_rows.factorizers(ours=0.04)
    made_up_rows.append(FACTORIZERS, folder(root), [row | more for row in found])
    readme = document(root, "README.md")
    assert cells(readme, "mfops / published") == ["0.40", "0.40"]
    assert cells(readme, "mfops / its best") == ["0.50", "0.50"]
    assert "`THP_MEM_ALLOC_ENABLE=1 python -m pytest other`." in " ".join(readme.split())


def test_a_document_says_why_none_of_ours_was_measured(root):
    (folder(root) / "factorizers.csv").unlink()
    assert "benchmarks: factorizers -->\n\nNo rows yet.\n" in document(root, "README.md")
    assert "\n- Factorizers\n" in page(root)
    made_up_rows.append(FACTORIZERS, folder(root), made_up_rows.factorizers(ours=None))
    case = ("(4, 512, 64, 1089)", "float32", "contiguous", "em, T = 3", "forward", "mfops (native)")
    why = "not measured: backend 'native' cannot run this call: no kernels"
    assert cells(document(root, "README.md"), *case) == [why, *"-------"]
    assert cells(section(root, "Factorizers"), "em: never slower than eager")[1:] == [
        "not evaluated: 0 cases",
        "-",
    ]


def test_contexts_are_relative_to_aspp_and_em(root):
    assert "**2048 to 256 channels, batch 1, float32**" in section(root, "Contexts")
    both = [row | {"over_aspp": 0.7} for row in made_up_rows.contexts() if row["pass"] == BOTH]
    forward = [row for row in made_up_rows.contexts() if row["pass"] == FORWARD]
    made_up_rows.append(CONTEXTS, folder(root), [row | NEWER for row in forward + both])
    readme = document(root, "README.md")
    assert cells(readme, "33x33", "MF") == ["5,000,000", "10.50", "0.60", "1.20", "0.70", "1.20"]


def test_some_contexts_alone_are_trained(root):
    """Costs are of every network there is, scores of those that were trained."""
    (folder(root) / "accuracy.csv").unlink()
    few = [row for row in made_up_rows.accuracy() if row["baseline"] in ("mf", "none")]
    made_up_rows.append(ACCURACY, folder(root), few)
    text = section(root, "Accuracy")
    assert cells(text, "MF", "3")[-2:] == ["160", "0.80"]  # ASPP's time is there, its score not
    assert "| ASPP |" not in text
    drawn = panels(root, "pareto")
    assert [set(points(panel)) for panel in drawn] == [{"MF", "none"}] * 3


def test_a_context_that_came_later_has_no_cost_yet(root):
    new = {"baseline": "nmf", "mIoU": 0.7, "fwIoU": 0.9, "accuracy": 0.95}
    made_up_rows.append(ACCURACY, folder(root), [made_up_rows.accuracy()[0] | new])
    assert cells(section(root, "Accuracy"), "NMF (Hamburger)", "1")[-2:] == ["-", "-"]
    by_flops, by_latency, _ = panels(root, "pareto")
    assert "NMF (Hamburger)" in points(by_flops)
    assert "NMF (Hamburger)" not in points(by_latency)


def test_variants_have_a_table_of_their_own(root):
    """MFNet Light stands in both, and they are no points of the picture."""
    light, variant = (
        [row | {"baseline": baseline} for row in made_up_rows.accuracy() if row["baseline"] == of]
        for baseline, of in (("mfnet_light", "aspp"), ("light: K = 8", "em"))
    )
    made_up_rows.append(ACCURACY, folder(root), [*light, *variant])
    networks, parts = (
        section(root, title) for title in ("Accuracy", "MFNet Light, a part at a time")
    )
    assert "light: K = 8" not in networks
    assert "| MF |" not in parts
    assert cells(networks, "MFNet Light", "3")[0] == "0.660 (0.010)"
    assert cells(parts, "MFNet Light", "3")[:5] == cells(networks, "MFNet Light", "3")[:5]
    assert cells(parts, "light: K = 8", "3")[0] == "0.620 (0.010)"
    assert cells(document(root, "README.md"), "light: K = 8", "3")[0] == "0.620 (0.010)"
    assert all("light: K = 8" not in points(panel) for panel in panels(root, "pareto"))


def test_a_score_counts_wherever_it_was_trained(root):
    """A latency does not: it is this machine's own."""
    elsewhere = {"baseline": "nmf", "device": "a GPU"} | NEWER
    new = [row | elsewhere for row in made_up_rows.accuracy() if row["baseline"] == "mf"]
    another_recipe = [row | {"flags": "--seed"} for row in new]
    made_up_rows.append(ACCURACY, folder(root).parent / "a-gpu", [*new, *another_recipe])
    text = section(root, "Accuracy")
    assert cells(text, "NMF (Hamburger)", "3")[0] == cells(text, "MF", "3")[0]
    assert cells(text, "NMF (Hamburger)", "3")[-2:] == ["-", "-"]
    assert text.count("NMF (Hamburger)") == 1
    assert "a GPU" in section(root, "Where the rows are from")


def test_latency_is_that_of_the_same_data_recipe_and_flags(root):
    other = {"flags": "--data.resize [180,240]"}
    made_up_rows.append(ACCURACY, folder(root), made_up_rows.accuracy(**other))
    cost = [row | {"median_s": row["median_s"] / 10} for row in made_up_rows.accuracy_cost(**other)]
    made_up_rows.append(ACCURACY_COST, folder(root), cost)
    first, second = section(root, "Accuracy").split(f", {other['flags']}**")
    assert cells(first, "MF", "3")[-2:] == ["160", "0.80"]
    assert cells(second, "MF", "3")[-2:] == ["16.0", "0.80"]
    drawn = panels(root, "pareto")
    assert [points(panel)["MF"][0] for panel in drawn] == [20.5, 20.5, 160, 16, 16, 16]


def test_regions_link_from_where_they_stand(drawn):
    for name, links_and_pictures in {"README.md": (2, 1), "docs/paper.md": (2, 1)}.items():
        text = (drawn / name).read_text()
        links = [link.split(")")[0] for link in text.split("](")[1:]]
        assert (len(links), text.count("![")) == links_and_pictures
        for link in links:
            assert ((drawn / name).parent / link).is_file()
