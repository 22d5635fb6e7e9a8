"""What all operations of a GPU share: launching kernels, and scratch memory."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from nettorrent_mpi.device.arrays import Array, DType, Shape, as_dtype
from nettorrent_mpi.device.gpu.runtime import Runtime, Stream

BLOCK = 256  # threads of a block, where a kernel does not need another number
MOST_BLOCKS = 4096  # of a grid-stride loop: enough for every GPU
EACH = 8  # elements that a thread adds up at least
LEAST_COUNTERS = 1024  # that are made at once
SUM_BLOCKS = 1024  # of a kernel that adds up its blocks' sums (kernels.cu: grid_sum)


class Owner(Protocol):
    """What operations need of their device: its runtime, the stream that work goes to at present, and memory."""

    runtime: Runtime
    stream: Stream
    tf32: bool  # whether float32 products may be rounded to TF32

    def empty(self, shape: Shape, dtype: DType) -> Array:
        """Return an uninitialised array."""

    def constant(self, values: Array) -> Array:
        """Return these values on the GPU: the same array for the same values, which nothing may change."""

    def upload(self, out: Array, values: Array) -> None:
        """out <- `values`, which lie in host memory and may be changed as soon as this returns."""

    def download(self, out: Array, x: Array) -> None:
        """out, in host memory, <- x, once all operations called so far are complete."""


class KernelOperations:
    """The base of the GPU's operations. Kernels run on the device's present stream, one after the other."""

    def __init__(self, device: Owner):
        self.device = device
        self._scratch: dict[tuple[str, Any, Stream], Array] = {}
        self._real: DType = np.float32  # of the last launch
        self._chosen: dict[str, DType] = {}  # kernel that does not depend on REAL -> where it is taken from

    def launch(self, kernel: str, real: DType, grid: int | tuple[int, int], block: int, *arguments: Any) -> None:
        """Launch a kernel for this type of REAL (see `Runtime.launch`). None: the kernel does not depend on it; it is
        taken from the kernels that are in use when it is first launched, so that no others have to be compiled."""
        size = (grid, 1) if isinstance(grid, int) else grid
        if size[0] and size[1]:
            if real is None:
                real = self._chosen.setdefault(kernel, self._real)
            self._real = real
            self.device.runtime.launch(self.device.stream, kernel, real, size, block, arguments)

    def each(self, kernel: str, real: DType, count: int, *arguments: Any) -> None:
        """Launch a kernel that loops over `count` elements with a stride of the whole grid (GRID_STRIDE)."""
        self.launch(kernel, real, blocks_for(count), BLOCK, *arguments)

    def each_pack(self, kernel: str, real: DType, count: int, *arguments: Any) -> None:
        """Launch a kernel that loops over packs of `count` elements (each_element), each of which has 16 bytes of
        REAL."""
        self.launch(kernel, real, blocks_for(-(-count * as_dtype(real).itemsize // 16)), BLOCK, *arguments)

    def sum(self, kernel: str, real: DType, count: int, *arguments: Any) -> None:
        """Launch a kernel that adds up something of `count` elements. Its grid depends on the count alone, and so does
        the order of the sum."""
        self.launch(kernel, real, min(-(-count // (BLOCK * EACH)), SUM_BLOCKS), BLOCK, *arguments)

    def partial_sums(self) -> tuple[Array, Array]:
        """Return memory for three sums of each of SUM_BLOCKS blocks, and a counter of the blocks that are done."""
        return self.scratch("partial sums", (3 * SUM_BLOCKS,), np.float64), self.counters(1)

    def counters(self, count: int, name: str = "counters") -> Array:
        """Return so many numbers (uint32) that are 0 between launches on the present stream."""
        counters = self._scratch.get((name, as_dtype(np.uint32), self.device.stream))
        if counters is None or counters.size < count:
            counters = self.scratch(name, (max(count, LEAST_COUNTERS),), np.uint32)
            self.each("clear_counters", None, counters.size, counters, counters.size)
        return counters

    def scratch(self, name: str, shape: Shape, dtype: DType) -> Array:
        """Return memory of this operation on the present stream, valid until it is next called with this name there. It
        grows to the largest size that is asked for, so the first step of a run allocates all of it."""
        size, dtype = math.prod(shape), as_dtype(dtype)
        key = name, dtype, self.device.stream
        memory = self._scratch.get(key)
        if memory is None or memory.size < size:
            memory = self._scratch[key] = self.device.empty((size,), dtype)
        return memory[:size].reshape(shape)

    @property
    def working_bytes(self) -> int:
        """The bytes of scratch memory."""
        return sum(int(memory.nbytes) for memory in self._scratch.values())


def blocks_for(count: int) -> int:
    """Return the number of blocks of BLOCK threads for `count` elements."""
    return min(-(-count // BLOCK), MOST_BLOCKS)
