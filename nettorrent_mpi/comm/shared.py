"""Memory that the ranks of one node share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from mpi4py import MPI

from nettorrent_mpi.comm.group import Array, Group

BACKING = "/dev/shm"  # where Open MPI and MPICH keep shared windows on Linux
SPARE = 16 << 20  # bytes that are left free there for MPI's own use


# All shared memory of this process that was not given back, in the order in which it was made. Open MPI's MPI_Finalize
# gives back what is left, waiting for the other members each time, but in an order of its own on every rank: with
# several groups it then hangs now and then (seen with 4 ranks). So nothing may be left: see `free_all`.
_open: list[SharedMemory] = []


class SharedMemory:
    """One flat array per member, which all members see. All members call everything here together.

    Who wants to read what others wrote, or to overwrite what others may still read, calls `meet` before.
    """

    def __init__(self, group: Group, sizes: Sequence[int], dtype: Any):
        """`sizes[i]` elements are member i's. All members are on one node (see `whole_on_one_node`)."""
        self._group = group
        dtype = np.dtype(dtype)
        lengths = [-(-size * dtype.itemsize // 64) * 64 for size in sizes]  # each begins on a cache line
        self._window = MPI.Win.Allocate_shared(lengths[group.index], 1, comm=group.comm)
        self._window.Lock_all(MPI.MODE_NOCHECK)
        self.parts: list[Array] = []
        for member, size in enumerate(sizes):
            memory, _ = self._window.Shared_query(member)
            self.parts.append(np.asarray(memory)[: size * dtype.itemsize].view(dtype))
        _open.append(self)

    def meet(self) -> None:
        """Wait for all members; what each wrote before is seen by all afterwards."""
        self._window.Sync()
        self._group.barrier()
        self._window.Sync()

    def free(self) -> None:
        """Give the memory back; nobody may use the arrays any more."""
        _open.remove(self)
        self.parts.clear()
        self._window.Unlock_all()
        self._window.Free()


def free_all() -> None:
    """Give all shared memory back, before MPI ends. Every rank calls; nobody may use any such array any more.

    The order is that of making, which all members of a group have in common with regard to their groups.
    """
    while _open:
        _open[0].free()


def node_of(group: Group) -> Group:
    """The members of `group` that are on this node. Every member of `group` calls."""
    return Group(cast("MPI.Intracomm", group.comm.Split_type(MPI.COMM_TYPE_SHARED)))


def by_nodes(group: Group) -> list[int]:
    """The members, those of a node side by side. The same answer for all; every member calls."""
    node = node_of(group)
    first = node.comm.bcast(group.index)
    node.comm.Free()
    firsts = group.comm.allgather(first)
    return sorted(range(group.size), key=lambda member: (firsts[member], member))


def whole_on_one_node(group: Group) -> bool:
    """Do all members share one node's memory? The same answer for all; every member calls."""
    node = node_of(group)
    whole = node.size == group.size
    node.comm.Free()
    return bool(group.comm.allreduce(whole, MPI.LAND))


def fits(group: Group, size: int) -> bool:
    """Is there room for so many bytes of shared memory on this node? Containers often have little.

    Every member of `group`, which is on one node, calls and gets the same answer.
    """
    free = None
    if group.index == 0:
        try:
            there = os.statvfs(BACKING)
            free = there.f_bavail * there.f_frsize
        except OSError:  # not Linux: MPI knows another place
            free = size + SPARE
    free = group.comm.bcast(free)
    return bool(free >= size + SPARE)


def share(node: Group, shape: tuple[int, ...], dtype: Any, fill: Callable[[Array], None]) -> Array:
    """One array for all members of `node`, filled by the first. Private ones where shared memory has no room.

    What `fill` raises is raised by all. The memory lives until `free_all`.
    """
    size = int(np.prod(shape, dtype=np.int64))
    if node.size == 1 or not fits(node, size * np.dtype(dtype).itemsize):
        own: Array = np.empty(shape, dtype)
        fill(own)
        return own
    memory = SharedMemory(node, [size if i == 0 else 0 for i in range(node.size)], dtype)
    array = memory.parts[0].reshape(shape)
    problem: Exception | None = None
    if node.index == 0:
        try:
            fill(array)
        except Exception as error:  # told to all below
            problem = error
    problem = node.comm.bcast(problem)  # once, at start-up
    memory.meet()
    if problem is not None:
        raise problem
    return array
