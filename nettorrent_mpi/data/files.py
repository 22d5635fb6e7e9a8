"""Files of data sets: every error in reading becomes a DataError with the file, the byte and the remedy."""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nettorrent_mpi.data.storage import PASSING, check_plain, refused, retried
from nettorrent_mpi.plan.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
_BLOCKS, _BLOCK = 16, 1 << 12  # how many blocks of how many bytes tell a file from another one
_CHUNK = 1 << 14  # compressed bytes at a time; deflate makes at most 1032 times as much of it (16 MiB)


@contextmanager
def opening(path: Path, remedy: str) -> Iterator[io.BufferedReader]:
    """Open the file for reading in binary; an error of the operating system becomes a DataError with `remedy`."""
    try:
        check_plain(path)
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"no such file; {remedy}", file=str(path)) from None
    except OSError as error:
        if error.errno in PASSING:
            refused(error, path)
        raise DataError(f"cannot be read ({error.strerror or error}); {remedy}", file=str(path)) from error


def sampled_checksum(path: Path, remedy: str) -> int:
    """Return a checksum of the file's size and of blocks that are spread over it."""

    def read() -> int:
        size = path.stat().st_size
        found = zlib.crc32(str(size).encode())
        with path.open("rb") as file:
            for place in range(0, size, max(size // _BLOCKS, _BLOCK)):
                file.seek(place)
                found = zlib.crc32(file.read(_BLOCK), found)
        return found

    with opening(path, remedy):
        return retried(read)


def size_of(path: Path, remedy: str) -> int:
    """Return the file's size in bytes."""
    with opening(path, remedy) as file:
        return os.fstat(file.fileno()).st_size


def parsed(text: str | bytes) -> Any:
    """Parse JSON in UTF-8. Raises ValueError for whatever is wrong about it, deeper nesting than Python takes
    included."""
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def gunzip(path: Path, remedy: str) -> Iterator[bytes]:
    """Yield the decompressed pieces of a gzip file with one or several members; the checksum of each is verified.

    A DataError's offset is the first compressed byte that cannot be right: the exact byte for damage that breaks the
    deflate stream, the member's trailer if only the CRC-32 or the length disagree, the end of a truncated file.
    """
    inflate = zlib.decompressobj(wbits=31)
    position = 0
    with opening(path, remedy) as file:
        while chunk := file.read(_CHUNK):
            while chunk:
                if inflate.eof:
                    if not chunk.strip(b"\0"):  # zeros after the last member are padding (gzip's manual)
                        position += len(chunk)
                        break
                    inflate = zlib.decompressobj(wbits=31)
                before = inflate.copy()
                try:
                    piece = inflate.decompress(chunk)
                except zlib.error as error:
                    offset = position + _first_bad(before, chunk)
                    text = f"corrupt gzip data ({error}); {remedy}"
                    raise DataError(text, file=str(path), offset=offset) from error
                if piece:
                    yield piece
                position += len(chunk) - len(inflate.unused_data)
                chunk = inflate.unused_data
    if not inflate.eof:
        raise DataError(f"the gzip data ends early: truncated; {remedy}", file=str(path), offset=position)


def _first_bad(inflate: zlib._Decompress, chunk: bytes) -> int:
    """Return the number of bytes of `chunk` that the decompressor accepts before it fails."""
    for index in range(len(chunk)):
        try:
            inflate.decompress(chunk[index : index + 1])
        except zlib.error:
            return index
    return len(chunk)
