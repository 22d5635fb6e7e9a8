"""Convolution of images (b, height, width, channels), as products of small matrices of windows with the weights."""

from __future__ import annotations

from math import prod

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu.blocking import gradient
from nettorrent_mpi.device.cpu.convolution import Convolution
from nettorrent_mpi.device.cpu.way import Geometry
from nettorrent_mpi.device.cpu.windows import places
from nettorrent_mpi.nn.layer import Features, Layer, Parameter, Params, Pass
from nettorrent_mpi.nn.layers.linear import add_bias_gradient
from nettorrent_mpi.nn.layers.registry import Site, makes
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.blocks import span


@makes(specs.Conv2d)
class Conv2d(Layer):
    """y[h, w, o] = sum over p, q, i of x[h * stride + p, w * stride + q, i] * weight[p, q, i, o] + bias[o].

    The filters o are divided over the cols; dx is partial when they are. `same` padding: see `windows.places`.
    """

    def __init__(self, spec: specs.Conv2d, site: Site):
        image = site.image("conv2d")
        assert site.inputs.is_whole, f"{site.name} stands on divided features"
        kernel, stride = specs.pair(spec.kernel), specs.pair(spec.stride)
        site.positive("filters", spec.filters)
        site.positive("kernel", *kernel)
        site.positive("stride", *stride)
        if spec.padding == "valid":
            site.fits("kernel", kernel, image)
        high, *vertical = places(image[0], kernel[0], stride[0], spec.padding)
        wide, *horizontal = places(image[1], kernel[1], stride[1], spec.padding)
        filters, part = spec.filters, span(spec.filters, site.cols, site.col)
        area = kernel[0] * kernel[1]
        weight = Parameter(
            "weight",
            (*kernel, image[2], filters),
            site.initial(spec.initial),
            axis=3,
            part=part,
            fans=(area * image[2], area * filters),
        )
        bias = (Parameter("bias", (filters,), axis=0, part=part),) if spec.bias else ()
        outputs = Features.divided((high, wide, filters), site.cols, site.col)
        super().__init__(site.name, site.inputs, outputs, (weight, *bias))
        self.bias = spec.bias
        geometry = Geometry(
            image, (high, wide, part.size), kernel, stride, (vertical[0], vertical[1]), (horizontal[0], horizontal[1])
        )
        self._convolution = Convolution(geometry)

    def forward(self, params: Params, x: Array, workspace: Workspace, step: Pass) -> tuple[Array, Array]:
        y = workspace.keep("y", (x.shape[0], *self.outputs.local))
        self._convolution.forward(x, params["weight"], params["bias"] if self.bias else None, y, workspace)
        return y, x

    def backward(
        self, params: Params, grads: Params, saved: Array, dy: Array, workspace: Workspace, step: Pass
    ) -> Array | None:
        if self.bias:
            add_bias_gradient(grads["bias"], dy, workspace, step)
        self._convolution.weight_gradient(saved, dy, grads["weight"], step.accumulate, workspace)
        if not self.needs_dx:
            return None
        dx = gradient(workspace, saved.shape, dy)
        self._convolution.input_gradient(params["weight"], dy, dx, workspace)
        return dx

    @property
    def operations(self) -> float:
        high, wide, filters = self.outputs.shape
        return 6.0 * prod(self.parameters[0].shape[:3]) * high * wide * filters
