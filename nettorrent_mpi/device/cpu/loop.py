"""Loops over elements are compiled by Numba, if installed: one pass over memory instead of several.

Every loop has an equivalent NumPy path. A loop does the same operations in the same order, and Numba may neither
reassociate nor contract them: both give the same numbers, bit for bit, except where a loop says otherwise. Arrays are
C-contiguous, and no two of them overlap (such a loop would not vectorize). Scalars have the arrays' type (`float32`
times a Python float would be computed in float64).
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, cast


class Inlined:
    """An Inlined function is called by loops of its module; Numba compiles it into them."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.__doc__ = function.__doc__

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class Loop:
    """A Loop is a function over arrays. Numba compiles it at the first call, and keeps the code on disk for later
    runs, if it can."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._compiled: Callable[..., Any] | None = None
        self._kept = False  # whether the compiled code is kept on disk
        self.__doc__ = function.__doc__

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            self._compile()
        assert self._compiled is not None
        try:
            return self._compiled(*arguments)
        except Exception:  # a loop raises nothing itself: the disk is full, or a file on it is damaged
            if not self._kept:
                raise
        try:
            return self._compiled(*arguments)  # where the code could only not be written
        except Exception:
            self._compile(keep=False)
            return self._compiled(*arguments)

    def _compile(self, *, keep: bool = True) -> None:
        from numba import njit  # takes 0.3 s and 60 MB: loaded only where needed

        try:
            self._compiled = njit(cache=keep, error_model="numpy", nogil=True)(_with_inlined(self._function, njit))
            self._kept = keep
        except (RuntimeError, OSError):  # no cache folder that can be written
            if not keep:
                raise
            self._compile(keep=False)


def _with_inlined(function: Callable[..., Any], njit: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function in which those that it calls are compiled, too."""
    own = cast("FunctionType", function)
    called = {name: own.__globals__.get(name) for name in own.__code__.co_names}
    compiled = {name: njit(each.function) for name, each in called.items() if isinstance(each, Inlined)}
    if not compiled:
        return function
    made = FunctionType(own.__code__, own.__globals__ | compiled, own.__name__, own.__defaults__, own.__closure__)
    made.__module__, made.__qualname__ = own.__module__, own.__qualname__
    return made
