"""Being told to stop: a signal to any rank ends the run on all ranks after the same step, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType

from nettorrent_mpi.comm.world import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # USR2: what Slurm's --signal=B:USR2@90 usually sends
PATIENCE = 2.0  # seconds between two times that the ranks ask each other


class Stop:
    """Asks now and then whether some rank was told to stop; the answer is the same on all ranks.

    Asking waits for all ranks, so it is done about every PATIENCE seconds only: `pace` tells how long a step takes.
    """

    def __init__(self, world: World):
        self._world = world
        self._told = False
        self._every = 10
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def asked(self, step: int, due: bool) -> bool:
        """Was any rank told to stop? Every rank calls after every step (they count from 1); `due`: ask now."""
        return (due or step % self._every == 0) and self._world.sum_numbers(self._told)[0] > 0

    def pace(self, seconds_per_step: float) -> None:
        """Every rank calls at the same steps with how long its steps take."""
        mean = self._world.sum_numbers(seconds_per_step)[0] / self._world.size
        self._every = max(1, min(1000, round(PATIENCE / mean))) if mean > 0 else 10

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
