"""Operations on bfloat16 arrays by compiled loops, where these are faster than float32 copies (widened.py)."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.cpu import bfloat16_loops as loops
from nettorrent_mpi.device.cpu import pools
from nettorrent_mpi.device.cpu.bfloat16_convolution import BfloatConvolutions
from nettorrent_mpi.device.cpu.blocking import row_repeats, rows_of, wide_rows
from nettorrent_mpi.device.geometry import Pooling


class BfloatOperations(BfloatConvolutions):
    """All operations (device.ops.Ops) on arrays of bfloat16, and of other types: those that take most of the time have
    compiled loops of their own, which read and write bfloat16, where Numba is installed."""

    def _loops(self, *arrays: Array) -> bool:
        """Whether all these arrays are bfloat16 and C-contiguous, and loops may be called."""
        return self._tuning.compiled and all(x.dtype == self.bfloat16 and x.flags.c_contiguous for x in arrays)

    def copy(self, out: Array, x: Array) -> None:
        if self._loops(out) and x.dtype == np.float32 and x.flags.c_contiguous and x.shape == out.shape:
            loops.narrow(x.reshape(-1), _bits(out).reshape(-1))
        else:
            super().copy(out, x)

    def add(self, a: Array, b: Array, out: Array) -> None:
        if self._loops(a, b, out) and a.shape == b.shape == out.shape:
            if a is out or b is out:
                loops.add_to(_bits(b if a is out else a).reshape(-1), _bits(out).reshape(-1))
            else:
                loops.add(*(_bits(x).reshape(-1) for x in (a, b, out)))
        else:
            super().add(a, b, out)

    def sum_rows(self, x: Array, out: Array, accumulate: bool = False) -> None:
        if self._loops(x) and out.dtype == np.float32:
            loops.sum_rows(wide_rows(_bits(x), row_repeats(x.shape[1:])), out, accumulate)
        else:
            super().sum_rows(x, out, accumulate)

    def relu(self, x: Array, y: Array) -> None:
        if x is y and self._loops(y):
            loops.relu(_bits(y).reshape(-1))
        else:
            super().relu(x, y)

    def relu_grad(self, y: Array, dy: Array) -> None:
        if self._loops(y, dy):
            loops.relu_grad(_bits(y).reshape(-1), _bits(dy).reshape(-1))
        else:
            super().relu_grad(y, dy)

    def relu_grad_sum(self, y: Array, dy: Array, total: Array, accumulate: bool = False) -> None:
        if self._loops(y, dy) and total.dtype == np.float32:
            repeats = row_repeats(dy.shape[1:])
            loops.relu_grad_sum(wide_rows(_bits(y), repeats), wide_rows(_bits(dy), repeats), total, accumulate)
        else:
            super().relu_grad_sum(y, dy, total, accumulate)

    def moments(self, x: Array, part: Array) -> None:
        if self._loops(x):
            loops.moments(rows_of(_bits(x)), part)
        else:
            super().moments(x, part)

    def normalize(self, x: Array, mean: Array, scale: Array, weight: Array, bias: Array, y: Array) -> None:
        if self._loops(x, weight, bias, y):
            loops.normalize(rows_of(_bits(x)), mean, scale, _bits(weight), _bits(bias), rows_of(_bits(y)))
        else:
            super().normalize(x, mean, scale, weight, bias, y)

    def norm_sums(self, x: Array, dy: Array, mean: Array, scale: Array, sums: Array) -> None:
        if self._loops(x, dy):
            loops.norm_sums(rows_of(_bits(x)), rows_of(_bits(dy)), mean, scale, sums)
        else:
            super().norm_sums(x, dy, mean, scale, sums)

    def norm_grad(self, x: Array, dy: Array, mean: Array, scale: Array, weight: Array, sums: Array, count: int) -> None:
        if self._loops(x, dy, weight):
            part = -1 / count if count else 0.0  # with 0 the statistics were constants
            loops.norm_grad(rows_of(_bits(x)), rows_of(_bits(dy)), mean, scale, _bits(weight), sums, part)
        else:
            super().norm_grad(x, dy, mean, scale, weight, sums, count)

    def max_pool(self, x: Array, y: Array, winner: Array | None, pooling: Pooling, relu: bool = False) -> None:
        if winner is not None and self._loops(x, y):
            loops.max_pool(_bits(x), _bits(y), winner, *pooling.size, *pooling.stride, relu)
        else:
            super().max_pool(x, y, winner, pooling, relu)

    def max_pool_grad(self, dy: Array, winner: Array, dx: Array, pooling: Pooling) -> None:
        if pooling.apart and self._loops(dy, dx):
            if not pooling.tiles:
                dx.fill(0)
            # It moves numbers, or puts zeros, which is the same for their bits.
            pools.max_pool_grad(_bits(dy), winner, _bits(dx), *pooling.size, *pooling.stride, False)
        else:
            super().max_pool_grad(dy, winner, dx, pooling)


def _bits(x: Array) -> Array:
    return x.view(np.uint16)
