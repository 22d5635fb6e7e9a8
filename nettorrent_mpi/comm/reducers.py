"""Reducers reduce-scatter a bucket's gradients and all-gather its parameters among its holders.

Each holder owns a shard of the bucket's flat arrays: it gets the sum of everyone's gradients of the shard, updates the
shard's parameters, and the shards are all-gathered (ZeRO stage 1, Rajbhandari et al. 2020). The bytes are those of an
all-reduce. One interface has several kinds; the kind of a bucket is decided where its memory is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence

from nettorrent_mpi.comm.channels import Channel
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.ring import Ring, Rings
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device

PIECE = 256 << 10  # bytes of a shard that go around a ring together, at least
PIECES = 8  # at most; more make no link busier


def pieces_of(counts: Sequence[int], itemsize: int) -> int:
    """Return the number of pieces in which shards of these numbers of elements go around: PIECES at most."""
    return min(max(1, max(counts) * itemsize // PIECE), PIECES)


class Reducer:
    """A Reducer is one holder's part in reducing a bucket. This class is the interface of all, and a single holder's,
    which has nothing to do.

    A step calls `begin_reduce` when the gradients are written, `reduce` before it reads the sums, `expect_gather` when
    the others' shards of the parameters may change, `begin_gather` when the own shard is updated, and `gather`, after
    which all parameters are up to date and the gradients may be overwritten. Only `reduce` and `gather` wait. Holders
    that share memory fence (`State.fence`) before `reduce` and after `gather`.
    """

    def begin_reduce(self) -> None:
        """Start to send the gradients, where they travel in messages."""

    def reduce(self) -> None:
        """Compute sums <- this shard of the sum of everyone's gradients."""

    def multiply(self, rows: int) -> None:
        """Compute, after `reduce`, the gradients in parts, from a mini-batch of `rows` rows."""

    def expect_gather(self) -> None:
        """Post receives for the others' shards of the parameters: no one here reads them until `gather` is complete."""

    def begin_gather(self) -> None:
        """Start to send this rank's shard of the parameters, where it travels in messages."""

    def gather(self) -> None:
        """Gather params <- everyone's shards."""


class ChannelReducer(Reducer):
    """A ChannelReducer reduces and gathers by a channel's collective operations; all shards have the same size."""

    def __init__(self, channel: Channel, params: Array, grads: Array, sums: Array):
        size, more = divmod(params.size, channel.group.size)
        assert not more, "shards of different sizes"
        self._channel, self._params, self._grads, self._sums = channel, params, grads, sums
        self._shard = params[channel.group.index * size :][:size]

    def reduce(self) -> None:
        self._channel.reduce_scatter(self._grads, self._sums)

    def gather(self) -> None:
        self._channel.all_gather(self._shard, self._params)


class RingReducer(Reducer):
    """A RingReducer reduces and gathers around rings while the ranks compute: in pieces, so that the link carries some
    while others wait to be added."""

    def __init__(
        self,
        rings: Rings,
        group: Group,
        first_tag: int,
        counts: Sequence[int],
        params: Array,
        grads: Array,
        sums: Array,
    ):
        """Set up the rings. Every member passes the same tag; PIECES tags from `first_tag` on must be free."""
        self._rings, self._gathering = rings, False
        pieces = pieces_of(counts, params.dtype.itemsize)
        self._around = [
            Ring(group, group.by_nodes, first_tag + i, grads, sums, params, counts, i, pieces) for i in range(pieces)
        ]
        for ring in self._around:
            rings.add(ring)

    def begin_reduce(self) -> None:
        for ring in self._around:
            ring.reduce.begin()

    def reduce(self) -> None:
        for ring in self._around:
            self._rings.finish(ring.reduce)

    def expect_gather(self) -> None:
        for ring in self._around:
            ring.gather.post()

    def begin_gather(self) -> None:
        for ring in self._around:
            ring.gather.begin()
        self._gathering = True

    def gather(self) -> None:
        if not self._gathering:
            self.begin_gather()
        for ring in self._around:
            self._rings.finish(ring.gather)
        for ring in self._around:
            ring.reduce.sent()  # the next backward overwrites the gradients
            ring.gather.sent()
        self._gathering = False


class SharedReducer(Reducer):
    """A SharedReducer reduces gradients in place, in memory that the holders of a node share, which also has the only
    copy of the parameters: nothing is sent or copied."""

    def __init__(self, device: Device, shards: Sequence[Array], sums: Array):
        """`shards` are everyone's gradients of this rank's shard, in the order in which they are added up."""
        self._ops, self._shards, self._sums = device.ops, shards, sums

    def reduce(self) -> None:
        first, second, *others = self._shards
        self._ops.add(first, second, self._sums)
        for grads in others:
            self._ops.add(self._sums, grads, self._sums)
