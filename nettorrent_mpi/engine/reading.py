"""What a rank reads of the mini-batches that follow each other: which rows are its own, their inputs and targets.

Micro-batches are numbered from the present mini-batch on, as in engine/pipeline.py.
"""

from __future__ import annotations

from typing import NamedTuple

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.feed import Batches, Feed
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.plan.blocks import Span, span


class Rows(NamedTuple):
    """The rows of a micro-batch: this rank's, as numbers in the mini-batch; how many there are in this replica; how
    many share batch statistics."""

    mine: Span
    whole: int
    sharing: int


class Reading:
    """Of one rank. In training the first stage's inputs may be gathered ahead of their forward (`load`)."""

    def __init__(self, wiring: Wiring):
        self._wiring = wiring
        self._known: dict[tuple[int, int], Rows] = {}
        self._loaded = (-1, -1)  # (step, piece of its mini-batch) of the micro-batch whose inputs are there already

    def begin(
        self, feed: Feed, batches: Batches, *, step: int, micro_batches: int, training: bool, alone: bool
    ) -> None:
        """From now on read these. `alone`: this replica has all rows, instead of its part of them."""
        self._feed, self._batches, self._step = feed, batches, step
        self._micro_batches, self._training, self._alone = micro_batches, training, alone
        self._chosen = -1

    def rows(self, m: int) -> Rows:
        """Of this micro-batch."""
        number, piece = divmod(m, self._micro_batches)
        size = self._batches.size(number)
        known = self._known.get((size, piece)) if self._training else None
        if known is None:
            known = self._rows(size, piece)
            if self._training:  # an evaluation is of as many micro-batches as there are rows for
                self._known[size, piece] = known
        return known

    def _rows(self, size: int, piece: int) -> Rows:
        place, topology, exact = self._wiring.place, self._wiring.topology, self._wiring.exact
        whole = span(size, self._micro_batches, piece)
        replica = Span(0, whole.size) if self._alone else span(whole.size, topology.replicas, place.replica)
        mine = span(replica.size, topology.stages[place.stage].rows, place.row)
        start = whole.start + replica.start + mine.start
        return Rows(Span(start, start + mine.size), replica.size, whole.size if exact else replica.size)

    def size(self, m: int) -> int:
        """Rows of the mini-batch over which the loss is averaged: all, or this replica's where it trains apart."""
        number = m // self._micro_batches
        if self._wiring.exact:
            return self._batches.size(number)
        pieces = range(number * self._micro_batches, (number + 1) * self._micro_batches)
        return max(sum(self.rows(m).whole for m in pieces), 1)

    def load(self, m: int) -> None:
        """Gather the inputs of a micro-batch that is still to come."""
        self._gather(m, self._wiring.ahead(self.rows(m).mine.size))
        self._loaded = self._name(m)

    def inputs(self, m: int, g: int) -> Array:
        """The inputs of micro-batch m, in the buffer of number g, where they are gathered or have arrived."""
        loaded = self._training and self._loaded == self._name(m)
        if loaded:
            self._wiring.take_ahead(g)
        x = self._wiring.x(g, self.rows(m).mine.size)
        if self._wiring.is_first and not loaded:
            self._gather(m, x)
        return x

    def targets(self, m: int) -> Array:
        """Valid until the next call of the same size."""
        self._choose(m // self._micro_batches)
        return self._feed.targets(self.rows(m).mine)

    def _gather(self, m: int, x: Array) -> None:
        self._choose(m // self._micro_batches)
        self._feed.inputs(self.rows(m).mine, x)

    def _choose(self, number: int) -> None:
        """Make a mini-batch the one that is read."""
        if number != self._chosen:
            self._batches.choose(number, self._feed)
            self._chosen = number

    def _name(self, m: int) -> tuple[int, int]:
        number, piece = divmod(m, self._micro_batches)
        return self._step + number, piece
