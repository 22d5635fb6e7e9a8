"""Each rank keeps a recent copy of what it owns, and its buddy another one, so that nothing is lost with a rank.

Every few steps a rank copies its blocks into memory of its own and begins to send them to its buddy (plan/recovery.py),
on another node where there is one. The messages travel while the next step computes; at its end all ranks wait until
the copies are whole. To complete a step no rank needs what another one does in a later step, so this wait cannot
deadlock. Where replicas differ, each has its copies within itself, and none waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nettorrent_mpi.comm.buddy_link import BuddyLink
from nettorrent_mpi.device.arrays import Array, Shape, as_dtype
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.state import Shard, blocks_of
from nettorrent_mpi.plan.moves import Holding
from nettorrent_mpi.plan.recovery import PLACES, Copies, Kept, buddies

TAG = 79
LINE = 64  # bytes: arrays in a copy begin at multiples of a cache line


class Entry(NamedTuple):
    """An Entry says where a block lies in the memory of a copy."""

    holding: Holding
    dtype: str
    start: int
    shape: Shape
    strides: tuple[int, ...]


class Redundancy:
    """A Redundancy keeps copies of one engine's blocks, this rank's and those of its ward: parameters and their earlier
    versions, running statistics and optimizer state, after every `every`-th step; where that is None, or a replica has
    one rank, none.

    All ranks of the engine's world make one, and call its methods after the same steps. It is closed before its engine.
    `rank` is this rank's number in that world, laid out as `topology`; `apart` says that replicas differ.
    """

    def __init__(self, engine: Engine, every: int | None):
        self._engine, self._every, self._steps = engine, every, engine.steps
        self.topology, self.apart, self.rank = engine.topology, not engine.plan.exact, engine.world.rank
        group = engine.wiring.channel(engine.wiring.replica)
        self._idle = every is None or group.size == 1
        members = self.topology.replica(engine.place.replica) if self.apart else range(self.topology.size)
        keepers = buddies(group.nodes)
        buddy, ward = keepers[group.index], keepers.index(group.index)
        self._of = members[group.index], members[ward]  # whose blocks the copies here are
        self._copies = Copies()
        shards = self._shards()
        size, starts = _laid_out([shard.values for shard in shards])
        own = [np.zeros(size, np.uint8) for _ in range(PLACES)]
        self._parts = [
            [
                memory[start : start + shard.values.nbytes].view(shard.values.dtype)
                for start, shard in zip(starts, shards, strict=True)
            ]
            for memory in own
        ]
        index = self._entries(own[0])
        told = size, index
        if not self._idle:
            told = group.comm.sendrecv(told, buddy, TAG, None, ward, TAG)  # once
        theirs = [np.zeros(told[0], np.uint8) for _ in range(PLACES)]
        self._memory, self._index = (own, theirs), (index, told[1])
        # The last thing in each memory is the step, so that one that has come in part only is not taken for complete.
        self._stamps = [[memory[-LINE:].view(np.int64)[:1] for memory in memories] for memories in self._memory]
        self._link = BuddyLink(group, buddy, ward, own, theirs, TAG)
        if not self._idle:
            engine.moving.append(self._progress)

    @property
    def whole(self) -> int | None:
        """Return the last step of which this rank knows that all ranks have their copies."""
        return self._copies.whole

    @property
    def bytes(self) -> int:
        """Return the bytes of all copies on this rank."""
        return sum(array.nbytes for arrays in self._memory for array in arrays)

    def after(self, step: int) -> None:
        """Keep copies if they are due after this many steps; wait for those of an earlier step. All ranks call after
        every step."""
        self._finish()
        # Without a flush a GPU's arrays are read only where the ranks come to rest.
        if self._every is not None and step - self._steps >= self._every and self._engine.may_wait:
            self._begin(step)

    def refresh(self, step: int) -> None:
        """Keep copies after this step, and wait until all ranks have them. All ranks call, at rest."""
        self._finish()
        if not self._idle and self.whole != step:
            self._begin(step)
            self._finish()

    def kept(self) -> list[Kept]:
        """Return which complete copies there are here."""
        return [Kept(step, self._of[ward]) for step, ward, _ in self._copies.kept()]

    def arrays(self, kept: Kept) -> dict[Holding, Array]:
        """Return the blocks of a copy, as views of memory that is used again for the second step kept after it."""
        for step, ward, place in self._copies.kept():
            if Kept(step, self._of[ward]) == kept:
                memory = self._memory[ward][place]
                return {entry.holding: _view(memory, entry) for entry in self._index[ward]}
        raise KeyError(kept)

    def abandon(self) -> None:
        """Give up what is under way, as members are lost and all communicators are revoked; the copies stay."""
        self._link.abandon()
        self._note()

    def close(self) -> None:
        """Wait for what is under way, and free the requests. All ranks call, at rest."""
        self._finish()
        self._link.free()
        if self._progress in self._engine.moving:
            self._engine.moving.remove(self._progress)

    def _begin(self, step: int) -> None:
        """Copy what this rank owns, and let it travel."""
        self._steps = step
        if self._idle:
            return
        place = self._copies.begin(step)
        for part, shard in zip(self._parts[place], self._shards(), strict=True):
            self._engine.device.download(part, shard.values)
        self._stamps[0][place][0] = step
        self._link.start(place)

    def _progress(self) -> None:
        if not self._link.complete:
            self._link.progress()
            self._note()

    def _finish(self) -> None:
        """Wait until all ranks have the copies of the latest step."""
        if not self._link.complete:
            self._link.finish()
            self._note()

    def _note(self) -> None:
        if self._copies.latest != self.whole:
            if self._link.arrived:
                assert self._stamps[1][self._copies.place][0] == self._copies.latest, "a copy has come in part only"
                self._copies.arrived()
            if self._link.complete:
                self._copies.all_have()

    def _shards(self) -> list[Shard]:
        """Return the live arrays to copy. What exchanges remember is not among them: it may be in flight."""
        return [] if self._idle else self._engine.state.owned_shards({})

    def _entries(self, memory: Array) -> list[Entry]:
        """Return where this rank's blocks lie in the memory of a copy."""
        parts = [shard._replace(values=part) for shard, part in zip(self._shards(), self._parts[0], strict=True)]
        begin = memory.ctypes.data
        return [
            Entry(holding, view.dtype.name, view.ctypes.data - begin, view.shape, view.strides)
            for holding, view in blocks_of(parts).items()
            if view.size
        ]


def _laid_out(arrays: Sequence[Array]) -> tuple[int, list[int]]:
    """Return the bytes that copies of these arrays and of the step take, one after another, and where each begins."""
    size, starts = 0, []
    for array in arrays:
        starts.append(size)
        size += -(-array.nbytes // LINE) * LINE
    return size + LINE, starts


def _view(memory: Array, entry: Entry) -> Array:
    return np.ndarray(entry.shape, as_dtype(entry.dtype), memory, entry.start, entry.strides)
