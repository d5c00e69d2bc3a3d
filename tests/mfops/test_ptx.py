"""What nvcc made of the kernels, interpreted: one case of each, on lines of odd length too."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from ptx import parameters as p
from ptx.instructions import bf16, from_bf16
from ptx.machine import Grid, MachineError, run
from ptx.memory import GLOBAL, Global
from ptx.program import program

from benchmarks.machine_code import listing

EPS = 1e-6


@pytest.fixture(scope="module")
def compiled() -> str:
    """The PTX that the build holds for architectures to come."""
    extension = pytest.importorskip("mfops._C", reason="the extension was not built")
    if extension.build_info()["cuda"] is None:
        pytest.skip(f"no CUDA in this build: {extension.build_info()['cuda_missing']}")
    if listing.cuobjdump() is None:
        pytest.skip("no cuobjdump, neither on PATH nor in triton")
    text = listing.dump(Path(extension.__file__), "--dump-ptx")
    targets = [int(arch) for arch in re.findall(r"^\.target sm_(\d+)", text, re.MULTILINE)]
    if min(targets, default=0) < 90:
        pytest.skip("no PTX from compute capability 9.0 on in this build (9.0+PTX in setup.py)")
    return text


def bits(array: np.ndarray) -> np.ndarray:
    return bf16(array).reshape(array.shape)


def values(array: np.ndarray) -> np.ndarray:
    return from_bf16(array).astype(np.float64).reshape(array.shape)


def padded(n: int) -> int:
    return -(-n // 16) * 16


def dense(address: int, lines: int, length: int, shared: bool = False) -> p.Lines:
    return p.Lines(address, 0 if shared else lines * length, length, 1)


def work(strips: int, tiles: int, ranges: int, chunks: int) -> p.Work:
    return p.Work(strips, tiles, ranges, chunks, 1, strips)


def off(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class Call:
    """Features, factors of each image or of all, and a problem that has them."""

    def __init__(self, shape: tuple[int, int, int, int], shared: bool = False) -> None:
        batch, channels, rank, pixels = self.shape = shape
        random = np.random.default_rng(0)
        self.memory = Global()
        self.x = bits(random.standard_normal((batch, channels, pixels)))
        self.products = 1 if shared else batch  # that a block's images have among them
        self.y = bits(random.standard_normal((self.products, channels, rank)))
        self.z = bits(random.standard_normal((self.products, rank, pixels)))
        x = dense(self.memory.put(self.x), channels, pixels)
        y = dense(self.memory.put(self.y), channels, rank, shared)
        z = dense(self.memory.put(self.z), rank, pixels, shared)
        sizes = (batch, channels, pixels, rank)
        self.problem = p.Problem(p.BF16, False, *sizes, x, y, z, not shared, not shared)
        self.kernel = f"ILNS0_4TypeE{p.BF16}ELb0ELb{int(shared)}E"


SHAPES = pytest.mark.parametrize(
    "shape", [(2, 136, 24, 152), (2, 137, 20, 151)], ids=["aligned", "odd"]
)
SHARING = pytest.mark.parametrize("shared", [False, True], ids=["per-image", "shared"])


def forward(compiled: str, call: Call, less: int = 0) -> tuple[np.ndarray, float]:
    """X' and the sum of squares, with so many bytes of shared memory less than it needs."""
    _, channels, rank, pixels = call.shape
    strips, tiles, stages, k = -(-channels // 128), -(-pixels // 64), 3, padded(rank)
    blocks = strips * 2 * call.products
    x_hat_shape = (call.products, channels, pixels)
    x_hat = call.memory.room(x_hat_shape, np.uint16)
    errors = call.memory.room((blocks,), np.float64)
    deal = work(strips, tiles, 2, call.products)
    parameters = p.Forward(call.problem, deal, stages, x_hat, errors)
    shared = 2 * (128 * (k + 8) + stages * (128 * 72 + k * 72)) - less
    kernel = program(compiled, f"forward_kernel{call.kernel}Li128E")
    run(kernel, bytes(parameters), call.memory, Grid(blocks, 256, shared))
    found = values(call.memory.get(x_hat, x_hat_shape, np.uint16))
    return found, float(call.memory.get(errors, (blocks,), np.float64).sum())


@SHARING
@SHAPES
def test_forward(compiled, shape, shared):
    call = Call(shape, shared)
    found, error = forward(compiled, call)
    x, y, z = (values(tensor) for tensor in (call.x, call.y, call.z))
    # A rounding of the result, and float32 sums of `rank` products.
    sums = 2 * y.shape[-1] * 2.0**-23 * (np.abs(y) @ np.abs(z))
    assert (np.abs(found - y @ z) <= 2.0**-8 * np.abs(y @ z) + sums).all()
    assert error == pytest.approx(((x - y @ z) ** 2).sum(), rel=1e-5)


@SHARING
@SHAPES
def test_backward(compiled, shape, shared):
    batch, channels, rank, pixels = shape
    call = Call(shape, shared)
    g = bits(np.random.default_rng(1).standard_normal(call.x.shape))
    elements, stages, k = batch * channels * pixels, 2, padded(rank)
    grad_mse = np.array([elements / 2], np.float32)
    grad_x = call.memory.room(call.x.shape, np.uint16)
    grad_y = call.memory.room(call.y.shape, np.float32)
    grad_z = call.memory.room(call.z.shape, np.float32)
    rows = work(-(-channels // 128), -(-pixels // 64), 1, call.products)
    cols = work(-(-pixels // 128), -(-channels // 64), 1, call.products)
    parameters = p.Backward(
        call.problem,
        dense(call.memory.put(g), channels, pixels),
        True,
        call.memory.put(grad_mse),
        2 / elements,
        stages,
        rows,
        cols,
        False,
        rows.strips * call.products,
        grad_x,
        0,
        p.FactorGradient(0, grad_y),
        p.FactorGradient(0, grad_z),
    )
    by_rows = 128 * (k + 8) + 128 * 72 + stages * (2 * 128 * 72 + k * 72)
    by_cols = k * 136 + 64 * 136 + stages * (2 * 64 * 136 + 64 * (k + 8))
    grid = Grid((rows.strips + cols.strips) * call.products, 512, 2 * max(by_rows, by_cols))
    kernel = program(compiled, f"backward_kernel{call.kernel}Li128ELi64ELi64E")
    run(kernel, bytes(parameters), call.memory, grid)
    x, y, z = (values(tensor) for tensor in (call.x, call.y, call.z))
    error = x - y @ z  # times 2 g / elements, which is 1
    d = values(g) - error
    get = call.memory.get
    rounding = 2.0**-8  # of dX, and of D before it is multiplied
    assert off(values(get(grad_x, x.shape, np.uint16)), error) < rounding
    d = d.reshape(len(y), -1, channels, pixels).sum(1)  # of the images that share a product
    assert off(get(grad_y, y.shape, np.float32), d @ z.transpose(0, 2, 1)) < rounding
    assert off(get(grad_z, z.shape, np.float32), y.transpose(0, 2, 1) @ d) < rounding


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(-2, keepdims=True))
    return e / e.sum(-2, keepdims=True)


def unit(bases: np.ndarray) -> np.ndarray:
    return bases / np.linalg.norm(bases, axis=-2, keepdims=True)


def factor_problem(x: int, shape: tuple[int, int, int, int]) -> p.FactorProblem:
    batch, channels, rank, pixels = shape
    lines = dense(x, channels, pixels)
    return p.FactorProblem(p.BF16, False, batch, channels, pixels, rank, lines)


@pytest.mark.parametrize("shape", [(2, 256, 20, 160), (2, 250, 20, 131)], ids=["aligned", "odd"])
@pytest.mark.parametrize("nmf", [False, True], ids=["em", "nmf"])
def test_round(compiled, nmf, shape):
    """Y is what update_kernel would have left, and so is nmf's Y^T Y."""
    batch, channels, rank, pixels = shape
    random, memory, k = np.random.default_rng(0), Global(), padded(rank)
    draw = random.random if nmf else random.standard_normal
    x = bits(draw((batch, channels, pixels)))
    bases = np.zeros((batch, channels, k), np.uint16)
    bases[..., :rank] = bits(unit(draw((batch, channels, rank))))
    y = values(bases)
    gram = bits(y.transpose(0, 2, 1) @ y)
    before = np.zeros((batch, pixels, k), np.uint16)
    before[..., :rank] = bits(random.random((batch, pixels, rank)))
    squares, factors = np.ones((batch, 1, k), np.float32), np.ones((batch, k), np.float32)
    stages, ranges, tiles = 2, 2, -(-pixels // 32)
    partials = memory.room((batch, ranges, channels, k), np.float32)
    sums_shape = (batch, ranges, k, k) if nmf else (batch, ranges, k)
    sums = memory.room(sums_shape, np.float32)
    z = memory.room((batch, rank, pixels), np.uint16)
    parameters = p.Round(
        problem=factor_problem(memory.put(x), shape),
        work=p.ColumnWork(tiles, ranges, 1, 1),
        stages=stages,
        bases=memory.put(bases),
        squares=memory.put(squares),
        slices=1,
        factors=memory.put(factors),
        gram=memory.put(gram),
        z_before=memory.put(before),
        z_after=memory.room(before.shape, np.uint16) if nmf else 0,
        partials=partials,
        sums=sums,
        z=z,
    )
    z_tiles = stages if nmf else 1
    places = (padded(channels) + nmf * k + z_tiles * 32) * (k + 8) + stages * 256 * 40
    shared = 2 * places + 4 * (k + 256 + 2 * 32 * 4)
    family = f"FamilyE{int(nmf)}ELNS0_8EpilogueE0ELi256E"
    kernel = program(compiled, f"round_kernelILNS0_4TypeE{p.BF16}ELb0ELNS0_6{family}")
    run(kernel, bytes(parameters), memory, Grid(batch * ranges, 256, shared))

    scores = (y.transpose(0, 2, 1) @ values(x))[:, :rank]
    after = softmax(scores)
    if nmf:
        under = values(gram) @ values(before).transpose(0, 2, 1) + EPS
        after = values(before).transpose(0, 2, 1)[:, :rank] * scores / under[:, :rank]
    rounding = 2.0**-8  # of Z
    assert off(values(memory.get(z, after.shape, np.uint16)), after) < rounding
    product = memory.get(partials, (batch, ranges, channels, k), np.float32).sum(1)[..., :rank]
    assert off(product, values(x) @ after.transpose(0, 2, 1)) < rounding
    total = memory.get(sums, sums_shape, np.float32).sum(1)
    if nmf:
        assert off(total[:, :rank, :rank], after @ after.transpose(0, 2, 1)) < 2 * rounding
    else:
        assert off(total[:, :rank], after.sum(-1)) < rounding


def em(x: np.ndarray, y: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    for _ in range(steps):
        z = softmax(y.transpose(0, 2, 1) @ x)
        y = x @ (z / (EPS + z.sum(-1, keepdims=True))).transpose(0, 2, 1)
        y = y / (EPS + np.linalg.norm(y, axis=-2, keepdims=True))
    return y, z


def nmf(x: np.ndarray, y: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    z = softmax(y.transpose(0, 2, 1) @ x)
    for step in range(steps + 1):
        z = z * (y.transpose(0, 2, 1) @ x) / (y.transpose(0, 2, 1) @ y @ z + EPS)
        if step < steps:
            y = y * (x @ z.transpose(0, 2, 1)) / (y @ (z @ z.transpose(0, 2, 1)) + EPS)
    return y, z


@pytest.mark.parametrize("method", [em, nmf], ids=["em", "nmf"])
def test_persistent(compiled, method):
    """A cluster of eight blocks, lines of odd length that start 2 bytes beyond 16."""
    shape = batch, channels, rank, pixels = 1, 70, 20, 151
    random, memory, k, steps = np.random.default_rng(0), Global(), padded(rank), 2
    draw = random.random if method is nmf else random.standard_normal
    x, start = bits(draw((batch, channels, pixels))), unit(draw((channels, rank)))
    y = memory.room((batch, channels, rank), np.float32)
    z = memory.room((batch, rank, pixels), np.uint16)
    x_hat = memory.room(x.shape, np.uint16)
    errors = memory.room((8 * batch,), np.float64)
    whole, span = -(-channels // 32) * 32, -(-pixels // 128) * 16
    parameters = p.Persistent(
        factor_problem(memory.put(x, shift=2), shape),
        span,
        steps,
        True,
        p.Lines(memory.put(start.astype(np.float32)), 0, rank, 1),
        y,
        z,
        memory.room((batch, rank, pixels), np.uint16),
        x_hat,
        errors,
    )
    bases = max(whole * k * 2, (k + 2 * -(-whole // 2 // 8)) * k * 4)
    shared = 2 * whole * span + bases + 2 * span * k + 12 * k + 16
    family = f"FamilyE{int(method is nmf)}E"
    kernel = program(compiled, f"persistent_kernelILNS0_4TypeE{p.BF16}ELb0ELNS0_6{family}")
    run(kernel, bytes(parameters), memory, Grid(8 * batch, 512, shared, cluster=8))

    x = values(x)
    expected_y, expected_z = method(x, np.broadcast_to(start, (batch, *start.shape)), steps)
    rounding = 2.0**-8  # of Y and Z, in each round
    assert off(memory.get(y, expected_y.shape, np.float32), expected_y) < steps * rounding
    found = values(memory.get(z, expected_z.shape, np.uint16))
    assert off(found, expected_z) < (steps + 1) * rounding
    expected = expected_y @ expected_z
    assert off(values(memory.get(x_hat, x.shape, np.uint16)), expected) < (steps + 1) * rounding
    error = memory.get(errors, (8 * batch,), np.float64).sum()
    assert error == pytest.approx(((x - expected) ** 2).sum(), rel=rounding)


def test_a_missing_barrier_is_found(compiled):
    """Of a block, before a tile is used, after lines were moved, before X' is written and before
    the warps' sums are added; of a warp, where it moves lines of X, of Y and of Z.
    """
    shape = 1, 130, 12, 131
    call = Call(shape)
    begin = re.search(rf"\.entry \w+forward_kernel{call.kernel}Li128E", compiled)
    assert begin is not None
    end = compiled.find(".entry", begin.end())
    found: dict[str, set[str]] = {"bar.sync": set(), "bar.warp.sync": set()}
    for barrier in re.finditer(r"(bar\.(?:warp\.)?sync)\s+-?\d", compiled[begin.start() : end]):
        at, after = (begin.start() + place for place in barrier.span())
        try:
            forward(f"{compiled[:at]}mov.u32 %r1, %r1{compiled[after:]}", Call(shape))
        except MachineError as error:
            found[barrier[1]].add(str(error))
    assert [len(errors) for errors in found.values()] == [4, 3]
    assert all("no barrier between them" in error for error in set.union(*found.values()))


def test_an_access_beyond_the_end_is_found(compiled):
    with pytest.raises(MachineError, match="outside of the block's shared memory"):
        forward(compiled, Call((1, 128, 16, 512)), less=32)  # 16 are padding
    call = Call((1, 128, 16, 128))
    call.memory.valid[: call.problem.x.data - GLOBAL + 16] = False
    with pytest.raises(MachineError, match="outside of what was allocated"):
        forward(compiled, call)
