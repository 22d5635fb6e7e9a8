"""CUDA's driver for CuPy on a machine without a GPU: the host device below CuPy's own arrays.

`install` replaces the calls of CuPy that reach a GPU, so that device/gpu/cuda.py runs as it is, on CuPy's arrays, whose
elements lie in the host device's memory. Every other use of the GPU by CuPy (arithmetic on an array, a copy, printing
one) fails as it does without a driver.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.device.gpu import cuda, source
from nettorrent_mpi.device.gpu.runtime import Matrix
from tests.gpu.host import products
from tests.gpu.host.build import Library, load
from tests.gpu.host.runtime import HostProduct, HostRuntime, convolution_of
from tests.gpu.host.streams import HostEvent, HostGraph

DEFAULT = 4  # cudaMemcpyDefault
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
NOT_READY = 600  # cudaErrorNotReady


class Driver:
    """A Driver is one GPU, present in one process: a host device. `index` is the current GPU's."""

    def __init__(self, host: HostRuntime):
        self.host, self.index = host, -1
        self.allocated: dict[int, Array] = {}
        self.events: dict[int, HostEvent] = {}
        self.failure = 0  # the error of the GPU
        self.current = 0  # the handle of the stream that CuPy's own functions go to

    def malloc(self, size: int) -> int:
        assert size > 0
        try:
            array = self.host.allocate(size)
        except MemoryError:
            raise DriverError(OUT_OF_MEMORY) from None
        address = self.host.address(array)
        self.allocated[address] = array
        return address

    def free(self, address: int) -> None:
        self.host.free(self.allocated.pop(address))

    def query(self, event: int) -> int:
        return self.failure or (0 if self.events[event].done() else NOT_READY)

    def copy(self, to: int, origin: int, size: int, kind: int, stream: int) -> None:
        assert size > 0
        assert kind == DEFAULT
        out, start = self.place(to), self.place(origin)
        assert (out, start) != (to, origin), "neither side of a copy is on the GPU"
        self.host.order.stream_of(stream).enqueue(f"copy of {size} bytes", lambda: ctypes.memmove(out, start, size))

    def place(self, address: int) -> int:
        """Where work finds what has this address: elsewhere, if it is the device's memory."""
        memory = self.host.memory
        return address + memory.delta if 0 <= address - memory.start < memory.size else address

    def within(self, array: Any) -> Array:
        """Return one of CuPy's arrays as work reads and writes it."""
        assert isinstance(array, cupy.ndarray)
        memory = self.host.memory
        return np.ndarray(array.shape, array.dtype, memory.work, array.data.ptr - memory.start, array.strides)


class DriverError(RuntimeError):
    """CuPy's CUDARuntimeError, which asks CUDA for its text."""

    def __init__(self, status: int):
        self.status = status
        super().__init__(f"CUDA error {status}")


