"""Metrics are sums that a rank accumulates over its rows, in an array on the device."""

from __future__ import annotations

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device

LOSS, CORRECT, ROWS, UNKNOWN, NONFINITE, FIRST = range(6)


class Metrics:
    """The metrics of one rank. `values` holds the sum of the losses, the number of correct answers, the number of rows,
    how often an answer could not be judged, the number of micro-batches whose outputs were not finite, and the step
    (from 0) of the first of these.

    Only ranks of the last stage count rows, and of a team's cols only the first, so that sums over all ranks are right;
    the losses of the other cols go to `ignored`.
    """

    def __init__(self, device: Device):
        self._device = device
        self.values: Array = device.zeros((6,), "float64")
        self.ignored: Array = device.zeros((6,), "float64")
        self.nonfinite: int | None = None  # the step of the first value that was not finite, once it is known here
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
        now = self.look()
        self._device.ops.fill(self.values[:NONFINITE], 0)
        loss, correct, rows, unknown = (a + b for a, b in zip(self._before, now, strict=True))
        self._before = loss, correct, rows, unknown
        return now[LOSS], now[ROWS]

    def look(self) -> list[float]:
        """Return (loss, correct, rows, unknown) at present, and learn of values that are not finite. The host waits for
        the device."""
        now: list[float] = self._device.on_host(self.values).tolist()
        if self.nonfinite is None and now[NONFINITE]:
            self.nonfinite = int(now[FIRST])
        return now[:NONFINITE]

    def forget_nonfinite(self) -> None:
        """Forget what was not finite."""
        self.nonfinite = None
        for values in (self.values, self.ignored):
            self._device.ops.fill(values[NONFINITE:], 0)
