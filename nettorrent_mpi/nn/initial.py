"""Initial values are whole arrays, the same for every layout, of which each rank takes its block.

Sources of the variances: He et al. 2015 (arXiv:1502.01852), 2 / fan in; Glorot and Bengio 2010, 2 / (fan in + fan out);
LeCun et al. 1998 (Efficient BackProp), 1 / fan in. Gains as in PyTorch's kaiming_ (relu) and xavier_ (1). Uniform
values have the same variance as the normal ones, so they reach to sqrt(3) standard deviations.
"""

from __future__ import annotations

from math import sqrt

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.random import constant, normal, uniform
from nettorrent_mpi.nn.layer import Parameter


def initial_value(parameter: Parameter, seed: int, layer_name: str) -> Array:
    """Return the initial value of `parameter` of layer `layer_name`: the whole array (parameter.shape, float64)."""
    if parameter.initial in ("zeros", "ones"):
        return constant(parameter.shape, float(parameter.initial == "ones"))
    scheme, distribution = parameter.initial.rsplit("_", 1)
    fan_in, fan_out = parameter.fans
    variance = {"he": 2.0 / fan_in, "glorot": 2.0 / (fan_in + fan_out), "lecun": 1.0 / fan_in}[scheme]
    if distribution == "normal":
        return normal(parameter.shape, sqrt(variance), seed, "initial", layer_name, parameter.name)
    return uniform(parameter.shape, sqrt(3.0 * variance), seed, "initial", layer_name, parameter.name)
