"""Runs tests of kernels under AddressSanitizer: `LD_PRELOAD=libasan.so python -m pytest -p tests.gpu.sanitized ...`.

Each array of the device lies alone, and kernels may touch no byte beyond it: one that does ends the process with the
line of kernels.cu. (Usually arrays lie side by side, so that an index too far finds another array.)
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

from nettorrent_mpi.device.arrays import Array, DType, Shape, as_dtype
from nettorrent_mpi.device.gpu import Gpu
from tests.gpu.host import build
from tests.gpu.host.memory import ALIGNMENT, GAP, HostMemory

FLAGS = ("-fsanitize=address", "-g1", "-O1")
SANITIZER = ctypes.CDLL(None)
begin, allocate, free = HostMemory.__init__, HostMemory.allocate, HostMemory.free


def poison(memory: HostMemory, offset: int, size: int, poisoned: bool) -> None:
    name = "poison" if poisoned else "unpoison"
    function = getattr(SANITIZER, f"__asan_{name}_memory_region")
    function(ctypes.c_void_p(memory.start + memory.delta + offset), ctypes.c_size_t(size))


def begin_clean(memory: HostMemory, size: int) -> None:
    begin(memory, size)
    poison(memory, 0, size, False)  # memory of an earlier test may have lain there


def allocate_alone(memory: HostMemory, size: int) -> Array:
    array = allocate(memory, size)
    if size:
        offset = array.ctypes.data - memory.start
        poison(memory, offset, -(-size // ALIGNMENT) * ALIGNMENT + GAP, True)
        poison(memory, offset, size, False)
    return array


def free_alone(memory: HostMemory, array: Array) -> None:
    if array.size:
        poison(memory, array.ctypes.data - memory.start, array.size + ALIGNMENT + GAP, False)
    free(memory, array)


def empty(device: Gpu, shape: Shape, dtype: DType) -> Array:
    kind: Any = as_dtype(dtype)
    return device.runtime.allocate(math.prod(shape) * kind.itemsize).view(kind).reshape(shape)


HostMemory.__init__ = begin_clean  # type: ignore[method-assign]
HostMemory.allocate = allocate_alone  # type: ignore[method-assign]
HostMemory.free = free_alone  # type: ignore[method-assign]
Gpu.empty = empty  # type: ignore[method-assign]
build.FLAGS = (*build.FLAGS, *FLAGS)
