"""A Group of ranks has collective operations on arrays. Those that are used in a step pickle nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any, TypeVar, cast

import numpy as np

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.comm.library import MPI
from nettorrent_mpi.comm.requests import Requests
from nettorrent_mpi.device.arrays import Array

T = TypeVar("T")
DOZE = 0.002  # seconds from look to look


class Group:
    """A Group is an ordered group of ranks: a communicator. `index` is this rank's position in it; `nodes` gives for
    each member its node, as the number of the first member there.

    Operations on a group of one make no MPI calls (at most a copy), so that callers need no special case, and a process
    that is alone needs no MPI: its groups have no communicator. Whoever makes a group, or has one made, frees it.
    `kin` are the groups that were made from one another and are not freed.
    """

    def __init__(
        self,
        comm: MPI.Intracomm | None,
        nodes: Sequence[int] | Callable[[], Sequence[int]] | None = None,
        kin: set[Group] | None = None,
        ranks: Callable[[], tuple[int, ...]] | None = None,
    ):
        """Wrap a communicator, None where this process is alone; without `nodes` the members determine them
        collectively. What is callable is called when it is first asked for."""
        self.kin = set() if kin is None else kin
        self.kin.add(self)
        self._nodes, self._ranks = (0,) if nodes is None else nodes, ranks
        self._alone = comm is None
        self.comm = cast("MPI.Intracomm", comm)
        self.size, self.index = 1, 0
        if not self._alone:
            self.comm.Set_errhandler(MPI.ERRORS_RETURN)
            self.size, self.index = self.comm.Get_size(), self.comm.Get_rank()
            if nodes is None:
                self._nodes = _nodes(self.comm)

    def free(self) -> None:
        """Free the communicator. All members call."""
        self.kin.discard(self)
        if not self._alone:
            self.comm.Free()

    def revoke(self) -> None:
        """Let every operation of this group and its kin, on all their members, end with an error, also those that wait
        already. One member calls; the groups cannot be used afterwards."""
        if not self._alone:
            for group in self.kin:
                group.comm.Revoke()

    @cached_property
    def nodes(self) -> tuple[int, ...]:
        """Each member's node, as the number of the first member there."""
        return tuple(self._nodes() if callable(self._nodes) else self._nodes)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The members' numbers in the world that this group was made from, for the watchdog."""
        return tuple(range(self.size)) if self._ranks is None else self._ranks()

    @property
    def is_broken(self) -> bool:
        """Whether this rank knows of a member that is lost, or the group was revoked: where MPI tells (failures.py)."""
        return not self._alone and bool(self.comm.Is_revoked() or self.comm.Get_failed().size)

    def duplicate(self) -> Group:
        """Return a group of the same members whose messages cannot match those of this one."""
        return Group(None if self._alone else self.comm.Dup(), lambda: self.nodes, self.kin, lambda: self.ranks)

    def subgroup(self, members: Sequence[int]) -> Group:
        """Return the group of these members, in this order. Its members alone call, in the same order of groups."""
        if self._alone:
            return Group(None)
        everyone = self.comm.group
        if isinstance(members, range):
            chosen = everyone.Range_incl([(members[0], members[-1], members.step)])
        else:
            chosen = everyone.Incl(list(members))
        comm = self.comm.Create_group(chosen, tag=_tag(members))
        chosen.Free()
        everyone.Free()
        return Group(
            comm,
            lambda: tuple(map(self.nodes.__getitem__, members)),
            self.kin,
            cache(lambda: tuple(map(self.ranks.__getitem__, members))),
        )

    @property
    def on_one_node(self) -> bool:
        """Whether all members share one node's memory."""
        return len(set(self.nodes)) == 1

    @property
    def by_nodes(self) -> list[int]:
        """Return all members, those of a node side by side."""
        firsts = {node: number for number, node in enumerate(dict.fromkeys(self.nodes))}
        return sorted(range(self.size), key=lambda member: firsts[self.nodes[member]])

    # -- collective operations --------------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Wait for all members."""
        if self.size > 1:
            with NOW.waiting:
                self.comm.Barrier()

    def doze(self) -> None:
        """Wait for all members without keeping a core busy: for those that others have to leave alone for long."""
        if self.size > 1:
            request = self.comm.Ibarrier()
            while not request.Test():
                time.sleep(DOZE)

    def all_reduce(self, values: Array) -> None:
        """All-reduce a contiguous array to its sum, in place; every member gets bitwise the same sums."""
        if self.size > 1:
            with NOW.waiting:
                self.comm.Allreduce(MPI.IN_PLACE, values)

    def mean(self, values: Array) -> None:
        """All-reduce to the mean, in place; every member gets bitwise the same values."""
        if self.size > 1:
            self.all_reduce(values)
            np.multiply(values, 1 / self.size, out=values)

    def maximum(self, values: Array) -> None:
        """All-reduce to the element-wise maximum, in place."""
        if self.size > 1:
            with NOW.waiting:
                self.comm.Allreduce(MPI.IN_PLACE, values, op=MPI.MAX)

    def reduce_scatter(self, values: Array, part: Array, counts: Sequence[int]) -> None:
        """Reduce-scatter: part <- this member's part of the sum of everyone's `values` (flat; member i's part has
        counts[i])."""
        if self.size > 1:
            with NOW.waiting:
                self.comm.Reduce_scatter(values, part, counts)
        else:
            np.copyto(part, values)

    def all_gather(self, part: Array, whole: Array, counts: Sequence[int]) -> None:
        """All-gather: whole (flat) <- everyone's parts one after another. `part` may be this member's section of
        `whole`."""
        if self.size > 1:
            own: Any = MPI.IN_PLACE if np.may_share_memory(part, whole) else part
            with NOW.waiting:
                if min(counts) == max(counts):
                    self.comm.Allgather(own, whole)
                else:
                    self.comm.Allgatherv(own, [whole, counts])
        elif whole.ctypes.data != part.ctypes.data:
            np.copyto(whole, part)

    def broadcast(self, values: Array, source: int) -> None:
        """Broadcast `values` from member `source`, in place."""
        if self.size > 1:
            with NOW.waiting:
                for chunk in chunks(values):
                    self.comm.Bcast(chunk, root=source)

    def gather_objects(self, value: T) -> list[T]:
        """Return everyone's value to everyone, pickled: not for use in steps."""
        return self.comm.allgather(value) if self.size > 1 else [value]

    # -- point to point ---------------------------------------------------------------------------------------------

    def pass_on(self, values: Array, into: Array) -> None:
        """Send `values` to the next member and receive those of the previous one; all members call."""
        to, source = (self.index + 1) % self.size, (self.index - 1) % self.size
        with NOW.waiting:
            self.comm.Sendrecv(values, to, recvbuf=into, source=source)

    def trade(self, sends: Sequence[tuple[Array, int]], receives: Sequence[tuple[Array, int]], tag: int) -> None:
        """Exchange contiguous arrays: sends are (array, to), receives (array, source). Waits for all of them.

        Between two members arrays arrive in the order in which they are sent.
        """
        messages = [(self, array, source, False) for array, source in receives]
        trade([*messages, *((self, array, to, True) for array, to in sends)], tag)

    def progress(self) -> None:
        """Make one nonblocking call into MPI, so that messages progress, of this group or any other."""
        self.comm.Iprobe()


