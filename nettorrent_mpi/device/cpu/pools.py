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

    def max_pool(self, x: Array, y: Array, winner: Array | None, pooling: Pooling) -> None:
        if winner is not None and self._tuning.compiled:
            max_pool(x, y, winner, *pooling.size, *pooling.stride)
            return
        memory = self.memory(x.dtype)
        for images in _images(x):
            best = y[images]
            for tap, seen in enumerate(_taps(x[images], pooling)):
                if tap == 0:
                    np.copyto(best, seen)
                    if winner is not None:
                        winner[images] = 0
                    continue
                if winner is not None:
                    # The numbers of the taps grow, so the last larger one is the largest number. (A product and a
                    # maximum are several times faster than NumPy's masked copy.)
                    larger = memory.scratch("larger", best.shape, np.bool_)
                    number = memory.scratch("tap number", best.shape, winner.dtype)
                    np.greater(seen, best, out=larger)
                    np.multiply(larger, winner.dtype.type(tap), out=number)
                    np.maximum(winner[images], number, out=winner[images])
                np.maximum(best, seen, out=best)

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


@Loop
def max_pool(x_bhwc: Array, y_bhwc: Array, winner_bhwc: Array, high: int, wide: int, down: int, across: int) -> None:
    """Compute the largest number of each window of high x wide, `down` and `across` apart, and the number of its tap.

    The taps are compared in numbers as wide as float32, and all are written, changed or not: so the loop also
    vectorizes on processors without masked stores of bytes.
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
def max_pool_grad(
    dy_bhwc: Array, winner_bhwc: Array, dx_bhwc: Array, high: int, wide: int, down: int, across: int, add: bool
) -> None:
    """Compute dx <- dy at the tap that won, 0 at the others of the window; or, with `add`, dx += these."""
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
