"""Tables of the page and of other documents, from made-up rows."""

from __future__ import annotations

import made_up_rows
from made_up_rows import GPU, RUN
from repository import NEWER, cells, document, folder, page, picture, points, section

from benchmarks import bench_factorizers, rows
from benchmarks.bench_op import GPU_SHAPES, Case
from benchmarks.kernels import BOTH, FORWARD
from benchmarks.questions import (
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
from benchmarks.report import load


def test_where_rows_are_from(root):
    assert made_up_rows.RUN["environment"] == ""
    text = section(root, "Where the rows are from")
    assert (
        "1. A CPU, 2 threads; CPU threads: 2; Python 3.11.7, torch 2.14.1; extension without CUDA; "
        "backends: native, reference" in text
    )
    command = "`python -m pytest benchmarks`"
    for question in load.QUESTIONS:
        assert cells(text, question.name) == [RUN["run"], "abc1234", "1", command]


def test_ceilings_are_in_bytes_and_flops(root):
    text = section(root, "Ceilings")
    assert cells(text, "float32", "copy") == ["13.0 GB/s", "40.0 [36.0, 44.0]"]
    assert cells(text, "float32", "matmul") == ["170 GFLOP/s", "100 [90.0, 110]"]


def test_op_shows_the_medians_and_ratios_of_its_rows(root):
    text = section(root, "The op")
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
    readme = " ".join(document(root, "README.md").split())
    assert "Of all 12 figures of the op" in readme
    assert "mfops is the fastest in 12; at worst" in readme
    case = Case(made_up_rows.SHAPE, "float32", "channels_last", "per image")
    seconds = {NATIVE: 0.005, TRITON: 0.001, EAGER: 0.006, COMPILE: 0.004, COPY: 0.002}
    newer = made_up_rows.op_figure(case, BOTH, seconds)
    rows.append(OP, folder(root), [row | NEWER for row in newer])
    assert (
        "mfops is the fastest in 11; at worst torch.compile takes 0.80 of its time: "
        "(4, 2048, 64, 1089), float32, channels_last, per image factors, forward + backward."
    ) in " ".join(document(root, "README.md").split())


def test_calls_that_came_late_are_counted(root):
    rows.append(
        OP, folder(root, GPU), [r | NEWER | {"late": 3} for r in made_up_rows.op("bfloat16")]
    )
    # 12 figures with 5 rivals of 10 rounds each
    assert "36 of 600 calls were not queued" in section(root, "The op", GPU)
    assert "not queued" not in section(root, "The op")


def test_a_gpu_has_its_targets(root):
    found = made_up_rows.op("bfloat16", tuple(GPU_SHAPES))
    rows.append(OP, folder(root, GPU), found)
    rows.append(HOST, folder(root, GPU), made_up_rows.host())
    text = section(root, "The op", GPU)
    where = "forward (8, 512, 64, 32768), bfloat16"
    assert cells(text, where) == [
        ">= 85% of the copy",
        "80% (short by 6%), contiguous, per image, the lowest of 4 of 4",
        "MISSED",
    ]
    compiled = "forward + backward against compile, bfloat16, contiguous, per image"
    ratio = "1.50x (short by 20%), from 1.50x to 1.50x; at a copy's speed 1.88x"  # 1.5 / 80%
    assert cells(text, compiled)[1] == ratio
    assert cells(text, "host time per call, no gradients")[1:] == ["0.80x", "met"]


def test_factorizers_show_the_medians_and_ratios_of_their_rows(root):
    text = section(root, "Factorizers")
    table = text.split("<summary>float32, contiguous</summary>")[1].split("</details>")[0]
    case = ("(4, 512, 64, 1089)", "nmf, T = 6", "forward")
    # X has 4 * 512 * 1089 floats, 8.51 MiB; the copy takes 4 ms.
    native = ["20.0 [18.0, 22.0]", "1.00", "20%", "-", "8.51", "0.0%"]
    assert cells(table, *case, "mfops (native)") == native
    published = ["100 [90.0, 110]", "5.00", "4%", "1.00", "17.0", "0.0%"]
    assert cells(table, *case, "eager, as published") == published
    assert cells(table, *case, "mfops (Triton)")[0].startswith("not measured: backend 'triton'")
    assert "error, which the published lines do not compute" in " ".join(text.split())


def test_what_the_factorizers_have_to_reach_on_a_cpu(root):
    text = section(root, "Factorizers")
    required, measured, verdict = cells(text, "nmf: never slower than eager")
    assert (required, measured.split()[0], verdict) == (">= 1x", "4.00x", "met")
    required, measured, verdict = cells(text, "em: less peak memory than eager")
    assert (required, measured.split()[0], verdict) == ("< 1x", "0.50x", "met")


def test_a_cpu_that_is_measured_in_bfloat16_has_a_cpus_targets(root):
    rows.append(OP, folder(root), made_up_rows.op("bfloat16"))
    rows.append(FACTORIZERS, folder(root), made_up_rows.factorizers("bfloat16", ours=0.2))
    op = section(root, "The op")
    assert "<summary>bfloat16, contiguous, shared factors</summary>" in op
    assert "| target |" not in op
    measured = cells(section(root, "Factorizers"), "nmf: never slower than eager")[1]
    assert measured.startswith("0.40x (forward, nmf, 6 rounds, (4, 512, 64, 1089) bfloat16")


def test_what_the_factorizers_have_to_reach_on_a_gpu(root):
    assert "### Factorizers" not in page(root).split(f"## {GPU}")[1]
    shapes = tuple(bench_factorizers.GPU_SHAPES)
    found = made_up_rows.factorizers("bfloat16", shapes, device="A GPU", late=2)
    rows.append(FACTORIZERS, folder(root, GPU), found)
    text = section(root, "Factorizers", GPU)
    where = "bfloat16, against"
    assert cells(text, f"em (16, 512, 64, 1089), {where} eager, as published")[::2] == [
        ">= 5.0x",
        "met",
    ]
    required, measured, verdict = cells(text, f"nmf (16, 512, 64, 4225), {where} compile")
    assert (required, verdict) == (">= 3.0x", "MISSED")
    assert measured.startswith("2.50x (short by 20%) (forward, nmf, 6 rounds, ")
    assert measured.endswith("the lowest of 4; at a copy's speed 12.50x")  # 2.5 / 20%
    # 12 figures of 5 rivals and 10 rounds
    assert "24 of 600 calls were not queued" in text


def test_a_document_says_what_of_the_published_lines_is_left(root):
    readme = document(root, "README.md")
    case = ("(4, 512, 64, 1089)", "float32", "channels_last", "nmf, T = 6", "forward + backward")
    ours = ["40.0", "0.20", "0.25", "0.40", "8.51", "0.25", "0.25", "0.25"]
    assert cells(readme, *case, "mfops (native)") == ours


def test_a_document_has_the_median_of_all_runs_of_a_commit(root):
    seconds = {"2026-11-24T09:00:00Z": 0.03, "2026-11-24T10:00:00Z": 0.01}
    for run, ours in seconds.items():
        found = made_up_rows.factorizers(ours=ours, run=run)
        rows.append(FACTORIZERS, folder(root), found)
    other = made_up_rows.factorizers(ours=0.09, run="2026-11-24T09:30:00Z", commit="def5678")
    rows.append(FACTORIZERS, folder(root), other)
    readme = document(root, "README.md")
    case = ("(4, 512, 64, 1089)", "float32", "contiguous", "em, T = 3", "forward")
    assert cells(readme, *case, "mfops (native)")[:3] == [
        "10.0",
        "0.20 (0.10 to 0.30)",
        "0.25 (0.12 to 0.38)",
    ]
    assert "the median of up to 3 runs" in readme
    assert cells(section(root, "Factorizers"), "em: never slower than eager")[1].startswith(
        "4.00x, 2.67 to 8.00 in 3 runs"
    )


def test_factorizers_under_huge_pages_are_told(root):
    more = {"environment": "THP_MEM_ALLOC_ENABLE=1", "command": "python -m pytest other"}
    found = made_up_rows.factorizers(ours=0.04)
    rows.append(FACTORIZERS, folder(root), [row | more for row in found])
    readme = " ".join(document(root, "README.md").split())
    assert "mfops's time is: over published 0.40 to 0.40; over its best 0.50 to 0.50; " in readme
    assert "(`THP_MEM_ALLOC_ENABLE=1 python -m pytest other`, commit abc1234" in readme


def test_a_document_says_why_none_of_ours_was_measured(root):
    (folder(root) / "factorizers.csv").unlink()
    assert "benchmarks: factorizers -->\n\nNo rows yet.\n" in document(root, "README.md")
    assert "- Factorizers: no rows yet" in section(root, "Not here yet")
    rows.append(FACTORIZERS, folder(root), made_up_rows.factorizers(ours=None))
    case = ("(4, 512, 64, 1089)", "float32", "contiguous", "em, T = 3", "forward", "mfops (native)")
    why = "not measured: backend 'native' cannot run this call: no kernels"
    assert cells(document(root, "README.md"), *case) == [why, *"-------"]
    assert cells(section(root, "Factorizers"), "em: never slower than eager")[1:] == [
        "not evaluated: no figure of mfops native and eager",
        "-",
    ]


def test_attention_is_beside_our_lines(root):
    of_case = ["gather", "(8, 256, 32, 1600)", "float32", "contiguous", "forward", SDPA]
    assert cells(section(root, "Gather and distribute"), *of_case)[-1] == "2.50"


def test_host_is_in_microseconds(root):
    case = ("(2, 64, 16, 100)", "float32", "no gradients")
    assert cells(section(root, "Host"), *case, "mfops") == ["20.0", "0.80"]


def test_contexts_are_relative_to_aspp_and_em(root):
    text = section(root, "Contexts")
    assert "**2048 to 256 channels, batch 1, float32**" in text
    expected = ["channels_last", "180 [162, 198]", "0.60", "1.20", "5,000,000", "31.50", "16.0"]
    assert cells(text, "33x33", "forward + backward", "MF") == expected
    both = [row | {"over_aspp": 0.7} for row in made_up_rows.contexts() if row["pass"] == BOTH]
    forward = [row for row in made_up_rows.contexts() if row["pass"] == FORWARD]
    rows.append(CONTEXTS, folder(root), [row | NEWER for row in forward + both])
    readme = document(root, "README.md")
    assert cells(readme, "33x33", "MF") == ["5,000,000", "10.50", "0.60", "1.20", "0.70", "1.20"]


def test_networks(root):
    text = section(root, "Networks")
    expected = ["513x513", "channels_last", "29,738,997", "122.26", "3000 [2700, 3300]"]
    expected += ["0.667", "0.62", "1.25", "512"]  # 3 s over 4.8 s, 3 s over 2.4 s
    assert cells(text, "training", "MFNet") == expected


def test_a_network_on_the_reference_is_beside_itself_on_the_kernels(root):
    text = section(root, "Networks, with and without kernels")
    assert "**resnet50, 513x513, batch 1, bfloat16 autocast**" in text
    of_reference = cells(text, "emanet", "inference", "mfops (reference)")
    assert of_reference == ["contiguous", "300 [270, 330]", "1.50", "-"]


def test_training_shows_where_the_time_goes(root):
    expected = ["5.00", "1600 [1440, 1760]", "1.00", "160 (10%)", "480 (30%)", "800 (50%)"]
    expected += ["128 (8%)", "32.0 (2%)"]
    assert cells(section(root, "Training"), "DeepLabV3+") == expected


def test_accuracy_is_a_mean_with_a_sample_deviation(root):
    text = section(root, "Accuracy")
    assert "**camvid, recipe camvid, resnet18, 360x480, 40 epochs**" in text
    # 0.55, 0.56, 0.60: 0.57, and the root of (0.02^2 + 0.01^2 + 0.03^2) / 2 = 0.0007
    none = ["0.570 (0.026)", "0.770 (0.026)", "0.820 (0.026)", "16,000,000", "11.10", "110", "0.55"]
    assert cells(text, "none", "3") == none
    assert cells(document(root, "README.md"), "none", "3") == none


def test_some_contexts_alone_are_trained(root):
    """Costs are of every network there is, scores of those that were trained."""
    (folder(root) / "accuracy.csv").unlink()
    few = [row for row in made_up_rows.accuracy() if row["rival"] in ("mf", "none")]
    rows.append(ACCURACY, folder(root), few)
    text = section(root, "Accuracy")
    assert cells(text, "MF", "3")[-2:] == ["160", "0.80"]  # ASPP's time is there, its score not
    assert "| ASPP |" not in text
    panels = picture(root, "pareto")["panels"]
    assert [set(points(panel)) for panel in panels] == [{"MF", "none"}] * 3


def test_a_context_that_came_later_has_no_cost_yet(root):
    new = {"rival": "nmf", "mIoU": 0.7, "fwIoU": 0.9, "accuracy": 0.95}
    rows.append(ACCURACY, folder(root), [made_up_rows.accuracy()[0] | new])
    assert cells(section(root, "Accuracy"), "NMF (Hamburger)", "1")[-2:] == ["-", "-"]
    by_flops, by_latency, _ = picture(root, "pareto")["panels"]
    assert "NMF (Hamburger)" in points(by_flops)
    assert "NMF (Hamburger)" not in points(by_latency)


def test_variants_have_a_table_of_their_own(root):
    """MFNet Light stands in both, and they are no points of the picture."""
    light, variant = (
        [row | {"rival": rival} for row in made_up_rows.accuracy() if row["rival"] == of]
        for rival, of in (("mfnet_light", "aspp"), ("light: K = 8", "em"))
    )
    rows.append(ACCURACY, folder(root), [*light, *variant])
    networks, parts = (
        section(root, title) for title in ("Accuracy", "MFNet Light, a part at a time")
    )
    assert "light: K = 8" not in networks
    assert "| MF |" not in parts
    assert cells(networks, "MFNet Light", "3")[0] == "0.660 (0.010)"
    assert cells(parts, "MFNet Light", "3")[:5] == cells(networks, "MFNet Light", "3")[:5]
    assert cells(parts, "light: K = 8", "3")[0] == "0.620 (0.010)"
    assert cells(document(root, "README.md"), "light: K = 8", "3")[0] == "0.620 (0.010)"
    assert all("light: K = 8" not in points(panel) for panel in picture(root, "pareto")["panels"])


def test_a_score_counts_wherever_it_was_trained(root):
    """A latency does not: it is this machine's own."""
    elsewhere = {"rival": "nmf", "device": "a GPU"} | NEWER
    new = [row | elsewhere for row in made_up_rows.accuracy() if row["rival"] == "mf"]
    another_recipe = [row | {"flags": "--seed"} for row in new]
    rows.append(ACCURACY, folder(root).parent / "a-gpu", [*new, *another_recipe])
    text = section(root, "Accuracy")
    assert cells(text, "NMF (Hamburger)", "3")[0] == cells(text, "MF", "3")[0]
    assert cells(text, "NMF (Hamburger)", "3")[-2:] == ["-", "-"]
    assert text.count("NMF (Hamburger)") == 1
    assert "a GPU" in section(root, "Where the rows are from")


def test_latency_is_that_of_the_same_data_recipe_and_flags(root):
    other = {"flags": "--data.resize [180,240]"}
    rows.append(ACCURACY, folder(root), made_up_rows.accuracy(**other))
    cost = [row | {"median_s": row["median_s"] / 10} for row in made_up_rows.accuracy_cost(**other)]
    rows.append(ACCURACY_COST, folder(root), cost)
    first, second = section(root, "Accuracy").split(f", {other['flags']}**")
    assert cells(first, "MF", "3")[-2:] == ["160", "0.80"]
    assert cells(second, "MF", "3")[-2:] == ["16.0", "0.80"]
    panels = picture(root, "pareto")["panels"]
    assert [points(panel)["MF"][0] for panel in panels] == [20.5, 20.5, 160, 16, 16, 16]


def test_the_papers_table(root):
    expected = ["68.98 / 85.31", "40.45 M", "40,352,181", "144.39"]
    assert cells(section(root, "The paper's Figure 6"), "DeepLabV3+") == expected
    assert cells(document(root, "docs/paper.md"), "DeepLabV3+") == expected


def test_regions_link_from_where_they_stand(written):
    for name, links_and_pictures in {"README.md": (4, 2), "docs/paper.md": (2, 1)}.items():
        text = (written / name).read_text()
        links = [link.split(")")[0] for link in text.split("](")[1:]]
        assert (len(links), text.count("![")) == links_and_pictures
        for link in links:
            assert ((written / name).parent / link).is_file()
