"""The interface of a device: memory for arrays, and the operations on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, runtime_checkable

from nettorrent_mpi.device.arrays import Array, DType, Shape, Workspace
from nettorrent_mpi.device.events import Stream
from nettorrent_mpi.device.ops import Ops

Kernels = Literal["fastest", "numpy"]  # the fastest of the installed libraries, or NumPy alone


class Numbers(Protocol):
    """Numbers change from step to step: they lie in an array (float64) on the device, where operations read them."""

    @property
    def array(self) -> Array:
        """The array on the device: the same one for good."""

    def set(self, values: Sequence[float]) -> None:
        """Let operations that are called from now on find these values."""


class Envelope(Protocol):
    """An Envelope holds one message of a fixed largest size: a head of numbers and a body of bytes.

    `whole` is host memory, from which a message is sent or into which it is received; `body` is where operations write
    and read the bytes after the head. On a CPU that is one memory. On a GPU there are two, and the methods begin copies
    beside compute, for which the host never waits: it asks `done`.
    """

    whole: Array

    @property
    def body(self) -> Array:
        """The body, for operations that are called from now on."""

    def collect(self, size: int) -> None:
        """Begin to put into `whole` what the operations called so far have written to the body: `size` bytes."""

    def deliver(self, size: int) -> None:
        """Begin to give operations the body of the message of `size` bytes that lies in `whole`."""

    def done(self) -> bool:
        """Whether what was begun is complete, so that `whole` may be sent, or written again."""

    def aside(self, size: int) -> Envelope:
        """Return a message of `size` bytes that was delivered in an envelope of its own, which is not for sending."""

    def drop(self) -> None:
        """Take note that no more operations use the body, until it is written anew or another message is delivered."""


class Device(Protocol):
    """A Device is one rank's processor. Each engine makes its own; only one thread at a time may use it.

    Its arrays' elements are for its operations alone. On a GPU operations only begin: they run in the order of their
    calls while the host goes on, until it waits in `synchronize`, `download` or `on_host`.
    """

    @property
    def kind(self) -> Literal["cpu", "gpu"]:
        """The kind of processor that works on the arrays."""

    @property
    def filter_axes(self) -> tuple[int, ...]:
        """The axes of filters (height, width, inputs, outputs) in their order in this device's memory."""

    @property
    def ops(self) -> Ops:
        """The operations, by name."""

    @property
    def names(self) -> list[str]:
        """The names of the libraries that compute."""

    @property
    def missing(self) -> list[str]:
        """The names of the optional libraries that would compute faster if they were installed."""

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether it has products of bfloat16 that are faster than those of float32."""

    @property
    def working_bytes(self) -> int:
        """The bytes of memory that the operations use for intermediate results."""

    def empty(self, shape: Shape, dtype: DType) -> Array:
        """Return an uninitialised C-contiguous array aligned to a cache line."""

    def zeros(self, shape: Shape, dtype: DType) -> Array:
        """Return an array of zeros, aligned likewise."""

    def workspace(self, dtype: DType, shared: Workspace | None = None) -> Workspace:
        """Return a workspace in this device's memory."""

    def numbers(self, count: int) -> Numbers:
        """Return `count` numbers that change from step to step, zeros at first."""

    def envelope(self, head: int, size: int) -> Envelope:
        """Return an envelope for messages with a head of `head` bytes (a multiple of 64) and bodies of up to `size`."""

    def upload(self, out: Array, values: Array) -> None:
        """out <- `values`, which lie in host memory and may be changed as soon as this returns; both of one shape."""

    def download(self, out: Array, x: Array) -> None:
        """out, in host memory, <- x, once all operations called so far are complete; both of one shape."""

    def on_host(self, x: Array) -> Array:
        """Return x in host memory, once all operations called so far are complete: x itself, or a copy."""

    def prepared(self, operation: str, *arguments: Any, **named: Any) -> list[Callable[[], object]]:
        """Return calls that together do what the operation of this name does with these arguments, each time that they
        are made; the arrays stay in place. On a CPU they look nothing up any more where that takes long."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return what does the same as `run` each time that it is called, with the same arrays and host values: on a
        GPU a graph, from the second call on."""

    def synchronize(self) -> None:
        """Wait until all operations called so far are complete."""

    def close(self) -> None:
        """Give all memory back: no array of this device is used any more."""


@runtime_checkable
class StreamDevice(Device, Protocol):
    """A StreamDevice is a device that works in streams: a GPU. Operations go to its present stream."""

    @property
    def uuid(self) -> str:
        """The identity of this GPU, or part of one, which no other has."""

    @property
    def bus(self) -> str:
        """The PCI address of this GPU on its node, which all parts of it share; "" if unknown."""

    @property
    def stream(self) -> Stream:
        """The stream that operations go to at present."""

    @property
    def held_bytes(self) -> int:
        """The bytes of all arrays that were ever made: the device gives none back before it is closed."""

    @property
    def compute(self) -> Stream:
        """The stream of operations, unless another one is chosen."""

    def make_stream(self) -> Stream:
        """Make one more stream. `Device.synchronize` waits for all of them."""

    def wait_by(self, wait: Callable[[Sequence[Stream]], None] | None) -> None:
        """Let `synchronize` wait for streams by this function, which may give up; None: by CUDA's."""

    def reserve(self, size: int) -> None:
        """Allocate memory for arrays of `size` bytes in one piece, before any is made. Raises DeviceMemoryError."""

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        """Let operations inside the `with` block go to this stream."""


def make_device(
    kind: Literal["cpu", "gpu"] = "cpu",
    kernels: Kernels = "fastest",
    *,
    index: int = 0,
    tf32: bool = False,
    bfloat16: bool = False,
) -> Device:
    """Make a device of this kind: a CPU with these kernels, which takes arrays of `bfloat16` only where that is told;
    or the GPU of this number among those that the process sees, whose float32 products may be rounded to TF32 with
    `tf32`. Its libraries load when first needed."""
    if kind == "gpu":
        from nettorrent_mpi.device import gpu

        return gpu.Gpu(gpu.open_runtime(index), tf32)
    from nettorrent_mpi.device.cpu import Cpu

    return Cpu(kernels, bfloat16=bfloat16)


def planned_gpu(tf32: bool = False) -> StreamDevice:
    """Make a GPU that only counts the memory that it takes: no GPU is needed, and its arrays have no elements."""
    from nettorrent_mpi.device import gpu
    from nettorrent_mpi.device.gpu.planned import PlannedRuntime

    return gpu.Gpu(PlannedRuntime(), tf32)
