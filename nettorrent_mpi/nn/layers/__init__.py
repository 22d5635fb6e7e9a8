"""Layers are stateless objects with explicit parameters, saved values and a context. `make` constructs one."""

# Imported so that they register their layers.
from nettorrent_mpi.nn.layers import activations, conv, dropout, form, linear, norm, pooling, residual  # noqa: F401
