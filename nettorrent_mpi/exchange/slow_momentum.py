"""Slow momentum modifies exact averages: SlowMo (Wang, Tantia, Ballas, Rabbat 2020, arXiv 1910.00643, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device


class SlowMomentum:
    """SlowMo computes u <- beta u + (x0 - x) / rate;  x <- x0 - rate u, where x is the average and x0 the result of the
    last average.

    With beta = 0 it changes nothing. `momenta` (u) and `before` (x0) are the same on all replicas.
    """

    def __init__(self, beta: float, shards: Sequence[Array], device: Device):
        self._beta, self._shards, self._device = beta, shards, device
        self.momenta = [device.zeros(shard.shape, shard.dtype) for shard in shards]
        self.before = [device.empty(shard.shape, shard.dtype) for shard in shards]
        self.begin()

    def begin(self) -> None:
        """Measure the next average relative to the present values."""
        for before, shard in zip(self.before, self._shards, strict=True):
            self._device.ops.copy(before, shard)

    def apply(self, rate: float) -> None:
        """Change the averaged values. A rate of 0 has no direction: nothing is done."""
        if rate == 0:
            return
        ops = self._device.ops
        for u, before, shard in zip(self.momenta, self.before, self._shards, strict=True):
            ops.subtract(before, shard, shard)
            ops.divide(shard, rate)
            ops.scale(u, self._beta)
            ops.add(u, shard, u)
            ops.copy(shard, u)
            ops.scale(shard, -rate)
            ops.add(before, shard, shard)
