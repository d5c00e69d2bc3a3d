"""The instructions that a warp issues for a tile, counted in a kernel's machine code.

The code of a kernel holds paths for edges and for all kinds of calls. Counted is the shortest path
once around the kernel's main loop that does the work of a tile inside the matrix, which the tile's
shape gives: so many copies, products and stores between one barrier and the next. What no work
forces is not counted. A subroutine (for quotients) counts with its shortest path.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from typing import NamedTuple

from benchmarks.machine_code.listing import Instruction

COPY, MOVE, MMA = "LDGSTS", "STS.128", "HMMA"

# What a warp does until a barrier: how often instructions occur, by the pattern of their names,
# which "if" follows where a predicate may switch them off, and "of 1" where they bring or move the
# second of the loop's tiles, or belong to its second product. Copies and products occur just as
# often, others at least.
Work = dict[str, int]


class _Place(NamedTuple):
    block: int
    stretch: int
    done: tuple[int, ...]  # of the stretch's work


_CLOSED = _Place(-1, -1, ())  # the loop, its work done


class Graph:
    """Basic blocks and which follows which. A barrier ends a block."""

    def __init__(self, code: list[Instruction]):
        at = {instruction.address: i for i, instruction in enumerate(code)}
        starts = {0}
        for i, instruction in enumerate(code):
            if re.match(r"BRA|EXIT|RET|CALL|BAR\.|UCGABAR_WAIT|BSYNC", instruction.name):
                starts.add(i + 1)
            if re.match("BRA|CALL", instruction.name):
                starts.add(at[instruction.target])
        first = sorted(starts & set(range(len(code))))
        self.blocks = [code[i:j] for i, j in zip(first, [*first[1:], len(code)], strict=True)]
        self.last = [block[-1] for block in self.blocks]
        self.block_at = {block[0].address: i for i, block in enumerate(self.blocks)}
        self.next = [self._after(i) for i in range(len(self.blocks))]
        for i, last in enumerate(self.last):
            if last.name.startswith("CALL"):
                self.blocks[i] = [*self.blocks[i], *self._subroutine(self.block_at[last.target])]

    def _after(self, i: int) -> list[int]:
        last = self.last[i]
        following = [i + 1] if i + 1 < len(self.blocks) else []
        if last.name.startswith("RET"):
            return []
        if last.name.startswith("EXIT"):
            return following if last.predicate else []
        if last.name.startswith("BRA") and not last.name.startswith("BRA.DIV"):
            conditional = last.predicate or re.search(r"\bU?P\d", last.operands)
            return [self.block_at[last.target], *(following if conditional else [])]
        return following

    def _subroutine(self, first: int) -> list[Instruction]:
        """The fewest instructions until it returns."""
        ways, seen = [(len(self.blocks[first]), [first])], set()
        while ways:
            length, way = heapq.heappop(ways)
            if self.last[way[-1]].name.startswith("RET"):
                return [instruction for i in way for instruction in self.blocks[i]]
            for j in set(self.next[way[-1]]) - seen:
                heapq.heappush(ways, (length + len(self.blocks[j]), [*way, j]))
            seen.add(way[-1])
        raise LookupError(f"the subroutine at {self.blocks[first][0].address:#x} never returns")

    def ends_with_barrier(self, i: int) -> bool:
        return re.match(r"BAR\.|UCGABAR_WAIT", self.last[i].name) is not None

    def heads(self) -> list[int]:
        """Blocks that loops with products and barriers begin with, largest loop first."""
        sizes: dict[int, int] = {}
        for i in self._reachable():
            for head in self.next[i]:
                inside = [ins.name for block in self.blocks[head : i + 1] for ins in block]
                if {MMA, "BAR"} <= {name.split(".")[0] for name in inside}:
                    sizes[head] = max(len(inside), sizes.get(head, 0))
        return sorted(sizes, key=lambda head: -sizes[head])

    def _reachable(self) -> set[int]:
        found, left = {0}, [0]
        while left:
            new = set(self.next[left.pop()]) - found
            found |= new
            left += new
        return found

    def pieces(self, head: int, name: str, beside: str = "") -> dict[int, int]:
        """Of each block that brings, moves or multiplies, which piece of a turn's work it is for.

        Its blocks are those with instructions of this name, and those with such as are `beside`
        them. It ends at a block that all paths go through on which there is anything to do. Where
        there is a single piece nothing is told apart.
        """
        before = _on_all_paths(self.next, head)
        names = [{ins.name for ins in block} for block in self.blocks]
        doing = [i for i in before if any(own.startswith(name) for own in names[i])]
        if not doing:
            return {}
        end = len(self.blocks)  # of the turn, or of the kernel
        reverse: list[list[int]] = [[] for _ in range(end + 1)]
        for i in before:
            for j in self.next[i] or [end]:
                reverse[end if j == head else j].append(i)
        after = _on_all_paths(reverse, end)
        common = set.intersection(*(before[i] for i in doing))
        first = max(common, key=lambda i: len(before[i]))
        place = {i: len(before[i] & after[first]) for i in before if first in before[i]}
        places = sorted({place[i] for i in doing})
        own = [i for i in place if place[i] in places and (i in doing or beside in names[i])]
        return {i: places.index(place[i]) for i in own} if len(places) > 1 else {}


def _on_all_paths(following: list[list[int]], start: int) -> dict[int, set[int]]:
    """Of each block in reach, which blocks all paths to it go through."""
    found = {start: {start}}
    changed = True
    while changed:
        changed = False
        for i in sorted(found):
            for j in following[i]:
                new = found[i] | {j} if j not in found else (found[i] & found[j]) | {j}
                if j != start and new != found.get(j):
                    found[j] = new
                    changed = True
    return found


def _name(instruction: Instruction, piece: int | None) -> str:
    condition = " if" if instruction.predicate else ""
    return instruction.name + condition + ("" if piece is None else f" of {piece}")


def _counts(graph: Graph, pieces: dict[int, int], work: Work) -> list[tuple[int, ...]]:
    """Of each block, how much of the work it does. What @!PT precedes does nothing."""
    names = [
        [_name(ins, pieces.get(i)) for ins in block if ins.predicate != "!PT"]
        for i, block in enumerate(graph.blocks)
    ]
    return [tuple(sum(bool(re.match(p, n)) for n in own) for p in work) for own in names]


def _in_reach(graph: Graph, head: int, counts: list[tuple[int, ...]], work: Work):
    """Of each block, how much of the work can be done from it on until a barrier or `head`."""
    most = [tuple(map(min, count, work.values())) for count in counts]
    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(most))):
            if graph.ends_with_barrier(i):
                continue
            after = [most[j] for j in graph.next[i] if j != head]
            best = map(max, zip(*after, strict=True)) if after else [0] * len(work)
            new = tuple(map(min, map(sum, zip(counts[i], best, strict=True)), work.values()))
            changed |= new != most[i]
            most[i] = new
    return most


class Search:
    """Dijkstra's algorithm over blocks and the work done so far."""

    def __init__(self, graph: Graph, head: int, stretches: list[Work]):
        self.graph, self.head, self.stretches = graph, head, stretches
        self.need = [tuple(work.values()) for work in stretches]
        self.exact = [[p.startswith((COPY, MMA)) for p in work] for work in stretches]
        pieces = graph.pieces(head, MMA) | graph.pieces(head, COPY)
        if any(COPY in p for work in stretches for p in work):
            pieces |= graph.pieces(head, MOVE, "LDS")
        self.counts = [_counts(graph, pieces, work) for work in stretches]
        self.reach = [
            _in_reach(graph, head, counts, work)
            for counts, work in zip(self.counts, stretches, strict=True)
        ]

    def shortest(self) -> list[int] | None:
        """The blocks of the path, in order; None where no path does the work."""
        place = _Place(self.head, 0, (0,) * len(self.need[0]))
        heap, lengths = [(0, place)], {place: 0}
        before: dict[_Place, _Place] = {}
        while heap:
            length, place = heapq.heappop(heap)
            if place == _CLOSED:
                path = [place := before[place]]
                while place in before:
                    path.append(place := before[place])
                return [step.block for step in reversed(path)]
            if length > lengths[place]:
                continue
            length += len(self.graph.blocks[place.block])
            for after in self._after(place):
                if length < lengths.get(after, length + 1):
                    lengths[after], before[after] = length, place
                    heapq.heappush(heap, (length, after))
        return None

    def _after(self, place: _Place) -> list[_Place]:
        i, stretch, done = place
        need = self.need[stretch]
        done = tuple(map(sum, zip(done, self.counts[stretch][i], strict=True)))
        if any(e and d > n for e, d, n in zip(self.exact[stretch], done, need, strict=True)):
            return []
        done = tuple(map(min, done, need))
        closing = done == need and stretch == len(self.stretches) - 1
        if self.graph.ends_with_barrier(i):
            if done != need or closing:
                return []
            stretch, done = stretch + 1, (0,) * len(self.need[stretch + 1])
        return [
            _CLOSED if j == self.head else _Place(j, stretch, done)
            for j in self.graph.next[i]
            if (closing if j == self.head else self._can_finish(stretch, done, j))
        ]

    def _can_finish(self, stretch: int, done: tuple[int, ...], i: int) -> bool:
        reach = zip(done, self.reach[stretch][i], self.need[stretch], strict=True)
        return all(d + most >= need for d, most, need in reach)


def issued(code: list[Instruction], stretches: list[Work]) -> Counter[str]:
    """How often a warp issues each instruction for a tile, by name.

    Raises:
        LookupError: no path around a loop does that work.
    """
    graph = Graph(code)
    for head in graph.heads():
        if path := Search(graph, head, stretches).shortest():
            names = (ins for i in path for ins in graph.blocks[i])
            return Counter(ins.name if ins.predicate != "!PT" else "NOP" for ins in names)
    raise LookupError("no path around a loop does the work expected of a tile")
