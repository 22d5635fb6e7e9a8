"""Which rows are for training, and in which order: a function of the seed and the epoch, never of the ranks."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.seeds import key

Array: TypeAlias = npt.NDArray[Any]


class Sampler:
    """Divides the rows of a training set into training and validation rows and walks through the former in epochs.

    `validation` is the fraction kept back, rounded to whole rows, drawn by the seed alone: the same on
    every rank. Raises ConfigError where no row would be left for training or a number is out of its range.
    """

    def __init__(self, rows: int, seed: int, validation: float, batch_size: int):
        if not 0.0 <= validation < 1.0:
            raise ConfigError(f"a fraction, at least 0 and below 1, not {validation}", key="data.validation")
        if batch_size < 1:
            raise ConfigError(f"at least 1, not {batch_size}", key="train.batch_size")
        kept = round(rows * validation)
        if kept >= rows:
            text = f"{validation} of {rows} rows leaves none for training; lower it or use a larger data set"
            raise ConfigError(text, key="data.validation")
        shuffled = _generator(seed, "validation").permutation(rows)
        self.seed, self.batch_size = seed, batch_size
        self.validation_rows: Array = np.sort(shuffled[:kept])
        self.training_rows: Array = np.sort(shuffled[kept:])
        self.steps_per_epoch = -(-len(self.training_rows) // batch_size)
        self._orders: dict[int, Array] = {}

    def epoch(self, step: int) -> int:
        """The epoch, counted from 0, that the global step belongs to."""
        return step // self.steps_per_epoch

    def order(self, epoch: int) -> Array:
        """The training rows in the epoch's order; read-only. Two epochs are kept: steps may overlap at the turn."""
        order = self._orders.get(epoch)
        if order is None:
            order = _generator(self.seed, "order", epoch).permutation(self.training_rows)
            order.flags.writeable = False
            while len(self._orders) > 1:
                self._orders.pop(min(self._orders))
            self._orders[epoch] = order
        return order

    def rows(self, step: int) -> Array:
        """The rows of the mini-batch of a global step (a view); the last one of an epoch may be smaller."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def augment_key(self, step: int) -> int:
        """The key that Inputs.batch takes for the random changes of this step's epoch."""
        return key(self.seed, "augment", self.epoch(step))


def _generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *numbers)))
