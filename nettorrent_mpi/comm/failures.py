"""Ranks that are lost: whether a run can survive that, how it is seen, and how to leave what waits for them.

Open MPI tells of dead ranks where its fault tolerance (ULFM, User-Level Failure Mitigation) is on: an operation that
needs one raises an error instead of waiting for ever. A rank that sees one revokes every communicator that it is in, so
that whoever waits for it there is woken, too, and by induction all. The survivors then shrink their world
(`World.shrink`) and make all other communicators anew. MPICH has the same functions, but they do nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nettorrent_mpi.comm import library
from nettorrent_mpi.comm.library import MPI
from nettorrent_mpi.plan.errors import CommunicationError, LostRanksError

if TYPE_CHECKING:
    from nettorrent_mpi.comm.group import Group

TOLERANT = "OMPI_MCA_mpi_ft_enable"  # set for the ranks by mpirun --with-ft ulfm
ENDING = 1.0  # seconds that requests of a revoked communicator have to end; they took 15 ms at most
_LEFT: list[MPI.Request] = []  # requests that did not: MPI may still write to their buffers


def survivable() -> bool:
    """Whether MPI lets the other ranks go on when one is lost: Open MPI's, started by `mpirun --with-ft ulfm`."""
    if not library.loaded() or os.environ.get(TOLERANT, "").lower() not in ("1", "true"):
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
        classes = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)
        return error.Get_error_class() in classes or group.is_broken
    return isinstance(error, CommunicationError) and group.is_broken


def drop(requests: Sequence[MPI.Request]) -> None:
    """Give up requests of revoked communicators: MPI ends them with an error. One that does not end stays with its
    buffer for ever."""
    left, until = list(requests), time.monotonic() + ENDING
    while left and time.monotonic() < until:
        left = [request for request in left if not _ended(request)]
    _LEFT.extend(left)


def _ended(request: MPI.Request) -> bool:
    if not request:  # it was freed
        return True
    try:
        if not request.Test():
            return False
    except MPI.Exception:
        pass  # it has ended all the same
    if isinstance(request, MPI.Prequest):
        request.Free()
    return True
