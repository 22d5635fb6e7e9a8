"""What a rank counts of the rows that it saw."""

from __future__ import annotations


class Tally:
    """Sums over the rows that this rank saw: of the loss, of right answers, of rows; and whether right is not defined.

    Only ranks of the last stage count, and of a team's cols only the first, so that sums over all ranks are right.
    `recent` are the sums of loss and rows since somebody set them to zero.
    """

    def __init__(self) -> None:
        self._numbers = (0.0, 0.0, 0.0, 0.0)
        self.recent = (0.0, 0.0)

    def add(self, loss: float, correct: float, rows: float, unknown: float = 0.0) -> None:
        a, b, c, d = self._numbers
        self._numbers = (a + loss, b + max(correct, 0), c + rows, d + unknown + (correct < 0))
        self.recent = (self.recent[0] + loss, self.recent[1] + rows)

    def numbers(self) -> tuple[float, float, float, float]:
        """(loss, right answers, rows, times that right was not defined)."""
        return self._numbers

    def take(self) -> tuple[float, float, float, float]:
        """The numbers, which begin anew."""
        taken, self._numbers = self._numbers, (0.0, 0.0, 0.0, 0.0)
        return taken
