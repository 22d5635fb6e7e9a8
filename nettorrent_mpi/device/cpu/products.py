"""Matrix products are computed by the fastest library for their shapes, which a trial finds at first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.cpu import blas
from nettorrent_mpi.device.cpu.blocking import RowSum, blocks, row_block, row_repeats, wide_rows
from nettorrent_mpi.device.cpu.flat import Operations
from nettorrent_mpi.device.cpu.loop import Loop
from nettorrent_mpi.device.cpu.tuning import Tuning
from nettorrent_mpi.device.ops import LayerOps

Run = Callable[[], object]
Multiply = Callable[[Array, Array, Array, bool], Run]
"""multiply(a_mk, b_kn, out_mn, accumulate) gives what computes the product each time that it is called."""

REMEMBERED = 1024  # cached products; in the steady state three per layer and micro-batch in flight
SUMMED = 64  # rows that are added up in the arrays' type


class ProductOperations(Operations):
    """Matrix products and sums of their rows: see device.ops.

    The arrays of the steady state are the same objects in every step. So the arguments of a library call (sizes,
    addresses: more work for Python than the call itself, and with small matrices than the product) are prepared once
    for the same objects, which are kept. Nothing is allocated after that.
    """

    def __init__(self, tuning: Tuning):
        super().__init__(tuning)
        self._chosen: dict[tuple[Any, ...], Multiply] = {}
        self._known: dict[tuple[int, int, int, bool, bool, bool], tuple[Run, Array, Array, Array]] = {}

    def matmul(
        self, a: Array, b: Array, out: Array, turn_a: bool = False, turn_b: bool = False, accumulate: bool = False
    ) -> None:
        key = id(a), id(b), id(out), turn_a, turn_b, accumulate
        known = self._known.get(key)
        if known is None:
            if len(self._known) == REMEMBERED:
                self._known.clear()
            run = self._prepare(a, b, out, turn_a, turn_b, accumulate)
            known = self._known[key] = run, a, b, out  # their ids are unique as long as they live
        known[0]()

    def linear(self, x: Array, weight: Array, bias: Array | None, y: Array, relu: bool = False) -> None:
        self.matmul(x, weight, y)
        if bias is not None:
            np.add(y, bias, out=y)
        if relu:
            cast("LayerOps", self).relu(y, y)

    def _prepare(self, a: Array, b: Array, out: Array, turn_a: bool, turn_b: bool, accumulate: bool) -> Run:
        first, second = a.T if turn_a else a, b.T if turn_b else b
        if not (out.size and a.size):  # no trial possible, and BLAS requires sizes above 0
            return self._by_numpy(first, second, out, accumulate)
        # The rows of `a`, those of a micro-batch, may be fewer at times: the first product decides.
        key = a.shape[1], out.shape[1], turn_a, turn_b, accumulate, out.dtype
        multiply = self._chosen.get(key)
        if multiply is None:
            multiply = self._chosen[key] = self._choose(first, second, out, accumulate)
        return multiply(first, second, out, accumulate)

    def _choose(self, a: Array, b: Array, out: Array, accumulate: bool) -> Multiply:
        blas.wake(out.dtype)
        algorithms = self.algorithms(out.dtype)
        elsewhere = np.empty_like(out)
        letters = "".join("n" if blas.plain(array) else "t" for array in (a, b))
        sizes = f"{a.shape[0]}x{a.shape[1]}x{b.shape[1]} {out.dtype} {letters}{' added' if accumulate else ''}"
        trials = {name: algorithm(a, b, elsewhere, accumulate) for name, algorithm in algorithms.items()}
        return algorithms[self._tuning.fastest(f"product {sizes}", trials, elsewhere)]

    def algorithms(self, dtype: np.dtype[Any]) -> dict[str, Multiply]:
        """Return the permitted libraries for matrices of this type, by name."""
        gemm, library = self._tuning.gemm(dtype), self._tuning.onednn()
        algorithms: dict[str, Multiply] = {"numpy": self._by_numpy}
        if gemm is not None:
            algorithms["blas"] = partial(_by, gemm)
        if library is not None and dtype == np.float32:
            algorithms["onednn"] = partial(_by, library.gemm)
        return algorithms

    def _by_numpy(self, a: Array, b: Array, out: Array, accumulate: bool) -> Run:
        if not accumulate:
            return partial(np.matmul, a, b, out)

        def add() -> None:
            more = self.memory(out.dtype).scratch("product", out.shape)
            np.matmul(a, b, out=more)
            np.add(out, more, out=out)

        return add

    def sum_rows(self, x: Array, out: Array, accumulate: bool = False) -> None:
        if accumulate:
            more = self.memory(x.dtype).scratch("row sums", out.shape, out.dtype)
            self.sum_rows(x, more)
            np.add(out, more, out=out)
            return
        repeats = row_repeats(x.shape[1:])
        x_nw = wide_rows(x, repeats)
        if self._tuning.compiled:
            sum_rows(x_nw, out)
        else:
            total = RowSum("of rows", repeats, out, self.memory(x.dtype))
            for block in blocks(x_nw.shape[0], row_block(x_nw.shape[1])):
                total.add(x_nw[block])
            total.finish()

    def relu_grad_sum(self, y: Array, dy: Array, total: Array, accumulate: bool = False) -> None:
        if not self._tuning.compiled:
            cast("LayerOps", self).relu_grad(y, dy)
            self.sum_rows(dy, total, accumulate)
            return
        sums = self.memory(dy.dtype).scratch("row sums", total.shape, total.dtype) if accumulate else total
        repeats = row_repeats(dy.shape[1:])
        relu_grad_sum(wide_rows(y, repeats), wide_rows(dy, repeats), sums)
        if accumulate:
            np.add(total, sums, out=total)


def _by(gemm: blas.Gemm, a: Array, b: Array, out: Array, accumulate: bool) -> Run:
    return gemm.prepare(a, b, out, 1.0 if accumulate else 0.0)


@Loop
def sum_rows(x_nw: Array, total_c: Array) -> None:
    """Compute total_c <- the sum over n and over the positions in a row; rounding differs from NumPy's."""
    part_w = np.empty(x_nw.shape[1], x_nw.dtype)
    total_c[:] = 0
    for first in range(0, x_nw.shape[0], SUMMED):
        part_w[:] = 0
        for n in range(first, min(first + SUMMED, x_nw.shape[0])):
            x_w = x_nw[n]
            for k in range(part_w.size):
                part_w[k] += x_w[k]
        for position in range(0, part_w.size, total_c.size):
            for c in range(total_c.size):
                total_c[c] += part_w[position + c]


@Loop
def relu_grad_sum(y_nw: Array, dy_nw: Array, total_c: Array) -> None:
    """dy <- dy where y > 0, elsewhere 0, and total_c <- the sum of that as by `sum_rows`."""
    part_w = np.empty(dy_nw.shape[1], dy_nw.dtype)
    total_c[:] = 0
    for first in range(0, dy_nw.shape[0], SUMMED):
        part_w[:] = 0
        for n in range(first, min(first + SUMMED, dy_nw.shape[0])):
            y_w, dy_w = y_nw[n], dy_nw[n]
            for k in range(part_w.size):
                dy_w[k] *= y_w[k] > 0
                part_w[k] += dy_w[k]
        for position in range(0, part_w.size, total_c.size):
            for c in range(total_c.size):
                total_c[c] += part_w[position + c]
