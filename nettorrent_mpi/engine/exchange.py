"""Exact exchange: after every step all ranks that hold the same block agree on the sum of their gradients.

Each holder sums its shard of the gradients, updates its shard of the parameters, and all give each other the result:
the bytes of one all-reduce, but the optimizer's work and state are divided among the holders. On one node the shards
are read and written where they lie, in shared memory; between nodes it is a reduce-scatter and an all-gather.
"""

from __future__ import annotations

import math

import numpy as np

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.engine.state import State
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

    def reduce(self) -> None:
        """Sum the gradients: each holder gets the sum of its shard, added up in the order of the holders."""
        for segment in self._state.segments:
            if segment.shared is not None:
                segment.meet()  # everyone's gradients are complete
                first, second, *others = (grads[segment.shard] for grads in segment.all_grads)
                np.add(first, second, out=segment.sums)
                for grads in others:
                    np.add(segment.sums, grads, out=segment.sums)
            elif segment.group.size > 1:
                segment.group.reduce_scatter(segment.grads, segment.sums, segment.counts)

    def norm(self) -> None:
        """The global norm over all stages, for clipping (all ranks take part): ||g|| over every parameter once."""
        assert self._clip_norm is not None
        self._squares[0] = sum(sum_of_squares(segment.sums) for segment in self._state.segments)
        self._world.sum(self._squares)
        self._scale = clip_scale(math.sqrt(self._squares[0]), self._clip_norm)

    def update(self, rate: float, step: int) -> None:
        """One optimizer step on this rank's shard, then everyone's shards for everyone. `step` counts from 1."""
        for segment in self._state.segments:
            part = segment.params[segment.shard]
            self._optimizer.update(part, segment.sums, segment.optimizer, rate, step, scale=self._scale)
            if segment.shared is not None:
                segment.meet()  # everyone's shard is updated, and nobody reads gradients any more
            elif segment.group.size > 1:
                segment.group.allgather(part, segment.params, segment.counts)
