"""An HDF5 data set holds `x` (rows, ...) uint8 or floating, `y` (rows,) integer labels or (rows, k) floating targets,
and, with a test set, `x_test` and `y_test` like them. The file's attribute `classes`, if any, lists class names.

Rows stay in the file: a rank reads those it needs, batch by batch. A data set that is stored contiguously and without
filters is mapped into memory (the ranks of a node share the system's page cache), any other is read through HDF5.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from nettorrent_mpi.data.files import opening, size_of
from nettorrent_mpi.data.from_arrays import as_targets, check_arrays
from nettorrent_mpi.data.rows import BYTE, UNIT, Dataset, Scaling, Split, Take, take_from
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.errors import DataError

REMEDY = "write the file again (`nettorrent data import` makes one from a folder of images)"


def open_hdf5(path: Path, mean: float | Sequence[float] | None, std: float | Sequence[float] | None) -> Dataset:
    """Open the file as a data set.

    Reads metadata only, unless labels come without the attribute `classes`: then they are read, because the largest
    gives the number of classes. Raises DataError, and ConfigError for wrong `mean` and `std`.
    """
    with opening(path, "set data.root to an HDF5 file"):
        pass
    with _open(path) as file:
        names = ["x", "y", *(["x_test", "y_test"] if "x_test" in file or "y_test" in file else [])]
        arrays = {name: _dataset(file, path, name) for name in names}
        check_arrays(arrays, str(path))
        rows = {name: len(array) for name, array in arrays.items()}
        shape, dtype, labelled = arrays["x"].shape[1:], arrays["x"].dtype, arrays["y"].ndim == 1
        listed = file.attrs.get("classes")
    classes = None
    if labelled and listed is not None:
        classes = len(listed)
    elif labelled:
        classes = 1 + max(int(_targets(path, name, np.iinfo(np.int64).max).max()) for name in names[1::2])
    scaling = Scaling(shape, UNIT if dtype == BYTE else 1.0, mean, std)

    def split(x: str, y: str) -> Split:
        # The rows stay in the file, so there is nothing to allocate.
        return Split(
            rows[x], shape, dtype, scaling, lambda allocate: _open_rows(path, x), lambda: _targets(path, y, classes)
        )

    test = split("x_test", "y_test") if "x_test" in rows else None
    return Dataset("hdf5", shape, classes, split("x", "y"), test, str(path))


def _open_rows(path: Path, name: str) -> Take:
    """Map the rows, or keep the file open for reading them. Raises DataError if the file is too short."""
    with _open(path) as file:
        data = _dataset(file, path, name)
        offset = data.id.get_offset()
        if data.chunks is None and offset is not None and not data.is_virtual and not data.external:
            size = size_of(path, REMEDY)
            if offset + data.nbytes > size:
                text = f"truncated: the rows of {name} reach to byte {offset + data.nbytes}; {REMEDY}"
                raise DataError(text, file=str(path), offset=size)
            shape = (len(data), data.nbytes // len(data))
            return take_from(np.memmap(path, np.uint8, "r", offset, shape))
    return _take_through_hdf5(path, name)


def _targets(path: Path, name: str, classes: int | None) -> Array:
    """Read all targets: (rows,) int64 labels below `classes`, or (rows, k) floats if `classes` is None."""
    with _open(path) as file:
        data = _dataset(file, path, name)
        try:
            values = data[...]
        except OSError as error:
            raise _unreadable(path, data, np.arange(len(data)), error) from error
    return as_targets(values, classes, name, str(path))


def _take_through_hdf5(path: Path, name: str) -> Take:
    """Make the `Take` that reads rows through HDF5: each needed row once, in the file's order, then put in place."""
    file = _open(path)
    data = _dataset(file, path, name)

    def take(indices: Array, out_bR: Array) -> None:
        assert file, "closed"  # `take` holds the file: HDF5 closes it and its objects with the last reference
        rows, places = np.unique(indices, return_inverse=True)
        try:
            values = data[rows]
        except OSError as error:
            raise _unreadable(path, data, rows, error) from error
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


def _dataset(file: h5py.File, path: Path, name: str) -> h5py.Dataset:
    try:
        data = file.get(name)
    except (OSError, RuntimeError) as error:
        raise DataError(f"data set {name} is corrupt ({error}); {REMEDY}", file=str(path)) from error
    if not isinstance(data, h5py.Dataset):
        there = ", ".join(sorted(file)) or "nothing"
        raise DataError(f"no data set {name} (there is: {there}); write x and y, and x_test and y_test", file=str(path))
    return data


def _unreadable(path: Path, data: h5py.Dataset, rows: Array, error: OSError) -> DataError:
    """Make the error for rows that HDF5 cannot read: it names the first of them and the position of its chunk."""
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
