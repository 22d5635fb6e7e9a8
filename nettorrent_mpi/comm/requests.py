"""Requests are waited for together, or given up because their communicator was revoked."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.comm.library import MPI

Kind = TypeVar("Kind", bound="MPI.Request")
ENDING = 1.0  # seconds that requests of a revoked communicator have to end; they took 15 ms at most
_LEFT: list[MPI.Request] = []  # requests that did not: MPI may still write to their buffers


class Requests(Generic[Kind]):
    """Requests are waited for together. Where some fail, the error of one is raised: MPI itself says only that some
    did, and has the errors in their statuses."""

    def __init__(self, each: Iterable[Kind] = ()):
        self.each: list[Kind] = list(each)
        self._statuses = [MPI.Status() for _ in self.each]

    def start(self: Requests[MPI.Prequest]) -> None:
        """Start all, which are persistent."""
        if self.each:
            MPI.Prequest.Startall(self.each)

    def wait(self) -> None:
        """Wait for all, or until one fails."""
        if self.each:
            try:
                with NOW.waiting:
                    MPI.Request.Waitall(self.each, self._statuses)
            except MPI.Exception as error:
                raise self._failure(error) from None

    def test(self) -> bool:
        """Whether all are complete. Does not wait."""
        try:
            return not self.each or MPI.Request.Testall(self.each, self._statuses)
        except MPI.Exception as error:
            raise self._failure(error) from None

    def _failure(self, error: MPI.Exception) -> MPI.Exception:
        if error.Get_error_class() != MPI.ERR_IN_STATUS:
            return error
        found = [MPI.Exception(code) for code in (status.Get_error() for status in self._statuses) if code]
        found = [each for each in found if each.Get_error_class() != MPI.ERR_PENDING]  # these have not failed
        return min(found, key=lambda each: each.Get_error_class() not in losses(), default=error)

    def drop(self) -> None:
        """Give all up; their communicator was revoked."""
        drop(self.each)

    def free(self) -> None:
        """Free all, which are persistent and not under way."""
        for request in self.each:
            request.Free()
        self.each.clear()
        self._statuses.clear()


def losses() -> tuple[int, ...]:
    """Return the classes of the errors by which MPI says that ranks are lost."""
    return MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED


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
