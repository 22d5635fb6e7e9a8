"""What a rank reads of a mini-batch: the inputs of its rows on the first stage, their targets on the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.data.dataset import Allocate, Split
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.blocks import Span


class Batches(Protocol):
    """The mini-batches that follow each other, counted from the present one, which is 0."""

    def size(self, number: int) -> int:
        """Rows of a mini-batch."""

    def choose(self, number: int, feed: Feed) -> None:
        """Make it the one that `feed` reads."""


class Training:
    """The mini-batches of steps n, n + 1, ..., augmented."""

    def __init__(self, sampler: Sampler, augment: Augment | None):
        self._sampler, self._augment = sampler, augment
        self.step = 0

    def size(self, number: int) -> int:
        sampler = self._sampler
        batch = (self.step + number) % sampler.steps_per_epoch
        return min(sampler.batch_size, len(sampler.training_rows) - batch * sampler.batch_size)

    def choose(self, number: int, feed: Feed) -> None:
        step = self.step + number
        feed.choose(self._sampler.rows(step), self._augment, self._sampler.augment_key(step) if self._augment else 0)


class Once:
    """A single mini-batch: rows as they are."""

    def __init__(self, rows: Array):
        self._rows = rows

    def size(self, number: int) -> int:
        assert number == 0
        return len(self._rows)

    def choose(self, number: int, feed: Feed) -> None:
        feed.choose(self._rows)


class Feed:
    """One data split, seen by one rank. Other ranks than those of the first and last stage hold nothing of it.

    Making one is collective over the ranks that share its inputs; targets are read apart from that (`read_targets`), so
    that a rank that fails to read its targets leaves nobody waiting.
    """

    def __init__(self, split: Split, *, reads_inputs: bool, reads_targets: bool, allocate: Allocate):
        self._inputs = split.inputs(allocate) if reads_inputs else None
        self._read_targets = split.targets if reads_targets else None
        self._targets: Array | None = None
        self._taken: dict[int, Array] = {}
        self._augment: Augment | None = None
        self._key = 0
        self._rows: Array = np.empty(0, np.int64)

    def choose(self, rows: Array, augment: Augment | None = None, key: int = 0) -> None:
        """Make `rows` (numbers in the split, in order) the mini-batch. `key` seeds the augmentation."""
        self._rows, self._augment, self._key = rows, augment, key

    def read_targets(self, check: Callable[[Array], None]) -> None:
        """Read the targets, if this rank needs them, and let `check` look at all of them. Not collective."""
        if self._read_targets is not None:
            self._targets = self._read_targets()
            check(self._targets)

    def inputs(self, part: Span, out_bI: Array) -> None:
        """out_bI <- the inputs of these rows of the mini-batch."""
        assert self._inputs is not None
        if part.size:
            self._inputs.batch(self._rows[slice(*part)], out_bI, self._augment, self._key)

    def targets(self, part: Span) -> Array:
        """The targets of these rows of the mini-batch, valid until the next call of the same size."""
        assert self._targets is not None
        out = self._taken.get(part.size)
        if out is None:
            out = np.empty((part.size, *self._targets.shape[1:]), self._targets.dtype)
            self._taken[part.size] = out
        return np.take(self._targets, self._rows[slice(*part)], axis=0, out=out)
