"""Metrics are sums that a rank accumulates over its rows, in an array on the device."""

from __future__ import annotations

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device

LOSS, CORRECT, ROWS, UNKNOWN, NONFINITE = range(5)


class Metrics:
    """The metrics of one rank. `values` holds the sum of the losses, the number of correct answers, the number of rows,
    how often an answer could not be judged, and the number of micro-batches whose outputs were not finite.

    Only ranks of the last stage count rows, and of a team's cols only the first, so that sums over all ranks are right;
    the losses of the other cols go to `ignored`.
    """

    def __init__(self, device: Device):
        self.values: Array = device.zeros((5,), "float64")
        self.ignored: Array = device.zeros((5,), "float64")
        self._told = (0.0, 0.0)  # the loss and the rows at the last call of `recent`

    def take(self) -> tuple[float, float, float, float]:
        """Return (loss, right, rows, unknown) and set them to zero."""
        loss, correct, rows, unknown = map(float, self.values[:NONFINITE])
        self.values[:NONFINITE] = 0
        self._told = (self._told[0] - loss, self._told[1] - rows)
        return loss, correct, rows, unknown

    def put_back(self, taken: tuple[float, float, float, float]) -> None:
        """Restore the sums that were taken before an evaluation; `recent` starts anew."""
        self.values[:NONFINITE] = taken
        self._told = (taken[LOSS], taken[ROWS])

    def recent(self) -> tuple[float, float]:
        """Return (loss, rows) since the last call."""
        now = float(self.values[LOSS]), float(self.values[ROWS])
        before, self._told = self._told, now
        return now[0] - before[0], now[1] - before[1]
