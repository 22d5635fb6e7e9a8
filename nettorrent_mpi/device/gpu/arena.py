"""The arena: a GPU's memory is allocated in one block, and arrays are cut from it."""

from __future__ import annotations

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.runtime import Runtime
from nettorrent_mpi.plan.errors import DeviceMemoryError

ALIGNMENT = 256  # bytes, of every array: that of the GPU's own allocations
BLOCK_BYTES = 1 << 25  # of a further block, at least


class Arena:
    """An Arena cuts arrays from blocks of a GPU's memory, one behind the other.

    Nothing is given back before `close`: a captured graph may hold the address of every array that there ever was. The
    first block is as large as `reserve` says, so that a run whose estimate is right allocates once.
    """

    def __init__(self, runtime: Runtime):
        self._runtime = runtime
        self._blocks: list[Array] = []
        self._used: list[int] = []

    @property
    def used(self) -> int:
        """The bytes of all arrays."""
        return sum(self._used)

    @property
    def reserved(self) -> int:
        """The bytes of all blocks."""
        return sum(int(block.size) for block in self._blocks)

    def reserve(self, size: int) -> None:
        """Allocate what is missing for arrays of `size` bytes more, aligned, in one block."""
        room = max((int(b.size) - used for b, used in zip(self._blocks, self._used, strict=True)), default=0)
        if size > room:
            self._grow(size, size)

    def take(self, size: int) -> Array:
        """Return an array of `size` bytes (uint8), uninitialised and aligned. Raises DeviceMemoryError."""
        whole = aligned_size(size)
        for number, block in enumerate(self._blocks):
            used = self._used[number]
            if used + whole <= block.size:
                break
        else:
            self._grow(whole, max(whole, BLOCK_BYTES))
            number, used = len(self._blocks) - 1, 0
        self._used[number] += whole
        return self._blocks[number][used : used + size]

    def close(self) -> None:
        """Free all blocks. The GPU is idle, and no array is used any more."""
        for block in self._blocks:
            self._runtime.free(block)
        self._blocks, self._used = [], []

    def _grow(self, needed: int, wanted: int) -> None:
        for size in sorted({needed, wanted}, reverse=True):
            try:
                block = self._runtime.allocate(aligned_size(size))
            except MemoryError:
                continue
            self._blocks.append(block)
            self._used.append(0)
            return
        about, free = self._runtime.properties, self._runtime.free_memory()
        raise DeviceMemoryError(about.name, needed=needed, held=self.reserved, free=free, memory=about.memory)


def aligned_size(size: int) -> int:
    """Return the bytes that an array of `size` bytes takes in an arena."""
    return -(-size // ALIGNMENT) * ALIGNMENT
