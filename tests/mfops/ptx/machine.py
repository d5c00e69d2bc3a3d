"""Runs a kernel, one cluster of blocks after another."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from .instructions import Instructions
from .memory import Global, Shared
from .program import Instruction, Program

RUNNING, AT_WARP, AT_BARRIER, AT_CLUSTER, ENDED = range(5)


class Grid(NamedTuple):
    blocks: int
    threads: int  # of a block
    shared: int  # bytes of a block
    cluster: int = 1  # blocks


class MachineError(Exception):
    pass


def run(program: Program, parameters: bytes, memory: Global, grid: Grid) -> None:
    """
    Raises:
        MachineError: an instruction did what it must not, or threads wait for ever.
    """
    assert len(parameters) == program.parameter_bytes, (len(parameters), program.parameter_bytes)
    for first in range(0, grid.blocks, grid.cluster):
        _Cluster(program, parameters, memory, grid, first).run()


class _Cluster:
    """All threads. Those that are furthest behind go on first, so that lanes meet again."""

    def __init__(
        self, program: Program, parameters: bytes, memory: Global, grid: Grid, first: int
    ) -> None:
        self.program, self.grid = program, grid
        count = grid.cluster * grid.threads
        self.block = np.repeat(np.arange(grid.cluster), grid.threads)
        self.next = np.zeros(count, np.int64)
        self.state = np.full(count, RUNNING)
        self.shared = Shared(self.block, grid.shared)
        self.own = Instructions(program, parameters, memory, self.shared, self.block, first)

    def run(self) -> None:
        while not (self.state == ENDED).all():
            running = self.state == RUNNING
            if running.any():
                at = int(self.next[running].min())
                self._step(at, running & (self.next == at))
            else:
                self._release()

    def _step(self, at: int, threads: np.ndarray) -> None:
        instruction = self.program.instructions[at]
        active = threads
        if instruction.predicate:
            active = threads & (self.own.register(instruction.predicate) != instruction.negated)
        self.next[threads] = at + 1
        name = instruction.name
        if name.startswith("bra"):
            self.next[active] = self.program.labels[instruction.operands[0]]
        elif name in ("ret", "exit"):
            self.state[active] = ENDED
        elif name.startswith("bar.sync"):
            self.state[active] = AT_BARRIER
        elif name == "bar.warp.sync":
            self.state[active] = AT_WARP
        elif name.startswith("barrier.cluster.wait"):
            self.state[active] = AT_CLUSTER
        elif active.any() and not name.startswith("barrier.cluster.arrive"):
            self._do(instruction, active)

    def _do(self, instruction: Instruction, active: np.ndarray) -> None:
        if re.match(r"mma|ldmatrix|shfl", instruction.name):
            lanes = active.reshape(-1, 32).sum(1)
            if not np.isin(lanes, (0, 32)).all():
                raise MachineError(f"a part of a warp only: {instruction.text}")
        try:
            self.own.do(instruction, active)
        except Exception as error:
            raise MachineError(f"{instruction.text}: {error}") from error
        # No lane goes beyond a matrix instruction before all have loaded what comes before it.
        if re.match("mma|ldmatrix", instruction.name):
            self.shared.meet(np.flatnonzero(active), 0)

    def _release(self) -> None:
        """Of barriers that all threads have come to."""
        if (self.state == AT_CLUSTER).all():
            self.state[:] = RUNNING
            self.shared.meet(np.arange(len(self.block)), 2)
            return
        released = False
        for level, state, size in ((0, AT_WARP, 32), (1, AT_BARRIER, self.grid.threads)):
            there, place = (self.state == state).reshape(-1, size), self.next.reshape(-1, size)
            complete = there.all(1) & (place == place[:, :1]).all(1)
            threads = np.flatnonzero(np.repeat(complete, size))
            if len(threads):
                self.state[threads] = RUNNING
                self.shared.meet(threads, level)
                released = True
        if not released:
            raise MachineError("threads wait for others that do not come")
