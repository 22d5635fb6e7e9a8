"""The ranks of one node share memory."""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.blocks import span

BACKING = "/dev/shm"  # Linux keeps files there in memory
SPARE = 16 << 20  # bytes that are left free there for MPI, whose files may grow


class SharedMemory:
    """A SharedMemory holds one flat array for each member of a group and a common one, all visible to all members. Its
    methods are collective.

    The memory is a file in BACKING. Its pages are reserved: where there is no room for a page that is written to, the
    program ends by SIGBUS. Each member reserves its own array and a part of the common one, so that they are near its
    core. Once all have mapped the file it has no name any more: however the ranks end, they leave nothing behind.

    A member calls `fence` before it reads what others wrote, and before it overwrites what others may still read.
    """

    def __init__(self, group: Group, own: int, common: int, dtype: Any):
        """Allocate `own` elements for each member, and `common` ones. All members are on one node.

        Raises OSError on all members, if there is no room or one of them cannot open the file.
        """
        self._group, size = group, group.size
        dtype = np.dtype(dtype)
        pages = [_pages(own, dtype)] * size + [span(_pages(common, dtype), size, i).size for i in range(size)]
        ends = [mmap.PAGESIZE * end for end in accumulate(pages)]
        starts = [0, *ends[:-1]]
        path = group.comm.bcast(_attempt(_create, ends[-1]) if group.index == 0 else None)
        mapped = path
        if isinstance(path, str):
            mapped = _attempt(_map, path, [(starts[i], ends[i]) for i in (group.index, size + group.index)], ends[-1])
        problems = group.gather_objects(mapped if isinstance(mapped, OSError) else None)
        if isinstance(path, str) and group.index == 0:
            os.unlink(path)
        problem = next((each for each in problems if each is not None), None)
        if problem is not None:
            if isinstance(mapped, mmap.mmap):
                mapped.close()
            raise problem
        self._memory = mapped
        self._parts: list[Array] = [np.frombuffer(mapped, dtype, own, starts[i]) for i in range(size)]
        self._whole: Array = np.frombuffer(mapped, dtype, common, starts[size])
        self._own = self._common = 0  # elements taken

    def take_own(self, size: int) -> list[Array]:
        """Return the next `size` elements of each member's own array. All members take the same."""
        start, self._own = self._own, self._own + size
        return [part[start : self._own] for part in self._parts]

    def take_common(self, size: int) -> Array:
        """Return the next `size` elements of the common array. All members take the same."""
        start, self._common = self._common, self._common + size
        return self._whole[start : self._common]

    def fill(self, write: Callable[[], None]) -> None:
        """Let the first member write for all. What it raises is raised on all members."""
        problem: Exception | None = None
        if self._group.index == 0:
            try:
                write()
            except Exception as error:  # raised on all members below
                problem = error
        problem = self._group.comm.bcast(problem)  # once, at start-up
        self.fence()
        if problem is not None:
            raise problem

    def fence(self) -> None:
        """Wait for all members; afterwards all see what each wrote before, because the messages of a barrier order
        their accesses to memory."""
        self._group.barrier()

    def free(self) -> None:
        """Give the memory back; the arrays may not be used any more."""
        self.fence()
        if self._group.index == 0:
            self._memory.madvise(mmap.MADV_REMOVE)


def _pages(size: int, dtype: np.dtype[Any]) -> int:
    return -(-size * dtype.itemsize // mmap.PAGESIZE)


def _attempt(make: Callable[..., Any], *arguments: Any) -> Any:
    """Return what is made, or the OSError that was raised."""
    try:
        return make(*arguments)
    except OSError as error:
        return error.with_traceback(None)


def _create(size: int) -> str:
    """Make an empty file of this size, whose name nobody else knows or has; return its path."""
    path = f"{BACKING}/nettorrent_mpi-{secrets.token_hex(8)}"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.truncate(file, size)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(file)
    return path


def _map(path: str, own: Sequence[tuple[int, int]], size: int) -> mmap.mmap:
    """Map the file, and reserve its pages in the intervals `own`."""
    file = os.open(path, os.O_RDWR)
    try:
        for start, stop in own:
            if start < stop:
                os.posix_fallocate(file, start, stop - start)
        return mmap.mmap(file, size)
    finally:
        os.close(file)


class Ask(NamedTuple):
    """An Ask is for memory that a group, which is on one node, shares: the arguments of SharedMemory. `alone` is the
    number of bytes that each member takes where it is not to be had."""

    group: Group
    own: int
    common: int
    dtype: Any
    alone: int

    @property
    def bytes(self) -> int:
        """Return the bytes of all members."""
        return (self.group.size * self.own + self.common) * int(np.dtype(self.dtype).itemsize)


def room() -> int:
    """Return the number of bytes that this node's ranks can share at present."""
    try:
        found = os.statvfs(BACKING)
    except OSError:
        return 0
    return max(found.f_bavail * found.f_frsize - SPARE, 0)


def share(among: Group, asks: Sequence[Ask]) -> tuple[list[SharedMemory], str | None]:
    """Allocate the memory that the members of `among` ask for: on each node all of it, or nothing and the reason; teams
    that looked one by one would take from each other what was free. All members call."""
    wanted = sum(ask.bytes for ask in asks if ask.group.index == 0)
    here = [i for i, node in enumerate(among.nodes) if node == among.nodes[among.index]]
    told = among.gather_objects((wanted, room()))
    wanted, free = sum(told[i][0] for i in here), min(told[i][1] for i in here)
    lack = f"{free / 1e6:.1f} MB are free" if wanted > free else None
    made = [] if lack else [_attempt(SharedMemory, *ask[:-1]) for ask in asks]
    lacks = among.gather_objects(lack or next((each.strerror for each in made if isinstance(each, OSError)), None))
    lack = next((lacks[i] for i in here if lacks[i] is not None), None)
    if lack is not None:
        for each in made:
            if isinstance(each, SharedMemory):
                each.free()
        return [], lack
    return made, None
