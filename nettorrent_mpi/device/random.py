"""Random arrays are drawn whole on the host: a function of (seed, purpose, numbers), never of a rank."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.plan import seeds


def generator(seed: int, purpose: str, *numbers: int | str) -> np.random.Generator:
    """Return a generator for one use of randomness, the same on every rank (see `plan.seeds.key`)."""
    return np.random.Generator(np.random.Philox(key=seeds.key(seed, purpose, *numbers)))


def constant(shape: Shape, value: float) -> Array:
    """Return an array (float64) whose elements are all `value`."""
    return np.full(shape, value)


def normal(shape: Shape, deviation: float, seed: int, purpose: str, *numbers: int | str) -> Array:
    """Draw normal random numbers (float64) of mean 0 and this standard deviation."""
    return generator(seed, purpose, *numbers).standard_normal(shape) * deviation


def uniform(shape: Shape, bound: float, seed: int, purpose: str, *numbers: int | str) -> Array:
    """Draw random numbers (float64) that are uniform from -bound to bound."""
    return generator(seed, purpose, *numbers).uniform(-bound, bound, shape)
