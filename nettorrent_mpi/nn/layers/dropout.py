"""Dropout whose choice does not depend on who holds which rows and features."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu import passes
from nettorrent_mpi.device.cpu.blocking import blocks
from nettorrent_mpi.device.cpu.loop import compiled
from nettorrent_mpi.nn.layer import Layer, Params, Pass
from nettorrent_mpi.nn.layers.registry import Site, makes
from nettorrent_mpi.nn.random import keep_mask, place_codes
from nettorrent_mpi.plan import seeds, specs
from nettorrent_mpi.plan.errors import ConfigError


@makes(specs.Dropout)
class Dropout(Layer):
    """In training each number is 0 with probability `rate` and otherwise divided by 1 - rate; else the input itself."""

    elementwise = True
    passes_on = True

    def __init__(self, spec: specs.Dropout, site: Site):
        if not 0 <= spec.rate < 1:
            raise ConfigError(f"layer {site.name}: rate is {spec.rate}, but has to be at least 0 and less than 1")
        super().__init__(site.name, site.inputs, site.inputs)
        self.rate = spec.rate
        self._codes = place_codes(site.inputs)

    def forward(self, params: Params, x: Array, workspace: Workspace, step: Pass) -> tuple[Array, Array | None]:
        if not step.training or self.rate == 0:
            return x, None
        assert step.rows.size == x.shape[0]
        keep = workspace.keep("keep", (x.shape[0], self._codes.size), np.bool_)
        key = seeds.key(step.seed, "dropout", self.name, step.step)
        keep_mask(keep, self._codes, self.rate, key, step.rows, workspace)
        y = x
        if not self.in_place:
            y = workspace.keep("y", x.shape)
            np.copyto(y, x)
        self._thin(y.reshape(-1), keep.reshape(-1))
        return y, keep

    def backward(
        self, params: Params, grads: Params, saved: Array | None, dy: Array, workspace: Workspace, step: Pass
    ) -> Array | None:
        if not self.needs_dx:
            return None
        if saved is not None:
            self._thin(dy.reshape(-1), saved.reshape(-1))
        return dy

    def _thin(self, y: Array, keep: Array) -> None:
        scale = 1 / (1 - self.rate)
        if compiled():
            passes.thin(y, keep, y.dtype.type(scale))
            return
        for block in blocks(y.size):
            np.multiply(y[block], keep[block], out=y[block])
            np.multiply(y[block], scale, out=y[block])

    @property
    def operations(self) -> float:
        return 20.0 * float(np.prod(self.outputs.shape))
