"""Loops over elements are compiled by Numba, if installed: one pass over memory instead of several.

Every loop has an equivalent NumPy path. A loop does the same operations in the same order, and Numba may neither
reassociate nor contract them: both give the same numbers, bit for bit, except where a loop says otherwise. Arrays are
C-contiguous, and no two of them overlap (such a loop would not vectorize). Scalars have the arrays' type (`float32`
times a Python float would be computed in float64).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Loop:
    """A Loop is a function over arrays. Numba compiles it at the first call, and keeps the code on disk for later
    runs."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._compiled: Callable[..., Any] | None = None
        self.__doc__ = function.__doc__

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            from numba import njit  # takes 0.3 s and 60 MB: loaded only where needed

            try:
                self._compiled = njit(cache=True, error_model="numpy", nogil=True)(self._function)
            except RuntimeError:  # no writable cache folder
                self._compiled = njit(error_model="numpy", nogil=True)(self._function)
        return self._compiled(*arguments)
