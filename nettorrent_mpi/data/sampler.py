"""The sampler decides which rows are for training, and in which order: a function of the seed and the epoch, never of
the ranks; with a separate part of the rows for each replica, also of the numbers of replicas and micro-batches."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.random import generator
from nettorrent_mpi.plan.blocks import micro_batch
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.seeds import key


class Sampler:
    """A Sampler divides the rows of a training set into training and validation rows and goes through the former in
    epochs.

    `validation` is the fraction held back, rounded to whole rows, drawn by the seed alone: the same on every rank.
    Raises ConfigError if no row would be left for training or a number is out of range.

    With `partition="disjoint"` each of the `replicas` has a part of the training rows, drawn once, and never trains on
    another's. The replica of a row in a mini-batch is decided by its position: `micro_batch` divides them over
    `micro_batches`, and `span` each of these over the replicas (plan.blocks). So a part is as large as its
    replica has positions in an epoch, and every epoch puts the part's rows, shuffled anew, at these positions.
    """

    def __init__(
        self,
        rows: int,
        seed: int,
        validation: float,
        batch_size: int,
        *,
        replicas: int = 1,
        micro_batches: int = 1,
        partition: Literal["shared", "disjoint"] = "shared",
    ):
        kept = round(rows * validation)
        if kept >= rows:
            text = f"{validation} of {rows} rows leaves none for training; lower it or use a larger data set"
            raise ConfigError(text, key="data.validation")
        shuffled = generator(seed, "validation").permutation(rows)
        assert 0 <= validation < 1 <= min(batch_size, replicas, micro_batches)
        self.seed, self.batch_size, self._validation = seed, batch_size, validation
        self.replicas, self.micro_batches = replicas, micro_batches
        self.partition: Literal["shared", "disjoint"] = partition
        self.validation_rows: Array = np.sort(shuffled[:kept])
        self.training_rows: Array = np.sort(shuffled[kept:])
        self.steps_per_epoch = -(-len(self.training_rows) // batch_size)
        self._orders: dict[int, Array] = {}

    def divided(self, replicas: int, micro_batches: int) -> Sampler:
        """Return the sampler of the same rows for another number of replicas and of micro-batches."""
        rows, validation = len(self.training_rows) + len(self.validation_rows), self._validation
        return Sampler(
            rows,
            self.seed,
            validation,
            self.batch_size,
            replicas=replicas,
            micro_batches=micro_batches,
            partition=self.partition,
        )

    def samples(self, steps: int) -> int:
        """Return the number of rows in the mini-batches of the first `steps` steps."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * len(self.training_rows) + min(rest * self.batch_size, len(self.training_rows))

    def epoch(self, step: int) -> int:
        """Return the epoch, counted from 0, that the global step belongs to."""
        return step // self.steps_per_epoch

    def order(self, epoch: int) -> Array:
        """Return the training rows in the epoch's order; read-only. Two are cached: steps of adjacent epochs may
        overlap."""
        order = self._orders.get(epoch)
        if order is None:
            if self.partition == "disjoint" and self.replicas > 1:
                order = self._in_parts(epoch)
            else:
                order = generator(self.seed, "order", epoch).permutation(self.training_rows)
            order.flags.writeable = False
            while len(self._orders) > 1:
                self._orders.pop(min(self._orders))
            self._orders[epoch] = order
        return order

    def size(self, step: int) -> int:
        """Return the number of rows in the mini-batch of a global step."""
        batch = step % self.steps_per_epoch
        return min(self.batch_size, len(self.training_rows) - batch * self.batch_size)

    def rows(self, step: int) -> Array:
        """Returns the rows of the mini-batch of a global step (a view); the last one of an epoch may be smaller."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _in_parts(self, epoch: int) -> Array:
        """Return the order in which every replica finds the rows of its own part, and no others, at its positions."""
        order = np.empty_like(self.training_rows)
        for replica, (part, positions) in enumerate(self._parts):
            order[positions] = generator(self.seed, "order", epoch, replica).permutation(part)
        return order

    @cached_property
    def _parts(self) -> list[tuple[Array, Array]]:
        """Return for each replica (its part of the training rows, its positions in the order of an epoch), of one
        length."""
        full, last = divmod(len(self.training_rows), self.batch_size)
        replicas = np.concatenate([np.tile(self._owners(self.batch_size), full), self._owners(last)])
        cuts = np.cumsum(np.bincount(replicas, minlength=self.replicas))[:-1]
        shuffled = generator(self.seed, "partition").permutation(self.training_rows)
        positions = np.argsort(replicas, kind="stable")
        return list(zip(np.split(shuffled, cuts), np.split(positions, cuts), strict=True))

    def _owners(self, size: int) -> Array:
        """Return the replica at each position of a mini-batch of `size` rows."""
        cuts = (micro_batch(size, self.batch_size, self.micro_batches, m) for m in range(self.micro_batches))
        sizes = _spans(np.array([cut.size for cut in cuts]), self.replicas)  # [micro-batch, replica]
        return np.repeat(np.tile(np.arange(self.replicas), self.micro_batches), sizes.ravel())

    def augment_key(self, step: int) -> int:
        """Return the key for Inputs.batch's random changes in this step's epoch."""
        return key(self.seed, "augment", self.epoch(step))


def _spans(totals: Array, parts: int) -> Array:
    """Return the sizes of plan.blocks' `span` for all `parts` of every total, in an additional last dimension."""
    each, more = np.divmod(totals[..., np.newaxis], parts)
    return each + (np.arange(parts) < more)
