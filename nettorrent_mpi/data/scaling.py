"""Rows are scaled: bytes to 0..1, then by mean and standard deviation.

Shape suffixes: b = the rows of one call, R = the elements of one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np

from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.plan.errors import ConfigError

UNIT = 1.0 / 255.0  # scales bytes to 0..1


class Scaling:
    """A Scaling scales rows: x <- (x * unit - mean) / std.

    `mean` and `std` are one number, or one per channel (last dimension of a row).

    Raises ConfigError for any other count of numbers, for numbers that are not finite, for a std not above 0, and, if
    there is a `unit`, which scales the values to 0..1, for numbers beyond.
    """

    def __init__(
        self,
        shape: Shape,
        unit: float = 1.0,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ):
        self._size = math.prod(shape)
        means = _per_channel("mean", mean, 0.0, shape)
        stds = _per_channel("std", std, 1.0, shape)
        if not np.all(stds > 0.0):
            raise ConfigError(f"standard deviations must be above 0, not {std}", key="data.std")
        for name, given, values in (("mean", mean, means), ("std", std, stds)):
            if unit != 1.0 and not (values.min() >= 0.0 and values.max() <= 1.0):
                raise ConfigError(
                    f"{given}, but the values are scaled to 0..1 before it applies: divide it by {1 / unit:g}",
                    key=f"data.{name}",
                )
        self.factor, self.offset = unit / stds, means / stds  # (channels,) or (1,): x <- x * factor - offset
        self.unit, self._stds = unit, stds
        self.mean, self.std = _shortest(means), _shortest(stds)
        self._cache: dict[np.dtype[Any], tuple[Array | None, Array | None]] = {}

    def without_unit(self) -> Scaling:
        """Return the same mean and std for values that are already scaled by `unit`."""
        other = copy(self)
        other.factor, other._cache = 1.0 / self._stds, {}
        return other

    def apply(self, x_bR: Array) -> None:
        """Scale x_bR (b, R), of a floating-point type, in place."""
        terms = self._cache.get(x_bR.dtype)
        if terms is None:
            terms = self._cache[x_bR.dtype] = (
                self._term(self.factor, 1.0, x_bR.dtype),
                self._term(self.offset, 0.0, x_bR.dtype),
            )
        factor, offset = terms
        if factor is not None:
            np.multiply(x_bR, factor, out=x_bR)
        if offset is not None:
            np.subtract(x_bR, offset, out=x_bR)

    def _term(self, values: Array, neutral: float, dtype: np.dtype[Any]) -> Array | None:
        if np.all(values == values[0]):
            return None if values[0] == neutral else np.asarray(values[0], dtype)
        # One value per element: broadcasting along a last dimension of three would process three elements at a time.
        return np.tile(values, self._size // len(values)).astype(dtype)


def _per_channel(name: str, value: float | Sequence[float] | None, default: float, shape: Shape) -> Array:
    values = np.atleast_1d(np.asarray(default if value is None else value, np.float64))
    if values.ndim != 1 or len(values) not in (1, shape[-1]):
        text = f"{len(values)} values for rows of shape {shape}: give one number, or {shape[-1]}, one for each channel"
        raise ConfigError(text, key=f"data.{name}")
    if not np.all(np.isfinite(values)):
        raise ConfigError(f"must be finite, not {value}", key=f"data.{name}")
    return values


def _shortest(values: Array) -> tuple[float, ...]:
    """Return the values, or one of them if all are equal."""
    return tuple(values.tolist()) if np.any(values != values[0]) else (float(values[0]),)
