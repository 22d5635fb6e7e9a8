"""How layers walk through memory: in blocks that stay in the cache and rows that are long enough for a ufunc."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nettorrent_mpi.nn.backend import Array, Shape, Workspace

BLOCK = 16384  # elements: a few such float32 arrays fit into the second-level cache of every current processor


def blocks(size: int, block: int = BLOCK) -> Iterator[slice]:
    """[0, size) cut into slices of at most `block`."""
    for start in range(0, size, block):
        yield slice(start, min(start + block, size))


def gradient(workspace: Workspace, shape: Shape, dy: Array) -> Array:
    """Shared memory for a dx of `shape` that does not lie over dy: two buffers take turns along the layers."""
    dx = workspace.scratch("dx", shape)
    return workspace.scratch("other dx", shape) if np.may_share_memory(dx, dy) else dx


def row_repeats(local: Shape) -> int:
    """How many positions to take together so that one row of (positions * channels) is long enough for a ufunc.

    NumPy pays some 10 ns for each run along the last axis; channels are often as few as 16, so a vector per channel
    is repeated and combined with several positions at once. The result divides the number of positions of a row.
    """
    repeats = 1
    for size in reversed(local[:-1]):
        if repeats * local[-1] >= 512:
            break
        repeats *= size
    return repeats


def repeated(values: Array, repeats: int, name: str, workspace: Workspace) -> Array:
    """values (channels,) written `repeats` times one after the other into scratch memory, in the workspace's dtype."""
    row = workspace.scratch(f"repeated {name}", (repeats * values.size,))
    row.reshape(repeats, values.size)[...] = values
    return row


def sum_rows(x_nc: Array, total_c: Array, workspace: Workspace) -> None:
    """total_c <- the sum of x_nc over its rows: block by block, so that rounding grows with the blocks only.

    `total_c` may have a wider dtype than `x_nc`; `x_nc` (rows, channels) is C-contiguous.
    """
    rows, channels = x_nc.shape
    total_c[...] = 0
    part_c = workspace.scratch("sum of a block", (channels,))
    for block in blocks(rows, max(1, BLOCK // max(channels, 1))):
        np.add.reduce(x_nc[block], axis=0, out=part_c)
        total_c += part_c
