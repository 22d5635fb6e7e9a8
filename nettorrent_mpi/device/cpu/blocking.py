"""Blocking: operations process memory in blocks that stay in the cache, and in rows that are long enough for a
ufunc."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from nettorrent_mpi.device.arrays import Array, Shape, Workspace

BLOCK = 16384  # elements: a few such float32 arrays fit into the second-level cache of every current processor


def blocks(size: int, block: int = BLOCK) -> Iterator[slice]:
    """Cut [0, size) into slices of at most `block`."""
    for start in range(0, size, block):
        yield slice(start, min(start + block, size))


def row_repeats(local: Shape) -> int:
    """Return how many positions to process together so that a row of (positions * channels) is long enough for a ufunc.

    NumPy pays some 10 ns for each run along the last axis; channels are often as few as 16, so a vector per channel is
    repeated and combined with several positions at once. The result divides the number of positions of a row.
    """
    repeats = 1
    for size in reversed(local[:-1]):
        if repeats * local[-1] >= 256:
            break
        repeats *= size
    return repeats


def repeated(values: Array, repeats: int, name: str, workspace: Workspace) -> Array:
    """Write values (channels,) `repeats` times in sequence into scratch memory, in the workspace's dtype."""
    row = workspace.scratch(f"repeated {name}", (repeats * values.size,))
    row.reshape(repeats, values.size)[...] = values
    return row


def wide_rows(x: Array, repeats: int) -> Array:
    """Return x (b, ..., channels), C-contiguous, as (rows, repeats * channels)."""
    wide = repeats * x.shape[-1]
    return x.reshape(x.size // wide if wide else 0, wide)


class RowSum:
    """A RowSum accumulates the sum per channel over all rows and positions, block by block.

    So rounding errors grow with the number of blocks only, and the total may have a wider type than the blocks.
    """

    def __init__(self, name: str, repeats: int, total_c: Array, workspace: Workspace):
        wide = repeats * total_c.size
        self._total_c = total_c
        self._part_w = workspace.scratch("sum of a block", (wide,))
        self._total_w = workspace.scratch(f"sum {name}", (repeats, total_c.size), total_c.dtype)
        self._total_w[...] = 0

    def add(self, block_nw: Array) -> None:
        """Add a block whose rows hold `repeats` positions each."""
        np.add.reduce(block_nw, axis=0, out=self._part_w)
        total_w = self._total_w.reshape(-1)
        np.add(total_w, self._part_w, out=total_w)

    def finish(self) -> None:
        """Write the sum to total_c."""
        np.add.reduce(self._total_w, axis=0, out=self._total_c)


def rows_of(x: Array) -> Array:
    """Return x (b, ..., c) as (rows * positions, c), also if c is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def row_block(wide: int) -> int:
    """Return the number of rows of `wide` elements in a block: few enough also for a small rounding error of their
    sum."""
    return min(64, max(8, BLOCK // max(wide, 1)))
