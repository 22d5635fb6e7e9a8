"""This module says whether a run can survive the loss of ranks, and whether an error tells of one.

Open MPI tells of dead ranks where its fault tolerance (ULFM, User-Level Failure Mitigation) is on: an operation that
needs one raises an error instead of waiting for ever. A rank that sees one revokes every communicator that it is in, so
that whoever waits for it there is woken, too, and by induction all. The survivors then shrink their world
(`World.shrink`) and make all other communicators anew. MPICH has the same functions, but they do nothing.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from nettorrent_mpi.comm import library
from nettorrent_mpi.comm.launcher import tolerant
from nettorrent_mpi.comm.library import MPI
from nettorrent_mpi.comm.requests import losses
from nettorrent_mpi.plan.errors import CommunicationError, LostRanksError

if TYPE_CHECKING:
    from nettorrent_mpi.comm.group import Group

TELLING = 2.0  # seconds in which MPI is told of a rank whose death it has felt


def survivable() -> bool:
    """Whether MPI lets the other ranks go on when one is lost: Open MPI's, started by `mpirun --with-ft ulfm`."""
    if not library.loaded() or not tolerant():
        return False
    return "Open MPI" in MPI.Get_library_version() and bool(MPI.COMM_WORLD.Get_size() > 1)


def lost(error: BaseException, group: Group) -> bool:
    """Whether this error, in an operation of the ranks of `group`, says that one of them is lost, so that the others
    can go on without it."""
    if not survivable():
        return False
    if isinstance(error, LostRanksError):
        return True
    if isinstance(error, MPI.Exception):
        return error.Get_error_class() in losses() or _becomes_broken(group)
    return isinstance(error, CommunicationError) and group.is_broken


def _becomes_broken(group: Group) -> bool:
    """Whether MPI knows, at once or soon, that a rank of the group or its kin is lost. An operation that needs a rank
    may fail by another error (MPI_ERR_OTHER in a barrier was seen) before MPI is told of the rank's death."""
    until = time.monotonic() + TELLING
    while not any(each.is_broken for each in group.kin):
        if time.monotonic() > until:
            return False
        with suppress(MPI.Exception):
            group.progress()
        time.sleep(0.01)
    return True
