"""Loops over elements are compiled by Numba, where it is installed: one pass over memory in the place of several.

Beside every use stands a NumPy path. A loop does the same operations in the same order as that path, and Numba is not
allowed to reassociate or to contract them: both give the same numbers, bit for bit, except where a loop says otherwise.
Arrays are C-contiguous, and no two of them overlap (such a loop would not run on vectors). Scalars have the arrays'
type (`float32` times a Python float would be computed in float64).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Loop:
    """A function over arrays. Numba compiles it when it is first called, and keeps the code on disk for later runs."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._compiled: Callable[..., Any] | None = None
        self.__doc__ = function.__doc__

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            from numba import njit  # takes 0.3 s and 60 MB: only where something is compiled

            try:
                self._compiled = njit(cache=True, error_model="numpy", nogil=True)(self._function)
            except RuntimeError:  # nowhere to keep the code
                self._compiled = njit(error_model="numpy", nogil=True)(self._function)
        return self._compiled(*arguments)
