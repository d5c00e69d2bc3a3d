"""The suite as a user runs it: options, rows, playback, what is left out, what is stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import mfnet
from benchmarks import bench_accuracy, bench_op, conftest, rows, schema, trainer
from benchmarks.machine import Machine
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


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def training(images, results) -> list[object]:
    """Options of runs that follow each other."""
    options = ["--small", "--device", "cpu", "--threads", 1]  # others want the rest of the machine
    options += ["--results", results, "--runs", results / "runs", "--data", images]
    return [*options, "--contexts", "none", "--seeds", "0,3", "--fit", FIT]


def suite(*arguments: object, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *map(str, arguments)],
        cwd=ROOT,
        # A worker of pytest-xdist's would take itself for one, and benchmarks would be off.
        env={**{k: v for k, v in os.environ.items() if "XDIST" not in k}, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout


def read(results: Path, benchmark: schema.Benchmark) -> list[rows.Row]:
    """The rows, with what is known of their runs."""
    (path,) = results.glob(f"*/{benchmark.name}.csv")
    runs = {row["run"]: row for row in rows.read(path.with_name(rows.RUNS), "run")}
    return [row | runs[row["run"]] for row in rows.read(path)]


@pytest.fixture(scope="module")
def before_the_stop(results) -> list[rows.Row]:
    """The row that a run left that was stopped after its first training."""
    folder = results / Machine("cpu", 1).folder()
    run = rows.add_run(folder, {"run": "2026-01-01T00:00:00Z"})
    of = Recipe("made_up", "made_up", "camvid", FIT).columns()
    rows.append(schema.ACCURACY, folder, [{**of, "baseline": "none", "seed": 0, "run": run}])
    return read(results, schema.ACCURACY)


@pytest.fixture(scope="module")
def whole(before_the_stop, training, results) -> dict[str, list[rows.Row]]:
    """The rows of one run of everything, small, that goes on where the other was stopped."""
    # With nmf a step of training in bfloat16 takes a second; emanet's stands for both.
    options = ["-k", "not (test_backend and training and nmf)"]
    options.append(f"--benchmark-json={results / 'saved.json'}")
    status, text = suite("benchmarks", *training, *options)
    assert status == 0, text
    return {b.name: read(results, b) for b in schema.BENCHMARKS}


def test_the_whole_suite(whole, results):
    """Rows of every benchmark, played back to pytest-benchmark."""
    *_, accuracy = whole["accuracy"]
    for name, of in (whole | {"accuracy": [accuracy]}).items():
        assert of, name
        for row in of:
            assert row["run"] == accuracy["run"]
            assert row["command"].startswith("python -m pytest")
            assert str(results) not in row["command"]
            assert row["device"]
            assert "torch" in row["versions"]
    assert {row["baseline"] for row in whole["contexts"]} == set(CONTEXTS)
    assert set(mfnet.list_models()) < {row["baseline"] for row in whole["models"]}
    assert {row["baseline"] for row in whole["training"]} == set(mfnet.list_models())
    for row in whole["training"]:
        assert row["data"] == "made_up"
        assert float(row["images_per_s"]) == pytest.approx(2 / float(row["median_s"]), rel=1e-3)
        assert all(float(row[f"{part}_s"]) > 0 for part in ("loader", "forward", "backward"))
    assert accuracy["network"] == "deeplabv3plus (context none)"
    assert (accuracy["baseline"], accuracy["seed"]) == ("none", "3")
    assert 0 <= float(accuracy["mIoU"]) <= 1
    assert [row["baseline"] for row in whole["accuracy_cost"]] == ["none"]

    # pytest-benchmark saw, per baseline, the readings that the rows are made of.
    medians = {
        (b["group"], b["extra_info"]["baseline"]): (
            b["stats"]["median"],
            b["extra_info"]["median_s"],
        )
        for b in json.loads((results / "saved.json").read_text())["benchmarks"]
    }
    assert len(medians) > 60
    for (group, _), (played, measured) in medians.items():
        assert played == pytest.approx(measured, rel=1e-6), group


def test_a_stopped_run_leaves_whole_rows_and_goes_on(before_the_stop, whole):
    (first,) = before_the_stop
    assert first["seed"] == "0"
    again = whole["accuracy"]
    assert [row["seed"] for row in again] == ["0", "3"]
    assert again[0] == first  # neither trained again nor written again
    assert again[1]["run"] > first["run"]


@pytest.fixture(scope="module")
def broken(tmp_path_factory, images) -> tuple[Path, str]:
    """The results and the output of a run, without torch.compile, in which a baseline of the op's
    and a whole case, every ceiling, fail and what the trainer needs is not installed."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "breaking.py").write_text(
        "import sys\n"
        "from benchmarks import bench_ceilings, bench_op\n"
        "def wrong(x, y, z):\n"
        "    x_hat, mse = bench_op.textbook(x, y, z)\n"
        "    return 2 * x_hat, mse\n"
        "def collapse(*_):\n"
        "    raise RuntimeError('out of memory')\n"
        "bench_op.careful = wrong\n"
        "bench_ceilings.time_calls = collapse\n"
        "sys.modules['jsonargparse'] = None\n"
    )
    files = ("ceilings", "op", "factorizers", "training", "accuracy")
    status, text = suite(
        *(f"benchmarks/bench_{name}.py" for name in files),
        *("-k", "ceiling or test_training or test_accuracy or contiguous and not backward"),
        *("--small", "--device", "cpu", "--results", folder, "-p", "breaking", "--no-compile"),
        *("--data", images, "--contexts", "none", "--seeds", "0", "--runs", folder / "runs"),
        PYTHONPATH=os.pathsep.join([str(ROOT), str(folder)]),
    )
    assert status == 1, text
    return folder, text


