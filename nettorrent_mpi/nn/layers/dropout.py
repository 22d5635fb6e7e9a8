"""Dropout, whose mask does not depend on which rank holds which rows and features."""

from __future__ import annotations

from math import prod

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.nn.layer import Context, Grads, Layer, Params
from nettorrent_mpi.nn.layers.registry import Site, register_layer
from nettorrent_mpi.plan import seeds, specs


@register_layer(specs.Dropout)
class DropoutLayer(Layer):
    """Dropout sets each number to 0 with probability `rate` in training and divides the others by 1 - rate; otherwise
    it returns its input."""

    elementwise = True
    passes_on = True

    def __init__(self, spec: specs.Dropout, site: Site):
        super().__init__(site.name, site.inputs, site.inputs)
        self.rate = spec.rate
        self._codes: Array | None = None  # made with the first forward: they depend on the device

    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, Array | None]:
        if not ctx.training or self.rate == 0:
            return x, None
        assert ctx.rows.size == x.shape[0]
        if self._codes is None:
            self._codes = ctx.ops.place_codes(self.inputs.shape, self.inputs.part)
        keep = ctx.workspace.keep("keep", (x.shape[0], self._codes.size), "bool")
        assert ctx.step is not None
        key = seeds.key(ctx.seed, "dropout", self.name)
        ctx.ops.keep_mask(keep, self._codes, self.rate, key, ctx.step, ctx.rows)
        y = x
        if not self.in_place:
            y = ctx.workspace.keep("y", x.shape)
            ctx.ops.copy(y, x)
        ctx.ops.drop(y, keep, 1 / (1 - self.rate))
        return y, keep

    def backward(self, params: Params, grads: Grads, saved: Array | None, dy: Array, ctx: Context) -> Array:
        if saved is not None:
            ctx.ops.drop(dy, saved, 1 / (1 - self.rate))
        return dy

    @property
    def operations(self) -> float:
        return 20.0 * prod(self.outputs.shape)
