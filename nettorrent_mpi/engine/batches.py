"""Batches give one rank its rows of a split, micro-batch by micro-batch.

A row's way from the data set to the first layer, and who holds what of it:

    Dataset    the training and the test split; opened, nothing read yet                                    every rank
    Sampler    the row numbers of step n's mini-batch, a function of (seed, n)                              every rank
    Batches    cuts the mini-batch into micro-batches, and finds this rank's rows of each                   every rank
    - inputs   the split's rows: `Inputs.batch` gathers, augments and scales them into the wiring's buffer  first stage
    - targets  the split's targets, whole in memory: labels never travel                                    last stage

Micro-batches are numbered from the present mini-batch on, as in engine/pipeline.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.data.rows import Allocate, Split
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.plan.blocks import Span, span


class RowsOfMicroBatch(NamedTuple):
    """Names the rows of a micro-batch: this rank's, as places in the mini-batch; how many this replica has of it; how
    many share batch statistics."""

    mine: Span
    whole: int
    sharing: int


class Batches:
    """Reads the mini-batches of one split for one rank: those of training steps, or one of given rows.

    `allocate` gives the memory for the inputs; whoever passes it owns that memory, and frees it after the last call
    here. Making an object is collective over the ranks for which `allocate` is; targets are read apart from that
    (`read_targets`), so that a rank that fails to read its targets leaves nobody waiting.
    """

    def __init__(
        self,
        split: Split,
        wiring: Wiring,
        allocate: Allocate,
        *,
        sampler: Sampler | None = None,
        augment: Augment | None = None,
    ):
        """Opens the inputs. `sampler` and `augment` are for the split that is trained on."""
        self.step = 0  # of the present mini-batch
        self._split, self._wiring, self._sampler, self._augment = split, wiring, sampler, augment
        self._inputs = split.inputs(allocate) if wiring.is_first else None
        self._targets: Array | None = None
        self._taken: dict[int, Array] = {}
        self._known: dict[tuple[int, int], RowsOfMicroBatch] = {}
        self._given: Array | None = None
        self._chosen, self._rows, self._key = -1, np.empty(0, np.int64), 0  # a step, its rows, its augmentation's key
        self._loaded = (-1, -1)  # (step, piece of its mini-batch) of the micro-batch whose inputs are there already

    def read_targets(self, check: Callable[[Array], None]) -> None:
        """Reads the targets, if there are any and this rank needs them, and lets `check` see all. Not collective."""
        if self._wiring.is_last and self._split.read_targets is not None:
            self._targets = self._split.targets()
            check(self._targets)

    # -- which mini-batch ---------------------------------------------------------------------------------------------

    def begin_step(self, step: int, micro_batches: int) -> None:
        """Makes step's mini-batch the present one; the sampler's next ones follow it. They are augmented."""
        self.step, self._micro_batches, self._given, self._alone = step, micro_batches, None, False

    def begin_rows(self, rows: Array, micro_batches: int, *, alone: bool = False) -> None:
        """Makes `rows` (numbers in the split) the present and only mini-batch, not augmented: for an evaluation.

        `alone`: this replica has all of them, instead of its part.
        """
        self._micro_batches, self._given, self._alone = micro_batches, rows, alone

    def batch_size(self, m: int) -> int:
        """Counts the rows of the whole mini-batch that micro-batch m is a piece of, over all replicas."""
        if self._given is not None:
            return len(self._given)
        assert self._sampler is not None
        return self._sampler.size(self.step + m // self._micro_batches)

    # -- micro-batch m ------------------------------------------------------------------------------------------------

    def rows(self, m: int) -> RowsOfMicroBatch:
        """Tells which rows of its mini-batch are micro-batch m's."""
        size, piece = self.batch_size(m), m % self._micro_batches
        if self._given is not None:  # an evaluation has as many micro-batches as its rows need: nothing to remember
            return self._divide(size, piece)
        known = self._known.get((size, piece))
        if known is None:
            known = self._known[size, piece] = self._divide(size, piece)
        return known

    def _divide(self, size: int, piece: int) -> RowsOfMicroBatch:
        place, topology, exact = self._wiring.place, self._wiring.topology, self._wiring.exact
        whole = span(size, self._micro_batches, piece)
        replica = Span(0, whole.size) if self._alone else span(whole.size, topology.replicas, place.replica)
        mine = span(replica.size, topology.stages[place.stage].rows, place.row)
        start = whole.start + replica.start + mine.start
        return RowsOfMicroBatch(Span(start, start + mine.size), replica.size, whole.size if exact else replica.size)

    def size(self, m: int) -> int:
        """Counts the rows over which the loss is averaged: all, or this replica's where it trains apart."""
        if self._wiring.exact:
            return self.batch_size(m)
        first = m - m % self._micro_batches
        return max(sum(self.rows(n).whole for n in range(first, first + self._micro_batches)), 1)

    def load(self, m: int) -> None:
        """Gathers the inputs of a training micro-batch that is still to come (first stage)."""
        self._gather(m, self._wiring.ahead(self.rows(m).mine.size))
        self._loaded = self._name(m)

    def inputs(self, m: int, g: int) -> Array:
        """Returns the inputs (rows, *shape) of micro-batch m in buffer g: gathered now, or arrived there."""
        loaded = self._given is None and self._loaded == self._name(m)
        if loaded:
            self._wiring.take_ahead(g)
        x = self._wiring.x(g, self.rows(m).mine.size)
        if self._wiring.is_first and not loaded:
            self._gather(m, x)
        return x

    def targets(self, m: int) -> Array:
        """Returns the targets of micro-batch m's rows, valid until the next call of that size (last stage)."""
        assert self._targets is not None
        part = self.rows(m).mine
        out = self._taken.get(part.size)
        if out is None:
            out = np.empty((part.size, *self._targets.shape[1:]), self._targets.dtype)
            self._taken[part.size] = out
        return np.take(self._targets, self._numbers(m)[slice(*part)], axis=0, out=out)

    def _gather(self, m: int, x_bI: Array) -> None:
        assert self._inputs is not None
        part = self.rows(m).mine
        if part.size:
            numbers = self._numbers(m)[slice(*part)]
            self._inputs.batch(numbers, x_bI, self._augment if self._given is None else None, self._key)

    def _numbers(self, m: int) -> Array:
        """Returns the numbers, in the split, of all rows of micro-batch m's mini-batch, in their order."""
        if self._given is not None:
            return self._given
        assert self._sampler is not None
        step = self.step + m // self._micro_batches
        if step != self._chosen:
            self._chosen, self._rows = step, self._sampler.rows(step)
            self._key = self._sampler.augment_key(step) if self._augment else 0
        return self._rows

    def _name(self, m: int) -> tuple[int, int]:
        number, piece = divmod(m, self._micro_batches)
        return self.step + number, piece
