"""Pooling of images (b, height, width, c): a thread for each element, forward of the output, backward of the input."""

from __future__ import annotations

from typing import Any

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.geometry import Pooling
from nettorrent_mpi.device.gpu.operations import BLOCK, KernelOperations
from nettorrent_mpi.device.gpu.tiles import tiles

MOST_DOWN = 65535  # blocks of a grid's second axis


class GpuPoolOperations(KernelOperations):
    """Pooling and its gradients: see device.ops. A pixel of several windows adds up what they give to it, in the order
    of its places in them."""

    def max_pool(self, x: Array, y: Array, winner: Array | None, pooling: Pooling, relu: bool = False) -> None:
        self._of_images("max_pool", y, x, y, *_winner(winner), *_sizes(x, y), *_window(pooling), relu)

    def max_pool_grad(self, dy: Array, winner: Array, dx: Array, pooling: Pooling) -> None:
        self._of_images("max_pool_grad", dx, dy, *_winner(winner), dx, *_sizes(dx, dy), *_window(pooling))

    def avg_pool(self, x: Array, y: Array, pooling: Pooling) -> None:
        self._of_images("avg_pool", y, x, y, 1 / pooling.taps, *_sizes(x, y), *_window(pooling))

    def avg_pool_grad(self, dy: Array, dx: Array, pooling: Pooling) -> None:
        self._of_images("avg_pool_grad", dx, dy, dx, 1 / pooling.taps, *_sizes(dx, dy), *_window(pooling))

    def global_avg_pool(self, x: Array, y: Array) -> None:
        images, high, wide, c = x.shape
        assert y.shape == (images, c)
        assert x.flags.c_contiguous
        width, grid = tiles(1, c, BLOCK, 1)
        down = min(images, MOST_DOWN)
        self.launch(
            "global_avg_pool", x.dtype, (grid[0], down), BLOCK, x, y, 1 / (high * wide), images, high * wide, c, width
        )

    def global_avg_pool_grad(self, dy: Array, dx: Array) -> None:
        images, high, wide, c = dx.shape
        assert dy.shape == (images, c)
        self._of_images("global_avg_pool_grad", dx, dy, dx, 1 / (high * wide), images, high * wide, c)

    def _of_images(self, kernel: str, out: Array, *arguments: Any) -> None:
        """Launch a kernel with a thread for each element of an image of `out`."""
        images, high, wide, c = out.shape
        size = high * wide * c
        assert size < 1 << 31, f"an image of {size} numbers"
        block = min(BLOCK, -(-size // 32) * 32)
        if images and size:
            self.launch(kernel, out.dtype, (-(-size // block), min(images, MOST_DOWN)), block, *arguments)


def _winner(winner: Array | None) -> tuple[Array | None, Array | None]:
    """Return the winner as the one or the other argument."""
    if winner is None or winner.dtype.itemsize == 1:
        return winner, None
    return None, winner


def _sizes(x: Array, y: Array) -> tuple[int, ...]:
    """Return the number of images, and the sizes of those before and after pooling."""
    assert (x.shape[0], x.shape[3]) == (y.shape[0], y.shape[3])
    assert x.flags.c_contiguous
    assert y.flags.c_contiguous
    return (*x.shape, *y.shape[1:3])


def _window(pooling: Pooling) -> tuple[int, ...]:
    return (*pooling.size, *pooling.stride)
