"""Flat arrays that ranks hold alike: how blocks lie in them, how gradients are summed, how results reach everybody.

Each holder owns a shard. On one node holders sum and share where the arrays lie, in shared memory; elsewhere in
messages around a ring (comm/ring.py), or where these would be short, or too long, by MPI's own algorithms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.ring import Ring, Rings
from nettorrent_mpi.comm.shared import SharedMemory
from nettorrent_mpi.device.arrays import Array, aligned
from nettorrent_mpi.device.ops import Ops
from nettorrent_mpi.engine.operands import SharedOperands
from nettorrent_mpi.nn.layer import Parameter
from nettorrent_mpi.nn.optimizers import OptimizerState
from nettorrent_mpi.plan.blocks import Span, span

PIECE = 256 << 10  # bytes of a shard that go around the ring together, at least
PIECES = 8  # at most; more make no link busier
LINE = 16  # blocks begin at multiples of this many elements: a cache line of float32


def round_up(length: int) -> int:
    """The elements that a block of that length takes."""
    return -(-length // LINE) * LINE


class Flat:
    """Blocks that all members of `group` hold alike, one after another in the flat array `params`.

    `counts` of its elements are each member's own, `shard` is this rank's, `places` tells where each block
    "<layer>/<name>" lies.
    """

    def __init__(self, group: Group, blocks: Mapping[str, Parameter], dtype: Any, *, own: bool = True):
        self.group, self.dtype = group, np.dtype(dtype)
        self.places: dict[str, slice] = {}
        size = 0
        for key, parameter in blocks.items():
            length = int(np.prod(parameter.local, dtype=np.int64))
            self.places[key] = slice(size, size + length)
            size += round_up(length)
        self.size = size
        self.counts = [LINE * span(size // LINE, group.size, i).size for i in range(group.size)]
        start = sum(self.counts[: group.index])
        self.shard = slice(start, start + self.counts[group.index])
        self.params = self.memory() if own else np.empty(0, dtype)

    def memory(self) -> Array:
        """A flat array like `params`; zeros."""
        array = aligned(self.size, self.dtype)
        array[...] = 0  # the gaps between the blocks, too
        return array

    def blocks(self, parameters: Mapping[str, Parameter], flat: Array) -> dict[str, Array]:
        """The blocks in `flat`, as views of their shapes."""
        return {key: flat[place].reshape(parameters[key].local) for key, place in self.places.items()}

    def share(self) -> None:
        """Give everyone's own part to all members. All call."""
        if self.group.size > 1:
            self.group.allgather(self.params[self.shard], self.params, self.counts)

    def meet(self) -> None:
        """Wait until all members have come here, where they share memory."""

    def free(self) -> None:
        """Give shared memory back. All call."""


