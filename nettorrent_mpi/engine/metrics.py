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
        self._before = (0.0, 0.0, 0.0, 0.0)  # what was added up before the last call of `recent`

    def take(self) -> tuple[float, float, float, float]:
        """Return (loss, right, rows, unknown) and set them to zero."""
        self.recent()
        taken, self._before = self._before, (0.0, 0.0, 0.0, 0.0)
        return taken

    def put_back(self, taken: tuple[float, float, float, float]) -> None:
        """Restore the sums that were taken before an evaluation; `recent` starts anew."""
        self._before = taken

    def recent(self) -> tuple[float, float]:
        """Return (loss, rows) since the last call."""
        now = [float(value) for value in self.values[:NONFINITE]]
        self.values[:NONFINITE] = 0
        loss, correct, rows, unknown = (a + b for a, b in zip(self._before, now, strict=True))
        self._before = loss, correct, rows, unknown
        return now[LOSS], now[ROWS]
