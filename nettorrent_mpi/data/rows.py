"""A split describes rows of a data set; its inputs gather, augment and scale a mini-batch of them.

Shape suffixes: b = the rows of one call, R = the elements of one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.data.scaling import Scaling
from nettorrent_mpi.device.arrays import Array, DType, Shape, is_bfloat16
from nettorrent_mpi.plan.errors import DataError
from nettorrent_mpi.plan.records import dataclass

BYTE = np.dtype(np.uint8)
SAMPLE = 1 << 16  # values by which rows are judged
LARGE = 100.0  # larger inputs are told of
OFF = 10.0  # a mean that is still so many deviations from 0 is

Fill: TypeAlias = Callable[[Array], None]
Allocate: TypeAlias = Callable[[Shape, "np.dtype[Any]", Fill], Array]
"""allocate(shape, dtype, fill) returns a C-contiguous array that fill(array) has filled. Whoever passes it owns the
memory: the engine's is shared by the ranks of a node, one of which fills it, and is freed with the engine's wiring."""
HasRoom: TypeAlias = Callable[[int], bool]
"""has_room(bytes) tells whether `allocate` should be asked for so much, where reading row by row is an alternative. All
ranks for which `allocate` is collective call, and get the same answer."""
Take: TypeAlias = Callable[[Array, Array], None]
"""take(indices, out_bR) copies rows as they are stored: out_bR[i] <- the bytes of row indices[i]; out_bR is uint8,
(b, bytes of a row); indices are intp."""


def private(shape: Shape, dtype: np.dtype[Any], fill: Fill) -> Array:
    """Allocate memory of this process alone: the plain `Allocate`."""
    array = np.empty(shape, dtype)
    fill(array)
    return array


def unlimited(size: int) -> bool:
    """Tell that there is room for any number of bytes: the plain `HasRoom`."""
    return True


def take_from(rows: Array) -> Take:
    """Make the `Take` of rows in memory or in a memory map: a C-contiguous array with the rows as its first
    dimension."""
    # As bytes, because take() on unaligned values, or of the other byte order, copies the whole array first.
    data = np.asarray(rows).reshape(len(rows), int(np.prod(rows.shape[1:]))).view(np.uint8)

    def take(indices: Array, out_bR: Array) -> None:
        np.take(data, indices, axis=0, out=out_bR, mode="clip")  # any other mode buffers the output

    return take


class Inputs:
    """The opened inputs of a split, which gathers mini-batches. It holds buffers for the largest mini-batch so far."""

    def __init__(self, take: Take, rows: int, shape: Shape, dtype: np.dtype[Any], scaling: Scaling):
        self.rows, self.shape, self.dtype = rows, shape, dtype
        self._take, self._scaling = take, scaling
        self._row_bytes = int(np.prod(shape)) * dtype.itemsize
        self._raw = self._augmented = np.empty((0, self._row_bytes), np.uint8)
        self._scaled = np.empty((0, 0), np.float32)

    def batch(self, indices: Array, out: Array, augment: Augment | None = None, key: int = 0) -> None:
        """Gather a mini-batch: out[i] <- row indices[i], scaled, in out's dtype; with `augment`, augmented first.

        `indices` (b,) integers in [0, rows), in any order, repeats allowed; `out` (b, *shape), C-contiguous,
        floating-point. The result for row i depends on (key, i) alone: any division of a batch gives the same rows.
        `key` comes from Sampler.augment_key. Nothing is allocated after the largest batch (except where a compressed
        HDF5 file is read batch by batch).
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
        self._take(indices, raw_bR)
        if augment is not None:
            if len(self._augmented) < count:
                self._augmented = np.empty((count, self._row_bytes), np.uint8)
            augment.apply(indices, key, raw_bR, self._augmented[:count])
            raw_bR = self._augmented[:count]
        out_bR = scaled_bR = out.reshape(count, -1)
        if is_bfloat16(out):  # scaled in float32, and rounded once
            if len(self._scaled) < count:
                self._scaled = np.empty((count, out_bR.shape[1]), np.float32)
            scaled_bR = self._scaled[:count]
        np.copyto(scaled_bR, raw_bR.view(self.dtype), casting="unsafe")
        self._scaling.apply(scaled_bR)
        if scaled_bR is not out_bR:
            np.copyto(out_bR, scaled_bR, casting="unsafe")

    @property
    def native(self) -> np.dtype[Any]:
        """The type in which `stored` gives rows: uint8, float32 or float64, the smallest that holds them."""
        if self.dtype == BYTE:
            return BYTE
        return np.dtype(np.float32 if self.dtype.itemsize <= 4 else np.float64)

    @property
    def native_bytes(self) -> int:
        """The bytes of a row of that type."""
        return math.prod(self.shape) * self.native.itemsize

    @property
    def scale(self) -> tuple[Array, Array]:
        """The factor and the offset (float64) of x * factor - offset: one number each, or one per channel."""
        return self._scaling.factor, self._scaling.offset

    def stored(self, indices: Array, out_bR: Array) -> None:
        """Copy rows, neither augmented nor scaled: out_bR[i] <- row indices[i]; out_bR (b, native_bytes) is uint8."""
        if self.native == self.dtype:
            self._take(indices, out_bR)
            return
        raw_bR = np.empty((len(indices), self._row_bytes), np.uint8)
        self._take(indices, raw_bR)
        np.copyto(out_bR.view(self.native), raw_bR.view(self.dtype), casting="same_kind")

    def doubt(self, indices: Array) -> str | None:
        """Return a warning if floating-point rows, judged by some of `indices`, are much larger than a network can be
        trained on, or if `mean` and `std` seem to be in another unit."""
        if self.dtype.kind != "f":
            return None
        indices = indices[: max(SAMPLE * self.dtype.itemsize // self._row_bytes, 1)]
        x = np.empty((len(indices), *self.shape))
        with np.errstate(all="ignore"):
            self.batch(indices, x)
            most, mean, deviation = float(np.abs(x).max()), float(x.mean()), float(x.std())
        if not math.isfinite(most):
            return None  # told where it is trained on
        if most > LARGE:
            return (
                f"data: values of x are as large as {most:.3g} (floating-point values are not scaled by themselves): "
                "scale them, to about -1..1, or give data.mean and data.std"
            )
        if np.any(self._scaling.offset) and abs(mean) > OFF * deviation > 0:
            return (
                f"data.mean: it leaves values of about {mean:.3g}, which differ by {deviation:.2g} only: "
                "are mean and std in the unit of x?"
            )
        return None

    def first_nonfinite(self, indices: Array, dtype: DType) -> Wrong | None:
        """Return the first value of these rows that is not finite when scaled in `dtype`; None if all are."""
        found = np.empty((len(indices), *self.shape), dtype)
        with np.errstate(all="ignore"):
            self.batch(indices, found)
        wrong = np.flatnonzero(~np.isfinite(found))
        if not wrong.size:
            return None
        at, *place = (int(part) for part in np.unravel_index(wrong[0], found.shape))
        stored = self._raw[: len(indices)].view(self.dtype).reshape(found.shape)
        return Wrong(int(indices[at]), tuple(place), float(stored[at, *place]))


class Wrong(NamedTuple):
    """A Wrong value is one that no training can use: its row, its place in the row, and the value as it is stored."""

    row: int
    place: tuple[int, ...]
    value: float

    def describe(self) -> str:
        """Say where the value is and what it is."""
        where = f"feature {self.place[0]}" if len(self.place) == 1 else f"element {list(self.place)}"
        finite = math.isfinite(self.value)
        return f"{where} of row {self.row} is {self.value:g}" + (", too large to be trained on" if finite else "")


@dataclass(frozen=True)
class Split:
    """A Split is the training or the test part of a data set. Nothing is read before inputs() or targets().

    `open_rows` opens the stored rows, (rows, *shape) of `dtype`; `read_targets` reads all targets, or is None if there
    are none (for predictions).
    """

    rows: int
    shape: Shape
    dtype: np.dtype[Any]
    scaling: Scaling
    open_rows: Callable[[Allocate, HasRoom], Take] = field(repr=False)
    read_targets: Callable[[], Array] | None = field(repr=False)

    @classmethod
    def of_bytes(cls, rows: int, shape: Shape, scaling: Scaling, fill: Fill, targets: Callable[[], Array]) -> Split:
        """Make a split whose rows are bytes that `fill` writes into memory, once `inputs` allocates it."""

        def open_rows(allocate: Allocate, has_room: HasRoom) -> Take:
            return take_from(allocate((rows, *shape), BYTE, fill))

        return cls(rows, shape, BYTE, scaling, open_rows, targets)

    @classmethod
    def of_array(cls, x: Array, scaling: Scaling, targets: Array | None) -> Split:
        """Make a split of rows in memory, x (rows, *shape); not copied if x is C-contiguous."""
        take = take_from(np.ascontiguousarray(x))

        def read_targets() -> Array:
            assert targets is not None
            return targets

        read = None if targets is None else read_targets
        return cls(len(x), x.shape[1:], x.dtype, scaling, lambda allocate, has_room: take, read)

    def inputs(self, allocate: Allocate = private, has_room: HasRoom = unlimited) -> Inputs:
        """Read the rows (or open them, if they are read batch by batch). Only ranks that need inputs call this.

        Raises DataError if the file proves to be corrupt or truncated.
        """
        return Inputs(self.open_rows(allocate, has_room), self.rows, self.shape, self.dtype, self.scaling)

    def targets(self) -> Array:
        """Read all targets of the split: (rows,) int64 labels, or (rows, k) floats. Every call reads anew.

        Raises DataError if the file is corrupt or a label is not one of the classes.
        """
        assert self.read_targets is not None, "these rows have no targets"
        return self.read_targets()


@dataclass(frozen=True)
class Dataset:
    """A Dataset has a training split and perhaps a test split.

    `shape` is that of one row; `classes` is None if the targets are not labels, and `class_names` if nobody names them.
    `file` is the file that messages name, if there is one; `notes` say in a line each what users should know of how
    the rows are read.
    """

    name: str
    shape: Shape
    classes: int | None
    train: Split
    test: Split | None
    file: str | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    missing: DataError | None = None  # what the files lack of a data set that is only planned with
    checksum: int = 0  # of samples of the file or the arrays: another one belongs to other data

    def require(self) -> None:
        """Raise the DataError of a data set whose files are missing."""
        if self.missing is not None:
            raise self.missing

    def numbered_as(self, names: Sequence[str]) -> Dataset:
        """Return the data set with its classes numbered as in `names`, which has all of its names."""
        assert self.class_names is not None
        place = {name: number for number, name in enumerate(names)}
        new = np.array([place[name] for name in self.class_names], np.int64)

        def renumbered(split: Split) -> Split:
            return replace(split, read_targets=lambda: new[split.targets()])

        test = None if self.test is None else renumbered(self.test)
        return replace(self, classes=len(names), class_names=tuple(names), train=renumbered(self.train), test=test)