def test_what_fails_fails_alone_and_has_rows_that_say_so(broken):
    results, text = broken
    assert "failed: RuntimeError: X' is wrong: relative error 1" in text
    known = {row["baseline"]: row["skipped"] for row in read(results, schema.OP)}
    assert known[schema.BEST].startswith("failed: ")
    assert known[schema.EAGER] == ""
    ceilings = [row["skipped"] for row in read(results, schema.CEILINGS)]
    assert ceilings == ["failed: RuntimeError: out of memory"] * 4
    failed = [line for line in text.splitlines() if line.startswith("FAILED")]
    assert all("test_ceiling" in line or schema.BEST in line for line in failed)


def test_no_compile_leaves_torch_compile_out(broken):
    results, text = broken
    assert f"-{schema.COMPILE}]" not in text  # a test of it would fail, as it has no row
    for benchmark in (schema.OP, schema.FACTORIZERS):
        known = {row["baseline"] for row in read(results, benchmark)}
        assert known == {
            schema.NATIVE,
            schema.TRITON,
            schema.EAGER,
            schema.BEST,
            schema.COPY,
        }


def test_without_what_the_trainer_needs_the_rows_say_so(broken):
    results, _ = broken
    for benchmark in (schema.TRAINING, schema.ACCURACY):
        known = {row["skipped"] for row in read(results, benchmark)}
        assert known == {"jsonargparse not installed"}


def test_a_budget_leaves_cases_out_by_name(tmp_path, monkeypatch, capfd):
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    options = ["--small", "--device", "cpu", "--results", str(tmp_path), "--budget", "0"]
    files = [str(ROOT / "benchmarks" / f"bench_{name}.py") for name in ("ceilings", "training")]
    assert pytest.main(["-q", "-p", "no:cacheprovider", *files, *options]) == 0
    networks = len(mfnet.list_models())
    assert f"{4 + networks} skipped" in capfd.readouterr().out
    for benchmark, baselines in ((schema.CEILINGS, 4), (schema.TRAINING, networks)):
        known = [row["skipped"] for row in read(tmp_path, benchmark)]
        assert known == ["--budget 0 was used up"] * baselines


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
