"""Pooling: maxima and means of windows of images (b, height, width, c)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.cpu.blocking import BLOCK, blocks
from nettorrent_mpi.device.cpu.flat import Operations
from nettorrent_mpi.device.cpu.loop import Loop
from nettorrent_mpi.device.geometry import Pooling


class PoolOperations(Operations):
    """Pooling and its gradients: see device.ops."""

    def max_pool(self, x: Array, y: Array, winner: Array | None, pooling: Pooling, relu: bool = False) -> None:
        if winner is not None and self._tuning.compiled:
            if pooling.size[1] == 2:
                max_pool_of_pairs(x, y, winner, pooling.size[0], *pooling.stride, relu)
            else:
                max_pool(x, y, winner, *pooling.size, *pooling.stride, relu)
            return
        memory = self.memory(x.dtype)
        for images in _images(x):
            best = y[images]
            for tap, seen in enumerate(_taps(x[images], pooling)):
                if winner is not None:
                    # The numbers of the taps, from 1 on, grow, so the last larger one is the largest number. (A product
                    # and a maximum are several times faster than NumPy's masked copy.)
                    larger = memory.scratch("larger", best.shape, np.bool_)
                    if tap:
                        np.greater(seen, best, out=larger)
                    elif relu:
                        np.greater(seen, 0, out=larger)
                    else:
                        larger.fill(True)
                    number = memory.scratch("tap number", best.shape, winner.dtype)
                    np.multiply(larger, winner.dtype.type(tap + 1), out=number)
                    np.maximum(winner[images] if tap else 0, number, out=winner[images])
                if tap == 0:
                    np.maximum(seen, 0 if relu else seen, out=best)
                else:
                    np.maximum(best, seen, out=best)
        if winner is not None:
            np.subtract(winner, 1, out=winner)  # none, a 0, becomes the largest number of the type

    def max_pool_grad(self, dy: Array, winner: Array, dx: Array, pooling: Pooling) -> None:
        if not pooling.tiles:
            dx.fill(0)
        if self._tuning.compiled:
            max_pool_grad(dy, winner, dx, *pooling.size, *pooling.stride, not pooling.apart)
            return
        memory = self.memory(dy.dtype)
        for images in _images(dx):
            won = winner[images]
            chosen = memory.scratch("chosen", won.shape, np.bool_)
            for tap, target in enumerate(_taps(dx[images], pooling)):
                np.equal(won, tap, out=chosen)
                if pooling.apart:
                    np.multiply(dy[images], chosen, out=target)
                else:
                    share = memory.scratch("share", won.shape)
                    np.multiply(dy[images], chosen, out=share)
                    np.add(target, share, out=target)

    def avg_pool(self, x: Array, y: Array, pooling: Pooling) -> None:
        for images in _images(x):
            total = y[images]
            for tap, seen in enumerate(_taps(x[images], pooling)):
                if tap == 0:
                    np.copyto(total, seen)
                else:
                    np.add(total, seen, out=total)
            total *= 1 / pooling.taps

    def avg_pool_grad(self, dy: Array, dx: Array, pooling: Pooling) -> None:
        if not pooling.tiles:
            dx.fill(0)
        np.multiply(dy, 1 / pooling.taps, out=dy)
        for images in _images(dx):
            for target in _taps(dx[images], pooling):
                if pooling.apart:
                    np.copyto(target, dy[images])
                else:
                    np.add(target, dy[images], out=target)

    def global_avg_pool(self, x: Array, y: Array) -> None:
        area = x.shape[1] * x.shape[2]
        np.add.reduce(x.reshape(x.shape[0], area, x.shape[3]), axis=1, out=y)
        y *= 1 / area

    def global_avg_pool_grad(self, dy: Array, dx: Array) -> None:
        np.multiply(dy, 1 / (dx.shape[1] * dx.shape[2]), out=dy)
        np.copyto(dx, dy[:, None, None, :])


def _images(x: Array) -> Iterator[slice]:
    """Return blocks of images that stay in the cache while all taps are visited."""
    return blocks(x.shape[0], max(1, 4 * BLOCK // max(1, x[:1].size)))


def _taps(x: Array, pooling: Pooling) -> Iterator[Array]:
    """Return what each pixel of the window sees at all its places: views of x, in the window's row-major order."""
    (high, wide), (down, across) = pooling.count, pooling.stride
    for p in range(pooling.size[0]):
        for q in range(pooling.size[1]):
            yield x[:, p : p + (high - 1) * down + 1 : down, q : q + (wide - 1) * across + 1 : across]


