"""An HDF5 data set holds `x` (rows, ...) uint8 or floating, `y` (rows,) integer labels or (rows, k) floating targets,
and, with a test set, `x_test` and `y_test` like them. The file's attribute `classes`, if any, lists class names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from nettorrent_mpi.data.files import sampled_checksum
from nettorrent_mpi.data.from_arrays import as_targets, check_arrays, classes_of
from nettorrent_mpi.data.hdf5_attributes import attribute
from nettorrent_mpi.data.hdf5_chunks import PackedChunks
from nettorrent_mpi.data.hdf5_rows import find, open_rows, opened, storage_note
from nettorrent_mpi.data.rows import BYTE, Dataset, Split
from nettorrent_mpi.data.scaling import UNIT, Scaling
from nettorrent_mpi.data.storage import refused, retried
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.errors import DataError


def open_hdf5(path: Path, mean: float | Sequence[float] | None, std: float | Sequence[float] | None) -> Dataset:
    """Open the file as a data set.

    Reads metadata only, unless labels come without the attribute `classes`: then they are read, because the largest
    gives the number of classes. Raises DataError, and ConfigError for wrong `mean` and `std`.
    """
    checksum = sampled_checksum(path, "set data.root to an HDF5 file")
    with opened(path) as file:
        names = ["x", "y", *(["x_test", "y_test"] if "x_test" in file or "y_test" in file else [])]
        arrays = {name: find(file, path, name) for name in names}
        check_arrays(arrays, str(path))
        rows = {name: len(array) for name, array in arrays.items()}
        shape, dtype, labelled = arrays["x"].shape[1:], arrays["x"].dtype, arrays["y"].ndim == 1
        notes = [storage_note(arrays[name], path, name) for name in names[::2]]
        class_names = _class_names(file, path) if labelled else None
    classes = None
    if class_names is not None:
        classes = len(class_names)
    elif labelled:
        labels = {name: _values(path, name) for name in names[1::2]}
        classes = classes_of(labels, str(path))
        seen = np.unique(labels["y"])
        if len(seen) < classes:
            first = int(np.argmax(np.append(seen, classes) != np.arange(len(seen) + 1)))
            more = f", and {classes - len(seen) - 1} more of 0..{classes - 1}" if len(seen) + 1 < classes else ""
            notes.append(f"{path}: no row of y has label {first}{more}: are the classes numbered 0, 1, 2, ...?")
    scaling = Scaling(shape, UNIT if dtype == BYTE else 1.0, mean, std)

    def split(x: str, y: str) -> Split:
        def targets() -> Array:
            return as_targets(_values(path, y), classes, y, str(path))

        return Split(rows[x], shape, dtype, scaling, partial(open_rows, path, x), targets)

    return Dataset(
        "hdf5",
        shape,
        classes,
        split("x", "y"),
        split("x_test", "y_test") if "x_test" in rows else None,
        str(path),
        class_names,
        tuple(note for note in notes if note),
        checksum=checksum,
    )


def _values(path: Path, name: str) -> Array:
    with opened(path) as file:
        data = find(file, path, name)
        PackedChunks(data, path, name).check(0, len(data))
        try:
            return np.asarray(retried(lambda: data[...]))
        except Exception as error:
            refused(error, path)
            raise DataError(f"{name} cannot be read ({error}); write the file again", file=str(path)) from error


def _class_names(file: h5py.File, path: Path) -> tuple[str, ...] | None:
    """Return the attribute `classes`; None without it. Raises DataError unless it is a list of different names."""
    if "classes" not in file.attrs:
        return None
    given = attribute(file, path, "classes")
    listed = given.tolist() if isinstance(given, np.ndarray) and given.ndim == 1 else None
    if not listed or not all(isinstance(name, str | bytes) for name in listed):
        shown = "empty" if isinstance(given, h5py.Empty) or listed == [] else f"{str(given)[:60]!r}"
        raise DataError(
            f"the attribute classes is {shown}, but has to list the names of the classes, as ['no', 'yes']; remove it "
            "if they have none",
            file=str(path),
        )
    names = tuple(name.decode(errors="replace") if isinstance(name, bytes) else name for name in listed)
    places: dict[str, int] = {}
    for number, name in enumerate(names):
        if name in places:
            text = f"the attribute classes names {name[:60]!r} twice ({places[name]} and {number}); correct it"
            raise DataError(text, file=str(path))
        places[name] = number
    return names
