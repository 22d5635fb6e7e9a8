"""Compiled loops over bfloat16 arrays, which are given by their bits (uint16): numbers are widened to float32 one by
one, and results rounded once. They read and write half of the memory that loops over float32 do."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.cpu.loop import Inlined, Loop

ROWS = 64  # rows that are added up in float32


@Inlined
def wide(bits: int) -> float:
    """Return the number of these bits, as float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)  # type: ignore[return-value]


@Inlined
def short(x: float) -> int:
    """Return the bits of the nearest bfloat16, of two the even one; NaN stays NaN."""
    bits = np.float32(x).view(np.uint32)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    kept = np.uint32(bits | np.uint32(0x400000))
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16((kept if is_nan else rounded) >> np.uint32(16))  # type: ignore[return-value]


@Inlined
def positive(bits: int) -> bool:
    """Whether these are the bits of a number above 0."""
    return (bits > np.uint16(0)) & (bits <= np.uint16(0x7F80))  # type: ignore[return-value]


@Inlined
def put_sums(sum_w: Array, total_c: Array, accumulate: bool) -> None:
    """total_c <- (or +=) the sums of several positions, which lie one after another, added up in the first's place."""
    channels = total_c.size
    for position in range(channels, sum_w.size, channels):
        for c in range(channels):
            sum_w[c] += sum_w[position + c]
    for c in range(channels):
        total_c[c] = total_c[c] + sum_w[c] if accumulate else sum_w[c]


@Loop
def narrow(x: Array, y: Array) -> None:
    """y <- x (float32, flat)."""
    for i in range(x.size):
        y[i] = short(x[i])


@Loop
def add(a: Array, b: Array, y: Array) -> None:
    """y <- a + b (flat)."""
    for i in range(y.size):
        y[i] = short(wide(a[i]) + wide(b[i]))


@Loop
def add_to(a: Array, y: Array) -> None:
    """y <- y + a (flat)."""
    for i in range(y.size):
        y[i] = short(wide(y[i]) + wide(a[i]))


@Loop
def relu(y: Array) -> None:
    """y <- max(y, 0) (flat); NaN stays NaN."""
    for i in range(y.size):
        y[i] = np.uint16(0) if (y[i] >= np.uint16(0x8000)) & (y[i] <= np.uint16(0xFF80)) else y[i]


@Loop
def relu_grad(y: Array, dy: Array) -> None:
    """dy <- dy where y > 0, elsewhere 0 (flat)."""
    for i in range(dy.size):
        dy[i] = dy[i] if positive(y[i]) else np.uint16(0)


@Loop
def relu_grad_sum(y_nw: Array, dy_nw: Array, total_c: Array, accumulate: bool) -> None:
    """dy <- dy where y > 0, elsewhere 0; total_c (float32) <- (or +=) the sum of that, as `sum_rows` has it."""
    rows, width = dy_nw.shape
    part_w, sum_w = np.empty(width, np.float32), np.zeros(width, np.float32)
    for first in range(0, rows, ROWS):
        part_w[:] = 0
        for n in range(first, min(first + ROWS, rows)):
            y_w, dy_w = y_nw[n], dy_nw[n]
            for k in range(width):
                kept = dy_w[k] if positive(y_w[k]) else np.uint16(0)
                dy_w[k] = kept
                part_w[k] += wide(kept)
        for k in range(width):
            sum_w[k] += part_w[k]
    put_sums(sum_w, total_c, accumulate)


@Loop
def sum_rows(x_nw: Array, total_c: Array, accumulate: bool) -> None:
    """total_c (float32) <- (or +=) the sum over n and over the positions in a row."""
    rows, width = x_nw.shape
    part_w, sum_w = np.empty(width, np.float32), np.zeros(width, np.float32)
    for first in range(0, rows, ROWS):
        part_w[:] = 0
        for n in range(first, min(first + ROWS, rows)):
            x_w = x_nw[n]
            for k in range(width):
                part_w[k] += wide(x_w[k])
        for k in range(width):
            sum_w[k] += part_w[k]
    put_sums(sum_w, total_c, accumulate)


@Loop
def moments(x_nc: Array, part: Array) -> None:
    """Compute part (float64) <- the number of rows, their sum, and the sum of squared deviations from their mean."""
    rows, channels = x_nc.shape
    total_c, squares_c = part[1 : 1 + channels], part[1 + channels :]
    mean_c, part_c = np.empty(channels, np.float32), np.empty(channels, np.float32)
    part[:] = 0
    part[0] = rows
    for first in range(0, rows, ROWS):
        part_c[:] = 0
        for n in range(first, min(first + ROWS, rows)):
            x_c = x_nc[n]
            for c in range(channels):
                part_c[c] += wide(x_c[c])
        for c in range(channels):
            total_c[c] += part_c[c]
    for c in range(channels):
        mean_c[c] = total_c[c] / max(rows, 1)
    for first in range(0, rows, ROWS):
        part_c[:] = 0
        for n in range(first, min(first + ROWS, rows)):
            x_c = x_nc[n]
            for c in range(channels):
                centred = wide(x_c[c]) - mean_c[c]
                part_c[c] += centred * centred
        for c in range(channels):
            squares_c[c] += part_c[c]


