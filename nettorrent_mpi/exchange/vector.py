"""What one rank owns of a replica, addressed as one long vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nettorrent_mpi.device.arrays import Array, aligned
from nettorrent_mpi.plan.blocks import Span

BLOCK = 1 << 15  # elements worked on together: they stay in the second-level cache


class Vector:
    """Flat arrays of one type, one after the other. The same elements have the same numbers in every replica.

    Each element is a parameter and what is remembered about it: `parameters` are the arrays of the former, and each of
    `memories` (the optimizer's m, then its v, ...) is a sequence of arrays of the same sizes. They come and go
    together, because they are right only together. The values of n elements are n parameters, then n of each memory.

    Changes may be withheld: made to the vector, but not yet to the parameters. They are in arrays like the parameters
    (`withhold`). The vector's values have them; `release` makes them to the parameters, too.
    """

    def __init__(self, parameters: Sequence[Array], memories: Sequence[Sequence[Array]] = ()):
        self.layers = [[part for part in layer if part.size] for layer in (parameters, *memories)]
        self._withheld: list[Array] = []
        self.dtype = parameters[0].dtype
        self.size = sum(part.size for part in parameters)
        assert all(sum(part.size for part in layer) == self.size for layer in self.layers)
        self._work = aligned(BLOCK, self.dtype)

    @property
    def bytes_per_element(self) -> int:
        return len(self.layers) * self.dtype.itemsize

    def _pieces(self, where: Span, parts: Sequence[Array]) -> Iterator[tuple[Array, slice]]:
        """(view of a part, which of the elements `where` these are), in blocks."""
        start, stop = where
        begin = 0
        for part in parts:
            low, high = max(start, begin), min(stop, begin + part.size)
            for at in range(low, high, BLOCK):
                end = min(at + BLOCK, high)
                yield part[at - begin : end - begin], slice(at - start, end - start)
            begin += part.size

    def read(self, where: Span, out: Array) -> None:
        """out <- the values of the elements `where`."""
        for layer, into in enumerate(np.split(out, len(self.layers))):
            for piece, place in self._pieces(where, self.layers[layer]):
                np.copyto(into[place], piece)
        for piece, place in self._pieces(where, self._withheld):
            np.add(out[place], piece, out=out[place])

    def withhold(self, changes: Sequence[Array]) -> None:
        """Changes are withheld in these arrays from now on; in none of an empty sequence. Nothing may be withheld."""
        self._withheld = [part for part in changes if part.size]

    def release(self, where: Span) -> None:
        """The parameters `where` <- the vector's values: nothing is withheld there any more."""
        if self._withheld:
            both = zip(self._pieces(where, self.layers[0]), self._pieces(where, self._withheld), strict=True)
            for (piece, _), (kept, _) in both:
                np.add(piece, kept, out=piece)
                kept.fill(0)

    def move(self, where: Span, share: float, towards: Array, origin: Array | None = None) -> None:
        """Add share * (towards - origin) to the parameters `where`; without origin: to what they are now."""
        self._move(where, 0, share, towards, origin)

    def mix(self, where: Span, share: float, towards: Array) -> None:
        """Add share * (towards - what they are now) to the memories `where`: unlike by differences of older values,
        what was positive remains so. `towards` holds values of parameters, too."""
        if len(self.layers) > 1:
            for layer, values in enumerate(np.split(towards, len(self.layers))[1:], start=1):
                self._move(where, layer, share, values, None)

    def _move(self, where: Span, layer: int, share: float, towards: Array, origin: Array | None) -> None:
        for piece, place in self._pieces(where, self.layers[layer]):
            work = self._work[: piece.size]
            np.subtract(towards[place], piece if origin is None else origin[place], out=work)
            np.multiply(work, share, out=work)
            np.add(piece, work, out=piece)

    def scale(self, where: Span, factor: float) -> None:
        """Multiply the parameters `where`."""
        for piece, _ in self._pieces(where, self.layers[0]):
            np.multiply(piece, factor, out=piece)

    def difference(self, where: Span, minus: Array, out: Array) -> None:
        """out <- the parameters `where`, with what is withheld, minus `minus`."""
        for piece, place in self._pieces(where, self.layers[0]):
            np.subtract(piece, minus[place], out=out[place])
        for piece, place in self._pieces(where, self._withheld):
            np.add(out[place], piece, out=out[place])
