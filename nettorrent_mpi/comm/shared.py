"""Memory shared by the ranks of one node."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.library import MPI
from nettorrent_mpi.device.arrays import Array

BACKING = "/dev/shm"  # where Open MPI and MPICH keep shared windows on Linux
SPARE = 16 << 20  # bytes that are left free there for MPI's own use


class SharedMemory:
    """One flat array for each member, visible to all members. Its methods are collective.

    A member calls `fence` before it reads what others wrote, and before it overwrites what others may still read. The
    owner frees the memory before MPI ends: Open MPI's MPI_Finalize frees remaining windows in a different order on
    every rank, waits for the other members each time, and sometimes hangs (seen with 4 ranks and several windows).
    """

    def __init__(self, group: Group, sizes: Sequence[int], dtype: Any):
        """Allocate `sizes[i]` elements for member i. All members are on one node."""
        self._group = group
        dtype = np.dtype(dtype)
        lengths = [-(-size * dtype.itemsize // 64) * 64 for size in sizes]  # each starts on a cache line
        self._window = MPI.Win.Allocate_shared(lengths[group.index], 1, comm=group.comm)
        self._window.Lock_all(MPI.MODE_NOCHECK)
        self.parts: list[Array] = []
        for member, size in enumerate(sizes):
            memory, _ = self._window.Shared_query(member)
            self.parts.append(np.asarray(memory)[: size * dtype.itemsize].view(dtype))

    def fence(self) -> None:
        """Wait for all members; afterwards all see what each wrote before."""
        self._window.Sync()
        self._group.barrier()
        self._window.Sync()

    def free(self) -> None:
        """Free the memory; the arrays may not be used any more."""
        self.parts.clear()
        self._window.Unlock_all()
        self._window.Free()


def fits(group: Group, size: int) -> bool:
    """Whether this node has room for `size` bytes of shared memory: containers often have little.

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
    """Return an array that the first member of `node` fills for all, and its memory, which the caller frees. If shared
    memory has no room, every member fills an array of its own (memory None).

    Errors of `fill` are raised on all members.
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
        except Exception as error:  # raised on all members below
            problem = error
    problem = node.comm.bcast(problem)  # once, at start-up
    memory.fence()
    if problem is not None:
        del array
        memory.free()
        raise problem
    return array, memory
