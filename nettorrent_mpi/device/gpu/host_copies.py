"""Copies between the host and a GPU, at rest: the host waits for them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.runtime import Runtime, Stream
from nettorrent_mpi.device.gpu.views import order_in_memory

STAGING_BYTES = 1 << 24  # of pinned memory, through which everything goes


class HostCopies:
    """HostCopies are of arrays of any strides, and go through one buffer in pinned memory. The GPU is idle when a copy
    begins."""

    def __init__(self, runtime: Runtime, stream: Stream):
        self._runtime, self._stream = runtime, stream
        self._buffer: Array | None = None

    def upload(self, out: Array, values: Array) -> None:
        """out, on the GPU, <- values, on the host; both of one shape."""
        assert out.shape == values.shape, (out.shape, values.shape)
        order = order_in_memory(out)
        source = np.ascontiguousarray(values.transpose(order), out.dtype).reshape(-1).view(np.uint8)
        for begin, parts in self._rounds(out.transpose(order)):
            size = sum(part.nbytes for part in parts)
            self._pinned()[:size] = source[begin : begin + size]
            at = 0
            for part in parts:
                self._runtime.copy(self._stream, part, self._pinned()[at : at + part.nbytes])
                at += part.nbytes
            self._stream.synchronize()

    def clear(self, out: Array) -> None:
        """Every byte of out, on the GPU, <- 0."""
        for _, parts in self._rounds(out.transpose(order_in_memory(out))):
            size = sum(int(part.nbytes) for part in parts)
            self._pinned()[:size] = 0
            for part in parts:
                self._runtime.copy(self._stream, part, self._pinned()[: part.nbytes])
            self._stream.synchronize()

    def download(self, out: Array, x: Array) -> None:
        """out, on the host, <- x, on the GPU; both of one shape."""
        assert out.shape == x.shape, (out.shape, x.shape)
        order = order_in_memory(x)
        target = np.empty(int(x.size), x.dtype)
        for begin, parts in self._rounds(x.transpose(order)):
            size = 0
            for part in parts:
                self._runtime.copy(self._stream, self._pinned()[size : size + part.nbytes], part)
                size += part.nbytes
            self._stream.synchronize()
            target.view(np.uint8)[begin : begin + size] = self._pinned()[:size]
        ordered = target.reshape([x.shape[axis] for axis in order])
        np.copyto(out.transpose(order), ordered, casting="unsafe")

    def _pinned(self) -> Array:
        if self._buffer is None:
            self._buffer = self._runtime.pinned(STAGING_BYTES)
        return self._buffer

    def _rounds(self, x: Array) -> Iterator[tuple[int, list[Array]]]:
        """Divide x into rounds that fit into the buffer: (bytes before, contiguous parts in the order of x)."""
        begin, size, parts = 0, 0, list[Array]()
        for part in _contiguous(x, STAGING_BYTES // x.dtype.itemsize):
            if size + part.nbytes > STAGING_BYTES:
                yield begin, parts
                begin, size, parts = begin + size, 0, []
            parts.append(part)
            size += int(part.nbytes)
        if parts:
            yield begin, parts


def _contiguous(x: Array, most: int) -> Iterator[Array]:
    """Divide x, in the order of its elements, into contiguous flat parts of at most `most` elements."""
    if x.size == 0:
        return
    inner, axis = 1, x.ndim
    while axis and (x.shape[axis - 1] == 1 or x.strides[axis - 1] == inner * x.dtype.itemsize):
        axis -= 1
        inner *= x.shape[axis]
    for index in np.ndindex(*x.shape[:axis]):
        flat = x[(*index, ...)].reshape(math.prod(x.shape[axis:]))
        for start in range(0, inner, most):
            yield flat[start : start + most]
