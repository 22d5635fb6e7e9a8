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

    # -- batch norm: statistics of each channel ---------------------------------------------------------------------

    def moments(self, x: Array, part: Array) -> None:
        if self._tuning.compiled:
            moments(_wide(x), part)
            return
        memory, channels, rows = self.memory(x.dtype), x.shape[-1], rows_of(x).shape[0]
        total, square_sum = part[1 : 1 + channels], part[1 + channels :]
        part[0] = rows
        repeats = row_repeats(x.shape[1:])
        x_nw = wide_rows(x, repeats)
        sums = RowSum("of rows", repeats, total, memory)
        for block in blocks(x_nw.shape[0], row_block(x_nw.shape[1])):
            sums.add(x_nw[block])
        sums.finish()
        mean = memory.scratch("mean", total.shape, np.float64)
        np.divide(total, max(rows, 1), out=mean)
        mean_w = repeated(mean, repeats, "mean", memory)
        squares = RowSum("of squares", repeats, square_sum, memory)
        for block in blocks(x_nw.shape[0], row_block(x_nw.shape[1])):
            square = memory.scratch("squares", x_nw[block].shape)
            np.subtract(x_nw[block], mean_w, out=square)
            np.multiply(square, square, out=square)
            squares.add(square)
        squares.finish()

    def merge_moments(
        self, parts: Array, mean: Array, scale: Array, running_mean: Array, running_var: Array, momentum: float,
        eps: float,
    ) -> None:  # fmt: skip
        if self._tuning.compiled:
            merge_moments(parts, mean, scale, running_mean, running_var, momentum, eps)
            return
        channels, count = mean.size, parts[:, 0].sum()
        move = self.memory(mean.dtype).scratch("move", mean.shape)
        np.add.reduce(parts[:, 1 : 1 + channels], axis=0, out=mean)
        np.divide(mean, count, out=mean)
        np.add.reduce(parts[:, 1 + channels :], axis=0, out=scale)
        for part in parts:
            if part[0]:
                np.divide(part[1 : 1 + channels], part[0], out=move)
                np.subtract(move, mean, out=move)
                np.multiply(move, move, out=move)
                np.multiply(move, part[0], out=move)
                np.add(scale, move, out=scale)
        np.divide(scale, count, out=scale)
        if momentum:
            for running, value, factor in ((running_mean, mean, 1.0), (running_var, scale, count / (count - 1))):
                np.multiply(value, factor, out=move)
                np.subtract(move, running, out=move)
                np.multiply(move, momentum, out=move)
                np.add(running, move, out=running, casting="same_kind")
        self.inverse_root(scale, eps)

    def normalize(self, x: Array, mean: Array, scale: Array, weight: Array, bias: Array, y: Array) -> None:
        if self._tuning.compiled:
            normalize(_wide(x), mean, scale, weight, bias, _wide(y))
            return
        memory = self.memory(x.dtype)
        repeats = row_repeats(x.shape[1:])
        x_nw, y_nw = wide_rows(x, repeats), wide_rows(y, repeats)
        mean_w = repeated(mean, repeats, "mean", memory)
        factor_w = repeated(_factor(weight, scale, memory), repeats, "factor", memory)
        bias_w = repeated(bias, repeats, "bias", memory)
        for block in blocks(x_nw.shape[0], row_block(x_nw.shape[1])):
            np.subtract(x_nw[block], mean_w, out=y_nw[block])
            np.multiply(y_nw[block], factor_w, out=y_nw[block])
            np.add(y_nw[block], bias_w, out=y_nw[block])

    def norm_sums(self, x: Array, dy: Array, mean: Array, scale: Array, sums: Array) -> None:
        if self._tuning.compiled:
            norm_sums(_wide(x), _wide(dy), mean, scale, sums)
            return
        memory = self.memory(x.dtype)
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
        part = -1 / count if count else 0.0  # with 0 the statistics were constants
        if self._tuning.compiled:
            norm_grad(_wide(x), _wide(dy), mean, scale, weight, sums, part)
            return
        memory = self.memory(x.dtype)
        sums *= part
        sums[0] *= scale
        repeats = row_repeats(x.shape[1:])
        x_nw, dy_nw = wide_rows(x, repeats), wide_rows(dy, repeats)
        mean_w = repeated(mean, repeats, "mean", memory)
        slope_w = repeated(sums[0], repeats, "slope", memory)
        shift_w = repeated(sums[1], repeats, "shift", memory)
        factor_w = repeated(_factor(weight, scale, memory), repeats, "factor", memory)
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


