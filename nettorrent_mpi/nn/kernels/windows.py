"""A kernel that slides over images: how many places it has, and the matrix of what it sees (im2col)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from nettorrent_mpi.nn.backend import Array, Workspace

# Bytes of one block of the matrix: measured best between 0.25 and 2 MiB on cores with 1 MiB of second-level cache,
# but not fewer than so many rows, since each block also costs a pass over the weights.
BLOCK_BYTES = 1 << 20
BLOCK_ROWS = 512

Pair = tuple[int, int]


def places(size: int, kernel: int, stride: int, padding: Literal["valid", "same"]) -> tuple[int, int, int]:
    """(number of places, padding before, padding after) along one axis; for `valid`, kernel <= size.

    `same` has ceil(size / stride) places. An odd kernel is padded by kernel // 2 before, as PyTorch's
    Conv2d(padding=kernel // 2) does, whatever the stride; an even one has the odd row or column at the end.
    """
    if padding == "valid":
        return (size - kernel) // stride + 1, 0, 0
    count = -(-size // stride)
    reach = (count - 1) * stride + kernel
    before = kernel // 2 if kernel % 2 else max(reach - size, 0) // 2
    return count, before, max(reach - size - before, 0)


class Windows:
    """The places of a kernel over images of `image` = (height, width, channels), padded by (before, after) zeros."""

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
        """(images, rows of places) that make one block of the matrix: several images, or part of a large one."""
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
        """(places, numbers of a window): what the kernel sees at the places of a block, in scratch memory.

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
        """Rows [top, bottom) of the padded images."""
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
