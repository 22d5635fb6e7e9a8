"""Random numbers that are a function of (seed, purpose, step, global row, index), never of who computes them."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.plan import seeds


def generator(seed: int, purpose: str, *numbers: int | str) -> np.random.Generator:
    """A generator for one use of randomness, the same on every rank (see `plan.seeds.key`)."""
    return np.random.Generator(np.random.Philox(key=seeds.key(seed, purpose, *numbers)))
