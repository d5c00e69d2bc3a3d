"""The suite as a user runs it: options, rows, playback, what is left out, what is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import mfnet
from benchmarks import bench_accuracy, bench_op, conftest, rows, schema, trainer
from benchmarks.rows import ROOT
from benchmarks.trainer import Recipe
from mfnet.contexts import CONTEXTS
from mfnet.data import synthetic

FIT = (
    "--trainer.max_epochs 1 --trainer.accelerator cpu --data.crop_size 33 --data.batch_size 2 "
    "--data.num_workers 0 --trainer.enable_progress_bar false --model.network.backbone test_resnet"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "made_up"
    return synthetic.generate(folder, train=6, val=2, size=33)


def start(*arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", *map(str, arguments)],
        cwd=ROOT,
        # A worker of pytest-xdist's would take itself for one, and benchmarks would be off.
        env={**{k: v for k, v in os.environ.items() if "XDIST" not in k}, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def suite(*arguments: object, **environment: str) -> tuple[int, str]:
    process = start(*arguments, **environment)
    text, _ = process.communicate(timeout=600)
    return process.returncode, text


def read(results: Path, benchmark: schema.Benchmark) -> list[rows.Row]:
    """The rows, with what is known of their runs."""
    (path,) = results.glob(f"*/{benchmark.name}.csv")
    runs = {row["run"]: row for row in rows.read(path.with_name(rows.RUNS), "run")}
    return [row | runs[row["run"]] for row in rows.read(path)]


def test_the_whole_suite(tmp_path, images):
    """One run of everything, small: rows of every benchmark, played back to pytest-benchmark."""
    saved, runs = tmp_path / "saved.json", tmp_path / "runs"
    options = ["--small", "--device", "cpu", "--results", tmp_path, "--data", images]
    options += ["--contexts", "none", "--seeds", "3", "--runs", runs, "--fit", FIT]
    options += ["--threads", 1]  # other tests want the rest of the machine
    status, text = suite("benchmarks", *options, f"--benchmark-json={saved}")
    assert status == 0, text

    found = {b.name: read(tmp_path, b) for b in schema.BENCHMARKS}
    for name, of in found.items():
        assert of, name
        for row in of:
            assert row["run"] == of[0]["run"]
            assert row["command"].startswith("python -m pytest")
            assert str(tmp_path) not in row["command"]
            assert row["device"]
            assert "torch" in row["versions"]
    assert {row["baseline"] for row in found["contexts"]} == set(CONTEXTS)
    assert set(mfnet.list_models()) < {row["baseline"] for row in found["models"]}
    assert {row["baseline"] for row in found["training"]} == set(mfnet.list_models())
    for row in found["training"]:
        assert row["data"] == "made_up"
        assert float(row["images_per_s"]) == pytest.approx(2 / float(row["median_s"]), rel=1e-3)
        assert all(float(row[f"{part}_s"]) > 0 for part in ("loader", "forward", "backward"))
    (accuracy,) = found["accuracy"]
    assert accuracy["network"] == "deeplabv3plus (context none)"
    assert (accuracy["baseline"], accuracy["seed"]) == ("none", "3")
    assert 0 <= float(accuracy["mIoU"]) <= 1
    assert [row["baseline"] for row in found["accuracy_cost"]] == ["none"]

    # pytest-benchmark saw, per baseline, the readings that the rows are made of.
    medians = {
        (b["group"], b["extra_info"]["baseline"]): (
            b["stats"]["median"],
            b["extra_info"]["median_s"],
        )
        for b in json.loads(saved.read_text())["benchmarks"]
    }
    assert len(medians) > 60
    for (group, _), (played, measured) in medians.items():
        assert played == pytest.approx(measured, rel=1e-6), group


def test_what_fails_fails_alone_and_has_rows_that_say_so(tmp_path):
    """A baseline of the op's, and a whole case: every ceiling."""
    (tmp_path / "breaking.py").write_text(
        "from benchmarks import bench_ceilings, bench_op\n"
        "def wrong(x, y, z):\n"
        "    x_hat, mse = bench_op.textbook(x, y, z)\n"
        "    return 2 * x_hat, mse\n"
        "def collapse(*_):\n"
        "    raise RuntimeError('out of memory')\n"
        "bench_op.careful = wrong\n"
        "bench_ceilings.time_calls = collapse\n"
    )
    status, text = suite(
        *("benchmarks/bench_op.py", "benchmarks/bench_ceilings.py", "--small", "--device", "cpu"),
        *("--results", tmp_path, "-p", "breaking", "--no-compile"),
        *("-k", "ceiling or channels_last and shared and forward"),
        PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]),
    )
    assert status == 1
    assert "failed: RuntimeError: X' is wrong: relative error 1" in text
    known = {row["baseline"]: row["skipped"] for row in read(tmp_path, schema.OP)}
    assert known[schema.BEST].startswith("failed: ")
    assert known[schema.EAGER] == ""
    ceilings = [row["skipped"] for row in read(tmp_path, schema.CEILINGS)]
    assert ceilings == ["failed: RuntimeError: out of memory"] * 4


