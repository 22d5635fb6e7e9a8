"""Channels carry a device's arrays among the members of a group: collective operations, and messages in launches.

There are three kinds with one interface. On CPUs, MPI reads and writes the arrays where they lie. Between GPUs, NCCL
does, as work of the device's present stream. Where NCCL cannot (two ranks on one GPU), arrays are staged: copied to
pinned host memory, exchanged by MPI, and copied back (staged_channel.py).

Arrays are C-contiguous. All members call the same operations in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from nettorrent_mpi.comm import nccl
from nettorrent_mpi.comm.group import Group, trade
from nettorrent_mpi.device.arrays import Array, is_bfloat16
from nettorrent_mpi.device.ops import Ops

TAG = 32000  # of the messages of channels; no others in their groups have it


class Carrier(Protocol):
    """A Carrier is what a channel needs of its device; staging and NCCL also need `runtime` and `stream` of a GPU."""

    @property
    def ops(self) -> Ops:
        """Return the operations, by name."""


class Message(NamedTuple):
    """A Message is one array of a launch, sent to or received from the member `peer` of a channel's group."""

    channel: Channel
    sending: bool
    array: Array
    peer: int


class Channel(ABC):
    """A Channel connects the members of a group. In a group of one, operations at most copy.

    `capturable`: operations can be captured in a graph. `equal_parts`: reduce_scatter and all_gather take equal parts
    only.
    """

    capturable = False
    equal_parts = True

    def __init__(self, device: Carrier, group: Group):
        self.group, self._device = group, device

    def all_reduce(self, values: Array) -> None:
        """All-reduce to the sum, in place; every member gets bitwise the same sums."""
        if self.group.size > 1 and values.size:
            self._all_reduce(values)

    def reduce_scatter(self, values: Array, part: Array, counts: Sequence[int] | None = None) -> None:
        """Reduce-scatter: part <- this member's part of the sum of everyone's `values`, both flat. Parts are equal, or
        member i's has counts[i]. `part` may be its section of `values` where parts have to be equal."""
        assert counts is None or not self.equal_parts or len(set(counts)) == 1, counts
        if self.group.size == 1:
            self._copy(part, values)
        elif values.size:
            self._reduce_scatter(values, part, counts or [part.size] * self.group.size)

    def all_gather(self, part: Array, whole: Array, counts: Sequence[int] | None = None) -> None:
        """All-gather: whole <- everyone's parts one after another, both flat. `part` may be its section of `whole`."""
        assert counts is None or not self.equal_parts or len(set(counts)) == 1, counts
        if self.group.size == 1:
            self._copy(whole, part)
        elif whole.size:
            self._all_gather(part, whole, counts or [part.size] * self.group.size)

    def broadcast(self, values: Array, source: int) -> None:
        """Broadcast from member `source`, in place."""
        if self.group.size > 1 and values.size:
            self._broadcast(values, source)

    def exchange(self, sends: Sequence[tuple[Array, int]], receives: Sequence[tuple[Array, int]]) -> None:
        """Launch messages of this channel alone: sends are (array, to), receives (array, source)."""
        messages = [Message(self, True, *send) for send in sends]
        launch(messages + [Message(self, False, *receive) for receive in receives])

    @classmethod
    @abstractmethod
    def carry(cls, messages: Sequence[Message]) -> None:
        """Launch these messages, none of them empty, on channels of this kind."""

    def close(self) -> None:  # noqa: B027
        """Free what the channel made. All members call when nothing is in flight."""

    def abort(self) -> None:  # noqa: B027
        """End what waits for members that will not come, where the device waits and not the host."""

    def check(self) -> None:  # noqa: B027
        """Raise an error if an operation that was launched has failed."""

    def _copy(self, out: Array, x: Array) -> None:
        if out is not x:
            self._device.ops.copy(out, x)

    @abstractmethod
    def _all_reduce(self, values: Array) -> None: ...

    @abstractmethod
    def _reduce_scatter(self, values: Array, part: Array, counts: Sequence[int]) -> None: ...

    @abstractmethod
    def _all_gather(self, part: Array, whole: Array, counts: Sequence[int]) -> None: ...

    @abstractmethod
    def _broadcast(self, values: Array, source: int) -> None: ...


