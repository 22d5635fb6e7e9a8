"""Random arrays are drawn whole on the host: a function of (seed, purpose, numbers), never of a rank."""

from __future__ import annotations

import math

import numpy as np

from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.plan import seeds
from nettorrent_mpi.plan.blocks import Span


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


def place_codes(shape: Shape, part: Span) -> Array:
    """Return a hash (uint32) of the index of each feature in a row of `shape`, whose last axis is held in `part`."""
    places = math.prod(shape[:-1])
    index = np.arange(places)[:, None] * shape[-1] + np.arange(*part)
    assert places * shape[-1] < 1 << 32, f"rows of {shape} are too long"
    code = index.reshape(-1).astype(np.uint32)
    mix(code, np.empty_like(code), np.uint32(0))
    return code


def mix(x: Array, work: Array, key: Array | np.uint32) -> None:
    """Apply a bijection of 32 bits to x: C. Wellons' lowbias32 (2018), with a key added halfway."""
    np.right_shift(x, 16, out=work)
    np.bitwise_xor(x, work, out=x)
    np.multiply(x, np.uint32(0x7FEB352D), out=x)
    np.add(x, key, out=x)
    np.right_shift(x, 15, out=work)
    np.bitwise_xor(x, work, out=x)
    np.multiply(x, np.uint32(0x846CA68B), out=x)
    np.right_shift(x, 16, out=work)
    np.bitwise_xor(x, work, out=x)
