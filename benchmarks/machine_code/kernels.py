"""The kernels of the table, and the work that each does on a tile inside the matrix.

Counts are of a warp, of the busiest one where warps differ. They follow from the shapes of tiles
in csrc/cuda (strip.cuh, columns.cuh), at (C, K) = (512, 64) in bfloat16, contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.machine_code.paths import COPY, MMA, Stretch

ARCH = "sm_90"
WAIT, EXP, RECIPROCAL, QUOTIENT = "DEPBAR", r"MUFU\.EX2", r"MUFU\.RCP", "FCHK"
LDSM, LDSM_T = r"LDSM.*\.M88", r"LDSM.*\.MT88"  # of a matrix, of its transpose
LOAD, LOAD_2, LOAD_16 = r"LDS( if)?$", r"LDS\.U16", r"LDS\.128"  # 4, 2, 16 bytes of shared memory
STORE, STORE_2, STORE_8, STORE_16 = r"STS( if)?$", r"STS\.U16", r"STS\.64", r"STS\.128"
CERTAIN_STORE = r"STS$"  # whose block of code is only there to store
OUT_2, OUT_4, OUT_16 = r"STG\S*\.U16", r"STG\.E( if)?$", r"STG\S*\.128"  # to global memory
GET, PUT = r"LD\.E", r"ST\.E"  # in the cluster's shared memory
MEET = {"UCGABAR": 2}  # a cluster's barrier; the code has a block's too, for launches without one

Work = dict[str, int]


@dataclass(frozen=True)
class Kernel:
    title: str
    pattern: str  # of its mangled name
    warps: int  # of a block
    blocks: int  # on a multiprocessor
    shared: int  # bytes of a block, in as many stages as there is room for
    copied: int | None  # bytes of a tile that cross the memory bus; None: of no tile in particular
    stretches: list[Stretch]
    branching: bool = False  # in its loops of products, to ask which lines are aligned


def copies(lines: int, length: int, aligned: bool, threads: int = 256) -> int:
    """How many times 16 bytes a thread copies of a tile: a granule more of each unaligned line."""
    return -(-lines * (length // 8 + (not aligned)) // threads)


def products(rows: int, cols: int, contraction: int, warps: int = 8) -> int:
    return rows * cols * contraction // (16 * 8 * 16) // warps


def pairs(rows: int, cols: int, threads: int = 256) -> int:
    return rows * cols // 2 // threads


def tile(lines: int, length: int) -> int:
    """Bytes of a tile in shared memory, 8 elements of padding a line."""
    return 2 * lines * (length + 8)


def loads(rows: int, cols: int, aligned: bool) -> Work:
    return {LOAD: pairs(rows, cols)} if aligned else {LOAD_2: 2 * pairs(rows, cols)}


def stores(rows: int, cols: int, aligned: bool) -> Work:
    return {STORE: pairs(rows, cols)} if aligned else {STORE_2: 2 * pairs(rows, cols)}


def written(lines: int, length: int, aligned: bool) -> Work:
    """Of a tile to global memory: of unaligned lines whole granules, and parts of others."""
    count = copies(lines, length, aligned)
    return {OUT_16: count} if aligned else {OUT_16: count, OUT_2: 8 * count}


def both(*works: Work) -> Work:
    names = [name for work in works for name in work]
    return {name: sum(work.get(name, 0) for work in works) for name in names}


def aligned_or_odd(aligned: bool) -> str:
    return "aligned" if aligned else "N odd"


def forward(aligned: bool) -> Kernel:
    x, z = copies(128, 64, aligned), copies(64, 64, aligned)
    # Of a step's fragments: two of Y, two of Z, which are read by twos where Z's lines are odd.
    product = {MMA: products(128, 64, 64), LDSM: 8, **({LDSM_T: 8} if aligned else {LOAD_2: 64})}
    return Kernel(
        f"forward, {aligned_or_odd(aligned)}",
        rf"14forward_kernelILNS0_4TypeE2ELb0ELb{int(aligned)}ELi128ELi64E",
        warps=8,
        blocks=2,
        shared=tile(128, 64) + 3 * (tile(128, 64) + tile(64, 64)),
        copied=2 * 2 * 128 * 64,
        stretches=[
            Stretch({WAIT: 1}),
            Stretch({COPY: z}, until_copies=True),
            Stretch(both({COPY: x}, product, loads(128, 64, aligned), stores(128, 64, aligned))),
            Stretch(written(128, 64, aligned)),
        ],
        branching=not aligned,
    )


def later_image() -> Kernel:
    """Of shared factors: X' is known and written already."""
    work = {COPY: copies(128, 64, True), **loads(128, 64, True)}
    return replace(
        forward(True),
        title="forward, aligned, shared factors, images after the first",
        copied=2 * 128 * 64,
        stretches=[Stretch({WAIT: 1}), Stretch(work)],
    )


