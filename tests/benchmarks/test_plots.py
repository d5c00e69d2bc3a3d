"""What the plots are drawn from, by made-up rows."""

from __future__ import annotations

import dataclasses
import json

import made_up_rows
import pytest
from made_up_rows import CPU
from PIL import Image
from repository import folder, page, panels, points, results, section

from benchmarks.bench_op import Problem
from benchmarks.kernels import FORWARD
from benchmarks.report.plots import PLOTS, Picture
from benchmarks.schema import (
    ACCURACY,
    CONTEXTS,
    COPY,
    EAGER,
    FACTORIZERS,
    MODELS,
    NATIVE,
)


def test_every_plot_is_drawn_with_its_digest_and_small(drawn):
    for plot, make_picture in PLOTS.items():
        path = drawn / "docs" / "benchmarks" / f"{CPU}-{plot}.png"
        with Image.open(path) as image:
            assert image.width == 960
            assert image.text["Description"] == make_picture(results(drawn)).digest()
        assert path.stat().st_size < 150 * 1024
        assert f"](benchmarks/{CPU}-{plot}.png)" in page(drawn)


def test_a_digest_is_of_data_and_labels():
    def digest(title: str = "t", **panel: object) -> str:
        return Picture(title, "alt", [panel], lambda panels: None).digest()

    assert digest(a=1, b=[2.5]) == digest(b=[2.5], a=1)
    assert len({digest(a=1), digest(a=2), digest("u", a=1), digest(b=1)}) == 4


def test_pareto_joins_those_that_no_other_beats(made):
    by_flops, by_latency, by_parameters = panels(made, "pareto")
    assert {p["name"]: p["sd"] for p in by_flops["points"]}["MF"] == 0.02
    assert points(by_flops)["none"] == (11.1, 0.57)
    assert points(by_latency)["ASPP"] == (200, 0.66)
    best = [("none", 0.57), ("EM", 0.62), ("ASPP, separable", 0.65), ("ASPP", 0.66)]
    assert by_flops["line"] == [points(by_flops)[name] for name, _ in best]
    assert [y for _, y in by_flops["line"]] == [y for _, y in best]
    # EM takes longer than the better separable ASPP.
    assert by_latency["line"] == [(110, 0.57), (140, 0.65), (200, 0.66)]
    assert by_parameters["line"] == [(16, 0.66)]


def test_few_seeds_are_hollow_and_off_the_line(root):
    one = made_up_rows.accuracy()[0] | {"baseline": "nmf", "mIoU": 0.7}
    made_up_rows.append(ACCURACY, folder(root), [one])
    by_flops, *_ = panels(root, "pareto")
    (nmf,) = (p for p in by_flops["points"] if p["hollow"])
    assert nmf["name"] == "NMF (Hamburger)"
    assert by_flops["line"][-1][1] == 0.66


def test_context_bars(made):
    drawn = panels(made, "contexts")
    assert drawn[0]["names"][:3] == ["MF", "EM", "ASPP"]
    assert drawn[0]["ours"] == [True, False, False, False, False]
    assert [panel["values"][0] for panel in drawn] == [5, 10.5, 0.6, 0.6]


def test_factorizer_bars(made):
    drawn = panels(made, "factorizers")
    assert drawn[0]["names"] == [
        "mfops (native)",
        "eager, as published",
        "eager, at its best",
        "torch.compile",
    ]
    assert drawn[0]["ours"] == [True, False, False, False]
    assert [panel["values"] for panel in drawn] == [
        [0.2, 1, 0.8, 0.5],  # em, nmf, nmf with backward
        [0.2, 1, 0.8, 0.5],
        [0.2, 1, 0.8, 0.5],
        [0.25, 1, 1, 1],  # and its memory
    ]


def test_factorizer_bars_without_ours_or_without_the_published_lines(root):
    path = folder(root) / "factorizers.csv"
    path.unlink()
    made_up_rows.append(FACTORIZERS, folder(root), made_up_rows.factorizers(ours=None))
    assert panels(root, "factorizers")[0]["names"][0] == "eager, as published"
    path.unlink()
    others = [row for row in made_up_rows.factorizers() if row["baseline"] != EAGER]
    made_up_rows.append(FACTORIZERS, folder(root), others)
    assert PLOTS["factorizers"](results(root)) is None


def test_roofline(made):
    (panel,) = panels(made, "roofline")
    assert panel["ceilings"] == {COPY: 1.3e10, "matmul": 1.7e11}
    problem = Problem(made_up_rows.SHAPE, "float32", "contiguous", "shared")
    flops = 2 * 4 * 2048 * 64 * 1089
    x = float(f"{flops / problem.floor_bytes(FORWARD):.6g}")
    y = float(f"{flops / 0.007:.6g}")
    assert {"baseline": NATIVE, "pass": FORWARD, "x": x, "y": y} in panel["points"]
    # Four baselines, three passes, two kinds of factors; the copy has no FLOPs.
    assert len(panel["points"]) == 4 * 3 * 2


def test_the_papers_plot(made):
    parameters, flops = panels(made, "paper")
    printed = [p["x"] for p in parameters["points"] if p["hollow"]]
    assert printed == [29.73, 40.45, 34.65]
    assert points(parameters)["DeepLabV3+"] == (40.3522, 68.98)
    assert points(flops)["EMANet"] == (92.95, 70.05)


def test_training_bars_add_up_to_the_step(made):
    (panel,) = panels(made, "training")
    assert panel["names"] == ["MFNet", "DeepLabV3+", "EMANet"]
    totals = [sum(parts) for parts in zip(*panel["parts"].values(), strict=True)]
    assert totals == pytest.approx([1000, 1600, 800])


def test_models_plot(made):
    inference, training = panels(made, "models")
    assert points(inference)["MFNet"] == (122.26, 500)
    assert points(training)["smp PSPNet"] == (23.3, 900)
    assert "smp UPerNet" not in points(inference)


def test_the_papers_plot_needs_all_of_its_networks(root):
    path = folder(root) / "models.csv"
    path.unlink()
    made_up_rows.append(
        MODELS, folder(root), [r for r in made_up_rows.models() if r["baseline"] != "emanet"]
    )
    assert isinstance(PLOTS["models"](results(root)), Picture)
    assert PLOTS["paper"](results(root)) is None


def test_what_is_drawn_is_plain_data(made):
    for make_picture in PLOTS.values():
        found = make_picture(results(made))
        drawn = json.loads(json.dumps(found.panels))
        assert dataclasses.replace(found, panels=drawn).digest() == found.digest()


def test_contexts_that_all_failed_are_no_plot(root):
    nothing = {"skipped": "failed: no memory", "median_s": None, "q1_s": None, "q3_s": None}
    (folder(root) / "contexts.csv").unlink()
    made_up_rows.append(CONTEXTS, folder(root), [row | nothing for row in made_up_rows.contexts()])
    assert PLOTS["contexts"](results(root)) is None
    assert "failed: no memory" in section(root, "Contexts")
