"""Layers are stateless objects with explicit parameters, saved values and a context. `make` constructs one."""

from nettorrent_mpi.nn.layers import activations, conv, dropout, form, linear, norm, pooling, residual
from nettorrent_mpi.nn.layers.form import Gather
from nettorrent_mpi.nn.layers.registry import make, register_layer
from nettorrent_mpi.nn.layers.sequence import Sequence

__all__ = [
    "Gather",
    "Sequence",
    "activations",
    "conv",
    "dropout",
    "form",
    "linear",
    "make",
    "norm",
    "pooling",
    "register_layer",
    "residual",
]
