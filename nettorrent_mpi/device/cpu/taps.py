"""Convolution as a sum of products, one for each tap of the kernel, or for each of its rows.

The padded images, flattened, are a matrix of pixels by channels. A tap's view of all places is the same matrix from a
later row on, so that y = sum over taps of matrix[tap:] @ weight[tap], and only the padding is copied. With a row of the
kernel for a tap, each row of the matrix has side by side the pixels of a row of the kernel (row im2col): fewer
products, of longer rows. Places in the padding are computed, too, and discarded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu.algorithm import Algorithm, adjoint_padding, turned
from nettorrent_mpi.device.cpu.blas import Gemm
from nettorrent_mpi.device.cpu.blocking import repeated, row_repeats, wide_rows
from nettorrent_mpi.device.geometry import Geometry, Pair

BLOCK_BYTES = 1 << 20  # bytes of padded images and outputs processed at a time


class TapProducts(Algorithm):
    """The algorithm for stride 1 with one product for each tap; `gemm` adds to the output."""

    name = "taps"
    by_rows: ClassVar[bool] = False

    def __init__(self, geometry: Geometry, gemm: Gemm):
        super().__init__(geometry)
        assert geometry.stride == (1, 1)
        self._gemm = gemm

    def forward(self, x: Array, weight: Array, bias: Array | None, y: Array, workspace: Workspace) -> None:
        self._correlate(x, weight, (self.geometry.vertical, self.geometry.horizontal), y, workspace)
        if bias is not None:
            repeats = row_repeats(y.shape[2:])
            y_nw = wide_rows(y, repeats)
            np.add(y_nw, repeated(bias, repeats, "bias", workspace), out=y_nw)

    def input_gradient(self, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        self._correlate(dy, turned(weight, workspace), adjoint_padding(self.geometry), dx, workspace)

    def weight_gradient(self, x: Array, dy: Array, dw: Array, accumulate: bool, workspace: Workspace) -> None:
        if not accumulate:
            dw[...] = 0
        padding = self.geometry.vertical, self.geometry.horizontal
        for images, matrix, size, width in self._blocks(x, padding, dw.shape, workspace):
            seen = self._spread(dy[images], size, width, workspace)
            for first, dw_ko in self._steps(dw, width):
                self._gemm(matrix[first : first + len(seen)].T, seen, dw_ko, 1.0)

    def _correlate(self, x: Array, weight: Array, padding: tuple[Pair, Pair], y: Array, workspace: Workspace) -> None:
        """Compute y <- the convolution of x with stride 1, without bias."""
        high, wide = y.shape[1:3]
        for images, matrix, size, width in self._blocks(x, padding, weight.shape, workspace):
            count = images.stop - images.start
            out = workspace.scratch("tap outputs", (count * size, weight.shape[3]))
            for first, weight_ko in self._steps(weight, width):
                self._gemm(matrix[first : first + len(out)], weight_ko, out, float(first > 0))
            np.copyto(y[images], out.reshape(count, -1, width, weight.shape[3])[:, :high, :wide])

    def _steps(self, weight: Array, width: int) -> Iterator[tuple[int, Array]]:
        """Return for each product (the first row of the matrix, the part of `weight` it is multiplied by)."""
        for p, row in enumerate(weight):
            if self.by_rows:
                yield p * width, row.reshape(-1, weight.shape[3])
            else:
                for q, tap in enumerate(row):
                    yield p * width + q, tap

    def _blocks(
        self, x: Array, padding: tuple[Pair, Pair], weight: tuple[int, ...], workspace: Workspace
    ) -> Iterator[tuple[slice, Array, int, int]]:
        """Yield (images, the matrix seen by a tap or a row, pixels of an image, pixels of a row)."""
        (top, bottom), (left, right) = padding
        _, height, width, channels = x.shape
        tall, broad = top + height + bottom, left + width + right
        beyond = (weight[0] - 1) * broad + weight[1] - 1  # what the last tap sees after the last image: discarded
        side = weight[1] if self.by_rows else 1  # pixels in a row of the matrix
        each = max(1, BLOCK_BYTES // (tall * broad * (side * weight[2] + weight[3]) * x.itemsize))
        for start in range(0, len(x), each):
            images = slice(start, min(start + each, len(x)))
            pixels = (images.stop - start) * tall * broad
            matrix = workspace.scratch("tap inputs", (pixels + beyond, channels))
            matrix[...] = 0
            padded = matrix[:pixels].reshape(-1, tall, broad, channels)
            np.copyto(padded[:, top : top + height, left : left + width], x[images])
            yield images, self._side_by_side(matrix, side, workspace), tall * broad, broad

    @staticmethod
    def _side_by_side(matrix: Array, side: int, workspace: Workspace) -> Array:
        """Concatenate row i of the matrix with the following ones: rows i .. i + side - 1."""
        if side == 1:
            return matrix
        count, channels = len(matrix) - side + 1, matrix.shape[1]
        wide = workspace.scratch("tap rows", (count, side * channels), matrix.dtype)
        # Elements of a raw type: NumPy copies them faster than runs of numbers.
        run = np.dtype((np.void, side * channels * matrix.itemsize))
        seen: Array = np.ndarray((count, 1), run, matrix, 0, (channels * matrix.itemsize, 0))
        np.copyto(wide.view(run), seen)
        return wide

    def _spread(self, dy: Array, size: int, width: int, workspace: Workspace) -> Array:
        """Return dy at its places among all pixels, zeros elsewhere: (pixels, filters)."""
        count, high, wide, filters = dy.shape
        spread = workspace.scratch("tap outputs", (count * size, filters))
        spread[...] = 0
        np.copyto(spread.reshape(count, -1, width, filters)[:, :high, :wide], dy)
        return spread


class RowProducts(TapProducts):
    """The algorithm for stride 1 with one product for each row of the kernel."""

    name = "rows"
    by_rows = True
