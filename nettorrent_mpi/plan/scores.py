"""Scores are the results of an evaluation, by which the best of several replicas is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Scores(NamedTuple):
    """The mean loss and the accuracy (0 to 1) of some rows; accuracy is None where it is not defined."""

    loss: float
    accuracy: float | None


def mean_scores(loss: float, correct: float, rows: float, unknown: float, extra: float) -> Scores:
    """Return the scores of `rows` rows with these sums of losses and correct answers; `unknown` counts how often
    correctness was not defined; the rows weigh `extra` more in the loss than 1 each."""
    return Scores(float(loss) / ((rows + extra) or 1), None if unknown else float(correct) / max(rows, 1))


def best_of(found: Sequence[Scores], metric: str) -> int:
    """Return the index of the best replica by `metric`, validation_loss or validation_accuracy; in ties the first.

    A replica whose loss is not finite is the worst by either metric: its correct answers are chance.
    """

    def badness(r: int) -> float:
        loss, accuracy = found[r]
        if not math.isfinite(loss):
            return math.inf
        return -(accuracy or 0.0) if metric == "validation_accuracy" else loss

    return min(range(len(found)), key=badness)
