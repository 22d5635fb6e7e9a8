"""A vector joins all that a rank owns of a replica."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.plan.blocks import Span, overlap


class Vector:
    """A Vector joins flat arrays of one type, one after the other. The same elements have the same numbers in every
    replica.

    Each element is a parameter and its memories: `parameters` are the arrays of the former, and each of `memories` (the
    optimizer's m, then its v, ...) is a sequence of arrays of the same sizes. They travel together, because they are
    right only together. The values of n elements are n parameters, then n of each memory.

    Changes may be withheld: made to the vector, but not yet to the parameters. They are in arrays like the parameters
    (`withhold`). The vector's values include them; `release` applies them to the parameters, too.
    """

    def __init__(
        self,
        device: Device,
        parameters: Sequence[Array],
        memories: Sequence[Sequence[Array]] = (),
        gaps: Sequence[Sequence[Span]] = (),
    ):
        """`gaps` are those of each of the parameters' arrays (Shards)."""
        self.device = device
        self._sizes = [part.size for part in parameters]
        self.layers = [[part for part in layer if part.size] for layer in (parameters, *memories)]
        self._withheld: list[Array] = []
        starts = accumulate(self._sizes, initial=0)
        self._gaps = [
            Span(begin + gap.start, begin + gap.stop)
            for begin, of_array in zip(starts, gaps, strict=False)
            for gap in of_array
        ]
        self.dtype = parameters[0].dtype
        self.size = sum(self._sizes)
        assert all(sum(part.size for part in layer) == self.size for layer in self.layers)

    @property
    def bytes_per_element(self) -> int:
        return len(self.layers) * self.dtype.itemsize

    def _pieces(self, where: Span, parts: Sequence[Array]) -> Iterator[tuple[Array, slice]]:
        """Yield (view of a part, its elements among `where`)."""
        start, stop = where
        begin = 0
        for part in parts:
            low, high = max(start, begin), min(stop, begin + part.size)
            if low < high:
                yield part[low - begin : high - begin], slice(low - start, high - start)
            begin += part.size

    def read(self, where: Span, out: Array) -> None:
        """Copy the values of the elements `where` to `out`."""
        for layer, into in zip(self.layers, self.of_layers(where, out), strict=True):
            for piece, place in self._pieces(where, layer):
                self.device.ops.copy(into[place], piece)
        for piece, place in self._pieces(where, self._withheld):
            self.device.ops.add(out[place], piece, out[place])

    def of_layers(self, where: Span, values: Array) -> list[Array]:
        """Return the values of the elements `where` of the parameters, then of each memory, as views."""
        return [values[i * where.size : (i + 1) * where.size] for i in range(len(self.layers))]

    def withhold(self, changes: Sequence[Array]) -> None:
        """Include these arrays of withheld changes in the values from now on; they are zeros, or there are none."""
        self._withheld = [part for part in changes if part.size]

    def release(self, where: Span) -> None:
        """Set the parameters `where` to the vector's values: nothing is withheld there any more."""
        if self._withheld:
            both = zip(self._pieces(where, self.layers[0]), self._pieces(where, self._withheld), strict=True)
            for (piece, _), (kept, _) in both:
                self.device.ops.add(piece, kept, piece)
                self.device.ops.fill(kept, 0)

    def move(self, where: Span, share: float, towards: Array, origin: Array | None = None) -> None:
        """Add share * (towards - origin) to the parameters `where`; without origin: share * (towards - their present
        values)."""
        self._move(where, self.layers[0], share, towards, origin)

    def mix(self, where: Span, share: float, towards: Array) -> None:
        """Add share * (towards - present values) to the memories `where`: unlike with differences of older values,
        positive values remain positive. `towards` holds values of parameters, too."""
        if len(self.layers) > 1:
            for layer, values in zip(self.layers[1:], self.of_layers(where, towards)[1:], strict=True):
                self._move(where, layer, share, values, None)

    def _move(self, where: Span, layer: Sequence[Array], share: float, towards: Array, origin: Array | None) -> None:
        for piece, place in self._pieces(where, layer):
            self.device.ops.move(piece, share, towards[place], None if origin is None else origin[place])

    def scale(self, where: Span, factor: float) -> None:
        """Multiply the parameters `where`."""
        for piece, _ in self._pieces(where, self.layers[0]):
            self.device.ops.scale(piece, factor)

    def difference(self, where: Span, minus: Array, out: Array) -> None:
        """Compute out <- the parameters `where`, with withheld changes, minus `minus`."""
        for piece, place in self._pieces(where, self.layers[0]):
            self.device.ops.subtract(piece, minus[place], out[place])
        for piece, place in self._pieces(where, self._withheld):
            self.device.ops.add(out[place], piece, out[place])

    def clear_gaps(self, where: Span, values: Array) -> None:
        """Set to zero what belongs to nothing in an array of the elements `where`."""
        for gap in self._gaps:
            both = overlap(gap, where)
            if both.size:
                self.device.ops.fill(values[both.start - where.start : both.stop - where.start], 0)

    def split(self, whole: Array) -> list[Array]:
        """Return `whole`, a number for each element, as views of the sizes of the parameters' arrays."""
        ends = accumulate(self._sizes)
        return [whole[end - size : end] for end, size in zip(ends, self._sizes, strict=True)]
