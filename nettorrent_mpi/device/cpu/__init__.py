"""The CPU: NumPy, compiled loops, oneDNN, and BLAS as it is.

Of these only NumPy is needed: where an optional library is missing, or `kernels: numpy` was asked for, it does all.
"""

from __future__ import annotations

import math
from typing import Literal

from nettorrent_mpi.device.arrays import Array, DType, Shape, Workspace, aligned
from nettorrent_mpi.device.cpu import choice
from nettorrent_mpi.device.cpu.flat import FlatOperations


class Cpu:
    """A device (device.device.Device) that computes with the fastest of what is installed, or with NumPy alone."""

    def __init__(self, kernels: Literal["fastest", "numpy"] = "fastest"):
        self.kernels = kernels
        self.ops = FlatOperations()

    @property
    def names(self) -> list[str]:
        return choice.names() if self.kernels == "fastest" else ["numpy"]

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
