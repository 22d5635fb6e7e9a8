"""NumPy arrays become a data set: they are checked, and described as the rows of files are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nettorrent_mpi.data.dataset import Dataset
from nettorrent_mpi.data.rows import BYTE, UNIT, Scaling, Split, as_targets, check_inputs, check_targets
from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.plan.errors import DataError


def from_arrays(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    x_test: npt.ArrayLike | None = None,
    y_test: npt.ArrayLike | None = None,
    *,
    classes: int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> Dataset:
    """Makes a data set of arrays that every rank holds alike.

    x: (rows, features) or (rows, height, width, channels). uint8 is scaled to 0..1, floating values are taken as they
        are. Not copied if C-contiguous (a memory map stays in its file): leave it as it is while it is trained on.
    y: (rows,) integer labels 0 .. classes - 1, or (rows, k) floating targets.
    x_test, y_test: the test set, like x and y.
    classes: how many there are; unless told, one more than the largest label of y and y_test.
    mean, std: subtracted from and divided into the scaled values: one number, or one per channel (last dimension).

    Raises DataError for arrays that are none of this, or do not fit each other; ConfigError for wrong `mean` and `std`.
    """
    parts = [_checked(x, y, "x", "y")]
    if (x_test is None) != (y_test is None):
        raise DataError("x_test and y_test come together: give both or none")
    if x_test is not None and y_test is not None:
        parts.append(_checked(x_test, y_test, "x_test", "y_test"))
    (inputs, targets), (inputs_test, targets_test) = parts[0], parts[-1]
    if inputs_test.shape[1:] != inputs.shape[1:] or inputs_test.dtype != inputs.dtype:
        text = f"x_test has rows of {inputs_test.shape[1:]} {inputs_test.dtype}"
        raise DataError(f"{text}, x of {inputs.shape[1:]} {inputs.dtype}; make them agree")
    if targets_test.dtype.kind != targets.dtype.kind or targets_test.shape[1:] != targets.shape[1:]:
        text = f"y_test has targets of {targets_test.shape[1:]} {targets_test.dtype}"
        raise DataError(f"{text}, y of {targets.shape[1:]} {targets.dtype}; make them agree")
    if targets.ndim == 1:
        if classes is None:
            classes = 1 + max(0, *(int(part.max()) for _, part in parts))
    elif classes is not None:
        raise DataError(f"classes={classes} is for integer labels; y holds {targets.dtype} of shape {targets.shape}")
    shape = inputs.shape[1:]
    scaling = Scaling(shape, UNIT if inputs.dtype == BYTE else 1.0, mean, std)
    splits = [
        Split.of_array(rows, scaling, as_targets(part, classes, name))
        for (rows, part), name in zip(parts, ("y", "y_test"), strict=False)
    ]
    return Dataset("arrays", shape, classes, splits[0], splits[1] if len(splits) > 1 else None)


def unlabelled(x: npt.ArrayLike, like: Split) -> Split:
    """Makes a split without targets, for predictions, of rows that are prepared as those of `like` are.

    x: (rows, *like.shape), of like's dtype, and then scaled as its rows are; or floating, and then taken to be on the
    scale of 0..1 already where `like` holds bytes. `mean` and `std` apply in both cases. Raises DataError.
    """
    rows = np.asarray(x)
    if rows.shape[1:] != like.shape or rows.ndim == 0:
        one = "; write x[np.newaxis] for a single row" if rows.shape == like.shape else ""
        raise DataError(f"x has shape {rows.shape}; the network reads {_dimensions(like.shape)}{one}")
    stored = rows.dtype == BYTE and like.dtype == BYTE
    if not stored and rows.dtype.kind != "f":
        wanted = "uint8 or floating" if like.dtype == BYTE else "floating"
        raise DataError(f"x holds {rows.dtype}; make it {wanted}, as the network was trained on")
    scaled_before = like.dtype == BYTE and not stored
    return Split.of_array(rows, like.scaling.without_unit() if scaled_before else like.scaling, None)


def _checked(x: npt.ArrayLike, y: npt.ArrayLike, x_name: str, y_name: str) -> tuple[Array, Array]:
    inputs, targets = np.asarray(x), np.asarray(y)
    check_inputs(inputs, x_name)
    check_targets(targets, y_name)
    if len(inputs) != len(targets):
        raise DataError(f"{x_name} has {len(inputs)} rows but {y_name} has {len(targets)}; give one target per row")
    return inputs, targets


def _dimensions(shape: Shape) -> str:
    return f"(rows, {', '.join(map(str, shape))})"