class Segment(Flat):
    """Trainable blocks: besides `params` there are `grads`; `sums` is for the summed gradients of the shard, and
    `optimizer` holds its state. In shared memory (`shared` is not None) there is one `params` for all members, and
    `all_grads` holds everyone's gradients. `stashes` has room for earlier versions of `params`. `first` is where the
    earliest of the blocks stands among the stage's parameters: when backward has come there, all gradients are written.

    With `operands`, one for each block, there are no gradients: each member computes the sums of its shard itself
    (engine/operands.py). Of several segments that the same members share only the first waits for them (`meets`): all
    are summed one after the other, and all are shared when all are updated.

    A step calls, in this order: `begin_sums` when the gradients are written, `sum`, `finish_sums`, `multiply` before it
    reads `sums`, `expect` when params may change, `begin_share` when the own shard is updated, `share`.
    """

    def __init__(
        self,
        group: Group,
        blocks: Mapping[str, Parameter],
        dtype: Any,
        stashes: int,
        *,
        shared: bool,
        first: int,
        operands: Mapping[str, SharedOperands] | None = None,
    ):
        self.shared: SharedMemory | None = None
        super().__init__(group, blocks, dtype, own=False)
        self.first = first
        self.optimizer: OptimizerState = {}
        self.stashes: list[Array]
        self._rings = Rings()
        self._around: list[Ring] = []  # the rings of the pieces
        self._sharing = False
        self.operands = operands or {}
        self.meets = True
        size, copies = self.size, 1 + stashes  # of params
        if shared:
            own = 0 if operands else size  # gradients
            self.shared = SharedMemory(group, [own + copies * size, *[own] * (group.size - 1)], dtype)
            memory = self.shared.parts[0][own:]
            self.params, *self.stashes = (memory[i * size : (i + 1) * size] for i in range(copies))
            self.all_grads = [part[:own] for part in self.shared.parts]
            self.grads = self.all_grads[group.index]
            self.params[self.shard] = 0
        else:
            self.params, *self.stashes = (self.memory() for _ in range(copies))
            self.all_grads = []
            self.grads = self.memory()
        self.sums = aligned(self.counts[group.index], dtype) if group.size > 1 else self.grads
        self.sums[...] = 0  # the gaps between the blocks, too
        self.grads[...] = 0
        for key, each in self.operands.items():
            place = self.places[key]
            start = min(max(place.start, self.shard.start), self.shard.stop)
            stop = max(start, min(place.stop, self.shard.stop))
            out = self.sums[start - self.shard.start : stop - self.shard.start]
            each.own(Span(start - place.start, stop - place.start), out)

    def join(self, rings: Rings, group: Group, order: Sequence[int], tag: int) -> int:
        """Sum and share by messages around rings of `group`, the same members, from now on: in pieces, so that the link
        is busy with some while others wait to be added. Gives the first tag that it leaves. All members call."""
        self._rings = rings
        pieces: int = min(max(1, max(self.counts) * self.dtype.itemsize // PIECE), PIECES)
        arrays = (self.grads, self.sums, self.params, self.counts)
        self._around = [Ring(group, order, tag + i, *arrays, i, pieces) for i in range(pieces)]
        for ring in self._around:
            rings.add(ring)
        return tag + pieces

    def stash(self, number: int) -> None:
        """stashes[number] <- params. All members call, before any of them changes its part."""
        part = self.shard if self.shared is not None else slice(None)
        np.copyto(self.stashes[number][part], self.params[part])

    def begin_sums(self) -> None:
        """The gradients are written: where they travel in messages, they may leave. Does not wait."""
        for ring in self._around:
            ring.sums.begin()

    def sum(self) -> None:
        """sums <- the sum of everyone's gradients of the shard, in the order of the members, or of the ring, where it
        may come later (`finish_sums`). With operands only waits until everyone's are complete, for `multiply`."""
        if self.shared is not None:
            self._wait()  # until everyone's gradients, or operands, are complete
            if not self.operands:
                first, second, *others = (grads[self.shard] for grads in self.all_grads)
                np.add(first, second, out=self.sums)
                for grads in others:
                    np.add(self.sums, grads, out=self.sums)
        elif not self._around and self.group.size > 1:
            self.group.reduce_scatter(self.grads, self.sums, self.counts)

    def multiply(self, rows: int, ops: Ops) -> None:
        """sums <- the shard's gradients, from everyone's operands of a mini-batch of `rows` rows, where there are."""
        for each in self.operands.values():
            each.multiply(rows, ops)

    def finish_sums(self) -> None:
        """Wait for `sums`."""
        for ring in self._around:
            self._rings.finish(ring.sums)

    def expect(self) -> None:
        """The others' shards of `params` may change from now on: nobody here reads them until `share` is done."""
        for ring in self._around:
            ring.shares.post()

    def begin_share(self) -> None:
        """This rank's shard is updated: where it travels in messages, it may leave. Does not wait."""
        for ring in self._around:
            ring.shares.begin()
        self._sharing = True

    def share(self) -> None:
        if self.shared is not None:
            self._wait()
        elif not self._around:
            super().share()
        else:
            if not self._sharing:
                self.begin_share()
            for ring in self._around:
                self._rings.finish(ring.shares)
            for ring in self._around:
                ring.sums.sent()  # the next backward overwrites the gradients
                ring.shares.sent()
            self._sharing = False

    def meet(self) -> None:
        if self.shared is not None:
            self.shared.meet()

    def _wait(self) -> None:
        if self.shared is not None and self.meets:
            self.shared.meet()

    def free(self) -> None:
        if self.shared is not None:
            self.shared.free()
