"""Matrix products are computed by the fastest library for their shapes, which a trial finds at first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.cpu import blas
from nettorrent_mpi.device.cpu.blocking import RowSum, blocks, row_block, row_repeats, wide_rows
from nettorrent_mpi.device.cpu.elementwise import ElementwiseOperations
from nettorrent_mpi.device.cpu.flat import Run
from nettorrent_mpi.device.cpu.loop import Loop
from nettorrent_mpi.device.cpu.tuning import Tuning

Multiply = Callable[[Array, Array, Array, bool], Run]
"""multiply(a_mk, b_kn, out_mn, accumulate) gives what computes the product each time that it is called."""

REMEMBERED = 1024  # cached products; in the steady state three per layer and micro-batch in flight
SUMMED = 64  # rows that are added up in the arrays' type


class ProductOperations(ElementwiseOperations):
    """Matrix products and what follows them directly, biases and sums of rows: see device.ops.

    The arrays of the steady state are the same objects in every step. So the arguments of a library call (sizes,
    addresses: more work for Python than the call itself, and with small matrices than the product) are prepared once
    for the same objects, which are kept. Nothing is allocated after that.
    """

    def __init__(self, tuning: Tuning):
        super().__init__(tuning)
        self._chosen: dict[tuple[Any, ...], Multiply] = {}
        self._known: dict[tuple[int, int, int, bool, bool, bool], tuple[Run, Array, Array, Array]] = {}

    def prepared(self, operation: str, *arguments: Any, **named: Any) -> list[Run]:
        if operation == "matmul":
            return [self._product(*arguments, **named)]
        if operation == "linear":
            return self._linear(*arguments, **named)
        if self._tuning.compiled and operation == "sum_rows":
            return [self._sum_rows(*arguments, **named)]
        if self._tuning.compiled and operation == "relu_grad_sum":
            return [self._relu_grad_sum(*arguments, **named)]
        return super().prepared(operation, *arguments, **named)

    def matmul(
        self, a: Array, b: Array, out: Array, turn_a: bool = False, turn_b: bool = False, accumulate: bool = False
    ) -> None:
        self._product(a, b, out, turn_a, turn_b, accumulate)()

    def _product(
        self, a: Array, b: Array, out: Array, turn_a: bool = False, turn_b: bool = False, accumulate: bool = False
    ) -> Run:
        key = id(a), id(b), id(out), turn_a, turn_b, accumulate
        known = self._known.get(key)
        if known is None:
            if len(self._known) == REMEMBERED:
                self._known.clear()
            run = self._prepare(a, b, out, turn_a, turn_b, accumulate)
            known = self._known[key] = run, a, b, out  # their ids are unique as long as they live
        return known[0]

    def linear(self, x: Array, weight: Array, bias: Array | None, y: Array, relu: bool = False) -> None:
        self.matmul(x, weight, y)
        for run in self._finished(bias, y, relu):
            run()

    def _linear(self, x: Array, weight: Array, bias: Array | None, y: Array, relu: bool = False) -> list[Run]:
        return [self._product(x, weight, y), *self._finished(bias, y, relu)]

    def _finished(self, bias: Array | None, y: Array, relu: bool) -> list[Run]:
        """Return what adds a bias to a product, and computes its ReLU."""
        if bias is not None and self._tuning.compiled:
            return [partial(add_bias_relu if relu else add_bias, y, bias)]
        runs: list[Run] = [] if bias is None else [partial(np.add, y, bias, y)]
        return [*runs, partial(self.relu, y, y)] if relu else runs

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
        if self._tuning.compiled:
            self._sum_rows(x, out, accumulate)()
        elif accumulate:
            more = self.memory(x.dtype).scratch("row sums", out.shape, out.dtype)
            self.sum_rows(x, more)
            np.add(out, more, out=out)
        else:
            repeats = row_repeats(x.shape[1:])
            x_nw = wide_rows(x, repeats)
            total = RowSum("of rows", repeats, out, self.memory(x.dtype))
            for block in blocks(x_nw.shape[0], row_block(x_nw.shape[1])):
                total.add(x_nw[block])
            total.finish()

    def _sum_rows(self, x: Array, out: Array, accumulate: bool = False) -> Run:
        return partial(sum_rows, wide_rows(x, row_repeats(x.shape[1:])), out, accumulate)

    def relu_grad_sum(self, y: Array, dy: Array, total: Array, accumulate: bool = False) -> None:
        if self._tuning.compiled:
            self._relu_grad_sum(y, dy, total, accumulate)()
        else:
            self.relu_grad(y, dy)
            self.sum_rows(dy, total, accumulate)

    def _relu_grad_sum(self, y: Array, dy: Array, total: Array, accumulate: bool = False) -> Run:
        repeats = row_repeats(dy.shape[1:])
        return partial(relu_grad_sum, wide_rows(y, repeats), wide_rows(dy, repeats), total, accumulate)


def _by(gemm: blas.Gemm, a: Array, b: Array, out: Array, accumulate: bool) -> Run:
    return gemm.prepare(a, b, out, 1.0 if accumulate else 0.0)


@Loop
def add_bias(y_no: Array, bias_o: Array) -> None:
    """y <- y + bias."""
    for n in range(y_no.shape[0]):
        y_o = y_no[n]
        for o in range(bias_o.size):
            y_o[o] += bias_o[o]


@Loop
def add_bias_relu(y_no: Array, bias_o: Array) -> None:
    """y <- max(y + bias, 0)."""
    for n in range(y_no.shape[0]):
        y_o = y_no[n]
        for o in range(bias_o.size):
            moved = y_o[o] + bias_o[o]
            y_o[o] = y_no.dtype.type(0) if moved < 0 else moved  # NaN stays NaN


@Loop
def sum_rows(x_nw: Array, total_c: Array, accumulate: bool) -> None:
    """Compute total_c <- (or +=) the sum over n and over the positions in a row; rounding differs from NumPy's."""
    part_w, sum_c = np.empty(x_nw.shape[1], x_nw.dtype), np.zeros(total_c.size, total_c.dtype)
    for first in range(0, x_nw.shape[0], SUMMED):
        part_w[:] = 0
        for n in range(first, min(first + SUMMED, x_nw.shape[0])):
            x_w = x_nw[n]
            for k in range(part_w.size):
                part_w[k] += x_w[k]
        for position in range(0, part_w.size, sum_c.size):
            for c in range(sum_c.size):
                sum_c[c] += part_w[position + c]
    for c in range(sum_c.size):
        total_c[c] = total_c[c] + sum_c[c] if accumulate else sum_c[c]


@Loop
def relu_grad_sum(y_nw: Array, dy_nw: Array, total_c: Array, accumulate: bool) -> None:
    """dy <- dy where y > 0, elsewhere 0, and total_c <- (or +=) the sum of that as by `sum_rows`."""
    part_w, sum_c = np.empty(dy_nw.shape[1], dy_nw.dtype), np.zeros(total_c.size, total_c.dtype)
    for first in range(0, dy_nw.shape[0], SUMMED):
        part_w[:] = 0
        for n in range(first, min(first + SUMMED, dy_nw.shape[0])):
            y_w, dy_w = y_nw[n], dy_nw[n]
            for k in range(part_w.size):
                dy_w[k] *= y_w[k] > 0
                part_w[k] += dy_w[k]
        for position in range(0, part_w.size, sum_c.size):
            for c in range(sum_c.size):
                sum_c[c] += part_w[position + c]
    for c in range(sum_c.size):
        total_c[c] = total_c[c] + sum_c[c] if accumulate else sum_c[c]
