"""Exact exchange: after every step all ranks that hold the same block agree on the sum of their gradients.

reduce-scatter, update of one's own shard, all-gather: the same bytes as one all-reduce, but the optimizer's work and
state are divided among the holders too.
"""

from __future__ import annotations

import math

import numpy as np

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.engine.state import State
from nettorrent_mpi.nn.backend import aligned
from nettorrent_mpi.nn.optimizers import Optimizer, clip_scale, sum_of_squares


class ExactExchange:
    """Sums gradients over the rows of a team and over the replicas, and updates every holder alike."""

    def __init__(self, world: World, state: State, optimizer: Optimizer, clip_norm: float | None):
        self._world = world
        self._state = state
        self._optimizer = optimizer
        self._clip_norm = clip_norm
        self._scale = 1.0
        self._squares = np.zeros(1)
        self._sums = [
            aligned(s.shard.size, state.dtype) if s.group.size > 1 else state.flat_grads[slice(*s.shard)]
            for s in state.segments
        ]

    def reduce(self) -> None:
        """Sum the gradients: each holder gets the sum of its shard."""
        for segment, sums in zip(self._state.segments, self._sums, strict=True):
            if segment.group.size > 1:
                segment.group.reduce_scatter(self._state.flat_grads[slice(*segment.stretch)], sums, segment.counts)

    def norm(self) -> None:
        """The global norm over all stages, for clipping (all ranks take part): ||g|| over every parameter once."""
        assert self._clip_norm is not None
        self._squares[0] = sum(sum_of_squares(sums) for sums in self._sums)
        self._world.sum(self._squares)
        self._scale = clip_scale(math.sqrt(self._squares[0]), self._clip_norm)

    def update(self, rate: float, step: int) -> None:
        """One optimizer step on this rank's shard, then everyone's shards for everyone. `step` counts from 1."""
        for segment, sums in zip(self._state.segments, self._sums, strict=True):
            part = self._state.flat[slice(*segment.shard)]
            self._optimizer.update(part, sums, segment.optimizer, rate, step, scale=self._scale)
            if segment.group.size > 1:
                segment.group.allgather(part, self._state.flat[slice(*segment.stretch)], segment.counts)
