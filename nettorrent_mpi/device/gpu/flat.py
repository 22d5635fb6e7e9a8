"""Operations on flat arrays, and on views of arrays."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.operations import KernelOperations
from nettorrent_mpi.device.gpu.source import REALS
from nettorrent_mpi.device.gpu.views import order_in_memory, type_code, view

ADD, SUBTRACT, MULTIPLY = range(3)  # as in kernels.cu


class GpuFlatOperations(KernelOperations):
    """Operations on flat arrays: see device.ops. Arrays are contiguous, except those of `copy`, `fill` and of sums,
    differences and products, which may be any views of up to four axes."""

    def copy(self, out: Array, x: Array) -> None:
        if out.dtype == x.dtype and out.shape == x.shape and contiguous(out, x):
            if out.size:
                self.device.runtime.copy(self.device.stream, out, x)
            return
        if self._rounded(out, x):
            return
        layout = view(out, x)
        if out.dtype == x.dtype:
            self.each("copy_view", None, layout[0], out, x, out.dtype.itemsize, *layout)
        else:
            self.each("convert_view", None, layout[0], out, type_code(out), x, type_code(x), *layout)

    def fill(self, out: Array, value: float) -> None:
        layout = view(out)
        self.each("fill_view", None, layout[0], out, type_code(out), value, *layout)

    def add(self, a: Array, b: Array, out: Array) -> None:
        self._combine(ADD, a, b, out)

    def subtract(self, a: Array, b: Array, out: Array) -> None:
        self._combine(SUBTRACT, a, b, out)

    def multiply(self, a: Array, b: Array, out: Array) -> None:
        self._combine(MULTIPLY, a, b, out)

    def scale(self, x: Array, factor: float) -> None:
        self.each_pack("scale", x.dtype, flat(x), x, factor, x.size)

    def divide(self, x: Array, divisor: float) -> None:
        self.each_pack("divide", x.dtype, flat(x), x, divisor, x.size)

    def store(self, out: Array, x: Array, accumulate: bool) -> None:
        if x.dtype == out.dtype:
            if accumulate:
                self.add(out, x, out)
            else:
                self.copy(out, x)
        else:
            self.each_pack("store_double", out.dtype, flat(out, x), out, x, accumulate, out.size)

    def move(self, x: Array, share: float, towards: Array, origin: Array | None = None) -> None:
        count = flat(x, towards) if origin is None else flat(x, towards, origin)
        self.each_pack("move", x.dtype, count, x, share, towards, origin, count)

    def withhold(self, x: Array, before: Array, kept: Array, part: float) -> None:
        count = flat(x, before, kept)
        self.each_pack("withhold", x.dtype, count, x, before, kept, part, count)

    def increase(self, x: Array, by: float) -> None:
        self.launch("increase", None, 1, 32, x, type_code(x), by)

    def sum_of_squares(self, x: Array, total: Array) -> None:
        self.sum("sum_of_squares", x.dtype, flat(x), x, total, *self.partial_sums(), x.size)

    def clip_scale(self, total: Array, limit: float, scale: Array) -> None:
        self.launch("clip_scale", None, 1, 32, total, limit, scale)

    def all_finite(self, x: Array) -> bool:
        x = x.transpose(order_in_memory(x))  # filters may be a turned view
        found, told = self.scratch("what is not finite", (1,), np.float64), np.zeros(1)
        self.fill(found, 0)
        self.each_pack("find_nonfinite", x.dtype, flat(x), x, found, x.size)
        self.device.download(told, found)
        return not told[0]

    def count_nonfinite(self, y: Array, count: Array, step: Array) -> None:
        self.sum("count_nonfinite", y.dtype, flat(y), y, count, step, *self.partial_sums(), y.size)

    def _rounded(self, out: Array, x: Array) -> bool:
        """Copy x to out at the full rate, if one is of float32, the other of another type of REAL, and both are alike
        in memory."""
        for kernel, real, other in (("from_float", out, x), ("to_float", x, out)):
            if other.dtype == np.float32 and real.dtype.name in REALS and real.dtype != np.float32:
                dense = out.shape == x.shape and contiguous(out, x)
                if dense:
                    self.each_pack(kernel, real.dtype, out.size, out, x, out.size)
                return dense
        return False

    def _combine(self, kind: int, a: Array, b: Array, out: Array) -> None:
        if a.shape == b.shape == out.shape and contiguous(a, b, out):
            self.each_pack("combine", out.dtype, out.size, out, a, b, kind, out.size)
        else:
            layout = view(out, a, b)
            self.each("combine_view", out.dtype, layout[0], out, a, b, kind, *layout)


def contiguous(*arrays: Array) -> bool:
    """Whether all arrays are C-contiguous."""
    return all(array.flags.c_contiguous for array in arrays)


def flat(first: Array, *others: Array) -> int:
    """Return the number of elements of arrays that a kernel goes through from their first element to their last."""
    assert contiguous(first, *others), "an array is not contiguous"
    assert all(array.size == first.size for array in others), [array.shape for array in (first, *others)]
    return first.size
