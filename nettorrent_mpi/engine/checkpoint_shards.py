"""These files of a checkpoint have arrays: a shard from each rank with the blocks that it owned, and the index.

    shard-R.h5: /parameters/<layer>/<name>/0-5x0-3     rows 0..4 and columns 0..2 of that array
    index.h5:   /parameters/<layer>/<name>             the whole array, made of the shards' blocks

The names before the box are those of `engine/model_file.py`. Blocks are written piece by piece, so that a thread that
writes takes little memory, and holds Python and HDF5 for short times only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nettorrent_mpi.data.storage import new_hdf5, retried
from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.engine.checkpoint_manifest import Manifest, SavedArray, SavedFile, opened_file
from nettorrent_mpi.engine.model_file import Attribute, opened, own_array, write_attributes
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.moves import Box, Holding, moves, whole, within

if TYPE_CHECKING:  # loaded only where a checkpoint is written or read
    import h5py

BUFFER = 1 << 24  # bytes that are read at a time
CHUNK = 1 << 20  # bytes that have one checksum, and are written at a time


def dataset_of(block: Holding) -> str:
    """Return the name of the dataset that a shard has for this block."""
    return f"{block.name}/{'x'.join(f'{start}-{stop}' for start, stop in block.box) or 'whole'}"


def write_shard(path: Path, blocks: Mapping[Holding, Array], between: Callable[[], None]) -> None:
    """Write the blocks of one rank, whole or not at all. Raises OSError, and what `between` raises, which is called
    after every piece."""

    def write() -> None:
        with new_hdf5(path) as file:
            for block, array in blocks.items():
                _write(file, dataset_of(block), array, between)

    retried(write)


def _write(file: h5py.File, name: str, array: Array, between: Callable[[], None]) -> None:
    if array.ndim == 0:
        file.create_dataset(name, data=array.reshape(1), chunks=(1,), fletcher32=True)
        return
    chunk = _chunk(array.shape, array.itemsize)
    made = file.create_dataset(name, shape=array.shape, dtype=array.dtype, chunks=chunk, fletcher32=True)
    for place in _pieces(array.shape, chunk):
        made[place] = array[place]
        between()


def _chunk(shape: Shape, itemsize: int) -> Shape:
    """Return the largest part of an array of this shape that lies together in memory and has at most CHUNK bytes."""
    axis, inner = len(shape) - 1, itemsize
    while axis > 0 and inner * shape[axis] <= CHUNK:
        inner *= shape[axis]
        axis -= 1
    return (*[1] * axis, max(min(shape[axis], CHUNK // inner), 1), *shape[axis + 1 :])


def _pieces(shape: Shape, chunk: Shape) -> Iterator[tuple[slice, ...]]:
    """Yield the places of the chunks of an array."""
    counts = [-(-length // part) for length, part in zip(shape, chunk, strict=True)]
    for index in np.ndindex(*counts):
        yield tuple(slice(i * part, (i + 1) * part) for i, part in zip(index, chunk, strict=True))


def write_index(
    path: Path,
    attributes: Mapping[str, Attribute],
    arrays: Mapping[str, SavedArray],
    files: Mapping[str, SavedFile],
) -> None:
    """Write the index of whole arrays, for other programs. Raises OSError."""
    import h5py

    found: dict[str, list[tuple[str, Holding]]] = {}
    for name, file in files.items():
        for block in file.blocks:
            found.setdefault(block.name, []).append((name, block))

    def write() -> None:
        with new_hdf5(path) as file:
            write_attributes(file, attributes)
            for name, array in arrays.items():
                if prod(array.shape) == 0 or not array.shape:  # HDF5 cannot make these of others
                    single = [_single(path.with_name(shard), block) for shard, block in found.get(name, [])]
                    data = single[0] if single else np.zeros(array.shape, array.dtype)
                    file.create_dataset(name, data=data)
                    continue
                layout = h5py.VirtualLayout(array.shape, array.dtype)
                for shard, block in found[name]:
                    source = h5py.VirtualSource(shard, dataset_of(block), [span.size for span in block.box])
                    layout[tuple(slice(*span) for span in block.box)] = source
                file.create_virtual_dataset(name, layout)

    retried(write)


def _single(shard: Path, block: Holding) -> Array:
    """Read an array of one number."""
    with opened(shard) as file:
        return np.asarray(own_array(file, dataset_of(block))[0])


def read_blocks(folder: Path, manifest: Manifest, prefix: str, wanted: Mapping[Holding, Array]) -> None:
    """Fill the wanted arrays with their parts of the checkpoint's arrays of that name after `prefix`: those that it
    has. Only files with such parts are opened. Raises DataError, or LostStateError where a part is in none."""
    known = {Holding(prefix + name, box): array for (name, box), array in wanted.items()}
    known = {each: array for each, array in known.items() if each.name in manifest.arrays}
    names = {each.name for each in known}
    shards = manifest.shards
    held = [[block for block in manifest.files[name].blocks if block.name in names] for name in shards]
    with ExitStack() as stack:
        files: dict[int, h5py.File] = {}
        for move in sorted(moves(held, [list(known)]), key=lambda move: move.source):
            if move.source not in files:
                stack.close()  # one file at a time
                files.clear()
                path = folder / shards[move.source]
                with opened_file(path, manifest.files[shards[move.source]]):
                    files[move.source] = stack.enter_context(opened(path))
            _read(
                files[move.source], move.name, move.held, move.box, known[Holding(move.name, move.wanted)], move.wanted
            )


def _read(file: h5py.File, name: str, held: Box, box: Box, out: Array, wanted: Box) -> None:
    """Read one box of a block into its place in `out`, which has the box `wanted`."""
    block = Holding(name, held)
    found = own_array(file, dataset_of(block), tuple(span.size for span in held) or (1,))
    if not held:
        out[...] = found[0]
        return
    into, rows = out[within(box, wanted)], box[0]
    step = max(BUFFER * rows.size // max(into.nbytes, 1), 1)
    for start in range(rows.start, rows.stop, step):
        part = (Span(start, min(start + step, rows.stop)), *box[1:])
        into[within(part, box)] = found[within(part, held)]


def whole_arrays(folder: Path, manifest: Manifest, names: Iterable[str]) -> dict[str, Array]:
    """Return whole arrays of a checkpoint. Raises DataError."""
    made = {name: np.empty(manifest.arrays[name].shape, manifest.arrays[name].dtype) for name in names}
    read_blocks(folder, manifest, "", {Holding(name, whole(array.shape)): array for name, array in made.items()})
    return made