# Loops go through the rows of the images one after another, and so through memory: that is twice as fast as window by
# window where images are no longer in the cache. Taps are compared in numbers as wide as float32, and all are written,
# changed or not: so the loops also vectorize on processors without masked stores of bytes.


@Loop
def max_pool(
    x_bhwc: Array, y_bhwc: Array, winner_bhwc: Array, high: int, wide: int, down: int, across: int, relu: bool
) -> None:
    """Compute the largest number of each window of high x wide, `down` and `across` apart, and the number of its tap;
    with `relu` of those above 0, else 0 and the largest number of the winners' type."""
    zero, first, none = x_bhwc.dtype.type(0), np.int32(0), np.int32(-1)
    for b in range(y_bhwc.shape[0]):
        for h in range(y_bhwc.shape[1]):
            for p in range(high):
                for w in range(y_bhwc.shape[2]):
                    best, winner = y_bhwc[b, h, w], winner_bhwc[b, h, w]
                    for q in range(wide):
                        seen, tap = x_bhwc[b, h * down + p, w * across + q], np.int32(p * wide + q)
                        if tap > 0:
                            for c in range(best.size):
                                here, most = seen[c], best[c]
                                winner[c] = tap if here > most else np.int32(winner[c])
                                best[c] = here if (here > most) | np.isnan(here) else most
                        elif relu:
                            for c in range(best.size):
                                here = seen[c]
                                winner[c] = first if here > 0 else none
                                best[c] = zero if here < 0 else here  # NaN stays NaN
                        else:
                            for c in range(best.size):
                                winner[c] = first
                                best[c] = seen[c]


@Loop
def max_pool_of_pairs(
    x_bhwc: Array, y_bhwc: Array, winner_bhwc: Array, high: int, down: int, across: int, relu: bool
) -> None:
    """Compute what `max_pool` does for windows of high x 2, whose usual size is 2 x 2, nearly twice as fast."""
    zero = x_bhwc.dtype.type(0)
    for b in range(y_bhwc.shape[0]):
        for h in range(y_bhwc.shape[1]):
            for p in range(high):
                left_tap, right_tap = np.int32(2 * p), np.int32(2 * p + 1)
                for w in range(y_bhwc.shape[2]):
                    left, right = x_bhwc[b, h * down + p, w * across], x_bhwc[b, h * down + p, w * across + 1]
                    best, winner = y_bhwc[b, h, w], winner_bhwc[b, h, w]
                    if p > 0:
                        for c in range(best.size):
                            most, tap, here = best[c], np.int32(winner[c]), left[c]
                            tap = left_tap if here > most else tap
                            most = here if (here > most) | np.isnan(here) else most
                            here = right[c]
                            winner[c] = right_tap if here > most else tap
                            best[c] = here if (here > most) | np.isnan(here) else most
                    else:
                        for c in range(best.size):
                            most, tap = left[c], np.int32(0)
                            if relu:
                                tap = np.int32(0) if most > 0 else np.int32(-1)
                                most = zero if most < 0 else most  # NaN stays NaN
                            here = right[c]
                            winner[c] = right_tap if here > most else tap
                            best[c] = here if (here > most) | np.isnan(here) else most


@Loop
def max_pool_grad(
    dy_bhwc: Array, winner_bhwc: Array, dx_bhwc: Array, high: int, wide: int, down: int, across: int, add: bool
) -> None:
    """Compute dx <- dy at the tap that won, 0 at the others of the window; or, with `add`, dx += these."""
    for b in range(dy_bhwc.shape[0]):
        for h in range(dy_bhwc.shape[1]):
            for p in range(high):
                for w in range(dy_bhwc.shape[2]):
                    dy, winner = dy_bhwc[b, h, w], winner_bhwc[b, h, w]
                    for q in range(wide):
                        dx = dx_bhwc[b, h * down + p, w * across + q]
                        tap = np.int32(p * wide + q)
                        if add:
                            for c in range(dy.size):
                                dx[c] += dy[c] * (np.int32(winner[c]) == tap)
                        else:
                            for c in range(dy.size):
                                dx[c] = dy[c] * (np.int32(winner[c]) == tap)
