"""Pooling of images (b, height, width, c): each works on whatever channels are here."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu import passes
from nettorrent_mpi.device.cpu.blocking import BLOCK, blocks, gradient
from nettorrent_mpi.device.cpu.loop import compiled
from nettorrent_mpi.nn.layer import Features, Layer, Params, Pass
from nettorrent_mpi.nn.layers.registry import Site, makes
from nettorrent_mpi.plan import specs


class Pool(Layer):
    """A window that slides over the images without padding; what is left at the ends is not looked at."""

    def __init__(self, spec: specs.MaxPool2d | specs.AvgPool2d, site: Site):
        high, wide, _ = site.image(spec.kind)
        self.size = specs.pair(spec.size)
        self.stride = self.size if spec.stride is None else specs.pair(spec.stride)
        site.positive("size", *self.size)
        site.positive("stride", *self.stride)
        site.fits("window", self.size, (high, wide))
        self.count = (high - self.size[0]) // self.stride[0] + 1, (wide - self.size[1]) // self.stride[1] + 1
        # Does every pixel lie in at most one window, and in at least one?
        self.apart = self.size[0] <= self.stride[0] and self.size[1] <= self.stride[1]
        self.tiles = self.size == self.stride and high % self.size[0] == 0 and wide % self.size[1] == 0
        outputs = Features((*self.count, site.inputs.shape[2]), site.inputs.part, site.inputs.parts)
        super().__init__(site.name, site.inputs, outputs)

    def taps(self, x: Array) -> Iterator[Array]:
        """What each pixel of the window sees at all its places: views of x, in the window's row-major order."""
        high, wide = self.count
        down, across = self.stride
        for p in range(self.size[0]):
            for q in range(self.size[1]):
                yield x[:, p : p + (high - 1) * down + 1 : down, q : q + (wide - 1) * across + 1 : across]

    def images(self, x: Array) -> Iterator[slice]:
        """Blocks of images that stay in the cache while all taps are visited."""
        return blocks(x.shape[0], max(1, 4 * BLOCK // max(1, x[:1].size)))

    def empty_gradient(self, shape: tuple[int, ...], dy: Array, workspace: Workspace) -> Array:
        """Memory for dx, zero unless each of its elements will be written."""
        dx = gradient(workspace, shape, dy)
        if not self.tiles:
            dx[...] = 0
        return dx

    @property
    def operations(self) -> float:
        return 2.0 * self.size[0] * self.size[1] * float(np.prod(self.outputs.shape))


@makes(specs.MaxPool2d)
class MaxPool2d(Pool):
    """The largest number of each window; the first of equal ones, as in PyTorch, gets the gradient. NaN goes on."""

    def forward(self, params: Params, x: Array, workspace: Workspace, step: Pass) -> tuple[Array, Array | None]:
        y = workspace.keep("y", (x.shape[0], *self.outputs.local))
        taps = self.size[0] * self.size[1]
        dtype = np.uint8 if taps <= 256 else np.uint32
        winner = workspace.keep("winner", y.shape, dtype) if step.training else None
        if winner is not None and compiled():
            passes.max_pool(x, y, winner, *self.size, *self.stride)
            return y, winner
        for images in self.images(x):
            best = y[images]
            larger = workspace.scratch("larger", best.shape, np.bool_)
            number = workspace.scratch("tap number", best.shape, dtype)
            for tap, seen in enumerate(self.taps(x[images])):
                if tap == 0:
                    np.copyto(best, seen)
                    if winner is not None:
                        winner[images] = 0
                    continue
                if winner is not None:
                    # The numbers of the taps grow, so the last larger one is the largest number. (A product and a
                    # maximum are several times faster than NumPy's masked copy.)
                    np.greater(seen, best, out=larger)
                    np.multiply(larger, dtype(tap), out=number)
                    np.maximum(winner[images], number, out=winner[images])
                np.maximum(best, seen, out=best)
        return y, winner

    def backward(
        self, params: Params, grads: Params, saved: Array, dy: Array, workspace: Workspace, step: Pass
    ) -> Array | None:
        if not self.needs_dx:
            return None
        dx = self.empty_gradient((dy.shape[0], *self.inputs.local), dy, workspace)
        if compiled():
            passes.max_pool_back(dy, saved, dx, *self.size, *self.stride, not self.apart)
            return dx
        for images in self.images(dx):
            winner = saved[images]
            chosen = workspace.scratch("chosen", winner.shape, np.bool_)
            for tap, target in enumerate(self.taps(dx[images])):
                np.equal(winner, tap, out=chosen)
                if self.apart:
                    np.multiply(dy[images], chosen, out=target)
                else:
                    share = workspace.scratch("share", winner.shape)
                    np.multiply(dy[images], chosen, out=share)
                    np.add(target, share, out=target)
        return dx


@makes(specs.AvgPool2d)
class AvgPool2d(Pool):
    """The mean of each window."""

    def forward(self, params: Params, x: Array, workspace: Workspace, step: Pass) -> tuple[Array, None]:
        y = workspace.keep("y", (x.shape[0], *self.outputs.local))
        for images in self.images(x):
            total = y[images]
            for tap, seen in enumerate(self.taps(x[images])):
                if tap == 0:
                    np.copyto(total, seen)
                else:
                    np.add(total, seen, out=total)
            total *= 1 / (self.size[0] * self.size[1])
        return y, None

    def backward(
        self, params: Params, grads: Params, saved: None, dy: Array, workspace: Workspace, step: Pass
    ) -> Array | None:
        if not self.needs_dx:
            return None
        dx = self.empty_gradient((dy.shape[0], *self.inputs.local), dy, workspace)
        np.multiply(dy, 1 / (self.size[0] * self.size[1]), out=dy)
        for images in self.images(dx):
            for target in self.taps(dx[images]):
                if self.apart:
                    np.copyto(target, dy[images])
                else:
                    np.add(target, dy[images], out=target)
        return dx


@makes(specs.GlobalAvgPool2d)
class GlobalAvgPool2d(Layer):
    """The mean of each channel over the image: (b, height, width, c) -> (b, c)."""

    def __init__(self, spec: specs.GlobalAvgPool2d, site: Site):
        high, wide, _ = site.image(spec.kind)
        self.area = high * wide
        super().__init__(site.name, site.inputs, Features(site.inputs.shape[2:], site.inputs.part, site.inputs.parts))

    def forward(self, params: Params, x: Array, workspace: Workspace, step: Pass) -> tuple[Array, None]:
        y = workspace.keep("y", (x.shape[0], *self.outputs.local))
        np.add.reduce(x.reshape(x.shape[0], self.area, x.shape[3]), axis=1, out=y)
        y *= 1 / self.area
        return y, None

    def backward(
        self, params: Params, grads: Params, saved: None, dy: Array, workspace: Workspace, step: Pass
    ) -> Array | None:
        if not self.needs_dx:
            return None
        dx = gradient(workspace, (dy.shape[0], *self.inputs.local), dy)
        np.multiply(dy, 1 / self.area, out=dy)
        np.copyto(dx, dy[:, None, None, :])
        return dx

    @property
    def operations(self) -> float:
        return 2.0 * float(np.prod(self.inputs.shape))
