"""What one rank owns of a replica, addressed as one long vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nettorrent_mpi.nn.backend import Array, aligned
from nettorrent_mpi.plan.blocks import Span

BLOCK = 1 << 15  # elements worked on together: they stay in the second-level cache


class Vector:
    """Flat arrays of one type, one after the other. The same elements have the same numbers in every replica."""

    def __init__(self, parts: Sequence[Array]):
        self.parts = [part for part in parts if part.size]
        self.dtype = parts[0].dtype
        self.size = sum(part.size for part in self.parts)
        self._work = aligned(BLOCK, self.dtype)

    def _pieces(self, where: Span) -> Iterator[tuple[Array, slice]]:
        """(view of a part, which of the elements `where` these are), in blocks."""
        start, stop = where
        begin = 0
        for part in self.parts:
            low, high = max(start, begin), min(stop, begin + part.size)
            for at in range(low, high, BLOCK):
                end = min(at + BLOCK, high)
                yield part[at - begin : end - begin], slice(at - start, end - start)
            begin += part.size

    def read(self, where: Span, out: Array) -> None:
        """out <- the elements `where`."""
        for piece, place in self._pieces(where):
            np.copyto(out[place], piece)

    def write(self, where: Span, values: Array) -> None:
        """The elements start..stop-1 <- values."""
        for piece, place in self._pieces(where):
            np.copyto(piece, values[place])

    def move(self, where: Span, share: float, towards: Array, origin: Array | None = None) -> None:
        """Add share * (towards - origin) to the elements `where`; without origin: to what they are now."""
        for piece, place in self._pieces(where):
            work = self._work[: piece.size]
            np.subtract(towards[place], piece if origin is None else origin[place], out=work)
            np.multiply(work, share, out=work)
            np.add(piece, work, out=piece)

    def scale(self, where: Span, factor: float) -> None:
        """Multiply the elements `where`."""
        for piece, _ in self._pieces(where):
            np.multiply(piece, factor, out=piece)

    def difference(self, where: Span, minus: Array, out: Array) -> None:
        """out <- the elements `where` minus `minus`."""
        for piece, place in self._pieces(where):
            np.subtract(piece, minus[place], out=out[place])
