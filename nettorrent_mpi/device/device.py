"""The interface of a device: memory for arrays, and the operations on them."""

from __future__ import annotations

from typing import Literal, Protocol

from nettorrent_mpi.device.arrays import Array, DType, Shape, Workspace
from nettorrent_mpi.device.ops import Ops

Kernels = Literal["fastest", "numpy"]  # the fastest of the installed libraries, or NumPy alone


class Device(Protocol):
    """A Device is one rank's processor. Each engine makes its own; only one thread at a time may use it."""

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
    def working_bytes(self) -> int:
        """The bytes of memory that the operations use for intermediate results."""

    def empty(self, shape: Shape, dtype: DType) -> Array:
        """Return an uninitialised C-contiguous array aligned to a cache line."""

    def zeros(self, shape: Shape, dtype: DType) -> Array:
        """Return an array of zeros, aligned likewise."""

    def workspace(self, dtype: DType, shared: Workspace | None = None) -> Workspace:
        """Return a workspace in this device's memory."""


def make_device(kind: Literal["cpu"] = "cpu", kernels: Kernels = "fastest") -> Device:
    """Make a device of this kind. Its libraries load when first needed."""
    from nettorrent_mpi.device.cpu import Cpu

    assert kind == "cpu", kind
    return Cpu(kernels)
