"""HDF5 data sets: `x` (rows, ...) uint8 or floating, `y` (rows,) integer labels or (rows, k) floating targets, and,
where there is a test set, `x_test` and `y_test` like them. The file's attribute `classes`, if any, lists class names.

Rows stay in the file: a rank reads those it needs, batch by batch. A data set that is stored contiguously and without
filters is mapped into memory (the ranks of a node share the system's page cache), any other is read through HDF5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt

from nettorrent_mpi.data.files import opening, size_of
from nettorrent_mpi.data.rows import Memory, Source
from nettorrent_mpi.plan.errors import DataError

Array: TypeAlias = npt.NDArray[Any]

REMEDY = "write the file again (`nettorrent data import` makes one from a folder of images)"


@dataclass(frozen=True)
class Hdf5Split:
    """`x` and `y`, or `x_test` and `y_test`, of a file."""

    path: Path
    x: str
    y: str
    rows: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    integer: bool

    def open_rows(self) -> Source:
        """Maps the rows, or keeps the file open for reading them. Raises DataError where the file is too short."""
        with _opened(self.path) as file:
            data = _dataset(file, self.path, self.x)
            offset = data.id.get_offset()
            if data.chunks is None and offset is not None and not data.is_virtual and not data.external:
                size = size_of(self.path, REMEDY)
                if offset + data.nbytes > size:
                    text = f"truncated: the rows of {self.x} reach to byte {offset + data.nbytes}; {REMEDY}"
                    raise DataError(text, file=str(self.path), offset=size)
                shape = (self.rows, data.nbytes // self.rows)
                return Memory(np.memmap(self.path, np.uint8, "r", offset, shape))
        return _Selection(self)

    def targets(self, classes: int | None) -> Array:
        """(rows,) int64 labels below `classes`, or (rows, k) floats where `classes` is None."""
        with _opened(self.path) as file:
            data = _dataset(file, self.path, self.y)
            try:
                values = data[...]
            except OSError as error:
                raise _unreadable(self.path, data, np.arange(self.rows), error) from error
        if classes is None:
            targets: Array = values.astype(values.dtype.newbyteorder("="), copy=False)
            return targets
        labels: Array = values.astype(np.int64)
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(wrong):
            row = int(wrong[0])
            text = f"{self.y}: label {labels[row]} of row {row} is not in 0..{classes - 1}; correct the labels"
            raise DataError(text, file=str(self.path))
        return labels


def open_hdf5(path: Path) -> tuple[Hdf5Split, Hdf5Split | None, int | None]:
    """(training split, test split or None, number of classes or None for floating targets).

    Reads metadata only, except where labels come without the attribute `classes`: their largest then tells how many
    classes there are, so they are read. Raises DataError.
    """
    with opening(path, "set data.root to an HDF5 file"):
        pass
    with _opened(path) as file:
        train = _split(file, path, "x", "y")
        test = _split(file, path, "x_test", "y_test") if "x_test" in file or "y_test" in file else None
        names = file.attrs.get("classes")
    if test is not None and (test.shape != train.shape or test.dtype != train.dtype or test.integer != train.integer):
        text = f"x_test has rows of {test.shape} {test.dtype}, x of {train.shape} {train.dtype}; make them agree"
        raise DataError(text, file=str(path))
    if not train.integer:
        return train, test, None
    if names is not None:
        return train, test, len(names)
    largest = max(int(split.targets(np.iinfo(np.int64).max).max()) for split in (train, test) if split is not None)
    return train, test, largest + 1


class _Selection:
    """Rows read through HDF5: each needed row once, in the file's order, then put where they belong."""

    def __init__(self, split: Hdf5Split):
        self._split = split
        self._file = _open(split.path)
        self._data = _dataset(self._file, split.path, split.x)

    def take(self, indices: Array, out_bR: Array) -> None:
        rows, places = np.unique(indices, return_inverse=True)
        try:
            values = self._data[rows]
        except OSError as error:
            raise _unreadable(self._split.path, self._data, rows, error) from error
        np.take(values.reshape(len(rows), -1).view(np.uint8), places, axis=0, out=out_bR, mode="clip")


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        size = size_of(path, REMEDY)
        if not h5py.is_hdf5(path):
            raise DataError(f"not an HDF5 file: no signature; {REMEDY}", file=str(path), offset=0) from error
        text = f"truncated or corrupt HDF5 file ({error}); {REMEDY}"
        raise DataError(text, file=str(path), offset=size) from error


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    file = _open(path)
    try:
        yield file
    finally:
        file.close()


def _dataset(file: h5py.File, path: Path, name: str) -> h5py.Dataset:
    try:
        data = file.get(name)
    except (OSError, RuntimeError) as error:
        raise DataError(f"data set {name} is corrupt ({error}); {REMEDY}", file=str(path)) from error
    if not isinstance(data, h5py.Dataset):
        there = ", ".join(sorted(file)) or "nothing"
        raise DataError(f"no data set {name} (there is: {there}); write x and y, and x_test and y_test", file=str(path))
    return data


def _split(file: h5py.File, path: Path, x_name: str, y_name: str) -> Hdf5Split:
    x, y = _dataset(file, path, x_name), _dataset(file, path, y_name)
    if x.dtype.kind != "f" and x.dtype != np.uint8:
        raise DataError(f"{x_name} holds {x.dtype}; write it as uint8 or floating", file=str(path))
    if x.ndim < 2 or 0 in x.shape:
        text = f"{x_name} has shape {x.shape}; write (rows, features) or (rows, height, width, channels), not empty"
        raise DataError(text, file=str(path))
    integer = y.dtype.kind in "iu"
    if not (integer and y.ndim == 1) and not (y.dtype.kind == "f" and y.ndim == 2):
        text = f"{y_name} holds {y.dtype} of shape {y.shape}; write integers (rows,) or floating targets (rows, k)"
        raise DataError(text, file=str(path))
    if len(x) != len(y):
        raise DataError(f"{x_name} has {len(x)} rows but {y_name} has {len(y)}; {REMEDY}", file=str(path))
    return Hdf5Split(path, x_name, y_name, len(x), x.shape[1:], x.dtype, integer)


def _unreadable(path: Path, data: h5py.Dataset, rows: Array, error: OSError) -> DataError:
    """The error for rows that HDF5 cannot read: names the first of them and where its chunk lies."""
    name = str(data.name).lstrip("/")
    for row in rows:
        try:
            data[row]
        except OSError:
            offset = None
            if data.chunks is not None:
                offset = data.id.get_chunk_info_by_coord((int(row), *[0] * (data.ndim - 1))).byte_offset
            return DataError(f"{name}: row {row} cannot be read ({error}); {REMEDY}", file=str(path), offset=offset)
    return DataError(f"{name} cannot be read ({error}); {REMEDY}", file=str(path))
