"""Data sets of NumPy arrays, which are checked and described like the rows of files."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nettorrent_mpi.data.rows import BYTE, Dataset, Split
from nettorrent_mpi.data.scaling import UNIT, Scaling
from nettorrent_mpi.device.arrays import Array, DType
from nettorrent_mpi.plan.errors import DataError

SAMPLE = 16  # rows of an array that tell it from another one
BLOCK = 1024  # rows that are looked at together, so that copies stay small
_MOST_CLASSES = 1 << 31


def from_arrays(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    x_test: npt.ArrayLike | None = None,
    y_test: npt.ArrayLike | None = None,
    *,
    classes: int | Sequence[str] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> Dataset:
    """Make a data set of arrays that every rank holds alike.

        x: (rows, features) or (rows, height, width, channels). uint8 is scaled to 0..1, floating-point values are used
            unchanged. Not copied if C-contiguous (a memory map stays in its file): do not change it during training.
        y: (rows,) integer labels 0 .. classes - 1, or (rows, k) floating-point targets.
        x_test, y_test: the test set, like x and y.
        classes: the number of classes, or their names; by default one more than the largest label of y and y_test.
        mean, std: scaled values x become (x - mean) / std: one number, or one per channel (last dimension).

    Raises DataError for arrays of other shapes or types, or that do not fit each other; ConfigError for wrong `mean`
    and `std`.
    """
    given = {"x": x, "y": y, "x_test": x_test, "y_test": y_test}
    arrays = {name: np.asarray(values) for name, values in given.items() if values is not None}
    check_arrays(arrays)
    inputs, targets = arrays["x"], arrays["y"]
    if targets.ndim == 2 and classes is not None:
        raise DataError(f"classes={classes} is for integer labels; y holds {targets.dtype} of shape {targets.shape}")
    names = None if classes is None or isinstance(classes, int) else tuple(classes)
    count = classes if isinstance(classes, int) else len(names) if names is not None else None
    if names is not None and len(set(names)) < len(names):
        raise DataError(f"classes={list(names)} has a name twice; give each class a name of its own")
    if targets.ndim == 1 and count is None:
        count = classes_of({name: values for name, values in arrays.items() if name.startswith("y")})
    scaling = Scaling(inputs.shape[1:], UNIT if inputs.dtype == BYTE else 1.0, mean, std)

    def split(x_name: str, y_name: str) -> Split:
        return Split.of_array(arrays[x_name], scaling, as_targets(arrays[y_name], count, y_name))

    test = split("x_test", "y_test") if "x_test" in arrays else None
    checksum = 0
    for values in arrays.values():
        some = np.linspace(0, len(values) - 1, min(len(values), SAMPLE)).astype(np.intp)
        checksum = zlib.crc32(np.ascontiguousarray(values[some]).tobytes(), checksum)
    return Dataset("arrays", inputs.shape[1:], count, split("x", "y"), test, class_names=names, checksum=checksum)


def unlabelled(x: npt.ArrayLike, like: Split, dtype: DType) -> Split:
    """Make a split without targets, for predictions, of rows that are prepared like those of `like`.

    x: (rows, *like.shape), of like's dtype, and then scaled like its rows; or floating-point, and then taken to be on
    the scale of 0..1 already if `like` holds bytes. `mean` and `std` apply in both cases. Raises DataError, also for a
    value that is not finite in `dtype`, which the network computes in.
    """
    rows = np.asarray(x)
    if rows.shape[1:] != like.shape or rows.ndim == 0:
        one = "; write x[np.newaxis] for a single row" if rows.shape == like.shape else ""
        raise DataError(f"x has shape {rows.shape}; the network reads rows of {like.shape}{one}")
    stored = rows.dtype == BYTE and like.dtype == BYTE
    if not stored and rows.dtype.kind != "f":
        wanted = "uint8 or floating" if like.dtype == BYTE else "floating"
        raise DataError(f"x holds {rows.dtype}; make it {wanted}, as the network was trained on")
    scaled_before = like.dtype == BYTE and not stored
    split = Split.of_array(rows, like.scaling.without_unit() if scaled_before else like.scaling, None)
    inputs = split.inputs()
    for first in range(0, 0 if stored else split.rows, BLOCK):
        wrong = inputs.first_nonfinite(np.arange(first, min(first + BLOCK, split.rows)), dtype)
        if wrong is not None:
            raise DataError(f"x: {wrong.describe()}; correct it, or leave the row out")
    return split


def check_arrays(arrays: Mapping[str, Any], file: str | None = None) -> None:
    """Raise DataError unless x and y, and perhaps x_test and y_test, can be a data set.

    x is (rows, ...), uint8 or floating-point, not empty; y is (rows,) integers or (rows, k) floating-point. They are
    NumPy arrays, or data sets in an HDF5 file: only their shape and dtype are used.
    """
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise DataError("x_test and y_test come together: give both or none", file=file)
    for name, values in arrays.items():
        shape, dtype = values.shape, values.dtype
        if name.startswith("y"):
            if (dtype.kind, len(shape)) not in (("i", 1), ("u", 1), ("f", 2)):
                text = f"{name} holds {dtype} of shape {shape}; write integers (rows,) or floating targets (rows, k)"
                raise DataError(text, file=file)
        elif dtype.kind != "f" and dtype != BYTE:
            raise DataError(f"{name} holds {dtype}; write it as uint8 or floating", file=file)
        elif len(shape) < 2 or 0 in shape:
            text = f"{name} has shape {shape}; write (rows, features) or (rows, height, width, channels), not empty"
            raise DataError(text, file=file)
    for x, y in (("x", "y"), ("x_test", "y_test")):
        if x in arrays and len(arrays[x]) != len(arrays[y]):
            text = f"{x} has {len(arrays[x])} rows but {y} has {len(arrays[y])}; write one target for each row"
            raise DataError(text, file=file)
    for name in ("x", "y"):
        train, test = arrays[name], arrays.get(f"{name}_test", arrays[name])
        same = test.dtype == train.dtype if name == "x" else (test.dtype.kind == "f") == (train.dtype.kind == "f")
        if not same or test.shape[1:] != train.shape[1:]:
            text = f"{name}_test has rows of {test.shape[1:]} {test.dtype}, {name} of {train.shape[1:]} {train.dtype}"
            raise DataError(f"{text}; make them agree", file=file)


def as_targets(values: Array, classes: int | None, name: str, file: str | None = None) -> Array:
    """Return targets in the engine's form: int64 labels, or, if `classes` is None, floats in native byte order.

    Raises DataError for a label that is not in 0 .. classes - 1.
    """
    if classes is None:
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    wrong = np.flatnonzero((values < 0) | (values >= classes))  # before a conversion, which would wrap large ones
    if len(wrong):
        row = int(wrong[0])
        text = f"{name}: label {values[row]} of row {row} is not in 0..{classes - 1}; correct it or the list of classes"
        raise DataError(text, file=file)
    return values.astype(np.int64, copy=False)


def classes_of(labels: Mapping[str, Array], file: str | None = None) -> int:
    """Return the number of classes of labels that nobody names: one more than the largest.

    Raises DataError for labels that cannot be counted from 0.
    """
    for name, values in labels.items():
        wrong = np.flatnonzero((values < 0) | (values >= _MOST_CLASSES))
        if len(wrong):
            row = int(wrong[0])
            text = f"{name}: label {values[row]} of row {row}; number the classes 0, 1, 2, ..."
            raise DataError(text, file=file)
    return 1 + max(int(values.max()) for values in labels.values())
