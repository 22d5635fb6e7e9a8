"""Slow momentum at exact averages: SlowMo (Wang, Tantia, Ballas, Rabbat 2020, arXiv 1910.00643, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nettorrent_mpi.device.arrays import Array


class SlowMomentum:
    """u <- beta u + (x0 - x) / rate;  x <- x0 - rate u: x is the average, x0 what the last average led to.

    With beta = 0 it changes nothing. `momenta` (u) and `before` (x0) are the same on all replicas.
    """

    def __init__(self, beta: float, shards: Sequence[Array]):
        self._beta, self._shards = beta, shards
        self.momenta = [np.zeros_like(shard) for shard in shards]
        self.before = [shard.copy() for shard in shards]

    def begin(self) -> None:
        """The present values are those that the next average is measured against."""
        for before, shard in zip(self.before, self._shards, strict=True):
            np.copyto(before, shard)

    def apply(self, rate: float) -> None:
        """Change the averaged values. A rate of 0 has no direction: nothing is done."""
        if rate == 0:
            return
        for u, before, shard in zip(self.momenta, self.before, self._shards, strict=True):
            np.subtract(before, shard, out=shard)
            np.divide(shard, rate, out=shard)
            np.multiply(u, self._beta, out=u)
            np.add(u, shard, out=u)
            np.multiply(u, -rate, out=shard)
            np.add(before, shard, out=shard)
