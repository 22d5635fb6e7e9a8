"""The end of a step: gradients are summed over all who hold the same block, and every holder updates its part.

Each holder sums its shard of the gradients, updates its shard of the parameters, and all give each other the result:
the bytes of one all-reduce, but the optimizer's work and state are divided among the holders. On one node the shards
are read and written where they lie, in shared memory. Between nodes they travel around a ring (comm/ring.py): the sums
of a segment leave when the last backward has come through its layers, and are on their way while it goes through the
others; and a segment that is updated is on its way to all while the next one is summed and updated.

Who holds the same block is the wiring's matter: with the exact exchange the rows of all replicas, otherwise those of
one team. `Exchange.agree` is where replicas that differ come nearer to each other: what a rank does there to the shard
that it owns reaches the whole team, so that the rows of a team stay bitwise alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.engine.state import State
from nettorrent_mpi.nn.optimizers import Optimizer, clip_scale, sum_of_squares


class Exchange:
    """Sums gradients and updates every holder alike; replicas that hold their own blocks train apart."""

    # What lets messages move while this rank computes: called between actions and between layers.
    progress: Callable[[], None] | None = None
    # Does `agree` change shards?
    agrees: ClassVar[bool] = False

    def __init__(self, everyone: Group, state: State, optimizer: Optimizer, clip_norm: float | None):
        """`everyone`: the ranks that hold the whole network once, and its gradients: all, or those of a replica."""
        self._everyone, self._state, self._optimizer = everyone, state, optimizer
        self._clip_norm = clip_norm
        self._begun = 0  # segments whose sums were begun in this step
        if state.rings:
            self.progress = state.rings.progress
        self._scale = 1.0
        self._squares = np.zeros(1)
        self._workspace = Workspace(state.dtype)
        self._withhold = 0.0  # a part of each change is added to these arrays, where there are, and not made yet
        self._withheld: list[Array | None] = [None] * len(state.segments)

    def complete(self, first: int) -> None:
        """In the step's last backward: the gradients of the stage's parameters from number `first` on are written, and
        what of them travels in messages may leave, under the rest of the backward."""
        segments = self._state.segments
        while self._begun < len(segments) and segments[self._begun].first >= first:
            segments[self._begun].begin_sums()
            self._begun += 1

    def reduce(self, rows: int) -> None:
        """Sum the gradients of a mini-batch of `rows` rows: each holder gets the sum of its shard. Sums that travel are
        waited for where they are needed."""
        self.complete(0)
        self._begun = 0
        for segment in self._state.segments:
            segment.sum(rows, self._workspace)

    def norm(self) -> None:
        """The global norm over all stages, for clipping (all of them take part): ||g|| over every parameter once."""
        assert self._clip_norm is not None
        for segment in self._state.segments:
            segment.finish_sums()
        self._squares[0] = sum(sum_of_squares(segment.sums) for segment in self._state.segments)
        self._everyone.sum(self._squares)
        self._scale = clip_scale(math.sqrt(self._squares[0]), self._clip_norm)

    def update(self, rate: float, step: int) -> None:
        """One optimizer step on this rank's shard, then everyone's shards for everyone. `step` counts from 1."""
        self.hear(step)
        segments = self._state.segments
        for segment in segments:
            segment.expect()
        for segment, withheld in zip(segments, self._withheld, strict=True):
            segment.finish_sums()
            part = segment.params[segment.shard]
            self._optimizer.update(
                part,
                segment.sums,
                segment.optimizer,
                rate,
                step,
                scale=self._scale,
                withheld=withheld,
                withhold=self._withhold,
            )
            if not self.agrees:
                segment.begin_share()  # under the next segment's sums and update
        self.agree(rate, step)
        for segment in segments:
            segment.share()  # everyone's shard is updated, and nobody reads gradients any more

    def hear(self, step: int) -> None:
        """Before the optimizer's step: merge what other replicas have sent into this rank's shards."""

    def agree(self, rate: float, step: int) -> None:
        """After it: come nearer to the other replicas, change this rank's shards."""

    def settle(self) -> None:
        """Wait until nothing is under way between replicas. All ranks call, after the same step."""

    def average(self, column: Group) -> None:
        """This rank's shards <- their mean over all replicas. Every member of `column` calls, settled."""
        for flat in self._state.flats:
            column.mean(flat.params[flat.shard])

    def averaged(self) -> None:
        """The replicas are the same from now on, with the present parameters."""

    def memories(self) -> dict[str, list[Array]]:
        """What a checkpoint has to hold besides parameters and optimizer state: for each name this rank's shards, which
        a restored run writes. Settled."""
        return {}

    def recall(self, step: int) -> None:
        """The run goes on after so many steps; this replica's parameters and `memories` were restored, or all replicas
        are the same (`averaged`)."""

    def close(self) -> None:
        """Give everything back to MPI. All ranks call, settled."""
