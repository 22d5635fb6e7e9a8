"""A StateCopy holds the training state that a rank owns, in host memory of its own: a checkpoint is written from it
while training goes on."""

from __future__ import annotations

import math

import numpy as np

from nettorrent_mpi.device.arrays import Array, quiet
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.resharding import of_replica
from nettorrent_mpi.engine.state import PARAMETERS
from nettorrent_mpi.plan.blocks import Span, span
from nettorrent_mpi.plan.moves import Box, Holding, volume, within

LEAST = 1 << 16  # bytes for what is small, and may come later
PIECE = 1 << 16  # elements that are copied, and looked at while they are in the cache


class StateCopy:
    """A StateCopy holds the blocks that this rank owned when `take` was called: disjoint over all ranks, and together
    the whole state. Its memory is allocated once."""

    def __init__(self) -> None:
        self.blocks: dict[Holding, Array] = {}
        self._memory: Array = np.empty(0, np.uint8)
        self._used = 0
        self._finite = True

    def reserve(self, engine: Engine) -> None:
        """Allocate the memory, and touch it: the system gives memory only when it is written to."""
        size, replicas = LEAST, engine.exchange.count
        for (_, box), array in engine.state.owned_blocks({}).items():
            size += _room(array.size * array.dtype.itemsize)
            if replicas > 1:
                size += _room(volume(_part(box, replicas, engine.place.replica)) * array.dtype.itemsize)
        self._grow(size)

    def take(self, engine: Engine) -> bool:
        """Copy the blocks; return whether the weights among them are finite. Collective over all ranks, at rest.

        Where replicas differ, these are each one's own, and their average, of which each replica copies a part.
        """
        self.blocks, self._used, self._finite = {}, 0, True
        state, exchange, replica = engine.state, engine.exchange, engine.place.replica
        download = engine.device.download
        with exchange.paused():
            if exchange.count > 1:
                with exchange.shown():
                    for (name, box), block in state.owned_blocks({}).items():
                        if name.startswith(PARAMETERS):
                            self._add_part(engine, name, box, engine.device.on_host(block))
                for (name, box), shard in state.shards(exchange.common()).items():
                    average = np.array(engine.device.on_host(shard))
                    engine.wiring.peers.all_reduce(average)
                    np.divide(average, exchange.count, out=average)
                    self._add_part(engine, name, box, average)
        for (name, box), block in engine.blocks.owned().items():
            holding = Holding(of_replica(replica, name) if exchange.count > 1 else name, box)
            out = self._room_for(holding, block)
            if engine.device.kind == "cpu" and block.flags.c_contiguous:
                self._copy(out, block, look=name.startswith(PARAMETERS))
            else:
                download(out, block)
                if name.startswith(PARAMETERS):
                    self._look(out)
        return self._finite

    def _add_part(self, engine: Engine, name: str, box: Box, average: Array) -> None:
        """Copy this replica's part of a block of the average."""
        part = _part(box, engine.exchange.count, engine.place.replica)
        if part != box or part == ():
            average = average[within(part, box)]
        if volume(part) and (part or engine.place.replica == 0):
            np.copyto(self._room_for(Holding(name, part), average), average)

    def _room_for(self, holding: Holding, block: Array) -> Array:
        """Return memory for a block, which is among `blocks` from now on."""
        size = block.size * block.dtype.itemsize
        if self._used + _room(size) > self._memory.size:
            self._grow(max(self._used + _room(size), self._memory.size * 5 // 4))
        memory = self._memory[self._used : self._used + size]
        self._used += _room(size)
        out = self.blocks[holding] = memory.view(block.dtype).reshape(block.shape)
        return out

    def _grow(self, size: int) -> None:
        """Allocate memory of this size, if there is less; blocks that were copied keep theirs."""
        if size > self._memory.size:
            self._memory, self._used = np.empty(size, np.uint8), 0
            self._memory.fill(0)

    def _copy(self, out: Array, block: Array, *, look: bool) -> None:
        """Copy a block in pieces; with `look`, look whether they are finite."""
        target, source = out.reshape(-1), block.reshape(-1)
        if not look:
            np.copyto(target, source)
            return
        for start in range(0, target.size, PIECE):
            piece = target[start : start + PIECE]
            np.copyto(piece, source[start : start + PIECE])
            self._look(piece)

    def _look(self, piece: Array) -> None:
        flat = piece.reshape(-1)
        with quiet():
            squares = float(np.dot(flat, flat))
        if not math.isfinite(squares):  # those of large finite ones are not
            self._finite = self._finite and bool(np.isfinite(flat).all())


def _part(box: Box, parts: int, index: int) -> Box:
    """Return part `index` of a box that is divided into `parts` along its first axis."""
    if not box:
        return box
    mine = span(box[0].size, parts, index)
    return (Span(box[0].start + mine.start, box[0].start + mine.stop), *box[1:])


def _room(size: int) -> int:
    """Return the bytes that a block takes, so that the next one begins at a cache line."""
    return -(-size // 64) * 64