def test_a_budget_leaves_cases_out_by_name(tmp_path):
    options = ["--small", "--device", "cpu", "--results", tmp_path, "--budget", "0"]
    files = ("benchmarks/bench_ceilings.py", "benchmarks/bench_training.py")
    status, text = suite(*files, *options)
    assert status == 0
    networks = len(mfnet.list_models())
    assert f"{4 + networks} skipped" in text
    for benchmark, baselines in ((schema.CEILINGS, 4), (schema.TRAINING, networks)):
        known = [row["skipped"] for row in read(tmp_path, benchmark)]
        assert known == ["--budget 0 was used up"] * baselines


def test_no_compile_leaves_torch_compile_out(tmp_path):
    options = ["--small", "--device", "cpu", "--results", tmp_path, "--no-compile"]
    files = ("benchmarks/bench_op.py", "benchmarks/bench_factorizers.py")
    status, text = suite(*files, *options, "-k", "contiguous and not backward")
    assert status == 0, text
    for benchmark in (schema.OP, schema.FACTORIZERS):
        known = {row["baseline"] for row in read(tmp_path, benchmark)}
        assert known == {
            schema.NATIVE,
            schema.TRITON,
            schema.EAGER,
            schema.BEST,
            schema.COPY,
        }


def test_without_what_the_trainer_needs_the_rows_say_so(tmp_path, images):
    (tmp_path / "hiding.py").write_text("import sys\nsys.modules['jsonargparse'] = None\n")
    status, text = suite(
        *("benchmarks/bench_training.py", "benchmarks/bench_accuracy.py", "-k", "not cost"),
        *("--small", "--device", "cpu", "--results", tmp_path, "--data", images, "-p", "hiding"),
        *("--contexts", "none", "--seeds", "0", "--runs", tmp_path / "runs"),
        PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]),
    )
    assert status == 0, text
    for benchmark in (schema.TRAINING, schema.ACCURACY):
        known = {row["skipped"] for row in read(tmp_path, benchmark)}
        assert known == {"jsonargparse not installed"}


def test_a_stopped_run_leaves_whole_rows_and_goes_on(tmp_path, images):
    options = ["benchmarks/bench_accuracy.py", "-k", "test_accuracy", "--device", "cpu"]
    options += ["--results", tmp_path, "--data", images, "--runs", tmp_path / "runs"]
    options += ["--contexts", "none", "--seeds", "0,1", "--fit", FIT]
    process = start(*options)
    try:
        give_up = time.monotonic() + 300
        while not list(tmp_path.glob("*/accuracy.csv")):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < give_up
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    (first,) = read(tmp_path, schema.ACCURACY)
    assert first["seed"] == "0"

    status, text = suite(*options)
    assert status == 0, text
    again = read(tmp_path, schema.ACCURACY)
    assert [row["seed"] for row in again] == ["0", "1"]
    assert again[0] == first  # neither trained again nor written again
    assert again[1]["run"] > first["run"]


def test_another_recipe_continues_no_run(tmp_path):
    recipe = Recipe("data", "data", "camvid", "")
    folders = {
        bench_accuracy.run_folder(tmp_path, of, "mf", seed)
        for of in (recipe, Recipe("data", "data", "camvid", "--trainer.max_epochs 9"))
        for seed in (0, 1)
    }
    assert len(folders) == 4


def test_a_context_trains_in_the_network_of_deeplab_and_mf_on_its_own_grid(images):
    recipe = Recipe(str(images), "made_up", "camvid", "--data.crop_size [48,97]")
    words = recipe.arguments("mf")
    assert words[-2:] == ["--model.network.context_size", "[3, 7]"]
    network = trainer.parsed(words).model.network
    assert network.context.factorized.size == (3, 7)
    assert "--model.network.context none" in " ".join(recipe.arguments("none"))
    assert "--model.network.context" not in recipe.arguments("emanet")


@pytest.fixture
def options(tmp_path) -> SimpleNamespace:
    return SimpleNamespace(
        device=None, threads=None, results=None, small=False, data=None, contexts=None, seeds="0,1"
    )


def configure(options: SimpleNamespace) -> None:
    conftest.pytest_configure(SimpleNamespace(option=options))


def test_options_by_default(options):
    configure(options)
    assert options.results == rows.RESULTS
    assert options.threads == len(os.sched_getaffinity(0))
    assert bench_accuracy.names(options) == [*CONTEXTS, "emanet"]
    assert bench_accuracy.seeds(options) == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"small": True}, "--small gives no figures for benchmarks/results: add --results"),
        ({"threads": 0}, "--threads: expected at least 1, got 0"),
        ({"data": Path("no such folder")}, "--data: no folder 'no such folder'"),
        ({"contexts": "mf,pyramid"}, "--contexts: unknown 'pyramid': choose from mf, em, "),
        ({"seeds": "1,two"}, "--seeds: expected numbers between commas, got '1,two'"),
    ],
)
def test_wrong_options(options, wrong, message):
    vars(options).update(wrong)

    def use() -> None:
        configure(options)
        bench_accuracy.names(options)
        bench_accuracy.seeds(options)

    with pytest.raises(pytest.UsageError, match=message):
        use()


@pytest.mark.skipif(bench_op.torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_it_says_so(options):
    options.device = "cuda"
    with pytest.raises(pytest.UsageError, match="--device cuda: no CUDA device"):
        configure(options)


def test_training_needs_data(options):
    with pytest.raises(pytest.skip.Exception, match="no --data: no data set to train on"):
        Recipe.of(options)
