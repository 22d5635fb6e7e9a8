"""Imports of folders, tables and arrays share the division into training and test rows, the classes and the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from nettorrent_mpi.data.from_arrays import check_arrays
from nettorrent_mpi.data.storage import check_file, new_hdf5
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.random import generator
from nettorrent_mpi.plan.errors import ConfigError, DataError, OutputError, listed

TEST = 0.2  # the fraction of each class that is held out, unless told
PIXELS = 64  # bytes in a row from which on they may be an image
Size = tuple[int, ...]  # (height, width), or (height, width, channels)


class Imported(NamedTuple):
    """The result of an import; without classes the targets are numbers. `notes` say in a line each what is not as one
    would take it to be."""

    rows: int
    test_rows: int
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def check_import(target: Path, test: float | None, size: Size | None, *, overwrite: bool) -> None:
    """Raise ConfigError for an argument out of range, OutputError if the target cannot be written."""
    if test is not None and not 0.0 <= test < 1.0:
        raise ConfigError(f"the fraction of test rows is at least 0 and below 1, not {test}")
    if size is not None and min(size) < 1:
        raise ConfigError(f"the size of the images is at least 1 x 1, not {' x '.join(map(str, size))}")
    check_file(target, overwrite=overwrite)


def held_out(name: str, rows: int, test: float) -> set[int]:
    """Draw the fraction `test` of the rows of a class, by a fixed seed."""
    order = generator(0, "import", name).permutation(rows)
    return set(order[: round(rows * test)].tolist())


@contextmanager
def new_data_file(target: Path, classes: Sequence[str]) -> Iterator[h5py.File]:
    """Give the file to write, with the names of the classes, if any; it appears complete or not at all. Raises
    OutputError."""
    try:
        with new_hdf5(target) as file:  # whose format has room for the names of thousands of classes
            if classes:  # names of fixed length: with a checksum
                file.attrs["classes"] = np.array([name.encode() for name in classes])
            yield file
    except (OSError, RuntimeError) as error:
        raise OutputError(f"cannot write {target} ({error}); free space or choose another place") from error


def write_rows(
    source: Path, target: Path, arrays: Mapping[str, Array], size: Size | None, test: float | None
) -> Imported:
    """Write x, y and perhaps x_test and y_test as a data set.

    x: (rows, ...), uint8 or floating-point; with `size`, rows of as many numbers become images of that shape, of bytes
    where all are whole numbers of 0 to 255. y: (rows,) texts or whole numbers, the classes; or (rows, k)
    floating-point. Without test rows the fraction `test` (TEST) of each class is held out. Raises DataError, and
    OutputError.
    """
    arrays, file = dict(arrays), str(source)
    notes: list[str] = []
    arrays |= {name: _shaped(x, name, size, file) for name, x in arrays.items() if name.startswith("x")}
    labels = {name: y for name, y in arrays.items() if name.startswith("y") and y.ndim == 1}
    classes: tuple[str, ...] = ()
    if "y" in labels:
        classes, numbered = _numbered(labels, file)
        arrays |= numbered
    check_arrays(arrays, file)
    if "x_test" not in arrays:
        arrays |= _divided(arrays["x"], arrays["y"], classes, TEST if test is None else test)
    both = [x for name, x in arrays.items() if name.startswith("x")]
    if size is not None and all(_are_bytes(x) for x in both):
        arrays |= {name: x.astype(np.uint8) for name, x in arrays.items() if name.startswith("x")}
    elif size is None and both[0].ndim == 2 and both[0].shape[1] >= PIXELS and _seem_pixels(both[0]):
        notes.append("all values are whole numbers of 0 to 255: give --size HEIGHTxWIDTH if they are pixels")
    if classes and "y_test" in arrays:
        lacking = sorted(set(range(len(classes))) - set(arrays["y"].tolist()))
        if lacking:
            notes.append(f"classes without training rows: {listed([classes[label] for label in lacking])}")
    if classes and len(classes) > max(20, len(arrays["y"]) // 2):
        notes.append(f"{len(classes):,} classes for {len(arrays['y']):,} training rows: is the label the right one?")
    if not classes:
        notes.append("the targets are numbers: train with loss: mean_squared_error")
    with new_data_file(target, classes) as output:
        for name, values in arrays.items():
            output.create_dataset(name, data=values)
    tested = len(arrays["x_test"]) if "x_test" in arrays else 0
    return Imported(len(arrays["x"]), tested, arrays["x"].shape[1:], classes, tuple(notes))


def _shaped(x: Array, name: str, size: Size | None, file: str) -> Array:
    """Give the rows the shape that is asked for."""
    each = int(np.prod(x.shape[1:]))
    if size is None or x.shape[1:] == size:
        return x
    whole = size if len(size) == 3 else (*size, each // (size[0] * size[1]) or 1)
    if int(np.prod(whole)) != each:
        asked = " x ".join(map(str, size))
        raise DataError(f"{name} has {each} numbers in a row, which are no image of {asked}; correct --size", file=file)
    return x.reshape(len(x), *whole)


def _are_bytes(x: Array) -> bool:
    """Whether all values are whole numbers of 0 to 255."""
    blocks = (x[first : first + 1024] for first in range(0, len(x), 1024))
    return x.dtype == np.uint8 or all(
        bool((block >= 0).all() and (block <= 255).all() and (block == np.floor(block)).all()) for block in blocks
    )


def _seem_pixels(x: Array) -> bool:
    return x.dtype != np.uint8 and _are_bytes(x) and float(x.max()) > 1


def _numbered(labels: Mapping[str, Array], file: str) -> tuple[tuple[str, ...], dict[str, Array]]:
    """Number the classes in the order of their names, or, where all of these are whole numbers, of those."""
    if len({each.dtype.kind for each in labels.values()}) > 1:
        raise DataError("y and y_test hold labels of different kinds; make them agree", file=file)
    found = np.unique(np.concatenate(list(labels.values())))  # sorted
    if len(found) < 2:
        raise DataError(f"all rows have the label {found[0]!s}, so there is nothing to tell apart", file=file)
    return tuple(str(each) for each in found), {name: np.searchsorted(found, each) for name, each in labels.items()}


def _divided(x: Array, y: Array, classes: Sequence[str], test: float) -> dict[str, Array]:
    """Hold out a part of each class."""
    held = np.zeros(len(x), bool)
    groups = [np.flatnonzero(y == label) for label in range(len(classes))] if classes else [np.arange(len(x))]
    for name, rows in zip(classes or [""], groups, strict=True):
        held[rows[sorted(held_out(name, len(rows), test))]] = True
    arrays = {"x": x[~held], "y": y[~held]}
    return arrays | ({"x_test": x[held], "y_test": y[held]} if held.any() else {})
