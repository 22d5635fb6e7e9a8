"""Starting the ranks of a command, and ending it on all of them."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TypeAlias, TypeVar

from nettorrent_mpi.cli.first import numbered_by
from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.comm.failures import lost
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.engine.failure import agreed, end_all
from nettorrent_mpi.engine.signals import end_in_peace
from nettorrent_mpi.plan.errors import NetTorrentError

Close: TypeAlias = Callable[[], None]
T = TypeVar("T")


class Ranks:
    """A context manager that starts MPI for a command, whose exit code is `code`. No rank outlives the failure of
    another one.

    An error that all ranks agree on is printed by rank 0 in one line, and every rank ends with its code. A user's
    mistake that only one rank sees is printed by that rank in one line, any other error with its traceback; both end
    all ranks. What it `owns` is closed first, in reverse order.
    """

    def __init__(self) -> None:
        self.code = 0
        self.world = World()
        numbered_by(lambda: self.world.rank)
        atexit.register(end_in_peace)  # before MPI ends, which was asked for when it started
        self._open: list[tuple[Close, Close]] = []
        self.complete(self.world.watch)

    def owns(self, close: Close, abandon: Close) -> None:
        """Let something be closed by all ranks at the end, or abandoned by each for itself where ranks are lost."""
        self._open.append((close, abandon))

    def complete(self, phase: Callable[[], T]) -> T:
        """Return what a phase of the command returns on all ranks, or on none: where ranks are lost in it the others
        abandon what they own and begin it again."""
        again = False
        while True:
            try:
                if again:
                    self._go_on_without_lost()
                done = phase()
                self.world.agree()
                return done
            except Exception as error:
                if not lost(error, self.world):
                    raise
                again = True

    def _go_on_without_lost(self) -> None:
        self._abandon()
        gone = self.world.shrink()
        if self.world.rank == 0:
            ranks = f"rank{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))}"
            sys.stderr.write(f"nettorrent: warning: without {ranks}, lost at the start, the others begin again\n")

    def _abandon(self) -> None:
        self.world.revoke()
        while self._open:
            self._open.pop()[1]()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            self._end(error)
        finally:
            numbered_by(None)
        return True

    def _end(self, error: BaseException | None) -> None:
        """End the command on all ranks, by this error or without one."""
        if isinstance(error, NetTorrentError) and agreed(error, self.world):
            self.code = error.exit_code
            if self.world.rank == 0:
                sys.stderr.write(f"nettorrent: error: {error}\n")
        elif error is not None:
            self.code = end_all(self.world, error, in_script=False)
            while self._open:  # of a process that is alone
                self._open.pop()[1]()
            return
        NOW.enter("the end")
        try:
            while self._open:
                self._open[-1][0]()
                self._open.pop()
            self.world.agree()
            self.world.free()
        except BaseException as failure:
            if lost(failure, self.world):  # the command is complete all the same
                self._abandon()
            else:
                self.code = end_all(self.world, failure, in_script=False)
