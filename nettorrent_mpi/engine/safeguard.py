"""A Safeguard does in every step what lets the others go on where a training loses ranks.

Ranks keep copies of each other's state (engine/redundancy.py). Where replicas differ, one whose ranks all live loses
not one step: its exchange does nothing any more once peers are lost, and its ranks leave the training after the same
step. For that they ask each other in every step whether one has heard of a loss, by a sum that is waited for one step
later: whoever gets the answer knows that all others get it after that step, too.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from nettorrent_mpi.comm.mail import Pending
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.redundancy import Redundancy
from nettorrent_mpi.plan.errors import LostRanksError

PATIENCE = 2.0  # seconds, and as long as three steps, in which the ranks of a replica have to end their step


class Safeguard:
    """A Safeguard belongs to one engine. All ranks make one, and call `after` after every step. Without `every` there
    are no copies."""

    def __init__(self, engine: Engine, every: int | None):
        self._engine = engine
        self.topology, self.apart, self.rank = engine.topology, not engine.plan.exact, engine.world.rank
        self.copies = None if every is None else Redundancy(engine, every)
        self._replica = engine.wiring.channel(engine.wiring.replica) if self.apart else None
        self._question: Pending | None = None
        self._last, self._seconds = time.monotonic(), 0.0  # of the latest step

    def after(self, step: int) -> None:
        """Keep copies, if they are due. Raises a LostRanksError if any rank of a replica that differs from others has
        heard of a loss, on all of its ranks after the same step."""
        if self.copies is not None:
            self.copies.after(step)
        if self._replica is None:
            return
        now = time.monotonic()
        self._last, self._seconds = now, now - self._last
        answer = self._question is not None and bool(self._question.sums()[0])
        heard = self._engine.exchange.broken or self._engine.world.is_broken
        self._question = Pending(self._replica, [float(heard)])
        if answer or (heard and self._replica.size == 1):
            raise LostRanksError("ranks of other replicas are lost")

    def refresh(self, step: int) -> None:
        """Keep copies of the state after this step, and wait until all have them. All ranks call, at rest."""
        if self.copies is not None:
            self.copies.refresh(step)

    def assemble(self) -> int | None:
        """Return the step after which this rank's own state is whole, where replicas differ. If all ranks of this one
        live, this waits until they have ended the step that they are in: they may need this rank for it."""
        group = self._replica
        if group is None:
            return None
        if group.size > 1 and not group.is_broken:
            until = time.monotonic() + PATIENCE + 3 * self._seconds
            with suppress(Exception):  # whoever has waited long enough revokes the group
                request = group.comm.Ibarrier()
                while not request.Test() and time.monotonic() < until:
                    os.sched_yield()
        return self._engine.whole

    def abandon(self) -> None:
        """Give up what is in flight, after the world was revoked. The copies stay."""
        if self.copies is not None:
            self.copies.abandon()
        if self._question is not None:
            self._question.abandon()

    def close(self) -> None:
        """Wait for what is in flight, and free the requests. All ranks call, at rest."""
        if self.copies is not None:
            self.copies.close()
        if self._question is not None:
            self._question.sums()
