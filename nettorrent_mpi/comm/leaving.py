"""A rank whose MPI may be stuck ends itself, or all ranks: nothing here waits for MPI."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence

from nettorrent_mpi.comm import library
from nettorrent_mpi.comm.launcher import LAUNCHER, depart, flush, is_rank, tolerant
from nettorrent_mpi.comm.library import MPI
from nettorrent_mpi.comm.processes import Process, this_process

TOGETHER = 3.0  # seconds in which MPI may end all ranks; it may be what is stuck
FORWARDING = 0.3  # seconds: MPICH's mpirun drops output that it has not forwarded when the ranks end (seen)
# Each tells the ranks of other machines, without MPI, to end with a code.
ORDERS: list[Callable[[int], None]] = []


def end_all(code: int) -> None:
    """End every rank of the program at once with this code; earlier output can still be read."""
    flush()
    time.sleep(FORWARDING)
    if not tolerant():
        MPI.COMM_WORLD.Abort(code)
    for order in ORDERS:  # MPI_Abort would end this rank alone, for which the others would wait for ever (seen, 5.0.11)
        order(code)
    for each in {*LAUNCHER.siblings, *filter(is_rank, LAUNCHER.started())} - {this_process()}:
        each.end(signal.SIGKILL)
    depart(code)


def leave(stopped: Sequence[Process], first: bool, code: int = 1) -> None:
    """End this process with `code`: the `first` one by MPI, so that the launcher ends all with this code, the others
    once that had time. The processes that are `stopped` are killed after it: they cannot end themselves."""
    flush()
    if first and library.loaded() and not tolerant():
        threading.Thread(target=MPI.COMM_WORLD.Abort, args=(code,), daemon=True).start()
    time.sleep(TOGETHER)
    for each in stopped:
        each.end(signal.SIGKILL)
    depart(code)
