"""The rows of a data set: where they lie, and how a mini-batch of them is gathered, scaled and augmented.

Shape suffixes: b = the rows of one call, R = the elements of one row, HWC = height, width, channels of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.plan.errors import ConfigError

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]
Fill: TypeAlias = Callable[[Array], None]
Allocate: TypeAlias = Callable[[Shape, "np.dtype[Any]", Fill], Array]
"""allocate(shape, dtype, fill) returns an array that fill(array) has filled: C-contiguous. The engine passes one whose
memory is shared by the ranks of a node and which lets one of them fill it."""


def private(shape: Shape, dtype: np.dtype[Any], fill: Fill) -> Array:
    """The plain allocation: memory of this process alone."""
    array = np.empty(shape, dtype)
    fill(array)
    return array


class Source(Protocol):
    """Where rows come from, as they are stored."""

    def take(self, indices: Array, out_bR: Array) -> None:
        """out_bR[i] <- the bytes of row indices[i]; out_bR is uint8, (b, bytes of a row); indices are intp."""


class Memory:
    """Rows in memory or in a memory map: `rows` is a C-contiguous array, its first dimension the rows."""

    def __init__(self, rows: Array):
        # As bytes, because take() on values that are unaligned or of the other byte order copies the whole array first.
        self._bytes = np.asarray(rows).reshape(len(rows), -1).view(np.uint8)

    def take(self, indices: Array, out_bR: Array) -> None:
        np.take(self._bytes, indices, axis=0, out=out_bR, mode="clip")  # any other mode buffers the output


class Scaling:
    """x <- (x * unit - mean) / std; `mean` and `std` are one number, or one per channel (last dimension of a row)."""

    def __init__(
        self,
        shape: Shape,
        unit: float = 1.0,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ):
        self._size = int(np.prod(shape))
        means = _per_channel("mean", mean, 0.0, shape)
        stds = _per_channel("std", std, 1.0, shape)
        if not np.all(stds > 0.0):
            raise ConfigError(f"standard deviations must be above 0, not {std}", key="data.std")
        self.factor, self.offset = unit / stds, means / stds  # (channels,): x <- x * factor - offset
        self._cache: dict[np.dtype[Any], tuple[Array | None, Array | None]] = {}

    def apply(self, x_bR: Array) -> None:
        """Scales in place; x_bR is (b, R), of a floating type."""
        terms = self._cache.get(x_bR.dtype)
        if terms is None:
            terms = self._cache[x_bR.dtype] = (
                self._term(self.factor, 1.0, x_bR.dtype),
                self._term(self.offset, 0.0, x_bR.dtype),
            )
        factor, offset = terms
        if factor is not None:
            np.multiply(x_bR, factor, out=x_bR)
        if offset is not None:
            np.subtract(x_bR, offset, out=x_bR)

    def _term(self, values: Array, neutral: float, dtype: np.dtype[Any]) -> Array | None:
        if np.all(values == values[0]):
            return None if values[0] == neutral else np.asarray(values[0], dtype)
        # One value per element: broadcasting along a last dimension of three would run three elements at a time.
        return np.tile(values, self._size // len(values)).astype(dtype)


def _per_channel(name: str, value: float | Sequence[float] | None, default: float, shape: Shape) -> Array:
    values = np.atleast_1d(np.asarray(default if value is None else value, np.float64))
    if values.ndim != 1 or len(values) not in (1, shape[-1]):
        text = f"{len(values)} values for rows of shape {shape}: give one number, or {shape[-1]}, one for each channel"
        raise ConfigError(text, key=f"data.{name}")
    if not np.all(np.isfinite(values)):
        raise ConfigError(f"must be finite, not {value}", key=f"data.{name}")
    return np.broadcast_to(values, (shape[-1],)).copy()


class Inputs:
    """The rows of a split, ready for gathering. Holds, beside the rows, buffers for the largest batch asked for yet."""

    def __init__(self, source: Source, rows: int, shape: Shape, dtype: np.dtype[Any], scaling: Scaling):
        self.rows, self.shape, self.dtype = rows, shape, dtype
        self._source, self._scaling = source, scaling
        self._row_bytes = int(np.prod(shape)) * dtype.itemsize
        self._raw = self._augmented = np.empty((0, self._row_bytes), np.uint8)

    def batch(self, indices: Array, out: Array, augment: Augment | None = None, key: int = 0) -> None:
        """out[i] <- row indices[i], scaled, in out's dtype; augmented first where `augment` is given.

        `indices` (b,) integers in [0, rows), in any order, repeats allowed; `out` (b, *shape), C-contiguous, floating.
        What row i becomes depends on (key, i) alone: any division of a batch gives the same rows. `key` comes from
        Sampler.augment_key. Nothing is allocated once the largest batch was seen (except by compressed or chunked HDF5
        files, and then in their library).
        """
        count = len(indices)
        assert out.shape == (count, *self.shape), (out.shape, count, self.shape)
        assert out.flags.c_contiguous
        if count == 0:
            return
        assert indices.min() >= 0, indices
        assert indices.max() < self.rows, (self.rows, indices)
        if len(self._raw) < count:
            self._raw = np.empty((count, self._row_bytes), np.uint8)
        raw_bR = self._raw[:count]
        self._source.take(indices, raw_bR)
        if augment is not None:
            if len(self._augmented) < count:
                self._augmented = np.empty((count, self._row_bytes), np.uint8)
            augment.apply(indices, key, raw_bR, self._augmented[:count])
            raw_bR = self._augmented[:count]
        out_bR = out.reshape(count, -1)
        np.copyto(out_bR, raw_bR.view(self.dtype), casting="unsafe")
        self._scaling.apply(out_bR)


@dataclass(frozen=True)
class Split:
    """The training or the test part of a data set. Cheap: nothing is read before inputs() or targets()."""

    rows: int
    shape: Shape
    dtype: np.dtype[Any]
    scaling: Scaling
    open_rows: Callable[[Allocate], Source] = field(repr=False)
    read_targets: Callable[[], Array] = field(repr=False)

    def inputs(self, allocate: Allocate = private) -> Inputs:
        """Reads the rows (or opens them, where they are read batch by batch). Only ranks that need inputs call this.

        Raises DataError where the file turns out to be corrupt or truncated.
        """
        return Inputs(self.open_rows(allocate), self.rows, self.shape, self.dtype, self.scaling)

    def targets(self) -> Array:
        """All targets of the split: (rows,) int64 labels, or (rows, k) floats. Read anew by each call.

        Raises DataError where the file is corrupt or a label lies outside its classes.
        """
        return self.read_targets()
