"""Mail carries messages between the members of a group without anyone waiting for them.

A message is sent in MPI's synchronous mode (Issend): it is in flight until its receiver has begun to receive it. So a
sender knows which members lag behind, and never has more than one message in flight to each; nothing accumulates in
MPI's memory at a stalled member. Receives for any sender are posted in advance. Messages of one sender arrive in order.

MPI knows host memory only. What a GPU writes or reads is copied there and back by its envelopes, beside compute: a
message leaves when its copy is complete, and a receive is posted anew when the message before it has been copied.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nettorrent_mpi.comm.failures import lost
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.library import MPI
from nettorrent_mpi.comm.requests import drop
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device, Envelope
from nettorrent_mpi.plan.gossip_rules import SPARE

HEADER = 8  # numbers (float64) at the head of every message
_HEAD = 8 * HEADER  # bytes


class Letter:
    """A Letter is a buffer for one message: `head`, HEADER numbers, and `body`, the bytes after them, on the device."""

    def __init__(self, envelope: Envelope, size: int):
        self.envelope = envelope
        self.head: Array = envelope.whole[:_HEAD].view(np.float64)
        self.length = size  # bytes of the body that are sent, or have arrived
        self.sealed = False  # written: its body is in host memory, or on its way there
        self.under_way = 0  # sends that are not finished

    @property
    def body(self) -> Array:
        """Return the body, for operations of the device that are called from now on."""
        return self.envelope.body


class Arrived(NamedTuple):
    """An Arrived is a received message and its sender. Return the letter with `Mail.release`."""

    source: int
    letter: Letter
    when: float  # time.perf_counter() when it was noticed


class Mail:
    """A Mail is the mailbox of one member, for bodies on its device. `size` is the largest body in bytes; `receives`
    messages can arrive before one is read."""

    def __init__(self, group: Group, device: Device, size: int, receives: int, tag: int):
        assert _HEAD + size < 1 << 31, "larger messages than MPI counts; send parts"
        self.group, self.size, self._device, self._tag = group, size, device, tag
        self.sent: list[int] = [0] * group.size  # messages to each member so far
        self.received: list[int] = [0] * group.size  # messages from each member
        self.bytes = 0  # sent so far
        self.broken = False  # members are lost: nothing is sent or received any more
        self._free = [self._make() for _ in range(SPARE)]
        self._leaving: dict[int, Letter] = {}  # until their copies are complete
        self._sending: dict[int, tuple[MPI.Request, Letter]] = {}
        self._posted: list[tuple[MPI.Prequest, Letter]] = []
        self._returning: list[tuple[MPI.Prequest, Letter]] = []  # read, but not yet copied
        self._made: dict[int, MPI.Prequest] = {}
        self._arrived: list[Arrived] = []
        self._status = MPI.Status()
        for _ in range(receives):
            letter = self._make()
            request = group.comm.Recv_init(letter.envelope.whole, MPI.ANY_SOURCE, tag)
            self._made[id(letter)] = request
            request.Start()
            self._posted.append((request, letter))

    def _make(self) -> Letter:
        return Letter(self._device.envelope(_HEAD, self.size), self.size)

    def letter(self) -> Letter:
        """Return a buffer to fill, whose sends have all finished."""
        return self._take_free() or self._find_free() or self._make()

    def _find_free(self) -> Letter | None:
        self._poll()  # sends may have finished
        return self._take_free()

    def _take_free(self) -> Letter | None:
        for i, letter in enumerate(self._free):
            if not letter.under_way:
                letter.sealed = False
                return self._free.pop(i)
        return None

    def put_back(self, letter: Letter) -> None:
        """Return an own letter; its buffer is reused once its sends are finished."""
        letter.envelope.drop()
        self._free.append(letter)

    def can_send(self, to: int) -> bool:
        """Whether the last message to this member has been received."""
        if to in self._sending or to in self._leaving:
            self._poll()
        return self.broken or (to not in self._sending and to not in self._leaving)

    def send(self, letter: Letter, to: int) -> None:
        """Start to send; the letter may not be changed until it is handed out again. Requires `can_send`."""
        if self.broken:
            return
        assert to not in self._sending
        assert to not in self._leaving
        if not letter.sealed:
            letter.envelope.collect(letter.length)
            letter.sealed = True
        self._leaving[to] = letter
        letter.under_way += 1
        self.sent[to] += 1
        self.bytes += _HEAD + letter.length
        self._attempt(self._leave)

    def _leave(self) -> None:
        """Send what has been copied to host memory."""
        for to, letter in list(self._leaving.items()):
            if letter.envelope.done():
                message = letter.envelope.whole[: _HEAD + letter.length]
                self._sending[to] = (self.group.comm.Issend(message, to, self._tag), letter)
                del self._leaving[to]

    def see_off(self) -> None:
        """Wait until all messages have left. Peers that wait for one without a deadline would otherwise wait while this
        member does something else: for ever, if that waits for them."""
        while self._leaving:
            self._poll()
            os.sched_yield()

    def progress(self) -> None:
        """Let messages progress by one nonblocking call into MPI, during compute."""
        if self._leaving:
            self._attempt(self._leave)
        if self._returning:
            self._attempt(self._return)
        if self._posted:
            self._attempt(self._look_first)

    def _attempt(self, act: Callable[[], None]) -> None:
        """Do something with MPI, unless members of the group are lost."""
        try:
            if not self.broken:
                act()
        except Exception as error:
            if not lost(error, self.group):
                raise
            self.broken = True
            self._leaving.clear()

    def _look_first(self) -> None:
        if self._posted:
            self._look(self._posted[0])

    def _look(self, posted: tuple[MPI.Prequest, Letter]) -> None:
        request, letter = posted
        if request.Test(self._status):
            self._posted.remove(posted)
            source = self._status.Get_source()
            letter.length = self._status.Get_count(MPI.BYTE) - _HEAD
            self.received[source] += 1
            letter.envelope.deliver(letter.length)
            self._arrived.append(Arrived(source, letter, time.perf_counter()))

    def _poll(self) -> None:
        """Register what has arrived and which sends are complete."""
        self._attempt(self._poll_all)

    def _poll_all(self) -> None:
        if self._leaving:
            self._leave()
        if self._returning:
            self._return()
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
        arrived.letter.envelope.drop()
        request = self._made.get(id(arrived.letter))
        if request is not None:  # not a copy of `aside`
            self._returning.append((request, arrived.letter))
            self._attempt(self._return)

    def _return(self) -> None:
        """Post receives into the buffers of messages that were read and have been copied."""
        while self._returning and self._returning[0][1].envelope.done():
            request, letter = self._returning.pop(0)
            request.Start()
            self._posted.append((request, letter))

    def aside(self, arrived: Arrived) -> Arrived:
        """Copy the message to memory of its own; its buffer waits for another one."""
        if id(arrived.letter) not in self._made:
            return arrived
        size = arrived.letter.length
        copy = Letter(arrived.letter.envelope.aside(size), size)
        self.release(arrived)
        return arrived._replace(letter=copy)

    @property
    def is_full(self) -> bool:
        """Whether all senders have to wait until a message is released."""
        return not self._posted and not self._returning

    def settle(self) -> list[Arrived]:
        """Wait until every message that any member sent has arrived; return those that were not read yet. All members
        call and leave together.

        More can arrive than receives are posted: messages are copied aside, so that their buffers receive the others.
        """
        told = np.array(self.sent, np.int64)
        expected = np.empty_like(told)
        self._attempt(lambda: self.group.comm.Alltoall(told, expected))
        kept: list[Arrived] = []
        while not self.broken:
            kept += [self.aside(arrived) for arrived in self.take()]
            flying = self._leaving or self._sending
            if not flying and all(a >= b for a, b in zip(self.received, expected, strict=True)):
                break
            os.sched_yield()
        self._attempt(self.group.barrier)  # or what a faster member sends afterwards could arrive here, too
        return kept

    def abandon(self) -> None:
        """Give up the requests; the group was revoked."""
        drop([*self._made.values(), *(request for request, _ in self._sending.values())])

    def close(self) -> None:
        """Free the requests. All members call, after `settle`; once the last one has, another mailbox may use the
        tag."""
        assert not self._sending
        assert not self._leaving
        self._device.synchronize()  # or what is being copied would lose its memory
        for request, _ in self._posted:
            request.Cancel()
            request.Wait()
        for request in self._made.values():
            request.Free()
        self._posted.clear()
        self._returning.clear()
        self._made.clear()
        self.group.barrier()  # or a message for the other mailbox could match a receive of this one


class Pending:
    """A Pending is a nonblocking all-reduce (Iallreduce): all members start it in the same order, and wait for it
    later."""

    def __init__(self, group: Group, values: Sequence[float] | Array):
        self._sums = np.array(values, np.float64)
        self.ranks = group.ranks  # it waits for them
        self._request = group.comm.Iallreduce(MPI.IN_PLACE, self._sums) if group.size > 1 else None

    def done(self) -> bool:
        """Whether the sums are complete. Does not wait."""
        if self._request is not None and self._request.Test():
            self._request = None
        return self._request is None

    def abandon(self) -> None:
        """Give up the sums; the group was revoked."""
        if self._request is not None:
            drop([self._request])

    def sums(self) -> Array:
        """Wait for the sums and return them."""
        if self._request is not None:
            self._request.Wait()
            self._request = None
        return self._sums
