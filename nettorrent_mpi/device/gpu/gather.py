"""Rows of a data set: which rows a step takes, and their inputs and targets."""

from __future__ import annotations

import math

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.operations import BLOCK, KernelOperations

EACH = 8  # elements of a row that a thread takes
MOST_DOWN = 65535  # blocks of a grid's second axis


class GpuGatherOperations(KernelOperations):
    """Reads rows that lie on the GPU: see device.feeding.RowOps."""

    def rows_of_step(
        self,
        step: Array,
        orders: Array,
        keys: Array,
        numbers: Array,
        key: Array | None,
        *,
        steps_per_epoch: int,
        batch_size: int,
    ) -> None:
        epochs, rows = orders.shape
        assert keys.shape == (epochs,)
        assert orders.flags.c_contiguous
        grid = max(1, min(-(-numbers.size // BLOCK), 64))  # one block for the key at least
        self.launch(
            "rows_of_step", None, grid, BLOCK, step, orders, keys, epochs, numbers, key, rows, steps_per_epoch,
            batch_size, numbers.size,
        )  # fmt: skip

    def take_rows(self, source: Array, numbers: Array, out: Array) -> None:
        assert source.dtype == out.dtype
        assert source.shape[1:] == out.shape[1:]
        assert out.shape[0] == numbers.size
        size = math.prod(out.shape[1:]) * out.dtype.itemsize
        if not size:
            return
        starts = [self.device.runtime.address(array) for array in (source, out)]
        unit = next(unit for unit in (8, 4, 1) if not any(number % unit for number in (size, *starts)))
        self.each("take_rows", None, out.nbytes // unit, source, numbers, out, numbers.size, size // unit, unit)

    def gather(
        self,
        images: Array,
        numbers: Array,
        out: Array,
        factor: Array,
        shift: Array,
        *,
        key: Array | None = None,
        flip: bool = False,
        crop: bool = False,
        resident: bool = True,
    ) -> None:
        assert images.shape[1:] == out.shape[1:]
        assert out.shape[0] == numbers.size
        assert factor.dtype == shift.dtype == work_type(out)
        assert factor.size == shift.size
        assert factor.size in (1, out.shape[-1])
        assert images.dtype.name in ("uint8", "float32", "float64"), images.dtype
        assert images.flags.c_contiguous
        assert out.flags.c_contiguous
        *places, c = out.shape[1:]
        if flip or crop:
            assert key is not None
            assert len(places) == 2
        high, wide = places if len(places) == 2 else (1, math.prod(places))
        size = high * wide * c
        assert size < 1 << 31, f"a row of {size} numbers"
        grid = -(-size // (BLOCK * EACH)), min(out.shape[0], MOST_DOWN)
        self.launch(
            "gather", out.dtype, grid, BLOCK, images, images.dtype.itemsize, numbers, key, out, factor, shift,
            factor.size, out.shape[0], high, wide, c, flip, crop, resident,
        )  # fmt: skip


def work_type(out: Array) -> np.dtype[np.floating]:
    """Return the type in which kernels compute an array: float64 for itself, float32 for all others."""
    return np.dtype(np.float64 if out.dtype == np.float64 else np.float32)
