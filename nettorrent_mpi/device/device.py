"""A device has memory for arrays, and the operations on them."""

from __future__ import annotations

from typing import Literal, Protocol

from nettorrent_mpi.device.arrays import Array, DType, Shape, Workspace
from nettorrent_mpi.device.ops import Ops

Kernels = Literal["fastest", "numpy"]  # the fastest of the libraries that are installed, or NumPy alone


class Device(Protocol):
    """A device is one rank's processor. Each engine makes its own; one thread at a time may use it."""

    @property
    def ops(self) -> Ops:
        """The operations, by name."""

    @property
    def names(self) -> list[str]:
        """The libraries that compute, by their names."""

    @property
    def working_bytes(self) -> int:
        """How much memory the operations have taken so far for their intermediate results."""

    def empty(self, shape: Shape, dtype: DType) -> Array:
        """An uninitialised C-contiguous array that begins on a cache line."""

    def zeros(self, shape: Shape, dtype: DType) -> Array:
        """The same, of zeros."""

    def workspace(self, dtype: DType, shared: Workspace | None = None) -> Workspace:
        """A workspace in this device's memory."""


def make_device(kind: Literal["cpu"] = "cpu", kernels: Kernels = "fastest") -> Device:
    """Make a device of this kind. Its libraries load when first needed."""
    from nettorrent_mpi.device.cpu import Cpu

    assert kind == "cpu", kind
    return Cpu(kernels)
