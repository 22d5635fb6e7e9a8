"""The ranks of a run: which of them have one replica, which exchange with each other, and who looks after them."""

from __future__ import annotations

import atexit
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nettorrent_mpi import env
from nettorrent_mpi.comm.activity import NOW, OUTSIDE, STARTING
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.config.reading import exchange_of, watchdog_of
from nettorrent_mpi.config.sections import WatchdogTimes
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.errors import LayoutError, UserError
from nettorrent_mpi.plan.exchange_specs import Allreduce
from nettorrent_mpi.plan.specs import Spec
from nettorrent_mpi.torch.batching import RankPlace

TIMES = WatchdogTimes()


class RunRanks:
    """RunRanks are the ranks of `world` in a run, divided into replicas: `holders` have this rank's, number `replica`,
    and average exactly; `peers` have its place in every replica, and exchange as `spec` says.

    All ranks make them, with the arguments of `parallelize`, and let a watchdog look after them until `close`, unless
    one does so already. Raises UserErrors on all ranks alike.
    """

    def __init__(
        self,
        world: World,
        exchange: str | Mapping[str, Any] | Spec,
        replica_size: int | None,
        watchdog: str | Mapping[str, Any] | WatchdogTimes,
    ):
        self.world = world
        with world.agreement():
            times = watchdog_of(watchdog)
            self.spec = exchange_of(exchange)
            each = _ranks_of_replica(replica_size, world.size, exact=isinstance(self.spec, Allreduce))
        self._watches = times is not None and world.watchdog is None
        if times is not None and self._watches:
            world.watch(times.report, times.end)
            atexit.register(world.unwatch)
        self.replica, place = divmod(world.rank, each)
        own = Span(self.replica * each, (self.replica + 1) * each)
        self.place = RankPlace(world.rank, world.size, own)
        self._made = [world.subgroup(range(*own)), world.subgroup(range(place, world.size, each))]
        self.holders, self.peers = self._made

    @classmethod
    @contextmanager
    def starting(
        cls,
        world: World,
        exchange: str | Mapping[str, Any] | Spec,
        replica_size: int | None = None,
        watchdog: str | Mapping[str, Any] | WatchdogTimes = TIMES,
    ) -> Iterator[RunRanks]:
        """Make the ranks of a run that starts inside the `with` block; an error there ends the watch."""
        NOW.enter(STARTING)
        try:
            ranks = cls(world, exchange, replica_size, watchdog)
            try:
                yield ranks
            except BaseException:
                ranks.unwatch()
                raise
        finally:
            NOW.enter(OUTSIDE)

    def unwatch(self) -> None:
        """Let no watchdog of this run look after the ranks any more."""
        if self._watches:
            self._watches = False
            atexit.unregister(self.world.unwatch)
            self.world.unwatch()

    def close(self) -> None:
        """Free the groups, and end the watch. All ranks call."""
        self.unwatch()
        for group in self._made:
            group.free()
        self._made.clear()


def world_of(comm: Any) -> World:
    """Return the world of a communicator of mpi4py, or itself if it is one; None: of all ranks of the program. Raises a
    UserError in a process that a rank has started: MPI would take it for the rank."""
    if comm is None:
        if _in_worker() and env.launched(os.environ):
            raise UserError(
                "a worker process runs the whole script again, as those do that spawn or forkserver start: put the "
                'training under if __name__ == "__main__":, which workers leave out'
            )
        env.prepare()
    return comm if isinstance(comm, World) else World(comm)


def _in_worker() -> bool:
    """Whether multiprocessing has started this process, which may still be reading the script, without a parent."""
    reading = getattr(multiprocessing.current_process(), "_inheriting", False)
    return reading or multiprocessing.parent_process() is not None


def _ranks_of_replica(asked: int | None, ranks: int, *, exact: bool) -> int:
    """Return how many of the ranks have one replica, where so many are asked for. Raises LayoutError."""
    if exact and asked not in (None, ranks):
        raise LayoutError(
            f'replica_size is {asked}, but exchange="allreduce" averages over all {ranks} ranks: leave it out, or '
            'choose "gossip" for the exchange between replicas'
        )
    each = ranks if exact else asked or 1
    if each < 1 or ranks % each:
        raise LayoutError(f"replica_size is {each}, which does not divide {ranks} ranks into equal replicas")
    return each
