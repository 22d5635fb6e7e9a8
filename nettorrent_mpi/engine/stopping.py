"""A request on one rank brings all ranks to rest after the same step, to stop the training or to save its state."""

from __future__ import annotations

from nettorrent_mpi.comm.failures import lost
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.mail import Pending
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.engine.signals import Signals

PATIENCE = 2.0  # seconds between two reports that carry the ranks' requests to each other


class Stopping:
    """A Stopping lets all ranks agree on the step after which they come to rest because one of them wants it.

    `asked` is this rank's request to stop, made by a signal, which reports carry to the others like other requests for
    a rest; `due` says after which steps additional reports have to be started for them, about every PATIENCE seconds.

    A report arrives at a different time on every rank. A rank that has heard of a request waits for the others to say
    how far they are, and must not be needed in a step that another rank has begun without having heard. So ranks that
    wait for each other inside a step (`bound`: all ranks, or a replica's) first agree, after the same step, that they
    have heard.
    """

    def __init__(self, world: World, bound: Group, signals: Signals | None, *, apart: bool):
        """`apart` says that replicas differ."""
        self._world, self._bound, self._apart = world, bound, apart
        self._signals = signals
        self.heard = False
        self._question: Pending | None = None
        self._every = 10
        if signals is not None:
            signals.listen(tells=world.rank == 0)

    @property
    def asked(self) -> bool:
        """Whether this rank is asked to stop."""
        return self._signals is not None and self._signals.asked

    def begin(self) -> None:
        """Begin or continue a training: earlier requests are settled."""
        self.heard, self._question = False, None

    def due(self, step: int) -> bool:
        """Whether a report has to follow this step (counted from 1). The same on all ranks."""
        return step % self._every == 0

    def pace(self, seconds_per_step: float, *, left: bool = False) -> bool:
        """Agree on the interval between reports, given this rank's seconds per step, and return whether on any rank the
        caller has `left`. All ranks call after the same step, and wait."""
        every = self._world.gather_objects((seconds_per_step, left))
        mean = sum(seconds for seconds, _ in every) / len(every)
        self._every = max(1, min(1000, round(PATIENCE / mean))) if mean > 0 else 10
        return any(gone for _, gone in every)

    def hear(self, asked: bool) -> None:
        """Take note of a report: whether some rank asked for a rest."""
        self.heard = self.heard or asked

    def all_know(self, *, ask: bool) -> bool:
        """Whether one of the `bound` ranks has heard of a request. They call after the same steps and get the same
        answer, to the question of the previous call; with `ask` the next call answers again."""
        try:
            answer = self._question is not None and bool(self._question.sums()[0] > 0)
            self._question = Pending(self._bound, [float(self.heard)]) if ask else None
        except Exception as error:
            if not (self._apart and lost(error, self._bound)):
                raise
            self._question = None  # the ranks of this replica have to end their step first (safeguard.py)
            return False
        return answer

    def abandon(self) -> None:
        """Give up the question that is in flight, after the world was revoked."""
        if self._question is not None:
            self._question.abandon()

    def last_step(self, begun: int) -> int:
        """Return the step after which all ranks come to rest: every rank that knows of a request passes how many it has
        `begun`."""
        return int(max(self._world.gather_objects(begun)))
