"""Norms: channels are summed in the arrays' type over 64 rows, and these sums, or the features of each row, in float64.

Suffixes: b rows of a micro-batch, c channels, n rows times positions, w channels repeated (see `blocking.row_repeats`).
"""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu.blocking import RowSum, blocks, repeated, row_block, row_repeats, rows_of, wide_rows
from nettorrent_mpi.device.cpu.flat import Operations
from nettorrent_mpi.device.cpu.loop import Loop

ROWS = 64  # rows that are added up in the arrays' own type


class NormOperations(Operations):
    """The parts of batch norm and layer norm: see device.ops."""

    def inverse_root(self, x: Array, eps: float) -> None:
        x += eps
        np.sqrt(x, out=x)
        np.reciprocal(x, out=x)

    def follow(self, running: Array, value: Array, factor: float, momentum: float) -> None:
        move = self.memory(value.dtype).scratch("move", value.shape)
        np.multiply(value, factor, out=move)
        np.subtract(move, running, out=move)
        move *= momentum
        np.add(running, move, out=running, casting="same_kind")

    # -- batch norm: statistics of each channel ---------------------------------------------------------------------

    def squared_deviations(self, x: Array, mean: Array, total: Array) -> None:
        memory = self.memory(x.dtype)
        if self._tuning.compiled:
            squared_deviations(rows_of(x), _single("mean", mean, memory), total)
            return
        repeats = row_repeats(x.shape[1:])
        x_nw = wide_rows(x, repeats)
        mean_w = repeated(mean, repeats, "mean", memory)
        squares = RowSum("of squares", repeats, total, memory)
        for block in blocks(x_nw.shape[0], row_block(x_nw.shape[1])):
            square = memory.scratch("squares", x_nw[block].shape)
            np.subtract(x_nw[block], mean_w, out=square)
            np.multiply(square, square, out=square)
            squares.add(square)
        squares.finish()

    def normalize(self, x: Array, mean: Array, scale: Array, weight: Array, bias: Array, y: Array) -> None:
        memory = self.memory(x.dtype)
        factor = _factor(weight, scale, memory)
        if self._tuning.compiled:
            normalize(rows_of(x), _single("mean", mean, memory), _single("factor", factor, memory), bias, rows_of(y))
            return
        repeats = row_repeats(x.shape[1:])
        x_nw, y_nw = wide_rows(x, repeats), wide_rows(y, repeats)
        mean_w = repeated(mean, repeats, "mean", memory)
        factor_w = repeated(factor, repeats, "factor", memory)
        bias_w = repeated(bias, repeats, "bias", memory)
        for block in blocks(x_nw.shape[0], row_block(x_nw.shape[1])):
            np.subtract(x_nw[block], mean_w, out=y_nw[block])
            np.multiply(y_nw[block], factor_w, out=y_nw[block])
            np.add(y_nw[block], bias_w, out=y_nw[block])

    def norm_sums(self, x: Array, dy: Array, mean: Array, scale: Array, sums: Array) -> None:
        memory = self.memory(x.dtype)
        if self._tuning.compiled:
            norm_sums(rows_of(x), rows_of(dy), _single("mean", mean, memory), sums[0], sums[1])
        else:
            repeats = row_repeats(x.shape[1:])
            x_nw, dy_nw = wide_rows(x, repeats), wide_rows(dy, repeats)
            mean_w = repeated(mean, repeats, "mean", memory)
            weight_sum = RowSum("of dy times x", repeats, sums[0], memory)
            bias_sum = RowSum("of dy", repeats, sums[1], memory)
            for block in blocks(x_nw.shape[0], row_block(x_nw.shape[1])):
                work = memory.scratch("centred", x_nw[block].shape)
                np.subtract(x_nw[block], mean_w, out=work)
                np.multiply(work, dy_nw[block], out=work)
                weight_sum.add(work)
                bias_sum.add(dy_nw[block])
            weight_sum.finish()
            bias_sum.finish()
        sums[0] *= scale

    def norm_grad(self, x: Array, dy: Array, mean: Array, scale: Array, weight: Array, sums: Array, count: int) -> None:
        memory = self.memory(x.dtype)
        if count:
            sums *= -1 / count
            sums[0] *= scale
        else:  # the statistics were constants
            sums[...] = 0
        factor = _factor(weight, scale, memory)
        if self._tuning.compiled:
            singles = (("mean", mean), ("slope", sums[0]), ("shift", sums[1]), ("factor", factor))
            norm_grad(rows_of(x), rows_of(dy), *(_single(name, values, memory) for name, values in singles))
            return
        repeats = row_repeats(x.shape[1:])
        x_nw, dy_nw = wide_rows(x, repeats), wide_rows(dy, repeats)
        mean_w = repeated(mean, repeats, "mean", memory)
        slope_w = repeated(sums[0], repeats, "slope", memory)
        shift_w = repeated(sums[1], repeats, "shift", memory)
        factor_w = repeated(factor, repeats, "factor", memory)
        for block in blocks(x_nw.shape[0], row_block(x_nw.shape[1])):
            work = memory.scratch("centred", x_nw[block].shape)
            np.subtract(x_nw[block], mean_w, out=work)
            np.multiply(work, slope_w, out=work)
            np.add(work, shift_w, out=work)
            np.add(dy_nw[block], work, out=dy_nw[block])
            np.multiply(dy_nw[block], factor_w, out=dy_nw[block])

    # -- layer norm: statistics of each row and position ------------------------------------------------------------

    def sum_features(self, x: Array, total_n: Array) -> None:
        np.add.reduce(rows_of(x), axis=1, out=total_n)

    def center(self, x: Array, mean_n: Array, y: Array, squares_n: Array) -> None:
        x_nc, y_nc, memory = rows_of(x), rows_of(y), self.memory(x.dtype)
        for block in blocks(x_nc.shape[0], row_block(x_nc.shape[1])):
            np.subtract(x_nc[block], mean_n[block, None], out=y_nc[block])
            square = memory.scratch("squares", y_nc[block].shape)
            np.multiply(y_nc[block], y_nc[block], out=square)
            np.add.reduce(square, axis=1, out=squares_n[block])

    def scale_features(self, y: Array, scale_n: Array, weight: Array, bias: Array) -> None:
        y_nc = rows_of(y)
        for block in blocks(y_nc.shape[0], row_block(y_nc.shape[1])):
            np.multiply(y_nc[block], scale_n[block, None], out=y_nc[block])
            np.multiply(y_nc[block], weight, out=y_nc[block])
            np.add(y_nc[block], bias, out=y_nc[block])

    def layer_norm_sums(
        self, x: Array, dy: Array, mean_n: Array, scale_n: Array, weight: Array, gradients: Array, sums: Array
    ) -> None:
        x_nc, dy_nc, memory = rows_of(x), rows_of(dy), self.memory(x.dtype)
        weight_sum = RowSum("of dy times x", 1, gradients[0], memory)
        bias_sum = RowSum("of dy", 1, gradients[1], memory)
        for block in blocks(x_nc.shape[0], row_block(x_nc.shape[1])):
            hat = _hat(x_nc[block], mean_n[block], scale_n[block], memory)
            product = memory.scratch("product", hat.shape)
            np.multiply(dy_nc[block], hat, out=product)
            weight_sum.add(product)
            bias_sum.add(dy_nc[block])
            np.multiply(product, weight, out=product)
            np.add.reduce(product, axis=1, out=sums[0, block])
            np.multiply(dy_nc[block], weight, out=dy_nc[block])
            np.add.reduce(dy_nc[block], axis=1, out=sums[1, block])
        weight_sum.finish()
        bias_sum.finish()

    def layer_norm_grad(self, x: Array, dy: Array, mean_n: Array, scale_n: Array, sums: Array) -> None:
        x_nc, dy_nc, memory = rows_of(x), rows_of(dy), self.memory(x.dtype)
        for block in blocks(x_nc.shape[0], row_block(x_nc.shape[1])):
            hat = _hat(x_nc[block], mean_n[block], scale_n[block], memory)
            np.multiply(hat, sums[0, block, None], out=hat)
            np.add(hat, sums[1, block, None], out=hat)
            np.add(dy_nc[block], hat, out=dy_nc[block])
            np.multiply(dy_nc[block], scale_n[block, None], out=dy_nc[block])


