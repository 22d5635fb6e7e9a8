"""Mail carries messages between the members of a group without anyone waiting for them.

A message is sent in MPI's synchronous mode (Issend): it is in flight until its receiver has begun to receive it. So a
sender knows which members lag behind, and never has more than one message in flight to each; nothing accumulates in
MPI's memory at a stalled member. Receives for any sender are posted in advance. Messages of one sender arrive in order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.library import MPI
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.gossip_rules import SPARE

HEADER = 8  # numbers (float64) at the head of every message
_HEAD = 8 * HEADER  # bytes


class Letter:
    """A buffer for one message: `head`, HEADER numbers, and `body`, the bytes after them."""

    def __init__(self, size: int):
        memory = np.zeros(_HEAD + size + 64, np.uint8)
        start = -memory.ctypes.data % 64
        self.whole: Array = memory[start : start + _HEAD + size]
        self.head: Array = self.whole[:_HEAD].view(np.float64)
        self.body: Array = self.whole[_HEAD:]
        self.length = size  # bytes of the body that are sent, or have arrived
        self.under_way = 0  # sends that are not finished


class Arrived(NamedTuple):
    """A received message and its sender. Return the letter with `Mail.release`."""

    source: int
    letter: Letter
    when: float  # time.perf_counter() when it was noticed


class Mail:
    """The mailbox of one member. `size` is the largest body in bytes; `receives` messages can arrive before one is
    read."""

    def __init__(self, group: Group, size: int, receives: int, tag: int):
        assert _HEAD + size < 1 << 31, "larger messages than MPI counts; send parts"
        self.group, self.size, self._tag = group, size, tag
        self.sent: list[int] = [0] * group.size  # messages to each member so far
        self.received: list[int] = [0] * group.size  # messages from each member
        self.bytes = 0  # sent so far
        self._free = [Letter(size) for _ in range(SPARE)]
        self._sending: dict[int, tuple[MPI.Request, Letter]] = {}
        self._posted: list[tuple[MPI.Prequest, Letter]] = []
        self._made: dict[int, MPI.Prequest] = {}
        self._arrived: list[Arrived] = []
        self._status = MPI.Status()
        for _ in range(receives):
            letter = Letter(size)
            request = group.comm.Recv_init(letter.whole, MPI.ANY_SOURCE, tag)
            self._made[id(letter)] = request
            request.Start()
            self._posted.append((request, letter))

    def letter(self) -> Letter:
        """Return a buffer to fill, whose sends have all finished."""
        self._poll()
        for i, letter in enumerate(self._free):
            if not letter.under_way:
                return self._free.pop(i)
        return Letter(self.size)

    def put_back(self, letter: Letter) -> None:
        """Return an own letter; its buffer is reused once its sends are finished."""
        self._free.append(letter)

    def can_send(self, to: int) -> bool:
        """Whether the last message to this member has been received."""
        if to in self._sending:
            self._poll()
        return to not in self._sending

    def send(self, letter: Letter, to: int) -> None:
        """Start to send; the letter may not be changed until it is handed out again. Requires `can_send`."""
        assert to not in self._sending
        message = letter.whole[: _HEAD + letter.length]
        self._sending[to] = (self.group.comm.Issend(message, to, self._tag), letter)
        letter.under_way += 1
        self.sent[to] += 1
        self.bytes += message.nbytes

    def progress(self) -> None:
        """Let messages progress by one nonblocking call into MPI, during compute."""
        if self._posted:
            self._look(self._posted[0])

    def _look(self, posted: tuple[MPI.Prequest, Letter]) -> None:
        request, letter = posted
        if request.Test(self._status):
            self._posted.remove(posted)
            source = self._status.Get_source()
            letter.length = self._status.Get_count(MPI.BYTE) - _HEAD
            self.received[source] += 1
            self._arrived.append(Arrived(source, letter, time.perf_counter()))

    def _poll(self) -> None:
        """Register what has arrived and which sends are complete."""
        for posted in tuple(self._posted):  # in the order of matching, so that one sender's messages keep theirs
            self._look(posted)
        done = [to for to, (request, _) in self._sending.items() if request.Test()]
        for to in done:
            self._sending.pop(to)[1].under_way -= 1

    def take(self) -> list[Arrived]:
        """Return the messages since the last call, in order of arrival."""
        self._poll()
        taken, self._arrived = self._arrived, []
        return taken

    def release(self, arrived: Arrived) -> None:
        """Return a message that was read: its buffer waits for another one."""
        request = self._made.get(id(arrived.letter))
        if request is not None:  # not a copy of `aside`
            request.Start()
            self._posted.append((request, arrived.letter))

    def aside(self, arrived: Arrived) -> Arrived:
        """Copy the message to memory of its own; its buffer waits for another one."""
        if id(arrived.letter) not in self._made:
            return arrived
        copy = Letter(arrived.letter.length)
        copy.whole[...] = arrived.letter.whole[: copy.whole.size]
        self.release(arrived)
        return arrived._replace(letter=copy)

    @property
    def is_full(self) -> bool:
        """Whether all senders have to wait until a message is released."""
        return not self._posted

    def settle(self) -> list[Arrived]:
        """Wait until every message that any member sent has arrived; return those that were not read yet. All members
        call and leave together.

        More can arrive than receives are posted: messages are copied aside, so that their buffers receive the others.
        """
        told = np.array(self.sent, np.int64)
        expected = np.empty_like(told)
        self.group.comm.Alltoall(told, expected)
        kept: list[Arrived] = []
        while True:
            kept += [self.aside(arrived) for arrived in self.take()]
            if not self._sending and all(a >= b for a, b in zip(self.received, expected, strict=True)):
                break
            os.sched_yield()
        self.group.barrier()  # or what a faster member sends afterwards could arrive here, too
        return kept

    def close(self) -> None:
        """Free the requests. All members call, after `settle`; once the last one has, another mailbox may use the
        tag."""
        assert not self._sending
        for request, _ in self._posted:
            request.Cancel()
            request.Wait()
        for request in self._made.values():
            request.Free()
        self._posted.clear()
        self._made.clear()
        self.group.barrier()  # or a message for the other mailbox could match a receive of this one


class Pending:
    """A nonblocking all-reduce (Iallreduce): started by all members in the same order, waited for later."""

    def __init__(self, group: Group, values: Sequence[float] | Array):
        self._sums = np.array(values, np.float64)
        self._request = group.comm.Iallreduce(MPI.IN_PLACE, self._sums) if group.size > 1 else None

    def done(self) -> bool:
        """Whether the sums are complete. Does not wait."""
        if self._request is not None and self._request.Test():
            self._request = None
        return self._request is None

    def sums(self) -> Array:
        """Wait for the sums and return them."""
        if self._request is not None:
            self._request.Wait()
            self._request = None
        return self._sums
