"""`benchmarks.gpu`, tried out on the CPU with small shapes."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch

import mfops
from benchmarks import figures, gpu, harness, machine
from benchmarks.figures import BACKWARD, BOTH, FORWARD, NATIVE, PASSES, Cell

CELL = Cell((2, 6, 3, 20), "float32", "contiguous", "shared")

pytestmark = pytest.mark.skipif(
    mfops.available_backends()["native"] is not None, reason="the extension was not built"
)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda op, **options: op)


@pytest.fixture
def cpu():
    return machine.Machine("cpu")


def test_trial_run_measures_every_case_and_says_that_it_is_one(tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--rounds", "2", "--output", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "op.json").read_text())
    assert len(data["results"]) == len(gpu.TRIAL_SHAPES) * 2 * 2 * 2 * len(PASSES)
    assert data["title"] == gpu.TRIAL
    assert data["failed"] == {}
    assert data["provenance"]["torch"] == torch.__version__
    for r in data["results"]:
        cell = Cell(tuple(r["cell"].pop("shape")), **r["cell"])
        assert r["counted_bytes"] == cell.counted_bytes(r["which"])
        assert r["base"] == NATIVE
        assert {"copy", NATIVE, "eager"} <= set(r["seconds"])
        compiled = (cell.dtype, cell.layout, cell.factors) == gpu.COMPILED
        assert any(name.startswith("compile") for name in r["seconds"]) == compiled
    page = (tmp_path / "op.md").read_text()
    assert page.startswith(f"# {gpu.TRIAL}")
    printed = capsys.readouterr().out
    assert "host time per call" in printed


def test_only_and_budget_leave_cases_out(tmp_path):
    arguments = ["--device", "cpu", "--rounds", "1", "--output", str(tmp_path)]
    assert gpu.main([*arguments, "--only", "float32 channels_last shared"]) == 0
    data = json.loads((tmp_path / "op.json").read_text())
    assert {r["cell"]["layout"] for r in data["results"]} == {"channels_last"}
    assert gpu.main([*arguments, "--budget", "0"]) == 0
    data = json.loads((tmp_path / "op.json").read_text())
    assert data["results"] == []
    assert len(data["not_measured"]["everything: --budget 0 was used up"]) == 16


def test_a_trial_is_never_written_among_the_results(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--output", str(gpu.RESULTS / "cpu")])
    assert "no figures for benchmarks/results" in capsys.readouterr().err
    assert gpu.parse(["--device", "cpu"]).output is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no CUDA device" in capsys.readouterr().err


def test_a_rival_with_wrong_results_is_not_timed(cpu, monkeypatch):
    def wrong(x, y, z):
        x_hat, mse = mfops.factorized_reconstruction(x, y, z)
        return 1.01 * x_hat, mse

    rivals = gpu.rivals_of(CELL, compile_too=False) | {"eager, wrong": gpu.Rival(wrong)}
    monkeypatch.setattr(gpu, "rivals_of", lambda *_: rivals)
    results, failed, _ = gpu.measure_cell(CELL, cpu, rounds=1, compile_too=False)
    assert failed == {"eager, wrong": "RuntimeError: X' is wrong: relative error 0.01"}
    assert all("eager, wrong" not in r.seconds for r in results)
    assert all(NATIVE in r.seconds for r in results)


def test_a_rival_that_breaks_makes_the_run_fail(tmp_path, monkeypatch, capsys):
    def broken(x, y, z):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setattr(gpu, "rivals_of", lambda *_: {NATIVE: gpu.Rival(broken)})
    arguments = ["--device", "cpu", "--rounds", "1", "--only", "float32 contiguous shared"]
    assert gpu.main([*arguments, "--output", str(tmp_path)]) == 1
    data = json.loads((tmp_path / "op.json").read_text())
    (what,) = data["failed"]
    assert what == f"{NATIVE}: RuntimeError: CUDA error: an illegal memory access"
    assert what in capsys.readouterr().out


def test_inputs_rotate_through_more_than_the_cache(cpu, monkeypatch):
    cpu.past_cache = 10_000  # of 2 x 6 x 20 + 6 x 3 + 3 x 20 floats, 1272 bytes
    seen = []

    def turn(rival, which, sets, machine):
        seen.append(len(sets))
        assert len({s.x.data_ptr() for s in sets}) == len(sets)
        return original(rival, which, sets, machine)

    original = gpu.turn
    monkeypatch.setattr(gpu, "turn", turn)
    gpu.measure_cell(CELL, cpu, rounds=1, compile_too=False)
    assert set(seen) == {8}


def test_backward_is_timed_without_forward(cpu):
    calls = []

    def op(x, y, z):
        calls.append("forward")
        return mfops.factorized_reconstruction(x, y, z)

    cpu.empty_cache = lambda: calls.append("cache")
    sets = [gpu.make_inputs(CELL, "cpu")]
    for which, before, during in [
        (FORWARD, [], ["forward"]),
        (BACKWARD, ["forward", "cache"], []),
        (BOTH, [], ["forward"]),
    ]:
        turn = gpu.turn(gpu.Rival(op), which, sets, cpu)
        state = turn.prepare(0)
        assert calls == before
        calls.clear()
        result = turn.run(state)
        assert calls == during
        calls.clear()
        if which != FORWARD:
            grads = result if which == BACKWARD else result[1]
            assert [g.shape for g in grads] == [leaf.shape for leaf in sets[0].leaves]
    dropped = gpu.turn(gpu.Rival(op, keep=False), FORWARD, sets, cpu)
    assert dropped.run(dropped.prepare(0)) is None


@pytest.mark.parametrize("layout", figures.LAYOUTS)
@pytest.mark.parametrize("factors", figures.FACTORS)
def test_every_rival_is_right(layout, factors):
    cell = Cell(CELL.shape, "bfloat16", layout, factors)
    inputs = gpu.make_inputs(cell, "cpu")
    assert inputs.x.stride()[1:] == ((1, 6) if layout == "channels_last" else (20, 1))
    expected = gpu.expected_results(cell, inputs)
    for name, rival in gpu.rivals_of(cell, compile_too=True).items():
        if name != figures.TRITON:
            gpu.assert_right(rival.op, inputs, expected, gpu.TOLERANCE["bfloat16"])


def test_copy_moves_half_of_the_bytes():
    turn = gpu.copy_turn(100, 3, "cpu")
    assert [turn.prepare(i) for i in range(4)] == [0, 1, 2, 0]
    assert turn.run(1).numel() == 50


def test_extra_memory_leaves_out_what_is_returned(monkeypatch):
    inputs = gpu.make_inputs(CELL, "cpu")
    x_hat, x, y, z = 6 * 20 * 4, 2 * 6 * 20 * 4, 6 * 3 * 4, 3 * 20 * 4
    peaks = [1000 + x_hat + 4 + x + y + z + 22, 1000 + x_hat + 4 + 11]

    class Stats(dict):
        def __missing__(self, key):
            assert key == "requested_bytes.all.peak"
            return peaks.pop()

    stats = Stats({"requested_bytes.all.current": 1000})
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: stats)
    assert gpu.extra_memory(mfops.factorized_reconstruction, inputs) == {FORWARD: 11, BOTH: 22}


def test_clocks_are_nvidia_smis_or_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    properties = SimpleNamespace(uuid="1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    answer = "1980 MHz, 1980 MHz, 2619 MHz, 2619 MHz, 41, 700.00 W"
    asked = []
    monkeypatch.setattr(machine, "output", lambda command: asked.append(command) or answer)
    assert machine.clocks() == (
        "SM 1980 MHz, of at most 1980 MHz, memory 2619 MHz, of at most 2619 MHz, "
        "degrees C 41, power limit 700.00 W"
    )
    assert "--id=GPU-1-2" in asked[0]
    answer = ""
    assert machine.clocks() == "nvidia-smi did not answer"


def test_results_are_in_a_folder_named_after_the_gpu():
    assert machine.folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_whole_program_with_a_gpu_that_is_played(tmp_path, monkeypatch, capsys):
    """Everything but what only a GPU can do: its calls are replaced, tensors stay on the CPU."""

    class Played(machine.Machine):
        def __init__(self, device):
            super().__init__("cpu")
            assert device == "cuda"
            self.cuda, self.clock, self.past_cache = True, harness.EventClock(), 1

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.time = time.perf_counter()

        def query(self):
            return False

        def elapsed_time(self, end):
            return 1e3 * (end.time - self.time)

    class Stats(dict):
        def __missing__(self, key):
            return 1000

    properties = SimpleNamespace(
        name="Some GPU", multi_processor_count=1, total_memory=2**33, L2_cache_size=2**20, uuid="1"
    )
    for name, value in {
        "Event": Event,
        "_sleep": lambda cycles: None,
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_stats": Stats,
        "get_device_properties": lambda: properties,
        "get_device_name": lambda: properties.name,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu, "Machine", Played)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    shapes = [(2, 6 + i, 3, 20) for i in range(6)]
    monkeypatch.setattr(figures, "SHAPES", shapes)
    monkeypatch.setattr(figures, "BANDWIDTH_SHAPES", shapes[3:5])
    monkeypatch.setattr(machine, "output", lambda command: "")

    assert gpu.main(["--rounds", "2"]) == 0
    data = json.loads((tmp_path / "some-gpu" / "op.json").read_text())
    assert data["provenance"]["GPU"] == "Some GPU, 1 multiprocessors, 8 GiB, L2 1 MiB"
    assert {"driver", "clocks before", "clocks after"} <= set(data["provenance"])
    first = next(r for r in data["results"] if r["which"] == BOTH)
    assert set(first["extra_bytes"]) == {NATIVE, "eager", "compile, max-autotune-no-cudagraphs"}
    assert {"compile, max-autotune", *first["extra_bytes"]} <= set(first["seconds"])
    evaluated = [t["name"] for t in data["targets"] if t["met"] is not None]
    assert len(evaluated) == 4 + 1 + 4 + 1 + 1 + 2  # all but Triton's
    assert f"{data['provenance']['calls not queued in time']}".startswith("0 of ")
    assert "# The op on Some GPU" in (tmp_path / "some-gpu" / "op.md").read_text()
    assert "The op on Some GPU" in capsys.readouterr().out
