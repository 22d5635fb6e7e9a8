"""What layers do between the matrix products, as loops: see the layers for the formulas.

Suffixes: b rows of a micro-batch, hw places, c channels, n rows times places.
"""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.cpu.loop import Loop


@Loop
def relu(y: Array) -> None:
    """y <- max(y, 0) (flat)."""
    for i in range(y.size):
        y[i] = y.dtype.type(0) if y[i] < 0 else y[i]  # NaN stays NaN


@Loop
def relu_back(y: Array, dy: Array) -> None:
    """dy <- dy where y > 0, elsewhere 0 (flat)."""
    for i in range(dy.size):
        dy[i] *= y[i] > 0


@Loop
def sigmoid(y: Array) -> None:
    """y <- 1 / (1 + exp(-y)) (flat, float32), to 1.5e-7; otherwise rounded than by NumPy.

    exp(t) = 2^n exp(r) with n a whole number and |r| <= log(2) / 2, of which a polynomial of degree 7 (Cephes' expf by
    S. Moshier) gives the exponential. Numba calls a function for each exp, which would not work on vectors.
    """
    one, least, most = np.float32(1), np.float32(-87), np.float32(88)
    for i in range(y.size):
        t = -y[i]
        t = most if t > most else t  # NaN stays NaN
        t = least if t < least else t
        n = np.floor(t * np.float32(1.4426950408889634) + np.float32(0.5))
        r = t - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * (r * r) + r + one
        power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
        y[i] = one / (one + p * power)


@Loop
def sigmoid_back(y: Array, dy: Array) -> None:
    """dy <- dy * y * (1 - y) (flat)."""
    for i in range(dy.size):
        dy[i] *= y[i] * (y.dtype.type(1) - y[i])


@Loop
def cross_entropy(
    y_bo: Array, labels_b: Array, scale: float, smooth: float, share: float, dy_bo: Array, gradient: bool
) -> tuple[float, int]:
    """(sum of the losses, rows told right); dy <- scale times the gradient. Rounded otherwise than by NumPy.

    The loss of a row is -share * log p[label] - smooth * sum(log p).
    """
    total, right = 0.0, 0
    for b in range(y_bo.shape[0]):
        y, dy, label = y_bo[b], dy_bo[b], labels_b[b]
        largest = 0
        for o in range(1, y.size):
            if y[o] > y[largest] or (np.isnan(y[o]) and not np.isnan(y[largest])):
                largest = o
        right += largest == label
        exps, sums = y.dtype.type(0), y.dtype.type(0)
        for o in range(y.size):
            moved = y[o] - y[largest]
            sums += moved
            dy[o] = np.exp(moved)
            exps += dy[o]
        total += np.log(exps) - share * (y[label] - y[largest]) - smooth * sums
        if gradient:
            for o in range(y.size):
                dy[o] = dy[o] / exps * scale - smooth * scale
            dy[label] -= share * scale
    return total, right


@Loop
def thin(y: Array, keep: Array, scale: float) -> None:
    """y <- y * scale where `keep`, elsewhere 0 (flat)."""
    for i in range(y.size):
        y[i] = y[i] * keep[i] * scale


@Loop
def keep_mask(keep_bf: Array, codes_f: Array, keys_b: Array, threshold: int) -> None:
    """nn.random.keep_mask's hash; keys_b (b, 2) uint32."""
    for b in range(keep_bf.shape[0]):
        before, within = keys_b[b, 0], keys_b[b, 1]
        keep = keep_bf[b]
        for i in range(codes_f.size):
            x = np.uint32(codes_f[i] ^ before)
            x = np.uint32(x ^ (x >> np.uint32(16)))
            x = np.uint32(x * np.uint32(0x7FEB352D))
            x = np.uint32(x + within)
            x = np.uint32(x ^ (x >> np.uint32(15)))
            x = np.uint32(x * np.uint32(0x846CA68B))
            x = np.uint32(x ^ (x >> np.uint32(16)))
            keep[i] = x >= threshold


@Loop
def max_pool(x_bhwc: Array, y_bhwc: Array, winner_bhwc: Array, high: int, wide: int, down: int, across: int) -> None:
    """The largest number of each window of high x wide, `down` and `across` apart, and the number of its tap.

    The taps are compared in numbers as wide as float32, and all are written, changed or not: so the loop runs on
    vectors on processors that have no masked stores of bytes, too.
    """
    taps = np.empty(x_bhwc.shape[3], np.int32)
    for b in range(y_bhwc.shape[0]):
        for h in range(y_bhwc.shape[1]):
            for w in range(y_bhwc.shape[2]):
                best, winner, first = y_bhwc[b, h, w], winner_bhwc[b, h, w], x_bhwc[b, h * down, w * across]
                for c in range(best.size):
                    best[c] = first[c]
                    taps[c] = 0
                for tap in range(1, high * wide):
                    seen = x_bhwc[b, h * down + tap // wide, w * across + tap % wide]
                    number = np.int32(tap)
                    for c in range(best.size):
                        here, most = seen[c], best[c]
                        taps[c] = number if here > most else taps[c]
                        best[c] = here if (here > most) | np.isnan(here) else most
                for c in range(best.size):
                    winner[c] = taps[c]


@Loop
def max_pool_back(
    dy_bhwc: Array, winner_bhwc: Array, dx_bhwc: Array, high: int, wide: int, down: int, across: int, add: bool
) -> None:
    """dx at the tap that won <- dy, at the others of the window 0; or, with `add`, dx += these."""
    for b in range(dy_bhwc.shape[0]):
        for h in range(dy_bhwc.shape[1]):
            for w in range(dy_bhwc.shape[2]):
                dy, winner = dy_bhwc[b, h, w], winner_bhwc[b, h, w]
                for tap in range(high * wide):
                    dx = dx_bhwc[b, h * down + tap // wide, w * across + tap % wide]
                    if add:
                        for c in range(dy.size):
                            dx[c] += dy[c] * (winner[c] == tap)
                    else:
                        for c in range(dy.size):
                            dx[c] = dy[c] * (winner[c] == tap)


# -- batch norm: sums are taken in the arrays' type over 64 rows, and these in float64 -------------------------------

ROWS = 64


@Loop
def sum_rows(x_nc: Array, total_c: Array) -> None:
    """total_c (float64) <- the sum over n; rounded otherwise than by NumPy."""
    part_c = np.empty(x_nc.shape[1], x_nc.dtype)
    total_c[:] = 0
    for first in range(0, x_nc.shape[0], ROWS):
        part_c[:] = 0
        for n in range(first, min(first + ROWS, x_nc.shape[0])):
            x_c = x_nc[n]
            for c in range(x_c.size):
                part_c[c] += x_c[c]
        for c in range(part_c.size):
            total_c[c] += part_c[c]


@Loop
def sum_squares(x_nc: Array, mean_c: Array, total_c: Array) -> None:
    """total_c (float64) <- the sum over n of (x - mean)^2; rounded otherwise than by NumPy."""
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
    """products_c, sums_c (float64) <- the sums over n of (x - mean) * dy and of dy; rounded otherwise than by NumPy."""
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
def norm_back(x_nc: Array, dy_nc: Array, mean_c: Array, slope_c: Array, shift_c: Array, factor_c: Array) -> None:
    """dy <- (dy + (x - mean) * slope + shift) * factor."""
    for n in range(x_nc.shape[0]):
        x_c, dy_c = x_nc[n], dy_nc[n]
        for c in range(x_c.size):
            dy_c[c] = (dy_c[c] + ((x_c[c] - mean_c[c]) * slope_c[c] + shift_c[c])) * factor_c[c]
