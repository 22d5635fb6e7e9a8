"""Staged channels carry a GPU's arrays where NCCL cannot (two ranks on one GPU): they copy them to pinned host memory,
exchange them by MPI, and copy them back. The host waits for the stream, so nothing of it can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from nettorrent_mpi.comm.channels import TAG, Channel, Message
from nettorrent_mpi.comm.group import LARGEST_MESSAGE, Group, trade
from nettorrent_mpi.device.arrays import Array, DType


class PinnedMemory:
    """A PinnedMemory is host memory through which the staged channels of a device copy its arrays. It grows to the
    largest launch.

    The stream may still read it when an operation returns: the host may write to it only after `wait`.
    """

    def __init__(self, device: Any):
        self._device = device
        self._stream = device.stream  # which last copied
        self._memory = np.empty(0, np.uint8)

    def take(self, shape: Sequence[int], dtype: DType) -> Array:
        """Return memory that is valid until the next call. Work of the present stream may use it at once."""
        size = prod(shape) * np.dtype(dtype).itemsize
        if size > self._memory.size or self._stream is not self._device.stream:
            self.wait()
        if size > self._memory.size:
            self._memory = self._device.runtime.pinned(size)
        self._stream = self._device.stream
        return self._memory[:size].view(dtype).reshape(shape)

    def copy(self, out: Array, source: Array) -> None:
        """out <- source, one of them in this memory, as work of the present stream."""
        self._device.runtime.copy(self._stream, out, source)

    def wait(self) -> None:
        """Wait until the stream has done its work."""
        self._stream.synchronize()


class StagedChannel(Channel):
    """A StagedChannel copies arrays of GPUs to pinned memory and back; MPI carries them in between, at most `largest`
    bytes at once.

    bfloat16, which MPI has not got, is summed in float32 and rounded once.
    """

    largest = LARGEST_MESSAGE

    def __init__(self, device: Any, group: Group, pinned: PinnedMemory):
        super().__init__(device, group)
        self._pinned = pinned

    @classmethod
    def carry(cls, messages: Sequence[Message]) -> None:
        first = messages[0].channel
        assert isinstance(first, StagedChannel)
        pinned = first._pinned
        starts = np.cumsum([0, *(-(-m.array.nbytes // 64) * 64 for m in messages)])
        memory = pinned.take((int(starts[-1]),), np.uint8)
        hosts = [memory[a : a + m.array.nbytes] for a, m in zip(starts, messages, strict=False)]
        for message, host in zip(messages, hosts, strict=True):
            assert message.array.flags.c_contiguous
            if message.sending:
                pinned.copy(host, message.array)
        pinned.wait()
        trade([(m.channel.group, host, m.peer, m.sending) for m, host in zip(messages, hosts, strict=True)], TAG)
        for message, host in zip(messages, hosts, strict=True):
            if not message.sending:
                pinned.copy(message.array, host)

    def _all_reduce(self, values: Array) -> None:
        flat = values.reshape(-1)
        for piece in self._pieces(flat.size, flat.dtype, 1):
            host = self._pinned.take((piece.stop - piece.start,), flat.dtype)
            self._pinned.copy(host, flat[piece])
            self._pinned.wait()
            wide = _summable(host)
            self.group.all_reduce(wide)
            if wide is not host:
                np.copyto(host, wide, casting="unsafe")
            self._pinned.copy(flat[piece], host)

    def _reduce_scatter(self, values: Array, part: Array, counts: Sequence[int]) -> None:
        members, count = self.group.size, part.size
        for piece in self._pieces(count, part.dtype, members):
            length = piece.stop - piece.start
            host = self._pinned.take((members + 1, length), part.dtype)
            for member in range(members):
                self._pinned.copy(host[member], values[member * count :][piece])
            self._pinned.wait()
            wide = _summable(host)
            self.group.reduce_scatter(wide[:members], wide[members], [length] * members)
            if wide is not host:
                np.copyto(host[members], wide[members], casting="unsafe")
            self._pinned.copy(part[piece], host[members])

    def _all_gather(self, part: Array, whole: Array, counts: Sequence[int]) -> None:
        members, count = self.group.size, part.size
        for piece in self._pieces(count, part.dtype, members):
            length = piece.stop - piece.start
            host = self._pinned.take((members, length), part.dtype)
            self._pinned.copy(host[self.group.index], part[piece])
            self._pinned.wait()
            sent = host.reshape(-1).view(np.uint8)
            each = sent.size // members
            self.group.all_gather(sent[each * self.group.index :][:each], sent, [each] * members)
            for member in range(members):
                self._pinned.copy(whole[member * count :][piece], host[member])

    def _broadcast(self, values: Array, source: int) -> None:
        flat = values.reshape(-1)
        for piece in self._pieces(flat.size, flat.dtype, 1):
            host = self._pinned.take((piece.stop - piece.start,), flat.dtype)
            if self.group.index == source:
                self._pinned.copy(host, flat[piece])
            self._pinned.wait()
            self.group.broadcast(host, source)
            if self.group.index != source:
                self._pinned.copy(flat[piece], host)

    def _pieces(self, count: int, dtype: np.dtype[Any], parts: int) -> Iterator[slice]:
        """Cut `count` elements so that `parts` times a piece is not larger than allowed."""
        most = max(self.largest // (dtype.itemsize * parts), 1)
        for start in range(0, count, most):
            yield slice(start, min(start + most, count))


def _summable(host: Array) -> Array:
    """Return the array, or a float32 copy of one of a type that MPI cannot add up."""
    return host.astype(np.float32) if host.dtype.name == "bfloat16" else host
