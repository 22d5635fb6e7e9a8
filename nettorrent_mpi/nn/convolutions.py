"""The convolutions of a network, for devices that prepare each one: a GPU's library plans them before it runs."""

from __future__ import annotations

from typing import NamedTuple

from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.nn.layers.conv import Conv2dLayer
from nettorrent_mpi.nn.layers.residual import ResidualLayer
from nettorrent_mpi.nn.layers.sequence import Sequence


class Convolution(NamedTuple):
    """One of the three passes of a convolution: "forward", "grad_x" or "grad_w"."""

    kind: str
    geometry: Geometry
    bias: bool  # whether a bias is added
    relu: bool = False  # and max(., 0) computed of that


def convolutions(layers: Sequence) -> set[Convolution]:
    """Return all that a training step of these layers computes, those inside residual blocks too."""
    found: set[Convolution] = set()
    for layer, relu in zip(layers.layers, layers.takes_relu, strict=True):
        if isinstance(layer, Conv2dLayer):
            found.add(Convolution("forward", layer.geometry, layer.bias or relu, relu))  # see gpu.epilogs
            found.add(Convolution("grad_w", layer.geometry, False))
            if layer.needs_dx:
                found.add(Convolution("grad_x", layer.geometry, False))
        elif isinstance(layer, ResidualLayer):
            for branch in (layer.body, layer.shortcut):
                branch.needs_dx = layer.needs_dx  # as in its backward
                found |= convolutions(branch)
    return found
