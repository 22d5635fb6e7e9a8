"""Tiles: how kernels that work on the columns of a matrix divide it over blocks of threads (kernels.cu: Tile).

A division depends on the sizes alone, so the order of sums is the same on every GPU.
"""

from __future__ import annotations

import math

from nettorrent_mpi.device.arrays import Array

WIDEST = 64  # columns of a tile: 128 bytes of bfloat16, as much as a warp reads at once
EACH = 8  # rows that a thread takes at least


def tiles(rows: int, columns: int, block: int, blocks: int) -> tuple[int, tuple[int, int]]:
    """Return (columns of a tile, grid) for blocks of so many threads, of which about `blocks` keep a GPU busy."""
    across = -(-columns // WIDEST)
    wide = -(-columns // max(across, 1))
    lanes = block // max(wide, 1)
    chunks = min(-(-rows // (lanes * EACH)), blocks // max(across, 1))
    return wide, (across, max(chunks, 1))


def matrix(x: Array, *others: Array) -> tuple[int, int]:
    """Return (rows and positions, channels) of arrays of one shape (b, ..., c)."""
    assert all(array.shape == x.shape for array in others), [array.shape for array in (x, *others)]
    assert all(array.flags.c_contiguous for array in (x, *others)), "an array is not contiguous"
    return math.prod(x.shape[:-1]), x.shape[-1]
