"""Convolution as one product for each tap of the kernel, added up: nothing is copied but for the padding.

The padded images, flattened, are a matrix of pixels by channels. What a tap sees from all places is the same matrix,
begun some rows later, so that y = sum over taps of matrix[tap:] @ weight[tap]. Places that lie in the padding come out,
too, and are thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nettorrent_mpi.nn.backend import Array, Workspace
from nettorrent_mpi.nn.kernels.blas import Gemm
from nettorrent_mpi.nn.kernels.memory import repeated, row_repeats, wide_rows
from nettorrent_mpi.nn.kernels.way import Geometry, Pair, Way, adjoint_padding, turned

BLOCK_BYTES = 1 << 20  # of padded images and outputs that are worked on together


class TapProducts(Way):
    """For stride 1; `gemm` adds to what is there."""

    name = "taps"

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
            for p, q in np.ndindex(*dw.shape[:2]):
                first = p * width + q
                self._gemm(matrix[first : first + len(seen)].T, seen, dw[p, q], 1.0)

    def _correlate(self, x: Array, weight: Array, padding: tuple[Pair, Pair], y: Array, workspace: Workspace) -> None:
        """y <- the convolution of x with stride 1, without bias."""
        high, wide = y.shape[1:3]
        for images, matrix, size, width in self._blocks(x, padding, weight.shape, workspace):
            count = images.stop - images.start
            out = workspace.scratch("tap outputs", (count * size, weight.shape[3]))
            for p, q in np.ndindex(*weight.shape[:2]):
                first = p * width + q
                self._gemm(matrix[first : first + len(out)], weight[p, q], out, float(first > 0))
            np.copyto(y[images], out.reshape(count, -1, width, weight.shape[3])[:, :high, :wide])

    def _blocks(
        self, x: Array, padding: tuple[Pair, Pair], weight: tuple[int, ...], workspace: Workspace
    ) -> Iterator[tuple[slice, Array, int, int]]:
        """(images, the matrix of their padded pixels, pixels of an image, pixels of a row)."""
        (top, bottom), (left, right) = padding
        _, height, width, channels = x.shape
        tall, broad = top + height + bottom, left + width + right
        beyond = (weight[0] - 1) * broad + weight[1] - 1  # what the last tap sees after the last image: thrown away
        each = max(1, BLOCK_BYTES // (tall * broad * (weight[2] + weight[3]) * x.itemsize))
        for start in range(0, len(x), each):
            images = slice(start, min(start + each, len(x)))
            pixels = (images.stop - start) * tall * broad
            matrix = workspace.scratch("tap inputs", (pixels + beyond, channels))
            matrix[...] = 0
            padded = matrix[:pixels].reshape(-1, tall, broad, channels)
            np.copyto(padded[:, top : top + height, left : left + width], x[images])
            yield images, matrix, tall * broad, broad

    def _spread(self, dy: Array, size: int, width: int, workspace: Workspace) -> Array:
        """dy at its places among all pixels, zeros elsewhere: (pixels, filters)."""
        count, high, wide, filters = dy.shape
        spread = workspace.scratch("tap outputs", (count * size, filters))
        spread[...] = 0
        np.copyto(spread.reshape(count, -1, width, filters)[:, :high, :wide], dy)
        return spread
