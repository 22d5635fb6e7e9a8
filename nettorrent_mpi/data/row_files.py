"""Rows in a file of arrays, for predictions: NumPy's .npy and .npz, and HDF5. They are read block by block.

Nothing is unpickled, and a file that promises more than it holds takes no more memory than a block.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from nettorrent_mpi.data.files import opening
from nettorrent_mpi.data.rows import Split
from nettorrent_mpi.data.scaling import Scaling
from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.plan.errors import DataError, UserError, listed
from nettorrent_mpi.plan.records import dataclass

USUAL = ("x_test", "x")  # the arrays that are taken, unless told
_HDF5 = (".h5", ".hdf5", ".hdf", ".he5")
ENDINGS = (".npy", ".npz", *_HDF5)
_ROOM = 1 << 30  # bytes of rows that are read at once where they cannot be read one by one
_REMEDY = "give a file that is there, and whole"


@dataclass(frozen=True)
class RowFile:
    """A RowFile describes the array of rows in a file, (rows, *shape) of `dtype`. `blocks(most)` yields all of them in
    their order, `most` at a time, and raises DataError where they cannot be read."""

    name: str  # of the array; empty in a .npy
    rows: int
    shape: Shape
    dtype: np.dtype[Any]
    blocks: Callable[[int], Iterator[Array]]


def open_row_file(path: Path, array: str | None = None) -> RowFile:
    """Open the array of this name; by default one of USUAL, or the only one that there is. Raises DataError."""
    if path.suffix.lower() in _HDF5:
        return _open_hdf5(path, array)
    if path.suffix.lower() == ".npy":
        if array is not None:
            raise DataError(f"holds one array, without a name: leave out {array}", file=str(path))
        return _open_npy(path, None)
    with _archive(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    return _open_npy(path, _chosen(path, names, array))


def _chosen(path: Path, names: Sequence[str], asked: str | None) -> str:
    """Choose an array of a file that has several."""
    usual = [name for name in USUAL if name in names] or (list(names) if len(names) == 1 else [])
    wanted = asked or (usual[0] if usual else None)
    if wanted is None or wanted not in names:
        text = f"has no array {wanted}" if wanted else f"has none of the arrays {' and '.join(USUAL)}"
        there = f"there are {listed(sorted(names))}: choose one by its name" if names else "there is none"
        raise DataError(f"{text}; {there}", file=str(path))
    return wanted


def _open_hdf5(path: Path, asked: str | None) -> RowFile:
    from nettorrent_mpi.data.hdf5_rows import find, open_rows, opened  # loads h5py

    with opened(path) as file:
        name = _chosen(path, list(file), asked)
        data = find(file, path, name)
        rows, shape, dtype = (len(data) if data.shape else 0), tuple(data.shape[1:]), data.dtype
        _check_kind(path, name, tuple(data.shape), dtype)

    def blocks(most: int) -> Iterator[Array]:
        split = Split(rows, shape, dtype, Scaling(shape), lambda *how: open_rows(path, name, *how), None)
        inputs = split.inputs(has_room=lambda size: size < _ROOM)
        for first in range(0, rows, most):
            some = np.arange(first, min(first + most, rows))
            out = np.empty((len(some), *shape), inputs.native)
            inputs.stored(some, out.reshape(len(some), -1).view(np.uint8))
            yield out

    return RowFile(name, rows, shape, dtype, blocks)


def _open_npy(path: Path, member: str | None) -> RowFile:
    """Open a .npy, or that of an archive."""
    with _reading(path, member) as file:
        whole, dtype = _header(path, member, file)

    def blocks(most: int) -> Iterator[Array]:
        with _reading(path, member) as file:
            _header(path, member, file)
            size = math.prod(whole[1:]) * dtype.itemsize
            for first in range(0, whole[0], most):
                count = min(most, whole[0] - first)
                content = file.read(count * size)
                if len(content) < count * size:
                    text = f"ends in row {first + len(content) // size} of {whole[0]:,}: it is truncated; {_REMEDY}"
                    raise DataError(text, file=str(path))
                native = dtype.newbyteorder("=")
                yield np.frombuffer(content, dtype).reshape(count, *whole[1:]).astype(native, copy=False)

    return RowFile(member or "", whole[0], whole[1:], dtype, blocks)


def _header(path: Path, member: str | None, file: IO[bytes]) -> tuple[Shape, np.dtype[Any]]:
    """Read the header of a .npy: (shape, dtype)."""
    reading = np.lib.format
    try:
        version = reading.read_magic(file)
        read = {(1, 0): reading.read_array_header_1_0, (2, 0): reading.read_array_header_2_0}[version]
        shape, by_columns, dtype = read(file)
    except DataError:
        raise
    except Exception as error:  # of damaged headers nearly any
        raise DataError(f"is no whole .npy ({type(error).__name__}: {error}); {_REMEDY}", file=str(path)) from error
    _check_kind(path, member or "the array", shape, dtype)
    if by_columns and len(shape) > 1:
        raise DataError("holds its array by columns; save numpy.ascontiguousarray(x)", file=str(path))
    return shape, dtype


def _check_kind(path: Path, name: str, shape: Shape, dtype: np.dtype[Any]) -> None:
    """Raise DataError unless the array can be rows of numbers."""
    if (dtype.kind != "f" and dtype != np.uint8) or dtype.itemsize > 8:
        text = f"{name} holds {dtype}; write it as uint8, or as float32 or float64"
        raise DataError(text, file=str(path))
    if len(shape) < 2 or min(shape[1:]) < 1 or shape[0] < 0:
        text = f"{name} has shape {shape}; write (rows, features) or (rows, height, width, channels)"
        raise DataError(text, file=str(path))


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    with opening(path, _REMEDY) as file, _told(path), zipfile.ZipFile(file) as archive:
        yield archive


@contextmanager
def _reading(path: Path, member: str | None) -> Iterator[IO[bytes]]:
    """Open a .npy, or that of an archive."""
    if member is None:
        with opening(path, _REMEDY) as file:
            yield file
        return
    with _archive(path) as archive, archive.open(f"{member}.npy") as inside:
        yield inside


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what a damaged archive raises into a DataError."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:  # of damaged archives nearly any
        raise DataError(f"is no whole .npz ({error}); {_REMEDY}", file=str(path)) from error
