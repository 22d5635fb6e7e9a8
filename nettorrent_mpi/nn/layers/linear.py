"""Fully connected layers: one matrix product each way."""

from __future__ import annotations

from math import prod

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu.blocking import gradient, sum_rows
from nettorrent_mpi.device.cpu.product import Product
from nettorrent_mpi.nn.layer import Features, Layer, Parameter, Params, Pass
from nettorrent_mpi.nn.layers.registry import Site, makes
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.errors import ShapeError


@makes(specs.Linear)
class Linear(Layer):
    """y_bo = x_bI @ weight_Io + bias_o, the neurons o divided over the cols. dx_bI is partial when they are."""

    multiplies = True

    def __init__(self, spec: specs.Linear, site: Site):
        if len(site.inputs.shape) != 1:
            raise ShapeError(
                f"layer {site.name}: linear wants flat rows, but {site.previous} gives {site.inputs.shape} a row; "
                f"put `flatten` between {site.previous} and {site.name}"
            )
        assert site.inputs.is_whole, f"{site.name} stands on divided features"
        site.positive("units", spec.units)
        ins, outs = site.inputs.shape[0], spec.units
        part = span(outs, site.cols, site.col)
        weight = Parameter("weight", (ins, outs), site.initial(spec.initial), axis=1, part=part, fans=(ins, outs))
        bias = (Parameter("bias", (outs,), axis=0, part=part),) if spec.bias else ()
        super().__init__(site.name, site.inputs, Features.divided((outs,), site.cols, site.col), (weight, *bias))
        self.bias = spec.bias
        self._y, self._dw, self._dx = Product(), Product(turn_a=True), Product(turn_b=True)

    def forward(self, params: Params, x: Array, workspace: Workspace, step: Pass) -> tuple[Array, Array]:
        y = workspace.keep("y", (x.shape[0], *self.outputs.local))
        self._y(x, params["weight"], y, workspace)
        if self.bias:
            y += params["bias"]
        return y, x

    def backward(
        self, params: Params, grads: Params, saved: Array, dy: Array, workspace: Workspace, step: Pass
    ) -> Array | None:
        if self.operands is not None:
            self.operands.put(saved, dy, step.rows)
        else:
            self._dw(saved, dy, grads["weight"], workspace, step.accumulate)
        if self.bias:
            add_bias_gradient(grads["bias"], dy, workspace, step)
        if not self.needs_dx:
            return None
        dx = gradient(workspace, saved.shape, dy)
        self._dx(dy, params["weight"], dx, workspace)
        return dx

    @property
    def operations(self) -> float:
        return 6.0 * prod(self.parameters[0].shape)


def add_bias_gradient(db_o: Array, dy_bo: Array, workspace: Workspace, step: Pass) -> None:
    """db_o <- (or +=, when step.accumulate) the sum of dy_bo over all but its last axis."""
    if step.accumulate:
        more = workspace.scratch("bias gradient", db_o.shape)
        sum_rows(dy_bo, more, workspace)
        np.add(db_o, more, out=db_o)
    else:
        sum_rows(dy_bo, db_o, workspace)