def launch(messages: Sequence[Message]) -> None:
    """Launch messages of a device's channels, which are all of one kind. Those of one channel wait for their partners
    together, so that they cannot wait for each other; a channel that is named later may have to wait for one that is
    named earlier.

    Between two members of a channel arrays arrive in the order in which they are sent.
    """
    filled = [message for message in messages if message.array.size]
    if filled:
        kind = type(filled[0].channel)
        assert all(type(message.channel) is kind for message in filled), "messages of several kinds of channels"
        kind.carry(filled)


class MpiChannel(Channel):
    """An MpiChannel carries arrays in the host's memory: MPI works on them in place, and has completed when an
    operation returns. bfloat16, which MPI has not got, is summed in float32 and rounded once."""

    equal_parts = False

    def __init__(self, device: Carrier, group: Group):
        super().__init__(device, group)
        self._memory: dict[str, Array] = {}

    @classmethod
    def carry(cls, messages: Sequence[Message]) -> None:
        trade([(m.channel.group, m.array, m.peer, m.sending) for m in messages], TAG)

    def _all_reduce(self, values: Array) -> None:
        summable = self._summable(values, "sum")
        self.group.all_reduce(summable)
        if summable is not values:
            np.copyto(values, summable, casting="unsafe")

    def _reduce_scatter(self, values: Array, part: Array, counts: Sequence[int]) -> None:
        summed = self._summable(part, "part")
        self.group.reduce_scatter(self._summable(values, "values"), summed, counts)
        if summed is not part:
            np.copyto(part, summed, casting="unsafe")

    def _all_gather(self, part: Array, whole: Array, counts: Sequence[int]) -> None:
        if is_bfloat16(whole):
            counts = [count * whole.itemsize for count in counts]
            part, whole = (array.reshape(-1).view(np.uint8) for array in (part, whole))
        self.group.all_gather(part, whole, counts)

    def _summable(self, values: Array, name: str) -> Array:
        """Return the array, or a copy in float32 where it is of a type that MPI cannot add up."""
        if not is_bfloat16(values):
            return values
        memory = self._memory.get(name)
        if memory is None or memory.size < values.size:
            memory = self._memory[name] = np.empty(values.size, np.float32)
        wide = memory[: values.size].reshape(values.shape)
        np.copyto(wide, values)
        return wide

    def _broadcast(self, values: Array, source: int) -> None:
        self.group.broadcast(values, source)


class NcclChannel(Channel):
    """An NcclChannel carries arrays of GPUs: NCCL's operations are work of the device's present stream."""

    capturable = True

    def __init__(self, device: Any, group: Group, library: Any, identity: bytes):
        super().__init__(device, group)
        self._library = library
        self._nccl: nccl.Communicator | None = None
        if group.size > 1:
            self._nccl = nccl.Communicator(library, group, identity, device.runtime.address)

    @property
    def _communicator(self) -> nccl.Communicator:
        assert self._nccl is not None, "a channel is used after it was closed or aborted"
        return self._nccl

    @property
    def _stream(self) -> int:
        handle: int = self._device.stream.handle  # type: ignore[attr-defined]
        return handle

    @classmethod
    def carry(cls, messages: Sequence[Message]) -> None:
        # One launch for each channel: NCCL would launch a kernel for each all the same, one after the other on the
        # stream, but in an order of its own (doLaunches and ncclGroupCommJoin in NCCL 2.30's sources).
        for channel in dict.fromkeys(message.channel for message in messages):
            assert isinstance(channel, NcclChannel)
            communicator, stream = channel._communicator, channel._stream
            with nccl.one_launch(channel._library):
                for _, sending, array, peer in (message for message in messages if message.channel is channel):
                    assert array.flags.c_contiguous
                    act = communicator.send if sending else communicator.receive
                    act(array, peer, stream)

    def close(self) -> None:
        if self._nccl is not None:
            self._nccl.close()
        self._nccl = None

    def abort(self) -> None:
        if self._nccl is not None:
            self._nccl.abort()
        self._nccl = None

    def check(self) -> None:
        if self._nccl is not None:
            self._nccl.check()

    def _all_reduce(self, values: Array) -> None:
        self._communicator.all_reduce(values, self._stream)

    def _reduce_scatter(self, values: Array, part: Array, counts: Sequence[int]) -> None:
        self._communicator.reduce_scatter(values, part, self._stream)

    def _all_gather(self, part: Array, whole: Array, counts: Sequence[int]) -> None:
        self._communicator.all_gather(part, whole, self._stream)

    def _broadcast(self, values: Array, source: int) -> None:
        self._communicator.broadcast(values, source, self._stream)
