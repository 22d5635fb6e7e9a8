"""Fully connected layers: one matrix product in each direction."""

from __future__ import annotations

from math import prod

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.nn.layer import Context, Features, Grads, Layer, Operands, Parameter, Params
from nettorrent_mpi.nn.layers.registry import Site, register_layer
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.errors import ShapeError


@register_layer(specs.Linear)
class LinearLayer(Layer):
    """A linear layer: y_bo = x_bI @ weight_Io + bias_o, the neurons o divided over the cols. dx_bI is partial when they
    are."""

    takes_relu = True

    def __init__(self, spec: specs.Linear, site: Site):
        if len(site.inputs.shape) != 1:
            raise ShapeError(
                f"layer {site.name}: linear wants flat rows, but {site.previous} gives {site.inputs.shape} a row; "
                f"put `flatten` between {site.previous} and {site.name}"
            )
        assert site.inputs.is_whole, f"{site.name} stands on divided features"
        site.positive("units", spec.units)
        ins, outs = site.inputs.shape[0], spec.units
        part, initial = span(outs, site.cols, site.col), site.initial(spec.initial)
        weight = Parameter("weight", (ins, outs), initial, axis=1, part=part, fans=(ins, outs), product=True)
        bias = (Parameter("bias", (outs,), axis=0, part=part),) if spec.bias else ()
        super().__init__(site.name, site.inputs, Features.divided((outs,), site.cols, site.col), (weight, *bias))
        self.bias = spec.bias

    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, tuple[Array, Array]]:
        y = ctx.workspace.keep("y", (x.shape[0], *self.outputs.local))
        ctx.ops.linear(x, params["weight"], params["bias"] if self.bias else None, y, ctx.relu)
        return y, (x, y)

    def backward(
        self, params: Params, grads: Grads, saved: tuple[Array, Array], dy: Array, ctx: Context
    ) -> Array | None:
        x, y = saved
        bias_gradient(y, dy, grads["bias"] if self.bias else None, ctx)
        dweight = grads["weight"]
        if isinstance(dweight, Operands):
            dweight.put(x, dy, ctx.rows)
        else:
            ctx.ops.matmul(x, dy, dweight, turn_a=True, accumulate=ctx.accumulate)
        if not self.needs_dx:
            return None
        dx = ctx.workspace.gradient(x.shape, dy)
        ctx.ops.matmul(dy, params["weight"], dx, turn_b=True)
        return dx

    @property
    def operations(self) -> float:
        return 6.0 * prod(self.parameters[0].shape)


def bias_gradient(y: Array, dy: Array, total: Array | None, ctx: Context) -> None:
    """Compute the gradient of a bias, if there is one, from that of the outputs y of a layer with weights; before that,
    where the layer has taken its ReLU (ctx.relu), dy <- dy where y > 0, elsewhere 0."""
    if total is None:
        if ctx.relu:
            ctx.ops.relu_grad(y, dy)
    elif ctx.relu:
        ctx.ops.relu_grad_sum(y, dy, total, ctx.accumulate)
    else:
        ctx.ops.sum_rows(dy, total, ctx.accumulate)
