"""Import of NumPy's archives of arrays (.npz). Nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np

from nettorrent_mpi.data.files import opening
from nettorrent_mpi.data.importing import Imported, Size, check_import, write_rows
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.errors import DataError, UserError, listed

# Names that the arrays go by: rows, targets, and those of the test; of this package, Keras, MedMNIST, scikit-learn.
USUAL = (
    ("x", "y", "x_test", "y_test"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("X_train", "y_train", "X_test", "y_test"),
    ("X", "y", "X_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("images", "labels", "test_images", "test_labels"),
    ("data", "target", "test_data", "test_target"),
    ("data", "labels", "test_data", "test_labels"),
)
_MOST = 1100  # times as many bytes as packed ones, which is what deflate can make of them
_REMEDY = "give a file that numpy.savez has written"


def import_npz(
    source: Path,
    target: Path,
    size: Size | None = None,
    *,
    test: float | None = None,
    overwrite: bool = False,
) -> Imported:
    """Write the arrays of an archive, under one row of names of USUAL, into the HDF5 file `target`.

    x: (rows, ...), bytes, whole numbers of 0 to 255 or floating-point; y: (rows,) or (rows, 1) whole numbers or texts,
    or (rows, k) floating-point. Images without channels get one. `size` and `test` are those of `write_rows`; an
    archive with test rows is divided already. Raises DataError, ConfigError, OutputError.
    """
    check_import(target, test, size, overwrite=overwrite)
    arrays = _read(source)
    if test is not None and "x_test" in arrays:
        raise DataError("has test rows already: leave out --test", file=str(source))
    return write_rows(source, target, arrays, size, test)


def _read(source: Path) -> dict[str, Array]:
    try:
        with opening(source, _REMEDY) as file, zipfile.ZipFile(file) as archive:
            there = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            names = next((each for each in USUAL if each[0] in there and each[1] in there), None)
            if names is None:
                known = " or ".join(" and ".join(each[:2]) for each in USUAL[:4])
                raise DataError(f"has no arrays {known}; there are {listed(sorted(there))}", file=str(source))
            given = [(name, wanted) for name, wanted in zip(names, USUAL[0], strict=True) if name in there]
            return {wanted: _array(archive, there[name], wanted, name, source) for name, wanted in given}
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:  # of damaged archives nearly any
        text = f"is no whole .npz ({type(error).__name__}: {error}); {_REMEDY}"
        raise DataError(text, file=str(source)) from error


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, wanted: str, name: str, source: Path) -> Array:
    """Read an array, in the form that `write_rows` takes."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read(file)
    if dtype.hasobject:
        text = f"{name} holds Python objects, which are not read; save it as numbers or texts of NumPy"
        raise DataError(text, file=str(source))
    if math.prod(shape) * dtype.itemsize > _MOST * info.compress_size + 4096:
        raise DataError(f"{name} promises {shape} {dtype}, more than the file holds; {_REMEDY}", file=str(source))
    with archive.open(info) as file:
        values = np.lib.format.read_array(file, allow_pickle=False)
    if not values.shape or not len(values):
        raise DataError(f"{name} has no rows: shape {values.shape}", file=str(source))
    return _as_y(values, name, source) if wanted.startswith("y") else _as_x(values, name, source)


def _as_x(values: Array, name: str, source: Path) -> Array:
    if values.ndim == 3:
        values = values[..., None]
    if values.dtype.kind in "iub" and values.dtype != np.uint8:
        fits = values.min() >= 0 and values.max() <= 255
        values = values.astype(np.uint8 if fits else np.float32)
    if values.dtype.kind != "f" and values.dtype != np.uint8:
        raise DataError(f"{name} holds {values.dtype}; save it as numbers", file=str(source))
    if values.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if len(bad):
            raise DataError(f"{name} has a value that is not finite, in row {bad[0]}; remove it", file=str(source))
        values = values.astype(np.float64 if values.dtype.itemsize > 4 else np.float32)
    return np.ascontiguousarray(values)


def _as_y(values: Array, name: str, source: Path) -> Array:
    if values.ndim == 2 and values.shape[1] == 1 and values.dtype.kind != "f":
        values = values[:, 0]  # as MedMNIST and CIFAR of Keras have it
    if values.ndim == 1 and values.dtype.kind == "f":
        values = values[:, None]
    whole = values.ndim == 1 and values.dtype.kind in "iubSU"
    if not whole and not (values.ndim == 2 and values.dtype.kind == "f"):
        text = f"{name} holds {values.dtype} of shape {values.shape}; save a label for each row, or floating targets"
        raise DataError(text, file=str(source))
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "backslashreplace")
    return values.astype(np.int64) if values.dtype.kind in "iub" else values
