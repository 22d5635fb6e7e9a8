"""A Ring of ranks reduce-scatters and all-gathers an array, in messages that travel while the ranks compute.

Every member of a group owns a shard of a flat array. In the first lap, the sum for shard o starts at the member after
o; every member adds its own numbers and passes it on, until o has the total. In the second lap o's result goes around
and every member keeps a copy. In each lap a member sends and receives every shard but one: no algorithm moves fewer
bytes (Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms), and no member receives from two others at
once, which slow links handle worst. Members of a node are neighbours, so that a node's link carries each byte once,
however many ranks it has.

All messages are point to point, with a tag for each array and lap: the members need not call in the same order, as with
MPI's collective operations, and the order of summation is known: that of the ring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.comm.group import LARGEST_MESSAGE, Group
from nettorrent_mpi.comm.library import MPI
from nettorrent_mpi.comm.requests import Requests, drop
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.blocks import span


def can_carry(counts: Sequence[int], itemsize: int, least: int) -> bool:
    """Whether the mean shard is worth a message (at least `least` bytes), and none is too large for one."""
    return sum(counts) * itemsize >= least * len(counts) and max(counts) * itemsize <= LARGEST_MESSAGE


class Lap:
    """A Lap goes once around the ring. Each arriving piece is taken in and then passed on."""

    def __init__(
        self,
        sends: Sequence[MPI.Prequest],
        receives: Sequence[MPI.Prequest],
        ahead: int,
        take: Callable[[int], None],
        source: int,
    ):
        """`ahead` is the number of receives that may be posted before `take(number)` has taken in the first of them;
        `source` is the rank of the world that they come from."""
        self.ranks = (source,)  # it waits for them
        self._sends, self._receives, self._ahead, self._take = Requests(sends), receives, ahead, take
        self._at = len(receives)  # the next one to arrive; after the last: nothing is in flight
        self._posted = 0

    def post(self) -> None:
        """Post the first receives, unless they are posted."""
        while self._posted < min(self._ahead, len(self._receives)):
            self._receives[self._posted].Start()
            self._posted += 1

    def begin(self) -> None:
        """Start: this member's own numbers are complete."""
        assert not self.under_way
        self.post()
        self._at = 0
        self._sends.each[0].Start()

    @property
    def under_way(self) -> bool:
        """Whether a piece has yet to arrive."""
        return self._at < len(self._receives)

    @property
    def awaited(self) -> MPI.Prequest:
        """Return the request of the next piece."""
        return self._receives[self._at]

    def go_on(self) -> None:
        """Continue after `awaited` has arrived."""
        self._take(self._at)
        self._at += 1
        if self._posted < len(self._receives):
            self._receives[self._posted].Start()
            self._posted += 1
        if self.under_way:
            self._sends.each[self._at].Start()
        else:
            self._posted = 0

    def sent(self) -> None:
        """Wait until all send buffers may be overwritten."""
        self._sends.wait()

    def abandon(self) -> None:
        """Give up the requests; their group was revoked."""
        drop([*self._sends.each, *self._receives])

    def free(self) -> None:
        """Free the requests; nothing is in flight on any member."""
        for request in self._receives[: self._posted]:
            request.Cancel()
            request.Wait()
        for request in self._receives:
            request.Free()
        self._sends.free()


class Ring:
    """A Ring has the two laps of one array: `reduce` and `gather`."""

    def __init__(
        self,
        group: Group,
        order: Sequence[int],
        tag: int,
        grads: Array,
        sums: Array,
        params: Array,
        counts: Sequence[int],
        piece: int = 0,
        pieces: int = 1,
    ):
        """`order` is the order of the members around the ring, `counts` the sizes of their shards, in the group's
        order. `grads` is overwritten, `sums` gets this member's shard of the sum; `params` has its shard of the result,
        and gets the others'. All this concerns only piece `piece` of `pieces` of every shard."""
        comm, size, place = group.comm, group.size, list(order).index(group.index)
        before, behind = order[place - 1], order[(place + 1) % size]
        starts = np.cumsum([0, *counts])

        def shard(array: Array, back: int) -> Array:
            """Return the shard of the member `back` positions before this one."""
            owner = order[(place - back) % size]
            own = span(counts[owner], pieces, piece)
            return array[starts[owner] + own.start : starts[owner] + own.stop]

        steps = range(size - 1)
        room = [np.empty(span(max(counts), pieces, 0).size, grads.dtype) for _ in range(min(2, size - 1))]
        own = [shard(grads, step + 2) for step in steps]
        came = [room[step % 2][: own[step].size] for step in steps]
        into = [*own[:-1], sums[slice(*span(counts[group.index], pieces, piece))]]

        def add(step: int) -> None:
            np.add(came[step], own[step], out=into[step])

        self.reduce = Lap(
            [comm.Send_init(shard(grads, step + 1), behind, 2 * tag) for step in steps],
            [comm.Recv_init(array, before, 2 * tag) for array in came],
            len(room),
            add,
            group.ranks[before],
        )
        self.gather = Lap(  # of bytes: MPI does not know every type
            [comm.Send_init(shard(params, step).view(np.uint8), behind, 2 * tag + 1) for step in steps],
            [comm.Recv_init(shard(params, step + 1).view(np.uint8), before, 2 * tag + 1) for step in steps],
            len(steps),
            lambda step: None,
            group.ranks[before],
        )

    def free(self) -> None:
        """Free the requests; nothing is in flight on any member."""
        self.reduce.free()
        self.gather.free()


class Rings:
    """Rings are all those of a rank: while it waits for one, the others progress."""

    def __init__(self) -> None:
        self._rings: list[Ring] = []
        self._laps: list[Lap] = []

    def __bool__(self) -> bool:
        return bool(self._rings)

    def add(self, ring: Ring) -> None:
        """Let this ring progress with the others."""
        ring.reduce.post()
        self._rings.append(ring)
        self._laps += [ring.reduce, ring.gather]

    def progress(self) -> None:
        """Take in what has arrived and pass it on. Does not wait."""
        for lap in self._laps:
            while lap.under_way and lap.awaited.Test():
                lap.go_on()

    def finish(self, lap: Lap) -> None:
        """Wait until this lap is complete."""
        if not lap.under_way:
            return
        laps = [each for each in self._laps if each.under_way]
        awaited = [each.awaited for each in laps]
        while lap.under_way:
            with NOW.waiting:
                came = MPI.Request.Waitany(awaited)
            laps[came].go_on()
            if laps[came].under_way:
                awaited[came] = laps[came].awaited
            else:
                del laps[came], awaited[came]

    def abandon(self) -> None:
        """Give up the requests; their groups were revoked."""
        for lap in self._laps:
            lap.abandon()

    def free(self) -> None:
        """Free the requests; nothing is in flight on any member."""
        for ring in self._rings:
            ring.free()
        self._rings.clear()
        self._laps.clear()
