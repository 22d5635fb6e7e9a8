"""Being told to stop: a signal to any rank ends the run on all ranks after the same step, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType

from nettorrent_mpi.comm.world import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # USR2: what Slurm's --signal=B:USR2@90 usually sends
PATIENCE = 2.0  # seconds between two times that the ranks tell each other


class Stop:
    """Listens for signals. `told` is this rank's flag, which the run's reports carry to the others; `due` says after
    which steps they have to, besides those that do anyway: about every PATIENCE seconds."""

    def __init__(self, world: World):
        self._world = world
        self.told = False
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

    def last_step(self, begun: int) -> int:
        """After which step all stop, when some rank was told to: every rank says how many it has `begun`."""
        return int(max(self._world.comm.allgather(begun)))

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
