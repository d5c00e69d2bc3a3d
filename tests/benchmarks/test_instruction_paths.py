"""The path of a tile through machine code that is made up."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from benchmarks.machine_code import __main__ as command
from benchmarks.machine_code import listing, table
from benchmarks.machine_code.kernels import KERNELS
from benchmarks.machine_code.paths import COPY, MMA, Work, issued

WAIT = {"DEPBAR": 1}
# A tile's loop. Branches, by the label that they jump to.
LOOP = """
      MOV R1, RZ
head: DEPBAR.LE SB0, 0x1
      BAR.SYNC 0x0
      @P0 BRA skip
rows: IMAD R2, R2, R3, RZ
      @!PT LDS RZ, [RZ]
      LDGSTS.E.128 [R2], desc[UR4][R4.64]
      @P1 BRA rows
cols: LDGSTS.E.128 [R6], desc[UR4][R8.64]
      @P1 BRA cols
skip: @P2 BRA edge
mul:  LDSM.16.M88.4 R12, [R16]
      HMMA.16816.F32.BF16 R4, R8, R12, R4
      @P3 BRA mul
      BRA done
edge: @P4 BRA next
      LDSM.16.M88.4 R12, [R16]
      HMMA.16816.F32.BF16 R4, R8, R12, R4
next: @P3 BRA edge
done: BAR.SYNC 0x0
      BSSY B0, meet
      @P5 BRA part
      FADD R1, R2, R3
      STG.E.128 desc[UR4][R4.64], R8
      BRA sync
part: @P6 STG.E.U16 desc[UR4][R4.64], R8
sync: BSYNC B0
meet: @P7 BRA head
      EXIT
"""


def code(text: str) -> list[listing.Instruction]:
    """As cuobjdump would list it."""
    lines = [
        line.split(":", 1) if line[0] != " " else ("", line) for line in text.split("\n")[1:-1]
    ]
    labels = {label: f"0x{16 * i:x}" for i, (label, _) in enumerate(lines) if label}
    listed = ["\t\tFunction : tile"]
    for i, (_, instruction) in enumerate(lines):
        words = [labels.get(word, word) for word in instruction.split()]
        listed.append(f"        /*{16 * i:04x}*/     {' '.join(words)} ;   /* 0x0 */")
        listed.append("                                  /* 0x000fc40000000f00 */")
    return listing.instructions("\n".join(listed))["tile"]


def whole(rows: int, cols: int, products: int, **stored: int) -> list[Work]:
    store = {f"STG.*{what.strip('_')}": count for what, count in stored.items()}
    return [WAIT, {f"{COPY}.* of 0": rows, f"{COPY}.* of 1": cols, MMA: products}, store]


def test_loops_go_round_as_often_as_the_work_asks():
    counts = issued(code(LOOP), whole(2, 4, 8, _128=1))
    assert counts["LDGSTS.E.128"] == 6
    assert counts["IMAD"] == counts["NOP"] == 2  # not six of the loop that is longer, or shorter
    assert counts["HMMA.16816.F32.BF16"] == counts["LDSM.16.M88.4"] == 8
    assert (counts["STG.E.128"], counts["STG.E.U16"]) == (1, 0)
    assert counts["BAR.SYNC"] == 2
    assert counts["EXIT"] == counts["MOV"] == 0
    # At the copies, after each of them, at the edge, after each product, at the stores, at the end.
    assert counts["BRA"] == 1 + 2 + 4 + 1 + 8 + 1 + 2 + 1


def test_a_path_that_does_less_is_taken_where_less_is_to_do():
    counts = issued(code(LOOP), [WAIT, {MMA: 1}, {}])
    assert counts["LDGSTS.E.128"] == 0
    assert counts["STG.E.128"] == 0  # the narrow store is the shorter way


def test_stores_are_those_that_the_work_asks_for():
    wide, narrow = (issued(code(LOOP), whole(1, 1, 1, **{n: 1})) for n in ("_128", "U16"))
    assert (wide["STG.E.128"], wide["STG.E.U16"]) == (1, 0)
    assert (narrow["STG.E.128"], narrow["STG.E.U16"]) == (0, 1)
    with pytest.raises(LookupError, match="no path"):
        issued(code(LOOP), whole(1, 1, 1, _128=1, U16=1))


MOVED = """
skip: @P2 BRA more
one:  @P4 BRA put1
      LDS R2, [R3]
