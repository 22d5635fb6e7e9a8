"""Rows in an HDF5 file, in each way in which HDF5 stores them.

contiguous            mapped into memory: the ranks of a node share the system's page cache
chunked, compressed,  read once, in the order of the file, into memory that the ranks of a node share; where it has no
virtual, ...          room, batch by batch: a compressed chunk has to be read as a whole for any row of it
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from nettorrent_mpi.data.files import size_of
from nettorrent_mpi.data.hdf5_chunks import REMEDY, PackedChunks
from nettorrent_mpi.data.hdf5_sources import HDF5Sources
from nettorrent_mpi.data.rows import Allocate, HasRoom, Take, take_from
from nettorrent_mpi.data.storage import read_hdf5, refused, retried
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.errors import DataError, UserError, warn

_BLOCK = 8 << 20  # bytes that are read at a time, if chunks are smaller
_WORTH_A_WORD = 10_000_000  # bytes
_SLAB = 64 << 20  # bytes of a buffer, if chunks are larger


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file. Whatever HDF5 raises here and inside the `with` block becomes a DataError that names the
    file: for damaged ones that is nearly any exception."""
    try:
        with _open(path) as file:
            yield file
    except UserError:
        raise
    except Exception as error:
        refused(error, path)
        raise DataError(f"truncated or corrupt HDF5 file ({error}); {REMEDY}", file=str(path)) from error


def _open(path: Path) -> h5py.File:
    try:
        return read_hdf5(path)
    except Exception as error:
        size = size_of(path, REMEDY)
        refused(error, path)
        if not h5py.is_hdf5(path):
            raise DataError(f"not an HDF5 file: no signature; {REMEDY}", file=str(path), offset=0) from error
        text = f"truncated or corrupt HDF5 file ({error}); {REMEDY}"
        raise DataError(text, file=str(path), offset=size) from error


def find(file: h5py.File, path: Path, name: str) -> h5py.Dataset:
    """Return a data set of the file that can be read. Raises DataError."""
    data = HDF5Sources(file, path).find(name)
    if not isinstance(data, h5py.Dataset):
        there = ", ".join(sorted(file)) or "nothing"
        what = f"{name} is a group, not a data set" if isinstance(data, h5py.Group) else f"no data set {name}"
        raise DataError(f"{what} (there is: {there[:200]}); write x and y, and x_test and y_test", file=str(path))
    return data


def slow(data: h5py.Dataset) -> bool:
    """Whether rows cannot be read one by one, fast, from where they lie."""
    contiguous = data.chunks is None and not data.is_virtual and not data.external
    return not (contiguous and data.id.get_offset() is not None)


def storage_note(data: h5py.Dataset, path: Path, name: str) -> str | None:
    """Say in one line how a data set is read that is not mapped, if that takes time or memory worth a word."""
    if not slow(data) or data.nbytes < _WORTH_A_WORD:
        return None
    how = f"compressed ({data.compression})" if data.compression else "not contiguous"
    return (
        f"{path}: {name} is {how}, so its {data.nbytes / 1e6:,.1f} MB are read into memory once, if they fit; "
        f"{_repacking(path)}"
    )


def _repacking(path: Path) -> str:
    return f"`h5repack -l CONTI -f NONE {path.name} NEW.h5` writes a file whose rows are read where they lie"


def open_rows(path: Path, name: str, allocate: Allocate, has_room: HasRoom) -> Take:
    """Open the rows: see the head of this module. Collective, as `allocate` and `has_room` are. Raises DataError."""
    with opened(path) as file:
        data = find(file, path, name)
        if not slow(data):
            place, offset = Path(data.file.filename), data.id.get_offset()  # another file where `name` is a link
            size = size_of(place, REMEDY)
            if offset + data.nbytes > size:
                text = f"truncated: the rows of {name} reach to byte {offset + data.nbytes}; {REMEDY}"
                raise DataError(text, file=str(place), offset=size)
            shape = (len(data), data.nbytes // len(data))
            return take_from(np.memmap(place, np.uint8, "r", offset, shape))
        size, shape, dtype = data.nbytes, data.shape, data.dtype
    if has_room(size):
        return take_from(allocate(shape, dtype, lambda out: _read_all(path, name, out)))
    warn(
        f"{path}: {name}: its {size / 1e6:,.0f} MB do not fit into half of the memory that is free, so every "
        f"mini-batch is read from the file, which is slow; {_repacking(path)}"
    )
    return _take_from_file(path, name)


def _read_all(path: Path, name: str, out: Array) -> None:
    """Fill `out` with all rows, chunk after chunk."""
    with opened(path) as file:
        data = find(file, path, name)
        chunks, step = PackedChunks(data, path, name), _rows_of_chunk(data)
        step *= max(1, _BLOCK * len(data) // max(data.nbytes * step, 1))
        for first in range(0, len(data), step):
            rows = slice(first, min(first + step, len(data)))
            chunks.check(rows.start, rows.stop)
            with _naming(path, data, rows):
                retried(partial(data.read_direct, out[rows], rows))


def _take_from_file(path: Path, name: str) -> Take:
    """Make the `Take` that reads rows from the file: each needed chunk once, in the file's order."""
    file = _open(path)
    data = find(file, path, name)
    chunks = PackedChunks(data, path, name)
    row_bytes = data.nbytes // len(data)
    # Of unfiltered chunks HDF5 reads the wanted rows alone.
    whole = _rows_of_chunk(data) if data.id.get_create_plist().get_nfilters() else 1
    slab = np.empty((max(1, min(whole, _SLAB // row_bytes)), *data.shape[1:]), data.dtype)

    def take(indices: Array, out_bR: Array) -> None:
        assert file, "closed"  # `take` holds the file: HDF5 closes it and its objects with the last reference
        rows, places = np.unique(indices, return_inverse=True)
        sorted_bR = np.empty((len(rows), row_bytes), np.uint8)
        at = 0
        while at < len(rows):
            first = int(rows[at])
            stop = min(first - first % whole + whole, first + len(slab), len(data))
            count = int(np.searchsorted(rows, stop)) - at
            stop = int(rows[at + count - 1]) + 1
            read = slab[: stop - first]
            chunks.check(first, stop)
            with _naming(path, data, slice(first, stop)):
                retried(partial(data.read_direct, read, slice(first, stop)))
            sorted_bR[at : at + count] = read.reshape(len(read), -1).view(np.uint8)[rows[at : at + count] - first]
            at += count
        np.take(sorted_bR, places, axis=0, out=out_bR, mode="clip")

    return take


def _rows_of_chunk(data: h5py.Dataset) -> int:
    return int(data.chunks[0]) if data.chunks else 1


@contextmanager
def _naming(path: Path, data: h5py.Dataset, rows: slice) -> Iterator[None]:
    """Turn an error in reading these rows into one that names the first bad row and the position of its chunk."""
    try:
        yield
    except Exception as error:
        refused(error, path)
        name = str(data.name).lstrip("/")
        for row in range(rows.start, rows.stop):
            try:
                data[row]
            except Exception:
                offset = None
                if data.chunks is not None:
                    offset = data.id.get_chunk_info_by_coord((row, *[0] * (data.ndim - 1))).byte_offset
                text = f"{name}: row {row} cannot be read ({error}); {REMEDY}"
                raise DataError(text, file=str(path), offset=offset) from error
        raise DataError(f"{name} cannot be read ({error}); {REMEDY}", file=str(path)) from error
