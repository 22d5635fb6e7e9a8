"""Chunks of HDF5 data sets, which HDF5 2.0 believes in: it does not look whether a chunk, once it is unpacked, is as
long as it has to be. Of a shorter one it gives what lies behind it in memory, or ends the process; a longer one may
fill the memory. So their lengths are looked at first: those of packed chunks by unpacking them.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from pathlib import Path

import h5py

from nettorrent_mpi.plan.errors import DataError, warn

REMEDY = "write the file again (`nettorrent data import` makes one from a folder of images)"
_LZF = 32000
_UNSAFE = (h5py.h5z.FILTER_NBIT, h5py.h5z.FILTER_SCALEOFFSET)
_SAME_LENGTH = (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32)
_CHECKSUM = 4  # bytes that fletcher32 adds
_MOST_EXTRA = 1024  # bytes that packing adds to what it cannot pack, besides doubling it


def check_filters(data: h5py.Dataset, path: Path, name: str) -> None:
    """Raise DataError for filters that HDF5 lacks, or cannot be trusted to undo."""
    filters = data.id.get_create_plist()
    size = 0 if data.chunks is None else _size(data)
    packed = False
    for number in reversed(range(filters.get_nfilters())):
        code, _, values, text = filters.get_filter(number)
        if code in _UNSAFE or (code == h5py.h5z.FILTER_FLETCHER32 and packed):
            raise DataError(
                f"{name} is packed by scale-offset or n-bit, or with a checksum inside, which HDF5 unpacks without "
                "looking where damaged values lead; write the file with gzip or without",
                file=str(path),
            )
        if code == _LZF and not (len(values) > 2 and values[2] == size):
            raise DataError(f"{name} is packed by lzf for chunks of another size; {REMEDY}", file=str(path))
        if not h5py.h5z.filter_avail(code):
            known = f"{code} ({text.decode(errors='replace')})" if text else str(code)
            raise DataError(
                f"{name} is compressed by filter {known}, which this HDF5 library lacks: let HDF5_PLUGIN_PATH name the "
                "folder of its plugin (`pip install hdf5plugin` has many), or write the file with gzip or without",
                file=str(path),
            )
        packed = packed or code not in _SAME_LENGTH


def check_written(data: h5py.Dataset, path: Path, name: str) -> None:
    """Raise DataError where nothing was written, and for chunks of impossible lengths; warn where HDF5 would read zeros
    for chunks that nobody wrote."""
    chunks = data.chunks or [max(length, 1) for length in data.shape]
    wanted, written = math.prod(-(-n // c) for n, c in zip(data.shape, chunks, strict=True)), 0
    if wanted > os.path.getsize(data.file.filename):  # HDF5 would go through all of them
        raise DataError(f"{name} is cut into {wanted:,} chunks, more than the file has bytes; {REMEDY}", file=str(path))
    if data.size and not data.id.get_storage_size():
        raise DataError(f"{name} has a shape, but no values were written; {REMEDY}", file=str(path))
    if data.chunks is None:
        return
    codes, size = _codes(data), _size(data)

    def check(chunk: h5py.h5d.StoreInfo) -> None:
        nonlocal written
        written += 1
        used = list(_used(codes, chunk.filter_mask))
        least = size + _CHECKSUM * used.count(h5py.h5z.FILTER_FLETCHER32)
        most = least
        if any(code not in _SAME_LENGTH for code in used):
            least, most = least - size + 1, 2 * size + _MOST_EXTRA
        if not least <= chunk.size <= most:
            text = f"{name}: the chunk at {chunk.chunk_offset} has {chunk.size:,} bytes for {size:,}; {REMEDY}"
            raise DataError(text, file=str(path), offset=chunk.byte_offset)

    data.id.chunk_iter(check)
    if written < wanted:
        warn(f"{path}: {name}: {wanted - written:,} of {wanted:,} chunks were never written, and are read as zeros")


class PackedChunks:
    """PackedChunks of a data set are unpacked once, to see whether they have the right lengths."""

    def __init__(self, data: h5py.Dataset, path: Path, name: str):
        self._data, self._path, self._name = data, path, name
        self._codes, self._checked = _codes(data), set[int]()
        self._packed = any(code in (h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SZIP) for code in self._codes)

    def check(self, start: int, stop: int) -> None:
        """Raise DataError unless those that have rows from `start` to `stop` may be read."""
        if not self._packed:
            return
        first, *others = self._data.chunks
        for row in range(start - start % first, stop, first):
            if row not in self._checked:
                for corner in product(*(range(0, n, c) for n, c in zip(self._data.shape[1:], others, strict=True))):
                    self._check((row, *corner))
                self._checked.add(row)

    def _check(self, corner: tuple[int, ...]) -> None:
        try:
            mask, packed = self._data.id.read_direct_chunk(corner)
        except Exception:  # nobody wrote it; or HDF5 cannot read it, and will say so
            return
        wanted = _size(self._data)
        found = _unpacked_length(packed, list(_used(self._codes, mask)), wanted)
        if found is not None and found != wanted:
            has = f"more than {wanted:,}" if found > wanted else f"{found:,} of {wanted:,}"
            text = f"{self._name}: the chunk at {corner} has {has} bytes once it is unpacked; {REMEDY}"
            offset = self._data.id.get_chunk_info_by_coord(corner).byte_offset  # slow: HDF5 looks through all chunks
            raise DataError(text, file=str(self._path), offset=offset)


@lru_cache(maxsize=1000)
def check_whole(path: Path, name: str, _changed: int) -> None:
    """Look at all chunks of a data set of a file that was last changed at a time."""
    with h5py.File(path, "r") as file:
        PackedChunks(file[name], path, name).check(0, len(file[name]))


def _unpacked_length(packed: bytes, used: list[int], most: int) -> int | None:
    """Return the number of bytes, of at most `most` + 1; None where only HDF5 knows, or finds that it is damaged."""
    for code in reversed(used):
        if code == h5py.h5z.FILTER_FLETCHER32:
            packed = packed[:-_CHECKSUM]
        elif code == h5py.h5z.FILTER_DEFLATE:
            try:
                packed = zlib.decompressobj().decompress(packed, most + 1)
            except zlib.error:
                return None
        elif code == h5py.h5z.FILTER_SZIP:
            return min(int.from_bytes(packed[:4], "little"), most + 1)
        elif code != h5py.h5z.FILTER_SHUFFLE:
            return None
    return len(packed)


def _codes(data: h5py.Dataset) -> list[int]:
    filters = data.id.get_create_plist()
    return [filters.get_filter(number)[0] for number in range(filters.get_nfilters())]


def _used(codes: list[int], mask: int) -> Iterator[int]:
    """Yield the filters of a chunk: others were left out."""
    return (code for number, code in enumerate(codes) if not mask >> number & 1)


def _size(data: h5py.Dataset) -> int:
    """Return the bytes of a chunk."""
    return int(math.prod(data.chunks) * data.id.get_type().get_size())
