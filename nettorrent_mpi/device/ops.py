"""The operations on arrays, by name: every device has all of them, and nobody above it computes in another way.

`out` and what an operation is said to change are written in place; nothing is allocated in the steady state. Arrays are
C-contiguous unless said otherwise.
"""

from __future__ import annotations

from typing import Protocol

from nettorrent_mpi.device.arrays import Array


class FlatOps(Protocol):
    """Operations on flat arrays of one type and length: parameters, gradients, optimizer states, messages."""

    def copy(self, out: Array, x: Array) -> None:
        """out <- x, which may be of another type, or a strided view; x is broadcast."""

    def fill(self, out: Array, value: float) -> None:
        """Every element of out <- value."""

    def add(self, a: Array, b: Array, out: Array) -> None:
        """out <- a + b (of any shapes that broadcast)."""

    def subtract(self, a: Array, b: Array, out: Array) -> None:
        """out <- a - b (of any shapes that broadcast)."""

    def multiply(self, a: Array, b: Array, out: Array) -> None:
        """out <- a * b (of any shapes that broadcast)."""

    def scale(self, x: Array, factor: float) -> None:
        """x <- factor * x."""

    def divide(self, x: Array, divisor: float) -> None:
        """x <- x / divisor, rounded once."""

    def move(self, x: Array, share: float, towards: Array, origin: Array | None = None) -> None:
        """x <- x + share * (towards - origin); without `origin`: x <- x + share * (towards - x)."""

    def withhold(self, x: Array, before: Array, kept: Array, part: float) -> None:
        """x has changed since it was `before`: the `part` of the change is taken back and added to `kept`."""

    def sum_of_squares(self, x: Array) -> float:
        """The sum of the squares, computed in float64 whatever the type."""

    def all_finite(self, x: Array) -> bool:
        """Tells whether no element is infinite or NaN."""

    def count_nonfinite(self, y: Array, count: Array) -> None:
        """count[0] <- count[0] + 1 unless the sum of y (of any shape) is finite."""


class Ops(FlatOps, Protocol):
    """All operations of a device."""
