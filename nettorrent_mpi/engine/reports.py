"""Reports sum the figures of all ranks while training continues.

A report is one nonblocking all-reduce over all ranks. Each rank starts its part when it gets there and trains on; the
sums are complete once the last rank has started. So no rank waits for another one only to report progress.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from nettorrent_mpi.comm.failures import lost
from nettorrent_mpi.comm.mail import Pending
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.metrics import EXTRA, ROWS, SUMS
from nettorrent_mpi.engine.rank_seconds import PARTS
from nettorrent_mpi.plan.errors import LostRanksError
from nettorrent_mpi.plan.scores import Scores, mean_scores

MOST = 128  # reports in flight at once; beyond that the oldest is waited for
SAMPLE = 4096  # parameters of a replica that are sampled for the consensus distance
ROUNDING = 1e-14  # relative rounding error of the difference where all replicas are equal

# Positions in a report; the sums of each replica follow, three of each rank, and the sample.
REST, STOP, LEFT, DIVERGED, SQUARES, HEAD = range(6)

Tag = TypeVar("Tag")
T = TypeVar("T")


class Report(NamedTuple, Generic[Tag]):
    """A Report holds the figures of all ranks. `tag` is what this rank passed when it started the report."""

    tag: Tag
    rest: bool  # whether any rank asks all to come to rest
    stop: bool  # whether any rank asks to stop
    left: bool  # whether any rank takes no more records
    diverged: bool  # whether any rank has seen a non-finite value
    training: Scores  # scores on the rows trained on since the last report
    replicas: list[float]  # the training loss of each replica
    seconds: np.ndarray  # (ranks, 3): of compute, communication and waiting (rank_seconds.py) since the last report
    distance: float | None  # root mean square distance of the replicas from their mean, relative to it; None for one


class Reports(Generic[Tag]):
    """Reports are those of one run. All ranks start the same ones in the same order, each at its own time."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._group = engine.wiring.channel(engine.wiring.everyone)
        topology, place = engine.topology, engine.place
        self._replicas = topology.replicas
        self._apart = engine.exchange.count > 1
        places = topology.size // topology.replicas
        each = max(SAMPLE // places, 8) if self._apart else 0
        inside = engine.world.rank - topology.rank(place.replica, 0, 0, 0)
        self._shards = [bucket.weights for bucket in engine.state.buckets]
        count = sum(shard.size for shard in self._shards)
        self._stride = max(1, count // each) if each else 1
        head = HEAD + SUMS * self._replicas
        self._metrics, self._seconds = slice(HEAD, head), slice(head, head + len(PARTS) * topology.size)
        head = self._seconds.stop
        self._sample = slice(head + inside * each, head + (inside + 1) * each)
        self._values = np.zeros(head + places * each)
        self._own_seconds = self._values[self._seconds].reshape(-1, len(PARTS))[engine.world.rank]
        self._head, self._each = head, each
        self._picked = engine.device.zeros((each,), "float64")  # the sample, on the device
        self._training = Scores(math.nan, None)  # of the latest report that had any
        self.broken = False  # ranks are lost: no report arrives any more
        self._under_way: deque[tuple[Tag, Pending]] = deque()

    def start(
        self, tag: Tag, *, rest: bool = False, stop: bool = False, left: bool = False, figures: bool = True
    ) -> None:
        """Start a report; without `figures` it carries only this rank's requests."""
        if self.broken:
            return
        if len(self._under_way) == MOST and self._attempt(self._under_way[0][1].sums) is None:
            return
        values = self._values
        values[...] = 0
        values[REST], values[STOP], values[LEFT] = rest, stop, left
        if figures:
            place = HEAD + SUMS * self._engine.place.replica
            wait = self._engine.may_wait
            values[place : place + SUMS] = self._engine.metrics.take(wait=wait)
            self._own_seconds[:] = self._engine.pipeline.spent.take()
            if self._apart and wait:
                self._add_sample(values)
            elif self._apart:
                values[SQUARES] = math.nan
        values[DIVERGED] = self._engine.pipeline.divergence.known
        pending = self._attempt(lambda: Pending(self._group, values))
        if pending is not None:
            self._under_way.append((tag, pending))

    def _attempt(self, act: Callable[[], T]) -> T | None:
        """Return what is done. Where replicas differ, and ranks are lost, that is only noted: the ranks of this replica
        have to end their step."""
        try:
            return act()
        except Exception as error:
            if not (self._apart and lost(error, self._group)):
                raise
            self.broken = True
            return None

    def _add_sample(self, values: np.ndarray) -> None:
        """Add every stride-th parameter of this rank, at positions that its peers sample too, and their squares."""
        device, at = self._engine.device, 0
        for shard in self._shards:
            part = shard[:: self._stride][: self._each - at]
            device.ops.copy(self._picked[at : at + part.size], part)
            at += part.size
        own = values[self._sample]
        own[...] = device.on_host(self._picked)
        values[SQUARES] = np.dot(own, own)

    def ready(self, *, wait: bool = False, but: int = 0) -> Iterator[Report[Tag]]:
        """Yield the completed reports, oldest first; with `wait` all started ones but the last `but`.

        A report that is not taken is there the next time: no later one is waited for before it is taken.
        """
        while not self.broken and len(self._under_way) > (but if wait else 0):
            tag, pending = self._under_way[0]
            sums = self._attempt(pending.sums) if wait or self._attempt(pending.done) else None
            if sums is None:
                break
            self._under_way.popleft()
            yield self._read(tag, sums)
        if wait and self.broken:
            raise LostRanksError("ranks of other replicas are lost")

    def _read(self, tag: Tag, sums: np.ndarray) -> Report[Tag]:
        metrics = sums[self._metrics].reshape(self._replicas, SUMS)
        seconds = sums[self._seconds].reshape(-1, len(PARTS))
        distance = None
        if self._each and not math.isnan(sums[SQUARES]):
            mean = sums[self._head :] / self._replicas
            norm = float(np.dot(mean, mean))
            spread = float(sums[SQUARES]) / self._replicas - norm
            distance = 0.0 if norm == 0 or spread <= ROUNDING * norm else math.sqrt(spread / norm)
        losses = [mean_scores(*each).loss if each[ROWS] + each[EXTRA] else math.nan for each in metrics]
        rest, stop, left, diverged = (bool(sums[place] > 0) for place in (REST, STOP, LEFT, DIVERGED))
        total = metrics.sum(axis=0)
        self._training = mean_scores(*total) if total[ROWS] + total[EXTRA] else self._training
        return Report(tag, rest, stop, left, diverged, self._training, losses, seconds, distance)

    def abandon(self) -> None:
        """Give up the reports that are in flight, after the world was revoked."""
        for _, pending in self._under_way:
            pending.abandon()

    def close(self) -> None:
        """Free the communicator. All ranks call, when no report is in flight."""
        assert not self._under_way
