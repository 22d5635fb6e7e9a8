"""Norms: channels are summed in float64, over tiles whose chunks are added up in their order; rows by a warp or block.

Statistics are float64 in batch norm. In layer norm they are of any floating-point type, all of one call of the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.operations import BLOCK, MOST_BLOCKS, KernelOperations
from nettorrent_mpi.device.gpu.tiles import matrix, tiles

SUM_BLOCK = 512  # threads of a block that adds up columns
SUM_BLOCKS = 264  # more would keep no GPU busier, but the last one would have more sums to add up
TILE_BLOCKS = 2048  # for kernels that add up nothing
LONG = 1024  # features of a row from which on a whole block adds them up


class GpuNormOperations(KernelOperations):
    """Sums of rows, with or without a ReLU's derivative, and the parts of batch norm and layer norm: see device.ops."""

    def sum_rows(self, x: Array, out: Array, accumulate: bool = False) -> None:
        self._add_up("sum_rows", 1, x, x, out, out.dtype.itemsize, accumulate)

    def relu_grad_sum(self, y: Array, dy: Array, total: Array, accumulate: bool = False) -> None:
        matrix(y, dy)
        self._add_up("relu_grad_sum", 1, dy, y, dy, total, total.dtype.itemsize, accumulate)

    def inverse_root(self, x: Array, eps: float) -> None:
        self.each("inverse_root", x.dtype, x.size, x, eps, x.size)

    # -- batch norm: statistics of each channel ---------------------------------------------------------------------

    def moments(self, x: Array, part: Array) -> None:
        self.sum_rows(x, part[1 : 1 + x.shape[-1]])
        self._add_up("squared_deviations", 1, x, x, part)

    def merge_moments(
        self, parts: Array, mean: Array, scale: Array, running_mean: Array, running_var: Array, momentum: float,
        eps: float,
    ) -> None:  # fmt: skip
        members, c = len(parts), mean.size
        running = running_mean, running_var
        self.each("merge_moments", running_mean.dtype, c, parts, mean, scale, *running, momentum, eps, members, c)

    def normalize(self, x: Array, mean: Array, scale: Array, weight: Array, bias: Array, y: Array) -> None:
        matrix(x, y)
        self._tiled("normalize", x, x, mean, scale, weight, bias, y)

    def norm_sums(self, x: Array, dy: Array, mean: Array, scale: Array, sums: Array) -> None:
        matrix(x, dy)
        self._add_up("norm_sums", 2, x, x, dy, mean, scale, sums)

    def norm_grad(self, x: Array, dy: Array, mean: Array, scale: Array, weight: Array, sums: Array, count: int) -> None:
        matrix(x, dy)
        share = -1 / count if count else 0.0
        self._tiled("norm_grad", x, x, dy, mean, scale, weight, sums, share)

    # -- layer norm: statistics of each row and position ------------------------------------------------------------

    def sum_features(self, x: Array, total_n: Array) -> None:
        self._of_rows("sum_features", x, x, total_n, _bytes(total_n))

    def center(self, x: Array, mean_n: Array, y: Array, squares_n: Array) -> None:
        matrix(x, y)
        self._of_rows("center", x, x, mean_n, y, squares_n, _bytes(mean_n, squares_n))

    def scale_features(self, y: Array, scale_n: Array, weight: Array, bias: Array) -> None:
        self._tiled("scale_features", y, y, scale_n, _bytes(scale_n), weight, bias)

    def layer_norm_sums(
        self, x: Array, dy: Array, mean_n: Array, scale_n: Array, weight: Array, gradients: Array, sums: Array
    ) -> None:
        matrix(x, dy)
        size = _bytes(mean_n, scale_n, sums)
        self._add_up("layer_norm_columns", 2, x, x, dy, mean_n, scale_n, size, gradients, _bytes(gradients))
        self._of_rows("layer_norm_rows", x, x, dy, mean_n, scale_n, weight, sums, size)

    def layer_norm_grad(self, x: Array, dy: Array, mean_n: Array, scale_n: Array, sums: Array) -> None:
        matrix(x, dy)
        self._tiled("layer_norm_grad", x, x, dy, mean_n, scale_n, sums, _bytes(mean_n, scale_n, sums))

    # -- launches ---------------------------------------------------------------------------------------------------

    def _add_up(self, kernel: str, sums: int, x: Array, *arguments: Any) -> None:
        """Launch a kernel that computes so many sums of each column of x."""
        rows, c = matrix(x)
        wide, grid = tiles(rows, c, SUM_BLOCK, SUM_BLOCKS)
        partial = done = None
        if grid[1] > 1:
            partial = self.scratch("column sums", (grid[1] * sums * c,), np.float64)
            done = self.counters(grid[0])
        self.launch(kernel, x.dtype, grid, SUM_BLOCK, *arguments, partial, done, rows, c, wide)

    def _tiled(self, kernel: str, x: Array, *arguments: Any) -> None:
        """Launch a kernel that goes through the columns of x."""
        rows, c = matrix(x)
        wide, grid = tiles(rows, c, BLOCK, TILE_BLOCKS)
        if rows:
            self.launch(kernel, x.dtype, grid, BLOCK, *arguments, rows, c, wide)

    def _of_rows(self, kernel: str, x: Array, *arguments: Any) -> None:
        """Launch a kernel that adds up the features of each row."""
        rows, c = matrix(x)
        team = 32 if c <= LONG else BLOCK
        grid = min(-(-rows * team // BLOCK), MOST_BLOCKS)
        self.launch(kernel, x.dtype, grid, BLOCK, *arguments, rows, c, team)


def _bytes(*statistics: Array) -> int:
    """Return the bytes of an element of statistics, which are of one type."""
    first = statistics[0].dtype
    assert all(array.dtype == first and array.flags.c_contiguous for array in statistics)
    return first.itemsize
