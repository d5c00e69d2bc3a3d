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
from copy import copy
from typing import NamedTuple

from benchmarks.machine_code.listing import Instruction

COPY, MMA = "LDGSTS", "HMMA"


class Stretch(NamedTuple):
    """What a warp does until a barrier, or until it copies another tile.

    `work`: how often instructions occur, by the pattern of their names, which "if" follows where
    a predicate may switch them off: copies and products just as often, others at least. The last
    stretch ends with the loop.
    """

    work: dict[str, int]
    until_copies: bool = False


class _Place(NamedTuple):
    block: int
    stretch: int
    done: tuple[int, ...]  # of the stretch's work
    copying: int = -1  # the tile that the stretch copies, if any
    other_side: int = -1  # where the warp's other lanes go on, if they have parted,
    meet: int = -1  # once the path is there


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

    def without_branching_products(self) -> Graph:
        """The graph without loops of products that ask at every piece: edges take those."""
        cut: set[int] = set()
        for i, following in enumerate(self.next):
            for head in (j for j in following if j <= i):
                inside = range(head, i + 1)
                inner = all(j > k for k in inside[:-1] for j in self.next[k])
                products = any(ins.name.startswith(MMA) for k in inside for ins in self.blocks[k])
                if inner and products and any(len(self.next[k]) > 1 for k in inside[:-1]):
                    cut |= set(inside)
        graph = copy(self)
        graph.next = [[j for j in following if j not in cut] for following in self.next]
        return graph

    def copied(self, head: int) -> dict[int, int]:
        """Of each block that copies, which of the tiles that a turn of the loop copies it is for.

        A tile ends at a block that all paths go through on which there is anything to copy.
        """
        before = _on_all_paths(self.next, head)
        copying = [i for i in before if any(ins.name.startswith(COPY) for ins in self.blocks[i])]
        if not copying:
            return {}
        end = len(self.blocks)  # of the turn, or of the kernel
        reverse: list[list[int]] = [[] for _ in range(end + 1)]
        for i in before:
            for j in self.next[i] or [end]:
                reverse[end if j == head else j].append(i)
        after = _on_all_paths(reverse, end)
        common = set.intersection(*(before[i] for i in copying))
        first = max(common, key=lambda i: len(before[i]))
        return {i: len(before[i] & after[first]) for i in copying}

    def partings(self) -> dict[int, int]:
        """Branches at which a warp's lanes part to store wide and narrow, and where they meet."""
        found: dict[int, int] = {}
        begun: dict[int, int] = {}
        for j, block in enumerate(self.blocks):
            begun |= {ins.target: j for ins in block if ins.name == "BSSY"}
            last = self.last[j]
            inside = range(begun.get(last.address + 16, j) if last.name == "BSYNC" else j, j)
            names = {ins.name for k in inside for ins in self.blocks[k]}
            loops = any(follower <= k for k in inside for follower in self.next[k])
            if not loops and sum(name.startswith("STG") for name in names) > 1:
                found |= {k: j for k in inside if len(self.next[k]) == 2 and max(self.next[k]) <= j}
        return found


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


def _name(instruction: Instruction) -> str:
    return f"{instruction.name} if" if instruction.predicate else instruction.name


def _counts(graph: Graph, work: dict[str, int]) -> list[tuple[int, ...]]:
    """Of each block, how much of the work it does. What @!PT precedes does nothing."""
    names = [[_name(ins) for ins in block if ins.predicate != "!PT"] for block in graph.blocks]
    return [tuple(sum(bool(re.match(p, n)) for n in own) for p in work) for own in names]


def _in_reach(graph: Graph, head: int, counts: list[tuple[int, ...]], work: dict[str, int]):
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

    def __init__(self, graph: Graph, head: int, stretches: list[Stretch]):
        self.graph, self.head, self.stretches = graph, head, stretches
        self.need = [tuple(stretch.work.values()) for stretch in stretches]
        self.exact = [[p in (COPY, MMA) for p in stretch.work] for stretch in stretches]
        self.counts = [_counts(graph, stretch.work) for stretch in stretches]
        self.reach = [
            _in_reach(graph, head, counts, stretch.work)
            for counts, stretch in zip(self.counts, stretches, strict=True)
        ]
        self.copied = graph.copied(head)
        self.one_loop = len(set(self.copied.values())) == 1  # that copies all tiles
        self.partings = graph.partings()

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
        i, stretch, done, copying, other_side, meet = place
        tile = self.copied.get(i, copying)
        stretch_done = done == self.need[stretch] and self.stretches[stretch].until_copies
        if tile != copying != -1 and not stretch_done:
            return []
        if i in self.copied and stretch_done and (tile != copying or self.one_loop):
            stretch, done = stretch + 1, (0,) * len(self.need[stretch + 1])
        copying = tile
        need = self.need[stretch]
        done = tuple(map(sum, zip(done, self.counts[stretch][i], strict=True)))
        if any(e and d > n for e, d, n in zip(self.exact[stretch], done, need, strict=True)):
            return []
        done = tuple(map(min, done, need))
        closing = done == need and stretch == len(self.stretches) - 1
        if self.graph.ends_with_barrier(i):
            if done != need or closing or self.stretches[stretch].until_copies:
                return []
            stretch, copying, done = stretch + 1, -1, (0,) * len(self.need[stretch + 1])
        sides = [(j, other_side, meet) for j in self.graph.next[i]]
        if i == meet:
            sides = [(other_side, -1, -1)]
        elif meet == -1 and i in self.partings:
            one, other = self.graph.next[i]
            sides += [(one, other, self.partings[i]), (other, one, self.partings[i])]
        return [
            _CLOSED if j == self.head else _Place(j, stretch, done, copying, *others)
            for j, *others in sides
            if (closing if j == self.head else self._can_finish(stretch, done, j, others[1]))
        ]

    def _can_finish(self, stretch: int, done: tuple[int, ...], i: int, meet: int) -> bool:
        """Where the lanes have parted, the other side's work is not known to be in reach."""
        reach = zip(done, self.reach[stretch][i], self.need[stretch], strict=True)
        return meet != -1 or all(d + most >= need for d, most, need in reach)


def issued(code: list[Instruction], stretches: list[Stretch], branching: bool) -> Counter[str]:
    """How often a warp issues each instruction for a tile, by name.

    `branching`: whether the loops of products that the tile takes have branches.

    Raises:
        LookupError: no path around a loop does that work.
    """
    graph = Graph(code) if branching else Graph(code).without_branching_products()
    for head in graph.heads():
        if path := Search(graph, head, stretches).shortest():
            names = (ins for i in path for ins in graph.blocks[i])
            return Counter(ins.name if ins.predicate != "!PT" else "NOP" for ins in names)
    raise LookupError("no path around a loop does the work expected of a tile")
