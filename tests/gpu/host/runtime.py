"""The host device: a GPU's runtime on a CPU, for tests.

It runs the kernels of kernels.cu, compiled by g++, and NumPy in place of the libraries, with streams that are as lazy
as CUDA allows (streams.py) and memory that the host cannot touch (memory.py). Work holds addresses, as a GPU does: what
an array or a slot of pinned memory contains counts when the work runs, not when it was launched.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nettorrent_mpi.device.arrays import Array, DType, as_dtype
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.device.gpu.runtime import Matrix, Properties
from nettorrent_mpi.device.gpu.source import signatures
from tests.gpu.host import convolution, products
from tests.gpu.host.build import Library, load
from tests.gpu.host.memory import HostMemory
from tests.gpu.host.streams import Exchanges, HostGraph, HostStream, Order, capture


class HostRuntime:
    """One rank's access to the host device (device.gpu.runtime.Runtime). `seed` decides the order of work."""

    names = ("the host device",)
    keeps_nan = True  # whether a library's ReLU is NaN where it gets NaN

    def __init__(self, seed: int = 0, *, memory: int = 1 << 33, background: bool = False, uuid: str = "host device"):
        self.properties = Properties("host device", uuid, (9, 0), processors=3, memory=memory)
        self.memory, self.order = HostMemory(memory), Order(seed, background)
        self.exchanges = Exchanges(self.order, self.memory, uuid)
        self.seed = seed
        self._pinned: list[Array] = []
        self.libraries: dict[str, Library] = {}  # of kernels, by the name of REAL
        self.allocations = 0

    # -- memory -----------------------------------------------------------------------------------------------------

    def allocate(self, size: int) -> Array:
        assert self.order.capturing is None, "memory is allocated inside a capture"
        self.allocations += 1
        return self.memory.allocate(size)

    def free(self, memory: Array) -> None:
        assert not any(stream.queue for stream in self.order.streams), f"memory is freed under work: {self.order}"
        self.memory.free(memory)

    def free_memory(self) -> int:
        return self.memory.free_bytes

    def pinned(self, size: int) -> Array:
        assert self.order.capturing is None, "memory is pinned inside a capture"
        self._pinned.append(np.empty(size, np.uint8))
        return self._pinned[-1]

    def address(self, array: Array) -> int:
        return int(array.__array_interface__["data"][0]) if array.size else 0

    def within(self, array: Array) -> Array:
        """Return an array as work reads and writes it: for doubles of libraries, and for tests at rest."""
        return self.memory.within(array)

    # -- work -------------------------------------------------------------------------------------------------------

    def stream(self) -> HostStream:
        return self.order.stream()

    def use(self, stream: HostStream) -> None:
        pass  # the host device has no arrays with functions of their own

    def launch(
        self, stream: HostStream, kernel: str, real: DType, grid: tuple[int, int], block: int, arguments: Sequence[Any]
    ) -> None:
        name = as_dtype(real).name
        values = signatures()[kernel].values(real, arguments, self._in_work)
        if name not in self.libraries:
            self.libraries[name] = load(name, self.seed)
        library = self.libraries[name]
        stream.enqueue(kernel, lambda: library.call(kernel, grid, block, values))

    def copy(self, stream: HostStream, out: Array, source: Array) -> None:
        assert out.nbytes == source.nbytes, (out.nbytes, source.nbytes)
        assert all(array.flags.c_contiguous for array in (out, source)), "a copy of strided memory"
        to, origin, size = self._of_copy(out), self._of_copy(source), out.nbytes
        stream.enqueue(f"copy of {size} bytes", lambda: ctypes.memmove(to, origin, size) if size else None)

    def capture(self, stream: HostStream, run: Callable[[], None]) -> HostGraph:
        return capture(stream, run)

    # -- libraries --------------------------------------------------------------------------------------------------

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
    ) -> HostProduct:
        assert self.order.capturing is None, "a product is prepared inside a capture"
        assert all(array.size for array in (a.array, b.array, out)), "cublasLt requires sizes above 0"
        assert self.memory.holds(workspace)
        first, second = (self.within(m.array.T if m.turned else m.array) for m in (a, b))
        to, more = self.within(out), None if bias is None else self.within(bias)
        return HostProduct(
            "product", lambda: products.product(first, second, to, accumulate, more, relu, tf32), self._after(relu, to)
        )

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
    ) -> HostProduct:
        assert self.order.capturing is None, "a convolution is prepared inside a capture"
        assert all(array.size for array in (x, weight, y)), "cuDNN requires sizes above 0"
        assert self.memory.holds(workspace(1000))
        images, filters, outputs = (self.within(array) for array in (x, weight, y))
        more = None if bias is None else self.within(bias)
        return convolution_of(kind, images, filters, outputs, geometry, more, relu, tf32, self._after(relu, outputs))

    def _after(self, relu: bool, out: Array) -> Callable[[], None] | None:
        """Return what a library's epilog does to a result of NaN."""
        return (lambda: np.copyto(out, 0, where=np.isnan(out))) if relu and not self.keeps_nan else None

    def _in_work(self, array: Array) -> int:
        if not array.size:
            return 0
        assert self.memory.holds(array), "a kernel's argument is not on the device"
        return self.address(array) + self.memory.delta

    def _of_copy(self, array: Array) -> int:
        if not array.size or self.memory.holds(array):
            return self._in_work(array)
        start = self.address(array)
        pinned = any(p.ctypes.data <= start and start + array.nbytes <= p.ctypes.data + p.size for p in self._pinned)
        assert pinned, "a copy from or to host memory that is not pinned"
        return start


class HostProduct:
    """A HostProduct is work of a library (device.gpu.runtime.Product)."""

    def __init__(self, name: str, run: Callable[[], None], after: Callable[[], None] | None = None):
        self._name, self._run, self._after = name, run, after

    def run(self, stream: HostStream) -> None:
        stream.enqueue(self._name, self._quiet)

    def _quiet(self) -> None:
        with np.errstate(all="ignore"):
            self._run()
            if self._after is not None:
                self._after()


def convolution_of(
    kind: str,
    x: Array,
    weight: Array,
    y: Array,
    geometry: Geometry,
    bias: Array | None,
    relu: bool,
    tf32: bool,
    after: Callable[[], None] | None = None,
) -> HostProduct:
    """Return a convolution of arrays as work reads and writes them."""
    runs: dict[str, Callable[[], None]] = {
        "forward": lambda: convolution.forward(x, weight, y, geometry, bias, relu, tf32),
        "grad_x": lambda: convolution.grad_x(x, weight, y, geometry, tf32),
        "grad_w": lambda: convolution.grad_w(x, weight, y, geometry, tf32),
    }
    return HostProduct(f"convolution {kind}", runs[kind], after)
