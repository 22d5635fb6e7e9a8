"""A link between buddies carries arrays around a permutation of a group's members while they compute."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from nettorrent_mpi.comm.group import Group, chunks
from nettorrent_mpi.comm.library import MPI
from nettorrent_mpi.comm.requests import Requests, drop
from nettorrent_mpi.device.arrays import Array


class BuddyLink:
    """A BuddyLink sends one of `sent` to member `to`, and receives one of `received` from member `source`; then it
    tells when that is so for all members. Requests are persistent.

    All members make one and start it equally often, each time with the same number. Nobody waits unless asked to.
    """

    def __init__(
        self, group: Group, to: int, source: int, sent: Sequence[Array], received: Sequence[Array], tag: int
    ) -> None:
        self._group = group
        self._requests: list[Requests[MPI.Prequest]] = []
        for mine, theirs in zip(sent, received, strict=True):
            into, out = (chunks(theirs), chunks(mine)) if group.size > 1 else ([], [])
            receives = [group.comm.Recv_init(chunk, source, tag) for chunk in into]
            self._requests.append(Requests([*receives, *(group.comm.Send_init(chunk, to, tag) for chunk in out)]))
        self._moving: Requests[MPI.Prequest] = Requests()
        self._barrier: MPI.Request | None = None
        self.arrived = self.complete = True  # what was started last has come here; and to all members
        self._failed = False  # requests that have failed are inactive, and look like those that have succeeded

    def start(self, number: int) -> None:
        """Begin to send and receive the arrays of this number. What was started before is complete."""
        assert self.complete
        self.arrived = self.complete = False
        self._moving = self._requests[number]
        self._moving.start()

    def progress(self) -> None:
        """Let messages move, without waiting."""
        if not self.arrived and self._come(wait=False):
            self._arrive()
        if self._barrier is not None and self._barrier.Test():
            self._barrier, self.complete = None, True

    def finish(self) -> None:
        """Wait until all members have what was started last."""
        if not self.arrived:
            self._come(wait=True)
            self._arrive()
        if self._barrier is not None:
            self._barrier.Wait()
            self._barrier, self.complete = None, True

    def _come(self, *, wait: bool) -> bool:
        """Return whether all messages have been sent and received."""
        try:
            if wait:
                self._moving.wait()
            return self._moving.test() and not self._failed
        except MPI.Exception:
            self._failed = True
            raise

    def _arrive(self) -> None:
        self.arrived = True
        if self._group.size == 1:
            self.complete = True
        else:
            self._barrier = self._group.comm.Ibarrier()

    def abandon(self) -> None:
        """Give up what is under way: members are lost, and the communicator is revoked. `arrived` stays true."""
        if not self.arrived:
            with suppress(MPI.Exception):
                self.arrived = self._come(wait=False)
        requests: list[MPI.Request] = [request for requests in self._requests for request in requests.each]
        drop(requests if self._barrier is None else [*requests, self._barrier])
        self._requests.clear()
        self._moving, self._barrier = Requests(), None

    def free(self) -> None:
        """Free the requests. All members call, when what was started last is complete."""
        assert self.complete
        for requests in self._requests:
            requests.free()
        self._requests.clear()
