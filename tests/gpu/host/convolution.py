"""Convolutions as cuDNN computes them, by NumPy (see device.geometry for the formula): bfloat16 is multiplied and added
up in float32, and everything is rounded once, at the end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.geometry import Geometry
from tests.gpu.host.products import operand


def forward(
    x: Array,
    weight: Array,
    y: Array,
    geometry: Geometry,
    bias: Array | None = None,
    relu: bool = False,
    tf32: bool = False,
) -> None:
    """Compute y <- the convolution of x (b, height, width, inputs) with weight (outputs, height, width, inputs), plus
    the bias, then max(., 0)."""
    _check(x, weight, y, geometry)
    padded, w = _padded(operand(x, tf32), geometry), operand(weight, tf32)
    total = np.zeros(y.shape, w.dtype)
    for p, q, window in _taps(padded, geometry):
        total += np.matmul(window, w[:, p, q].T)
    if bias is not None:
        total += bias
    if relu:
        np.maximum(total, 0, out=total)
    y[...] = total


def grad_x(x: Array, weight: Array, y: Array, geometry: Geometry, tf32: bool = False) -> None:
    """Compute x <- the gradient with respect to the images, y being dy."""
    _check(x, weight, y, geometry)
    dy, w = operand(y, tf32), operand(weight, tf32)
    padded = _padded(np.zeros(x.shape, w.dtype), geometry)
    for p, q, window in _taps(padded, geometry):
        np.add(window, np.matmul(dy, w[:, p, q]), out=window)
    top, left = geometry.vertical[0], geometry.horizontal[0]
    x[...] = padded[:, top : top + x.shape[1], left : left + x.shape[2]]


def grad_w(x: Array, weight: Array, y: Array, geometry: Geometry, tf32: bool = False) -> None:
    """Compute weight <- the gradient with respect to the filters, y being dy."""
    _check(x, weight, y, geometry)
    assert weight.dtype == x.dtype, "cuDNN has no engine that rounds to another type"
    padded, dy = _padded(operand(x, tf32), geometry), operand(y, tf32)
    for p, q, window in _taps(padded, geometry):
        weight[:, p, q] = np.tensordot(dy, window, axes=((0, 1, 2), (0, 1, 2)))


def _check(x: Array, weight: Array, y: Array, geometry: Geometry) -> None:
    assert x.shape[1:] == geometry.image
    assert y.shape == (len(x), *geometry.output)
    assert weight.shape == (geometry.output[2], *geometry.kernel, geometry.image[2])
    assert x.dtype == y.dtype
    assert all(array.flags.c_contiguous for array in (x, weight, y))


def _padded(x: Array, geometry: Geometry) -> Array:
    return np.pad(x, ((0, 0), geometry.vertical, geometry.horizontal, (0, 0)))


def _taps(padded: Array, geometry: Geometry) -> Iterator[tuple[int, int, Array]]:
    """Yield each tap (p, q) of the kernel with the pixels under it, (b, places down, places across, inputs)."""
    (high, wide, _), (down, across) = geometry.output, geometry.stride
    for p in range(geometry.kernel[0]):
        for q in range(geometry.kernel[1]):
            yield p, q, padded[:, p : p + (high - 1) * down + 1 : down, q : q + (wide - 1) * across + 1 : across]
