"""IDX, plain or compressed by gzip, is the format of MNIST and its relatives.

Two zero bytes, a type byte (8 = unsigned byte, the only one these data sets use), the number of dimensions, each
dimension as a big-endian 32-bit number, then the values (Y. LeCun, C. Cortes, C. J. C. Burges, The MNIST database).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nettorrent_mpi.data.files import GZIP_MAGIC, gunzip, opening, size_of
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.errors import DataError
from nettorrent_mpi.plan.records import dataclass


@dataclass(frozen=True)
class IdxFile:
    """An IDX file of unsigned bytes, whose header was read and whose length agrees with it."""

    path: Path
    shape: tuple[int, ...]
    compressed: bool
    remedy: str

    @property
    def header(self) -> int:
        """Return the number of bytes before the values."""
        return 4 + 4 * len(self.shape)

    @property
    def length(self) -> int:
        """Return the number of bytes of the file, decompressed."""
        return self.header + math.prod(self.shape)

    def read(self, out: Array) -> None:
        """Fill `out` (uint8, C-contiguous, as many values as the file has). Raises DataError."""
        flat = out.reshape(-1)
        done = -self.header
        for piece in gunzip(self.path, self.remedy) if self.compressed else self._pieces():
            values = np.frombuffer(piece, np.uint8)[max(0, -done) :]
            at = max(0, done)
            done += len(piece)
            if done > flat.size:
                break
            flat[at : at + len(values)] = values
        if done != flat.size:
            raise _wrong_length(self, done + self.header)

    def labels(self, classes: int, first: int) -> Array:
        """Read the values as labels 0 .. classes - 1 (int64), where the file counts from `first`."""
        stored = np.empty(self.shape, np.uint8)
        self.read(stored)
        labels = stored.astype(np.int64) - first
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(wrong):
            row = int(wrong[0])
            where = ", counted after decompression" if self.compressed else ""
            text = f"label {stored[row]} of row {row} is not in {first}..{first + classes - 1}{where}; {self.remedy}"
            raise DataError(text, file=str(self.path), offset=self.header + row)
        return labels

    def _pieces(self) -> Iterator[bytes]:
        with opening(self.path, self.remedy) as file:
            while piece := file.read(1 << 20):
                yield piece


def open_idx(folder: Path, name: str, dimensions: int, remedy: str) -> IdxFile:
    """Find `name`.gz or `name` in the folder, read its header and compare its length.

    A gzip file states its length, modulo 2^32, in its last four bytes; only if that disagrees or is too little is it
    decompressed here. Raises DataError.
    """
    path = folder / f"{name}.gz"
    if not path.exists() and (folder / name).exists():
        path = folder / name
    with opening(path, remedy) as file:
        start = file.read(4 + 4 * dimensions)
    compressed = start[:2] == GZIP_MAGIC
    if compressed:
        start = b""
        for piece in gunzip(path, remedy):
            start += piece
            if len(start) >= 4 + 4 * dimensions:
                break
    if start[:4] != bytes((0, 0, 8, dimensions)):
        text = f"not an IDX file of bytes in {dimensions} dimensions: begins with {start[:4].hex(' ') or 'nothing'}"
        raise DataError(f"{text}, not 00 00 08 {dimensions:02x}; {remedy}", file=str(path), offset=0)
    if len(start) < 4 + 4 * dimensions:
        raise DataError(f"ends within its header: truncated; {remedy}", file=str(path), offset=len(start))
    shape = struct.unpack(f">{dimensions}I", start[4 : 4 + 4 * dimensions])
    if 0 in shape:
        raise DataError(f"states that it is empty: shape {shape}; {remedy}", file=str(path), offset=4)
    idx = IdxFile(path, shape, compressed, remedy)
    if not compressed:
        length = size_of(path, remedy)
    elif idx.length < 2**32 and _said_length(path, remedy) == idx.length:
        length = idx.length
    else:
        length = 0
        for piece in gunzip(path, remedy):
            length += len(piece)
            if length > idx.length:
                break
    if length != idx.length:
        raise _wrong_length(idx, length)
    return idx


def _said_length(path: Path, remedy: str) -> int:
    with opening(path, remedy) as file:
        file.seek(-4, 2)
        return int.from_bytes(file.read(4), "little")


def _wrong_length(idx: IdxFile, length: int) -> DataError:
    after = " after decompression" if idx.compressed else ""
    what = "truncated" if length < idx.length else "has more than its header says"
    least = "at least " if idx.compressed and length > idx.length else ""
    text = f"{what}: {least}{length} bytes{after}, but shape {idx.shape} makes {idx.length}; {idx.remedy}"
    return DataError(text, file=str(idx.path), offset=min(length, idx.length))
