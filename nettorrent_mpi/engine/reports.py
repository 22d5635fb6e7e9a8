"""Reports: figures of all ranks, summed while everybody goes on.

A report is one nonblocking sum over all ranks. Whoever comes first starts its part and trains on; the sums are there
when the last one has come. So no rank waits for another one only because people want to read how far they are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from nettorrent_mpi.comm.mail import Pending
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.plan.scores import Scores, mean_scores

MOST = 128  # reports under way at once; then the oldest is waited for
SAMPLE = 4096  # parameters of a replica of which the consensus distance is measured
ROUNDING = 1e-14  # what is left, relative to the squares, where equal replicas' squares are taken from each other

FLAG, DIVERGED, SQUARES, HEAD = range(4)  # the places in a report; then come four figures of each replica

Tag = TypeVar("Tag")


class Report(NamedTuple, Generic[Tag]):
    """What the ranks said. `tag` is what this rank gave when it started the report."""

    tag: Tag
    flag: bool  # did any rank raise its flag?
    diverged: bool  # has any rank seen a value that is not finite?
    training: Scores  # of the rows trained on since the last report
    replicas: list[float]  # the training loss of each replica
    distance: float | None  # root mean square distance of the replicas from their mean, relative to it; None for one


class Reports(Generic[Tag]):
    """The reports of a run. All ranks start the same ones in the same order, each at its own time."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._group = engine.wiring.channel(engine.wiring.everyone)
        topology, place = engine.topology, engine.place
        self._replicas = topology.replicas
        self._apart = engine.exchange.count > 1
        places = topology.size // topology.replicas
        each = max(SAMPLE // places, 8) if self._apart else 0
        inside = engine.world.rank - topology.rank(place.replica, 0, 0, 0)
        self._shards = [bucket.params[bucket.shard] for bucket in engine.state.buckets]
        count = sum(shard.size for shard in self._shards)
        self._stride = max(1, count // each) if each else 1
        head = HEAD + 4 * self._replicas
        self._sample = slice(head + inside * each, head + (inside + 1) * each)
        self._values = np.zeros(head + places * each)
        self._head, self._each = head, each
        self._under_way: deque[tuple[Tag, Pending]] = deque()

    def start(self, tag: Tag, flag: bool, *, figures: bool = True) -> None:
        """Start a report; without `figures` it is about the flag only."""
        if len(self._under_way) == MOST:
            self._under_way[0][1].sums()
        values = self._values
        values[...] = 0
        values[FLAG], values[DIVERGED] = flag, self._engine.pipeline.diverged() is not None
        if figures:
            place = HEAD + 4 * self._engine.place.replica
            values[place : place + 4] = self._engine.metrics.take()
            if self._apart:
                self._add_sample(values)
        self._under_way.append((tag, Pending(self._group, values)))

    def _add_sample(self, values: np.ndarray) -> None:
        """Every stride-th parameter of this rank's, at a place that it shares with its peers; and their squares."""
        at = self._sample.start
        for shard in self._shards:
            part = shard[:: self._stride][: self._sample.stop - at]
            values[at : at + part.size] = part
            at += part.size
        own = values[self._sample]
        values[SQUARES] = np.dot(own, own)

    def ready(self, *, wait: bool = False, but: int = 0) -> Iterator[Report[Tag]]:
        """The reports that are complete, the oldest first; with `wait` all that were started but the last `but`. A
        report that is not taken is there the next time: no later one is waited for before it is taken."""
        while len(self._under_way) > (but if wait else 0) and (wait or self._under_way[0][1].done()):
            tag, pending = self._under_way.popleft()
            yield self._read(tag, pending.sums())

    def _read(self, tag: Tag, sums: np.ndarray) -> Report[Tag]:
        tallies = sums[HEAD : self._head].reshape(self._replicas, 4)
        distance = None
        if self._each:
            mean = sums[self._head :] / self._replicas
            norm = float(np.dot(mean, mean))
            spread = float(sums[SQUARES]) / self._replicas - norm
            distance = 0.0 if norm == 0 or spread <= ROUNDING * norm else math.sqrt(spread / norm)
        losses = [mean_scores(*tally).loss if tally[2] else math.nan for tally in tallies]
        flag, diverged = bool(sums[FLAG] > 0), bool(sums[DIVERGED] > 0)
        return Report(tag, flag, diverged, mean_scores(*tallies.sum(axis=0)), losses, distance)

    def close(self) -> None:
        """Give everything back. All ranks call, when no report is under way."""
        assert not self._under_way
