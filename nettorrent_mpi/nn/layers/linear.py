"""Fully connected layers: one matrix product in each direction."""

from __future__ import annotations

from abc import abstractmethod
from math import prod

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.nn.layer import Context, Features, Grads, Layer, Operands, Parameter, Params
from nettorrent_mpi.nn.layers.registry import Site, register_layer
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.errors import ShapeError


class ProductLayer(Layer):
    """A ProductLayer adds a bias to a product of its inputs with its weights. Its backward pass has two products, dx
    and the gradient of the weights, which do not need each other."""

    bias: bool

    def backward(
        self, params: Params, grads: Grads, saved: tuple[Array, Array], dy: Array, ctx: Context
    ) -> Array | None:
        bias_gradient(saved[1], dy, grads["bias"] if self.bias else None, ctx)
        self.backward_weights(grads, saved, dy, ctx)
        return self.gradient_x(params, saved[0], dy, ctx) if self.needs_dx else None

    def backward_inputs(
        self, params: Params, grads: Grads, saved: tuple[Array, Array], dy: Array, ctx: Context
    ) -> tuple[Array | None, Array]:
        bias_gradient(saved[1], dy, grads["bias"] if self.bias else None, ctx)
        return self.gradient_x(params, saved[0], dy, ctx) if self.needs_dx else None, dy

    @abstractmethod
    def gradient_x(self, params: Params, x: Array, dy: Array, ctx: Context) -> Array:
        """Return dx, from the gradient dy of the product."""


@register_layer(specs.Linear)
class LinearLayer(ProductLayer):
    """A linear layer: y_bo = x_bI @ weight_Io + bias_o, the neurons o divided over the cols. dx_bI is partial when they
    are."""

    takes_relu = splits = True

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

    def backward_weights(self, grads: Grads, saved: tuple[Array, Array], held: Array, ctx: Context) -> None:
        dweight = grads["weight"]
        if isinstance(dweight, Operands):
            dweight.put(saved[0], held, ctx)
        else:
            ctx.ops.matmul(saved[0], held, dweight, turn_a=True, accumulate=ctx.accumulate)

    def gradient_x(self, params: Params, x: Array, dy: Array, ctx: Context) -> Array:
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
