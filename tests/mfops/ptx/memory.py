"""Global memory, and the shared memory of a cluster's blocks, with their checks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
GLOBAL, SHARED = 1 << 44, 1024  # where they begin; a block's number is in the bits from 24 on
BLOCK_BIT = 24


class AccessError(Exception):
    pass


def at(places: Array, size: int) -> Array:
    """The places of all bytes of an access: a line for each."""
    return places[:, None] + np.arange(size)


class Global:
    def __init__(self) -> None:
        self.bytes = np.zeros(1 << 22, np.uint8)
        self.valid = np.zeros(len(self.bytes), np.bool_)
        self.end = 0

    def put(self, array: Array, shift: int = 0) -> int:
        """The address of a copy, `shift` bytes beyond a multiple of 256.

        The bytes before it in its first 16 may be read, as by kernels that read 16 at a time.
        """
        data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        begin = -(-self.end // 256) * 256 + 256 + shift
        self.end = begin + len(data)
        self.bytes[begin : self.end] = data
        self.valid[begin - shift : self.end] = True
        return GLOBAL + begin

    def room(self, shape: tuple[int, ...], dtype: type) -> int:
        return self.put(np.full(shape, -1).astype(dtype))

    def get(self, address: int, shape: tuple[int, ...], dtype: type) -> Array:
        begin, count = address - GLOBAL, int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.bytes[begin : begin + count].tobytes(), dtype).reshape(shape)

    def places(self, addresses: Array, size: int) -> Array:
        places = addresses.astype(np.int64) - GLOBAL
        if (places % size).any():
            raise AccessError("misaligned in global memory")
        inside = (places >= 0) & (places + size <= len(self.bytes))
        if not inside.all() or not self.valid[at(places, size)].all():
            raise AccessError("outside of what was allocated in global memory")
        return at(places, size)


class Interval:
    """Who read and wrote each two bytes since the last barrier."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.written, self.writer = np.full((2, *shape), -1)
        self.read, self.reader = np.full((2, *shape), -1)

    def conflicts(self, where: tuple[Array, ...], epoch: Array, who: Array, write: bool) -> bool:
        found = (self.written[where] == epoch) & (self.writer[where] != who)
        read = self.read[where] == epoch
        other = read & (self.reader[where] != who)
        if write:
            self.written[where], self.writer[where] = epoch, who
            return bool((found | other | (self.writer[where] != who)).any())
        self.read[where], self.reader[where] = epoch, np.where(other, -2, who)
        several = self.reader[where] != who
        self.reader[tuple(index[several] for index in where)] = -2
        return bool(found.any())


class Shared:
    """Of all blocks of a cluster. It begins as what no kernel should read: not-a-number."""

    def __init__(self, block: Array, size: int) -> None:
        """`block`: of each thread."""
        blocks, threads = int(block[-1]) + 1, np.arange(len(block))
        self.bytes = np.full((blocks, SHARED + size), 0xFF, np.uint8)
        pairs = (blocks, (SHARED + size) // 2)
        self.block, self.warp = block, threads // 32
        # Between lanes of a warp, warps of a block, blocks; and how many barriers each has met at.
        self.intervals = [Interval(pairs) for _ in range(3)]
        self.syncs = np.zeros((3, len(block)), np.int64)
        self.syncs[0] = self.warp  # which keeps one warp's intervals apart from another's
        self.who = [threads, self.warp, block]

    def meet(self, threads: Array, level: int) -> None:
        """A barrier of warps (0), blocks (1) or the cluster (2)."""
        self.syncs[0, threads] += len(self.block) // 32
        self.syncs[1 : level + 1, threads] += 1

    def places(
        self, addresses: Array, size: int, active: Array, write: bool, remote: bool
    ) -> tuple[Array, Array]:
        """Notes an access of these threads; what it touches."""
        thread = np.flatnonzero(active)
        block = self.block[thread]
        owner = (addresses >> BLOCK_BIT).astype(np.int64)
        places = (addresses & ((1 << BLOCK_BIT) - 1)).astype(np.int64)
        if (owner >= len(self.bytes)).any() or (not remote and (owner != block).any()):
            raise AccessError("in another block's shared memory")
        if (places % size).any():
            raise AccessError("misaligned in shared memory")
        if (places < SHARED).any() or (places + size > self.bytes.shape[1]).any():
            raise AccessError("outside of the block's shared memory")
        count = max(1, size // 2)
        pairs = np.repeat(owner, count), at(places // 2, count).ravel()
        thread = np.repeat(thread, count)
        own = pairs[0] == self.block[thread]
        own_pairs, own_thread = (pairs[0][own], pairs[1][own]), thread[own]
        for level, other in enumerate(("lane", "warp", "block")):
            where, who = (pairs, thread) if level == 2 else (own_pairs, own_thread)
            epoch = self.syncs[level, who]
            if self.intervals[level].conflicts(where, epoch, self.who[level][who], write):
                raise AccessError(
                    f"of what another {other} reads or writes, with no barrier between them"
                )
        return owner[:, None], at(places, size)
