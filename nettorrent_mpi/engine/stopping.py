"""Being told to stop: a signal to any rank ends the run on all ranks after the same step, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.mail import Pending
from nettorrent_mpi.comm.world import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # USR2: what Slurm's --signal=B:USR2@90 usually sends
PATIENCE = 2.0  # seconds between two times that the ranks tell each other


class Stop:
    """Listens for signals. `told` is this rank's flag, which the run's reports carry to the others; `due` says after
    which steps they have to, besides those that do anyway: about every PATIENCE seconds.

    A report arrives on every rank at another time. Who waits then, for the others to say how far they are, must not be
    waited for in a step that another one has begun, not having heard yet. So those who need each other in a step
    (`bound`: all ranks, or a replica's) agree among themselves first that they have heard, after the same step.
    """

    def __init__(self, world: World, bound: Group):
        self._world, self._bound = world, bound.duplicate()
        self.told = False
        self.heard = False
        self._question: Pending | None = None
        self._every = 10
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.told = True

    def due(self, step: int) -> bool:
        """Has this step (counted from 1) to be followed by a report? The same on all ranks."""
        return step % self._every == 0

    def pace(self, seconds_per_step: float) -> None:
        """Every rank calls after the same step with how long its steps take. Waits for all."""
        mean = self._world.sum_numbers(seconds_per_step)[0] / self._world.size
        self._every = max(1, min(1000, round(PATIENCE / mean))) if mean > 0 else 10

    def hear(self, told: bool) -> None:
        """Has a report told that some rank was told to stop?"""
        self.heard = self.heard or told

    def all_know(self, *, ask: bool) -> bool:
        """Has one of those who are bound to each other heard of it? They call after the same steps and get the same
        answer, to what was asked the last time; with `ask` the next call answers again."""
        answer = self._question is not None and bool(self._question.sums()[0] > 0)
        self._question = Pending(self._bound, [float(self.heard)]) if ask else None
        return answer

    def last_step(self, begun: int) -> int:
        """After which step all stop, when some rank was told to: every rank says how many it has `begun`."""
        return int(max(self._world.comm.allgather(begun)))

    def close(self) -> None:
        """Give the signals back. All ranks call, at rest."""
        self._bound.comm.Free()
        for number, handler in self._before.items():
            signal.signal(number, handler)
