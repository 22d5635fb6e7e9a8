"""The manifest of a checkpoint says which files belong to it, and what is in them.

    step-N/manifest.json     its attributes; every array's shape; every file's size, SHA-256 and blocks
    step-N/shard-R.h5        the blocks that rank R owned, each a dataset (engine/checkpoint_shards.py)
    step-N/index.h5          the whole arrays, for other programs: virtual datasets of the blocks

It was written last, and the folder then got its name: a folder without it, or with any file that is not the one it
names, is no checkpoint. A virtual dataset would read zeros, without an error, where a shard is missing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from nettorrent_mpi.data.storage import regular
from nettorrent_mpi.device.arrays import Shape
from nettorrent_mpi.engine.model_file import Attribute, is_name
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.errors import DataError
from nettorrent_mpi.plan.moves import Box, Holding, volume
from nettorrent_mpi.plan.records import dataclass

MANIFEST, INDEX = "manifest.json", "index.h5"
FORMAT = "nettorrent_mpi checkpoint 1"
LARGEST = 1 << 28  # bytes of a manifest: some millions of blocks
PIECE = 1 << 20  # bytes that are read at a time
TYPES = {"float32": 4, "float64": 8, "uint16": 2}  # of all that is saved: bytes of an element
_SHARD, _SUM = re.compile(r"shard-\d{5,}\.h5", re.ASCII), re.compile("[0-9a-f]{64}")


class SavedArray(NamedTuple):
    """A SavedArray is a whole array of a checkpoint, in global coordinates."""

    shape: Shape
    dtype: str


class SavedFile(NamedTuple):
    """A SavedFile is one file of a checkpoint and the blocks that it has."""

    bytes: int
    sha256: str
    blocks: tuple[Holding, ...] = ()


def shard_name(rank: int) -> str:
    """Return the name of the file with this rank's blocks."""
    return f"shard-{rank:05d}.h5"


@dataclass(frozen=True)
class Manifest:
    """A Manifest describes a checkpoint: what `manifest.json` says."""

    attributes: Mapping[str, Attribute]
    arrays: Mapping[str, SavedArray]
    files: Mapping[str, SavedFile]

    def text(self) -> str:
        """Write it as JSON, with a checksum of its own."""
        files = {
            name: {"bytes": file.bytes, "sha256": file.sha256, "blocks": plain_blocks(file.blocks)}
            for name, file in self.files.items()
        }
        arrays = {name: {"shape": list(array.shape), "dtype": array.dtype} for name, array in self.arrays.items()}
        return _text({"format": FORMAT, "attributes": dict(self.attributes), "arrays": arrays, "files": files})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of the checkpoint in a folder. Raises DataError if it is missing, or not as it was
        written, to the last bit."""
        path = folder / MANIFEST
        with regular(path) as file:
            data = file.read(LARGEST + 1) or b""
        if len(data) > LARGEST:
            raise DataError("is too large for the manifest of a checkpoint", file=str(path))
        try:
            told = json.loads(data.decode())
            body = {key: value for key, value in told.items() if key != "checksum"}
            if told["format"] == FORMAT and _text(body).encode() == data:
                return cls(
                    {str(key): _attribute(value) for key, value in body["attributes"].items()},
                    {_name(name): _array(value) for name, value in body["arrays"].items()},
                    {_file_name(name): _file(value) for name, value in body["files"].items()},
                )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        raise DataError("is not the whole manifest of a checkpoint", file=str(path))

    @property
    def shards(self) -> list[str]:
        """Return the names of the files with blocks, in the ranks' order."""
        return [name for name in self.files if name != INDEX]

    def check(self, folder: Path) -> None:
        """Raise DataError unless the blocks are parts of the arrays, no array is larger than its blocks, no block
        larger than its file, and all files are there. Quick: what is in them is not read."""
        rest = {name: prod(array.shape) for name, array in self.arrays.items()}
        for name, file in self.files.items():
            size = 0
            for block in file.blocks:
                array = self.arrays.get(block.name)
                if array is None or not _fits(block.box, array.shape):
                    raise DataError(f"{name} has a block of {block.name} that is no part of it", file=str(folder))
                rest[block.name] -= volume(block.box)
                size += volume(block.box) * TYPES[array.dtype]
            if size > file.bytes:
                raise DataError("is smaller than the blocks that it is to have", file=str(folder / name))
            with opened_file(folder / name, file):
                pass
        wrong = next((name for name, elements in rest.items() if elements), None)
        if wrong is not None:
            raise DataError(f"has not each part of {wrong} once", file=str(folder))

    def verify(self, folder: Path, names: Sequence[str]) -> None:
        """Raise DataError unless these files are those that were written, to the last bit."""
        for name in names:
            with opened_file(folder / name, self.files[name]) as opened:
                found = digest(opened)
            if found != self.files[name].sha256:
                text = "is not the file that was written (its checksum is another)"
                raise DataError(f"{text}; restore a copy of it", file=str(folder / name))


@contextmanager
def opened_file(path: Path, file: SavedFile) -> Iterator[Any]:
    """Open a file of a checkpoint, a regular one of the right size. Raises DataError."""
    with regular(path) as opened:
        size = opened.seek(0, 2)
        opened.seek(0)
        if size != file.bytes:
            text = f"is not the file that was written (it has {size:,} of {file.bytes:,} bytes)"
            raise DataError(f"{text}; restore a copy of it", file=str(path))
        try:
            yield opened
        except OSError as error:
            raise DataError(f"could not be read ({error.strerror or error})", file=str(path)) from error


def digest(file: Any) -> str:
    """Return the SHA-256 of what is left to read of a file."""
    found, piece = hashlib.sha256(), bytearray(PIECE)
    while count := file.readinto(piece):
        found.update(memoryview(piece)[:count])
    return found.hexdigest()


def plain_blocks(blocks: Sequence[Holding]) -> list[list[Any]]:
    """Return blocks as JSON has them."""
    return [[name, [list(span) for span in box]] for name, box in blocks]


def blocks_of(told: Sequence[Any]) -> tuple[Holding, ...]:
    """Return the blocks of `plain_blocks`. Raises ValueError or TypeError."""
    return tuple(Holding(_name(name), _box(box)) for name, box in told)


def _text(body: Mapping[str, Any]) -> str:
    checksum = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "checksum": checksum}) + "\n"


def _name(name: Any) -> str:
    if not is_name(name):
        raise ValueError(name)
    return str(name)


def _file_name(name: str) -> str:
    if name != INDEX and not _SHARD.fullmatch(name):
        raise ValueError(name)
    return name


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(value)
    return value


def _attribute(value: Any) -> Attribute:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(value)
    if isinstance(value, int) and not -1 << 62 < value < 1 << 62:
        raise ValueError(value)
    return value


def _array(told: Any) -> SavedArray:
    if told["dtype"] not in TYPES:
        raise ValueError(told)
    return SavedArray(tuple(_number(length) for length in told["shape"]), told["dtype"])


def _box(told: Any) -> Box:
    box = tuple(Span(_number(start), _number(stop)) for start, stop in told)
    if any(span.size <= 0 for span in box):
        raise ValueError(told)
    return box


def _fits(box: Box, shape: Shape) -> bool:
    """Whether a box lies within an array."""
    return len(box) == len(shape) and all(span.stop <= length for span, length in zip(box, shape, strict=True))


def _file(told: Any) -> SavedFile:
    if not _SUM.fullmatch(told["sha256"]):
        raise ValueError(told)
    return SavedFile(_number(told["bytes"]), told["sha256"], blocks_of(told["blocks"]))
