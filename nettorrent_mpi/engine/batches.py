"""Batches give one rank its rows of a split, micro-batch by micro-batch.

The path of a row from the data set to the first layer, and which ranks hold what of it:

    Dataset    the training and the test split; opened, nothing read yet                                    every rank
    Sampler    the row numbers of step n's mini-batch, a function of (seed, n)                              every rank
    Batches    cuts the mini-batch into micro-batches, and finds this rank's rows of each                   every rank
    - inputs   the split's rows: `Inputs.batch` gathers, augments and scales them into the wiring's buffer  first stage
    - targets  the split's targets, whole in memory: labels never travel                                    last stage

On a GPU engine/device_batches.py does the last two. Micro-batches are numbered from the present mini-batch on, as in
engine/pipeline.py.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import inf
from typing import NamedTuple, TypeAlias

import numpy as np

from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.data.rows import Allocate, Split, Wrong
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Array, DType
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.plan.actions import Action
from nettorrent_mpi.plan.blocks import Span, micro_batch, span

CheckTargets: TypeAlias = Callable[[Array], None]


class RowsOfMicroBatch(NamedTuple):
    """A RowsOfMicroBatch gives the rows of one micro-batch: this rank's and this replica's, as positions in the
    mini-batch; over how many batch statistics are taken."""

    mine: Span
    replica: Span
    sharing: int

    @property
    def whole(self) -> int:
        """Return the number of rows that belong to this replica."""
        return self.replica.size


class Batches:
    """A Batches object reads the mini-batches of one split for one rank: those of training steps, or one of given rows.

    `allocate` provides the memory for the inputs; its owner frees it after the last call here. Construction is
    collective over the ranks for which `allocate` is collective. Targets are read separately (`read_targets`), so that
    a rank that fails to read its targets leaves no other rank waiting.
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
        """Open the inputs. `sampler` and `augment` apply to the training split only."""
        self.step = 0  # of the present mini-batch
        self._split, self._wiring, self._sampler, self._augment = split, wiring, sampler, augment
        self._inputs = split.inputs(allocate, wiring.has_room) if wiring.is_first else None
        self._targets: Array | None = None
        self._weights: Array | None = None  # of all rows
        self._taken: dict[int, Array] = {}
        self._known: dict[tuple[int, int], RowsOfMicroBatch] = {}
        self._asked: dict[int, RowsOfMicroBatch] = {}  # of the present mini-batch and those that follow
        self._given: Array | None = None
        self._chosen, self._rows, self._key = -1, np.empty(0, np.int64), 0  # a step, its rows, its augmentation key
        self._loaded = (-1, -1)  # (step, micro-batch) whose inputs were gathered ahead

    def read_targets(self, check: CheckTargets, split: Split | None = None) -> None:
        """Read the targets, if this rank needs them, and pass all of them to `check`; from now on those of `split`, if
        given, which has the same rows. Not collective."""
        self._split = split or self._split
        if self._wiring.is_last and self._split.read_targets is not None:
            self._targets = self._split.targets()
            check(self._targets)

    def weigh(self, weights: Array | None) -> None:
        """Give each row of the split a weight (float64) in the loss; None: each weighs 1. For the last stage."""
        self._weights = weights

    # -- which mini-batch ---------------------------------------------------------------------------------------------

    def begin_step(self, step: int, micro_batches: int) -> None:
        """Make the mini-batch of `step` the present one, augmented; those of the following steps come after it."""
        self.step, self._micro_batches, self._given, self._alone = step, micro_batches, None, False
        self._asked.clear()

    def begin_rows(self, rows: Array, micro_batches: int, *, alone: bool = False) -> None:
        """Make `rows` (numbers in the split) the present and only mini-batch, not augmented: for an evaluation.

        With `alone` this replica takes all of them, otherwise its part.
        """
        self._micro_batches, self._given, self._alone = micro_batches, rows, alone
        self._asked.clear()

    def batch_size(self, m: int) -> int:
        """Return the number of rows, over all replicas, of the mini-batch to which micro-batch m belongs."""
        if self._given is not None:
            return len(self._given)
        assert self._sampler is not None
        return self._sampler.size(self.step + m // self._micro_batches)

    def prepare(self, actions: Sequence[Action], steps: Sequence[Array] = ()) -> None:
        """Make ready what these actions need of the present mini-batch and the following ones, after `begin_step` or
        `begin_rows`. `steps` are arrays of the device, of one element: the number of the step whose mini-batch is the
        present one, and of those after it. On a CPU `inputs` and `targets` do all of it."""

    def key(self) -> Hashable | None:
        """Return what a recording of `inputs` and `targets` depends on besides the actions: it holds where this is the
        same. None: it holds never, as they do more than begin operations of the device."""
        return ()

    # -- micro-batch m ------------------------------------------------------------------------------------------------

    def rows(self, m: int) -> RowsOfMicroBatch:
        """Return which rows of its mini-batch belong to micro-batch m."""
        found = self._asked.get(m)  # each is asked for several times
        if found is None:
            found = self._asked[m] = self._rows_of(self.batch_size(m), m % self._micro_batches)
        return found

    def _rows_of(self, size: int, piece: int) -> RowsOfMicroBatch:
        if self._given is not None:  # not cached: the number of micro-batches of an evaluation varies
            return self._divide(size, piece)
        known = self._known.get((size, piece))
        if known is None:
            known = self._known[size, piece] = self._divide(size, piece)
        return known

    def _divide(self, size: int, piece: int) -> RowsOfMicroBatch:
        place, topology, exact = self._wiring.place, self._wiring.topology, self._wiring.exact
        usual = size if self._sampler is None or self._given is not None else self._sampler.batch_size
        whole = micro_batch(size, usual, self._micro_batches, piece)
        replica = Span(0, whole.size) if self._alone else span(whole.size, topology.replicas, place.replica)
        mine = span(replica.size, topology.stages[place.stage].rows, place.row)
        start = whole.start + replica.start + mine.start
        part = Span(whole.start + replica.start, whole.start + replica.stop)
        return RowsOfMicroBatch(Span(start, start + mine.size), part, whole.size if exact else replica.size)

    def weight(self, m: int) -> float:
        """Return the weight of the rows that the loss is averaged over, infinite if it would be 0: they are the
        mini-batch's, or this replica's part where replicas differ (last stage)."""
        if self._wiring.exact:
            parts = [Span(0, self.batch_size(m))]
        else:
            first = m - m % self._micro_batches
            parts = [self.rows(n).replica for n in range(first, first + self._micro_batches)]
        if self._weights is None:
            return max(sum(part.size for part in parts), 1)
        weights = self._weights[self._numbers(m)]
        return sum(float(weights[slice(*part)].sum()) for part in parts) or inf

    def load(self, m: int) -> None:
        """Gather the inputs of a later training micro-batch ahead of its turn (first stage)."""
        self._gather(m, self._wiring.ahead(self.rows(m).mine.size))
        self._loaded = self._name(m)

    def inputs(self, m: int, g: int) -> Array:
        """Return the inputs (rows, *shape) of micro-batch m in buffer g: gathered now (first stage) or received."""
        loaded = self._given is None and self._loaded == self._name(m)
        if loaded:
            self._wiring.take_ahead(g)
        x = self._wiring.x(g, self.rows(m).mine.size)
        if self._wiring.is_first and not loaded:
            self._gather(m, x)
        return x

    def targets(self, m: int) -> Array:
        """Return the targets of micro-batch m's rows, valid until the next call of that size (last stage)."""
        assert self._targets is not None
        part = self.rows(m).mine
        out = self._taken.get(part.size)
        if out is None:
            out = np.empty((part.size, *self._targets.shape[1:]), self._targets.dtype)
            self._taken[part.size] = out
        return np.take(self._targets, self._numbers(m)[slice(*part)], axis=0, out=out)

    def doubt(self) -> str | None:
        """Return what is doubtful about the first training rows as they come to the first layer (elsewhere None)."""
        if self._inputs is None or self._sampler is None:
            return None
        return self._inputs.doubt(self._sampler.rows(0))

    def first_nonfinite(self, dtype: DType) -> Wrong | None:
        """Return the first value of this rank's rows of the present mini-batch that is not finite when it is scaled in
        `dtype` (first stage; elsewhere None)."""
        inputs = self._inputs
        if inputs is None:
            return None
        rows = [self._numbers(m)[slice(*self.rows(m).mine)] for m in range(self._micro_batches)]
        return next((wrong for each in rows if (wrong := inputs.first_nonfinite(each, dtype))), None)

    def _gather(self, m: int, x_bI: Array) -> None:
        assert self._inputs is not None
        part = self.rows(m).mine
        if part.size:
            numbers = self._numbers(m)[slice(*part)]
            self._inputs.batch(numbers, x_bI, self._augment if self._given is None else None, self._key)

    def _numbers(self, m: int) -> Array:
        """Return the numbers, in the split, of all rows of the mini-batch to which micro-batch m belongs, in order."""
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
