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
        if repeats * local[-1] >= 256:
            break
        repeats *= size
    return repeats


def repeated(values: Array, repeats: int, name: str, workspace: Workspace) -> Array:
    """values (channels,) written `repeats` times one after the other into scratch memory, in the workspace's dtype."""
    row = workspace.scratch(f"repeated {name}", (repeats * values.size,))
    row.reshape(repeats, values.size)[...] = values
    return row


def sum_rows(x: Array, total_c: Array, workspace: Workspace) -> None:
    """total_c <- the sum of x over all but its last axis: block by block, so that rounding grows with the blocks only.

    `x` (b, ..., channels) is C-contiguous; `total_c` may have a wider dtype.
    """
    wide = row_repeats(x.shape[1:]) * total_c.size
    x_nw = x.reshape(x.size // wide if wide else 0, wide)
    part_w = workspace.scratch("sum of a block", (wide,))
    total_w = workspace.scratch("sum of blocks", (wide,), total_c.dtype)
    total_w[...] = 0
    for block in blocks(x_nw.shape[0], max(8, BLOCK // max(wide, 1))):
        np.add.reduce(x_nw[block], axis=0, out=part_w)
        total_w += part_w
    np.add.reduce(total_w.reshape(-1, total_c.size) if wide else total_w.reshape(0, 0), axis=0, out=total_c)