def trade(messages: Sequence[tuple[Group, Array, int, bool]], tag: int) -> None:
    """Send and receive contiguous arrays in several groups: (group, array, peer, sending). Waits for all of them."""
    requests = []
    for group, array, peer, sending in messages:
        post = group.comm.Isend if sending else group.comm.Irecv
        requests += [post(chunk, peer, tag) for chunk in chunks(array)]
    Requests(requests).wait()


def _nodes(comm: MPI.Intracomm) -> list[int]:
    """Return for each rank the first one that runs on the same node. All ranks call."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    first = np.array([comm.Get_rank()])
    node.Bcast(first)
    node.Free()
    found = np.empty(comm.Get_size(), first.dtype)
    comm.Allgather(first, found)
    return [int(each) for each in found]


def _tag(members: Sequence[int]) -> int:
    """Return a tag for making this group, so that overlapping groups are not confused."""
    numbers = np.asarray(members, np.int64)
    return int((np.arange(1, len(numbers) + 1) * (numbers + 7) % 30000).sum() % 30000)


LARGEST_MESSAGE = 1 << 30  # bytes; MPI counts are C ints, and some transports fail at 2 GiB


def chunks(values: Array, largest: int | None = None) -> list[Array]:
    """Split a contiguous array into flat byte views of at most `largest` bytes (default: LARGEST_MESSAGE) each."""
    largest = LARGEST_MESSAGE if largest is None else largest
    flat = values.reshape(-1).view(np.uint8)
    return [flat[i : i + largest] for i in range(0, flat.size, largest)]