def install(driver: Driver) -> None:
    """Put a driver below CuPy, for the rest of the process."""

    class Stream:
        def __init__(self, *, non_blocking: bool):
            assert non_blocking
            self.stream = driver.host.stream()
            self.ptr = self.stream.handle

        def use(self) -> None:
            driver.current = self.ptr

        def wait_event(self, event: Event) -> None:
            self.stream.wait(event._there())

        def synchronize(self) -> None:
            self.stream.synchronize()

        def begin_capture(self, mode: int) -> None:
            assert mode == 1  # cudaStreamCaptureModeThreadLocal
            assert driver.host.order.capturing is None
            driver.host.order.capturing = self.stream

        def end_capture(self) -> Graph:
            assert driver.host.order.capturing is self.stream
            driver.host.order.capturing, work, self.stream.captured = None, self.stream.captured, []
            return Graph(HostGraph(work))

    class Event:
        def __init__(self, *, disable_timing: bool):
            assert disable_timing
            self._event: HostEvent | None = None
            self.ptr = id(self)

        def _there(self) -> HostEvent:
            assert self._event is not None
            return self._event

        def record(self, stream: Stream) -> None:
            self._event = driver.events[self.ptr] = stream.stream.record()

        def synchronize(self) -> None:
            if driver.failure:
                raise DriverError(driver.failure)
            self._there().synchronize()

    class Graph:
        def __init__(self, graph: HostGraph):
            self._graph = graph

        def launch(self, stream: Stream) -> None:
            self._graph.launch(stream.stream)

    class Device:
        def __init__(self, index: int):
            self._index = index

        def use(self) -> None:
            driver.index = self._index

    class RawModule:
        def __init__(self, *, code: str, options: tuple[str, ...]):
            assert "extern" in code
            (real,) = (option.removeprefix("-DREAL=") for option in options if option.startswith("-DREAL="))
            name = next(name for name, spelt in source.REALS.items() if spelt == real)
            self._library = load(name, driver.host.seed)

        def get_function(self, name: str) -> RawKernel:
            return RawKernel(self._library, name)

    class RawKernel:
        def __init__(self, library: Library, name: str):
            self._library, self._name = library, name
            self._parameters = source.signatures()[name].parameters

        @property
        def kernel(self) -> RawKernel:
            return self

        def __call__(self, grid: tuple[int, int], block: tuple[int], args: Sequence[Any], stream: Any) -> None:
            wanted = [np.uint64 if p.pointer else np.dtype(p.dtype).type for p in self._parameters]
            assert [type(value) for value in args] == wanted, self._name
            assert all(grid), "CuPy makes 1 of a grid of 0 blocks"
            values = [
                driver.place(int(value)) if p.pointer else value.item()
                for value, p in zip(args, self._parameters, strict=True)
            ]
            there = driver.host.order.stream_of(stream.ptr)
            there.enqueue(self._name, lambda: self._library.call(self._name, grid, block[0], values))

    class Products:
        def __init__(self, address: Any, gpu: str):
            pass

        def product(
            self, a: Matrix, b: Matrix, out: Any, accumulate: bool, bias: Any, relu: bool, tf32: bool, space: Any
        ) -> Any:
            first, second = (driver.within(m.array.T if m.turned else m.array) for m in (a, b))
            to, more = driver.within(out), None if bias is None else driver.within(bias)
            work = HostProduct("product", lambda: products.product(first, second, to, accumulate, more, relu, tf32))
            return OnStream(work)

    class Convolutions:
        def __init__(self, address: Any):
            pass

        def convolution(
            self, kind: str, x: Any, weight: Any, y: Any, geometry: Geometry, bias: Any, relu: bool, tf32: bool,
            workspace: Callable[[int], Any],
        ) -> Any:  # fmt: skip
            assert isinstance(workspace(1000), cupy.ndarray)
            images, filters, outputs = (driver.within(array) for array in (x, weight, y))
            more = None if bias is None else driver.within(bias)
            return OnStream(convolution_of(kind, images, filters, outputs, geometry, more, relu, tf32))

    class OnStream:
        def __init__(self, work: HostProduct):
            self._work = work

        def run(self, stream: Any) -> None:
            self._work.run(driver.host.order.stream_of(stream.ptr))

    properties = {
        "name": b"NVIDIA H200",
        "uuid": bytes(range(1, 17)),
        "major": 9,
        "minor": 0,
        "multiProcessorCount": 132,
        "totalGlobalMem": driver.host.memory.size,
    }
    for name, function in {
        "malloc": driver.malloc,
        "free": driver.free,
        "memcpyAsync": driver.copy,
        "eventQuery": driver.query,
        "memGetInfo": lambda: (driver.host.free_memory(), driver.host.memory.size),
        "driverGetVersion": lambda: 13000,
        "deviceGetPCIBusId": lambda index: f"{driver.host.properties.uuid}, 0000:0{index}:00.0",
        "getDeviceProperties": lambda index: properties,
        "CUDARuntimeError": DriverError,
    }.items():
        replace(cupy.cuda.runtime, name, function)
    replace(cupy.cuda, "alloc_pinned_memory", bytearray)
    for double in (Stream, Event, Graph, Device):
        replace(cupy.cuda, double.__name__, double)
    for double in (RawModule, RawKernel):
        replace(cupy, double.__name__, double)
    cuda.CublasLt = Products
    sys.modules["nettorrent_mpi.device.gpu.cudnn"] = SimpleNamespace(Cudnn=Convolutions)  # type: ignore[assignment]


def replace(module: Any, name: str, double: Any) -> None:
    """Replace what CuPy has by this name. A class must have all of its double's methods."""
    real = getattr(module, name)
    if isinstance(real, type) and isinstance(double, type):
        assert all(hasattr(real, method) for method in vars(double) if not method.startswith("_")), name
    setattr(module, name, double)
