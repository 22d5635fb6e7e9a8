"""A workspace gives the same arrays in every pass, once its memory has grown to what a pass needs."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace

SIZES = [2, 30, 3, 9]  # of the gradients from the last layer to the first


def backward(workspace: Workspace, dy: Array) -> list[Array]:
    """Two micro-batches, the first of them larger."""
    found = []
    for rows in (6, 5):
        gradient = dy[:rows]
        for size in SIZES:
            dx = workspace.gradient((rows, size), gradient)
            assert not np.may_share_memory(dx, gradient)
            found.append(dx)
            gradient = dx
    return found


def test_all_memory_of_gradients_is_allocated_in_the_first_pass() -> None:
    workspace, dy = Workspace("float64"), np.zeros((6, 4))
    backward(workspace, dy)
    allocated = workspace.bytes
    second, third = backward(workspace, dy), backward(workspace, dy)
    assert workspace.bytes == allocated
    assert all(a is b for a, b in zip(second, third, strict=True))
