"""Starting the ranks of a command, and ending it on all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.engine.failure import agreed, end_all
from nettorrent_mpi.plan.errors import NetTorrentError


class Ranks:
    """A context manager that starts MPI for a command, whose exit code is `code`. No rank outlives the failure of
    another one.

    An error that all ranks agree on is printed by rank 0 in one line, and every rank ends with its code. A user's
    mistake that only one rank sees is printed by that rank in one line, any other error with its traceback; both end
    all ranks. Objects in `open` are closed first, in reverse order.
    """

    def __init__(self) -> None:
        self.code = 0
        self.world = World()
        self.open: list[Callable[[], None]] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, NetTorrentError) and agreed(error, self.world):
            self.code = error.exit_code
            if self.world.rank == 0:
                sys.stderr.write(f"nettorrent: error: {error}\n")
        elif error is not None:
            self.code = end_all(self.world, error, shown=False)
            return True
        try:
            for close in reversed(self.open):
                close()
            self.world.free()
        except BaseException as failure:
            self.code = end_all(self.world, failure, shown=False)
        return True
