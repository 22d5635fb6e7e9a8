"""Metrics: what a rank adds up over the rows that it sees, in an array on the device."""

from __future__ import annotations

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device

LOSS, CORRECT, ROWS, UNKNOWN, NONFINITE = range(5)


class Metrics:
    """Sums over the rows that this rank saw: `values` has the sum of their losses, how many were right, how many they
    were, how often right was not defined, and how many outputs of micro-batches were not finite.

    Only ranks of the last stage count rows, and of a team's cols only the first, so that sums over all ranks are right;
    the others' losses go where nobody reads them (`ignored`).
    """

    def __init__(self, device: Device):
        self.values: Array = device.zeros((5,), "float64")
        self.ignored: Array = device.zeros((5,), "float64")
        self._told = (0.0, 0.0)  # the loss and the rows at the last call of `recent`

    def take(self) -> tuple[float, float, float, float]:
        """(loss, right, rows, unknown), which begin anew."""
        loss, correct, rows, unknown = map(float, self.values[:NONFINITE])
        self.values[:NONFINITE] = 0
        self._told = (self._told[0] - loss, self._told[1] - rows)
        return loss, correct, rows, unknown

    def put_back(self, taken: tuple[float, float, float, float]) -> None:
        """Go on with what was taken before an evaluation; `recent` begins anew."""
        self.values[:NONFINITE] = taken
        self._told = (taken[LOSS], taken[ROWS])

    def recent(self) -> tuple[float, float]:
        """(loss, rows) since the last call."""
        now = float(self.values[LOSS]), float(self.values[ROWS])
        before, self._told = self._told, now
        return now[0] - before[0], now[1] - before[1]