@Loop
def normalize(x_nc: Array, mean_c: Array, scale_c: Array, weight_c: Array, bias_c: Array, y_nc: Array) -> None:
    """y <- (x - mean) * weight * scale + bias."""
    rows, channels = x_nc.shape
    mean, factor = np.empty(channels, np.float32), np.empty(channels, np.float32)
    shift = np.empty(channels, np.float32)
    for c in range(channels):
        mean[c], factor[c], shift[c] = mean_c[c], wide(weight_c[c]) * scale_c[c], wide(bias_c[c])
    for n in range(rows):
        x_c, y_c = x_nc[n], y_nc[n]
        for c in range(channels):
            y_c[c] = short((wide(x_c[c]) - mean[c]) * factor[c] + shift[c])


@Loop
def norm_sums(x_nc: Array, dy_nc: Array, mean_c: Array, scale_c: Array, sums: Array) -> None:
    """Compute sums (2, c), float64 <- the sums over n of (x - mean) * dy, times scale, and of dy."""
    rows, channels = x_nc.shape
    mean, product_c = np.empty(channels, np.float32), np.empty(channels, np.float32)
    part_c = np.empty(channels, np.float32)
    for c in range(channels):
        mean[c] = mean_c[c]
    sums[:] = 0
    for first in range(0, rows, ROWS):
        product_c[:] = 0
        part_c[:] = 0
        for n in range(first, min(first + ROWS, rows)):
            x_c, dy_c = x_nc[n], dy_nc[n]
            for c in range(channels):
                slope = wide(dy_c[c])
                product_c[c] += (wide(x_c[c]) - mean[c]) * slope
                part_c[c] += slope
        for c in range(channels):
            sums[0, c] += product_c[c]
            sums[1, c] += part_c[c]
    for c in range(channels):
        sums[0, c] *= scale_c[c]


@Loop
def norm_grad(
    x_nc: Array, dy_nc: Array, mean_c: Array, scale_c: Array, weight_c: Array, sums: Array, part: float
) -> None:
    """dy <- (dy + (x - mean) * slope + shift) * factor, where slope and shift are `part` of the sums."""
    rows, channels = x_nc.shape
    mean, slope = np.empty(channels, np.float32), np.empty(channels, np.float32)
    shift, factor = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for c in range(channels):
        mean[c], factor[c] = mean_c[c], wide(weight_c[c]) * scale_c[c]
        slope[c], shift[c] = sums[0, c] * part * scale_c[c], sums[1, c] * part
    for n in range(rows):
        x_c, dy_c = x_nc[n], dy_nc[n]
        for c in range(channels):
            moved = wide(dy_c[c]) + ((wide(x_c[c]) - mean[c]) * slope[c] + shift[c])
            dy_c[c] = short(moved * factor[c])


@Loop
def max_pool(
    x_bhwc: Array, y_bhwc: Array, winner_bhwc: Array, high: int, across_: int, down: int, across: int, relu: bool
) -> None:
    """Compute the largest number of each window of high x across_, `down` and `across` apart, and the number of its
    tap; with `relu` of those above 0, else 0 and the largest number of the winners' type (see pools.max_pool)."""
    zero, first, none = np.uint16(0), np.int32(0), np.int32(-1)
    for b in range(y_bhwc.shape[0]):
        for h in range(y_bhwc.shape[1]):
            for p in range(high):
                for w in range(y_bhwc.shape[2]):
                    best, winner = y_bhwc[b, h, w], winner_bhwc[b, h, w]
                    for q in range(across_):
                        seen, tap = x_bhwc[b, h * down + p, w * across + q], np.int32(p * across_ + q)
                        if tap > 0:
                            for c in range(best.size):
                                here, most = wide(seen[c]), wide(best[c])
                                winner[c] = tap if here > most else np.int32(winner[c])
                                best[c] = seen[c] if (here > most) | np.isnan(here) else best[c]
                        elif relu:
                            for c in range(best.size):
                                here = wide(seen[c])
                                winner[c] = first if here > 0 else none
                                best[c] = zero if here < 0 else seen[c]  # NaN stays NaN
                        else:
                            for c in range(best.size):
                                winner[c] = first
                                best[c] = seen[c]
