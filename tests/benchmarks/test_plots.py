"""What the plots are drawn from, by made-up rows."""

from __future__ import annotations

import made_up_rows
import pytest
from made_up_rows import append
from repository import folder, panels, points

from benchmarks.bench_op import Problem
from benchmarks.kernels import FORWARD
from benchmarks.report.plots import Picture
from benchmarks.schema import ACCURACY, COPY, EAGER, FACTORIZERS, MODELS, NATIVE


def test_a_digest_is_of_data_and_labels():
    def digest(title: str = "t", **panel: object) -> str:
        return Picture(title, [panel], lambda panels: None).digest()

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
    append(ACCURACY, folder(root), [made_up_rows.accuracy()[0] | {"baseline": "nmf", "mIoU": 0.7}])
    by_flops, *_ = panels(root, "pareto")
    assert [p["name"] for p in by_flops["points"] if p["hollow"]] == ["NMF (Hamburger)"]
    assert by_flops["line"][-1][1] == 0.66


@pytest.mark.parametrize(
    ("plot", "names", "values"),
    [
        ("contexts", ["MF", "EM", "ASPP", "ASPP, separable", "none"], [5, 10.5, 0.6, 0.6]),
        (  # em, nmf, nmf with backward and its memory
            "factorizers",
            ["mfops (native)", "eager, as published", "eager, at its best", "torch.compile"],
            [0.2, 0.2, 0.2, 0.5],
        ),
    ],
)
def test_bars_begin_with_ours(made, plot, names, values):
    drawn = panels(made, plot)
    assert drawn[0]["names"] == names
    assert drawn[0]["ours"] == [True, *[False] * (len(names) - 1)]
    assert [panel["values"][0] for panel in drawn] == values


def test_factorizer_bars_without_ours_or_without_the_published_lines(root):
    path = folder(root) / "factorizers.csv"
    path.unlink()
    found = made_up_rows.factorizers(ours=None)
    append(FACTORIZERS, folder(root), found)
    assert panels(root, "factorizers")[0]["names"][0] == "eager, as published"
    path.unlink()
    append(FACTORIZERS, folder(root), [row for row in found if row["baseline"] != EAGER])
    assert panels(root, "factorizers") == []


def test_roofline(made):
    (panel,) = panels(made, "roofline")
    assert panel["ceilings"] == {COPY: 1.3e10, "matmul": 1.7e11}
    problem = Problem((4, 2048, 64, 1089), "float32", "contiguous", "shared")
    x = float(f"{1e9 / problem.floor_bytes(FORWARD):.6g}")
    y = float(f"{1e9 / 0.007:.6g}")
    assert {"baseline": NATIVE, "pass": FORWARD, "x": x, "y": y} in panel["points"]
    # Two shapes, four baselines, three passes, two kinds of factors; the copy has no FLOPs.
    assert len(panel["points"]) == 2 * 4 * 3 * 2


def test_the_papers_plot_needs_all_of_its_networks(root):
    parameters, flops = panels(root, "paper")
    printed = [p["x"] for p in parameters["points"] if p["hollow"]]
    assert printed == [29.73, 40.45, 34.65]
    assert points(parameters)["DeepLabV3+"] == (40.3522, 68.98)
    assert points(flops)["EMANet"] == (92.95, 70.05)
    (folder(root) / "models.csv").unlink()
    some = [row for row in made_up_rows.models() if row["baseline"] != "emanet"]
    append(MODELS, folder(root), some)
    assert panels(root, "paper") == []


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
