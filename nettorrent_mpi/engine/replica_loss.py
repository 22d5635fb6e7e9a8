"""A ReplicaLoss gives the loss of one replica in a step to exchanges that compare replicas."""

from __future__ import annotations

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.mail import Pending
from nettorrent_mpi.engine.metrics import Metrics


class ReplicaLoss:
    """A ReplicaLoss sums a replica's loss in one step over its ranks while the next step computes: only the last stage
    knows it. `replica` is a group for this purpose alone."""

    def __init__(self, replica: Group, metrics: Metrics):
        self._replica, self._metrics = replica, metrics
        self._sums: Pending | None = None  # on its way
        self._known = (0.0, 0.0)  # without sums on their way
        self._read = False  # whether what the host reads from the device is still to be summed

    def begin(self) -> None:
        """Begin to read the loss since the last call, and to sum it as soon as the host knows it."""
        self._metrics.begin()
        self._read = True
        if self._metrics.done():
            self._sum()

    def take(self) -> tuple[float, float]:
        """Return (loss, weight of the rows) of this replica, as last begun; zeros if nothing was. All of its ranks
        call, and wait."""
        found, self._known = self.look(), (0.0, 0.0)
        return found

    def look(self) -> tuple[float, float]:
        """Return what `take` will return."""
        self._sum()
        if self._sums is not None:
            loss, weight = self._sums.sums()
            self._known, self._sums = (float(loss), float(weight)), None
        return self._known

    def restore(self, loss: float, weight: float) -> None:
        """Let `take` return this next."""
        self._known = loss, weight

    def _sum(self) -> None:
        if self._read:
            self._sums = Pending(self._replica, self._metrics.recent())
            self._read = False
