"""Layers that reshape or redistribute features and compute nothing: flatten, and the all-gather of divided features."""

from __future__ import annotations

from math import prod

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.nn.layer import Context, Features, Grads, Layer, Params
from nettorrent_mpi.nn.layers.registry import Site, register_layer
from nettorrent_mpi.plan import specs


@register_layer(specs.Flatten)
class FlattenLayer(Layer):
    """Flatten reshapes (b, height, width, channels) to (b, height * width * channels) in the same memory. Its input is
    whole."""

    passes_on = True

    def __init__(self, spec: specs.Flatten, site: Site):
        assert site.inputs.is_whole, f"{site.name} stands on divided features"
        super().__init__(site.name, site.inputs, Features.whole((prod(site.inputs.shape),)))

    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, None]:
        return ctx.workspace.reshaped(x, (x.shape[0], *self.outputs.shape)), None

    def backward(self, params: Params, grads: Grads, saved: None, dy: Array, ctx: Context) -> Array:
        return ctx.workspace.reshaped(dy, (dy.shape[0], *self.inputs.shape))


class Gather(Layer):
    """An all-gather of features: y_b..C <- x_b..c of all cols, so that every col has whole features.

    If the next layer divides its work over the cols, each col has only a partial dy (`partial`), and backward is a
    reduce-scatter over the cols. If every col does the same work, as with the loss, backward takes the col's slice.
    """

    def __init__(self, name: str, inputs: Features, partial: bool):
        super().__init__(name, inputs, Features.whole(inputs.shape))
        self.partial = partial

    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, None]:
        y = ctx.workspace.keep("y", (x.shape[0], *self.outputs.shape))
        ctx.team.gather_cols(x, y, ctx.workspace)
        return y, None

    def backward(self, params: Params, grads: Grads, saved: None, dy: Array, ctx: Context) -> Array:
        dx = ctx.workspace.gradient((dy.shape[0], *self.inputs.local), dy)
        if self.partial:
            ctx.team.scatter_cols(dy, dx, ctx.workspace)
        else:
            ctx.ops.copy(dx, dy[..., slice(*self.inputs.part)])
        return dx
