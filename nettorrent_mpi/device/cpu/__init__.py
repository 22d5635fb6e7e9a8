"""The CPU device computes with NumPy, compiled loops, oneDNN, and direct calls of BLAS.

Only NumPy is required: it replaces optional libraries that are missing, and all of them with `kernels: numpy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from nettorrent_mpi.device.arrays import Array, DType, Shape, Workspace, aligned
from nettorrent_mpi.device.cpu.envelope import HostEnvelope
from nettorrent_mpi.device.cpu.operations import CpuOperations
from nettorrent_mpi.device.cpu.tuning import Tuning


class HostNumbers:
    """Numbers (device.device.Numbers) in host memory."""

    def __init__(self, count: int):
        self.array: Array = np.zeros(count)

    def set(self, values: Sequence[float]) -> None:
        self.array[...] = values


class Cpu:
    """A device (device.device.Device) that computes with the fastest of the installed libraries, or with NumPy
    alone. Only with `bfloat16` it takes arrays of that type."""

    kind: Literal["cpu", "gpu"] = "cpu"
    filter_axes: tuple[int, ...] = (0, 1, 2, 3)

    def __init__(self, kernels: Literal["fastest", "numpy"] = "fastest", *, bfloat16: bool = False):
        self.tuning = Tuning(kernels)
        self.ops = CpuOperations(self.tuning)
        if bfloat16:
            from nettorrent_mpi.device.cpu.bfloat16 import BfloatOperations  # loads ml_dtypes

            self.ops = BfloatOperations(self.tuning)

    @property
    def names(self) -> list[str]:
        return self.tuning.names

    @property
    def missing(self) -> list[str]:
        return self.tuning.missing

    @property
    def multiplies_bfloat16(self) -> bool:
        library = self.tuning.onednn()
        return library is not None and library.multiplies_bfloat16

    @property
    def working_bytes(self) -> int:
        return self.ops.working_bytes

    def empty(self, shape: Shape, dtype: DType) -> Array:
        return aligned(math.prod(shape), dtype).reshape(shape)

    def zeros(self, shape: Shape, dtype: DType) -> Array:
        array = self.empty(shape, dtype)
        array.fill(0)
        return array

    def workspace(self, dtype: DType, shared: Workspace | None = None) -> Workspace:
        return Workspace(dtype, shared)

    def numbers(self, count: int) -> HostNumbers:
        return HostNumbers(count)

    def envelope(self, head: int, size: int) -> HostEnvelope:
        return HostEnvelope(head, size)

    def upload(self, out: Array, values: Array) -> None:
        np.copyto(out, values)

    def download(self, out: Array, x: Array) -> None:
        np.copyto(out, x)

    def on_host(self, x: Array) -> Array:
        return x

    def prepared(self, operation: str, *arguments: Any, **named: Any) -> list[Callable[[], object]]:
        return self.ops.prepared(operation, *arguments, **named)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        return run

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass
