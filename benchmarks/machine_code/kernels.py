"""The kernels of the table, and the work that each does on a tile inside the matrix.

Counts are of a warp, of the busiest one where warps differ. They follow from the shapes of tiles
(csrc/cuda: reconstruct/strip.cuh, factorize/columns.cuh) at (C, K) = (512, 64) in bfloat16,
contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.machine_code.paths import MMA, Work

ARCH = "sm_90"
WAIT, EXP, RECIPROCAL, QUOTIENT = "DEPBAR", r"MUFU\.EX2", r"MUFU\.RCP", "FCHK"
# Copies of whole tiles that start on 16 bytes; of other ones, which ask for edges.
COPY, COPY_PART = r"LDGSTS.*\.128", r"LDGSTS.*\.ZFILL"
LDSM, LDSM_T = r"LDSM.*\.M88", r"LDSM.*\.MT88"  # of a matrix, of its transpose
LOAD, LOAD_2, LOAD_16 = r"LDS( if)?$", r"LDS\.U16", r"LDS\.128"  # 4, 2, 16 bytes of shared memory
STORE, STORE_8, STORE_16 = r"STS( if)?$", r"STS\.64", r"STS\.128"
OUT_2, OUT_4, OUT_16 = r"STG\S*\.U16", r"STG\.E( if)?$", r"STG\S*\.128"  # to global memory
GET, PUT = r"LD\.E", r"ST\.E"  # in the cluster's shared memory
MEET = {"UCGABAR": 2}  # a cluster's barrier; the code has a block's too, for launches without one


@dataclass(frozen=True)
class Kernel:
    title: str
    pattern: str  # of its mangled name
    warps: int  # of a block
    blocks: int  # on a multiprocessor
    shared: int  # bytes of a block, in as many stages as there is room for
    copied: int | None  # bytes of a tile that cross the memory bus; None: of no tile in particular
    stretches: list[Work]  # the last one ends with the loop


@dataclass(frozen=True)
class Moves:
    """What threads of a block do to bring a tile, to move its lines to 16 bytes, to write it."""

    lines: int
    length: int
    threads: int
    aligned: bool
    brought_as: int = 0  # which of the tiles that the kernel's loop brings, in the code's order
    moved_as: int | None = None  # and of those that it moves; None: the only one

    @property
    def granules(self) -> int:
        """Of 16 bytes, a thread's."""
        return self.lines * self.length // 8 // self.threads

    def brought(self) -> Work:
        """A line that is not aligned takes a granule more."""
        tile = f" of {self.brought_as}"
        if self.aligned:
            return {COPY + tile: self.granules}
        return {COPY_PART + tile: -(-self.lines * (self.length // 8 + 1) // self.threads)}

    def moved(self) -> Work:
        if self.aligned:
            return {}
        tile = "" if self.moved_as is None else f" of {self.moved_as}"
        return {f"LDS{tile}$": 5 * self.granules, f"STS.128( if)?{tile}$": self.granules}

    def written(self) -> Work:
        if self.aligned:
            return {LOAD_16: self.granules, OUT_16: self.granules}
        # And what is left at the ends of lines, up to 7 elements each.
        ends = 7 * -(-2 * self.lines // self.threads)
        return {LOAD: 5 * self.granules, OUT_16: self.granules, LOAD_2: ends, OUT_2: ends}


def products(rows: int, cols: int, contraction: int, warps: int = 8) -> int:
    return rows * cols * contraction // (16 * 8 * 16) // warps


def pairs(rows: int, cols: int, threads: int = 256) -> int:
    return rows * cols // 2 // threads


def tile(lines: int, length: int) -> int:
    """Bytes of a tile in shared memory, 8 elements of padding a line."""
    return 2 * lines * (length + 8)


def both(*works: Work) -> Work:
    names = [name for work in works for name in work]
    return {name: sum(work.get(name, 0) for work in works) for name in names}


def aligned_or_odd(aligned: bool) -> str:
    return "aligned" if aligned else "N odd"


def forward(aligned: bool) -> Kernel:
    x, z = Moves(128, 64, 256, aligned, 2, 0), Moves(64, 64, 256, aligned, 1, 2)
    n = pairs(128, 64)
    return Kernel(
        f"forward, {aligned_or_odd(aligned)}",
        "14forward_kernelILNS0_4TypeE2ELb0ELb0ELi128ELi64E",
        warps=8,
        blocks=2,
        shared=tile(128, 64) + 3 * (tile(128, 64) + tile(64, 64)),
        copied=2 * 2 * 128 * 64,
        stretches=[
            {WAIT: 1},
            both(z.brought(), x.brought(), x.moved(), z.moved()),
            # Of a step's fragments two are of Y, two of Z.
            {MMA: products(128, 64, 64), LDSM: 8, LDSM_T: 8, LOAD: n, STORE: n},
            x.written(),
        ],
    )


def later_image() -> Kernel:
    """Of shared factors: X' is known and written already."""
    return replace(
        forward(True),
        title="forward, aligned, shared factors, images after the first",
        pattern="14forward_kernelILNS0_4TypeE2ELb0ELb1ELi128ELi64E",
        copied=2 * 128 * 64,
        stretches=[
            {WAIT: 1},
            Moves(128, 64, 256, True, 2).brought(),
            {LOAD: pairs(128, 64)},
        ],
    )


def backward(own_rows: bool, aligned: bool) -> Kernel:
    rows, cols = (128, 64) if own_rows else (64, 128)
    x, g = (Moves(rows, cols, 512, aligned, place, place) for place in (2, 3))
    # Y's lines run along the bases, so they are aligned.
    factor = Moves(64, 64, 512, aligned or not own_rows, int(own_rows), int(own_rows))
    n = pairs(rows, cols, 512)
    product = {MMA: products(128, 64, 64, 16)}
    of_d = {LDSM: 12, **x.written()} if own_rows else {LDSM_T: 12}
    return Kernel(
        f"backward, {'rows' if own_rows else 'columns'}, {aligned_or_odd(aligned)}",
        "15backward_kernelILNS0_4TypeE2ELb0ELb0ELi128ELi64ELi64E",
        warps=16,
        blocks=1,
        shared=2 * tile(128, 64) + 4 * (2 * tile(128, 64) + tile(64, 64)),
        copied=3 * 2 * 128 * 64 if own_rows else None,
        stretches=[
            {WAIT: 1},
            both(*(work for tile in (factor, x, g) for work in (tile.brought(), tile.moved()))),
            # Of a step's fragments two are of Y, one of Z. D is kept for the second product; dX
            # takes X's place only with the blocks of rows.
            {**product, LDSM: 8, LDSM_T: 4, LOAD: 2 * n, STORE: (2 if own_rows else 1) * n},
            {**product, **of_d},
        ],
    )


def round_(nmf: bool, aligned: bool) -> Kernel:
    scores, sums = products(32, 64, 512), products(512, 64, 32)
    x = Moves(512, 32, 256, aligned)
    z = pairs(32, 64)
    before = Moves(32, 64, 256, True, 2).brought() if nmf else {}  # nmf: the Z before
    if nmf:
        square = products(32, 64, 64)
        work = [
            {MMA: scores + square, LDSM: 4, LDSM_T: 64 + 4},
            {QUOTIENT: 2 * z, STORE: z},
            {OUT_16: 1, MMA: sums + square, LDSM: 8, LDSM_T: 8 + 6},
        ]
    else:
        work = [{MMA: scores}, {EXP: 2 * z}, {STORE: z}, {MMA: sums, LOAD_2: 8}]
    brought = both(x.brought(), before, x.moved())
    # A barrier follows what is moved, on a path of its own.
    work = [both(brought, work[0]), *work[1:]] if aligned else [brought, *work]
    gram = tile(64, 64) if nmf else 0
    small = 4 * (64 + 256 + 2 * 32 * 4)  # factors of Y's columns, sums by threads and by warps
    stage = tile(512, 32) + (tile(32, 64) if nmf else 0)
    return Kernel(
        f"{'nmf' if nmf else 'em'}'s round, {aligned_or_odd(aligned)}",
        rf"12round_kernelILNS0_4TypeE2ELb0ELNS0_6FamilyE{int(nmf)}ELNS0_8EpilogueE0ELi512E",
        warps=8,
        blocks=1,
        shared=tile(512, 64) + gram + 3 * stage + (0 if nmf else tile(32, 64)) + small,
        copied=2 * 512 * 32,
        stretches=[{WAIT: 1}, *work],
    )


def persistent(nmf: bool) -> Kernel:
    """A round of a block's 144 columns; the busiest warps have 16 of them."""
    sums = products(256, 64, 144, 16)
    get = {GET: 8, **MEET}
    score = products(16, 64, 512, 1)
    if nmf:
        half = {f"{MMA}.* of 3": sums, STORE_8: 16, **MEET}
        work = [
            {f"{MMA}.* of 0": score, f"{MMA}.* of 1": products(64, 64, 512, 16)},
            {STORE: 4},
            # Half of the bases at a time; the way into the second half's loop is not counted.
            {f"{MMA}.* of 2": products(16, 64, 64, 1), RECIPROCAL: 32, STORE: 16},
            *(half, get, half, get),
            {f"{MMA}.* of 4": products(64, 64, 144, 16), STORE_8: 4, **MEET},
            {GET: 8, PUT: 16, **MEET},  # an eighth of Z Z^T, for all blocks
            {STORE_16: 2},
            {LOAD_16: 96, RECIPROCAL: 8, **MEET},
            {PUT: 16, OUT_4: 8, **MEET},
            {},
        ]
    else:
        half = {f"{MMA}.* of 2": sums, STORE_8: 16, **MEET}
        fetched = {GET: 8, STORE_16: 1}
        work = [
            {f"{MMA}.* of 0": score, EXP: 32, STORE: 16},
            {**half, f"{MMA}.* of 1": products(16, 64, 144, 4), STORE_8: 16 + 4},
            *(get, half, get),
            fetched,
            {LOAD_16: 1, RECIPROCAL: 4, STORE_16: 1},
            {LOAD: 32, **MEET},
            fetched,
            {LOAD_16: 1, RECIPROCAL: 4, PUT: 16, **MEET},
            {},
        ]
    return Kernel(
        f"persistent, {'nmf' if nmf else 'em'}: a round at N = 1089",
        rf"17persistent_kernelILNS0_4TypeE2ELb0ELNS0_6FamilyE{int(nmf)}E",
        warps=16,
        blocks=1,
        shared=2 * (144 * 512 + 512 * 64 + 144 * 64) + 3 * 4 * 64 + 16,
        copied=None,
        stretches=work,
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
    persistent(False),
    persistent(True),
]
