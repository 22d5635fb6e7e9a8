"""Pooling of images (b, height, width, c), on this rank's channels."""

from __future__ import annotations

from math import prod

from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.device.geometry import Pooling
from nettorrent_mpi.nn.layer import Context, Features, Grads, Layer, Params
from nettorrent_mpi.nn.layers.registry import Site, register_layer
from nettorrent_mpi.plan import specs


class Pool(Layer):
    """A pooling window slides over the images without padding; remainders at the edges are ignored."""

    def __init__(self, spec: specs.MaxPool2d | specs.AvgPool2d, site: Site):
        high, wide, _ = site.image(spec.kind)
        size = specs.pair(spec.size)
        stride = size if spec.stride is None else specs.pair(spec.stride)
        site.positive("size", *size)
        site.positive("stride", *stride)
        site.fits("window", size, (high, wide))
        self.pooling = Pooling((high, wide), size, stride)
        shape = (*self.pooling.count, site.inputs.shape[2])
        super().__init__(site.name, site.inputs, Features(shape, site.inputs.part, site.inputs.parts))

    def output_of(self, x: Array) -> Shape:
        """Return the shape of the output on this rank."""
        return x.shape[0], *self.outputs.local

    @property
    def operations(self) -> float:
        return 2.0 * self.pooling.taps * prod(self.outputs.shape)


@register_layer(specs.MaxPool2d)
class MaxPool2dLayer(Pool):
    """Max pooling takes the largest number of each window; in ties the first gets the gradient, as in PyTorch. NaN
    propagates. With the ReLU before it, it gives the same numbers and gradients in one pass over a fraction of them."""

    takes_relu_before = True

    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, Array | None]:
        y = ctx.workspace.keep("y", self.output_of(x))
        dtype = "uint8" if self.pooling.taps < 256 else "uint32"  # a number is left for "none"
        winner = ctx.workspace.keep("winner", y.shape, dtype) if ctx.training else None
        ctx.ops.max_pool(x, y, winner, self.pooling, ctx.relu)
        return y, winner

    def backward(self, params: Params, grads: Grads, saved: Array, dy: Array, ctx: Context) -> Array:
        dx = ctx.workspace.gradient((dy.shape[0], *self.inputs.local), dy)
        ctx.ops.max_pool_grad(dy, saved, dx, self.pooling)
        return dx


@register_layer(specs.AvgPool2d)
class AvgPool2dLayer(Pool):
    """Average pooling takes the mean of each window."""

    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, None]:
        y = ctx.workspace.keep("y", self.output_of(x))
        ctx.ops.avg_pool(x, y, self.pooling)
        return y, None

    def backward(self, params: Params, grads: Grads, saved: None, dy: Array, ctx: Context) -> Array:
        dx = ctx.workspace.gradient((dy.shape[0], *self.inputs.local), dy)
        ctx.ops.avg_pool_grad(dy, dx, self.pooling)
        return dx


@register_layer(specs.GlobalAvgPool2d)
class GlobalAvgPool2dLayer(Layer):
    """Global average pooling takes the mean of each channel over the image: (b, height, width, c) -> (b, c)."""

    def __init__(self, spec: specs.GlobalAvgPool2d, site: Site):
        site.image(spec.kind)
        super().__init__(site.name, site.inputs, Features(site.inputs.shape[2:], site.inputs.part, site.inputs.parts))

    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, None]:
        y = ctx.workspace.keep("y", (x.shape[0], *self.outputs.local))
        ctx.ops.global_avg_pool(x, y)
        return y, None

    def backward(self, params: Params, grads: Grads, saved: None, dy: Array, ctx: Context) -> Array:
        dx = ctx.workspace.gradient((dy.shape[0], *self.inputs.local), dy)
        ctx.ops.global_avg_pool_grad(dy, dx)
        return dx

    @property
    def operations(self) -> float:
        return 2.0 * prod(self.inputs.shape)