def _wide(x: Array) -> Array:
    """x with several positions in a row: loops over few channels would mostly begin and end."""
    return wide_rows(x, row_repeats(x.shape[1:]))


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
def moments(x_nw: Array, part: Array) -> None:
    """Compute part (float64) <- the number of rows, their sum, and the sum of squared deviations from their mean;
    rounding differs from NumPy's.

    A block of rows is read twice, while it is in the cache: for a mean, and for deviations from it, whose sum corrects
    it. Blocks are merged as by Chan, Golub, LeVeque (1983), equation 2.1.
    """
    wide, channels = x_nw.shape[1], part.size // 2
    total_c, squares_c = part[1 : 1 + channels], part[1 + channels :]
    part_w, rest_w, mean_w = np.empty(wide, x_nw.dtype), np.empty(wide, x_nw.dtype), np.empty(wide, x_nw.dtype)
    sum_c, rest_c = np.empty(channels), np.empty(channels)
    part[:] = 0
    for first in range(0, x_nw.shape[0], ROWS):
        last = min(first + ROWS, x_nw.shape[0])
        before, here = part[0], np.float64((last - first) * (wide // channels))
        part_w[:] = 0
        for n in range(first, last):
            x_w = x_nw[n]
            for k in range(wide):
                part_w[k] += x_w[k]
        sum_c[:] = 0
        rest_c[:] = 0
        for position in range(0, wide, channels):
            for c in range(channels):
                sum_c[c] += part_w[position + c]
        for position in range(0, wide, channels):
            for c in range(channels):
                mean_w[position + c] = sum_c[c] / here
        part_w[:] = 0
        rest_w[:] = 0
        for n in range(first, last):
            x_w = x_nw[n]
            for k in range(wide):
                centred = x_w[k] - mean_w[k]
                part_w[k] += centred * centred
                rest_w[k] += centred
        for position in range(0, wide, channels):
            for c in range(channels):
                squares_c[c] += part_w[position + c]
                rest_c[c] += rest_w[position + c]
        for c in range(channels):
            squares_c[c] -= rest_c[c] * rest_c[c] / here
            total = mean_w[c] * here + rest_c[c]
            if before > 0:
                move = total_c[c] / before - total / here
                squares_c[c] += move * move * (before * here / (before + here))
            total_c[c] += total
        part[0] = before + here


@Loop
def merge_moments(
    parts: Array, mean_c: Array, scale_c: Array, running_mean_c: Array, running_var_c: Array, momentum: float,
    eps: float,
) -> None:  # fmt: skip
    """Compute the statistics of all rows from the moments of parts of them."""
    members, channels = parts.shape[0], mean_c.size
    count = 0.0
    for member in range(members):
        count += parts[member, 0]
    for c in range(channels):
        total = square_sum = 0.0
        for member in range(members):
            total += parts[member, 1 + c]
            square_sum += parts[member, 1 + channels + c]
        mean = total / count
        for member in range(members):
            if parts[member, 0] > 0:
                move = parts[member, 1 + c] / parts[member, 0] - mean
                square_sum += move * move * parts[member, 0]
        variance = square_sum / count
        mean_c[c] = mean
        if momentum != 0:
            unbiased = variance * (count / (count - 1))
            running_mean_c[c] = running_mean_c[c] + (mean - running_mean_c[c]) * momentum
            running_var_c[c] = running_var_c[c] + (unbiased - running_var_c[c]) * momentum
        scale_c[c] = 1 / np.sqrt(variance + eps)


@Loop
def normalize(x_nw: Array, mean_c: Array, scale_c: Array, weight_c: Array, bias_c: Array, y_nw: Array) -> None:
    """y <- (x - mean) * weight * scale + bias."""
    wide, channels = x_nw.shape[1], mean_c.size
    mean, factor, bias = np.empty(wide, x_nw.dtype), np.empty(wide, x_nw.dtype), np.empty(wide, x_nw.dtype)
    for k in range(wide):
        c = k % channels
        mean[k], factor[k], bias[k] = mean_c[c], weight_c[c] * scale_c[c], bias_c[c]
    for n in range(x_nw.shape[0]):
        x_w, y_w = x_nw[n], y_nw[n]
        for k in range(wide):
            y_w[k] = (x_w[k] - mean[k]) * factor[k] + bias[k]


@Loop
def norm_sums(x_nw: Array, dy_nw: Array, mean_c: Array, scale_c: Array, sums: Array) -> None:
    """Compute sums (2, c), float64 <- the sums over n of (x - mean) * dy, times scale, and of dy; rounding differs from
    NumPy's."""
    wide, channels = x_nw.shape[1], mean_c.size
    mean, product_w, part_w = np.empty(wide, x_nw.dtype), np.empty(wide, x_nw.dtype), np.empty(wide, x_nw.dtype)
    for k in range(wide):
        mean[k] = mean_c[k % channels]
    sums[:] = 0
    for first in range(0, x_nw.shape[0], ROWS):
        product_w[:] = 0
        part_w[:] = 0
        for n in range(first, min(first + ROWS, x_nw.shape[0])):
            x_w, dy_w = x_nw[n], dy_nw[n]
            for k in range(wide):
                product_w[k] += (x_w[k] - mean[k]) * dy_w[k]
                part_w[k] += dy_w[k]
        for position in range(0, wide, channels):
            for c in range(channels):
                sums[0, c] += product_w[position + c]
                sums[1, c] += part_w[position + c]
    for c in range(channels):
        sums[0, c] *= scale_c[c]


@Loop
def norm_grad(
    x_nw: Array, dy_nw: Array, mean_c: Array, scale_c: Array, weight_c: Array, sums: Array, part: float
) -> None:
    """dy <- (dy + (x - mean) * slope + shift) * factor, where slope and shift are `part` of the sums."""
    wide, channels = x_nw.shape[1], mean_c.size
    mean, slope = np.empty(wide, x_nw.dtype), np.empty(wide, x_nw.dtype)
    shift, factor = np.empty(wide, x_nw.dtype), np.empty(wide, x_nw.dtype)
    for k in range(wide):
        c = k % channels
        mean[k], factor[k] = mean_c[c], weight_c[c] * scale_c[c]
        slope[k], shift[k] = sums[0, c] * part * scale_c[c], sums[1, c] * part
    for n in range(x_nw.shape[0]):
        x_w, dy_w = x_nw[n], dy_nw[n]
        for k in range(wide):
            dy_w[k] = (dy_w[k] + ((x_w[k] - mean[k]) * slope[k] + shift[k])) * factor[k]