def _single(name: str, values: Array, memory: Workspace) -> Array:
    """values (channels,) in the memory's type."""
    return repeated(values, 1, name, memory)


def _factor(weight: Array, scale: Array, memory: Workspace) -> Array:
    """weight * scale in float64."""
    factor = memory.scratch("factor", scale.shape, np.float64)
    np.multiply(weight, scale, out=factor)
    return factor


def _hat(x_nc: Array, mean_n: Array, scale_n: Array, memory: Workspace) -> Array:
    """(x - mean) * scale."""
    hat = memory.scratch("centred", x_nc.shape)
    np.subtract(x_nc, mean_n[:, None], out=hat)
    np.multiply(hat, scale_n[:, None], out=hat)
    return hat


@Loop
def squared_deviations(x_nc: Array, mean_c: Array, total_c: Array) -> None:
    """Compute total_c (float64) <- the sum over n of (x - mean)^2; rounding differs from NumPy's."""
    part_c = np.empty(x_nc.shape[1], x_nc.dtype)
    total_c[:] = 0
    for first in range(0, x_nc.shape[0], ROWS):
        part_c[:] = 0
        for n in range(first, min(first + ROWS, x_nc.shape[0])):
            x_c = x_nc[n]
            for c in range(x_c.size):
                centred = x_c[c] - mean_c[c]
                part_c[c] += centred * centred
        for c in range(part_c.size):
            total_c[c] += part_c[c]


