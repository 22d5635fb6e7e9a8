"""The GPU device computes with the kernels of kernels.cu, cublasLt and cuDNN, on arrays that stay on the GPU."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal, cast

import numpy as np

from nettorrent_mpi.device.arrays import Array, DType, Shape, Workspace, as_dtype
from nettorrent_mpi.device.gpu.arena import Arena
from nettorrent_mpi.device.gpu.codecs import GpuCodecOperations
from nettorrent_mpi.device.gpu.convolution import GpuConvolutionOperations
from nettorrent_mpi.device.gpu.criteria import GpuCriterionOperations
from nettorrent_mpi.device.gpu.elementwise import GpuElementwiseOperations
from nettorrent_mpi.device.gpu.envelopes import Envelopes, GpuEnvelope
from nettorrent_mpi.device.gpu.flat import GpuFlatOperations
from nettorrent_mpi.device.gpu.gather import GpuGatherOperations
from nettorrent_mpi.device.gpu.host_copies import HostCopies
from nettorrent_mpi.device.gpu.masks import GpuMaskOperations
from nettorrent_mpi.device.gpu.norms import GpuNormOperations
from nettorrent_mpi.device.gpu.numbers import DeviceNumbers
from nettorrent_mpi.device.gpu.pinned import PinnedRing
from nettorrent_mpi.device.gpu.pools import GpuPoolOperations
from nettorrent_mpi.device.gpu.products import GpuProductOperations
from nettorrent_mpi.device.gpu.runtime import Graph, Runtime, Stream
from nettorrent_mpi.device.gpu.updates import GpuUpdateOperations

WARM_UP = 2  # calls of a run before it is captured


class GpuOperations(
    GpuFlatOperations,
    GpuCodecOperations,
    GpuProductOperations,
    GpuConvolutionOperations,
    GpuElementwiseOperations,
    GpuMaskOperations,
    GpuNormOperations,
    GpuPoolOperations,
    GpuCriterionOperations,
    GpuUpdateOperations,
    GpuGatherOperations,
):
    """All operations (device.ops.Ops) of a GPU; each is in the module of its subject."""


class Gpu:
    """A device (device.device.Device) that computes on one GPU.

    Operations go to `stream`, which is `compute` except inside `on`. `copies` is for transfers beside the computation;
    what lies between two streams is ordered by events only.
    """

    kind: Literal["cpu", "gpu"] = "gpu"
    filter_axes: tuple[int, ...] = (3, 0, 1, 2)

    def __init__(self, runtime: Runtime, tf32: bool = False):
        self.runtime, self.tf32 = runtime, tf32
        self.arena = Arena(runtime)
        self._streams: list[Stream] = []
        self._wait: Callable[[Sequence[Stream]], None] | None = None
        self.compute, self.copies = self.make_stream(), self.make_stream()
        self.stream = self.compute
        self._host_copies = HostCopies(runtime, self.compute)
        self._rings: dict[str, PinnedRing] = {}
        self._constants: dict[tuple[str, bytes], Array] = {}
        self._envelopes: Envelopes | None = None
        self.ops = GpuOperations(self)

    @property
    def names(self) -> list[str]:
        return list(self.runtime.names)

    @property
    def missing(self) -> list[str]:
        return []

    @property
    def multiplies_bfloat16(self) -> bool:
        return True

    @property
    def working_bytes(self) -> int:
        return self.ops.working_bytes

    @property
    def held_bytes(self) -> int:
        return self.arena.used

    @property
    def uuid(self) -> str:
        return self.runtime.properties.uuid

    @property
    def bus(self) -> str:
        return self.runtime.properties.bus

    def make_stream(self) -> Stream:
        """Return a further stream, for which `synchronize` waits, too."""
        self._streams.append(self.runtime.stream())
        return self._streams[-1]

    def reserve(self, size: int) -> None:
        self.arena.reserve(size)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Let operations inside the `with` block go to this stream."""
        before, self.stream = self.stream, stream
        self.runtime.use(stream)
        try:
            yield
        finally:
            self.stream = before
            self.runtime.use(before)

    def empty(self, shape: Shape, dtype: DType) -> Array:
        dtype = as_dtype(dtype)
        return self.arena.take(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def zeros(self, shape: Shape, dtype: DType) -> Array:
        array = self.empty(shape, dtype)
        self.synchronize()
        self._host_copies.clear(array)
        return array

    def workspace(self, dtype: DType, shared: Workspace | None = None) -> Workspace:
        return Workspace(dtype, shared, lambda size, kind: self.empty((size,), kind))

    def numbers(self, count: int) -> DeviceNumbers:
        return DeviceNumbers(self.runtime, self.compute, self.zeros((count,), np.float64))

    def envelope(self, head: int, size: int) -> GpuEnvelope:
        if self._envelopes is None:
            self._envelopes = Envelopes(self)
        return self._envelopes.make(head, size)

    def upload(self, out: Array, values: Array) -> None:
        self.synchronize()
        self._host_copies.upload(out, values)

    def download(self, out: Array, x: Array) -> None:
        self.synchronize()
        self._host_copies.download(out, x)

    def on_host(self, x: Array) -> Array:
        array = np.empty(x.shape, x.dtype)
        self.download(array, x)
        return array

    def upload_ring(self, count: int, size: int, name: str = "") -> PinnedRing:
        """Make a ring of buffers for uploads ahead (device.feeding.UploadRing). One with a name is the same as before
        where that is large enough, and its former user is done with it."""
        ring = self._rings.get(name)
        if ring is None or ring.memory.shape[0] < count or ring.memory.shape[1] < size:
            ring = PinnedRing(self, self.copies, count, size)
        if name:
            self._rings[name] = ring
        return ring

    def constant(self, values: Array) -> Array:
        """Return these values on the GPU: the same array for the same values, which nothing may change."""
        key = values.dtype.name, values.tobytes()
        if key not in self._constants:
            self._constants[key] = self.empty(values.shape, values.dtype)
            self.upload(self._constants[key], values)
        return self._constants[key]

    def has_room(self, size: int) -> bool:
        """Whether data of so many bytes may lie on the GPU: in half of what is free of its memory."""
        return 2 * size <= self.runtime.free_memory()

    def prepared(self, operation: str, *arguments: Any, **named: Any) -> list[Callable[[], object]]:
        return [partial(getattr(self.ops, operation), *arguments, **named)]

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        return Captured(self, run)

    def wait_by(self, wait: Callable[[Sequence[Stream]], None] | None) -> None:
        self._wait = wait

    def synchronize(self) -> None:
        if self._wait is not None:
            self._wait(self._streams)
            return
        for stream in self._streams:
            stream.synchronize()

    def close(self) -> None:
        self.synchronize()
        self.arena.close()


class Captured:
    """A Captured run of work is executed at its first two calls: in the first all memory is allocated, while scratch
    memory still grows, and in the second all algorithms are chosen for the arrays that remain. It is captured and
    launched at the third, and launched as one graph at all later ones."""

    def __init__(self, device: Gpu, run: Callable[[], None]):
        self._device, self._run = device, run
        self._graph: Graph | None = None
        self._executed = 0

    def __call__(self) -> None:
        if self._executed < WARM_UP:
            self._run()
            self._executed += 1
            return
        if self._graph is None:
            self._graph = self._device.runtime.capture(self._device.stream, self._run)
        self._graph.launch(self._device.stream)


def open_cuda(index: int) -> Runtime:
    """Open the GPU of this number through CuPy, which keeps compiled kernels in a folder; where it cannot, each process
    compiles its own."""
    folder = os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")
    with suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK):
        os.environ.setdefault("CUPY_CACHE_IN_MEMORY", "1")
    from nettorrent_mpi.device.gpu.cuda import Cuda

    return cast("Runtime", Cuda(index))


open_runtime: Callable[[int], Runtime] = open_cuda  # the only way to a GPU; tests put a device of the host here
