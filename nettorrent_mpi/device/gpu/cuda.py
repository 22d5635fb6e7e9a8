"""A GPU's runtime by CuPy. No machine without a GPU can execute this module: it translates, and decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import cupy
import numpy as np

from nettorrent_mpi.device.arrays import Array, DType
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.device.gpu import source
from nettorrent_mpi.device.gpu.cublaslt import CublasLt, LtProduct
from nettorrent_mpi.device.gpu.runtime import Matrix, Properties

# Of https://docs.nvidia.com/cuda/cuda-runtime-api/
ERROR_MEMORY = 2  # cudaErrorMemoryAllocation
ERROR_NOT_READY = 600  # cudaErrorNotReady
COPY_DEFAULT = 4  # cudaMemcpyDefault: the addresses tell where memory lies


class CudaEvent:
    """An Event (see runtime)."""

    def __init__(self, stream: Any):
        self.event = cupy.cuda.Event(disable_timing=True)
        self.event.record(stream)

    def done(self) -> bool:
        code = cupy.cuda.runtime.eventQuery(self.event.ptr)
        if code not in (0, ERROR_NOT_READY):  # the GPU has failed, and will never come there
            self.event.synchronize()  # raises the error
        return bool(code == 0)

    def synchronize(self) -> None:
        self.event.synchronize()


class CudaStream:
    """A Stream (see runtime) that does not wait for CUDA's default stream. `ptr` is its handle by CuPy's name."""

    def __init__(self) -> None:
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.handle = self.ptr = int(self.stream.ptr)

    def record(self) -> CudaEvent:
        return CudaEvent(self.stream)

    def wait(self, event: CudaEvent) -> None:
        self.stream.wait_event(event.event)

    def synchronize(self) -> None:
        self.stream.synchronize()


class CudaGraph:
    """A Graph (see runtime)."""

    def __init__(self, graph: Any):
        self._graph = graph

    def launch(self, stream: CudaStream) -> None:
        self._graph.launch(stream.stream)


class Cuda:
    """A Runtime (see runtime) of the GPU of this number among those that the process sees, which becomes the current
    one of this thread."""

    def __init__(self, index: int):
        cupy.cuda.Device(index).use()
        api = cupy.cuda.runtime
        found = api.getDeviceProperties(index)
        # CuPy cuts the UUID at its first zero byte; together with the bus it still tells GPUs and their parts apart.
        bus = api.deviceGetPCIBusId(index)
        self.properties = Properties(
            found["name"].decode(),
            f"{bus} {found['uuid'][:16].hex()}",
            (found["major"], found["minor"]),
            found["multiProcessorCount"],
            found["totalGlobalMem"],
            api.driverGetVersion(),
            api.runtimeGetVersion(),
            bus,
        )
        self.names = [f"CuPy {cupy.__version__}", f"CUDA {self.properties.runtime // 1000}"]
        self._index = index
        self._products = CublasLt(self.address, self.properties.name)
        self._convolutions: Any = None  # cuDNN, which loads with the first convolution
        self._functions: dict[tuple[str, DType], tuple[Any, list[Callable[[Any], Any]]]] = {}

    def allocate(self, size: int) -> Array:
        try:
            address = cupy.cuda.runtime.malloc(max(size, 1))
        except cupy.cuda.runtime.CUDARuntimeError as error:
            if error.status == ERROR_MEMORY:
                raise MemoryError(str(error)) from None
            raise
        memory = cupy.cuda.UnownedMemory(address, size, None, self._index)
        array: Array = cupy.ndarray((size,), np.uint8, cupy.cuda.MemoryPointer(memory, 0))
        return array

    def free(self, memory: Array) -> None:
        cupy.cuda.runtime.free(memory.data.ptr)  # type: ignore[attr-defined]

    def free_memory(self) -> int:
        return int(cupy.cuda.runtime.memGetInfo()[0])

    def pinned(self, size: int) -> Array:
        return np.frombuffer(cupy.cuda.alloc_pinned_memory(max(size, 1)), np.uint8, size)

    def address(self, array: Array) -> int:
        if not array.size:
            return 0
        return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)

    def stream(self) -> CudaStream:
        return CudaStream()

    def use(self, stream: CudaStream) -> None:
        stream.stream.use()

    def launch(
        self, stream: CudaStream, kernel: str, real: DType, grid: tuple[int, int], block: int, arguments: Sequence[Any]
    ) -> None:
        known = self._functions.get((kernel, real))
        if known is None:
            known = self._functions[kernel, real] = self._function(kernel, real)
        function, types = known
        values = source.signatures()[kernel].values(real, arguments, self.address)
        typed = [make(value) for make, value in zip(types, values, strict=True)]
        function(grid, (block,), typed, stream=stream)

    def _function(self, kernel: str, real: DType) -> tuple[Any, list[Callable[[Any], Any]]]:
        module = cupy.RawModule(code=source.text(), options=source.options(real))
        parameters = source.signatures()[kernel].parameters
        types: list[Callable[[Any], Any]] = [np.uint64 if p.pointer else np.dtype(p.dtype).type for p in parameters]
        return module.get_function(kernel).kernel, types

    def copy(self, stream: CudaStream, out: Array, source: Array) -> None:
        if out.nbytes:
            to, origin = self.address(out), self.address(source)
            cupy.cuda.runtime.memcpyAsync(to, origin, out.nbytes, COPY_DEFAULT, stream.ptr)

    def capture(self, stream: CudaStream, run: Callable[[], None]) -> CudaGraph:
        stream.stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
        try:
            run()
        except BaseException:
            with suppress(cupy.cuda.runtime.CUDARuntimeError):  # the capture may be over already
                stream.stream.end_capture()
            raise
        return CudaGraph(stream.stream.end_capture())

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
    ) -> LtProduct:
        return self._products.product(a, b, out, accumulate, bias, relu, tf32, workspace)

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
    ) -> Any:
        if self._convolutions is None:
            from nettorrent_mpi.device.gpu.cudnn import Cudnn

            self._convolutions = Cudnn(self.address)
        return self._convolutions.convolution(kind, x, weight, y, geometry, bias, relu, tf32, workspace)
