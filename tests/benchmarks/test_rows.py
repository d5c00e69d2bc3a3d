"""Rows in files: whole or not there, never lost, with where they are from."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from benchmarks import rows
from benchmarks.machine import Machine
from benchmarks.schema import Benchmark

BENCHMARK = Benchmark("made_up", case=("case",), measures=("bytes",), bases=("base",))


def row(**cells: object) -> dict[str, object]:
    return {"case": "a", "baseline": "base", "run": "2026-01-01T00:00:00Z"} | cells


def test_what_was_appended_is_read_back(tmp_path):
    assert rows.read(tmp_path / "made_up.csv") == []
    path = rows.append(BENCHMARK, tmp_path, [row(median_s=0.1234567, bytes=12345678, skipped=None)])
    rows.append(BENCHMARK, tmp_path, [row(baseline='with "quotes", a comma\nand a line')])
    first, second = rows.read(path)
    assert list(first) == list(BENCHMARK.columns)
    assert (first["median_s"], first["bytes"], first["skipped"]) == ("0.123457", "12345678", "")
    assert second["baseline"] == 'with "quotes", a comma\nand a line'


def test_a_stop_while_writing_leaves_the_rows_that_were_there(tmp_path, monkeypatch):
    path = rows.append(BENCHMARK, tmp_path, [row()])
    before = path.read_bytes()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        rows.append(BENCHMARK, tmp_path, [row(), row()])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_columns_of_older_rows_are_kept(tmp_path):
    older = Benchmark("made_up", case=("case",), measures=("given_up",), bases=("base",))
    rows.append(older, tmp_path, [row(given_up="7")])
    path = rows.append(BENCHMARK, tmp_path, [row(bytes=8)])
    first, second = rows.read(path)
    assert (first["given_up"], first["bytes"]) == ("7", "")
    assert (second["given_up"], second["bytes"]) == ("", "8")


def test_an_unknown_column_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ValueError, match="made_up: no such columns: byts"):
        rows.append(BENCHMARK, tmp_path, [row(byts=1)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,baseline\na\n", "row 1: expected 2 cells"),
        ("case,baseline\na,b,c\n", "row 1: expected 2 cells"),
        ("case,other\na,b\n", "expected a header with a column 'baseline'"),
        ('case,baseline\na,"b\n', "line 1: unexpected end"),
        ("", "expected a header"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    path = tmp_path / "made_up.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"made_up.csv.*{message}"):
        rows.read(path)


def test_a_run_has_one_row_and_another_of_that_second_another_id(tmp_path):
    run = {"run": "2026-01-01T00:00:00Z", "commit": "abc1234"}
    for _ in range(2):
        assert rows.add_run(tmp_path, run) == run["run"]
        assert rows.add_run(tmp_path, run | {"commit": "def5678"}) == f"{run['run']}-2"
    first, second = rows.read(tmp_path / rows.RUNS, "run")
    assert list(first) == list(rows.PROVENANCE)
    assert (first["commit"], second["commit"]) == ("abc1234", "def5678")


def test_rows_that_are_appended_side_by_side_are_all_there(tmp_path):
    """The lock is of files, so that it holds between processes, too."""

    def work(worker: int) -> None:
        for count in range(8):
            run = rows.add_run(tmp_path, {"run": "2026-01-01T00:00:00Z", "commit": str(worker)})
            rows.append(BENCHMARK, tmp_path, [{"case": f"{worker} {count}", "run": run}])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    cases = [row["case"] for row in rows.read(tmp_path / "made_up.csv")]
    assert sorted(cases) == sorted(f"{w} {c}" for w in range(2) for c in range(8))
    assert len(rows.read(tmp_path / rows.RUNS, "run")) == 2


def test_commands_name_no_folder_outside_the_repository(monkeypatch, tmp_path):
    spec = SimpleNamespace(name="pytest.__main__")
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    inside = rows.ROOT / "benchmarks" / "bench_op.py"
    words = [str(inside), "--data", "../elsewhere/camvid", f"--results={tmp_path}", "-k", "a and b"]
    monkeypatch.setattr(sys, "argv", ["pytest", *words])
    assert rows.command() == (
        f"python -m pytest benchmarks/bench_op.py --data camvid --results={tmp_path.name} "
        "-k 'a and b'"
    )


def test_commit_from_the_repository_or_the_environment(monkeypatch):
    answers = {"rev-parse": "abc1234", "status": ""}
    monkeypatch.setattr(rows, "output", lambda command: answers[command[3]])
    assert rows.commit() == "abc1234"
    answers["status"] = " M csrc/ops.cpp"
    assert rows.commit() == "abc1234 with changes"
    answers["rev-parse"] = ""
    monkeypatch.setenv("COMMIT", "def5678")
    assert rows.commit() == "def5678"
    monkeypatch.delenv("COMMIT")
    assert rows.commit() == "no commit"


def test_provenance_is_whole(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    of = rows.provenance(Machine("cpu", threads=2))
    assert set(of) == set(rows.PROVENANCE)
    assert of["environment"] == "THP_MEM_ALLOC_ENABLE=1"
    assert of["threads"] == "2"
    assert "torch " in of["versions"]
