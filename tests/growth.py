"""Measures what this process takes of the machine, and whether it takes more and more."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

LIBRARY = ctypes.CDLL(None)
WINDOWS = 4  # parts of a run that are compared


class Usage(NamedTuple):
    """A Usage is what this process has: resident KiB, private ones and those of mapped files; open descriptors; mapped
    files of /dev/shm; threads."""

    private: int
    files: int
    descriptors: int
    mapped: int
    threads: int


def usage() -> Usage:
    """Return what this process has now, without garbage that is still to be collected, and without memory that was
    freed and that the C library keeps, scattered: not its peak, which one large array or an earlier test may have
    set."""
    gc.collect()
    if hasattr(LIBRARY, "malloc_trim"):
        LIBRARY.malloc_trim(0)
    sizes = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    private, resident = int(sizes["Anonymous:"]), int(sizes["Rss:"])
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = {parts[5] for parts in maps if len(parts) == 6 and parts[5].startswith("/dev/shm/")}
    descriptors = len(os.listdir("/proc/self/fd"))
    return Usage(private, resident - private, descriptors, len(mapped), threading.active_count())


def least(seen: Sequence[Usage]) -> Usage:
    """Return the least of each: what is there for a moment only does not count."""
    return Usage(*map(min, zip(*seen, strict=True)))


def growth(windows: Sequence[Usage]) -> Usage:
    """Return by how much each has grown at least from one window to the next. What leaks grows in every window; what is
    made when it is first needed, in one of them."""
    return least([Usage(*(b - a for a, b in zip(*pair, strict=True))) for pair in pairwise(windows)])
