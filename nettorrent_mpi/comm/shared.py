"""Memory that the ranks of one node share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.arrays import Array

BACKING = "/dev/shm"  # where Open MPI and MPICH keep shared windows on Linux
SPARE = 16 << 20  # bytes that are left free there for MPI's own use


class SharedMemory:
    """One flat array for each member, which all members see. All members call everything here together.

    Who wants to read what others wrote, or to overwrite what others may still read, calls `fence` before. Its owner
    frees it before MPI ends: Open MPI's MPI_Finalize frees what is left in an order of its own on every rank, waits for
    the other members each time, and hangs now and then (seen with 4 ranks and several windows).
    """

    def __init__(self, group: Group, sizes: Sequence[int], dtype: Any):
        """`sizes[i]` elements are member i's. All members are on one node."""
        self._group = group
        dtype = np.dtype(dtype)
        lengths = [-(-size * dtype.itemsize // 64) * 64 for size in sizes]  # each begins on a cache line
        self._window = MPI.Win.Allocate_shared(lengths[group.index], 1, comm=group.comm)
        self._window.Lock_all(MPI.MODE_NOCHECK)
        self.parts: list[Array] = []
        for member, size in enumerate(sizes):
            memory, _ = self._window.Shared_query(member)
            self.parts.append(np.asarray(memory)[: size * dtype.itemsize].view(dtype))

    def fence(self) -> None:
        """Wait for all members; what each wrote before is seen by all afterwards."""
        self._window.Sync()
        self._group.barrier()
        self._window.Sync()

    def free(self) -> None:
        """Give the memory back; nobody may use the arrays any more."""
        self.parts.clear()
        self._window.Unlock_all()
        self._window.Free()


def fits(group: Group, size: int) -> bool:
    """Whether there is room for so many bytes of shared memory on this node: containers often have little.

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


def shared_array(
    node: Group, shape: tuple[int, ...], dtype: Any, fill: Callable[[Array], None]
) -> tuple[Array, SharedMemory | None]:
    """An array that the first member of `node` fills for all, and the memory that it lies in, which the caller frees.
    Where shared memory has no room every member fills one of its own (None).

    What `fill` raises is raised by all members.
    """
    size = int(np.prod(shape, dtype=np.int64))
    if node.size == 1 or not fits(node, size * np.dtype(dtype).itemsize):
        own: Array = np.empty(shape, dtype)
        fill(own)
        return own, None
    memory = SharedMemory(node, [size if i == 0 else 0 for i in range(node.size)], dtype)
    array = memory.parts[0].reshape(shape)
    problem: Exception | None = None
    if node.index == 0:
        try:
            fill(array)
        except Exception as error:  # told to all below
            problem = error
    problem = node.comm.bcast(problem)  # once, at start-up
    memory.fence()
    if problem is not None:
        del array
        memory.free()
        raise problem
    return array, memory
