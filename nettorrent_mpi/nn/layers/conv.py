"""Convolution layers, for images (b, height, width, channels)."""

from __future__ import annotations

from math import prod

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.nn.layer import Context, Features, Grads, Parameter, Params
from nettorrent_mpi.nn.layers.linear import ProductLayer
from nettorrent_mpi.nn.layers.registry import Site, register_layer
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.blocks import span


@register_layer(specs.Conv2d)
class Conv2dLayer(ProductLayer):
    """A convolution: y[h, w, o] = sum over p, q, i of x[h * stride + p, w * stride + q, i] * weight[p, q, i, o] +
    bias[o].

    The filters o are divided over the cols; dx is partial when they are. `same` padding: see device.geometry.places.
    """

    takes_relu = splits = True

    def __init__(self, spec: specs.Conv2d, site: Site):
        image = site.image("conv2d")
        assert site.inputs.is_whole, f"{site.name} stands on divided features"
        kernel, stride = specs.pair(spec.kernel), specs.pair(spec.stride)
        site.positive("filters", spec.filters)
        site.positive("kernel", *kernel)
        site.positive("stride", *stride)
        if spec.padding == "valid":
            site.fits("kernel", kernel, image)
        filters, part = spec.filters, span(spec.filters, site.cols, site.col)
        area = kernel[0] * kernel[1]
        weight = Parameter(
            "weight",
            (*kernel, image[2], filters),
            site.initial(spec.initial),
            axis=3,
            part=part,
            fans=(area * image[2], area * filters),
            filters=True,
        )
        bias = (Parameter("bias", (filters,), axis=0, part=part),) if spec.bias else ()
        self.bias = spec.bias
        self.geometry = Geometry.of(image, part.size, kernel, stride, spec.padding)
        outputs = Features.divided((*self.geometry.output[:2], filters), site.cols, site.col)
        super().__init__(site.name, site.inputs, outputs, (weight, *bias))

    def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, tuple[Array, Array]]:
        y = ctx.workspace.keep("y", (x.shape[0], *self.outputs.local))
        ctx.ops.convolve(x, params["weight"], params["bias"] if self.bias else None, y, self.geometry, ctx.relu)
        return y, (x, y)

    def backward_weights(self, grads: Grads, saved: tuple[Array, Array], held: Array, ctx: Context) -> None:
        ctx.ops.convolve_grad_w(saved[0], held, grads["weight"], self.geometry, ctx.accumulate)

    def gradient_x(self, params: Params, x: Array, dy: Array, ctx: Context) -> Array:
        dx = ctx.workspace.gradient(x.shape, dy)
        ctx.ops.convolve_grad_x(params["weight"], dy, dx, self.geometry)
        return dx

    @property
    def operations(self) -> float:
        high, wide, filters = self.outputs.shape
        return 6.0 * prod(self.parameters[0].shape[:3]) * high * wide * filters
