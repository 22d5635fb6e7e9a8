"""The end of a rank whose MPI may be stuck: nothing here waits for it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence

from nettorrent_mpi.comm import library
from nettorrent_mpi.comm.launcher import depart, flush
from nettorrent_mpi.comm.library import MPI
from nettorrent_mpi.comm.processes import Process

TOGETHER = 3.0  # seconds in which MPI may end all ranks; it may be what is stuck


def leave(stopped: Sequence[Process], first: bool, code: int = 1) -> None:
    """End this process with `code`: the `first` one by MPI, so that the launcher ends all with this code, the others
    once that had time. The processes that are `stopped` are killed after it: they cannot end themselves."""
    flush()
    if first and library.loaded():
        threading.Thread(target=MPI.COMM_WORLD.Abort, args=(code,), daemon=True).start()
    time.sleep(TOGETHER)
    for each in stopped:
        each.end(signal.SIGKILL)
    depart(code)
