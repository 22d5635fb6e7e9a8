"""Convolution of images (b, height, width, channels), as products of small matrices of windows with the weights."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.nn import specs
from nettorrent_mpi.nn.backend import Array, Workspace
from nettorrent_mpi.nn.layer import Features, Layer, Parameter, Params, Pass
from nettorrent_mpi.nn.layers.linear import add_bias_gradient
from nettorrent_mpi.nn.layers.memory import gradient, repeated, row_repeats, wide_rows
from nettorrent_mpi.nn.layers.registry import Site, makes
from nettorrent_mpi.nn.layers.windows import Windows, places
from nettorrent_mpi.plan.blocks import span


@makes(specs.Conv2d)
class Conv2d(Layer):
    """y[h, w, o] = sum over p, q, i of x[h * stride + p, w * stride + q, i] * weight[p, q, i, o] + bias[o].

    The filters o are divided over the cols; dx is partial when they are. `same` padding: see `windows.places`.
    The windows are made anew in backward: keeping them would take kernel height * width times the memory of x.
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
        self.windows = Windows(image, kernel, stride, (vertical[0], vertical[1]), (horizontal[0], horizontal[1]))
        # dx of stride 1 is itself a convolution: of dy, padded to all places that touch the image, with the kernel
        # turned round.
        self.adjoint: Windows | None = None
        if stride == (1, 1):
            self.adjoint = Windows(
                (high, wide, part.size),
                kernel,
                stride,
                (kernel[0] - 1 - vertical[0], kernel[0] - 1 - vertical[1]),
                (kernel[1] - 1 - horizontal[0], kernel[1] - 1 - horizontal[1]),
            )

    def forward(self, params: Params, x: Array, workspace: Workspace, step: Pass) -> tuple[Array, Array]:
        y = workspace.keep("y", (x.shape[0], *self.outputs.local))
        _, wide, filters = self.outputs.local
        if filters == 0:
            return y, x
        weight = params["weight"].reshape(-1, filters)
        repeats = row_repeats((wide, filters))
        bias = repeated(params["bias"], repeats, "bias", workspace) if self.bias else None
        for images, rows in self.windows.blocks(x.shape[0], x.itemsize):
            y_no = y[images, rows].reshape(-1, filters)
            np.matmul(self.windows.matrix(x, images, rows, workspace), weight, out=y_no)
            if bias is not None:
                y_nw = wide_rows(y_no, repeats)
                np.add(y_nw, bias, out=y_nw)
        return y, x

    def backward(
        self, params: Params, grads: Params, saved: Array, dy: Array, workspace: Workspace, step: Pass
    ) -> Array | None:
        if self.bias:
            add_bias_gradient(grads["bias"], dy, workspace, step)
        self._weight_gradient(grads["weight"], saved, dy, workspace, step.accumulate)
        if not self.needs_dx:
            return None
        dx = gradient(workspace, saved.shape, dy)
        if self.outputs.local[2] == 0:
            dx[...] = 0
        elif self.adjoint is not None:
            self._correlate_back(self.adjoint, params["weight"], dy, dx, workspace)
        else:
            self._scatter_back(params["weight"], dy, dx, workspace)
        return dx

    def _weight_gradient(self, dw: Array, x: Array, dy: Array, workspace: Workspace, accumulate: bool) -> None:
        filters = dw.shape[3]
        if not accumulate:
            dw[...] = 0
        if filters == 0:
            return
        dw_ko = dw.reshape(-1, filters)
        more = workspace.scratch("weight gradient", dw_ko.shape)
        for images, rows in self.windows.blocks(x.shape[0], x.itemsize):
            seen = self.windows.matrix(x, images, rows, workspace)
            np.matmul(seen.T, dy[images, rows].reshape(-1, filters), out=more)
            np.add(dw_ko, more, out=dw_ko)

    def _correlate_back(self, adjoint: Windows, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        """dx for stride 1."""
        channels = dx.shape[3]
        turned = workspace.scratch("turned weight", (*weight.shape[:2], weight.shape[3], channels))
        np.copyto(turned, weight[::-1, ::-1].transpose(0, 1, 3, 2))
        for images, rows in adjoint.blocks(dy.shape[0], dy.itemsize):
            seen = adjoint.matrix(dy, images, rows, workspace)
            np.matmul(seen, turned.reshape(-1, channels), out=dx[images, rows].reshape(-1, channels))

    def _scatter_back(self, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        """dx for larger strides: the gradient of the windows, added up where they came from, one tap at a time."""
        filters = weight.shape[3]
        weight_ko = weight.reshape(-1, filters)
        dx[...] = 0
        for images, rows in self.windows.blocks(dy.shape[0], dy.itemsize):
            dy_no = dy[images, rows].reshape(-1, filters)
            seen = workspace.scratch("windows", (dy_no.shape[0], weight_ko.shape[0]))
            np.matmul(dy_no, weight_ko.T, out=seen)
            taps = seen.reshape(-1, rows.stop - rows.start, dy.shape[2], *weight.shape[:3])
            for p in range(weight.shape[0]):
                down, here_down = self._reach(0, p, rows)
                for q in range(weight.shape[1]):
                    across, here_across = self._reach(1, q, slice(0, dy.shape[2]))
                    target = dx[images, down, across]
                    np.add(target, taps[:, here_down, here_across, p, q], out=target)

    def _reach(self, axis: int, tap: int, places: slice) -> tuple[slice, slice]:
        """(pixels, places) along an axis: which pixels inside the image a tap of the kernel touches from which places.

        The places are counted from the block's first.
        """
        stride, size = self.windows.stride[axis], self.windows.image[axis]
        before = (self.windows.vertical, self.windows.horizontal)[axis][0]
        first = max(places.start, -((tap - before) // stride))  # the least with place * stride + tap - before >= 0
        last = max(first, min(places.stop, (size - 1 - tap + before) // stride + 1))
        pixel = first * stride + tap - before
        return slice(pixel, pixel + (last - first) * stride, stride), slice(first - places.start, last - places.start)

    @property
    def operations(self) -> float:
        high, wide, filters = self.outputs.shape
        return 6.0 * self.windows.size * high * wide * filters
