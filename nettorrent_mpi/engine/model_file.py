"""These files have whole arrays, independent of the layout that wrote them: model.h5, and the index of a checkpoint.

    /parameters/<layer>/<name>             linear weight (in, out), conv weight (kh, kw, in, out), ...
    /optimizer/<state>/<layer>/<name>      checkpoints only: the optimizer state of that array
    /exchange/<state>/<layer>/<name>       checkpoints only: the gossip state of that array
    /replicas/<number>/...                 checkpoints only, where replicas differ: each of them (above: their mean)
    attribute `model`                      the network's configuration as JSON
    attribute `data`                       what it was trained on, as JSON (engine/trained_on.py)

Everything has checksums, so that a flipped bit is an error when read and not a wrong weight: arrays are chunked with
fletcher32, and those of model.h5 have an attribute `sha256`, because zeros fit a fletcher32 of zero; HDF5's metadata
have their own in this format, and with them the attributes, whose texts are of fixed length (those of variable length
lie in a heap without checksums, where a flipped bit made HDF5 2.0 loop for ever).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nettorrent_mpi.data.storage import new_hdf5, read_hdf5, refused, retried
from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.plan.errors import DataError, UserError
from nettorrent_mpi.plan.moves import Box

if TYPE_CHECKING:  # loaded only where needed: most ranks of a run never read or write a file
    import h5py

PARAMETERS = "parameters"
_SUM, _PIECE = "sha256", 1 << 24  # an array's attribute; bytes that are read at a time
MODEL = "model.h5"  # in a run folder
Attribute = str | int | float


def write_arrays(path: Path, groups: Mapping[str, Mapping[str, Array]], attributes: Mapping[str, Attribute]) -> None:
    """Write a file whole or not at all: under a temporary name first, then renamed. Raises OSError (e.g. a full
    disk)."""

    def write() -> None:
        with new_hdf5(path) as file:
            write_attributes(file, attributes)
            for name, arrays in groups.items():
                group = file.create_group(name)
                for key, array in arrays.items():
                    checked = {"chunks": True, "fletcher32": True} if array.size else {}
                    made = group.create_dataset(key, data=array, **checked)
                    made.attrs[_SUM] = np.bytes_(hashlib.sha256(np.ascontiguousarray(array).data).hexdigest().encode())

    retried(write)


def write_attributes(file: h5py.File, attributes: Mapping[str, Attribute]) -> None:
    """Write the attributes of a file."""
    for name, value in attributes.items():
        file.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value


def read_attributes(file: h5py.File) -> dict[str, Attribute]:
    """Return the attributes of a file. Raises DataError for texts of variable length, which HDF5 cannot be trusted to
    read."""
    for name in file.attrs:
        if file.attrs.get_id(name).dtype.kind not in "Siuf":
            text = f"attribute {name} is not of a kind that nettorrent_mpi writes; use a file of its own"
            raise DataError(text, file=file.filename)
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in file.attrs.items()}


def verify(path: Path) -> dict[str, Attribute]:
    """Read the whole file and return its attributes. Raises DataError if any part is damaged."""
    with opened(path) as file:
        for item in _arrays(file).values():
            _check_own(file, item)
            found = hashlib.sha256()
            step = max(_PIECE * len(item) // max(item.nbytes, 1), 1) if item.ndim else 1
            for piece in (item[at : at + step] for at in range(0, len(item), step)) if item.ndim else (item[()],):
                found.update(np.ascontiguousarray(piece).data)
            _check_sum(item, found.hexdigest())
        return read_attributes(file)


def read_arrays(path: Path) -> dict[str, Array]:
    """Return the parameters of a file: "<layer>/<name>" -> whole array. Raises DataError if it is missing or
    damaged."""
    arrays: dict[str, Array] = {}
    with opened(path) as file:
        for name, item in _arrays(file).items():
            if name.startswith(f"{PARAMETERS}/"):
                _check_own(file, item)
                array = arrays[name.removeprefix(f"{PARAMETERS}/")] = np.asarray(item)
                _check_sum(item, hashlib.sha256(np.ascontiguousarray(array).data).hexdigest())
    return arrays


def array_shapes(file: h5py.File) -> dict[str, tuple[Shape, str]]:
    """Return the shape and the type of every array of a file."""
    return {name: (item.shape, item.dtype.name) for name, item in _arrays(file).items()}


def _arrays(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Return the arrays of a file by their names. Raises DataError for names that are none of ours."""
    import h5py

    found: dict[str, h5py.Dataset] = {}

    def visit(name: object, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            if not is_name(name):
                raise DataError(f"has an array of a strange name ({ascii(name)[:80]})", file=file.filename)
            found[str(name)] = item

    file.visititems(visit)  # which follows no link to elsewhere
    return found


def is_name(name: object) -> bool:
    """Whether an array may have this name: a text that terminals and archives take for nothing else."""
    return isinstance(name, str) and name.isprintable() and not {"", ".", ".."} & set(name.split("/"))


def own_array(file: h5py.File, name: str, shape: Shape | None = None) -> h5py.Dataset:
    """Return an array of the file, of this shape. Raises DataError unless it is stored in the file itself."""
    import h5py

    place: Any = file
    for part in name.split("/"):
        link = place.get(part, getlink=True) if isinstance(place, h5py.Group) and part in place else None
        place = place[part] if isinstance(link, h5py.HardLink) else None
    if not isinstance(place, h5py.Dataset):
        raise DataError(f"has no array {name}", file=file.filename)
    if shape is not None and place.shape != shape:
        text = f"array {name} has shape {place.shape}, the network wants {shape}; is it another network's?"
        raise DataError(text, file=file.filename)
    _check_own(file, place)
    return place


def _check_own(file: h5py.File, array: h5py.Dataset) -> None:
    """Raise DataError if the array is a link to another file: a stranger's could make this program read any file. Nor
    may it be packed, or have parts that were never written: a small file would fill the memory."""
    import h5py

    if array.external or array.is_virtual or array.file.filename != file.filename:
        text = f"array {array.name} is not stored in this file, as nettorrent_mpi does it; use a file of its own"
        raise DataError(text, file=file.filename)
    filters = array.id.get_create_plist()
    packed = any(filters.get_filter(i)[0] != h5py.h5z.FILTER_FLETCHER32 for i in range(filters.get_nfilters()))
    pieces = max(math.prod(array.chunks or (1,)), array.size) * array.dtype.itemsize
    packed = packed or pieces > os.path.getsize(file.filename)
    if not packed:  # else HDF5 might go through more chunks than it comes to the end of
        packed = array.id.get_storage_size() < array.size * array.dtype.itemsize
    if not packed and array.chunks:  # HDF5 2.0 does not look how long a chunk is, and reads beyond a shorter one
        bytes_of_chunk = math.prod(array.chunks) * array.dtype.itemsize + 4 * filters.get_nfilters()

        def check(chunk: h5py.h5d.StoreInfo) -> None:
            nonlocal packed
            packed = packed or chunk.filter_mask != 0 or chunk.size != bytes_of_chunk

        array.id.chunk_iter(check)
    if packed or array.dtype.kind not in "fu":
        text = f"array {array.name} is not stored whole, as nettorrent_mpi does it; use a file of its own"
        raise DataError(text, file=file.filename)


def _check_sum(array: h5py.Dataset, found: str) -> None:
    """Raise DataError if the array has a checksum and is not what was written."""
    if _SUM in array.attrs and array.attrs.get_id(_SUM).dtype.kind == "S" and array.attrs[_SUM] != found.encode():
        text = f"array {array.name} is not the one that was written (its checksum is another); restore a copy of it"
        raise DataError(text, file=array.file.filename)


def read_box(file: h5py.File, name: str, box: Box, out: Array) -> None:
    """Read one box of an array into `out`, and no more."""
    out[...] = own_array(file, name)[tuple(slice(*span) for span in box)]


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading. Raises DataError if it is missing, or if what is read inside is damaged."""
    try:
        with read_hdf5(path) as file:
            yield file
    except FileNotFoundError:
        raise DataError("there is no such file", file=str(path)) from None
    except UserError:
        raise
    except Exception as error:  # for damaged files HDF5 raises nearly any
        refused(error, path)
        text = "is not a whole file of nettorrent_mpi"
        raise DataError(f"{text} ({' '.join(str(error).split())}); restore a copy of it", file=str(path)) from None