@Loop
def normalize(x_nc: Array, mean_c: Array, factor_c: Array, bias_c: Array, y_nc: Array) -> None:
    """y <- (x - mean) * factor + bias."""
    for n in range(x_nc.shape[0]):
        x_c, y_c = x_nc[n], y_nc[n]
        for c in range(x_c.size):
            y_c[c] = (x_c[c] - mean_c[c]) * factor_c[c] + bias_c[c]


@Loop
def norm_sums(x_nc: Array, dy_nc: Array, mean_c: Array, products_c: Array, sums_c: Array) -> None:
    """Compute products_c, sums_c (float64) <- the sums over n of (x - mean) * dy and of dy; rounding differs from
    NumPy's."""
    product_c = np.empty(x_nc.shape[1], x_nc.dtype)
    part_c = np.empty(x_nc.shape[1], x_nc.dtype)
    products_c[:] = 0
    sums_c[:] = 0
    for first in range(0, x_nc.shape[0], ROWS):
        product_c[:] = 0
        part_c[:] = 0
        for n in range(first, min(first + ROWS, x_nc.shape[0])):
            x_c, dy_c = x_nc[n], dy_nc[n]
            for c in range(x_c.size):
                product_c[c] += (x_c[c] - mean_c[c]) * dy_c[c]
                part_c[c] += dy_c[c]
        for c in range(part_c.size):
            products_c[c] += product_c[c]
            sums_c[c] += part_c[c]


@Loop
def norm_grad(x_nc: Array, dy_nc: Array, mean_c: Array, slope_c: Array, shift_c: Array, factor_c: Array) -> None:
    """dy <- (dy + (x - mean) * slope + shift) * factor."""
    for n in range(x_nc.shape[0]):
        x_c, dy_c = x_nc[n], dy_nc[n]
        for c in range(x_c.size):
            dy_c[c] = (dy_c[c] + ((x_c[c] - mean_c[c]) * slope_c[c] + shift_c[c])) * factor_c[c]
