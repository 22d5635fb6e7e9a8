"""A GPU that only counts: the device's own code runs on it, and shows how much memory it takes, without a GPU.

Its arrays have addresses and no memory behind them: nothing on the host reads or writes an array of a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from nettorrent_mpi.device.arrays import Array, DType
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.device.gpu.known import KNOWN, convolution_workspace
from nettorrent_mpi.device.gpu.runtime import Event, Graph, Matrix, Product, Properties, Stream

GPU = "H200"  # whose plans of convolutions are looked at
ASSUMED = 64 << 20  # bytes of a convolution's workspace where cuDNN cannot be asked: true float32 took 48 MiB on one
_FIRST, _ALIGNMENT = 1 << 40, 256


class _Nothing:
    """Stands for a stream, an event, a graph and a product: there is nothing to wait for, and nothing to do."""

    handle = 0

    def record(self) -> Event:
        return self

    def wait(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def done(self) -> bool:
        return True

    def launch(self, stream: Stream) -> None:
        pass

    def run(self, stream: Stream) -> None:
        pass


class _Place:
    """An array's address, as NumPy asks for it."""

    def __init__(self, address: int, size: int):
        self.__array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}


class PlannedRuntime:
    """A runtime (device.gpu.runtime.Runtime) without a GPU: it allocates addresses, and does nothing."""

    names: Sequence[str] = ()

    def __init__(self) -> None:
        facts = KNOWN[GPU]
        self.properties = Properties(
            facts["deviceName"],
            "planned",
            divmod(facts["deviceVer"] // 10, 10),
            facts["multiProcessorCount"],
            facts["totalGlobalMem"],
        )
        self._next = _FIRST

    def allocate(self, size: int) -> Array:
        address = self._next
        self._next += -(-size // _ALIGNMENT) * _ALIGNMENT
        return np.asarray(_Place(address, size))

    def free(self, memory: Array) -> None:
        pass

    def free_memory(self) -> int:
        return self.properties.memory

    def pinned(self, size: int) -> Array:
        return np.empty(size, np.uint8)

    def address(self, array: Array) -> int:
        return int(array.ctypes.data) if array.size else 0

    def stream(self) -> Stream:
        return _Nothing()

    def use(self, stream: Stream) -> None:
        pass

    def launch(
        self, stream: Stream, kernel: str, real: DType, grid: tuple[int, int], block: int, arguments: Sequence[Any]
    ) -> None:
        pass

    def copy(self, stream: Stream, out: Array, source: Array) -> None:
        pass

    def capture(self, stream: Stream, run: Callable[[], None]) -> Graph:
        return _Nothing()

    def product(
        self,
        a: Matrix,
        b: Matrix,
        out: Array,
        *,
        accumulate: bool = False,
        bias: Array | None = None,
        relu: bool = False,
        tf32: bool = False,
        workspace: Array,
    ) -> Product:
        return _Nothing()

    def convolution(
        self,
        kind: str,
        x: Array,
        weight: Array,
        y: Array,
        geometry: Geometry,
        *,
        bias: Array | None = None,
        relu: bool = False,
        tf32: bool = False,
        workspace: Callable[[int], Array],
    ) -> Product:
        size = ASSUMED
        if _cudnn_plans():
            with suppress(RuntimeError):  # it has no plan
                wanted = kind, geometry, bias is not None, relu
                size = convolution_workspace(GPU, [wanted], len(x), x.dtype, tf32)
        workspace(max(size, 1))
        return _Nothing()


@cache
def _cudnn_plans() -> bool:
    """Whether cuDNN can plan here. Without a driver's library it would say in a line of its own that it cannot."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return find_spec("cudnn") is not None
