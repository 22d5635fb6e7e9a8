"""A Patience ends a training that does not improve any more (early stopping), and knows the best evaluation, whose
network is kept."""

from __future__ import annotations

import json
import math

from nettorrent_mpi.plan.scores import Scores


class Patience:
    """A Patience has the figure of each evaluation by which a training is judged: its accuracy, or its loss where
    `by_loss`. All ranks hold the same, because all get the same scores.

    `most` evaluations one after another without a better figure than the best one before exhaust it.
    """

    def __init__(self, most: int, *, by_loss: bool):
        self._most, self._by_loss = most, by_loss
        self._seen: list[tuple[int, float]] = []  # (step, figure), the higher the better

    def see(self, step: int, scores: Scores) -> bool:
        """Take note of an evaluation after this step; return whether it is the best one so far."""
        self.forget_after(step - 1)
        figure = -scores.loss if self._by_loss else (scores.accuracy or 0.0)
        best = self._best()
        self._seen.append((step, figure if math.isfinite(figure) else -math.inf))
        return best is None or self._seen[-1][1] > best[1]

    @property
    def step(self) -> int | None:
        """Return the step of the best evaluation; None before the first one. In ties it is the first of them."""
        best = self._best()
        return None if best is None else best[0]

    @property
    def exhausted(self) -> bool:
        """Whether the training is to end."""
        return sum(step > (self.step or 0) for step, _ in self._seen) >= self._most

    def forget_after(self, step: int) -> None:
        """Go back to what was known after this step, from where the training goes on."""
        self._seen = [each for each in self._seen if each[0] <= step]

    def forget(self) -> None:
        """Begin anew: the best network is lost."""
        self._seen.clear()

    def text(self) -> str:
        """Write what a training needs to go on: the best evaluation, and those after it."""
        return json.dumps([each for each in self._seen if each[0] >= (self.step or 0)])

    def read(self, text: str) -> None:
        """Take what `text` has written. Raises ValueError for anything else."""
        found = json.loads(text)
        if not isinstance(found, list):
            raise ValueError("no list of evaluations")
        try:
            self._seen = [(int(step), float(figure)) for step, figure in found]
        except (TypeError, OverflowError) as error:
            raise ValueError("no list of evaluations") from error

    def _best(self) -> tuple[int, float] | None:
        return max(self._seen, key=lambda each: (each[1], -each[0]), default=None)
