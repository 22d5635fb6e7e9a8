"""Answers say what a network's outputs mean: labels, and probabilities of classes."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.trained_on import TrainedOn
from nettorrent_mpi.plan.specs import CrossEntropy, MeanSquaredError, Spec


class Answers:
    """Answers are what outputs (rows, units) mean after training with a loss.

    `classes` has the name of each class, its number where nobody has named it; it is empty where targets were numbers.
    """

    def __init__(self, trained_on: TrainedOn, loss: Spec, units: int):
        classes = trained_on.classes
        if units == 1 and isinstance(loss, MeanSquaredError):  # which takes labels for numbers
            classes = None
        names = trained_on.class_names or ()
        count = 0 if classes is None else max(units, classes)  # there may be more outputs than classes
        self.classes = (*names, *map(str, range(len(names), count)))
        self._loss = loss

    @property
    def tells_probabilities(self) -> bool:
        """Whether outputs tell probabilities."""
        return not isinstance(self._loss, MeanSquaredError)

    def labels(self, outputs: Array) -> Array:
        """Return the number of the class that each row is taken to be, (rows,) int64. There have to be classes."""
        if outputs.shape[1] == 1 and len(self.classes) == 2:  # the logit of the second one
            return np.asarray(outputs[:, 0] > 0, np.int64)
        return np.asarray(outputs.argmax(axis=1))

    def probabilities(self, outputs: Array) -> Array:
        """Return the probability of each class, (rows, classes), or, where targets were numbers, of each output."""
        assert self.tells_probabilities
        wide = outputs.astype(np.float64)
        if isinstance(self._loss, CrossEntropy):
            exponentials = np.exp(wide - wide.max(axis=1, keepdims=True))
            return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True), outputs.dtype)
        found = np.exp(-np.logaddexp(0, -wide)).astype(outputs.dtype)
        return np.hstack([1 - found, found]) if found.shape[1] == 1 and len(self.classes) == 2 else found

    def scores(self, outputs: Array) -> Array:
        """Return a number for each class (rows, classes), the largest for the most likely: the probability where
        outputs tell it, else the output."""
        return self.probabilities(outputs) if self.tells_probabilities else outputs
