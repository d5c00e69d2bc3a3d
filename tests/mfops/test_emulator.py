"""The emulator does what the PTX ISA says (section 9.7, and 9.7.14 on fragments), and tells errors.

The formulas for fragments are the manual's own, not primitives.cuh's.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import emulator
import pytest
import torch
from guarded import guarded
from torch import Tensor

ORDERS = ["ascending", "descending", "1", "2"]
FLOAT16S = {"bf16": torch.bfloat16, "f16": torch.float16}
TF32_BITS = -(1 << 13)  # those of a float32 that TF32 keeps


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    return emulator.load(emulator.HERE / "kernels.cpp")


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MFOPS_EMULATOR_ORDER", request.param)
    return request.param


def run(
    entry: ctypes._CFuncPtr,
    source: Tensor,
    target: Tensor,
    *numbers: int,
    blocks: int = 1,
    threads: int = 32,
    shared: int = 1024,
) -> Tensor:
    """Launches with the kernel's numbers a, b, c; the target."""
    a, b, c = (*numbers, 0, 0, 0)[:3]
    emulator.call(entry, source, target, blocks, threads, shared, a, b, c)
    return target


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


# Rows and columns of a lane's elements, low half of the first register first.


def a_place_16(lane: int, i: int) -> tuple[int, int]:
    row = lane // 4 if i in (0, 1, 4, 5) else lane // 4 + 8
    return row, lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_place_16(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane // 4


def a_place_tf32(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i in (1, 3) else 0), lane % 4 + (4 if i >= 2 else 0)


def b_place_tf32(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 + (4 if i == 1 else 0), lane // 4


def d_place(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


def fragments(matrix: Tensor, place, elements: int) -> Tensor:
    """(32, elements): each lane's elements of the matrix."""
    index = torch.tensor([[place(lane, i) for i in range(elements)] for lane in range(32)])
    return matrix[index[..., 0], index[..., 1]]


MMA = {
    "bf16": (torch.bfloat16, 16, a_place_16, b_place_16),
    "f16": (torch.float16, 16, a_place_16, b_place_16),
    "tf32": (torch.float32, 8, a_place_tf32, b_place_tf32),
}


@pytest.mark.parametrize("name", MMA)
def test_mma_is_the_product(lib: ctypes.CDLL, order: str, name: str) -> None:
    dtype, depth, a_place, b_place = MMA[name]
    torch.manual_seed(0)
    warps, expected = [], []
    for _ in range(2):
        a = torch.randint(-8, 9, (16, depth)).to(dtype)  # small integers: all sums are exact
        b = torch.randint(-8, 9, (depth, 8)).to(dtype)
        d = torch.randint(-99, 99, (16, 8)).float()
        parts = [
            fragments(a, a_place, depth // 2 if depth == 16 else 4).view(torch.float32),
            fragments(b, b_place, depth // 4 if depth == 16 else 2).view(torch.float32),
            fragments(d, d_place, 4),
        ]
        warps.append(torch.cat(parts, dim=1))
        expected.append(fragments(d + a.float() @ b.float(), d_place, 4))
    result = torch.empty(64, 4)
    run(getattr(lib, f"run_mma_{name}"), torch.cat(warps), result, threads=64)
    assert torch.equal(result, torch.cat(expected))


def test_mma_tf32_reads_no_more_than_tf32(lib: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    operands = torch.cat([torch.randn(32, 6), torch.zeros(32, 4)], dim=1)
    cut = (operands.view(torch.int32) & TF32_BITS).view(torch.float32)
    assert not torch.equal(operands, cut)
    results = [run(lib.run_mma_tf32, source, torch.empty(32, 4)) for source in (operands, cut)]
    assert torch.equal(*results)


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(lib: ctypes.CDLL, order: str, trans: bool) -> None:
    memory = torch.arange(32 * 8, dtype=torch.int16).view(32, 8)
    rows = memory.flip(0)  # the kernel's lane l passes the row 31 - l
    result = run(lib.run_ldmatrix, memory, torch.empty(32, 4, dtype=torch.int32), int(trans))
    pairs = result.view(torch.int16).view(32, 4, 2)
    for matrix in range(4):
        tile = rows[8 * matrix : 8 * matrix + 8]
        tile = tile.T if trans else tile
        for lane in range(32):
            row, col = lane // 4, lane % 4 * 2
            assert torch.equal(pairs[lane, matrix], tile[row, col : col + 2])


def test_shuffle_down(lib: ctypes.CDLL, order: str) -> None:
    source = torch.randn(64, dtype=torch.float64)
    result = run(lib.run_shuffle, source, torch.empty_like(source), 5, threads=64).view(2, 32)
    lanes = source.view(2, 32)
    assert torch.equal(result[:, :27], lanes[:, 5:])
    assert torch.equal(result[:, 27:], lanes[:, 27:])


def float_patterns() -> Tensor:
    """Every sign, exponent and first 7 bits, with the rest at and beside all that rounds."""
    upper = torch.arange(1 << 16) << 16
    middle = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x5000, 0x7FFF])
    rest = torch.cat([middle, middle + 0x8000])
    values = (upper[:, None] + rest).flatten()
    random = torch.randint(0, 1 << 32, (100_000,), generator=torch.Generator().manual_seed(0))
    return torch.cat([values, random]).to(torch.int64).sub(1 << 31).to(torch.int32)


@pytest.mark.parametrize("name", FLOAT16S)
def test_from_float_rounds_as_torch(lib: ctypes.CDLL, name: str) -> None:
    source = float_patterns().view(torch.float32)
    result = torch.empty(len(source), dtype=FLOAT16S[name])
    emulator.call(getattr(lib, f"{name}_from_float"), source, result, len(source))
    nan = source.isnan()
    assert torch.equal(bits(result)[~nan], bits(source.to(FLOAT16S[name]))[~nan])
    assert (bits(result)[nan] == 0x7FFF).all()  # PTX ISA: the NaN of cvt to .f16 and .bf16


@pytest.mark.parametrize("name", FLOAT16S)
def test_to_float_is_exact(lib: ctypes.CDLL, name: str) -> None:
    source = torch.arange(1 << 16).to(torch.int16).view(FLOAT16S[name])
    result = torch.empty(1 << 16)
    emulator.call(getattr(lib, f"{name}_to_float"), source, result, len(source))
    nan = source.isnan()
    assert torch.equal(bits(result)[~nan], bits(source.float())[~nan])
    assert result[nan].isnan().all()


def test_to_tf32_rounds_ties_away(lib: ctypes.CDLL) -> None:
    source = float_patterns().view(torch.float32)
    result = torch.empty(len(source))
    emulator.call(lib.tf32_from_float, source, result, len(source))
    finite = source.isfinite()
    exact = source[finite].double()
    exponent = (torch.frexp(exact.abs()).exponent - 1).clamp(min=-126)  # subnormals share one
    step = torch.ldexp(torch.ones_like(exact), exponent - 10)
    expected = (torch.floor(exact.abs() / step + 0.5) * step).copysign(exact).float()
    assert torch.equal(bits(result[finite]), bits(expected))
    # What sm_80's and sm_90's machine code does with the rest: mask the last 13 bits.
    assert torch.equal(bits(result[~finite]), bits(source[~finite]) & TF32_BITS)


def test_copies_are_there_after_the_wait(lib: ctypes.CDLL) -> None:
    source = torch.arange(16.0)
    results = {
        wait: run(getattr(lib, f"run_copies_{wait}"), source, torch.empty(16), threads=1)
        for wait in ("wait_0", "wait_1", "no_wait")
    }
    for wait, copied in {"wait_0": 12, "wait_1": 8, "no_wait": 0}.items():
        assert torch.equal(results[wait][:copied], source[:copied])
        assert results[wait][copied:].isnan().all()  # of the group that was not closed, always


@pytest.mark.parametrize("count", [0, 1, 15, 16])
def test_copy_fills_up_with_zeros(lib: ctypes.CDLL, count: int) -> None:
    source = guarded(torch.arange(1, 17, dtype=torch.uint8))
    result = torch.empty(16, dtype=torch.uint8)
    run(lib.run_copy, source, result, 0, 32, count, threads=1)
    assert torch.equal(result, torch.where(torch.arange(16) < count, source, 0))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 8, 16), r"cp_async_16 of 16 bytes at byte 8 of 1024 in shared memory"),
        ((0, -16, 16), r"cp_async_16 of 16 bytes at byte -16 of 1024"),
        ((0, 1024, 16), r"cp_async_16 of 16 bytes at byte 1024 of 1024"),
        ((4, 0, 16), "cp_async_16: an address that is no multiple of 16"),
        ((0, 0, 17), "cp_async_16 of 17 bytes"),
        ((0, 0, -1), "cp_async_16 of -1 bytes"),
    ],
)
def test_wrong_copies(lib: ctypes.CDLL, numbers: tuple[int, ...], message: str) -> None:
    source = guarded(torch.zeros(64, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match=rf"block 0: thread 0 at kernels\.cpp:\d+: .*{message}"):
        run(lib.run_copy, source, torch.empty(16), *numbers, threads=1)


def test_words(lib: ctypes.CDLL) -> None:
    source = torch.arange(4, dtype=torch.int32)
    result = guarded(torch.zeros(4, dtype=torch.int32))
    assert torch.equal(run(lib.run_words, source, result, 1008, 1008, threads=1), source)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((4, 0, 0), "store_shared of 8 bytes at byte 4 of 1024 in shared memory"),
        ((2, 0, 0), "store_shared of 8 bytes at byte 2 "),
        ((1016, 0, 0), "store_shared of 4 bytes at byte 1024 "),
        ((0, 8, 0), "load_shared of 16 bytes at byte 8 "),
        ((0, -16, 0), "load_shared of 16 bytes at byte -16 "),
        ((0, 0, 8), "store_global: an address that is no multiple of 16"),
    ],
)
def test_wrong_words(lib: ctypes.CDLL, numbers: tuple[int, ...], message: str) -> None:
    target = guarded(torch.empty(8, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=message):
        run(lib.run_words, torch.empty(4, dtype=torch.int32), target, *numbers, threads=1)


@pytest.mark.parametrize("offset", [8, 1024])
def test_wrong_ldmatrix(lib: ctypes.CDLL, offset: int) -> None:
    with pytest.raises(
        RuntimeError, match=rf"thread 5 .*ldmatrix of 16 bytes at byte {16 * 26 + offset} of"
    ):
        run(lib.run_ldmatrix, torch.zeros(256), torch.zeros(128), 0, offset)


@pytest.mark.parametrize(("offset", "side"), [(-1, "before"), (1024, "past"), (1100, "past")])
def test_writes_beside_shared_memory_are_found(lib: ctypes.CDLL, offset: int, side: str) -> None:
    with pytest.raises(RuntimeError, match=f"write {side} shared memory"):
        run(lib.run_poke, torch.empty(0), torch.empty(0), offset)
    run(lib.run_poke, torch.empty(0), torch.empty(0), 1023)


@pytest.mark.parametrize("distance", [1, 32])
@pytest.mark.parametrize("missing", ["nothing", "barrier after writes", "barrier after reads"])
def test_a_race_shows_in_some_order(
    lib: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, missing: str, distance: int
) -> None:
    source = torch.randn(64, 4)
    expected = source[:, 0].roll(-distance)
    agree = []
    for order in ORDERS:
        monkeypatch.setenv("MFOPS_EMULATOR_ORDER", order)
        number = ["nothing", "barrier after writes", "barrier after reads"].index(missing)
        result = run(lib.run_pass, source, torch.empty(64), distance, number, threads=64)
        agree.append(torch.equal(result, expected))
    assert all(agree) == (missing == "nothing")


@pytest.mark.parametrize("missing", ["nothing", "barrier after writes", "barrier after reads"])
@pytest.mark.parametrize("distance", [0, 1, 3])
def test_a_race_between_blocks_of_a_cluster_shows_in_some_order(
    lib: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, missing: str, distance: int
) -> None:
    source = torch.randn(2, 4, 32, 4)  # clusters, blocks, threads
    expected = source.roll(-distance, 1)
    agree = []
    for order in ORDERS:
        monkeypatch.setenv("MFOPS_EMULATOR_ORDER", order)
        number = {"nothing": 0, "barrier after writes": 2, "barrier after reads": 3}[missing]
        target = torch.empty(2, 4, 32, 4)
        run(lib.run_cluster, source, target, distance, number, blocks=8)
        agree.append(torch.equal(target, expected))
    assert all(agree) == (missing == "nothing" or distance == 0)


def test_memory_of_a_block_that_may_not_have_begun(lib: ctypes.CDLL, order: str) -> None:
    with pytest.raises(RuntimeError, match="load_cluster of a block that has ended or not begun"):
        run(lib.run_cluster, torch.zeros(4, 32, 4), torch.empty(4, 32, 4), 1, 1, blocks=4)


def test_blocks_that_make_no_whole_clusters(lib: ctypes.CDLL) -> None:
    with pytest.raises(RuntimeError, match="cannot launch 6 blocks"):
        run(lib.run_cluster, torch.zeros(6, 32, 4), torch.empty(6, 32, 4), 1, 0, blocks=6)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (0, r"thread 0 is at __syncthreads \(kernels\.cpp:\d+\), thread 40 is at its end"),
        (1, r"thread 0 is at __syncthreads \(kernels\.cpp:\d+\), thread 40 is at __syncthreads"),
        (2, r"thread 32 is at mma \(kernels\.cpp:\d+\), thread 40 is at __syncthreads"),
        (3, r"thread 32 is at mma \(kernels\.cpp:\d+\), thread 40 is at ldmatrix"),
        (4, r"thread 32 is at mma \(kernels\.cpp:\d+\), thread 40 is at its end"),
    ],
)
def test_divergence_is_found(lib: ctypes.CDLL, order: str, case: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"threads diverge: {message}"):
        run(lib.run_diverge, torch.empty(0), torch.empty(0), case, threads=64)
    # and does not spoil the next launch
    run(lib.run_diverge, torch.empty(0), torch.empty(0), 2, threads=32)