put1: STS.128 [R3], R4
      @P1 BRA one
more: @P2 BRA moved
two:  @P4 BRA put2
      IMAD R7, R2, R3, RZ
      LDS R2, [R3]
put2: STS.128 [R3], R4
      @P1 BRA two
moved: @P2 BRA edge"""


def test_tiles_are_moved_by_their_own_loops():
    """Which load beside they store, and a lane of the warp at least loads."""
    moved = LOOP.replace("\nskip: @P2 BRA edge", MOVED)
    wait, brought, *rest = whole(1, 1, 1)
    work = {"LDS of 0$": 3, "STS.128 of 0$": 3, "LDS of 1$": 2, "STS.128 of 1$": 2}
    counts = issued(code(moved), [wait, brought | work, *rest])
    assert (counts["LDS"], counts["STS.128"], counts["IMAD"]) == (5, 5, 1 + 2)


UNROLLED = """
      @P2 BRA cols
two:  LDGSTS.E.BYPASS.128 [R6], desc[UR4][R8.64]
      LDGSTS.E.BYPASS.128 [R6], desc[UR4][R8.64]
      @P1 BRA two
      @P2 BRA skip
cols: LDGSTS"""


def test_a_tile_may_be_copied_by_several_blocks():
    """A loop unrolled by two, and what remains."""
    unrolled = LOOP.replace("\ncols: LDGSTS", UNROLLED)
    counts = issued(code(unrolled), whole(1, 5, 1))
    assert (counts["LDGSTS.E.BYPASS.128"], counts["LDGSTS.E.128"], counts["IMAD"]) == (4, 2, 1)


SUBROUTINE = """
      EXIT
sub:  @P0 BRA slow
      RET.REL R2
slow: MUFU.RCP R2, R3
      RET.REL R2
"""


def test_a_subroutine_counts_with_its_shortest_path():
    calls = LOOP.replace("\n      EXIT\n", SUBROUTINE).replace(
        "done: ", "done: CALL.REL sub\n      "
    )
    plain = issued(code(LOOP), whole(1, 1, 1))
    more = issued(code(calls), whole(1, 1, 1)) - plain
    assert more == {"CALL.REL": 1, "BRA": 1, "RET.REL": 1}


def test_work_that_no_path_does_is_an_error():
    with pytest.raises(LookupError, match="no path"):
        issued(code(LOOP), whole(1, 1, 1, _128=2))
    with pytest.raises(LookupError, match="no path"):
        issued(code(re.sub("@P3 BRA mul|@P3 BRA edge", "NOP", LOOP)), whole(1, 1, 2))


def test_the_command_says_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(command, "builds", lambda: [])
    assert command.main([]) == 1
    assert "mfops has no extension" in capsys.readouterr().err
    monkeypatch.setattr(listing, "dump", lambda *_: "ELF file 1: _C.1.sm_80.cubin")
    assert command.main(["--build", "_C.so"]) == 1
    assert "_C.so has no machine code for sm_90" in capsys.readouterr().err


def test_ceilings_are_read_from_the_table():
    kernel = KERNELS[0]
    row = table.Row(kernel, 100, Counter({"HMMA.16816": 32, "IMAD": 1200}))
    assert table.ceilings(f"| {' | '.join(row.cells())} |\n") == {kernel.title: 1232}
    assert row.classes() == {**dict.fromkeys(table.CLASSES, 0), "tensor core": 32, "rest": 1200}
