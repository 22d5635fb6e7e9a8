"""Transfers move one micro-batch's array between two teams by point-to-point messages.

Requests are persistent: made once per buffer, started and completed every step. A part of an array that is not
contiguous in memory, or that is added to others (partial gradients), goes through a staging buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nettorrent_mpi.comm.group import Group, chunks
from nettorrent_mpi.comm.library import MPI
from nettorrent_mpi.comm.requests import Requests
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.blocks import Span


class Part(NamedTuple):
    """A Part is one message of a transfer: rows and features (of the last axis), local to the array, and the other
    rank."""

    peer: int
    rows: Span
    features: Span
    add: bool = False  # receiving: add to earlier parts instead of overwriting


class Transfer:
    """A Transfer has all messages of one array, on one side. `start` and `finish` are called in turn; neither allocates
    arrays."""

    def __init__(self, group: Group, array: Array, parts: Sequence[Part], tag: int, *, sending: bool):
        self.array = array
        self.ranks = tuple(sorted({group.ranks[part.peer] for part in parts}))  # it waits for them
        self._sending = sending
        self._staged: list[tuple[Array, Array, bool]] = []
        requests: list[MPI.Prequest] = []
        make = group.comm.Send_init if sending else group.comm.Recv_init
        for part in parts:
            view = array[slice(*part.rows), ..., slice(*part.features)]
            if view.size == 0:
                continue
            if part.add or not view.flags.c_contiguous:
                staging = np.empty(view.shape, view.dtype)
                self._staged.append((view, staging, part.add))
                view = staging
            requests += [make(chunk, part.peer, tag) for chunk in chunks(view)]
        self._requests = Requests(requests)
        self._active = False

    def start(self) -> None:
        """Start to send the array's present contents, or to receive into it. Does not wait."""
        assert not self._active, "a transfer is started again before it finished"
        self._active = True
        if self._sending:
            for view, staging, _ in self._staged:
                np.copyto(staging, view)
        self._requests.start()

    def finish(self) -> None:
        """Wait until the array may be used again (sending) or has been received. Returns at once if not started."""
        if not self._active:
            return
        self._active = False
        self._requests.wait()
        if not self._sending:
            for view, staging, add in self._staged:
                if add:
                    np.add(view, staging, out=view)
                else:
                    np.copyto(view, staging)

    def abandon(self) -> None:
        """Give up the requests; their group was revoked."""
        self._requests.drop()

    def free(self) -> None:
        """Free the requests."""
        assert not self._active
        self._requests.free()
