"""All-reducers add up flat arrays over a group, in place, while the ranks go on computing.

One interface has three kinds: memory that the ranks of a node share, rings of messages between nodes, and MPI's own
operation where a message would not be worth its latency. The numbers that all ranks get are bitwise the same.
"""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.reducers import pieces_of
from nettorrent_mpi.comm.ring import Ring, Rings
from nettorrent_mpi.comm.shared import SharedMemory
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.blocks import span

CHUNK = 1 << 15  # elements that are added up together: what several ranks wrote of them fits a cache


class AllReducer:
    """An AllReducer adds up `array` over a group. This class is the interface of all, and suffices where a rank is
    alone.

    Each time all members call `begin` when their numbers are complete, then `turn`, with the same factor on the sum,
    and then `finish`; both wait. Nobody touches the array in between. Of several arrays each is turned before the first
    one is finished: results of one travel while numbers of another are still added up, so that links do not idle.
    """

    def __init__(self, array: Array):
        self.array = array

    def begin(self) -> None:
        """Start to send, where numbers travel in messages."""

    def turn(self, factor: float) -> None:
        """Compute this rank's part of factor * the sum of everyone's array, and start to send it."""
        if factor != 1:
            np.multiply(self.array, factor, out=self.array)

    def finish(self) -> None:
        """Wait until `array` has the whole."""

    def close(self) -> None:
        """Free what belongs to this rank. Nothing is in flight."""


class MpiAllReducer(AllReducer):
    """An MpiAllReducer reduces by MPI's collective operation."""

    def __init__(self, group: Group, array: Array):
        super().__init__(array)
        self._group = group

    def turn(self, factor: float) -> None:
        self._group.all_reduce(self.array)
        super().turn(factor)


class RingAllReducer(AllReducer):
    """A RingAllReducer reduces around rings, in messages that travel while the ranks compute (comm/ring.py)."""

    def __init__(self, rings: Rings, group: Group, first_tag: int, array: Array):
        """All members pass the same tag; reducers.PIECES tags from it on must be free."""
        super().__init__(array)
        counts = [span(array.size, group.size, i).size for i in range(group.size)]
        self._own: Array = array[slice(*span(array.size, group.size, group.index))]
        self._rings, pieces = rings, pieces_of(counts, array.dtype.itemsize)
        self._around = [
            Ring(group, group.by_nodes, first_tag + i, array, self._own, array, counts, i, pieces)
            for i in range(pieces)
        ]
        for ring in self._around:
            rings.add(ring)

    def begin(self) -> None:
        for ring in self._around:
            ring.reduce.begin()

    def turn(self, factor: float) -> None:
        for ring in self._around:
            self._rings.finish(ring.reduce)
        for ring in self._around:
            ring.reduce.sent()  # the second lap writes to where the first one sends from
        if factor != 1:
            np.multiply(self._own, factor, out=self._own)
        for ring in self._around:
            ring.gather.begin()

    def finish(self) -> None:
        for ring in self._around:
            self._rings.finish(ring.gather)
        for ring in self._around:
            ring.gather.sent()


class SharedAllReducer(AllReducer):
    """A SharedAllReducer reduces in memory that the ranks of one node share: each adds up its part of everyone's
    arrays, and writes the sum to all of them.

    Reading and writing everyone's arrays where they are moves the fewest bytes: no copy of the sum is made.
    """

    def __init__(self, group: Group, memory: SharedMemory, size: int):
        arrays = memory.take_own(size)
        super().__init__(arrays[group.index])
        self._memory = memory
        mine = span(size, group.size, group.index)
        starts = range(mine.start, mine.stop, CHUNK)
        self._chunks = [
            [array[start : min(start + CHUNK, mine.stop)] for array in arrays] for start in starts
        ]  # views, so that a step makes none

    def turn(self, factor: float) -> None:
        self._memory.fence()
        for first, *others in self._chunks:
            for other in others:
                np.add(first, other, out=first)
            np.multiply(first, factor, out=first)
            for other in others:
                np.copyto(other, first)
        self._memory.fence()
