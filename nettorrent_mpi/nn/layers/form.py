"""Layers that change the form of the features and compute nothing: flatten, and the change from divided to whole."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu.blocking import gradient
from nettorrent_mpi.nn.layer import Features, Layer, Params, Pass
from nettorrent_mpi.nn.layers.registry import Site, makes
from nettorrent_mpi.plan import specs


@makes(specs.Flatten)
class Flatten(Layer):
    """(b, height, width, channels) -> (b, height * width * channels): the same memory. Its input is whole."""

    passes_on = True

    def __init__(self, spec: specs.Flatten, site: Site):
        assert site.inputs.is_whole, f"{site.name} stands on divided features"
        size = int(np.prod(site.inputs.shape))
        super().__init__(site.name, site.inputs, Features.whole((size,)))

    def forward(self, params: Params, x: Array, workspace: Workspace, step: Pass) -> tuple[Array, None]:
        return workspace.reshaped(x, (x.shape[0], *self.outputs.shape)), None

    def backward(
        self, params: Params, grads: Params, saved: None, dy: Array, workspace: Workspace, step: Pass
    ) -> Array | None:
        return workspace.reshaped(dy, (dy.shape[0], *self.inputs.shape)) if self.needs_dx else None


class Gather(Layer):
    """y_b..C <- x_b..c of all cols: divided features become whole on every col.

    What stands behind either divides its work over the cols, so that each has only a partial dy (`partial`): backward
    then is a sum over the cols. Or every col does the same work there, as with the loss: backward takes its slice.
    """

    def __init__(self, name: str, inputs: Features, partial: bool):
        super().__init__(name, inputs, Features.whole(inputs.shape))
        self.partial = partial

    def forward(self, params: Params, x: Array, workspace: Workspace, step: Pass) -> tuple[Array, None]:
        y = workspace.keep("y", (x.shape[0], *self.outputs.shape))
        step.team.gather_cols(x, y, workspace)
        return y, None

    def backward(
        self, params: Params, grads: Params, saved: None, dy: Array, workspace: Workspace, step: Pass
    ) -> Array | None:
        if not self.needs_dx:
            return None
        dx = gradient(workspace, (dy.shape[0], *self.inputs.local), dy)
        if self.partial:
            step.team.scatter_cols(dy, dx, workspace)
        else:
            np.copyto(dx, dy[..., slice(*self.inputs.part)])
        return dx
