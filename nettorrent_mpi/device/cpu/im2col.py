"""Im2col computes a convolution by matrix products: the windows of the kernel form a matrix, block by block."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu.algorithm import Algorithm, adjoint_padding, turned
from nettorrent_mpi.device.cpu.blocking import repeated, row_repeats, wide_rows
from nettorrent_mpi.device.geometry import Geometry, Pair

# Bytes of one block of the matrix: measured best between 0.25 and 2 MiB on cores with 1 MiB of second-level cache;
# and its least rows, since each block also costs a pass over the weights.
BLOCK_BYTES = 1 << 20
BLOCK_ROWS = 512


class Im2col:
    """The windows of a kernel over images (height, width, channels), padded by (before, after) zeros."""

    def __init__(self, image: tuple[int, int, int], kernel: Pair, stride: Pair, vertical: Pair, horizontal: Pair):
        self.image, self.kernel, self.stride = image, kernel, stride
        self.vertical, self.horizontal = vertical, horizontal
        self.count = (
            (image[0] + sum(vertical) - kernel[0]) // stride[0] + 1,
            (image[1] + sum(horizontal) - kernel[1]) // stride[1] + 1,
        )
        self.size = kernel[0] * kernel[1] * image[2]  # numbers in one window
        self.padded = any(vertical) or any(horizontal)
        self.plain = kernel == (1, 1) and stride == (1, 1) and not self.padded  # the matrix is the image itself

    def blocks(self, rows: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
        """Return (images, rows of places) of one block of the matrix: several images, or part of a large one."""
        places = max(BLOCK_ROWS, BLOCK_BYTES // (self.size * itemsize))
        high, wide = self.count
        if high * wide <= 2 * places:
            each = max(1, places // (high * wide))
            for first in range(0, rows, each):
                yield slice(first, min(first + each, rows)), slice(0, high)
        else:
            each = -(-places // wide)
            for image in range(rows):
                for first in range(0, high, each):
                    yield slice(image, image + 1), slice(first, min(first + each, high))

    def matrix(self, x: Array, images: slice, rows: slice, workspace: Workspace) -> Array:
        """Return the windows at the places of a block, (places, numbers of a window), in scratch memory.

        x (b, height, width, channels) is C-contiguous.
        """
        if self.plain:
            return x[images, rows].reshape(-1, self.size)
        count, high = images.stop - images.start, rows.stop - rows.start
        top = rows.start * self.stride[0] - self.vertical[0]
        source, offset = x, images.start * x.strides[0] + top * x.strides[1]
        if self.padded:
            bottom = (rows.stop - 1) * self.stride[0] + self.kernel[0] - self.vertical[0]
            source, offset = self._pad(x[images], top, bottom, workspace), 0
        # One run of kernel width * channels is one element of a raw type: NumPy copies such elements about twice as
        # fast as runs of numbers.
        run = np.dtype((np.void, self.kernel[1] * x.shape[3] * x.itemsize))
        image, row, column, _ = source.strides
        places = (count, high, self.count[1], self.kernel[0])
        strides = (image, row * self.stride[0], column * self.stride[1], row)
        seen: Array = np.ndarray(places, run, source, offset, strides)
        matrix = workspace.scratch("windows", (count * high * self.count[1], self.size), x.dtype)
        np.copyto(matrix.view(run).reshape(places), seen)
        return matrix

    def _pad(self, x: Array, top: int, bottom: int, workspace: Workspace) -> Array:
        """Return rows [top, bottom) of the padded images."""
        count, height, width, channels = x.shape
        left, right = self.horizontal
        padded = workspace.scratch("padded", (count, bottom - top, left + width + right, channels), x.dtype)
        first, last = max(top, 0), min(bottom, height)
        padded[:, : first - top] = 0
        padded[:, last - top :] = 0
        middle = padded[:, first - top : last - top]
        middle[:, :, :left] = 0
        middle[:, :, left + width :] = 0
        middle[:, :, left : left + width] = x[:, first:last]
        return padded


class Im2colProducts(Algorithm):
    """The im2col algorithm. It rebuilds the matrix in backward: keeping it would take kernel height * width times the
    memory of x."""

    name = "im2col"

    def __init__(self, geometry: Geometry):
        super().__init__(geometry)
        kernel = geometry.kernel
        self._windows = Im2col(geometry.image, kernel, geometry.stride, geometry.vertical, geometry.horizontal)
        self._adjoint: Im2col | None = None
        if geometry.stride == (1, 1):
            self._adjoint = Im2col(geometry.output, kernel, (1, 1), *adjoint_padding(geometry))

    def forward(self, x: Array, weight: Array, bias: Array | None, y: Array, workspace: Workspace) -> None:
        _, wide, filters = self.geometry.output
        weight_ko = weight.reshape(-1, filters)
        repeats = row_repeats((wide, filters))
        bias_w = None if bias is None else repeated(bias, repeats, "bias", workspace)
        for images, rows in self._windows.blocks(x.shape[0], x.itemsize):
            y_no = y[images, rows].reshape(-1, filters)
            np.matmul(self._windows.matrix(x, images, rows, workspace), weight_ko, out=y_no)
            if bias_w is not None:
                y_nw = wide_rows(y_no, repeats)
                np.add(y_nw, bias_w, out=y_nw)

    def weight_gradient(self, x: Array, dy: Array, dw: Array, accumulate: bool, workspace: Workspace) -> None:
        filters = self.geometry.output[2]
        if not accumulate:
            dw[...] = 0
        dw_ko = dw.reshape(-1, filters)
        more = workspace.scratch("weight gradient", dw_ko.shape)
        for images, rows in self._windows.blocks(x.shape[0], x.itemsize):
            seen = self._windows.matrix(x, images, rows, workspace)
            np.matmul(seen.T, dy[images, rows].reshape(-1, filters), out=more)
            np.add(dw_ko, more, out=dw_ko)

    def input_gradient(self, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        if self._adjoint is not None:
            self._correlate_back(self._adjoint, weight, dy, dx, workspace)
        else:
            self._scatter_back(weight, dy, dx, workspace)

    def _correlate_back(self, adjoint: Im2col, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        """Compute dx for stride 1."""
        channels = dx.shape[3]
        weight_ko = turned(weight, workspace).reshape(-1, channels)
        for images, rows in adjoint.blocks(dy.shape[0], dy.itemsize):
            seen = adjoint.matrix(dy, images, rows, workspace)
            np.matmul(seen, weight_ko, out=dx[images, rows].reshape(-1, channels))

    def _scatter_back(self, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        """Compute dx for larger strides: the gradient of the windows, added up at their origin, one tap at a time."""
        filters = weight.shape[3]
        weight_ko = weight.reshape(-1, filters)
        dx[...] = 0
        for images, rows in self._windows.blocks(dy.shape[0], dy.itemsize):
            dy_no = dy[images, rows].reshape(-1, filters)
            seen = workspace.scratch("windows", (dy_no.shape[0], weight_ko.shape[0]))
            np.matmul(dy_no, weight_ko.T, out=seen)
            taps = seen.reshape(-1, rows.stop - rows.start, dy.shape[2], *weight.shape[:3])
            for p in range(weight.shape[0]):
                down, here_down = self._reach(0, p, rows)
                for q in range(weight.shape[1]):
                    across, here_across = self._reach(1, q, slice(0, dy.shape[2]))
                    target = dx[images, down, across]
                    np.add(target, taps[:, here_down, here_across, p, q], out=target)

    def _reach(self, axis: int, tap: int, places: slice) -> tuple[slice, slice]:
        """Return (pixels, places) along an axis: the pixels inside the image that a tap of the kernel touches, and from
        which places.

        The places are counted from the block's first.
        """
        geometry = self.geometry
        stride, size = geometry.stride[axis], geometry.image[axis]
        before = (geometry.vertical, geometry.horizontal)[axis][0]
        first = max(places.start, -((tap - before) // stride))  # the least with place * stride + tap - before >= 0
        last = max(first, min(places.stop, (size - 1 - tap + before) // stride + 1))
        pixel = first * stride + tap - before
        return slice(pixel, pixel + (last - first) * stride, stride), slice(first - places.start, last - places.start)
