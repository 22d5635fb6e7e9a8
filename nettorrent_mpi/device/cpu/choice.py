"""Which kernels this process may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import ClassVar, Literal

Kernels = Literal["fastest", "numpy"]


class _Process:
    """What holds for this process."""

    kernels: ClassVar[Kernels] = "fastest"


def use(kernels: Kernels) -> None:
    """From now on the fastest of what is installed, or NumPy alone. To be called before layers are made."""
    _Process.kernels = kernels


@contextmanager
def numpy_alone() -> Iterator[None]:
    """For a while."""
    before = _Process.kernels
    _Process.kernels = "numpy"
    try:
        yield
    finally:
        _Process.kernels = before


def fastest() -> bool:
    """May other kernels than NumPy's be used?"""
    return _Process.kernels == "fastest"


def names() -> list[str]:
    """What kernels this process may use, by the names of the libraries."""
    from nettorrent_mpi.device.cpu.onednn import library

    if not fastest():
        return ["numpy"]
    return ["numpy", *(["numba"] if installed("numba") else []), *(["onednn"] if library() is not None else [])]


@cache
def installed(module: str) -> bool:
    """Can this optional module be imported? It is not loaded here."""
    return find_spec(module) is not None
