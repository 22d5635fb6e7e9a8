"""The end of a step: gradients are summed over all who hold the same block, and every holder updates its part.

Each holder sums its shard of the gradients, updates its shard of the parameters, and all give each other the result:
the bytes of one all-reduce, but the optimizer's work and state are divided among the holders. On one node the shards
are read and written where they lie, in shared memory. Between nodes they travel around a ring (comm/ring.py): the sums
of a segment leave when the last backward has come through its layers, and are on their way while it goes through the
others; and a segment that is updated is on its way to all while the next one is summed and updated.

Who holds the same block is the wiring's matter: with the exact exchange the rows of all replicas, otherwise those of
one team. Replicas that differ come nearer to each other before and after the optimizer's update (exchange/): what a
rank does there to the shard that it owns reaches the whole team, so that the rows of a team stay bitwise alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.mail import Pending
from nettorrent_mpi.device.ops import Ops
from nettorrent_mpi.engine.state import State
from nettorrent_mpi.engine.tally import Tally
from nettorrent_mpi.exchange.base import Exchange
from nettorrent_mpi.nn.optimizers import Optimizer, clip_scale


class Update:
    """Sums gradients and updates every holder alike; `exchange` is what replicas that differ do before and after."""

    def __init__(
        self,
        everyone: Group,
        state: State,
        optimizer: Optimizer,
        clip_norm: float | None,
        exchange: Exchange,
        tally: Tally,
        ops: Ops,
    ):
        """`everyone`: the ranks that hold the whole network once, and its gradients: all, or those of a replica."""
        self._everyone, self._state, self._optimizer = everyone, state, optimizer
        self._clip_norm, self._exchange, self._tally = clip_norm, exchange, tally
        self._losses = everyone.duplicate() if exchange.wants_loss else None
        self._pending: Pending | None = None
        self._begun = 0  # segments whose sums were begun in this step
        self._scale = 1.0
        self._squares = np.zeros(1)
        self._ops = ops

    @property
    def progress(self) -> list[Callable[[], None]]:
        """What lets messages move while this rank computes: to be called between actions and between layers."""
        rings, exchange = self._state.rings, self._exchange.progress
        return [*([rings.progress] if rings else []), *([exchange] if exchange else [])]

    def complete(self, first: int) -> None:
        """In the step's last backward: the gradients of the stage's parameters from number `first` on are written, and
        what of them travels in messages may leave, under the rest of the backward."""
        segments = self._state.segments
        while self._begun < len(segments) and segments[self._begun].first >= first:
            segments[self._begun].begin_sums()
            self._begun += 1

    def reduce(self) -> None:
        """Reduce the gradients: waits until this rank has its shards of their sums, or, where they are computed in
        parts, until everybody has put what they are computed from."""
        self.complete(0)
        self._begun = 0
        for segment in self._state.segments:
            segment.sum()
        for segment in self._state.segments:
            segment.finish_sums()

    def multiply(self, rows: int) -> None:
        """Compute this rank's shards of the gradients of a mini-batch of `rows` rows that are computed in parts."""
        for segment in self._state.segments:
            segment.multiply(rows, self._ops)

    def norm(self) -> None:
        """The global norm over all stages, for clipping (all of them take part): ||g|| over every parameter once."""
        assert self._clip_norm is not None
        self._squares[0] = sum(self._ops.sum_of_squares(segment.sums) for segment in self._state.segments)
        self._everyone.sum(self._squares)
        self._scale = clip_scale(math.sqrt(self._squares[0]), self._clip_norm)

    def before(self, step: int) -> None:
        """Take in what other replicas have sent. Steps count from 1, here and below."""
        if self._losses is not None:
            self._tell_loss(self._losses)
        self._exchange.before_update(step)

    def _tell_loss(self, group: Group) -> None:
        """The loss of this replica's rows in the step before. Only its last stage knows it, so it is summed up."""
        if self._pending is not None:
            loss, rows = self._pending.sums()
            if rows:
                self._exchange.tell_loss(float(loss / rows))
        self._pending = Pending(group, self._tally.recent)
        self._tally.recent = (0.0, 0.0)

    def update(self, rate: float, step: int) -> None:
        """One optimizer step on this rank's shards, which then may leave for the other holders. Does not wait."""
        segments = self._state.segments
        for segment in segments:
            segment.expect()
        for segment in segments:
            part = segment.params[segment.shard]
            self._optimizer.update(self._ops, part, segment.sums, segment.optimizer, rate, step, self._scale)
            if not self._exchange.changes_after_update:
                segment.begin_share()  # under the next segment's update

    def after(self, rate: float, step: int) -> None:
        """Come nearer to other replicas."""
        self._exchange.after_update(rate, step)

    def gather(self) -> None:
        """All-gather the shards, which all holders have updated; nobody reads gradients any more."""
        for segment in self._state.segments:
            segment.share()

    def close(self) -> None:
        """Free what belongs to MPI. All ranks of `everyone` call."""
        if self._pending is not None:
            self._pending.sums()
        if self._losses is not None:
            self._losses.comm.Free()
