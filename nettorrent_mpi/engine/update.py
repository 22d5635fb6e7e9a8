"""An Update ends a step: gradients are reduced over the holders of each block, and every holder updates its shard.

Gradients are reduce-scattered, each holder updates its shard of the parameters, and the shards are all-gathered: the
bytes of one all-reduce, while the optimizer's work and state are divided among the holders. On one node the shards are
read and written in place, in shared memory. Between nodes they travel around a ring (comm/ring.py): a bucket's
gradients leave as soon as the last backward pass has come through its layers, and travel while it goes through the
others; an updated bucket travels while the next one is updated.

The wiring knows the holders: with the exact exchange the rows of all replicas, otherwise those of one team. Then
`exchange` brings the replicas nearer to each other: what a rank does to the shard that it owns reaches the whole team,
so that the rows of a team stay bitwise alike.
"""

from __future__ import annotations

from nettorrent_mpi.device.device import Device
from nettorrent_mpi.engine.metrics import Metrics
from nettorrent_mpi.engine.replica_loss import ReplicaLoss
from nettorrent_mpi.engine.state import State
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.exchange.base import Exchange
from nettorrent_mpi.nn.optimizers import Optimizer


class Update:
    """An Update reduces gradients, updates this rank's shards, exchanges them with peers, and all-gathers them.

    The methods are the actions R, M, N, X, U, Y, G of a schedule (plan/actions.py), in this order; only `reduce`,
    `norm`, `before`, `after` and `gather` wait. Steps count from 1.
    """

    def __init__(
        self,
        wiring: Wiring,
        device: Device,
        state: State,
        optimizer: Optimizer,
        exchange: Exchange,
        metrics: Metrics,
        clip_norm: float | None,
    ):
        self._wiring, self._ops, self._state = wiring, device.ops, state
        self._optimizer, self._exchange, self._clip_norm = optimizer, exchange, clip_norm
        self.whole: int | None = 0  # the step whose end this rank has come to; None in the middle of an update
        self._step = 0  # the latest that was begun
        self._left = 0  # buckets whose gradients have left in this step
        self._metrics, self._keeps = metrics, device.kind == "cpu" and exchange.count == 1
        self._numbers = device.numbers(len(optimizer.numbers(0.0, 1)))
        self._scale = None if clip_norm is None else device.zeros((1,), "float64")
        self._squares = device.zeros((1,), "float64")
        self.loss = ReplicaLoss(wiring.channel(wiring.replica), metrics) if exchange.wants_loss else None

    @property
    def reads_loss(self) -> bool:
        """Whether the loss is read in every step, for the exchange."""
        return self.loss is not None

    def begin(self, rate: float, step: int) -> None:
        """Tell the device what is new in this step, before any of its actions."""
        if self._keeps:
            self._state.keep_statistics()
            self._metrics.keep()
        self._step = step  # last: who sees it in another thread finds what was kept
        self._numbers.set(self._optimizer.numbers(rate, step))

    @property
    def begun(self) -> bool:
        """Whether a step has begun after the last whole one."""
        return self.whole is None or self._step > self.whole

    def restore(self, step: int | None) -> None:
        """Note that the state is that after this step; None: that it is replaced at present."""
        self.whole, self._step = step, step or 0

    def complete(self, first: int) -> None:
        """Note that the last backward pass of the step has written the gradients of the stage's parameters from number
        `first` on, so that complete buckets may leave under the rest of it."""
        buckets = self._state.buckets
        while self._left < len(buckets) and buckets[self._left].first >= first:
            buckets[self._left].reducer.begin_reduce()
            self._left += 1

    def reduce(self) -> None:
        """Reduce-scatter the gradients: each holder gets the sum for its shards."""
        self.complete(0)
        self._left = 0
        self._state.reduce()

    def multiply(self, rows: int) -> None:
        """Compute this rank's shards of gradients whose operands the holders share, for a mini-batch of `rows`."""
        self._state.multiply(rows)

    def norm(self) -> None:
        """Compute the global gradient norm over all stages for clipping; every parameter counts once. All stages take
        part."""
        assert self._clip_norm is not None
        assert self._scale is not None
        self._ops.fill(self._squares, 0)
        for bucket in self._state.buckets:
            self._ops.sum_of_squares(bucket.reduced, self._squares)
        self._wiring.channels[self._wiring.replica].all_reduce(self._squares)
        self._ops.clip_scale(self._squares, self._clip_norm, self._scale)

    def before(self, step: int) -> None:
        """Merge into this rank's shards the messages of its peers."""
        self.whole = None
        if self.loss is not None:
            loss, weight = self.loss.take()  # in the step before
            if weight:
                self._exchange.tell_loss(loss / weight)
            self.loss.begin()
        self._exchange.before_update(step)

    def update(self) -> None:
        """Run the optimizer on this rank's shards. No rank reads the other shards of the parameters until `gather`."""
        self.whole = None
        buckets = self._state.buckets
        for bucket in buckets:
            bucket.reducer.expect_gather()
        for bucket in buckets:
            numbers, scale = self._numbers.array, self._scale
            self._optimizer.update(self._ops, bucket.weights, bucket.reduced, bucket.optimizer, numbers, scale)
            if not self._exchange.changes_after_update:
                bucket.round()
                bucket.reducer.begin_gather()  # under the next bucket's update

    def after(self, rate: float, step: int) -> None:
        """Exchange this rank's shards with its peers."""
        self._exchange.after_update(rate, step)

    def gather(self) -> None:
        """All-gather the shards."""
        self._state.gather(rounded=not self._exchange.changes_after_update)
        self.whole = self._step

    def close(self) -> None:
        """Wait for communication in flight. All ranks call, at rest."""
        if self.loss is not None:
            self.loss.take()
