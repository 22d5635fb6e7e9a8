"""Scores: what an evaluation gives, and which of several replicas is the best by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Scores(NamedTuple):
    """The mean loss and the accuracy, from 0 to 1, of some rows; accuracy is None where it is not defined."""

    loss: float
    accuracy: float | None


def mean_scores(loss: float, correct: float, rows: float, unknown: float) -> Scores:
    """The scores of so many rows with these sums of losses and right answers; `unknown` counts how often right was not
    defined."""
    return Scores(float(loss) / max(rows, 1), None if unknown else float(correct) / max(rows, 1))


def best_of(found: Sequence[Scores], metric: str) -> int:
    """The index of the best replica by `metric`, validation_loss or validation_accuracy; of equals the first.

    A replica whose loss is not finite is the worst by either metric: what it gets right it gets right by chance.
    """

    def badness(r: int) -> float:
        loss, accuracy = found[r]
        if not math.isfinite(loss):
            return math.inf
        return -(accuracy or 0.0) if metric == "validation_accuracy" else loss

    return min(range(len(found)), key=badness)
