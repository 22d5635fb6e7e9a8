"""Stopping early: what one rank asks for ends the training on all ranks after the same step."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.mail import Pending
from nettorrent_mpi.comm.world import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # USR2: what Slurm's --signal=B:USR2@90 usually sends
PATIENCE = 2.0  # seconds between two reports that carry the ranks' requests to each other


class Stopping:
    """The agreement of all ranks on the step after which they stop. `asked` is this rank's request, which the reports
    carry to the others; `due` says after which steps reports have to be started for it, besides those that are anyway:
    about every PATIENCE seconds. With `signals` a SIGTERM, SIGUSR1 or SIGUSR2 is a request.

    A report arrives on every rank at another time. A rank that then waits for the others to tell how far they are must
    not be waited for in a step that another one has begun, not having heard yet. So those who need each other in a step
    (`bound`: all ranks, or a replica's) agree among themselves first that they have heard, after the same step.
    """

    def __init__(self, world: World, bound: Group, *, signals: bool):
        self._world, self._bound = world, bound
        self.asked = False
        self.heard = False
        self._question: Pending | None = None
        self._every = 10
        listens = signals and threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS if listens}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def begin(self) -> None:
        """A training begins, or goes on: what was heard in an earlier one is settled."""
        self.heard, self._question = False, None

    def due(self, step: int) -> bool:
        """Whether this step (counted from 1) has to be followed by a report. The same on all ranks."""
        return step % self._every == 0

    def pace(self, seconds_per_step: float) -> None:
        """Every rank calls after the same step with how long its steps take. Waits for all."""
        mean = self._world.sum_numbers(seconds_per_step)[0] / self._world.size
        self._every = max(1, min(1000, round(PATIENCE / mean))) if mean > 0 else 10

    def hear(self, asked: bool) -> None:
        """A report has arrived; did some rank ask to stop?"""
        self.heard = self.heard or asked

    def all_know(self, *, ask: bool) -> bool:
        """Whether one of those who are bound to each other has heard of a request. They call after the same steps and
        get the same answer, to what was asked the last time; with `ask` the next call answers again."""
        answer = self._question is not None and bool(self._question.sums()[0] > 0)
        self._question = Pending(self._bound, [float(self.heard)]) if ask else None
        return answer

    def last_step(self, begun: int) -> int:
        """The step after which all stop: every rank that knows of a request says how many it has `begun`."""
        return int(max(self._world.comm.allgather(begun)))

    def close(self) -> None:
        """Give the communicator and the signals' handlers back. All ranks call, at rest."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
