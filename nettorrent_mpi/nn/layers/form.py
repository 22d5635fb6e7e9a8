"""Layers that change the form of the features and compute nothing: flatten, and the change from divided to whole."""

from __future__ import annotations

from math import prod

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.nn.layer import Context, Features, Grads, Layer, Params
from nettorrent_mpi.nn.layers.registry import Site, register_layer
from nettorrent_mpi.plan import specs


@register_layer(specs.Flatten)
class FlattenLayer(Layer):
    """(b, height, width, channels) -> (b, height * width * channels): the same memory. Its input is whole."""

    passes_on = True

    def __init__(self, spec: specs.Flatten, site: Site):
        assert site.inputs.is_whole, f"{site.name} stands on divided features"
        super().__init__(site.name, site.inputs, Features.whole((prod(site.inputs.shape),)))

    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, None]:
        return ctx.workspace.reshaped(x, (x.shape[0], *self.outputs.shape)), None

    def backward(self, params: Params, grads: Grads, saved: None, dy: Array, ctx: Context) -> Array | None:
        return ctx.workspace.reshaped(dy, (dy.shape[0], *self.inputs.shape)) if self.needs_dx else None


class Gather(Layer):
    """y_b..C <- x_b..c of all cols: divided features become whole on every col.

    What stands behind either divides its work over the cols, so that each has only a partial dy (`partial`): backward
    then is a reduce-scatter over the cols. Or every col does the same work there, as with the loss: backward takes its
    slice.
    """

    def __init__(self, name: str, inputs: Features, partial: bool):
        super().__init__(name, inputs, Features.whole(inputs.shape))
        self.partial = partial

    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, None]:
        y = ctx.workspace.keep("y", (x.shape[0], *self.outputs.shape))
        ctx.team.gather_cols(x, y, ctx.workspace)
        return y, None

    def backward(self, params: Params, grads: Grads, saved: None, dy: Array, ctx: Context) -> Array | None:
        if not self.needs_dx:
            return None
        dx = ctx.workspace.gradient((dy.shape[0], *self.inputs.local), dy)
        if self.partial:
            ctx.team.scatter_cols(dy, dx, ctx.workspace)
        else:
            ctx.ops.copy(dx, dy[..., slice(*self.inputs.part)])
        return dx