def test_collective_of_an_incomplete_warp(lib: ctypes.CDLL) -> None:
    with pytest.raises(RuntimeError, match="block 0: mma in an incomplete warp"):
        run(lib.run_diverge, torch.empty(0), torch.empty(0), 2, threads=20)


@pytest.mark.parametrize(
    "launch",
    [{"blocks": 0}, {"threads": 0}, {"threads": 1025}, {"shared": 227 * 1024 + 1}],
)
def test_impossible_launches(lib: ctypes.CDLL, launch: dict[str, int]) -> None:
    with pytest.raises(RuntimeError, match="cannot launch"):
        run(lib.run_grid, torch.empty(0), torch.empty(0), **launch)


def test_every_thread_of_every_block_runs_once(lib: ctypes.CDLL, order: str) -> None:
    result = torch.zeros(3 * 1024, dtype=torch.int32)
    run(lib.run_grid, torch.empty(0), result, blocks=3, threads=1024, shared=227 * 1024)
    assert torch.equal(result, torch.arange(3 * 1024, dtype=torch.int32) + 3)


def test_unknown_order_is_told(lib: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFOPS_EMULATOR_ORDER", "sideways")
    with pytest.raises(RuntimeError, match="MFOPS_EMULATOR_ORDER"):
        run(lib.run_poke, torch.empty(0), torch.empty(0), 0)


def test_guarded_memory(lib: ctypes.CDLL) -> None:
    memory = guarded(torch.arange(6.0))
    assert torch.equal(run(lib.run_guard, memory, torch.empty(6), 6), torch.arange(6.0))
    with pytest.raises(RuntimeError, match="thread 3: no access to memory at 0x"):
        run(lib.run_guard, memory, torch.empty(7), 7)
    with pytest.raises(RuntimeError, match="thread 3: no access to memory at 0x"):
        run(lib.run_guard, torch.empty(7), memory, 7)

    aligned = guarded(torch.arange(6.0), align=16)
    assert aligned.data_ptr() % 16 == 0
    assert run(lib.run_guard, aligned, torch.empty(8), 8)[6:].isnan().all()  # 8 bytes in between
    with pytest.raises(RuntimeError, match="no access"):
        run(lib.run_guard, aligned, torch.empty(9), 9)


def test_guarded_keeps_strides() -> None:
    tensor = torch.arange(12.0).view(3, 4)[:, ::2].T
    copy = guarded(tensor)
    assert copy.stride() == tensor.stride()
    assert torch.equal(copy, tensor)
    assert copy.as_strided((11,), (1,))[1::2].isnan().all()  # the gaps


def test_libraries_keep_apart(tmp_path: Path) -> None:
    libraries = []
    for number in (1, 2):
        source = tmp_path / f"{number}.cpp"
        source.write_text(
            f"namespace mfops {{ inline int number = {number}; }}"
            'extern "C" int get() { return mfops::number; }'
        )
        libraries.append(emulator.load(source))
    assert [library.get() for library in libraries] == [1, 2]
