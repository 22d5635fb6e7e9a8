"""Tuning finds the fastest of several algorithms for the same operation: each is timed once, and the results are kept.

Results are kept in a file for each host and version of the libraries, so that later runs start at once and choose
alike: kernels-HOST.json (see choices). The ranks of a host run the trials one after another.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nettorrent_mpi import __version__
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.choices import choices_folder, open_choices, read_choices, write_choices
from nettorrent_mpi.device.cpu import blas, onednn

REPEATS = 5  # timed calls of each algorithm, after one that is not counted; the fastest counts
SECONDS = 0.1  # seconds for all calls of an algorithm, but for the first two
# Relative to the largest number, by bytes per element: far more than rounding, also Winograd's.
TOLERANCE = {2: 2e-2, 4: 1e-3, 8: 1e-9}
SAMPLE = 1 << 20  # approximate count of compared numbers


class Tuning:
    """A Tuning knows which libraries one device may use, and which algorithms it has found to be the fastest."""

    def __init__(self, kernels: Literal["fastest", "numpy"] = "fastest"):
        self.kernels = kernels
        self.compiled = kernels == "fastest" and find_spec("numba") is not None  # whether loops may be called
        self._known: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """The libraries that may be used."""
        return ["numpy", *(["numba"] if self.compiled else []), *(["onednn"] if self.onednn() is not None else [])]

    @property
    def missing(self) -> list[str]:
        """The optional libraries that may be used and are not installed, though they are published for this machine."""
        if self.kernels != "fastest":
            return []
        return [
            *([] if self.compiled else ["Numba"]),
            *(["oneDNN"] if onednn.published() and self.onednn() is None else []),
        ]

    def gemm(self, dtype: np.dtype[Any]) -> blas.Gemm | None:
        """Return BLAS's product of matrices, if it may be used."""
        return blas.gemm(dtype) if self.kernels == "fastest" else None

    def onednn(self) -> onednn.Library | None:
        """Return oneDNN, if it is installed and may be used."""
        return onednn.library() if self.kernels == "fastest" else None

    def fastest(self, what: str, algorithms: Mapping[str, Callable[[], object]], out: Array) -> str:
        """Return the name of the fastest of `algorithms`, which all do `what` to `out`.

        Each may be called several times. Those whose results differ from the first one's by more than rounding are
        rejected: libraries have bugs on some processors.
        """
        if len(algorithms) == 1:
            return next(iter(algorithms))
        key = f"{what}: {' or '.join(algorithms)}"
        if key not in self._known:
            with open_choices(_path) as file:
                self._known.update(read_choices(file).get(_subject(), {}))
                if self._known.get(key) not in algorithms:
                    self._known[key] = _try(algorithms, out)
                    write_choices(file, _subject(), self._known)
        return self._known[key]


def _try(algorithms: Mapping[str, Callable[[], object]], out: Array) -> str:
    sample = out.reshape(-1)[:: max(1, out.size // SAMPLE)]
    right: Array | None = None
    times = {}
    for name, algorithm in algorithms.items():
        out[...] = 0
        try:
            algorithm()  # allocates, and warms the caches
        except RuntimeError:  # a library does not support this size
            continue
        if right is None:
            right = sample.copy()
        elif not _alike(sample, right):
            continue
        times[name] = _time(algorithm)
    return min(times, key=lambda name: times[name])


def _alike(found: Array, right: Array) -> bool:
    tolerance = TOLERANCE[right.dtype.itemsize]
    found, right = (x.astype(np.float32) if x.itemsize == 2 else x for x in (found, right))
    scale = float(np.abs(right).max())
    if not np.isfinite(scale):  # as the rows or weights are not: that tells nothing
        return True
    return bool(np.abs(found - right).max() <= tolerance * scale)


def _time(algorithm: Callable[[], object]) -> float:
    best, spent = float("inf"), 0.0
    for _ in range(REPEATS):
        began = time.perf_counter()
        algorithm()
        took = time.perf_counter() - began
        best, spent = min(best, took), spent + took
        if spent > SECONDS:
            break
    return best


@cache
def _path() -> Path:
    return choices_folder() / f"kernels-{platform.node() or 'host'}.json"


@cache
def _subject() -> str:
    """Name what the results are valid for: this processor with these libraries and settings."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = ("vendor_id", "cpu family", "model", "stepping")
        told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        processor = " ".join(told.get(name, "") for name in wanted)
    settings = " ".join(os.environ.get(name, "") for name in ("OPENBLAS_CORETYPE", "OMP_NUM_THREADS"))
    return f"{__version__}, numpy {np.__version__}, {processor}, {settings}"
