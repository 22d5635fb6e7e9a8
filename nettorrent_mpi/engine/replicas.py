"""What replicas that train apart have in common: their average, the best of them, taking another one's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.state import State
from nettorrent_mpi.engine.update import Exchange
from nettorrent_mpi.engine.wiring import Wiring

TAG = 79


class Replicas:
    """Moves weights between replicas that have come to rest. All ranks call every method, after the same step."""

    def __init__(self, wiring: Wiring, state: State, exchange: Exchange):
        self._column, self._state, self._exchange = wiring.peers, state, exchange
        self._index = wiring.place.replica
        self.count = 1 if wiring.exact else wiring.topology.replicas  # that have weights of their own

    @contextmanager
    def shown(self, best: int | None = None) -> Iterator[None]:
        """Inside, every replica has the average of all, or the weights of replica `best`; afterwards its own again.

        Takes memory for one copy of this rank's shards.
        """
        if self.count == 1:
            yield
            return
        self._exchange.settle()
        kept = [flat.params[flat.shard].copy() for flat in self._state.flats]
        self._all_take(best)
        yield
        self._state.meet()
        for flat, own in zip(self._state.flats, kept, strict=True):
            np.copyto(flat.params[flat.shard], own)
        self._share()

    def become(self, best: int | None = None) -> None:
        """Every replica takes the average of all, or replica `best`'s weights and optimizer state, and keeps it."""
        if self.count == 1:
            return
        self._exchange.settle()
        if best is not None:
            for array in self._memories():
                self._column.broadcast(array, best)
        self._all_take(best)
        self._exchange.averaged()

    def adopt(self, takes: Sequence[int]) -> None:
        """Replica r takes the weights and optimizer state of replica takes[r], which keeps its own."""
        assert all(takes[source] == source for source in takes)
        self._exchange.settle()
        self._state.meet()
        for array in (*(flat.params[flat.shard] for flat in self._state.flats), *self._memories()):
            for to, source in enumerate(takes):
                if source == self._index != to:
                    self._column.send(array, to, TAG)
                if to == self._index != source:
                    self._column.receive(array, source, TAG)
        self._share()

    def _all_take(self, best: int | None) -> None:
        self._state.meet()
        if best is None:
            self._exchange.average(self._column)
        else:
            for flat in self._state.flats:
                self._column.broadcast(flat.params[flat.shard], best)
        self._share()

    def _share(self) -> None:
        for flat in self._state.flats:
            flat.share()

    def _memories(self) -> list[Array]:
        """The optimizer's state of this rank's shards."""
        return [array for segment in self._state.segments for array in segment.optimizer.values()]
