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
from nettorrent_mpi.device.arrays import Array, is_bfloat16
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
        self._copied: list[tuple[Array, Array]] = []
        self._added: list[tuple[Array, Array]] = []
        # Where bfloat16 numbers are added: their sum, which is rounded once.
        adds = is_bfloat16(array) and any(part.add for part in parts)
        self._total: Array | None = np.empty(array.shape, np.float32) if adds else None
        requests: list[MPI.Prequest] = []
        make = group.comm.Send_init if sending else group.comm.Recv_init
        for part in parts:
            place = (slice(*part.rows), ..., slice(*part.features))
            view = array[place]
            if view.size == 0:
                continue
            if part.add or not view.flags.c_contiguous:
                staging = np.empty(view.shape, view.dtype)
                if part.add:
                    self._added.append((view if self._total is None else self._total[place], staging))
                else:
                    self._copied.append((view, staging))
                view = staging
            requests += [make(chunk, part.peer, tag) for chunk in chunks(view)]
        self._requests = Requests(requests)
        self._active = False

    def start(self) -> None:
        """Start to send the array's present contents, or to receive into it. Does not wait."""
        assert not self._active, "a transfer is started again before it finished"
        self._active = True
        if self._sending:
            for view, staging in self._copied:
                np.copyto(staging, view)
        self._requests.start()

    def finish(self) -> None:
        """Wait until the array may be used again (sending) or has been received. Returns at once if not started."""
        if not self._active:
            return
        self._active = False
        self._requests.wait()
        if not self._sending:
            for view, staging in self._copied:
                np.copyto(view, staging)
            if self._total is not None:
                np.copyto(self._total, self.array)
            for view, staging in self._added:
                np.add(view, staging, out=view)
            if self._total is not None:
                np.copyto(self.array, self._total, casting="unsafe")

    def abandon(self) -> None:
        """Give up the requests; their group was revoked."""
        self._requests.drop()

    def free(self) -> None:
        """Free the requests."""
        assert not self._active
        self._requests.free()
