"""Activations are element-wise functions, each a layer of its own."""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import Any, ClassVar

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.nn.layer import Context, Grads, Layer, Params
from nettorrent_mpi.nn.layers.registry import Site, register_layer
from nettorrent_mpi.plan import specs


class Activation(Layer):
    """An Activation is y = f(x), element by element, on this rank's part of the features."""

    elementwise = True
    reads_output = True
    cost: ClassVar[float] = 10.0  # operations per element, forward and backward

    def __init__(self, spec: specs.LayerSpec, site: Site):
        super().__init__(site.name, site.inputs, site.inputs)

    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, Any]:
        y = x if self.in_place else ctx.workspace.keep("y", x.shape)
        return y, self.apply(x, y, ctx)

    def backward(self, params: Params, grads: Grads, saved: Array, dy: Array, ctx: Context) -> Array:
        self.differentiate(saved, dy, ctx)
        return dy

    @abstractmethod
    def apply(self, x: Array, y: Array, ctx: Context) -> Array:
        """Compute y <- f(x), possibly in place; return what backward needs."""

    @abstractmethod
    def differentiate(self, saved: Array, dy: Array, ctx: Context) -> None:
        """Compute dy <- dy * f'(x), from what `apply` returned."""

    @property
    def operations(self) -> float:
        return self.cost * prod(self.outputs.shape)


@register_layer(specs.Relu)
class ReluLayer(Activation):
    """ReLU computes max(x, 0)."""

    cost = 2.0

    def apply(self, x: Array, y: Array, ctx: Context) -> Array:
        ctx.ops.relu(x, y)
        return y

    def differentiate(self, saved: Array, dy: Array, ctx: Context) -> None:
        ctx.ops.relu_grad(saved, dy)


@register_layer(specs.LeakyRelu)
class LeakyReluLayer(Activation):
    """Leaky ReLU computes x where it is positive, slope * x elsewhere. The slope is not negative, so the output has the
    input's sign."""

    def __init__(self, spec: specs.LeakyRelu, site: Site):
        super().__init__(spec, site)
        self.slope = spec.slope

    def apply(self, x: Array, y: Array, ctx: Context) -> Array:
        ctx.ops.leaky_relu(x, y, self.slope)
        return y

    def differentiate(self, saved: Array, dy: Array, ctx: Context) -> None:
        ctx.ops.leaky_relu_grad(saved, dy, self.slope)


@register_layer(specs.Sigmoid)
class SigmoidLayer(Activation):
    """The logistic function computes 1 / (1 + exp(-x))."""

    def apply(self, x: Array, y: Array, ctx: Context) -> Array:
        ctx.ops.sigmoid(x, y)
        return y

    def differentiate(self, saved: Array, dy: Array, ctx: Context) -> None:
        ctx.ops.sigmoid_grad(saved, dy)


@register_layer(specs.Tanh)
class TanhLayer(Activation):
    """The hyperbolic tangent computes tanh(x)."""

    def apply(self, x: Array, y: Array, ctx: Context) -> Array:
        ctx.ops.tanh(x, y)
        return y

    def differentiate(self, saved: Array, dy: Array, ctx: Context) -> None:
        ctx.ops.tanh_grad(saved, dy)


@register_layer(specs.Gelu)
class GeluLayer(Activation):
    """GELU computes x * Phi(x), Phi being the normal distribution function (1 + erf(x / sqrt 2)) / 2 (Hendrycks,
    Gimpel: arXiv:1606.08415).

    In training the derivative Phi(x) + x * phi(x) is kept instead of x.
    """

    reads_output = False
    cost = 60.0

    def apply(self, x: Array, y: Array, ctx: Context) -> Array:
        slope = ctx.workspace.keep("slope", x.shape) if ctx.training else None
        ctx.ops.gelu(x, y, slope)
        return y if slope is None else slope

    def differentiate(self, saved: Array, dy: Array, ctx: Context) -> None:
        ctx.ops.multiply(dy, saved, dy)
