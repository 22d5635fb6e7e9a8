"""The parts share a device, arrays to and from it, captured runs, and times by the GPU's own clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from nettorrent_mpi.device import gpu as package
from nettorrent_mpi.device.arrays import Array

TYPES = ("float32", "tf32", "float64", "bfloat16")
ROUNDING = {"float32": 2.0**-24, "tf32": 2.0**-11, "float64": 2.0**-53, "bfloat16": 2.0**-9}


class WrongNumbers(Exception):  # noqa: N818
    """Raised where the device's numbers are not what they should be."""


class OnDevice:
    """A device, and arrays on it of one of the TYPES."""

    def __init__(self, name: str = "float32", device: package.Gpu | None = None):
        self.name = name
        self.device = device or package.Gpu(package.open_runtime(0), tf32=name == "tf32")
        self.dtype = dtype_of(name)
        self._workspace: Array | None = None

    def up(self, values: Array, dtype: Any = None) -> Array:
        """Return the values, rounded to the type, on the device."""
        rounded = np.ascontiguousarray(values).astype(self.dtype if dtype is None else dtype)
        array = self.device.empty(rounded.shape, rounded.dtype)
        self.device.upload(array, rounded)
        return array

    def down(self, array: Array) -> Array:
        """Return an array of the device in float64."""
        return self.device.on_host(array).astype(np.float64)

    def rounded(self, values: Array) -> Array:
        """Return what `up` makes of the values, in float64."""
        return values.astype(self.dtype).astype(np.float64)

    def workspace(self, size: int) -> Array:
        """Return memory for a library."""
        if self._workspace is None or self._workspace.size < size:
            self._workspace = self.device.empty((size,), np.uint8)
        return self._workspace[:size]

    def captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return what replays a run as a graph."""
        graph = self.device.runtime.capture(self.device.stream, run)
        return lambda: graph.launch(self.device.stream)

    def seconds(self, run: Callable[[], None], least: float = 0.02, turns: int = 5) -> float:
        """Return the median seconds of a run on the GPU: of as many in a row as take `least` seconds."""
        run()
        self.device.synchronize()
        count = 1
        while (taken := self._timed(run, count)) < least:
            count = max(2 * count, int(1.2 * count * least / max(taken, 1e-9)))
        return median([taken, *(self._timed(run, count) for _ in range(turns - 1))]) / count

    def _timed(self, run: Callable[[], None], count: int) -> float:
        self.device.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            run()
        self.device.synchronize()
        return time.perf_counter() - began


def dtype_of(name: str) -> Any:
    """Return the NumPy type of one of the TYPES."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype("float32" if name == "tf32" else name)


def error_of(found: Array, wanted: Array, terms: Array | float) -> float:
    """Return the largest error relative to `terms`, the sum of the magnitudes of what is added up."""
    if not found.size:
        return 0.0
    wrong = np.abs(found - wanted) / np.maximum(terms, np.finfo(np.float64).tiny)
    return float(np.nan_to_num(wrong, nan=np.inf).max())


def check(error: float, limit: float) -> None:
    """Raise WrongNumbers if an error is above its limit."""
    if not error <= limit:
        raise WrongNumbers(f"the error is {error:.3g}, the limit {limit:.3g}")
