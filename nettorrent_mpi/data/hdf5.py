"""An HDF5 data set holds `x` (rows, ...) uint8 or floating, `y` (rows,) integer labels or (rows, k) floating targets,
and, with a test set, `x_test` and `y_test` like them. The file's attribute `classes`, if any, lists class names.

Rows stay in the file: a rank reads those it needs, batch by batch. A data set that is stored contiguously and without
filters is mapped into memory (the ranks of a node share the system's page cache), any other is read through HDF5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from nettorrent_mpi.data.files import opening, size_of
from nettorrent_mpi.data.rows import Take, as_targets, check_inputs, check_targets, take_from
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.errors import DataError

REMEDY = "write the file again (`nettorrent data import` makes one from a folder of images)"


@dataclass(frozen=True)
class Hdf5Split:
    """Describes `x` and `y`, or `x_test` and `y_test`, of a file."""

    path: Path
    x: str
    y: str
    rows: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    integer: bool

    def open_rows(self) -> Take:
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
                return take_from(np.memmap(self.path, np.uint8, "r", offset, shape))
        return _take_through_hdf5(self)

    def targets(self, classes: int | None) -> Array:
        """Reads all targets: (rows,) int64 labels below `classes`, or (rows, k) floats where `classes` is None."""
        with _opened(self.path) as file:
            data = _dataset(file, self.path, self.y)
            try:
                values = data[...]
            except OSError as error:
                raise _unreadable(self.path, data, np.arange(self.rows), error) from error
        return as_targets(values, classes, self.y, str(self.path))


def open_hdf5(path: Path) -> tuple[Hdf5Split, Hdf5Split | None, int | None]:
    """Returns (training split, test split or None, number of classes or None for floating targets).

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


def _take_through_hdf5(split: Hdf5Split) -> Take:
    """Makes the `Take` that reads rows through HDF5: each needed row once, in the file's order, then put in place."""
    file = _open(split.path)
    data = _dataset(file, split.path, split.x)

    def take(indices: Array, out_bR: Array) -> None:
        assert file, "closed"  # `take` holds the file: HDF5 closes it, and what is in it, with its last reference
        rows, places = np.unique(indices, return_inverse=True)
        try:
            values = data[rows]
        except OSError as error:
            raise _unreadable(split.path, data, rows, error) from error
        np.take(values.reshape(len(rows), -1).view(np.uint8), places, axis=0, out=out_bR, mode="clip")

    return take


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
    check_inputs(x, x_name, str(path))
    check_targets(y, y_name, str(path))
    if len(x) != len(y):
        raise DataError(f"{x_name} has {len(x)} rows but {y_name} has {len(y)}; {REMEDY}", file=str(path))
    return Hdf5Split(path, x_name, y_name, len(x), x.shape[1:], x.dtype, y.dtype.kind in "iu")


def _unreadable(path: Path, data: h5py.Dataset, rows: Array, error: OSError) -> DataError:
    """Makes the error for rows that HDF5 cannot read: it names the first of them and where its chunk lies."""
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
