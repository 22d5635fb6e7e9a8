"""The host device's memory: an array there has an address that the host can neither read nor write.

One file in memory is mapped twice. Arrays lie in the first mapping, which nobody may touch: an element that the host
reads or writes is a segmentation fault. Work of the device runs in the second mapping, `delta` bytes further.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np

from nettorrent_mpi.device.arrays import Array

ALIGNMENT = 256  # of every allocation, as CUDA's
GAP = 4096  # bytes between two allocations, which nobody writes
POISON = 0xFF  # in every byte: NaN in every type of floating point, -1 in integers, and an index that fits nowhere
NO_ACCESS = 0  # PROT_NONE, which the module mmap does not name


class HostMemory:
    """Memory of `size` bytes; what is not touched takes no room. New and freed memory is poisoned."""

    def __init__(self, size: int):
        self.size = size
        file = os.memfd_create("host device")
        try:
            os.ftruncate(file, size)
            self._guarded, self._open = mmap.mmap(file, size), mmap.mmap(file, size)
        finally:
            os.close(file)
        self._arrays = np.frombuffer(self._guarded, np.uint8)
        self.work = np.frombuffer(self._open, np.uint8)
        self.start = int(self._arrays.ctypes.data)
        self.delta = int(self.work.ctypes.data) - self.start
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(self.start), ctypes.c_size_t(size), NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
        self._taken: dict[int, int] = {}  # offset -> size
        self._holes = [(0, size)]  # (offset, size), in order

    @property
    def free_bytes(self) -> int:
        """The bytes that are not allocated."""
        return self.size - sum(self._taken.values())

    def allocate(self, size: int) -> Array:
        """Return a flat array (uint8) that the host cannot touch. Raises MemoryError."""
        if size == 0:
            return self._arrays[:0]
        whole = -(-size // ALIGNMENT) * ALIGNMENT + GAP
        for number, (offset, room) in enumerate(self._holes):
            if room >= whole:
                self._holes[number : number + 1] = [(offset + whole, room - whole)] if room > whole else []
                self._taken[offset] = whole
                self.work[offset : offset + whole] = POISON
                return self._arrays[offset : offset + size]
        raise MemoryError(f"{size:,} bytes")

    def free(self, array: Array) -> None:
        """Take memory back. Its gap must be as it was: nobody wrote behind the end."""
        if array.size == 0:
            return
        offset = self._offset(array)
        whole = self._taken.pop(offset)
        assert (self.work[offset + array.size : offset + whole] == POISON).all(), "work has written behind its memory"
        self.work[offset : offset + whole] = POISON
        holes: list[tuple[int, int]] = []
        for start, room in sorted([*self._holes, (offset, whole)]):
            if holes and sum(holes[-1]) == start:
                holes[-1] = holes[-1][0], holes[-1][1] + room
            else:
                holes.append((start, room))
        self._holes = holes

    def holds(self, array: Array) -> bool:
        """Whether an array lies in this memory."""
        return 0 <= self._offset(array) < self.size

    def within(self, array: Array) -> Array:
        """Return the same array in the mapping that work of the device reads and writes."""
        assert self.holds(array), "the array is not on the device"
        return np.ndarray(array.shape, array.dtype, self.work, self._offset(array), array.strides)

    def _offset(self, array: Array) -> int:
        return int(array.__array_interface__["data"][0]) - self.start
