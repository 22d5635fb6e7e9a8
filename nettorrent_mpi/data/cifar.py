"""The binary version of CIFAR-10 holds records of a label byte and 3,072 bytes: the red, green and blue planes of 32 x
32 pixels, row by row (A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nettorrent_mpi.data.files import opening, size_of
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.errors import DataError

SHAPE = (32, 32, 3)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECORD = 1 + 3072
_BLOCK = 500  # records at a time: 1.5 MB


class CifarFiles:
    """Reads the binary files of one split in sequence. Opening checks sizes only. Raises DataError."""

    def __init__(self, paths: Sequence[Path], remedy: str):
        self._paths, self._remedy = paths, remedy
        self.rows = 0
        for path in paths:
            size = size_of(path, remedy)
            if size == 0 or size % _RECORD:
                text = f"truncated: {size} bytes are not a whole number of records of {_RECORD} bytes; {remedy}"
                raise DataError(text, file=str(path), offset=size)
            self.rows += size // _RECORD

    def images(self, out_bHWC: Array) -> None:
        """Fill out_bHWC, (rows, 32, 32, 3) uint8."""
        row = 0
        for _, _, block in self._blocks():
            planes_bCHW = block[:, 1:].reshape(-1, 3, 32, 32)
            out_bHWC[row : row + len(block)] = planes_bCHW.transpose(0, 2, 3, 1)
            row += len(block)

    def labels(self) -> Array:
        """Read all labels: (rows,) int64."""
        labels = np.empty(self.rows, np.int64)
        row = 0
        for path, first, block in self._blocks():
            labels[row : row + len(block)] = block[:, 0]
            wrong = np.flatnonzero(block[:, 0] >= len(CLASSES))
            if len(wrong):
                text = f"label {block[wrong[0], 0]} of record {first + wrong[0]} is not in 0..9; {self._remedy}"
                raise DataError(text, file=str(path), offset=int(first + wrong[0]) * _RECORD)
            row += len(block)
        return labels

    def _blocks(self) -> Iterator[tuple[Path, int, Array]]:
        """Yield (file, number of the first record, records as (b, 3073) bytes), each valid until the next one."""
        buffer = np.empty((_BLOCK, _RECORD), np.uint8)
        total = 0
        for path in self._paths:
            first = 0
            with opening(path, self._remedy) as file:
                while read := file.readinto(buffer.data):
                    if read % _RECORD:
                        offset = first * _RECORD + read
                        raise DataError(f"truncated within a record; {self._remedy}", file=str(path), offset=offset)
                    records = read // _RECORD
                    total += records
                    if total > self.rows:
                        raise DataError("grew while it was being read; run again", file=str(path))
                    yield path, first, buffer[:records]
                    first += records
        if total != self.rows:
            raise DataError("became shorter while it was being read; run again", file=str(self._paths[-1]))
