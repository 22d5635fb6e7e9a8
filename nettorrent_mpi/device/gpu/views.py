"""A view is what a kernel sees of an array that need not be contiguous: sizes and strides of four axes."""

from __future__ import annotations

import math
from functools import lru_cache

from nettorrent_mpi.device.arrays import Array, Shape

AXES = 4  # of the kernels' views

# The element types that views may have, with their codes in kernels.cu.
TYPES = {
    name: code
    for code, name in enumerate(
        ("float32", "float64", "bfloat16", "bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64")
    )
}


def type_code(array: Array) -> int:
    """Return the code of an array's element type."""
    code = TYPES.get(array.dtype.name)
    if code is None:
        raise TypeError(f"no kernel reads or writes {array.dtype}")
    return code


def view(out: Array, *arrays: Array) -> tuple[int, ...]:
    """Return the number of elements of `out`, its sizes except the first, its strides, and those of the arrays, which
    are broadcast to its shape; in elements.

    Axes that lie behind one another in all arrays are one axis, and those with the smallest strides of `out` come last,
    where neighbouring threads work: the order of elements does not matter.
    """
    layouts = tuple((array.shape, array.strides, array.dtype.itemsize) for array in (out, *arrays))
    return _view(out.shape, layouts)


@lru_cache(maxsize=4096)
def _view(shape: Shape, layouts: tuple[tuple[Shape, Shape, int], ...]) -> tuple[int, ...]:
    strides = [_strides(shape, *layout) for layout in layouts]
    axes = [(size, *(own[axis] for own in strides)) for axis, size in enumerate(shape) if size != 1]
    axes.sort(key=lambda axis: -abs(axis[1]))
    merged: list[tuple[int, ...]] = []
    for size, *steps in axes:
        if merged and all(before == step * size for before, step in zip(merged[-1][1:], steps, strict=True)):
            merged[-1] = (merged[-1][0] * size, *steps)
        else:
            merged.append((size, *steps))
    if len(merged) > AXES:
        raise ValueError(f"an operation on {len(merged)} axes that do not lie behind one another: {layouts}")
    missing = AXES - len(merged)
    merged = [(1,) * (1 + len(layouts))] * missing + merged
    columns = list(zip(*merged, strict=True))
    return math.prod(shape), *columns[0][1:], *(step for column in columns[1:] for step in column)


def _strides(shape: Shape, own: Shape, strides: Shape, itemsize: int) -> list[int]:
    """Return an array's strides along the axes of `shape`, to which it is broadcast."""
    extra = len(shape) - len(own)
    fits = extra >= 0 and all(size in (1, whole) for size, whole in zip(own, shape[max(extra, 0) :], strict=True))
    if not fits:
        raise ValueError(f"an array of shape {own} does not fit into one of shape {shape}")
    found = [0 if size == 1 else stride // itemsize for size, stride in zip(own, strides, strict=True)]
    return [0] * extra + found


def order_in_memory(x: Array) -> list[int]:
    """Return the axes of x in the order in which its elements lie in memory, the slowest first."""
    return sorted(range(x.ndim), key=lambda axis: -x.strides[axis])