def backward(own_rows: bool, aligned: bool) -> Kernel:
    rows, cols = (128, 64) if own_rows else (64, 128)
    x = copies(rows, cols, aligned)
    read = loads(rows, cols, aligned)
    out = written(rows, cols, aligned) if own_rows else {}
    # Y's lines run along the bases, so they are aligned.
    factor = copies(64, 64, aligned or not own_rows)
    product = {MMA: products(128, 64, 64), LDSM: 8, **({LDSM_T: 8} if aligned else {LOAD_2: 64})}
    if not own_rows:
        gradient = {LDSM_T: 16}
    else:
        gradient = {LDSM: 16} if aligned else {LDSM: 8, LOAD_2: 64 + 8 * x}
    # D is kept for the second product; dX takes X's place only with the blocks that own rows.
    kept = {CERTAIN_STORE: pairs(rows, cols)}
    if own_rows:
        kept |= {STORE: 2 * pairs(rows, cols), **({} if aligned else {STORE_2: 32})}
    return Kernel(
        f"backward, {'rows' if own_rows else 'columns'}, {aligned_or_odd(aligned)}",
        rf"15backward_kernelILNS0_4TypeE2ELb0ELb{int(aligned)}ELi128ELi64ELi64E",
        warps=8,
        blocks=1,
        shared=2 * tile(128, 64) + 4 * (2 * tile(128, 64) + tile(64, 64)),
        copied=3 * 2 * 128 * 64 if own_rows else None,
        stretches=[
            Stretch({WAIT: 1}),
            Stretch({COPY: factor}, until_copies=True),
            Stretch({COPY: x}, until_copies=True),
            Stretch(both({COPY: x}, product, kept, read, read)),  # X and G'
            Stretch({MMA: products(128, 64, 64), **gradient, **out}),
        ],
        branching=not aligned,
    )


def round_(nmf: bool, aligned: bool) -> Kernel:
    scores, share = products(32, 64, 512), products(512, 64, 32)
    x = {COPY: copies(512, 32, aligned)}
    z = pairs(32, 64)
    # Lines are moved into place by one thread each, 16 bytes at a time; a barrier follows.
    settle = [] if aligned else [{STORE_16: 512 // 256 * 32 // 8}]
    if nmf:
        square = products(32, 64, 64)
        before = [Stretch(x, until_copies=True)]
        x = {COPY: copies(32, 64, True)}
        work = [
            *settle,
            {MMA: scores + square, LDSM: 4, LDSM_T: 64 + 4},
            {QUOTIENT: 2 * z, STORE: z},
            {OUT_16: 1, MMA: share + square, LDSM: 8, LDSM_T: 8 + 6},
        ]
    else:
        before = []
        work = [*settle, {MMA: scores}, {EXP: 2 * z}, {STORE: z}, {MMA: share, LOAD_2: 32}]
    work[0] = both(x, work[0])
    gram = tile(64, 64) if nmf else 0
    small = 4 * (64 + 256 + 2 * 32 * 4)  # factors of Y's columns, sums by threads and by warps
    stage = tile(512, 32) + (tile(32, 64) if nmf else 0)
    return Kernel(
        f"{'nmf' if nmf else 'em'}'s round, {aligned_or_odd(aligned)}",
        rf"12round_kernelILNS0_4TypeE2ELb0ELNS0_6FamilyE{int(nmf)}ELNS0_6EndingE0ELi512E",
        warps=8,
        blocks=1,
        shared=tile(512, 64) + gram + 3 * stage + (0 if nmf else tile(32, 64)) + small,
        copied=2 * 512 * 32,
        stretches=[Stretch({WAIT: 1}), *before, *map(Stretch, work)],
    )


def resident(nmf: bool) -> Kernel:
    """A round of a block's 144 columns; the busiest warps have 16 of them."""
    half = {MMA: products(256, 64, 144, 16), STORE_8: 16, **MEET}
    get = {GET: 8, **MEET}
    score = products(16, 64, 512, 1)
    if nmf:
        square = products(64, 64, 512, 16)
        work = [
            {MMA: score + square, LDSM_T: 160 + 64},
            {STORE: 4},
            {MMA: products(16, 64, 64, 1), RECIPROCAL: 32, STORE: 16},
            *(half, get, half, get),
            {MMA: products(64, 64, 144, 16), **MEET},
            {GET: 16, **MEET},
            {STORE_16: 4},
            {LOAD_16: 96, RECIPROCAL: 8, **MEET},
            {PUT: 8, OUT_4: 8, **MEET},
            {},
        ]
    else:
        weights = products(16, 64, 144, 4)
        work = [
            {MMA: score, EXP: 32, STORE: 16},
            both(half, {MMA: weights, LDSM: 9 + 9}),
            *(get, half, get),
            {GET: 8, STORE_16: 1},
            {LOAD: 32, **MEET},
            {GET: 8, PUT: 8, **MEET},
            {},
        ]
    return Kernel(
        f"resident, {'nmf' if nmf else 'em'}: a round at N = 1089",
        rf"15resident_kernelILNS0_4TypeE2ELb0ELNS0_6FamilyE{int(nmf)}E",
        warps=16,
        blocks=1,
        shared=2 * (144 * 512 + 512 * 64 + 144 * 64) + 2 * 4 * 64 + 16,
        copied=None,
        stretches=[*map(Stretch, work)],
    )


KERNELS = [
    forward(True),
    later_image(),
    forward(False),
    backward(True, True),
    backward(False, True),
    backward(True, False),
    backward(False, False),
    *(round_(nmf, aligned) for nmf in (False, True) for aligned in (True, False)),
    resident(False),
    resident(True),
]
