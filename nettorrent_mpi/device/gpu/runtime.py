"""The interface of a GPU's runtime: everything that the package asks of a GPU and of its libraries.

Two classes implement it: `cuda.Cuda` by CuPy, cublasLt and cuDNN, as thin as possible, and the host device of
tests/gpu, which runs the same kernels on a CPU with streams as lazy as CUDA allows. All other modules of device/gpu are
the same over both. An array is whatever `allocate` returns and its views (CuPy's, or NumPy's over memory that the host
cannot read): code uses its shape, dtype, strides, reshape, view and slices, and never its elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from nettorrent_mpi.device.arrays import Array, DType
from nettorrent_mpi.device.events import Event, Stream
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.plan.records import dataclass

__all__ = ["Event", "Graph", "Matrix", "Product", "Properties", "Runtime", "Stream"]


@dataclass(frozen=True)
class Properties:
    """The properties of one GPU (or part of one: MIG): `capability` is (9, 0) for sm_90; `uuid` tells GPUs and their
    parts apart, parts of one GPU have the same `bus`."""

    name: str
    uuid: str
    capability: tuple[int, int]
    processors: int  # streaming multiprocessors
    memory: int  # bytes in all
    driver: int = 0  # version, like 13000
    runtime: int = 0
    bus: str = ""


class Graph(Protocol):
    """A Graph is captured work, which can be launched again with the same arrays and arguments."""

    def launch(self, stream: Stream) -> None:
        """Launch it on a stream."""


class Matrix(NamedTuple):
    """A Matrix is an array (rows, columns) whose columns lie side by side, or some columns of one; `turned`: used as
    its transpose."""

    array: Array
    turned: bool = False


class Product(Protocol):
    """A Product is a matrix product whose arrays and algorithm are chosen. It can be captured."""

    def run(self, stream: Stream) -> None:
        """Launch it."""


class Runtime(Protocol):
    """One rank's access to one GPU."""

    properties: Properties
    names: Sequence[str]  # of the libraries that compute, with their versions

    # -- memory -----------------------------------------------------------------------------------------------------

    def allocate(self, size: int) -> Array:
        """Return `size` bytes of the GPU's memory: flat uint8, aligned to 256 bytes. Raises MemoryError."""

    def free(self, memory: Array) -> None:
        """Give memory of `allocate` back. The stream is idle, and neither it nor its views are used any more."""

    def free_memory(self) -> int:
        """Return the bytes of the GPU's memory that are free at present."""

    def pinned(self, size: int) -> Array:
        """Return `size` bytes of host memory (NumPy, uint8) that a stream can copy from and to."""

    def address(self, array: Array) -> int:
        """Return the address of the first element, on the GPU or on the host; 0 for an empty array."""

    # -- work -------------------------------------------------------------------------------------------------------

    def stream(self) -> Stream:
        """Make a stream."""

    def use(self, stream: Stream) -> None:
        """Let NumPy's functions of the GPU's arrays, which layers from outside the package call, go to this stream."""

    def launch(
        self, stream: Stream, kernel: str, real: DType, grid: tuple[int, int], block: int, arguments: Sequence[Any]
    ) -> None:
        """Launch a kernel of kernels.cu, compiled for REAL = `real` (float32, float64, bfloat16), with `grid` blocks of
        `block` threads. Arguments are converted to the types of the kernel's signature: arrays (None: a null pointer)
        to pointers, numbers to its scalars."""

    def copy(self, stream: Stream, out: Array, source: Array) -> None:
        """out <- source: as many bytes, both C-contiguous, each on the GPU or in pinned host memory."""

    def capture(self, stream: Stream, run: Callable[[], None]) -> Graph:
        """Call `run`, which launches work on this stream alone; return that work, not executed, as a graph."""

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
    ) -> Product:
        """Choose the fastest algorithm, by trial, for out <- (out +) a @ b, then plus the bias of each column, then
        max(., 0), which may be 0 for NaN (see epilogs). float32 is true float32 unless `tf32`. Waits for the stream;
        not inside a capture."""

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
        """Prepare "forward" (y <- the convolution, plus the bias, then max(., 0), which may be 0 for NaN), "grad_x"
        (x <- the gradient, y being dy) or "grad_w" (weight <- the gradient). Images are (b, height, width, channels);
        `weight` is (outputs, height, width, inputs). `workspace` gives so many bytes of scratch memory. Not inside a
        capture."""
