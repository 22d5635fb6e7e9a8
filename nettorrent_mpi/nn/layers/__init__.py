"""The layers: stateless objects with explicit parameters, saved values and a workspace. `make` makes one."""

from nettorrent_mpi.nn.layers import activations, conv, linear
from nettorrent_mpi.nn.layers.registry import make

__all__ = ["activations", "conv", "linear", "make"]
